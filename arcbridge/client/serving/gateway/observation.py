"""Starts the listener of a gateway's metrics and health, where the settings want one, and registers the metrics.

It counts nothing itself. Invariant: no label has a value that comes from outside, no caller's and no cluster's.
"""

from __future__ import annotations

from collections import Counter
from functools import partial

import structlog

from arcbridge.client.serving.gateway.caller_sessions import CallerSessions
from arcbridge.client.serving.gateway.server import GatewayServer
from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.server import ObserveServer

log = structlog.get_logger("arcbridge.client")
# The results that the counts have.
_REQUESTS = ("passed_on", "upgraded", "refused")
_NEW_SESSIONS = ("established", "failed", "limited")


async def observe_gateway(listen: str, server: GatewayServer, sessions: CallerSessions) -> ObserveServer:
    """Return the listener, which has started. Raises ConfigError."""
    metrics = Metrics("client")
    register(metrics, server, sessions)
    observer = ObserveServer(listen, metrics, Checks())
    log.info("observing", address=await observer.start())
    return observer


def register(metrics: Metrics, server: GatewayServer, sessions: CallerSessions) -> None:
    """Register everything that a gateway counts."""
    metrics.gauge("gateway_connections", "Connections of callers that are open.", None, lambda: len(server.open))
    metrics.gauge("gateway_sessions", "Sessions of callers to clusters.", None, lambda: len(sessions))
    metrics.gauge("gateway_requests_under_way", "Requests that are under way.", None, lambda: sessions.requests)
    requests = partial(_values, server.requests, _REQUESTS)
    metrics.counter("gateway_requests_total", "Requests by how they went.", {"result": _REQUESTS}, requests)
    attempts = partial(_values, sessions.attempts, _NEW_SESSIONS)
    metrics.counter("gateway_new_sessions_total", "New sessions by how they went.", {"result": _NEW_SESSIONS}, attempts)


def _values(counts: Counter[str], results: tuple[str, ...]) -> dict[str, int]:
    """Return the counts by result, with the 0 of those that are not in `counts` yet."""
    return {one: counts[one] for one in results}
