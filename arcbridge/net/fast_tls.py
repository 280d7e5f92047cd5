"""aiofastnet, which calls OpenSSL without Python's `ssl` in between, where it works.

It is passed over where it is not installed, and where this Python hides its OpenSSL (aiofastnet then works through
`ssl`, slower than uvloop). What takes its place is the caller's choice. Two of its ways are changed here: it decodes no
certificate, and reports two things less (`FastTlsLoop`). The reasons are in docs/decisions/0012-aiofastnet.md.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import ssl
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

from arcbridge.loop_shares import LoopTime

_READ_AFTER_ABORT = "incoming BIO: no writable capacity"
log = logging.getLogger("arcbridge.net")


@functools.cache
def fast_tls() -> ModuleType | None:
    """Return aiofastnet, or None where our own TLS serves sessions; the log tells which, once, at debug."""
    try:
        import aiofastnet
    except ImportError as error:
        # Also raised by an aiofastnet that does not fit this Python's OpenSSL.
        log.debug("sessions use the TLS of `ssl`: aiofastnet cannot be imported (%s)", error)
        return None
    if aiofastnet.OPENSSL_DYN_LIBS is None:
        log.debug("sessions use the TLS of `ssl`: aiofastnet has no direct access to this Python's OpenSSL")
        return None
    if ssl.OPENSSL_VERSION_INFO < (3,):
        log.debug("sessions use the TLS of `ssl`: %s does not tell of KeyUpdates", ssl.OPENSSL_VERSION)
        return None
    try:
        from arcbridge.net import key_updates

        key_updates.find_openssl(aiofastnet.OPENSSL_DYN_LIBS.libssl)
    except (ImportError, OSError, AttributeError, MemoryError) as error:  # no ctypes, no closures, another library
        log.debug("sessions use the TLS of `ssl`: KeyUpdates cannot be counted (%s)", error)
        return None
    _decode_no_certificate(aiofastnet)
    log.debug("sessions use the TLS of aiofastnet %s", aiofastnet.__version__)
    return aiofastnet


def bound_key_updates(context: ssl.SSLContext, aiofastnet: ModuleType) -> None:
    """Bound the KeyUpdates in connections of a context that aiofastnet reads (docs/threats.md#J34)."""
    from arcbridge.net import key_updates  # imports ctypes

    key_updates.bound_key_updates(context, aiofastnet.OPENSSL_DYN_LIBS.libssl)


class FastTlsLoop:
    """The event loop as aiofastnet sees it: all of it, but two reports that are none, and what its handshakes cost.

    aiofastnet 1.2.0 reports a peer that leaves within the handshake to the exception handler, with the class
    ConnectionResetError in place of an exception, which no handler expects. And where its protocol aborts the
    connection in the middle of a read, it goes on to read into its buffer, which is not emptied any more, until that is
    full. The protocol gets what there is to know in `connection_lost` in any case.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, payer: LoopTime | None = None, *, holds_reader: bool = False
    ) -> None:
        """`holds_reader`: what is read from the socket is another's until `release`, and it is not closed."""
        self._loop = loop
        self._held: Callable[[], None] | None = _nothing if holds_reader else None
        """Begins to read at last."""
        self._timer: asyncio.TimerHandle | None = None
        """Ends the handshake whose reader is held."""
        self._postponed: list[Callable[[], object]] = []
        """Calls of a handshake that fails while its reader is held: they close the socket."""
        self.payer = payer
        """Pays for what is read, for as long as it is set."""
        # What aiofastnet asks for again and again needs no call of `__getattr__`.
        self.call_later = self._call_later if holds_reader else loop.call_later
        self.call_soon: Callable[..., object] = self._postpone if holds_reader else loop.call_soon
        self.create_future, self.get_debug = loop.create_future, loop.get_debug
        self.remove_reader: Callable[..., object] = self._forget_reader if holds_reader else loop.remove_reader
        self.add_writer: Callable[..., Any] = loop.add_writer
        self.remove_writer: Callable[..., Any] = loop.remove_writer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def add_reader(self, descriptor: int, callback: Callable[..., Any], *args: Any) -> None:
        if self._held is not None:
            self._held = partial(self.add_reader, descriptor, callback, *args)
        elif self.payer is None:
            self._loop.add_reader(descriptor, callback, *args)
        else:
            self._loop.add_reader(descriptor, self.payer.run, partial(callback, *args))

    def _call_later(self, delay: float, callback: Callable[..., Any], *args: Any) -> asyncio.TimerHandle:
        self._timer = self._loop.call_later(delay, callback, *args)
        return self._timer

    def _postpone(self, callback: Callable[..., object], *args: Any) -> None:
        self._postponed.append(partial(self._loop.call_soon, callback, *args))

    def _forget_reader(self, descriptor: int) -> None:
        self._held = _nothing

    def release(self) -> None:
        """Let the reader be added that was held, unless the handshake has failed."""
        held, self._held, self.remove_reader = self._held, None, self._loop.remove_reader
        self.call_soon = self._loop.call_soon
        if held is not None:
            held()
        for call in self._postponed:
            call()

    def abandon(self, descriptor: int) -> None:
        """Leave a descriptor alone whose reader is still held: its owner closes it, and its number has a new meaning
        then."""
        self.cancel_timer()
        self._loop.remove_writer(descriptor)
        self.add_writer = self.remove_writer = _nothing
        self.call_soon = self._loop.call_soon
        for call in self._postponed:
            call()

    def cancel_timer(self) -> None:
        """Let a handshake that is over go: aiofastnet's timer keeps its transport, with 0.5 MB of buffers."""
        if self._timer is not None:
            self._timer.cancel()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, type) and str(error) != _READ_AFTER_ABORT:
            self._loop.call_exception_handler(context)


def _nothing(*_: object) -> None:
    pass


def _decode_no_certificate(aiofastnet: ModuleType) -> None:
    """Have clients know the server's certificate as DER alone, which is all that is asked for here.

    aiofastnet 1.2.0 decodes it, once OpenSSL has verified it, for callers that ask a transport for `peercert`: by way
    of a temporary file, and where none can be written the handshake never ends. OpenSSL verifies as before.
    """
    engine: Any = getattr(aiofastnet, "ssl_engine_direct", None)
    if hasattr(engine, "tempfile"):
        quiet = ModuleType("ssl")
        decoder = SimpleNamespace(_test_decode_cert=lambda path: {})
        vars(quiet).update(vars(ssl), DER_cert_to_PEM_cert=lambda der: "", _ssl=decoder)
        no_file = nullcontext(SimpleNamespace(name="", write=len))  # without a name nothing has to be removed
        engine.ssl, engine.tempfile = quiet, SimpleNamespace(NamedTemporaryFile=lambda **_: no_file)
