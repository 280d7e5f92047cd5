"""Decides which sessions are recorded: by user, group and namespace, required or as well as it goes.

It reads no request. Invariant: of several rules that apply the strictest counts, so that a rule that is added takes no
recording away.
"""

from __future__ import annotations

from collections.abc import Mapping
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

    def of(self, identity: Identity, namespace: str | None) -> Demand | None:
        """Return how a session of this user in a pod of `namespace` (None: of any) is recorded; None: it is not."""
        found = [rule for rule in self._rules if _is_for(rule, identity, namespace)]
        if not found:
            return None
        return Demand(any(rule.required for rule in found), any(rule.typed_input for rule in found))


def _is_for(rule: RecordingRuleConfig, identity: Identity, namespace: str | None) -> bool:
    if namespace is not None and rule.namespaces and namespace not in rule.namespaces:
        return False
    everyone = not (rule.users or rule.groups)
    return everyone or identity.username in rule.users or not frozenset(rule.groups).isdisjoint(identity.groups)
