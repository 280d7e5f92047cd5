"""The checked syntax tree of an expression, read from the library's serialised form.

The form is the protobuf message `cel.expr.CheckedExpr` of the CEL specification (checked.proto, syntax.proto). Only the
fields that evaluation and validation use are read; others are skipped by their wire type, as protobuf asks. The input
comes from the library alone, never from a peer; what is cut short or unknown raises ValueError.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

NULL, BOOL, INT, UINT, DOUBLE, STRING, BYTES = "null", "bool", "int", "uint", "double", "string", "bytes"
DYN, ANY, LIST, MAP, TYPE, ERROR, PARAMETER = "dyn", "any", "list", "map", "type", "error", "parameter"
TIMESTAMP, DURATION = "timestamp", "duration"

_PRIMITIVES = {1: BOOL, 2: INT, 3: UINT, 4: DOUBLE, 5: STRING, 6: BYTES}
_WELL_KNOWN = {1: ANY, 2: TIMESTAMP, 3: DURATION}


@dataclass(frozen=True, slots=True)
class Type:
    """A static type: its `name` (a constant above, or that of an opaque type) and the types that it is made of."""

    name: str
    parameters: tuple[Type, ...] = ()

    def __str__(self) -> str:
        if not self.parameters:
            return self.name
        return f"{self.name}({', '.join(map(str, self.parameters))})"


@dataclass(frozen=True, slots=True)
class UInt:
    """A literal such as `5u`."""

    value: int


@dataclass(frozen=True, slots=True)
class Literal:
    """`value`: None, bool, int, UInt, float, str or bytes."""

    id: int
    value: bool | int | UInt | float | str | bytes | None


@dataclass(frozen=True, slots=True)
class Identifier:
    """A variable; one that is declared with a path for a name, such as `user.username`, has that name."""

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Select:
    """`operand.field`, or `has(operand.field)` where `presence` is true."""

    id: int
    operand: Node
    field: str
    presence: bool


@dataclass(frozen=True, slots=True)
class Call:
    """A function or operator; `target` is the receiver of a member call."""

    id: int
    target: Node | None
    function: str
    arguments: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class ListLiteral:
    """`[a, ?b]`; `optional`: the indices of elements with `?`."""

    id: int
    elements: tuple[Node, ...]
    optional: frozenset[int]


@dataclass(frozen=True, slots=True)
class Entry:
    """One `key: value` of a map literal, `?key: value` where `optional` is true."""

    id: int
    key: Node
    value: Node
    optional: bool


@dataclass(frozen=True, slots=True)
class MapLiteral:
    """`{key: value}`."""

    id: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True, slots=True)
class MessageLiteral:
    """`name{field: value}`."""

    id: int
    name: str


@dataclass(frozen=True, slots=True)
class Comprehension:
    """What a macro such as `all` or `map` becomes; `variable2` is empty where it has one variable."""

    id: int
    variable: str
    variable2: str
    range: Node
    accumulator: str
    start: Node
    condition: Node
    step: Node
    result: Node


Node = Literal | Identifier | Select | Call | ListLiteral | MapLiteral | MessageLiteral | Comprehension


@dataclass(frozen=True, slots=True)
class Checked:
    """An expression's tree, the `types` of its nodes by their id, and where each node stands: its 0-based character."""

    root: Node
    types: Mapping[int, Type]
    positions: Mapping[int, int]

    def type_of(self, node: Node) -> Type:
        """Return the static type of `node`."""
        return self.types.get(node.id, Type(DYN))


def children(node: Node) -> Iterator[Node]:
    """Yield the nodes directly below `node`."""
    if isinstance(node, Select):
        yield node.operand
    elif isinstance(node, Call):
        if node.target is not None:
            yield node.target
        yield from node.arguments
    elif isinstance(node, ListLiteral):
        yield from node.elements
    elif isinstance(node, MapLiteral):
        for entry in node.entries:
            yield entry.key
            yield entry.value
    elif isinstance(node, Comprehension):
        yield from (node.range, node.start, node.condition, node.step, node.result)


def descendants(node: Node) -> Iterator[Node]:
    """`node` and all nodes below it."""
    waiting = [node]
    while waiting:
        current = waiting.pop()
        yield current
        waiting.extend(children(current))


def read(data: bytes) -> Checked:
    """Read a `CheckedExpr`, packed in a `google.protobuf.Any` as the library serialises it. Raises ValueError."""
    message = next((_bytes(value) for number, value in _fields(data) if number == 2), b"")
    types: dict[int, Type] = {}
    positions: dict[int, int] = {}
    root: Node | None = None
    for number, value in _fields(message):
        if number == 3:
            key, part = _entry(value)
            types[key] = _type(part)
        elif number == 4:
            root = _node(_bytes(value))
        elif number == 5:
            for inner, entry in _fields(_bytes(value)):
                if inner == 4:
                    pair = dict(_fields(_bytes(entry)))
                    positions[_int(pair.get(1, 0))] = _int(pair.get(2, 0))
    if root is None:
        raise ValueError("the checked expression has no tree")
    return Checked(root, types, positions)


_Value = int | bytes


def _fields(data: bytes) -> Iterator[tuple[int, _Value]]:
    """Yield the fields of a message: their numbers, and an int (varint), or bytes (all else)."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            number, at = _varint(data, at)
            yield tag >> 3, number
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} is not known")
        if at + size > len(data):
            raise ValueError("the message is cut short")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError("the message is cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _bytes(value: _Value) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message is expected")
    return value


def _int(value: _Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a message where a number is expected")
    return value - (1 << 64) if value >> 63 else value


def _entry(value: _Value) -> tuple[int, bytes]:
    key, message = 0, b""
    for number, part in _fields(_bytes(value)):
        if number == 1:
            key = _int(part)
        elif number == 2:
            message = _bytes(part)
    return key, message


def _last_text(data: bytes, wanted: int) -> str:
    text = ""
    for number, value in _fields(data):
        if number == wanted:
            text = _bytes(value).decode()
    return text


def _type(data: bytes) -> Type:
    for number, value in _fields(data):
        if number == 1:
            return Type(DYN)
        if number == 2:
            return Type(NULL)
        if number == 3:
            return Type(_PRIMITIVES.get(_int(value), DYN))
        if number == 4:
            return Type("wrapper", (Type(_PRIMITIVES.get(_int(value), DYN)),))
        if number == 5:
            return Type(_WELL_KNOWN.get(_int(value), ANY))
        if number in (6, 7):
            return Type(LIST if number == 6 else MAP, tuple(_type(_bytes(part)) for _, part in _fields(_bytes(value))))
        if number == 9:
            return Type(_bytes(value).decode())
        if number == 10:
            return Type(PARAMETER)
        if number == 11:
            return Type(TYPE)
        if number == 14:
            inner = list(_fields(_bytes(value)))
            name = next((_bytes(part).decode() for field, part in inner if field == 1), "")
            return Type(name, tuple(_type(_bytes(part)) for field, part in inner if field == 2))
    return Type(ERROR)


def _node(data: bytes) -> Node:
    node_id = 0
    for number, value in _fields(data):
        if number == 2:
            node_id = _int(value)
        elif number in _READERS:
            # The id is written before the rest, as the field numbers are.
            return _READERS[number](node_id, _bytes(value))
    return Literal(node_id, None)


def _literal(node_id: int, data: bytes) -> Node:
    for number, value in _fields(data):
        if number == 2:
            return Literal(node_id, bool(value))
        if number == 3:
            return Literal(node_id, _int(value))
        if number == 4 and isinstance(value, int):
            return Literal(node_id, UInt(value))
        if number == 5:
            return Literal(node_id, struct.unpack("<d", _bytes(value))[0])
        if number == 6:
            return Literal(node_id, _bytes(value).decode())
        if number == 7:
            return Literal(node_id, _bytes(value))
    return Literal(node_id, None)


def _identifier(node_id: int, data: bytes) -> Node:
    return Identifier(node_id, _last_text(data, 1))


def _select(node_id: int, data: bytes) -> Node:
    operand: Node = Literal(0, None)
    field, presence = "", False
    for number, value in _fields(data):
        if number == 1:
            operand = _node(_bytes(value))
        elif number == 2:
            field = _bytes(value).decode()
        elif number == 3:
            presence = bool(value)
    return Select(node_id, operand, field, presence)


def _call(node_id: int, data: bytes) -> Node:
    target: Node | None = None
    function = ""
    arguments: list[Node] = []
    for number, value in _fields(data):
        if number == 1:
            target = _node(_bytes(value))
        elif number == 2:
            function = _bytes(value).decode()
        elif number == 3:
            arguments.append(_node(_bytes(value)))
    return Call(node_id, target, function, tuple(arguments))


def _list(node_id: int, data: bytes) -> Node:
    elements: list[Node] = []
    optional: set[int] = set()
    for number, value in _fields(data):
        if number == 1:
            elements.append(_node(_bytes(value)))
        elif number == 2 and isinstance(value, int):
            optional.add(value)
        elif number == 2:  # packed
            at, packed = 0, _bytes(value)
            while at < len(packed):
                index, at = _varint(packed, at)
                optional.add(index)
    return ListLiteral(node_id, tuple(elements), frozenset(optional))


def _struct(node_id: int, data: bytes) -> Node:
    name = _last_text(data, 1)
    if name:
        return MessageLiteral(node_id, name)
    return MapLiteral(node_id, tuple(_map_entry(_bytes(value)) for number, value in _fields(data) if number == 2))


def _map_entry(data: bytes) -> Entry:
    entry_id, optional = 0, False
    key: Node = Literal(0, None)
    content: Node = Literal(0, None)
    for number, value in _fields(data):
        if number == 1:
            entry_id = _int(value)
        elif number == 3:
            key = _node(_bytes(value))
        elif number == 4:
            content = _node(_bytes(value))
        elif number == 5:
            optional = bool(value)
    return Entry(entry_id, key, content, optional)


def _comprehension(node_id: int, data: bytes) -> Node:
    texts = {1: "", 3: "", 8: ""}
    nodes: dict[int, Node] = {number: Literal(0, None) for number in (2, 4, 5, 6, 7)}
    for number, value in _fields(data):
        if number in texts:
            texts[number] = _bytes(value).decode()
        elif number in nodes:
            nodes[number] = _node(_bytes(value))
    return Comprehension(node_id, texts[1], texts[8], nodes[2], texts[3], nodes[4], nodes[5], nodes[6], nodes[7])


_READERS = {3: _literal, 4: _identifier, 5: _select, 6: _call, 7: _list, 8: _struct, 9: _comprehension}
