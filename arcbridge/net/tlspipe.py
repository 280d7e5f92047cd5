"""TLS by hand over a raw socket, for connections where the socket outlives the TLS.

asyncio's TLS transports close the socket together with the TLS. Here `ssl.MemoryBIO` sits between OpenSSL and a
non-blocking socket that the caller owns: after `close` both sides' close_notify have passed (RFC 8446 §6.1) and
whatever else has been read from the socket comes back as left-over bytes.

Bounded: at most 16 KiB are read from the socket at a time, and only when OpenSSL asks for more. A peer whose records
bring no payload is left after a few KiB of them: OpenSSL takes any number of KeyUpdates, at 3 µs a byte
(docs/threats.md#J29).
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from typing import Final

from arcbridge.net.sockets import SocketReader, receive, send_all

HANDSHAKE_DEADLINE: Final = 5.0
CLOSE_DEADLINE: Final = 3.0
_CHUNK: Final = 16 * 1024
_HEADER: Final = 5
_USUAL_FILLS: Final = 8
"""Reads within which a handshake and a record are complete; behind them others have their turns in between."""
PIECE: Final = 4 * 1024
"""Bytes that are read at a time from a peer that has sent no payload with the last ones."""
EMPTY_MOST: Final = 24 * 1024
"""Bytes without payload behind which a connection is given up: more than a server's tickets, and one record that lacks
its end (RFC 8446 §5.2)."""
PAYLOAD_EXPLAINS: Final = 32
"""Bytes from the peer that one byte of payload explains: a record with one byte has 23."""


class TlsPipe:
    """One TLS connection over `sock`, which is never closed here. Callers set its deadlines, or those of its `reader`.

    All methods raise `ssl.SSLError` or `OSError` from below and `EOFError` when the peer's TCP stream ends without
    close_notify, or its records bring no payload. After an error or a cancellation the TLS state is unusable: the
    connection has to be closed.
    """

    __slots__ = (
        "_empty", "_fills", "_header", "_incoming", "_outgoing", "_reader", "_rest", "_sock", "_tls", "by_record",
        "round_trip",
    )  # fmt: skip

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        reader: SocketReader | None = None,
    ) -> None:
        """`reader`: reads the socket, and is the caller's, who stops it."""
        self._sock = sock
        self._reader = reader
        self._fills = 0
        """Reads from the socket so far."""
        self._empty = 0
        """Bytes behind the handshake that the peer's payload does not explain."""
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )
        self.by_record = False
        """Whether nothing behind the record that is wanted is read: what comes behind close_notify stays with the
        socket."""
        self._header = b""
        """What is here of the next record's header (RFC 8446 §5.1); `_rest`: bytes that the record under way lacks."""
        self._rest = 0
        self.round_trip = 0.0
        """Seconds from this side's first flight to the peer's first bytes; as a client, a round trip."""

    @property
    def alpn(self) -> str | None:
        """The protocol that the finished handshake selected."""
        return self._tls.selected_alpn_protocol()

    @property
    def peer_certificate(self) -> bytes | None:
        """DER of the peer's verified certificate, None when it gave none."""
        return self._tls.getpeercert(binary_form=True)

    async def handshake(self) -> None:
        """A client's last flight is held back until the first `write`, so both leave in one segment."""
        while True:
            try:
                self._tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                await self.flush()
                began = time.monotonic()
                await self._fill()
                self._empty = 0
                self.round_trip = self.round_trip or time.monotonic() - began
            except ssl.SSLError:
                # The alert that tells the peer why; best effort, the error is what counts.
                try:
                    await self.flush()
                except OSError:
                    pass
                raise

    def take(self, data: bytes) -> None:
        """Take bytes that the caller has read from the socket."""
        self._incoming.write(data)

    def payload_waits(self) -> bool:
        """Return whether the peer has sent more application data, which is lost. Raises `ssl.SSLError`."""
        try:
            return bool(self._tls.read(_CHUNK))
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            return False

    def feed(self, data: bytes) -> None:
        """Queue application data; `flush` sends it."""
        if data:
            self._tls.write(data)

    async def write(self, data: bytes) -> None:
        self.feed(data)
        await self.flush()

    async def read(self, size: int = _CHUNK) -> bytes:
        """Return some application data, b"" when the peer has sent close_notify."""
        while True:
            try:
                found = self._tls.read(size)
                self._empty -= PAYLOAD_EXPLAINS * len(found)
                if self._empty < 0:
                    self._empty = 0
                return found
            except ssl.SSLWantReadError:
                await self.flush()
                await self._fill()
            except ssl.SSLZeroReturnError:
                return b""

    async def close(self) -> bytes:
        """Send close_notify (unless sent), wait for the peer's, return the raw bytes that came behind it.

        Application data that the peer sends meanwhile is an error (`ssl.SSLError`), as are raw bytes before its
        close_notify.
        """
        self.feed_close_notify()
        await self.flush()
        while True:
            try:
                self._tls.unwrap()
                return self._incoming.read()
            except ssl.SSLWantReadError:
                await self._fill()

    def feed_close_notify(self) -> None:
        """Queue our close_notify behind what is queued, so that both leave in one segment."""
        try:
            self._tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLSyscallError as error:
            raise EOFError("the connection ended without close_notify") from error

    @property
    def unread(self) -> int:
        """Bytes of the peer that are here and not yet consumed: raw ones, and decrypted ones."""
        return self._incoming.pending + self._tls.pending()

    async def flush(self) -> None:
        data = self._outgoing.read()
        if data:
            await send_all(self._sock, data, deadline=self._reader.deadline if self._reader else None)

    async def _fill(self) -> None:
        if self._empty > EMPTY_MOST:
            raise EOFError("the peer sends records without payload")
        reader, size = self._reader, PIECE if self._empty else _CHUNK
        if self.by_record:
            size = min(size, self._rest) or _HEADER - len(self._header)
        data = await (receive(self._sock, size) if reader is None else reader.receive(size))
        if not data:
            raise EOFError("the connection ended without close_notify")
        self._incoming.write(data)
        if self._rest:
            self._rest -= len(data)
        elif self.by_record:
            self._header += data
            if len(self._header) == _HEADER:
                self._rest, self._header = int.from_bytes(self._header[3:]), b""
        self._empty += len(data)
        self._fills += 1
        if self._fills > _USUAL_FILLS:
            await asyncio.sleep(0)
