"""The join: how a connection to the relay becomes a raw byte path to the other end (docs/protocol.md, "Join").

Both ends of a session, client and agent, make a TLS connection to the relay under ALPN `arcbridge-join/2` and say one
`JoinRequest`; the relay answers one `JoinReply`. When that is consent, the TLS is closed in order and *the same TCP
socket lives on*:

1. end → relay    TLS handshake, JOIN and close_notify; from here on whatever the end sends is raw
2. relay → end    JOIN reply and close_notify, in one flight; from here on whatever the relay sends is raw
3. relay          forwards raw bytes between the two ends

So a client's first raw flight (`FirstFlight`) waits for no answer. The relay keeps it, at most 4 KiB, until the agent
is there (`ServerJoin.finish` returns it). An end reads the relay's TLS record by record, and leaves what is behind it
in the socket. Under `arcbridge-join/1` an end sends close_notify as an answer to the relay's, and nothing raw before.
A JOIN message travels as a 4-byte big-endian length and that many bytes, at most 80 KiB.

Deadlines in seconds: handshake 5, JOIN record 5, close_notify 3; `client_join` takes one for the whole.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Callable, Coroutine
from dataclasses import replace
from enum import IntEnum
from functools import partial
from typing import Final, NoReturn, Protocol, TypeVar

from arcbridge.errors import ArcbridgeError, ConnectionLost, JoinRefused, RemoteProtocolError, Unreachable
from arcbridge.net.sockets import SocketReader, reset
from arcbridge.net.tls import ALPN_JOIN, ServerContext, untrusted, versions
from arcbridge.net.tlspipe import CLOSE_DEADLINE, HANDSHAKE_DEADLINE, TlsPipe
from arcbridge.refusals import read_refusal
from arcbridge.wire.records import MAX_RECORD, JoinReply, JoinRequest

T = TypeVar("T")

REQUEST_DEADLINE: Final = 5.0
WHOLE_DEADLINE: Final = 20.0
"""The relay gives up at 15 s and says why; this is above it, so the reason arrives."""
EARLY_MOST: Final = 4 * 1024
"""Bytes behind a JOIN that the relay takes before it answers: a ClientHello has 0.3 to 2 KB."""
_LINGER: Final = 1.0

JOIN_ID: Final = re.compile(r"[0-9A-Za-z.-]{1,64}")
"""What the id of a join looks like. The relay chooses it, and both ends put it into logs, audit and headers."""


class JoinCode(IntEnum):
    """Why a join did not happen. An unknown cluster is FORBIDDEN, with the same words (docs/threats.md#J22)."""

    OK = 0
    UNAUTHENTICATED = 1
    FORBIDDEN = 2
    NO_AGENT = 3
    AGENT_TIMEOUT = 4
    AGENT_REFUSED = 5
    OVERLOADED = 6
    DRAINING = 7
    BAD_REQUEST = 8
    GONE = 9
    INTERNAL = 10
    NO_INSTANCE = 11
    """The agent that a client wants back is not connected here; others may be."""
    LIMIT = 12
    """The user is at a limit of the relay; `retry_after` says when to try again."""

    @classmethod
    def _missing_(cls, value: object) -> JoinCode:
        """Return what stands for the code of a newer relay of the fleet."""
        return cls.INTERNAL


class FirstFlight(Protocol):
    """What a client sends behind its JOIN without waiting for the answer."""

    def begin(self) -> None:
        """Send it, and read nothing from the socket yet."""

    def abandon(self) -> None:
        """Leave the socket alone from now on: it is about to be closed."""


async def client_join(
    sock: socket.socket,
    context: ssl.SSLContext,
    server_name: str,
    request: JoinRequest,
    *,
    alpn: str = ALPN_JOIN,
    deadline: float = WHOLE_DEADLINE,
    prove: Callable[[bytes], str] | None = None,
    measured: Callable[[float], None] = lambda seconds: None,
    flight: FirstFlight | None = None,
) -> JoinReply:
    """Join as client or agent over a connected socket; after it the socket is raw and still the caller's.

    `prove` makes the request's proof from the certificate (DER) that the relay shows. `measured` is called with the
    round trip to the relay, seconds. `flight` is begun where the relay takes it before its answer.

    On any error, and when cancelled, the socket has been closed. Raises `JoinRefused` with the relay's code and words,
    `Unreachable` when the relay's certificate is not trusted or it does not answer, `ConnectionLost` when the
    connection ended, `RemoteProtocolError` when the relay broke the protocol, and what `prove` raises.
    """
    reader, until = SocketReader(sock), asyncio.get_running_loop().time() + deadline
    try:
        try:
            pipe = TlsPipe(sock, context, server_hostname=server_name, reader=reader)
            return await _client_join(pipe, reader, until, server_name, request, alpn, prove, measured, flight)
        except BaseException:
            if flight is not None:
                flight.abandon()
            raise
        finally:
            reader.stop()
    except TimeoutError as error:
        reset(sock)
        raise Unreachable(f"the relay {server_name} did not finish the join in time") from error
    except (OSError, EOFError) as error:
        reset(sock)
        _raise_client(server_name, error)
    except BaseException:
        reset(sock)
        raise


async def _client_join(
    pipe: TlsPipe,
    reader: SocketReader,
    until: float,
    server_name: str,
    request: JoinRequest,
    alpn: str,
    prove: Callable[[bytes], str] | None,
    measured: Callable[[float], None],
    flight: FirstFlight | None,
) -> JoinReply:
    time = asyncio.get_running_loop().time
    reader.deadline = min(until, time() + HANDSHAKE_DEADLINE)
    try:
        await pipe.handshake()
    except TimeoutError as error:
        raise Unreachable(f"the relay {server_name} did not finish the TLS handshake in time") from error
    if pipe.alpn not in versions(alpn):
        raise RemoteProtocolError(f"{server_name} does not speak {alpn}: is this an arcbridge relay?")
    measured(pipe.round_trip)
    if prove is not None and (proof := prove(pipe.peer_certificate or b"")):
        request = replace(request, proof=proof)
    reader.deadline = until
    pipe.feed(_framed(request.encode()))
    if pipe.alpn == ALPN_JOIN:
        pipe.feed_close_notify()
        pipe.by_record = True
    await pipe.flush()
    if pipe.by_record and flight is not None:
        flight.begin()
    record, rest = await _read_record(pipe)
    reply = JoinReply.decode(record)
    if reply.code:
        raise JoinRefused(
            reply.code,
            reply.message or "the relay refused",
            retry_after=reply.retry_after or None,
            session=reply.join_id if JOIN_ID.fullmatch(reply.join_id) else "",
            refusal=read_refusal(reply.rule, reply.wanted, reply.groups, reply.more_groups),
        )
    if reply.join_id and not JOIN_ID.fullmatch(reply.join_id):
        raise RemoteProtocolError("the relay gave the join an id that no relay makes")
    reader.deadline = min(until, time() + CLOSE_DEADLINE)
    try:
        if rest or await pipe.read():
            raise RemoteProtocolError("the relay sent more than its reply")
        left_over = await pipe.close()
    except TimeoutError as error:
        raise ConnectionLost(f"the relay {server_name} did not end the outer TLS in time") from error
    if left_over:
        raise RemoteProtocolError("the relay sent raw bytes before the outer TLS had ended")
    return reply


def _raise_client(server_name: str, error: OSError | EOFError) -> NoReturn:
    if isinstance(error, ssl.SSLCertVerificationError):
        raise untrusted(server_name, error) from error
    if isinstance(error, ssl.SSLError):
        raise ConnectionLost(f"TLS with the relay {server_name} failed ({error.reason or 'unknown'})") from error
    raise ConnectionLost(f"the relay {server_name} ended the connection during the join") from error


class ServerJoin:
    """The relay's side of one join connection; owns `sock` until `finish` has returned or `refuse`/`abort` was called.

    Order of calls: `handshake`, `read_request`, then either `refuse`, or `reply` and `finish`; between request and
    reply `watch` notices that the peer left, and takes what it sends behind its JOIN. Every failure raises
    `RemoteProtocolError` (the peer broke the protocol) or `ConnectionLost` (it left, or was too slow), in words that
    name the step; then only `refuse` and `abort` may be called.
    """

    __slots__ = ("_broken", "_early", "_early_left", "_loop", "_pipe", "_protocol", "_reader", "own_key", "sock")

    def __init__(self, sock: socket.socket, context: ServerContext, protocol: str = ALPN_JOIN) -> None:
        self.sock = sock
        self.own_key = context.spki
        """SubjectPublicKeyInfo (DER) of the certificate that this side shows."""
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._reader = SocketReader(sock)
        self._pipe = TlsPipe(sock, context, server_side=True, reader=self._reader)
        self._broken = False
        self._early: ArcbridgeError | None = None
        """What `watch` has found."""
        self._early_left = 0
        """Bytes that the peer may still send before the reply."""

    @property
    def peer_certificate(self) -> bytes | None:
        """DER of the verified client certificate, None if none was given."""
        return self._pipe.peer_certificate

    async def handshake(self) -> None:
        """Make the handshake. Raises also when it selected another protocol (docs/threats.md#J13)."""
        await self._step("TLS handshake", HANDSHAKE_DEADLINE, self._pipe.handshake())
        if self._pipe.alpn not in versions(self._protocol):
            self._broken = True
            raise RemoteProtocolError("the handshake selected another protocol than the one that was peeked")
        self._early_left = EARLY_MOST if self._pipe.alpn == ALPN_JOIN else 0

    async def read_request(self) -> JoinRequest:
        record, rest = await self._step("JOIN message", REQUEST_DEADLINE, _read_record(self._pipe))
        self._early_left -= len(rest) + self._pipe.unread
        if rest or not self._may_be_early():
            raise _too_early()
        return JoinRequest.decode(record)

    def watch(self, left: Callable[[ArcbridgeError], None]) -> None:
        """Call `left` with a `ConnectionLost` when the peer leaves, and with a `RemoteProtocolError` when it sends more
        than it may, until `unwatch`."""
        self._reader.watch(partial(self._look, left))

    def unwatch(self) -> None:
        """Leave the connection as it is."""
        self._reader.unwatch()

    def _look(self, left: Callable[[ArcbridgeError], None]) -> None:
        error: ArcbridgeError
        try:
            if data := self.sock.recv(self._early_left + 1):
                self._early_left -= len(data)
                self._pipe.take(data)
                if self._may_be_early():
                    return
                error = _too_early()
            else:
                self._broken = True
                error = ConnectionLost("the peer closed the connection before it was joined")
        except (BlockingIOError, InterruptedError):
            return
        except OSError as cause:
            self._broken = True
            error = ConnectionLost("the peer reset the connection before it was joined")
            error.__cause__ = cause
        self.unwatch()
        self._early = error
        left(error)

    def _may_be_early(self) -> bool:
        """Return whether what is here behind the JOIN is nothing, or close_notify and not too much behind it."""
        try:
            return self._early_left >= 0 and not self._pipe.payload_waits()
        except ssl.SSLError:
            self._broken = True
            return False

    async def reply(self, reply: JoinReply) -> None:
        """Send the consent, with our close_notify in the same flight."""
        if self._early is not None:  # `left` heard of it too late
            raise self._early
        self._pipe.feed(_framed(reply.encode()))
        await self._step("reply", CLOSE_DEADLINE, self._end_flight())

    async def finish(self) -> bytes:
        """Return the raw bytes behind the peer's close_notify, waiting 3 s for it at most. The socket is raw now."""
        left_over = await self._step("close_notify", CLOSE_DEADLINE, self._pipe.close())
        # Nothing can be said any more: what the peer hears now is the other end.
        self._broken = True
        self._reader.stop()
        return left_over

    async def refuse(self, reply: JoinReply) -> None:
        """Say why, as far as the peer still listens, and close the socket; takes at most a second and never raises.

        Where nothing can be said (the TLS is broken, or over), the socket is closed with RST.
        """
        if self._broken:
            self.abort()
            return
        self._reader.deadline = self._loop.time() + _LINGER
        try:
            self._pipe.feed(_framed(reply.encode()))
            await self._end_flight()
            self.sock.shutdown(socket.SHUT_WR)
            # Unread bytes at close would make the kernel send RST, which may overtake the reply.
            taken = 0
            while taken < MAX_RECORD and (chunk := await self._reader.receive(16 * 1024)):
                taken += len(chunk)
        except (OSError, EOFError):
            # The peer is gone or stalls: it does not get to hear the reason.
            self.abort()
        finally:
            self._reader.stop()
            self.sock.close()

    def abort(self) -> None:
        """Close with RST, at once."""
        self._broken = True
        self._reader.stop()
        reset(self.sock)

    async def _end_flight(self) -> None:
        self._pipe.feed_close_notify()
        await self._pipe.flush()

    async def _step(self, name: str, deadline: float, step: Coroutine[object, object, T]) -> T:
        self._reader.deadline = self._loop.time() + deadline
        try:
            return await step
        except TimeoutError as error:
            self._broken = True
            raise ConnectionLost(f"{name}: not complete within {deadline:.0f} s") from error
        except ssl.SSLError as error:
            self._broken = True
            raise RemoteProtocolError(f"{name}: TLS failed ({error.reason or 'unknown'})") from error
        except (OSError, EOFError) as error:
            self._broken = True
            raise ConnectionLost(f"{name}: the peer ended the connection") from error
        except BaseException:
            # Cancelled in the middle of a TLS operation, or a record that is too long: nothing more can be said.
            self._broken = True
            raise


def _too_early() -> RemoteProtocolError:
    return RemoteProtocolError("bytes came before the reply to the JOIN message")


def _framed(record: bytes) -> bytes:
    if len(record) > MAX_RECORD:
        raise RemoteProtocolError(f"the JOIN message is larger than {MAX_RECORD // 1024} KiB; the token is too long")
    return len(record).to_bytes(4, "big") + record


async def _read_record(pipe: TlsPipe) -> tuple[bytes, bytes]:
    """Return one record, and what came behind it."""
    data = bytearray()
    size = 4
    while len(data) < size:
        chunk = await pipe.read()
        if not chunk:
            raise EOFError("close_notify inside a record")
        data += chunk
        if size == 4 and len(data) >= 4:
            size = 4 + int.from_bytes(data[:4], "big")
            if size > 4 + MAX_RECORD:
                raise RemoteProtocolError(f"a record of more than {MAX_RECORD // 1024} KiB")
    return bytes(data[4:size]), bytes(data[size:])
