"""The local HTTPS endpoint of one cluster: every accepted connection becomes one stream to its API server.

Nothing is parsed on the good path: the first bytes open the stream and travel in the same flight, the rest is
spliced. TLS offers `http/1.1` alone and accepts clients without ALPN (kubectl's upgrades offer none). The client
certificate is optional in TLS, so that a caller without it gets a 401 that explains instead of ten silent seconds; only
the kubeconfig (mode 0600) holds the right one, and without it no stream is opened.

Any process of the machine can connect, so connections that have not shown that certificate are bounded in number, and
the newest takes the place of the oldest: one that says nothing keeps no place from kubectl (docs/threats.md#W1).

Where there is no session the request's head is read, bounded, and answered with one Status. A stream that was cut
resets the local socket: an end in order would make a half answer look whole.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import structlog

from arcbridge.client.session.refusal import RETRY_SOON, response
from arcbridge.client.session.session_manager import TARGET, SessionManager
from arcbridge.client.state import LocalCertificates
from arcbridge.errors import (
    ArcbridgeError,
    OverLimit,
    PermissionRefused,
    SessionEnded,
    StreamReset,
    Unauthenticated,
    Unreachable,
)
from arcbridge.mux.session import MuxSession
from arcbridge.mux.splice import SpliceResult, TransportSplice, reset_transport
from arcbridge.net.descriptors import explain
from arcbridge.net.sockets import ACCEPT_PAUSE, AcceptLoop
from arcbridge.net.tlstransport import accept_tls
from arcbridge.pki.chain import load_chain
from arcbridge.tasks import TaskSet, cancel_and_wait
from arcbridge.wire.frames import ResetCode

HEAD_LIMIT = 64 * 1024
"""Bytes of a request's head that is answered by us; kubectl's is 1 to 4 KiB, tokens make it longer."""
HEAD_DEADLINE = 10.0
"""Seconds for that head."""
MAX_UNPROVEN = 512
"""Connections without the certificate at a time: in the TLS handshake, or refused and not closed yet. Far more than the
handshakes that one user's tools have under way at once; each costs about 60 KiB."""
FIRST_BYTES_DEADLINE = 3600.0
"""Seconds a connection may say nothing at all: keep-alive pools of client libraries open some in advance."""

log = structlog.get_logger("arcbridge.client")


@dataclass
class EndpointStats:
    """Counters of one endpoint."""

    open: int = 0
    spliced: int = 0
    strangers: int = 0
    """Connections without the kubeconfig's client certificate."""
    displaced: int = 0
    """Connections that were closed for a newer one before they had shown a certificate."""
    refused: int = 0
    """Connections answered with a Status of ours."""
    resets: int = 0
    bytes_to_cluster: int = 0
    bytes_from_cluster: int = 0


class LocalEndpoint:
    """Serves one cluster on given listening sockets; `start`, then `close`."""

    def __init__(
        self, cluster: str, session: SessionManager, certificates: LocalCertificates, sockets: list[socket.socket]
    ) -> None:
        self.cluster = cluster
        self.session = session
        self.port = int(sockets[0].getsockname()[1])
        self.stats = EndpointStats()
        self._context = server_context(certificates)
        self.relay = certificates.relay
        self._accepting = AcceptLoop(sockets, self._accepted, self._exhausted)
        self.unproven = UnprovenConnections(MAX_UNPROVEN)
        self.connections: set[LocalConnection] = set()
        self.tasks = TaskSet()
        self.splices: set[TransportSplice] = set()
        self.log = log.bind(cluster=cluster)

    async def start(self) -> None:
        self._accepting.start()

    def _accepted(self, sock: socket.socket, _host: str) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = LocalConnection(self)

        def handshake_over(error: BaseException | None) -> None:
            if error is not None:
                self.unproven.discard(connection)

        transport = accept_tls(sock, self._context, connection, on_handshake=handshake_over)
        if self.unproven.add(connection, transport):
            self.stats.displaced += 1
            self.log.warning("local connection without a certificate displaced", reason=f"more than {MAX_UNPROVEN}")

    def _exhausted(self, _listening: socket.socket, error: OSError, again: bool) -> None:
        if not again:  # once, not at each try for as long as it lasts
            self.log.warning("cannot accept a local connection", reason=explain(error), retry_in=ACCEPT_PAUSE)

    def renew(self, certificates: LocalCertificates) -> None:
        """Show this certificate from the next handshake on; what is open stays open."""
        self._context = server_context(certificates)

    @property
    def busy(self) -> bool:
        """Whether any connection is open."""
        return bool(self.tasks or self.connections or self.splices or len(self.unproven))

    def moved(self) -> tuple[int, int]:
        """Return the bytes that went to the cluster and back, those of connections that are open included."""
        running = [splice.moved for splice in self.splices]
        sent = self.stats.bytes_to_cluster + sum(one.to_stream for one in running)
        return sent, self.stats.bytes_from_cluster + sum(one.from_stream for one in running)

    def release(self) -> tuple[socket.socket, ...]:
        """Stop accepting and hand the listening sockets back; what is open goes on."""
        return self._accepting.release()

    def accept_again(self, sockets: Sequence[socket.socket]) -> None:
        """Accept on the sockets that were released."""
        self._accepting.resume(sockets)

    async def close(self) -> None:
        """Stop listening; what is still open is reset."""
        self._accepting.close()
        await cancel_and_wait(*self.tasks)
        self.unproven.abort()
        for connection in list(self.connections):
            connection.reset()
        for splice in list(self.splices):
            if not splice.outer.is_closing():
                reset_transport(splice.outer)

    def spliced(self, splice: TransportSplice, result: SpliceResult) -> None:
        """A connection that reached the cluster is over."""
        self.splices.discard(splice)
        self.stats.open -= 1
        self.stats.bytes_to_cluster += result.to_stream
        self.stats.bytes_from_cluster += result.from_stream
        if result.error is not None:
            self.stats.resets += 1
            # An honest agent never breaks the protocol, so that is worth a warning; a cut connection is not.
            log_line = self.log.warning if _broke_rules(result.error) else self.log.debug
            log_line("connection cut", up=result.to_stream, down=result.from_stream, reason=_reason(result.error))


class UnprovenConnections:
    """The connections that have not shown the kubeconfig's certificate; never more than `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # In the order of arrival, because the oldest makes room for the newest.
        self._handshakes: dict[LocalConnection, asyncio.Transport] = {}
        self._strangers: dict[LocalConnection, asyncio.Transport] = {}

    def __len__(self) -> int:
        return len(self._handshakes) + len(self._strangers)

    def add(self, connection: LocalConnection, transport: asyncio.Transport) -> bool:
        """Take a connection whose handshake begins; say whether another one was closed for it.

        A caller that has come without the certificate goes first, then the oldest handshake.
        """
        displaced = len(self) >= self._limit
        if displaced:
            first = self._strangers or self._handshakes
            oldest = next(iter(first))
            first.pop(oldest).abort()
        self._handshakes[connection] = transport
        return displaced

    def refused(self, connection: LocalConnection) -> None:
        """Note a connection whose handshake is done, and that showed no certificate, or a wrong one."""
        if (transport := self._handshakes.pop(connection, None)) is not None:
            self._strangers[connection] = transport

    def abort(self) -> None:
        """Close all of them."""
        while len(self):
            (self._strangers or self._handshakes).popitem()[1].abort()

    def discard(self, connection: LocalConnection) -> None:
        """Leave out a connection that has shown the certificate, or is gone."""
        self._handshakes.pop(connection, None)
        self._strangers.pop(connection, None)


class LocalConnection(asyncio.Protocol):
    """One accepted connection until it is spliced or answered."""

    def __init__(self, endpoint: LocalEndpoint) -> None:
        self._endpoint = endpoint
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._refusal: ArcbridgeError | None = None
        self._asking = False
        self._answered = False
        self._timer: asyncio.TimerHandle | None = None

    # -- asyncio's callbacks -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        endpoint = self._endpoint
        endpoint.connections.add(self)
        endpoint.stats.open += 1
        self._arm(FIRST_BYTES_DEADLINE)
        self._refusal = _certificate_refusal(
            self._transport.get_extra_info("peercert"), endpoint.cluster, endpoint.relay
        )
        if self._refusal is None:
            endpoint.unproven.discard(self)
        else:
            endpoint.unproven.refused(self)
            endpoint.stats.strangers += 1
            endpoint.log.warning("connection without the kubeconfig's certificate", reason=self._refusal.message)
            self._arm(HEAD_DEADLINE)

    def data_received(self, data: bytes) -> None:
        if self._answered:
            return  # the body of a request that was answered already
        self._received += data
        if self._refusal is not None:
            self._answer_when_complete()
        elif not self._asking:
            self._begin()
        elif len(self._received) > HEAD_LIMIT and self._transport is not None:
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._endpoint.connections.discard(self)
        self._endpoint.unproven.discard(self)
        self._endpoint.stats.open -= 1
        self._disarm()
        self._transport = None

    def reset(self) -> None:
        if self._transport is not None:
            reset_transport(self._transport)

    # -- with a session ---------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """First bytes: open the stream now if there is a session, else wait for one."""
        session = self._endpoint.session.current
        if session is not None:
            self._splice(session)
            return
        self._asking = True
        self._endpoint.tasks.start(self._ask())

    async def _ask(self) -> None:
        try:
            session = await self._endpoint.session.ready()
        except ArcbridgeError as error:
            self._refuse(error)
            return
        if self._transport is not None and not self._transport.is_closing():
            self._splice(session)

    def _splice(self, session: MuxSession) -> None:
        endpoint, transport = self._endpoint, cast(asyncio.Transport, self._transport)
        splice = _LocalSplice(endpoint, transport, bytes(self._received), session.label)
        try:
            session.open(TARGET, splice.stream_side)
        except ArcbridgeError:
            # The session ended after it was chosen and before the stream was opened.
            ended = Unreachable(f'the session with cluster "{endpoint.cluster}" ended', retry_after=RETRY_SOON)
            ended.session = session.label
            self._refuse(ended)
            return
        self._disarm()
        endpoint.connections.discard(self)
        endpoint.splices.add(splice)
        endpoint.stats.spliced += 1
        first, self._received = bytes(self._received), bytearray()
        self._transport = None
        splice.start(first)

    # -- without a session -------------------------------------------------------------------------------------------

    def _refuse(self, error: ArcbridgeError) -> None:
        self._refusal = error
        if self._transport is None:
            return
        self._arm(HEAD_DEADLINE)
        self._transport.resume_reading()
        self._answer_when_complete()

    def _answer_when_complete(self) -> None:
        """Answer once the request's head is there; a caller that sent no whole head gets none."""
        transport = self._transport
        if transport is None or self._refusal is None:
            return
        if b"\r\n\r\n" not in self._received:
            if len(self._received) > HEAD_LIMIT:
                self.reset()
            return
        self._answered = True
        self._endpoint.stats.refused += 1
        transport.write(response(self._refusal, head_only=self._received.startswith(b"HEAD ")))
        self._received.clear()
        self._disarm()
        transport.close()  # takes and drops the caller's body, so that no RST overtakes the answer

    def _arm(self, delay: float) -> None:
        self._disarm()
        self._timer = self._loop.call_later(delay, self._expired)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expired(self) -> None:
        if self._transport is not None:
            self._transport.close()


class _LocalSplice(TransportSplice):
    """A splice whose stream may be refused before anything ran: then the caller hears so instead of a reset."""

    def __init__(self, endpoint: LocalEndpoint, outer: asyncio.Transport, first: bytes, session: str) -> None:
        super().__init__(outer, lambda result: endpoint.spliced(self, result))
        self._endpoint = endpoint
        self._session = session
        self._head = first.startswith(b"HEAD ")
        self._received_any = False
        # A later refusal answers only a request whose whole head is in these bytes; any other is reset, because the
        # rest of its head went into the stream unread.
        self._whole_head = b"\r\n\r\n" in first

    def from_stream(self, view: memoryview) -> None:
        self._received_any = True
        super().from_stream(view)

    def stream_lost(self, exc: Exception | None) -> None:
        error = None if self._received_any else answer_to_reset(exc, self._endpoint.cluster)
        if error is not None and self._whole_head and not self.outer.is_closing():
            self._endpoint.stats.refused += 1
            error.session = self._session
            self.outer.write(response(error, head_only=self._head))
            super().stream_lost(None)
        else:
            super().stream_lost(exc)


def answer_to_reset(exc: Exception | None, cluster: str) -> ArcbridgeError | None:
    """Return the answer to a request whose stream was reset before any byte of an answer came; None for a reset.

    `retry_after` is set where the request surely reached no API server.
    """
    agent = f'the agent of cluster "{cluster}"'
    answers: dict[int, ArcbridgeError] = {
        ResetCode.REFUSED: Unreachable(f"{agent} takes no new request now", retry_after=RETRY_SOON),
        ResetCode.CONNECT_FAILED: Unreachable(f"{agent} cannot reach its API server", retry_after=RETRY_SOON),
        ResetCode.FORBIDDEN: PermissionRefused(f'cluster "{cluster}" does not let you in; ask its operator for access'),
        ResetCode.EXPIRED: Unauthenticated("the login has expired; log in again"),
        ResetCode.LIMIT: OverLimit(
            f"{agent} ended the connection at one of its limits; end connections that you do not need, or ask the "
            "cluster's operator for a higher limit"
        ),
    }
    return answers.get(exc.code) if isinstance(exc, StreamReset) else None


def https_context(certificate_pem: str, key_pem: str) -> ssl.SSLContext:
    """Make a TLS context for callers that speak HTTP/1.1; 1.2 is for client libraries of old systems. Raises
    ConfigError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    load_chain(context, certificate_pem, key_pem)
    return context


def server_context(certificates: LocalCertificates) -> ssl.SSLContext:
    """Make the TLS context of the local endpoint."""
    context = https_context(certificates.server_certificate_pem, certificates.server_key_pem)
    # No tickets: a resumed handshake could do without the client certificate.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    context.load_verify_locations(cadata=certificates.ca_pem)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def _certificate_refusal(peer: object, cluster: str, relay: str) -> ArcbridgeError | None:
    """Return None for the client certificate of this cluster at these relays, else the error to answer with.

    A certificate that gets here is of our CA: with any other the handshake has failed.
    """
    if not peer or not isinstance(peer, dict):
        # A stranger does not learn which cluster it is of.
        return Unauthenticated(
            "this endpoint is for the user whose kubeconfig holds its client certificate; "
            "start your own: arcbridge --role client --cluster NAME"
        )
    names = [value for rdn in peer.get("subject", ()) for key, value in rdn if key == "commonName"]
    if names != [cluster] or peer.get("subjectAltName") != (("URI", relay),):
        return Unauthenticated(
            f'this endpoint is of cluster "{cluster}", the client certificate is of another, or of another relay\'s; '
            "run arcbridge again to save the kubeconfig anew"
        )
    return None


def _broke_rules(error: Exception) -> bool:
    return isinstance(error, StreamReset) and error.code in (ResetCode.PROTOCOL, ResetCode.FLOW_CONTROL)


def _reason(error: Exception) -> str:
    if not isinstance(error, StreamReset):
        return error.message if isinstance(error, SessionEnded) else type(error).__name__
    name = next((code.name for code in ResetCode if code == error.code), error.code)
    return f"stream reset ({name}){': one of the two ends broke the protocol' if _broke_rules(error) else ''}"
