"""The background process: what it answers, what it keeps, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.background import local_channel, lock_holder
from arcbridge.client.background import process as process_module
from arcbridge.client.background.caller import NotRunning, OtherVersion, exchange, request
from arcbridge.client.background.clusters import ServedClusters
from arcbridge.client.background.connection_settings import UNKNOWN
from arcbridge.client.background.connections import Connections
from arcbridge.client.kubeconfig.entries import Kubeconfig
from arcbridge.client.serving.served_cluster import ServedCluster
from arcbridge.errors import ArcbridgeError, ExitCode
from arcbridge.installation import own_path
from arcbridge.net.join import JoinCode
from arcbridge.pki.private_files import try_lock
from arcbridge.wire.records import JoinReply
from tests.client.background.conftest import Background
from tests.client.far_side import CLUSTER
from tests.support.eventually import until


async def test_connect_status_and_disconnect(background: Background) -> None:
    background.kubeconfig.write_text("current-context: home\n")
    async with background.running() as task:
        answer = await background.connect()
        assert answer == {
            "cluster": CLUSTER,
            "context": CLUSTER,
            "port": answer["port"],
            "kubeconfig": str(background.kubeconfig),
            "current": True,
        }
        document = background.document()
        assert document["current-context"] == CLUSTER
        user = document["users"][0]["user"]["exec"]
        assert (user["command"], user["args"]) == (own_path(), ["credential", *background.arguments])
        status = await background.ask("status")
        (one,) = status["clusters"]
        assert (one["name"], one["user"], one["state"], one["port"]) == (CLUSTER, "alice", "connected", answer["port"])
        assert one["contexts"] == [CLUSTER]
        gone = await background.ask("disconnect", CLUSTER)
        assert gone == {"disconnected": [{"cluster": CLUSTER, "context": CLUSTER}]}
        await asyncio.wait_for(task, 10)
    assert background.document()["current-context"] == "home"
    assert background.document()["contexts"] == []
    assert Connections(Path(background.place.connections)).all() == []
    assert json.loads((Path(background.place.state) / "ports.json").read_text()) == {}
    with pytest.raises(NotRunning):
        await background.ask("status")


async def test_a_port_that_was_taken_meanwhile_moves_and_the_context_says_so(background: Background) -> None:
    async with background.running():
        port = (await background.connect())["port"]
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        async with background.running():
            with pytest.raises(ArcbridgeError) as caught:
                await background.ask("credential", *background.arguments, server=f"https://127.0.0.1:{port}")
            assert f"the context in {background.kubeconfig} says so now: run the command again" in caught.value.message
            server = background.document()["clusters"][0]["cluster"]["server"]
            assert server != f"https://127.0.0.1:{port}"
            await background.ask("credential", *background.arguments, server=server)


async def test_a_credential_for_a_cluster_that_was_not_connected_serves_it(background: Background) -> None:
    """As after the state directory was lost: the kubeconfig has all that is needed."""
    async with background.running():
        answer = await background.ask("credential", *background.arguments, server="")
        assert answer["kind"] == "ExecCredential"
        with pytest.raises(ArcbridgeError, match=f"run `arcbridge connect {CLUSTER}`"):
            await background.ask("credential", *background.arguments, server="https://127.0.0.1:1")


@pytest.mark.parametrize(
    ("code", "exit_code"), [(JoinCode.NO_AGENT, ExitCode.UNREACHABLE), (JoinCode.UNAUTHENTICATED, ExitCode.LOGIN)]
)
async def test_a_cluster_that_cannot_be_reached_changes_nothing(
    background: Background, code: JoinCode, exit_code: ExitCode
) -> None:
    background.far.reply = JoinReply(code=code)
    async with background.running():
        with pytest.raises(ArcbridgeError) as caught:
            await background.connect()
        assert caught.value.exit_code == exit_code
        assert (await background.ask("status"))["clusters"] == []
    assert not background.kubeconfig.exists()
    assert Connections(Path(background.place.connections)).all() == []
    assert not (Path(background.place.state) / "ports.json").exists()


async def test_static_is_a_certificate_while_it_runs_and_the_plugin_afterwards(background: Background) -> None:
    async with background.running():
        await background.connect(static="yes")
        assert "client-key-data" in background.document()["users"][0]["user"]
    assert background.document()["users"][0]["user"]["exec"]["args"] == ["credential", *background.arguments]
    async with background.running():
        assert "client-key-data" in background.document()["users"][0]["user"]


async def test_static_that_is_written_during_the_end_is_the_plugin_afterwards_too(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge, begun, goes_on = Kubeconfig.merge, threading.Event(), threading.Event()

    def slow(*arguments: Any, **options: Any) -> Any:
        begun.set()
        assert goes_on.wait(10)
        return merge(*arguments, **options)

    async with background.running() as task:
        monkeypatch.setattr(Kubeconfig, "merge", slow)
        connecting = asyncio.create_task(background.connect(static="yes"))
        assert await asyncio.to_thread(begun.wait, 10)
        await background.ask("stop")
        goes_on.set()
        await asyncio.gather(connecting, return_exceptions=True)  # its answer may still have come
        await asyncio.wait_for(task, 10)
    assert background.document()["users"][0]["user"]["exec"]["args"] == ["credential", *background.arguments]


async def test_static_that_comes_back_during_the_end_is_the_plugin_afterwards_too(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcbridge.client.background.clusters.RETRY", 0.05)
    refresh, repair = Kubeconfig.refresh, Kubeconfig.repair
    begun, goes_on, repaired = threading.Event(), threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        begun.set()
        assert goes_on.wait(10)
        return refresh(*arguments)

    def noted(*arguments: Any) -> Any:
        repaired.set()
        return repair(*arguments)

    async with background.running():
        await background.connect(static="yes")
    background.take_settings_away(True)
    async with background.running() as task:
        monkeypatch.setattr(Kubeconfig, "refresh", slow)
        monkeypatch.setattr(Kubeconfig, "repair", noted)
        background.take_settings_away(False)
        assert await asyncio.to_thread(begun.wait, 10)
        await background.ask("stop")
        behind = await asyncio.to_thread(repaired.wait, 0.2)
        goes_on.set()
        await asyncio.wait_for(task, 10)
    assert not behind
    assert background.document()["users"][0]["user"]["exec"]["args"] == ["credential", *background.arguments]


async def test_a_static_connection_that_failed_is_the_plugin_afterwards_too(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter, made = ServedClusters._enter, list[ServedClusters]()

    def noted(clusters: ServedClusters, *arguments: Any) -> None:
        made.append(clusters)
        enter(clusters, *arguments)

    monkeypatch.setattr(ServedClusters, "_enter", noted)
    async with background.running() as task:
        await background.connect(static="yes")
        clusters = made[0]
        (served,) = clusters.served.values()
        await clusters._give_up(served, "a defect")
        assert "exec" not in background.document()["users"][0]["user"]
        await background.ask("stop")
        await asyncio.wait_for(task, 10)
    assert background.document()["users"][0]["user"]["exec"]["args"] == ["credential", *background.arguments]


async def test_what_cannot_be_served_again_is_told(background: Background) -> None:
    async with background.running():
        await background.connect()
    file = Path(background.place.connections)
    file.write_text(file.read_text().replace('"cluster": [', '"unknown": "x", "cluster": ['))
    async with background.running():
        (one,) = (await background.ask("status"))["clusters"]
        assert (one["state"], one["reason"]) == ("failed", UNKNOWN)
        await background.ask("disconnect", every="yes")


async def test_another_version_is_told(background: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    async with background.running():
        monkeypatch.setattr(process_module, "__version__", "0.0.1")
        with pytest.raises(OtherVersion, match=r"0\.0\.1"):
            await background.ask("status")


async def test_one_that_serves_nothing_ends(background: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "IDLE_END", 0.01)
    async with background.running() as task:
        await asyncio.wait_for(task, 10)


async def test_stop(background: Background) -> None:
    async with background.running() as task:
        await background.connect()
        assert await background.ask("stop") == {"stopped": True}
        await asyncio.wait_for(task, 10)
    assert background.document()["current-context"] == CLUSTER  # the plugin starts the next one
    assert len(Connections(Path(background.place.connections)).all()) == 1


async def test_a_connect_that_is_being_proved_at_an_end_leaves_nothing(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller hears nothing, and asks the next process, which may want its port as soon as the lock is free."""
    close, closed = ServedCluster.close, []

    async def slow(self: ServedCluster) -> None:
        await asyncio.sleep(0.2)
        await close(self)
        closed.append(self.port)

    monkeypatch.setattr(ServedCluster, "close", slow)
    background.far.answers.clear()
    async with background.running() as task:
        connecting = asyncio.create_task(background.connect())
        await asyncio.wait_for(background.far.joined.wait(), 10)
        await background.ask("stop")
        await asyncio.wait_for(task, 10)
        assert len(closed) == 1
        with pytest.raises(NotRunning):
            await connecting
    background.far.answers.set()
    assert not background.kubeconfig.exists()
    assert Connections(Path(background.place.connections)).all() == []


async def test_w14_a_program_of_another_user_is_refused(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with background.running():
        monkeypatch.setattr(
            local_channel, "foreign_user", lambda sock: 12345 if isinstance(sock, socket.socket) else None
        )
        with pytest.raises(NotRunning):
            await background.ask("version")
        monkeypatch.undo()
        assert (await background.ask("version"))["pid"]


async def test_w14_the_socket_is_for_this_user_alone(background: Background) -> None:
    async with background.running():
        assert Path(background.place.socket).stat().st_mode & 0o777 == 0o600
        assert Path(background.place.runtime).stat().st_mode & 0o777 == 0o700
    assert not Path(background.place.socket).exists()


@pytest.mark.parametrize(
    "line",
    [
        b"{\n",
        b"[]\n",
        b"null\n",
        b'{"operation": "status"}\n',
        request("nonsense"),
        b'{"operation":1,"version":2,"arguments":3}\n',
    ],
    ids=["broken", "list", "null", "short", "unknown", "types"],
)
async def test_what_is_no_request_is_answered_with_an_error(background: Background, line: bytes) -> None:
    async with background.running():
        answer = json.loads(await asyncio.to_thread(exchange, background.place, line))
        assert answer["error"]


async def test_running_streams_survive_the_next_version(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former process keeps what runs, the next one accepts what comes; both are real, in one loop."""
    async with background.running() as former:
        port = (await background.connect())["port"]
        reader, writer = await through(background, port)
        writer.write(b"one ")
        assert await reader.readexactly(4) == b"one "
        async with _next_version(background, monkeypatch):
            status = await background.ask("status")
            assert status["process"]["former_versions"] == 1
            assert [one["port"] for one in status["clusters"]] == [port]
            writer.write(b"two ")
            assert await reader.readexactly(4) == b"two "
            more, writing = await through(background, port)
            writing.write(b"new ")
            assert await more.readexactly(4) == b"new "
            assert not former.done()
            writer.close()
            await asyncio.wait_for(former, 20)
            writing.close()


async def test_no_port_moves_by_an_upgrade_where_a_cluster_has_two_contexts(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with background.running() as former:
        port = (await background.connect())["port"]
        await background.connect("--kube-context", "mine")
        await background.connect()  # kept behind the other one now
        async with _next_version(background, monkeypatch):
            (one,) = (await background.ask("status"))["clusters"]
            assert (one["port"], sorted(one["contexts"])) == (port, ["mine", CLUSTER])
            await asyncio.wait_for(former, 20)
    servers = {item["cluster"]["server"] for item in background.document()["clusters"]}
    assert servers == {f"https://127.0.0.1:{port}"}


async def test_a_connect_is_never_lost_in_an_upgrade(background: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    """The former process leaves it to the next one, which would not know of it otherwise."""
    async with background.running() as former:
        background.far.answers.clear()
        connecting = asyncio.create_task(background.connect())
        await asyncio.wait_for(background.far.joined.wait(), 10)
        async with _next_version(background, monkeypatch):
            background.far.answers.set()
            with pytest.raises(NotRunning):
                await connecting
            await asyncio.wait_for(former, 20)
            assert not background.kubeconfig.exists()
            assert (await background.connect())["current"]


async def test_a_directory_that_is_removed_under_it_comes_back(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second process would find the lock held, and the first one again: there are never two."""
    monkeypatch.setattr(process_module, "SOCKET_CHECK", 0.05)
    async with background.running() as first:
        port = (await background.connect())["port"]
        shutil.rmtree(background.place.runtime)
        with pytest.raises(NotRunning):
            exchange(background.place, request("version"))  # in one turn with the removal: it may come back in the next
        async with background.running() as second:  # what the next command starts
            await asyncio.wait_for(second, 20)
        assert not first.done()
        (one,) = (await background.ask("status"))["clusters"]
        assert (one["port"], one["state"]) == (port, "connected")
        assert Path(background.place.socket).stat().st_mode & 0o777 == 0o600


async def test_a_state_directory_that_is_removed_under_it_is_locked_anew(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next command's process would find the lock free, and the two would take the socket from each other."""
    monkeypatch.setattr(process_module, "SOCKET_CHECK", 0.05)
    monkeypatch.setattr(process_module, "IDLE_END", 3600.0)
    async with background.running() as first:
        await background.connect()
        _remove(background)
        await until(lambda: Path(background.place.socket).exists())
        async with background.running() as second:
            await asyncio.wait_for(second, 20)  # not for want of work
        assert not first.done()
        assert len((await background.ask("status"))["clusters"]) == 1


async def test_a_command_that_looks_at_the_lock_is_no_other_process(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def taken_once(path: Path) -> int | None:
        nonlocal looks
        looks += 1
        return None if looks == 1 else try_lock(path)

    monkeypatch.setattr(process_module, "SOCKET_CHECK", 0.05)
    async with background.running() as process:
        await background.connect()
        monkeypatch.setattr(process_module, "try_lock", taken_once)
        _remove(background)
        await until(lambda: looks == 2 and Path(background.place.socket).exists())
        assert not process.done()


async def test_a_beat_comes_at_once() -> None:
    """A caller after one that got no answer waits for it a third of a second."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(10)
        beating = asyncio.create_task(process_module._beat(ours))
        assert await asyncio.to_thread(theirs.recv, 10) == b" "
        beating.cancel()


async def test_the_lock_names_none_while_it_is_handed_over(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next process may be of a version that signs nothing: `stop` would kill this one with its streams."""
    named: list[lock_holder.Holder | None] = []

    def fail(*_: object) -> None:
        named.append(lock_holder.holder_of(background.place))
        raise OSError

    monkeypatch.setattr("arcbridge.client.background.handover.send", fail)
    async with background.running():
        await background.connect()
        before = lock_holder.holder_of(background.place)
        with pytest.raises(NotRunning):
            await background.ask("hand-over")
        assert named == [None]
        assert lock_holder.holder_of(background.place) == before is not None


async def test_a_process_whose_lock_another_one_has_taken_ends(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_module, "SOCKET_CHECK", 0.3)
    monkeypatch.setattr(process_module, "IDLE_END", 3600.0)
    looked, has_the_socket = asyncio.Event(), process_module.BackgroundProcess._has_the_socket

    def look(self: process_module.BackgroundProcess) -> bool:
        looked.set()
        return has_the_socket(self)

    monkeypatch.setattr(process_module.BackgroundProcess, "_has_the_socket", look)
    async with background.running() as first:
        await background.connect()
        # Right behind a look of the first process, so that the second one begins before the next look.
        looked.clear()
        await asyncio.wait_for(looked.wait(), 20)
        _remove(background)
        async with background.running() as second:
            assert not second.done()
            await asyncio.wait_for(first, 10)
            assert (await background.ask("status"))["clusters"] == []
            await asyncio.sleep(0.5)  # time enough for a look in which the second would miss its socket
            assert not second.done()
            assert Path(background.place.socket).exists()


def _remove(background: Background) -> None:
    """Remove the state directory and the directory of the socket, as by hand."""
    shutil.rmtree(background.place.runtime)
    shutil.rmtree(background.place.state)


@contextlib.asynccontextmanager
async def _next_version(background: Background, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """Have a process of another version serve, whose callers are of its version, and stop it at the end."""
    monkeypatch.setattr(process_module, "__version__", "0.0.2")
    monkeypatch.setattr(process_module.BackgroundProcess, "_is_served", lambda self: False)
    ready = asyncio.Event()
    process = process_module.BackgroundProcess(background.place, background.environment)
    following = asyncio.create_task(process.run(ready.set))
    await asyncio.wait_for(ready.wait(), 20)
    monkeypatch.undo()
    yield
    await background.ask("stop")
    await asyncio.wait_for(following, 20)


async def through(background: Background, port: int, *more: str) -> Any:
    """A connection to the local endpoint with the certificate that the process gives."""
    status = (await background.ask("credential", *background.arguments, *more, server=""))["status"]
    return await background.open(port, status["clientCertificateData"] + status["clientKeyData"])
