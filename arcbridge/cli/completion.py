"""Completion scripts for bash, zsh, fish and PowerShell, made from the tables of commands and flags: static text, and
nothing of ours runs at a TAB.

Each script does the same: it finds the role and the words of the command, completes the value of a flag, or offers what
may follow, flags only behind a `-`. Behind `run --` another program is completed as the shell does it. Cluster names
come from a file that `clusters` and `proxy` keep (`StateDirectory.keep_cluster_names`), so that a TAB needs neither
Python nor the network; what a name cannot be is left out of it (docs/threats.md#B3).
"""

from __future__ import annotations

import shlex
import sys

from arcbridge.cli.commands import COMMANDS, GROUP_HELP, INTERNAL, SHELLS, WITHOUT_ROLE, commands_of
from arcbridge.cli.help import HELP_WORDS
from arcbridge.cli.parser import Invocation
from arcbridge.errors import ExitCode
from arcbridge.settings.flags import CLIENT, ROLES, Flag, flags_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Offers = list[tuple[str, str]]

_NAME = "^[a-z0-9.-]+$"
"""What a cluster's name is made of."""
_CLUSTERS, _FILES, _NOTHING, _SWITCH = "clusters", "files", "nothing", "switch"

_BEFORE_COMMANDS = next(f"{CLIENT} {' '.join(one.path)}" for one in COMMANDS if one.takes_command)
"""The words behind whose `--` another program is completed."""


def print_script(invocation: Invocation) -> int:
    sys.stdout.write(script(invocation.text("shell")))
    return ExitCode.DONE


def script(shell: str) -> str:
    """Return the completion script of one shell."""
    makers: dict[str, Callable[[], str]] = dict(zip(SHELLS, (_bash, _zsh, _fish, _powershell), strict=True))
    return makers[shell]()


# --- what may follow --------------------------------------------------------------------------------------------------


class _Place:
    """What may follow the words `path` of a role: words and flags with their texts, what completes the values of these
    flags, and what an argument is."""

    __slots__ = ("argument", "flags", "key", "values", "words")

    def __init__(self, role: str, path: tuple[str, ...]) -> None:
        self.key = " ".join((role, *path))
        self.words: Offers = []
        self.flags: Offers = []
        self.values: Offers = []
        self.argument = ""
        for command in commands_of(role):
            if command.path == path:
                self.flags = [(name, flag.help) for flag in command.flags for name in flag.names]
                self.values = [(name, _value_of(flag)) for flag in command.flags for name in flag.names]
                if (argument := command.argument) is not None:
                    self.words += [(choice, "") for choice in argument.choices]
                    self.argument = argument.kind
            elif command.path[: len(path)] == path and command.path[0] not in INTERNAL:
                word = command.path[len(path)]
                leaf = len(command.path) == len(path) + 1
                self.words.append((word, command.help if leaf else GROUP_HELP[word]))
        self.words = list(dict(self.words).items())


def _places() -> list[_Place]:
    """Return every place of every role; the empty path is what follows no word."""
    paths = {
        role: dict.fromkeys(command.path[:n] for command in commands_of(role) for n in range(len(command.path) + 1))
        for role in ROLES
    }
    places = [_Place(role, path) for role, found in paths.items() for path in found]
    for place in places:
        if " " not in place.key:
            place.words.append(("help", "usage, examples and flags of one command"))
    return places


def _common(role: str) -> Offers:
    return [*((name, flag.help) for flag in flags_of(role) for name in flag.names), ("--help", "show help")]


def _roles_of_words() -> dict[str, str]:
    """Return the role of each first word that says one other than the client's."""
    owners: dict[str, set[str]] = {}
    for command in COMMANDS:
        owners.setdefault(command.path[0], set()).update(command.roles)
    return {word: WITHOUT_ROLE.get(word) or min(roles) for word, roles in owners.items() if CLIENT not in roles}


def _values() -> list[tuple[str, list[str]]]:
    """Return what completes the value of flags, `clusters`, `files`, `nothing` or words, and the keys of these flags.

    A command's own flag has its place before its name and comes first, as it hides the role's of the same name:
    `switch` says that it takes no value, other than the role's. The key of a role's flag is a space and its name.
    """
    common = {name: _value_of(flag) for role in ROLES for flag in flags_of(role) for name in flag.names}
    own: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    for place in _places():
        for name, what in place.values:
            if what != common.get(name, _SWITCH):
                own.setdefault(what, []).append(f"{place.key} {name}")
    for name, what in common.items():
        others.setdefault(what, []).append(f" {name}")
    others.pop(_SWITCH)
    return [*own.items(), *others.items()]


def _keys(*, switches: bool) -> list[str]:
    """Return the keys of the flags that take a value, or of those that take none although the role's does."""
    return [key for what, keys in _values() for key in keys if (what == _SWITCH) is switches]


def _value_of(flag: Flag) -> str:
    if not flag.takes_value:
        return _SWITCH
    if flag.choices:
        return " ".join(flag.choices)
    return _CLUSTERS if flag.dest == "cluster" else _FILES if flag.metavar in ("FILE", "DIR") else _NOTHING


def _filled(template: str, **parts: str) -> str:
    """Return a script with `@PART@` replaced."""
    for name, text in parts.items():
        template = template.replace(f"@{name}@", text)
    return template


# --- bash and zsh -----------------------------------------------------------------------------------------------------

_POSIX_CACHE = '"${XDG_CACHE_HOME:-$cache}/arcbridge/clusters"'
_POSIX_NAMES = f"grep -xE '{_NAME}' {_POSIX_CACHE} 2>/dev/null"
_POSIX = """    local word='' role='' given='' skip='' helping='' kind='' cache=$HOME/.cache place i
    local -a list flags
    [[ $OSTYPE == darwin* ]] && cache=$HOME/Library/Caches
    for word in "$@"; do
        [[ $word == -- ]] && skip='' && break
        [[ $word == = ]] && continue  # bash makes three words of --role=relay
        if [[ -n $skip ]]; then
            [[ $skip == *' --role' ]] && role=$word
            skip=''
            continue
        fi
        case "$role$given $word" in
            @switches@) ;;
            @values@) skip="$role$given $word" ;;
            *' --role='*) role=${word#--role=} ;;
            *' -'*) ;;
            *)
                [[ $word == help && -z $given ]] && helping=1 && continue
                if [[ -z $role ]]; then
                    role=client
                    case $word in
@roles@
                    esac
                fi
                case "$role$given $word" in
                    @keys@) given="$given $word" ;;
                esac ;;
        esac
    done
    case $skip in
@cases@
    esac
    place="${role:-client}$given"
    case $place in
@places@
    esac
    case $place in
@common@
    esac
"""
"""How `$@`, the words before the one at the cursor, are read: the value of a flag is completed, and of what else may
follow them `list`, `flags` and `kind` are set."""


def _posix(offers: Callable[[Offers], str], values: dict[str, str], words: str) -> str:
    """`values` and `words`: what completes a flag's value, and what does where it is one of some words."""
    cases = "\n".join(
        f"        {_posix_pattern(keys)}) {values.get(what) or words.format(what)}; return ;;"
        for what, keys in _values()
        if what != _SWITCH
    )
    places = "\n".join(
        f"        '{place.key}') list=({offers(place.words)}) flags=({offers(place.flags)}) kind='{place.argument}' ;;"
        for place in _places()
    )
    return _filled(
        _POSIX,
        switches=_posix_pattern(_keys(switches=True)),
        values=_posix_pattern(_keys(switches=False)),
        roles="\n".join(f"                        {word}) role={role} ;;" for word, role in _roles_of_words().items()),
        keys=_posix_pattern([place.key for place in _places() if " " in place.key]),
        cases=cases,
        places=places,
        common="\n".join(f"        {role}*) flags+=({offers(_common(role))}) ;;" for role in ROLES),
    )


def _posix_pattern(keys: list[str]) -> str:
    return "|".join(f"{'*' if key.startswith(' ') else ''}'{key}'" for key in keys)


def _bash() -> str:
    files = 'COMPREPLY=($(compgen -f -- "$cur")); compopt -o filenames 2>/dev/null'
    clusters = f'COMPREPLY=($(compgen -W "$({_POSIX_NAMES})" -- "$cur"))'
    values = {_FILES: files, _CLUSTERS: clusters, _NOTHING: ":"}

    def names(offers: Offers) -> str:
        return " ".join(word for word, _ in offers)

    return f"""# bash completion of arcbridge; load it with: source <(arcbridge completion bash)
_arcbridge() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}}
    COMPREPLY=()
    [[ $cur == = ]] && cur=''
    set -- "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"
{_posix(names, values, 'COMPREPLY=($(compgen -W "{}" -- "$cur"))')}    for (( i = 1; i < COMP_CWORD; i++ )); do
        [[ ${{COMP_WORDS[i]}} == -- ]] || continue
        [[ $place == '{_BEFORE_COMMANDS}' ]] || return
        if declare -F _command_offset >/dev/null; then
            _command_offset $((i + 1))
        elif (( i + 1 == COMP_CWORD )); then
            COMPREPLY=($(compgen -c -- "$cur"))
        else
            {files}
        fi
        return
    done
    local words="${{list[*]-}}"
    [[ -n $helping ]] && kind='' && [[ -z $given ]] && words="${{words/ help/}} {" ".join(HELP_WORDS)}"
    if [[ $cur == -* ]]; then
        words=${{flags[*]-}}
    elif [[ $kind == clusters ]]; then
        words="$words $({_POSIX_NAMES})"
    elif [[ $kind == files ]]; then
        {files}
        return
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -F _arcbridge arcbridge
"""


def _zsh() -> str:
    def array(offers: Offers) -> str:
        return " ".join(shlex.quote(f"{word}:{text}" if text else word) for word, text in offers)

    names = f'-- ${{(f)"$({_POSIX_NAMES})"}}'
    values = {_FILES: "_files", _CLUSTERS: f"compadd {names}", _NOTHING: "_message value"}
    return f"""#compdef arcbridge
# zsh completion of arcbridge; load it with: source <(arcbridge completion zsh)
_arcbridge() {{
    local cur=${{words[CURRENT]}}
    set -- "${{(@)words[2,CURRENT-1]}}"
{_posix(array, values, "compadd -- {}")}    i=${{words[(i)--]}}
    if (( i < CURRENT )); then
        [[ $place == '{_BEFORE_COMMANDS}' ]] || return
        shift $i words
        (( CURRENT -= i ))
        _normal
        return
    fi
    [[ -n $helping ]] && kind='' && [[ -z $given ]] && list=(${{list:#help:*}} {" ".join(HELP_WORDS)})
    if [[ $cur == -* ]]; then
        _describe -o flag flags
        return
    fi
    case $kind in
        clusters) compadd -X cluster {names} ;;
        files) _files ;;
    esac
    (( $#list )) && _describe command list
}}
compdef _arcbridge arcbridge
"""


# --- fish -------------------------------------------------------------------------------------------------------------


_FISH = """# fish completion of arcbridge; load it with: arcbridge completion fish | source
function __arcbridge_complete
    set -l words (commandline -opc) ; set -l cur (commandline -ct)
    set -l file @cache@
    set -l role '' ; set -l given '' ; set -l skip '' ; set -l helping 0
    set -l list ; set -l flags ; set -l kind ''
    for word in $words[2..-1]
        test $word = --; and break
        if test -n "$skip"
            string match -q -- '* --role' $skip; and set role $word
            set skip ''
            continue
        end
        switch "$role$given $word"
            case @switches@
            case @flags@
                set skip "$role$given $word"
            case '* --role=*'
                set role (string replace -- --role= '' $word)
            case '* -*'
            case '*'
                if test $word = help -a -z "$given"
                    set helping 1
                    continue
                end
                if test -z "$role"
                    set role client
                    switch $word
@roles@
                    end
                end
                contains -- "$role$given $word" @keys@; and set given "$given $word"
        end
    end
    test -z "$role"; and set role client
    if contains -- -- $words
        test "$role$given" = '@before_commands@'; or return
        set -l rest (string join ' ' -- (string escape -- $words[(math (contains -i -- -- $words) + 1)..-1]) $cur)
        complete -C "$rest"
        return
    end
    switch "$skip"
@values@
    end
    switch "$role$given"
@places@
    end
    switch $role
@common@
    end
    if string match -q -- '-*' $cur
        string join \\n -- $flags
        return
    end
    string join \\n -- $list
    if test $helping = 1
        test -z "$given"; and @help@
    else if test "$kind" = clusters
        test -r $file; and @names@
    else if test "$kind" = files
        __fish_complete_path $cur
    end
end
complete -c arcbridge -f -a '(__arcbridge_complete)'
"""


def _fish() -> str:
    def texts(offers: Offers) -> str:
        return " ".join(_fish_quoted(f"{word}\t{text}") for word, text in offers)

    cache = "(set -q XDG_CACHE_HOME; and echo $XDG_CACHE_HOME; or echo $HOME/.cache)/arcbridge/clusters"
    names = f"string match -r -- '{_NAME}' < $file 2>/dev/null"
    values = {_FILES: "__fish_complete_path $cur", _CLUSTERS: f"test -r $file; and {names}", _NOTHING: "true"}
    cases = "\n".join(
        f"        case {_fish_pattern(keys)}\n            {values.get(what) or _fish_print(what.split())}\n"
        "            return"
        for what, keys in _values()
        if what != _SWITCH
    )
    keys = _fish_pattern([place.key for place in _places() if " " in place.key])
    roles = "\n".join(
        f"                        case {word}\n                            set role {role}"
        for word, role in _roles_of_words().items()
    )
    places = "\n".join(
        f"        case '{place.key}'\n            set list {texts(place.words)}\n"
        f"            set flags {texts(place.flags)}\n            set kind '{place.argument}'"
        for place in _places()
    )
    common = "\n".join(f"        case {role}\n            set -a flags {texts(_common(role))}" for role in ROLES)
    return _filled(
        _FISH,
        cache=cache,
        before_commands=_BEFORE_COMMANDS,
        switches=_fish_pattern(_keys(switches=True)),
        flags=_fish_pattern(_keys(switches=False)),
        roles=roles,
        keys=keys,
        values=cases,
        places=places,
        common=common,
        help=_fish_print(HELP_WORDS),
        names=names,
    )


def _fish_print(words: Iterable[str]) -> str:
    return f"printf '%s\\n' {' '.join(words)}"


def _fish_pattern(keys: list[str]) -> str:
    return " ".join(f"'{'*' if key.startswith(' ') else ''}{key}'" for key in keys)


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# --- PowerShell -------------------------------------------------------------------------------------------------------


_POWERSHELL = """# PowerShell completion of arcbridge; load it with:
#   arcbridge completion powershell | Out-String | Invoke-Expression
Register-ArgumentCompleter -Native -CommandName arcbridge -ScriptBlock {
    param($current, $ast, $cursor)
    $values = @{
@values@
    }
    $places = @{
@places@
    }
    $common = @{
@common@
    }
    $roles = @{ @roles@ }
    $role = ''; $given = ''; $skip = ''; $helping = $false
    $typed = @($ast.CommandElements | Where-Object { $_.Extent.EndOffset -lt $cursor } | ForEach-Object { "$_" })
    foreach ($word in @($typed | Select-Object -Skip 1)) {
        if ($word -eq '--') {
            if ($typed[-1] -ne '--' -or "$role$given" -ne '@before_commands@') { return }
            return [System.Management.Automation.CompletionCompleters]::CompleteCommand($current)
        }
        if ($skip) { if ($skip -eq '--role') { $role = $word }; $skip = ''; continue }
        $what = $values["$role$given $word"]
        if (-not $what) { $what = $values[" $word"] }
        if ($what -and $what -ne 'switch') { $skip = $word; continue }
        if ($word -like '--role=*') { $role = $word.Substring(7); continue }
        if ($word -like '-*') { continue }
        if ($word -eq 'help' -and -not $given) { $helping = $true; continue }
        if (-not $role) { $role = if ($roles.ContainsKey($word)) { $roles[$word] } else { 'client' } }
        if ($places.ContainsKey("$role$given $word")) { $given = "$given $word" }
    }
    if (-not $role) { $role = 'client' }
    $cache = if ($env:XDG_CACHE_HOME) { "$env:XDG_CACHE_HOME/arcbridge" }
        elseif ($env:LOCALAPPDATA) { "$env:LOCALAPPDATA/arcbridge/Cache" }
        elseif ($IsMacOS) { "$HOME/Library/Caches/arcbridge" }
        else { "$HOME/.cache/arcbridge" }
    $names = { Get-Content "$cache/clusters" -ErrorAction SilentlyContinue |
        Where-Object { $_ -cmatch '@name@' } | ForEach-Object { ,@($_, 'cluster') } }
    $place = $places["$role$given"]
    $offers = if ($skip) {
        switch ($what) {
            'files' { return }
            'nothing' { }
            'clusters' { & $names }
            default { $_ -split ' ' | ForEach-Object { ,@($_, $_) } }
        }
    } elseif ($current -like '-*') { $place.Flags + $common[$role] }
    else {
        $place.Words
        if ($helping) { if (-not $given) { @help@ } }
        elseif ($place.Kind -eq 'clusters') { & $names }
    }
    $offers | Where-Object { $_ -and $_[0] -like "$current*" } | ForEach-Object {
        [System.Management.Automation.CompletionResult]::new($_[0], $_[0], 'ParameterValue', $_[1])
    }
}
"""


def _powershell() -> str:
    def pairs(offers: Offers) -> str:
        return "@(" + ", ".join(f"@({_ps(word)}, {_ps(text or word)})" for word, text in offers) + ",@())"

    values = "\n".join(f"        {_ps(key)} = {_ps(what)}" for what, keys in _values() for key in keys)
    places = "\n".join(
        f"        {_ps(place.key)} = @{{ Words = {pairs(place.words)}; Flags = {pairs(place.flags)}; "
        f"Kind = {_ps(place.argument)} }}"
        for place in _places()
    )
    common = "\n".join(f"        {_ps(role)} = {pairs(_common(role))}" for role in ROLES)
    roles = "; ".join(f"{_ps(word)} = {_ps(role)}" for word, role in _roles_of_words().items())
    return _filled(
        _POWERSHELL,
        values=values,
        places=places,
        common=common,
        roles=roles,
        name=_NAME,
        before_commands=_BEFORE_COMMANDS,
        help=", ".join(f"@({_ps(word)}, {_ps(word)})" for word in HELP_WORDS),
    )


def _ps(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
