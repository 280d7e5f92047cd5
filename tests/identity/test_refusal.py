"""What the errors of a refused token carry: a status, a rule for log and counter, and what may be sent."""

from __future__ import annotations

import pytest

from arcbridge.identity.proof import REFUSALS, ProofRefused
from arcbridge.identity.refusal import RULES, GroupsUnavailable, IssuerUnavailable, TokenRefused
from arcbridge.refusals import Refusal, RefusalRule


def test_a_refusal_is_a_401_with_a_rule_for_the_log() -> None:
    error = TokenRefused(
        RefusalRule.TOKEN_AUD, "the token is not meant for this place", wanted="relay", detail="it's x"
    )
    assert (error.status_code, error.refusal) == (401, Refusal(RefusalRule.TOKEN_AUD, "relay"))
    assert error.log_fields() == {"rule": "token.aud", "detail": "it's x"}


def test_a_name_that_could_be_read_otherwise_is_not_sent() -> None:
    error = TokenRefused(RefusalRule.CLAIMS_RULE, "the token does not have a claim", wanted='a"b')
    assert error.refusal == Refusal(RefusalRule.CLAIMS_RULE)


@pytest.mark.parametrize(
    ("error", "rule"), [(IssuerUnavailable("x"), "issuer.keys"), (GroupsUnavailable("x"), "groups.unavailable")]
)
def test_what_does_not_answer_is_a_503_with_a_rule_of_its_own(error: IssuerUnavailable, rule: str) -> None:
    assert (error.status_code, error.refusal.rule) == (503, rule)


def test_counters_have_the_rules_of_tokens_and_proofs() -> None:
    assert {"token.exp", "claims.groups.many", "user.rule"} < set(RULES)
    assert not {"", "proof.key", "issuer.keys", "session.age"} & set(RULES)
    assert {ProofRefused(RefusalRule(f"proof.{check}"), "x").rule.check for check in REFUSALS} == set(REFUSALS)
