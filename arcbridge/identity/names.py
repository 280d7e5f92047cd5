"""Says which names read the same everywhere: those of users, groups, uids and actors, and values of extra keys.

What passes here stands in a header line, in a log and in a policy as the same text; whether it means something to
Kubernetes is another question (`claims.is_reserved`).
"""

from __future__ import annotations

import unicodedata

MAX_NAME = 1024
"""Bytes of a user name, uid or group: far above any real one, far below a header line's limit."""


def is_plain(name: str, limit: int = MAX_NAME) -> bool:
    """Return whether `name` reads the same everywhere: 1 to `limit` bytes of UTF-8, none invisible, no outer blanks."""
    if not name or name != name.strip():
        return False
    try:
        if len(name.encode()) > limit:
            return False
    except UnicodeEncodeError:  # a lone surrogate from a JSON escape
        return False
    return all(unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") for c in name)
