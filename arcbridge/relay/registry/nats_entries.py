"""Checks what a key of a fleet's registry holds, before a relay believes it (docs/threats.md#F22).

It reads and writes nothing: `nats_bucket` hands over each value. Invariant: a value of a known kind that passes has
every member which `registry.nats` reads, each of its type, and a number in a range that every clock and float holds.
Kinds that this version does not know pass: a newer relay may have written them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from arcbridge.pki.names import is_cluster_name

_MOST: Final = 1e15
"""Largest number, in seconds or counted: far behind every date, far below what a float holds exactly."""


def is_entry(key: str, data: Mapping[str, Any]) -> bool:
    """Return whether `data` is what a relay writes under `key`."""
    first, _, rest = key.partition(".")
    kind = rest.partition(".")[2] if first == "cluster" else first
    members = _MEMBERS.get(kind)
    if members is None:
        return True
    if not all(check(data.get(member)) for member, check in members.items()):
        return False
    # Dots of the name are underscores in the key: one cluster's entry is not another's.
    return kind != "binding" or data["name"].replace(".", "_") == rest.partition(".")[0]


def _text(value: object) -> bool:
    return isinstance(value, str)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST


def _whole(value: object) -> bool:
    return isinstance(value, int) and _number(value)


def _keys(value: object) -> bool:
    return value is None or (isinstance(value, dict) and all(_key_state(state) for state in value.values()))


def _key_state(value: object) -> bool:
    checks = (_whole, _text, _number, _whole)
    return (
        isinstance(value, list)
        and 1 <= len(value) <= len(checks)
        and all(check(one) for check, one in zip(checks, value, strict=False))
    )


def _absent_or(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


def _times(value: object) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


_MEMBERS: Final[Mapping[str, Mapping[str, Callable[[object], bool]]]] = {
    "binding": {
        "name": lambda value: isinstance(value, str) and is_cluster_name(value),
        "ca_pem": _text,
        "ca_pin": _text,
        "created": _number,
        "valid_since": _number,
        "keys": _keys,
    },
    "revoked": {"at": lambda value: _number(value) and value != 0},
    "seen": {
        "last_seen": _absent_or(_number),
        "certificate_expires": _absent_or(_number),
        "version": _absent_or(_text),
    },
    "token": {
        "secret_hash": _text,
        "cluster": lambda value: isinstance(value, str) and is_cluster_name(value),
        "uses": _whole,
        "used": _whole,
        "created": _number,
        "expires_at": _number,
        "rebind": lambda value: isinstance(value, bool),
        "redemptions": _times,
    },
    "user": {"user": _text, "before": _number, "reason": _text, "revoked": _number},
}
"""By kind of key: its members, and what each has to be."""
