"""Every function and operator of an expression: one row for each, with its cost, what computes it, and its overloads.

`compiler` declares to the library's checker what Kubernetes 1.36 has beside CEL's own functions, `evaluation` calls
what an expression names. A call goes to the overload of its operands' types, which the checker does not know where a
claim is `any`. Invariant: what computes a call is given values of the types that its overload names.

Source: `k8s.io/apiserver/pkg/cel/library` and `pkg/cel/environment/base.go`, release 1.36. The standard functions, the
macros, optional types, sets, lists (version 2 of 3, which differ in costs alone) and comprehensions with two variables
come with the library; version 2 of the strings extension is declared, because Kubernetes adds to its functions.
Authorizers are left out: an authenticator has no variable of that type.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import permutations
from typing import Any, NamedTuple

from arcbridge.identity.cel import addresses, costs, formats, formatting, lists, quantities, regex, strings, timestamps
from arcbridge.identity.cel.addresses import Cidr, Ip, Url
from arcbridge.identity.cel.costs import one
from arcbridge.identity.cel.numbers import read_double, read_int, read_uint, write_double
from arcbridge.identity.cel.quantities import Quantity
from arcbridge.identity.cel.values import (
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
    decoded,
    equal,
    is_zero,
    no_such_overload,
    succeeds,
    type_name,
)
from arcbridge.identity.cel.versions import Version, read_version

Call = Callable[..., Value]
Cost = Callable[..., int]


class Overload(NamedTuple):
    """One overload, as `receiver.name(arguments) -> result`; the library declares those without a result itself."""

    name: str
    receiver: str
    arguments: tuple[str, ...]
    result: str

    @property
    def operands(self) -> tuple[str, ...]:
        """The types of receiver and arguments."""
        return (self.receiver, *self.arguments) if self.receiver else self.arguments


class Calls(dict[tuple[type, ...], Call]):
    """What computes a call, by the types of its operands; it is looked for when those types first come."""

    __slots__ = ("overloads",)

    def __init__(self) -> None:
        self.overloads: list[tuple[tuple[type, ...], Call]] = []

    def __missing__(self, found: tuple[type, ...]) -> Call:
        for wanted, call in self.overloads:
            if all(map(_fits, found, wanted)):
                self[found] = call
                return call
        raise no_such_overload()


class Function(NamedTuple):
    """What is called by one name with one number of operands; `cost` takes operands of any type."""

    cost: Cost
    calls: Calls

    def call(self, *values: Value) -> Value:
        """Return the result. Raises EvaluationError, also where no overload fits."""
        return self.calls[tuple(map(type, values))](*values)


def _fits(found: type, wanted: type) -> bool:
    # `bool` and UInt are subclasses of `int` in Python alone.
    return found is int if wanted is int else issubclass(found, wanted)


def _quotient(left: int, right: int) -> int:
    if not right:
        raise EvaluationError("division by zero")
    whole = abs(left) // abs(right)  # towards zero
    return whole if (left < 0) == (right < 0) else -whole


def _remainder(left: int, right: int) -> int:
    if left == INT_MIN and right == -1:
        raise EvaluationError("integer overflow")
    return left - right * _quotient(left, right)


def _ratio(left: float, right: float) -> float:
    if right:
        return left / right
    if left == 0 or left != left:
        return math.nan
    return math.copysign(math.inf, left) * math.copysign(1.0, right)


def _joined(left: Value, right: Value) -> Value:
    strings.bounded(len(left) + len(right))
    return left + right


def _later(moment: Timestamp, duration: Duration, sign: int = 1) -> Timestamp:
    return checked_timestamp(moment.nanoseconds + sign * duration.nanoseconds, moment.offset)


def _unequal(left: Value, right: Value) -> bool:
    try:
        return not equal(left, right)
    except EvaluationError:
        # kube-apiserver takes what cannot be compared for different.
        return True


def _truncated(value: float, fits: bool) -> int:
    if not fits:
        raise EvaluationError("integer overflow")
    return int(value)


def _bool(text: str) -> bool:
    if text not in _BOOLS:
        raise EvaluationError("not a bool")
    return _BOOLS[text]


_BOOLS = {"1": True, "t": True, "T": True, "TRUE": True, "true": True, "True": True}
_BOOLS |= {"0": False, "f": False, "F": False, "FALSE": False, "false": False, "False": False}


def _timestamp(seconds: int) -> Timestamp:
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise EvaluationError("timestamp overflow")
    return Timestamp(seconds * NANOSECONDS)


def _with_entries(target: Map, more: Map) -> Map:
    for key, value in more.items():
        target = target.with_entry(key, value)
    return target


def _same(value: Value) -> Value:
    return value


def _order(left: Value, right: Value) -> int:
    return int(left.order > right.order) - int(left.order < right.order)


_COMPARABLE = ("int", "uint", "double", "bool", "duration", "timestamp", "string", "bytes")
_PAIRS = [f"{kind},{kind}" for kind in _COMPARABLE] + list(map(",".join, permutations(("int", "uint", "double"), 2)))
ORDER = {"_<_": operator.lt, "_<=_": operator.le, "_>_": operator.gt, "_>=_": operator.ge}


def _arithmetic(name: str, operation: Callable[[Any, Any], Any], cost: Cost = one) -> tuple[tuple[Any, ...], ...]:
    return (
        (cost, lambda left, right: checked_int(operation(left, right)), f"{name}(int,int)"),
        (cost, lambda left, right: checked_uint(operation(left, right)), f"{name}(uint,uint)"),
    )


def _ordered(name: str, holds: Callable[[int, int], bool]) -> tuple[Any, ...]:
    return (
        costs.compared,
        lambda left, right: holds(compare(left, right), 0),
        *(f"{name}({pair}) -> bool" for pair in _PAIRS),
    )


_ROWS: tuple[tuple[Any, ...], ...] = (
    # Operators.
    (costs.concatenated, _joined, "_+_(string,string)", "_+_(bytes,bytes)"),
    (costs.concatenated, lists.concatenate, "_+_(list,list)"),
    (costs.concatenated, operator.add, "_+_(double,double)"),
    *_arithmetic("_+_", operator.add, costs.concatenated),
    (
        costs.concatenated,
        lambda left, right: checked_duration(left.nanoseconds + right.nanoseconds),
        "_+_(duration,duration)",
    ),
    (costs.concatenated, _later, "_+_(timestamp,duration)"),
    (costs.concatenated, lambda left, right: _later(right, left), "_+_(duration,timestamp)"),
    (one, operator.sub, "_-_(double,double)"),
    *_arithmetic("_-_", operator.sub),
    (
        one,
        lambda left, right: checked_duration(left.nanoseconds - right.nanoseconds),
        "_-_(duration,duration)",
        "_-_(timestamp,timestamp)",
    ),
    (one, lambda left, right: _later(left, right, -1), "_-_(timestamp,duration)"),
    (one, operator.mul, "_*_(double,double)"),
    *_arithmetic("_*_", operator.mul),
    (one, _ratio, "_/_(double,double)"),
    *_arithmetic("_/_", _quotient),
    *_arithmetic("_%_", _remainder),
    (one, operator.neg, "-_(double)"),
    (one, lambda value: checked_int(-value), "-_(int)"),
    (one, lambda value: checked_duration(-value.nanoseconds), "-_(duration)"),
    (one, operator.not_, "!_(bool)"),
    (costs.compared, equal, "_==_(~A,~A)"),
    (costs.compared, _unequal, "_!=_(~A,~A)"),
    *(_ordered(name, holds) for name, holds in ORDER.items()),
    (costs.contained, lambda wanted, values: lists.contains(values, wanted), "@in(~A,list)"),
    (costs.contained, lambda wanted, values: wanted in values, "@in(~A,map)"),
    # Conversions.
    (costs.converted, read_int, "int(string)"),
    (costs.converted, lambda value: _truncated(value, -(2.0**63) < value < 2.0**63), "int(double)"),
    (costs.converted, lambda value: value.nanoseconds // NANOSECONDS, "int(timestamp)"),
    (costs.converted, lambda value: value.nanoseconds, "int(duration)"),
    (costs.converted, lambda value: checked_int(int(value)), "int(int)", "int(uint)"),
    (costs.converted, read_uint, "uint(string)"),
    (costs.converted, lambda value: UInt(_truncated(value, 0 <= value < 2.0**64)), "uint(double)"),
    (costs.converted, checked_uint, "uint(int)", "uint(uint)"),
    (costs.converted, read_double, "double(string)"),
    (costs.converted, float, "double(int)", "double(uint)", "double(double)"),
    (costs.converted, _same, "string(string) -> string"),
    (costs.converted, lambda value: "true" if value else "false", "string(bool) -> string"),
    (costs.converted, str, "string(int) -> string", "string(uint) -> string"),
    (costs.converted, write_double, "string(double) -> string"),
    (costs.converted, decoded, "string(bytes) -> string"),
    (costs.converted, timestamps.write_timestamp, "string(timestamp) -> string"),
    (costs.converted, timestamps.write_duration, "string(duration) -> string"),
    (costs.converted, str, "string(net.IP) -> string", "string(net.CIDR) -> string", "string(kubernetes.URL)"),
    (costs.converted, _same, "bool(bool)"),
    (costs.converted, _bool, "bool(string)"),
    (costs.scanned, _same, "bytes(bytes)"),
    (costs.scanned, lambda text: text.encode("utf-8", "surrogatepass"), "bytes(string)"),
    (costs.converted, _same, "timestamp(timestamp)"),
    (costs.converted, timestamps.read_timestamp, "timestamp(string)"),
    (costs.converted, _timestamp, "timestamp(int)"),
    (costs.converted, _same, "duration(duration)"),
    (costs.converted, timestamps.read_duration, "duration(string)"),
    (one, _same, "dyn(~A)"),
    (one, lambda value: TypeValue(type_name(value)), "type(~A)"),
    # Strings.
    (one, len, "size(string)", "size(bytes)", "size(list)", "size(map)"),
    (costs.found_within, operator.contains, "string.contains(string)"),
    (costs.scanned, str.startswith, "string.startsWith(string)"),
    (costs.scanned, str.endswith, "string.endsWith(string)"),
    (costs.matched, regex.matches, "string.matches(string)"),
    (costs.matched, regex.find, "string.find(string) -> string"),
    (costs.matched, regex.find_all, "string.findAll(string[,int]) -> list<string>"),
    (one, strings.char_at, "string.charAt(int) -> string"),
    (costs.searched, strings.index_of, "string.indexOf(string[,int]) -> int"),
    (costs.searched, strings.last_index_of, "string.lastIndexOf(string[,int]) -> int"),
    (costs.scanned, strings.lower_ascii, "string.lowerAscii() -> string"),
    (costs.scanned, strings.upper_ascii, "string.upperAscii() -> string"),
    (costs.replaced, strings.replace, "string.replace(string,string[,int]) -> string"),
    (costs.scanned_twice, strings.split, "string.split(string[,int]) -> list<string>"),
    (costs.scanned, strings.substring, "string.substring(int[,int]) -> string"),
    (costs.scanned, strings.trim, "string.trim() -> string"),
    (costs.joined, strings.join, "list<string>.join([string]) -> string"),
    (costs.scanned, strings.quote, "strings.quote(string) -> string"),
    (costs.formatted, formatting.format_values, "string.format(list<dyn>) -> string"),
    # Lists, maps and optional values. `evaluation` sums a list, whose static type it knows.
    (costs.searched, lists.is_sorted, *(f"list<{kind}>.isSorted() -> bool" for kind in _COMPARABLE)),
    (costs.searched, partial(lists.extreme, 1), *(f"list<{kind}>.max() -> {kind}" for kind in _COMPARABLE)),
    (costs.searched, partial(lists.extreme, -1), *(f"list<{kind}>.min() -> {kind}" for kind in _COMPARABLE)),
    (costs.listed, lists.total, *(f"list<{kind}>.sum() -> {kind}" for kind in lists.SUMMED)),
    (costs.searched, lists.index_of, "list<~A>.indexOf(~A) -> int"),
    (costs.searched, lists.last_index_of, "list<~A>.lastIndexOf(~A) -> int"),
    (costs.sliced, lists.part, "list.slice(int,int)"),
    (costs.flattened, lists.flatten, "list.flatten([int])"),
    (costs.sorted_by, lambda values: lists.sort_by(values, values), "list.sort()"),
    (costs.sorted_by, lists.sort_by, "list.@sortByAssociatedKeys(list)"),
    (costs.distinct, lists.distinct, "list.distinct()"),
    (costs.copied, lambda values: values[::-1], "list.reverse()"),
    (costs.counted, lists.numbers, "lists.range(int)"),
    (one, lambda values: Optional(values[0]) if values else NONE, "list.first()"),
    (one, lambda values: Optional(values[-1]) if values else NONE, "list.last()"),
    (costs.crossed, lists.sets_contain, "sets.contains(list,list)"),
    (costs.crossed, lists.sets_intersect, "sets.intersects(list,list)"),
    (costs.crossed_twice, lists.sets_equivalent, "sets.equivalent(list,list)"),
    (one, Optional, "optional.of(~A)"),
    (one, lambda: NONE, "optional.none()"),
    (one, lambda value: NONE if is_zero(value) else Optional(value), "optional.ofNonZeroValue(~A)"),
    (one, lists.unwrap, "optional.unwrap(list<optional_type<~A>>) -> list<~A>"),
    (one, lists.unwrap, "list<optional_type<~A>>.unwrapOpt() -> list<~A>"),
    (one, lambda optional: optional.value, "optional_type.value()"),
    (one, lambda optional: optional.present, "optional_type.hasValue()"),
    (one, Map.with_entry, "cel.@mapInsert(map,~A,~A)"),
    (one, _with_entries, "cel.@mapInsert(map,map)"),
    # URLs, addresses and blocks of them.
    (costs.scanned, addresses.read_url, "url(string) -> kubernetes.URL"),
    (costs.converted, addresses.is_url, "isURL(string) -> bool"),
    (one, lambda url: url.scheme, "kubernetes.URL.getScheme() -> string"),
    (one, lambda url: url.host, "kubernetes.URL.getHost() -> string"),
    (one, lambda url: url.hostname, "kubernetes.URL.getHostname() -> string"),
    (one, lambda url: url.port, "kubernetes.URL.getPort() -> string"),
    (one, lambda url: url.path, "kubernetes.URL.getEscapedPath() -> string"),
    (costs.queried, addresses.query_of, "kubernetes.URL.getQuery() -> map<string,list<string>>"),
    (costs.addressed, addresses.read_ip, "ip(string) -> net.IP"),
    (costs.addressed, lambda block: Ip(block.address), "net.CIDR.ip() -> net.IP"),
    (costs.scanned, addresses.is_ip, "isIP(string) -> bool"),
    (costs.scanned_twice, lambda text: str(addresses.read_ip(text)) == text, "ip.isCanonical(string) -> bool"),
    (one, lambda ip: ip.address.version, "net.IP.family() -> int"),
    (one, lambda ip: ip.address.is_unspecified, "net.IP.isUnspecified() -> bool"),
    (one, lambda ip: ip.address.is_loopback, "net.IP.isLoopback() -> bool"),
    (one, lambda ip: ip.address.is_link_local, "net.IP.isLinkLocalUnicast() -> bool"),
    (one, addresses.is_link_local_multicast, "net.IP.isLinkLocalMulticast() -> bool"),
    (one, addresses.is_global_unicast, "net.IP.isGlobalUnicast() -> bool"),
    (costs.scanned, addresses.read_cidr, "cidr(string) -> net.CIDR"),
    (costs.scanned, addresses.is_cidr, "isCIDR(string) -> bool"),
    (costs.contained_ip, addresses.contains_ip, "net.CIDR.containsIP(net.IP) -> bool"),
    (
        costs.contained_ip,
        lambda block, text: addresses.contains_ip(block, addresses.read_ip(text)),
        "net.CIDR.containsIP(string) -> bool",
    ),
    (costs.contained_cidr, addresses.contains_cidr, "net.CIDR.containsCIDR(net.CIDR) -> bool"),
    (
        costs.contained_cidr,
        lambda block, text: addresses.contains_cidr(block, addresses.read_cidr(text)),
        "net.CIDR.containsCIDR(string) -> bool",
    ),
    (one, lambda block: block.bits, "net.CIDR.prefixLength() -> int"),
    (one, lambda block: Cidr(block.network.network_address, block.bits), "net.CIDR.masked() -> net.CIDR"),
    # Quantities and versions.
    (costs.scanned, quantities.read_quantity, "quantity(string) -> kubernetes.Quantity"),
    (costs.scanned, succeeds(quantities.read_quantity), "isQuantity(string) -> bool"),
    (one, lambda quantity: (quantity.number > 0) - (quantity.number < 0), "sign(kubernetes.Quantity) -> int"),
    (one, quantities.as_double, "kubernetes.Quantity.asApproximateFloat() -> double"),
    (one, quantities.as_integer, "kubernetes.Quantity.asInteger() -> int"),
    (one, succeeds(quantities.as_integer), "kubernetes.Quantity.isInteger() -> bool"),
    (
        one,
        partial(quantities.add, 1),
        *(f"kubernetes.Quantity.add({k}) -> kubernetes.Quantity" for k in quantities.ADDED),
    ),
    (
        one,
        partial(quantities.add, -1),
        *(f"kubernetes.Quantity.sub({k}) -> kubernetes.Quantity" for k in quantities.ADDED),
    ),
    *(
        row
        for kind in ("kubernetes.Quantity", "kubernetes.Semver")
        for row in (
            (one, lambda left, right: left.order > right.order, f"{kind}.isGreaterThan({kind}) -> bool"),
            (one, lambda left, right: left.order < right.order, f"{kind}.isLessThan({kind}) -> bool"),
            (one, _order, f"{kind}.compareTo({kind}) -> int"),
        )
    ),
    (costs.scanned, read_version, "semver(string[,bool]) -> kubernetes.Semver"),
    (costs.scanned, succeeds(read_version), "isSemver(string[,bool]) -> bool"),
    (one, lambda version: version.major, "kubernetes.Semver.major() -> int"),
    (one, lambda version: version.minor, "kubernetes.Semver.minor() -> int"),
    (one, lambda version: version.patch, "kubernetes.Semver.patch() -> int"),
    # Named formats, timestamps and durations.
    *(
        (one, partial(_same, form), f"format.{name}() -> kubernetes.NamedFormat")
        for name, form in formats.FORMATS.items()
    ),
    (one, formats.named, "format.named(string) -> optional_type<kubernetes.NamedFormat>"),
    (costs.validated, formats.validate, "kubernetes.NamedFormat.validate(string) -> optional_type<list<string>>"),
    *((one, partial(timestamps.part, part), f"timestamp.{name}([string])") for name, part in timestamps.PARTS.items()),
    *(
        (one, partial(timestamps.duration_part, unit), f"duration.{name}()")
        for name, unit in timestamps.DURATION_PARTS.items()
    ),
)

_OPAQUE = {kind.type_name: kind for kind in (Url, Ip, Cidr, Quantity, Version, formats.Format)}
_TYPES: Mapping[str, type] = {
    "string": str,
    "bool": bool,
    "int": int,
    "uint": UInt,
    "double": float,
    "bytes": bytes,
    "list": list,
    "map": Map,
    "timestamp": Timestamp,
    "duration": Duration,
    "optional_type": Optional,
    "~A": object,
    **_OPAQUE,
}
"""The Python types of operands. What is inside a list or a map is not looked at before a call."""
_NAMESPACES = ("cel", "format", "ip", "lists", "optional", "sets", "strings")


def _overloads(signature: str) -> Iterator[Overload]:
    """Yield an overload; of a signature with `[,an optional argument]` first that without it."""
    head, _, result = signature.partition(" -> ")
    path, _, rest = head.partition("(")
    receiver, _, name = path.rpartition(".")
    if receiver in _NAMESPACES:
        receiver, name = "", path
    for arguments in dict.fromkeys((rest.partition("[")[0].rstrip(")"), rest[:-1].replace("[", "").replace("]", ""))):
        yield Overload(name, receiver, tuple(filter(None, arguments.split(","))), result)


OVERLOADS: list[Overload] = []
"""All overloads, in the order of the rows."""
FUNCTIONS: dict[tuple[str, int], Function] = {}
"""All functions by name and number of operands, but those that `evaluation` carries out itself."""
for _cost, _call, *_signatures in _ROWS:
    for _signature in _signatures:
        for _overload in _overloads(_signature):
            _operands = tuple(_TYPES[kind.partition("<")[0]] for kind in _overload.operands)
            OVERLOADS.append(_overload)
            _function = FUNCTIONS.setdefault((_overload.name, len(_operands)), Function(_cost, Calls()))
            _function.calls.overloads.append((_operands, _call))

CONVERSIONS = frozenset(("int", "uint", "double", "string", "bool", "bytes", "timestamp", "duration", "dyn", "type"))
"""Functions that are computed once where their argument is a constant."""

TYPES: Mapping[str, TypeValue] = {
    name: TypeValue(name)
    for name in (
        *("bool", "int", "uint", "double", "string", "bytes", "list", "map", "null_type", "type", "optional_type"),
        *("google.protobuf.Timestamp", "google.protobuf.Duration"),
        *_OPAQUE,
    )
}
"""The types that an expression can name."""
