"""The one loader of the settings that `arcbridge.settings.config` declares.

Precedence: flag > environment (`ARCBRIDGE_<FLAG>`) > file > default. An unknown key is an error that names its path,
the file and the nearest known key. A `Path` that a file gives is relative to that file. The loader looks at names and
types alone: it opens no file but the settings file, and what values mean is the roles' to check.
"""

from __future__ import annotations

import functools
import math
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from arcbridge.errors import ConfigError
from arcbridge.settings.config import AgentConfig, ClientConfig, RelayConfig
from arcbridge.settings.problems import Place, Problem
from arcbridge.settings.suggest import nearest

Config = TypeVar("Config", RelayConfig, AgentConfig, ClientConfig)

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_DURATION = re.compile(r"(?:\d{1,9}(?:\.\d{1,6})?(?:ms|s|m|h|d|w))+", re.ASCII)
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d|w)", re.ASCII)


class Given(NamedTuple):
    """A setting from outside the file: text as typed, or a value already of its type, and who gave it."""

    value: object
    source: str
    """As a message names it: `flag --port`, `environment variable ARCBRIDGE_PORT`."""


class SettingError(ConfigError):
    """One setting is wrong, or (`setting` empty) the file as a whole; `problem` says what, and where it was given."""

    def __init__(self, setting: str, message: str, place: Place | None = None) -> None:
        self.problem = Problem(setting, message, place=place)
        super().__init__(str(self.problem))


class _Source(NamedTuple):
    """Where a value stands: for messages, and for relative paths."""

    name: str
    base: Path
    text: str
    """The file's whole text; empty for flags and environment, whose values are then texts to be read."""
    is_file: bool
    top: tuple[str, ...] = ()
    """Names of the role's settings that are in no table."""


def load(kind: type[Config], file: Path | None = None, given: Mapping[str, Given] | None = None) -> Config:
    """Load the settings of one role: `given` (dotted path -> value; flags and environment) over `file` over defaults.

    Raises ConfigError that names the file, its line where that can be told, the path of the setting, and for an
    unknown one the nearest that is known.
    """
    config, wrong = load_all(kind, file, given)
    if wrong:
        raise wrong[0]
    return config


def load_all(
    kind: type[Config],
    file: Path | None = None,
    given: Mapping[str, Given] | None = None,
    *,
    judge: Callable[[Path, os.stat_result], None] | None = None,
) -> tuple[Config, list[SettingError]]:
    """Return what `load` loads, and every mistake instead of the first one; a setting that is wrong has its default.

    `judge` gets the status of the very file that is read, and raises where it is not to be used.
    """
    document: dict[str, Any] = {}
    source = _Source("", Path(), "", True)
    wrong: list[SettingError] = []
    if file is not None:
        try:
            source, document = _read(file, judge)
        except SettingError as error:
            wrong.append(error)
    values = _table(kind, document, (), source._replace(top=_names_without_table(kind)), wrong)
    for path, one in (given or {}).items():
        outside = _Source(one.source, Path.cwd(), "", False)
        try:
            _set(kind, values, tuple(path.split(".")), one.value, outside)
        except SettingError as error:
            wrong.append(error)
    config: Config = _build(kind, values)
    return config, wrong


def parse_duration(text: str) -> float:
    """Return the seconds of `10m`, `1h30m`, `7d` or a plain number; raises ValueError."""
    text = text.strip()
    if _DURATION.fullmatch(text):
        return sum(float(number) * _UNITS[unit] for number, unit in _DURATION_PART.findall(text))
    seconds = float(text)
    if not math.isfinite(seconds) or seconds < 0:
        raise ValueError("not a duration")
    return seconds


def _read(file: Path, judge: Callable[[Path, os.stat_result], None] | None = None) -> tuple[_Source, dict[str, Any]]:
    import tomllib  # 30 ms, and a process without a settings file does not need it

    try:
        with file.open(encoding="utf-8") as opened:
            if judge is not None:
                judge(file, os.fstat(opened.fileno()))
            text = opened.read()
    except OSError as error:
        raise SettingError("", f"cannot read the settings file: {error.strerror}", Place(str(file))) from error
    except UnicodeDecodeError as error:
        raise SettingError("", "not UTF-8 text; a settings file is TOML", Place(str(file))) from error
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also a number too long for Python, or nesting
        from arcbridge.settings.toml_lines import syntax_place

        _, line, column = syntax_place(str(error), text)
        raise SettingError("", f"not valid TOML: {error}", Place(str(file), line, column)) from error
    return _Source(str(file), file.resolve().parent, text, True), document


_hints: Callable[..., dict[str, Any]] = functools.cache(typing.get_type_hints)
"""Returns the types of a dataclass' fields, which take half a millisecond to evaluate."""


def _table(
    kind: type[Any], table: Mapping[str, Any], path: tuple[str, ...], source: _Source, wrong: list[SettingError]
) -> dict[str, Any]:
    """Return the values of one table as a dict of field values, sub-tables as dicts; each checked and converted. What
    is wrong is left out and added to `wrong`."""
    hints = _hints(kind)
    values: dict[str, Any] = {}
    for key, value in table.items():
        here = (*path, key)
        try:
            if key not in hints:
                raise _unknown(here, source, list(hints))
            values[key] = _located(kind, key, _value(hints[key], value, here, source, wrong), source)
        except SettingError as error:
            wrong.append(error)
    return values


def _set(kind: type[Any], values: dict[str, Any], path: tuple[str, ...], value: object, source: _Source) -> None:
    """Put one outside value in its place among the values of the file."""
    for name in path[:-1]:
        kind = _hints(kind)[name]
        values = values.setdefault(name, {})
    found = _value(_hints(kind)[path[-1]], value, path, source, [])
    values[path[-1]] = _located(kind, path[-1], found, source)


def _located(kind: type[Any], name: str, value: Any, source: _Source) -> Any:
    """Return `value`, made absolute where it is a text that means a file."""
    if not kind.__dataclass_fields__[name].metadata.get("path") or value in ("", "-"):
        return value
    return str(source.base / Path(value).expanduser())


def _build(kind: type[Any], values: dict[str, Any]) -> Any:
    hints = _hints(kind)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        hint = hints[name]
        if is_dataclass(hint):
            value = _build(typing.cast("type[Any]", hint), value)
        elif typing.get_origin(hint) is dict:
            value = {key: _build(typing.get_args(hint)[1], table) for key, table in value.items()}
        arguments[name] = value
    return kind(**arguments)


def _value(hint: Any, value: object, path: tuple[str, ...], source: _Source, wrong: list[SettingError]) -> Any:
    """Return one value in the type of its field; raises SettingError. What is wrong within a table is added to
    `wrong`."""
    if is_dataclass(hint):
        if not isinstance(value, dict):
            raise _wrong(path, source, f"must be a table, not {_kind(value)}")
        return _table(typing.cast("type[Any]", hint), value, path, source, wrong)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(path, source, f"must be a table of tables, not {_kind(value)}")
        found = {}
        for key, table in value.items():
            try:
                found[str(key)] = _value(arguments[1], table, (*path, str(key)), source, wrong)
            except SettingError as error:
                wrong.append(error)
        return found
    if origin in (types.UnionType, typing.Union):
        hint = next(argument for argument in arguments if argument is not type(None))
        if hint is Path and value == "":
            return None
    try:
        return _scalar(hint, value, source)
    except (ValueError, TypeError):
        raise _wrong(path, source, f"must be {_wanted(hint)}, not {_kind(value)}") from None


def _scalar(hint: Any, value: object, source: _Source) -> Any:
    if isinstance(value, str) and not source.is_file:
        value = _from_text(hint, value)
    if hint is float:
        if isinstance(value, str):
            return parse_duration(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ValueError
        return float(value)
    if hint is int or hint is bool:
        if type(value) is not hint:
            raise TypeError
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise TypeError
        return tuple(value)
    if not isinstance(value, str):
        raise TypeError
    return source.base / Path(value).expanduser() if hint is Path else value


def _from_text(hint: Any, text: str) -> object:
    if hint is bool:
        lowered = text.strip().lower()
        if lowered in ("1", "true", "yes", "on"):
            return True
        if lowered in ("0", "false", "no", "off", ""):
            return False
        raise ValueError
    if hint is int:
        return int(text)
    if typing.get_origin(hint) is tuple:
        return [item.strip() for item in text.split(",") if item.strip()]
    return text


def _wanted(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return "a list of strings"
    return {
        float: 'a duration: seconds, or text like "10m" or "1h30m"',
        int: "a whole number",
        bool: "true or false",
        Path: "the path of a file or directory, as a string",
    }.get(hint, "a string")


_HARMLESS = re.compile(r"[A-Za-z]{0,6}|[-+]?[0-9]{1,6}(?:[., ][0-9]{1,3})? ?[A-Za-z%]{0,3}")
"""A text that is no secret, because its like is soon guessed: `none`, `many`, `10 MiB`."""


def _kind(value: object) -> str:
    """Return how a message names a value that is of the wrong kind; short words and numbers are quoted."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # Any other text may be a secret that was put here by mistake, and messages get into logs and bundles.
        return f"{value!r}" if _HARMLESS.fullmatch(value) else "a string"
    return str(value)[:40]


def _wrong(path: tuple[str, ...], source: _Source, what: str) -> SettingError:
    if not source.is_file:
        return SettingError(".".join(path), what, Place(source.name))
    return _at_line(path, source, f"{'.'.join(path)} {what}")


def _names_without_table(kind: type) -> tuple[str, ...]:
    return tuple(
        name
        for name, hint in _hints(kind).items()
        if not any(one is dict or is_dataclass(one) for one in (hint, typing.get_origin(hint), *typing.get_args(hint)))
    )


def _unknown(path: tuple[str, ...], source: _Source, known: list[str]) -> SettingError:
    near = nearest(path[-1], known)
    hint = f"did you mean {'.'.join((*path[:-1], near))!r}?" if near else f"known here: {', '.join(sorted(known))}"
    if path[-1] in source.top:  # TOML's usual mistake: what is added at the end of the file is in its last table
        hint = f"{path[-1]!r} belongs to no table: move it above the first [table]"
    return _at_line(path, source, f"unknown setting {'.'.join(path)!r}; {hint}")


def _at_line(path: tuple[str, ...], source: _Source, what: str) -> SettingError:
    from arcbridge.settings.toml_lines import line_of  # only for a mistake

    return SettingError(".".join(path), what, Place(source.name, line_of(path, source.text)))
