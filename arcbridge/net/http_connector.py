"""The connector of every aiohttp session that asks a server outside: issuers, relays, token endpoints.

It dials through `net.dialer`, so that proxies, both address families, socket options and errors are the same as for
every other connection of ours. aiohttp by itself knows HTTP proxies alone, and looks names up that only a proxy knows.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from functools import partial
from typing import Any, Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler

from arcbridge.net.address import Address
from arcbridge.net.dialer import DIRECT, connect
from arcbridge.net.tlstransport import connect_tls

DEADLINE: Final = 15.0
"""Seconds to connect at most; a session's own deadline is mostly shorter."""
MOST_FRAMING: Final = 256 * 1024
"""Bytes of an answer beside twice those of its body: of its head, those of interim answers, and what frames chunks."""


class _BoundedAnswers(ResponseHandler):
    """Reads the answers of one connection, each of `most` bytes: aiohttp takes interim answers, extensions of chunks
    and trailers without end, at a second for two MB (docs/threats.md#J36)."""

    def __init__(self, most: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._most = self._left = most

    def set_response_params(self, **settings: Any) -> None:
        """Note that the next answer begins."""
        self._left = self._most
        super().set_response_params(**settings)

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left >= 0:
            super().data_received(data)
        elif self.transport is not None:
            self.set_exception(aiohttp.ClientPayloadError("the answer has more bytes than its body explains"))
            self.transport.abort()


class DialingConnector(aiohttp.TCPConnector):
    """An `aiohttp.TCPConnector` for sessions without `trust_env`. Failures to connect are `Unreachable`."""

    def __init__(self, most_body: int, **options: Any) -> None:
        """`most_body`: bytes of the largest body that is of use."""
        super().__init__(resolver=_NoResolver(), use_dns_cache=False, **options)
        self._most = 2 * most_body + MOST_FRAMING

    async def _wrap_create_connection(
        self,
        *arguments: Any,
        addr_infos: Any,
        req: aiohttp.ClientRequest,
        timeout: aiohttp.ClientTimeout,
        client_error: type[Exception] = aiohttp.ClientConnectorError,
        **options: Any,
    ) -> Any:
        """Connect and make the protocol, in the place of aiohttp's own method, whose errors about TLS it keeps."""
        host, port = req.url.raw_host, req.url.port
        if host is None or port is None:
            raise aiohttp.InvalidURL(req.url)
        # Without TLS only servers of this machine are asked: a proxy would read it, and its loopback is another.
        proxy = DIRECT if req.url.scheme == "http" else None
        sock = await connect(Address(host, port), deadline=timeout.sock_connect or DEADLINE, proxy=proxy)
        loop = asyncio.get_running_loop()
        answers = partial(_BoundedAnswers, self._most, loop=loop)
        try:
            if (context := options.get("ssl")) is None:
                return await loop.create_connection(answers, *arguments[1:], **options, sock=sock)
            # Not the loop's TLS: uvloop closes the descriptor itself where the server has reset the connection, and the
            # close below would then hit whichever connection has the number by then.
            protocol = answers()
            return await connect_tls(sock, context, protocol, options["server_hostname"]), protocol
        except BaseException as error:
            sock.close()
            key = req.connection_key
            if isinstance(error, ssl.CertificateError):
                raise aiohttp.ClientConnectorCertificateError(key, error) from error
            if isinstance(error, ssl.SSLError):
                raise aiohttp.ClientConnectorSSLError(key, error) from error
            if isinstance(error, OSError) and not isinstance(error, TimeoutError):
                raise client_error(key, error) from error
            raise


class _NoResolver(AbstractResolver):
    """Leaves names to the dialer, or to the proxy."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [ResolveResult(hostname=host, host="0.0.0.0", port=port, family=socket.AF_INET, proto=0, flags=0)]

    async def close(self) -> None:
        pass
