"""What the other end may be told, how it is read again, and that nothing else gets through."""

from __future__ import annotations

import pytest

from arcbridge.errors import Unreachable
from arcbridge.identity.proof import ProofRefused
from arcbridge.identity.refusal import ISSUER_KEYS, IssuerUnavailable, TokenRefused, Told, tell, told_in


def test_a_refusal_is_a_401_with_a_rule_for_the_log() -> None:
    refusal = TokenRefused("token.exp", "the token has expired; log in again")
    assert (refusal.status_code, refusal.rule) == (401, "token.exp")


def test_an_issuer_that_is_down_is_a_503() -> None:
    assert IssuerUnavailable("later").status_code == 503


@pytest.mark.parametrize("wanted", ["arcbridge-relay", "https://relay.example.com/ a", "a, b", "x" * 200])
def test_an_audience_is_told_and_read_again(wanted: str) -> None:
    error = TokenRefused("token.aud", "the token is not meant for this place", wanted=wanted, detail='it is for "x"')
    assert told_in(tell(error)) == Told("token.aud", wanted)
    assert "x" * 201 not in tell(error)
    assert '"x"' not in tell(error), "the detail is for our own log"


@pytest.mark.parametrize("wanted", ["", 'a"b', "a\\b", "a\nb", "é", " a", "x" * 201])
def test_a_name_that_could_be_read_otherwise_is_not_told(wanted: str) -> None:
    error = TokenRefused("claims.rule", "the token does not have a claim", wanted=wanted)
    assert told_in(tell(error)) == Told("claims.rule", "")


def test_the_issuers_keys() -> None:
    assert told_in(tell(IssuerUnavailable("no keys"))) == Told(ISSUER_KEYS, "")


def test_other_errors_are_told_as_they_are() -> None:
    assert tell(Unreachable("down")) == "down"
    proof = ProofRefused("missing", "the relay")
    assert tell(proof) == proof.message
    assert told_in(proof.message) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "words",
        "words (token.aud) more",
        'words (token.aud wants "a\x1b[31m")',
        'words (token.aud wants "a" "b")',
        'words (other.aud wants "a")',
        f'words (token.aud wants "{"x" * 201}")',
        "words (token.AUD)",
    ],
)
def test_nothing_else_of_a_peer_is_read(text: str) -> None:
    assert told_in(text) is None
