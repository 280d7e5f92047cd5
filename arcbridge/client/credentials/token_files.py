"""Reads tokens from files, and checks that a text can be one token.

Files are read at each use, because other programs renew them; what the tokens say is not looked at. Invariant: no byte
of a token is in an error.
"""

from __future__ import annotations

import re
from pathlib import Path

from arcbridge.errors import StateError, Unauthenticated

TOKEN_LIMIT = 64 * 1024
FILE_LIMIT = 1024 * 1024
"""Bytes of a file with tokens, one on each line; a token is some KiB."""
_TOKEN = re.compile(rb"[!-~]+")


def read_token(path: Path) -> str:
    """Read the token in a file, trimmed; raises Unauthenticated or StateError, which name the file."""
    return check_token(_read(path, TOKEN_LIMIT), str(path))


def read_tokens(path: Path) -> list[str]:
    """Read the tokens of a file, one on each line. Raises Unauthenticated, StateError."""
    data = _read(path, FILE_LIMIT)
    if len(data) > FILE_LIMIT or not data.isascii():
        raise Unauthenticated(f"login.workload: {path} holds no tokens, or more than {FILE_LIMIT // 1024} KiB")
    return data.decode().split()


def check_token(data: bytes, source: str) -> str:
    """Return a token as header and AUTH can carry it; raises Unauthenticated."""
    if len(data) > TOKEN_LIMIT:
        raise Unauthenticated(f"{source} holds more than {TOKEN_LIMIT // 1024} KiB: not a token")
    token = data.strip()
    if not token:
        raise Unauthenticated(f"{source} is empty; put a token there")
    if _TOKEN.fullmatch(token) is None:
        raise Unauthenticated(f"{source} does not hold one token: there are spaces or other characters in it")
    return token.decode("ascii")


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limit + 1)
    except FileNotFoundError as error:
        raise Unauthenticated(f"the token file {path} does not exist; log in, or name another one") from error
    except OSError as error:
        raise StateError(f"cannot read the token file {path}: {error.strerror}") from error
