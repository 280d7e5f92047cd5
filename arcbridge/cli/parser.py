"""The command-line parser, made from the table in `flags`.

A role's flags are accepted before and after its sub-command. Nothing has a default here: what was not given is
absent, so that the loader can look at the environment and the file next.
"""

from __future__ import annotations

import argparse
import sys

from arcbridge.cli.flags import (
    DEFAULT_COMMAND,
    GROUP_HELP,
    LIST,
    ROLES,
    Command,
    Flag,
    commands_of,
    flags_of,
)
from arcbridge.errors import ExitCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn


class UsageError(SystemExit):
    """The command line is wrong; already told on standard error."""

    def __init__(self) -> None:
        super().__init__(int(ExitCode.USAGE))


class Parser(argparse.ArgumentParser):
    """An argument parser that tells mistakes in the house's form and never guesses abbreviations."""

    def error(self, message: str) -> NoReturn:
        groups = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        if groups and message.endswith(": "):  # argparse names what is missing, and a list of sub-commands has no name
            message = f"a sub-command is needed: one of {', '.join(groups[0].choices)}"
        # One line, then what to do; the usage block of argparse fills a screen and hides the mistake.
        sys.stderr.write(f"error: {message}\nrun `{self.prog} --help` for the flags and sub-commands\n")
        raise UsageError


class Invocation:
    """A parsed command line: which command of which role, and what was given."""

    __slots__ = ("command", "given", "role")

    def __init__(self, role: str, command: tuple[str, ...], given: dict[str, object]) -> None:
        self.role = role
        self.command = command
        self.given = given

    def text(self, name: str, default: str = "") -> str:
        """A flag or positional of the command line alone."""
        value = self.given.get(name, default)
        return value if isinstance(value, str) else default

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.given.get(name, ())
        return tuple(value) if isinstance(value, list) else ()

    def switch(self, name: str) -> bool:
        return self.given.get(name) is True


def role_of(arguments: Sequence[str], *, program: str = "", environment: str = "") -> str:
    """Which role a command line asks for; empty when it does not say.

    `--role` decides, then ARCBRIDGE_ROLE. Called as `kubectl arcbridge` it is the client; otherwise a sub-command
    that only one role has says it too.
    """
    for index, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument == "--role" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith("--role="):
            return argument[len("--role=") :]
    if environment:
        return environment
    if program.rpartition("/")[2].startswith("kubectl-"):
        return "client"
    for argument in arguments:
        if argument.startswith("-"):
            continue
        owners = {role for role in ROLES for command in commands_of(role) if command.path[0] == argument}
        if len(owners) == 1:
            return owners.pop()
        break
    return ""


def _add_flag(parser: argparse._ActionsContainer, flag: Flag) -> None:
    if flag.takes_value:
        # Choices are checked by the loader, so that a wrong value in a file and on the command line get one answer.
        metavar = "|".join(flag.choices) if flag.choices else flag.metavar
        parser.add_argument(
            *flag.names,
            dest=flag.dest,
            action="append" if flag.kind == LIST else "store",
            metavar=metavar,
            help=flag.help,
            default=argparse.SUPPRESS,
            choices=None,
        )
    else:
        parser.add_argument(*flag.names, dest=flag.dest, action="store_true", help=flag.help, default=argparse.SUPPRESS)


def build(role: str, program: str = "arcbridge", commands: Sequence[Command] | None = None) -> Parser:
    """The parser of one role, with all of its sub-commands, or with those in `commands` alone."""
    name = f"{program} --role {role}"
    parser = Parser(
        prog=name,
        usage=f"{name} [FLAGS] [SUB-COMMAND]",
        description={
            "relay": "Bring clients and agents together; the only role with an open port.",
            "agent": "Dial out of the cluster and talk to its API server as each caller.",
            "client": "Reach a cluster behind a firewall: a local endpoint and a kubeconfig for it.",
        }[role],
        allow_abbrev=False,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    _add_flags(parser, role, ())
    if commands is None:
        commands = commands_of(role)
    elif not commands:
        return parser
    leaves = parser.add_subparsers(title="sub-commands", metavar="", dest="command_0", parser_class=Parser)
    groups: dict[str, argparse._SubParsersAction[Parser]] = {}
    for command in commands:
        if len(command.path) == 1:
            leaf = leaves.add_parser(command.path[0], **_texts(name, command))
        else:
            head, tail = command.path
            if head not in groups:
                group = leaves.add_parser(head, help=GROUP_HELP[head], prog=f"{name} {head}", allow_abbrev=False)
                groups[head] = group.add_subparsers(
                    title="sub-commands", metavar="", dest="command_1", required=True, parser_class=Parser
                )
            leaf = groups[head].add_parser(tail, **_texts(name, command))
        _add_flags(leaf, role, command.flags)
        for argument, text, choices in command.arguments:
            many = command.repeated and argument == command.arguments[-1][0]
            nargs = ("*" if command.optional else "+") if many else None
            leaf.add_argument(argument, help=text, choices=choices or None, nargs=nargs)
    return parser


def _texts(name: str, command: Command) -> dict[str, Any]:
    full = f"{name} {' '.join(command.path)}"
    return {
        "help": command.help,
        "description": command.help[0].upper() + command.help[1:] + ".",
        "prog": full,
        "usage": " ".join(
            [full, *(argument[0].upper() for argument in command.arguments), *["…"] * command.repeated, "[FLAGS]"]
        ),
        "allow_abbrev": False,
        "add_help": False,
        "argument_default": argparse.SUPPRESS,
    }


def _add_flags(parser: Parser, role: str, own: Sequence[Flag]) -> None:
    """The command's own flags, then the role's; a flag of the command hides the role's of the same name."""
    taken = {name for flag in own for name in flag.names}
    if own:
        section = parser.add_argument_group("flags of this sub-command")
        for flag in own:
            _add_flag(section, flag)
    section = parser.add_argument_group(f"flags of --role {role}")
    section.add_argument("-h", "--help", action="help", help="show this text")
    for flag in flags_of(role):
        if not taken.intersection(flag.names):
            _add_flag(section, flag)


def _refuse_unknown_flags(parser: Parser, arguments: Sequence[str], role: str) -> None:
    """Name a mistyped flag; argparse would take the word behind it for a sub-command and complain about that."""
    flags = [*flags_of(role), *(flag for command in commands_of(role) for flag in command.flags)]
    known = {"--help", *(name for flag in flags for name in flag.names)}
    for argument in arguments:
        if argument == "--":
            return
        name = argument.partition("=")[0]
        if name.startswith("--") and name not in known:
            import difflib  # on this path only

            near = difflib.get_close_matches(name, sorted(known), n=1)
            parser.error(f"unknown flag {name}" + (f"; did you mean {near[0]}?" if near else ""))


def _commands_needed(arguments: Sequence[str], role: str) -> Sequence[Command] | None:
    """The one sub-command that is surely meant, or none at all; None: every one, for help and for messages.

    To make the parsers of all sub-commands takes 20 ms, a tenth of a client's start.
    """
    values = {name: flag.takes_value for flag in flags_of(role) for name in flag.names}
    known = {command.path[0]: command for command in commands_of(role) if len(command.path) == 1}
    rest = iter(arguments)
    for argument in rest:
        name, assigned, _ = argument.partition("=")
        if not argument.startswith("-"):
            needed = known.get(argument)
            # Help before the sub-command lists them all.
            return [needed] if needed is not None else None
        if name not in values or (assigned and not name.startswith("--")):
            return None
        if values[name] and not assigned:
            next(rest, None)
    return ()


def parse(arguments: Sequence[str], role: str, program: str = "arcbridge") -> Invocation:
    """Parse the whole command line of one role. Raises UsageError (told), or SystemExit(0) after `--help`."""
    parser = build(role, program, _commands_needed(arguments, role))
    _refuse_unknown_flags(parser, arguments, role)
    given = vars(parser.parse_args(list(arguments)))
    path = tuple(str(given.pop(f"command_{level}")) for level in (0, 1) if given.get(f"command_{level}"))
    given.pop("command_0", None)
    return Invocation(role, path or DEFAULT_COMMAND[role], given)
