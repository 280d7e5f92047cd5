"""The values that an expression computes with: what they are in Python, their types, equality, order and size.

    CEL        Python                       CEL          Python
    null       None                         list         list, or StringList
    bool       bool                         map          Map
    int        int                          timestamp    Timestamp
    uint       UInt                         duration     Duration
    double     float                        type         TypeValue
    string     str                          optional     Optional
    bytes      bytes                        opaque types subclasses of Opaque

`Memory` counts the bytes of every value that a function or a literal makes, and never gives back what is dropped: the
sum bounds what can be alive at once. What it counts is at least a fourth of what Python allocates.

`Claims` is the variable `claims`: kube-apiserver's map there can do less than a map, and it walks through its values
where a map walks through its keys. Values never change after they were made.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

Value = Any

INT_MIN, INT_MAX, UINT_MAX = -(2**63), 2**63 - 1, 2**64 - 1
NANOSECONDS = 10**9
MIN_SECONDS, MAX_SECONDS = -62135596800, 253402300799
"""0001-01-01T00:00:00Z and 9999-12-31T23:59:59Z, the bounds of a timestamp."""


class EvaluationError(Exception):
    """An expression has no result for these claims; `||`, `&&` and macros may still absorb it."""


class LimitExceeded(Exception):
    """The evaluation costs more, or would make a larger value, than is allowed; nothing absorbs it.

    `permanent`: a larger budget of cost and time changes nothing.
    """

    def __init__(self, message: str, *, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


class Unabsorbed(LimitExceeded):
    """An error of an expression that nothing absorbs, though no limit is exceeded."""

    def __init__(self, message: str) -> None:
        super().__init__(message, permanent=True)


def succeeds(call: Callable[..., object]) -> Callable[..., bool]:
    """Return a function that returns whether `call` has a result for the same arguments."""

    def has_result(*arguments: Value) -> bool:
        try:
            call(*arguments)
        except EvaluationError:
            return False
        return True

    return has_result


def decoded(data: bytes) -> str:
    """Return the text of UTF-8. Raises EvaluationError."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise EvaluationError("invalid UTF-8 in bytes, cannot convert to string") from error


def no_such_overload() -> EvaluationError:
    """Return the error of an operation that its operands do not have."""
    return EvaluationError("no such overload")


class UInt(int):
    """An unsigned integer, apart from `int` by its type alone."""

    __slots__ = ()


class StringList(list[str]):
    """A list that a function made of bare strings (`split`, `findAll`).

    kube-apiserver cannot take such a list as the result of a mapping, and refuses the token.
    """

    __slots__ = ()


class ClaimList(list[Any]):
    """A list that came with the claims: `optional.ofNonZeroValue` takes it for something also where it is empty."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Timestamp:
    """`nanoseconds` since 1970 in UTC; `offset`: the seconds east of UTC in which it was written."""

    nanoseconds: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Duration:
    """`nanoseconds`, of which a 64-bit number holds 292 years."""

    nanoseconds: int


@dataclass(frozen=True, slots=True)
class TypeValue:
    """A type as a value, such as `string`."""

    name: str


class Optional:
    """`optional.of(value)`; `NONE` is `optional.none()`."""

    __slots__ = ("_value", "present")

    def __init__(self, value: Value, *, present: bool = True) -> None:
        self._value = value
        self.present = present

    @property
    def value(self) -> Value:
        """The value inside. Raises EvaluationError where there is none."""
        if not self.present:
            raise EvaluationError("optional.none() dereference")
        return self._value


NONE: Final = Optional(None, present=False)


class Opaque:
    """A value of a type that Kubernetes adds: a dataclass, whose equality is that of the type. `type_name`: in CEL."""

    __slots__ = ()
    type_name = ""

    @property
    def size(self) -> int:
        """The size that costs are computed from."""
        return 1

    @property
    def memory(self) -> int:
        """The bytes that the value takes, as `memory` counts them."""
        return 200


class Map:
    """A map. `escaped` is true for one that came with the claims: its keys are also found by their escaped names."""

    __slots__ = ("_entries", "escaped")

    def __init__(self, entries: dict[object, tuple[Value, Value]], *, escaped: bool = False) -> None:
        self._entries = entries
        self.escaped = escaped

    @classmethod
    def of(cls, pairs: Mapping[str, Value], *, escaped: bool = False) -> Map:
        """Make a map with strings for keys."""
        return cls({key: (key, value) for key, value in pairs.items()}, escaped=escaped)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Value) -> bool:
        try:
            return lookup_key(key) in self._entries
        except EvaluationError:
            return False  # what cannot be a key is not there

    def items(self) -> Iterator[tuple[Value, Value]]:
        """Return keys with their values."""
        return iter(self._entries.values())

    def find(self, key: Value) -> tuple[bool, Value]:
        """Return whether `key` is there, and its value."""
        if self.escaped and isinstance(key, str):
            key = unescaped(key) or key
        if key not in self:
            return False, None
        return True, self._entries[lookup_key(key)][1]

    def with_entry(self, key: Value, value: Value) -> Map:
        """Return this map and one entry more. Raises EvaluationError where the key is there already."""
        found = lookup_key(key)
        if found in self._entries:
            raise EvaluationError("insert failed: the key is there already")
        return Map({**self._entries, found: (key, value)})


class Claims:
    """The variable `claims`, or the whole `user`: fields that can be selected, and little else.

    The fields of a token become CEL values when an expression first reads them, so that one that cannot be a value
    spoils no expression that does not read it.
    """

    __slots__ = ("_fields", "_raw", "type_name")

    def __init__(self, fields: Mapping[str, Value], type_name: str = "kubernetes.claims") -> None:
        self._fields = dict(fields)
        self._raw: dict[str, Any] = {}
        self.type_name = type_name

    @classmethod
    def from_json(cls, claims: Mapping[str, Any]) -> Claims:
        """Return the claims of a token, as its JSON was parsed."""
        made = cls({})
        made._raw = dict(claims)
        return made

    def find(self, key: Value) -> tuple[bool, Value]:
        """Return whether a field is there, by its name or its escaped name, and its value. Raises EvaluationError."""
        if not isinstance(key, str):
            raise no_such_overload()
        name = unescaped(key)
        if name is None or (name not in self._fields and name not in self._raw):
            return False, None
        return True, self._field(name)

    def walk(self) -> Iterator[Value]:
        """Return what a macro with one variable goes through: the values."""
        return (self._field(name) for name in [*self._fields, *(n for n in self._raw if n not in self._fields)])

    def _field(self, name: str) -> Value:
        if name not in self._fields:
            self._fields[name] = from_json(self._raw[name])
        return self._fields[name]


def lookup_key(key: Value) -> object:
    """Return the dictionary key for a map's key: numbers of all types that are equal have the same."""
    if isinstance(key, bool):
        return ("bool", key)
    if isinstance(key, float):
        return int(key) if math.isfinite(key) and key == int(key) else ("double", key)
    if isinstance(key, UInt):
        return int(key)
    if isinstance(key, str | int):
        return key
    raise EvaluationError("unsupported key type")


_ESCAPED = re.compile(r"__([^_]+)__")
_SYMBOLS = {"underscores": "__", "dot": ".", "dash": "-", "slash": "/"}
_RESERVED = frozenset(
    {"true", "false", "null", "in", "as", "break", "const", "continue", "else", "for", "function", "if"}
)
_RESERVED |= {"import", "let", "loop", "package", "namespace", "return", "var", "void", "while"}


def unescaped(name: str) -> str | None:
    """Undo Kubernetes' escaping of field names (`my__dash__claim`); None where an escape is not one."""
    if "__" not in name:
        return name
    good = True

    def replace(match: re.Match[str]) -> str:
        nonlocal good
        inner = match[1]
        if inner in _SYMBOLS:
            return _SYMBOLS[inner]
        good = good and inner in _RESERVED and len(match[0]) == len(name)
        return inner

    plain = _ESCAPED.sub(replace, name)
    return plain if good else None


_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half a character, from an escape such as `\\ud800`. Go reads U+FFFD there."""


def from_json(value: Value) -> Value:
    """Make a CEL value of parsed JSON: numbers are doubles, as in kube-apiserver. Raises EvaluationError."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value if value.isascii() else _SURROGATE.sub("\ufffd", value)
    if isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise EvaluationError("a number is too large")
        return number
    if isinstance(value, list):
        return ClaimList(map(from_json, value))
    return Map.of({from_json(key): from_json(item) for key, item in value.items()}, escaped=True)


TYPE_NAMES: Mapping[type, str] = {
    type(None): "null_type",
    bool: "bool",
    int: "int",
    UInt: "uint",
    float: "double",
    str: "string",
    bytes: "bytes",
    list: "list",
    StringList: "list",
    ClaimList: "list",
    Map: "map",
    Timestamp: "google.protobuf.Timestamp",
    Duration: "google.protobuf.Duration",
    TypeValue: "type",
    Optional: "optional_type",
}


def type_name(value: Value) -> str:
    """Return the name of a value's type."""
    name = TYPE_NAMES.get(type(value))
    return name if name is not None else str(value.type_name)


def is_number(value: Value) -> bool:
    """Return whether `value` is an int, uint or double."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_compared(left: Value, right: Value) -> tuple[Value, Value]:
    """Return two numbers as they are compared: where one is a double, both, though Python would compare them exactly.

    So does kube-apiserver; a rule about a large number must hold for the claim that has it, which is a double.
    """
    if isinstance(left, float) or isinstance(right, float):
        return float(left), float(right)
    return left, right


def equal(left: Value, right: Value) -> bool:
    """CEL's `==`: values of different types differ, numbers are compared across types. Raises EvaluationError."""
    if left is None or right is None:
        return left is right
    if isinstance(left, Claims):
        if isinstance(right, Claims):
            return left is right
        raise no_such_overload()
    if is_number(left):
        if not is_number(right):
            return False
        left, right = _as_compared(left, right)
        return bool(left == right)
    if isinstance(left, bool | str | bytes | Timestamp | Duration | TypeValue):
        if isinstance(left, Timestamp):
            return isinstance(right, Timestamp) and left.nanoseconds == right.nanoseconds
        return type(left) is type(right) and bool(left == right)
    if isinstance(left, list):
        return isinstance(right, list) and len(left) == len(right) and all(map(_not_unequal, left, right))
    if isinstance(left, Map):
        if not isinstance(right, Map) or len(left) != len(right):
            return False
        for key, value in left.items():
            found, other = right.find(key)
            if not found or not _not_unequal(value, other):
                return False
        return True
    if isinstance(left, Optional):
        if not isinstance(right, Optional):
            return False
        if left.present and right.present:
            return equal(left.value, right.value)
        return left.present == right.present
    if isinstance(left, Opaque):
        if type(left) is not type(right):
            raise no_such_overload()
        return bool(left == right)
    raise no_such_overload()


def _not_unequal(left: Value, right: Value) -> bool:
    # Inside a list or a map, what cannot be compared does not count as a difference: so does kube-apiserver.
    try:
        return equal(left, right)
    except EvaluationError:
        return True


def compare(left: Value, right: Value) -> int:
    """Return the order of two values: -1, 0 or 1. Raises EvaluationError where they have none."""
    if is_number(left) and is_number(right):
        if left != left or right != right:
            raise EvaluationError("NaN values cannot be ordered")
        left, right = _as_compared(left, right)
    elif isinstance(left, str) and isinstance(right, str):
        left, right = left.encode("utf-8", "surrogatepass"), right.encode("utf-8", "surrogatepass")
    elif isinstance(left, Timestamp | Duration) and type(left) is type(right):
        left, right = left.nanoseconds, right.nanoseconds
    elif type(left) is not type(right) or not isinstance(left, bool | bytes):
        raise no_such_overload()
    return int(left > right) - int(left < right)


def size(value: Value) -> int:
    """Return the size that costs are computed from: characters, bytes, elements, entries, and 1 for all else."""
    if isinstance(value, str | bytes | list | Map):
        return len(value)
    if isinstance(value, Opaque):
        return value.size
    if isinstance(value, Optional) and value.present:
        return size(value.value)
    return 1


ELEMENT = 40
"""Bytes of an element of a list: its pointer and a small number, though other elements are often there already."""
ENTRY = 120
"""Bytes of an entry of a map: its place in the dictionary and the pair that it keeps."""
_UNCOUNTED = frozenset({bool, int, float, type(None)})


class Memory:
    """The bytes that are `left` for values."""

    __slots__ = ("left",)

    def __init__(self, left: float = math.inf) -> None:
        self.left = left

    def take(self, value: Value) -> None:
        """Count a value that was made. Raises LimitExceeded."""
        if type(value) not in _UNCOUNTED:
            self.spend(measure(value))

    def spend(self, size: int) -> None:
        """Count `size` bytes. Raises LimitExceeded."""
        self.left -= size
        if self.left < 0:
            raise LimitExceeded("the expressions make values that are too large together", permanent=True)


def measure(value: Value) -> int:
    """Return the bytes of a value that a function has just made; elements that it did not make count as references."""
    if isinstance(value, str | bytes):
        return sys.getsizeof(value)
    if isinstance(value, StringList):
        return ELEMENT * (1 + len(value)) + sum(map(sys.getsizeof, value))
    if isinstance(value, list):
        return ELEMENT * (1 + len(value))
    if isinstance(value, Map):
        lists = sum(measure(item) for _, item in value.items() if type(item) is StringList)
        return ENTRY * (2 + len(value)) + lists
    if isinstance(value, Optional):
        return ELEMENT
    return value.memory if isinstance(value, Opaque) else ELEMENT


def is_zero(value: Value) -> bool:
    """Return whether `optional.ofNonZeroValue` takes `value` for nothing."""
    if value is None:
        return True
    if isinstance(value, ClaimList):
        return False
    if isinstance(value, bool | int | float | str | bytes | list):
        return not value
    if isinstance(value, Map):
        return len(value) == 0 and not value.escaped
    if isinstance(value, Duration):
        return value.nanoseconds == 0
    # Go's zero time is the first day of year 1.
    return isinstance(value, Timestamp) and value.nanoseconds == MIN_SECONDS * NANOSECONDS


def checked_int(value: int) -> int:
    """`value`, if it is an int of 64 bits. Raises EvaluationError."""
    if not INT_MIN <= value <= INT_MAX:
        raise EvaluationError("integer overflow")
    return value


def checked_uint(value: int) -> UInt:
    """`value` as an unsigned int of 64 bits. Raises EvaluationError."""
    if not 0 <= value <= UINT_MAX:
        raise EvaluationError("unsigned integer overflow")
    return UInt(value)


def checked_timestamp(nanoseconds: int, offset: int = 0) -> Timestamp:
    """Return a timestamp within the years 1 to 9999. Raises EvaluationError."""
    if not MIN_SECONDS <= nanoseconds // NANOSECONDS <= MAX_SECONDS:
        raise EvaluationError("timestamp overflow")
    return Timestamp(nanoseconds, offset)


def checked_duration(nanoseconds: int) -> Duration:
    """Return a duration of at most 292 years. Raises EvaluationError."""
    if not INT_MIN <= nanoseconds <= INT_MAX:
        raise EvaluationError("duration overflow")
    return Duration(nanoseconds)
