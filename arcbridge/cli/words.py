"""Reads the words of a command line without parsing it: which role it is of, and which sub-command.

It needs the tables alone, so that help and parser can both stand on it.
"""

from __future__ import annotations

from arcbridge.cli.commands import COMMANDS, WITHOUT_ROLE
from arcbridge.settings.flags import CLIENT, ROLES, flags_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def role_of(arguments: Sequence[str], *, program: str = "", environment: str = "") -> str:
    """Return which role a command line asks for; empty when it does not say.

    `--role` decides, then ARCBRIDGE_ROLE. Called as `kubectl arcbridge` it is the client; otherwise a sub-command says
    it, a client's before those of the other roles unless it is the same for all of them, as `config check` is; without
    a sub-command a flag says it that one role alone has.
    """
    if said := value_of("--role", arguments) or environment:
        return said
    if program.rpartition("/")[2].startswith("kubectl-"):
        return "client"
    word, flags = first_word(arguments)
    if word:
        named = [command.roles for command in COMMANDS if command.path[0] == word]
        owners = {role for roles in named for role in roles}
        if "client" in owners and ROLES not in named:
            return "client"
        return owners.pop() if len(owners) == 1 else WITHOUT_ROLE.get(word, "")
    owners = set(ROLES)
    for name in flags:
        owners &= {role for role in ROLES for flag in flags_of(role) if name in flag.names} or owners
    return owners.pop() if len(owners) == 1 else ""


def value_of(flag: str, arguments: Sequence[str]) -> str:
    """Return the first value of a flag that all roles have; empty where it is not given."""
    for index, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{flag}="):
            return argument[len(flag) + 1 :]
    return ""


def spelled(role: str, path: tuple[str, ...]) -> str:
    """Return a command as it is typed: with its role where the words alone do not say it."""
    named = (role == CLIENT and not path) or path[:1] in (("version",), ("completion",)) or role_of(path) == role
    return " ".join(("arcbridge", *(() if named else ("--role", role)), *path))


def first_word(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Return the sub-command of a command line, whatever its role, and the flags before it; empty: there is none."""
    flags: list[str] = []
    for one in _words_and_flags(arguments):
        if not one.startswith("-"):
            return one, flags
        flags.append(one)
    return "", flags


def words_of(arguments: Sequence[str]) -> list[str]:
    """Return what of a command line is neither a flag nor its value."""
    return [one for one in _words_and_flags(arguments) if not one.startswith("-")]


def _words_and_flags(arguments: Sequence[str]) -> Iterator[str]:
    with_value = {name for role in ROLES for flag in flags_of(role) if flag.takes_value for name in flag.names}
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            break
        name, assigned, _ = argument.partition("=")
        yield name if argument.startswith("-") else argument
        if name in with_value and not assigned:
            next(rest, None)
