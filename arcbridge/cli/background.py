"""The commands of the background process: `connect`, `disconnect`, `status`, `stop`, `logs`, and the process itself.

What needs a terminal happens here, in the foreground: the question whether a pin is right, and a login. The process is
given settings as flags, which are those of the command line and of the environment; nothing in them is secret.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from arcbridge.cli.flags import CLIENT, DOCUMENTS, LIST, flags_of
from arcbridge.cli.output import plain, print_document, print_error, print_rows, rfc3339
from arcbridge.cli.parser import Invocation, UsageError, parse
from arcbridge.client.background.caller import (
    READY_VARIABLE,
    NotRunning,
    OtherVersion,
    answer_of,
    ask,
    exchange,
    leave_terminal,
    request,
)
from arcbridge.client.background_paths import Place
from arcbridge.errors import ArcbridgeError, ConfigError, ExitCode, StateError
from arcbridge.settings.choices import PROGRAM

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, TextIO

    from arcbridge.client.background.connections import Connection
    from arcbridge.client.service import ClientContext, Terminal
    from arcbridge.settings.config import ClientConfig

_NOT_KEPT = ("cluster", "file", "context_switch", "remove_context", "trust_first_use", "observe.log_level",
             "observe.log_format", "observe.listen")  # fmt: skip
"""Settings of one command, and not of a connection."""
_COLUMNS = (
    ("name", "CLUSTER"),
    ("user", "USER"),
    ("port", "PORT"),
    ("contexts", "CONTEXT"),
    ("state", "STATE"),
    ("since", "SINCE"),
    ("bytes_to_cluster", "SENT"),
    ("bytes_from_cluster", "RECEIVED"),
    ("token_expires", "TOKEN ENDS"),
)
_END_WAIT = 10.0
"""Seconds in which a process that was told to end has ended."""
_FOLLOW = 0.2
"""Seconds between two looks at a log that is followed."""


class Foreground:
    """What the client's commands share: `terminal` for a stream of lines, and `configure_logging`."""

    __slots__ = ("configure_logging", "terminal")

    def __init__(self, terminal: Callable[[TextIO], Terminal], configure_logging: Callable[..., None]) -> None:
        self.terminal = terminal
        self.configure_logging = configure_logging


def run_command(invocation: Invocation, foreground: Foreground) -> int:
    """Run a command of the background process; returns the exit code."""
    if sys.platform == "win32" and not invocation.switch("ended"):
        raise ConfigError("there is no background process on Windows; use `arcbridge --role client proxy`")
    return _COMMANDS[invocation.command[0]](invocation, foreground)


# --- connect --------------------------------------------------------------------------------------------------------


def _connect(invocation: Invocation, foreground: Foreground) -> int:
    from arcbridge.cli.settings import load_settings
    from arcbridge.client.kubeconfig.entries import Kubeconfig
    from arcbridge.client.service import ClientContext

    environment = os.environ
    config: ClientConfig = load_settings(invocation, environment)
    names = [*invocation.texts("name")]
    if not names:
        names = [name for name in (config.cluster, *config.clusters) if name]
    names = list(dict.fromkeys(names))
    _check(invocation, config, names)
    files = [os.path.abspath(file.path) for file in Kubeconfig.find(config.file, environment).files]
    context = ClientContext(config, foreground.terminal(sys.stderr), environment=environment)
    _repair_known(config.state_dir, environment)
    _sweep()
    kept = naming_relays(kept_arguments(invocation, environment), config)
    width = max(map(len, names))
    code: int = ExitCode.DONE
    switch = config.context_switch
    for name in names:
        arguments = ("--cluster", name, *kept)
        line = request(
            "connect",
            arguments,
            kubeconfig="\n".join(files),
            static="yes" if invocation.switch("static") else "",
            switch="yes" if switch else "",
        )
        try:
            _meet(context, name, foreground)
            answer = _asked(context, line, environment, foreground)
        except ArcbridgeError as error:
            print_error(error.message)
            code = code or error.exit_code
            continue
        current = " (current)" if answer["current"] else ""
        switch = False  # the first that is connected becomes the current one
        print(f'{name.ljust(width)}   port {answer["port"]}   context "{plain(str(answer["context"]))}"{current}')
        sys.stdout.flush()
    return code


def _check(invocation: Invocation, config: ClientConfig, names: Sequence[str]) -> None:
    from arcbridge.pki.names import check_cluster_name

    if not names:
        raise ConfigError("cluster: required but not set; name the clusters to connect (`clusters` lists them)")
    for name in names:
        try:
            check_cluster_name(name)
        except ConfigError as error:
            raise ConfigError(f"{name[:64]!r}: {error.message}") from error
    if len(names) > 1:
        for flag, value in (
            ("--kube-context", config.kube_context),
            ("--cluster-ca-pin", config.cluster_ca_pin),
            ("--port", config.port),
        ):
            if value:
                raise ConfigError(f"flag {flag}: fits one cluster, but {len(names)} were named")
    if config.file == "-":
        raise ConfigError("flag --file: connect keeps the kubeconfig right, and needs a file for that")
    if invocation.text("token") or os.environ.get("ARCBRIDGE_TOKEN"):
        raise ConfigError("flag --token: connect would have to keep the token; give it in a file with --token-file")


def _meet(context: ClientContext, name: str, foreground: Foreground) -> None:
    """Decide whether to trust a cluster that is not known here; the process never does.

    Without a terminal no question is asked and nothing is done, and the process's refusal says what to do.
    """
    if context.trust().known(name) or not (context.terminal.ask_trust or context.config.trust_first_use):
        return
    from arcbridge.cli.loop import run_until_signal

    foreground.configure_logging(context.config, default_level="warning")

    async def meet() -> None:
        session = context.session(name)
        try:
            await session.connect_once()
        finally:
            session.close()
            await session.wait_closed()

    run_until_signal(meet())


def _asked(
    context: ClientContext, line: bytes, environment: Mapping[str, str], foreground: Foreground
) -> dict[str, Any]:
    """Ask the process; once more after a login, where one is needed and there is a terminal for it."""
    place = Place.find(environment)
    try:
        return ask(place, line, environment)
    except ArcbridgeError as error:
        if error.exit_code != ExitCode.LOGIN or not _log_in(context, foreground):
            raise
    # The process gives the error of its last attempt for a moment (FAILURE_HOLD).
    time.sleep(1.1)
    return ask(place, line, environment)


def _log_in(context: ClientContext, foreground: Foreground) -> bool:
    """Log in at the terminal; False where there is none, or no login that a person could do."""
    from arcbridge.cli.loop import run_until_signal

    login = context.config.login
    if not context.terminal.may_log_in or not login.issuer or login.grant_type == PROGRAM:
        return False
    foreground.configure_logging(context.config, default_level="warning")
    run_until_signal(context.login().log_in())
    return True


def kept_arguments(invocation: Invocation, environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the settings of the command line and of the environment as flags, with absolute paths; the settings file
    too."""
    from arcbridge.cli.settings import settings_file

    kept: list[str] = []
    if (file := settings_file(invocation, environment)) is not None:
        kept += ["--config", os.path.abspath(file)]
    for flag in flags_of(CLIENT):
        if not flag.key or flag.key in _NOT_KEPT:
            continue
        given = invocation.given.get(flag.dest)
        if given is None:
            text = environment.get(flag.variable, "")
            given = text.split(",") if text and flag.kind == LIST else text or None
        if given is None:
            continue
        if not flag.takes_value:
            if given is True or str(given).strip().lower() in ("1", "true", "yes", "on"):
                kept.append(flag.long)
            continue
        for value in given if isinstance(given, list) else [given]:
            text = str(value).strip()
            kept += [flag.long, os.path.abspath(os.path.expanduser(text)) if flag.metavar in ("FILE", "DIR") else text]
    return tuple(kept)


def naming_relays(kept: tuple[str, ...], config: ClientConfig) -> tuple[str, ...]:
    """Name the relays where no flag does: a settings file may name none, and a later login chooses others."""
    if "--relay" in kept:
        return kept
    return (*kept, *(word for url in config.relay_urls() for word in ("--relay", url)))


def settings_of(arguments: Sequence[str], environment: Mapping[str, str]) -> ClientConfig:
    """Return the settings that a connection's arguments give; raises ConfigError."""
    from arcbridge.cli.settings import load_settings

    bare = {name: value for name, value in environment.items() if not name.startswith("ARCBRIDGE_")}
    try:
        invocation = parse(["credential", *arguments], CLIENT)
    except UsageError:
        raise ConfigError("the flags of the credential plugin are not known; run `arcbridge connect` again") from None
    config: ClientConfig = load_settings(invocation, bare)
    if not config.cluster:
        raise ConfigError("cluster: required but not set; give --cluster NAME")
    return config


def repair_contexts(state_dir: Path | None, environment: Mapping[str, str]) -> None:
    """Let no context of ours point at the port of a process that was killed; says which ones did."""
    from arcbridge.client.state import StateDirectory

    state = StateDirectory.find(state_dir, environment)
    if state.kubeconfigs():
        from arcbridge.client.kubeconfig.repair import repair_kubeconfigs, running_of

        for name in repair_kubeconfigs(state, running_of(state, environment)):
            sys.stderr.write(f'what served context "{plain(name)}" had ended; the kubeconfig says so now\n')


def _repair_known(state_dir: Path | None, environment: Mapping[str, str]) -> None:
    """Repair what the state directory of this command knows, and those of all that is connected.

    Raises StateError for that of this command; what cannot be looked at of the others is a line.
    """
    from itertools import pairwise

    repair_contexts(state_dir, environment)
    looked_at = {state_dir}
    by_file: dict[str, Path | None] = {"": None}
    for one in _connections(Place.find(environment)):
        named = dict(pairwise(one.arguments))
        file = named.get("--config", "")
        try:
            if file not in by_file and "--state-dir" not in named:
                by_file[file] = settings_of(one.arguments, environment).state_dir
            directory = Path(named["--state-dir"]) if "--state-dir" in named else by_file[file]
            if directory not in looked_at:
                looked_at.add(directory)
                repair_contexts(directory, environment)
        except ArcbridgeError as error:
            cluster = plain(one.cluster)
            sys.stderr.write(
                f'the kubeconfigs of "{cluster}" were not looked at: {plain(error.message)}; '
                f"`arcbridge disconnect {cluster}` forgets it\n"
            )


def _connections(place: Place) -> list[Connection]:
    """Return what is connected; nothing where the list cannot be read, which the process says."""
    from arcbridge.client.background.connections import Connections

    try:
        return Connections(Path(place.connections)).all()
    except StateError:
        return []


def _repair_for(invocation: Invocation) -> None:
    given = invocation.text("state_dir") or os.environ.get("ARCBRIDGE_STATE_DIR", "")
    _repair_known(Path(given).expanduser().absolute() if given else None, os.environ)


def _sweep() -> None:
    """Remove the kubeconfigs of commands of `run` that were killed."""
    from arcbridge.client.kubeconfig.private import sweep

    sweep(os.environ)


# --- the others -----------------------------------------------------------------------------------------------------


def _disconnect(invocation: Invocation, foreground: Foreground) -> int:
    names, every = invocation.texts("name"), invocation.switch("all")
    if every and names:
        raise ConfigError("flag --all: is for all clusters; leave the names out")
    _repair_for(invocation)
    place = Place.find(os.environ)
    try:
        answer = ask(place, request("disconnect", names, every="yes" if every else ""), os.environ, start=False)
        gone = answer["disconnected"]
    except NotRunning:
        gone = _disconnect_here(place, names, every)
    for one in gone:
        print(f'{plain(str(one["cluster"]))} disconnected; context "{plain(str(one["context"]))}" is gone')
    if not gone:
        print("No cluster is connected.")
    return ExitCode.DONE


def _disconnect_here(place: Place, names: Sequence[str], every: bool) -> list[dict[str, str]]:
    """Disconnect in this process, while no background process runs."""
    from functools import partial

    from arcbridge.client.background.connections import Connections
    from arcbridge.client.background.removal import choose, remove_connection

    connections = Connections(Path(place.connections))
    chosen = choose(connections.all(), names, every=every)
    for connection in chosen:
        remove_connection(connection, connections, partial(settings_of, environment=os.environ), os.environ)
    return [{"cluster": one.cluster, "context": one.context} for one in chosen]


def _status(invocation: Invocation, foreground: Foreground) -> int:
    output = invocation.text("output") or "table"
    _repair_for(invocation)
    _sweep()
    place = Place.find(os.environ)
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
        print_document({"process": process, "clusters": clusters}, output)
        return ExitCode.DONE
    if output == "table":
        print(_about(process))
        if not clusters:
            return ExitCode.DONE
        clusters = [{**one, **_for_people(one)} for one in clusters]
    print_rows(clusters, _COLUMNS, output)
    for one in clusters:
        if output == "table" and one.get("reason"):
            print(f"{plain(str(one['name']))}: {plain(str(one['reason']))}")
    return ExitCode.DONE


def _about(process: Mapping[str, Any] | None) -> str:
    if process is None:
        return "No background process runs; kubectl starts it when a context needs it."
    if "pid" not in process:
        return (
            f"A background process of version {process['version']} runs; the next command of this version replaces it."
        )
    former = process.get("former_versions", 0)
    more = f"; {former} of a former version with streams that run" if former else ""
    return f"Background process {process['pid']}, version {process['version']}, since {_age(process['since'])}{more}"


def _not_served(place: Place) -> list[dict[str, Any]]:
    """Return what is connected while no process of this version runs."""
    return [{"name": one.cluster, "contexts": [one.context], "state": "not running"} for one in _connections(place)]


def _for_people(one: Mapping[str, Any]) -> dict[str, Any]:
    ends = one.get("token_expires") or 0
    return {
        "since": _age(one["since"]) if "since" in one else "",
        "bytes_to_cluster": _size(one.get("bytes_to_cluster")),
        "bytes_from_cluster": _size(one.get("bytes_from_cluster")),
        "token_expires": f"in {_duration(ends - time.time())}" if ends else "",
    }


def _age(since: float) -> str:
    return _duration(time.time() - since)


def _duration(seconds: float) -> str:
    seconds = max(0.0, seconds)
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


def _size(count: object) -> str:
    if not isinstance(count, int):
        return ""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _stop(invocation: Invocation, foreground: Foreground) -> int:
    place = Place.find(os.environ)
    try:
        pid = _pid(place)
        exchange(place, request("stop"))
    except NotRunning:
        _repair_for(invocation)
        print("No background process runs.")
        return ExitCode.DONE
    deadline = time.monotonic() + _END_WAIT
    while os.path.exists(place.socket) or _is_held(place.process_lock):
        if time.monotonic() > deadline:
            raise StateError(f"the background process{pid} has not ended; see `arcbridge logs`")
        time.sleep(0.02)
    _repair_for(invocation)
    print("Stopped. kubectl starts it again when a context needs it; `arcbridge disconnect --all` takes them out.")
    return ExitCode.DONE


def _pid(place: Place) -> str:
    try:
        return f" {answer_of(exchange(place, request('version')))['pid']}"
    except OtherVersion:
        return ""


def _is_held(lock: str) -> bool:
    import fcntl

    try:
        with open(lock, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def _logs(invocation: Invocation, foreground: Foreground) -> int:
    path = Path(Place.find(os.environ).log)
    follow = invocation.switch("follow")
    if not path.exists() and not follow:
        print("There is no log: no background process has run.")
        return ExitCode.DONE
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
            return ExitCode.DONE
        try:
            time.sleep(_FOLLOW)
        except KeyboardInterrupt:
            return ExitCode.DONE


def _credential(invocation: Invocation, foreground: Foreground) -> int:
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
    context = ClientContext(settings_of(arguments, os.environ), foreground.terminal(sys.stderr))
    answer = _asked(context, request("credential", arguments), os.environ, foreground)
    import json

    print(json.dumps(answer))
    return ExitCode.DONE


def _background(invocation: Invocation, foreground: Foreground) -> int:
    from functools import partial
    from typing import cast

    from arcbridge.cli.loop import Interrupted, notify, run_until_signal
    from arcbridge.client.background.log_file import LogFile
    from arcbridge.client.background.process import run_background
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

    place = Place.find(os.environ)
    try:
        file = LogFile(Path(place.log), standard_error=bool(descriptor))
        level = "debug" if invocation.switch("verbose") else invocation.text("log_level", "info")
        stream = cast("TextIO", file)
        logging.configure("client", level, invocation.text("log_format", "console"), stream)
        environment = dict(os.environ)
        settings = partial(settings_of, environment=environment)
        run_until_signal(run_background(place, settings, environment, ready=ready), terminal=False)
    except Interrupted:
        pass
    except ArcbridgeError as error:
        tell(error.message)
        raise
    except OSError as error:
        tell(f"{error.filename or place.log}: {error.strerror}")
        raise
    return ExitCode.DONE


_COMMANDS = {
    "connect": _connect,
    "disconnect": _disconnect,
    "status": _status,
    "stop": _stop,
    "logs": _logs,
    "credential": _credential,
    "background": _background,
}
