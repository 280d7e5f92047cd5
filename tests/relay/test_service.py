"""The whole relay in this process: real files, port, TLS, registry, API; enrol, join, revoke, drain."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import aiohttp
import pytest

from arcbridge.audit.verify import verify
from arcbridge.errors import ConfigError, StateError
from arcbridge.mux.session import MuxSession
from arcbridge.net.address import parse_address
from arcbridge.net.dialer import DIRECT, connect
from arcbridge.net.join import JoinCode, client_join
from arcbridge.net.sockets import receive, send_all
from arcbridge.net.tls import ALPN_HTTP, ALPN_JOIN, RelayTrust, fetch_relay_cas, outer_client_context
from arcbridge.pki.authority import Authority
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.relay import admin, service
from arcbridge.relay.certificate import ServerCertificate
from arcbridge.relay.drain import PATIENCE
from arcbridge.relay.registry.base import RegistryUnavailable
from arcbridge.relay.registry.sqlite import SqliteRegistry
from arcbridge.relay.service import RelayInfo, serve
from arcbridge.settings.config import ObserveConfig, RelayConfig
from arcbridge.wire.records import JoinReply, JoinRequest, Revoke
from tests.identity.issuer import URL, Issuer, claims, token
from tests.relay.audit.test_log import records
from tests.relay.conftest import relay_config
from tests.relay.station import Agent, Station, is_cut, refused
from tests.support.eventually import until

POLICY = """
[[allow]]
users = ["oidc:alice"]
clusters = ["prod"]
"""


class Fetcher(Issuer):
    """The issuer's documents, without an issuer's process."""

    async def __call__(self, url: str, ca_pem: str | None) -> object:
        return await self.fetch(url, ca_pem)

    async def ask(self, method: str, url: str, ca_pem: str | None, **_: object) -> object:
        raise AssertionError("no token here points to another place")

    async def close(self) -> None:
        pass


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RelayConfig:
    monkeypatch.setattr(service, "HttpFetcher", Fetcher)
    return relay_config(tmp_path, POLICY, listen="127.0.0.1:0", observe=ObserveConfig(listen="127.0.0.1:0"))


class Running:
    """A relay that serves, and the ends that use it."""

    def __init__(self, config: RelayConfig) -> None:
        self.config = config
        self.stopping, self.hurry = asyncio.Event(), asyncio.Event()
        self.info: RelayInfo
        self.task: asyncio.Task[None]

    async def start(self) -> None:
        ready: asyncio.Future[RelayInfo] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(serve(self.config, ready.set_result, self.stopping, self.hurry))
        await asyncio.wait([ready, self.task], return_when=asyncio.FIRST_COMPLETED)
        if self.task.done():
            self.task.result()
        self.info = ready.result()
        self.ca = (
            await fetch_relay_cas(parse_address(self.info.address), self.info.relay_ca_pin, proxy=DIRECT)
        ).trusted

    async def stop(self) -> None:
        self.stopping.set()
        self.hurry.set()
        await asyncio.wait_for(self.task, 10)

    async def dial(self) -> socket.socket:
        return await connect(parse_address(self.info.address), deadline=5, proxy=DIRECT)

    async def post(self, path: str, body: dict[str, str], **context: object) -> tuple[int, dict[str, str]]:
        tls = outer_client_context(RelayTrust(self.ca), ALPN_HTTP, **context)
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"https://{self.info.address}{path}", json=body, ssl=tls) as response,
        ):
            return response.status, await response.json()

    async def metrics(self) -> str:
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.info.observe}/metrics") as response:
            return await response.text()

    async def shows(self, line: str) -> None:
        """Wait until the metrics have a line."""

        async def is_shown() -> bool:
            return line in await self.metrics()

        await until(is_shown)

    async def join(self, subject: str = "alice") -> tuple[socket.socket, JoinReply]:
        access = token(claims(time.time(), sub=subject))
        context = outer_client_context(RelayTrust(self.ca), ALPN_JOIN)
        sock = await self.dial()
        return sock, await client_join(
            sock, context, "127.0.0.1", JoinRequest(role="client", cluster="prod", token=access)
        )


@contextlib.asynccontextmanager
async def running(config: RelayConfig) -> AsyncIterator[Running]:
    relay = Running(config)
    await relay.start()
    try:
        yield relay
    finally:
        if not relay.task.done():
            await relay.stop()


class EnrolledAgent(Agent):
    """An agent that enrols through the API."""

    server_name = "127.0.0.1"

    def __init__(self, relay: Running) -> None:
        super().__init__(cast(Station, relay), instance="pod-1")
        self.running = relay
        self.told: asyncio.Queue[Revoke] = asyncio.Queue()
        self.cluster_ca = Authority.create("prod").certificate_pem

    def context(self, alpn: str, cluster: str = "") -> ssl.SSLContext:
        return outer_client_context(RelayTrust(self.running.ca), alpn, client_certificate=self.certificate)

    async def __aenter__(self) -> EnrolledAgent:
        made = await admin.create_token(admin.at(self.running.config), cluster="prod")
        key = make_key()
        body = {"join_token": made.token, "csr": make_csr(key), "cluster_ca": self.cluster_ca}
        status, answer = await self.running.post("/v1/enrol", body)
        assert status == 200, answer
        self.certificate = (answer["certificate"], key)
        await self.connect()
        await self.running.shows("arcbridge_relay_agents 1.0")
        return self

    def revoke_received(self, session: MuxSession, revoke: Revoke) -> None:
        self.told.put_nowait(revoke)

    async def hears(self, expected: Revoke) -> None:
        """Wait until the relay says this of a user."""
        async with asyncio.timeout(5):
            while await self.told.get() != expected:
                pass


async def exchange(near: socket.socket, agent: EnrolledAgent) -> socket.socket:
    await send_all(near, b"ping")
    await until(lambda: agent.sockets)
    far = agent.sockets[-1]
    assert await receive(far, 10) == b"ping"
    return far


@contextlib.asynccontextmanager
async def session_under_policy(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Running, socket.socket, socket.socket]]:
    """A session of alice's, near and far end, at a relay that looks at its policy many times a second."""
    monkeypatch.setattr(service, "POLICY_INTERVAL", 0.02)
    monkeypatch.setattr("arcbridge.identity.policy.CHECK_INTERVAL", 0.0)
    async with running(config) as relay, EnrolledAgent(relay) as agent:
        near, _ = await relay.join()
        with near:
            yield relay, near, await exchange(near, agent)


async def test_from_enrolment_to_a_joined_session(config: RelayConfig) -> None:
    before = set(os.listdir("/proc/self/fd"))
    async with running(config) as relay, EnrolledAgent(relay) as agent:
        near, reply = await relay.join()
        with near:
            assert reply.cluster_ca.strip() == agent.cluster_ca.strip()
            assert reply.subject == "oidc:alice"
            far = await exchange(near, agent)
            await send_all(far, b"pong!")
            assert await receive(near, 10) == b"pong!"
            text = await relay.metrics()
            for line in (
                'arcbridge_relay_joins_total{result="ok"} 1.0',
                "arcbridge_relay_pumps_open 1.0",
                'arcbridge_relay_pumped_bytes_total{direction="up"} 4.0',
                'arcbridge_relay_pumped_bytes_total{direction="down"} 5.0',
                "arcbridge_relay_ready 1.0",
                "arcbridge_relay_join_seconds_count 1.0",
            ):
                assert line in text, line
        assert (await refused(relay.join("mallory"))).code == JoinCode.FORBIDDEN
    await until(lambda: len(os.listdir("/proc/self/fd")) <= len(before) + 2)


async def test_what_is_done_to_a_relay_is_in_its_audit(config: RelayConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config.data_dir / "audit.jsonl"
    async with session_under_policy(config, monkeypatch) as (relay, _, _):
        status, _ = await relay.post("/v1/enrol", {"join_token": "x", "csr": make_csr(make_key()), "cluster_ca": "x"})
        assert status == 403
        config.policy.write_text(POLICY.replace("oidc:alice", "oidc:bob"))
        await until(lambda: "policy change" in path.read_text())
        await admin.revoke_user(admin.at(config), "oidc:alice", reason="left")
    found = {(one["act"], one["stage"]): one for one in records(path)}
    assert list(found) == [
        ("relay start", "complete"), ("token create", "begun"), ("token create", "ended"), ("agent enrol", "complete"),
        ("policy change", "complete"), ("user revoke", "begun"), ("user revoke", "ended"), ("relay stop", "complete"),
    ]  # fmt: skip
    enrolled, refused = [one for one in records(path) if one["act"] == "agent enrol"]
    token_id = found["token create", "ended"]["result"]["token_id"]
    assert (enrolled["arguments"]["cluster"], enrolled["arguments"]["token_id"]) == ("prod", token_id)
    assert (refused["outcome"], refused["source"]) == ("refused", enrolled["source"])
    changed = found["policy change", "complete"]
    assert changed["result"] == {"users_lost": 1, "sessions_lost": 1, "users": ["oidc:alice"]}
    assert changed["arguments"]["former"] == found["relay start", "complete"]["arguments"]["policy"]
    assert found["user revoke", "ended"]["uid"] == os.getuid()
    assert verify([path]).ok
    assert len(verify([path]).chains) == 1


async def test_the_policy_counts_whatever_has_become_of_the_registry(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/threats.md#V1: the policy is asked for the sessions that run, too; a broken one cuts no session."""
    async with session_under_policy(config, monkeypatch) as (relay, near, far):
        config.policy.write_text("[[allow]]\nnonsense = 1\n")

        async def fails(self: SqliteRegistry) -> object:
            raise StateError("registry.db is damaged")

        monkeypatch.setattr(SqliteRegistry, "user_revocations", fails)
        monkeypatch.setattr(service, "MAINTENANCE_INTERVAL", 0.05)
        await relay.shows("arcbridge_relay_ready 0.0")
        assert 'sessions_cut_total{reason="policy"} 0.0' in await relay.metrics()
        config.policy.write_text(POLICY.replace("alice", "bob"))
        await is_cut(near, far)
        assert (await refused(relay.join())).code == JoinCode.FORBIDDEN
        assert 'sessions_cut_total{reason="policy"} 1.0' in await relay.metrics()


async def test_the_policy_counts_while_the_registry_hangs(config: RelayConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#V1: who is taken out is refused at the door, too, whatever else waits."""
    monkeypatch.setattr(service, "MAINTENANCE_INTERVAL", 0.05)
    async with session_under_policy(config, monkeypatch) as (relay, near, far):
        hangs = asyncio.Event()

        async def hang(self: SqliteRegistry) -> object:
            hangs.set()
            return await asyncio.Event().wait()

        for question in ("revocations", "user_revocations", "clusters"):
            monkeypatch.setattr(SqliteRegistry, question, hang)
        await asyncio.wait_for(hangs.wait(), 10)
        config.policy.write_text(POLICY.replace("alice", "bob"))
        await is_cut(near, far)
        assert (await refused(relay.join())).code == JoinCode.FORBIDDEN


async def test_a_relay_that_cannot_list_its_clusters_is_as_ready_as_before(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known to be revoked comes from a relay's own copy where NATS does not answer; the list has none."""
    monkeypatch.setattr(service, "MAINTENANCE_INTERVAL", 0.05)
    asked = 0

    async def fails(self: SqliteRegistry) -> object:
        nonlocal asked
        asked += 1
        raise RegistryUnavailable("NATS does not answer")

    monkeypatch.setattr(SqliteRegistry, "clusters", fails)
    async with running(config) as relay:
        await until(lambda: asked > 2)
        await relay.shows("arcbridge_relay_ready 1.0")


async def test_no_revocation_waits_until_all_clusters_are_noted(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fleet's registry takes milliseconds for each cluster, and a slow one much longer."""
    monkeypatch.setattr(service, "MAINTENANCE_INTERVAL", 0.05)
    monkeypatch.setattr(service, "_SEEN", 0.05)
    noting = asyncio.Event()

    async def hangs(self: SqliteRegistry, name: str, when: float, *, version: str | None = None) -> None:
        noting.set()
        await asyncio.Event().wait()

    async with running(config) as relay, EnrolledAgent(relay) as agent:
        await agent.hears(Revoke(first=True))
        monkeypatch.setattr(SqliteRegistry, "seen", hangs)
        await asyncio.wait_for(noting.wait(), 10)
        made = await admin.revoke_user(admin.at(config), "oidc:alice")
        await agent.hears(Revoke("oidc:alice", made.before))


async def test_certificates_are_renewed_while_the_registry_does_not_answer(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MAINTENANCE_INTERVAL", 0.05)
    monkeypatch.setattr(service, "_SEEN", 0.05)
    looks = 0

    async def fails(self: SqliteRegistry) -> frozenset[str]:
        raise RegistryUnavailable("its disk is full")

    def refresh(self: ServerCertificate) -> None:
        nonlocal looks
        looks += 1

    async with running(config) as relay:
        monkeypatch.setattr(SqliteRegistry, "revocations", fails)
        await relay.shows("arcbridge_relay_ready 0.0")
        monkeypatch.setattr(ServerCertificate, "refresh", refresh)
        await until(lambda: looks > 1)


async def test_a_revoked_user_is_cut_everywhere_and_the_agents_are_told(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/threats.md#V2: also while the registry does not answer."""
    monkeypatch.setattr(service, "MAINTENANCE_INTERVAL", 0.05)
    config.policy.write_text(POLICY.replace('"oidc:alice"', '"oidc:alice", "oidc:bob"'))
    async with running(config) as relay, EnrolledAgent(relay) as agent:
        await agent.hears(Revoke(first=True))
        near, _ = await relay.join()
        far = await exchange(near, agent)
        kept, _ = await relay.join("bob")
        kept_far = await exchange(kept, agent)
        made = await admin.revoke_user(admin.at(config), "oidc:alice", reason="left the company")
        await agent.hears(Revoke("oidc:alice", made.before, reason="left the company"))
        # An agent may call the user by another name; the subject is the issuer's.
        await agent.hears(Revoke(f"{URL}#alice", made.before, reason="left the company"))
        await is_cut(near, far)

        async def fails(self: SqliteRegistry) -> frozenset[str]:
            raise RegistryUnavailable("its disk is full")

        with monkeypatch.context() as down:
            down.setattr(SqliteRegistry, "revocations", fails)
            await relay.shows("arcbridge_relay_ready 0.0")
            assert (await refused(relay.join(), "left the company")).code == JoinCode.FORBIDDEN
        await send_all(kept, b"still here")
        assert await receive(kept_far, 20) == b"still here"
        await admin.restore_user(admin.at(config), "oidc:alice")
        await agent.hears(Revoke("oidc:alice"))
        (await relay.join())[0].close()
        assert 'sessions_cut_total{reason="user"} 1.0' in await relay.metrics()
        near.close()
        kept.close()


async def test_a_successor_takes_the_port_over_at_once(config: RelayConfig) -> None:
    """Without sessions the relay stops at once; the port is free although connections to it were open."""
    async with running(config) as relay, EnrolledAgent(relay) as agent:
        relay.stopping.set()
        await asyncio.wait_for(relay.task, PATIENCE / 2)
        await asyncio.wait_for(agent.session.wait_ended(), 5)
        async with running(replace(config, listen=relay.info.address)) as successor:
            assert successor.info.address == relay.info.address


async def test_what_only_a_start_can_find_names_the_setting(config: RelayConfig, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for changes, words in (
            ({"policy": missing}, "missing"),
            ({"listen": f"127.0.0.1:{port}"}, "the port is in use"),
            ({"observe": ObserveConfig(listen=f"127.0.0.1:{port}")}, "observe.listen"),
        ):
            relay = Running(replace(config, **changes))
            with pytest.raises((ConfigError, StateError), match=words):
                await relay.start()
