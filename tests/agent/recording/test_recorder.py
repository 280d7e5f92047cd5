"""What is recorded of an exec through the proxy, what is refused because it cannot be, and the index in the audit."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from arcbridge.agent.kube.caller import Lent
from arcbridge.agent.recording import recorder as recorder_module
from arcbridge.agent.recording.cast import CastWriter
from arcbridge.agent.recording.recorder import Recorder
from arcbridge.agent.recording.sealed_file import ENDING, PART, RecordingFile
from arcbridge.agent.recording.spool import Spool
from arcbridge.errors import StateError
from arcbridge.observe.metrics import Metrics
from arcbridge.settings.config import RecordingConfig, RecordingRuleConfig
from tests.agent.kube.bench import Bench, Wire, running
from tests.agent.kube.test_channel_splice import sentence
from tests.support.eventually import until
from tests.support.fake_apiserver import Exchange, reply

from .keys import RECIPIENT, events_of, frame, output_of

EXEC = "/api/v1/namespaces/shop/pods/web/exec"
MASK = b"wxyz"
NOTICE = b"arcbridge: this session is recorded"
SUCCESS = frame(b'\x03{"metadata":{},"status":"Success"}')


def request(path: str = EXEC, query: str = "command=ls&stdout=true&stderr=true", *offers: str) -> bytes:
    offered = ", ".join(offers or ("v5.channel.k8s.io", "v4.channel.k8s.io"))
    return (
        f"GET {path}?{query} HTTP/1.1\r\nHost: k\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: a2V5\r\nSec-WebSocket-Protocol: {offered}\r\n\r\n"
    ).encode()


SPDY = (
    f"POST {EXEC}?command=sh HTTP/1.1\r\nHost: k\r\nContent-Length: 0\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
    "X-Stream-Protocol-Version: v5.channel.k8s.io\r\n\r\n"
).encode()


def switch(chosen: str = "v5.channel.k8s.io") -> bytes:
    return (
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Accept: x\r\nSec-WebSocket-Protocol: {chosen}\r\n\r\n"
    ).encode()


def serving(
    first: bytes, *, chosen: str = "v5.channel.k8s.io", waits: bytes = b""
) -> Callable[[Exchange], Awaitable[None]]:
    """Switches, sends, and ends when `waits` has come."""

    async def serve(exchange: Exchange) -> None:
        await exchange.send(switch(chosen) + first[:7])
        await exchange.send(first[7:])
        got = b""
        while waits not in got:
            got += await exchange.reader.read(65536)
        exchange.writer.close()

    return serve


class Recorders:
    """A bench whose agent records."""

    def __init__(self, bench: Bench, recorder: Recorder, directory: Path) -> None:
        self.bench = bench
        self.recorder = recorder
        self.directory = directory

    def files(self) -> list[Path]:
        return sorted(self.directory.glob("*" + ENDING))

    def index(self) -> list[dict[str, Any]]:
        """The records whose files have their names, and those without a file."""
        found = [json.loads(line) for line in self.lines if '"stage":"recorded"' in line]
        return [one for one in found if (self.directory / one["recording"].get("file", "")).exists()]

    lines: list[str]

    async def run(self, head: bytes) -> Wire:
        """An exec, up to the head of its answer."""
        wire = await self.bench.begin(head)
        status, _ = await wire.head()
        assert status == 101
        return wire

    async def refused(self, head: bytes) -> tuple[int, str]:
        answer = await (await self.bench.begin(head)).answer()
        return answer.status, answer.status_object["message"]


@asynccontextmanager
async def recording(directory: Path, **config: Any) -> AsyncIterator[Recorders]:
    """An agent that records; `rule` has the fields of its one rule."""
    rule = RecordingRuleConfig(**config.pop("rule", {}))
    where = directory / "recordings"
    async with running(directory) as bench:
        settings = RecordingConfig((RECIPIENT,), where, rules={"all": rule}, **config)
        made = Recorders(bench, Recorder(settings, bench.audit), where)
        made.lines = []
        put = bench.audit.put

        def kept(line: str) -> bool:
            made.lines.append(line)
            return put(line)

        put_and_wait = bench.audit.put_and_wait

        async def kept_and_waited(line: Callable[[], str]) -> None:
            assert not made.files() or made.index()  # no file has its name before its record
            made.lines.append(line())
            await put_and_wait(line)

        bench.audit.put, bench.audit.put_and_wait = kept, kept_and_waited
        bench.proxy.context.recorder = made.recorder
        try:
            yield made
        finally:
            await bench.proxy.close()
            await made.recorder.close()


async def test_a_rule_for_a_group_that_is_lent_records_who_has_it(tmp_path: Path) -> None:
    async with recording(tmp_path, rule={"groups": ("operators",)}) as made:
        made.bench.api.routes[EXEC] = serving(SUCCESS)
        await (await made.run(request())).rest()
        assert not made.files()
        caller = made.bench.caller
        caller.lent = Lent(replace(caller.identity, groups=("operators",)), None)
        await (await made.run(request())).rest()
        await until(made.index)
        assert len(made.files()) == 1


def as_other(head: bytes, groups: str = "operators") -> bytes:
    other = f"Impersonate-User: root\r\nImpersonate-Group: {groups}\r\n"
    return head.replace(b"Host: k\r\n", b"Host: k\r\n" + other.encode())


@pytest.mark.parametrize("rule", [{"groups": ("operators",)}, {"users": ("root",)}, {"users": ("alice",)}])
async def test_a_rule_counts_for_the_user_and_for_whom_as_names(tmp_path: Path, rule: dict[str, Any]) -> None:
    async with recording(tmp_path, rule=rule) as made:
        code, message = await made.refused(as_other(SPDY))
        assert (code, "has to be recorded" in message) == (403, True)
        code, message = await made.refused(as_other(KUBELET["run"]))
        assert (code, "nodes/proxy" in message) == (403, True)
        made.bench.api.routes[EXEC] = serving(SUCCESS)
        await (await made.run(as_other(request()))).rest()
        await until(made.index)
        assert len(made.files()) == 1


async def test_an_exec_its_notice_and_its_index(tmp_path: Path) -> None:
    async with recording(tmp_path) as made:
        made.bench.api.routes[EXEC] = serving(frame(b"\x01a\r\n") + frame(b"\x02oops") + SUCCESS)
        wire = await made.run(request())
        notice = frame(b"\x02" + NOTICE + b"\n")
        assert await wire.rest() == notice + frame(b"\x01a\r\n") + frame(b"\x02oops") + SUCCESS
        await until(made.index)
        (path,), (index,) = made.files(), made.index()
        assert output_of(path) == NOTICE + b"\na\r\noops"
        assert events_of(path)[-1] == ("x", b"0")
        found = index["recording"]
        assert found["file"] == path.name
        assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert (found["bytes"], found["exit"]) == (path.stat().st_size, 0)
        assert found["output_bytes"] == len(output_of(path))
        assert 0 <= found["seconds"] < 60
        assert "failure" not in found
        assert (index["user"], index["namespace"], index["name"], index["command"]) == ("alice", "shop", "web", ["ls"])
        (record,) = await made.bench.audit.wait(1)
        assert index["request"] == record.request
        assert record.request in path.name
        assert record.bytes_down == len(frame(b"\x01a\r\n") + frame(b"\x02oops") + SUCCESS)
        assert made.recorder.recorded == 1
        assert made.recorder.open == 0


async def test_a_terminal_its_input_and_its_size(tmp_path: Path) -> None:
    """The notice of a terminal is on standard output: it has no standard error. What is typed is left out."""
    async with recording(tmp_path) as made:
        made.bench.api.routes[EXEC] = serving(frame(b"\x01$ "), waits=b"end")
        wire = await made.run(request(EXEC, "command=sh&stdin=true&stdout=true&tty=true"))
        assert await wire.until(b"$ ") == frame(b"\x01" + NOTICE + b"\r\n") + frame(b"\x01$ ")
        await wire.send(frame(b'\x04{"Width":120,"Height":40}', mask=MASK) + frame(b"\x00secret\r", mask=MASK))
        await wire.send(frame(b"end", mask=bytes(4), opcode=9))
        await wire.rest()
        await until(made.index)
        events = events_of(made.files()[0])
        assert ("r", b"120x40") in events
        assert "i" not in [code for code, _ in events]


async def test_input_where_it_is_switched_on(tmp_path: Path) -> None:
    async with recording(tmp_path, rule={"typed_input": True}) as made:
        made.bench.api.routes[EXEC] = serving(b"", waits=b"end")
        wire = await made.run(request(EXEC, "command=sh&stdin=true&stdout=true&tty=true"))
        assert b"recorded, and what is typed in it\r\n" in await wire.until(b"\r\n")
        await wire.send(frame(b"\x00ls\r", mask=MASK) + frame(b"end", mask=bytes(4), opcode=9))
        await wire.rest()
        await until(made.index)
        assert ("i", b"ls\r") in events_of(made.files()[0])


async def test_a_session_of_another_namespace_is_not_touched(tmp_path: Path) -> None:
    async with recording(tmp_path, rule={"namespaces": ("vault",)}) as made:
        made.bench.api.routes[EXEC] = serving(frame(b"\x01a"))
        wire = await made.run(request())
        assert await wire.rest() == frame(b"\x01a")
        await made.bench.audit.wait(1)
        assert made.files() == made.index() == []


async def test_what_is_asked_for_and_has_no_standard_error_gets_no_notice(tmp_path: Path) -> None:
    async with recording(tmp_path) as made:
        made.bench.api.routes[EXEC] = serving(frame(b"\x01a"))
        wire = await made.run(request(EXEC, "command=cat&stdout=true"))
        assert await wire.rest() == frame(b"\x01a")
        await until(made.index)
        assert output_of(made.files()[0]) == b"a"


UNSUITABLE = {
    "SPDY": SPDY,
    "an old protocol": request(EXEC, "command=ls", "v3.channel.k8s.io"),
    "one of the offers": request(EXEC, "command=ls", "v4.channel.k8s.io", "base64.channel.k8s.io"),
    "none": request(EXEC, "command=ls").replace(
        b"Sec-WebSocket-Protocol: v5.channel.k8s.io, v4.channel.k8s.io\r\n", b""
    ),
}


@pytest.mark.parametrize("head", UNSUITABLE.values(), ids=UNSUITABLE.keys())
async def test_what_cannot_be_recorded_is_refused_before_it_leaves(tmp_path: Path, head: bytes) -> None:
    async with recording(tmp_path) as made:
        code, message = await made.refused(head)
        assert code == 403
        assert "has to be recorded, and a recording needs WebSocket" in message
        assert "kubectl 1.31" in message
        assert made.bench.api.requests == []
        assert made.recorder.refused == {"fault": 0, "client": 1}


@pytest.mark.parametrize("head", UNSUITABLE.values(), ids=UNSUITABLE.keys())
async def test_where_it_is_not_required_it_goes_on_without(tmp_path: Path, head: bytes) -> None:
    async with recording(tmp_path, rule={"required": False}) as made:
        made.bench.api.routes[EXEC] = reply(403, b'{"kind":"Status"}')
        answer = await (await made.bench.begin(head)).answer()
        assert answer.status == 403
        assert len(made.bench.api.requests) == 1
        assert made.recorder.unrecorded == 1
        assert made.files() == []
        (index,) = made.index()
        assert index["recording"] == {"failure": "its protocol cannot be recorded"}
        assert (index["user"], index["namespace"], index["name"]) == ("alice", "shop", "web")


KUBELET = {
    "exec": request("/api/v1/nodes/n1/proxy/exec/shop/web/app", "command=ls"),
    "any upgrade": request("/api/v1/nodes/n1/proxy/x%2e%2e/", "command=ls"),
    "run": b"POST /api/v1/nodes/n1/proxy/run/shop/web/app?cmd=ls HTTP/1.1\r\nHost: k\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("head", KUBELET.values(), ids=KUBELET.keys())
async def test_what_a_kubelet_runs_is_refused_to_those_who_are_recorded(tmp_path: Path, head: bytes) -> None:
    async with recording(tmp_path, rule={"namespaces": ("elsewhere",)}) as made:
        code, message = await made.refused(head)
        assert code == 403
        assert "nodes/proxy" in message
        assert made.bench.api.requests == []


async def test_reads_of_a_kubelet_and_users_who_are_not_recorded_go_on(tmp_path: Path) -> None:
    async with recording(tmp_path) as made:
        assert (await made.bench.get("/api/v1/nodes/n1/proxy/metrics")).status == 200
    async with recording(tmp_path, rule={"users": ("bob",)}) as made:
        answer = await (await made.bench.begin(KUBELET["run"])).answer()
        assert answer.status == 200


async def test_a_full_directory_refuses_with_a_sentence_and_spdy_gets_the_same(tmp_path: Path) -> None:
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / ("old" + ENDING)).write_bytes(bytes(100_000))
    async with recording(tmp_path, directory_bytes=100_000) as made:
        await until(lambda: not made.recorder._tasks)
        for head in (request(), SPDY):
            code, message = await made.refused(head)
            assert code == 503
            assert "the agent cannot write its recording (the recordings in" in message
            assert "tell the operator" in message
        metrics = Metrics("agent")
        made.recorder.register(metrics)
        for reason in ("fault", "client"):
            assert f'arcbridge_agent_recordings_refused_total{{reason="{reason}"}} 1.0' in metrics.render()[0].decode()
        assert made.bench.api.requests == []
        (made.directory / ("old" + ENDING)).unlink()
        made.bench.api.routes[EXEC] = serving(SUCCESS)
        await (await made.run(request())).rest()
        await until(made.index)


def broken(*_: object) -> NoReturn:
    raise OSError(errno.EIO, "Input/output error")


async def test_a_directory_that_cannot_be_read_is_a_failure_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Spool, "measure", broken)
    async with recording(tmp_path) as made:
        await until(lambda: made.recorder.failed == 1)
        code, message = await made.refused(request())
        assert (code, "Input/output error" in message) == (503, True)
        assert made.recorder.refused == {"fault": 1, "client": 0}


async def test_a_full_directory_where_a_recording_is_not_required(tmp_path: Path) -> None:
    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / ("old" + ENDING)).write_bytes(bytes(100_000))
    async with recording(tmp_path, directory_bytes=100_000, rule={"required": False}) as made:
        await until(lambda: not made.recorder._tasks)
        made.bench.api.routes[EXEC] = serving(SUCCESS)
        wire = await made.run(request())
        assert await wire.rest() == SUCCESS
        assert made.recorder.unrecorded == 1


async def test_a_directory_that_takes_nothing_refuses_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "BEGIN_DEADLINE", 0.05)
    async with recording(tmp_path) as made:
        gate = asyncio.Event()
        submit = made.recorder._thread.submit

        async def late(*arguments: Any) -> Any:
            await gate.wait()
            return await submit(*arguments)

        monkeypatch.setattr(made.recorder._thread, "submit", lambda *given, **_: asyncio.ensure_future(late(*given)))
        made.recorder._thread.progress = time.monotonic() + 60
        code, message = await made.refused(request())
        assert (code, "more to record at once than it can write" in message) == (503, True)
        made.recorder._thread.progress = 0.0
        code, message = await made.refused(request())
        assert code == 503
        assert "its directory takes no data" in message
        gate.set()
        await until(lambda: not list(made.directory.iterdir()) and not made.recorder._tasks)


async def test_a_session_that_the_api_server_refuses_leaves_no_file(tmp_path: Path) -> None:
    async with recording(tmp_path) as made:
        made.bench.api.routes[EXEC] = reply(403, b'{"kind":"Status"}')
        answer = await (await made.bench.begin(request())).answer()
        assert answer.status == 403
        await until(lambda: not list(made.directory.iterdir()))
        assert made.index() == []
        assert made.recorder.open == 0


async def test_a_protocol_that_was_not_offered_is_not_joined_and_one_that_is_unknown_ends_the_session(
    tmp_path: Path,
) -> None:
    async with recording(tmp_path) as made:
        made.bench.api.routes[EXEC] = serving(b"", chosen="v3.channel.k8s.io")
        answer = await (await made.bench.begin(request())).answer()
        assert answer.status == 502
        await until(lambda: not list(made.directory.iterdir()))


async def test_a_recording_that_fails_ends_its_session_with_a_reason(tmp_path: Path) -> None:
    async with recording(tmp_path, session_bytes=100_000) as made:
        made.bench.api.routes[EXEC] = serving(frame(b"\x01" + bytes(20_000)), waits=b"never")
        wire = await made.run(request())
        reason = "the recording failed: it has more than 100000 bytes (recording.session_bytes)"
        assert await sentence(wire) == f"arcbridge: {reason}"
        (record,) = await made.bench.audit.wait(1)
        assert record.outcome == "cut"
        assert record.reason == reason
        await until(made.index)
        assert made.index()[0]["recording"]["failure"].startswith("it has more than")
        assert made.recorder.failed == 1


async def test_a_session_that_breaks_off_is_a_recording_with_a_mark(tmp_path: Path) -> None:
    async with recording(tmp_path) as made:
        made.bench.api.routes[EXEC] = serving(frame(b"\x01a"), waits=b"never")
        wire = await made.run(request())
        await wire.until(b"a")
        wire.transport.abort()
        await until(made.index)
        assert "exit" not in made.index()[0]["recording"]
        assert events_of(made.files()[0])[-1] == ("m", b"the session was cut")


async def left(tmp_path: Path) -> Path:
    """A file of a process that was killed."""
    async with recording(tmp_path) as made:
        made.bench.api.routes[EXEC] = serving(SUCCESS)
        await (await made.run(request())).rest()
        await until(made.index)
        (path,) = made.files()
        path.write_bytes(path.read_bytes()[:-1024])  # without the end of the archive
        path.rename(path.with_name(path.name + PART))
    return path


async def test_what_a_former_process_left_counts_once(tmp_path: Path) -> None:
    """Where its index fails too."""
    await left(tmp_path)
    async with recording(tmp_path) as made:
        made.bench.audit.put_and_wait = full
        await until(lambda: made.recorder.failed and not made.recorder._tasks)
        assert made.recorder.failed == 1


async def test_what_a_former_process_left_is_indexed(tmp_path: Path) -> None:
    path = await left(tmp_path)
    async with recording(tmp_path) as made:
        await until(made.index)
        (index,) = made.index()
        assert path.name.endswith(index["request"] + ENDING)
        assert index["recording"]["file"] == path.name
        assert index["recording"]["failure"] == "the agent ended"
        assert made.recorder.failed == 1
        assert index["recording"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


async def test_what_is_left_is_listed_before_a_session_makes_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a file that this process leaves is finished, and counted, a second time."""
    gate = threading.Event()
    monkeypatch.setattr(Spool, "measure", lambda spool: gate.wait(10))
    listed, left_there = [], Spool.left

    def listing(spool: Spool) -> list[Path]:
        listed.append(left_there(spool))
        return listed[-1]

    monkeypatch.setattr(Spool, "left", listing)
    async with recording(tmp_path) as made:
        made.bench.api.routes[EXEC] = serving(SUCCESS)
        run = asyncio.ensure_future(made.run(request()))
        await until(lambda: made.recorder._thread._jobs or made.recorder._thread._urgent)
        gate.set()
        await (await run).rest()
        await until(made.index)
        assert listed == [[]]


async def test_a_file_keeps_its_ending_where_its_record_is_not_written(tmp_path: Path) -> None:
    """The next start of an agent finishes it and records it, also while this one runs."""
    async with recording(tmp_path) as made:
        made.bench.api.routes[EXEC] = serving(SUCCESS)
        made.bench.audit.put_and_wait = full
        await (await made.run(request())).rest()
        await until(lambda: made.recorder.recorded and not made.recorder._tasks)
        assert made.files() == []
        (part,) = made.directory.iterdir()
        assert part.name.endswith(PART)
        assert made.recorder.failed == 1
        found = await made.recorder._thread.submit(made.recorder._spool.recover, part)
        assert found is not None
        assert found[0].whole


async def full(line: Callable[[], str]) -> None:
    raise StateError("the disk is full")


async def test_a_file_gets_its_name_when_it_is_the_turn_of_its_user(tmp_path: Path) -> None:
    """Else the ends of one user's sessions wait behind those of all others."""
    gate = threading.Event()
    async with recording(tmp_path) as made:
        thread, put_and_wait = made.recorder._thread, made.bench.audit.put_and_wait

        async def put_and_stop(line: Callable[[], str]) -> None:
            await put_and_wait(line)
            thread.submit(gate.wait, urgent=True)

        await until(lambda: not made.recorder._tasks)
        made.bench.audit.put_and_wait = put_and_stop
        made.bench.api.routes[EXEC] = serving(SUCCESS)
        await (await made.run(request())).rest()
        await until(lambda: thread._jobs)
        turns = list(thread._jobs)
        gate.set()
        assert turns == ["alice"]
        await until(made.files)


@pytest.mark.parametrize("part", ["size", "end", "finish"])
async def test_a_recording_that_fails_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """At its output, its last line, or its last segment; and then at its index."""
    async with recording(tmp_path, session_bytes=100_000, rule={"required": False}) as made:
        made.bench.audit.put_and_wait = full
        if part != "size":
            monkeypatch.setattr(*((RecordingFile, "finish") if part == "finish" else (CastWriter, "end")), broken)
        size, waits = (20_000, b"end") if part == "size" else (1, b"")
        made.bench.api.routes[EXEC] = serving(frame(b"\x01" + bytes(size)) + SUCCESS, waits=waits)
        wire = await made.run(request())
        if part == "size":
            await until(lambda: made.recorder.failed)
            await wire.send(b"end")
        await wire.rest()
        await until(lambda: not (made.recorder.open or made.recorder._tasks))
        assert made.recorder.failed == 1


async def test_a_file_that_cannot_be_ended_has_a_record_of_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RecordingFile, "finish", broken)
    async with recording(tmp_path) as made:
        made.bench.api.routes[EXEC] = serving(SUCCESS)
        await (await made.run(request())).rest()
        await until(made.index)
        assert made.index()[0]["recording"] == {"failure": "Input/output error"}
        assert made.index()[0]["user"] == "alice"
        (part,) = made.directory.iterdir()
        path = part.with_name(part.name.removesuffix(PART))
        # Its writer leaves it, behind others' work in the same thread.
        await until(lambda: made.recorder._thread.submit(RecordingFile.reopen, path, ()))


async def test_a_session_does_not_wait_for_what_a_former_process_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, gate = threading.Event(), threading.Event()

    def slow(*_: object) -> None:
        reached.set()
        gate.wait()

    (tmp_path / "recordings").mkdir()
    (tmp_path / "recordings" / f"large{ENDING}{PART}").touch()
    monkeypatch.setattr(RecordingFile, "reopen", slow)
    async with recording(tmp_path) as made:
        await until(reached.is_set)
        made.bench.api.routes[EXEC] = serving(SUCCESS)
        await (await made.run(request())).rest()
        await until(made.index)
        assert made.recorder.recorded == 1
        gate.set()
