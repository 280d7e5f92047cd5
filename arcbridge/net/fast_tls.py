"""aiofastnet, which calls OpenSSL without Python's `ssl` in between, where it works.

It is passed over where it is not installed, where this Python hides its OpenSSL (aiofastnet then works through `ssl`,
slower than uvloop), and by a TLS client that can write no temporary file: aiofastnet decodes the server's certificate
from one, and a handshake that cannot be decoded never ends. What takes its place is the caller's choice.
The reasons are in docs/decisions/0012-aiofastnet.md.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from arcbridge.loop_shares import LoopTime

_READ_AFTER_ABORT = "incoming BIO: no writable capacity"
log = logging.getLogger("arcbridge.net")


@functools.cache
def fast_tls() -> ModuleType | None:
    """Return aiofastnet, or None where the loop's TLS serves sessions; the log tells which, once, at debug."""
    try:
        import aiofastnet
    except ImportError as error:
        # Also raised by an aiofastnet that does not fit this Python's OpenSSL.
        log.debug("sessions use the event loop's TLS: aiofastnet cannot be imported (%s)", error)
        return None
    if aiofastnet.OPENSSL_DYN_LIBS is None:
        log.debug("sessions use the event loop's TLS: aiofastnet has no direct access to this Python's OpenSSL")
        return None
    log.debug("sessions use the TLS of aiofastnet %s", aiofastnet.__version__)
    return aiofastnet


def fast_tls_as_client() -> ModuleType | None:
    """Return aiofastnet for one connection as the TLS client, or None where it cannot make this one."""
    aiofastnet = fast_tls()
    return aiofastnet if aiofastnet is not None and _temporary_file_possible() else None


class FastTlsLoop:
    """The event loop as aiofastnet sees it: all of it, but two reports that are none, and what its handshakes cost.

    aiofastnet 1.2.0 reports a peer that leaves within the handshake to the exception handler, with the class
    ConnectionResetError in place of an exception, which no handler expects. And where its protocol aborts the
    connection in the middle of a read, it goes on to read into its buffer, which is not emptied any more, until that is
    full. The protocol gets what there is to know in `connection_lost` in any case.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, payer: LoopTime | None = None) -> None:
        self._loop = loop
        self.payer = payer
        """Pays for what is read, for as long as it is set."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def add_reader(self, descriptor: int, callback: Callable[..., Any], *args: Any) -> None:
        if self.payer is None:
            self._loop.add_reader(descriptor, callback, *args)
        else:
            self._loop.add_reader(descriptor, self.payer.run, partial(callback, *args))

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, type) and str(error) != _READ_AFTER_ABORT:
            self._loop.call_exception_handler(context)


def _temporary_file_possible() -> bool:
    """Return whether a certificate can be decoded from a temporary file; asked at each connection, since a disk fills
    up."""
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(bytes(16 * 1024))
            file.flush()
    except OSError as error:
        log.debug("this connection is made without aiofastnet: no temporary file can be written (%s)", error)
        return False
    return True
