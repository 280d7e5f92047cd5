"""The sentences of version 0.1, letter by letter: they are read, and written, until 2027-03-01."""

from __future__ import annotations

import pytest

from arcbridge.legacy_refusals import read, with_rule
from arcbridge.refusals import NO_REFUSAL, Refusal, RefusalRule

SENTENCES = [
    (
        "the relay does not accept the access token: the token is not meant for this place (audience); log in again "
        '(token.aud wants "arcbridge-relay")',
        Refusal(RefusalRule.TOKEN_AUD, "arcbridge-relay"),
    ),
    ("the token has expired; log in again (token.exp)", Refusal(RefusalRule.TOKEN_EXP)),
    ("the token has expired; log in again", Refusal(RefusalRule.TOKEN_EXP)),
    (
        "the relay cannot verify tokens now because the issuer does not answer; try again (issuer.keys)",
        Refusal(RefusalRule.ISSUER_KEYS),
    ),
    (
        "the groups of this login cannot be looked up now: Microsoft Graph is busy (status 503); try again shortly",
        Refusal(RefusalRule.GROUPS_UNAVAILABLE),
    ),
    (
        "a session lasts 12 h here at most; start again what ran in it, and log in again if that is asked for",
        Refusal(RefusalRule.SESSION_AGE),
    ),
    (
        "arcbridge: the API server refuses the credential of this cluster's agent; this is not about your login: tell "
        "the cluster's operator (of the agent, its log, its metrics and `arcbridge --role agent doctor` say what is "
        "wrong)",
        Refusal(RefusalRule.AGENT_CREDENTIAL),
    ),
    (
        "arcbridge: the agent of this cluster may not act as you: its account system:serviceaccount:a:b lacks the "
        'right "impersonate" for users; this is not about your own rights: tell the cluster\'s operator',
        Refusal(RefusalRule.AGENT_IMPERSONATION),
    ),
]


@pytest.mark.parametrize(("sentence", "refusal"), SENTENCES, ids=[refusal.rule for _, refusal in SENTENCES])
def test_a_sentence_of_the_previous_version_is_read(sentence: str, refusal: Refusal) -> None:
    assert read(sentence) == refusal


@pytest.mark.parametrize(
    "text",
    [
        "",
        "words",
        "words (token.aud) more",
        "words (other.aud)",
        "words (token.AUD)",
        "(proof.key)",
        " (proof.key) ",
        " (proof.other)",
        " (proof." + "x" * 50 + ")",
        "he said: a session lasts 12 h here at most",
    ],
)
def test_nothing_else_of_a_peer_is_read(text: str) -> None:
    assert read(text) == NO_REFUSAL


@pytest.mark.parametrize("wanted", ["a\x1b[31m", 'a" "b', "x" * 201])
def test_what_was_wanted_is_bounded_there_too(wanted: str) -> None:
    assert not read(f'words (token.aud wants "{wanted}")').wanted


def test_a_client_of_the_previous_version_reads_the_rule_behind_the_sentence() -> None:
    words = "the token is not meant for this place (audience)"
    assert with_rule(words, Refusal(RefusalRule.TOKEN_AUD, "relay")) == f'{words} (token.aud wants "relay")'
    assert with_rule(words, Refusal(RefusalRule.PROOF_MISSING)) == f"{words} (proof.missing)"
    for refusal in (NO_REFUSAL, Refusal(RefusalRule.SESSION_AGE), Refusal(RefusalRule.GROUPS_UNAVAILABLE)):
        assert with_rule(words, refusal) == words
