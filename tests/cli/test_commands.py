"""The table of sub-commands is consistent with itself, and each row names a function that is there."""

from __future__ import annotations

import importlib
import inspect

import pytest

from arcbridge.cli.commands import COMMANDS, DEFAULT_COMMAND, GROUP_HELP, commands_of, find_command
from arcbridge.settings.flags import ROLES


@pytest.mark.parametrize("role", ROLES)
def test_defaults_and_groups_exist(role: str) -> None:
    assert find_command(role, DEFAULT_COMMAND[role]) in commands_of(role)
    assert {word for command in COMMANDS for word in command.path[:-1]} == set(GROUP_HELP)


def test_each_sub_command_has_a_function_of_its_own() -> None:
    """One of all roles, as `bundle`, has a row for the client and one for the other roles; `admin` has one for all."""
    functions = {command.function: command.path for command in COMMANDS}
    assert all(functions[one.function] == one.path for one in COMMANDS if one.path[0] != "admin")
    for module, name in (function.split(":") for function in functions):
        function = getattr(importlib.import_module(f"arcbridge.cli.{module}"), name)
        assert len(inspect.signature(function).parameters) == 1, name
