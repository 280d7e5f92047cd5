"""Foreign text: one line, bounded, without credentials (docs/threats.md#O1, #O2)."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.observe.untrusted_text import (
    FIELD_LIMIT,
    TRACE_LIMIT,
    clean,
    clean_trace,
    escape,
    names_secret,
    printable,
    redact,
    without_last_word,
)
from tests.support.growth import growth

JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhbm5hIn0.c2lnbmF0dXJlLWJ5dGVz"


@given(st.text(max_size=3000))
def test_any_text_becomes_one_bounded_line(text: str) -> None:
    result = clean(text)
    assert len(result.encode()) <= FIELD_LIMIT
    assert len(result.splitlines()) <= 1
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in result)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prod-eu", "prod-eu"),
        ("a\r\nb", "a\\r\\nb"),
        ("\x1b[2J\x9bclear", "\\x1b[2J\\x9bclear"),
        ("line\u2028separator", "line\\u2028separator"),
        ("right\u202eto left", "right\\u202eto left"),
        ("half\ud800surrogate", "half\\ud800surrogate"),
        ("naïve – 日本", "naïve – 日本"),
    ],
)
def test_control_characters_are_written_out(text: str, expected: str) -> None:
    assert escape(text) == expected
    assert clean(text) == expected


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        (f"token {JWT} refused", JWT),
        (f"Authorization: Bearer {JWT}", JWT),
        ("authorization: Basic YW5uYTpodW50ZXIy", "YW5uYTpodW50ZXIy"),
        ("Set-Cookie: session=hunter2; Path=/", "hunter2"),
        ("Cookie: session=hunter2; other=1", "hunter2"),
        ("connect to http://anna:hunter2@proxy.example.org:3128 failed", "hunter2"),
        ("nats://hunter2@10.0.0.1:4222", "hunter2"),
        ("grant_type=client_credentials&client_secret=hunter2&x=1", "hunter2"),
        ("grant_type=password&password=hunter2", "hunter2"),
        ("/callback?access_token=hunter2&state=1", "hunter2"),
        ("GET /callback?code=hunter2&state=1", "hunter2"),
        ("GET /callback?state=1&code=hunter2", "hunter2"),
        ("GET /x?key=hunter2", "hunter2"),
        ("token=hunter2", "hunter2"),
        ("password=hunter2", "hunter2"),
        ("nats://hunter2@x", "hunter2"),
        ("bearer abcdefghijkl", "abcdefghijkl"),
        ("password: hunter2", "hunter2"),
        ("client_secret: hunter2", "hunter2"),
        ("refresh_token: hunter2", "hunter2"),
        ('{"password":"hunter2 and more"}', "hunter2 and more"),
        ('{"a": 1, "client_secret": "hunter2"}', "hunter2"),
        ('{"access_token":"hunter2","x":1}', "hunter2"),
        ('{"Token": "hunter2"}', "hunter2"),
        ("sent Bearer opaque-access-token-0123", "opaque-access-token-0123"),
        ("join with a1b2c3d4e5f60718.Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6cXV4Zm9v now", "Zm9vYmFyYmF6cXV4Zm9vYmFyYmF6cXV4Zm9v"),
        ("resume " + "aB3" * 16, "aB3aB3aB3"),
        ("-----BEGIN EC PRIVATE KEY-----\nMHcCAQEE\n-----END EC PRIVATE KEY-----", "MHcCAQEE"),
        ("-----BEGIN PRIVATE KEY-----\nMHcCAQEE cut off", "MHcCAQEE"),
    ],
)
def test_credentials_are_replaced(text: str, secret: str) -> None:
    assert secret in text
    assert secret not in redact(text)
    assert "[redacted]" in clean(text)


@pytest.mark.parametrize(
    "text",
    [
        "sha256:" + "0123456789abcdef" * 4,
        "kube-system/coredns-7db6d8ff4d-x2v9q",
        "https://login.example.com/realms/production/protocol/openid-connect/certs",
        "prod-eu.cluster.arcbridge",
        "6f1f9a0e-1f9c-4a57-9d0a-0f3c1c2b4d5e",
        "the bearer is unknown and basic rules apply to authorization",
        "/apis/apps/v1/namespaces/a-namespace-with-a-long-name-0123456789/deployments",
        "write key=value as Kubernetes has labels",
        "exit code=4711, and monkey=banana",
        "invalid token: expired",
        'unknown keys in {"code":"policy", "key": "value"}',
        "some-quite-long-subdomain-name-of-a-relay.eu-central-1.compute.internal.example.com:443",
    ],
)
def test_names_and_digests_stay_readable(text: str) -> None:
    assert clean(text) == text


@given(st.integers(0, 5000), st.integers(0, 60))
def test_a_token_at_a_cut_leaves_no_readable_piece(before: int, spaces: int) -> None:
    token = "eyJ" + "aB3dE6gH9" * 40
    result = clean("x " * (before // 2) + " " * spaces + token + " tail" * 500)
    assert "aB3dE6gH9aB3" not in result


def test_a_megabyte_costs_no_more_than_its_beginning() -> None:
    result = clean("word " * 200_000)
    assert len(result.encode()) <= FIELD_LIMIT
    assert result.endswith("…")


def test_random_keys_of_32_bytes_never_appear() -> None:
    for _ in range(200):
        token = secrets.token_urlsafe(32)
        if token.strip("-_") != token or not (
            any(c.isupper() for c in token) and any(c.islower() for c in token) and any(c.isdigit() for c in token)
        ):
            continue
        assert token not in clean(f"value {token}, next")


def test_a_trace_keeps_its_end_and_one_line_per_line() -> None:
    text = "\n".join(f'  File "x.py", line {n}, in f' for n in range(2000)) + f"\nValueError: bad\x1b[0m {JWT}"
    lines = clean_trace(text)
    assert lines[-1].startswith("ValueError: bad\\x1b[0m [redacted]")
    assert lines[0] == "…"
    assert len("\n".join(lines).encode()) <= TRACE_LIMIT
    json.dumps(lines)


@pytest.mark.parametrize(
    ("field", "secret"),
    [("token", True), ("access_token", True), ("Authorization", True), ("client_secret", True), ("key_pem", True),
     ("token_id", False), ("tokens_used", False), ("secret_name", False), ("cluster", False), ("keys", False)],
)  # fmt: skip
def test_field_names_that_hold_secrets(field: str, secret: bool) -> None:
    assert names_secret(field) is secret


@pytest.mark.parametrize("character", ["a", "-", "9"])
def test_h20_one_character_over_the_working_length_costs_no_multiple(character: str) -> None:
    """From each of 4 096 positions the pattern for the last word read 512 characters and went back: 17 ms."""
    most = 4 * FIELD_LIMIT
    assert growth(clean, character * most, character * (most + 1)) < 8
    assert growth(clean, character * most, character * 16 * most) < 8


@given(st.text(st.sampled_from("ab \n\x1c\u2003"), max_size=1200) | st.integers(0, 1200).map(lambda n: " " + "a" * n))
def test_h20_the_last_word_is_dropped_as_before(text: str) -> None:
    assert without_last_word(text) == re.sub(r"[^\s]{0,512}\Z", "", text)


PUMPED = [
    "a", "A1b", "-", "/", "=", " ", "eyJ", "eyJa.", "abcdef.", "aaaaaa." + "a" * 40 + ".", "bearer ",
    "basic aaaaaaaaaaaa", "authorization: ", "authorization: a", "-----BEGIN ", "-----BEGIN PRIVATE KEY-----",
    "-----END ", "aB3+/", "\x1b", "\u2028", "_token", ".secret.", "private_", "://", "@", "password=",
    "password: ", 'password":"', '_secret": "', "token=", "&code=", "?key=", '"', '":"', ": ",
]  # fmt: skip


@pytest.mark.parametrize("token", PUMPED)
@pytest.mark.parametrize("function", [redact, names_secret])
def test_h20_every_pattern_grows_with_its_text(function: Callable[[str], object], token: str) -> None:
    """A square would make it 64 times as much for 8 times the text."""
    text = token * (2048 // len(token))
    for end in ("", "!", "/", "="):
        assert growth(function, text + end, text * 8 + end) < 24


def test_printable_text_has_no_control_characters_and_a_length() -> None:
    assert printable("1.2.3+g0\x1b\r\n\u202e", 64) == "1.2.3+g0"
    assert len(printable("1" * 100_000, 64)) == 64
