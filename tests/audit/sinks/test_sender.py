"""Senders against real collectors in processes of their own: kills on both sides, refusals, bounds, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arcbridge.audit.chain import Head, SealedLine
from arcbridge.audit.log import ChainedLog
from arcbridge.audit.sinks import sender as module
from arcbridge.audit.sinks.sender import Sinks
from arcbridge.audit.sinks.settings import sink_findings
from arcbridge.audit.sinks.tail import EVENT, LogFiles, LogRecord, LostRecords, position_file, read_position
from arcbridge.audit.verify import verify
from arcbridge.errors import StateError
from arcbridge.net.backoff import Backoff
from arcbridge.settings.config import AuditFilesConfig, AuditSinkConfig
from tests.audit.sinks import role
from tests.audit.sinks.role import logging, put
from tests.support.collector import Collector, once
from tests.support.eventually import until

STDOUT = AuditFilesConfig(sinks={"out": AuditSinkConfig(kind="stdout")})


@pytest.fixture(scope="module")
def collectors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Collector]]:
    directory = tmp_path_factory.mktemp("collectors")
    with Collector("http", directory / "http") as http, Collector("syslog", directory / "syslog") as syslog:
        yield {"http": http, "syslog": syslog}


@pytest.fixture(params=["http", "syslog"])
def collector(request: pytest.FixtureRequest, collectors: dict[str, Collector]) -> Collector:
    collectors[request.param].forget()
    return collectors[request.param]


@pytest.fixture
def http(collectors: dict[str, Collector]) -> Collector:
    collectors["http"].forget()
    return collectors["http"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses after failures are short."""
    for name, seconds in (("FIRST_DELAY", 0.05), ("LONGEST_DELAY", 0.2), ("REFUSED_AGAIN", 0.01)):
        monkeypatch.setattr(module, name, seconds)


def sink(collector: Collector, **settings: Any) -> AuditSinkConfig:
    where = f"127.0.0.1:{collector.port}"
    address = f"https://{where}/ingest" if collector.kind == "http" else where
    return AuditSinkConfig(**{"kind": "http" if collector.kind == "http" else "syslog", "address": address,
                              "ca_file": collector.ca, "interval": 0.05, "timeout": 5.0, **settings})  # fmt: skip


def numbers(texts: list[str]) -> list[int]:
    return [fields["n"] for fields in map(json.loads, texts) if "n" in fields]


def events(path: Path, event: str) -> list[dict[str, Any]]:
    return [one for one in map(json.loads, path.read_text().splitlines()) if one["event"] == event]


def whole(texts: list[str], directory: Path) -> None:
    """What has arrived is a log whose chains are whole."""
    arrived = directory / "arrived.jsonl"
    arrived.write_text("".join(f"{text}\n" for text in once(texts)))
    report = verify([arrived])
    assert report.ok, report.findings


async def test_records_arrive_as_they_stand_in_the_file(collector: Collector, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    async with logging(path, {"siem": sink(collector, batch_records=7)}) as audit:
        put(audit, *range(50))
        await until(lambda: len(numbers(collector.texts)) == 50)
    assert collector.texts == path.read_text().splitlines(), "with the end of the chain, which came last"
    whole(collector.texts, tmp_path)
    assert read_position(path, "siem").offset == path.stat().st_size


async def test_kills_of_the_collector_lose_nothing(collector: Collector, tmp_path: Path) -> None:
    path, sent = tmp_path / "audit.jsonl", 0
    async with logging(path, {"siem": sink(collector, batch_records=10)}) as audit:
        for _ in range(2):
            for _ in range(20):
                put(audit, *range(sent, sent + 15))
                sent += 15
                await asyncio.sleep(0.005)  # so that the kill meets a batch that is under way; any moment will do
            collector.kill()
            put(audit, sent)
            sent += 1
            await until(lambda: audit.sinks.senders[0].failure)
            collector.start()
        await until(lambda: len(set(numbers(collector.texts))) == sent)
        assert not audit.sinks.senders[0].failure
        assert audit.sinks.senders[0].dropped == 0
    assert numbers(once(collector.texts)) == list(range(sent)), "in order"
    assert [line for line in once(collector.texts)] == path.read_text().splitlines()
    whole(collector.texts, tmp_path)


async def test_kills_of_the_role_lose_nothing(collector: Collector, tmp_path: Path) -> None:
    path, number = tmp_path / "audit.jsonl", -1
    settings = sink(collector)
    for _ in range(2):
        arguments = (settings.kind, settings.address, str(collector.ca), str(path), str(number + 1), "1000000")
        process = await asyncio.create_subprocess_exec(
            sys.executable, role.__file__, *arguments, stderr=subprocess.PIPE
        )
        assert process.stderr is not None
        before = len(collector.lines)
        told = b""
        while len(collector.lines) < before + 30:  # it delivers while it writes
            told += await process.stderr.readline()
        process.send_signal(signal.SIGKILL)
        told += await process.stderr.read()
        await process.wait()
        number = max(map(int, re.findall(rb"recorded (\d+)\n", told)))
    async with logging(path, {"siem": settings}):
        await until(lambda: len(set(numbers(collector.texts))) > number)
    assert sorted(set(numbers(collector.texts)))[: number + 1] == list(range(number + 1))
    kept = [text for text in path.read_text().splitlines() if text.startswith('{"chain"')]
    assert once(collector.texts) == [text for text in kept if text.endswith("}")]
    whole(collector.texts, tmp_path)


async def test_what_one_process_sends_no_other_sends(http: Collector, tmp_path: Path) -> None:
    """Two pods that share a file: the second one takes over where the first one has ended."""
    path = tmp_path / "audit.jsonl"
    async with logging(path, {"siem": sink(http)}) as first:
        put(first, 1)
        await until(lambda: numbers(http.texts) == [1])
        async with logging(path, {"siem": sink(http)}) as second:
            put(second, 2)
            await until(lambda: numbers(http.texts) == [1, 2])
            await until(lambda: first.sinks.senders[0].delivered >= 3)
            assert second.sinks.senders[0].delivered == 0
            await asyncio.to_thread(first.sinks.close)
            put(second, 3)
            await until(lambda: numbers(http.texts) == [1, 2, 3])
    assert http.texts == once(http.texts), "none came twice"


async def test_a_record_that_is_refused_is_given_up_and_counted_and_no_other(
    http: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "audit.jsonl"
    from arcbridge.audit.sinks.collector import RecordsRefused
    from arcbridge.audit.sinks.http import HttpTransport

    send, refused = HttpTransport.send, list[int]()

    async def picky(self: HttpTransport, records: Any) -> None:
        if any(one.sealed.fields.get("n") == 13 for one in records):
            refused.append(len(records))
            raise RecordsRefused("answered 413")
        await send(self, records)

    monkeypatch.setattr(HttpTransport, "send", picky)
    async with logging(path, {"siem": sink(http)}) as audit:
        put(audit, *range(40))
        await until(lambda: len(numbers(http.texts)) == 39)
        await until(lambda: events(path, "audit-undelivered"))
        assert audit.sinks.senders[0].dropped == 1
    assert numbers(http.texts) == [*range(13), *range(14, 40)]
    assert refused.count(1) == module.REFUSALS
    assert len(refused) < 4 * module.REFUSALS, "halves lead to it"
    (found,) = events(path, "audit-undelivered")
    sequence = next(one["seq"] for one in map(json.loads, path.read_text().splitlines()) if one.get("n") == 13)
    assert (found["sink"], found["records"]) == ("siem", 1)
    assert found["to"].endswith(f"/{sequence}")
    arrived = tmp_path / "arrived"
    arrived.write_text("".join(f"{one}\n" for one in http.texts))
    report = verify([arrived])
    assert [one.kind for one in report.findings] == ["missing"]
    assert any("1 records" in note and "siem" in note for note in report.notes), "and what arrived says why"


@pytest.mark.parametrize("status", [301, 401, 404, 500])
async def test_what_may_be_mended_is_tried_until_it_is(http: Collector, tmp_path: Path, status: int) -> None:
    http.refuse(status, "Location: https://127.0.0.1:1/elsewhere")
    path = tmp_path / "audit.jsonl"
    async with logging(path, {"siem": sink(http)}) as audit:
        put(audit, *range(5))
        (one,) = audit.sinks.senders
        await until(lambda: one.failures > 2 * module.REFUSALS)
        assert f"answered {status}" in one.failure
        assert one.waiting_bytes > 500
        assert one.lag > 0
        http.refuse()
        await until(lambda: numbers(http.texts) == [0, 1, 2, 3, 4])
        await until(lambda: (one.failure, one.lag, one.waiting_bytes, one.dropped) == ("", 0.0, 0, 0))


async def test_retry_after_is_obeyed_and_bounded(http: Collector, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    http.refuse(503, "Retry-After: 2")
    async with logging(path, {"siem": sink(http)}) as audit:
        put(audit, 1)
        (one,) = audit.sinks.senders
        await until(lambda: one.failure)
        http.refuse()
        began = time.monotonic()
        await until(lambda: numbers(http.texts) == [1])
        assert time.monotonic() - began > 1.0
    from arcbridge.errors import ArcbridgeError
    from arcbridge.net.backoff import Backoff

    error = ArcbridgeError("later", retry_after=10**9)
    assert one._failed(error, Backoff(first=0.05, cap=0.2)) < 2 * module.MOST_PATIENCE


async def test_a_dead_collector_delays_no_record(tmp_path: Path) -> None:
    """What waits for its record waits for the disk alone."""
    dead = AuditSinkConfig(kind="syslog", address="127.0.0.1:1", interval=0.05, timeout=1.0)
    path = tmp_path / "audit.jsonl"
    async with logging(path, {"siem": dead}) as audit:
        for number in range(50):
            async with asyncio.timeout(2):
                await audit.put_and_wait(lambda number=number: json.dumps({"n": number}))
        (one,) = audit.sinks.senders
        await until(lambda: one.failure)
        assert "127.0.0.1:1" in one.failure
        began = time.monotonic()
    assert time.monotonic() - began < module.FLUSH + 2, "the end waits no longer than its bound"


async def test_the_bound_on_disk_is_kept_and_what_it_costs_is_counted(http: Collector, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    http.refuse(503)
    bounds = {"rotate_bytes": 4096, "keep_bytes": 8192}
    async with logging(path, {"siem": sink(http)}, **bounds) as audit:
        for number in range(120):
            put(audit, number)
            audit.reopen()  # it looks at the size now
            await asyncio.sleep(0.01)
        (one,) = audit.sinks.senders
        await until(lambda: one.dropped > 0)
        held = sum(file.stat().st_size for file in tmp_path.glob("audit.jsonl*"))
        assert held < 8192 + 2 * 4096
        http.refuse()
        await until(lambda: numbers(http.texts)[-1:] == [119])
    lost = events_in(tmp_path, "audit-undelivered")
    assert sum(found["records"] for found in lost) == one.dropped
    arrived = {(fields["chain"], fields["seq"]) for fields in map(json.loads, http.texts)}
    every = numbers(http.texts)
    assert every == sorted(every)
    missing = 120 - len(set(every))
    assert missing > 0
    assert missing <= one.dropped <= 2 * missing, "with the records of the chains themselves"
    assert all(tuple(found["to"].split("/")) not in arrived for found in lost)


def events_in(directory: Path, event: str) -> list[dict[str, Any]]:
    return [found for file in sorted(directory.glob("audit.jsonl*")) for found in events(file, event)]


@pytest.mark.parametrize("bounds", [{}, {"rotate_bytes": 1 << 20, "keep_bytes": 1 << 20}])
async def test_files_that_another_program_has_removed_are_counted(
    http: Collector, tmp_path: Path, bounds: dict[str, int]
) -> None:
    path = tmp_path / "audit.jsonl"
    async with logging(path, {"siem": sink(http)}, **bounds) as audit:
        put(audit, 1)
        await until(lambda: numbers(http.texts) == [1])
        http.refuse(503)
        put(audit, 2, 3)
        (one,) = audit.sinks.senders
        await until(lambda: one.failure)
        path.unlink()
        audit.reopen()
        put(audit, 4)
        await until(lambda: one.dropped)
        failures = one.failures
        await until(lambda: one.failures > failures + 2)
        http.refuse()
        await until(lambda: numbers(http.texts) == [1, 4])
        await until(lambda: events(path, "audit-undelivered"))
        (found,) = events(path, "audit-undelivered")
        assert found["records"] == 3, "two, and the end of their chain"


async def test_a_count_that_is_not_in_the_file_is_none(tmp_path: Path) -> None:
    """`on_failure = "continue"` lets work go on while the disk is full; the sink waits."""
    (sender,) = Sinks(STDOUT, tmp_path / "audit.jsonl").senders
    full = ChainedLog("/dev/full")
    loop = asyncio.get_running_loop()
    sender._record = lambda line: asyncio.run_coroutine_threadsafe(full.put_or_fail(line), loop)
    for _ in range(2):  # the disk is found full, and is known to be
        with pytest.raises(StateError, match="No space left"):
            await sender._lose(LostRecords("out", 1000, "", Head("a" * 16, 5, ""), "gone"))
    assert sender.dropped == 0
    await asyncio.to_thread(full.close)


async def test_a_file_that_cannot_be_read_is_named_and_is_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit.jsonl"
    sinks = Sinks(STDOUT, path)
    (sender,) = sinks.senders
    path.mkdir()
    with pytest.raises(StateError, match=f"{path} cannot be read: Is a directory") as caught:
        await sender.step()
    sender._failed(caught.value, Backoff(first=1, cap=2))
    clock = time.time()
    monkeypatch.setattr(module.time, "time", lambda: clock + 1000)
    assert sender.lag > module.LATE
    (one,) = sink_findings(sinks)
    assert str(path) in one.detail
    assert "collector" not in one.remedy
    path.rmdir()
    await sender.step()
    assert (sender.lag, sender.readable) == (0.0, True)


async def test_behind_a_rotation_it_looks_no_more_often_than_ever(
    http: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that was just renamed may still be written, and is looked at again: after the interval, as always."""
    looks: list[int] = []
    read = LogFiles.read

    def counted(*arguments: Any) -> Any:
        batch = read(*arguments)
        looks.append(len(batch.records))
        return batch

    monkeypatch.setattr(LogFiles, "read", counted)
    path = tmp_path / "audit.jsonl"
    async with logging(path, {"siem": sink(http, interval=0.2)}) as audit:
        put(audit, 1)
        await until(lambda: numbers(http.texts) == [1])
        path.rename(tmp_path / "audit.jsonl.1")
        audit.reopen()
        put(audit, 2)
        looks.clear()
        began = time.monotonic()
        await until(lambda: numbers(http.texts) == [1, 2])
        assert looks.count(0) <= (time.monotonic() - began) / 0.2 + 2


async def test_a_position_that_cannot_be_kept_holds_nothing_up(
    http: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_position", full)
    path = tmp_path / "audit.jsonl"
    async with logging(path, {"siem": sink(http)}) as audit:
        put(audit, 1)
        await until(lambda: numbers(http.texts) == [1])
        put(audit, 2)
        await until(lambda: numbers(http.texts) == [1, 2])
    assert not position_file(path, "siem").exists()


async def test_standard_output_has_a_line_for_each_record(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    command = [sys.executable, role.__file__, "stdout", "", "", str(path), "0", "5"]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == path.read_text()
    assert len(numbers(done.stdout.splitlines())) == 5
    assert "recorded 4" in done.stderr, "the log is another stream"


async def test_an_output_that_does_not_block_tears_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    monkeypatch.setattr(module, "_STDOUT", writer)
    records = [LogRecord(str(one).encode() * 2900, SealedLine(Head("", one, ""), "", {})) for one in range(3)]
    output = module.StdoutTransport()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await output.send(records)
    torn = os.read(reader, 65536)
    sending = asyncio.create_task(output.send(records))
    got = torn
    while not sending.done():
        await asyncio.sleep(0.01)
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(reader, False)
            got += os.read(reader, 65536)
    lines = got.split(b"\n")
    assert lines[-4:-1] == [one.text for one in records], "whole, whatever stands before them"
    os.close(reader)
    os.close(writer)


async def test_an_output_that_takes_nothing_holds_up_neither_work_nor_end(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    command = [sys.executable, role.__file__, "stdout", "", "", str(path), "0", "500"]
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    try:
        process = await asyncio.create_subprocess_exec(*command, stdout=writer, stderr=subprocess.PIPE)
        async with asyncio.timeout(60):
            _, told = await process.communicate()
        assert process.returncode == 0
        assert b"recorded 499" in told
    finally:
        os.close(reader)
        os.close(writer)


async def test_no_secret_is_in_a_log_or_a_record(
    http: Collector, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    token = tmp_path / "token"
    token.write_text("s3cr3t-token\n")
    path = tmp_path / "audit.jsonl"
    http.refuse(401)
    settings = sink(http, token_file=token, address=f"https://127.0.0.1:{http.port}/in?key=s3cr3t-key")
    async with logging(path, {"siem": settings}) as audit:
        put(audit, 1)
        await until(lambda: audit.sinks.senders[0].failures > 2)
        failure = audit.sinks.senders[0].failure
        http.refuse()
        await until(lambda: numbers(http.texts) == [1])
    assert http.requests[-1]["Authorization"] == "Bearer s3cr3t-token"
    assert http.requests[-1]["path"] == "/in?key=s3cr3t-key"
    output = capfd.readouterr()
    for text in (failure, output.out, output.err, path.read_text(), position_file(path, "siem").read_text()):
        assert "s3cr3t" not in text


def test_without_settings_there_is_nothing() -> None:
    sinks = Sinks()
    assert sinks.senders == []
    assert sinks.lost([]) == []
    sinks.close()


async def test_a_collector_that_refuses_everything_makes_no_log_grow(
    http: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The records that count what is given up are refused as well, by two collectors, each of which gets the other's:
    with nothing else to record they are tried again, and no more are made."""
    http.refuse(400)
    path = tmp_path / "audit.jsonl"

    def given_up() -> int:
        return len(events(path, EVENT))

    async with logging(path, {"siem": sink(http), "copy": sink(http)}) as audit:
        put(audit, 1)
        senders = audit.sinks.senders
        await until(lambda: all(one.dropped >= 2 for one in senders))  # the chain's begin, and the record

        async def tried_on(rounds: int = module.REFUSALS + 1) -> None:
            failures = [one.failures for one in senders]
            await until(lambda: all(one.failures > had + rounds for one, had in zip(senders, failures, strict=True)))

        await tried_on()
        before = given_up()
        await tried_on()
        assert given_up() == before, "the log has come to rest"
        for number in range(2, 5):
            put(audit, number)
            await tried_on()
        assert given_up() <= before + 3 * 4, "two for each record and collector"
        assert all("answered 400" in one.failure for one in senders)
        assert all(one.lag > 0 for one in senders), "and the self-check comes to warn"
        http.refuse()
        await until(lambda: all((one.failure, one.waiting_bytes) == ("", 0) for one in senders))
        told = [one for one in map(json.loads, once(http.texts)) if one.get("event") == EVENT]
        assert {found["sink"] for found in told} == {"siem", "copy"}, "the last count of each has arrived"


async def test_what_a_kill_has_left_of_a_position_is_removed_at_the_start(http: Collector, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    position = position_file(path, "siem")
    left, others = tmp_path / f".{position.name}.{'0f' * 8}", [f".{position.name}.old", f".x.{'0f' * 8}"]
    left.touch()
    for other in others:
        (tmp_path / other).touch()
    async with logging(path, {"siem": sink(http)}) as audit:
        put(audit, 1)
        await until(lambda: numbers(http.texts) == [1])
        assert not left.exists()
        assert all((tmp_path / other).exists() for other in others)
