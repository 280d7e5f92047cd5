"""The functions on lists: cel-go's extensions for lists (version 3) and sets, and Kubernetes' own for lists.

A list that a function makes anew is a plain one, also where it comes from bare strings (`values.StringList`).
"""

from __future__ import annotations

from itertools import pairwise

from arcbridge.identity.cel.strings import bounded, integer
from arcbridge.identity.cel.values import (
    NONE,
    Duration,
    EvaluationError,
    Optional,
    Timestamp,
    UInt,
    Value,
    checked_duration,
    checked_int,
    checked_uint,
    compare,
    equal,
    no_such_overload,
    type_name,
)


def elements(value: Value) -> list[Value]:
    """`value`, if it is a list. Raises EvaluationError."""
    if not isinstance(value, list):
        raise no_such_overload()
    return value


def contains(values: list[Value], wanted: Value) -> bool:
    """Tell whether a list has an element that is equal to `wanted`."""
    for item in values:
        try:
            if equal(wanted, item):
                return True
        except EvaluationError:
            continue
    return False


def is_sorted(value: Value) -> bool:
    """`isSorted`."""
    items = elements(value)
    if len(items) == 1:
        _comparable(items[0])
    return all(compare(before, after) <= 0 for before, after in pairwise(items))


def largest(value: Value) -> Value:
    """`max`: of equal ones the first."""
    return _extreme(value, 1, "max")


def smallest(value: Value) -> Value:
    """`min`: of equal ones the first."""
    return _extreme(value, -1, "min")


def _extreme(value: Value, sign: int, name: str) -> Value:
    items = elements(value)
    if not items:
        raise EvaluationError(f"{name} called on empty list")
    best = items[0]
    _comparable(best)
    for item in items[1:]:
        if compare(best, item) == -sign:
            best = item
    return best


def _comparable(value: Value) -> None:
    if not isinstance(value, bool | int | float | str | bytes | Timestamp | Duration):
        raise no_such_overload()


def total(value: Value, kind: str = "int") -> Value:
    """`sum`; `kind` is the static type of the elements, which an empty list needs and which all elements must have."""
    items = elements(value)
    if kind == "duration":
        if not all(isinstance(item, Duration) for item in items):
            raise no_such_overload()
        nanoseconds = 0
        for item in items:
            nanoseconds = checked_duration(nanoseconds + item.nanoseconds).nanoseconds
        return Duration(nanoseconds)
    wanted = {"int": int, "uint": UInt, "double": float}[kind]
    if not all(type(item) is wanted for item in items):
        raise no_such_overload()
    if wanted is float:
        result = 0.0
        for item in items:
            result += item
        return result
    number = 0
    for item in items:
        number = checked_int(number + item) if wanted is int else checked_uint(number + item)
    return number if wanted is int else UInt(number)


def index_of(value: Value, wanted: Value) -> int:
    """`indexOf` of a list."""
    return next((index for index, item in enumerate(elements(value)) if _same(item, wanted)), -1)


def last_index_of(value: Value, wanted: Value) -> int:
    """`lastIndexOf` of a list."""
    items = elements(value)
    return next((index for index in range(len(items) - 1, -1, -1) if _same(items[index], wanted)), -1)


def _same(left: Value, right: Value) -> bool:
    try:
        return equal(left, right)
    except EvaluationError:
        return False


def part(value: Value, start: Value, end: Value) -> list[Value]:
    """`slice`."""
    items, begin, stop = elements(value), integer(start), integer(end)
    if begin < 0 or stop < 0 or begin > stop or stop > len(items):
        raise EvaluationError(f"cannot slice({begin}, {stop}), list is length {len(items)}")
    return list(items[begin:stop])


def flatten(value: Value, depth: Value = 1) -> list[Value]:
    """`flatten`, `depth` levels deep."""
    items, levels = elements(value), integer(depth)
    if levels < 0:
        raise EvaluationError("level must be non-negative")
    out = list(items)
    # An expression nests no deeper than the parser allows, claims no deeper than their parser.
    while levels and any(isinstance(item, list) for item in out):
        bounded(sum(len(item) if isinstance(item, list) else 1 for item in out))
        out = [inner for item in out for inner in (item if isinstance(item, list) else [item])]
        levels -= 1
    return out


def sort(value: Value) -> list[Value]:
    """`sort`."""
    return sort_by(value, value)


def sort_by(value: Value, sort_keys: Value) -> list[Value]:
    """Return what `sortBy` becomes: the elements in the order of their keys, which must be of one type."""
    items, keys = elements(value), elements(sort_keys)
    if len(items) != len(keys):
        raise EvaluationError("sortBy has a key for each element")
    if not items:
        return items
    _comparable(keys[0])
    if len(items) > 1 and any(type_name(key) != type_name(keys[0]) for key in keys):
        raise EvaluationError("list elements must have the same type")
    order = sorted(range(len(items)), key=lambda index: _Order(keys[index]))
    return [items[index] for index in order]


class _Order:
    """A key as `sorted` compares it."""

    __slots__ = ("_key",)

    def __init__(self, key: Value) -> None:
        self._key = key

    def __lt__(self, other: _Order) -> bool:
        return compare(self._key, other._key) < 0


def distinct(value: Value) -> list[Value]:
    """`distinct`: the first of equal elements stays."""
    items = elements(value)
    if not items:
        return items
    out: list[Value] = []
    for item in items:
        if not contains(out, item):
            out.append(item)
    return out


def reverse(value: Value) -> list[Value]:
    """`reverse`."""
    return list(reversed(elements(value)))


def numbers(count: Value) -> list[Value]:
    """`lists.range`."""
    most = integer(count)
    bounded(most)
    return list(range(max(0, most)))


def first(value: Value) -> Optional:
    """`first`."""
    items = elements(value)
    return Optional(items[0]) if items else NONE


def last(value: Value) -> Optional:
    """`last`."""
    items = elements(value)
    return Optional(items[-1]) if items else NONE


def unwrap(value: Value) -> list[Value]:
    """`optional.unwrap`: the values of those that have one."""
    items = elements(value)
    if not all(isinstance(item, Optional) for item in items):
        raise EvaluationError("value is not optional")
    return [item.value for item in items if item.present]


def sets_contain(values: Value, wanted: Value) -> bool:
    """`sets.contains`."""
    items = elements(values)
    return all(contains(items, item) for item in elements(wanted))


def sets_intersect(left: Value, right: Value) -> bool:
    """`sets.intersects`."""
    items = elements(right)
    return any(contains(items, item) for item in elements(left))


def sets_equivalent(left: Value, right: Value) -> bool:
    """`sets.equivalent`."""
    return sets_contain(left, right) and sets_contain(right, left)
