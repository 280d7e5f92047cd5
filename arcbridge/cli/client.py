"""The client's sub-commands: what each prints, where to, and its exit code."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Any

from arcbridge.cli.output import print_document, print_error, print_rows, print_warning, rfc3339
from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import load_settings
from arcbridge.cli.terminal import configure_logging
from arcbridge.cli.terminal import terminal as _terminal
from arcbridge.errors import ArcbridgeError, ConfigError, ExitCode, StateError
from arcbridge.settings.config import ClientConfig
from arcbridge.single_file import executable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from arcbridge.client.credentials.tokens import Tokens
    from arcbridge.client.service import ClientContext

_TOKEN_WAS_SHOWN = "ARCBRIDGE_TOKEN_WAS_SHOWN"
"""In the environment of a process that began with a token on its command line."""
_writing = threading.Lock()
"""Held while output of commands is written, so that lines of two clusters do not mix."""
_COLUMNS = (("name", "NAME"), ("state", "STATE"), ("agents", "AGENTS"), ("last_seen", "LAST SEEN"))
_WIDE = (
    ("version", "VERSION"),
    ("certificate_expires", "CERTIFICATE UNTIL"),
    ("labels", "LABELS"),
    ("ca_pin", "CA PIN"),
)


def run_client(invocation: Invocation) -> int:
    """Run a client command; returns the exit code."""
    name = invocation.command[0]
    if name in _OF_THE_BACKGROUND or (name == "status" and "role" not in invocation.given):
        return _background(invocation)
    config: ClientConfig = load_settings(invocation, os.environ)
    if name in _REPAIRING:
        from arcbridge.cli.background import repair_contexts

        repair_contexts(config.state_dir, os.environ)
    return _COMMANDS[name](invocation, config, _token(invocation))


# --- commands that run until they are interrupted -------------------------------------------------------------------


def _proxy(invocation: Invocation, config: ClientConfig, token: str) -> int:
    # `--file -`: stdout is the kubeconfig alone.
    lines = sys.stderr if config.file == "-" else sys.stdout
    configure_logging(config)
    from arcbridge.client.service import run_proxy

    return _serve(lambda ready: run_proxy(config, _terminal(lines), token=token, ready=ready))


def _forward(invocation: Invocation, config: ClientConfig, token: str) -> int:
    target, listen = invocation.text("target"), invocation.text("listen", "127.0.0.1:0")
    any_user = invocation.switch("any_user")
    configure_logging(config)
    from arcbridge.client.service import run_forward

    return _serve(
        lambda ready: run_forward(
            config, _terminal(sys.stdout), target, listen, any_user=any_user, token=token, ready=ready
        )
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


def _run(invocation: Invocation, config: ClientConfig, token: str) -> int:
    """Run the command behind `--`; the exit code is its own, or the worst of several."""
    from arcbridge.cli.loop import Interrupted, run_until_signal

    parallel = _parallel(invocation.text("parallel"))
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
                _terminal(sys.stderr),
                invocation.texts("command_line"),
                report=report,
                write=_write_all,
                parallel=parallel or PARALLEL,
                token=token,
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


def _write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data` in one piece, as far as the kernel takes it so; several threads write to one descriptor."""
    with _writing:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]


# --- commands that answer and end -----------------------------------------------------------------------------------


def _answer(
    answer: Callable[[Invocation, ClientContext], Coroutine[Any, Any, int]],
) -> Callable[[Invocation, ClientConfig, str], int]:
    """Return a command that answers and ends. It logs only what is wrong, unless asked for more."""

    def run(invocation: Invocation, config: ClientConfig, token: str) -> int:
        from arcbridge.cli.loop import Interrupted, run_until_signal
        from arcbridge.client.service import ClientContext

        configure_logging(config, default_level="warning")
        context = ClientContext(config, _terminal(sys.stderr), token=token)
        try:
            code = run_until_signal(answer(invocation, context))
        except Interrupted:
            return ExitCode.INTERRUPTED
        _tell_of_update(context)
        return code

    return run


def _tell_of_update(context: ClientContext) -> None:
    """Say that the relay has a newer client, where an answer of it told so."""
    try:
        relay = context.relays.in_use
    except ArcbridgeError:
        return  # no relay is set
    if relay is not None and relay.offered_client:
        from arcbridge.client.relay.update_notice import tell

        tell(relay.offered_client, relay.address.url, context.state.cache, sys.stderr, os.environ)


async def _clusters(invocation: Invocation, context: ClientContext) -> int:
    output = invocation.text("output", "table")
    from arcbridge.client.commands.directory import list_clusters

    found = await list_clusters(context.relays, context.tokens)
    context.state.keep_cluster_names([str(one["name"]) for one in found])
    trust = context.trust()
    for one in found:
        # Scripts read the pins from here, and would trust what the relay says.
        if wrong := trust.contradiction(str(one["name"]), str(one.get("ca_pin", ""))):
            print_warning(wrong)
    if output in ("", "table", "wide"):
        found = [_as_row(one) for one in found]
        if not found:
            sys.stderr.write("no clusters: none is enrolled, or you may reach none\n")
            return ExitCode.DONE
    else:
        found = [_as_document(one) for one in found]
    wide = output == "wide"
    # No command of ours gives a cluster labels: a column without any would be a riddle.
    more = [column for column in _WIDE if column[0] != "labels" or any(cluster.get("labels") for cluster in found)]
    print_rows(found, (*_COLUMNS, *more) if wide else _COLUMNS, "table" if wide else output)
    return ExitCode.DONE


def _as_row(cluster: dict[str, Any]) -> dict[str, Any]:
    """Return a cluster of the relay's list for people: ages, and `key=value` for labels."""
    labels = cluster.get("labels")
    shown = [f"{key}={value}" for key, value in labels.items()] if isinstance(labels, dict) else []
    until = _seconds(cluster.get("certificate_expires"))
    return {
        **cluster,
        "last_seen": _ago(cluster.get("last_seen")),
        "certificate_expires": (rfc3339(until) or "")[:10],
        "labels": sorted(shown),
    }


def _as_document(cluster: dict[str, Any]) -> dict[str, Any]:
    """Return the same for programs: times of RFC 3339, null for never; labels only where there are any."""
    times = {key: rfc3339(_seconds(cluster.get(key))) for key in ("last_seen", "certificate_expires")}
    found = {**cluster, **times}
    if not found.get("labels"):
        found.pop("labels", None)
    return found


def _seconds(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


async def _status(invocation: Invocation, context: ClientContext) -> int:
    """Check each step of the way in its order: login, relay, cluster; the first that fails gives the exit code."""
    output = invocation.text("output", "table")
    from arcbridge.client.commands.directory import list_clusters

    steps: list[dict[str, Any]] = []
    code: int = ExitCode.DONE
    context.tokens.interactive = False

    def failed(step: str, error: ArcbridgeError) -> None:
        nonlocal code
        steps.append({"name": step, "state": "failed", "detail": error.message})
        code = code or error.exit_code

    config, found = context.config, None
    try:
        detail, tokens = await _login_state(context)
        steps.append({"name": "login", "state": "ok", "detail": detail})
        found = await list_clusters(context.relays, tokens)
        url = context.relays.in_use.address.url if context.relays.in_use is not None else ""
        steps.append({"name": "relay", "state": "ok", "detail": f"{url}; clusters: {len(found)}"})
    except ArcbridgeError as error:
        failed("relay" if steps else "login", error)
    for cluster in filter(None, (config.cluster, *config.clusters)):
        if found is None:
            continue
        one = next((entry for entry in found if entry["name"] == cluster), None)
        session = context.session(cluster)
        try:
            await session.connect_once()
            agents = f"; agents: {one['agents']}" if one is not None and "agents" in one else ""
            # With one relay the line above has named it.
            through = session.relay.address.url if session.relay is not None and len(context.relays) > 1 else ""
            way = f" through {through}" if through else ""
            steps.append({"name": cluster, "state": "ok", "detail": f"reachable as {session.subject}{way}{agents}"})
        except ArcbridgeError as error:
            failed(cluster, error)
        finally:
            session.close()
    if output in ("json", "yaml"):
        print_document({"steps": steps, "ok": code == ExitCode.DONE}, output)
    else:
        print_rows(steps, (("name", "STEP"), ("state", "STATE"), ("detail", "DETAIL")), output)
    return code


async def _login_state(context: ClientContext) -> tuple[str, Tokens]:
    """Return what the login step says, and the tokens to go on with: of the first cluster where each has its own."""
    config, tokens = context.config, context.tokens
    if "{cluster}" in config.login.cluster_audience and not tokens.token_mode:
        name = next(filter(None, (config.cluster, *config.clusters)), "")
        if not name:
            from arcbridge.client.credentials.jwt_unverified import read_unverified

            access = await tokens.access()
            until = _until(read_unverified(access).expires_at)
            return f"OIDC{until}{_bound(access)}; the relay's token, each cluster has its own", tokens
        tokens = tokens.for_cluster(name)
    access = await tokens.access()
    token = await tokens.cluster()
    same = "; one token for both" if access == token.text else ""
    mode = "ServiceAccount token" if token.kind == "bearer" else "OIDC"
    return f"{mode}{_until(token.expires_at)}{_bound(token.text)}{same}", tokens


def _ago(seen: object) -> str:
    import time

    if not isinstance(seen, int | float) or not 0 < seen < 1e12:
        return "never"
    seconds = max(0.0, time.time() - seen)
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds / 86400:.0f} d ago"


def _until(expires_at: float) -> str:
    import time

    return time.strftime(", until %Y-%m-%d %H:%M", time.localtime(expires_at)) if expires_at else ""


def _bound(token: str) -> str:
    """Return how the cluster's token says that it is bound to a key; empty where it is bound to none."""
    from arcbridge.client.credentials.jwt_unverified import claims_unverified
    from arcbridge.identity.proof import BindingKind, binding

    kind = binding(claims_unverified(token)).kind
    return f", bound to a key ({kind})" if kind is not BindingKind.NONE else ""


def _doctor(invocation: Invocation, config: ClientConfig, token: str) -> int:
    """Print what each hop is like; the exit code is that of the first that failed."""
    from arcbridge.cli.diagnosis import print_findings
    from arcbridge.cli.loop import Interrupted, run_until_signal

    output = invocation.text("output", "table")
    # What it finds is on stdout; the log would tell it twice.
    configure_logging(config, default_level="error")
    from arcbridge.checks.diagnosis import failed
    from arcbridge.client.doctor.codes import exit_code
    from arcbridge.client.doctor.examination import examine
    from arcbridge.client.service import ClientContext, Terminal

    try:
        cluster = _one_cluster(invocation, config)
        context = ClientContext(config, Terminal(), token=token)  # it asks nothing
        findings = run_until_signal(examine(context, cluster))
    except Interrupted:
        return ExitCode.INTERRUPTED
    except (ConfigError, StateError) as error:
        findings = [failed("settings", error.message, "correct the setting", "settings")]
    print_findings(findings, output)
    return exit_code(findings)


async def _speedtest(invocation: Invocation, context: ClientContext) -> int:
    """Print what was measured, hop by hop, and how."""
    output, cluster = invocation.text("output", "table"), _one_cluster(invocation, context.config)
    if not cluster:
        raise ConfigError("cluster: required but not set; name it: `arcbridge speedtest NAME`")
    seconds = _reading_time(invocation.text("seconds"))
    from arcbridge.client.commands.speedtest import DURATION, measure

    found = await measure(context, cluster, seconds or DURATION)
    if output in ("json", "yaml"):
        print_document(found.document(), output)
    else:
        print_rows(
            found.rows(), (("hop", "HOP"), ("round_trip", "ROUND TRIP"), ("rate", "RATE"), ("how", "HOW")), output
        )
    return ExitCode.DONE


def _reading_time(text: str) -> float:
    """Return a length of time in seconds; 0: as long as is usual. Raises ConfigError."""
    if not text:
        return 0.0
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 60:
        raise ConfigError(f"flag --seconds: {text[:20]!r} is not a time to read; give 1 to 60")
    return float(text)


def _one_cluster(invocation: Invocation, config: ClientConfig) -> str:
    """Return the cluster that a command is about: its argument, else the first of the settings; empty: none."""
    name = invocation.text("name") or next(filter(None, (config.cluster, *config.clusters)), "")
    if name:
        from arcbridge.pki.names import check_cluster_name

        try:
            check_cluster_name(name)
        except ConfigError as error:
            raise ConfigError(f"cluster {name[:64]!r}: {error.message}") from error
    return name


def _key(invocation: Invocation, config: ClientConfig, token: str) -> int:
    """Print what binds tokens to the key of the settings, which is made if it is not there."""
    from arcbridge.client.credentials import proof_keys

    file, output = config.login.proof_key_file, invocation.text("output", "table")
    if file is None:
        raise ConfigError("login.proof_key_file: required; give --proof-key-file FILE")
    key = proof_keys.load_or_make(file, of_settings=True)
    names = {"thumbprint": key.thumbprint, "audience": key.audience(), "nonce": key.nonce()}
    if output in ("json", "yaml"):
        print_document(names, output)
    else:
        rows = [{"name": name, "value": value} for name, value in names.items()]
        print_rows(rows, (("name", "NAME"), ("value", "VALUE")), output)
    return ExitCode.DONE


def _of_login(invocation: Invocation, config: ClientConfig, token: str) -> int:
    """Run the sub-commands about the login itself (`cli.login`)."""
    from arcbridge.cli import login

    return login.COMMANDS[invocation.command[0]](invocation, config)


def _background(invocation: Invocation, *_: object) -> int:
    from arcbridge.cli.background import Foreground, run_command

    return run_command(invocation, Foreground(_terminal, configure_logging))


_OF_THE_BACKGROUND = ("connect", "disconnect", "stop", "logs", "credential", "background")
"""What concerns the background process. `status` does too, unless the role is named: then it checks each step."""
_REPAIRING = ("clusters", "forward", "login", "logout", "speedtest", "status")
"""Commands that put contexts right which a killed process has left. `proxy` and the commands of the background process
do so by themselves; `run`, `doctor` and `whoami` promise to change nothing."""

_COMMANDS: dict[str, Callable[[Invocation, ClientConfig, str], int]] = {
    "proxy": _proxy,
    "forward": _forward,
    "run": _run,
    "doctor": _doctor,
    "speedtest": _answer(_speedtest),
    "clusters": _answer(_clusters),
    "login": _of_login,
    "whoami": _of_login,
    "key": _key,
    "logout": _of_login,
    "status": _answer(_status),
    **dict.fromkeys(_OF_THE_BACKGROUND, _background),
}
