"""The relay's HTTP API: how agents enrol and renew, and how people see which clusters they may reach.

    GET  /v1/ca                the CA (PEM) under which this relay's own certificate is verified; checked by its pin
    POST /v1/enrol             {join_token, csr, cluster_ca} -> {certificate, ca, cluster, not_after}
    POST /v1/renew             {csr, stored?} -> the same; the cluster is the one of the TLS client certificate, nothing
                               else, and the key too. `stored`: "yes", the same request will be sent again if need be
    GET  /v1/clusters          [{name, state, agents, last_seen, ca_pin, certificate_expires, version, labels, revoked}]
    GET  /v1/clusters/{name}   one of these; unknown and not allowed get one answer

The last two need an access token, and the header `Arcbridge-Proof` where that is bound to a key (`identity.proof`).
Times are unix seconds, 0 for never. An error is `{"error": {"code": "…", "message": "…"}}`, its message a sentence for
a person. Nothing that a peer sent is ever in an answer or in a log: aiohttp by itself quotes the bytes that it could
not parse, which may be the start of a bearer token, in its 400 and in a logged traceback (docs/threats.md#A3), so here
every answer and every log line is ours.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

import structlog
from aiohttp import web

from arcbridge.errors import ArcbridgeError, ConfigError, EnrolmentRefused, PermissionRefused, Unauthenticated
from arcbridge.identity.claims import Identity
from arcbridge.identity.proof import HEADER, Peer, ProofChecker, ProofPolicy, ProofRefused
from arcbridge.limiters import Bursts, KeyedTokenBucket
from arcbridge.net.address import source_of
from arcbridge.net.tls import ServerContext
from arcbridge.pki.authority import (
    Authority,
    agent_generation,
    agent_issued_at,
    agent_key_hash,
    certificate_validity,
    check_ca_certificate,
)
from arcbridge.pki.enrolment import JoinToken, key_hash, request_hash
from arcbridge.pki.names import check_cluster_name
from arcbridge.relay.access import Access
from arcbridge.relay.admission import Ticket
from arcbridge.relay.registry.base import ClusterRecord, Registry, RegistryUnavailable, admit, cluster_state
from arcbridge.relay.registry.generations import OLDER_AGENT, RenewedTwice, ShownCertificate

BODY_LIMIT = 64 * 1024
"""Bytes of a request's body: a request and a CA certificate of 16 KiB each, escaped as JSON, fit twice."""

BODY_DEADLINE = 10.0
"""Seconds for a body to arrive."""

HEAD_DEADLINE = 10.0
"""Seconds from the end of the TLS handshake to the first complete request head; aiohttp itself would wait for ever."""

KEEPALIVE = 30.0
"""Seconds that an idle connection is kept: clients ask rarely, and each one held counts against the relay's caps."""

ANONYMOUS_LIFE = 60.0
"""Seconds that a connection lives on which no credential was found good, or since the last one was."""

ANONYMOUS_REQUESTS = 100
"""Requests that such a connection may send."""

ANSWER_DEADLINE = 15.0
"""Seconds beyond its life that a connection has to end the request that is under way: a body has `BODY_DEADLINE`."""

FIELD_LIMIT = 64 * 1024
"""Bytes of one header: access tokens with many groups exceed aiohttp's 8190."""

FAILURES = 10
"""Failed enrolments that one source has at once. Against guessing stand the 256 bits of a secret: this bound only keeps
noise cheap."""

FAILURES_RATE = 1 / 6
"""Failed enrolments per second that grow back."""

UNPROVED = 30
"""Refusals for want of a proof that one address has at once; it may stand for an office full of older clients."""

UNPROVED_RATE = 0.5
"""Such refusals per second that grow back."""

STRANGERS = 200
"""Requests without a credential that one address has at once; an agent sends one in its life."""

STRANGERS_RATE = 50.0
"""Such requests per second that grow back. At 0.2 ms each an address takes a hundredth of a core."""

USER_REQUESTS_PER_MINUTE = 240
"""Requests of one subject, and as many at once, unless the settings say otherwise."""

RENEWALS = 20
"""Renewals that the agents of one cluster have at once: they share one certificate, which lasts for days."""

RENEWALS_RATE = 1 / 6
"""Renewals per second and cluster that grow back."""

SOURCES = 4096
"""Addresses, and clusters, whose requests are counted."""

SUBJECTS = 16_384
"""Subjects whose requests are counted."""

LOG_INTERVAL = 10.0
"""Seconds between two lines in the log about requests that one limit refuses."""

_CODES = {
    HTTPStatus.BAD_REQUEST: "bad_request",
    HTTPStatus.UNAUTHORIZED: "unauthenticated",
    HTTPStatus.FORBIDDEN: "forbidden",
    HTTPStatus.NOT_FOUND: "not_found",
    HTTPStatus.METHOD_NOT_ALLOWED: "method_not_allowed",
    HTTPStatus.REQUEST_TIMEOUT: "timeout",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "too_large",
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: "unsupported_encoding",
    HTTPStatus.EXPECTATION_FAILED: "unsupported_expectation",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limited",
    HTTPStatus.SERVICE_UNAVAILABLE: "unavailable",
}

log = structlog.get_logger("arcbridge.relay")


class Verifier(Protocol):
    """`identity.verifier.TokenVerifier`."""

    async def verify(self, token: str) -> Identity: ...


CountAgents = Callable[[Sequence[str]], Awaitable[Mapping[str, int]]]
"""How many agents of each of these clusters are connected now, in the whole fleet; a cluster left out has none."""

PeerCertificate = Callable[[web.Request], bytes | None]
"""The verified TLS client certificate (DER) of a request's connection, or None."""

OwnKey = Callable[[web.Request], bytes]
"""The SubjectPublicKeyInfo (DER) of the certificate that this relay showed in a request's connection."""


class Limited:
    """How many requests each limit has refused."""

    LIMITS = ("address", "enrolments", "user", "renewals", "proofs")

    def __init__(self) -> None:
        self.counts = dict.fromkeys(self.LIMITS, 0)
        self._bursts: Bursts[str] = Bursts(LOG_INTERVAL)

    def count(self, limit: str) -> bool:
        """Count a refusal; say whether the log is to tell of it."""
        self.counts[limit] += 1
        return self._bursts.seen(limit, time.monotonic()) is not None


class ApiRefusal(ArcbridgeError):
    """The request itself cannot be answered; `status` says why."""

    def __init__(self, status: HTTPStatus, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.status_code = status


def tls_peer_certificate(request: web.Request) -> bytes | None:
    """Return the client certificate that asyncio's TLS verified on this connection (DER), or None."""
    tls = None if request.transport is None else request.transport.get_extra_info("ssl_object")
    # The parsed form is empty unless the certificate was verified; the binary form is there in any case.
    if tls is None or not tls.getpeercert():
        return None
    certificate: bytes | None = tls.getpeercert(binary_form=True)
    return certificate


def tls_own_key(request: web.Request) -> bytes:
    """Return the key that this relay showed on this connection; empty, which no proof names, where it is not known."""
    tls = None if request.transport is None else request.transport.get_extra_info("ssl_object")
    return tls.context.spki if tls is not None and isinstance(tls.context, ServerContext) else b""


@dataclass(frozen=True, slots=True)
class _Api:
    """The handlers, with what they work on."""

    authority: Authority
    registry: Registry
    count_agents: CountAgents
    verifier: Verifier
    access: Access
    clock: Callable[[], float]
    certificate_life: float
    ca_pem: str
    failures: KeyedTokenBucket[str]
    """Failed enrolments, by address."""
    unproved: KeyedTokenBucket[str]
    """Refusals for want of a proof, by address: one who has stolen a token spends nothing of its owner's."""
    unproved_told: Bursts[str]
    """The same refusals, by reason, for the log."""
    strangers: KeyedTokenBucket[str]
    """Requests that need no credential, by address."""
    callers: KeyedTokenBucket[str]
    """Requests with an access token, by subject."""
    renewals: KeyedTokenBucket[str]
    """Renewals, by cluster."""
    limited: Limited
    monotonic: Callable[[], float]
    peer_certificate: PeerCertificate
    own_key: OwnKey
    proofs: ProofChecker
    renewed_twice: Callable[[], None]

    async def ca(self, request: web.Request) -> web.Response:
        self._spend("address", self.strangers, source_of(_source(request)), "too many requests from this address")
        return web.Response(text=self.ca_pem, content_type="application/x-pem-file")

    async def enrol(self, request: web.Request) -> web.Response:
        source = _source(request)
        join_token, csr, cluster_ca = await _body(request, "join_token", "csr", "cluster_ca")
        try:
            # The request is judged before the token is consumed, so that a mistake in it costs no use.
            key = key_hash(csr)
            cluster_ca = check_ca_certificate(cluster_ca)
            token_id = JoinToken.parse(join_token).id
            record = await self.registry.redeem_join_token(join_token, key, cluster_ca)
        except EnrolmentRefused as error:
            log.warning("enrolment refused", source=source, reason=error.message)
            # The limit comes after the credential: an agent with a good token is let in, whatever its neighbours
            # behind one address do. What a failure costs is bounded by the connection that it takes (`is_last`).
            now = self.monotonic()
            if self.failures.reserve(source_of(source), now) is not None:
                raise
            self.limited.count("enrolments")
            raise ApiRefusal(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"too many failed enrolments from this address, and this one failed, too: {error.message}",
                retry_after=math.ceil(self.failures.wait(source_of(source), now)),
            ) from error
        _proved(request)
        # A relay of the fleet that counts nothing may have written the record since.
        state = record.keys.get(key)
        answer = await self._sign(csr, record, 1 if state is None else state.generation)
        log.info("agent enrolled", cluster=record.name, join_token=token_id, source=source, ca_pin=record.ca_pin)
        return web.json_response(answer)

    async def renew(self, request: web.Request) -> web.Response:
        certificate = self.peer_certificate(request)
        if certificate is None:
            raise ApiRefusal(
                HTTPStatus.UNAUTHORIZED,
                "a renewal needs the agent's client certificate: connect with it, or enrol with a new join token",
            )
        try:
            cluster = self.authority.authenticate_agent(certificate)
            record = admit(await self.registry.cluster(cluster), certificate)
            _proved(request)
            self._spend("renewals", self.renewals, cluster, "this cluster's agents renew too often")
            csr, stored = await _body(request, "csr", optional=("stored",))
            shown = ShownCertificate(
                agent_key_hash(certificate), agent_generation(certificate), agent_issued_at(certificate)
            )
            if key_hash(csr) != shown.key:
                raise EnrolmentRefused("a renewal keeps the agent's key: enrol with a new join token to change it")
            generation = await self.registry.renew(cluster, shown, request_hash(csr) if stored else OLDER_AGENT)
            answer = await self._sign(csr, record, generation)
        except RenewedTwice as error:
            self.renewed_twice()
            log.error(
                "agent certificate renewed twice",
                cluster=cluster,
                source=_source(request),
                generation=shown.generation,
                reason=error.message,
            )
            raise
        except EnrolmentRefused as error:
            log.warning("renewal refused", source=_source(request), reason=error.message)
            raise
        log.info("certificate renewed", cluster=cluster, source=_source(request), generation=generation)
        return web.json_response(answer)

    async def clusters(self, request: web.Request) -> web.Response:
        identity = await self._caller(request)
        records = [record for record in await self.registry.clusters() if self.access.allows(identity, record.name)]
        agents = await self.count_agents([record.name for record in records])
        now = self.clock()
        return web.json_response([_shown(record, agents.get(record.name, 0), now) for record in records])

    async def cluster(self, request: web.Request) -> web.Response:
        identity = await self._caller(request)
        try:
            name = check_cluster_name(request.match_info["name"])
        except ConfigError as error:
            raise ApiRefusal(HTTPStatus.BAD_REQUEST, error.message) from error
        # Both are asked whatever the other says, and there is one answer: a caller does not learn which names exist
        # (docs/threats.md#J22).
        record, allowed = await self.registry.cluster(name), self.access.allows(identity, name)
        agents = await self.count_agents([name])
        if record is None or not allowed:
            raise ApiRefusal(
                HTTPStatus.NOT_FOUND,
                "there is no such cluster, or you may not reach it: check its name, and ask the relay's operator",
            )
        return web.json_response(_shown(record, agents.get(name, 0), self.clock()))

    async def _sign(self, csr: str, record: ClusterRecord, generation: int) -> dict[str, object]:
        certificate = self.authority.sign_agent(
            csr, record.name, life=self.certificate_life, cluster_ca_pin=record.ca_pin, generation=generation
        )
        _, not_after = certificate_validity(certificate)
        await self.registry.certificate_issued(record.name, not_after)
        return {"certificate": certificate, "ca": self.ca_pem, "cluster": record.name, "not_after": not_after}

    async def _caller(self, request: web.Request) -> Identity:
        values = request.headers.getall("Authorization", [])
        scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated("an access token is needed: log in and send it as 'Authorization: Bearer'")
        token = token.strip()
        identity = await self.verifier.verify(token)
        proofs = request.headers.getall(HEADER, [])
        proof = proofs[0] if len(proofs) == 1 else ""
        try:
            self.proofs.check(identity.binding, token, proof, Peer(self.own_key(request)))
        except ProofRefused as error:
            self._refuse_unproved(identity, error, _source(request))
            raise
        if (refused := self.access.refusal(identity)) is not None:
            raise PermissionRefused(refused.message)
        _proved(request)
        self._spend("user", self.callers, identity.subject, "you ask this relay too often")
        return identity

    def _refuse_unproved(self, identity: Identity, error: ProofRefused, source: str) -> None:
        """Log a refusal for want of a proof, once in each burst; raises `ApiRefusal` for an address with too many."""
        now = self.monotonic()
        if (since_last := self.unproved_told.seen(error.reason, now)) is not None:
            log.warning(
                "api token refused",
                user=identity.username,
                source=source,
                bound=identity.binding.kind.value,
                reason=error.rule,
                requests=since_last,
            )
        # As with enrolments the limit comes after the credential, and locks out no neighbour with a good proof.
        if self.unproved.reserve(source_of(source), now) is None:
            self.limited.count("proofs")
            raise ApiRefusal(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"too many tokens without a good proof came from this address, and this is one: {error.message}",
                retry_after=max(math.ceil(self.unproved.wait(source_of(source), now)), 1),
            ) from error

    def _spend(self, limit: str, bucket: KeyedTokenBucket[str], key: str, words: str) -> None:
        """Take one request of what `key` has; raises `ApiRefusal` that says when to come back."""
        now = self.monotonic()
        if bucket.reserve(key, now) is not None:
            return
        wait = max(math.ceil(bucket.wait(key, now)), 1)
        if self.limited.count(limit):
            log.warning("api requests refused", reason=limit)
        raise ApiRefusal(HTTPStatus.TOO_MANY_REQUESTS, f"{words}: wait {wait} s and try again", retry_after=wait)


def caller_bucket(requests_per_minute: float) -> KeyedTokenBucket[str]:
    """The requests that each user may make, by subject."""
    return KeyedTokenBucket(requests_per_minute, requests_per_minute / 60, size=SUBJECTS)


def build_app(
    *,
    authority: Authority,
    registry: Registry,
    count_agents: CountAgents,
    verifier: Verifier,
    access: Access,
    certificate_life: float,
    ca_pem: str | None = None,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    peer_certificate: PeerCertificate = tls_peer_certificate,
    own_key: OwnKey = tls_own_key,
    proofs: ProofChecker | None = None,
    user_requests_per_minute: float = USER_REQUESTS_PER_MINUTE,
    callers: KeyedTokenBucket[str] | None = None,
    limited: Limited | None = None,
    renewed_twice: Callable[[], None] = lambda: None,
) -> web.Application:
    """Return the application; serve it with `ApiServer`, which keeps the parser's words out of answers and logs.

    `certificate_life`: seconds of an agent's certificate. `ca_pem`: the CA of the relay's outer certificate, if that
    is not `authority`. `clock`: unix seconds; `monotonic`: monotonic seconds. `renewed_twice`: called for each renewal
    that shows a copy of a credential. `callers`: requests with an access token, by subject, in place of
    `user_requests_per_minute`, for a relay whose limits change.
    """
    api = _Api(
        authority,
        registry,
        count_agents,
        verifier,
        access,
        clock,
        certificate_life,
        ca_pem or authority.certificate_pem,
        KeyedTokenBucket(FAILURES, FAILURES_RATE, size=SOURCES),
        KeyedTokenBucket(UNPROVED, UNPROVED_RATE, size=SOURCES),
        Bursts(LOG_INTERVAL),
        KeyedTokenBucket(STRANGERS, STRANGERS_RATE, size=SOURCES),
        callers if callers is not None else caller_bucket(user_requests_per_minute),
        KeyedTokenBucket(RENEWALS, RENEWALS_RATE, size=SOURCES),
        limited or Limited(),
        monotonic,
        peer_certificate,
        own_key,
        proofs or ProofChecker(ProofPolicy.IF_BOUND, "the relay"),
        renewed_twice,
    )
    app = web.Application(middlewares=[_errors], client_max_size=BODY_LIMIT)
    app.on_response_prepare.append(_set_headers)
    routes: list[tuple[str, str, Callable[[web.Request], Awaitable[web.StreamResponse]]]] = [
        ("GET", "/v1/ca", api.ca),
        ("POST", "/v1/enrol", api.enrol),
        ("POST", "/v1/renew", api.renew),
        ("GET", "/v1/clusters", api.clusters),
        ("GET", "/v1/clusters/{name}", api.cluster),
    ]
    for method, path, handler in routes:
        app.router.add_route(method, path, handler, expect_handler=_expect)
        app.router.add_route("*", path, _wrong_method, expect_handler=_expect)
    # Also for paths that are not there, or aiohttp's own handler would quote an odd Expect header.
    app.router.add_route("*", "/{path:.*}", _no_such_path, expect_handler=_expect)
    return app


class ApiServer:
    """Serves an application on connections that the relay's listener has accepted: the protocol factory for
    `loop.connect_accepted_socket(server, …)` or `loop.create_server(server, …)`.

        server = ApiServer(build_app(…)); await server.start(); …; await server.close()
    """

    def __init__(self, app: web.Application) -> None:
        # handler_cancellation: a vanished client's handler ends with it.
        self._runner = web.AppRunner(app, handle_signals=False, access_log=None, handler_cancellation=True)
        self.malformed = 0
        """Requests that were no HTTP; read by the metrics."""
        self.slow = 0
        """Connections that sent no request in time."""
        self.outlived = 0
        """Connections that were closed because their life without a credential was over."""

    async def start(self) -> None:
        """Run the application's start-up; nothing listens yet."""
        await self._runner.setup()

    async def close(self, deadline: float = 5.0) -> None:
        """Let requests that run finish for `deadline` seconds, then close all connections."""
        if self._runner.server is not None:
            self._runner.server.pre_shutdown()
            await self._runner.server.shutdown(deadline)
        await self._runner.cleanup()

    def __call__(self, ticket: Ticket | None = None) -> asyncio.Protocol:
        """Return the protocol of one connection, which has the place of `ticket` where the listener counts it."""
        # Made here and not by aiohttp's Server: that one drops all limits when it does not know one of them.
        server = self._runner.server
        if server is None:
            raise RuntimeError("ApiServer.start() comes first")
        return _Connection(self, server, ticket)


class _Connection(web.RequestHandler):
    """One connection, with our words for what the parser refuses.

    Without a credential it has a life and a number of requests, counted anew from each request whose token or
    certificate was found good. While it waits for its peer the listener may close it to make room (`admission`).
    """

    __slots__ = ("_anonymous_requests", "_head_timer", "_life_timer", "_over", "_owner", "_ticket", "_working")

    def __init__(self, owner: ApiServer, server: web.Server, ticket: Ticket | None) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=KEEPALIVE,
            # It would log request lines and user agents as they came. None is what aiohttp's own AppRunner passes.
            access_log=None,  # type: ignore[arg-type]
            max_line_size=FIELD_LIMIT,
            max_field_size=FIELD_LIMIT,
            lingering_time=2.0,
            auto_decompress=False,
        )
        self._owner = owner
        self._ticket = ticket
        self._head_timer: asyncio.TimerHandle | None = None
        self._life_timer: asyncio.TimerHandle | None = None
        self._anonymous_requests = 0
        """Requests since a credential was found good."""
        self._working = False
        """A request is under way."""
        self._over = False
        """The answer to the request that is under way is the last one."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self._head_timer = loop.call_later(HEAD_DEADLINE, self._too_slow)
        self._life_timer = loop.call_later(ANONYMOUS_LIFE, self._life_over)

    def connection_lost(self, exc: BaseException | None) -> None:
        self.head_arrived()
        if self._life_timer is not None:
            self._life_timer.cancel()
            self._life_timer = None
        super().connection_lost(exc)

    @property
    def source(self) -> str:
        """The peer's IP; behind a balancer that of the connection's origin."""
        return "" if self._ticket is None else self._ticket.address

    def begin(self) -> None:
        """A request has arrived: the relay works for it."""
        self.head_arrived()
        self._working = True
        self._anonymous_requests += 1
        self.works()

    def works(self) -> None:
        if self._ticket is not None:
            self._ticket.works()

    def waits(self) -> None:
        """The relay waits for the peer, for a body or for a request."""
        if self._ticket is not None:
            self._ticket.waits()

    def proved(self) -> None:
        """The request that is under way came with a credential that is good."""
        self._anonymous_requests = 0
        self._over = False
        if self._life_timer is not None:
            self._life_timer.cancel()
            self._life_timer = asyncio.get_running_loop().call_later(ANONYMOUS_LIFE, self._life_over)

    def is_last(self, answer: web.StreamResponse) -> bool:
        """Say whether the connection ends with `answer`: its life is over, or a stranger was refused.

        A stranger who tries again pays for a new connection, whose number the address bounds. So the cost of verifying
        bad credentials is bounded, and no address is locked out by the failures of a neighbour.
        """
        anonymous = self._anonymous_requests > 0
        return self._over or self._anonymous_requests >= ANONYMOUS_REQUESTS or (anonymous and answer.status >= 400)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        # A peer that does not read its answer is one that the relay waits for.
        self.waits()
        try:
            return await super().finish_response(request, resp, start_time)
        finally:
            self._working = False
            self.waits()

    def _life_over(self) -> None:
        self._life_timer = None
        if self.transport is None:
            return
        if self._working and not self._over:
            self._over = True
            self._life_timer = asyncio.get_running_loop().call_later(ANSWER_DEADLINE, self._life_over)
            return
        self._owner.outlived += 1
        if self._working:
            self.transport.abort()
        else:
            self.force_close()

    def head_arrived(self) -> None:
        """The first request is there: from now on aiohttp's own keepalive timer watches."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _too_slow(self) -> None:
        self._head_timer = None
        if self.transport is not None:
            self._owner.slow += 1
            self.transport.abort()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what aiohttp could not parse or handle. `message` and `exc` may quote the peer: neither is shown."""
        self.head_arrived()
        if status < 500:
            self._owner.malformed += 1
            log.debug("malformed request", source=_source(request), error=type(exc).__name__)
        else:
            log.error("request failed", source=_source(request), error=type(exc).__name__)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun: it can only be cut off")
        if status < 500:
            answer = _error(HTTPStatus.BAD_REQUEST, "the request is not well-formed HTTP, or a header is too long")
        else:
            answer = _internal()
        answer.headers["Server"] = "arcbridge"
        answer.force_close()
        return answer

    def log_exception(self, *args: Any, **kw: Any) -> None:
        log.error("connection failed", error=type(kw.get("exc_info")).__name__)

    def log_debug(self, *args: Any, **kw: Any) -> None:
        pass  # its texts quote exceptions, which quote the peer; what matters is counted above


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Turn every exception into an answer of ours, and end the connection with its last answer."""
    connection = request.protocol
    if not isinstance(connection, _Connection):
        return await _answer(request, handler)
    connection.begin()
    answer = await _answer(request, handler)
    if connection.is_last(answer):
        answer.force_close()
    return answer


async def _answer(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        _refuse_page(request)
        return await handler(request)
    except web.HTTPException as error:
        return _error(HTTPStatus(error.status), HTTPStatus(error.status).phrase)
    except ArcbridgeError as error:
        status = HTTPStatus(error.status_code)
        if status >= 500 and status != HTTPStatus.SERVICE_UNAVAILABLE:
            # About this machine, not about the request: the caller gets no paths and no details.
            log.error("request failed", path=_route(request), error=type(error).__name__, reason=error.message)
            return _internal()
        if isinstance(error, RegistryUnavailable):
            origin = type(error.__cause__).__name__ if error.__cause__ is not None else ""
            log.error("registry unavailable", path=_route(request), reason=error.message, error=origin)
        answer = _error(status, error.message, code="enrolment_refused" if isinstance(error, EnrolmentRefused) else "")
        if error.retry_after is not None:
            answer.headers["Retry-After"] = str(error.retry_after)
        if status == HTTPStatus.UNAUTHORIZED:
            answer.headers["WWW-Authenticate"] = "Bearer"
        if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
            answer.force_close()
        return answer
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception as error:
        # Its text may quote a value, so the log gets its kind and place only.
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = "" if place is None else f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}"
        log.error("request failed", path=_route(request), error=type(error).__name__, where=where)
        return _internal()


async def _set_headers(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "arcbridge"
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"


async def _expect(request: web.Request) -> web.StreamResponse | None:
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # Or it would count as the beginning of the answer, after which no error can be answered.
        request.writer.output_size = 0
        return None
    return _error(HTTPStatus.EXPECTATION_FAILED, "the only expectation that is met is 100-continue")


async def _wrong_method(request: web.Request) -> web.StreamResponse:
    raise ApiRefusal(HTTPStatus.METHOD_NOT_ALLOWED, "this path does not take this method")


async def _no_such_path(request: web.Request) -> web.StreamResponse:
    raise ApiRefusal(HTTPStatus.NOT_FOUND, "there is nothing here: is this the address of the relay's API?")


async def _body(request: web.Request, *names: str, optional: tuple[str, ...] = ()) -> list[str]:
    """Return the named strings of a JSON body, optional ones empty where they are missing.

    Other members are ignored, so that newer agents may send more.
    """
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ApiRefusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the body without compression")
    too_large = ApiRefusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is larger than {BODY_LIMIT // 1024} KiB")
    if (request.content_length or 0) > BODY_LIMIT:
        raise too_large
    data = bytearray()
    connection = request.protocol
    if isinstance(connection, _Connection):
        connection.waits()
    try:
        async with asyncio.timeout(BODY_DEADLINE):
            async for chunk in request.content.iter_any():
                data += chunk
                if len(data) > BODY_LIMIT:
                    raise too_large
        if isinstance(connection, _Connection):
            connection.works()
    except TimeoutError as error:
        raise ApiRefusal(HTTPStatus.REQUEST_TIMEOUT, "the body did not arrive in time") from error
    except web.RequestPayloadError as error:
        raise ApiRefusal(HTTPStatus.BAD_REQUEST, "the body is not well-formed HTTP") from error
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        # Not chained: a JSONDecodeError carries the whole document, and with it the join token.
        raise ApiRefusal(HTTPStatus.BAD_REQUEST, "the body is not JSON") from None
    values = [document.get(name) for name in names] if isinstance(document, dict) else []
    values += [document.get(name, "") for name in optional] if values else []
    if not values or not all(isinstance(value, str) for value in values):
        raise ApiRefusal(HTTPStatus.BAD_REQUEST, f"the body must be a JSON object with the strings {', '.join(names)}")
    return [str(value) for value in values]


def _shown(record: ClusterRecord, agents: int, now: float) -> dict[str, object]:
    return {
        "name": record.name,
        "state": cluster_state(record, agents, now),
        "agents": agents,
        "last_seen": now if agents > 0 else record.last_seen,
        "ca_pin": record.ca_pin,
        "certificate_expires": record.certificate_expires,
        "version": record.version,
        "labels": dict(record.labels),
        "revoked": record.revoked > 0,
    }


def _error(status: HTTPStatus, message: str, *, code: str = "") -> web.Response:
    body = {"error": {"code": code or _CODES.get(status, status.name.lower()), "message": message}}
    return web.json_response(body, status=status)


def _internal() -> web.Response:
    return _error(
        HTTPStatus.INTERNAL_SERVER_ERROR, "the relay failed: its log has the cause; tell its operator", code="internal"
    )


def _source(request: web.BaseRequest) -> str:
    """Return the IP of the peer; behind a balancer, which only the listener knows, that of the connection's origin."""
    connection = request.protocol
    return (connection.source if isinstance(connection, _Connection) else "") or request.remote or ""


def _proved(request: web.Request) -> None:
    """Note that this request's credential is good."""
    if isinstance(request.protocol, _Connection):
        request.protocol.proved()


def _refuse_page(request: web.Request) -> None:
    """Raise `ApiRefusal` for what a browser sends on behalf of a page: nothing here is for one (docs/threats.md#W5)."""
    if "Origin" in request.headers or request.headers.get("Sec-Fetch-Site", "none") != "none":
        raise ApiRefusal(HTTPStatus.FORBIDDEN, "the relay's API is not for web pages")


def _route(request: web.Request) -> str:
    """The route's pattern: what is in the log comes from us, not from the peer."""
    resource = request.match_info.route.resource
    return "" if resource is None else resource.canonical
