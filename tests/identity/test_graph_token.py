"""The own token for Microsoft Graph: one request for all, delays after failures, recovery (docs/threats.md#T56)."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from arcbridge.errors import Unreachable
from arcbridge.identity import graph_token
from arcbridge.identity.fetch import Reply
from arcbridge.identity.graph_token import DEFAULT_LIFE, FIRST_DELAY, MARGIN, MOST_ASKED_FOR, MOST_SPREAD, GraphToken
from arcbridge.identity.refusal import GroupsUnavailable
from arcbridge.settings.config import GraphConfig
from tests.support.clock import Clock


@dataclass
class Endpoint:
    """A token endpoint that does what it is told."""

    status: int = 200
    answer: dict[str, Any] = field(default_factory=dict)
    retry_after: float | None = None
    down: bool = False
    secrets: list[str] = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.open.set()

    async def __call__(
        self, method: str, url: str, ca_pem: str | None, *, headers: Mapping[str, str], body: bytes = b""
    ) -> Reply:
        self.secrets.append(body.decode().partition("client_secret=")[2].partition("&")[0])
        await self.open.wait()
        if self.down:
            raise Unreachable("login.example: down")
        given = {"access_token": f"token-{len(self.secrets)}", "expires_in": 3600}
        document = given | self.answer if self.status == 200 else {"error": "invalid_client"}
        return Reply(self.status, json.dumps(document).encode(), self.retry_after)

    @property
    def asked(self) -> int:
        return len(self.secrets)


@dataclass
class End:
    """An own token, with its endpoint, clock and credential. `draw` is what the jitter draws."""

    directory: Path
    endpoint: Endpoint = field(default_factory=Endpoint)
    clock: Clock = field(default_factory=Clock)
    draw: float = 0.0

    def __post_init__(self) -> None:
        self.secret = self.directory / "secret"
        self.secret.write_text("old")
        self.told = 0
        self.token = GraphToken(
            "graph.example",
            GraphConfig(client_id="reader", client_secret_file=self.secret),
            "https://login.example/token",
            "https://graph.example/.default",
            None,
            self.endpoint,
            clock=self.clock,
            monotonic=self.clock,
            draw=lambda: self.draw,
        )
        self.token.on_failure = self._tell

    def _tell(self) -> None:
        self.told += 1

    async def why(self) -> str:
        with pytest.raises(GroupsUnavailable) as caught:
            await self.token.get()
        return caught.value.detail


@pytest.fixture
def end(tmp_path: Path) -> End:
    return End(tmp_path)


async def test_one_request_serves_all(end: End) -> None:
    assert await asyncio.gather(*(end.token.get() for _ in range(20))) == ["token-1"] * 20
    assert (end.endpoint.asked, end.token.granted, end.token.failed) == (1, 1, 0)


async def test_t56_a_credential_that_is_refused_is_not_shown_again_for_each_user(end: End) -> None:
    end.endpoint.status = 401
    said = await asyncio.gather(*(end.why() for _ in range(20)))
    assert set(said) == {
        "the application reader of graph.example gets no token for Microsoft Graph (status 401, invalid_client); it is "
        "asked for again in 5 s"
    }
    for _ in range(20):
        await end.why()
    assert (end.endpoint.asked, end.token.failed, end.told) == (1, 1, 1)
    assert end.token.failure is not None
    assert end.token.failure.code == "graph_credential"


@pytest.mark.parametrize(("draw", "spread"), [(0.0, 0.0), (1.0, 1.0)])
async def test_t56_delays_grow_with_jitter_and_have_a_bound(end: End, draw: float, spread: float) -> None:
    end.endpoint.status, end.draw = 401, draw
    for n in range(8):
        await end.why()
        assert end.endpoint.asked == n + 1
        delay = FIRST_DELAY + spread * min(FIRST_DELAY * 2**n, MOST_SPREAD)
        end.clock.now += delay - 0.01
        await end.why()
        assert end.endpoint.asked == n + 1, "not yet"
        end.clock.now += 0.01
    assert delay <= FIRST_DELAY + MOST_SPREAD


async def test_t56_it_recovers_by_itself(end: End) -> None:
    end.endpoint.status = 401
    await end.why()
    end.endpoint.status = 200
    await end.why()
    end.clock.now += FIRST_DELAY
    assert await end.token.get() == "token-2"
    assert end.token.failure is None
    end.endpoint.status = 401
    end.clock.now += 3600
    await end.why()
    end.clock.now += FIRST_DELAY
    await end.why()
    assert end.endpoint.asked == 4, "the first delay again"


async def test_a_new_credential_is_tried_at_once(end: End) -> None:
    end.endpoint.status = 401
    await end.why()
    end.endpoint.status = 200
    end.secret.write_text("new")
    os.utime(end.secret, ns=(1, 1))
    assert await end.token.get() == "token-2"
    assert end.endpoint.secrets == ["old", "new"]


async def test_a_credential_that_cannot_be_read_is_not_shown_and_costs_no_request(end: End) -> None:
    end.secret.unlink()
    assert "graph.example.client_secret_file: " in await end.why()
    assert (end.endpoint.asked, end.token.failed) == (0, 1)
    end.secret.write_text("old")
    assert await end.token.get() == "token-1"


@pytest.mark.parametrize(
    ("given", "least"), [(None, FIRST_DELAY), (1.0, FIRST_DELAY), (30.0, 30.0), (86400.0, MOST_ASKED_FOR)]
)
async def test_an_endpoint_that_names_a_time_is_left_alone_for_it(end: End, given: float | None, least: float) -> None:
    end.endpoint.status, end.endpoint.retry_after = 429, given
    assert "(status 429, invalid_client)" in await end.why()
    assert end.token.failure is not None
    assert end.token.failure.code == "graph_unreachable"
    end.endpoint.status = 200
    end.clock.now += least - 0.01
    await end.why()
    end.clock.now += 0.01
    assert await end.token.get() == "token-2"


async def test_an_endpoint_that_is_down_is_not_dialled_for_each_user(end: End) -> None:
    end.endpoint.down = True
    for _ in range(5):
        assert "the token endpoint for Microsoft Graph does not answer (login.example: down)" in await end.why()
    assert end.endpoint.asked == 1


async def test_t56_an_endpoint_that_stalls_is_named_and_holds_up_its_users_once(
    end: End, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_token, "DEADLINE", 0.01)
    end.endpoint.open.clear()
    said = await asyncio.gather(*(end.why() for _ in range(10)))
    assert all("the token endpoint for Microsoft Graph did not answer within" in one for one in said)
    await end.why()
    assert end.endpoint.asked == 1


async def test_a_user_who_leaves_does_not_end_the_request_of_the_others(end: End) -> None:
    end.endpoint.open.clear()
    first, second = (asyncio.create_task(end.token.get()) for _ in range(2))
    while not end.endpoint.asked:
        await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)
    end.endpoint.open.set()
    assert await second == "token-1"
    assert end.endpoint.asked == 1


async def test_it_is_renewed_before_its_end_and_used_until_then(end: End) -> None:
    await end.token.get()
    end.clock.now += 3600 - MARGIN
    end.endpoint.status = 401
    assert await end.token.get() == "token-1"
    assert await end.token.look() is not None
    assert end.token.usable
    assert await end.token.get() == "token-1", "good until its end"
    end.clock.now += MARGIN
    assert "gets no token" in await end.why()
    end.endpoint.status = 200
    end.clock.now += MOST_SPREAD + FIRST_DELAY
    assert await end.token.look() is None
    assert end.token.usable


async def test_a_token_that_graph_refuses_is_renewed_once_and_then_waited_for(end: End) -> None:
    first = await end.token.get()
    second = await end.token.get(refused=first)
    assert (second, await end.token.get(refused=first)) == ("token-2", "token-2"), "another user renewed it"
    end.token.reject(second, "Microsoft Graph refuses it")
    assert await end.why() == "Microsoft Graph refuses it; it is asked for again in 5 s"
    assert end.endpoint.asked == 2
    end.clock.now += FIRST_DELAY
    third = await end.token.get()
    end.token.reject(third, "Microsoft Graph refuses it")
    end.draw = 1.0
    end.clock.now += FIRST_DELAY
    fourth = await end.token.get()
    end.token.reject(fourth, "Microsoft Graph refuses it")
    end.clock.now += FIRST_DELAY + 4 * FIRST_DELAY - 0.01
    await end.why()
    end.clock.now += 0.01
    assert await end.token.get() == "token-5", "a token that is granted and refused does not make the delays short"
    end.token.accepted()
    end.token.reject("token-5", "Microsoft Graph refuses it")
    end.clock.now += 2 * FIRST_DELAY
    assert await end.token.get() == "token-6"


LIVES: list[tuple[Any, float]] = [
    (None, DEFAULT_LIFE),
    ("3600", DEFAULT_LIFE),
    (True, DEFAULT_LIFE),
    (0, DEFAULT_LIFE),
    (-5, DEFAULT_LIFE),
    (1e300, graph_token.MOST_LIFE),
    (10**99, graph_token.MOST_LIFE),
    (60, 60.0),
]


@pytest.mark.parametrize(("life", "lasts"), LIVES, ids=range(len(LIVES)))
async def test_a_life_that_is_none_is_not_believed(end: End, life: Any, lasts: float) -> None:
    end.endpoint.answer = {"expires_in": life}
    await end.token.get()
    end.clock.now += lasts - 0.01
    assert end.token.usable
    end.clock.now += 0.01
    assert not end.token.usable


@pytest.mark.parametrize("token", [None, "", 7, "a b", "a\r\nX: y", "é", "x" * 40_000], ids=range(7))
async def test_what_is_no_token_is_put_into_no_header(end: End, token: Any) -> None:
    end.endpoint.answer = {"access_token": token}
    assert "gets no token for Microsoft Graph (status 200)" in await end.why()


async def test_an_end_leaves_nothing_running(end: End) -> None:
    end.endpoint.open.clear()
    waiting = asyncio.create_task(end.token.get())
    while not end.endpoint.asked:
        await asyncio.sleep(0)
    await end.token.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
