"""The listener says whether each cluster has a session, and why not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import aiohttp

from arcbridge.client.serving.endpoint import EndpointStats
from arcbridge.client.serving.local_port import ForwardStats
from arcbridge.client.serving.observation import observe, register
from arcbridge.client.session.resumable_session import SessionCounters
from arcbridge.errors import Unreachable
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.server import ObserveServer


async def test_a_cluster_is_ready_while_it_has_a_session(monkeypatch: Any) -> None:
    started: list[str] = []
    start = ObserveServer.start

    async def noted(server: ObserveServer) -> str:
        started.append(await start(server))
        return started[0]

    monkeypatch.setattr(ObserveServer, "start", noted)
    up = SimpleNamespace(cluster="up", current=object(), failure=None)
    new = SimpleNamespace(cluster="new", current=None, failure=None)
    down = SimpleNamespace(cluster="down", current=None, failure=Unreachable("no relay"))
    server = await observe("127.0.0.1:0", cast(Any, [up, new, down]))
    try:
        async with aiohttp.ClientSession() as client, client.get(f"http://{started[0]}/readyz?verbose") as answer:
            assert (await answer.text()).splitlines() == [
                "[+] session-up: ok",
                "[-] session-new: no session yet",
                "[-] session-down: no relay",
                "not ready",
            ]
    finally:
        await server.stop()


def test_sums() -> None:
    sessions = []
    for current, attempts in ((object(), 2), (None, 1)):
        counters = SessionCounters()
        counters.attempts, counters.failures, counters.established = attempts, 1, attempts - 1
        counters.resumed, counters.moved, counters.resume_failures["gone"] = 3, 2, 1
        counters.detached_seconds.observe(0.7)
        sessions.append(SimpleNamespace(current=current, counters=counters, detached_count=1, replayed_bytes=1000))
    endpoint, forward = EndpointStats(), ForwardStats()
    endpoint.spliced, endpoint.strangers, endpoint.bytes_to_cluster, endpoint.open = 3, 1, 100, 2
    endpoint.displaced = 4
    forward.accepted, forward.bytes_to_cluster, forward.failed = 5, 11, 1
    metrics = Metrics("client")
    register(metrics, cast(Any, sessions), lambda: [endpoint], lambda: [forward])
    text = metrics.render()[0].decode()
    for line in (
        "arcbridge_client_sessions 1.0",
        "arcbridge_client_session_attempts_total 3.0",
        "arcbridge_client_session_failures_total 2.0",
        "arcbridge_client_sessions_detached 2.0",
        'arcbridge_client_sessions_resumed_total{cause="lost"} 6.0',
        'arcbridge_client_sessions_resumed_total{cause="moved"} 4.0',
        'arcbridge_client_resume_failures_total{reason="gone"} 2.0',
        'arcbridge_client_resume_failures_total{reason="timeout"} 0.0',
        "arcbridge_client_replayed_bytes_total 2000.0",
        'arcbridge_client_detached_seconds_bucket{le="1.0"} 2.0',
        "arcbridge_client_detached_seconds_sum 1.4",
        'arcbridge_client_local_connections_total{result="spliced"} 3.0',
        'arcbridge_client_local_connections_total{result="stranger"} 1.0',
        'arcbridge_client_local_connections_total{result="displaced"} 4.0',
        'arcbridge_client_local_connections_total{result="forwarded"} 5.0',
        "arcbridge_client_local_connections 2.0",
        'arcbridge_client_local_bytes_total{direction="up"} 111.0',
        "arcbridge_client_local_resets_total 1.0",
    ):
        assert f"\n{line}\n" in text
