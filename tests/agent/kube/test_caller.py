"""What a session remembers of its caller between requests."""

from __future__ import annotations

import dataclasses

import pytest

from arcbridge.agent.accounts import Account, Accounts
from arcbridge.agent.kube.caller import SAFE_ID, Caller, ReviewedTokens, SubjectLines, token_digest
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.identity.claims import Identity

from .bench import ALICE


def test_another_identity_or_credential_counts_at_once() -> None:
    lines = SubjectLines()
    assert b"Impersonate-Group: ops" in lines.of(ALICE, "Bearer a")
    assert lines.of(ALICE, "Bearer a").startswith(b"Authorization: Bearer a\r\n")
    fewer: Identity = dataclasses.replace(ALICE, groups=("dev",))
    assert b"ops" not in lines.of(fewer, "Bearer a")
    assert lines.of(fewer, "Bearer b").startswith(b"Authorization: Bearer b\r\n")
    assert b"Authorization" not in lines.of(fewer, "")


def test_an_identity_that_cannot_be_sent_leaves_no_lines_of_the_one_before() -> None:
    lines = SubjectLines()
    lines.of(ALICE, "")
    for bad in ("", "a\r\nImpersonate-Group: system:masters", " alice"):
        broken = dataclasses.replace(ALICE, username=bad)
        for _ in range(2):
            with pytest.raises(RequestRefusal):
                lines.of(broken, "")


def test_extras_are_escaped_as_for_any_request() -> None:
    identity = Identity("ü", "", (), "i#ü", "i", 4e9, {"a/b_c": ("1",)})
    assert SubjectLines().of(identity, "") == ("Impersonate-User: ü\r\nImpersonate-Extra-a%2Fb%5Fc: 1\r\n".encode())


def test_a15_the_agent_makes_its_half_of_a_request_id() -> None:
    """A relay that gives two sessions one join id gives no two requests one id, and chooses none."""
    for join_id in ("0123456789abcdef", "a" * 200):
        first, second = (Caller(join_id, ALICE, Account(Accounts(), ALICE)) for _ in range(2))
        assert first.request_prefix != second.request_prefix
        assert first.request_prefix.startswith(join_id[:16])
        assert SAFE_ID.fullmatch(longest := f"{first.request_prefix}-{2**31}-{10**6}")
        assert len(longest) <= 64, "parts of the API server would cut it off"


def test_a18_few_tokens_are_remembered() -> None:
    tokens = ReviewedTokens()
    for number in range(100):
        tokens.add(token_digest(b"%d" % number))
        tokens.add(token_digest(b"%d" % number))
    held = [number for number in range(100) if token_digest(b"%d" % number) in tokens]
    assert held == list(range(92, 100))
    tokens.add(b"")
    assert b"" not in tokens
