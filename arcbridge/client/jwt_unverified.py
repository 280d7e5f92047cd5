"""A glance into a JWT that we only carry: when it ends, and its nonce. Nothing here verifies or trusts anything."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass

_LIMIT = 64 * 1024


@dataclass(frozen=True, slots=True)
class Glance:
    expires_at: float = 0.0
    """Unix seconds; 0: the token does not say, or is no JWT."""
    nonce: str = ""
    subject: str = ""
    issuer: str = ""


def look(token: str) -> Glance:
    """The claims that concern a carrier; all empty for anything that is not a JWT."""
    parts = token.split(".")
    if len(parts) != 3 or len(token) > _LIMIT:
        return Glance()
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, RecursionError):
        return Glance()
    if not isinstance(claims, dict):
        return Glance()
    end = claims.get("exp")
    valid = isinstance(end, int | float) and not isinstance(end, bool) and 0 < end < 1e12
    return Glance(
        expires_at=float(end) if valid and end is not None else 0.0,
        nonce=_text(claims.get("nonce")),
        subject=_text(claims.get("sub")),
        issuer=_text(claims.get("iss")),
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
