"""Completion for bash, zsh, fish and PowerShell: a short script for each shell asks this program at each TAB.

`arcbridge complete SHELL -- WORD… =CURRENT` gets the words before the cursor, and behind a `=` what is typed of the one
at the cursor. It answers with the offers, a line each, or with one line for what the shell completes itself: `:files`,
or `:command N`, where word N, counted from 0, begins the command line of another program. Flags are offered only behind
a `-`. Cluster names come from a file that `clusters` and `proxy` keep (`StateDirectory.keep_cluster_names`), so that a
TAB needs no network; what a name cannot be is left out of it (docs/threats.md#B3). The program that is asked is the one
that is typed, and the one of PATH where that cannot be found.
"""

from __future__ import annotations

import os
import sys

from arcbridge.cli.commands import COMMANDS, GROUP_HELP, INTERNAL, WITHOUT_ROLE, commands_of
from arcbridge.cli.help import HELP_WORDS
from arcbridge.cli.parser import Invocation
from arcbridge.errors import ExitCode
from arcbridge.pki.names import is_cluster_name
from arcbridge.settings.flags import CLIENT, ROLES, Flag, flags_of
from arcbridge.settings.user_directories import user_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from arcbridge.cli.commands import Command

    Offers = list[tuple[str, str]]

_FILES = ":files"

SCRIPTS = {
    "bash": r"""# bash completion of arcbridge; load it with: source <(arcbridge completion bash)
_arcbridge() {
    local me=${COMP_WORDS[0]} cur=${COMP_WORDS[COMP_CWORD]} files='compgen -f -- "$cur"'
    [[ $cur == = ]] && cur=''  # bash makes three words of --role=relay
    type -P -- "$me" >/dev/null || me=arcbridge
    # Before IFS is another: bash 3.2 makes one word of the slice then.
    local -a asked=(--role client complete bash -- "${COMP_WORDS[@]:1:COMP_CWORD-1}" "=$cur")
    local IFS=$'\n'
    COMPREPLY=($(command "$me" "${asked[@]}" 2>/dev/null))
    case ${COMPREPLY[0]-} in
        :files) COMPREPLY=($(eval "$files")); compopt -o filenames 2>/dev/null ;;
        ':command '*)
            local first=${COMPREPLY[0]#* }
            COMPREPLY=()
            unset IFS
            if declare -F _command_offset >/dev/null; then
                _command_offset "$first"
            elif (( first == COMP_CWORD )); then
                COMPREPLY=($(compgen -c -- "$cur"))
            else
                IFS=$'\n' COMPREPLY=($(eval "$files")); compopt -o filenames 2>/dev/null
            fi ;;
    esac
}
complete -F _arcbridge arcbridge
""",
    "zsh": r"""#compdef arcbridge
# zsh completion of arcbridge; load it with: source <(arcbridge completion zsh)
_arcbridge() {
    local -a offers
    local me=${(Q)words[1]}
    whence -p -- $me >/dev/null || me=arcbridge
    offers=(${(f)"$(command $me --role client complete zsh -- \
        "${(@)words[2,CURRENT-1]}" "=${words[CURRENT]}" 2>/dev/null)"})
    case ${offers[1]-} in
        :files) _files ;;
        ':command '*)
            local first=${offers[1]#* }
            shift $first words
            (( CURRENT -= first ))
            _normal ;;
        -*) _describe -o flag offers ;;
        *) _describe word offers ;;
    esac
}
compdef _arcbridge arcbridge
""",
    "fish": r"""# fish completion of arcbridge; load it with: arcbridge completion fish | source
function __arcbridge_complete
    set -l words (commandline -opc) ; set -l cur (commandline -ct)
    set -l me $words[1] ; command -sq -- $me ; or set me arcbridge
    set -l offers (command $me --role client complete fish -- $words[2..-1] "=$cur" 2>/dev/null)
    switch "$offers[1]"
        case :files
            __fish_complete_path $cur
        case ':command *'
            set -l first (math (string sub -s 10 -- $offers[1]) + 1)
            set -l rest (string join ' ' -- (string escape -- $words[$first..-1]) $cur)
            complete -C "$rest"
        case '*'
            string join \n -- $offers
    end
end
complete -c arcbridge -f -a '(__arcbridge_complete)'
""",
    "powershell": r"""# PowerShell completion of arcbridge; load it with:
#   arcbridge completion powershell | Out-String | Invoke-Expression
Register-ArgumentCompleter -Native -CommandName arcbridge -ScriptBlock {
    param($current, $ast, $cursor)
    $words = @($ast.CommandElements | Where-Object { $_.Extent.EndOffset -lt $cursor } | ForEach-Object { "$_" })
    $typed = @($words | Select-Object -Skip 1)
    $me = $ast.GetCommandName()
    if (-not ($me -and (Get-Command $me -CommandType Application -ErrorAction Ignore))) { $me = 'arcbridge' }
    $offers = @(& $me --role client complete powershell '--' @typed "=$current" 2>$null)
    if ($offers[0] -like ':command *') {
        if ($words[-1] -ne '--') { return }
        return [System.Management.Automation.CompletionCompleters]::CompleteCommand($current)
    }
    $offers | Where-Object { $_ -and $_ -ne ':files' } | ForEach-Object {
        $word, $text = $_ -split "`t", 2
        [System.Management.Automation.CompletionResult]::new($word, $word, 'ParameterValue', $text)
    }
}
""",
}


def print_script(invocation: Invocation) -> int:
    sys.stdout.write(SCRIPTS[invocation.text("shell")])
    return ExitCode.DONE


def complete(invocation: Invocation) -> int:
    """Print what may stand at the cursor, in the form of one shell; see the module's docstring."""
    shell = invocation.text("shell")
    *words, current = invocation.texts("command_line")
    current = current.removeprefix("=")  # never empty: PowerShell passes no empty words on
    for word, text in _offers(words, current):
        if word.startswith(":"):
            print(word)
        elif shell in ("zsh", "fish"):  # those choose among the offers themselves, each by its user's settings
            print(f"{word}{':' if shell == 'zsh' else chr(9)}{text}" if text else word)
        elif word.startswith(current):
            print(word if shell == "bash" else f"{word}\t{text or word}")
    return ExitCode.DONE


def _offers(words: Sequence[str], current: str) -> Offers:
    """Return what may follow these words, each with its text."""
    role, helping = "", False
    path: tuple[str, ...] = ()
    pending: Flag | None = None
    for number, word in enumerate(words):
        if word == "--":
            takes = any(one.path == path and one.takes_command for one in commands_of(role or CLIENT))
            return [(f":command {number + 2}", "")] if takes else []
        if word == "=":
            continue
        if pending is not None:
            role = word if pending.dest == "role" else role
            pending = None
        elif word.startswith("--role="):
            role = word.removeprefix("--role=")
        elif word.startswith("-"):
            flag = _flag(role, path, word)
            pending = flag if flag is not None and flag.takes_value else None
        elif word == "help" and not path:
            helping = True
        else:
            role = role or _role_of_word(word)
            if any(one.path[: len(path) + 1] == (*path, word) for one in commands_of(role)):
                path = (*path, word)
    if pending is not None:
        return _values(pending)
    role = role or CLIENT
    command = next((one for one in commands_of(role) if one.path == path), None)
    if current.startswith("-"):
        flags = [*(command.flags if command else ()), *flags_of(role)]
        return [*((name, flag.help) for flag in flags for name in flag.names), ("--help", "show help")]
    if helping:
        words_of_help = [(word, "") for word in HELP_WORDS] if not path else []
        return [*words_of_help, *_sub_commands(role, path)]
    return [*_sub_commands(role, path), *_arguments(command)]


def _sub_commands(role: str, path: tuple[str, ...]) -> Offers:
    found: dict[str, str] = {}
    for command in commands_of(role):
        if command.path[: len(path)] == path != command.path and command.path[0] not in INTERNAL:
            word = command.path[len(path)]
            found[word] = command.help if len(command.path) == len(path) + 1 else GROUP_HELP[word]
    return [*found.items(), *([] if path else [("help", "usage, examples and flags of one command")])]


def _arguments(command: Command | None) -> Offers:
    if command is None or command.argument is None:
        return []
    if command.argument.kind == "files":
        return [(_FILES, "")]
    choices = [(choice, "") for choice in command.argument.choices]
    return [*choices, *(_clusters() if command.argument.kind == "clusters" else ())]


def _values(flag: Flag) -> Offers:
    if flag.dest == "cluster" and not flag.choices:
        return _clusters()
    return [(_FILES, "")] if flag.metavar in ("FILE", "DIR") else [(choice, "") for choice in flag.choices]


def _clusters() -> Offers:
    try:
        names = (user_directory("cache", os.environ) / "clusters").read_text("utf-8", "replace").split("\n")
    except OSError:
        return []
    return [(name, "cluster") for name in names if is_cluster_name(name)]


def _flag(role: str, path: tuple[str, ...], name: str) -> Flag | None:
    """Return what a flag means behind these words: the command's own hides the role's of the same name."""
    own = [flag for one in commands_of(role or CLIENT) if one.path == path for flag in one.flags]
    common = [flag for one in ROLES for flag in flags_of(one)]
    return next((flag for flag in (*own, *common) if name in flag.names), None)


def _role_of_word(word: str) -> str:
    """Return the role of a first word: the client's, unless only others have it."""
    roles = {role for command in COMMANDS if command.path[0] == word for role in command.roles}
    return CLIENT if CLIENT in roles or not roles else WITHOUT_ROLE.get(word) or min(roles)
