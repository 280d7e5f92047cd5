"""The relay's API over real TLS, with the real authority, registry and policy: what the tests of its modules share."""

import asyncio
import json
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from arcbridge.errors import Unauthenticated, Unreachable
from arcbridge.identity.claims import Identity
from arcbridge.identity.policy import PolicyFile
from arcbridge.identity.proof import ProofChecker, ProofKey, ProofPolicy, binding
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.loop_shares import LoopTimes
from arcbridge.net.tls import ALPN_HTTP, outer_server_contexts
from arcbridge.pki.authority import Authority, Issued
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.relay.access import Access, CallerChecks
from arcbridge.relay.admin import Administered
from arcbridge.relay.admission import Admission, Ticket
from arcbridge.relay.counters import Counters
from arcbridge.relay.http.administration import AdminApi
from arcbridge.relay.http.api import Api, build_app
from arcbridge.relay.http.server import HttpApiServer
from arcbridge.relay.operations import Question, Row
from arcbridge.relay.page.site import PATHS, PageSite
from arcbridge.relay.registry.sqlite import SqliteRegistry
from arcbridge.settings.config import RelayConfig, RelayLimitsConfig
from tests.relay.station import places
from tests.support.clock import Clock

HOUR = 3600.0
POLICY = """
[[allow]]
users = ["ann"]
clusters = ["prod", "test"]

[[allow]]
users = ["bob"]
clusters = ["test"]
"""
CANARY = "eyJhbGciOiCANARYcanaryCANARY0123456789"


KEY = ProofKey.generate()
"""The key to which the tokens are bound that end with `.bound`."""


class StubVerifier(TokenVerifier):
    """Tokens are `token-of-<name>`."""

    def __init__(self) -> None:
        """Keep nothing: no issuer is asked."""

    async def verify(self, token: str) -> Identity:
        if token == "issuer-out":
            raise Unreachable("the issuer does not answer: try again later", retry_after=7)
        if token == "bug":
            raise KeyError(CANARY)
        if not token.startswith("token-of-"):
            raise Unauthenticated("the access token is not valid: log in again")
        name, _, bound = token.removeprefix("token-of-").partition(".")
        found = binding({"aud": KEY.audience()} if bound else {})
        return Identity(name, "", (), name, "https://issuer.test", 0.0, binding=found)


@dataclass
class Relay:
    authority: Authority
    registry: SqliteRegistry
    clock: Clock
    server: HttpApiServer
    port: int
    limited: dict[str, int]
    agents: dict[str, int]
    access: Access
    api: Api
    spki: bytes
    """What the relay shows."""
    counters: Counters
    admission: Admission = field(default_factory=lambda: places(10_000, 10_000))
    origin: str = ""
    """Where connections come from by the word of a balancer; empty: from where they come."""
    tickets: list[Ticket] = field(default_factory=list)
    """Of all connections, as the listener gives them."""
    payers: LoopTimes[str] = field(default_factory=lambda: LoopTimes(0.0, size=100))
    """Users' times of the loop."""
    questions: list[Question] = field(default_factory=list)
    """What administrators have asked the relay that runs."""
    rows: dict[str, list[Row]] = field(default_factory=dict)
    """What it answers, by what is asked."""
    cluster_ca: Authority = field(default_factory=lambda: Authority.create("cluster CA"))

    def connection(self) -> asyncio.Protocol:
        """Return the protocol of one connection, which the listener counts."""
        ticket = self.admission.enter("127.0.0.1", through_proxy=bool(self.origin))
        assert isinstance(ticket, Ticket)
        if self.origin:
            assert ticket.came_from(self.origin) == ""
        self.tickets.append(ticket)
        return self.server(ticket)

    def context(self, certificate: Issued | None = None) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.authority.certificate_pem)
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        if certificate is not None:
            load(context, certificate)
        return context

    async def call(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
        certificate: Issued | None = None,
    ) -> tuple[int, object, Mapping[str, str]]:
        connector = aiohttp.TCPConnector(ssl=self.context(certificate), force_close=True)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.request(
                method, f"https://127.0.0.1:{self.port}{path}", json=body, data=data, headers=headers
            ) as answer,
        ):
            text = await answer.text()
            return answer.status, json.loads(text) if "json" in answer.content_type else text, answer.headers

    async def granted(self, path: str, body: object, certificate: Issued | None = None) -> dict[str, Any]:
        """Return the answer to a POST that the relay does."""
        status, answer, _ = await self.call("POST", path, body, certificate=certificate)
        assert status == 200, answer
        assert isinstance(answer, dict)
        return answer

    async def refused(
        self, method: str, path: str, body: object = None, words: str = "", **more: Any
    ) -> tuple[int, str]:
        """Return status and code of the answer to a request that the relay does not do; `words` are in its message."""
        status, answer, _ = await self.call(method, path, body, **more)
        code, message = error(answer)
        assert words in message
        return status, code

    async def raw(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=self.context())
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 20)
        writer.close()
        await writer.wait_closed()
        return answer

    async def token(self, cluster: str = "prod", **options: object) -> str:
        return await self.registry.create_join_token(cluster, expires_at=self.clock.now + HOUR, **options)

    def enrolment(self, token: str, key: str) -> dict[str, str]:
        return {"join_token": token, "csr": make_csr(key), "cluster_ca": self.cluster_ca.certificate_pem}

    async def enrolled(self, cluster: str = "prod") -> Issued:
        key = make_key()
        status, answer, _ = await self.call("POST", "/v1/enrol", self.enrolment(await self.token(cluster), key))
        assert status == 200
        return Issued(answer["certificate"], key)


def load(context: ssl.SSLContext, issued: Issued) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "pair.pem"
        file.write_text(issued.certificate_pem + issued.key_pem)
        context.load_cert_chain(file)


def error(answer: object) -> tuple[str, str]:
    assert set(answer) == {"error"}
    assert {"code", "message"} <= set(answer["error"]) <= {"code", "message", "rule", "wanted"}
    return answer["error"]["code"], answer["error"]["message"]


@asynccontextmanager
async def serving(
    tmp_path: Path,
    login: Mapping[str, object] | None,
    *,
    authority: Authority | None = None,
    port: int = 0,
    page: Callable[[Api, AdminApi], PageSite] | None = None,
) -> AsyncIterator[Relay]:
    """A relay's API that answers on loopback; what is changed in `login` is what it says from then on. `page`: makes
    the administrators' page."""
    clock = Clock(time.time())  # real: TLS judges certificates by the machine's clock
    authority = authority or Authority.create("relay CA", clock=clock)
    registry = await SqliteRegistry.open(tmp_path, clock=clock)
    agents: dict[str, int] = {}
    (tmp_path / "policy.toml").write_text(POLICY)
    access = Access(PolicyFile(tmp_path / "policy.toml"))
    access.learn_users({})

    async def count_agents(clusters: Sequence[str]) -> Mapping[str, int]:
        return {cluster: agents[cluster] for cluster in clusters if cluster in agents}

    counters = Counters()
    api = Api(
        authority,
        registry,
        count_agents,
        CallerChecks(StubVerifier(), ProofChecker(ProofPolicy.IF_BOUND, "the relay"), access),
        counters,
        certificate_life=600.0,
        limits=RelayLimitsConfig(requests_per_minute_per_user=30),
        login_document=login,
        payer_of=lambda identity: made.payers.of(identity.username, 0.0),
    )
    api.clock = api.monotonic = clock

    async def same() -> Authority:
        return authority

    async def ask(question: Question) -> list[Row]:
        made.questions.append(question)
        return [dict(row) for row in made.rows.get(question["ask"], [])]

    administration = AdminApi(api)
    config = RelayConfig(public_address="relay.test:8443", data_dir=tmp_path)
    administration.relay = Administered(
        config, lambda _: nullcontext(registry), same, ask, lambda act, **_: nullcontext({}), clock
    )
    install, paths = [administration.install], frozenset[str]()
    if page is not None:
        install, paths = [*install, page(api, administration).install], frozenset(PATHS)
    server = HttpApiServer(build_app(api, *install), paths)
    await server.start()
    issued = authority.issue_server(["127.0.0.1"])
    chain = issued.certificate_pem + authority.links_pem
    context = outer_server_contexts(chain, issued.key_pem, authority.trusted_pem)[ALPN_HTTP]
    listener = await asyncio.get_running_loop().create_server(lambda: made.connection(), "127.0.0.1", port, ssl=context)
    port = listener.sockets[0].getsockname()[1]
    made = Relay(authority, registry, clock, server, port, api.limited, agents, access, api, context.spki, counters)
    try:
        yield made
    finally:
        listener.close()
        await server.close()
        await listener.wait_closed()
        await registry.close()
