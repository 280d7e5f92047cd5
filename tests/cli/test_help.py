"""The help: each command in a group, with examples that the parser takes. What it looks like is in `test_snapshots`."""

from __future__ import annotations

import shlex

import pytest

from arcbridge.cli.commands import COMMANDS, GROUPS, INTERNAL, Command, commands_of
from arcbridge.cli.help import EXAMPLES, definitions, exit_codes_page, page_of
from arcbridge.cli.parser import parse
from arcbridge.cli.screen import Screen
from arcbridge.cli.words import role_of, value_of
from arcbridge.settings.flags import CLIENT, ROLES, flags_of


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
    assert len(set(command.examples)) >= (2 if varies else 1)
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


@pytest.mark.parametrize("role", ROLES)
def test_a_role_s_help_has_no_example_of_another_role(role: str) -> None:
    for command in commands_of(role):
        if command.path[0] in INTERNAL:
            continue
        (lines,) = ([line for line, _ in pairs] for title, pairs in page_of(role, command.path).sections
                    if title == EXAMPLES)  # fmt: skip
        assert lines
        assert {value_of("--role", line.split()) for line in lines} <= {"", role}, command.path


def test_the_flags_that_set_nothing_and_have_a_variable_all_the_same() -> None:
    """The help says so of all but `--verbose`; what reads these four is not the loader of settings."""
    keyless = {flag.long for role in ROLES for flag in flags_of(role) if not flag.key}
    assert keyless == {"--role", "--config", "--color", "--token", "--verbose"}


def test_only_the_client_ends_with_the_codes_of_run() -> None:
    codes = {role: {code for code, _ in exit_codes_page(role).sections[0][1]} for role in ROLES}
    assert codes[CLIENT] - codes["relay"] == {"125", "126", "127"}
    assert codes["relay"] == codes["agent"]


def test_a_command_lists_its_own_flags_and_those_that_it_is_about() -> None:
    """The rest stands behind one line."""
    page = page_of(CLIENT, ("connect",))
    (flags,) = (pairs for title, pairs in page.sections if title == "flags")
    assert [term for term, _ in flags] == [
        *("--static", "--port PORT", "-f, --file FILE", "--kube-context NAME", "--no-context-switch"),
        *("--read-only", "--no-secrets", "--namespace NAME", "--verb VERB", "-h, --help"),
    ]
    assert page.ending == "`arcbridge help flags` lists the flags that all commands take."


def test_a_long_term_has_its_text_below() -> None:
    pairs = [("--short", "one two three four fifteen"), ("--as-long-as-a-term-can-hardly-be TEXT", "text")]
    assert definitions(pairs, Screen(36)).splitlines() == [
        "  --short   one two three four",
        "            fifteen",
        "  --as-long-as-a-term-can-hardly-be",
        "    TEXT",
        "            text",
    ]


@pytest.mark.parametrize("width", range(20, 81))
def test_a_narrow_screen_leaves_room_for_texts(width: int) -> None:
    text = "one two three four five six seven"
    lines = definitions([("--short", text), ("--a-longer-flag NAME", text)], Screen(width)).splitlines()
    assert " ".join(" ".join(lines).split()) == f"--short {text} --a-longer-flag NAME {text}"
    assert max(map(len, lines)) <= width
    assert lines[0].startswith("  --short   ") is (width >= 25 + 24)
