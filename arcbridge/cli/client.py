"""The client's sub-commands: what each prints, where to, and its exit code."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

from arcbridge.cli.output import plain, print_document, print_rows, print_warning
from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import load_settings
from arcbridge.config import ClientConfig
from arcbridge.errors import ArcbridgeError, ConfigError, ExitCode

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from arcbridge.client.service import ClientContext, Terminal
    from arcbridge.client.tokens import Tokens

_TOKEN_WAS_SHOWN = "ARCBRIDGE_TOKEN_WAS_SHOWN"
"""In the environment of a process that began with a token on its command line."""
_COLUMNS = (("name", "NAME"), ("state", "STATE"), ("agents", "AGENTS"), ("last_seen", "LAST SEEN"))


def run_client(invocation: Invocation) -> int:
    """Run a client command; returns the exit code."""
    name = invocation.command[0]
    if name in _OF_THE_BACKGROUND or (name == "status" and "role" not in invocation.given):
        return _background(invocation)
    config: ClientConfig = load_settings(invocation, os.environ)
    return _COMMANDS[invocation.command[0]](invocation, config, _token(invocation))


# --- commands that run until they are interrupted -------------------------------------------------------------------


def _proxy(invocation: Invocation, config: ClientConfig, token: str) -> int:
    # `--file -`: stdout is the kubeconfig alone.
    lines = sys.stderr if config.file == "-" else sys.stdout
    _configure_logging(config)
    from arcbridge.client.service import run_proxy

    return _serve(lambda ready: run_proxy(config, _terminal(lines), token=token, ready=ready))


def _forward(invocation: Invocation, config: ClientConfig, token: str) -> int:
    target, listen = invocation.text("target"), invocation.text("listen", "127.0.0.1:0")
    any_user = invocation.switch("any_user")
    _configure_logging(config)
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
        # Ctrl-C is how these end, once they serve; before, as during a login, it breaks them off.
        return ExitCode.DONE if serving else ExitCode.INTERRUPTED
    return ExitCode.DONE


def _configure_logging(config: ClientConfig, default_level: str = "") -> None:
    """Set logging up by the settings; `default_level` takes the place of `info`, which is their default."""
    from arcbridge.observe import logging

    level = config.observe.log_level
    logging.configure(
        "client", default_level if default_level and level == "info" else level, config.observe.log_format
    )


def _terminal(lines: TextIO) -> Terminal:
    from arcbridge.client.service import Terminal

    def tell(line: str) -> None:
        lines.write(f"{line}\n")
        # Tools wait for these lines on a pipe.
        lines.flush()

    interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    return Terminal(
        tell=tell,
        write_data=_write_data,
        ask_trust=_ask_trust if interactive else None,
        may_log_in=sys.stderr.isatty(),
    )


def _write_data(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


async def _ask_trust(cluster: str, pin: str) -> bool:
    """Ask at the terminal, one question at a time; the loop goes on meanwhile, Ctrl-C works, and the log waits."""
    import asyncio

    from arcbridge.observe import logging

    loop = asyncio.get_running_loop()

    def readable() -> None:
        if not answer.done():
            answer.set_result(sys.stdin.readline())

    async with _questions.setdefault(loop, asyncio.Lock()):
        with logging.paused():
            sys.stderr.write(
                f"Cluster {plain(cluster)!r} is not known here. The pin of its CA is\n  {pin}\n"
                "Compare it with the one its owner gave you. Trust it from now on? [y/N] "
            )
            sys.stderr.flush()
            answer: asyncio.Future[str] = loop.create_future()
            loop.add_reader(sys.stdin, readable)
            try:
                return (await answer).strip().lower() in ("y", "yes")
            finally:
                loop.remove_reader(sys.stdin)


_questions: dict[object, Any] = {}
"""The lock of each loop under which the user is asked: clusters that are met at once are asked about in turn."""


def _token(invocation: Invocation) -> str:
    """The token of `--token`: a literal (warned of, and hidden), `-` for standard input, or ARCBRIDGE_TOKEN."""
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
        os.execve(sys.executable, command, {**os.environ, "ARCBRIDGE_TOKEN": literal, _TOKEN_WAS_SHOWN: "1"})
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
        if word == "--token":
            values.append(next(words, ""))
        elif word.startswith("--token="):
            values.append(word.removeprefix("--token="))
        else:
            kept.append(word)
    return kept if literal in values else None


# --- commands that answer and end -----------------------------------------------------------------------------------


def _answer(
    answer: Callable[[Invocation, ClientContext], Coroutine[Any, Any, int]],
) -> Callable[[Invocation, ClientConfig, str], int]:
    """A command that answers and ends. It logs only what is wrong, unless asked for more."""

    def run(invocation: Invocation, config: ClientConfig, token: str) -> int:
        from arcbridge.cli.loop import Interrupted, run_until_signal
        from arcbridge.client.service import ClientContext

        _configure_logging(config, default_level="warning")
        context = ClientContext(config, _terminal(sys.stderr), token=token)
        try:
            return run_until_signal(answer(invocation, context))
        except Interrupted:
            return ExitCode.INTERRUPTED

    return run


async def _clusters(invocation: Invocation, context: ClientContext) -> int:
    output = invocation.text("output", "table")
    from arcbridge.client.directory import list_clusters

    found = await list_clusters(context.relays, context.tokens)
    context.state.keep_cluster_names([str(one["name"]) for one in found])
    trust = context.trust()
    for one in found:
        # Scripts read the pins from here, and would trust what the relay says.
        if wrong := trust.contradiction(str(one["name"]), str(one.get("ca_pin", ""))):
            print_warning(wrong)
    if output in ("", "table"):
        found = [{**one, "last_seen": _ago(one.get("last_seen"))} for one in found]
        if not found:
            sys.stderr.write("no clusters: none is enrolled, or you may reach none\n")
            return ExitCode.DONE
    print_rows(found, _COLUMNS, output)
    return ExitCode.DONE


async def _login(invocation: Invocation, context: ClientContext) -> int:
    login = context.login()
    tokens = await login.log_in()
    from arcbridge.client.jwt_unverified import read_unverified

    who = read_unverified(tokens.id_token or tokens.access_token).subject
    until = _until(tokens.expires_at)
    print(f"Logged in{f' as {plain(who)}' if who else ''}{until}")
    return ExitCode.DONE


async def _logout(invocation: Invocation, context: ClientContext) -> int:
    context.login()  # says what is missing when no login is configured
    print("Logged out." if context.token_cache().clear() else "There was no login to forget.")
    return ExitCode.DONE


async def _status(invocation: Invocation, context: ClientContext) -> int:
    """Check each step of the way in its order: login, relay, cluster; the first that fails gives the exit code."""
    output = invocation.text("output", "table")
    from arcbridge.client.directory import list_clusters

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
    """What the login step says, and the tokens to go on with: of the first cluster where each has its own."""
    config, tokens = context.config, context.tokens
    if "{cluster}" in config.login.cluster_audience and not tokens.token_mode:
        name = next(filter(None, (config.cluster, *config.clusters)), "")
        if not name:
            from arcbridge.client.jwt_unverified import read_unverified

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
    """How the cluster's token says that it is bound to a key; empty where it is bound to none."""
    from arcbridge.client.jwt_unverified import claims_unverified
    from arcbridge.identity.proof import BindingKind, binding

    kind = binding(claims_unverified(token)).kind
    return f", bound to a key ({kind})" if kind is not BindingKind.NONE else ""


def _key(invocation: Invocation, config: ClientConfig, token: str) -> int:
    """Print what binds tokens to the key of the settings, which is made if it is not there."""
    from arcbridge.client import proof_keys

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


def _background(invocation: Invocation, *_: object) -> int:
    from arcbridge.cli.background import Foreground, run_command

    return run_command(invocation, Foreground(_terminal, _configure_logging))


_OF_THE_BACKGROUND = ("connect", "disconnect", "stop", "logs", "credential", "background")
"""What concerns the background process. `status` does too, unless the role is named: then it checks each step."""

_COMMANDS: dict[str, Callable[[Invocation, ClientConfig, str], int]] = {
    "proxy": _proxy,
    "forward": _forward,
    "clusters": _answer(_clusters),
    "login": _answer(_login),
    "key": _key,
    "logout": _answer(_logout),
    "status": _answer(_status),
    **dict.fromkeys(_OF_THE_BACKGROUND, _background),
}
