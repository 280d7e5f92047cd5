"""The join over real sockets and real TLS, both ends ours, or one end scripted and misbehaving (docs/threats.md#J5,
#J6, #J7, #J13).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from arcbridge.errors import ConnectionLost, JoinRefused, RemoteProtocolError, Unreachable
from arcbridge.net import join
from arcbridge.net.join import EARLY_MOST, JoinCode, ServerJoin, client_join
from arcbridge.net.sockets import receive, send_all
from arcbridge.net.tls import ALPN_HTTP, ALPN_JOIN, ALPN_JOIN_1, RelayTrust, outer_client_context, outer_server_contexts
from arcbridge.net.tlspipe import TlsPipe
from arcbridge.pki.authority import Authority
from arcbridge.wire.records import MAX_RECORD, JoinReply, JoinRequest
from tests.net.ends import (
    RELAY,
    agent_certificate,
    authority,
    client_context,
    server_certificate,
    server_contexts,
    tcp_pair,
)
from tests.support.eventually import until

REQUEST = JoinRequest(role="client", cluster="prod", token="t" * 3000, version="1")
OK = JoinReply(join_id="0123456789abcdef", cluster_ca="PEM")


def server(far: socket.socket) -> ServerJoin:
    return ServerJoin(far, server_contexts()[ALPN_JOIN])


Pair = tuple[socket.socket, socket.socket, ServerJoin]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """The end's socket, the relay's, and what the relay makes of it."""
    near, far = await tcp_pair()
    serving = server(far)
    yield near, far, serving
    near.close()
    serving.abort()


def framed(record: bytes) -> bytes:
    return len(record).to_bytes(4, "big") + record


async def asked(serving: ServerJoin) -> JoinRequest:
    await serving.handshake()
    return await serving.read_request()


async def left(serving: ServerJoin) -> None:
    """Return never; raise what `watch` calls back with."""
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    serving.watch(gone.set_exception)
    await gone


async def asks(near: socket.socket, *, alpn: str = ALPN_JOIN) -> TlsPipe:
    """Ask as an end does, whose script goes on."""
    scripted = TlsPipe(near, client_context(alpn), server_hostname=RELAY)
    await scripted.handshake()
    await scripted.write(framed(REQUEST.encode()))
    return scripted


async def consent(serving: ServerJoin) -> tuple[JoinRequest, bytes]:
    request = await asked(serving)
    await serving.reply(OK)
    return request, await serving.finish()


async def test_the_socket_outlives_the_tls(pair: Pair) -> None:
    near, far, serving = pair

    async def end() -> JoinReply:
        reply = await client_join(near, client_context(), RELAY, REQUEST)
        await send_all(near, b"raw bytes at once")
        return reply

    reply, (request, left_over) = await asyncio.gather(end(), consent(serving))
    assert reply == OK
    assert request == REQUEST
    rest = b"" if len(left_over) == 17 else await receive(far, 100)
    assert left_over + rest == b"raw bytes at once"
    await send_all(far, b"answer")
    assert await receive(near, 100) == b"answer"


async def test_an_agent_shows_its_certificate(pair: Pair) -> None:
    near, _, serving = pair
    await asyncio.gather(client_join(near, client_context(cluster="prod"), RELAY, REQUEST), consent(serving))
    assert serving.peer_certificate is not None


@pytest.mark.parametrize("size", [40, 1500, 9000])
async def test_left_over_bytes_behind_close_notify_cut_anywhere(size: int) -> None:
    """docs/threats.md#J5: the relay reads close_notify and what follows in one go, whatever the cut."""
    raw = bytes(range(256)) * (size // 256 + 1)
    raw = raw[:size]
    for cut in [*range(0, 30), size + 20]:
        near, far = await tcp_pair()
        with near, far:
            serving = server(far)

            async def end(near: socket.socket = near, cut: int = cut) -> None:
                scripted = await asks(near)
                assert await scripted.read()
                assert await scripted.read() == b""
                scripted.feed_close_notify()
                # The alert and the raw bytes as one string, cut at every byte of the alert's record.
                data = scripted._outgoing.read() + raw
                await send_all(near, data[:cut])
                await asyncio.sleep(0)
                await send_all(near, data[cut:])

            _, (_, left_over) = await asyncio.gather(end(), consent(serving))
            while len(left_over) < size:
                left_over += await receive(far, 65536)
            assert left_over == raw


NO_CLOSE_NOTIFY = [b"\x16\x03\x01\x00\x05hello", b"\x17\x03\x03\x00\x05hello"]


@pytest.mark.parametrize(
    ("alpn", "early"),
    [*((ALPN_JOIN, early) for early in NO_CLOSE_NOTIFY), *((ALPN_JOIN_1, early) for early in NO_CLOSE_NOTIFY),
     (ALPN_JOIN_1, b"G")],
)  # fmt: skip
@pytest.mark.parametrize("when", ["with the request", "before the reply"])
async def test_raw_bytes_too_early(pair: Pair, alpn: str, early: bytes, when: str) -> None:
    """docs/threats.md#J6."""
    near, _, serving = pair
    scripted = TlsPipe(near, client_context(alpn), server_hostname=RELAY)

    async def end() -> None:
        await scripted.handshake()
        scripted.feed(framed(REQUEST.encode()))
        data = scripted._outgoing.read()
        if when == "with the request":
            await send_all(near, data + early)
        else:
            await send_all(near, data)
            await asyncio.sleep(0.05)
            await send_all(near, early)

    async def relay() -> None:
        await asked(serving)
        await left(serving)

    ending = asyncio.create_task(end())
    with pytest.raises(RemoteProtocolError):
        await relay()
    await ending


class Flight:
    """Sends `first` behind the JOIN."""

    def __init__(self, sock: socket.socket, first: bytes) -> None:
        self._sock = sock
        self._first = first
        self.calls: list[str] = []

    def begin(self) -> None:
        self.calls.append("begin")
        assert self._sock.send(self._first) == len(self._first)

    def abandon(self) -> None:
        assert self._sock.fileno() >= 0, "before its descriptor may be another's"
        self.calls.append("abandon")


@pytest.mark.parametrize("when", ["with the request", "while the agent comes", "behind the reply"])
async def test_a_first_flight_waits_for_no_answer(pair: Pair, when: str) -> None:
    """Nor do raw bytes of the other end: an end reads nothing of what is behind the relay's close_notify."""
    near, far, serving = pair
    flight = Flight(near, b"hello agent" if when == "with the request" else b"")
    ending = asyncio.create_task(client_join(near, client_context(), RELAY, REQUEST, flight=flight))
    await asked(serving)
    serving.watch(pytest.fail)
    await until(lambda: flight.calls)
    if when == "while the agent comes":
        await send_all(near, b"hello agent")
        await until(lambda: serving._early_left <= EARLY_MOST - len(b"hello agent"))
    serving.unwatch()
    await serving.reply(OK)
    await send_all(far, b"\x16\x03\x03raw, and no record")
    assert await ending == OK
    assert await receive(near, 100) == b"\x16\x03\x03raw, and no record"
    if when == "behind the reply":
        await send_all(near, b"hello agent")
    left_over = await serving.finish()
    assert left_over + (b"" if left_over else await receive(far, 100)) == b"hello agent"
    assert flight.calls == ["begin"]


@pytest.mark.parametrize("size", [EARLY_MOST, 100 * EARLY_MOST])
async def test_a_first_flight_that_is_too_long(pair: Pair, size: int) -> None:
    """The relay has taken no more than its bound when it gives up, whatever is sent (docs/threats.md#J6)."""
    near, _, serving = pair
    ending = asyncio.create_task(client_join(near, client_context(), RELAY, REQUEST, flight=Flight(near, b"")))
    await asked(serving)
    sending = asyncio.create_task(send_all(near, bytes(size)))
    with pytest.raises(RemoteProtocolError, match="before the reply"):
        await left(serving)
    assert serving._early_left >= -1
    await serving.refuse(JoinReply(code=JoinCode.BAD_REQUEST))
    with pytest.raises(JoinRefused):
        await ending
    await asyncio.gather(sending, return_exceptions=True)


async def test_a_refused_first_flight_is_abandoned(pair: Pair) -> None:
    near, _, serving = pair
    flight = Flight(near, b"hello agent")
    ending = asyncio.create_task(client_join(near, client_context(), RELAY, REQUEST, flight=flight))
    await asked(serving)
    await serving.refuse(JoinReply(code=JoinCode.NO_AGENT))
    with pytest.raises(JoinRefused):
        await ending
    assert flight.calls == ["begin", "abandon"]


@pytest.mark.parametrize("older", ["client", "relay"])
async def test_an_end_of_the_version_before(older: str) -> None:
    near, far = await tcp_pair()
    context = server_contexts()[ALPN_JOIN]
    if older == "relay":
        issued = server_certificate()
        context = outer_server_contexts(issued.certificate_pem, issued.key_pem, authority().certificate_pem)[ALPN_JOIN]
        context.set_alpn_protocols([ALPN_JOIN_1])
    serving, flight = ServerJoin(far, context), Flight(near, b"hello agent")
    with near, far:
        alpn = ALPN_JOIN_1 if older == "client" else ALPN_JOIN
        joining = client_join(near, client_context(alpn), RELAY, REQUEST, alpn=alpn, flight=flight)
        _, (_, left_over) = await asyncio.gather(joining, consent(serving))
        assert (left_over, flight.calls) == (b"", [])
        await send_all(near, b"raw")
        assert await receive(far, 100) == b"raw"


@pytest.mark.parametrize("join_id", ["0" * 65, "a b", "x\r\nAudit-ID: y", "\x1b[2J"])
async def test_b8_an_id_that_no_relay_makes(pair: Pair, join_id: str) -> None:
    near, _, serving = pair

    async def relay() -> None:
        await asked(serving)
        await serving.reply(JoinReply(join_id=join_id))

    answering = asyncio.create_task(relay())
    with pytest.raises(RemoteProtocolError, match="an id that no relay makes"):
        await client_join(near, client_context(), RELAY, REQUEST)
    await answering
    serving.abort()


async def test_application_data_after_the_reply(pair: Pair) -> None:
    near, _, serving = pair

    async def end() -> None:
        scripted = await asks(near)
        await scripted.read()
        await scripted.write(b"GET / HTTP/1.1\r\n\r\n")

    with pytest.raises(RemoteProtocolError, match="close_notify"):
        await asyncio.gather(consent(serving), end())


@pytest.mark.parametrize("half", [0, 10])
async def test_close_notify_withheld(pair: Pair, monkeypatch: pytest.MonkeyPatch, half: int) -> None:
    """docs/threats.md#J7: the client sends nothing, or half of the alert's record."""
    monkeypatch.setattr(join, "CLOSE_DEADLINE", 0.1)
    near, _, serving = pair

    async def end() -> None:
        scripted = await asks(near)
        await scripted.read()
        scripted.feed_close_notify()
        await send_all(near, scripted._outgoing.read()[:half])

    with pytest.raises(ConnectionLost, match="close_notify: not complete"):
        await asyncio.gather(consent(serving), end())


async def test_a_refusal_arrives_with_its_words(pair: Pair) -> None:
    near, _, serving = pair

    async def relay() -> None:
        await asked(serving)
        await serving.refuse(JoinReply(code=JoinCode.OVERLOADED, message="come back later", retry_after=7))

    with pytest.raises(JoinRefused, match="come back later") as caught:
        await asyncio.gather(client_join(near, client_context(), RELAY, REQUEST), relay())
    assert caught.value.code == JoinCode.OVERLOADED
    assert caught.value.retry_after == 7
    assert near.fileno() == -1


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_gone_notices_at_once(pair: Pair, how: str) -> None:
    near, _, serving = pair
    await asyncio.gather(asks(near), asked(serving))
    watching = asyncio.create_task(left(serving))
    await asyncio.sleep(0)
    near.close() if how == "close" else join.reset(near)
    with pytest.raises(ConnectionLost, match="before it was joined"):
        await asyncio.wait_for(watching, 10)


async def test_watching_can_be_called_off(pair: Pair) -> None:
    near, _, serving = pair
    ending = asyncio.create_task(client_join(near, client_context(), RELAY, REQUEST))
    await asked(serving)
    serving.watch(pytest.fail)
    await asyncio.sleep(0)
    serving.unwatch()
    await serving.reply(OK)
    assert await serving.finish() == b""
    assert await ending == OK


@pytest.mark.parametrize("length", [MAX_RECORD + 1, 0xFFFFFFFF], ids=["one too many", "the most that fits the field"])
async def test_a_record_over_its_size_is_refused_at_its_length(pair: Pair, length: int) -> None:
    near, _, serving = pair
    scripted = TlsPipe(near, client_context(), server_hostname=RELAY)

    async def end() -> None:
        await scripted.handshake()
        await scripted.write(length.to_bytes(4, "big"))

    with pytest.raises(RemoteProtocolError, match="more than 80 KiB"):
        await asyncio.gather(end(), asked(serving))


async def test_deadlines_of_handshake_and_request(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join, "HANDSHAKE_DEADLINE", 0.05)
    near, far, serving = pair
    await send_all(near, b"\x16\x03\x01")
    with pytest.raises(ConnectionLost, match="TLS handshake: not complete"):
        await serving.handshake()
    serving.abort()
    assert far.fileno() == -1
    # The relay does not answer: the client's own deadlines end the join.
    near, far = await tcp_pair()
    with far, pytest.raises(Unreachable, match="TLS handshake in time"):
        await client_join(near, client_context(), RELAY, REQUEST)
    assert near.fileno() == -1


async def test_another_protocol_is_refused_on_both_sides() -> None:
    """docs/threats.md#J13: neither end goes on when the handshake did not select the join protocol."""
    near, far = await tcp_pair()
    with near, far:
        serving = server(far)
        results = await asyncio.gather(
            client_join(near, client_context(ALPN_HTTP), RELAY, REQUEST), serving.handshake(), return_exceptions=True
        )
        assert all(isinstance(result, RemoteProtocolError | ConnectionLost) for result in results), results
        serving.abort()
    near, far = await tcp_pair()
    http = TlsPipe(far, server_contexts()[ALPN_HTTP], server_side=True)
    with near, far, pytest.raises(RemoteProtocolError, match="does not speak"):
        await asyncio.gather(client_join(near, client_context(ALPN_HTTP), RELAY, REQUEST), http.handshake())
    near, far = await tcp_pair()
    with near, far:
        other = ServerJoin(far, server_contexts()[ALPN_HTTP])
        with pytest.raises(RemoteProtocolError, match="another protocol"):
            await asyncio.gather(other.handshake(), asks(near, alpn=ALPN_HTTP))


@pytest.mark.parametrize("wrong", ["CA", "name"])
async def test_an_untrusted_relay_hears_nothing(pair: Pair, wrong: str) -> None:
    near, _, serving = pair
    context, name = client_context(), "other.test"
    if wrong == "CA":
        stranger = Authority.create("another authority").certificate_pem
        context, name = outer_client_context(RelayTrust(stranger), ALPN_JOIN), RELAY
    results = await asyncio.gather(
        client_join(near, context, name, REQUEST), serving.handshake(), return_exceptions=True
    )
    assert isinstance(results[0], Unreachable)
    assert "not trusted" in results[0].message
    assert isinstance(results[1], RemoteProtocolError)


async def test_a_foreign_client_certificate_ends_the_handshake() -> None:
    near, far = await tcp_pair()
    stranger = Authority.create("another authority").issue_client("agent")
    context = outer_client_context(
        RelayTrust(authority().certificate_pem),
        ALPN_JOIN,
        client_certificate=(stranger.certificate_pem, stranger.key_pem),
    )
    serving = server(far)
    with far:
        results = await asyncio.gather(
            client_join(near, context, RELAY, REQUEST), serving.handshake(), return_exceptions=True
        )
        serving.abort()
    assert isinstance(results[0], ConnectionLost)
    assert isinstance(results[1], RemoteProtocolError)
    assert agent_certificate("prod")[0].startswith("-----BEGIN")


async def test_a_client_that_is_cancelled_leaves_no_socket() -> None:
    near, far = await tcp_pair()
    with far:
        ending = asyncio.create_task(client_join(near, client_context(), RELAY, REQUEST))
        await asyncio.sleep(0)
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        assert near.fileno() == -1
