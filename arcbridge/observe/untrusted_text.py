"""Makes text that a peer wrote fit for a log line, a terminal and a status page.

Written as they came, names, paths and reasons could start a new line, move a terminal's cursor or recolour it (the
class of CVE-2021-25743), fill a disk, or carry a credential. `clean` cuts a text to a bounded working length, so that a
megabyte costs no more than a kilobyte; replaces what looks like a credential (the last line of defence: no caller hands
a secret over in the first place); escapes control characters, so that one event is one line; and cuts the rest to the
field's length. Redaction comes before the last cut: half a token is still a secret.
"""

from __future__ import annotations

import re

FIELD_LIMIT = 1024
"""Bytes of UTF-8 in one field. Room for a long URL; a hundred such fields still make a line that tools accept."""

TRACE_LIMIT = 8192
"""Bytes of one stack trace: about sixty frames. The end is kept, because the raising frame is there."""

_WORKING_FACTOR = 4
_LAST_WORD = 512
"""Characters of a word that a cut went through, which are dropped at most."""
REDACTED = "[redacted]"

# C0, DEL and C1; the line and paragraph separators that some viewers break lines at; the marks that reorder text
# on a screen ("Trojan Source"); lone surrogates, which cannot be encoded at all; the byte order mark.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff]")

_CREDENTIALS = re.compile(
    r"""
    -----BEGIN\ [A-Z\ ]{0,40}PRIVATE\ KEY-----.*?(?:-----END\ [A-Z\ ]{0,40}PRIVATE\ KEY-----|\Z)   # PEM keys
  | eyJ[A-Za-z0-9_-]{6,}(?:\.[A-Za-z0-9_-]*){0,4}                                 # JWS and JWE, compact
  | (?<![A-Za-z0-9_-])[A-Za-z0-9_-]{6,64}\.[A-Za-z0-9_-]{32,}(?![A-Za-z0-9_.-])   # join tokens: id.secret
  | (?P<introduced> (?<=[\ /="])(?:   # one character first: six words at each place cost half as much again
        (?<=bearer\ )[A-Za-z0-9._~+/=-]{12,}                                        # RFC 6750 §2.1
      | (?<=authorization:\ )[^\r\n"']{4,}
      | (?<=basic\ )[A-Za-z0-9+/]{12,}={1,2}                                        # RFC 7617, where it is padded
      | (?<=cookie:\ )[^\r\n"']{4,}                                                # and Set-Cookie: RFC 6265
      | (?<=://)[^\s/?\#@"']{1,256}(?=@)                                           # userinfo of a URL: RFC 3986 §3.2.1
      | (?<==)(?:(?<=password=)|(?<=_secret=)|(?<=token=)|(?<=[?&]code=)|(?<=[?&]key=))   # forms and queries: RFC 6749;
        [^\s&"',;]{4,}                                                              # without ?, key=value is a label
      | (?<=:\ )(?:(?<=password:\ )|(?<=_secret:\ )|(?<=_token:\ ))[^\s&"',;]{4,}  # YAML
      | (?<=")(?:(?<=":")(?:(?<=password":")|(?<=_secret":")|(?<=token":"))          # JSON
          |(?<=":\ ")(?:(?<=password":\ ")|(?<=_secret":\ ")|(?<=token":\ ")))[^"\r\n]{4,}
    ))
  | (?<![A-Za-z0-9_+/-])                                                          # 256 bits in base64 or base64url
    (?=[A-Za-z0-9_+/-]*[A-Z])(?=[A-Za-z0-9_+/-]*[a-z])(?=[A-Za-z0-9_+/-]*[0-9])
    [A-Za-z0-9_+-]{40,}=*(?![A-Za-z0-9_+/-])
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_MIXED = re.compile(r"(?=.*[A-Z])(?=.*[a-z])(?=.*[0-9])", re.DOTALL)

_SECRET_NAMES = re.compile(
    r"(?:^|[_.-])(?:token|secret|password|passwd|authorization|cookie|credential|private_?key|key_pem|bearer)s?$",
    re.IGNORECASE,
)


def clean(text: str, limit: int = FIELD_LIMIT) -> str:
    """Return `text` on one line, without credentials, in at most `limit` bytes of UTF-8 (the mark `…` included)."""
    if len(text) < 24 and text.isascii() and text.isprintable() and not _may_introduce(text):
        return text  # the common case: nothing below can apply
    working = limit * _WORKING_FACTOR
    was_cut = len(text) > working
    if was_cut:
        # The cut may have left the beginning of a token that no pattern knows any more: drop the last word.
        text = without_last_word(text[:working])
    text = escape(redact(text))
    return _shorten(text, limit, was_cut)


def _may_introduce(text: str) -> bool:
    """Return whether a short text may have a credential behind what introduces it."""
    return "=" in text or ": " in text or "://" in text or '"' in text or (len(text) > 18 and "bearer " in text.lower())


def clean_trace(text: str) -> list[str]:
    """Return a stack trace as clean lines, together at most TRACE_LIMIT bytes, keeping the end."""
    text = redact(text[-TRACE_LIMIT * _WORKING_FACTOR :])
    lines = [_shorten(escape(line), FIELD_LIMIT, False) for line in text.split("\n") if line.strip()]
    size = 0
    for number, line in enumerate(reversed(lines)):
        size += len(line.encode()) + 1
        if size > TRACE_LIMIT:
            return ["…", *lines[len(lines) - number :]]
    return lines


def escape(text: str) -> str:
    """Return `text` with every control character written out (`\\x1b`, `\\n`, `\\u2028`)."""
    return _CONTROL.sub(lambda match: match.group().encode("unicode_escape").decode(), text)


def redact(text: str) -> str:
    """Return `text` with everything that looks like a credential replaced by `[redacted]`."""
    return _CREDENTIALS.sub(_replacement, text)


def printable(text: str, limit: int) -> str:
    """Return the printable ASCII characters among the first `limit` of `text`."""
    text = text[:limit]
    if text.isascii() and text.isprintable():
        return text  # the common case, at a tenth of the cost
    return "".join(character for character in text if character.isascii() and character.isprintable())


def names_secret(field: str) -> bool:
    """Return whether a field of this name would hold a secret: `token`, `client_secret`, `Authorization`, …"""
    return _SECRET_NAMES.search(field) is not None


def _replacement(match: re.Match[str]) -> str:
    found = match.group()
    if match.lastgroup or found.startswith(("eyJ", "-----")) or "." in found:
        return REDACTED
    # The pattern ignores case, so its last branch also finds lower-case names and hexadecimal digests, which are
    # wanted in logs (pins are digests). Only a run that mixes all three classes is random base64.
    return REDACTED if _MIXED.match(found) else found


def without_last_word(text: str) -> str:
    """Return `text` up to its last space, or without its last 512 characters. Reads no more than those: a pattern
    with `\\Z` behind a repetition would begin at each character of the text (docs/threats.md#H20)."""
    kept = max(0, len(text) - _LAST_WORD)
    for position in range(len(text), kept, -1):
        if text[position - 1].isspace():
            return text[:position]
    return text[:kept]


def _shorten(text: str, limit: int, was_cut: bool) -> str:
    data = text.encode("utf-8")
    if len(data) <= limit and not was_cut:
        return text
    return data[: limit - 3].decode("utf-8", "ignore") + "…"
