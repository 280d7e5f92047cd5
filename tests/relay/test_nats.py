from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path

import pytest

from arcbridge.errors import ConfigError
from arcbridge.pki.authority import Authority
from arcbridge.relay.nats import NatsConnection, NatsUnavailable, NoReply, NoResponder, check, subject_token
from arcbridge.settings.config import RelayFleetConfig
from tests.relay.conftest import Connect, Connections, settings
from tests.support.eventually import until
from tests.support.nats_server import NatsServer, silent_port


class Echo:
    """A handler that echoes each request, in `tasks` of its own."""

    def __init__(self, connection: NatsConnection) -> None:
        self.connection = connection
        self.heard: list[bytes] = []
        self.tasks: list[asyncio.Future[None]] = []

    def __call__(self, message: object) -> None:
        self.heard.append(message.data)
        if reply := message.reply:
            self.tasks.append(asyncio.ensure_future(self.connection.publish(reply, message.data)))


class TestMessages:
    async def test_request_and_reply(self, connections: Connections) -> None:
        asking, answering = await connections.make(), await connections.make()
        echo = Echo(answering)
        subscription = await answering.subscribe("here", echo)
        await answering.flush(10)
        assert await asking.request("here", b"hello", 10) == b"hello"
        with pytest.raises(NoResponder):
            await asking.request("nowhere", b"", 10)
        await answering.unsubscribe(subscription)
        await answering.flush(10)
        with pytest.raises(NoResponder):
            await asking.request("here", b"", 10)

    async def test_silence_of_one_is_not_silence_of_nats(self, connections: Connections) -> None:
        asking, silent = await connections.make(), await connections.make()
        await silent.subscribe("here", lambda message: None)
        await silent.flush(10)
        for _ in range(3):
            with pytest.raises(NoReply):
                await asking.request("here", b"", 0.05)
            assert asking.connected

    async def test_cancelled_requests_leave_nothing(self, connections: Connections) -> None:
        asking = await connections.make()
        await asking.subscribe("here", lambda message: None)
        await asking.flush(10)
        tasks = [asyncio.create_task(asking.request("here", b"", 60)) for _ in range(500)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not asking.client._resp_map

    async def test_a_slow_subscription_is_made_anew(self, connections: Connections) -> None:
        """docs/threats.md#Q2: dropped messages are lost; the subscription is not."""
        slow, fast = await connections.make(), await connections.make()
        heard: list[bytes] = []

        def handler(message: object) -> None:
            heard.append(message.data)

        subscription = await slow.subscribe("here", handler)
        await slow.flush(10)
        first = subscription.live
        first._pending_queue._maxsize = 1
        for n in range(2000):
            await fast.publish("here", str(n).encode())
        await until(lambda: slow.slow_consumers)
        await until(lambda: subscription.live not in (first, None))
        await slow.flush(10)
        heard.clear()
        await fast.publish("here", b"after")
        await until(lambda: b"after" in heard)


class TestConnection:
    @pytest.mark.parametrize("how", ["stop", "freeze"])
    async def test_down_and_up_again(self, own_server: NatsServer, connect: Connect, how: str) -> None:
        """docs/threats.md#F1: calls fail at once or in the time given, nothing is kept for later, subscriptions come
        back.
        """
        connections = connect(own_server)
        one, two = await connections.make(), await connections.make()
        echo = Echo(two)
        await two.subscribe("here", echo)
        await two.flush(10)
        changes: list[bool] = []
        one.on_change = lambda: changes.append(one.connected)
        getattr(own_server, how)()
        began = time.monotonic()
        with pytest.raises((NoReply, NatsUnavailable)):
            await one.request("here", b"old", 1.0)
        await until(lambda: not one.connected)
        await until(lambda: changes and not changes[-1])
        assert time.monotonic() - began < 10
        began = time.monotonic()
        for _ in range(50):
            with pytest.raises(NatsUnavailable):
                await one.request("here", b"late", 10)
            with pytest.raises(NatsUnavailable):
                await one.publish("here", b"late")
        assert time.monotonic() - began < 1
        if how == "stop":
            own_server.start()
        else:
            own_server.thaw()
        back = time.monotonic()
        await until(lambda: one.connected and two.connected)
        assert time.monotonic() - back < 15
        assert await one.request("here", b"new", 10) == b"new"
        assert b"late" not in echo.heard

    async def test_frozen_for_long(
        self, own_server: NatsServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The connection is given up, also with much to send, and leaves no task behind (docs/threats.md#Q1)."""
        monkeypatch.setattr("arcbridge.relay.nats.PING", 0.2)
        connection = await connect(own_server).make()
        for n in range(20):
            await connection.subscribe(f"here.{n}", lambda message: None)
        await connection.flush(10)
        tasks = asyncio.all_tasks()
        own_server.freeze()
        for _ in range(200):
            # More than the sockets take.
            await connection.publish("here.0", b"x" * 100_000)
        client = connection._client
        await until(lambda: connection._client is not client)
        own_server.thaw()
        await until(lambda: connection.connected)
        await connection.flush(10)
        await until(lambda: len(asyncio.all_tasks()) <= len(tasks))
        gc.collect()

    async def test_a_server_that_says_nothing(self, own_server: NatsServer) -> None:
        """Among several servers one that works is found."""
        with silent_port() as port:
            config = RelayFleetConfig(servers=(f"nats://127.0.0.1:{port}", own_server.url, "nats://127.0.0.1:9"))
            connection = NatsConnection(config)
            try:
                assert await connection.start(60)
            finally:
                await connection.close()

    async def test_closing_in_any_state(self, own_server: NatsServer) -> None:
        own_server.freeze()
        for wait in (0.0, 0.3):
            connection = NatsConnection(settings(own_server))
            assert not await connection.start(wait)
            await connection.close()
        own_server.thaw()
        assert len(asyncio.all_tasks()) == 1

    async def test_passwords_and_permissions(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """The permissions of docs/run.md are enough, and what is not among them is refused."""
        page = (Path(__file__).parents[2] / "docs" / "run.md").read_text()
        permissions = page[page.index("    permissions {") : page.index("A relay needs nothing else")]
        config = f'authorization {{ users = [ {{ user: "relay-1", password: "secret", {permissions} }} ] }}\n'
        password = tmp_path / "password"
        password.write_text("secret\n")
        with NatsServer(tmp_path / "nats", config=config) as server:
            connection = NatsConnection(settings(server, name="relay-1", user="relay-1", password_file=password))
            assert await connection.start(30)
            from arcbridge.relay.fleet.nats import NatsFleet
            from arcbridge.relay.registry.nats import NatsRegistry
            from tests.relay.fleet.conformance import DIAL, Link

            fleet, registry = NatsFleet(connection), NatsRegistry(connection)
            await fleet.start()
            registry.start()
            await fleet.register(Link())
            assert await registry.create_join_token("prod", expires_at=time.time() + 60)
            assert await registry.revocations() == frozenset()
            await registry.adopt("prod", Authority.create("prod").certificate_pem, time.time())
            assert await registry.revoke_cluster("prod")
            assert await registry.unrevoke_cluster("prod")
            assert [record.name for record in await registry.clusters()] == ["prod"]
            assert await registry.list_join_tokens()
            await until(lambda: registry._complete)
            for number in range(300):  # more than the library takes without flow control
                await registry._bucket.write(f"other.{number}", {"text": "x" * 2000}, 0)
            assert len(await registry._bucket.read_all("other.>")) == 300
            assert (await fleet.dial("prod", DIAL, 10)).token == "t"
            assert await fleet.address_of(fleet.relay_id) == ""
            assert dict(await fleet.count(["prod"])) == {"prod": 1}
            assert "complains" not in capsys.readouterr().out
            await connection.publish("$JS.API.STREAM.PURGE.KV_arcbridge", b"")
            told = ""
            async with asyncio.timeout(30):
                while "STREAM.PURGE" not in told.upper():
                    told += capsys.readouterr().out
                    await asyncio.sleep(0.02)
            assert [record.name for record in await registry.clusters()] == ["prod"]
            await connection.subscribe("arcbridge.inbox.relay-2.>", lambda message: None)
            told = ""
            async with asyncio.timeout(30):
                while "relay-2" not in told:
                    told += capsys.readouterr().out
                    await asyncio.sleep(0.02)
            await registry.close()
            await fleet.close()
            await connection.close()
            wrong = tmp_path / "wrong"
            wrong.write_text("not it\n")
            connection = NatsConnection(settings(server, user="relay-1", password_file=wrong))
            assert not await connection.start(0.5)
            await connection.close()
            assert "not it" not in capsys.readouterr().out

    @pytest.mark.parametrize("scheme", ["nats", "tls"])
    async def test_tls_both_ways(self, tmp_path: Path, scheme: str) -> None:
        """The server's certificate is verified under our CA, and it asks for ours."""
        ca = Authority.create("NATS")
        server, client = ca.issue_server(["127.0.0.1"]), ca.issue_client("relay")
        files = {"ca": ca.certificate_pem, "server": server.certificate_pem, "server-key": server.key_pem,
                 "client": client.certificate_pem, "client-key": client.key_pem}  # fmt: skip
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        (tmp_path / "stranger").write_text(Authority.create("other").certificate_pem)
        config = (
            f'tls {{ cert_file: "{tmp_path / "server"}", key_file: "{tmp_path / "server-key"}", '
            f'ca_file: "{tmp_path / "ca"}", verify: true }}\n'
        )
        with NatsServer(tmp_path / "nats", config=config) as nats:
            url = nats.url.replace("nats://", f"{scheme}://")

            async def connects(**files: Path) -> bool:
                connection = NatsConnection(RelayFleetConfig(servers=(url,), **files))
                try:
                    return await connection.start(30 if len(files) == 3 and "ca" in files["ca_file"].name else 0.5)
                finally:
                    await connection.close()

            pair = {"certificate": tmp_path / "client", "key": tmp_path / "client-key"}
            assert await connects(ca_file=tmp_path / "ca", **pair)
            assert not await connects(ca_file=tmp_path / "ca")
            assert not await connects(ca_file=tmp_path / "stranger", **pair)

    @pytest.mark.parametrize("setting", ["ca_file", "password_file"])
    async def test_a_missing_file_is_named_and_waited_for(
        self, own_server: NatsServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
    ) -> None:
        more = (
            {"user": "a", setting: tmp_path / "not there"} if setting == "password_file" else {setting: tmp_path / "x"}
        )
        connection = NatsConnection(settings(own_server, **more))
        assert not await connection.start(0.3)
        told = ""

        def is_told() -> bool:
            nonlocal told
            told += capsys.readouterr().out
            return f"fleet.{setting}" in told

        await until(is_told)
        assert not connection.connected
        await connection.close()


class TestSettings:
    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"servers": ("http://a:1",)}, "fleet.servers"),
            ({"servers": ("a:4222",)}, "fleet.servers"),
            ({"servers": ("nats://user:secret@a:4222",)}, "password_file"),
            ({"name": "a.b"}, "fleet.name"),
            ({"name": "a>"}, "fleet.name"),
            ({"prefix": "a..b"}, "fleet.prefix"),
            ({"prefix": "a.*"}, "fleet.prefix"),
            ({"bucket": "a.b"}, "fleet.bucket"),
            ({"replicas": 0}, "fleet.replicas"),
            ({"replicas": 7}, "fleet.replicas"),
            ({"user": "a"}, "password_file"),
            ({"password_file": Path("p")}, "password_file"),
            ({"credentials": Path("c"), "user": "a", "password_file": Path("p")}, "two ways"),
            ({"certificate": Path("c")}, "certificate and key"),
        ],
    )
    def test_bad_ones_are_named(self, wrong: dict[str, object], words: str) -> None:
        config = RelayFleetConfig(**{"servers": ("nats://a:4222",), **wrong})
        with pytest.raises(ConfigError) as caught:
            check(config)
        assert words in caught.value.message
        assert "secret" not in caught.value.message

    def test_good_ones(self) -> None:
        check(RelayFleetConfig(servers=("nats://a:1", "tls://[::1]:2"), prefix="a.b", name="relay-1", replicas=3))
        check(RelayFleetConfig())

    def test_cluster_names_in_subjects(self) -> None:
        assert subject_token("a.b-c") == "a_b-c"
        for name in ("a_b", "a*", ">", "", "a b", "A"):
            with pytest.raises(ConfigError):
                subject_token(name)
