"""The commands of the background process: `connect`, `disconnect`, `status`, `stop`, `logs`, and the process itself.

They ask the process and print what it replies. A login, and the question whether a pin is right, need the terminal and
are asked before (`client.background.connecting`).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from arcbridge.cli.commands import DOCUMENTS, FOR_PEOPLE
from arcbridge.cli.credential import is_news
from arcbridge.cli.output import (
    plain,
    print_document,
    print_error,
    print_note,
    print_prose,
    print_rows,
    print_warning,
    rfc3339,
)
from arcbridge.cli.parser import Invocation
from arcbridge.cli.screen import Column, Waiting
from arcbridge.cli.settings import given_settings, given_state_dir, load_settings, read_settings, settings_file
from arcbridge.cli.terminal import cluster_meant, configure_logging, terminal
from arcbridge.client.background.caller import (
    READY_VARIABLE,
    NoAnswer,
    NotRunning,
    OtherVersion,
    answer_of,
    ask,
    exchange,
    request,
)
from arcbridge.client.background.caller import stop as stop_process
from arcbridge.client.background.connection_settings import ConnectionSettings, read_words
from arcbridge.client.background.local_channel import leave_terminal
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.errors import ArcbridgeError, ConfigError, ExitCode, StateError
from arcbridge.settings.flags import CLIENT, LIST, OFF, flags_of
from arcbridge.units import duration, size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Coroutine, Mapping
    from typing import Any, TextIO, TypeVar

    from arcbridge.client.credentials.identity_summary import IdentitySummary
    from arcbridge.client.service import ClientContext
    from arcbridge.settings.config import ClientConfig

    T = TypeVar("T")

_NOT_KEPT = frozenset(
    ("cluster", "file", "context_switch", "remove_context", "trust_first_use", "observe.log_level",
     "observe.log_format", "observe.listen")
)  # fmt: skip
"""Settings of one command, and not of a connection."""
_COLUMNS = (
    Column("name", "CLUSTER"),
    Column("user", rank=2),
    Column("port", rank=4),
    Column("contexts", "CONTEXT"),
    Column("state", state=True),
    Column("round_trip", rank=3),
    Column("relay", rank=5),
    Column("since", rank=6),
    Column("bytes_to_cluster", "SENT", rank=8),
    Column("bytes_from_cluster", "RECEIVED", rank=7),
    Column("token_expires", "TOKEN ENDS", rank=3),
)
_FOLLOW = 0.2
"""Seconds between two looks at a log that is followed."""


# --- connect --------------------------------------------------------------------------------------------------------


def connect(invocation: Invocation) -> int:
    """Have clusters served by the background process, one after the other."""
    from arcbridge.client.background.connecting import check_connect, is_to_be_trusted, trust
    from arcbridge.client.kubeconfig.entries import Kubeconfig
    from arcbridge.client.kubeconfig.private import sweep
    from arcbridge.client.service import ClientContext

    config: ClientConfig = load_settings(invocation, os.environ)
    named = invocation.texts("name") or tuple(filter(None, (config.cluster, *config.clusters)))
    names = list(dict.fromkeys(named))
    check_connect(config, names)
    if invocation.text("token") or os.environ.get("ARCBRIDGE_TOKEN"):
        raise ConfigError("flag --token: connect would have to keep the token; give it in a file with --token-file")
    files = [os.path.abspath(file.path) for file in Kubeconfig.find(config.file, os.environ).files]
    context = ClientContext(config, terminal(sys.stderr))
    _repair(config.state_dir)
    sweep(os.environ)
    kept = kept_settings(invocation, os.environ, config)
    width = max(map(len, names))
    code: int = ExitCode.DONE
    switch = config.context_switch
    for name in names:
        settings = ConnectionSettings.of({**dict(kept.values), "cluster": (name,)}, kept.file)
        line = request(
            "connect",
            settings.words(),
            kubeconfig="\n".join(files),
            static="yes" if invocation.switch("static") else "",
            switch="yes" if switch else "",
        )
        try:
            if is_to_be_trusted(context, name):
                _run(context, trust(context, name))
            answer = _asked(context, line, f"Connecting {name} …")
        except ArcbridgeError as error:
            print_error(error.message + cluster_meant(error, [name], context.state))
            code = code or error.exit_code
            continue
        current = " (current)" if answer["current"] else ""
        switch = False  # the first that is connected becomes the current one
        print(f'{name.ljust(width)}   port {answer["port"]}   context "{plain(str(answer["context"]))}"{current}')
        sys.stdout.flush()
    return code


def kept_settings(invocation: Invocation, environment: Mapping[str, str], config: ClientConfig) -> ConnectionSettings:
    """Return what the command line and the environment set for a connection, with absolute paths.

    The relays are always named: a settings file may name none, and a later login chooses others.
    """
    flags = {flag.key: flag for flag in flags_of(CLIENT) if flag.key and flag.key not in _NOT_KEPT}
    values: dict[str, Any] = {}
    for key, (value, _) in given_settings(invocation, environment).items():
        if (flag := flags.get(key)) is None:
            continue
        if flag.kind == LIST:
            values[key] = tuple(str(one).strip() for one in value) if isinstance(value, list) else (str(value),)
        elif flag.takes_value:
            text = str(value).strip()
            values[key] = os.path.abspath(os.path.expanduser(text)) if flag.metavar in ("FILE", "DIR") else text
        elif str(value).strip().lower() in (("false", "0") if flag.kind == OFF else ("true", "1", "yes", "on")):
            values[key] = True  # the flag is there
    file = settings_file(invocation, environment)
    return ConnectionSettings.of(
        {"relays": config.relay_urls(), **values}, os.path.abspath(file) if file is not None else ""
    )


def _run(context: ClientContext, work: Coroutine[Any, Any, T]) -> T:
    from arcbridge.cli.loop import run_until_signal

    configure_logging(context.config, default_level="warning")
    return run_until_signal(work)


def _asked(context: ClientContext, line: bytes, wait: str) -> dict[str, Any]:
    """Ask the process; once more after a login, where one is needed and there is a terminal for it."""
    from arcbridge.client.background.connecting import ask_again_after_login, login_may_help

    began = time.time()
    try:
        with Waiting(sys.stderr, wait):
            return ask(BackgroundPaths.find(os.environ), line, os.environ)
    except ArcbridgeError as error:
        if not login_may_help(context, error):
            raise
    return _run(context, ask_again_after_login(context, line, began))


def _repair(state_dir: Path | None) -> None:
    from arcbridge.client.background.connections import repair_all

    for sentence in repair_all(state_dir, os.environ):
        print_note(plain(sentence))


# --- the others -----------------------------------------------------------------------------------------------------


def disconnect(invocation: Invocation) -> int:
    """Take connections off."""
    names, every = invocation.texts("name"), invocation.switch("all")
    if every and names:
        raise ConfigError("flag --all: is for all clusters; leave the names out")
    _repair(given_state_dir(invocation, os.environ))
    place = BackgroundPaths.find(os.environ)
    try:
        answer = ask(place, request("disconnect", names, every="yes" if every else ""), os.environ, start=False)
        gone = answer["disconnected"]
    except NotRunning:
        from arcbridge.client.background.removal import disconnect as disconnect_here

        gone = disconnect_here(Path(place.connections), names, os.environ, every=every)
    for one in gone:
        print_prose(f'{plain(str(one["cluster"]))} disconnected; context "{plain(str(one["context"]))}" is gone')
    if not gone:
        print_prose("No cluster is connected.")
    return ExitCode.DONE


def status(invocation: Invocation) -> int:
    """Print what the background process serves."""
    if "role" in invocation.given:  # in scripts of releases before December 2026 it examined the way; goes 2027-03-01
        raise ConfigError(
            "`status` takes no --role any more: `arcbridge doctor NAME` examines login, relay and cluster, and "
            "`arcbridge status` alone says what runs here"
        )
    from arcbridge.client.kubeconfig.private import sweep

    output = invocation.text("output") or "table"
    _repair(given_state_dir(invocation, os.environ))
    sweep(os.environ)
    place = BackgroundPaths.find(os.environ)
    process: dict[str, Any] | None = None
    try:
        answer = answer_of(exchange(place, request("status")))
        process, clusters = answer["process"], answer["clusters"]
    except NotRunning:
        clusters = _not_served(place)
    except OtherVersion as other:
        process, clusters = {"version": str(other)}, _not_served(place)
    if output in DOCUMENTS:
        for document in filter(None, (process, *clusters)):
            for key in ("since", "token_expires"):
                if key in document:
                    document[key] = rfc3339(document[key] or 0.0)
        found = [one for group in _logins(invocation) or () for one in group]
        logins = [{"relay": one.relay, "user": one.user or None} for one in found]
        print_document({"process": process, "clusters": clusters, "logins": logins}, output)
        return ExitCode.DONE
    if output in FOR_PEOPLE:
        print_prose(_about(process))
        if (logins_here := _logins(invocation)) is not None:
            print_prose(_about_logins(*logins_here))
        if not clusters:
            return ExitCode.DONE
        clusters = [{**one, **_for_people(one)} for one in clusters]
    print_rows(clusters, _columns(clusters), output)
    for one in clusters:
        if output in FOR_PEOPLE and one.get("reason"):
            print_prose(f"{plain(str(one['name']))}: {plain(str(one['reason']))}")
    return ExitCode.DONE


def _columns(clusters: list[dict[str, Any]]) -> tuple[Column, ...]:
    """Return the columns of the table: what a session gave up has one where any has."""
    return (*_COLUMNS, Column("restricted", rank=1)) if any(one.get("restricted") for one in clusters) else _COLUMNS


def _logins(invocation: Invocation) -> tuple[list[IdentitySummary], list[IdentitySummary]] | None:
    """Return the login that commands mean, and the others; None, with a warning, where the settings or what is kept
    cannot be read."""
    from arcbridge.client.credentials.identity_summary import login_meant, other_logins
    from arcbridge.client.state import StateDirectory

    try:
        config = read_settings(invocation, os.environ)[0]
        state = StateDirectory.find(config.state_dir, os.environ)
        return login_meant(config, state), other_logins(config, state, print_warning)
    except ArcbridgeError as error:
        print_warning(error.message)
        return None


def _about_logins(mine: list[IdentitySummary], others: list[IdentitySummary]) -> str:
    from arcbridge.client.credentials.identity_summary import in_words

    here = f"Logged in at {plain(in_words(mine))}" if mine else "Not logged in"
    return f"{here}{'; also ' if mine else ', but '}at {plain(in_words(others))}" if others else here


def _about(process: Mapping[str, Any] | None) -> str:
    if process is None:
        return "No background process runs; kubectl starts it when a context needs it."
    if "pid" not in process:
        return (
            f"A background process of version {process['version']} runs; the next command of this version replaces it."
        )
    former = process.get("former_versions", 0)
    more = f"; {former} of a former version with streams that run" if former else ""
    since = duration(time.time() - process["since"])
    return f"Background process {process['pid']}, version {process['version']}, since {since}{more}"


def _not_served(place: BackgroundPaths) -> list[dict[str, Any]]:
    """Return what is connected while no process of this version runs."""
    from arcbridge.client.background.connections import connected

    return [{"name": one.cluster, "contexts": [one.context], "state": "not running"} for one in connected(place)]


def _for_people(one: Mapping[str, Any]) -> dict[str, Any]:
    ends, now = one.get("token_expires") or 0, time.time()
    return {
        "since": duration(now - one["since"]) if "since" in one else "",
        **{key: size(one[key]) for key in ("bytes_to_cluster", "bytes_from_cluster") if key in one},
        "round_trip": f"{trip * 1000:.1f} ms" if (trip := one.get("round_trip")) else "",
        "token_expires": f"in {duration(ends - now)}" if ends else "",
    }


def stop(invocation: Invocation) -> int:
    """End the background process."""
    place = BackgroundPaths.find(os.environ)
    done = "Stopped. kubectl starts it again when a context needs it; `arcbridge disconnect --all` takes them out."
    try:
        stop_process(place)
    except NotRunning:
        from arcbridge.client.background.lock_holder import is_held

        if is_held(place):  # it hangs, and its socket is gone
            _end_by_force(place, force=invocation.switch("force"))
        else:
            done = "No background process runs."
    except NoAnswer:
        _end_by_force(place, force=invocation.switch("force"))
    _repair(given_state_dir(invocation, os.environ))
    print_prose(done)
    return ExitCode.DONE


def _end_by_force(place: BackgroundPaths, *, force: bool) -> None:
    """End a process that does not answer: by SIGTERM, then by SIGKILL where the user, or the flag, says so."""
    from arcbridge.cli.loop import run_until_signal
    from arcbridge.cli.terminal import ask_yes, may_ask
    from arcbridge.client.background.lock_holder import END_TIMEOUT, end, holder_to_end, silence

    if (holder := holder_to_end(place)) is None:
        return
    print_warning(f"{silence(place)}; it gets SIGTERM now")
    if end(place, holder):
        return
    ended = f"it has not ended within {END_TIMEOUT:.0f} s"
    if not force and may_ask():
        force = run_until_signal(ask_yes(f"{ended}. Kill it (SIGKILL)? What runs through it is cut. [y/N] "))
    if not force:
        raise StateError(f"{ended}; `arcbridge stop --force` kills it (SIGKILL), and what runs through it is cut")
    if not end(place, holder, kill=True):
        raise StateError("it has not ended after SIGKILL either: a disk or a network file system holds it")


def logs(invocation: Invocation) -> int:
    """Print its log."""
    path = Path(BackgroundPaths.find(os.environ).log)
    follow = invocation.switch("follow")
    if not path.exists() and not follow:
        print_prose("There is no log: no background process has run.")
        return ExitCode.DONE
    if follow:
        _warn_of_silence()
    former = path.with_name(f"{path.name}.1")
    if former.exists():
        sys.stdout.write(former.read_text(errors="replace"))
    place, inode = 0, -1
    while True:
        try:
            with path.open(errors="replace") as file:
                if os.fstat(file.fileno()).st_ino != inode:
                    place, inode = 0, os.fstat(file.fileno()).st_ino
                file.seek(place)
                sys.stdout.write(file.read())
                place = file.tell()
        except FileNotFoundError:
            pass  # it comes with the process
        sys.stdout.flush()
        if not follow:
            _warn_of_silence()
            return ExitCode.DONE
        try:
            time.sleep(_FOLLOW)
        except KeyboardInterrupt:
            return ExitCode.DONE


def _warn_of_silence() -> None:
    try:
        exchange(BackgroundPaths.find(os.environ), request("version"))
    except NoAnswer as error:
        print_warning(error.message)
    except (NotRunning, ArcbridgeError):
        pass  # its log is there all the same


def credential(invocation: Invocation) -> int:
    """End what the quick way (`cli.credential`) began: log in, or say an error in words."""
    from arcbridge.client.service import ClientContext

    clusters = invocation.texts("cluster")
    name = plain(clusters[0]) if clusters else "NAME"
    if invocation.switch("ended"):
        raise StateError(
            f'cluster "{name}" is not served now: its proxy has ended\n'
            f"run `arcbridge connect {name}`, or `arcbridge --role client proxy -n {name}`"
        )
    arguments = sys.argv[sys.argv.index("credential") + 1 :] if "credential" in sys.argv else []
    # stdout is the credential alone.
    context = ClientContext(read_words(arguments).load(os.environ), terminal(sys.stderr))
    try:
        answer = _asked(context, request("credential", arguments), "Waiting for the background process …")
    except ArcbridgeError as error:
        if is_news(BackgroundPaths.find(os.environ), error.message):
            raise
        return error.exit_code
    import json

    print(json.dumps(answer))
    return ExitCode.DONE


def serve(invocation: Invocation) -> int:
    """Be the background process."""
    from typing import cast

    from arcbridge.cli.loop import Interrupted, notify, run_until_signal
    from arcbridge.client.background.log_file import LogFile
    from arcbridge.client.background.process import BackgroundProcess
    from arcbridge.observe import logging

    descriptor = os.environ.pop(READY_VARIABLE, "")
    if descriptor:
        os.set_inheritable(int(descriptor), False)
        leave_terminal()

    def tell(word: str) -> None:
        nonlocal descriptor
        if descriptor:
            os.write(int(descriptor), word.encode())
            os.close(int(descriptor))
            descriptor = ""

    def ready() -> None:
        tell("ready")
        notify("READY=1")

    place = BackgroundPaths.find(os.environ)
    try:
        file = LogFile(Path(place.log), standard_error=bool(descriptor))
        level = "debug" if invocation.switch("verbose") else invocation.text("log_level", "info")
        stream = cast("TextIO", file)
        logging.configure("client", level, invocation.text("log_format", "console"), stream)
        run_until_signal(BackgroundProcess(place, dict(os.environ)).run(ready), terminal=False)
    except Interrupted:
        pass
    except ArcbridgeError as error:
        tell(error.message)
        raise
    except OSError as error:
        tell(f"{error.filename or place.log}: {error.strerror}")
        raise
    return ExitCode.DONE
