"""What the client counts, as a scrape sees it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from arcbridge.client.endpoint import EndpointStats
from arcbridge.client.forward import ForwardStats
from arcbridge.client.metrics import register
from arcbridge.observe.metrics import Metrics


def test_sums() -> None:
    sessions = [
        SimpleNamespace(current=object(), attempts=2, established_count=1, failures=1),
        SimpleNamespace(current=None, attempts=1, established_count=0, failures=1),
    ]
    endpoint, forward = EndpointStats(), ForwardStats()
    endpoint.spliced, endpoint.strangers, endpoint.bytes_up, endpoint.open = 3, 1, 100, 2
    forward.accepted, forward.bytes_up, forward.failed = 5, 11, 1
    metrics = Metrics("client")
    register(metrics, cast(Any, sessions), lambda: [endpoint], lambda: [forward])
    text = metrics.render()[0].decode()
    for line in (
        "arcbridge_client_sessions 1.0",
        "arcbridge_client_session_attempts_total 3.0",
        "arcbridge_client_session_failures_total 2.0",
        'arcbridge_client_local_connections_total{result="spliced"} 3.0',
        'arcbridge_client_local_connections_total{result="stranger"} 1.0',
        'arcbridge_client_local_connections_total{result="forwarded"} 5.0',
        "arcbridge_client_local_connections 2.0",
        'arcbridge_client_local_bytes_total{direction="up"} 111.0',
        "arcbridge_client_local_resets_total 1.0",
    ):
        assert f"\n{line}\n" in text
