"""Computes the cost of a call before it is made, in the units of kube-apiserver's tracker.

Each cost takes the receiver first, then the arguments, whatever their types: a call that its operands do not have is
paid for as well. Source: cel-go's `interpreter/runtimecost.go` and Kubernetes' `pkg/cel/library/cost.go`; where a cost
is above theirs, its docstring or comment says why. Invariant: what a call costs grows with what it does.
"""

from __future__ import annotations

import math

from arcbridge.identity.cel.addresses import Cidr, Url
from arcbridge.identity.cel.formats import Format
from arcbridge.identity.cel.strings import bounded, replaced_length
from arcbridge.identity.cel.values import Map, Value, size

LIST_COST, MAP_COST = 10, 30
"""What making a list or a map costs."""


def one(*_: Value) -> int:
    """Return the cost of what does not depend on sizes."""
    return 1


def _tenth(length: float) -> int:
    return math.ceil(length * 0.1)


def scanned(value: Value, *_: Value) -> int:
    """Return the cost of going through the receiver once."""
    return _tenth(size(value))


def scanned_twice(value: Value, *_: Value) -> int:
    """Return the cost of going through the receiver, and writing as much."""
    return _tenth(size(value) * 2)


def searched(value: Value, *_: Value) -> int:
    """Return the cost of comparing a text, or each element of a list, with one value."""
    if not isinstance(value, list):
        return _tenth(size(value))
    return len(value) + sum(_tenth(len(item)) for item in value if isinstance(item, str | bytes)) + _inside(value)


def listed(value: Value) -> int:
    """Return the cost of going through the elements of a list."""
    return len(value) if isinstance(value, list) else 1


def converted(value: Value) -> int:
    """Return the cost of reading a text as another type."""
    return max(1, _tenth(len(value))) if isinstance(value, str) else 1


def compared(left: Value, right: Value) -> int:
    """Return the cost of equality and order."""
    return _tenth(min(size(left), size(right))) + _inside(left)


def contained(wanted: Value, values: Value) -> int:
    """Return the cost of `in`."""
    return size(values) + _inside(values) if isinstance(values, list) else 1


def concatenated(left: Value, right: Value) -> int:
    """Return the cost of `+`."""
    if isinstance(left, str | bytes):
        return _tenth(size(left) + size(right))
    # kube-apiserver joins lists without copying them.
    return 1 + (size(left) + size(right)) // 50 if isinstance(left, list) else 1


def found_within(left: Value, right: Value) -> int:
    """Return the cost of seeking one text in another."""
    return _tenth(size(left)) * _tenth(size(right))


def matched(value: Value, pattern: Value, *_: Value) -> int:
    """Return the cost of a regular expression."""
    return _tenth(1 + size(value)) * math.ceil(size(pattern) * 0.25)


def validated(value: Value, name: Value) -> int:
    """Return the cost of a named format, of which the length of its pattern is known."""
    pattern = value.pattern_size if isinstance(value, Format) else 1
    return _tenth(1 + size(name)) * math.ceil(pattern * 0.25)


def replaced(value: Value, *arguments: Value) -> int:
    """Return the cost of `replace`. Raises LimitExceeded where the result is too long."""
    # kube-apiserver counts the text twice, also where the result is a thousand times as long.
    fits = all(isinstance(text, str) for text in (value, *arguments[:2])) and all(type(n) is int for n in arguments[2:])
    length = replaced_length(value, *arguments) if fits else 0
    bounded(length)
    return _tenth(size(value) + max(size(value), length))


def joined(value: Value, separator: Value = "") -> int:
    """Return the cost of `join`."""
    if not isinstance(value, list):
        return 1
    between = len(separator) * max(0, len(value) - 1) if isinstance(separator, str) else 0
    return _tenth(2 * (between + sum(len(item) for item in value if isinstance(item, str))))


def formatted(value: Value, values: Value) -> int:
    """Return the cost of `format`, which writes what is inside its arguments, too."""
    written, waiting = 0, [values]
    while waiting:
        current = waiting.pop()
        if isinstance(current, list | Map):
            items = current if isinstance(current, list) else [item for pair in current.items() for item in pair]
            written += len(items) + sum(_tenth(len(item)) for item in items if isinstance(item, str | bytes))
            waiting.extend(item for item in items if isinstance(item, list | Map))
    return _tenth(size(value)) + written


def made(length: int) -> int:
    """Return the cost of a list of this length that is made."""
    return max(0, length) + 1 + LIST_COST


def copied(value: Value) -> int:
    """Return the cost of a list as long as another one."""
    return made(size(value))


def counted(count: Value) -> int:
    """Return the cost of `lists.range`."""
    return made(_int(count))


def sliced(value: Value, start: Value, end: Value) -> int:
    """Return the cost of a part of a list."""
    length = end - start if type(start) is int and type(end) is int else 0
    return made(min(length, size(value)))


def flattened(value: Value, depth: Value = 1) -> int:
    """Return the cost of `flatten`."""
    return made(size(value) * max(0, _int(depth)))


def sorted_by(value: Value, keys: Value = None) -> int:
    """Return the cost of sorting a list."""
    length = size(value if keys is None else keys)
    # kube-apiserver counts the square of the length where it knows the elements' type, and 1 where it does not.
    return made(int(length * max(1, length).bit_length() * 2.1))


def distinct(items: Value) -> int:
    """Return the cost of comparing all elements of a list with one another."""
    if not isinstance(items, list):
        return 1
    factor = 2.1 if items and isinstance(items[0], str | bytes) else 2.0
    return made(int(len(items) ** 2 * factor) + _inside(items) * len(items))


def crossed(left: Value, right: Value) -> int:
    """Return the cost of comparing each element of a list with each of another one."""
    return 1 + (size(left) + _inside(left)) * size(right)


def crossed_twice(left: Value, right: Value) -> int:
    """Return the cost of doing so in both directions."""
    return 2 * crossed(left, right) - 1


def queried(value: Value) -> int:
    """Return the cost of `getQuery`."""
    # kube-apiserver counts 1 for a text of any length.
    return 1 + (len(value.query) // 10 if isinstance(value, Url) else 0)


def addressed(value: Value) -> int:
    """Return the cost of `ip`, which reads a text or takes the address of a block."""
    return 1 if isinstance(value, Cidr) else _tenth(size(value))


def contained_ip(block: Value, other: Value) -> int:
    """Return the cost of `containsIP`."""
    return _tenth(2 * size(block)) + (_tenth(size(other)) if isinstance(other, str) else 0)


def contained_cidr(block: Value, other: Value) -> int:
    """Return the cost of `containsCIDR`."""
    return contained_ip(block, other) + _tenth(size(block)) + 1


def _inside(value: Value) -> int:
    """Return what comparing a list or a map costs for what is inside its elements, which kube-apiserver does not
    count."""
    count, waiting = 0, [value] if isinstance(value, list | Map) else []
    while waiting:
        current = waiting.pop()
        items = current if isinstance(current, list) else [item for _, item in current.items()]
        nested = [item for item in items if isinstance(item, list | Map)]
        count += sum(map(len, nested))
        waiting += nested
    return count // 2


def _int(value: Value) -> int:
    return value if type(value) is int else 0
