"""The tree that the library hands over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.identity.cel.compiler import environment
from arcbridge.identity.cel.syntax import (
    Call,
    CheckedExpression,
    Comprehension,
    Identifier,
    ListLiteral,
    Literal,
    MapLiteral,
    Select,
    Type,
    descendants,
    read,
)
from arcbridge.identity.cel.values import UInt

ENVIRONMENT = environment("claims")


def checked(source: str) -> CheckedExpression:
    return read(ENVIRONMENT.compile(source).serialize())


LITERALS = [
    ("5", 5), ("-5", -5), ("5u", UInt(5)), ("2.5", 2.5), ("'é'", "é"), ("b'\\xff'", b"\xff"), ("true", True),
    ("false", False), ("null", None), ("9223372036854775807", 2**63 - 1), ("''", ""), ("0", 0),
]  # fmt: skip


@pytest.mark.parametrize(("source", "value"), LITERALS, ids=[row[0] for row in LITERALS])
def test_literals(source: str, value: object) -> None:
    root = checked(source).root
    assert isinstance(root, Literal)
    assert root.value == value
    assert type(root.value) is type(value)


def test_the_shape_of_a_tree() -> None:
    tree = checked("[claims.a, ?claims.?b].map(x, {'k': has(claims.c), ?'o': claims.?d})")
    kinds = {type(node) for node in descendants(tree.root)}
    assert kinds >= {Comprehension, ListLiteral, MapLiteral, Select, Call, Identifier, Literal}
    assert isinstance(tree.root, Comprehension)
    assert (tree.root.variable, tree.root.variable2) == ("x", "")
    assert isinstance(tree.root.range, ListLiteral)
    assert tree.root.range.optional == {1}
    (presence,) = [node for node in descendants(tree.root) if isinstance(node, Select) and node.presence]
    assert presence.field == "c"
    assert tree.type_of(tree.root) == Type("list", (Type("map", (Type("string"), Type("bool"))),))


def test_types_and_places() -> None:
    tree = checked("claims.a == 1 ? 'x' : 'y'")
    assert str(tree.type_of(tree.root)) == "string"
    assert str(checked("dyn(claims.a).map(x, 1)").type_of(checked("dyn(claims.a).map(x, 1)").root)) == "list(int)"
    select = next(node for node in descendants(tree.root) if isinstance(node, Select))
    assert tree.positions[select.id] == len("claims")
    assert tree.type_of(select) == Type("any")


def test_two_variables() -> None:
    root = checked("dyn(claims.a).all(k, v, k == v)").root
    assert isinstance(root, Comprehension)
    assert (root.variable, root.variable2) == ("k", "v")


@given(st.binary(max_size=60))
def test_what_is_no_tree(data: bytes) -> None:
    try:
        read(data)
    except ValueError:
        return


def test_a_tree_that_is_cut_short() -> None:
    whole = ENVIRONMENT.compile("claims.a == 'b'").serialize()
    for length in range(len(whole)):
        with pytest.raises(ValueError, match=r"cut short|no tree|expected"):
            read(whole[:length])
