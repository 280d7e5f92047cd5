"""TCP targets are those of the list, for the users and groups of the list (docs/threats.md#H10)."""

from __future__ import annotations

import asyncio
import gc
import socket
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from arcbridge.agent import targets as targets_module
from arcbridge.agent.sessions import Sessions
from arcbridge.agent.targets import MAX_CONNECTING_OF_USER, RECORDS, TcpTargets, read_targets
from arcbridge.errors import ConfigError, SessionEnded, StreamReset
from arcbridge.limiters import TokenBucket
from arcbridge.mux.session import MuxSession
from arcbridge.settings.config import TargetConfig
from arcbridge.wire.frames import GoawayCode, ResetCode
from arcbridge.wire.limits import DEFAULT
from arcbridge.wire.records import Auth
from tests.support.clock import Clock
from tests.support.eventually import until
from tests.support.stream_io import StreamIO

from .kube.bench import RecordedAudit
from .pair import ClientSide, FakeAuthenticator, joined, make_sessions, opened, reset_of


@asynccontextmanager
async def serving(
    listed: dict[str, TargetConfig] | None = None, judge: FakeAuthenticator | None = None
) -> AsyncIterator[tuple[MuxSession, TcpTargets, RecordedAudit, Sessions, ClientSide]]:
    """A session of alice, who is in the group ops, at an agent with these targets."""
    audit = RecordedAudit()
    targets = TcpTargets(read_targets(listed or {}), audit)
    if judge is None:
        judge = FakeAuthenticator()
        judge.add("t", "alice", "ops")
    sessions, _ = make_sessions(judge, Clock(), targets)
    async with joined(sessions) as (client, handler), asyncio.timeout(60):
        yield client, targets, audit, sessions, handler
    await targets.close()


@pytest.fixture
def dialling(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Targets are dialled without end; set once one is."""
    begun = asyncio.Event()

    async def hang(*args: object, **kwargs: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr("arcbridge.agent.targets.connect", hang)
    return begun


@pytest.fixture
async def echo() -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write(b"end")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


BAD = [
    ("db", TargetConfig("a:1"), r"targets\.db: needs users or groups"),
    ("db", TargetConfig("a", users=("x",)), r"targets\.db\.address"),
    ("db", TargetConfig("", users=("x",)), r"targets\.db\.address"),
    ("a b", TargetConfig("a:1", users=("x",)), r"targets\.a b"),
    ("", TargetConfig("a:1", users=("x",)), "targets"),
]


@pytest.mark.parametrize(("name", "config", "message"), BAD, ids=range(len(BAD)))
def test_bad_settings_are_named(name: str, config: TargetConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_targets({name: config})


async def test_what_a_user_may_open_is_said_where_there_is_room() -> None:
    lists = TargetConfig("a:1", users=("alice",)), TargetConfig("a:1", users=("bob",))
    targets = TcpTargets(read_targets({"z": lists[0], "db": lists[1], "a": lists[0]}), RecordedAudit())
    sessions, _ = make_sessions(FakeAuthenticator(t="alice"), Clock(), targets)
    async with joined(sessions, alone=False) as (_, handler):
        assert handler.accepted[-1].targets == "kubernetes tcp:a tcp:z"
    targets.replace(read_targets({f"t{n}-{'x' * 50}": lists[0] for n in range(80)}))
    async with joined(sessions) as (_, handler):
        assert handler.accepted[-1].targets == "", "the frame has 4 KiB"


async def test_only_users_and_groups_of_the_list_connect(echo: str) -> None:
    listed = {"db": TargetConfig(echo, users=("bob",)), "ops": TargetConfig(echo, groups=("ops",))}
    async with serving(listed) as (client, targets, audit, *_):
        refused = opened(client, "tcp:db")
        assert await reset_of(refused) == ResetCode.FORBIDDEN

        io = opened(client, "tcp:ops")
        await io.write(b"x" * 300_000)
        io.finish()
        received = b""
        while data := await io.read():
            received += data
        assert received == b"x" * 300_000 + b"end", "half-close passes both ways"
        first, second = await audit.wait(2)
        assert (first.outcome, first.target, first.subject.user) == ("refused", "tcp:db", "alice")
        assert (second.outcome, second.bytes_up, second.bytes_down) == ("connected", 300_000, 300_003)
    assert (targets.opened, targets.open, targets.refused) == (1, 0, 1)


async def test_a_target_that_is_down() -> None:
    async with serving({"db": TargetConfig("127.0.0.1:1", users=("alice",))}) as (client, targets, audit, *_):
        io = opened(client, "tcp:db")
        await io.write(b"early")
        assert await reset_of(io) == ResetCode.CONNECT_FAILED
    assert (await audit.wait(1))[0].outcome == "refused"
    assert targets.failed == 1


@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1"])
async def test_the_error_of_a_failed_dial_does_not_wait_for_the_garbage_collector(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor do its frames, whether it fails within the call or in a task: of a target that is down there are many."""
    met: list[weakref.ref[Exception]] = []

    class Noted(targets_module._Connection):
        def _failed(self, error: Exception) -> None:
            met.append(weakref.ref(error))
            super()._failed(error)

    monkeypatch.setattr(targets_module, "_Connection", Noted)
    async with serving({"db": TargetConfig(address, users=("alice",))}) as (client, *_):
        gc.disable()
        try:
            assert await reset_of(opened(client, "tcp:db")) == ResetCode.CONNECT_FAILED
            await asyncio.sleep(0.01)
            assert [one() for one in met] == [None]
        finally:
            gc.enable()


async def test_a_caller_who_leaves_while_it_is_dialled(dialling: asyncio.Event) -> None:
    async with serving({"db": TargetConfig("db.example.test:1", users=("alice",))}) as (client, _, audit, *_):
        io = opened(client, "tcp:db")
        await asyncio.wait_for(dialling.wait(), 5)
        io.reset(ResetCode.CANCELLED)
        assert (await audit.wait(1))[0].outcome == "cut"


async def test_a12_a_target_hears_nothing_before_the_record(echo: str) -> None:
    async with serving({"ops": TargetConfig(echo, groups=("ops",))}) as (client, targets, audit, sessions, *_):
        waiting: list[Callable[[str], None]] = []
        audit.begin = lambda record, recorded: waiting.append(recorded)
        first, second, third = (StreamIO() for _ in range(3))
        for number, io in enumerate((first, second, third), 1):
            client.open("tcp:ops", io)
            await io.write(b"early")
            await until(lambda number=number: len(waiting) >= number)
        assert targets.opened == 0
        dialled = [connection._dialled for connection in targets._connections.values()]
        assert all(isinstance(sock, socket.socket) for sock in dialled), "while the records are written"
        served = list(sessions._open)
        waiting[0]("")
        assert await first.read() == b"early"
        waiting[1]("the disk is full")
        assert await reset_of(second) == ResetCode.INTERNAL
        third.transport.abort()
        await until(lambda: served[0].streams <= 1)
        waiting[2]("")
        assert targets.opened == 1
        refused, cut = await audit.wait(2)
        assert [sock.fileno() < 0 for sock in dialled if isinstance(sock, socket.socket)] == [False, True, True]
        assert (refused.outcome, refused.reason) == ("refused", "the disk is full")
        assert cut.outcome == "cut"


async def test_a20_a_connection_that_fails_leaves_its_record(echo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))

    sockets: list[socket.socket] = []

    def fail(*given: object, **__: object) -> None:
        sockets.extend(one for one in given if isinstance(one, socket.socket))
        raise RuntimeError("a defect")

    async with serving({"ops": TargetConfig(echo, groups=("ops",))}) as (client, _, audit, *_):
        for number, place in enumerate(("begin", "SocketSplice"), 1):
            with monkeypatch.context() as patch:
                patch.setattr(f"arcbridge.agent.targets.{place}", fail)
                io = opened(client, "tcp:ops")
                with pytest.raises(StreamReset):
                    await io.read()
                assert (await audit.wait(number))[-1].outcome == "failed"
                assert isinstance(told[-1], RuntimeError)
    assert [one.fileno() for one in sockets] == [-1], "the splice that was not made has left none open"
    asyncio.get_running_loop().set_exception_handler(None)


async def test_l33_of_many_refused_targets_some_leave_a_record_and_the_rest_are_counted() -> None:
    """OPENs of targets that do not exist filled the audit log: each costs its stream's share of churn, and no line."""
    async with serving() as (client, targets, audit, *_):
        last = StreamIO()
        for number in range(400):
            client.open(f"tcp:nowhere-{number}" if number % 2 else "elsewhere", last := StreamIO())
        assert await reset_of(last) == ResetCode.UNKNOWN_TARGET
        assert targets.refused == 400
    records = [record for record in audit.kept if record.verb == "connect"]
    assert RECORDS < len(records) < RECORDS + 10
    assert {record.outcome for record in records} == {"refused"}
    assert records[RECORDS].limit == "targets"
    (end,) = [record for record in audit.kept if record.verb == "limit"]
    assert (end.limit, len(records) + end.omitted) == ("targets", 400), "each is in the log, alone or in a number"


async def test_m7_opens_of_unknown_targets_end_the_session() -> None:
    async with serving() as (client, targets, _, sessions, *_):
        client._machine.stream_table.churn = TokenBucket(10**9, 0)  # a hostile client does not mind
        (handler,) = sessions._open
        handler.session._machine.stream_table.churn.rate = 0.0  # however long this takes
        opened = 0
        async with asyncio.timeout(60):
            while client.usable and opened < 5000:
                for _ in range(100):
                    if client.usable:
                        client.open("tcp:nowhere", StreamIO())
                        opened += 1
                await asyncio.sleep(0.005)
            error = await client.wait_ended()
        assert isinstance(error, SessionEnded)
        assert error.code == GoawayCode.LIMIT
        assert "before their answers" in error.message
        assert DEFAULT.churn_burst <= targets.refused <= DEFAULT.churn_burst + 500


async def test_m7_connecting_to_a_target_for_nothing_counts(echo: str) -> None:
    async with serving({"db": TargetConfig(echo, users=("alice",))}) as (client, _, audit, sessions, *_):
        (handler,) = sessions._open
        churn = handler.session._machine.stream_table.churn
        churn.rate = 0.0
        for number in range(1, 4):
            io = opened(client, "tcp:db")
            await io.write(b"x")
            assert await io.read() == b"x"
            io.finish()
            await audit.wait(number)
        assert churn.left == churn.burst
        io = opened(client, "tcp:db")
        io.reset()
        await audit.wait(4)
        assert churn.left < churn.burst


async def test_v20_a_connection_ends_when_its_right_is_lost_and_no_other(echo: str) -> None:
    """The group is gone at a renewal, the target or its users at a reload; each ends what it allowed."""
    ops, other = TargetConfig(echo, groups=("ops",)), TargetConfig(echo, users=("alice",))
    judge = FakeAuthenticator()
    judge.add("t", "alice", "ops", "dev")
    judge.add("more", "alice", "ops", "dev", "new", expires=2100.0)
    judge.add("fewer", "alice", "dev", expires=2200.0)
    listed = {"ops": ops, "other": other, "moved": other, "gone": other}
    async with serving(listed, judge) as (client, targets, audit, _, handler):
        running = {name: StreamIO() for name in ("ops", "other", "moved", "gone")}
        for name, io in running.items():
            client.open(f"tcp:{name}", io)
            await echoes(io)

        async def end(name: str) -> None:
            with pytest.raises(StreamReset) as caught:
                await running.pop(name).read()
            assert caught.value.code == ResetCode.FORBIDDEN
            for io in running.values():
                await echoes(io)

        for count, token in enumerate(("more", "fewer"), 2):
            for io in running.values():
                await echoes(io)
            client.authenticate(Auth(kind="oidc", token=token))
            await until(lambda count=count: len(handler.accepted) >= count)
        await end("ops")
        elsewhere = TargetConfig("127.0.0.1:1", users=("alice",))
        targets.replace(read_targets({"ops": ops, "other": other, "moved": elsewhere, "gone": other}))
        targets.end_disallowed()
        await end("moved")
        targets.replace(read_targets({"other": other}))
        targets.end_disallowed()
        await end("gone")
        assert [(one.target, one.outcome, one.reason) for one in await audit.wait(3)] == [
            ("tcp:ops", "cut", "the user may connect to the target no longer"),
            ("tcp:moved", "cut", "the target was taken out of the settings"),
            ("tcp:gone", "cut", "the target was taken out of the settings"),
        ]
        assert (targets.ended, targets.open) == (3, 1)
    assert targets._connections == {}


async def test_v20_a_dial_under_way_ends_too(dialling: asyncio.Event) -> None:
    async with serving({"db": TargetConfig("db.example.test:1", users=("alice",))}) as (client, targets, audit, *_):
        io = opened(client, "tcp:db")
        await dialling.wait()
        targets.replace({})
        targets.end_disallowed()
        assert await reset_of(io) == ResetCode.FORBIDDEN
        (record,) = await audit.wait(1)
        assert (record.outcome, record.reason) == ("cut", "the target was taken out of the settings")
    assert targets._connections == {}


async def echoes(io: StreamIO) -> None:
    await io.write(b"x")
    assert await io.read(1) == b"x"


async def test_h27_a_target_that_does_not_answer_takes_no_dials_of_others(dialling: asyncio.Event) -> None:
    """Also where the dials come at once, while their records are written."""
    audit = RecordedAudit()
    waiting: list[Callable[[str], None]] = []
    audit.begin = lambda record, recorded: waiting.append(recorded)
    slow, db = (TargetConfig(address, users=("mallory", "bob")) for address in ("slow.example.test:1", "db.test:1"))
    targets = TcpTargets(read_targets({"slow": slow, "db": db}), audit)
    sessions, _ = make_sessions(FakeAuthenticator(t="mallory"), Clock(), targets)
    others = FakeAuthenticator(t="bob")
    more, _ = make_sessions(others, Clock(), targets)
    async with joined(sessions) as (mallory, _), joined(more) as (bob, _), asyncio.timeout(20):
        for _ in range(2 * MAX_CONNECTING_OF_USER):
            mallory.open("tcp:slow", StreamIO())
        await until(lambda: targets.refused == MAX_CONNECTING_OF_USER)
        while waiting:
            waiting.pop()("")
        assert (len(targets.connecting), targets.refused) == (MAX_CONNECTING_OF_USER, MAX_CONNECTING_OF_USER)
        bob.open("tcp:db", StreamIO())
        await until(lambda: bool(waiting))
        waiting.pop()("")
        assert len(targets.connecting) == MAX_CONNECTING_OF_USER + 1
        await targets.close()
    assert not targets.connecting
