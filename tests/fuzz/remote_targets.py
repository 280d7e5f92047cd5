"""Targets for what a stranger, an issuer, NATS, a relay or another program's file gives beside frames and tokens.

They keep the rules of `tests.fuzz.targets`.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from aiohttp.base_protocol import BaseProtocol
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser

from arcbridge.agent.authenticator import Authenticator
from arcbridge.agent.elevation import objects
from arcbridge.agent.kube import review
from arcbridge.agent.kube.impersonation import Subject
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig
from arcbridge.client.kubeconfig.file import KubeconfigFile, dump, is_empty, parse
from arcbridge.client.relay import update_notice
from arcbridge.client.relay.relay_profile import LoginOffer
from arcbridge.client.serving.pod_ports import spdy, workload
from arcbridge.client.serving.pod_ports.target import parse_targets
from arcbridge.errors import (
    ArcbridgeError,
    ConfigError,
    EnrolmentRefused,
    SealingError,
    StateError,
    Unauthenticated,
    Unreachable,
)
from arcbridge.identity import authentication, keys
from arcbridge.identity.cel.mapping import BudgetExceeded, CostBudget
from arcbridge.identity.claims import Identity, map_claims
from arcbridge.identity.refusal import TokenRefused
from arcbridge.pki.authority import check_ca_certificate
from arcbridge.pki.enrolment import JoinToken, key_hash
from arcbridge.relay import http_heads, proxy_protocol
from arcbridge.relay.fleet import nats as fleet
from arcbridge.relay.fleet.base import Lost
from arcbridge.relay.fleet.nats_questions import NatsQuestions
from arcbridge.relay.http import server as api_server
from arcbridge.relay.http.answers import ApiRefusal
from arcbridge.relay.registry import nats as nats_registry
from arcbridge.relay.registry.base import RegistryUnavailable
from arcbridge.relay.registry.nats_bucket import Bucket
from arcbridge.sealing.age import open_sealed, parse_identities, parse_identity, parse_recipient
from arcbridge.sealing.header import ByteSource, read_header, written
from arcbridge.tasks import TaskSet
from arcbridge.untrusted_json import read_json

_LOOP = asyncio.new_event_loop()


# -- strangers at the relay -------------------------------------------------------------------------------------------


def proxy_header(data: bytes) -> None:
    """What is refused stays refused, a header stays that header, and a wait is for more than there is."""
    whole = proxy_protocol.peek(data)
    for end in {0, 1, 12, 15, 16, len(data) // 2, len(data) - 1} & set(range(len(data))):
        part = proxy_protocol.peek(data[:end])
        if isinstance(part, proxy_protocol.ProxyIncomplete):
            assert end < part.need <= proxy_protocol.MAX_HEADER
        elif isinstance(part, proxy_protocol.ProxyRefusal):
            assert isinstance(whole, proxy_protocol.ProxyRefusal), "a refusal that more bytes take back"
        else:
            assert part == whole, "a header that more bytes change"


def read_api_body(data: bytes) -> list[str] | None:
    """Read the body of a `POST /v1/…`; None where it is refused."""

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(data), 4096):
            yield data[at : at + 4096]

    ticket = SimpleNamespace(waits=lambda: None, works=lambda: None)
    request: Any = SimpleNamespace(
        headers={}, content_length=None, protocol=SimpleNamespace(ticket=ticket),
        content=SimpleNamespace(iter_any=pieces),
    )  # fmt: skip
    try:
        return _LOOP.run_until_complete(api_server.read_body(request, "join_token", "csr", optional=("stored",)))
    except ApiRefusal:
        return None


def api_body(data: bytes) -> None:
    """A body is the strings that are asked for, or an ApiRefusal."""
    found = read_api_body(data)
    if found is not None:
        assert len(found) == 3
        assert found[:2] == [json.loads(data)[name] for name in ("join_token", "csr")]


def read_http_head(data: bytes, size: int = 16 * 1024) -> list[tuple[str, str, Any]]:
    """Return the requests that a connection of the relay's API takes up, from pieces of `size`."""
    protocol = BaseProtocol(_LOOP)
    inner = HttpRequestParser(
        protocol, _LOOP, api_server.BODY_LIMIT, max_line_size=http_heads.FIELD_LIMIT,
        max_field_size=http_heads.FIELD_LIMIT, max_headers=http_heads.MAX_HEADERS, max_msg_queue_size=32,
    )  # fmt: skip
    parser = http_heads.HeadParser(inner)
    protocol._parser = parser
    found: list[tuple[str, str, Any]] = []
    try:
        for at in range(0, len(data), size):
            messages, upgraded, _ = parser.feed_data(data[at : at + size])
            found += [(message.method, message.path, message.raw_headers) for message, _ in messages]
            assert parser._held <= http_heads.HEAD_LIMIT, "more than a connection may hold"
            if upgraded:
                break
    except HttpProcessingError:
        pass
    return found


def http_head(data: bytes) -> None:
    """The first request does not depend on how the bytes arrive, where all of them are one head at most."""
    whole, cut = read_http_head(data, len(data) or 1), read_http_head(data, 7)
    if whole and len(data) <= 16 * 1024:
        assert cut[:1] == whole[:1], "a request that depends on the segments"


def enrolment(data: bytes) -> None:
    """A request, a CA and a join token are one each, or EnrolmentRefused."""
    text = data.decode("utf-8", "replace")
    for read in (key_hash, check_ca_certificate, JoinToken.parse):
        try:
            read(text)
        except EnrolmentRefused:
            pass


# -- the issuer -------------------------------------------------------------------------------------------------------


def issuer_document(data: bytes) -> None:
    """What an issuer answers is an object or Unreachable, and its key set is at most MAX_KEYS keys."""
    try:
        document = keys._json_object(data)
    except Unreachable:
        return
    found = keys.parse_keys(document, "https://issuer.example")
    assert len(found) <= keys.MAX_KEYS
    assert all(key.algorithms for key in found)


_CEL = authentication.parse(
    """
apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
jwt:
- issuer: {url: "https://issuer.example", audiences: [arcbridge]}
  claimMappings:
    username: {expression: "claims.sub + ':' + string(claims.?n.orValue(0))"}
    groups: {expression: "dyn(claims.?groups.orValue([])).filter(g, g.startsWith('a')).map(g, g.replace('a', 'bb'))"}
    uid: {expression: "claims.?text.optMap(t, t.substring(0, 1).upperAscii()).orValue('')"}
    extra:
    - {key: example.com/a, valueExpression: "dyn(claims.?list.orValue([])).map(x, string(x)).join(',')"}
    - key: example.com/b
      valueExpression: "claims.?text.optMap(t, string(t).split(' ').map(x, string(x))).orValue([])"
    - {key: example.com/c, valueExpression: "claims.?text.optMap(t, string(t).find('[0-9]+$')).orValue('')"}
    - {key: example.com/d, valueExpression: "claims.?map.optMap(m, dyn(m).map(k, string(k))).orValue([])"}
    - {key: example.com/e, valueExpression: "claims.?ip.optMap(t, isIP(t) ? string(ip(t).family()) : '').orValue('')"}
    - key: example.com/f
      valueExpression: "claims.?version.optMap(t, isSemver(t) ? string(semver(t).major()) : '').orValue('')"
  claimValidationRules:
  - expression: "!dyn(claims.?list.orValue([])).exists(x, dyn(claims.?list.orValue([])).exists(y, x == y + '!'))"
    message: refused
  userValidationRules:
  - {expression: "user.groups.all(g, !g.contains('system:'))", message: refused}
"""
).issuers[0]


def cel_values(data: bytes) -> None:
    """Expressions over any claims give an identity or TokenRefused, within the budget of a token."""
    try:
        claims = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(claims, dict):
        return
    claims["exp"] = 1.8e9  # the verifier has read it before
    try:
        identity = map_claims(_CEL, claims, CostBudget())
    except (TokenRefused, BudgetExceeded):
        return
    assert isinstance(identity, Identity)


# -- other relays, over NATS ------------------------------------------------------------------------------------------


class _Tasks(TaskSet):
    """Begins nothing: there is no event loop."""

    def start(self, work: Any, name: str | None = None) -> Any:
        work.close()


def nats_message(data: bytes) -> None:
    """Whatever is published is a message that is taken, or dropped: nothing escapes a subscription's handler."""
    for kind in (fleet.DialAsk, fleet.Offer, fleet.Accept, fleet.DialAnswer, Lost):
        try:
            read = kind.decode(data)
        except ArcbridgeError:
            continue
        assert kind.decode(read.encode()) == read
    connection: Any = SimpleNamespace(prefix="p", name="n")
    questions = NatsQuestions(connection, "0" * 16, lambda _: [], _Tasks())
    questions._asked(SimpleNamespace(data=data, reply="r", subject="s"))
    questions._waiting["1"] = asyncio.Queue(4)
    questions._answered(SimpleNamespace(data=data, reply="", subject="p.1"))
    bucket = Bucket(connection, name="b", replicas=1, monotonic=lambda: 0.0)
    for key in ("cluster.prod.binding", "cluster.prod.revoked", "seen.prod", "token.a", "user.a"):
        try:
            entry = bucket._decoded(key, data)
        except RegistryUnavailable:
            continue
        if key == "cluster.prod.binding":
            nats_registry._record(entry, None, 0.0)
        elif key == "user.a":
            nats_registry._user(entry)


# -- the API server's answers to the agent's own questions ------------------------------------------------------------


def review_answer(data: bytes) -> None:
    """An answer is a verdict, or a refusal that says that there is none."""

    async def ask(*_: Any, **__: Any) -> tuple[int, Any]:
        try:
            return 201, read_json(data)
        except ValueError:
            return 201, None

    api: Any = SimpleNamespace(ask=ask)
    part = review.Part("", "users", "bob")
    subject = Subject("alice", "", (), ())
    try:
        allowed = _LOOP.run_until_complete(review.Reviewer(api)._ask(subject, part, cast(Any, None)))
        assert isinstance(allowed, bool)
    except RequestRefusal:
        pass
    reviewed: Any = SimpleNamespace(api=api, clock=lambda: 1.8e9, verifier=None)
    reviewed._identity = lambda info, token: Authenticator._identity(reviewed, info, token)
    try:
        identity = _LOOP.run_until_complete(Authenticator._review(reviewed, "opaque"))
    except (Unauthenticated, Unreachable):
        return
    assert identity.username


def access_object(data: bytes) -> None:
    """A rule or a request is read, or refused with ValueError; what goes into a header is one clean line."""
    try:
        document = read_json(data)
    except ValueError:
        return
    if not isinstance(document, dict):
        return
    for read in (objects.read_rule, objects.read_request):
        try:
            found = read(document)
        except ValueError:
            continue
        if isinstance(found, objects.AccessRequest):
            assert not set(found.text) & set("\r\n\0")
            assert len(found.text.encode()) < 4096


# -- what a relay answers its clients and agents ----------------------------------------------------------------------


def login_profile(data: bytes) -> None:
    """What a relay says of logins is an offer that can be kept and read again, or ConfigError; versions are bounded."""
    update_notice.newer(data.decode("latin-1"), "1.0.0", "linux-x86_64")
    try:
        offer = LoginOffer.read(json.loads(data))
    except (ValueError, RecursionError, ConfigError):
        return
    assert LoginOffer.read(json.loads(json.dumps(offer.document()))) == offer
    assert offer.issuer.startswith("https://")
    texts = [one for one in offer.settings.values() if isinstance(one, str)]
    texts += [text for one in offer.settings.values() if isinstance(one, tuple) for text in one]
    assert all(32 < ord(letter) < 127 for text in texts for letter in text)


# -- what an API server, or an agent in its place, answers a `forward` -------------------------------------------------


class _NoWriter:
    def write(self, data: bytes) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0


def read_pod_stream(data: bytes, size: int = 256 * 1024) -> bytes | None:
    """Return what a pod has sent, from pieces of `size`; None where it has not ended in order."""
    reader = asyncio.StreamReader(spdy.CHUNK, loop=_LOOP)
    for at in range(0, len(data), size):
        reader.feed_data(data[at : at + size])
    reader.feed_eof()
    pod = spdy.PodReader(reader, cast(Any, _NoWriter()))

    async def all_of_it() -> bytes:
        return b"".join([part async for part in pod.payload()])

    try:
        return _LOOP.run_until_complete(all_of_it())
    except (spdy.SpdyError, asyncio.IncompleteReadError):
        return None
    finally:
        assert len(pod._text) <= spdy.MAX_TEXT


def pod_stream(data: bytes) -> None:
    """What comes out does not depend on how the bytes were cut, and is no more than came."""
    whole = read_pod_stream(data)
    assert read_pod_stream(data, 7) == whole
    assert whole is None or len(whole) < len(data)


def pod_document(data: bytes) -> None:
    """A document is a pod, or a thing with pods, or it is refused; a name is safe in a path."""
    for kind in ("pod", "svc", "deploy"):
        (target,) = parse_targets([f"{kind}/web", "80"], "shop")
        try:
            document = read_json(data)
            found = workload.Workload.of(target, document)
            assert len(found.ports) <= workload.MAX_PORTS
        except (ValueError, ConfigError):
            continue
    try:
        name = workload.Pod.of(read_json(data)).name
    except ValueError:
        return
    assert name.isascii()
    assert not set(name) & set("/\r\n %?#")


# -- files of other programs ------------------------------------------------------------------------------------------


class _File(KubeconfigFile):
    """A file that is in memory, whose first writing is kept."""

    def __init__(self, data: bytes) -> None:
        super().__init__(Path("kubeconfig"))
        self.data = data

    def exists(self) -> bool:
        return True

    @contextmanager
    def locked(self) -> Iterator[None]:
        yield

    def read(self) -> None:
        self.changed = False
        document = parse(self.data, "kubeconfig")
        self.document = {} if is_empty(document) else document
        if not isinstance(self.document, dict):
            raise StateError("not a kubeconfig")
        for section in ("clusters", "users", "contexts"):
            self._list(section)

    def save(self) -> None:
        if self.changed:
            self.data = dump(self.document).encode()

    def check_writable(self) -> None: ...


_ENTRY = Entry("prod", "prod", "https://127.0.0.1:1", "CA", "CERTIFICATE", "KEY", relays=("relay.example:443",))


def foreign_kubeconfig(data: bytes) -> None:
    """Our entry goes into any file of another program and out of it again, and all else stays what it was."""
    files, file = Kubeconfig([]), _File(data)
    files.files = [file]
    try:
        file.read()
        before = file.document
        names = [item.get("name") for part in ("clusters", "users", "contexts") for item in _entries(before, part)]
        files.merge(_ENTRY, switch=False)
    except (StateError, ConfigError):
        return
    assert parse(file.data, "kubeconfig")["clusters"]
    assert files.has_ours()
    files.remove("prod", "prod", _ENTRY.relays)
    if "prod" in names or "arcbridge-prod" in names:
        return
    after = parse(file.data, "kubeconfig")
    for part in ("clusters", "users", "contexts"):
        assert _entries(after, part) == _entries(before, part), "an entry of another program was changed"


def _entries(document: Any, part: str) -> list[Any]:
    value = document.get(part)
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


# -- sealed files -----------------------------------------------------------------------------------------------------

IDENTITIES = [
    parse_identity("AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX"),
    parse_identity("AGE-SECRET-KEY-PQ-1XX76JRALNLXDMEW0CRK45QMCCH4X06SE84UN3VPM33W6HWDX0H3SK3ZQFR"),
]
"""The keys of age's specification, to which the corpus is sealed."""


def read_sealed_file(data: bytes) -> None:
    try:
        for _ in open_sealed(io.BytesIO(data).read, IDENTITIES):
            pass
    except SealingError:
        pass


def sealed_file(data: bytes) -> None:
    """A header is written again as it was read, however its bytes come; a file, and a key, is one or a SealingError."""
    found: list[object] = []
    for size in (len(data) or 1, 1, 13):
        file = io.BytesIO(data)
        source = ByteSource(lambda _, file=file, size=size: file.read(size))
        try:
            header = read_header(source)
            assert written(header.stanzas) == header.signed
            found.append((header, source.take(len(data))))
        except SealingError as error:
            found.append(type(error))
    assert found[0] == found[1] == found[2], "a header that depends on the segments"
    read_sealed_file(data)
    text = data.decode("latin-1")
    for parsed in (lambda: parse_recipient(text), lambda: parse_identity(text), lambda: parse_identities(data)):
        try:
            parsed()
        except SealingError:
            pass
