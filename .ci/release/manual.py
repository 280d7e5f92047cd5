"""Writes the man pages and the reference from the tables of commands, flags, settings and exit codes, and
tables of metrics, log events and codes from what `inventory` finds in the source.

The help that a terminal shows is made of the same pages (`arcbridge.cli.help`), so the three say one thing. What the
tables do not say is not in here. `tests/release/test_manual.py` fails where a file is stale.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import re
import textwrap
import typing
from pathlib import Path

from arcbridge.cli import help as pages
from arcbridge.cli.commands import GROUPS, INTERNAL, commands_of
from arcbridge.client.doctor.codes import CODES
from arcbridge.settings import config
from arcbridge.settings.flags import AGENT, CLIENT, OFF, RELAY, ROLES, Flag, flags_of
from release import inventory

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference.md"
MAN = ROOT / "config" / "man"
NAMES = {CLIENT: "arcbridge.1", RELAY: "arcbridge-relay.8", AGENT: "arcbridge-agent.8"}
SETTINGS = {CLIENT: config.ClientConfig, RELAY: config.RelayConfig, AGENT: config.AgentConfig}
WIDTH = 128
ROLES_OF_ALL = ("agent", "client", "relay")


@functools.cache
def files() -> dict[Path, str]:
    """Return each file that is made, with its text."""
    return {REFERENCE: reference(), **{MAN / name: man_page(role) for role, name in NAMES.items()}}


def write() -> list[Path]:
    MAN.mkdir(exist_ok=True)
    made = files()
    for path, text in made.items():
        path.write_text(text, encoding="utf-8")
    return list(made)


def command_pages(role: str) -> list[tuple[str, pages.HelpPage]]:
    """Return the page of each command of a role, in the order of the help's groups."""
    order = [word for _, group in GROUPS[role] for word in group.split()]
    found = [command for command in commands_of(role) if command.path[0] not in INTERNAL or role != CLIENT]
    found.sort(key=lambda command: order.index(command.path[0]))
    return [(" ".join(command.path), pages.page_of(role, command.path)) for command in found]


# --- settings ---------------------------------------------------------------------------------------------------------


class Setting(typing.NamedTuple):
    """One setting of a file."""

    key: str
    kind: str
    default: str
    flag: str
    about: str


def settings(role: str) -> list[Setting]:
    """Return all settings of a role with what their declarations say of them."""
    flags = {flag.key: flag for flag in flags_of(role) if flag.key}
    of_others = {flag.key: flag for other in ROLES for flag in flags_of(other) if flag.key}
    texts = _docstrings()
    found: list[Setting] = []

    def add(kind: type, prefix: str) -> None:
        hints = typing.get_type_hints(kind)
        for one in dataclasses.fields(kind):
            key, hint = prefix + one.name, hints[one.name]
            if dataclasses.is_dataclass(hint):
                add(typing.cast(type, hint), f"{key}.")
                continue
            flag = flags.get(key)
            about = _about(kind, one.name, texts, flag or of_others.get(key))
            found.append(Setting(key, _kind(hint), _default(one), flag.long if flag is not None else "", about))

    add(SETTINGS[role], "")
    return found


def _about(kind: type, name: str, texts: dict[tuple[str, str], str], flag: Flag | None) -> str:
    """Return the field's own text, else its flag's. Raises ValueError where it has neither."""
    own = [found for base in kind.__mro__ if (found := texts.get((base.__name__, name)))]
    of_flag = [] if flag is None else [f"{'false: ' if flag.kind == OFF else ''}{flag.help}"]
    if not own and not of_flag:
        raise ValueError(f"{kind.__name__}.{name} has no text below it")
    return next(iter([*own, *of_flag]))


def _docstrings() -> dict[tuple[str, str], str]:
    """Return the text below each field of the settings' classes."""
    found = {}
    for node in ast.parse(inspect.getsource(config)).body:
        if isinstance(node, ast.ClassDef):
            for field, text in itertools.pairwise(node.body):
                if not isinstance(text, ast.Expr) or not isinstance(text.value, ast.Constant):
                    continue
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    found[node.name, field.target.id] = " ".join(str(text.value.value).split())
    return found


def _kind(hint: object) -> str:
    text = str(hint).replace("typing.", "")
    for what, word in (("dict", "table"), ("tuple", "list"), ("bool", "true or false"), ("Path", "file"),
                       ("int", "number"), ("float", "number"), ("str", "text")):  # fmt: skip
        if re.search(rf"\b{what}\b", text):
            return word
    return "table"


def _default(field: dataclasses.Field[typing.Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING or value is None or value == "" or value == ():
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# --- the reference ----------------------------------------------------------------------------------------------------


def reference() -> str:
    """Return docs/reference.md."""
    about = (
        "Commands, flags, settings, metrics, log events and codes, made from the program's own tables and source by "
        "`make manual`: do not edit this page. `arcbridge help` and `man arcbridge` show commands, flags and settings."
    )
    lines = ["# Reference", "", *_filled(about)]
    for role in (CLIENT, RELAY, AGENT):
        lines += ["", f"## Commands of the {role}"]
        for words, page in command_pages(role):
            lines += ["", f"### {role}: {words}", "", f"    {page.usage}", "", *_filled(page.about)]
            for title, pairs in page.sections:
                lines += ["", f"{title.capitalize()}:", "", *_pairs(pairs, title)]
    for role in (CLIENT, RELAY, AGENT):
        lines += ["", f"## Flags of all commands of the {role}"]
        for title, pairs in pages.flags_page(role).sections:
            lines += ["", f"**{title}**", "", *_pairs(pairs, title)]
    for role in (CLIENT, RELAY, AGENT):
        lines += ["", f"## Settings of the {role}", ""]
        for one in settings(role):
            facts = ", ".join(filter(None, (one.kind, f"default `{one.default}`" if one.default else "")))
            flag = f"; `{one.flag}`" if one.flag else ""
            lines += _filled(f"* `{one.key}` ({facts}{flag}){f': {one.about}' if one.about else ''}", "  ")
    lines += [*_metrics(), *_events(), *_codes()]
    lines += ["", "## Exit codes", "", *_pairs(pages.exit_codes_page().sections[0][1], "")]
    return "\n".join(lines) + "\n"


def _metrics() -> list[str]:
    """Return the metrics, by the roles that have them."""
    lines = [
        *("", "## Metrics", ""),
        *_filled(
            "Names are without their prefix, `arcbridge_relay_`, `arcbridge_agent_` or `arcbridge_client_`; besides "
            "there are `arcbridge_build_info` and the usual `process_…`. Labels have the values that stand with them; "
            "what is not among these is `other`. [When it is broken](broken.md#metrics) says which to watch."
        ),
    ]
    titles = {ROLES_OF_ALL: "every role", ("agent", "relay"): "relay and agent"}
    found: dict[tuple[str, ...], list[inventory.Metric]] = {ROLES_OF_ALL: [], ("agent", "relay"): []}
    for one in inventory.metrics():
        found.setdefault(tuple(sorted(one.roles)), []).append(one)
    for roles, metrics in found.items():
        lines += ["", f"### Metrics of {titles.get(roles) or f'the {roles[0]}'}", ""]
        for one in metrics:
            labels = f"{{{','.join(one.labels)}}}" if one.labels else ""
            values = "".join(
                f" `{label}`: {', '.join(f'`{value}`' for value in values)}."
                for label, values in one.labels.items()
                if values
            )
            lines += _filled(f"* `{one.name}{labels}` ({one.kind}): {one.help}{values}", "  ")
    return lines


def _events() -> list[str]:
    """Return the log events with their levels and fields."""
    lines = ["", "## Log events", "", *_filled(
        "What stands in the field `event` of a log line, from `info` on: the roles and levels at which it is written, "
        "and the fields that it has besides those of every line and of its session."
    )]  # fmt: skip
    lines.append("")
    for one in inventory.events():
        roles = "all" if one.roles == set(ROLES) else ", ".join(sorted(one.roles))
        levels = ", ".join(level for level in inventory.LEVELS if level in one.levels)
        fields = ", ".join(f"`{name}`" for name in sorted(one.fields))
        lines += _filled(f"* `{one.name}` ({roles}; {levels}){f': {fields}' if fields else ''}", "  ")
    return lines


def _codes() -> list[str]:
    """Return the codes that `doctor` and the self-checks give, with what they say is to be done."""
    of = inventory.codes()
    lines = ["", "## Codes of relay and agent", "", *_filled(
        "Of `arcbridge --role relay doctor`, `--role agent doctor`, and the log lines `check failed`, `check warns`: "
        "with the remedy beside them."
    ), ""]  # fmt: skip
    for code, remedy in of["operator"].items():
        lines += _filled(f"* `{code}`{f': {remedy}' if remedy else ''}", "  ")
    lines += ["", "## Codes of the client", "", *_filled("Of `arcbridge doctor`, with the exit code."), ""]
    for code, remedy in of["client"].items():
        lines += _filled(f"* `{code}` ({int(CODES[code])}){f': {remedy}' if remedy else ''}", "  ")
    return lines


def _pairs(pairs: list[tuple[str, str]], title: str) -> list[str]:
    if title == pages.EXAMPLES:
        return [f"    {line}{f'  # {text}' if text else ''}" for line, text in pairs]
    return [line for term, text in pairs for line in _filled(f"* `{term}`: {text}", "  ")]


def _filled(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


# --- man pages --------------------------------------------------------------------------------------------------------


def man_page(role: str) -> str:
    """Return a man page in the macros of man(7)."""
    name, _, section = NAMES[role].partition(".")
    page = pages.page_of(role, ())
    about = page.about[0].lower() + page.about[1:].removesuffix(".")
    lines = [
        '.\\" Made from the tables of the program by `make manual`.',
        f'.TH {name.upper()} {section} "" arcbridge',
        ".SH NAME",
        f"{_roff(name)} \\- {_roff(about)}",
        ".SH SYNOPSIS",
        _roff(page.usage),
        ".SH DESCRIPTION",
        _roff(page.about),
    ]
    lines += [".SH COMMANDS"]
    for _, one in command_pages(role):
        lines += [f".SS {_roff(one.usage)}", _roff(one.about)]
        for title, pairs in one.sections:
            if title == pages.EXAMPLES:
                lines += [".PP", ".nf", *(_roff(f"  {line}") for line, _ in pairs), ".fi"]
            else:
                lines += _terms([(term, text) for term, text in pairs if term != "-h, --help"])
    lines += [".SH FLAGS OF ALL COMMANDS"]
    for title, pairs in pages.flags_page(role).sections:
        lines += [f".SS {_roff(title)}", *_terms(pairs)]
    lines += [".SH SETTINGS"]
    for setting in settings(role):
        text = f"{setting.about} {f'(default: {setting.default})' if setting.default else ''}".strip()
        lines += _terms([(setting.key, text or setting.kind)])
    lines += [".SH EXIT STATUS", *_terms(pages.exit_codes_page(role).sections[0][1])]
    lines += [".SH FILES", *_terms(_places(role))]
    others = [other for one, other in NAMES.items() if one != role]
    lines += [".SH SEE ALSO", ", ".join(f"{other.partition('.')[0]}({other[-1]})" for other in others)]
    return "\n".join(lines) + "\n"


def _places(role: str) -> list[tuple[str, str]]:
    files = [(f"~/.config/arcbridge/{role}.toml, /etc/arcbridge/{role}.toml", "settings; --config names another file")]
    if role == CLIENT:
        files += [
            ("~/.local/state/arcbridge", "keys, pins, ports and profiles of relays"),
            ("~/.cache/arcbridge", "tokens of logins, and the names of clusters for completion"),
        ]
    return files


def _terms(pairs: list[tuple[str, str]]) -> list[str]:
    return [line for term, text in pairs for line in (".TP", f".B {_roff(term)}", _roff(text) or "\\&")]


def _roff(text: str) -> str:
    """Escape what roff would read: backslashes, hyphens that are to be copied, and control lines."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "\\`").replace("'", "\\(aq").replace("~", "\\(ti")
    return f"\\&{text}" if text.startswith((".", "'")) else text


assert set(NAMES) == set(ROLES)
