"""Runs `forward`: carries a TCP target of one cluster to a local address until it is interrupted.

It prints nothing: what the user reads goes to the `Terminal` of the command line. Invariant: the address accepts only
once the agent has said that the user may open the target.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

from arcbridge.client.service import ClientContext, Terminal
from arcbridge.client.serving.forward import Forward, check_offered, check_target_name
from arcbridge.client.serving.served_cluster import send_resets
from arcbridge.client.settings import required
from arcbridge.errors import ConfigError
from arcbridge.net.address import parse_listen
from arcbridge.net.loopback import listen_at
from arcbridge.settings.config import ClientConfig


async def run_forward(
    config: ClientConfig,
    terminal: Terminal,
    target: str,
    listen: str,
    *,
    environment: Mapping[str, str],
    any_user: bool = False,
    token: str = "",
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Carry a TCP target of the one named cluster to a local address until cancelled.

    `any_user`: also for programs of other users of this machine.
    """
    check_target_name(target)
    context = ClientContext(config, terminal, token=token, environment=environment)
    cluster, *more = context.clusters()
    required(config, environment)
    if more:
        raise ConfigError("flag --cluster: `forward` is for one cluster; start one process for each")
    context.require_login()
    address = parse_listen(listen, default_port=0)
    sock = listen_at(address.host or "127.0.0.1", address.port)
    session = context.session(cluster)
    forward = Forward(session, target, sock, any_user=any_user)
    observer = None
    try:
        if config.observe.listen:
            from arcbridge.client.serving.observation import observe

            observer = await observe(config.observe.listen, [session], forwards=[forward.stats])
        await session.connect_once()
        check_offered(target, session.targets, cluster)
        async with asyncio.TaskGroup() as group:
            group.create_task(session.run())
            forward.start()
            host, port = sock.getsockname()[:2]
            shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            terminal.tell(f"Forwarding {shown} to {target} of cluster {cluster}")
            terminal.tell("Press Ctrl+C to close.")
            ready()
    finally:
        await forward.close()
        session.close()
        await session.wait_closed()
        await send_resets()
        if observer is not None:
            await observer.stop()
