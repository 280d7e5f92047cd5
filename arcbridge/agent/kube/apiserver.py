"""Knows how the agent reaches the API server: address, CA, its own credential; and makes the agent's own calls.

Two kinds of TLS connection, never mixed:

* **own**: the agent authenticates itself (its ServiceAccount token in a header, its client certificate, or that of its
  pod) and impersonates. Requests of different users may follow each other on one HTTP/1.1 connection, because each
  carries its own impersonation and the connection keeps no state: no cookies, no authentication other than the agent's.
* **bare**: token mode. The agent's client certificate must not be there: kube-apiserver asks x509 before tokens, so
  with it every token-mode request would run as the agent.

Callers' GET and HEAD use idle connections of the pool (`upstream_pool`). Everything else gets a fresh one: a request
that writes must not be repeated, and on an idle connection that has died it would fail for no fault of the caller's.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog
from aiohttp import http_parser

from arcbridge.agent.accounts import Account, Limit
from arcbridge.agent.kube.connect_limit import too_much
from arcbridge.agent.kube.own_credential import CredentialFiles, OwnCredential, read_credential, stamps
from arcbridge.agent.kube.response import ResponseHead
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upstream_pool import UpstreamPool, UpstreamRequest
from arcbridge.agent.seats import Seats
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.settings.config import KubernetesConfig
from arcbridge.units import rfc3339
from arcbridge.untrusted_json import read_json

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REREAD = 10.0
"""Seconds between two looks at the files of CA and credential; the kubelet replaces a projected token or certificate
long before it expires."""
SEAT_WAIT = 5.0
"""Seconds for which a call that is made for a user's request waits for one of the user's seats."""
MAX_ANSWER = 1 << 20
"""Bytes of the answer to a call of the agent's own, unless the call allows more."""

log = structlog.get_logger("arcbridge.agent")


@dataclass(frozen=True, slots=True)
class Endpoint(CredentialFiles):
    """The API server's address (`host` without brackets) and the files that are configured for it."""

    host: str
    port: int
    impersonable: frozenset[str] | None = None
    """Groups that the agent's own identity may impersonate; None: any."""

    @property
    def authority(self) -> str:
        """`host:port` for URLs and Host headers."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def endpoint_of(
    config: KubernetesConfig, environ: Mapping[str, str] = os.environ, service_account: Path = SERVICE_ACCOUNT
) -> Endpoint:
    """Read the settings; all empty means in-cluster. Raises ConfigError that names the setting."""
    certificate, key = config.client_certificate_file, config.client_key_file
    if (certificate is None) != (key is None):
        raise ConfigError("kubernetes.client_certificate_file and kubernetes.client_key_file belong together")
    bundle = config.credential_bundle_file
    if bundle is not None and (config.token_file, certificate) != (None, None):
        raise ConfigError(
            "kubernetes.credential_bundle_file: is a whole credential; remove kubernetes.token_file, and "
            "kubernetes.client_certificate_file with its key"
        )
    groups = _impersonable(config.impersonate_groups)
    if not config.server:
        host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise ConfigError("kubernetes.server: missing, and this is not a pod (KUBERNETES_SERVICE_HOST is not set)")
        if not port.isdigit():
            raise ConfigError("KUBERNETES_SERVICE_PORT: not a port number")
        ca_file = config.ca_file or service_account / "ca.crt"
        token = None if bundle is not None else config.token_file or service_account / "token"
        return Endpoint(ca_file, token, certificate, key, bundle, host, int(port), groups)
    try:
        parts = urlsplit(config.server)
        server, number = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"kubernetes.server: {error}") from error
    if parts.scheme != "https" or not server:
        raise ConfigError("kubernetes.server: must be https://host:port")
    if parts.path not in ("", "/") or parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigError("kubernetes.server: must be https://host:port and nothing more")
    if config.token_file is None and certificate is None and bundle is None:
        raise ConfigError(
            "kubernetes: needs token_file, credential_bundle_file, or client_certificate_file with client_key_file"
        )
    return Endpoint(config.ca_file, config.token_file, certificate, key, bundle, server, number or 443, groups)


def _impersonable(groups: tuple[str, ...]) -> frozenset[str] | None:
    """Return the groups that may be impersonated; None for any. Raises ConfigError."""
    if groups == ("*",):
        return None
    if "*" in groups or not all(groups):
        raise ConfigError('kubernetes.impersonate_groups: either ["*"], which is every group, or names of groups')
    return frozenset(groups)


class AnswerFailed(ArcbridgeError):
    """A call of the agent's own got no usable answer. The message quotes neither the request nor an answer."""


class _Collected:
    """Collects the answer to a call of the agent's own."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.body = bytearray()

    def response_begins(self, head: ResponseHead) -> bytes:
        self.status = head.status
        return b""

    def response_data(self, data: bytes | memoryview, payload: int) -> None:
        self.body += data
        if len(self.body) > self._most:
            self._fail("the answer is too long")

    def response_complete(self) -> None:
        if not self.done.done():
            self.done.set_result(None)

    def response_failed(self, refusal: RequestRefusal | None) -> None:
        self._fail("the connection was closed without a usable answer")

    def response_switched(self, head: ResponseHead, rest: bytes) -> None:
        raise AssertionError("a call asks for no upgrade")

    def _fail(self, words: str) -> None:
        if not self.done.done():
            self.done.set_exception(AnswerFailed(words))


class ApiServer:
    """Connections to one API server. Made in the event loop; `close()` must be awaited."""

    def __init__(self, endpoint: Endpoint, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Read CA and credential once. Raises ConfigError when a file cannot be read."""
        if http_parser.HttpRequestParser is http_parser.HttpRequestParserPy:
            raise ConfigError(
                "aiohttp's C parser is missing; its Python one is too lenient to stand before an API server"
            )
        self.endpoint = endpoint
        self.impersonable = endpoint.impersonable
        """Groups that the agent's own identity may impersonate; None: any."""
        self.authority = endpoint.authority
        """`host:port` as written in Host."""
        self._clock = clock
        self._looked_at = clock()
        self._stamp = stamps(endpoint)
        self.credential: OwnCredential = read_credential(endpoint)
        """What was read last."""
        self.upstream = UpstreamPool(endpoint.host, endpoint.port)
        self.on_rotation: Callable[[], None] = lambda: None
        """Called when CA or credential were replaced."""
        self.reload_error = ""
        """Why changed files could not be read; empty while all is well."""

    def credentials(self, *, own: bool) -> tuple[ssl.SSLContext, str]:
        """Return the TLS settings of one kind of connection, and the agent's own Authorization value; that is empty for
        a bare one, and where the agent has only a client certificate."""
        if self._clock() - self._looked_at >= REREAD:
            self._reload()
        credential = self.credential
        return (credential.own, credential.authorization) if own else (credential.bare, "")

    def reread(self) -> None:
        """Read CA and credential at the next use, whenever they were read last."""
        self._looked_at = -math.inf

    async def ask(
        self,
        method: str,
        target: str,
        document: object = None,
        *,
        token: str = "",
        most: int = MAX_ANSWER,
        content_type: str = "application/json",
        account: Account | None = None,
    ) -> tuple[int, Any]:
        """Make one small call of the agent's own, on a connection of its own; return the code and the answer's JSON,
        None for an answer that is none.

        `document`: what is sent, as JSON of this `content_type`; None for no body. `token`: a caller's, with which the
        call is made in place of the agent's own credential. `account`: of the user for whose request it is made, who
        pays for it. Raises AnswerFailed where there is no answer of at most `most` bytes, and with an account
        RequestRefusal where the user has no turn or the API server is out of reach. Cancelled, it leaves nothing.
        """
        tls, authorization = self.credentials(own=not token)
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self.authority}", "Connection: close"]
        lines += ["Accept: application/json", "User-Agent: arcbridge-agent"]
        if token or authorization:
            lines.append(f"Authorization: {f'Bearer {token}' if token else authorization}")
        body = b"" if document is None else json.dumps(document).encode()
        if document is not None:
            lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
        if any("\r" in line or "\n" in line or "\x00" in line for line in lines):
            raise AnswerFailed("a header is malformed")
        status, answer = await self.carry(tls, "\r\n".join(lines).encode() + b"\r\n\r\n" + body, method, most, account)
        try:
            return status, read_json(answer, most)
        except ValueError:
            return status, None

    async def carry(
        self,
        tls: ssl.SSLContext,
        request: bytes,
        method: str = "POST",
        most: int = MAX_ANSWER,
        account: Account | None = None,
    ) -> tuple[int, bytes]:
        """Send one whole request on a connection of its own; return code and body of the answer. Raises as `ask`."""
        seats = Seats(0) if account is None else account.seats
        try:
            await seats.turn(SEAT_WAIT)
        except TimeoutError:
            assert account is not None, "seats without a bound are free"
            raise too_much(account, Limit.APISERVER_SEATS, time.monotonic()) from None
        try:
            connection = await self.upstream.dial(tls, account)
            answer = _Collected(most)
            try:
                connection.send(answer, UpstreamRequest(request, method, repeatable=False, framed=False))
                await answer.done
            finally:
                connection.drop()
        except RequestRefusal as refusal:
            if account is not None:
                raise
            failed = AnswerFailed(refusal.message.removeprefix("arcbridge: "))
            failed.refusal = refusal.refusal
            raise failed from None
        finally:
            seats.leave()
        return answer.status, bytes(answer.body)

    async def close(self) -> None:
        """Close all connections; requests under way fail."""
        self.upstream.close()

    # -- inside -----------------------------------------------------------------------------------------------

    def _reload(self) -> None:
        self._looked_at = self._clock()
        try:
            stamp = stamps(self.endpoint)
            if stamp == self._stamp:
                return
            self.credential = read_credential(self.endpoint)
        except ConfigError as error:
            self.reload_error = error.message  # half-replaced files: the old ones are good for a while yet
            return
        self._stamp = stamp
        self.reload_error = ""
        validity = self.credential.validity
        until = rfc3339(validity[1]) if validity is not None else ""
        log.info("credential read again", kind=self.credential.kind, until=until)
        self.on_rotation()
