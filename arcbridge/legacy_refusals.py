"""Reads the refusals of peers of version 0.1, which had no fields, and writes the sentences that clients of it read.

Version 0.1 put the rule, and what was wanted, behind a sentence, and had sentences of a fixed beginning. This is the
one place where a sentence decides anything. It goes on 2027-03-01, with its test.
"""

from __future__ import annotations

import re
from typing import Final

from arcbridge.refusals import NO_REFUSAL, Refusal, RefusalRule, read_refusal

_NAMED: Final = re.compile(r' \(((?:token|claims|user|issuer|proof)\.[a-z_.]{1,40})(?: wants "([^"]{1,200})")?\)\Z')
_BEGINNINGS: Final = {
    "the groups of this login cannot be looked up now: ": RefusalRule.GROUPS_UNAVAILABLE,
    "a session lasts ": RefusalRule.SESSION_AGE,
    "the token has expired": RefusalRule.TOKEN_EXP,
    "arcbridge: the API server refuses the credential of this cluster's agent": RefusalRule.AGENT_CREDENTIAL,
    "arcbridge: the agent of this cluster may not act as you": RefusalRule.AGENT_IMPERSONATION,
}


def read(message: str) -> Refusal:
    """Return the refusal that a sentence of version 0.1 names."""
    if found := _NAMED.search(message):
        return read_refusal(found[1], found[2] or "")
    rule = next((rule for beginning, rule in _BEGINNINGS.items() if message.startswith(beginning)), None)
    return NO_REFUSAL if rule is None else Refusal(rule)


def with_rule(message: str, refusal: Refusal) -> str:
    """Return the sentence as version 0.1 sent it: with the rule, and what was wanted, behind it."""
    if refusal.rule.family not in ("token", "claims", "user", "issuer", "proof"):
        return message
    wants = f' wants "{refusal.wanted}"' if refusal.wanted else ""
    return f"{message} ({refusal.rule}{wants})"
