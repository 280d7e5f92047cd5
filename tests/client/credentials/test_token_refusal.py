"""Refusals of tokens are told by class: the sentences are those that relay and agent really say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from arcbridge.client.credentials import token_refusal
from arcbridge.client.credentials.token_refusal import Reason, explain, reason_in
from arcbridge.client.session.refusal import of_token

IDENTITY = Path(token_refusal.__file__).parents[1] / "identity"


def test_each_known_sentence_is_said_by_the_verifier() -> None:
    said = " ".join(re.sub(r'"\s+f?"', "", file.read_text()) for file in IDENTITY.rglob("*.py"))
    assert [text for text, _ in token_refusal._KNOWN if text not in said] == []


@pytest.mark.parametrize("reason", [one for one in Reason if one not in (Reason.UNKNOWN, Reason.PROOF)])
def test_each_reason_has_a_sentence_of_this_module(reason: Reason) -> None:
    assert explain(reason, "the relay")
    assert "{" not in explain(reason, "the relay")


def test_nothing_that_a_relay_says_is_shown() -> None:
    said = "EVIL the token is not meant for this place (audience) EVIL"
    error = of_token("the relay does not accept the access token", said, "the relay")
    assert error.refusal is Reason.AUDIENCE
    assert "it is for another audience" in error.message
    assert "EVIL" not in error.message
    unknown = of_token("the relay does not accept the access token", "EVIL", "the relay")
    assert (unknown.refusal, "EVIL" in unknown.message) == (Reason.UNKNOWN, False)
    proof = of_token("x", "words (proof.missing)", "the relay")
    assert proof.refusal is Reason.PROOF
    assert reason_in("") is Reason.UNKNOWN
