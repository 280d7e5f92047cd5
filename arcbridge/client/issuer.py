"""The OIDC issuer as a login sees it: discovery, and forms posted to its endpoints.

Nothing is specific to a vendor. HTTPS only, no redirects, bounded answers; the issuer that discovery names must be
the one that was configured (OpenID Connect Discovery 1.0 §4.3).
"""

from __future__ import annotations

import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from arcbridge.errors import ConfigError, StateError, Unreachable

DEADLINE = 20.0
"""Seconds for one request."""
_LIMIT = 1024 * 1024


@dataclass(frozen=True, slots=True)
class IssuerEndpoints:
    """What discovery names; empty where the issuer has none."""

    token: str
    authorization: str = ""
    device_authorization: str = ""


class IssuerError(Exception):
    """The issuer answered with an OAuth error; `code` is its word (RFC 6749 §5.2, RFC 8628 §3.5)."""

    def __init__(self, code: str, description: str = "") -> None:
        super().__init__(code)
        self.code = code
        self.description = description


class Issuer:
    """One issuer. Use as an async context manager: it owns an HTTP session."""

    def __init__(self, url: str, ca_file: Path | None = None) -> None:
        if urlsplit(url).scheme != "https" or not urlsplit(url).hostname:
            raise ConfigError(f"login.issuer: {url!r} is not an https:// URL")
        self.url = url
        self._context = _context(ca_file)
        self._session: aiohttp.ClientSession | None = None
        self._endpoints: IssuerEndpoints | None = None

    async def __aenter__(self) -> Issuer:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._context),
            timeout=aiohttp.ClientTimeout(total=DEADLINE),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=True,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def endpoints(self) -> IssuerEndpoints:
        """By discovery, once. Raises Unreachable, or ConfigError when the issuer is another one."""
        if self._endpoints is None:
            status, document = await self._request(
                "GET", self.url.rstrip("/") + "/.well-known/openid-configuration", None
            )
            if status != 200:
                raise Unreachable(f"the issuer {self.url} has no discovery document (status {status})")
            if document.get("issuer") != self.url:
                raise ConfigError(
                    f"login.issuer: {self.url} names itself differently in its discovery document; "
                    "use its own spelling, trailing slash included"
                )
            found = IssuerEndpoints(
                token=_endpoint(document, "token_endpoint"),
                authorization=_endpoint(document, "authorization_endpoint"),
                device_authorization=_endpoint(document, "device_authorization_endpoint"),
            )
            if not found.token:
                raise Unreachable(f"the issuer {self.url} names no token endpoint")
            self._endpoints = found
        return self._endpoints

    async def post(self, url: str, form: Mapping[str, str]) -> dict[str, Any]:
        """The answer to a form; raises IssuerError for an OAuth error, Unreachable for everything else."""
        status, document = await self._request("POST", url, form)
        if status == 200:
            return document
        code = document.get("error")
        if isinstance(code, str) and code:
            description = document.get("error_description")
            raise IssuerError(code[:64], description[:200] if isinstance(description, str) else "")
        raise Unreachable(f"the issuer {self.url} answered with status {status}; try again")

    async def _request(self, method: str, url: str, form: Mapping[str, str] | None) -> tuple[int, dict[str, Any]]:
        assert self._session is not None, "use `async with`"
        try:
            async with self._session.request(
                method, url, data=form, allow_redirects=False, headers={"Accept": "application/json"}
            ) as response:
                body = b""
                async for chunk in response.content.iter_chunked(65536):
                    body += chunk
                    if len(body) > _LIMIT:
                        raise Unreachable(f"the issuer {self.url} answered more than {_LIMIT} bytes")
                status = response.status
        except TimeoutError as error:
            raise Unreachable(f"the issuer {self.url} did not answer within {DEADLINE:.0f} s") from error
        except aiohttp.ClientSSLError as error:
            raise Unreachable(
                f"the issuer's certificate is not trusted for {urlsplit(url).hostname}; "
                "set login.ca_file (--oidc-ca-file)"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"the issuer {self.url} cannot be reached ({type(error).__name__})") from error
        try:
            document = json.loads(body)
        except ValueError:
            document = {}
        return status, document if isinstance(document, dict) else {}


def _endpoint(document: Mapping[str, Any], key: str) -> str:
    url = document.get(key)
    return url if isinstance(url, str) and urlsplit(url).scheme == "https" else ""


def _context(ca_file: Path | None) -> ssl.SSLContext:
    if ca_file is None:
        return ssl.create_default_context()
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError as error:
        raise ConfigError(f"login.ca_file: {ca_file} holds no PEM certificate") from error
    except OSError as error:
        raise StateError(f"login.ca_file: cannot read {ca_file}: {error.strerror}") from error
