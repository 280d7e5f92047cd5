"""One HTTPS request for a token, to the service of a platform that a job or a pod runs on.

No redirects, no cookies, a bounded answer, one deadline. Invariant: nothing of what was sent or received is in an
error.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from arcbridge.errors import ConfigError, Unreachable
from arcbridge.net.system_trust import trusting_context
from arcbridge.untrusted_json import read_json_object

DEADLINE = 20.0
"""Seconds for one request."""
_LIMIT = 256 * 1024
_UNTRUSTED_CA = (18, 19, 20, 21)
"""Of x509_vfy.h: a certificate that vouches for itself, such a CA, one that is not here, and no CA at all."""
_OPENSSL_CODES = 1000
"""Above all codes of x509_vfy.h, and below those of Windows."""


async def request(
    method: str,
    url: str,
    authorization: str,
    ca_file: Path | None,
    body: Mapping[str, Any] | None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Send one request; return the status and the JSON object of the answer, empty where it is none.

    `ca_file`: the CA of the service; None: the system's. Raises Unreachable, without a word of what was sent, and
    ConfigError for a file that holds no CA.
    """
    import aiohttp  # a quarter of a second, for those who ask

    from arcbridge.net.http_connector import DialingConnector
    from arcbridge.net.http_errors import reason

    context = _trust(ca_file)
    headers = {"Authorization": authorization, "Accept": "application/json", **(headers or {})}
    host = urlsplit(url).hostname
    try:
        async with (
            aiohttp.ClientSession(
                connector=DialingConnector(ssl=context),
                timeout=aiohttp.ClientTimeout(total=DEADLINE),
                cookie_jar=aiohttp.DummyCookieJar(),
            ) as session,
            session.request(method, url, json=body, headers=headers, allow_redirects=False) as response,
        ):
            data, status = b"", response.status
            async for chunk in response.content.iter_chunked(65536):
                data += chunk
                if len(data) > _LIMIT:
                    raise Unreachable(f"{host} answered more than {_LIMIT} bytes for a token")
    except TimeoutError as error:
        raise Unreachable(f"{host} did not answer within {DEADLINE:.0f} s") from error
    except aiohttp.ClientSSLError as error:
        raise Unreachable(_tls_failure(str(host), error.__cause__, ca_file)) from error
    except (aiohttp.ClientError, OSError) as error:
        raise Unreachable(f"{host} cannot be reached for a token: {reason(error)}") from error
    return status, read_json_object(data, _LIMIT)


def _tls_failure(host: str, cause: BaseException | None, ca_file: Path | None) -> str:
    """Return why TLS failed, for the user.

    What truststore raises has the system's own codes, which say nothing here, or none.
    """
    if isinstance(cause, ssl.SSLCertVerificationError):
        code = getattr(cause, "verify_code", 0)
        if code in _UNTRUSTED_CA or not 0 < code < _OPENSSL_CODES:
            if ca_file is not None:
                return f"the certificate of {host} is not of the CA in {ca_file}"
            return (
                f"the certificate of {host} is not of a CA that is trusted for tokens; have this system trust the "
                "right one (SSL_CERT_FILE names a file of CAs)"
            )
        return f"the certificate of {host} is not good: {cause.verify_message}"
    reason = getattr(cause, "reason", "")
    if not reason and isinstance(cause, ssl.SSLError):
        reason = " ".join(map(str, cause.args))
    return f"{host} cannot be reached for a token: TLS failed ({reason or type(cause).__name__})"


def _trust(ca_file: Path | None) -> ssl.SSLContext:
    """Make a TLS context that trusts the CA of a service: in a file, or the system's. Raises ConfigError."""
    try:
        return trusting_context() if ca_file is None else ssl.create_default_context(cafile=ca_file)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{ca_file} holds no PEM certificate that can be read") from error
