"""The functions on lists: cel-go's extensions for lists (version 3) and sets, and Kubernetes' own for lists.

A list that a function makes anew is a plain one, also where it comes from bare strings (`values.StringList`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cmp_to_key
from itertools import pairwise

from arcbridge.identity.cel.strings import bounded
from arcbridge.identity.cel.values import (
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

SUMMED: Mapping[str, type] = {"int": int, "uint": UInt, "double": float, "duration": Duration}
"""The types of elements that have a sum."""


def concatenate(left: list[Value], right: list[Value]) -> list[Value]:
    """`+` of two lists; of which one is empty, the other."""
    if not left or not right:
        return left or right
    bounded(len(left) + len(right))
    return [*left, *right]


def contains(values: list[Value], wanted: Value) -> bool:
    """Return whether a list has an element that is equal to `wanted`."""
    for item in values:
        try:
            if equal(wanted, item):
                return True
        except EvaluationError:
            continue
    return False


def is_sorted(values: list[Value]) -> bool:
    """`isSorted`."""
    if len(values) == 1:
        _comparable(values[0])
    return all(compare(before, after) <= 0 for before, after in pairwise(values))


def extreme(sign: int, values: list[Value]) -> Value:
    """`max` (sign 1) or `min` (-1): of equal ones the first."""
    if not values:
        raise EvaluationError(f"{'max' if sign > 0 else 'min'} called on empty list")
    best = values[0]
    _comparable(best)
    for item in values[1:]:
        if compare(best, item) == -sign:
            best = item
    return best


def _comparable(value: Value) -> None:
    if not isinstance(value, bool | int | float | str | bytes | Timestamp | Duration):
        raise no_such_overload()


def total(values: list[Value], kind: str = "") -> Value:
    """`sum`; `kind`: the static type of the elements, which all must have; without one the type of the first counts."""
    known = type(values[0]) if values else int
    wanted = SUMMED[kind] if kind else known if known in SUMMED.values() else int
    if not all(type(item) is wanted for item in values):
        raise no_such_overload()
    if wanted is float:
        result = 0.0
        for item in values:
            result += item
        return result
    checked = {int: checked_int, UInt: checked_uint, Duration: checked_duration}[wanted]
    found = checked(0)
    for item in values:
        found = checked(found.nanoseconds + item.nanoseconds if isinstance(found, Duration) else found + item)
    return found


def index_of(values: list[Value], wanted: Value) -> int:
    """`indexOf` of a list."""
    return next((index for index, item in enumerate(values) if _same(item, wanted)), -1)


def last_index_of(values: list[Value], wanted: Value) -> int:
    """`lastIndexOf` of a list."""
    return next((index for index in range(len(values) - 1, -1, -1) if _same(values[index], wanted)), -1)


def _same(left: Value, right: Value) -> bool:
    try:
        return equal(left, right)
    except EvaluationError:
        return False


def part(values: list[Value], start: int, end: int) -> list[Value]:
    """`slice`."""
    if not 0 <= start <= end <= len(values):
        raise EvaluationError(f"cannot slice({start}, {end}), list is length {len(values)}")
    return values[start:end]


def flatten(values: list[Value], depth: int = 1) -> list[Value]:
    """`flatten`, `depth` levels deep."""
    if depth < 0:
        raise EvaluationError("level must be non-negative")
    out = list(values)
    # An expression nests no deeper than the parser allows, claims no deeper than their parser.
    while depth and any(isinstance(item, list) for item in out):
        bounded(sum(len(item) if isinstance(item, list) else 1 for item in out))
        out = [inner for item in out for inner in (item if isinstance(item, list) else [item])]
        depth -= 1
    return out


def sort_by(values: list[Value], keys: list[Value]) -> list[Value]:
    """Return what `sortBy` becomes: the elements in the order of their keys, which must be of one type."""
    if len(values) != len(keys):
        raise EvaluationError("sortBy has a key for each element")
    if not values:
        return values
    _comparable(keys[0])
    if len(values) > 1 and any(type_name(key) != type_name(keys[0]) for key in keys):
        raise EvaluationError("list elements must have the same type")
    order = sorted(range(len(values)), key=lambda index: _KEY(keys[index]))
    return [values[index] for index in order]


_KEY = cmp_to_key(compare)


def distinct(values: list[Value]) -> list[Value]:
    """`distinct`: the first of equal elements stays."""
    if not values:
        return values
    out: list[Value] = []
    for item in values:
        if not contains(out, item):
            out.append(item)
    return out


def numbers(count: int) -> list[Value]:
    """`lists.range`."""
    bounded(count)
    return list(range(count))


def unwrap(values: list[Value]) -> list[Value]:
    """`optional.unwrap`: the values of those that have one."""
    if not all(isinstance(item, Optional) for item in values):
        raise EvaluationError("value is not optional")
    return [item.value for item in values if item.present]


def sets_contain(values: list[Value], wanted: list[Value]) -> bool:
    """`sets.contains`."""
    return all(contains(values, item) for item in wanted)


def sets_intersect(left: list[Value], right: list[Value]) -> bool:
    """`sets.intersects`."""
    return any(contains(right, item) for item in left)


def sets_equivalent(left: list[Value], right: list[Value]) -> bool:
    """`sets.equivalent`."""
    return sets_contain(left, right) and sets_contain(right, left)
