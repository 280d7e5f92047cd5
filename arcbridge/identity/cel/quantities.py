"""Kubernetes' library for resource quantities (`1.5Gi`), read as `k8s.io/apimachinery/pkg/api/resource` reads them.

A quantity is an exact number; what it was written as is kept no longer than `is_integer` needs it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from fractions import Fraction

from arcbridge.identity.cel.values import INT_MAX, INT_MIN, EvaluationError, Opaque

_QUANTITY = re.compile(r"([+-]?)([0-9]*+)(?:\.([0-9]*+))?([eEinumkKMGTP]*[+-]?[0-9]*)")
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
_NANO = Fraction(1, 10**9)
_MAX_DIGITS = 1000
"""Digits and powers of ten of a quantity; more are refused, where Kubernetes would compute with them."""


@dataclass(frozen=True, slots=True)
class Quantity(Opaque):
    """`quantity(…)`. `small`: it fits the 64-bit form, which alone can be taken as an integer; `scale`: the power of
    ten that Kubernetes counts the quantity in."""

    number: Fraction
    small: bool = field(default=True, compare=False)
    scale: int = field(default=0, compare=False)

    type_name = "kubernetes.Quantity"

    @property
    def order(self) -> Fraction:
        """What comparisons compare."""
        return self.number

    @property
    def memory(self) -> int:
        return 200 + (self.number.numerator.bit_length() + self.number.denominator.bit_length()) // 8


def read_quantity(string: str) -> Quantity:
    """Read a quantity. Raises EvaluationError."""
    # The length comes first: the pattern is not matched against a text that is refused in any case.
    match = _QUANTITY.fullmatch(string) if 0 < len(string) <= _MAX_DIGITS else None
    if match is None:
        raise EvaluationError("not a quantity")
    sign, digits, decimals, suffix = match[1], match[2].lstrip("0"), match[3] or "", match[4]
    if not digits and match[3] is None and match[2] and not suffix:
        return Quantity(Fraction(0))
    if not match[2] and match[3] is None:
        raise EvaluationError("not a quantity")
    exponent, binary = 0, 0
    if suffix in _DECIMAL:
        exponent = _DECIMAL[suffix]
    elif suffix in _BINARY:
        binary = _BINARY[suffix]
    elif re.fullmatch(r"[eE][+-]?[0-9]{1,18}", suffix):
        exponent = int(suffix[1:])
        if abs(exponent) > _MAX_DIGITS:
            raise EvaluationError("a quantity with such an exponent is not carried out here")
    else:
        raise EvaluationError("unable to parse quantity's suffix")
    number = Fraction(int((digits or "0") + decimals), 10 ** len(decimals)) * Fraction(10) ** exponent * 2**binary
    shown = len(digits or "0") + len(decimals)
    fast = (not decimals and 15 - shown - int(binary * 3 / 10) - 1 >= 0) if binary else 18 - shown >= 0
    scale = exponent - len(decimals)
    if fast and scale >= -9 and abs(number) <= INT_MAX * Fraction(10) ** max(0, scale):
        return Quantity(-number if sign == "-" else number, True, scale)
    if number:
        # Rounded away from zero to a billionth, and for binary suffixes capped.
        number, scale = Fraction(-((-number) // _NANO)) * _NANO, -9
        if binary and number > INT_MAX:
            number, scale = Fraction(INT_MAX), 0
    return Quantity(-number if sign == "-" else number, False, scale)


def as_integer(quantity: Quantity) -> int:
    """`asInteger`. Raises EvaluationError."""
    if not quantity.small or quantity.scale < 0 or not INT_MIN <= quantity.number <= INT_MAX:
        raise EvaluationError("cannot convert value to integer")
    return int(quantity.number)


def as_double(quantity: Quantity) -> float:
    """`asApproximateFloat`: as approximate as Kubernetes' own, whose last digit may differ from the exact one."""
    try:
        base = float(quantity.number / Fraction(10) ** quantity.scale)
    except OverflowError as error:
        raise EvaluationError("the quantity is too large") from error
    return base * _power_of_ten(quantity.scale) if quantity.scale else base


def _power_of_ten(exponent: int) -> float:
    # Go's math.Pow10.
    tables, rest = divmod(abs(exponent), 32)
    if exponent < 0:
        return float(f"1e-{tables * 32}") / float(f"1e{rest}") if exponent >= -323 else 0.0
    return float(f"1e{tables * 32}") * float(f"1e{rest}") if exponent <= 308 else math.inf


ADDED = ("kubernetes.Quantity", "int")
"""The types of what can be added to a quantity, or taken from it."""


def add(sign: int, one: Quantity, other: Quantity | int) -> Quantity:
    """`add` (sign 1) or `sub` (-1)."""
    if isinstance(other, int):
        other = Quantity(Fraction(other))
    number = one.number + sign * other.number
    scale = min(one.scale, other.scale)
    if not (one.small and other.small and abs(number) <= INT_MAX * Fraction(10) ** scale):
        return Quantity(number, False, scale)
    return Quantity(number, True, scale if one.number and other.number else (one if not other.number else other).scale)
