"""Makes the help of each command from the tables of commands and flags: usage, arguments, examples, its own flags.

What all commands of a role have stands behind one line and is listed by `help flags`. Terminals, man pages and the
reference (`.ci/release/manual.py`) are made from the same pages.
"""

from __future__ import annotations

from arcbridge.cli.commands import COMMANDS, GROUP_HELP, GROUPS, Command, commands_of, find_command
from arcbridge.cli.screen import DEFAULT_WIDTH, LEAST_PROSE, WIDEST_PROSE, Screen, cells, prose, wrap
from arcbridge.cli.words import spelled, value_of
from arcbridge.errors import EXIT_CODES, ExitCode
from arcbridge.settings.flags import CLIENT, ROLES, Flag, flags_of
from arcbridge.settings.suggest import listed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    Pairs = list[tuple[str, str]]

_TERM = 26
"""Columns of a term that has its text beside it; that of a longer one stands below."""
_ABOUT = {
    CLIENT: "kubectl access to Kubernetes clusters behind firewalls, through a relay that cannot read what it carries.",
    "relay": "Bring clients and agents together; the only role with an open port.",
    "agent": "Dial out of the cluster and talk to its API server as each caller.",
}
_ROLE_EXAMPLES = {
    CLIENT: [
        ("arcbridge login https://relay.example.org", ""),
        ("arcbridge connect berlin", "makes `kubectl get pods` work from any terminal"),
    ],
    "relay": [
        ("arcbridge --role relay --config relay.toml", ""),
        ("arcbridge token create --cluster berlin", "a token for a cluster's agents"),
    ],
    "agent": [
        ("arcbridge --role agent --config agent.toml", ""),
        ("arcbridge --role agent doctor --config agent.toml", "what is in the way"),
    ],
}
_ROLES_HELP = [
    ("--role relay --help", "run the relay, and administer it on its machine"),
    ("--role agent --help", "run in a cluster, and dial out"),
]
_MORE_HELP = [
    ("help COMMAND", "usage, examples and flags of one command"),
    ("help flags", "flags that all commands have"),
    ("help exit-codes", "what the exit codes say"),
]
_OF_RUN = (ExitCode.RUN_FAILED, ExitCode.CANNOT_RUN, ExitCode.NOT_FOUND)
"""What the client's `run` alone ends with."""
EXAMPLES = "examples"
HELP_WORDS = ("flags", "exit-codes")
"""What `arcbridge help` explains besides commands."""


class HelpPage:
    """The help of one command, group or role: sections of terms, each with its text."""

    __slots__ = ("about", "ending", "sections", "usage")

    def __init__(self, usage: str, about: str, sections: Iterable[tuple[str, Pairs]], ending: str = "") -> None:
        self.usage = usage
        self.about = about
        self.sections = [(title, pairs) for title, pairs in sections if pairs]
        self.ending = ending

    def text(self, screen: Screen) -> str:
        """Return the page as lines; where there is no terminal they are as wide as a terminal usually is."""
        narrow = Screen(screen.prose or DEFAULT_WIDTH, colour=screen.colour)
        blocks = [prose(f"usage: {self.usage}", narrow, "    ")] if self.usage else []
        blocks += [prose(self.about, narrow)] if self.about else []
        for title, pairs in self.sections:
            lines = _lines(pairs, narrow) if title == EXAMPLES else definitions(pairs, narrow)
            blocks.append(f"{screen.heading(title)}:\n{lines}")
        blocks += [prose(self.ending, narrow)] if self.ending else []
        return "\n".join(blocks)


def definitions(pairs: Pairs, screen: Screen) -> str:
    """Return terms with their texts beside them, or below those that are long; below all of them on a narrow screen."""
    width = screen.width or WIDEST_PROSE
    column = max((cells(term) for term, _ in pairs if cells(term) <= _TERM), default=8) + 5
    narrow = width - column < LEAST_PROSE
    column = 6 if narrow else column
    lines: list[str] = []
    for term, text in pairs:
        beside = not narrow and cells(term) + 5 <= column
        first, *rest = wrap(text, width - column)
        if not beside:
            lines += wrap(f"  {term}", width, "  ")
        lines.append(f"  {term:{column - 2}}{first}" if beside else " " * column + first)
        lines += [" " * column + line for line in rest]
    return "".join(f"{line.rstrip()}\n" for line in lines)


def _lines(examples: Pairs, screen: Screen) -> str:
    """Return command lines, each below what it does."""
    return "".join(prose(f"  # {text}", screen, "# ") * bool(text) + f"  {line}\n" for line, text in examples)


# --- the pages --------------------------------------------------------------------------------------------------------


def page_of(role: str, path: tuple[str, ...]) -> HelpPage:
    """Return the page of a command or group of a role; of the role itself where `path` is empty."""
    if not path:
        return _role_page(role)
    if any(command.path == path for command in commands_of(role)):
        return _command_page(role, find_command(role, path))
    pairs = [
        (" ".join(command.path[len(path) :]), command.help)
        for command in commands_of(role)
        if command.path[: len(path)] == path
    ]
    usage = f"{spelled(role, path)} SUB-COMMAND [FLAGS]"
    return HelpPage(usage, _sentence(GROUP_HELP[path[-1]]), [("sub-commands", pairs)], _common(role))


def _role_page(role: str) -> HelpPage:
    sections = [(title, [(word, _of_word(role, word)) for word in group.split()]) for title, group in GROUPS[role]]
    sections.insert(0, (EXAMPLES, _ROLE_EXAMPLES[role]))
    sections += [("more help", _MORE_HELP)] + ([("operators", _ROLES_HELP)] if role == CLIENT else [])
    every = "Most of `help flags` can be ARCBRIDGE_<FLAG>, or stand in the file of --config."
    return HelpPage(f"{spelled(role, ())} COMMAND [FLAGS]", _ABOUT[role], sections, every)


def _of_word(role: str, word: str) -> str:
    found = [command for command in commands_of(role) if command.path[0] == word]
    if found[0].path == (word,):
        return found[0].help
    return f"{GROUP_HELP[word]}: {', '.join(dict.fromkeys(command.path[1] for command in found))}"


def _command_page(role: str, command: Command) -> HelpPage:
    argument, shown = command.argument, ""
    arguments: Pairs = []
    if argument is not None:
        name = argument.name.upper()
        shown = argument.shown or name + " …" * (argument.count in ("*", "+"))
        choices = f": {listed(argument.choices)}" if argument.choices else ""
        arguments = [(argument.shown or name, argument.help + choices)]
        shown = f" [{shown}]" if argument.count in ("?", "*") else f" {shown}"
    full = spelled(role, command.path)
    if command.roles == ROLES and full.startswith("arcbridge --role"):
        full = " ".join(("arcbridge --role ROLE", *command.path))
    usage = f"{full}{shown} [FLAGS]{' -- COMMAND …' * command.takes_command}"
    own = [one for one in command.examples if value_of("--role", one.split()) in ("", role)]
    examples = [(line, text) for line, _, text in (one.partition("  # ") for one in own)]
    common = {flag.long: flag for flag in flags_of(role)}
    taken = {name for flag in command.flags for name in flag.names}
    flags = [*map(_of_flag, command.flags), *(_of_flag(common[name], taken) for name in command.uses.split())]
    sections = [("arguments", arguments), (EXAMPLES, examples), ("flags", [*flags, ("-h, --help", "show this text")])]
    return HelpPage(usage, _sentence(command.help), sections, _common(role))


def _of_flag(flag: Flag, taken: Collection[str] = ()) -> tuple[str, str]:
    names = ", ".join(name for name in flag.names if name not in taken)
    words = [f"{one} (default)" if one == flag.default else one for one in flag.choices]
    term = f"{names} {flag.metavar}" if flag.takes_value else names
    return term, f"{flag.help}: {listed(words)}" if words else flag.help


def _common(role: str) -> str:
    return (
        f"`arcbridge help flags{'' if role == CLIENT else f' --role {role}'}` lists the flags that all commands take."
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def flags_page(role: str) -> HelpPage:
    """Return all flags of a role, by what they are about."""
    topics: dict[str, Pairs] = {}
    for flag in flags_of(role):
        topics.setdefault(flag.topic, []).append(_of_flag(flag))
    about = (
        f"All commands of the {role} take these flags, before and behind their words. Each but --verbose can be given "
        "as a variable, too: --log-level is ARCBRIDGE_LOG_LEVEL. What may be repeated has commas between its parts "
        "there."
    )
    return HelpPage("", about, topics.items())


def exit_codes_page(role: str = CLIENT) -> HelpPage:
    """Return what each exit code says that commands of a role end with."""
    pairs = [
        (str(int(code)), f"{text}{f': {remedy}' if remedy else ''}")
        for code, (text, remedy) in EXIT_CODES.items()
        if role == CLIENT or code not in _OF_RUN
    ]
    return HelpPage("", "All commands end with these exit codes; scripts can rely on them.", [("exit codes", pairs)])


def help_for(arguments: list[str], role: str) -> HelpPage | None:
    """Return the page that `arcbridge help WORD …` asks for; None: the words are none of any role."""
    if arguments[:1] == ["flags"] and arguments[1:] in ([], *([one] for one in ROLES)):
        return flags_page("".join(arguments[1:]) or role or CLIENT)
    if arguments == ["exit-codes"]:
        return exit_codes_page(role or CLIENT)
    path = () if arguments == ["help"] else tuple(arguments)
    for one in (role,) if role else (CLIENT, *ROLES):
        if not path or any(command.path[: len(path)] == path for command in COMMANDS if one in command.roles):
            return page_of(one, path)
    return None
