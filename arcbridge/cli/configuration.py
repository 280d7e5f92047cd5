"""`config check` and `config print`: what is wrong with a role's settings, and what it would run with."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcbridge.cli.commands import DOCUMENTS
from arcbridge.cli.output import print_document, print_error, print_prose, print_warning
from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import load_settings, misspelt_variables, place_of, read_settings, settings_file
from arcbridge.errors import ExitCode
from arcbridge.settings.flags import CLIENT, RELAY
from arcbridge.settings.role_settings import find_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from arcbridge.settings.problems import Problem


def show(invocation: Invocation) -> int:
    """Print the settings in force."""
    config = load_settings(invocation, os.environ)
    output = invocation.text("output", "toml")
    if output == "toml":
        sys.stdout.write(as_toml(config))
    else:
        print_document(as_data(config), output)
    return ExitCode.DONE


def find_problems(invocation: Invocation, environment: Mapping[str, str], *, around: bool = False) -> list[Problem]:
    """Return everything that is wrong with the settings of the invocation's role, each with its place.

    `around`: also what a start of these settings would meet on this machine now.
    """
    from arcbridge.settings.problems import Problem, Severity, located

    config, wrong = read_settings(invocation, environment)
    found = [Problem("", sentence, Severity.WARNING) for sentence in misspelt_variables(environment)]
    found += [error.problem for error in wrong]
    # A setting that could not be read has its default, of which nothing is to be said.
    unread = {error.problem.setting for error in wrong}
    if all(error.problem.setting for error in wrong):
        role = importlib.import_module(f"arcbridge.{invocation.role}.settings")
        surroundings = () if invocation.role == RELAY else (environment,)
        checked = role.check(config, *surroundings)
        problems: list[Problem] = list(checked.problems)
        if around and invocation.role != CLIENT:
            look = importlib.import_module(f"arcbridge.{invocation.role}.surroundings").look_around
            wrong_settings = {problem.setting for problem in checked.problems.errors}
            found_around: list[Problem] = list(look(checked, _runs_these(invocation, environment)))
            problems += [problem for problem in found_around if problem.setting not in wrong_settings]
        found += [problem for problem in problems if problem.setting not in unread]
    return located(found, place_of(invocation, environment))


def _runs_these(invocation: Invocation, environment: Mapping[str, str]) -> Callable[[int], bool]:
    """Return a function that says whether a process has the settings of this invocation, as far as its file tells."""
    from arcbridge.settings.surroundings import runs_with

    role, file = invocation.role, settings_file(invocation, environment)
    default = find_file(role, environment)
    return lambda process: runs_with(process, role, file, default)


def check(invocation: Invocation) -> int:
    """Print what is wrong; 2 where a start would fail."""
    from arcbridge.settings.problems import Place, Severity

    output = invocation.text("output", "text")
    found = find_problems(invocation, os.environ, around=True)
    errors = [problem for problem in found if problem.severity is Severity.ERROR]
    warnings = [problem for problem in found if problem.severity is Severity.WARNING]
    if output in DOCUMENTS:
        document = {
            "ok": not errors,
            "role": invocation.role,
            "problems": [
                {"severity": str(one.severity), "setting": one.setting, "message": one.message}
                | asdict(one.place or Place(""))
                for one in (*errors, *warnings)
            ],
        }
        print_document(document, output)
        return ExitCode.USAGE if errors else ExitCode.DONE
    for problem in errors:
        print_error(str(problem))
    for problem in warnings:
        print_warning(str(problem))
    what = f"{settings_file(invocation, os.environ) or 'flags and environment'}"
    if errors:
        print_prose(f"{what}: the {invocation.role} does not start with these settings: {_count(errors, 'error')}")
        return ExitCode.USAGE
    more = f"; {_count(warnings, 'warning')}" if warnings else ""
    print_prose(f"{what}: the settings of the {invocation.role} are complete and well-formed{more}")
    return ExitCode.DONE


def _count(found: list[Problem], word: str) -> str:
    return f"{len(found)} {word}{'s' if len(found) != 1 else ''}"


def as_data(config: Any) -> dict[str, Any]:
    """Return settings as plain data in the shape of the file; what is unset is left out."""
    data: dict[str, Any] = {}
    for field in fields(config):
        value = _plain(getattr(config, field.name))
        if value is not None:
            data[field.name] = value
    return data


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return as_data(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def as_toml(config: Any) -> str:
    """Return settings as a file that `--config` takes."""
    return "\n".join(_toml_table(as_data(config), ())).lstrip("\n") + "\n"


def _toml_table(table: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [f"\n[{'.'.join(_toml_key(part) for part in path)}]"] if path else []
    lines += [f"{_toml_key(key)} = {toml_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    if len(lines) == 1 and path:
        lines = []
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _toml_table(value, (*path, key))
    return lines


def _toml_key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else toml_value(key)


def toml_value(value: Any) -> str:
    """Return a value as TOML writes it."""
    import json

    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    # TOML's basic strings and numbers are written as JSON's are (toml.io v1.0.0, "String").
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else json.dumps(value)
