"""The processor that makes the fields of a log event fit to be written: ordered, bounded, without credentials.

It turns each value into what JSON has, sends each text through `untrusted_text.clean`, and replaces an exception by its
text and, where the exception is a defect of ours, its stack trace. It neither samples nor renders. What leaves it can
be rendered on one line, whatever a peer has put into it.
"""

from __future__ import annotations

import enum
import json
import math
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from functools import lru_cache, partial
from typing import Any, Final

from arcbridge.errors import ArcbridgeError

from .untrusted_text import FIELD_LIMIT, REDACTED, clean, clean_trace, names_secret

PREFIX: Final = ("connection", "session", "stream", "cluster")
"""Fields that stand before all others and in this order, so that one text search yields the life of one stream."""

MAX_FIELDS, MAX_ITEMS, MAX_DEPTH = 40, 20, 3
"""Fields of an event, items of a collection, collections within each other; what is beyond is cut."""

QUOTING_PACKAGES: Final = ("aiohttp", "h11", "http")
"""Packages whose exceptions and log arguments may hold bytes of a request."""


# Nearly all names of fields are words of this code.
_clean_name = lru_cache(maxsize=256)(partial(clean, limit=64))
_names_secret = lru_cache(maxsize=256)(names_secret)


class Redaction:
    """Returns the event's fields in the order of the log, clean and bounded. `worker`: this process' index, if any."""

    def __init__(self, role: str, worker: int | None = None) -> None:
        self._identity: dict[str, Any] = {"role": role} if worker is None else {"role": role, "worker": worker}

    def __call__(self, logger: Any, method: str, fields: MutableMapping[str, Any]) -> dict[str, Any]:
        trace = _exception_fields(fields)
        shaped: dict[str, Any] = {
            "timestamp": fields.pop("timestamp", ""),
            "level": method,
            "event": clean(_text(fields.pop("event", ""))),
            "logger": getattr(logger, "name", "arcbridge"),
            **self._identity,
        }
        for name in PREFIX:
            if name in fields:
                shaped[name] = safe_value(name, fields.pop(name))
        for count, (name, value) in enumerate(fields.items()):
            if count >= MAX_FIELDS:
                shaped["fields_omitted"] = len(fields) - MAX_FIELDS
                break
            shaped.setdefault(_clean_name(str(name)), safe_value(str(name), value))
        shaped.update(trace)
        return shaped


def error_text(error: BaseException) -> str:
    """Return what a log line says of an exception: never the bytes of a request that it quotes."""
    name, text = type(error).__name__, "" if quotes_peer(error) else _string(error)
    return text if isinstance(error, ArcbridgeError) else f"{name}: {text}" if text else name


def quotes_peer(error: BaseException) -> bool:
    """Return whether exceptions of this type quote bytes that a peer sent: those of the HTTP parsers do."""
    return type(error).__module__.partition(".")[0] in QUOTING_PACKAGES


def _exception_fields(fields: MutableMapping[str, Any]) -> dict[str, Any]:
    """Take `exc_info` out of the fields and return what replaces it: `error`, and `trace` for a defect of ours."""
    info = fields.pop("exc_info", None)
    fields.pop("stack_info", None)
    info = sys.exc_info()[1] if info is True else info[1] if isinstance(info, tuple) else info
    if not isinstance(info, BaseException):
        return {}
    found: dict[str, Any] = {"error": clean(error_text(info))}
    if not isinstance(info, ArcbridgeError):
        found["trace"] = clean_trace(_trace(info))
    return found


def _trace(error: BaseException) -> str:
    """Return the stack trace with the chain of causes; without any text where one of them quotes a peer."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    if any(map(quotes_peer, chain)):
        return "".join(traceback.format_tb(error.__traceback__, limit=-40)) + type(error).__name__
    return "".join(traceback.format_exception(error, limit=-40))


def safe_value(name: str, value: Any, depth: int = 0) -> Any:
    """Return `value` as something JSON has, clean and bounded. A field named after a secret loses its value."""
    if type(value) is str:  # as most are: what follows asks a dozen questions first
        return REDACTED if _names_secret(name) else clean(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if isinstance(value, int):
        return value if value.bit_length() <= 64 else f"integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else str(value)
    if _names_secret(name):
        return REDACTED
    if isinstance(value, Mapping) and depth < MAX_DEPTH:
        pairs = list(value.items())[:MAX_ITEMS]
        return _bounded({clean(_text(key), 64): safe_value(_text(key), item, depth + 1) for key, item in pairs})
    if isinstance(value, (list, tuple, set, frozenset)) and depth < MAX_DEPTH:
        return _bounded([safe_value("", item, depth + 1) for item in list(value)[:MAX_ITEMS]])
    return clean(_text(value))


def _bounded(value: Any) -> Any:
    text = json.dumps(value, ensure_ascii=False)
    return value if len(text) <= FIELD_LIMIT else clean(text)


def _text(value: Any) -> str:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value[: FIELD_LIMIT * 4]).decode("utf-8", "backslashreplace")
    return error_text(value) if isinstance(value, BaseException) else _string(value)


def _string(value: object) -> str:
    try:
        return str(value)
    except Exception as error:  # an object whose own __str__ fails must not cost the event it belongs to
        return f"<{type(value).__name__} that cannot be written: {type(error).__name__}>"
