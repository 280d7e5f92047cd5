"""Completion scripts for bash, zsh, fish and PowerShell, made from the tables of commands and flags: static text, and
nothing of ours runs at a TAB.

Each script does the same: it finds the role and the words of the command, completes the value of a flag, or offers what
may follow, flags only behind a `-`. Behind `run --` another program is completed as the shell does it. Cluster names
come from a file that `clusters` and `proxy` keep (`StateDirectory.keep_cluster_names`), so that a TAB needs neither
Python nor the network; what a name cannot be is left out of it (docs/threats.md#B3).
"""

from __future__ import annotations

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
_CLUSTERS, _FILES, _NOTHING = "clusters", "files", "nothing"


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
    """What may follow the words `path` of a role: words and flags with their texts, and what an argument is."""

    __slots__ = ("argument", "flags", "key", "words")

    def __init__(self, role: str, path: tuple[str, ...]) -> None:
        self.key = " ".join((role, *path))
        self.words: Offers = []
        self.flags: Offers = []
        self.argument = ""
        for command in commands_of(role):
            if command.path == path:
                self.flags = [(name, flag.help) for flag in command.flags for name in flag.names]
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


def _values() -> dict[str, list[str]]:
    """Return what completes a flag's value, `clusters`, `files`, `nothing` or words, each with its flags."""
    found: dict[str, str] = {}
    for role in ROLES:
        for flag in [*(flag for command in commands_of(role) for flag in command.flags), *flags_of(role)]:
            for name in flag.names * flag.takes_value:
                # `--output` has other words under `config print`: both are offered.
                words = dict.fromkeys((*found.get(name, "").split(), *_value_of(flag)))
                if len(words) > 1:
                    words.pop(_NOTHING, "")
                found[name] = " ".join(words)
    grouped: dict[str, list[str]] = {}
    for name, what in found.items():
        grouped.setdefault(what, []).append(name)
    return grouped


def _value_of(flag: Flag) -> tuple[str, ...]:
    if flag.choices:
        return flag.choices
    return (_CLUSTERS if flag.dest == "cluster" else _FILES if flag.metavar in ("FILE", "DIR") else _NOTHING,)


def _filled(template: str, **parts: str) -> str:
    """Return a script with `@PART@` replaced."""
    for name, text in parts.items():
        template = template.replace(f"@{name}@", text)
    return template


# --- bash and zsh -----------------------------------------------------------------------------------------------------

_POSIX_CACHE = '"${XDG_CACHE_HOME:-$cache}/arcbridge/clusters"'
_POSIX_NAMES = f"grep -xE '{_NAME}' {_POSIX_CACHE} 2>/dev/null"
_POSIX_WALK = """    local word='' role='' given='' skip='' helping='' cache=$HOME/.cache place
    [[ $OSTYPE == darwin* ]] && cache=$HOME/Library/Caches
    for word in "$@"; do
        [[ $word == -- ]] && break
        [[ $word == = ]] && continue  # bash makes three words of --role=relay
        if [[ -n $skip ]]; then
            [[ $skip == --role ]] && role=$word
            skip=''
            continue
        fi
        case $word in
            @values@) skip=$word ;;
            --role=*) role=${word#--role=} ;;
            -*) ;;
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
    place="${role:-client}$given"
"""


def _posix_walk() -> str:
    """Return how `$@`, the words before the one at the cursor, are read: into `place` and `helping`."""
    values = "|".join(name for names in _values().values() for name in names)
    roles = "\n".join(f"                        {word}) role={role} ;;" for word, role in _roles_of_words().items())
    keys = "|".join(f"'{place.key}'" for place in _places() if " " in place.key)
    return _filled(_POSIX_WALK, values=values, roles=roles, keys=keys)


def _bash() -> str:
    def words(offers: Offers) -> str:
        return " ".join(word for word, _ in offers)

    values = {
        _FILES: 'COMPREPLY=($(compgen -f -- "$cur")); compopt -o filenames 2>/dev/null; return',
        _CLUSTERS: f'COMPREPLY=($(compgen -W "$({_POSIX_NAMES})" -- "$cur")); return',
        _NOTHING: "return",
    }
    cases = "\n".join(
        f"        {'|'.join(names)}) "
        + values.get(what, f'COMPREPLY=($(compgen -W "{what}" -- "$cur")); return')
        + " ;;"
        for what, names in _values().items()
    )
    places = "\n".join(
        f"        '{place.key}') words='{words(place.words)}' flags='{words(place.flags)}' kind='{place.argument}' ;;"
        for place in _places()
    )
    common = "\n".join(f'        {role}*) flags="$flags {words(_common(role))}" ;;' for role in ROLES)
    return f"""# bash completion of arcbridge; load it with: source <(arcbridge completion bash)
_arcbridge() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} words='' flags='' kind='' i
    COMPREPLY=()
    [[ $cur == = ]] && cur=''; [[ $prev == = ]] && prev=${{COMP_WORDS[COMP_CWORD-2]}}
    set -- "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"
{_posix_walk()}    for (( i = 1; i < COMP_CWORD; i++ )); do
        [[ ${{COMP_WORDS[i]}} == -- ]] || continue
        [[ $place == '{_BEFORE_COMMANDS}' ]] || return
        if declare -F _command_offset >/dev/null; then
            _command_offset $((i + 1))
        elif (( i + 1 == COMP_CWORD )); then
            COMPREPLY=($(compgen -c -- "$cur"))
        else
            COMPREPLY=($(compgen -f -- "$cur")); compopt -o filenames 2>/dev/null
        fi
        return
    done
    case $prev in
{cases}
    esac
    case $place in
{places}
    esac
    case $place in
{common}
    esac
    [[ -n $helping ]] && kind='' && [[ -z $given ]] && words="${{words/ help/}} {" ".join(HELP_WORDS)}"
    if [[ $cur == -* ]]; then
        words=$flags
    elif [[ $kind == clusters ]]; then
        words="$words $({_POSIX_NAMES})"
    elif [[ $kind == files ]]; then
        COMPREPLY=($(compgen -f -- "$cur")); compopt -o filenames 2>/dev/null
        return
    fi
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -F _arcbridge arcbridge
"""


def _zsh() -> str:
    def array(offers: Offers) -> str:
        return " ".join(_quoted(f"{word}:{text}" if text else word) for word, text in offers)

    values = {
        _FILES: "_files; return",
        _CLUSTERS: f'compadd -- ${{(f)"$({_POSIX_NAMES})"}}; return',
        _NOTHING: "_message value; return",
    }
    cases = "\n".join(
        f"        {'|'.join(names)}) {values.get(what, f'compadd -- {what}; return')} ;;"
        for what, names in _values().items()
    )
    places = "\n".join(
        f"        '{place.key}') list=({array(place.words)}) flags=({array(place.flags)}) kind='{place.argument}' ;;"
        for place in _places()
    )
    common = "\n".join(f"        {role}*) flags+=({array(_common(role))}) ;;" for role in ROLES)
    return f"""#compdef arcbridge
# zsh completion of arcbridge; load it with: source <(arcbridge completion zsh)
_arcbridge() {{
    local cur=${{words[CURRENT]}} prev=${{words[CURRENT-1]}} kind='' i
    local -a list flags
    set -- "${{(@)words[2,CURRENT-1]}}"
{_posix_walk()}    i=${{words[(i)--]}}
    if (( i < CURRENT )); then
        [[ $place == '{_BEFORE_COMMANDS}' ]] || return
        shift $i words
        (( CURRENT -= i ))
        _normal
        return
    fi
    case $prev in
{cases}
    esac
    case $place in
{places}
    esac
    case $place in
{common}
    esac
    [[ -n $helping ]] && kind='' && [[ -z $given ]] && list=(${{list:#help:*}} {" ".join(HELP_WORDS)})
    if [[ $cur == -* ]]; then
        _describe -o flag flags
        return
    fi
    case $kind in
        clusters) compadd -X cluster -- ${{(f)"$({_POSIX_NAMES})"}} ;;
        files) _files ;;
    esac
    (( $#list )) && _describe command list
}}
compdef _arcbridge arcbridge
"""


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# --- fish -------------------------------------------------------------------------------------------------------------


_FISH = """# fish completion of arcbridge; load it with: arcbridge completion fish | source
function __arcbridge_complete
    set -l words (commandline -opc) ; set -l cur (commandline -ct)
    set -l file @cache@
    set -l role '' ; set -l given '' ; set -l skip '' ; set -l helping 0 ; set -l kind ''
    set -l dashes (string match -q -- '-*' $cur; and echo 1; or echo 0)
    for word in $words[2..-1]
        test $word = --; and break
        if test -n "$skip"
            test $skip = --role; and set role $word
            set skip ''
            continue
        end
        switch $word
            case @flags@
                set skip $word
            case '--role=*'
                set role (string replace -- --role= '' $word)
            case '-*'
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
    if test $dashes = 1
        switch $role
@common@
        end
    else if test $helping = 1
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
    def lines(offers: Offers) -> str:
        return "                " + _fish_print(f"{word}\t{text}" for word, text in offers)

    cache = "(set -q XDG_CACHE_HOME; and echo $XDG_CACHE_HOME; or echo $HOME/.cache)/arcbridge/clusters"
    names = f"string match -r -- '{_NAME}' < $file 2>/dev/null"
    values = {_FILES: "__fish_complete_path $cur", _CLUSTERS: f"test -r $file; and {names}", _NOTHING: "true"}
    cases = "\n".join(
        f"        case {' '.join(flags)}\n            {values.get(what) or _fish_print(what.split())}\n"
        "            return"
        for what, flags in _values().items()
    )
    keys = " ".join(_fish_quoted(place.key) for place in _places() if " " in place.key)
    roles = "\n".join(
        f"                        case {word}\n                            set role {role}"
        for word, role in _roles_of_words().items()
    )
    places = "\n".join(
        f"        case {_fish_quoted(place.key)}\n            if test $dashes = 1\n{lines(place.flags)}\n"
        f"            else\n{lines(place.words)}\n                set kind {place.argument or _NOTHING}\n"
        "            end"
        for place in _places()
    )
    common = "\n".join(f"            case {role}\n{lines(_common(role))}" for role in ROLES)
    flags = " ".join(name for names_ in _values().values() for name in names_)
    return _filled(
        _FISH,
        cache=cache,
        before_commands=_BEFORE_COMMANDS,
        flags=flags,
        roles=roles,
        keys=keys,
        values=cases,
        places=places,
        common=common,
        help=_fish_print(HELP_WORDS),
        names=names,
    )


def _fish_print(lines: Iterable[str]) -> str:
    texts = " ".join(map(_fish_quoted, lines))
    return f"printf '%s\\n' {texts}" if texts else "true"


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
        if ($values.ContainsKey($word)) { $skip = $word; continue }
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
        switch ($values[$skip]) {
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

    values = "\n".join(f"        {_ps(name)} = {_ps(what)}" for what, names in _values().items() for name in names)
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
