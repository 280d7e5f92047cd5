"""Decides which sessions are recorded: by user, group and namespace, required or as well as it goes.

It reads no request. Invariant: of several rules that apply the strictest counts, so that a rule that is added takes no
recording away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from arcbridge.identity.claims import Identity
from arcbridge.settings.config import RecordingRuleConfig


@dataclass(frozen=True, slots=True)
class Demand:
    """How a session is recorded."""

    required: bool
    """Whether it may not go on without."""
    typed_input: bool
    """Whether what the user types is recorded too."""


class RecordingRules:
    """The rules of one agent."""

    def __init__(self, rules: Mapping[str, RecordingRuleConfig]) -> None:
        self._rules = tuple(rules.values())

    def of(self, identities: Sequence[Identity], namespace: str | None) -> Demand | None:
        """Return how a session in a pod of `namespace` (None: of any) is recorded; None: it is not.

        `identities`: of the user, and the one of `--as` where there is one; a rule for either counts.
        """
        found = [rule for rule in self._rules if any(_is_for(rule, one, namespace) for one in identities)]
        if not found:
            return None
        return Demand(any(rule.required for rule in found), any(rule.typed_input for rule in found))


def _is_for(rule: RecordingRuleConfig, identity: Identity, namespace: str | None) -> bool:
    if namespace is not None and rule.namespaces and namespace not in rule.namespaces:
        return False
    everyone = not (rule.users or rule.groups)
    return everyone or identity.username in rule.users or not identity.groups_at_api_server.isdisjoint(rule.groups)
