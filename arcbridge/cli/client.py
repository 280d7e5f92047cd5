"""The client's sub-commands: who is at the terminal, where lines go, what the exit code is."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from arcbridge.cli.output import plain, print_document, print_rows, print_warning
from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import load_settings
from arcbridge.config import ClientConfig
from arcbridge.errors import ArcbridgeError, ConfigError, ExitCode

if TYPE_CHECKING:
    from arcbridge.client.service import ClientContext, Terminal

_COLUMNS = (("name", "NAME"), ("state", "STATE"), ("agents", "AGENTS"), ("last_seen", "LAST SEEN"))


def run_client(invocation: Invocation) -> int:
    """Run a client command; returns the exit code."""
    config: ClientConfig = load_settings(invocation, os.environ)
    command = invocation.command[0]
    # `--file -`: stdout is the kubeconfig alone.
    lines = sys.stderr if config.file == "-" and command == "proxy" else sys.stdout
    token = _token(invocation)
    if command in ("proxy", "forward"):
        from arcbridge.observe import logging

        logging.configure("client", config.observe.log_level, config.observe.log_format)
        return _serve(invocation, config, token, lines)

    from arcbridge.cli.loop import Interrupted, run_until_signal
    from arcbridge.client.service import ClientContext
    from arcbridge.observe import logging

    # A command that answers and ends logs only what is wrong, unless asked for more.
    quiet = config.observe.log_level == "info"
    logging.configure("client", "warning" if quiet else config.observe.log_level, config.observe.log_format)
    parts = ClientContext(config, _person(sys.stderr), token=token)
    try:
        if command == "clusters":
            return run_until_signal(_clusters(parts, invocation.text("output", "table")))
        if command == "login":
            return run_until_signal(_login(parts))
        if command == "logout":
            return _logout(parts)
        return run_until_signal(_status(parts, invocation.text("output", "table")))
    except Interrupted:
        return ExitCode.INTERRUPTED


def _serve(invocation: Invocation, config: ClientConfig, token: str, lines: Any) -> int:
    from arcbridge.cli.loop import Interrupted, notify, run_until_signal
    from arcbridge.client.service import run_forward, run_proxy

    person = _person(lines)
    try:
        if invocation.command[0] == "forward":
            target, listen = invocation.text("target"), invocation.text("listen", "127.0.0.1:0")
            run_until_signal(run_forward(config, person, target, listen, token=token, ready=lambda: notify("READY=1")))
        else:
            run_until_signal(
                run_proxy(config, person, token=token, write_stdout=_write, ready=lambda: notify("READY=1"))
            )
    except Interrupted:
        pass  # Ctrl-C is how these end
    return ExitCode.DONE


def _person(lines: Any) -> Terminal:
    from arcbridge.client.service import Terminal

    def tell(line: str) -> None:
        lines.write(f"{line}\n")
        # Tools wait for these lines on a pipe.
        lines.flush()

    here = sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty()
    return Terminal(tell=tell, ask_trust=_ask_trust if here else None, may_log_in=sys.stderr.isatty())


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


async def _ask_trust(cluster: str, pin: str) -> bool:
    """Ask at the terminal. The loop goes on meanwhile, and Ctrl-C works."""
    import asyncio

    sys.stderr.write(
        f"Cluster {plain(cluster)!r} is not known here. The pin of its CA is\n  {pin}\n"
        "Compare it with the one its owner gave you. Trust it from now on? [y/N] "
    )
    sys.stderr.flush()
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[str] = loop.create_future()

    def readable() -> None:
        if not answer.done():
            answer.set_result(sys.stdin.readline())

    loop.add_reader(sys.stdin, readable)
    try:
        return (await answer).strip().lower() in ("y", "yes")
    finally:
        loop.remove_reader(sys.stdin)


def _token(invocation: Invocation) -> str:
    """The token of `--token`: a literal (warned of), `-` for standard input, or ARCBRIDGE_TOKEN."""
    literal = invocation.text("token")
    if not literal:
        return os.environ.get("ARCBRIDGE_TOKEN", "").strip()
    if literal == "-":
        token = sys.stdin.readline(64 * 1024).strip()
        if not token:
            raise ConfigError("flag --token: nothing came from standard input")
        return token
    print_warning("other users of this machine can see a token on the command line; use --token-file, or --token -")
    return literal


# --- commands that answer and end -----------------------------------------------------------------------------------


async def _clusters(parts: ClientContext, output: str) -> int:
    from arcbridge.client.directory import list_clusters

    found = await list_clusters(parts.relays, parts.tokens)
    parts.state.keep_cluster_names([str(one["name"]) for one in found])
    if output in ("", "table"):
        found = [{**one, "last_seen": _ago(one.get("last_seen"))} for one in found]
        if not found:
            sys.stderr.write("no clusters: none is enrolled, or you may reach none\n")
            return ExitCode.DONE
    print_rows(found, _COLUMNS, output)
    return ExitCode.DONE


async def _login(parts: ClientContext) -> int:
    login = parts.login()
    tokens = await login.log_in()
    from arcbridge.client.jwt_unverified import read_unverified

    who = read_unverified(tokens.id_token or tokens.access_token).subject
    until = _until(tokens.expires_at)
    print(f"Logged in{f' as {plain(who)}' if who else ''}{until}")
    return ExitCode.DONE


def _logout(parts: ClientContext) -> int:
    parts.login()  # says what is missing when no login is configured
    print("Logged out." if parts.token_cache().clear() else "There was no login to forget.")
    return ExitCode.DONE


async def _status(parts: ClientContext, output: str) -> int:
    """Each step of the way in its order: login, relay, cluster; the first that fails gives the exit code."""
    from arcbridge.client.directory import list_clusters

    steps: list[dict[str, Any]] = []
    code: int = ExitCode.DONE
    parts.tokens.interactive = False

    def failed(step: str, error: ArcbridgeError) -> None:
        nonlocal code
        steps.append({"name": step, "state": "failed", "detail": error.message})
        code = code or error.exit_code

    config, found = parts.config, None
    try:
        await parts.tokens.access()
        token = await parts.tokens.cluster()
        same = "" if token.kind == "bearer" or await parts.tokens.access() != token.text else "; one token for both"
        mode = "ServiceAccount token" if token.kind == "bearer" else "OIDC"
        steps.append({"name": "login", "state": "ok", "detail": f"{mode}{_until(token.expires_at)}{same}"})
        found = await list_clusters(parts.relays, parts.tokens)
        url = parts.relays.in_use.address.url if parts.relays.in_use is not None else ""
        steps.append({"name": "relay", "state": "ok", "detail": f"{url}; clusters: {len(found)}"})
    except ArcbridgeError as error:
        failed("relay" if steps else "login", error)
    for cluster in filter(None, (config.cluster, *config.clusters)):
        if found is None:
            continue
        one = next((entry for entry in found if entry["name"] == cluster), None)
        session = parts.session(cluster)
        try:
            await session.connect_once()
            agents = f"; agents: {one['agents']}" if one is not None and "agents" in one else ""
            # With one relay the line above has named it.
            through = session.relay.address.url if session.relay is not None and len(parts.relays) > 1 else ""
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


def _ago(seen: object) -> str:
    import time

    if not isinstance(seen, int | float) or seen <= 0:
        return "never"
    seconds = max(0.0, time.time() - seen)
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds / 86400:.0f} d ago"


def _until(expires_at: float) -> str:
    import time

    return time.strftime(", until %Y-%m-%d %H:%M", time.localtime(expires_at)) if expires_at else ""
