"""What a gateway counts."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, cast

import aiohttp

from arcbridge.client.serving.gateway.observation import observe_gateway


class Sessions(list[int]):
    def __init__(self, of: list[int]) -> None:
        super().__init__(of)
        self.requests, self.attempts = 4, Counter(established=2, limited=1)


async def test_metrics_and_health() -> None:
    server = SimpleNamespace(open={1, 2, 3}, requests=Counter(passed_on=7, refused=2))

    observer = await observe_gateway("127.0.0.1:0", cast(Any, server), cast(Any, Sessions([1, 2])))
    try:
        async with aiohttp.ClientSession(f"http://{observer.address}") as client:
            async with client.get("/readyz") as answer:
                assert answer.status == 200
            async with client.get("/metrics") as answer:
                lines = (await answer.text()).splitlines()
    finally:
        await observer.stop()
    for line in (
        "arcbridge_client_gateway_connections 3.0",
        "arcbridge_client_gateway_sessions 2.0",
        "arcbridge_client_gateway_requests_under_way 4.0",
        'arcbridge_client_gateway_requests_total{result="passed_on"} 7.0',
        'arcbridge_client_gateway_requests_total{result="upgraded"} 0.0',
        'arcbridge_client_gateway_new_sessions_total{result="limited"} 1.0',
    ):
        assert line in lines
