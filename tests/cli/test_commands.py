"""The table of sub-commands is consistent with itself, and each row names a function that is there."""

from __future__ import annotations

import importlib
import inspect
import shlex

import pytest

from arcbridge.cli.commands import (
    COMMANDS,
    DEFAULT_COMMAND,
    GROUP_HELP,
    GROUPS,
    INTERNAL,
    Command,
    commands_of,
    find_command,
)
from arcbridge.cli.parser import parse, role_of
from arcbridge.settings.flags import CLIENT, ROLES


@pytest.mark.parametrize("role", ROLES)
def test_defaults_and_groups_exist(role: str) -> None:
    assert find_command(role, DEFAULT_COMMAND[role]) in commands_of(role)
    assert {word for command in COMMANDS for word in command.path[:-1]} == set(GROUP_HELP)


def test_each_sub_command_has_a_function_of_its_own() -> None:
    functions = {command.function for command in COMMANDS}
    assert len(functions) == len(COMMANDS)
    for module, name in (function.split(":") for function in functions):
        function = getattr(importlib.import_module(f"arcbridge.cli.{module}"), name)
        assert len(inspect.signature(function).parameters) == 1, name


@pytest.mark.parametrize("role", ROLES)
def test_the_help_of_a_role_has_each_command_in_one_group(role: str) -> None:
    words = [word for _, group in GROUPS[role] for word in group.split()]
    internal = INTERNAL if role == CLIENT else ()
    assert len(words) == len(set(words))
    assert {command.path[0] for command in commands_of(role)} == {*words, *internal}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join((command.roles[0], *command.path)))
def test_the_examples_of_a_command_are_of_it(command: Command) -> None:
    """Two, or one where there is nothing to vary; each is a line that the parser takes, and that fits 80 columns."""
    if command.path[0] in INTERNAL:
        return
    varies = command.flags or command.argument
    assert len(command.examples) >= (2 if varies and command.path[:1] != ("admin",) else 1)
    seen = set()
    for example in command.examples:
        line, _, text = example.partition("  # ")
        assert len(line) <= 78
        assert len(text) <= 74
        words = shlex.split(line.removeprefix("source <(").removesuffix(")").partition(" > ")[0].partition(" | ")[0])
        assert words.pop(0) == "arcbridge"
        role = role_of(words) or command.roles[0]
        found = parse(words, role)
        seen.add(found.command)
        assert role in command.roles
    assert command.path in seen
