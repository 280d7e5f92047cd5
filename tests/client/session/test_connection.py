"""Joins through several relays, and the handshake behind them, over real sockets: what is tried, and what is left."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.relay import relays as relays_module
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays
from arcbridge.client.session.connection import ClusterAccess, Joined, join
from arcbridge.errors import ArcbridgeError, PermissionRefused, PinMismatch, Unauthenticated, Unreachable
from arcbridge.net.join import JoinCode
from arcbridge.pki.rotation import Rotation
from arcbridge.wire.records import JoinReply
from tests.client.far_side import CLUSTER, OTHER_CA, RELAY_CA, FarSide
from tests.client.session.test_session_manager import login, make
from tests.support.descriptors import held
from tests.support.eventually import until


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A relay that is only slow, as on a busy machine, is waited for: what is tried is what the tests say."""
    monkeypatch.setattr(relays_module, "HEAD_START", 60.0)


class Way:
    def __init__(self, directory: Path, *sides: FarSide) -> None:
        ca_file = directory / "relay-ca.pem"
        ca_file.write_text(RELAY_CA.certificate_pem)
        self.tokens = Tokens(login(directory), None)
        self.relays = Relays([RelayAccess(side.address, ca_file=ca_file) for side in sides], draw=lambda: 0.0)

    async def join(self, **options: str) -> Joined:
        async with asyncio.timeout(20):
            return await join(ClusterAccess(self.relays, CLUSTER, self.tokens), **options)

    async def failure(self) -> ArcbridgeError:
        with pytest.raises(ArcbridgeError) as caught:
            await self.join()
        return caught.value


class TestJoin:
    async def test_the_instance_is_asked_for(self, far: FarSide, tmp_path: Path) -> None:
        joined = await Way(tmp_path, far).join(instance="pod-7")
        joined.close()
        assert far.requests[0].instance == "pod-7"

    async def test_a_client_says_which_ca_it_has_followed_the_relay_s_to(self, far: FarSide, tmp_path: Path) -> None:
        state = Rotation(RELAY_CA.certificate_pem, RELAY_CA.key_pem).take("next", time.time()).list
        way = Way(tmp_path, far)
        for far.reply in (JoinReply(), JoinReply(relay_cas=state.text), JoinReply()):
            (await way.join()).close()
        assert [request.relay_ca for request in far.requests] == ["", "", state.pins[1]]

    @pytest.mark.parametrize(
        "code",
        [
            JoinCode.NO_AGENT, JoinCode.AGENT_TIMEOUT, JoinCode.AGENT_REFUSED, JoinCode.OVERLOADED, JoinCode.DRAINING,
            JoinCode.NO_INSTANCE, JoinCode.INTERNAL, JoinCode.FORBIDDEN, JoinCode.BAD_REQUEST,
        ],
    )  # fmt: skip
    async def test_what_another_relay_may_not_say(
        self, far: FarSide, second: FarSide, tmp_path: Path, code: JoinCode
    ) -> None:
        far.reply = JoinReply(code=code)
        way = Way(tmp_path, far, second)
        joined = await way.join()
        joined.close()
        assert joined.relay is way.relays.all[1] is way.relays.in_use
        assert (len(far.requests), len(second.requests)) == (1, 1)

    async def test_a_token_that_is_not_taken(self, far: FarSide, second: FarSide, tmp_path: Path) -> None:
        far.reply = JoinReply(code=JoinCode.UNAUTHENTICATED)
        assert isinstance(await Way(tmp_path, far, second).failure(), Unauthenticated)
        assert second.requests == []

    async def test_a_dead_relay(self, far: FarSide, second: FarSide, tmp_path: Path) -> None:
        await far.stop_listening()
        joined = await Way(tmp_path, far, second).join()
        joined.close()
        assert len(second.requests) == 1

    async def test_a_relay_of_another_ca_gets_no_token(self, far: FarSide, second: FarSide, tmp_path: Path) -> None:
        other = RelayAccess(far.address, ca_pin=OTHER_CA.pin)
        way = Way(tmp_path, far, second)
        way.relays = Relays([other, way.relays.all[1]], draw=lambda: 0.0)
        joined = await way.join()
        joined.close()
        assert (len(far.requests), len(second.requests)) == (0, 1)

    @pytest.mark.parametrize("where", ["not_serving", "silent_join"])
    async def test_a_silent_relay(
        self, far: FarSide, second: FarSide, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(relays_module, "HEAD_START", 0.05)
        setattr(far, where, True)
        way = Way(tmp_path, far, second)
        joined = await way.join()
        joined.close()
        assert joined.relay is way.relays.all[1]
        assert way.relays.order() == [way.relays.all[1], way.relays.all[0]]

    async def test_nothing_is_left_of_the_losers(
        self, far: FarSide, second: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(relays_module, "HEAD_START", 0.01)
        far.not_serving = second.not_serving = True
        way = Way(tmp_path, far, second)
        before, tasks = held(), asyncio.all_tasks()
        work = asyncio.ensure_future(way.join())
        await until(lambda: len(far._sockets) + len(second._sockets) >= 2)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        for sock in far._sockets | second._sockets:
            sock.close()
        await until(lambda: held() <= before)
        await until(lambda: asyncio.all_tasks() == tasks)


class TestTheWords:
    async def test_without_a_connection_the_relay_is_named(self, far: FarSide, tmp_path: Path) -> None:
        way = Way(tmp_path, far)
        await far.stop_listening()
        words = f"the relay {way.relays.all[0].address.url} cannot be reached (connection refused); check its address"
        assert (await way.failure()).message.startswith(words)

    async def test_how_far_it_came_decides(self, far: FarSide, second: FarSide, tmp_path: Path) -> None:
        await far.stop_listening()
        second.reply = JoinReply(code=JoinCode.NO_AGENT)
        error = await Way(tmp_path, far, second).failure()
        assert isinstance(error, Unreachable)
        assert error.message == (
            'cluster "prod" has no connected agent; check that its agent runs and reaches the relay '
            "(2 relays were tried)"
        )
        far.reply = JoinReply(code=JoinCode.FORBIDDEN)
        await far.start_listening()
        error = await Way(tmp_path, far, second).failure()
        assert "no connected agent" in error.message
        second.reply = JoinReply(code=JoinCode.OVERLOADED)
        assert "no room" in (await Way(tmp_path, far, second).failure()).message
        second.reply = JoinReply(code=JoinCode.FORBIDDEN)
        assert isinstance(await Way(tmp_path, far, second).failure(), PermissionRefused)

    async def test_a_server_in_between(self, far: FarSide, second: FarSide, tmp_path: Path) -> None:
        second.reply = JoinReply(code=JoinCode.NO_AGENT)
        way = Way(tmp_path, far, second)

        async def context(alpn: str) -> object:
            raise PinMismatch("two pins")

        way.relays.all[0].context = context
        assert isinstance(await way.failure(), PinMismatch)

    async def test_hints(self, far: FarSide, second: FarSide, tmp_path: Path) -> None:
        far.reply, second.reply = (JoinReply(code=JoinCode.DRAINING, retry_after=after) for after in (20, 7))
        assert (await Way(tmp_path, far, second).failure()).retry_after == 7
        await far.stop_listening()
        assert (await Way(tmp_path, far, second).failure()).retry_after is None


class TestAFreshSession:
    async def test_a_relay_that_dies_behind_the_join(self, far: FarSide, second: FarSide, tmp_path: Path) -> None:
        """The same attempt goes on through the other relay."""
        far.dies_behind_the_join = True
        session = make(far, tmp_path, others=(second,))
        try:
            async with asyncio.timeout(20):
                await session.connect_once()
            assert (len(far.requests), len(second.requests)) == (1, 1)
        finally:
            session.close()

    async def test_every_relay_once(self, far: FarSide, second: FarSide, tmp_path: Path) -> None:
        far.dies_behind_the_join = second.dies_behind_the_join = True
        session = make(far, tmp_path, others=(second,))
        with pytest.raises(Unreachable, match="was lost"):
            await session.connect_once()
        assert (len(far.requests), len(second.requests)) == (1, 1)
