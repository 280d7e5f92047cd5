"""Holds what is wrong with settings and the files that they name: errors, which prevent a start, and warnings.

A check collects problems and goes on, so that an operator sees all of them at once. This module reads no file and
prints nothing. A problem names its setting; where it stands in another file than the settings' own, it has that place.
It is a leaf that all may import, and no problem holds a secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum

from arcbridge.errors import ConfigError

_SETTING = re.compile(r"([a-z_]+(?:\.(?:[A-Za-z0-9_-]+|\"[^\"]*\")|\[\d+\])*): ")
"""The path of a setting at the beginning of a message."""


class Severity(StrEnum):
    """What a problem means for a start."""

    ERROR = "error"
    """The role does not start."""
    WARNING = "warning"
    """The role starts, and does something that the operator may not have meant."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where something stands; line and column are counted from 1, and 0 where they cannot be told."""

    source: str
    """A file, or who gave the setting: `flag --port`."""
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        line = f", line {self.line}" if self.line else ""
        return f"{self.source}{line}{f', column {self.column}' if self.line and self.column else ''}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake, or one warning."""

    setting: str
    """Dotted path in the role's settings, such as `limits.sessions`; empty where it is none of them."""
    message: str
    """One sentence that says what to do."""
    severity: Severity = Severity.ERROR
    place: Place | None = None
    """None: where the settings file, a flag or the environment gives `setting`."""

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place is not None else self.message


class SettingsRefused(ConfigError):
    """A role does not start with its settings; `problems` are all that were found, errors and warnings."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        errors = [problem for problem in problems if problem.severity is Severity.ERROR]
        more = f" (and {len(errors) - 1} more: `config check` lists them)" if len(errors) > 1 else ""
        super().__init__(f"{errors[0]}{more}")
        self.problems = tuple(problems)


class Problems:
    """Collects the problems of one check, in the order in which they were found."""

    def __init__(self) -> None:
        self._found: list[Problem] = []

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._found)

    @property
    def errors(self) -> list[Problem]:
        """Those that keep the role from starting."""
        return [problem for problem in self._found if problem.severity is Severity.ERROR]

    @property
    def warnings(self) -> list[Problem]:
        """The others."""
        return [problem for problem in self._found if problem.severity is Severity.WARNING]

    def error(self, setting: str, message: str, place: Place | None = None) -> None:
        """Add an error. A message names its setting first, unless it has a place in another file."""
        self._add(Problem(setting, _named(setting, message, place), Severity.ERROR, place))

    def warn(self, setting: str, message: str, place: Place | None = None) -> None:
        """Add a warning."""
        self._add(Problem(setting, _named(setting, message, place), Severity.WARNING, place))

    def extend(self, found: Sequence[Problem]) -> None:
        """Add what another check has found."""
        for problem in found:
            self._add(problem)

    @contextmanager
    def collect(self, setting: str) -> Iterator[None]:
        """Add the ConfigError that the block raises, of the setting that it begins with, else of `setting`; the check
        goes on behind the block."""
        try:
            yield
        except SettingsRefused as error:
            self.extend(error.problems)
        except ConfigError as error:
            named = _SETTING.match(error.message)
            self.error(named[1] if named else setting, error.message)

    def refuse(self) -> None:
        """Raise SettingsRefused where there is an error."""
        if self.errors:
            raise SettingsRefused(self._found)

    def _add(self, problem: Problem) -> None:
        if problem not in self._found:
            self._found.append(problem)


def located(problems: Sequence[Problem], place: Callable[[str], Place | None]) -> list[Problem]:
    """Return the problems, each with its place; `place` says where a setting was given."""
    return [
        problem if problem.place is not None else replace(problem, place=place(problem.setting)) for problem in problems
    ]


def _named(setting: str, message: str, place: Place | None) -> str:
    root = setting.partition("[")[0].partition(".")[0]
    if place is not None or not setting or message.startswith((f"{root}:", f"{root}.", f"{root}[", f"{root} ")):
        return message
    return f"{setting}: {message}"
