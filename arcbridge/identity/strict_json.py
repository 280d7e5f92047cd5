"""JSON that no two parsers read differently, for what is signed: headers and payloads of tokens and proofs, and keys.

RFC 8259 leaves open what a key that occurs twice means, and Python reads constants that are no JSON. Here both are
errors. What an issuer answers over HTTPS is not signed: `untrusted_json` reads it.
"""

from __future__ import annotations

import json
from typing import Any, Final

from arcbridge.untrusted_json import decode, refuse_constant


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse one JSON object of UTF-8.

    Raises ValueError: for a key that occurs twice, for NaN and Infinity, for nesting that is too deep, and for anything
    else that is no object.
    """
    value = decode(_DECODER, data.decode())
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a key occurs twice")
    return out


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=refuse_constant)
