"""A relay that meddles with what it carries: TLS finds that out, and no answer holds an altered byte
(docs/threats.md#B1, docs/threats.md#B2, docs/threats.md#B6).

The lie is about one TLS record: of the handshake, of the login, or of an answer. In the first two cases the session
does not begin; in the last one it goes on over another connection, and the answer is whole.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.session import connection as client_connection
from arcbridge.client.session import connector, session_manager
from arcbridge.errors import Unreachable
from arcbridge.wire.limits import Limits
from tests.hostile import wire_lies as lies
from tests.hostile.organisation import ALICE, BOB, Organisation
from tests.hostile.relay_lies import CrossingPumps
from tests.hostile.wire_lies import TO_AGENT, TO_CLIENT, MeddlingPumps, OnRecord, Wire

ALTERED = "bytes were altered on the way between client and agent, which TLS found out"
BIG = 8000
"""Lines of a large answer: 200 KiB, in a dozen records."""


@pytest.fixture(autouse=True)
def _quick_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing else follows a record that was left out, the next PING shows it: in 10 s at the latest."""
    monkeypatch.setattr(connector, "DEFAULT", Limits(ping_interval=0.3))


def on_wire(make: Callable[[int], Wire]) -> tuple[dict[str, Any], list[MeddlingPumps]]:
    """The relay's lies, and the pumps that it makes."""
    made: list[MeddlingPumps] = []

    def pumps(*args: Any, **settings: Any) -> MeddlingPumps:
        made.append(MeddlingPumps(*args, wire=make, **settings))
        return made[-1]

    return {"Pumps": pumps}, made


def reasons(org: Organisation) -> str:
    """Every reason that any role has logged."""
    return "\n".join(str(one.get("reason", "")) for one in org.logs)


ACTS = [lies.flip, lies.drop, lies.duplicate, lies.insert]


@pytest.mark.parametrize("number", [0, 2, 3], ids=["hello", "handshake", "finished"])
@pytest.mark.parametrize("direction", [TO_AGENT, TO_CLIENT])
@pytest.mark.parametrize("act", ACTS, ids=lambda act: str(act.__name__))
async def test_a_handshake_that_was_altered(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[bytes], Iterable[bytes]],
    direction: str,
    number: int,
) -> None:
    # The first and the last flight: no byte comes behind it that could show what is missing.
    silent = act is lies.drop and direction == TO_AGENT and number in (0, 3)
    if silent:
        monkeypatch.setattr(client_connection, "HANDSHAKE_DEADLINE", 1.0)
    relay, made = on_wire(lambda pair: OnRecord(direction=direction, when=lambda n, _: n == number, act=act))
    async with Organisation.running(tmp_path, relay=relay) as org:
        with pytest.raises(Unreachable) as caught:
            async with org.client():
                pytest.fail("it began")
        assert made[0].wires[0].acted, "the lie was told"
        if silent:
            assert caught.value.message == 'the agent of cluster "prod" did not answer in time; try again'
        else:
            await org.until(lambda: ALTERED in caught.value.message + reasons(org), "an end names the lie")
        assert 'cluster "prod"' in caught.value.message
        assert org.requests == []


@pytest.mark.parametrize("direction", [TO_AGENT, TO_CLIENT])
@pytest.mark.parametrize("act", [*ACTS, lies.truncate, lies.end], ids=lambda act: str(act.__name__))
async def test_an_answer_that_was_altered_comes_whole_over_another_connection(
    tmp_path: Path, act: Callable[[bytes], Iterable[bytes]], direction: str
) -> None:
    armed: list[bool] = []
    relay, made = on_wire(
        lambda pair: OnRecord(
            direction=direction, when=lambda _, record: bool(armed) and pair == 0 and len(record) > 60, act=act
        )
    )
    async with Organisation.running(tmp_path, relay=relay) as org, org.client() as alice:
        org.clusters["prod"].api.repeats = BIG
        assert (await alice.get()).status == 200
        armed.append(True)
        # Two: where the record of one is dropped, that of the other shows it.
        answers = await asyncio.gather(alice.get(), alice.get())
        assert made[0].wires[0].acted, "the lie was told"
        assert [answer.status for answer in answers] == [200, 200]
        assert len(made[0].wires) == 2
        if act in ACTS:
            detecting = "session detached" if direction == TO_AGENT else "connection lost, waiting to resume"
            (told,) = org.said(detecting)
            assert told["reason"].startswith(ALTERED)
            assert told["log_level"] == "warning"
        assert len(org.said("session resumed", epoch=1)) == 1
        # What the relay saw of all this holds no secret and no word of either end.
        seen = b"".join(bytes(wire.passed[way]) for wire in made[0].wires for way in (TO_AGENT, TO_CLIENT))
        assert len(seen) > 500_000
        for secret in (b"/tagged/prod/alice", ALICE.token("cluster").encode()[:60], b"Bearer"):
            assert secret not in seen


@pytest.mark.parametrize("act", [lies.truncate, lies.end], ids=lambda act: str(act.__name__))
async def test_an_answer_that_is_cut_for_good_never_looks_whole(
    tmp_path: Path, act: Callable[[bytes], Iterable[bytes]]
) -> None:
    """Nothing is resumed: kubectl's connection is reset, and no prefix is taken for the answer."""
    armed: list[bool] = []
    relay, made = on_wire(
        # The first of the body: records are full ones on a fast path, and of some thousand bytes on a slow one.
        lambda pair: OnRecord(direction=TO_CLIENT, when=lambda _, record: bool(armed) and len(record) > 1_000, act=act)
    )
    async with Organisation.running(tmp_path, relay=relay) as org, org.client(resumption=False) as alice:
        org.clusters["prod"].api.repeats = BIG
        assert (await alice.get()).status == 200
        armed.append(True)
        answer = await alice.get()
        assert made[0].wires[0].acted
        assert answer.status == 0
        assert len(answer.body) < BIG * len("/tagged/prod/alice/2|alice\n")
        await org.until(lambda: org.said("session lost"), "the client says so")
        assert org.said("session lost")[0]["reason"] == "the other end closed the connection"


@pytest.mark.parametrize("direction", [TO_AGENT, TO_CLIENT])
async def test_records_in_another_order(tmp_path: Path, direction: str) -> None:
    class Reorders(Wire):
        held: bytes = b""
        done = False

        async def pass_on(self, way: str, number: int, record: bytes) -> Iterable[bytes]:
            if way != direction or not armed or self.done or self.number:
                return (record,)
            if not self.held:
                self.held = record
                return ()
            self.done = True
            return (record, self.held)

    armed: list[bool] = []
    relay, _ = on_wire(lambda pair: Reorders())
    async with Organisation.running(tmp_path, relay=relay) as org, org.client() as alice:
        org.clusters["prod"].api.repeats = BIG
        assert (await alice.get()).status == 200
        armed.append(True)
        answers = await asyncio.gather(alice.get(), alice.get())
        assert [answer.status for answer in answers] == [200, 200]
        assert ALTERED in reasons(org)


async def test_a_relay_that_alters_every_connection_is_named_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_manager, "DETACHED_WAIT", 0.2)
    armed: list[bool] = []
    relay, _ = on_wire(
        lambda pair: OnRecord(
            direction=TO_CLIENT, when=lambda number, record: bool(armed) and (pair == 0 or number == 3), act=lies.flip
        )
    )
    async with Organisation.running(tmp_path, relay=relay) as org, org.client() as alice:
        assert (await alice.get()).status == 200
        armed.append(True)
        hanging = asyncio.ensure_future(alice.get())
        await org.until(lambda: org.said("connection lost, waiting to resume"), "the session waits")
        answer = await alice.get()  # told once a try has failed that long after the loss
        assert answer.status == 503
        assert answer.sentence.startswith(f'arcbridge: the connection to cluster "prod" was lost: {ALTERED}')
        assert "tell the relay's operator" in answer.sentence
        armed.clear()
        assert (await hanging).status == 200, "the first one was never answered with anything else"


async def test_beside_an_honest_relay_a_lying_one_is_left(tmp_path: Path) -> None:
    """A session that begins at the relay that alters everything, or moves there, ends up at the other one."""
    armed: list[bool] = []
    relay, made = on_wire(
        lambda pair: OnRecord(
            direction=TO_CLIENT, when=lambda _, record: bool(armed) and len(record) > 60, act=lies.flip
        )
    )
    async with Organisation.running(tmp_path, relay=relay, honest_relay=True) as org:
        for _ in range(20):  # a client begins at a relay of its own choice
            async with org.client() as alice:
                if not made[0].wires:
                    continue
                armed.append(True)
                for _ in range(3):
                    assert (await alice.get()).status == 200
                break
        else:
            pytest.fail("no client came to the first relay")
        assert len(org.said("session resumed", epoch=1)) == 1
        assert org.said("connection lost, waiting to resume")[0]["reason"].startswith(ALTERED)
        assert len(made[0].wires) == 1, "it did not come back to the relay that lied"
        async with org.client() as alice:
            assert (await alice.get()).status == 200


async def test_delays_change_nothing(tmp_path: Path) -> None:
    class Slow(Wire):
        async def pass_on(self, way: str, number: int, record: bytes) -> Iterable[bytes]:
            await asyncio.sleep(0.005)
            return (record,)

    relay, _ = on_wire(lambda pair: Slow())
    async with Organisation.running(tmp_path, relay=relay) as org, org.client() as alice:
        org.clusters["prod"].api.repeats = BIG
        assert [one.status for one in await asyncio.gather(*(alice.get() for _ in range(5)))] == [200] * 5


async def test_a_relay_that_holds_everything_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Holds(Wire):
        async def pass_on(self, way: str, number: int, record: bytes) -> Iterable[bytes]:
            return ()

    monkeypatch.setattr(client_connection, "HANDSHAKE_DEADLINE", 0.3)
    relay, _ = on_wire(lambda pair: Holds())
    async with Organisation.running(tmp_path, relay=relay) as org:
        with pytest.raises(Unreachable) as caught:
            async with org.client():
                pytest.fail("it began")
        assert caught.value.message == 'the agent of cluster "prod" did not answer in time; try again'


async def test_a_relay_that_goes_silent_is_found_by_pings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Wire):
        async def pass_on(self, way: str, number: int, record: bytes) -> Iterable[bytes]:
            return () if armed and self.number == 0 else (record,)

    armed: list[bool] = []
    monkeypatch.setattr(connector, "DEFAULT", Limits(ping_interval=0.2, ping_timeout=3.0))
    relay, _ = on_wire(lambda pair: Silent())
    async with Organisation.running(tmp_path, relay=relay) as org, org.client() as alice:
        assert (await alice.get()).status == 200
        armed.append(True)
        assert (await alice.get()).status == 200
        (told,) = org.said("connection lost, waiting to resume")
        assert told["reason"].startswith("the connection is dead: ")


async def test_b2_users_whose_connections_are_crossed_before_the_login(tmp_path: Path) -> None:
    sentence = (
        'the relay joined you to an agent of cluster "prod" that came for another user; if it happens again, tell the '
        "relay's operator"
    )
    async with Organisation.running(tmp_path, relay={"Pumps": CrossingPumps}) as org:

        async def start(person: Any) -> None:
            async with org.client(person):
                pytest.fail("it began")

        found = await asyncio.gather(start(ALICE), start(BOB), return_exceptions=True)
        assert [getattr(one, "message", one) for one in found] == [sentence, sentence]
        await org.until(lambda: len(org.said("session refused")) >= 2, "the agent has refused both")
        refused = org.said("session refused")
        assert {one["reason"] for one in refused} == {
            "the client was joined under another id than this agent: the relay has crossed two joins"
        }
        assert len(refused) == 2
        assert org.said("session opened") == []
        assert org.requests == []


async def test_b2_users_whose_connections_are_crossed_within_their_sessions(tmp_path: Path) -> None:
    relay, made = on_wire(lambda pair: Wire())
    async with Organisation.running(tmp_path, relay=relay) as org, org.client(ALICE) as alice, org.client(BOB) as bob:
        org.clusters["prod"].api.repeats = BIG
        assert [(await one.get()).status for one in (alice, bob)] == [200, 200]
        made[0].cross()
        answers = await asyncio.gather(*(one.get() for one in (alice, bob) for _ in range(3)))
        assert [answer.status for answer in answers] == [200] * 6
        assert ALTERED in reasons(org)
        # The first that is found out ends the crossing: the other may have had no byte under way. A session that had
        # no stream by then begins anew.
        await org.until(
            lambda: org.said("session resumed", epoch=1) or len(org.said("session opened")) > 2, "it goes on elsewhere"
        )


async def test_b2_a_recorded_session_that_is_played_to_the_agent(tmp_path: Path) -> None:
    class Replays(Wire):
        """Sends what an earlier client said in the place of this one's words."""

        played = False

        async def pass_on(self, way: str, number: int, record: bytes) -> Iterable[bytes]:
            if self.number == 0 or way == TO_CLIENT:
                return (record,)
            if self.played:
                return ()
            self.played = True
            return (bytes(made[0].wires[0].passed[TO_AGENT]),)

    relay, made = on_wire(lambda pair: Replays())
    async with Organisation.running(tmp_path, relay=relay) as org:
        async with org.client(ALICE) as alice:
            assert (await alice.get()).status == 200
        with pytest.raises(Unreachable):
            async with org.client(BOB):
                pytest.fail("it began")
        await org.until(lambda: ALTERED in reasons(org), "an end names the lie")
        assert len(org.said("session opened")) == 1, "the recording opened no session"
        assert len(org.requests) == 1, "and repeated no request"


async def test_b2_a_recorded_session_that_is_played_to_the_client(tmp_path: Path) -> None:
    class Replays(Wire):
        """Plays what an agent once said to a later client."""

        async def pass_on(self, way: str, number: int, record: bytes) -> Iterable[bytes]:
            if self.number and way == TO_CLIENT:
                return (bytes(made[0].wires[0].passed[TO_CLIENT]),) if number == 0 else ()
            return (record,)

    relay, made = on_wire(lambda pair: Replays())
    async with Organisation.running(tmp_path, relay=relay) as org:
        async with org.client(ALICE) as alice:
            assert (await alice.get()).status == 200
        with pytest.raises(Unreachable) as caught:
            async with org.client(ALICE):
                pytest.fail("it began")
        assert caught.value.message.startswith(f'the connection to cluster "prod" was lost: {ALTERED}')
        assert len(org.requests) == 1


@pytest.mark.parametrize("direction", [TO_AGENT, TO_CLIENT])
async def test_b2_records_of_the_session_that_are_played_again(tmp_path: Path, direction: str) -> None:
    """An exec, a POST, an AUTH: whatever a record holds, a second one ends the connection and does nothing."""
    armed: list[bool] = []

    class Replays(Wire):
        done = False

        async def pass_on(self, way: str, number: int, record: bytes) -> Iterable[bytes]:
            if way != direction or not armed or self.number or self.done:
                return (record,)
            self.done = True
            whole = bytes(self.passed[direction])
            last = whole[len(whole) - 2 * len(record) :][: len(record)]
            return (record, last)

    relay, _ = on_wire(lambda pair: Replays())
    async with Organisation.running(tmp_path, relay=relay) as org, org.client() as alice:
        assert (await alice.get()).status == 200
        armed.append(True)
        assert (await alice.get()).status == 200
        assert (await alice.get()).status == 200
        await org.until(lambda: ALTERED in reasons(org), "an end names the lie")
        targets = [request.target for request in org.requests]
        assert len(targets) == len(set(targets)) == 3
