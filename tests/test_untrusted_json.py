"""JSON of another party is parsed, or it is a ValueError: whatever its size, its nesting and its constants."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arcbridge.audit.chain import read_line
from arcbridge.identity.strict_json import parse_object
from arcbridge.relay.fleet.nats_questions import NatsQuestions
from arcbridge.relay.operations import rows_of
from arcbridge.untrusted_json import DEPTH, MOST, read_json, read_json_object

HOUSE = Path(__file__).resolve().parents[1] / "arcbridge"
ITS_OWN = {
    "agent/kube/pod_body.py": "with all pairs of an object, in 128 KiB, and RecursionError is caught",
    "client/background/caller.py": "of the user's own process",
    "client/background/connections.py": "the user's own file",
    "client/background/handover.py": "of the user's own process",
    "client/background/process.py": "of the user's own commands",
    "client/relay/relay_profile.py": "the user's own file",
    "client/state.py": "the user's own files",
    "pki/credentials.py": "the agent's own file",
    "relay/admin_socket.py": "an operator's command reads up to 256 MiB of the relay that runs",
    "relay/processes/supervisor.py": "of the relay's own worker",
    "relay/registry/sqlite.py": "the relay's own file",
    "relay/siblings/channel.py": "of the relay's own worker",
}
"""Modules that call json.loads themselves, and whose text it is."""


def nested(depth: int, kind: str) -> str:
    return {"list": "[" * depth + "]" * depth, "object": '{"a":' * depth + "1" + "}" * depth}[kind]


@pytest.mark.parametrize("kind", ["list", "object"])
def test_nesting_is_bounded_below_what_python_takes(kind: str) -> None:
    deepest = read_json(nested(DEPTH, kind))
    assert json.loads(repr(deepest).replace("'", '"')) == deepest, "code that calls itself may walk it"
    for depth in (DEPTH + 1, 500, 5000, 200_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            read_json(nested(depth, kind))
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_object(f'{{"a":{nested(depth, kind)}}}'.encode())


def test_wide_texts_are_not_deep() -> None:
    wide: list[dict[str, list[object]]] = [{"a": [{}, []]}] * 5000
    assert read_json(json.dumps(wide)) == wide
    assert read_json(json.dumps("[" * 5000)) == "[" * 5000


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"nonsense",
        b"NaN",
        b"[-Infinity]",
        b"\xff\xff",
        b"[1",
        b"1 2",
        b"9" * 5000,
        b"9" * 101,
        b"[-1e999]",
        b" " * (MOST + 1),
    ],
)
def test_what_is_no_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # of any wording
        read_json(text)
    assert read_json_object(text) == {}


def test_what_is_json_is_read_from_bytes_and_text() -> None:
    assert read_json(b'{"a": [1, "\xc3\xa4"]}') == read_json('{"a": [1, "ä"]}') == {"a": [1, "ä"]}
    assert read_json(bytearray(b"\xef\xbb\xbf[]")) == []
    assert read_json(b"[1]", 3) == [1]
    with pytest.raises(ValueError, match="larger than 2 bytes"):
        read_json(b"[1]", 2)


DEEP = nested(200_000, "list").encode()
HANDLERS: dict[str, Callable[[], Any]] = {
    "a question in NATS": lambda: NatsQuestions._asked(SimpleNamespace(), SimpleNamespace(data=DEEP)),
    "an answer in NATS": lambda: NatsQuestions._answered(
        SimpleNamespace(_waiting={"1": SimpleNamespace(full=lambda: False)}),
        SimpleNamespace(subject="inbox.1", data=DEEP),
    ),
    "rows of another relay": lambda: rows_of(DEEP),
    "a line of an audit log": lambda: read_line(b'{"chain":"1","seq":1,"prev":"2","a":' + DEEP + b"}"),
}


@pytest.mark.parametrize("read", HANDLERS.values(), ids=HANDLERS.keys())
def test_j23_what_is_nested_deeply_escapes_no_handler(read: Callable[[], Any]) -> None:
    assert not read()


def test_all_other_modules_read_it_by_this_one() -> None:
    found = set()
    for path in HOUSE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("loads", "load") and ast.unparse(node.value) == "json":
                found.add(path.relative_to(HOUSE).as_posix())
    assert found == set(ITS_OWN)
