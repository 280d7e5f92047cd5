"""Fetches one https document for a verifier, or asks one question: small, bounded, and never somewhere else than asked.

No redirects (a key set must come from where the configuration says), no cookies, at most 1 MiB, and one deadline for
all of it, from the name's lookup to the last byte: a server that sends one byte per second is a server that is down.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Mapping

import aiohttp
from yarl import URL

from arcbridge.errors import Unreachable, UntrustedCertificate
from arcbridge.identity.fetch import Reply
from arcbridge.net.http_connector import DialingConnector
from arcbridge.net.system_trust import trusting_context

MAX_DOCUMENT = 1 << 20
KEPT = 2.0
"""Seconds for which a connection is kept for the next request: less than any server does (5 s are the shortest in use).
A POST on a connection that the server has just closed is lost, and is not sent again; the polls of a login are 5 s
apart (RFC 8628 §3.2)."""
DEADLINE = 10.0
"""Seconds for one document. A login waits for it when no keys are in memory yet."""

_ACCEPT = "application/json, application/jwk-set+json"
"""Kubernetes' API server answers 406 for its key set to a request that does not name the second (RFC 7517 §8.5.1)."""
_UNTRUSTED_CA = (2, 7, 18, 19, 20, 21, 24, 79)
"""Of x509_vfy.h: the CA of an intermediate is not here (2), the CA was made anew with its name (7), a certificate that
vouches for itself (18), such a CA (19), one that is not here (20, 21), and one here that is no CA (24, 79)."""
_OPENSSL_CODES = 1000
"""Above all codes of x509_vfy.h; what truststore raises has codes of the system, which say nothing here, or none."""
_MAX_AGE = re.compile(r"(?:^|[,\s])max-age\s*=\s*\"?(\d{1,9})", re.IGNORECASE)
_SECONDS = re.compile(r"\d{1,6}", re.ASCII)

Trust = str | ssl.SSLContext | None
"""The CA (PEM) of the server, or a whole context; None: the system's roots."""


class HttpFetcher:
    """`await fetcher(url, ca_pem)`; one aiohttp session, made on first use, closed by `close()`.

    `keep`: keep connections for the next request, for several of them within seconds. `plain`: ask `http` URLs, too,
    which the caller has found to be of this machine, and leave bodies as they came, without decompression. `cut`: a
    body above the limit is cut there, for callers whom the status tells enough.
    """

    def __init__(
        self, *, deadline: float = DEADLINE, limit: int = MAX_DOCUMENT, keep: bool = False, plain: bool = False,
        cut: bool = False,
    ) -> None:  # fmt: skip
        self._cut = cut
        self._keep = keep
        self._plain = plain
        self._deadline = deadline
        self._limit = limit
        self._session: aiohttp.ClientSession | None = None
        self._contexts: dict[str | None, ssl.SSLContext] = {}

    async def __call__(self, url: str, ca_pem: str | None) -> Reply:
        """Fetch `url`. Raises Unreachable, with the URL's host and what went wrong, for anything but a good 200;
        UntrustedCertificate, where the certificate is not of `ca_pem`."""
        reply = await self.ask("GET", url, ca_pem, headers={"Accept": _ACCEPT})
        if reply.status != 200:
            raise Unreachable(f"{URL(url, encoded=True).host}: answered {reply.status}")
        return reply

    async def ask(
        self, method: str, url: str, ca_pem: Trust, *, headers: Mapping[str, str], body: bytes = b""
    ) -> Reply:
        """Send one request; return the answer, whatever its status. Raises Unreachable for want of a whole one."""
        try:
            target = URL(url, encoded=True)
            where = target.host  # parsed only now
        except ValueError as error:  # an issuer's document names a port that is no number, say
            raise Unreachable("what is to be fetched has no well-formed URL") from error
        if target.scheme not in (("https", "http") if self._plain else ("https",)) or not where:
            raise Unreachable("only https documents are fetched")
        try:
            async with asyncio.timeout(self._deadline):
                return await self._ask(method, target, ca_pem, headers, body)
        except TimeoutError as error:
            raise Unreachable(f"{where}: no complete answer within {self._deadline:g} seconds") from error
        except (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError) as error:
            raise _refused_certificate(where, error) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Unreachable(f"{where}: {_words(error)}") from error

    async def close(self) -> None:
        """Closes the session and its connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _ask(self, method: str, url: URL, ca_pem: Trust, headers: Mapping[str, str], body: bytes) -> Reply:
        # A document is fetched once an hour: a connection kept for the next time would only be found dead.
        sent = {"User-Agent": "arcbridge", **({} if self._keep else {"Connection": "close"}), **headers}
        async with self._open().request(
            method, url, data=body or None, headers=sent, ssl=self._context(ca_pem), allow_redirects=False
        ) as response:
            found, answered = await self._body(url, response), response.headers
            retry_after, max_age = (
                _seconds(answered.get("Retry-After", "")),
                _max_age(answered.get("Cache-Control", "")),
            )
            return Reply(response.status, found, retry_after, max_age, answered.get("DPoP-Nonce", ""))

    async def _body(self, url: URL, response: aiohttp.ClientResponse) -> bytes:
        if response.content_length is not None and response.content_length > self._limit and not self._cut:
            raise Unreachable(f"{url.host}: the document is larger than {self._limit} bytes")
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > self._limit and self._cut:
                return bytes(body[: self._limit])
            if len(body) > self._limit:
                raise Unreachable(f"{url.host}: the document is larger than {self._limit} bytes")
        return bytes(body)

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # No bound of its own: callers bound what they ask of one server (a key set once at a time, groups eight
                # times), and a bound for all would let a server that stalls hold up those that answer.
                connector=DialingConnector(
                    self._limit, limit=0, **({"keepalive_timeout": KEPT} if self._keep else {"force_close": True})
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=self._deadline),
                # Not True: that would also send credentials from ~/.netrc. Proxies are the connector's.
                trust_env=False,
                auto_decompress=not self._plain,
            )
        return self._session

    def _context(self, ca_pem: Trust) -> ssl.SSLContext:
        if isinstance(ca_pem, ssl.SSLContext):
            return ca_pem
        context = self._contexts.get(ca_pem)
        if context is None:
            context = trusting_context(ca_pem)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._contexts[ca_pem] = context
        return context


def _refused_certificate(where: str, error: BaseException) -> Unreachable:
    """Return why a certificate was not accepted; UntrustedCertificate only where another CA would help."""
    inner = getattr(error, "certificate_error", error)
    words, code = getattr(inner, "verify_message", "") or type(inner).__name__, getattr(inner, "verify_code", 0)
    if code not in _UNTRUSTED_CA and 0 < code < _OPENSSL_CODES:
        return Unreachable(f"{where}: its certificate is not good: {words}")
    return UntrustedCertificate(f"{where}: its certificate is not of the CA that is expected ({words})")


def _words(error: BaseException) -> str:
    """Return what the system says of an error; else the name of its class. A library's sentence may quote anything."""
    if isinstance(error, aiohttp.ServerDisconnectedError):
        return "it ended the connection without an answer"
    inner = getattr(error, "os_error", error)
    strerror = getattr(inner, "strerror", None)
    return strerror if isinstance(strerror, str) and strerror.isprintable() else type(error).__name__


def _max_age(cache_control: str) -> float | None:
    if re.search(r"\bno-(store|cache)\b", cache_control, re.IGNORECASE):
        return 0.0
    match = _MAX_AGE.search(cache_control)
    return float(match.group(1)) if match else None


def _seconds(retry_after: str) -> float | None:
    return float(retry_after) if _SECONDS.fullmatch(retry_after.strip()) else None
