"""What each function and operator does, and what a call costs, by its name and its number of arguments.

A function looks at its arguments' types itself, as it must where the checker knew a claim only as `any`. Costs are
those of kube-apiserver's tracker, computed before the call where it computes them after: a call that would cost too
much is not made. Source: cel-go's `interpreter/runtimecost.go` and Kubernetes' `pkg/cel/library/cost.go`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from arcbridge.identity.cel import (
    addresses,
    formats,
    formatting,
    lists,
    quantities,
    regex,
    strings,
    timestamps,
    versions,
)
from arcbridge.identity.cel.numbers import read_double, read_int, read_uint, write_double
from arcbridge.identity.cel.values import (
    INT_MAX,
    INT_MIN,
    MAX_SECONDS,
    MIN_SECONDS,
    NANOSECONDS,
    NONE,
    Duration,
    EvaluationError,
    Map,
    Optional,
    Timestamp,
    TypeValue,
    UInt,
    Value,
    checked_duration,
    checked_int,
    checked_timestamp,
    checked_uint,
    compare,
    equal,
    is_zero,
    no_such_overload,
    size,
    type_name,
)

LIST_COST, MAP_COST = 10, 30
"""What making a list or a map costs."""


class Function(NamedTuple):
    """`call` computes, `cost` tells what that costs; both take the receiver first, then the arguments."""

    call: Callable[..., Value]
    cost: Callable[..., int]


def one(*_: Value) -> int:
    """Return the cost of what does not depend on sizes."""
    return 1


def _tenth(length: float) -> int:
    return math.ceil(length * 0.1)


def _first(value: Value, *_: Value) -> int:
    return _tenth(size(value))


def _twice(value: Value, *_: Value) -> int:
    return _tenth(size(value) * 2)


def _replaced(value: Value, *arguments: Value) -> int:
    # kube-apiserver counts the text twice, also where the result is a thousand times as long.
    length = strings.replaced_length(value, *arguments)
    strings.bounded(length)
    return _tenth(size(value) + max(size(value), length))


def _queried(value: Value) -> int:
    # kube-apiserver counts 1 for a text of any length.
    return 1 + (len(value.query) // 10 if isinstance(value, addresses.Url) else 0)


def _inside(value: Value) -> int:
    """Return what comparing a list or a map costs for what is inside its elements, which kube-apiserver does not
    count."""
    if not isinstance(value, list | Map):
        return 0
    count = 0
    waiting = [value]
    while waiting:
        current = waiting.pop()
        items = current if isinstance(current, list) else [item for _, item in current.items()]
        for item in items:
            if isinstance(item, list | Map):
                count += len(item)
                waiting.append(item)
    return count // 2


def _shorter(left: Value, right: Value) -> int:
    return _tenth(min(size(left), size(right))) + _inside(left)


def _both(left: Value, right: Value) -> int:
    if isinstance(left, str | bytes):
        return _tenth(size(left) + size(right))
    # kube-apiserver joins lists without copying them.
    return 1 + (size(left) + size(right)) // 50 if isinstance(left, list) else 1


def _converted(value: Value) -> int:
    return max(1, _tenth(len(value))) if isinstance(value, str) else 1


def _formatted(value: Value, values: Value) -> int:
    written = 0
    waiting = [values]
    while waiting:
        current = waiting.pop()
        if isinstance(current, list | Map):
            items = current if isinstance(current, list) else [item for pair in current.items() for item in pair]
            written += len(items)
            waiting.extend(item for item in items if isinstance(item, list | Map))
            written += sum(_tenth(len(item)) for item in items if isinstance(item, str | bytes))
    return _tenth(size(value)) + written


def _product(left: Value, right: Value) -> int:
    return _tenth(size(left)) * _tenth(size(right))


def _regex(value: Value, pattern: Value, *_: Value) -> int:
    return _tenth(1 + size(value)) * math.ceil(size(pattern) * 0.25)


def _membership(wanted: Value, values: Value) -> int:
    return size(values) + _inside(values) if isinstance(values, list) else 1


def _walk(value: Value, *_: Value) -> int:
    if isinstance(value, list):
        return len(value) + sum(_tenth(len(item)) for item in value if isinstance(item, str | bytes)) + _inside(value)
    return _tenth(size(value))


def _squared(items: Value) -> int:
    if not isinstance(items, list):
        return 1
    factor = 2.1 if items and isinstance(items[0], str | bytes) else 2.0
    return int(len(items) ** 2 * factor) + _inside(items) * len(items) + 1 + LIST_COST


def _sorted(value: Value, keys: Value = None) -> int:
    items = value if keys is None else keys
    # kube-apiserver counts the square of the length where it knows the elements' type, and 1 where it does not.
    return int(size(items) * max(1, size(items)).bit_length() * 2.1) + 1 + LIST_COST


def _crossed(factor: int, left: Value, right: Value) -> int:
    return 1 + (size(left) + _inside(left)) * size(right) * factor


def _copied(value: Value, *_: Value) -> int:
    return size(value) + 1 + LIST_COST


def _sliced(value: Value, start: Value, end: Value) -> int:
    length = end - start if type(start) is int and type(end) is int else 0
    return max(0, min(length, size(value))) + 1 + LIST_COST


def _counted(count: Value) -> int:
    return max(0, count if type(count) is int else 0) + 1 + LIST_COST


def _flattened(value: Value, depth: Value = 1) -> int:
    return int(size(value) * max(0, depth if type(depth) is int else 0)) + 1 + LIST_COST


def _joined(value: Value, separator: Value = "") -> int:
    if not isinstance(value, list):
        return 1
    between = len(separator) * max(0, len(value) - 1) if isinstance(separator, str) else 0
    return _tenth(2 * (between + sum(len(item) for item in value if isinstance(item, str))))


def _validated(value: Value, name: Value) -> int:
    pattern = value.pattern_size if isinstance(value, formats.Format) else 1
    return _tenth(1 + size(name)) * math.ceil(pattern * 0.25)


def _contained(block: Value, other: Value) -> int:
    return _tenth(2 * size(block)) + (_tenth(size(other)) if isinstance(other, str) else 0)


def _contained_block(block: Value, other: Value) -> int:
    return _contained(block, other) + _tenth(size(block)) + 1


def _ip_cost(value: Value) -> int:
    return 1 if isinstance(value, addresses.Cidr) else _tenth(size(value))


# Operators.


def add(left: Value, right: Value) -> Value:
    """`+`."""
    kind = type(left)
    if kind is type(right):
        if kind is str or kind is bytes:
            strings.bounded(len(left) + len(right))
            return left + right
        if kind is float:
            return left + right
        if kind is int:
            return checked_int(left + right)
        if kind is UInt:
            return checked_uint(left + right)
        if kind is Duration:
            return checked_duration(left.nanoseconds + right.nanoseconds)
    if isinstance(left, list) and isinstance(right, list):
        if not left or not right:
            return left or right
        strings.bounded(len(left) + len(right))
        return [*left, *right]
    if isinstance(left, Timestamp) and isinstance(right, Duration):
        return checked_timestamp(left.nanoseconds + right.nanoseconds, left.offset)
    if isinstance(left, Duration) and isinstance(right, Timestamp):
        return checked_timestamp(left.nanoseconds + right.nanoseconds, right.offset)
    raise no_such_overload()


def subtract(left: Value, right: Value) -> Value:
    """`-` of two."""
    kind = type(left)
    if kind is type(right):
        if kind is float:
            return left - right
        if kind is int:
            return checked_int(left - right)
        if kind is UInt:
            return checked_uint(left - right)
        if kind is Duration or kind is Timestamp:
            return checked_duration(left.nanoseconds - right.nanoseconds)
    if isinstance(left, Timestamp) and isinstance(right, Duration):
        return checked_timestamp(left.nanoseconds - right.nanoseconds, left.offset)
    raise no_such_overload()


def multiply(left: Value, right: Value) -> Value:
    """`*`."""
    kind = type(left)
    if kind is type(right):
        if kind is float:
            return left * right
        if kind is int:
            return checked_int(left * right)
        if kind is UInt:
            return checked_uint(left * right)
    raise no_such_overload()


def divide(left: Value, right: Value) -> Value:
    """`/`: of integers towards zero."""
    kind = type(left)
    if kind is type(right):
        if kind is float:
            if right:
                return left / right
            if left == 0 or left != left:
                return math.nan
            return math.copysign(math.inf, left) * math.copysign(1.0, right)
        if kind is int or kind is UInt:
            if not right:
                raise EvaluationError("division by zero")
            whole = abs(left) // abs(right)
            return checked_int(whole if (left < 0) == (right < 0) else -whole) if kind is int else UInt(whole)
    raise no_such_overload()


def remainder(left: Value, right: Value) -> Value:
    """`%`: with the sign of the left operand."""
    kind = type(left)
    if kind is not type(right) or kind not in (int, UInt):
        raise no_such_overload()
    if not right:
        raise EvaluationError("modulus by zero")
    if left == INT_MIN and right == -1:
        raise EvaluationError("integer overflow")
    rest = abs(left) % abs(right)
    return UInt(rest) if kind is UInt else (-rest if left < 0 else rest)


def negate(value: Value) -> Value:
    """`-` of one."""
    if isinstance(value, float):
        return -value
    if type(value) is int:
        return checked_int(-value)
    if isinstance(value, Duration):
        return checked_duration(-value.nanoseconds)
    raise no_such_overload()


def invert(value: Value) -> Value:
    """`!`."""
    if not isinstance(value, bool):
        raise no_such_overload()
    return not value


def contains(wanted: Value, values: Value) -> bool:
    """`in`."""
    if isinstance(values, list):
        return lists.contains(values, wanted)
    if isinstance(values, Map):
        return wanted in values
    raise no_such_overload()


# Conversions.


def to_int(value: Value) -> Value:
    """`int(…)`."""
    if isinstance(value, str):
        return read_int(value)
    if isinstance(value, float):
        if not -(2.0**63) < value < 2.0**63:
            raise EvaluationError("integer overflow")
        return int(value)
    if isinstance(value, Timestamp):
        return value.nanoseconds // NANOSECONDS
    if isinstance(value, Duration):
        return value.nanoseconds
    if isinstance(value, bool) or not isinstance(value, int):
        raise no_such_overload()
    if value > INT_MAX:
        raise EvaluationError("integer overflow")
    return int(value)


def to_uint(value: Value) -> Value:
    """`uint(…)`."""
    if isinstance(value, str):
        return read_uint(value)
    if isinstance(value, float):
        if not 0 <= value < 2.0**64:
            raise EvaluationError("unsigned integer overflow")
        return UInt(int(value))
    if isinstance(value, bool) or not isinstance(value, int):
        raise no_such_overload()
    return checked_uint(value)


def to_double(value: Value) -> Value:
    """`double(…)`."""
    if isinstance(value, str):
        return read_double(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise no_such_overload()
    return float(value)


def to_string(value: Value) -> Value:
    """`string(…)`."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return write_double(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise EvaluationError("invalid UTF-8 in bytes, cannot convert to string") from error
    if isinstance(value, Timestamp):
        return timestamps.write_timestamp(value)
    if isinstance(value, Duration):
        return timestamps.write_duration(value)
    if isinstance(value, addresses.Ip):
        return addresses.write_ip(value)
    if isinstance(value, addresses.Cidr):
        return addresses.write_cidr(value)
    if isinstance(value, addresses.Url):
        return value.whole
    raise no_such_overload()


_BOOLS = {"1": True, "t": True, "T": True, "TRUE": True, "true": True, "True": True}
_BOOLS |= {"0": False, "f": False, "F": False, "FALSE": False, "false": False, "False": False}


def to_bool(value: Value) -> Value:
    """`bool(…)`."""
    if isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise no_such_overload()
    if value not in _BOOLS:
        raise EvaluationError("not a bool")
    return _BOOLS[value]


def to_bytes(value: Value) -> Value:
    """`bytes(…)`."""
    if isinstance(value, bytes):
        return value
    return strings.text(value).encode("utf-8", "surrogatepass")


def to_timestamp(value: Value) -> Value:
    """`timestamp(…)`, of a text or of seconds since 1970."""
    if isinstance(value, Timestamp):
        return value
    if isinstance(value, str):
        return timestamps.read_timestamp(value)
    seconds = strings.integer(value)
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise EvaluationError("timestamp overflow")
    return Timestamp(seconds * NANOSECONDS)


def to_duration(value: Value) -> Value:
    """`duration(…)`."""
    if isinstance(value, Duration):
        return value
    return timestamps.read_duration(strings.text(value))


CONVERSIONS: Mapping[str, Callable[[Value], Value]] = {
    "int": to_int,
    "uint": to_uint,
    "double": to_double,
    "string": to_string,
    "bool": to_bool,
    "bytes": to_bytes,
    "timestamp": to_timestamp,
    "duration": to_duration,
    "dyn": lambda value: value,
    "type": lambda value: TypeValue(type_name(value)),
}


# Functions on values of several types.


def measure(value: Value) -> int:
    """`size`."""
    if isinstance(value, str | bytes | list | Map):
        return len(value)
    raise no_such_overload()


def index_of(value: Value, *rest: Value) -> int:
    """`indexOf` of a string or a list."""
    if isinstance(value, list) and len(rest) == 1:
        return lists.index_of(value, *rest)
    return strings.index_of(value, *rest)


def last_index_of(value: Value, *rest: Value) -> int:
    """`lastIndexOf` of a string or a list."""
    if isinstance(value, list) and len(rest) == 1:
        return lists.last_index_of(value, *rest)
    return strings.last_index_of(value, *rest)


def order(left: Value, right: Value) -> int:
    """`compareTo` of two quantities or two versions."""
    if isinstance(left, quantities.Quantity) and isinstance(right, quantities.Quantity):
        return quantities.compare(left, right)
    if isinstance(left, versions.Version) and isinstance(right, versions.Version):
        return versions.compare(left, right)
    raise no_such_overload()


def ip(value: Value) -> Value:
    """`ip(…)` of a text, or `ip()` of a block."""
    return addresses.address_of(value) if isinstance(value, addresses.Cidr) else addresses.read_ip(value)


def _of_nonzero(value: Value) -> Optional:
    return NONE if is_zero(value) else Optional(value)


def _optional(value: Value) -> Optional:
    if not isinstance(value, Optional):
        raise no_such_overload()
    return value


def _less(left: Value, right: Value) -> bool:
    return compare(left, right) < 0


def _less_equal(left: Value, right: Value) -> bool:
    return compare(left, right) <= 0


def _greater(left: Value, right: Value) -> bool:
    return compare(left, right) > 0


def _greater_equal(left: Value, right: Value) -> bool:
    return compare(left, right) >= 0


def _unequal(left: Value, right: Value) -> bool:
    try:
        return not equal(left, right)
    except EvaluationError:
        # kube-apiserver takes what cannot be compared for different.
        return True


def _insert(target: Value, key: Value, value: Value) -> Map:
    if not isinstance(target, Map):
        raise no_such_overload()
    return target.with_entry(key, value)


def _insert_all(target: Value, more: Value) -> Map:
    if not isinstance(target, Map) or not isinstance(more, Map):
        raise no_such_overload()
    made = target
    for key, value in more.items():
        made = made.with_entry(key, value)
    return made


FUNCTIONS: dict[tuple[str, int], Function] = {
    ("_+_", 2): Function(add, _both),
    ("_-_", 2): Function(subtract, one),
    ("_*_", 2): Function(multiply, one),
    ("_/_", 2): Function(divide, one),
    ("_%_", 2): Function(remainder, one),
    ("-_", 1): Function(negate, one),
    ("!_", 1): Function(invert, one),
    ("_==_", 2): Function(equal, _shorter),
    ("_!=_", 2): Function(_unequal, _shorter),
    ("_<_", 2): Function(_less, _shorter),
    ("_<=_", 2): Function(_less_equal, _shorter),
    ("_>_", 2): Function(_greater, _shorter),
    ("_>=_", 2): Function(_greater_equal, _shorter),
    ("@in", 2): Function(contains, _membership),
    **{(name, 1): Function(call, _converted) for name, call in CONVERSIONS.items()},
    ("dyn", 1): Function(CONVERSIONS["dyn"], one),
    ("type", 1): Function(CONVERSIONS["type"], one),
    ("bytes", 1): Function(to_bytes, _first),
    ("size", 1): Function(measure, one),
    ("contains", 2): Function(strings.contains, _product),
    ("startsWith", 2): Function(strings.starts_with, _first),
    ("endsWith", 2): Function(strings.ends_with, _first),
    ("matches", 2): Function(lambda value, pattern: regex.matches(strings.text(value), strings.text(pattern)), _regex),
    ("find", 2): Function(lambda value, pattern: regex.find(strings.text(value), strings.text(pattern)), _regex),
    ("findAll", 2): Function(lambda value, pattern: regex.find_all(strings.text(value), strings.text(pattern)), _regex),
    ("findAll", 3): Function(
        lambda value, pattern, most: regex.find_all(strings.text(value), strings.text(pattern), strings.integer(most)),
        _regex,
    ),
    ("charAt", 2): Function(strings.char_at, one),
    ("indexOf", 2): Function(index_of, _walk),
    ("indexOf", 3): Function(index_of, _walk),
    ("lastIndexOf", 2): Function(last_index_of, _walk),
    ("lastIndexOf", 3): Function(last_index_of, _walk),
    ("lowerAscii", 1): Function(strings.lower_ascii, _first),
    ("upperAscii", 1): Function(strings.upper_ascii, _first),
    ("replace", 3): Function(strings.replace, _replaced),
    ("replace", 4): Function(strings.replace, _replaced),
    ("split", 2): Function(strings.split, _twice),
    ("split", 3): Function(strings.split, _twice),
    ("substring", 2): Function(strings.substring, _first),
    ("substring", 3): Function(strings.substring, _first),
    ("trim", 1): Function(strings.trim, _first),
    ("join", 1): Function(strings.join, _joined),
    ("join", 2): Function(strings.join, _joined),
    ("strings.quote", 1): Function(strings.quote, _first),
    ("format", 2): Function(formatting.format_values, _formatted),
    ("isSorted", 1): Function(lists.is_sorted, _walk),
    ("max", 1): Function(lists.largest, _walk),
    ("min", 1): Function(lists.smallest, _walk),
    ("slice", 3): Function(lists.part, _sliced),
    ("flatten", 1): Function(lists.flatten, _flattened),
    ("flatten", 2): Function(lists.flatten, _flattened),
    ("sort", 1): Function(lists.sort, _sorted),
    ("@sortByAssociatedKeys", 2): Function(lists.sort_by, _sorted),
    ("distinct", 1): Function(lists.distinct, _squared),
    ("reverse", 1): Function(lists.reverse, _copied),
    ("lists.range", 1): Function(lists.numbers, _counted),
    ("first", 1): Function(lists.first, one),
    ("last", 1): Function(lists.last, one),
    ("sets.contains", 2): Function(lists.sets_contain, partial(_crossed, 1)),
    ("sets.intersects", 2): Function(lists.sets_intersect, partial(_crossed, 1)),
    ("sets.equivalent", 2): Function(lists.sets_equivalent, partial(_crossed, 2)),
    ("optional.of", 1): Function(Optional, one),
    ("optional.none", 0): Function(lambda: NONE, one),
    ("optional.ofNonZeroValue", 1): Function(_of_nonzero, one),
    ("optional.unwrap", 1): Function(lists.unwrap, one),
    ("unwrapOpt", 1): Function(lists.unwrap, one),
    ("value", 1): Function(lambda value: _optional(value).value, one),
    ("hasValue", 1): Function(lambda value: _optional(value).present, one),
    ("cel.@mapInsert", 3): Function(_insert, one),
    ("cel.@mapInsert", 2): Function(_insert_all, one),
    ("url", 1): Function(addresses.read_url, _first),
    ("isURL", 1): Function(addresses.is_url, _converted),
    **{(name, 1): Function(partial(addresses.url_part, name), one) for name in addresses.URL_PARTS},
    ("getQuery", 1): Function(partial(addresses.url_part, "getQuery"), _queried),
    ("ip", 1): Function(ip, _ip_cost),
    ("isIP", 1): Function(addresses.is_ip, _first),
    ("ip.isCanonical", 1): Function(addresses.is_canonical, _twice),
    **{(name, 1): Function(partial(addresses.ip_property, name), one) for name in addresses.IP_PROPERTIES},
    ("cidr", 1): Function(addresses.read_cidr, _first),
    ("isCIDR", 1): Function(addresses.is_cidr, _first),
    ("containsIP", 2): Function(addresses.contains_ip, _contained),
    ("containsCIDR", 2): Function(addresses.contains_cidr, _contained_block),
    ("masked", 1): Function(addresses.masked, one),
    ("prefixLength", 1): Function(addresses.prefix_length, one),
    ("quantity", 1): Function(quantities.read_quantity, _first),
    ("isQuantity", 1): Function(quantities.is_quantity, _first),
    ("sign", 1): Function(quantities.sign, one),
    ("asInteger", 1): Function(quantities.as_integer, one),
    ("isInteger", 1): Function(quantities.is_integer, one),
    ("asApproximateFloat", 1): Function(quantities.as_double, one),
    ("add", 2): Function(quantities.add, one),
    ("sub", 2): Function(quantities.subtract, one),
    ("compareTo", 2): Function(order, one),
    ("isGreaterThan", 2): Function(lambda left, right: order(left, right) > 0, one),
    ("isLessThan", 2): Function(lambda left, right: order(left, right) < 0, one),
    ("semver", 1): Function(versions.read_version, _first),
    ("semver", 2): Function(versions.read_version, _first),
    ("isSemver", 1): Function(versions.is_version, _first),
    ("isSemver", 2): Function(versions.is_version, _first),
    **{(name, 1): Function(partial(versions.part, name), one) for name in versions.PARTS},
    **{
        (f"format.{name}", 0): Function(partial(lambda found: found, found), one)
        for name, found in formats.FORMATS.items()
    },
    ("format.named", 1): Function(formats.named, one),
    ("validate", 2): Function(formats.validate, _validated),
    **{
        (name, arguments): Function(partial(timestamps.part, name), one)
        for name in timestamps.PARTS
        for arguments in (1, 2)
    },
}
"""Every function that a checked expression can call, but those that `evaluation` carries out itself."""

TYPES: Mapping[str, TypeValue] = {
    name: TypeValue(name)
    for name in (
        *("bool", "int", "uint", "double", "string", "bytes", "list", "map", "null_type", "type", "optional_type"),
        *("google.protobuf.Timestamp", "google.protobuf.Duration"),
        *(kind.type_name for kind in (addresses.Url, addresses.Ip, addresses.Cidr)),
        *(kind.type_name for kind in (quantities.Quantity, versions.Version, formats.Format)),
    )
}
"""The types that an expression can name."""

__all__ = ["CONVERSIONS", "FUNCTIONS", "LIST_COST", "MAP_COST", "TYPES", "Function", "one"]
