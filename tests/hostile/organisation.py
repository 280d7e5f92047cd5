"""A small organisation in one event loop: a relay, clusters with their agents, and people with their clients.

Every role is the real one, made by its own `serve` or `run_proxy` from settings; an API server that tags its answers
and an issuer in memory stand outside. A test makes one role lie: it gives a subclass of one of that role's parts, which
`serve` then makes in the part's place (`lying`). All else stays honest, and must end the lie.

Bytes are tagged. A person asks for `/tagged/CLUSTER/USER/NUMBER`; the API server answers with that path and the user
whom it was told, over and over. `Organisation.check` fails where an API server saw a request of another user or for
another cluster, and `Client.get` where a completed answer is not its own.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib
import json
import shutil
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import yaml
from structlog.testing import capture_logs

from arcbridge.agent import service as agent_service
from arcbridge.client import service as client_service
from arcbridge.client.commands.proxy import run_proxy
from arcbridge.identity.fetch import Reply
from arcbridge.identity.proof import ProofKey
from arcbridge.net.address import parse_address
from arcbridge.net.dialer import connect
from arcbridge.net.join import client_join
from arcbridge.net.tls import ALPN_JOIN, RelayTrust, outer_client_context
from arcbridge.pki.pins import pin_of
from arcbridge.relay import service as relay_service
from arcbridge.relay.registry.sqlite import SqliteRegistry
from arcbridge.settings.config import (
    AgentConfig,
    AgentLimitsConfig,
    AgentStateConfig,
    AuditConfig,
    ClientConfig,
    KubernetesConfig,
    LoginConfig,
    RelayConfig,
)
from arcbridge.wire.records import JoinReply, JoinRequest
from tests.identity.issuer import URL, Issuer, claims, token
from tests.support.fake_apiserver import Exchange, FakeApiServer, Request, Route, reply
from tests.support.world import fixed_port

CLUSTER = "prod"
RELAY_AUDIENCE = "relay"

Lies = Mapping[str, Any]
"""Name of a part in the role's `service` module, or the whole path of one in another module -> what stands in its
place."""


@contextlib.contextmanager
def lying(service: ModuleType, lies: Lies) -> Iterator[None]:
    """Let a role be made with these parts; those of other modules stay until the end of the organisation."""
    honest = []
    for path, part in lies.items():
        module, _, name = path.rpartition(".")
        place = importlib.import_module(module) if module else service
        honest.append((place, name, getattr(place, name)))
        setattr(place, name, part)
    try:
        yield
    finally:
        for place, name, part in reversed(honest):
            setattr(place, name, part)


@dataclass(frozen=True, slots=True)
class Person:
    """A user of the organisation."""

    name: str
    groups: tuple[str, ...] = ("platform",)

    key: ProofKey | None = None
    """To which the person's tokens are bound, by an audience; None: they are bearer tokens."""

    def claims(self, audience: str, **changes: Any) -> dict[str, Any]:
        """Good claims of now."""
        named: Any = audience if self.key is None else [audience, self.key.audience()]
        return claims(time.time(), sub=self.name, **{"aud": named, "groups": list(self.groups), **changes})

    def token(self, audience: str, **changes: Any) -> str:
        """A token of the organisation's issuer."""
        return token(self.claims(audience, **changes))


ALICE, BOB, MALLORY = Person("alice"), Person("bob"), Person("mallory")


@dataclass(slots=True)
class Cluster:
    """One cluster: its API server, and its agent while that runs."""

    name: str
    directory: Path
    api: FakeApiServer
    audience: str
    """What tokens for this cluster name."""
    pin: str = ""
    lies: Lies = field(default_factory=dict)

    def audit(self) -> list[dict[str, Any]]:
        """The agent's audit records so far."""
        path = self.directory / "audit.jsonl"
        text = path.read_bytes() if path.exists() else b""
        lines = text[: text.rfind(b"\n") + 1].splitlines()  # a thread writes them
        return [record for record in map(json.loads, lines) if "outcome" in record]


class TaggedApiServer(FakeApiServer):
    """Answers `/tagged/CLUSTER/USER/NUMBER` with that path and the user it was told, `repeats` times."""

    repeats = 1

    def _route(self, request: Request) -> Route:
        path = request.target.partition("?")[0]
        if path.startswith("/tagged/") and path not in self.routes:
            told = b",".join(request.header("impersonate-user"))
            return reply(200, (path.encode() + b"|" + told + b"\n") * self.repeats, content_type="text/plain")
        return super()._route(request)


_CALLERS = ThreadPoolExecutor(128, "caller")


@dataclass(frozen=True, slots=True)
class Answer:
    """What kubectl would get: a status and a body, or a cut (`status` 0) with what came before it."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """The message of a `metav1.Status`, as kubectl shows it; empty for any other body."""
        try:
            return str(json.loads(self.body)["message"])
        except (ValueError, KeyError, TypeError):
            return ""


class WrongBytes(AssertionError):
    """A completed answer that is not the caller's own."""


def _ask(port: int, context: ssl.SSLContext, path: str, deadline: float) -> Answer:
    """Ask for `path` and read the answer; raises TimeoutError where it is not complete within `deadline` seconds."""
    end = time.monotonic() + deadline
    data = bytearray()
    head, headers, length = b"", {}, None
    with socket.create_connection(("127.0.0.1", port), timeout=deadline) as sock:
        try:
            with context.wrap_socket(sock, server_hostname="127.0.0.1", suppress_ragged_eofs=False) as caller:
                caller.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                while length is None or len(data) < length:
                    caller.settimeout(max(end - time.monotonic(), 0.001))
                    if not (piece := caller.recv(65536)):
                        return Answer(0, bytes(data), headers)
                    data += piece
                    if length is None and b"\r\n\r\n" in data:
                        head, _, rest = bytes(data).partition(b"\r\n\r\n")
                        lines = (line.partition(":") for line in head.decode("latin-1").split("\r\n")[1:])
                        headers = {name.lower(): value.strip() for name, _, value in lines}
                        length, data = int(headers["content-length"]), bytearray(rest)
                while caller.recv(65536):  # to the end, for which it asked: what is unread would reset the connection
                    caller.settimeout(max(end - time.monotonic(), 0.001))
        except TimeoutError:
            raise
        except OSError:
            return Answer(0, bytes(data), headers)
    return Answer(int(head.split()[1]), bytes(data), headers)


class Client:
    """A person's client, in this process, and a caller at its local endpoint."""

    def __init__(self, person: Person, cluster: str, directory: Path) -> None:
        self.person = person
        self.cluster = cluster
        self.directory = directory
        self.lines: list[str] = []
        self.number = 0
        self._context: ssl.SSLContext | None = None
        self._port = 0

    def caller(self) -> tuple[int, ssl.SSLContext]:
        """Port and TLS of the local endpoint, as the kubeconfig says."""
        if self._context is None:
            config = yaml.safe_load((self.directory / "kubeconfig").read_text())
            cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
            ca = base64.b64decode(cluster["certificate-authority-data"]).decode()
            self._context = ssl.create_default_context(cadata=ca)
            pair = self.directory / "pair.pem"
            pair.touch(mode=0o600)
            pair.write_bytes(
                base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"])
            )
            self._context.load_cert_chain(pair)
            self._port = int(cluster["server"].rpartition(":")[2])
        return self._port, self._context

    @contextlib.asynccontextmanager
    async def connected(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection to the local endpoint."""
        port, context = self.caller()
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="127.0.0.1")
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def get(self, *, deadline: float = 20.0) -> Answer:
        """Ask for the next tagged path, and check a completed answer against it."""
        self.number += 1
        path = f"/tagged/{self.cluster}/{self.person.name}/{self.number}"
        answer = await self.ask(path, deadline=deadline)
        if answer.status == 200:
            line = f"{path}|{self.person.name}\n".encode()
            if not answer.body or answer.body != line * (len(answer.body) // len(line)):
                raise WrongBytes(f"{self.person.name} was answered with bytes that are not the answer")
        return answer

    async def ask(self, path: str, *, deadline: float = 20.0) -> Answer:
        """One GET over a connection of its own.

        A thread reads a blocking socket: asyncio's TLS, uvloop's too, drops what it has not given to a paused reader
        when the peer closes, so that a whole answer looked like a cut one (twice in 24 runs on a busy machine; never
        in 48 with a blocking socket).
        """
        port, context = self.caller()
        return await asyncio.get_running_loop().run_in_executor(_CALLERS, _ask, port, context, path, deadline)


class Organisation:
    """Use `running`; every role ends with the block, and `check` is called."""

    def __init__(self, directory: Path, logs: list[Any]) -> None:
        self.directory = directory
        self.logs = logs
        """What all roles have logged so far (structlog's events, in order)."""
        self.issuer = Issuer()
        self.clusters: dict[str, Cluster] = {}
        self.relays: list[str] = []
        """`host:port` of each relay."""
        self.relay_pin = ""
        self.relay_ca = ""
        self.policy = '[[allow]]\ngroups = ["platform"]\nclusters = ["*"]\n'
        self.registry: SqliteRegistry
        self._stack = AsyncExitStack()
        self._clients = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls,
        directory: Path,
        *clusters: str,
        relay: Lies | None = None,
        honest_relay: bool = False,
        agents: Mapping[str, Lies] | None = None,
        audiences: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Self]:
        """`relay` and `agents` (by cluster) say who lies; `audiences` (by cluster) what tokens must name.

        With `honest_relay` there is a second one, over the same CA.
        """
        with capture_logs() as logs:
            made = cls(directory, logs)
            async with made._stack:
                await made.start_relay(relay or {})
                if honest_relay:
                    await made.start_relay({})
                for name in clusters or (CLUSTER,):
                    lies = (agents or {}).get(name, {})
                    await made.add_cluster(name, lies=lies, audience=(audiences or {}).get(name, "cluster"))
                if honest_relay:
                    await made.until(lambda: made.said("cluster adopted"), "the agent is at both relays")
                yield made
            made.check()

    @property
    def relay_address(self) -> str:
        """Where the first relay listens."""
        return self.relays[0]

    # -- the roles ----------------------------------------------------------------------------------------------

    async def start_relay(self, lies: Lies) -> None:
        """A relay with a registry of its own; the first has a CA of its own, and the others have that one."""
        directory = self.directory / f"relay-{len(self.relays)}"
        (directory / "data").mkdir(parents=True, mode=0o700)
        if self.relays:
            for name in ("ca.key", "ca.crt"):
                shutil.copy2(self.directory / "relay-0" / "data" / name, directory / "data" / name)
        (directory / "authentication.yaml").write_text(authentication(RELAY_AUDIENCE))
        (directory / "policy.toml").write_text(self.policy)
        address = f"127.0.0.1:{fixed_port()}"
        config = RelayConfig(
            listen=address,
            public_address=address,
            data_dir=directory / "data",
            authentication=directory / "authentication.yaml",
            policy=directory / "policy.toml",
        )
        info: asyncio.Future[relay_service.RelayInfo] = asyncio.get_running_loop().create_future()
        stopping, hurry = asyncio.Event(), asyncio.Event()
        with lying(relay_service, {"HttpFetcher": self._fetcher, **lies}):
            work = relay_service.serve(config, info.set_result, stopping, hurry)
            await self._run(work, info, stopping, hurry)
        self.relays.append(address)
        if len(self.relays) > 1:
            return
        self.relay_pin = info.result().relay_ca_pin
        self.relay_ca = (directory / "data" / "ca.crt").read_text()
        self.registry = await SqliteRegistry.open(directory / "data")
        self._stack.push_async_callback(self.registry.close)

    async def add_cluster(self, name: str, *, lies: Lies, audience: str = "cluster", **settings: Any) -> Cluster:
        """A cluster with one agent, enrolled and connected."""
        directory = self.directory / name
        directory.mkdir()
        api = await self._stack.enter_async_context(TaggedApiServer.serving(directory))
        cluster = self.clusters[name] = Cluster(name, directory, api, audience, lies=lies)
        await self.start_agent(cluster, **settings)
        record = await self.registry.cluster(name)
        assert record is not None
        cluster.pin = pin_of(record.ca_pem)
        return cluster

    async def start_agent(self, cluster: Cluster, **changes: Any) -> None:
        """The agent of a cluster, until the organisation ends."""
        directory = cluster.directory
        (directory / "authentication.yaml").write_text(authentication(cluster.audience))
        expires = time.time() + 60
        (directory / "join-token").write_text(await self.registry.create_join_token(cluster.name, expires_at=expires))
        config = AgentConfig(
            relays=tuple(self.relays),
            relay_ca_pin=self.relay_pin,
            join_token_file=directory / "join-token",
            authentication=directory / "authentication.yaml",
            kubernetes=KubernetesConfig(
                server=cluster.api.url, ca_file=cluster.api.ca_file, token_file=cluster.api.token_file
            ),
            limits=AgentLimitsConfig(),
            state=AgentStateConfig(directory=directory / "state"),
            audit=AuditConfig(file=str(directory / "audit.jsonl")),
        )
        connected: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stopping, hurry = asyncio.Event(), asyncio.Event()
        lasting = {path: part for path, part in cluster.lies.items() if "." in path}
        self._stack.enter_context(lying(agent_service, lasting))
        with lying(agent_service, {"HttpFetcher": self._fetcher, **cluster.lies}):
            work = agent_service.serve(replace(config, **changes), lambda: connected.set_result(None), stopping, hurry)
            await self._run(work, connected, stopping, hurry)

    @contextlib.asynccontextmanager
    async def client(self, person: Person = ALICE, cluster: str = CLUSTER, **changes: Any) -> AsyncIterator[Client]:
        """A person's client, from its first session to the end of the block.

        Raises what its start raises: `arcbridge` prints that as `error: SENTENCE`.
        """
        self._clients += 1
        directory = self.directory / f"client-{self._clients}"
        directory.mkdir()
        found = self.clusters[cluster]
        (directory / "access-token").write_text(person.token(RELAY_AUDIENCE))
        (directory / "id-token").write_text(person.token(found.audience))
        client = Client(person, cluster, directory)
        key_file = None
        if person.key is not None:
            key_file = directory / "proof-key.jwk"
            key_file.touch(mode=0o600)
            key_file.write_bytes(person.key.to_jwk())
        settings = ClientConfig(
            relays=tuple(f"https://{address}" for address in self.relays),
            relay_ca_pin=self.relay_pin,
            cluster=cluster,
            cluster_ca_pin=found.pin,
            port=0,
            file=str(directory / "kubeconfig"),
            state_dir=directory / "state",
            login=LoginConfig(
                access_token_file=directory / "access-token",
                id_token_file=directory / "id-token",
                proof_key_file=key_file,
            ),
        )
        ready = asyncio.Event()
        terminal = client_service.Terminal(tell=client.lines.append)
        context = client_service.ClientContext(replace(settings, **changes), terminal, environment={})
        task = asyncio.ensure_future(run_proxy(context, ready=ready.set))
        waiting = asyncio.ensure_future(ready.wait())
        try:
            await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
                raise AssertionError("the client ended by itself")
            yield client
        finally:
            waiting.cancel()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def joined(self, access_token: str, cluster: str = CLUSTER, **fields: Any) -> tuple[socket.socket, JoinReply]:
        """Join as a client of whatever make, with a token; raises JoinRefused with the relay's words."""
        context = outer_client_context(RelayTrust(self.relay_ca), ALPN_JOIN)
        request = JoinRequest(**{"role": "client", "cluster": cluster, "token": access_token, **fields})
        sock = await connect(parse_address(self.relay_address), deadline=5)
        return sock, await client_join(sock, context, "127.0.0.1", request)

    # -- looking ------------------------------------------------------------------------------------------------

    def said(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The log records of an event whose fields have these values."""
        return [
            one
            for one in self.logs
            if one["event"] == event and all(one.get(name) == value for name, value in fields.items())
        ]

    async def until(self, condition: Callable[[], object], what: str, *, timeout: float = 10.0) -> None:
        """Wait until `condition()` holds; fail with what was logged."""
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    await asyncio.sleep(0.005)
        except TimeoutError:
            raise AssertionError(f"never: {what}; logged: {self.logs}") from None

    def check(self) -> None:
        """Fail where an API server was asked for a user, or for a cluster, that is not the one of the tag."""
        for cluster in self.clusters.values():
            for request in cluster.api.requests:
                parts = request.target.split("/")
                if len(parts) != 5 or parts[1] != "tagged":
                    continue
                told = [value.decode() for value in request.header("impersonate-user")]
                assert (parts[2], told) == (cluster.name, [parts[3]]), "a request reached a place that is not its own"

    @property
    def requests(self) -> list[Request]:
        """What the API servers of all clusters were asked."""
        return [request for cluster in self.clusters.values() for request in cluster.api.requests]

    # -- inside -------------------------------------------------------------------------------------------------

    async def _run(self, work: Any, ready: asyncio.Future[Any], stopping: asyncio.Event, hurry: asyncio.Event) -> None:
        task = asyncio.ensure_future(work)
        await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
            raise AssertionError("the role ended by itself")

        async def stop() -> None:
            hurry.set()
            stopping.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._stack.push_async_callback(stop)

    def _fetcher(self) -> _Fetcher:
        return _Fetcher(self.issuer)


class _Fetcher:
    """The issuer's documents, in the place of `net.fetch.HttpFetcher`."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer

    async def __call__(self, url: str, ca_pem: str | None) -> Reply:
        return await self._issuer.fetch(url, ca_pem)

    async def ask(self, method: str, url: str, ca_pem: str | None, **_: object) -> object:
        raise AssertionError("no token here points to another place")

    async def close(self) -> None:
        """Nothing is open."""


def authentication(audience: str) -> str:
    """An AuthenticationConfiguration that trusts the issuer for one audience; user names are the subjects."""
    return json.dumps(
        {
            "apiVersion": "apiserver.config.k8s.io/v1",
            "kind": "AuthenticationConfiguration",
            "jwt": [
                {
                    "issuer": {"url": URL, "audiences": [audience]},
                    "claimMappings": {
                        "username": {"claim": "sub", "prefix": ""},
                        "groups": {"claim": "groups", "prefix": ""},
                    },
                }
            ],
        }
    )


__all__ = ["ALICE", "BOB", "CLUSTER", "MALLORY", "Answer", "Client", "Cluster", "Exchange", "Organisation", "Person"]
