"""Completion scripts for bash, zsh and fish, generated from the table of flags: static text, nothing runs at a TAB.

Cluster names come from a file that `clusters` and `proxy` keep (`$XDG_CACHE_HOME/arcbridge/clusters`), so that a TAB
needs neither Python nor the network.
"""

from __future__ import annotations

import sys

from arcbridge.cli.commands import COMMANDS, commands_of
from arcbridge.cli.parser import Invocation
from arcbridge.errors import ExitCode
from arcbridge.settings.flags import CLIENT, ROLES, Flag, flags_of

_CLUSTERS = '"${XDG_CACHE_HOME:-$HOME/.cache}/arcbridge/clusters"'
_FISH_CLUSTERS = "(set -q XDG_CACHE_HOME; and echo $XDG_CACHE_HOME; or echo $HOME/.cache)/arcbridge/clusters"
_FILES = ("FILE", "DIR")


def print_script(invocation: Invocation) -> int:
    sys.stdout.write(script(invocation.text("shell")))
    return ExitCode.DONE


def script(shell: str) -> str:
    """Return the completion script of one shell: `bash`, `zsh` or `fish`."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]()


def _all_flags(role: str) -> list[Flag]:
    """Return the flags of the role's commands, then its own, which have short names too."""
    own = [flag for command in commands_of(role) for flag in command.flags]
    return [*own, *flags_of(role)]


def _value_flags() -> list[str]:
    return sorted({name for role in ROLES for flag in _all_flags(role) if flag.takes_value for name in flag.names})


def _words(role: str, path: tuple[str, ...]) -> list[str]:
    """Return what may follow the sub-command words `path`: sub-commands, choices of a positional, then flags."""
    following = [
        command.path[len(path)] for command in commands_of(role) if command.path[: len(path)] == path != command.path
    ]
    for command in commands_of(role):
        if command.path == path:
            following += command.argument.choices if command.argument else ()
            following += [name for flag in command.flags for name in flag.names]
    flags = [name for flag in flags_of(role) for name in flag.names]
    return list(dict.fromkeys([*following, *flags, "--help"]))


def _paths(role: str) -> list[tuple[str, ...]]:
    """Return every prefix of a command path, the empty one included."""
    return list(dict.fromkeys(command.path[:n] for command in commands_of(role) for n in range(len(command.path) + 1)))


def _owners() -> dict[str, list[str]]:
    """Role -> first words of sub-commands that only this role has."""
    owners: dict[str, list[str]] = {role: [] for role in ROLES}
    for word in dict.fromkeys(command.path[0] for command in COMMANDS):
        roles = {role for command in COMMANDS if command.path[0] == word for role in command.roles}
        if len(roles) == 1:
            owners[roles.pop()].append(word)
    return owners


def _value_cases() -> list[tuple[str, str]]:
    """(pattern of flag names, what completes their value): `files`, `clusters`, or words."""
    cases: dict[str, str] = {}
    for role in ROLES:
        for flag in _all_flags(role):
            if not flag.takes_value:
                continue
            for name in flag.names:
                if flag.choices:
                    words = " ".join(flag.choices)
                    # `--output` has other words under `config print`: offer both.
                    known = cases.get(name, "")
                    cases[name] = " ".join(dict.fromkeys(f"{known} {words}".split()))
                elif flag.dest == "cluster":
                    cases[name] = "clusters"
                elif flag.metavar in _FILES:
                    cases[name] = "files"
                else:
                    cases.setdefault(name, "nothing")
    grouped: dict[str, list[str]] = {}
    for name, what in cases.items():
        grouped.setdefault(what, []).append(name)
    return [("|".join(names), what) for what, names in grouped.items()]


def _bash() -> str:
    return f"""# bash completion of arcbridge; load it with: source <(arcbridge completion bash)
{_function()}complete -F _arcbridge arcbridge
"""


def _function() -> str:
    """Return the function that completes in bash, and in what zsh emulates of it."""
    cases = "\n".join(
        f"        {pattern}) " + {
            "files": 'COMPREPLY=($(compgen -f -- "$cur")); compopt -o filenames 2>/dev/null; return ;;',
            # compgen expands its words as the shell does: only what can be a name may reach it (docs/threats.md#B3).
            "clusters": f"""COMPREPLY=($(compgen -W "$(grep -xE '[a-z0-9.-]+' {_CLUSTERS} 2>/dev/null)" """
            '-- "$cur")); return ;;',
            "nothing": "return ;;",
        }.get(what, f'COMPREPLY=($(compgen -W "{what}" -- "$cur")); return ;;')
        for pattern, what in _value_cases()
    )  # fmt: skip
    roles = "\n".join(
        f"            {'|'.join(names)}) [[ -z $role ]] && role={role} ;;" for role, names in _owners().items() if names
    )
    words = "\n".join(
        f'        "{role} {"".join(part + " " for part in path)}") words="{" ".join(_words(role, path))}" ;;'
        for role in ROLES
        for path in _paths(role)
    )
    # No variable is named `path`: in zsh that is PATH.
    return f"""_arcbridge() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} words='' role='' given='' skip='' word i
    COMPREPLY=()
    case $prev in
{cases}
    esac
    for (( i = 1; i < COMP_CWORD; i++ )); do
        word=${{COMP_WORDS[i]}}
        if [[ -n $skip ]]; then
            [[ $skip == --role ]] && role=$word
            skip=''
            continue
        fi
        case $word in
            {"|".join(_value_flags())}) skip=$word ;;
            --role=*) role=${{word#--role=}} ;;
            -*) ;;
{roles}
        esac
        [[ -z $skip && $word != -* ]] && given="$given$word "
    done
    [[ -z $role ]] && role={CLIENT}
    case "$role $given" in
{words}
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
"""


def _zsh() -> str:
    """Return a function that has zsh complete files, and in its emulation of bash's completion bash's the rest."""
    files = "|".join(pattern for pattern, what in _value_cases() if what == "files")
    return f"""#compdef arcbridge
# zsh completion of arcbridge; load it with: source <(arcbridge completion zsh)
autoload -U +X bashcompinit && bashcompinit
{_function()}_arcbridge_zsh() {{
    case ${{words[CURRENT-1]}} in
        {files}) _files ;;
        *) _bash_complete -F _arcbridge ;;
    esac
}}
compdef _arcbridge_zsh arcbridge
"""


def _fish() -> str:
    lines = [
        "# fish completion of arcbridge; load it with: arcbridge completion fish | source",
        "complete -c arcbridge -f",
    ]
    for role in ROLES:
        for path in _paths(role):
            for command in commands_of(role):
                if command.path[: len(path)] == path != command.path and len(command.path) == len(path) + 1:
                    lines.append(_fish_line(_fish_behind(path), f"-a {command.path[-1]}", command.help))
        for group in dict.fromkeys(c.path[:n] for c in commands_of(role) for n in range(1, len(c.path))):
            lines.append(_fish_line(_fish_behind(group[:-1]), f"-a {group[-1]}", ""))
    for flag in {flag.long: flag for role in ROLES for flag in _all_flags(role)}.values():
        names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names)
        value = ""
        if flag.choices:
            value = f" -x -a '{' '.join(flag.choices)}'"
        elif flag.takes_value and flag.dest == "cluster":
            value = f" -x -a '(cat {_FISH_CLUSTERS} 2>/dev/null)'"
        elif flag.takes_value:
            value = " -r -F" if flag.metavar in _FILES else " -x"
        lines.append(f"complete -c arcbridge {names}{value} -d '{_fish_text(flag.help)}'")
    for command in COMMANDS:
        if command.argument is not None and command.argument.choices:
            seen = f"__fish_seen_subcommand_from {command.path[-1]}"
            lines.append(_fish_line(seen, f"-a '{' '.join(command.argument.choices)}'", ""))
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _fish_behind(path: tuple[str, ...]) -> str:
    return f"__fish_seen_subcommand_from {path[-1]}" if path else "__fish_use_subcommand"


def _fish_line(condition: str, what: str, text: str) -> str:
    description = f" -d '{_fish_text(text)}'" if text else ""
    return f"complete -c arcbridge -n '{condition}' {what}{description}"


def _fish_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")
