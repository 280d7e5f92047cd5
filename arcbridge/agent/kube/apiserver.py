"""How the agent reaches the API server: address, CA, its own credential, and which connection a request may use.

Two kinds of TLS connection, never mixed:

* **own**: the agent authenticates itself (its ServiceAccount token in a header, or its client certificate) and
  impersonates. Requests of different users may follow each other on one HTTP/1.1 connection, because each carries its
  own impersonation and nothing is remembered between them: no cookies, no connection-level authentication other than
  the agent's.
* **bare**: token mode. The agent's client certificate must not be there: kube-apiserver asks x509 before tokens, so
  with it every token-mode request would run as the agent.

GET and HEAD use kept connections. Everything else gets a fresh one: aiohttp repeats PUT and DELETE on its own when a
kept connection turns out dead, and a POST on one would fail for no fault of the caller's.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp import http_parser
from yarl import URL

from arcbridge.agent.kube.framing import MAX_HEAD_LINE, MAX_HEADERS
from arcbridge.agent.kube.impersonation import Headers
from arcbridge.agent.kube.upstream_pool import CONNECT_DEADLINE, KEEPALIVE, UpstreamPool
from arcbridge.config import KubernetesConfig
from arcbridge.errors import ConfigError, Unreachable
from arcbridge.net.address import Address
from arcbridge.net.dialer import DIRECT, connect
from arcbridge.net.sockets import disable_user_timeout
from arcbridge.net.tlstransport import TlsTransport, connect_tls

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REREAD = 10.0
"""Seconds between two looks at token and CA file; kubelet replaces the projected token long before it lapses."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where and how: `host` without brackets, files as configured."""

    host: str
    port: int
    ca_file: Path | None
    token_file: Path | None
    certificate_file: Path | None
    key_file: Path | None

    @property
    def authority(self) -> str:
        """`host:port` for URLs and Host headers."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def endpoint_of(
    config: KubernetesConfig,
    environ: Mapping[str, str] = os.environ,
    service_account: Path = SERVICE_ACCOUNT,
) -> Endpoint:
    """Reads the settings; all empty means in-cluster. Raises ConfigError that names the setting."""
    certificate, key = config.client_certificate_file, config.client_key_file
    if (certificate is None) != (key is None):
        raise ConfigError("kubernetes.client_certificate_file and kubernetes.client_key_file belong together")
    if not config.server:
        host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise ConfigError("kubernetes.server: missing, and this is not a pod (KUBERNETES_SERVICE_HOST is not set)")
        if not port.isdigit():
            raise ConfigError("KUBERNETES_SERVICE_PORT: not a port number")
        token = config.token_file or service_account / "token"
        return Endpoint(host, int(port), config.ca_file or service_account / "ca.crt", token, certificate, key)
    try:
        parts = urlsplit(config.server)
        server, number = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"kubernetes.server: {error}") from error
    if parts.scheme != "https" or not server:
        raise ConfigError("kubernetes.server: must be https://host:port")
    if parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigError("kubernetes.server: must be https://host:port and nothing more")
    if config.token_file is None and certificate is None:
        raise ConfigError("kubernetes: needs token_file, or client_certificate_file with client_key_file")
    return Endpoint(server, number or 443, config.ca_file, config.token_file, certificate, key)


class ApiServer:
    """Connections to one API server. Made in the event loop; `close()` must be awaited."""

    def __init__(self, endpoint: Endpoint, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Reads CA, token and certificate once. Raises ConfigError when one cannot be read."""
        if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
            raise ConfigError(
                "aiohttp's C parser is missing; its Python one is too lenient to stand before an API server"
            )
        self.endpoint = endpoint
        self._clock = clock
        self._looked_at = clock()
        self._stamp = self._stamps()
        self._own, self._bare = self._contexts()
        self._token = self._read_token()
        self._kept = self._session(force_close=False)
        self._fresh = self._session(force_close=True)
        # The one switch against repeating a PUT or DELETE whose connection died; aiohttp's own test client uses it.
        self._fresh._retry_connection = False
        self.kept = UpstreamPool(self, endpoint.host, endpoint.port)
        """For plain requests; `request` is for all others."""
        self.connections_failed = 0
        self.reload_error = ""

    @property
    def authority(self) -> str:
        """`host:port` as written in Host."""
        return self.endpoint.authority

    def authorization(self) -> str:
        """The agent's own Authorization value; empty when it has only a client certificate."""
        self._reload()
        return f"Bearer {self._token}" if self._token else ""

    def tls(self, *, own: bool) -> ssl.SSLContext:
        """The TLS settings of one kind of connection."""
        self._reload()
        return self._own if own else self._bare

    async def request(
        self, method: str, target: str, headers: Headers, *, own: bool, body: Any = None
    ) -> aiohttp.ClientResponse:
        """Sends one request and answers when the head of the response is there.

        `target` and `headers` go out as they are; `body` is None, bytes, or an async iterator (chunked unless
        `headers` have Content-Length). Raises aiohttp's errors. The caller must `release()` or `close()` the response.
        """
        session = self._kept if method in ("GET", "HEAD") and body is None else self._fresh
        return await session.request(
            method,
            URL(f"https://{self.authority}{target}", encoded=True),
            headers=headers,
            data=body,
            ssl=self.tls(own=own),
            allow_redirects=False,
        )

    async def dial(self, protocol: asyncio.BaseProtocol, *, own: bool) -> TlsTransport:
        """Opens one fresh TLS connection for an upgrade. Raises OSError, TimeoutError; cancelling leaves nothing."""
        host = self.endpoint.host
        async with asyncio.timeout(CONNECT_DEADLINE):
            try:
                sock = await connect(Address(host, self.endpoint.port), deadline=CONNECT_DEADLINE, proxy=DIRECT)
            except Unreachable as error:
                raise error.__cause__ or ConnectionError(error.message) from error
            disable_user_timeout(sock)
            return await connect_tls(sock, self.tls(own=own), protocol, host)

    async def close(self) -> None:
        """Closes all kept connections; requests under way fail."""
        self.kept.close()
        await self._kept.close()
        await self._fresh.close()

    # -- inside -----------------------------------------------------------------------------------------------

    def _session(self, *, force_close: bool) -> aiohttp.ClientSession:
        keep: dict[str, Any] = {"force_close": True} if force_close else {"keepalive_timeout": KEEPALIVE}
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, **keep),
            cookie_jar=aiohttp.DummyCookieJar(),
            # No total: watches and `logs -f` last for hours.
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_DEADLINE),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            auto_decompress=False,
            trust_env=False,
            max_line_size=MAX_HEAD_LINE,
            max_field_size=MAX_HEAD_LINE,
            max_headers=MAX_HEADERS,
        )

    def _reload(self) -> None:
        now = self._clock()
        if now - self._looked_at < REREAD:
            return
        self._looked_at = now
        try:
            stamp = self._stamps()
            if stamp == self._stamp:
                return
            own, bare = self._contexts()
            token = self._read_token()
        except ConfigError as error:
            self.reload_error = error.message  # half-replaced files: the old ones are good for a while yet
            return
        self._stamp, self._own, self._bare, self._token, self.reload_error = stamp, own, bare, token, ""

    def _stamps(self) -> list[tuple[int, int, int]]:
        stamps = []
        end = self.endpoint
        for path in (end.ca_file, end.token_file, end.certificate_file, end.key_file):
            if path is not None:
                try:
                    stat = os.stat(path)
                except OSError as error:
                    raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
                stamps.append((stat.st_mtime_ns, stat.st_size, stat.st_ino))
        return stamps

    def _contexts(self) -> tuple[ssl.SSLContext, ssl.SSLContext]:
        end = self.endpoint
        try:
            own = ssl.create_default_context(cafile=end.ca_file)
            bare = ssl.create_default_context(cafile=end.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"kubernetes.ca_file: {end.ca_file} is not a CA certificate") from error
        if end.certificate_file is not None and end.key_file is not None:
            try:
                own.load_cert_chain(end.certificate_file, end.key_file)
            except (OSError, ssl.SSLError) as error:
                raise ConfigError("kubernetes.client_certificate_file and client_key_file do not fit") from error
        return own, bare

    def _read_token(self) -> str:
        path = self.endpoint.token_file
        if path is None:
            return ""
        try:
            token = path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"kubernetes.token_file: {path} cannot be read") from error
        if not token or any(c.isspace() for c in token):
            raise ConfigError(f"kubernetes.token_file: {path} holds no token")
        return token
