"""The supervisor with workers that are real processes: start, death, restart, errors, drain."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import pickle
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import aiohttp
import pytest
from structlog.testing import capture_logs

from arcbridge.audit.verify import verify
from arcbridge.errors import ConfigError, StateError
from arcbridge.net.address import Address, parse_address
from arcbridge.observe.reloads import Outcome
from arcbridge.pki.authority import Authority
from arcbridge.relay import admin
from arcbridge.relay.audit.log import RelayAudit
from arcbridge.relay.backend import registry_of
from arcbridge.relay.data_dir import change_authority, open_authority
from arcbridge.relay.listener import bind
from arcbridge.relay.processes import supervisor as supervisor_module
from arcbridge.relay.processes.supervisor import Supervisor, supervise
from arcbridge.relay.service import RelayInfo, serve
from arcbridge.relay.siblings.channel import MAX_MESSAGE, Channel, Received, pair
from arcbridge.settings.config import ObserveConfig, RelayConfig, RelayLimitsConfig, RelayUserLimitsConfig
from arcbridge.tasks import cancel_and_wait
from tests.relay.audit.test_log import records
from tests.relay.conftest import relay_config
from tests.support.eventually import until
from tests.support.world import fixed_port


@pytest.fixture
def config(tmp_path: Path) -> RelayConfig:
    long = tmp_path / ("long" * 40) / "data"  # longer than the path of a Unix socket may be
    observe = ObserveConfig(listen="127.0.0.1:0")
    return relay_config(tmp_path, "", listen="127.0.0.1:0", data_dir=long, observe=observe, workers=2)


class Running:
    def __init__(self, config: RelayConfig) -> None:
        self.stopping, self.hurry = asyncio.Event(), asyncio.Event()
        self.ready: asyncio.Future[RelayInfo] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(supervise(config, self.ready.set_result, self.stopping, self.hurry))

    async def serving(self) -> RelayInfo:
        await asyncio.wait([self.ready, self.task], return_when=asyncio.FIRST_COMPLETED, timeout=60)
        if self.task.done():
            self.task.result()
        return self.ready.result()

    async def page(self, path: str) -> tuple[int, str]:
        url = f"http://{self.ready.result().observe}{path}"
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            return response.status, await response.text()

    async def metric(self, name: str) -> float:
        _, text = await self.page("/metrics")
        (line,) = [line for line in text.splitlines() if line.startswith(f"arcbridge_relay_{name} ")]
        return float(line.rpartition(" ")[2])


def children() -> list[int]:
    """Return the process ids of this process's workers."""
    found = []
    for one in Path("/proc").iterdir():
        try:
            ours = one.name.isdigit() and f"\nPPid:\t{os.getpid()}\n" in (one / "status").read_text()
            if ours and b"arcbridge-relay-worker" in (one / "cmdline").read_bytes():
                found.append(int(one.name))
        except OSError:
            continue
    return sorted(found)


async def test_a_worker_that_dies_is_started_again(config: RelayConfig) -> None:
    running = Running(config)
    info = await running.serving()
    assert await running.page("/readyz") == (200, "ok\n")
    workers = children()
    assert len(workers) == 2
    # Connections reach each worker: the counts add up, and stay when a worker dies.
    before = await running.metric("connections_total")
    address = parse_address(info.address)
    for _ in range(20):
        socket.create_connection((address.host, address.port)).close()
    async with asyncio.timeout(10):
        while await running.metric("connections_total") < before + 20:
            await asyncio.sleep(0.02)
    os.kill(workers[0], signal.SIGKILL)
    async with asyncio.timeout(30):
        while await running.metric("worker_restarts_total") < 1 or await running.metric("workers_serving") < 2:
            assert (await running.page("/readyz"))[0] == 200, "the other one serves"
            assert await running.metric("connections_total") >= before + 20
            await asyncio.sleep(0.02)
    assert workers[1] in children()
    assert workers[0] not in children()
    # A worker that an operator ends alone is replaced as well.
    os.kill(workers[1], signal.SIGTERM)
    async with asyncio.timeout(30):
        while await running.metric("worker_restarts_total") < 2 or await running.metric("workers_serving") < 2:
            await asyncio.sleep(0.02)
    began = time.monotonic()
    running.stopping.set()
    await asyncio.wait_for(running.task, 20)
    assert time.monotonic() - began < 8, "without sessions a drain takes a moment"
    assert children() == []
    bind(address).close()


async def test_one_process_writes_what_all_record(config: RelayConfig) -> None:
    running = Running(config)
    await running.serving()
    config.policy.write_text('[[allow]]\nusers = ["alice"]\nclusters = ["*"]\n')
    path = config.data_dir / "audit.jsonl"
    await until(lambda: path.read_text().count("policy change") >= 2)
    await admin.revoke_user(admin.at(config), "bob")
    assert await running.metric("audit_records_total") >= 5
    assert await running.metric("audit_failing") == 0
    running.stopping.set()
    await asyncio.wait_for(running.task, 20)
    found = records(path)
    assert sorted(one["worker"] for one in found if one["act"] == "policy change") == [0, 1]
    others = [(one["act"], one["stage"]) for one in found if one["act"] != "policy change"]
    assert others == [
        ("relay start", "complete"), ("user revoke", "begun"), ("user revoke", "ended"), ("relay stop", "complete")
    ]  # fmt: skip
    report = verify([path])
    assert report.ok
    assert len(report.chains) == 1


async def test_an_error_at_the_start_is_the_relays_own(config: RelayConfig) -> None:
    config.authentication.write_text("apiVersion: nonsense\n")
    with pytest.raises(ConfigError, match=r"authentication\.yaml"):
        await Running(config).serving()
    assert children() == []


async def test_a_port_that_is_in_use(config: RelayConfig, tmp_path: Path) -> None:
    """docs/threats.md#R7: also by a relay of this user that shares its port among workers of its own."""
    for shared in (False, True):
        with bind(Address("127.0.0.1", 0), shared=shared) as taken:
            listen = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(ConfigError, match="the port is in use"):
                await Running(replace(config, listen=listen)).serving()
            with pytest.raises(ConfigError, match="the port is in use"):
                await serve(
                    replace(config, listen=listen, workers=1), lambda info: None, asyncio.Event(), asyncio.Event()
                )


async def test_settings_of_five_thousand_users_reach_every_worker(config: RelayConfig) -> None:
    """At the start, by a reload, and when a worker is started again: they are longer than one message."""

    def limited(sessions: int) -> RelayConfig:
        users = {f"oidc:user-{n}@example.com": RelayUserLimitsConfig(sessions=sessions) for n in range(5000)}
        return replace(config, limits=RelayLimitsConfig(users=users))

    assert len(pickle.dumps(limited(1))) > MAX_MESSAGE
    supervisor = Supervisor(limited(1), 2, fixed_port(), os.open(os.devnull, os.O_RDONLY))
    try:
        await supervisor.start()
        outcome = await supervisor.reload(lambda: limited(2))
        assert outcome == Outcome(("limits.users",), ()), "each worker has seen what is different"
        os.kill(children()[0], signal.SIGKILL)
        await until(lambda: supervisor.restarts >= 1 and len(supervisor._serving()) >= 2)
        outcome = await supervisor.reload(lambda: limited(2))
        assert outcome == Outcome((), ()), "also the new worker has the limits of the last reload"
    finally:
        await supervisor.kill()


def started(config: RelayConfig) -> tuple[Supervisor, supervisor_module._WorkerHandle, socket.socket]:
    """A supervisor, a worker that was started with these settings, and the worker's end of the channel."""
    ours, theirs = pair()
    theirs.setblocking(False)
    worker = supervisor_module._WorkerHandle(0)
    worker.channel = Channel(ours, lambda message: None, lambda: None)
    worker.settings = config
    return Supervisor(config, 1, 1, -1), worker, theirs


async def test_metrics_of_more_clusters_than_a_message_holds_reach_the_page(config: RelayConfig) -> None:
    names = [f"{'c' * 58}{number:05}" for number in range(500)]
    pem = Authority.create("one").certificate_pem
    async with registry_of(config) as registry:
        for name in names:
            await registry.adopt(name, pem, 1.0)
    running = Running(config)
    await running.serving()

    async def shown() -> bool:
        _, text = await running.page("/metrics")
        return text.count("arcbridge_relay_cluster_agents{") == len(names)

    await until(shown)
    running.stopping.set()
    running.hurry.set()
    await asyncio.wait_for(running.task, 30)


async def test_what_every_worker_reads_alike_is_not_added_up(config: RelayConfig) -> None:
    open_authority(config.data_dir)
    change_authority(config.data_dir, lambda state: state.take("next", 5.0))
    async with registry_of(config) as registry:
        await registry.revoke_user("bob", 7)
    running = Running(config)
    await running.serving()
    wanted = {"ca_rotation_step_timestamp_seconds": 5.0, "users_revoked": 1.0}
    for name, value in wanted.items():
        async with asyncio.timeout(10):
            while (found := await running.metric(name)) != value:
                assert found < value, name
                await asyncio.sleep(0.05)
    assert await running.metric("workers_serving") == 2
    assert {name: await running.metric(name) for name in wanted} == wanted
    running.stopping.set()
    running.hurry.set()
    await asyncio.wait_for(running.task, 30)


async def test_a_worker_that_started_during_a_reload_is_told_the_new_settings(config: RelayConfig) -> None:
    supervisor, worker, theirs = started(config)
    serving = Received({"t": "serving"}, b"", None)
    supervisor._received(worker, serving)
    with pytest.raises(BlockingIOError):
        theirs.recv(MAX_MESSAGE)  # it has the settings that count
    supervisor._config = replace(config, max_token_lifetime=60.0)
    supervisor._received(worker, serving)
    assert json.loads(theirs.recv(MAX_MESSAGE).partition(b"\n")[0])["t"] == "reload"
    assert worker.settings is supervisor._config
    worker.channel.close()
    theirs.close()


async def test_a_worker_that_is_launched_while_the_relay_stops_goes_as_well(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_DELAY", 0.0)
    supervisor, worker, theirs = started(config)
    _, dead, _ = started(config)
    supervisor._started = True
    dead.process = mock.Mock(wait=mock.AsyncMock(), returncode=-9, pid=1)

    async def launch(index: int) -> None:
        supervisor._workers[index] = worker
        supervisor._stopping.set()

    monkeypatch.setattr(supervisor, "_launch", launch)
    await supervisor._watch(dead)
    told = [json.loads(theirs.recv(MAX_MESSAGE).partition(b"\n")[0])["t"] for _ in range(2)]
    assert told == ["serve", "stop"]
    worker.channel.close()
    theirs.close()


@pytest.mark.parametrize("heard", [False, True])
async def test_a_container_that_was_paused_has_no_silent_workers(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch, heard: bool
) -> None:
    """`docker pause`: the clock goes on. A worker that hangs after it is found as soon as ever."""
    now, killed = 100.0, mock.Mock()
    monkeypatch.setattr(supervisor_module, "time", mock.Mock(monotonic=lambda: now))
    monkeypatch.setattr(supervisor_module, "_kill", killed)
    supervisor, worker, theirs = started(config)
    worker.process, worker.state = mock.Mock(pid=1), supervisor_module.WorkerState.SERVING
    supervisor._workers[0] = worker

    async def looks(*steps: float) -> None:
        left = iter(steps)

        async def sleep(seconds: float) -> None:
            nonlocal now
            if (step := next(left, None)) is None:
                raise asyncio.CancelledError
            now += step
            if heard and step > 1.0:
                worker.heard = now

        with monkeypatch.context() as patch, contextlib.suppress(asyncio.CancelledError):
            patch.setattr(asyncio, "sleep", sleep)
            await supervisor._look()

    await looks(600.0, *[1.0] * 29)
    killed.assert_not_called()
    await looks(1.0, 1.0)
    killed.assert_called_with(worker.process)
    worker.channel.close()
    theirs.close()


async def test_a_worker_without_a_descriptor_for_it_is_an_error_that_is_tried_again(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other than `StateError` ends the watch, and the worker would never be started again."""
    monkeypatch.setattr(supervisor_module, "pair", mock.Mock(side_effect=OSError(errno.EMFILE, "Too many open files")))
    with pytest.raises(StateError, match="a worker cannot be started: Too many open files"):
        await Supervisor(config, 1, 1, -1)._launch(0)


async def test_a_worker_hears_that_its_line_is_written(config: RelayConfig, tmp_path: Path) -> None:
    """So that an act on its socket begins only then (docs/decisions/0033)."""
    path = tmp_path / "audit.jsonl"
    audit = RelayAudit(str(path))
    _, worker, theirs = started(config)
    supervisor = Supervisor(config, 1, 1, -1, audit)
    for number in (0, 7):
        line = json.dumps({"event": "audit", "number": number}).encode()
        supervisor._received(worker, Received({"t": "audit", "n": number}, line, None))
    theirs.setblocking(True)
    told = json.loads((await asyncio.to_thread(theirs.recv, MAX_MESSAGE)).partition(b"\n")[0])
    assert told == {"t": "recorded", "n": 7, "refusal": ""}
    assert [one["number"] for one in records(path)] == [0, 7]
    audit.close()
    worker.channel.close()
    theirs.close()


async def test_a_log_that_fails_is_told_to_the_workers(config: RelayConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also to one that serves later: with `refuse` each of them refuses enrolments."""
    monkeypatch.setattr(supervisor_module, "_LOOK", 0.01)
    audit = RelayAudit("/dev/full", on_failure="refuse")
    _, worker, theirs = started(config)
    supervisor = Supervisor(config, 1, 1, -1, audit)
    supervisor._workers[0] = worker
    audit.note("policy change")
    looking = asyncio.create_task(supervisor._look())
    await until(lambda: supervisor._audit_failure)
    supervisor._received(worker, Received({"t": "serving"}, b"", None))
    told = [json.loads(theirs.recv(MAX_MESSAGE).partition(b"\n")[0]) for _ in range(2)]
    assert told == [{"t": "audit", "failure": "No space left on device"}] * 2
    await cancel_and_wait(looking)
    audit.close()
    worker.channel.close()
    theirs.close()


async def test_a_worker_that_refuses_the_settings_of_its_start_is_in_the_log(config: RelayConfig) -> None:
    """No reload waits for its answer, and it serves under the policy of before."""
    supervisor, worker, theirs = started(config)
    supervisor._config = replace(config, max_token_lifetime=60.0)
    supervisor._received(worker, Received({"t": "serving"}, b"", None))
    number = json.loads(theirs.recv(MAX_MESSAGE).partition(b"\n")[0])["n"]
    with capture_logs() as lines:
        supervisor._received(worker, Received({"t": "reloaded", "n": number, "error": "no such file"}, b"", None))
        supervisor._received(worker, Received({"t": "reloaded", "n": number, "taken": []}, b"", None))
    assert [(line["event"], line["log_level"], line["index"], line["reason"]) for line in lines] == [
        ("settings not reloaded", "error", 0, "no such file")
    ]
    worker.channel.close()
    theirs.close()
