"""Makes a command line fit for an audit record: bounded, one line, without the values of secrets.

Redaction hides nothing but what has the form of a secret's value: never shell code, so that no command hides behind
the name of a secret (docs/decisions/0024-what-a-record-leaves-out.md). Code is what has a character that a shell acts
on: white space, `;`, `|`, `&`, `<`, `>`, parentheses and backticks. Invariant: where a word was redacted, cut or left
out, the fields say how many, and have the SHA-256 of the whole command.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from arcbridge.agent.audit.record import Value, listed, total_of, words_sha256
from arcbridge.observe.untrusted_text import REDACTED

MAX_WORD = 4096
"""Characters of a word that are looked at; a record has a quarter of them."""
MAX_WORDS = 64
"""Words that are looked at: no more get into a record."""

_NAME = r"[\w.-]*(?:token|secret|passw(?:or)?d|pwd|credential|private[_-]?key|api[_-]?key|authorization)s?"
_VALUE = r"('[^']*(?:'|\Z)|\"[^\"]*(?:\"|\Z)|[^\s;&|<>()`'\"]+)"
# `--password=x`, `PASSWORD=x`, `password: x`, `password = x`, also within a script that is one word. Behind `TOKEN=`
# and a space stands the command that gets an empty variable, behind a line's end another command: neither is a value.
_SECRET_VALUE = re.compile(rf"(?i)((?:^|[\s;&|('\"])-{{0,2}}{_NAME}['\"]?(?:=|[ \t]+=[ \t]*|[ \t]*:[ \t]*)){_VALUE}")
_SECRET_FLAG = re.compile(rf"(?i)--?{_NAME}")
_SECRET_FLAG_INSIDE = re.compile(rf"(?i)((?:^|\s)--{_NAME}[ \t]+){_VALUE}")
_SHELL_CODE = re.compile(r"[\s;|&<>()`]")
_MIXED = r"(?=[\w+/-]*[A-Z])(?=[\w+/-]*[a-z])(?=[\w+/-]*[0-9])"
# What is a secret by its own form. Narrower than in log lines (`untrusted_text`): no form has a space or a character in
# it that a shell acts on.
_CREDENTIALS = re.compile(
    rf"""
    -----BEGIN\ [A-Z\ ]{{0,40}}PRIVATE\ KEY-----(?:\s{{1,4}}[A-Za-z0-9+/=]{{40,}}+)++(?:\s{{1,4}}[A-Za-z0-9+/=]++)?
  | eyJ[A-Za-z0-9_-]{{6,}}+(?:\.[A-Za-z0-9_-]*+){{0,4}}                            # JWS and JWE, compact
  | (?<![A-Za-z0-9_-])[A-Za-z0-9_-]{{6,64}}\.{_MIXED}[A-Za-z0-9_-]{{32,}}+(?![.])  # join tokens
  | (?<=[Bb]earer\ )[A-Za-z0-9._~+/=-]{{12,}}
  | (?<=[Bb]asic\ )[A-Za-z0-9+/]{{12,}}={{0,2}}
  | (?<![A-Za-z0-9_+/-]){_MIXED}[A-Za-z0-9_+-]{{40,}}+=*(?![A-Za-z0-9_+/-])        # 256 bits
    """,
    re.VERBOSE | re.ASCII,  # a word is the same to what looks back and to what looks ahead
)


def recorded_command(words: Sequence[str]) -> dict[str, Value]:
    """Return the fields of a record for a command line: `command`, and where it is not whole `more` and `sha256`."""
    redacted = long = 0
    kept: list[str] = []
    secret_next = False
    for word in words[:MAX_WORDS]:
        if secret_next and not word.startswith("-") and not _SHELL_CODE.search(word):
            text, count = REDACTED, 1
        else:
            text, count = _redacted(word[:MAX_WORD])
            if len(word) > MAX_WORD:
                long += 1
                text += "…"
        secret_next = _SECRET_FLAG.fullmatch(word, 0, MAX_WORD) is not None
        redacted += count
        kept.append(text)
    command, rest, _ = listed(kept, total_of(words))
    fields: dict[str, Value] = {"command": command}
    counts = ((redacted, "redacted"), (long, f"longer than {MAX_WORD} characters"))
    missing = [f"{count} {what}" for count, what in counts if count] + [rest] * bool(rest)
    if missing:
        fields["more"] = {"command": ", ".join(missing)}
    if missing and len(words) == total_of(words):
        fields["sha256"] = {"command": words_sha256(words)}
    return fields


def left_out(words: Sequence[str]) -> dict[str, Value]:
    """Return the fields for a command line that the setting `commands` keeps out of records. It has no hash either:
    that of a short command lets the command be guessed."""
    return {"more": {"command": f"{total_of(words)} left out by audit.commands"}}


def _redacted(word: str) -> tuple[str, int]:
    """Return a word without the values of secrets, and how many those were."""
    count = 0

    def hide(match: re.Match[str]) -> str:
        nonlocal count
        value = match[2].strip("'\"")
        if value in ("", "$", REDACTED):
            return match[0]
        if _SHELL_CODE.search(value):  # quoted: the other kind of quote may be within, so this goes two deep at most
            return match[1] + _SECRET_VALUE.sub(hide, match[2])
        count += 1
        return match[1] + REDACTED

    text, count = _CREDENTIALS.subn(REDACTED, word)
    return _SECRET_FLAG_INSIDE.sub(hide, _SECRET_VALUE.sub(hide, text)), count
