"""An attempt sends the cluster's token to an agent whose CA is trusted alone, and none comes in a loop."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.credentials.token_cache import TokenSet
from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.session import connector
from arcbridge.client.session.connection import Joined
from arcbridge.client.session.connector import HOLD_FIRST, HOLD_LONGEST, RevocationHold
from arcbridge.client.session.trust import ClusterTrust
from arcbridge.errors import (
    ArcbridgeError,
    ConnectionLost,
    PermissionRefused,
    PinMismatch,
    SessionEnded,
    Unauthenticated,
)
from arcbridge.pki.pins import PinStore
from arcbridge.refusals import Refusal, RefusalRule
from arcbridge.settings.config import LoginConfig
from arcbridge.wire.frames import GoawayCode
from tests.client.credentials.test_tokens import Pair
from tests.client.far_side import CLUSTER, CLUSTER_CA, OTHER_CA, FarSide
from tests.client.session.test_session_manager import jwt_like, make, running
from tests.support.eventually import until


async def test_a_try_that_waits_for_a_handover_ends_with_the_attempt(
    far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = make(far, tmp_path)

    def tries() -> list[asyncio.Task[Any]]:
        return [task for task in asyncio.all_tasks() if "_try_until_attached" in repr(task.get_coro())]

    async def broken(joined: Joined, *_: object) -> None:
        (pending,) = session.connector.sessions
        session.move_requested(pending)  # as if MOVE came in this flight
        assert tries()
        raise ConnectionLost("the connection broke")

    monkeypatch.setattr(connector, "shake_hands", broken)
    with pytest.raises(ArcbridgeError):
        await session.connect_once()
    await until(lambda: not tries())


async def test_a_refused_token_of_a_login_is_the_one_that_was_sent(
    far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the attempt has it: it is in no file."""
    identity = jwt_like(3600, aud="the-clusters")
    tokens = Tokens(LoginConfig(), Pair(TokenSet("the-access-token", identity)))

    async def refused(*_: object) -> None:
        refusal = Refusal(RefusalRule.TOKEN_AUD, "another")
        raise SessionEnded(GoawayCode.UNAUTHENTICATED, "words", refusal=refusal)

    monkeypatch.setattr(connector, "shake_hands", refused)
    with pytest.raises(Unauthenticated) as caught:
        await make(far, tmp_path, tokens=tokens).connect_once()
    assert 'the token is for audience "the-clusters", its agent wants "another"' in caught.value.message
    assert "ARCBRIDGE_CLUSTER_AUDIENCE" in caught.value.message


class TestTrust:
    async def test_no_token_before_the_pin(self, far: FarSide, tmp_path: Path) -> None:
        session = make(far, tmp_path, trust=ClusterTrust(pin=OTHER_CA.pin))
        with pytest.raises(PinMismatch) as caught:
            await session.connect_once()
        assert CLUSTER_CA.pin in caught.value.message
        assert OTHER_CA.pin in caught.value.message
        assert far.auths == []
        assert all(session.peer_hello is None for session in far.sessions)

    async def test_no_token_for_an_agent_of_another_ca(self, far: FarSide, tmp_path: Path) -> None:
        far.shows_ca = OTHER_CA
        with pytest.raises(PinMismatch, match="not certified by its CA"):
            await make(far, tmp_path).connect_once()
        assert far.auths == []

    async def test_unknown_and_no_user_to_ask(self, far: FarSide, tmp_path: Path) -> None:
        with pytest.raises(PinMismatch, match="--trust-first-use"):
            await make(far, tmp_path, trust=ClusterTrust()).connect_once()
        assert far.auths == []

    async def test_asked_once_and_remembered(self, far: FarSide, tmp_path: Path) -> None:
        asked = []

        async def ask(cluster: str, pin: str) -> bool:
            asked.append((cluster, pin))
            return True

        def trust() -> ClusterTrust:
            return ClusterTrust(remembered=PinStore(tmp_path / "pins.toml"), ask=ask)

        for _ in range(2):
            async with running(make(far, tmp_path, trust=trust())) as session:
                await session.ready()
        assert asked == [(CLUSTER, CLUSTER_CA.pin)]
        far.says_ca = far.shows_ca = OTHER_CA
        with pytest.raises(PinMismatch):
            await make(far, tmp_path, trust=trust()).connect_once()

    async def test_refused_by_the_person(self, far: FarSide, tmp_path: Path) -> None:
        async def ask(cluster: str, pin: str) -> bool:
            return False

        store = PinStore(tmp_path / "pins.toml")
        with pytest.raises(PinMismatch, match="was not trusted"):
            await make(far, tmp_path, trust=ClusterTrust(remembered=store, ask=ask)).connect_once()
        assert store.get(CLUSTER) is None

    async def test_first_use(self, far: FarSide, tmp_path: Path) -> None:
        store = PinStore(tmp_path / "pins.toml")
        async with running(make(far, tmp_path, trust=ClusterTrust(remembered=store, first_use=True))) as session:
            await session.ready()
        assert store.get(CLUSTER) == CLUSTER_CA.pin


ERROR = PermissionRefused("revoked")


def test_v18_the_wait_doubles_up_to_a_minute() -> None:
    hold = RevocationHold()
    assert hold.refusal("t", 0.0) is None
    now, waits = 100.0, []
    for _ in range(7):
        hold.begin(ERROR, "t", now)
        began = now
        assert hold.refusal("t", now) is ERROR
        while hold.refusal("t", now) is not None:
            now += 1.0
        waits.append(now - began)
    assert waits == [5.0, 10.0, 20.0, 40.0, 60.0, 60.0, 60.0]
    assert (waits[0], waits[-1]) == (HOLD_FIRST, HOLD_LONGEST)
    assert hold.error is ERROR, "until a session is established no attempt is made without a caller"


def test_v18_another_token_is_tried_at_once_and_an_unknown_one_waits() -> None:
    hold = RevocationHold()
    hold.begin(ERROR, "old", 0.0)
    assert hold.refusal("old", 1.0) is ERROR
    assert hold.refusal("new", 1.0) is None
    assert hold.refusal("", 1.0) is ERROR, "a login would be asked for one"
    hold.begin(ERROR, "new", 1.0)
    assert hold.refusal("new", 10.0) is ERROR, "the wait has doubled"
    hold.begin(ERROR, "", 100.0)
    assert hold.refusal("", 101.0) is ERROR


def test_a_session_ends_it() -> None:
    hold = RevocationHold()
    hold.begin(ERROR, "t", 0.0)
    hold.begin(ERROR, "t", 6.0)
    hold.end()
    assert hold.error is None
    assert hold.refusal("t", 7.0) is None
    hold.begin(ERROR, "t", 10.0)
    assert hold.refusal("t", 10.0 + HOLD_FIRST) is None


def test_it_shows_no_token() -> None:
    hold = RevocationHold()
    hold.begin(ERROR, "canary-token", 0.0)
    assert "canary" not in repr(hold)
