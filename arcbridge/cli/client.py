"""The client's sub-commands: what each prints, where to, and its exit code."""

from __future__ import annotations

import os
import select
import sys
import threading
from typing import TYPE_CHECKING, Any

from arcbridge.cli.commands import DOCUMENTS, FOR_PEOPLE
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
from arcbridge.cli.settings import given_state_dir, load_settings
from arcbridge.cli.terminal import configure_logging, terminal
from arcbridge.errors import ArcbridgeError, ConfigError, ExitCode, StateError, Unauthenticated
from arcbridge.settings.config import ClientConfig
from arcbridge.single_file import executable
from arcbridge.units import duration

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from arcbridge.client.service import ClientContext

_TOKEN_WAS_SHOWN = "ARCBRIDGE_TOKEN_WAS_SHOWN"
"""In the environment of a process that began with a token on its command line."""
_LONGEST = 366 * 86400.0
"""Seconds of `--for`."""
_writing = threading.Lock()
"""Held while output of commands is written, so that lines of two clusters do not mix."""
_PINS = (
    Column("name"),
    Column("relay"),
    Column("pin", "CLUSTER CA PIN"),
    Column("followed_by"),
    Column("file", wide=True),
)
_COLUMNS = (
    Column("name"),
    Column("state", state=True),
    Column("agents", rank=1),
    Column("last_seen", rank=2),
    Column("version", wide=True),
    Column("certificate_expires", "CERTIFICATE UNTIL", wide=True),
    Column("cluster_ca_pin", wide=True),
)


def _start(invocation: Invocation, *, repair: bool = False) -> tuple[ClientConfig, str]:
    """Return the settings, and the token of `--token`. `repair`: first put contexts right that a killed process left.

    `proxy` and the commands of the background process do so by themselves; `run`, `doctor` and `whoami` promise to
    change nothing.
    """
    config: ClientConfig = load_settings(invocation, os.environ)
    if repair:
        from arcbridge.cli.terminal import repair_contexts

        repair_contexts(config.state_dir)
    return config, _token(invocation)


# --- commands that run until they are interrupted -------------------------------------------------------------------


def proxy(invocation: Invocation) -> int:
    """Serve kubectl on a local port."""
    config, token = _start(invocation)
    # `--file -`: stdout is the kubeconfig alone.
    lines = sys.stderr if config.file == "-" else sys.stdout
    configure_logging(config)
    from arcbridge.client.commands.proxy import run_proxy
    from arcbridge.client.service import ClientContext

    context = ClientContext(config, terminal(lines), token=token, lasts=time_limit(invocation))
    return _serve(lambda ready: run_proxy(context, ready=ready))


def forward(invocation: Invocation) -> int:
    """Carry ports of pods, or a TCP target of the agent's settings, to local ports."""
    from arcbridge.client.serving.pod_ports.target import is_kubernetes

    words, spaces, short = invocation.texts("target"), invocation.texts("namespace"), invocation.texts("n")
    pods = is_kubernetes(words)
    if pods:
        spaces += short
    elif short:
        invocation.given["cluster"] = [*invocation.texts("cluster"), *short]  # as all other commands mean it
    if len(spaces) > int(pods):
        raise ConfigError("flag --namespace is for things of Kubernetes, and all of a command are in one namespace")
    config, token = _start(invocation, repair=True)
    configure_logging(config)
    from arcbridge.client.commands.forward import run_forward, run_pod_forward
    from arcbridge.client.service import ClientContext

    any_user = invocation.switch("any_user")
    listen, addresses = invocation.text("listen"), invocation.texts("address")
    if (pods and listen) or (not pods and addresses):
        raise ConfigError("flag --listen is for a target of the agent, and --address for things of Kubernetes")
    context = ClientContext(config, terminal(sys.stdout), token=token)
    if pods:
        space, at = "".join(spaces) or "default", addresses or ("localhost",)
        return _serve(
            lambda ready: run_pod_forward(context, words, namespace=space, addresses=at, any_user=any_user, ready=ready)
        )
    listen = listen or "127.0.0.1:0"
    return _serve(lambda ready: run_forward(context, words[0], listen, any_user=any_user, ready=ready))


def gateway(invocation: Invocation) -> int:
    """Serve many callers and clusters over HTTPS."""
    config, token = _start(invocation)
    if token:
        raise ConfigError("flag --token: each request to a gateway has its caller's own tokens; take the flag out")
    certificate, key = invocation.text("certificate"), invocation.text("key")
    if not certificate or not key:
        raise ConfigError("flags --certificate and --key: required, because callers send tokens; name both files")
    configure_logging(config)
    from pathlib import Path

    from arcbridge.client.commands.gateway import run_gateway

    listen = invocation.text("listen", "127.0.0.1:8443")
    files = Path(certificate), Path(key)
    return _serve(
        lambda ready: run_gateway(config, terminal(sys.stdout), listen, *files, environment=os.environ, ready=ready)
    )


def _serve(begin: Callable[[Callable[[], None]], Coroutine[Any, Any, None]]) -> int:
    from arcbridge.cli.loop import Interrupted, notify, run_until_signal

    serving = False

    def ready() -> None:
        nonlocal serving
        serving = True
        notify("READY=1")

    try:
        run_until_signal(begin(ready))
    except Interrupted:
        # Ctrl-C is how these end; before they serve, during a login say, it breaks them off.
        return ExitCode.DONE if serving else ExitCode.INTERRUPTED
    return ExitCode.DONE


def _token(invocation: Invocation) -> str:
    """Return the token of `--token`: a literal (warned of, and hidden), `-` for standard input, or ARCBRIDGE_TOKEN."""
    literal = invocation.text("token")
    if not literal:
        # Taken out, so that no program that this one starts inherits it.
        if os.environ.pop(_TOKEN_WAS_SHOWN, ""):
            _warn_of_literal()
        return os.environ.pop("ARCBRIDGE_TOKEN", "").strip()
    if literal == "-":
        token = sys.stdin.readline(64 * 1024).strip()
        if not token:
            raise ConfigError("flag --token: nothing came from standard input")
        return token
    if (command := without_token(sys.orig_argv, literal)) is not None and os.name == "posix":
        # A command line is open to every user of the machine for as long as the process lives, an environment to this
        # one alone: the same program begins once more without it (docs/threats.md#W4).
        sys.stdout.flush()
        os.execve(executable(), command, {**os.environ, "ARCBRIDGE_TOKEN": literal, _TOKEN_WAS_SHOWN: "1"})
    _warn_of_literal()
    return literal


def _warn_of_literal() -> None:
    print_warning("other users of this machine can see a token on the command line; use --token-file, or --token -")


def without_token(command: Sequence[str], literal: str) -> list[str] | None:
    """Return a command line without each `--token` and its value; None where `literal` is none of them.

    Of several the last counts: one that stayed would be taken by the program that begins once more.
    """
    kept: list[str] = []
    values: list[str] = []
    words = iter(command)
    for word in words:
        if word == "--":
            kept += [word, *words]  # another program's command line
        elif word == "--token":
            values.append(next(words, ""))
        elif word.startswith("--token="):
            values.append(word.removeprefix("--token="))
        else:
            kept.append(word)
    return kept if literal in values else None


# --- a command against clusters ---------------------------------------------------------------------------------------


def run(invocation: Invocation) -> int:
    """Run the command behind `--`; the exit code is its own, or the worst of several."""
    config, token = _start(invocation)
    from arcbridge.cli.loop import Interrupted, run_until_signal

    parallel, lasts = _parallel(invocation.text("parallel")), time_limit(invocation)
    # What the command writes is all that is written, unless something is wrong.
    configure_logging(config, default_level="warning")
    from arcbridge.client.commands.run import PARALLEL, run_command

    def report(cluster: str, message: str) -> None:
        print_error(f"{cluster}: {message}")
        sys.stderr.flush()

    try:
        return run_until_signal(
            run_command(
                config,
                terminal(sys.stderr),
                invocation.texts("command_line"),
                report=report,
                write=_write_all,
                parallel=parallel or PARALLEL,
                token=token,
                lasts=lasts,
                environment=dict(os.environ),
            )
        )
    except Interrupted as ended:
        return 128 + ended.signal


def _parallel(text: str) -> int:
    """Return the clusters at a time; 0: as many as is usual. Raises ConfigError."""
    if not text:
        return 0
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1000:
        raise ConfigError(f"flag --parallel: {text[:20]!r} is not a number of clusters; give 1 to 1000")
    return int(text)


def time_limit(invocation: Invocation) -> float:
    """Return the seconds of `--for`; 0: it was not given. Raises ConfigError."""
    text = invocation.text("for")
    if not text:
        return 0.0
    from arcbridge.settings.config_loader import parse_duration

    try:
        seconds = parse_duration(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= _LONGEST:
        raise ConfigError(f"flag --for: {text[:20]!r} is no duration of a second to a year; give 1h or 30m")
    return seconds


def _write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data` in one piece, as far as the kernel takes it so; several threads write to one descriptor."""
    with _writing:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except BlockingIOError:  # a question is open, and uvloop waits for its answer at the same terminal
                select.select((), (descriptor,), ())


# --- commands that answer and end -----------------------------------------------------------------------------------


def answering(answer: Callable[[Invocation, ClientContext], Coroutine[Any, Any, int]]) -> Callable[[Invocation], int]:
    """Return a command that answers and ends. It logs only what is wrong, unless asked for more."""

    def command(invocation: Invocation) -> int:
        config, token = _start(invocation, repair=True)
        from arcbridge.cli.loop import run_until_signal
        from arcbridge.client.service import ClientContext

        configure_logging(config, default_level="warning")
        context = ClientContext(config, terminal(sys.stderr), token=token)
        code = run_until_signal(answer(invocation, context))
        _tell_of_update(context)
        return code

    return command


def _tell_of_update(context: ClientContext) -> None:
    """Say that the relay has a newer client, where an answer of it told so."""
    try:
        relay = context.relays.in_use
    except ArcbridgeError:
        return  # no relay is set
    if relay is not None and relay.offered_client:
        from arcbridge.client.relay.update_notice import tell

        tell(relay.offered_client, relay.address.url, context.state.cache, sys.stderr, os.environ)


@answering
async def clusters(invocation: Invocation, context: ClientContext) -> int:
    output = invocation.text("output", "table")
    check_gateway_flags(invocation)
    from arcbridge.client.commands.directory import list_clusters

    found = await list_clusters(context.relays, context.tokens)
    context.state.keep_cluster_names([str(one["name"]) for one in found])
    trust = context.trust()
    for one in found:
        # Scripts read the pins from here, and would trust what the relay says.
        one["cluster_ca_pin"] = one.pop("ca_pin", "")
        if wrong := trust.contradiction(str(one["name"]), str(one["cluster_ca_pin"])):
            print_warning(wrong)
    if output == "clusterprofile":
        print_document(_profiles(invocation, context, found), "json")
        return ExitCode.DONE
    if output in ("", *FOR_PEOPLE):
        found = [_as_row(one) for one in found]
        if not found:
            print_note("no clusters: none is enrolled, or you may reach none")
            return ExitCode.DONE
    else:
        found = [_as_document(one) for one in found]
    print_rows(found, _COLUMNS, output)
    return ExitCode.DONE


def check_gateway_flags(invocation: Invocation) -> None:
    """Raise ConfigError for flags of profiles that would have no effect."""
    if invocation.text("gateway") and invocation.text("output", "table") != "clusterprofile":
        raise ConfigError("flag --gateway: needs -o clusterprofile")
    if invocation.text("gateway_ca_file") and not invocation.text("gateway"):
        raise ConfigError("flag --gateway-ca-file: needs --gateway")


def _profiles(invocation: Invocation, context: ClientContext, found: list[dict[str, Any]]) -> dict[str, Any]:
    from arcbridge.client.background import cluster_profiles as profiles

    names = [str(one["name"]) for one in found]
    if url := invocation.text("gateway"):
        accesses = profiles.gateway_accesses(url, invocation.text("gateway_ca_file"), names)
    else:
        accesses = profiles.local_accesses(context)
        if missing := [name for name in names if name not in accesses]:
            print_note(f"not connected here, so their profiles say no way to them: {', '.join(missing)}")
    return profiles.cluster_profiles(found, accesses)


def _as_row(cluster: dict[str, Any]) -> dict[str, Any]:
    """Return a cluster of the relay's list for people: its age, and a date."""
    until = _seconds(cluster.get("certificate_expires"))
    return {**cluster, "last_seen": _ago(cluster.get("last_seen")), "certificate_expires": (rfc3339(until) or "")[:10]}


def _as_document(cluster: dict[str, Any]) -> dict[str, Any]:
    """Return the same for programs: times of RFC 3339, null for never."""
    return {**cluster, **{key: rfc3339(_seconds(cluster.get(key))) for key in ("last_seen", "certificate_expires")}}


def _seconds(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def _ago(seen: object) -> str:
    import time

    if not isinstance(seen, int | float) or not 0 < seen < 1e12:
        return "never"
    return f"{duration(time.time() - seen)} ago"


def doctor(invocation: Invocation) -> int:
    """Print what each hop is like; the exit code is that of the first that failed."""
    from arcbridge.cli.loop import run_until_signal
    from arcbridge.cli.output import FindingPrinter

    printer = FindingPrinter(invocation.text("output"))
    from arcbridge.checks.diagnosis import failed
    from arcbridge.client.doctor.codes import exit_code, fault
    from arcbridge.client.doctor.examination import examine
    from arcbridge.client.doctor.machine_hops import look_at_directories
    from arcbridge.client.service import ClientContext, Terminal

    try:
        config, token = _start(invocation)
        # What it finds is on stdout; the log would tell it twice.
        configure_logging(config, default_level="error")
        cluster = _one_cluster(invocation, config)
        context = ClientContext(config, Terminal(), token=token)  # it asks nothing
        with Waiting(sys.stderr, "Looking at the way to the cluster …"):
            run_until_signal(examine(context, cluster, printer.add, throughput=invocation.switch("throughput")))
    except (ConfigError, StateError, Unauthenticated) as error:
        if not printer.findings:
            printer.add(look_at_directories(given_state_dir(invocation, os.environ), os.environ))
        login = isinstance(error, Unauthenticated)
        printer.add(
            fault("login", error.message, "login_missing")
            if login
            else failed("settings", error.message, "correct the setting", "settings")
        )
    printer.end()
    return exit_code(printer.findings)


def _one_cluster(invocation: Invocation, config: ClientConfig) -> str:
    """Return the cluster that a command is about: its argument, else the first of the settings; empty: none."""
    name = invocation.text("name") or next(filter(None, (config.cluster, *config.clusters)), "")
    if name:
        from arcbridge.client.service import check_name

        check_name(name, "cluster ")
    return name


@answering
async def trust(invocation: Invocation, context: ClientContext) -> int:
    """Print the pins of clusters, or have another one trusted in the place of one."""
    from arcbridge.client.commands.pins import known_pins, renew

    name = _one_cluster(invocation, context.config)
    known = known_pins(context, name)
    if invocation.switch("renew"):
        if not name:
            raise ConfigError("flag --renew: name the cluster")
        for one in known:
            print_note(f"trusted until now: {plain(one['pin'])}")
        print_prose(f"{name} is trusted by {await renew(context, name)}")
        return ExitCode.DONE
    if not known:
        of = f" of cluster {name!r}" if name else ""
        raise StateError(f"no pin is known here{of}; `arcbridge connect` asks for one")
    columns = [one for one in _PINS if one.key != "followed_by" or any(row["followed_by"] for row in known)]
    print_rows(known, columns, invocation.text("output", "table"))
    return ExitCode.DONE


def key(invocation: Invocation) -> int:
    """Print what binds tokens to the key of the settings, which is made if it is not there."""
    config, _ = _start(invocation)
    from arcbridge.client.credentials import proof_keys

    file, output = config.login.proof_key_file, invocation.text("output", "table")
    if file is None:
        raise ConfigError("login.proof_key_file: required; give --proof-key-file FILE")
    made = proof_keys.load_or_make(file)
    names = {"thumbprint": made.thumbprint, "audience": made.audience(), "nonce": made.nonce()}
    if output in DOCUMENTS:
        print_document(names, output)
    else:
        rows = [{"name": name, "value": value} for name, value in names.items()]
        print_rows(rows, (Column("name"), Column("value")), output)
    return ExitCode.DONE
