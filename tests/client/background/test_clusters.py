"""What the background process serves: proved before it replaces, whole at each moment, young certificates."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from arcbridge.client.background.caller import NotRunning
from arcbridge.client.background.clusters import AskAgain, Served, ServedClusters
from arcbridge.client.background.connections import Connections
from arcbridge.client.kubeconfig.entries import Kubeconfig
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ArcbridgeError, StateError, Unreachable
from arcbridge.net.join import JoinCode
from arcbridge.pki.authority import certificate_validity
from arcbridge.wire.records import JoinReply
from tests.client.background.conftest import Background
from tests.client.background.test_process import through
from tests.client.far_side import CLUSTER
from tests.support.eventually import until
from tests.support.reports import rewrite
from tests.support.world import fixed_port

DAY = 86400.0


class Stream:
    """A connection of kubectl's through the endpoint to the cluster, which says everything back."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, background: Background, port: int, *more: str) -> Stream:
        stream = cls(*await through(background, port, *more))
        await stream.check()
        return stream

    async def check(self) -> None:
        """It is as it was: nothing has cut it."""
        self.writer.write(b"echo")
        assert await asyncio.wait_for(self.reader.readexactly(4), 10) == b"echo"


def kept(background: Background) -> str:
    return Path(background.place.connections).read_text()


# -- other settings for a context -------------------------------------------------------------------------------------


async def test_a_connect_that_fails_leaves_what_serves_and_what_runs(background: Background, port: int) -> None:
    stream = await Stream.open(background, port)
    before = (background.kubeconfig.read_text(), kept(background), await background.ask("status"))
    background.far.reply = JoinReply(code=JoinCode.NO_AGENT)
    for other in (("--redirect-port", "8123"), ("--port", "0")):
        with pytest.raises(ArcbridgeError):
            await background.connect(*other)
    assert (background.kubeconfig.read_text(), kept(background)) == before[:2]
    (one,) = (await background.ask("status"))["clusters"]
    assert (one["port"], one["state"], one["since"]) == (port, "connected", before[2]["clusters"][0]["since"])
    await stream.check()
    background.far.reply = JoinReply()
    await (await Stream.open(background, port)).check()


async def test_a_kubeconfig_that_cannot_be_written_leaves_them_too(
    background: Background, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise StateError("the kubeconfig is locked")

    stream = await Stream.open(background, port)
    before = kept(background)
    monkeypatch.setattr(Kubeconfig, "merge", refuse)
    with pytest.raises(ArcbridgeError, match="is locked"):
        await background.connect("--redirect-port", "8123")
    monkeypatch.undo()
    assert kept(background) == before
    assert [one["port"] for one in (await background.ask("status"))["clusters"]] == [port]
    await stream.check()
    await (await Stream.open(background, port)).check()


@pytest.mark.usefixtures("port")
async def test_a_port_that_cannot_be_kept_takes_no_connection_back(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then the context says that it is served, and the former connection is gone."""

    def refuse(*_: object) -> None:
        raise StateError("the disk is full")

    monkeypatch.setattr(StateDirectory, "remember_port", refuse)
    free = fixed_port()
    assert (await background.connect("--port", str(free)))["port"] == free
    (one,) = (await background.ask("status"))["clusters"]
    assert (one["port"], one["state"]) == (free, "connected")
    await (await Stream.open(background, free, "--port", str(free))).check()


async def test_a_list_that_is_damaged_takes_no_credential_away(background: Background, port: int) -> None:
    Path(background.place.connections).write_text("{")
    with pytest.raises(ArcbridgeError, match=r"was not changed \(.*connections\.json is damaged"):
        await background.ask("credential", *background.arguments, server="https://127.0.0.1:9")
    await background.ask("credential", *background.arguments, server=f"https://127.0.0.1:{port}")


async def test_other_settings_take_over_the_port(background: Background, port: int) -> None:
    former = await Stream.open(background, port)
    assert (await background.connect("--redirect-port", "8123"))["port"] == port
    (one,) = (await background.ask("status"))["clusters"]
    assert (one["port"], one["contexts"]) == (port, [CLUSTER])
    (kept_one,) = Connections(Path(background.place.connections)).all()
    assert kept_one.settings.words() == (*background.arguments, "--redirect-port", "8123")
    with pytest.raises(ConnectionResetError):  # it ran by the former settings
        await former.reader.read()
    await (await Stream.open(background, port)).check()
    ports = json.loads((Path(background.place.state) / "ports.json").read_text())
    assert list(ports.values()) == [port]


async def test_a_static_certificate_is_no_other_connection(background: Background, port: int) -> None:
    stream = await Stream.open(background, port)
    assert (await background.connect(static="yes"))["port"] == port
    assert "client-key-data" in background.document()["users"][0]["user"]
    assert (await background.connect())["port"] == port
    assert "exec" in background.document()["users"][0]["user"]
    await stream.check()
    (one,) = (await background.ask("status"))["clusters"]
    assert one["contexts"] == [CLUSTER]


@pytest.mark.parametrize("ask", ["connect", "credential"])
async def test_a_restriction_in_the_settings_file_counts_for_what_is_connected(
    background: Background, port: int, ask: str
) -> None:
    """For each context that these settings serve; what ran with more rights ends."""
    await background.connect("--kube-context", "mine", static="yes")
    former = await Stream.open(background, port)
    for table, words in (("read_only = true", ["read-only"]), ('namespaces = ["shop"]', ["namespaces=shop"]), ("", [])):
        background.restrict(table)
        if ask == "connect":
            assert (await background.connect())["port"] == port
        else:
            await background.ask("credential", *background.arguments, server=f"https://127.0.0.1:{port}")
        (one,) = (await background.ask("status"))["clusters"]
        assert (one["restricted"], one["port"], one["contexts"]) == (words, port, [CLUSTER, "mine"])
        with pytest.raises(ConnectionResetError):
            await former.reader.read()
        static = next(user for user in background.document()["users"] if "client-key-data" in user["user"])
        pem = "".join(
            base64.b64decode(static["user"][f"client-{kind}-data"]).decode() for kind in ("certificate", "key")
        )
        former = Stream(*await background.open(port, pem))
        await former.check()


async def test_the_port_of_a_restricted_context_is_kept(background: Background, port: int) -> None:
    """Beside that of the cluster, which another context holds."""
    restricted = await background.connect("--kube-context", "ro", "--read-only")
    assert restricted["port"] != port
    ports = json.loads((Path(background.place.state) / "ports.json").read_text())
    assert sorted(ports.values()) == sorted([port, restricted["port"]])


async def test_a_settings_file_that_cannot_be_read_restricts_nothing_anew(background: Background, port: int) -> None:
    background.restrict("read_only = true")
    await background.connect()
    background.take_settings_away(True)
    await background.ask("credential", *background.arguments, server=f"https://127.0.0.1:{port}")
    assert (await background.ask("status"))["clusters"][0]["restricted"] == ["read-only"]


async def test_other_settings_for_one_of_two_contexts(background: Background, port: int) -> None:
    """What the other context goes on to need is neither closed nor robbed of its port, here and in the list."""
    assert (await background.connect("--kube-context", "mine"))["port"] == port
    (one,) = (await background.ask("status"))["clusters"]
    assert one["contexts"] == [CLUSTER, "mine"]
    stream = await Stream.open(background, port)
    other = (await background.connect("--kube-context", "mine", "--redirect-port", "8123"))["port"]
    assert other != port
    await stream.check()
    status = (await background.ask("status"))["clusters"]
    assert sorted((one["port"], *one["contexts"]) for one in status) == [(port, CLUSTER), (other, "mine")]
    ports = json.loads((Path(background.place.state) / "ports.json").read_text())
    assert list(ports.values()) == [port]
    await background.ask("disconnect", "mine")
    assert [item["name"] for item in background.document()["contexts"]] == [CLUSTER]


async def test_connects_at_once_are_served_once(background: Background) -> None:
    async with background.running():
        answers = await asyncio.gather(*(background.connect() for _ in range(5)))
        (one,) = (await background.ask("status"))["clusters"]
        assert {answer["port"] for answer in answers} == {one["port"]}
        assert len(Connections(Path(background.place.connections)).all()) == 1


@pytest.mark.parametrize("operation", ["connect", "credential"])
async def test_who_waits_for_a_session_at_an_end_asks_the_next_process(
    background: Background, waiting: asyncio.Event, operation: str
) -> None:
    """The end of the session is no answer to what was asked."""
    async with background.running():
        await background.connect()
    background.far.answers.clear()
    async with background.running() as task:
        asking = background.connect() if operation == "connect" else background.ask(operation, *background.arguments)
        caller = asyncio.create_task(asking)
        await asyncio.wait_for(waiting.wait(), 10)
        await background.ask("stop")
        with pytest.raises(NotRunning):
            await asyncio.wait_for(caller, 10)
        await asyncio.wait_for(task, 10)
    background.far.answers.set()


@pytest.mark.parametrize(
    ("operation", "gone", "error"),
    [
        ("connect", "disconnected", AskAgain),
        ("credential", "given up", AskAgain),
        ("credential", "disconnected", Unreachable),  # what the user has just taken back is not connected again
    ],
)
async def test_who_waits_for_a_cluster_that_is_taken_off_meanwhile(
    background: Background, waiting: asyncio.Event, operation: str, gone: str, error: type[Exception]
) -> None:
    async with serving(background) as clusters:
        waiting.clear()  # who connected it has waited, too
        asking = (
            clusters.connect(background.settings, (str(background.kubeconfig),), static=False, switch=True)
            if operation == "connect"
            else clusters.credential(background.settings, "")
        )
        caller = asyncio.create_task(asking)
        await asyncio.wait_for(waiting.wait(), 10)
        if gone == "disconnected":
            await clusters.disconnect((CLUSTER,), every=False)
        else:
            await clusters._give_up(next(iter(clusters.served.values())), "a defect")
        with pytest.raises(error):
            await asyncio.wait_for(caller, 10)
        assert not clusters.served


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once a caller waits for a session."""
    found, ready = asyncio.Event(), SessionManager.ready

    async def told(self: SessionManager, *, before_auth: bool = False) -> Any:
        if self.current is None:
            asyncio.get_running_loop().call_soon(found.set)
        return await ready(self, before_auth=before_auth)

    monkeypatch.setattr(SessionManager, "ready", told)
    return found


@contextlib.asynccontextmanager
async def serving(background: Background) -> AsyncIterator[ServedClusters]:
    """What serves a connection after a restart, and has no session yet: joins are not answered."""
    async with background.running():
        await background.connect()
    background.far.answers.clear()
    clusters = ServedClusters(Path(background.place.connections), background.environment)
    try:
        await clusters.restore({})
        yield clusters
    finally:
        clusters.leaving = True
        await clusters.close_all()
        background.far.answers.set()


async def test_what_failed_and_comes_back_is_still_the_context_s(background: Background) -> None:
    """The kubeconfig that `connect` wrote stays known, so `disconnect` cleans it."""
    async with background.running():
        await background.connect()
    background.take_settings_away(True)
    async with background.running() as task:
        assert (await background.ask("status"))["clusters"][0]["state"] == "failed"
        background.take_settings_away(False)
        await background.ask("credential", *background.arguments, server="")
        (one,) = (await background.ask("status"))["clusters"]
        assert one["state"] == "connected"
        (kept_one,) = Connections(Path(background.place.connections)).all()
        assert kept_one.kubeconfig == (str(background.kubeconfig),)
        await background.ask("disconnect", CLUSTER)
        await asyncio.wait_for(task, 10)
    assert background.document()["contexts"] == []


@pytest.mark.parametrize("static", ["", "yes"], ids=["when it is asked for", "by itself"])
async def test_a_session_that_a_defect_ended_comes_back(
    background: Background, monkeypatch: pytest.MonkeyPatch, static: str
) -> None:
    run = SessionManager.run
    monkeypatch.setattr("arcbridge.client.background.clusters.RETRY", 0.05)

    async def broken(self: SessionManager) -> None:
        raise RuntimeError("a defect")

    async with background.running():
        port = (await background.connect(static=static))["port"]
    monkeypatch.setattr(SessionManager, "run", broken)
    async with background.running():
        one: Any = {}
        async with asyncio.timeout(10):
            while one.get("state") != "failed":
                (one,) = (await background.ask("status"))["clusters"]
        assert one["reason"] == "internal error (RuntimeError); see `arcbridge logs`"
        monkeypatch.setattr(SessionManager, "run", run)
        if not static:  # else nothing would ask for it
            await background.ask("credential", *background.arguments, server=f"https://127.0.0.1:{port}")
        async with asyncio.timeout(10):
            while one["state"] != "connected":
                (one,) = (await background.ask("status"))["clusters"]
        assert (one["port"], one["contexts"]) == (port, [CLUSTER])
        assert ("client-key-data" in background.document()["users"][0]["user"]) == bool(static)
        await (await Stream.open(background, port)).check()


async def test_a_static_connection_whose_settings_were_away_comes_back_by_itself(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcbridge.client.background.clusters.RETRY", 0.05)
    async with background.running():
        await background.connect(static="yes")
    background.take_settings_away(True)
    async with background.running():
        (one,) = (await background.ask("status"))["clusters"]
        assert one["state"] == "failed"
        assert "not valid TOML" in one["reason"]
        background.take_settings_away(False)
        async with asyncio.timeout(10):
            while (await background.ask("status"))["clusters"][0]["state"] != "connected":
                await asyncio.sleep(0.01)


# -- a port that differs ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("port")
async def test_what_to_do_where_the_entry_is_not_ours_to_change(background: Background) -> None:
    document = background.document()
    document["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    background.kubeconfig.write_text(json.dumps(document))
    with pytest.raises(ArcbridgeError) as caught:
        await background.ask("credential", *background.arguments, server="https://127.0.0.1:9")
    assert "was not changed (the entry was changed, or taken out, by hand)" in caught.value.message
    assert caught.value.message.endswith(f"run `arcbridge connect {CLUSTER}` to save it anew")
    assert background.document() == document
    # And that helps.
    port = (await background.connect())["port"]
    await background.ask("credential", *background.arguments, server=f"https://127.0.0.1:{port}")


async def test_what_to_do_where_no_kubeconfig_is_known(background: Background) -> None:
    arguments = (*background.arguments, "--kube-context", "mine")
    async with background.running():
        with pytest.raises(ArcbridgeError, match=f"run `arcbridge connect {CLUSTER} --kube-context mine` to save"):
            await background.ask("credential", *arguments, server="https://127.0.0.1:9")


# -- certificates -----------------------------------------------------------------------------------------------------


def certificate_of(document: Any) -> str:
    return base64.b64decode(document["users"][0]["user"]["client-certificate-data"]).decode()


async def test_a_long_life_renews_both_certificates_and_cuts_nothing(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It begins in the past, so that TLS, which has the machine's clock, takes both the former and the new ones.
    monkeypatch.setattr("arcbridge.client.state.CLIENT_CERTIFICATE_LIFE", 90 * DAY)
    now = time.time() - 61 * DAY
    clusters = ServedClusters(Path(background.place.connections), background.environment, lambda: now)
    background.place.make()
    try:
        files = (str(background.kubeconfig),)
        port = (await clusters.connect(background.settings, files, static=True, switch=True))["port"]
        (served,) = clusters.served.values()
        before = pem_of(background)
        stream = Stream(*await background.open(port, before))
        await stream.check()
        first, shown = certificate_of(background.document()), await _shown(background, port)
        for _ in range(2):
            await served.renew()
            await served.update_kubeconfig(lambda: clusters._renewed(served))
            if now > time.time() - DAY:
                break
            assert certificate_of(background.document()) == first
            assert await _shown(background, port) == shown
            now = time.time()
        second = certificate_of(background.document())
        assert second != first
        assert x509.load_pem_x509_certificate(second.encode()).not_valid_after_utc.timestamp() > now + 89 * DAY
        assert await _shown(background, port) != shown
        await stream.check()
        document = await clusters.credential(background.settings, "")
        assert document["status"]["clientCertificateData"] == second
        assert document["status"]["expirationTimestamp"] > time.strftime("%Y-%m-%d", time.gmtime(now + 80 * DAY))
        # A program that read the kubeconfig before goes on, until its certificate ends.
        await Stream(*await background.open(port, before)).check()
    finally:
        clusters.leaving = True
        await clusters.close_all()


async def test_a_renewed_certificate_that_could_not_be_written_is_written_later(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first kubeconfig is broken: the other one is written at once, and the first one when it is whole again."""
    monkeypatch.setattr("arcbridge.client.serving.served_cluster.RENEWAL_CHECK", 0.05)
    now = time.time() - 245 * DAY
    clusters = ServedClusters(Path(background.place.connections), background.environment, lambda: now)
    background.place.make()
    other = background.kubeconfig.with_name("other")
    try:
        for file in (background.kubeconfig, other):
            await clusters.connect(background.settings, (str(file),), static=True, switch=True)
        whole, text = background.document(), background.kubeconfig.read_text()
        background.kubeconfig.write_text("{ half of")
        now = time.time()
        await until(lambda: certificate_of(yaml.safe_load(other.read_text())) != certificate_of(whole))
        rewrite(background.kubeconfig, text)  # it may be read meanwhile
        (served,) = clusters.served.values()
        assert served.certificates is not None
        renewed = served.certificates.client_certificate_pem
        await until(lambda: certificate_of(background.document()) == renewed)
    finally:
        clusters.leaving = True
        await clusters.close_all()


async def test_a_context_that_could_not_be_written_at_the_start_is_written_later(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcbridge.client.serving.served_cluster.RENEWAL_CHECK", 0.05)
    async with background.running():
        await background.connect(static="yes")
    plugin = background.document()["users"][0]["user"]
    assert "exec" in plugin
    text = background.kubeconfig.read_text()
    background.kubeconfig.write_text("{ half of")
    async with background.running():
        await background.ask("status")  # it has begun to serve
        rewrite(background.kubeconfig, text)  # it may be read meanwhile
        await until(lambda: "exec" not in background.document()["users"][0]["user"])
        assert certificate_of(background.document())


def pem_of(background: Background) -> str:
    """The static client certificate of the kubeconfig, and its key."""
    user = background.document()["users"][0]["user"]
    return "".join(base64.b64decode(user[key]).decode() for key in ("client-certificate-data", "client-key-data"))


async def _shown(background: Background, port: int) -> bytes:
    """The certificate that the endpoint shows to a new connection."""
    _, writer = await background.open(port, pem_of(background))
    shown: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return shown


async def test_the_credential_ends_before_certificate_and_token(background: Background, tmp_path: Path) -> None:
    config = replace(background.settings.load(background.environment), port=0)
    served = Served(ClientContext(config, Terminal(), environment={}), CLUSTER, time.time)
    served.bind()
    document = served.exec_credential()
    assert next(iter(document)) == "kind"  # what the plugin looks for
    assert document["spec"] == {"interactive": False}
    status = document["status"]
    ends = datetime.strptime(status["expirationTimestamp"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    assert ends < certificate_validity(status["clientCertificateData"])[1]
    assert "token" not in status
    (tmp_path / "token").write_text("a.b.c")
    served.config = replace(config, token_file=tmp_path / "token")
    assert served.exec_credential()["status"]["token"] == "a.b.c"
    await served.close()
