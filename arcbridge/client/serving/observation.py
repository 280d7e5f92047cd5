"""Starts the listener of a client's metrics and health, where the settings want one, and registers the metrics.

It counts nothing: the metrics are sums over sessions, endpoints and forwards, computed at each scrape. Invariant: a
cluster is healthy exactly while new streams have a session, and no label has a value that comes from outside. It
imports aiohttp, a quarter of a second that a start without metrics does not pay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import structlog

from arcbridge.client.serving.endpoint import EndpointStats
from arcbridge.client.serving.local_port import ForwardStats
from arcbridge.client.serving.served_cluster import ServedCluster
from arcbridge.client.session.resumable_session import DETACHED_BOUNDS, REASONS
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Buckets, Metrics
from arcbridge.observe.server import ObserveServer

log = structlog.get_logger("arcbridge.client")


async def observe(
    listen: str,
    sessions: Sequence[SessionManager],
    *,
    proxies: Sequence[ServedCluster] = (),
    forwards: Sequence[ForwardStats] = (),
) -> ObserveServer:
    """Return the listener, which has started. Raises ConfigError."""
    metrics, checks = Metrics("client"), Checks()
    register(
        metrics,
        sessions,
        lambda: [proxy.endpoint.stats for proxy in proxies if proxy.endpoint is not None],
        lambda: forwards,
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


def register(
    metrics: Metrics,
    sessions: Sequence[SessionManager],
    endpoints: Callable[[], Sequence[EndpointStats]],
    forwards: Callable[[], Sequence[ForwardStats]],
) -> None:
    """Register everything that this role counts."""

    def local() -> list[EndpointStats | ForwardStats]:
        return [*endpoints(), *forwards()]

    metrics.gauge("sessions", "Sessions that are up.", None, lambda: sum(s.current is not None for s in sessions))
    metrics.counter("session_attempts_total", "Attempts to establish a session.", None,
                    lambda: sum(s.counters.attempts for s in sessions))  # fmt: skip
    metrics.counter("sessions_established_total", "Sessions that were established.", None,
                    lambda: sum(s.counters.established for s in sessions))  # fmt: skip
    metrics.counter("session_failures_total", "Attempts that failed and sessions that were refused.", None,
                    lambda: sum(s.counters.failures for s in sessions))  # fmt: skip
    metrics.gauge("sessions_detached", "Sessions that wait to be resumed.", None,
                  lambda: sum(s.detached_count for s in sessions))  # fmt: skip
    metrics.counter("sessions_resumed_total", "Sessions that went on over another connection, by why they had to.",
                    {"cause": ("lost", "moved")},
                    lambda: {
                        "lost": sum(s.counters.resumed for s in sessions),
                        "moved": sum(s.counters.moved for s in sessions),
                    })  # fmt: skip
    metrics.counter("resume_failures_total", "Sessions that waited in vain, by reason.", {"reason": REASONS},
                    lambda: {reason: sum(s.counters.resume_failures[reason] for s in sessions) for reason in REASONS},
                    )  # fmt: skip
    metrics.counter("replayed_bytes_total", "Bytes sent again after a resumption.", None,
                    lambda: sum(s.replayed_bytes for s in sessions))  # fmt: skip
    metrics.histogram("detached_seconds", "How long sessions waited for a connection, resumed or not.", None,
                      lambda: sum((s.counters.detached_seconds for s in sessions), Buckets(DETACHED_BOUNDS)),
                      )  # fmt: skip
    metrics.counter("local_connections_total", "Local connections by how they went.",
                    {"result": ("spliced", "refused", "stranger", "displaced", "forwarded")},
                    lambda: {
                        "spliced": sum(e.spliced for e in endpoints()),
                        "refused": sum(e.refused for e in endpoints()),
                        "stranger": sum(e.strangers for e in endpoints()),
                        "displaced": sum(e.displaced for e in endpoints()),
                        "forwarded": sum(f.accepted for f in forwards()),
                    })  # fmt: skip
    metrics.counter("local_resets_total", "Local connections that were cut.", None,
                    lambda: sum(e.resets for e in endpoints()) + sum(f.failed for f in forwards()))  # fmt: skip
    metrics.gauge("local_connections", "Local connections that are open.", None,
                  lambda: sum(one.open for one in local()))  # fmt: skip
    metrics.counter("local_bytes_total", "Bytes of finished local connections, by direction.",
                    {"direction": ("up", "down")},
                    lambda: {
                        "up": sum(one.bytes_to_cluster for one in local()),
                        "down": sum(one.bytes_from_cluster for one in local()),
                    })  # fmt: skip
