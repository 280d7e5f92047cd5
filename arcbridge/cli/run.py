"""One command line from beginning to end: role, parser, settings, command, exit code."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from arcbridge import __version__
from arcbridge.cli.commands import COMMANDS, commands_of, find_command
from arcbridge.cli.core_dumps import forbid_core_dumps
from arcbridge.cli.output import describe, plain, print_error
from arcbridge.cli.parser import Invocation, Parser, UsageError, parse, unknown_command
from arcbridge.cli.screen import Screen, use_colour
from arcbridge.cli.words import role_of, value_of, words_of
from arcbridge.errors import ArcbridgeError, ConfigError, ExitCode
from arcbridge.settings.flags import CLIENT, COLOURS, ROLES
from arcbridge.settings.suggest import unknown
from arcbridge.single_file import is_single_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from arcbridge.cli.help import HelpPage


def run(arguments: Sequence[str], *, program: str = "arcbridge") -> int:
    """Run one command line; returns the exit code."""
    _prepare_streams()
    role = role_of(arguments, program=program, environment=os.environ.get("ARCBRIDGE_ROLE", ""))
    invocation = Invocation(role, tuple(words_of(arguments)[:1]), {})
    try:
        use_colour(_colour(arguments))
        if (page := _help(arguments, role)) is not None:
            sys.stdout.write(page.text(Screen.of(sys.stdout)))
            code: int = ExitCode.DONE
        elif role not in ROLES and (role or invocation.command not in (("completion",), ("version",))):
            code = _without_role(arguments, role)
        else:
            invocation = parse(arguments, role or CLIENT)  # those two are the same for all roles
            code = _run(invocation)
        sys.stdout.flush()
        return code
    except UsageError:
        return _own_code(invocation, ExitCode.USAGE)
    except SystemExit as ended:  # argparse after --help
        return int(ended.code or 0)
    except ArcbridgeError as error:
        print_error(error.told() + _cluster_meant(error, invocation) + _origin(error, invocation))
        return _own_code(invocation, error.exit_code)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away (`| head`)
        _drop_output()
        return _own_code(invocation, ExitCode.FAILURE)
    except Exception as error:
        if invocation.switch("verbose"):
            raise
        _drop_output()
        print_error(describe(error))
        return _own_code(invocation, ExitCode.FAILURE)


def _prepare_streams() -> None:
    """Let nothing fail for what a stream is: one that is closed (`>&-`) takes everything, or is at its end, and what an
    encoding does not have is escaped. A socket would have its number otherwise, and uvloop aborts as it closes it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
        elif name != "stdin" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Drop what standard output does not take (a closed pipe, a full disk): Python would write it again at its end, and
    complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _colour(arguments: Sequence[str]) -> str:
    """Return when to colour; help and mistakes of the command line need it before anything is parsed."""
    for source, value in (
        ("flag --color", value_of("--color", arguments)),
        ("environment variable ARCBRIDGE_COLOR", os.environ.get("ARCBRIDGE_COLOR")),
    ):
        if value and value not in COLOURS:
            raise ConfigError(unknown(source, plain(value), COLOURS))
        if value:
            return value
    return "auto"


def _origin(error: ArcbridgeError, invocation: Invocation) -> str:
    """Return a line that says where the relay comes from that an error is about; empty where it is about none."""
    if not (about := getattr(error, "about", ())):
        return ""
    from arcbridge.cli.settings import given_settings, place_of

    given, place = given_settings(invocation, os.environ), place_of(invocation, os.environ)
    for setting in about:
        where = place(setting)
        if where is not None and (setting in given or where.line):
            return f"\nthe relay is that of {where}"
    return ""


def _own_code(invocation: Invocation, code: ExitCode) -> ExitCode:
    """Return the exit code of an error; where another program's code is expected, one that tells ours from it."""
    another = invocation.role == CLIENT and invocation.command == ("run",)
    return ExitCode.RUN_FAILED if another and code < ExitCode.RUN_FAILED else code


def _run(invocation: Invocation) -> int:
    """Call the function of the sub-command; what it imports is paid for only here."""
    if invocation.role != CLIENT and is_single_file():
        raise ConfigError(
            f"this file is the client alone: for --role {invocation.role} install the package, or use the image"
        )
    forbid_core_dumps()
    module, name = find_command(invocation.role, invocation.command).function.split(":")
    if module == "background" and sys.platform == "win32" and not invocation.switch("ended"):
        raise ConfigError("there is no background process on Windows; use `arcbridge --role client proxy`")
    try:
        code: int = getattr(import_module(f"arcbridge.cli.{module}"), name)(invocation)
    except ConfigError as error:
        raise _with_places(error, invocation) from error
    return code


def _cluster_meant(error: ArcbridgeError, invocation: Invocation) -> str:
    """Return a further line for an error of a client's command that was about a cluster."""
    names = [one for one in (*invocation.texts("cluster"), invocation.text("name")) if one]
    if invocation.role != CLIENT or not names:
        return ""
    from arcbridge.cli.settings import given_state_dir
    from arcbridge.cli.terminal import cluster_meant
    from arcbridge.client.state import StateDirectory

    try:
        state = StateDirectory.find(given_state_dir(invocation, os.environ), os.environ)
        return cluster_meant(error, names, state)
    except ArcbridgeError:
        return ""  # the error itself is what counts


def _with_places(error: ConfigError, invocation: Invocation) -> ConfigError:
    """Return the same error; one of settings says where each of them was given."""
    from arcbridge.cli.settings import place_of
    from arcbridge.settings.problems import SettingsRefused, located

    if not isinstance(error, SettingsRefused):
        return error
    return SettingsRefused(located(error.problems, place_of(invocation, os.environ)))


def version(invocation: Invocation) -> int:
    from arcbridge.build import version_line

    print(version_line())
    return ExitCode.DONE


def _help(arguments: Sequence[str], role: str) -> HelpPage | None:
    """Return the page for `help` and `help WORD …`, and for `--help` where the command line says no role; None: it asks
    for neither, or for what is not there."""
    words = words_of(arguments)
    asked = words[:1] == ["help"]
    if role and role not in ROLES:
        return None
    if not asked and (role or not {"-h", "--help"}.intersection(arguments)):
        return None
    from arcbridge.cli.help import HELP_WORDS, help_for

    page = help_for(words[asked:], role)
    if page is None and asked:
        known = [*(command.path[0] for command in COMMANDS if not role or role in command.roles), *HELP_WORDS]
        several = words[1] in known
        what = f"there is no command `{' '.join(words[1:])}`" if several else unknown_command(words[1], known, role)
        Parser(prog="arcbridge").error(what)
    return page


def _without_role(arguments: Sequence[str], role: str) -> int:
    """Help and version need no role; what is left here says none by itself."""
    if role:
        print_error(f"--role {role}: unknown; use one of {', '.join(ROLES)}")
        return ExitCode.USAGE
    if "--version" in arguments:
        print(f"arcbridge {__version__}")
        return ExitCode.DONE
    if not arguments:
        from arcbridge.cli.help import page_of

        sys.stderr.write(page_of(CLIENT, ()).text(Screen.of(sys.stderr)))
        return ExitCode.USAGE
    parser = Parser(prog="arcbridge")
    if word := next(iter(words_of(arguments)), ""):
        roles = [one for one in ROLES if any(command.path[0] == word for command in commands_of(one))]
        if not roles:
            parser.error(unknown_command(word, [*(command.path[0] for command in COMMANDS), "help"]))
        parser.error(f"`{word}` is for the settings of one role: give --role {'|'.join(roles)}")
    parser.error(f"which role? give --role {'|'.join(ROLES)}")
