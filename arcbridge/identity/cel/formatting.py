"""`format` of cel-go's extension for strings, version 2, as it writes in American English, which has no other setting.

`check` is the same walk over the clauses without values: a literal format is checked when the expression is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from arcbridge.identity.cel.numbers import write_double
from arcbridge.identity.cel.strings import bounded, quoted_as_go
from arcbridge.identity.cel.timestamps import write_duration, write_timestamp
from arcbridge.identity.cel.values import Duration, EvaluationError, Map, Timestamp, TypeValue, Value, decoded

MAX_PRECISION = 1000
"""Digits after the point of `%.1000f`; more would let a claim that is a format make a text of any length."""
_DEFAULT_PRECISION = 6
_CLAUSE = re.compile(r"%(?:%|(?:\.([0-9]*))?(.?))", re.DOTALL)
_SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


@dataclass(frozen=True, slots=True)
class Clause:
    """One piece of a format: literal `text`, or where `kind` is not empty, the place of an argument."""

    text: str
    kind: str = ""
    precision: int = _DEFAULT_PRECISION


def clauses(format_text: str) -> Iterator[Clause]:
    """Yield the pieces of a format. Raises EvaluationError."""
    at = 0
    for match in _CLAUSE.finditer(format_text):
        if match.start() < at:
            continue
        yield Clause(format_text[at : match.start()])
        at = match.end()
        if match[0] == "%%":
            yield Clause("%")
            continue
        precision, kind = match[1], match[2]
        if not kind or kind not in "sdfebxXo" or precision == "":
            raise EvaluationError("could not parse formatting clause")
        digits = _DEFAULT_PRECISION if precision is None else int(precision[:9])
        if digits > MAX_PRECISION:
            raise EvaluationError(f"a precision above {MAX_PRECISION} is not carried out here")
        yield Clause("", kind, digits)
    yield Clause(format_text[at:])


def format_values(format_text: str, values: list[Value]) -> str:
    """`format`. Raises EvaluationError."""
    out: list[str] = []
    length = index = 0
    for clause in clauses(format_text):
        piece = clause.text
        if clause.kind:
            if index >= len(values):
                raise EvaluationError(f"index {index} out of range")
            piece = _WRITERS[clause.kind](values[index], clause.precision)
            index += 1
        length += len(piece)
        bounded(length)
        out.append(piece)
    return "".join(out)


def _string(value: Value, precision: int = 0) -> str:
    return _ALONE.get(type(value), _nested)(value)


def _nested(value: Value) -> str:
    """Return how a value stands inside a list or a map."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, str):
        return quoted_as_go(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return '"NaN"' if math.isnan(value) else f'"{"+" if value > 0 else "-"}Inf"'
        return f"{value:.{_DEFAULT_PRECISION}f}"
    if isinstance(value, bytes):
        return "b" + quoted_as_go(_string(value))
    if isinstance(value, Timestamp):
        return f'timestamp("{write_timestamp(value)}")'
    if isinstance(value, Duration):
        return f'duration("{write_duration(value)}")'
    if isinstance(value, TypeValue):
        return value.name
    if isinstance(value, list):
        return f"[{', '.join(map(_nested, value))}]"
    if isinstance(value, Map):
        pairs = []
        for key, content in value.items():
            if isinstance(key, float):
                raise EvaluationError("no formatting function for a map key of this type")
            pairs.append((_nested(key), _nested(content)))
        return "{" + ", ".join(f"{key}:{content}" for key, content in sorted(pairs)) + "}"
    raise EvaluationError("no formatting function for a value of this type")


_ALONE: Mapping[type, Callable[[Value], str]] = {
    str: str,
    float: write_double,
    bytes: decoded,
    Timestamp: write_timestamp,
    Duration: write_duration,
}
"""How values stand by themselves that stand otherwise inside a list."""


def _integer(value: Value, form: str) -> str:
    if not isinstance(value, int) or (isinstance(value, bool) and form != "b"):
        raise EvaluationError("clause can only be used on integers")
    return f"{int(value):{form}}"


def _double(value: Value) -> float:
    if value in ("NaN", "Infinity", "-Infinity"):
        return float(value)
    if not isinstance(value, float):
        raise EvaluationError("clause can only be used on doubles")
    return value


def _special(number: float) -> str:
    return "NaN" if math.isnan(number) else "∞" if number > 0 else "-∞"


def _fixed(value: Value, precision: int) -> str:
    number = _double(value) or 0.0  # which has no sign, where -0.0 has one
    return f"{number:,.{precision}f}" if math.isfinite(number) else _special(number)


def _scientific(value: Value, precision: int) -> str:
    # In `%.2e` cel-go takes the precision for a width.
    number = _double(value) or 0.0
    if not math.isfinite(number):
        return _special(number).rjust(precision)
    mantissa, _, exponent = f"{number:.{_DEFAULT_PRECISION}e}".partition("e")
    return f"{mantissa}×10{exponent.removeprefix('+').translate(_SUPERSCRIPT)}".rjust(precision)


def _hex(value: Value, precision: int) -> str:
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return data.hex() if isinstance(data, bytes) else _integer(value, "x")


_WRITERS: Mapping[str, Callable[[Value, int], str]] = {
    "s": _string,
    "d": lambda value, precision: _integer(value, "d"),
    "f": _fixed,
    "e": _scientific,
    "b": lambda value, precision: _integer(value, "b"),
    "o": lambda value, precision: _integer(value, "o"),
    "x": _hex,
    "X": lambda value, precision: _hex(value, precision).upper(),
}

_TYPES = {
    "s": "bool bytes double duration int list map null string timestamp type uint",
    "f": "double string",
    "e": "double string",
    "b": "int uint bool",
    "x": "int uint string bytes",
    "X": "int uint string bytes",
}
ACCEPTED = {kind: frozenset((*_TYPES.get(kind, "int uint").split(), "dyn")) for kind in _WRITERS}
"""The static types that each clause takes; `any`, which claims have, is in none."""
