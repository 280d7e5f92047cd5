"""Holds a user to whom nothing is lent to reading (`elevation.default`), but for what it takes to ask and to approve.

It is a session's restriction that the session did not ask for: what the session gave up itself holds besides, and it
alone decides about asking, too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from arcbridge.agent.elevation.objects import API_GROUP, REQUESTS
from arcbridge.agent.restrictions.session_restrictions import SessionRestrictions
from arcbridge.refusals import RefusalRule
from arcbridge.wire.records import UNRESTRICTED

_WRITES = frozenset({("create", ""), ("patch", "status"), ("update", "status")})
"""Verb and subresource of what asks, approves, denies and withdraws."""


@dataclass(frozen=True)
class DefaultRestrictions(SessionRestrictions):
    """Reading alone, and what the session gave up itself."""

    own: SessionRestrictions | None = None
    may_ask: bool = True
    """Whether something can be lent to the session: not to a program that acts for the user, nor in token mode."""

    @classmethod
    def over(cls, own: SessionRestrictions | None, *, may_ask: bool = True) -> DefaultRestrictions:
        """Return the default of a session that gave up `own`."""
        record = replace(UNRESTRICTED if own is None else own.record, read_only=True)
        return cls(record, own=own, may_ask=may_ask)

    def rule_against(self, verb: str, group: str, resource: str, subresource: str, namespace: str) -> RefusalRule:
        """Return what forbids a verb on a resource, as `SessionRestrictions` does."""
        if (group, resource) == (API_GROUP, REQUESTS) and (verb, subresource) in _WRITES:
            own = self.own
            return RefusalRule.NONE if own is None else own.rule_against(verb, group, resource, subresource, namespace)
        return super().rule_against(verb, group, resource, subresource, namespace)

    def sentence(self, rule: RefusalRule) -> str:
        """Return what is left, and how to do more."""
        if rule is RefusalRule.RESTRICTED_READ_ONLY and not (self.own is not None and self.own.record.read_only):
            if not self.may_ask:
                return "here programs only read: nothing is lent to one that acts for a user or has a token of its own"
            if self.own is not None:
                return "here everyone only reads; to do more, use a session without restrictions, and ask there"
            return "here everyone only reads; to do more, ask for it: arcbridge elevate --for 30m --reason WHY"
        return super().sentence(rule)
