"""Kubernetes' library for semantic versions: `semver('1.2.3').isGreaterThan(semver('1.2.0'))`.

Source: Semantic Versioning 2.0.0, which the text must follow to the letter unless it is to be normalized first.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

from arcbridge.identity.cel.values import UINT_MAX, EvaluationError, Opaque

_PART = r"(0|[1-9][0-9]{0,19})"
_MAX_DIGITS = len(str(UINT_MAX))
_VERSION = re.compile(
    rf"{_PART}\.{_PART}\.{_PART}(?:-([0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*))?(?:\+[0-9A-Za-z-]+(?:\.[0-9A-Za-z-]+)*)?"
)


@dataclass(frozen=True, slots=True)
class Version(Opaque):
    """`semver(…)`. `before`: the identifiers of a pre-release; metadata of a build does not count."""

    major: int
    minor: int
    patch: int
    before: tuple[str, ...] = ()

    type_name = "kubernetes.Semver"

    @property
    def order(self) -> tuple[Any, ...]:
        """What comparisons compare: a pre-release comes before its release, and in it numbers before words."""
        before = [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in self.before]
        return self.major, self.minor, self.patch, not before, before

    @property
    def memory(self) -> int:
        return 200 + sum(8 + sys.getsizeof(part) for part in self.before)


def read_version(string: str, normalize: bool = False) -> Version:
    """Read a version; `normalize` allows a `v` in front, missing parts and leading zeros. Raises EvaluationError."""
    match = _VERSION.fullmatch(_normalized(string) if normalize else string)
    if match is None:
        raise EvaluationError("not a semantic version")
    numbers = [int(match[n]) for n in (1, 2, 3)]
    before = tuple(match[4].split(".")) if match[4] else ()
    if max(numbers) > UINT_MAX or any(_zeros(part) or _too_large(part) for part in before):
        raise EvaluationError("not a semantic version")
    return Version(numbers[0], numbers[1], numbers[2], before)


def _zeros(part: str) -> bool:
    return part.isdigit() and len(part) > 1 and part[0] == "0"


def _too_large(part: str) -> bool:
    # Python's `int` raises ValueError for more than 4,300 digits.
    return part.isdigit() and (len(part) > _MAX_DIGITS or int(part) > UINT_MAX)


def _normalized(string: str) -> str:
    parts = string.removeprefix("v").split(".", 2)
    for index, part in enumerate(parts):
        if len(part) > 1:
            shorter = part.lstrip("0")
            parts[index] = shorter if shorter[:1].isdigit() and shorter[:1].isascii() else "0" + shorter
    if len(parts) < 3 and ("+" in parts[-1] or "-" in parts[-1]):
        raise EvaluationError("a short version has no pre-release")
    return ".".join(parts + ["0"] * (3 - len(parts)))
