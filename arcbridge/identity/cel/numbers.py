"""Reads and writes numbers as Go does, for `int(…)`, `double(…)` and `string(…)` of an expression.

It knows no expression and no types of CEL beyond its integers. Invariant: what Go refuses is an `EvaluationError`, and
what it takes has the same value here.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

from arcbridge.identity.cel.values import EvaluationError, UInt, checked_int, checked_uint

_INT = re.compile(r"[+-]?[0-9]{1,40}")
_UINT = re.compile(r"[0-9]{1,40}")
# A pattern must have one way to match a run of digits: with two, a long text that matches in the end nowhere takes time
# that grows with the square of its length.
_DECIMAL = re.compile(r"[+-]?([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_HEX = re.compile(r"[+-]?0[xX]([0-9a-fA-F]+(?:\.[0-9a-fA-F]*)?|\.[0-9a-fA-F]+)[pP][+-]?[0-9]+")
_SEPARATOR = re.compile(r"(?<=[0-9])_(?=[0-9])")
_SPECIAL = re.compile(r"nan|[+-]?inf(inity)?", re.IGNORECASE)


def read_int(text: str) -> int:
    """Read a decimal integer of 64 bits. Raises EvaluationError."""
    if not _INT.fullmatch(text):
        raise EvaluationError("not an int")
    return checked_int(int(text))


def read_uint(text: str) -> UInt:
    """Read a decimal integer without a sign. Raises EvaluationError."""
    if not _UINT.fullmatch(text):
        raise EvaluationError("not a uint")
    return checked_uint(int(text))


def read_double(text: str) -> float:
    """Read a decimal or hexadecimal number, with `_` between digits where that helps. Raises EvaluationError."""
    text = _SEPARATOR.sub("", text)
    try:
        if _SPECIAL.fullmatch(text):
            return float(text)
        if _DECIMAL.fullmatch(text):
            number = float(text)
        elif _HEX.fullmatch(text):
            number = float.fromhex(text)
        else:
            raise EvaluationError("not a double")
    except (ValueError, OverflowError) as error:
        raise EvaluationError("not a double") from error
    if math.isinf(number):
        raise EvaluationError("not a double")
    return number


def write_double(value: float) -> str:
    """Return the shortest text that gives the same number again, with an exponent below 10^-4 and from 10^6 or 10^21
    on."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    sign = "-" if math.copysign(1.0, value) < 0 else ""
    if value == 0:
        return sign + "0"
    parts = Decimal(repr(value)).normalize().as_tuple()
    digits = "".join(map(str, parts.digits))
    exponent = len(digits) - 1 + int(parts.exponent)
    if exponent < -4 or exponent >= LARGE_EXPONENT:
        rest = digits[1:]
        return f"{sign}{digits[0]}{'.' + rest if rest else ''}e{'-' if exponent < 0 else '+'}{abs(exponent):02}"
    if exponent < 0:
        return f"{sign}0.{'0' * (-exponent - 1)}{digits}"
    if len(digits) <= exponent + 1:
        return sign + digits.ljust(exponent + 1, "0")
    return f"{sign}{digits[: exponent + 1]}.{digits[exponent + 1 :]}"


LARGE_EXPONENT = 6
"""The exponent from which a double is written with one."""
