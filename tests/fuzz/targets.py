"""One function for each parser of outside input: it takes any bytes, and raises where the parser breaks a promise.

A parser may refuse input with the error that it documents; whatever else it raises is a defect, and so is a result that
depends on how the input was cut, or that another parser of the same format contradicts. No target opens a file or a
socket, and none reads a clock.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import h11
import jwt
from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from hypothesis import HealthCheck, settings
from hypothesis.stateful import get_state_machine_test
from yarl import URL

from arcbridge import legacy_refusals
from arcbridge.agent.denylist import parse_denylist
from arcbridge.agent.kube import impersonation
from arcbridge.agent.kube.fast_path_parser import KnownLines, plain_head
from arcbridge.agent.kube.request_facts import read_facts
from arcbridge.agent.kube.request_info import request_info
from arcbridge.agent.kube.request_target import request_target
from arcbridge.agent.kube.response import CHUNKED, ChunkedBody, ResponseHead, read_head
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upstream_pool import UpstreamConnection, UpstreamRequest
from arcbridge.client.credentials.jwt_unverified import read_unverified
from arcbridge.client.kubeconfig import file as kubeconfig_yaml
from arcbridge.errors import ConfigError, RemoteProtocolError, StateError
from arcbridge.identity import authentication, groups, verifier
from arcbridge.identity import proof as proofs
from arcbridge.identity.cel.mapping import BudgetExceeded, CostBudget
from arcbridge.identity.claims import Identity, map_claims
from arcbridge.identity.fetch import Reply
from arcbridge.identity.policy import Policy
from arcbridge.identity.refusal import TokenRefused
from arcbridge.net import join as joins
from arcbridge.net.client_hello import MAX_HELLO, Incomplete, peek
from arcbridge.pki import pins
from arcbridge.refusals import MAX_WANTED, RefusalRule, read_refusal
from arcbridge.wire import records
from arcbridge.wire.decoder import Decoder
from tests.fuzz import caller_targets, gateway_targets, remote_targets
from tests.wire.lossy_link import LossyLink

Target = Callable[[bytes], None]

_RECORDS = (
    records.Hello, records.Auth, records.Restrictions, records.AuthOk, records.Open, records.Goaway, records.Move,
    records.Dial, records.Status, records.Revoke, records.Ledger, records.JoinRequest, records.JoinReply,
)  # fmt: skip
_LOOP = asyncio.new_event_loop()
PIECE = 16 * 1024
"""Bytes that arrive at once."""


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    """Cut `data` into pieces of `size` bytes."""
    return (data[at : at + size] for at in range(0, len(data), size))


# -- what strangers send to the relay's port --------------------------------------------------------------------------


def client_hello(data: bytes) -> None:
    """A verdict never depends on where the bytes were cut, and each `Incomplete` asks for more than there is."""
    whole = peek(data)
    for end in {0, 1, 5, len(data) // 3, len(data) // 2, len(data) - 1} & set(range(len(data))):
        part = peek(data[:end])
        if isinstance(part, Incomplete):
            assert end < part.need <= MAX_HELLO
        else:
            assert part == whole, "a verdict that more bytes change"
    if isinstance(whole, Incomplete):
        assert len(data) < whole.need <= MAX_HELLO


def read_join(data: bytes, size: int = PIECE) -> tuple[bytes, bytes]:
    """Return the record of a join's message and what came behind it, from pieces of `size`."""
    waiting = deque(pieces(data, size))

    async def read() -> bytes:
        return waiting.popleft() if waiting else b""

    record, rest = _LOOP.run_until_complete(joins._read_record(SimpleNamespace(read=read)))
    return record, rest + b"".join(waiting)


def join(data: bytes) -> None:
    """The message of a join: the length, the record, and what came behind it, however the bytes arrive."""
    found = []
    for size in (len(data) or 1, 1, 7):
        try:
            record, rest = read_join(data, size)
            records.JoinRequest.decode(record)
            found.append((record, rest))
        except (RemoteProtocolError, EOFError) as error:
            found.append((type(error), b""))
    assert found[0] == found[1] == found[2], "a join that depends on the segments"


# -- frames and records, from a peer of a session ---------------------------------------------------------------------


class _Seen:
    """A sink that notes what it was given; a DATA frame's payload counts, and not how it was cut."""

    def __init__(self) -> None:
        self.frames: list[tuple[int, int, bytes]] = []
        self.payload = bytearray()

    def data_begins(self, stream_id: int, length: int) -> Callable[[memoryview], None] | None:
        self.frames.append((5, stream_id, length.to_bytes(4, "big")))
        return None if stream_id % 4 == 2 else self.payload.extend

    def frame_received(self, kind: int, stream_id: int, body: bytes) -> None:
        self.frames.append((kind, stream_id, body))


def decoder(data: bytes) -> None:
    """The frames, the payload and the error do not depend on how the bytes arrive."""
    found = []
    for size in (len(data) or 1, 1, 13):
        seen, reader, error = _Seen(), Decoder(), ""
        try:
            for piece in pieces(data, size):
                reader.feed(memoryview(piece), seen)
        except RemoteProtocolError as refused:
            error = refused.message
        found.append((seen.frames, bytes(seen.payload), error, reader.position if not error else -1))
    assert found[0] == found[1] == found[2], "frames that depend on the segments"


def record(data: bytes) -> None:
    """What a record's bytes are read as is what its own encoding is read as; a refusal in it can be quoted."""
    for kind in _RECORDS:
        try:
            found = kind.decode(data)
        except RemoteProtocolError:
            continue
        assert kind.decode(found.encode()) == found
        repr(found)
        if isinstance(found, records.Goaway | records.JoinReply):
            for refusal in (read_refusal(found.rule, found.wanted), legacy_refusals.read(found.message)):
                assert refusal.rule in RefusalRule
                assert refusal.wanted.isascii()
                assert '"' not in refusal.wanted
                assert len(refusal.wanted) <= MAX_WANTED


# -- requests, from a caller ------------------------------------------------------------------------------------------


def _h11_request(data: bytes) -> tuple[h11.Request, list[tuple[bytes, bytes]]] | None:
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    connection.receive_data(data)
    try:
        event = connection.next_event()
    except h11.RemoteProtocolError:
        return None
    return (event, list(event.headers.raw_items())) if isinstance(event, h11.Request) else None


def plain_request(data: bytes) -> None:
    """What the fast path reads, h11 reads alike, and it holds no line that says who asks."""
    known = KnownLines()
    head = plain_head(data, known)
    again = plain_head(data, known)
    if head is None:
        assert again is None
        return
    assert again is not None
    assert (again.target, again.plain) == (head.target, head.plain)
    other = _h11_request(data)
    assert other is not None, "h11 refuses a plain request"
    request, fields_ = other
    assert (request.method, request.target) == (b"GET", head.target.encode())
    assert not any(name.lower() in (b"transfer-encoding", b"content-length") for name, _ in fields_)
    assert head.plain is not None
    lines = head.plain.lower()
    assert b"\nimpersonate-" not in b"\n" + lines
    assert b"\nauthorization" not in b"\n" + lines


def read_request(data: bytes) -> tuple[Any, list[tuple[str, str]]] | None:
    """Read a head as the general path does: the message, and the headers that go on; None where it is refused."""
    parser = HttpRequestParser(
        BaseProtocol(_LOOP), _LOOP, 2**16, max_line_size=2**16, max_field_size=2**16, max_headers=1000
    )
    try:
        messages, _, _ = parser.feed_data(data)
    except (HttpProcessingError, ValueError):
        return None
    if not messages:
        return None
    message = messages[0][0]
    try:
        facts = read_facts(message.method, message.path, message.raw_headers, message.version)
        if facts.misframed is not None or facts.misnamed is not None:
            return None
        request_target(message.method, message.path, False)
        impersonation.requested_subject(facts.impersonation)
        subject = impersonation.Subject("alice", "", ("dev",), ())
        cleaned = impersonation.cleaned_headers(facts)
        return message, impersonation.impersonated_headers(cleaned, subject, authorization="Bearer agent")
    except RequestRefusal:
        return None


def request(data: bytes) -> None:
    """The general path: refusals are RequestRefusals, and what goes on names the caller once, and no other."""
    found = read_request(data)
    if found is None:
        return
    message, outgoing = found
    named = [value for name, value in outgoing if name.lower() == "impersonate-user"]
    assert named == ["alice"]
    assert [value for name, value in outgoing if name.lower() == "authorization"] == ["Bearer agent"]
    assert not any("\r" in text or "\n" in text or "\0" in text for field in outgoing for text in field)
    other = _h11_request(data)
    if other is not None:
        theirs, their_fields = other
        assert theirs.method.decode() == message.method
        assert theirs.target.decode() == message.path
        assert _lengths(their_fields) == _lengths(message.raw_headers), "two parsers see two bodies"


def _lengths(fields_: Any) -> list[tuple[bytes, bytes]]:
    wanted = (b"content-length", b"transfer-encoding")
    return sorted((name.lower(), value.strip().lower()) for name, value in fields_ if name.lower() in wanted)


def target(data: bytes) -> None:
    """Every text has a verb and a resource for the audit record, and none raises."""
    text = data.decode("latin-1")
    for method in ("GET", "POST", "DELETE", "x"):
        for upgrade in (False, True):
            request_info(method, text, upgrade=upgrade)


# -- answers, from the API server -------------------------------------------------------------------------------------


def response_head(data: bytes) -> None:
    """What is passed on is one head, and h11 reads its status and the length of its body alike."""
    end = data.find(b"\r\n\r\n")
    head = data[: end + 4] if end >= 0 else data
    for method in ("GET", "HEAD"):
        try:
            found = read_head(head, method)
        except RequestRefusal:
            continue
        if found is None or found.status < 200:
            continue
        passed = found.lines + b"\r\n"
        assert passed.count(b"\r\n\r\n") == 1, "two heads leave the agent"
        connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
        connection.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        connection.send(h11.EndOfMessage())
        connection.receive_data(passed)
        try:
            event = connection.next_event()
        except h11.RemoteProtocolError:
            continue  # h11 knows fewer bytes in values than RFC 9110 §5.5 allows
        assert isinstance(event, h11.Response)
        assert event.status_code == found.status
        lengths = [value for name, value in event.headers if name == b"content-length"]
        if found.length == CHUNKED:
            assert not lengths
        elif method == "GET" and found.status not in (204, 304):
            assert lengths == [str(found.length).encode()] or [int(one) for one in lengths] == [found.length]


def chunked_body(data: bytes) -> None:
    """The payload and the end do not depend on how the bytes arrive, and h11 takes what is passed on alike."""
    found = []
    for size in (len(data) or 1, 1, 5):
        body, payload, passed = ChunkedBody(), bytearray(), bytearray()
        for piece in pieces(data, size):
            buffer = bytearray(b"\0\0\0" + piece)
            stop, behind = body.feed(buffer, 3, len(buffer))
            for start, end in body.spans:
                payload += buffer[start:end]
            passed += buffer[3:stop] + behind
            if body.over or body.broken:
                break
        found.append((bytes(payload), body.over, body.broken))
        assert body.payload == len(payload)
        if body.over:
            assert _h11_chunked(bytes(passed)) == bytes(payload), "two parsers see two bodies"
    assert found[0][1:] == found[1][1:] == found[2][1:], "an end that depends on the segments"
    if found[0][1]:
        assert found[0][0] == found[1][0] == found[2][0]


class _Taken:
    """A caller and a pool that note what an API server's connection tells them."""

    def __init__(self) -> None:
        self.passed = bytearray()
        self.payload = 0
        self.end = ""
        self.kept = False

    def response_begins(self, head: ResponseHead) -> bytes:
        return head.lines + b"\r\n"

    def response_data(self, data: bytes | memoryview, payload: int) -> None:
        self.passed += data
        self.payload += payload

    def response_complete(self) -> None:
        self.end = "complete"

    def response_failed(self, refusal: RequestRefusal | None) -> None:
        self.end = "failed"

    def put(self, connection: UpstreamConnection) -> None:
        self.kept = True

    def remove(self, connection: UpstreamConnection) -> None:
        self.kept = False

    left = remove


def read_answer(data: bytes, taken: _Taken, size: int = PIECE, method: str = "GET") -> None:
    """Read an answer to `method` in pieces of `size` on a connection to the API server."""
    transport: Any = SimpleNamespace(
        is_closing=lambda: False, write=len, abort=str, pause_reading=str, resume_reading=str
    )
    connection = UpstreamConnection(taken, None)
    connection.connection_made(transport)
    connection.send(taken, UpstreamRequest(b"", method))
    for piece in pieces(data, size):
        connection.get_buffer(-1)[: len(piece)] = piece
        connection.buffer_updated(len(piece))
        if taken.end == "failed":
            break


def answer(data: bytes) -> None:
    """The whole reader of answers: however the bytes come, the same is passed on, and h11 reads the same answer in what
    came and in what is passed on; nothing behind an answer is, nor is such a connection kept."""
    for method in ("GET", "HEAD"):
        found = []
        for size in (len(data) or 1, 1, 7):
            taken = _Taken()
            read_answer(data, taken, size, method)
            found.append((taken.end, bytes(taken.passed), taken.payload, taken.kept))
        if found[0][0] != "failed":  # else what came before the fault may have been passed on
            assert found[0][:3] == found[1][:3] == found[2][:3], "an answer that depends on the segments"
        assert {one[0] for one in found} == {found[0][0]}
        end, passed, payload, kept = found[0]
        if end != "complete":
            continue
        theirs, rest = _h11_answer(data, method)
        again, none = _h11_answer(passed, method, ours=True)
        assert not none, "bytes behind the answer were passed on"
        assert not (rest and kept), "a connection with bytes behind its answer was kept"
        if theirs is not None:
            assert len(theirs[1]) == payload
            assert again is None or again == theirs, "two parsers see two answers"


def _h11_answer(data: bytes, method: str, *, ours: bool = False) -> tuple[tuple[int, bytes] | None, bytes]:
    """Status and body of the whole answer that h11 reads, and what is behind it; None: it refuses it, `ours` for
    its head alone."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    connection.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    if data:
        connection.receive_data(data)
    status, body = 0, b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                return (status, body), connection.trailing_data[0]
            else:
                assert isinstance(event, h11.InformationalResponse), "h11 sees no end"
    except h11.RemoteProtocolError:
        assert not (ours and status), "h11 refuses the body of what was passed on"
        return (
            None,
            b"",
        )  # h11 knows fewer bytes in values than RFC 9110 §5.5 allows, and reads trailers, which are dropped


def _h11_chunked(body: bytes) -> bytes:
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "a")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
    payload = b""
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Data):
            payload += event.data
        elif isinstance(event, h11.EndOfMessage):
            return payload
        elif event is h11.NEED_DATA:
            raise AssertionError("h11 sees no end")


# -- the life of a session --------------------------------------------------------------------------------------------

_LIVES = get_state_machine_test(
    LossyLink, settings=settings(stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
)


def sessions(data: bytes) -> None:
    """The bytes choose what happens to two sessions over a lossy link (`tests.wire.lossy_link`)."""
    _LIVES.hypothesis.fuzz_one_input(data)


# -- tokens and certificates ------------------------------------------------------------------------------------------

_ISSUERS = authentication.parse(
    """
apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
jwt:
- issuer: {url: "https://issuer.example", audiences: [arcbridge]}
  claimMappings:
    username: {claim: sub, prefix: ""}
    groups: {claim: groups, prefix: "oidc:"}
"""
)
_ISSUER = _ISSUERS.issuers[0]


async def _fetch(url: str, ca_pem: str | None) -> Reply:
    raise AssertionError("no key is asked for")


_VERIFIER = verifier.TokenVerifier(_ISSUERS, _fetch, accept=verifier.Acceptance(frozenset({"relay"})))
_CEL_ISSUER = authentication.parse(
    """
apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
jwt:
- issuer: {url: "https://issuer.example", audiences: [arcbridge]}
  claimMappings:
    username: {expression: "string(claims.sub).lowerAscii() + string(claims.?n.orValue(''))"}
    groups: {expression: "dyn(claims.?groups.orValue([])).map(g, string(g)).sort().distinct()"}
    uid: {expression: "claims.?url.optMap(u, url(u).getHost()).orValue('')"}
    extra:
    - {key: example.com/a, valueExpression: "'%s'.format([dyn(claims.?m.orValue(null))])"}
    - {key: example.com/b, valueExpression: "claims.?text.optMap(t, t.split(',').map(x, x.trim())).orValue([])"}
    - {key: example.com/c, valueExpression: "claims.?time.optMap(t, string(timestamp(t))).orValue('')"}
    - {key: example.com/d, valueExpression: "claims.?text.optMap(t, t.matches('^(a+)+$') ? 'y' : 'n').orValue('')"}
    - {key: example.com/e, valueExpression: "claims.?q.optMap(q, string(quantity(q).asInteger())).orValue('')"}
"""
).issuers[0]


def token(data: bytes) -> None:
    """A text is a token in shape or TokenRefused; claims are an identity that headers can say, or TokenRefused."""
    text = data.decode("latin-1")
    read_unverified(text)
    try:
        verifier._parts(text)
    except TokenRefused:
        pass
    try:
        claims = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(claims, dict):
        return
    try:
        for name in ("exp", "iat"):
            verifier._number(claims, name, required=True)
    except TokenRefused:
        return
    try:
        groups.check_pointers(claims)
        source = groups.source_of(claims, "groups")
    except TokenRefused:
        return
    if source is not None and groups._origin(source.endpoint) == "issuer.example:443":
        # Python's HTTP client goes where it was looked at.
        assert (URL(source.endpoint, encoded=True).host, source.endpoint[:8]) == ("issuer.example", "https://")
        assert source.access_token.isascii()
        assert source.access_token.isprintable()
    for issuer in (_ISSUER, _CEL_ISSUER):
        try:
            identity = map_claims(issuer, claims, CostBudget(20_000), ("bot",))
        except (TokenRefused, BudgetExceeded):
            continue
        assert isinstance(identity, Identity)
        assert not identity.username.startswith("system:")
        assert identity.actor or "act" not in claims, "an actor that cannot be read is no user without one"
        try:
            impersonation.impersonated_headers([], impersonation.Subject.of(identity), authorization="Bearer agent")
        except RequestRefusal:
            pass
    try:
        verifier._check_kind(claims, claims)
        _VERIFIER._check_audience(_ISSUER, claims)
    except TokenRefused:
        return
    audience = claims["aud"]
    places = {proofs.place_of(one) for one in ([audience] if isinstance(audience, str) else audience)}
    assert "arcbridge" in places
    assert "relay" not in places
    assert str(claims.get("typ", "JWT")).lower().endswith("jwt")


PROOF_KEY = proofs.ProofKey.from_jwk(
    b'{"kty":"EC","crv":"P-256","x":"axfR8uEsQkf4vOblY6RA8ncDfYEt6zOg9KE5RdiYwpY",'
    b'"y":"T-NC4v4af5uO5-tKfA-eFivOM1drMV7Oy7ZAaDe_UfU","d":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE"}'
)
"""The private key 1: inputs are signed with it, and the corpus stays good for ever."""
PROOF_TOKEN, PROOF_SPKI, PROOF_PIN, PROOF_NOW = "head.claims.signature", b"the peer's key", "sha256:" + "ab" * 32, 1.8e9


def proof(data: bytes) -> None:
    """A text is a proof or ProofRefused; what is taken says what is meant, to another implementation, too.

    An input of two lines is header and claims, which are signed here: mutations would not come past the signature. What
    is no proof is read as the claims of a token, which are bound in one way or in none, and as a private key.
    """
    text = data.decode("latin-1")
    header, separator, claims = data.partition(b"\n")
    if separator:
        signed = f"{proofs._encode(header)}.{proofs._encode(claims)}"
        text = f"{signed}.{proofs._encode(PROOF_KEY._key().sign(signed.encode()))}"
    try:
        thumbprint = proofs.check_proof(
            text, token=PROOF_TOKEN, peer_spki=PROOF_SPKI, pin=PROOF_PIN, now=PROOF_NOW, place="the agent"
        )
    except proofs.ProofRefused:
        pass
    else:
        _is_meant(text, thumbprint)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(found, dict):
        bound = proofs.binding(found)
        assert bound.names("") is False
        if "cnf" not in found and "nonce" not in found and "aud" not in found:
            assert bound == proofs.UNBOUND
    try:
        proofs.ProofKey.from_jwk(data)
    except StateError:
        pass


def _is_meant(text: str, thumbprint: str) -> None:
    header = jwt.get_unverified_header(text)
    assert header.keys() == {"typ", "alg", "jwk"}
    assert (header["typ"], header["alg"]) == (proofs.TYPE, "ES256")
    assert header["jwk"].keys() == {"kty", "crv", "x", "y"}, "a private key, or more than a key"
    claims = jwt.decode(text, jwt.PyJWK(header["jwk"], "ES256").key, ["ES256"], options={"verify_iat": False})
    assert claims["ath"] == proofs.token_hash(PROOF_TOKEN)
    assert claims["peer"] == proofs.peer_hash(PROOF_SPKI)
    assert claims["pin"] == PROOF_PIN
    assert type(claims["iat"]) is int
    assert abs(claims["iat"] - PROOF_NOW) <= proofs.IAT_WINDOW
    canonical = json.dumps(header["jwk"], sort_keys=True, separators=(",", ":")).encode()
    assert thumbprint == proofs._encode(hashlib.sha256(canonical).digest())


def certificate(data: bytes) -> None:
    """Where our own reading finds the key of a certificate, `cryptography` finds the same."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    text = data.decode("latin-1")
    ours = pins._p256_key(text)
    if ours is None:
        return
    try:
        theirs = x509.load_pem_x509_certificate(text.encode("latin-1")).public_key()
    except (ValueError, x509.InvalidVersion):
        return  # it trusts nothing of such a certificate, and neither does the handshake
    assert theirs.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == ours


# -- files ------------------------------------------------------------------------------------------------------------


def _file(read: Callable[[bytes], object]) -> Target:
    def target(data: bytes) -> None:
        """What is read is a value or a ConfigError."""
        try:
            read(data)
        except ConfigError:
            pass

    return target


FILES: dict[str, Target] = {
    "authentication_file": _file(lambda data: authentication.parse(data.decode("utf-8", "replace"))),
    "denylist_file": _file(lambda data: parse_denylist(data, "denylist")),
    "policy_file": _file(lambda data: Policy.load(data.decode("utf-8", "replace"))),
}


def kubeconfig(data: bytes) -> None:
    """A document that is written again is the same document."""
    try:
        document = kubeconfig_yaml.parse(data, "kubeconfig")
    except StateError:
        return
    if not isinstance(document, dict):  # refused, or an empty file
        return
    text = kubeconfig_yaml.dump(document)
    assert kubeconfig_yaml.parse(text.encode(), "kubeconfig") == document


TARGETS: dict[str, Target] = {
    one.__name__: one
    for one in (
        client_hello, join, decoder, record, plain_request, request, target, response_head, chunked_body, answer,
        sessions, token,
        proof, certificate, kubeconfig,
        caller_targets.head, caller_targets.pod_body, caller_targets.audit_text, caller_targets.port_forward,
         gateway_targets.gateway_head, caller_targets.recorded_channels,
        remote_targets.proxy_header, remote_targets.http_head, remote_targets.api_body,
        remote_targets.enrolment, remote_targets.issuer_document,
        remote_targets.cel_values, remote_targets.nats_message, remote_targets.login_profile,
         remote_targets.foreign_kubeconfig, remote_targets.review_answer, remote_targets.access_object,
         remote_targets.pod_stream, remote_targets.pod_document, remote_targets.sealed_file,
    )
} | FILES  # fmt: skip
