"""Connects to the collector of a sink: its address, its trust, and how a delivery fails.

A collector is known by its certificate, of the CA that the settings name or of one that the system trusts. Nothing that
a collector sends reaches a record or a log but the number of an HTTP status.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final, Protocol
from urllib.parse import urlsplit

from arcbridge.audit.sinks.tail import LogRecord
from arcbridge.errors import ArcbridgeError, ConfigError, StateError
from arcbridge.net.address import Address, parse_address
from arcbridge.net.dialer import DIRECT, connect
from arcbridge.net.system_trust import read_cas, trusting_context
from arcbridge.net.tlspipe import TlsPipe
from arcbridge.pki.chain import load_chain
from arcbridge.settings.config import AuditSinkConfig

HTTP, SYSLOG, STDOUT = "http", "syslog", "stdout"
SYSLOG_PORT: Final = 6514
"""RFC 5425 §4.1."""


class CollectorFailed(ArcbridgeError):
    """A batch was not delivered; it is sent again. `retry_after`: when at the earliest, in seconds."""


class RecordsRefused(CollectorFailed):
    """The collector does not take these very records: the same batch is refused again."""


class Transport(Protocol):
    """Carries batches to one collector. It is used in the thread and the event loop of one sink."""

    async def send(self, records: Sequence[LogRecord]) -> None:
        """Deliver records, in this order; return once the collector has all of them. Raises CollectorFailed,
        ArcbridgeError, OSError."""

    async def close(self) -> None:
        """Close what is kept between batches."""


def address_of(sink: AuditSinkConfig) -> tuple[Address, bool]:
    """Return where a collector is, and whether over TLS. Raises ConfigError."""
    if sink.kind == SYSLOG:
        return parse_address(sink.address, default_port=SYSLOG_PORT), True
    return http_address(sink.address)


def http_address(url: str) -> tuple[Address, bool]:
    """Return where the server of a URL is, and whether over TLS. Raises ConfigError, in words for any such setting."""
    try:
        parts = urlsplit(url)
        secure = parts.scheme == "https"
    except ValueError:
        raise ConfigError("it is no URL") from None
    if "@" in parts.netloc or parts.fragment or parts.scheme not in ("http", "https"):
        raise ConfigError("a URL https://host[:port]/path is needed; a secret stands in a file of its own")
    where = parse_address(parts.netloc, default_port=443 if secure else 80)
    if not secure and not _is_loopback(where.host):
        raise ConfigError("http:// is for a server on this machine's loopback alone; write https://")
    return where, secure


def token_of(path: Path, setting: str = "token_file") -> str:
    """Return the token of a file that a setting names. Raises StateError."""
    try:
        text = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StateError(f"{setting}: {path} cannot be read") from error
    if len(text.split()) != 1:
        raise StateError(f"{setting}: {path} holds no token: one word is needed")
    return text


def context_of(sink: AuditSinkConfig) -> ssl.SSLContext:
    """Return how the collector is known. Raises ConfigError, StateError, OSError."""
    context = trusting_context(read_cas(sink.ca_file, "ca_file") if sink.ca_file is not None else None)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if sink.certificate is not None and sink.key is not None:
        load_chain(context, sink.certificate.read_text("ascii", "ignore"), sink.key.read_text("ascii", "ignore"))
    return context


async def probe(sink: AuditSinkConfig) -> None:
    """Connect to a collector and make TLS; send nothing. Raises ArcbridgeError, OSError, TimeoutError."""
    where, secure = address_of(sink)
    async with asyncio.timeout(sink.timeout):
        if secure:
            async with opened(where, sink):
                return
        (await connect(where, deadline=sink.timeout, proxy=DIRECT)).close()


@contextlib.asynccontextmanager
async def opened(where: Address, sink: AuditSinkConfig) -> AsyncIterator[tuple[socket.socket, TlsPipe]]:
    """Yield a connection to a collector and its TLS; it is closed behind them."""
    context = context_of(sink)
    with await connect(where, deadline=sink.timeout) as sock:
        pipe = TlsPipe(sock, context, server_hostname=where.host)
        try:
            await pipe.handshake()
        except ssl.SSLCertVerificationError as error:
            raise CollectorFailed(f"{where}: its certificate is not good: {error.verify_message}") from error
        except ssl.SSLError as error:
            raise CollectorFailed(f"{where}: TLS failed ({error.reason or type(error).__name__})") from error
        except EOFError as error:
            raise CollectorFailed(f"{where}: it ended the connection") from error
        yield sock, pipe


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
