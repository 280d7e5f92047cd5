"""Starts the listener of a client's metrics and health, where the settings want one.

It counts nothing: `metrics` says what is shown. Invariant: a cluster is healthy
exactly while new streams have a session.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import structlog

from arcbridge.client.serving.forward import Forward
from arcbridge.client.serving.served_cluster import ServedCluster
from arcbridge.client.session.session_manager import SessionManager

if TYPE_CHECKING:
    from arcbridge.observe.server import ObserveServer

log = structlog.get_logger("arcbridge.client")


async def observe(
    listen: str,
    sessions: Sequence[SessionManager],
    *,
    proxies: Sequence[ServedCluster] = (),
    forwards: Sequence[Forward] = (),
) -> ObserveServer | None:
    """Return the listener, which has started; None where `listen` is empty. Raises ConfigError."""
    if not listen:
        return None
    # These import aiohttp, a quarter of a second that a start without metrics does not pay.
    from arcbridge.client.serving.metrics import register
    from arcbridge.observe.health import Checks
    from arcbridge.observe.metrics import Metrics
    from arcbridge.observe.server import ObserveServer

    metrics, checks = Metrics("client"), Checks()
    register(
        metrics,
        sessions,
        lambda: [proxy.endpoint.stats for proxy in proxies if proxy.endpoint is not None],
        lambda: [forward.stats for forward in forwards],
    )
    for session in sessions:
        checks.add(f"session-{session.cluster}", _session_check(session))
    server = ObserveServer(listen, metrics, checks)
    log.info("observing", address=await server.start())
    return server


def _session_check(session: SessionManager) -> Callable[[], str | None]:
    def check() -> str | None:
        if session.current is not None:
            return None
        return session.failure.message if session.failure is not None else "no session yet"

    return check
