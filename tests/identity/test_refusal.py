"""What a caller and our log learn of a refused token."""

from __future__ import annotations

from arcbridge.identity.refusal import IssuerUnavailable, TokenRefused


def test_a_refusal_is_a_401_with_a_rule_for_the_log() -> None:
    refusal = TokenRefused("token.exp", "the token has expired; log in again")
    assert (refusal.status_code, refusal.rule) == (401, "token.exp")


def test_an_issuer_that_is_down_is_a_503() -> None:
    assert IssuerUnavailable("later").status_code == 503
