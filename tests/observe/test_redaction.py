"""Fields of log events: ordered, bounded, without secrets (docs/threats.md#O1, #O2)."""

from __future__ import annotations

import enum
import json
from typing import Any

import pytest
from aiohttp.http_exceptions import BadStatusLine

from arcbridge.errors import Unauthenticated
from arcbridge.observe.redaction import Redaction

CANARY = "eyJhbGciOiJub25lIn0.Y2FuYXJ5LWNhbmFyeQ.c2ln"


def shaped(**fields: object) -> dict[str, Any]:
    return Redaction("relay")(None, "info", {"event": "x", **fields})


class Code(enum.IntEnum):
    NO_AGENT = 3


class Unprintable:
    def __str__(self) -> str:
        raise ValueError("no")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, None), (True, True), (5, 5), (10**400, "integer of 1329 bits"), (float("inf"), "inf"),
        (Code.NO_AGENT, "no_agent"), (b"\xff\x00", "\\xff\\x00"),
        (Unprintable(), "<Unprintable that cannot be written: ValueError>"),
        ({"a": {"b": (1, "x\n")}}, {"a": {"b": [1, "x\\n"]}}), (ValueError("bad\n"), "ValueError: bad\\n"),
        (Unauthenticated("expired"), "expired"), (BadStatusLine("GET /secret-path"), "BadStatusLine"),
    ],
)  # fmt: skip
def test_values_become_json(value: object, shown: object) -> None:
    assert shaped(value=value)["value"] == shown


def test_fields_are_bounded_in_number_and_size() -> None:
    found = shaped(big=list(range(100_000)), deep={"a": "y" * 5000}, **{f"f{n}": n for n in range(100)})
    assert len(found) < 60
    assert found["fields_omitted"] == 62
    assert len(json.dumps(found)) < 8192


def test_what_identifies_a_line_comes_first_and_cannot_be_replaced() -> None:
    found = Redaction("relay", 1)(None, "info", {"b": 1, "role": "agent", "cluster": "c", "session": "s", "event": "x"})
    assert list(found) == ["timestamp", "level", "event", "logger", "role", "worker", "session", "cluster", "b"]
    assert (found["role"], found["worker"]) == ("relay", 1)


def test_a_field_named_after_a_secret_loses_its_value() -> None:
    found = shaped(token="short", nested={"client_secret": "short"}, note=f"sent {CANARY}")
    assert found["token"] == found["nested"]["client_secret"] == "[redacted]"
    assert found["note"] == "sent [redacted]"


@pytest.mark.parametrize("given", [True, "error", "tuple"])
def test_an_exception_becomes_text_and_a_trace(given: object) -> None:
    try:
        raise RuntimeError(f"unexpected {CANARY}")
    except RuntimeError as error:
        info = {"error": error, "tuple": (type(error), error, None)}.get(str(given), True)
        found = shaped(exc_info=info)
    assert found["error"] == "RuntimeError: unexpected [redacted]"
    assert found["trace"][-1] == "RuntimeError: unexpected [redacted]"
    assert "exc_info" not in found


def test_no_exception_is_no_field() -> None:
    assert "error" not in shaped(exc_info=True)
    assert "error" not in shaped(exc_info=(None, None, None))
