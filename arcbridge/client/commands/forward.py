"""Runs `forward`: carries local ports into one cluster until it is interrupted.

What they lead to is a TCP target of the agent's settings (`run_forward`), or pods behind names, by the API server's
port-forward (`run_pod_forward`). It prints nothing: what the user reads goes to the `Terminal` of the command line.
Invariant: a port accepts only once what it leads to is known to be there for the user.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from arcbridge.client.service import ClientContext
from arcbridge.client.serving.forward import Forward, check_offered, check_target_name
from arcbridge.client.serving.served_cluster import send_resets
from arcbridge.client.session.restrictions import restricts_requests
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.client.settings import required
from arcbridge.errors import ConfigError
from arcbridge.net.address import parse_listen
from arcbridge.net.loopback import listen_at
from arcbridge.tasks import first_error

if TYPE_CHECKING:
    from arcbridge.client.serving.pod_ports.pod_forward import PodForward


async def run_forward(
    context: ClientContext,
    target: str,
    listen: str,
    *,
    any_user: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Carry a TCP target of the one named cluster to a local address until cancelled.

    `any_user`: also for programs of other users of this machine.
    """
    check_target_name(target)
    session, tell = _session(context), context.terminal.tell
    address = parse_listen(listen, default_port=0)
    sock = listen_at(address.host or "127.0.0.1", address.port)
    forward = Forward(session, target, sock, any_user=any_user)
    async with _running(context, session, [forward]):
        restricted = restricts_requests(session.restrictions)
        check_offered(target, session.targets, session.cluster, restricted=restricted)
        async with asyncio.TaskGroup() as group:
            group.create_task(session.run())
            forward.start()
            host, port = sock.getsockname()[:2]
            shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            tell(f"Forwarding {shown} to {target} of cluster {session.cluster}")
            tell("Press Ctrl+C to close.")
            ready()


async def run_pod_forward(
    context: ClientContext,
    words: Sequence[str],
    *,
    namespace: str,
    addresses: Sequence[str],
    any_user: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Carry local ports to pods behind the names in `words` until cancelled."""
    from arcbridge.client.serving.pod_ports.pod_forward import PodForward
    from arcbridge.client.serving.pod_ports.target import parse_addresses, parse_targets

    targets, listening = parse_targets(words, namespace), parse_addresses(addresses)
    session, tell = _session(context), context.terminal.tell
    forwards = [PodForward(session, target, tell, any_user=any_user) for target in targets]
    async with _running(context, session, forwards):
        try:
            async with asyncio.TaskGroup() as group:
                for work in (session.run(), *(forward.run() for forward in forwards)):
                    group.create_task(work)
                for forward in forwards:
                    await forward.open(listening)
                tell("Press Ctrl+C to close.")
                ready()
        except BaseExceptionGroup as errors:
            raise first_error(errors) from errors


def _session(context: ClientContext) -> SessionManager:
    """Return the session to the one cluster of the settings. Raises ArcbridgeError."""
    cluster, *more = context.clusters()
    required(context.given, context.environment)
    if more:
        raise ConfigError("flag --cluster: `forward` is for one cluster; start one process for each")
    context.require_login()
    return context.session(cluster)


@asynccontextmanager
async def _running(
    context: ClientContext, session: SessionManager, forwards: Sequence[Forward | PodForward]
) -> AsyncIterator[None]:
    """Establish the session, and at the end close the ports before it, and then what observes it."""
    observer = None
    try:
        if listen := context.config.observe.listen:
            from arcbridge.client.serving.observation import observe

            observer = await observe(listen, [session], forwards=[one.stats for one in forwards])
        await session.connect_once()
        yield
    finally:
        for forward in forwards:
            await forward.close()
        session.close()
        await session.wait_closed()
        await send_resets()
        if observer is not None:
            await observer.stop()
