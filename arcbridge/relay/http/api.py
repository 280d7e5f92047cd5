"""The relay's HTTP API: how agents enrol and renew, and how people see which clusters they may reach.

    GET  /v1/ca                the CA (PEM) under which this relay's own certificate is verified; checked by its pin.
                               Where the CA was rotated, all those that count, and how they followed each other
    GET  /v1/login             where clients log in: issuer, client id, scopes, audiences (`login_settings`); 404 where
                               the settings name no issuer
    POST /v1/enrol             {join_token, csr, cluster_ca} -> {certificate, ca, cluster, not_after}
    POST /v1/join-token        {join_token} -> {cluster}: whether it could enrol an agent, without using it
    POST /v1/renew             {csr, stored?} -> the same; the cluster is the one of the TLS client certificate, nothing
                               else, and the key too. `stored`: "yes", the same request will be sent again if need be
    GET  /v1/clusters          [{name, state, agents, round_trip, last_seen, ca_pin, certificate_expires, version,
                               revoked}]
    GET  /v1/clusters/{name}   one of these; unknown and not allowed get one answer
    POST /v1/admin             a command of an administrator (`relay.http.administration`)

The last three need an access token, and the header `Arcbridge-Proof` where that is bound to a key (`identity.proof`).
Times are unix seconds, 0 for never. An error is `{"error": {"code": "…", "message": "…"}}`, its message a sentence for
a person. Connections and bodies are `relay.http.server`'s, the words of errors `relay.http.answers`'.

Nothing that a peer sent is ever in an answer or in a log: aiohttp by itself quotes the bytes that it could not parse,
which may be the start of a bearer token, in its 400 and in a logged traceback (docs/threats.md#A3), so here every
answer and every log line is ours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from http import HTTPStatus

import structlog
from aiohttp import web

from arcbridge.errors import ConfigError, EnrolmentRefused, PermissionRefused, StateError, Unauthenticated
from arcbridge.identity.claims import Identity
from arcbridge.identity.proof import HEADER, Peer, ProofRefused
from arcbridge.limiters import Bursts, KeyedTokenBucket
from arcbridge.loop_shares import LoopTime
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
from arcbridge.pki.pins import check_pin
from arcbridge.relay.access import CallerChecks
from arcbridge.relay.audit.log import RelayAudit
from arcbridge.relay.audit.record import Actor
from arcbridge.relay.counters import Counters
from arcbridge.relay.http.answers import ApiRefusal, set_headers
from arcbridge.relay.http.server import BODY_LIMIT, address_of, note_proved, read_body, take_turn
from arcbridge.relay.registry.base import ClusterRecord, Registry, admit, cluster_state, foreign_ca, is_bound_to
from arcbridge.relay.registry.generations import OLDER_AGENT, RenewedTwice, ShownCertificate
from arcbridge.settings.config import RelayLimitsConfig

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

RENEWALS = 20
"""Renewals that the agents of one cluster have at once: they share one certificate, which lasts for days."""

RENEWALS_RATE = 1 / 6
"""Renewals per second and cluster that grow back."""

SOURCES = 4096
"""Addresses, and clusters, whose requests are counted."""

SUBJECTS = 16_384
"""Subjects whose requests are counted."""

LIMITS = ("address", "enrolments", "user", "renewals", "proofs", "administration", "page")
"""What refuses a request, for the metrics."""

UNRECORDED = "the relay cannot record this enrolment now: try again later, or tell its operator"

LOG_INTERVAL = 10.0
"""Seconds between two lines in the log about requests that one limit refuses."""

log = structlog.get_logger("arcbridge.relay")


CountAgents = Callable[[Sequence[str]], Awaitable[Mapping[str, int]]]
"""How many agents of each of these clusters are connected now, in the whole fleet; a cluster left out has none."""


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


@dataclass(eq=False, repr=False)
class Api:
    """The handlers, with what they work on."""

    authority: Authority
    registry: Registry
    count_agents: CountAgents
    checks: CallerChecks
    counters: Counters
    _: KW_ONLY
    certificate_life: float
    """Seconds of an agent's certificate."""
    limits: InitVar[RelayLimitsConfig]
    login_document: Mapping[str, object] | None
    """What `/v1/login` answers (`login_settings`)."""
    payer_of: Callable[[Identity], LoopTime]
    """Returns who pays for the loop's time once the token is verified."""
    audit: RelayAudit = field(default_factory=lambda: RelayAudit(""))
    """Where enrolments are recorded."""

    def __post_init__(self, limits: RelayLimitsConfig) -> None:
        self.round_trip: Callable[[str], float] = lambda cluster: 0.0
        """Seconds between this process and the nearest agent of a cluster, by its report; 0: not known."""
        self.limited = dict.fromkeys(LIMITS, 0)
        """How many requests each limit has refused."""
        self._bursts = Bursts[str](LOG_INTERVAL)
        self.clock = time.time
        self.monotonic = time.monotonic
        self._callers = KeyedTokenBucket[str](0.0, 0.0, size=SUBJECTS)
        """Requests with an access token, by subject."""
        self.change_limits(limits)
        self._failures = KeyedTokenBucket[str](FAILURES, FAILURES_RATE, size=SOURCES)
        """Failed enrolments, by address."""
        self._unproved = KeyedTokenBucket[str](UNPROVED, UNPROVED_RATE, size=SOURCES)
        """Refusals for want of a proof, by address: one who has stolen a token spends nothing of its owner's."""
        self._unproved_logged = Bursts[str](LOG_INTERVAL)
        """The same refusals, by reason."""
        self._strangers = KeyedTokenBucket[str](STRANGERS, STRANGERS_RATE, size=SOURCES)
        """Requests that need no credential, by address."""
        self._renewals = KeyedTokenBucket[str](RENEWALS, RENEWALS_RATE, size=SOURCES)
        """Renewals, by cluster."""

    def change_limits(self, limits: RelayLimitsConfig) -> None:
        """Let each user make so many requests from now on."""
        minute = limits.requests_per_minute_per_user
        self._callers.change(self.monotonic(), minute, minute / 60)

    async def ca(self, request: web.Request) -> web.Response:
        self.spend_of_stranger(request)
        # The oldest that counts first: an end of an earlier version takes that one, and knows its pin.
        text = self.authority.trusted_pem + self.authority.announced
        return web.Response(text=text, content_type="application/x-pem-file")

    async def login(self, request: web.Request) -> web.Response:
        self.spend_of_stranger(request)
        if self.login_document is None:
            raise ApiRefusal(
                HTTPStatus.NOT_FOUND,
                "the relay does not say how to log in: give --oidc-issuer-url and --oidc-client-id, or have its "
                "operator add a [login] table to its settings",
            )
        return web.json_response(self.login_document)

    async def enrol(self, request: web.Request) -> web.Response:
        source, token_id = address_of(request), ""
        agent = Actor("agent", facts={"source": source})
        join_token, csr, cluster_ca = await read_body(request, "join_token", "csr", "cluster_ca")
        try:
            # The request is judged before the token is consumed, so that a mistake in it costs no use.
            key = key_hash(csr)
            cluster_ca = check_ca_certificate(cluster_ca)
            token_id = JoinToken.parse(join_token).id
            if self.audit.refusal():
                raise ApiRefusal(HTTPStatus.SERVICE_UNAVAILABLE, UNRECORDED, retry_after=5)
            record = await self.registry.redeem_join_token(join_token, key, cluster_ca)
        except EnrolmentRefused as error:
            log.warning("enrolment refused", source=source, reason=error.message)
            # First: one address shall not spend the records that all addresses have together.
            self._count_failure(source, error)
            self.audit.note_stranger("agent enrol", {"token_id": token_id}, agent, error.message)
            raise
        note_proved(request)
        # Before the certificate leaves. The agent asks again where this fails, which takes no further use of its token.
        try:
            facts = {"cluster": record.name, "token_id": token_id, "cluster_ca_pin": record.ca_pin, "agent_key": key}
            await self.audit.noted("agent enrol", facts, agent)
        except StateError as error:
            raise ApiRefusal(HTTPStatus.SERVICE_UNAVAILABLE, UNRECORDED, retry_after=5) from error
        # A relay of the fleet that counts nothing may have written the record since.
        state = record.keys.get(key)
        answer = await self._sign(csr, record, 1 if state is None else state.generation)
        log.info(
            "agent enrolled", cluster=record.name, join_token_id=token_id, source=source, cluster_ca_pin=record.ca_pin
        )
        return web.json_response(answer)

    async def check_join_token(self, request: web.Request) -> web.Response:
        """Return whether a join token could enrol an agent now, for the agent's `doctor`; nothing is used up by it."""
        source = address_of(request)
        join_token, pin = await read_body(request, "join_token", optional=("cluster_ca_pin",))
        try:
            cluster = await self.registry.check_join_token(join_token)
            record = await self.registry.cluster(cluster)
            if pin and record is not None and not is_bound_to(record.ca_pin, record.cas, _checked_pin(pin)):
                tokens = await self.registry.list_join_tokens()
                if not any(one.rebind for one in tokens if one.id == join_token.partition(".")[0]):
                    raise EnrolmentRefused(foreign_ca(record.ca_pin, pin))
        except EnrolmentRefused as error:
            # It is as good as an enrolment for guessing, and has the same bound.
            self._count_failure(source, error)
            raise
        return web.json_response({"cluster": cluster})

    def _count_failure(self, source: str, error: EnrolmentRefused) -> None:
        """Count a bad join token of an address; raise `ApiRefusal` where there were too many."""
        # The limit comes after the credential: an agent with a good token is let in, whatever its neighbours behind
        # one address do. What a failure costs is bounded by the connection that it takes (`is_last`).
        words = f"too many failed enrolments from this address, and this one failed, too ({error.message})"
        self.spend("enrolments", self._failures, source_of(source), words)

    async def renew(self, request: web.Request) -> web.Response:
        certificate = tls_peer_certificate(request)
        if certificate is None:
            raise ApiRefusal(
                HTTPStatus.UNAUTHORIZED,
                "a renewal needs the agent's client certificate: connect with it, or enrol with a new join token",
            )
        try:
            cluster = self.authority.authenticate_agent(certificate)
            record = admit(await self.registry.cluster(cluster), certificate)
            note_proved(request)
            self.spend("renewals", self._renewals, cluster, "this cluster's agents renew too often")
            csr, stored = await read_body(request, "csr", optional=("stored",))
            shown = ShownCertificate(
                agent_key_hash(certificate), agent_generation(certificate), agent_issued_at(certificate)
            )
            if key_hash(csr) != shown.key:
                raise EnrolmentRefused("a renewal keeps the agent's key: enrol with a new join token to change it")
            generation = await self.registry.renew(cluster, shown, request_hash(csr) if stored else OLDER_AGENT)
            answer = await self._sign(csr, record, generation)
        except RenewedTwice as error:
            self.counters.certificates_renewed_twice += 1
            log.error(
                "agent certificate renewed twice",
                cluster=cluster,
                source=address_of(request),
                generation=shown.generation,
                reason=error.message,
            )
            agent = Actor("agent", facts={"source": address_of(request)})
            self.audit.note_stranger("certificate renew", {"cluster": cluster}, agent, error.message)
            raise
        except EnrolmentRefused as error:
            log.warning("renewal refused", source=address_of(request), reason=error.message)
            raise
        log.info("certificate renewed", cluster=cluster, source=address_of(request), generation=generation)
        return web.json_response(answer)

    async def clusters(self, request: web.Request) -> web.Response:
        return await self.for_caller(request, self._clusters)

    async def cluster(self, request: web.Request) -> web.Response:
        return await self.for_caller(request, self._cluster)

    async def for_caller(
        self, request: web.Request, answer: Callable[[web.Request, Identity], Coroutine[object, object, web.Response]]
    ) -> web.Response:
        """Answer a request with a token, at the cost of its user from the verification on."""
        identity = await self._caller(request)
        payer = self.payer_of(identity)
        await take_turn(payer, "your sessions and requests take")
        return await payer.steps(answer(request, identity), inner=True)

    async def _clusters(self, request: web.Request, identity: Identity) -> web.Response:
        records = [
            record for record in await self.registry.clusters() if self.checks.access.allows(identity, record.name)
        ]
        agents = await self.count_agents([record.name for record in records])
        now = self.clock()
        return web.json_response([self._shown(record, agents.get(record.name, 0), now) for record in records])

    async def _cluster(self, request: web.Request, identity: Identity) -> web.Response:
        try:
            name = check_cluster_name(request.match_info["name"])
        except ConfigError as error:
            raise ApiRefusal(HTTPStatus.BAD_REQUEST, error.message) from error
        # Both are asked whatever the other says, and there is one answer: a caller does not learn which names exist
        # (docs/threats.md#J22).
        record, allowed = await self.registry.cluster(name), self.checks.access.allows(identity, name)
        agents = await self.count_agents([name])
        if record is None or not allowed:
            raise ApiRefusal(
                HTTPStatus.NOT_FOUND,
                "there is no such cluster, or you may not reach it: check its name, and ask the relay's operator",
            )
        return web.json_response(self._shown(record, agents.get(name, 0), self.clock()))

    def _shown(self, record: ClusterRecord, agents: int, now: float) -> dict[str, object]:
        return {
            "name": record.name,
            "state": cluster_state(record, agents, now),
            "agents": agents,
            "round_trip": self.round_trip(record.name),
            "last_seen": now if agents > 0 else record.last_seen,
            "ca_pin": record.ca_pin,
            "certificate_expires": record.certificate_expires,
            "version": record.version,
            "revoked": record.revoked > 0,
        }

    async def _sign(self, csr: str, record: ClusterRecord, generation: int) -> dict[str, object]:
        certificate = self.authority.sign_agent(
            csr, record.name, life=self.certificate_life, cluster_ca_pin=record.ca_pin, generation=generation
        )
        _, not_after = certificate_validity(certificate)
        await self.registry.certificate_issued(record.name, not_after)
        return {
            "certificate": certificate,
            "ca": self.authority.certificate_pem,
            "cluster": record.name,
            "not_after": not_after,
        }

    async def _caller(self, request: web.Request) -> Identity:
        values = request.headers.getall("Authorization", [])
        scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        if scheme.lower() != "bearer" or not token.strip():
            raise Unauthenticated("an access token is needed: log in and send it as 'Authorization: Bearer'")
        token = token.strip()
        identity = await self.checks.verifier.verify(token)
        proofs = request.headers.getall(HEADER, [])
        proof = proofs[0] if len(proofs) == 1 else ""
        try:
            self.checks.proofs.check(identity.binding, token, proof, Peer(tls_own_key(request)))
        except ProofRefused as error:
            self._refuse_unproved(identity, error, address_of(request))
            raise
        if (refused := self.checks.access.refusal(identity)) is not None:
            raise PermissionRefused(refused.message)
        note_proved(request)
        self.spend("user", self._callers, identity.subject, "you ask this relay too often")
        return identity

    def _refuse_unproved(self, identity: Identity, error: ProofRefused, source: str) -> None:
        """Log a refusal for want of a proof, once in each burst; raises `ApiRefusal` for an address with too many."""
        now = self.monotonic()
        if (since_last := self._unproved_logged.seen(error.rule, now)) is not None:
            log.warning(
                "api token refused",
                user=identity.username,
                source=source,
                bound=identity.binding.kind.value,
                reason=error.rule.value,
                requests=since_last,
            )
        # As with enrolments the limit comes after the credential, and locks out no neighbour with a good proof.
        words = f"too many tokens without a good proof came from this address, and this is one ({error.message})"
        self.spend("proofs", self._unproved, source_of(source), words)

    def spend_of_stranger(self, request: web.Request) -> None:
        """Count a request that needs no credential."""
        self.spend("address", self._strangers, source_of(address_of(request)), "too many requests from this address")

    def spend(self, limit: str, bucket: KeyedTokenBucket[str], key: str, words: str) -> None:
        """Take one request of what `key` has; raises `ApiRefusal` that says when to come back."""
        now = self.monotonic()
        if bucket.reserve(key, now) is not None:
            return
        wait = max(math.ceil(bucket.wait(key, now)), 1)
        self.limited[limit] += 1
        if self._bursts.seen(limit, now) is not None:
            log.warning("api requests refused", reason=limit)
        raise ApiRefusal(HTTPStatus.TOO_MANY_REQUESTS, f"{words}: wait {wait} s and try again", retry_after=wait)


def build_app(api: Api, *install: Callable[[web.Application], None]) -> web.Application:
    """Return the application; serve it with `HttpApiServer`, which bounds its requests and keeps aiohttp's words
    out of answers and logs.

    Each of `install` adds routes (`relay.http.client_files`, `relay.http.administration`).
    """
    app = web.Application(client_max_size=BODY_LIMIT)
    app.on_response_prepare.append(set_headers)
    routes: list[tuple[str, str, Callable[[web.Request], Awaitable[web.StreamResponse]]]] = [
        ("GET", "/v1/ca", api.ca),
        ("GET", "/v1/login", api.login),
        ("POST", "/v1/enrol", api.enrol),
        ("POST", "/v1/join-token", api.check_join_token),
        ("POST", "/v1/renew", api.renew),
        ("GET", "/v1/clusters", api.clusters),
        ("GET", "/v1/clusters/{name}", api.cluster),
    ]
    for method, path, handler in routes:
        app.router.add_route(method, path, handler)
    for further in install:
        further(app)
    return app


def _checked_pin(pin: str) -> str:
    try:
        return check_pin(pin)
    except ConfigError as error:
        raise ApiRefusal(HTTPStatus.BAD_REQUEST, "cluster_ca_pin is no pin") from error
