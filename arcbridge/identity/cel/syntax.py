"""The checked syntax tree of an expression, read from the library's serialised form.

The form is the protobuf message `cel.expr.CheckedExpr` of the CEL specification (checked.proto, syntax.proto). Only the
fields that evaluation and validation use are read; others are skipped by their wire type, as protobuf asks. The input
comes from the library alone, never from a peer; what is cut short or unknown raises ValueError.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from arcbridge import protobuf
from arcbridge.identity.cel.values import UInt

NULL, BOOL, INT, UINT, DOUBLE, STRING, BYTES = "null", "bool", "int", "uint", "double", "string", "bytes"
DYN, ANY, LIST, MAP, TYPE, ERROR, PARAMETER = "dyn", "any", "list", "map", "type", "error", "parameter"
TIMESTAMP, DURATION = "timestamp", "duration"

_PRIMITIVES = {1: BOOL, 2: INT, 3: UINT, 4: DOUBLE, 5: STRING, 6: BYTES}
_ALONE = {1: DYN, 2: NULL, 10: PARAMETER, 11: TYPE}
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
class Literal:
    """A constant."""

    id: int
    value: bool | int | float | str | bytes | None


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
class MapEntry:
    """One `key: value` of a map literal, `?key: value` where `optional` is true."""

    id: int
    key: Node
    value: Node
    optional: bool


@dataclass(frozen=True, slots=True)
class MapLiteral:
    """`{key: value}`."""

    id: int
    entries: tuple[MapEntry, ...]


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
class CheckedExpression:
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


def read(data: bytes) -> CheckedExpression:
    """Read a `CheckedExpr`, packed in a `google.protobuf.Any` as the library serialises it. Raises ValueError."""
    message = _Message(_Message(data).data(2))
    if 4 not in message:
        raise ValueError("the checked expression has no tree")
    types = {entry.integer(1): _type(entry.data(2)) for entry in message.messages(3)}
    places = [entry for source in message.messages(5) for entry in source.messages(4)]
    positions = {entry.integer(1): entry.integer(2) for entry in places}
    return CheckedExpression(_node(message.data(4)), types, positions)


_Value = int | bytes


class _Message(dict[int, list[_Value]]):
    """The fields of a message by their numbers. What is absent is empty, as protobuf has it; the last value counts."""

    def __init__(self, data: bytes) -> None:
        for number, value in protobuf.fields(data):
            self.setdefault(number, []).append(value)

    def data(self, number: int) -> bytes:
        return _bytes(self[number][-1]) if number in self else b""

    def text(self, number: int) -> str:
        return self.data(number).decode()

    def integer(self, number: int) -> int:
        return _int(self[number][-1]) if number in self else 0

    def messages(self, number: int) -> list[_Message]:
        return [_Message(_bytes(value)) for value in self.get(number, ())]

    def node(self, number: int) -> Node:
        return _node(self.data(number))

    def nodes(self, number: int) -> tuple[Node, ...]:
        return tuple(_node(_bytes(value)) for value in self.get(number, ()))


def _bytes(value: _Value) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where a message is expected")
    return value


def _int(value: _Value) -> int:
    if not isinstance(value, int):
        raise ValueError("a message where a number is expected")
    return value - (1 << 64) if value >> 63 else value


def _type(data: bytes) -> Type:
    for number, value in protobuf.fields(data):
        if number in _ALONE:
            return Type(_ALONE[number])
        if number == 3:
            return Type(_PRIMITIVES.get(_int(value), DYN))
        if number == 4:
            return Type("wrapper", (Type(_PRIMITIVES.get(_int(value), DYN)),))
        if number == 5:
            return Type(_WELL_KNOWN.get(_int(value), ANY))
        if number in (6, 7):
            return Type(
                LIST if number == 6 else MAP, tuple(_type(_bytes(part)) for _, part in protobuf.fields(_bytes(value)))
            )
        if number == 9:
            return Type(_bytes(value).decode())
        if number == 14:
            inner = list(protobuf.fields(_bytes(value)))
            name = next((_bytes(part).decode() for field, part in inner if field == 1), "")
            return Type(name, tuple(_type(_bytes(part)) for field, part in inner if field == 2))
    return Type(ERROR)


def _node(data: bytes) -> Node:
    node_id = 0
    for number, value in protobuf.fields(data):
        if number == 2:
            node_id = _int(value)
        elif number == 3:
            return _literal(node_id, _bytes(value))
        elif number in _READERS:
            # The id is written before the rest, as the field numbers are.
            return _READERS[number](node_id, _Message(_bytes(value)))
    return Literal(node_id, None)


def _literal(node_id: int, data: bytes) -> Node:
    for number, value in protobuf.fields(data):
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


def _call(node_id: int, message: _Message) -> Node:
    target = message.node(1) if 1 in message else None
    return Call(node_id, target, message.text(2), message.nodes(3))


def _list(node_id: int, message: _Message) -> Node:
    optional: set[int] = set()
    for value in message.get(2, ()):
        if isinstance(value, int):
            optional.add(value)
            continue
        at = 0  # packed
        while at < len(value):
            index, at = protobuf.varint(value, at)
            optional.add(index)
    return ListLiteral(node_id, message.nodes(1), frozenset(optional))


def _struct(node_id: int, message: _Message) -> Node:
    if name := message.text(1):
        return MessageLiteral(node_id, name)
    entries = message.messages(2)
    return MapLiteral(
        node_id,
        tuple(MapEntry(entry.integer(1), entry.node(3), entry.node(4), bool(entry.integer(5))) for entry in entries),
    )


def _comprehension(node_id: int, message: _Message) -> Node:
    over, start, condition, step, result = map(message.node, (2, 4, 5, 6, 7))
    return Comprehension(
        node_id, message.text(1), message.text(8), over, message.text(3), start, condition, step, result
    )


_READERS: Mapping[int, Callable[[int, _Message], Node]] = {
    4: lambda node_id, message: Identifier(node_id, message.text(1)),
    5: lambda node_id, message: Select(node_id, message.node(1), message.text(2), bool(message.integer(3))),
    6: _call,
    7: _list,
    8: _struct,
    9: _comprehension,
}
