"""Reads claims of a JWT without verifying it, for the client, which only carries tokens: its end, nonce and audiences.

No decision about access may rest on what this returns; relay and agent verify (`arcbridge.identity`).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from arcbridge.untrusted_json import read_json_object

MAX_TIME = 1e12
"""Seconds, or unix seconds."""
_LIMIT = 64 * 1024


@dataclass(frozen=True, slots=True)
class UnverifiedClaims:
    """What a token says about itself."""

    expires_at: float = 0.0
    """Unix seconds; 0: the token does not say, or is no JWT."""
    nonce: str = ""
    subject: str = ""
    issuer: str = ""
    audiences: tuple[str, ...] = ()


def read_unverified(token: str) -> UnverifiedClaims:
    """Read the claims that the client needs; all are empty for a text that is not a JWT.

    Those of the last few tokens are kept, but no token: a join asks five times for the claims of two.
    """
    return _read(_payload(token))


@lru_cache(maxsize=8)
def _read(payload: str) -> UnverifiedClaims:
    claims = _claims(payload)
    audience = claims.get("aud")
    audiences = audience if isinstance(audience, list) else [audience]
    return UnverifiedClaims(
        expires_at=positive(claims.get("exp")),
        nonce=_text(claims.get("nonce")),
        subject=_text(claims.get("sub")),
        issuer=_text(claims.get("iss")),
        audiences=tuple(one for one in audiences if isinstance(one, str)),
    )


def claims_unverified(token: str) -> dict[str, Any]:
    """Return what a token claims; nothing for a text that is not a JWT."""
    return _claims(_payload(token))


def _payload(token: str) -> str:
    """Return the part of a JWT that has its claims, and is no credential; empty for another text."""
    parts = token.split(".")
    return parts[1] if len(parts) == 3 and len(token) <= _LIMIT else ""


def _claims(payload: str) -> dict[str, Any]:
    try:
        return read_json_object(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except ValueError:
        return {}


def positive(value: object, default: float = 0.0) -> float:
    """Return a number of seconds, or of unix seconds, that another party gives; `default` for what is none.

    What is later than `MAX_TIME` is no time that an issuer means.
    """
    good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MAX_TIME
    return float(value) if good and isinstance(value, int | float) else default


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
