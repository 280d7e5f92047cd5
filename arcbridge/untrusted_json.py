"""Reads JSON that another party wrote: an issuer, a relay, an API server, NATS, a command, a file that may be changed.

It judges the text alone; what the values mean is for the caller. Invariants: whatever the text is, it is parsed or a
ValueError is raised; what was parsed is nested at most `DEPTH` deep, so that no code that walks it by calling itself
runs out of stack, and each number in it is a finite `float`, or has one. `identity.strict_json` reads what is signed,
with other rules.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

MOST: Final = 2 * 1024 * 1024
"""Bytes of a text, where a caller has no lower bound of its own."""
DEPTH: Final = 100
"""Objects and arrays inside each other. Documents of Kubernetes and of issuers stay below 20."""
DIGITS: Final = 100
"""Those of an integer, at most."""


def read_json(text: bytes | bytearray | str, most: int = MOST) -> Any:
    """Parse a JSON text of at most `most` bytes (characters of a str), in UTF-8 (RFC 8259).

    Raises ValueError for one that is larger, for nesting that is too deep, for numbers that no `float` has, and for no
    JSON.
    """
    if len(text) > most:
        raise ValueError(f"larger than {most} bytes")
    return decode(_DECODER, text if isinstance(text, str) else text.decode("utf-8-sig"))


def read_json_object(text: bytes | bytearray | str, most: int = MOST) -> dict[str, Any]:
    """Parse a JSON object as `read_json` does; return an empty one for every other text."""
    try:
        value = read_json(text, most)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def decode(decoder: json.JSONDecoder, text: str) -> Any:
    """Parse with this decoder; raises ValueError where the text is no JSON or is nested too deep."""
    try:
        value = decoder.decode(text)
    except RecursionError:
        # Not chained: thousands of frames say nothing more.
        raise ValueError("nested too deeply") from None
    # As few brackets cannot be nested deeper, and most texts have no more.
    if text.count("{") + text.count("[") > DEPTH and _is_deep(value):
        raise ValueError("nested too deeply")
    return value


def refuse_constant(name: str) -> Any:
    """Refuse NaN and Infinity, which Python's parser takes (`parse_constant` of a decoder). Raises ValueError."""
    raise ValueError(f"{name} is not JSON")


def _integer(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"an integer of more than {DIGITS} digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError("a number that is too large")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEPTH):
        level = [
            child
            for one in level
            for child in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True


_DECODER: Final = json.JSONDecoder(parse_constant=refuse_constant, parse_int=_integer, parse_float=_finite)
