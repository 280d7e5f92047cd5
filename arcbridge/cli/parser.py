"""The command-line parser, made from the tables in `flags` and `commands`.

A role's flags are accepted before and after its sub-command. Nothing has a default here: what was not given is
absent, so that the loader can look at the environment and the file next.
"""

from __future__ import annotations

import argparse
import sys

from arcbridge.cli.commands import DEFAULT_COMMAND, GONE, INTERNAL, Command, commands_of
from arcbridge.cli.output import print_error
from arcbridge.cli.screen import DEFAULT_WIDTH, Screen
from arcbridge.cli.words import first_word, spelled, words_of
from arcbridge.errors import ExitCode
from arcbridge.settings.flags import CLIENT, LIST, RELAY, ROLES, Flag, flags_of
from arcbridge.settings.suggest import listed, nearest, unknown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from typing import Any, NoReturn


_FEW = 9
"""Sub-commands of a group that a message lists; all of a role's would hide what is wrong."""


class UsageError(SystemExit):
    """The command line is wrong; already told on standard error."""

    def __init__(self) -> None:
        super().__init__(int(ExitCode.USAGE))


class Parser(argparse.ArgumentParser):
    """An argument parser that tells mistakes in the house's form and never guesses abbreviations."""

    role = ""
    """The role whose sub-commands it knows; empty: none's."""
    path: tuple[str, ...] = ()
    """The sub-command that it parses, or the group."""
    asked = ""
    """The sub-command of a mistake that is found before its own parser reads it."""

    def __init__(self, **options: Any) -> None:
        defaults: dict[str, Any] = {"allow_abbrev": False, "add_help": False, "argument_default": argparse.SUPPRESS}
        # With a width it imports nothing to find one: shutil brings bz2 and lzma, 3 ms of each start.
        defaults["formatter_class"] = lambda prog: argparse.HelpFormatter(prog, width=DEFAULT_WIDTH)
        super().__init__(**(defaults | options))

    def print_help(self, file: object = None) -> None:
        """Print the page; argparse's own method hides that it could not be written."""
        from arcbridge.cli.help import page_of

        sys.stdout.write(page_of(self.role, self.path).text(Screen.of(sys.stdout)))
        sys.stdout.flush()

    def error(self, message: str) -> NoReturn:
        groups = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        missing = message.partition("the following arguments are required: ")[2]
        if groups and message.endswith(": "):  # argparse names what is missing, and a list of sub-commands has no name
            words = list(groups[0].choices)
            message = f"a sub-command is needed: {'one of ' * (len(words) > 1)}{', '.join(words)}"
        elif missing:
            texts = {action.dest: action.help for action in self._actions}
            named = [f"{name.upper()} ({texts.get(name, '')})" for name in missing.split(", ")]
            message = f"{' and '.join(named)} is missing"
        # One line, then what to do; the usage block of argparse fills a screen and hides the mistake.
        what = "commands" if not self.asked and (groups or not self.path) else "flags and examples"
        print_error(f"{message}\nrun `{self.asked or self.prog} --help` for the {what}")
        raise UsageError

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Say what a mistyped word was probably meant to be; argparse's own words name no sub-command."""
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            self.error(unknown_command(str(value), list(action.choices), self.role))
        self.error(unknown(action.dest.upper(), str(value), [str(choice) for choice in action.choices]))


def unknown_command(word: str, known: Sequence[str], role: str = "") -> str:
    """Return what is said of a sub-command that `role` does not have; of no role where that is empty."""
    if word in GONE:
        return f"`{word}` is gone; {GONE[word]}"
    others = [other for other in ROLES if other != role and any(c.path[0] == word for c in commands_of(other))]
    if others and role:
        return f"unknown sub-command {word!r}; it is one of --role {listed(others)}"
    if word in ROLES:
        return f"unknown sub-command {word!r}; did you mean --role {word}?"
    known = [one for one in dict.fromkeys(known) if one not in INTERNAL]
    near = nearest(word, [*known, *GONE])
    if near in GONE:
        return f"unknown sub-command {word!r}; `{near}` is gone; {GONE[near]}"
    hint = f"; did you mean {near}?" if near else ""
    if not near and len(known) <= _FEW:
        hint = f"; there {'are' if len(known) > 1 else 'is'} {', '.join(known)}"
    return f"unknown sub-command {word!r}{hint}"


class Invocation:
    """A parsed command line: which command of which role, and what was given."""

    __slots__ = ("command", "given", "role")

    def __init__(self, role: str, command: tuple[str, ...], given: dict[str, object]) -> None:
        self.role = role
        self.command = command
        self.given = given

    def text(self, name: str, default: str = "") -> str:
        """Return a flag or positional of the command line alone."""
        value = self.given.get(name, default)
        return value if isinstance(value, str) else default

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.given.get(name, ())
        return tuple(value) if isinstance(value, list) else ()

    def switch(self, name: str) -> bool:
        return self.given.get(name) is True


def _add_flag(parser: argparse._ActionsContainer, flag: Flag, taken: Collection[str] = ()) -> None:
    takes: dict[str, Any] = {"action": "store_true"}
    if flag.takes_value:
        # Choices are checked by the loader, so that a wrong value in a file and on the command line get one answer.
        takes = {"action": "append" if flag.kind == LIST else "store"}
    names = [name for name in flag.names if name not in taken]
    parser.add_argument(*names, dest=flag.dest, **takes)


def build(role: str, commands: Sequence[Command]) -> Parser:
    """Return the parser of one role, with these of its sub-commands."""
    parser = _parser_of(role, ())
    _add_flags(parser, role, ())
    if not commands:
        return parser
    groups: dict[tuple[str, ...], argparse._SubParsersAction[Parser]] = {}
    groups[()] = parser.add_subparsers(metavar="", dest="command_0", parser_class=Parser)
    for command in commands:
        for level in range(1, len(command.path)):
            words = command.path[:level]
            if words not in groups:
                group = _parser_of(role, words, groups[words[:-1]])
                group.add_argument("-h", "--help", action="help")
                groups[words] = group.add_subparsers(
                    metavar="", dest=f"command_{level}", required=True, parser_class=Parser
                )
        leaf = _parser_of(role, command.path, groups[command.path[:-1]])
        _add_flags(leaf, role, command.flags)
        if (one := command.argument) is not None:
            leaf.add_argument(one.name, help=one.help, choices=one.choices or None, nargs=one.count or None)
    return parser


def _parser_of(role: str, path: tuple[str, ...], among: argparse._SubParsersAction[Parser] | None = None) -> Parser:
    name = spelled(role, path)
    parser = Parser(prog=name) if among is None else among.add_parser(path[-1], prog=name)
    parser.role, parser.path = role, path
    return parser


def _add_flags(parser: Parser, role: str, own: Sequence[Flag]) -> None:
    """The command's own flags, then the role's; a flag of the command hides the role's of the same long name, and
    takes a short one from it."""
    taken = {name for flag in own for name in flag.names}
    parser.add_argument("-h", "--help", action="help")
    for flag in own:
        _add_flag(parser, flag)
    for flag in flags_of(role):
        if flag.long not in taken:
            _add_flag(parser, flag, taken)


def _refuse_unknown_flags(parser: Parser, arguments: Sequence[str], role: str) -> None:
    """Name a mistyped flag; argparse would take the word behind it for a sub-command and complain about that."""
    flags = [*flags_of(role), *(flag for command in commands_of(role) for flag in command.flags)]
    known = {"--help", *(name for flag in flags for name in flag.names)}
    for argument in arguments:
        if argument == "--":
            return
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in known:
            near = nearest(name, sorted(known))
            hint = _of_others(name, role) or (f"; did you mean {near}?" if near else "")
            parser.error(f"unknown flag {name}{hint}")


def _of_others(name: str, role: str) -> str:
    """Return what to do with a flag that is another role's; empty where it is none's."""
    others = [other for other in ROLES if other != role and any(name in flag.names for flag in flags_of(other))]
    if not others:
        return ""
    users = "; `arcbridge clusters` lists those that a user may reach" if role == RELAY and CLIENT in others else ""
    return f": it is one of --role {listed(others)}{users}"


def _commands_needed(arguments: Sequence[str], role: str) -> Sequence[Command]:
    """Return those that the first word may mean, or none without one; every one for help and for messages.

    To make the parsers of all sub-commands takes 20 ms, a tenth of a client's start.
    """
    word, flags = first_word(arguments)
    every = commands_of(role)
    known = {name for flag in flags_of(role) for name in flag.names}
    if "--" in arguments or not known.issuperset(flags):
        return every
    return tuple(command for command in every if command.path[0] == word) or (every if word else ())


def _split_command(arguments: list[str], role: str) -> tuple[list[str], list[str] | None]:
    """Cut off the command line of another program, where the sub-command takes one: empty where it is missing.

    None: the sub-command takes none, and `--` means to it what it means to argparse.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    word, _ = first_word(arguments[:end])
    if not any(command.takes_command for command in commands_of(role) if command.path[0] == word):
        return arguments, None
    return arguments[:end], arguments[end + 1 :]


def _add_words(parser: Parser, given: dict[str, object], more: Sequence[str], role: str) -> None:
    """Give words behind flags to the argument that takes several: argparse ends it at the first flag."""
    several = {
        command.argument.name
        for command in commands_of(role)
        if command.argument is not None
        and command.argument.count in ("*", "+")
        and command.path[0] == given.get("command_0")
    }
    words = given.get(next(iter(several), ""))
    if more and (not isinstance(words, list) or any(word.startswith("-") for word in more)):
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    if isinstance(words, list):
        words += more


def parse(arguments: Sequence[str], role: str) -> Invocation:
    """Parse the whole command line of one role. Raises UsageError (told), or SystemExit(0) after `--help`."""
    arguments, behind = _split_command(list(arguments), role)
    parser = build(role, _commands_needed(arguments, role))
    words = words_of(arguments)
    path = max((one.path for one in commands_of(role) if list(one.path) == words[: len(one.path)]), default=())
    parser.asked = spelled(role, path) if path else ""
    if behind == [] and "-h" not in arguments and "--help" not in arguments:
        parser.error("the command goes behind --, as in `arcbridge run --cluster NAME -- kubectl get pods`")
    _refuse_unknown_flags(parser, arguments, role)
    namespace, more = parser.parse_known_args(arguments)
    given = vars(namespace)
    _add_words(parser, given, more, role)
    if behind:
        given["command_line"] = behind
    path = tuple(str(given.pop(f"command_{level}")) for level in (0, 1, 2) if given.get(f"command_{level}"))
    given.pop("command_0", None)
    return Invocation(role, path or DEFAULT_COMMAND[role], given)
