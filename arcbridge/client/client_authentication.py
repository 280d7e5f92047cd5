"""How this program proves to the issuer that it is the client it says: with nothing, a secret, a key, or an assertion.

It makes what a form to the token endpoint or device authorization endpoint needs (RFC 6749 §2.3, RFC 7523 §2.2) and
sends nothing. Files are read, and a program is run, for each request, because other programs renew what they hold.
Invariant: a secret, a key or an assertion is in no error, and a key never leaves this process.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import quote_plus

import structlog

from arcbridge.client.azure_pipelines import AzurePipelines, is_azure_pipelines
from arcbridge.client.issuer import ClientProof, IssuerEndpoints
from arcbridge.client.token_program import output_of
from arcbridge.config import LoginConfig
from arcbridge.errors import ConfigError, StateError, Unauthenticated
from arcbridge.pki.private_files import others_may_use

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
ASSERTION_LIFE = 60.0
"""Seconds from `iat` to `exp` of an assertion that is made here: Keycloak and others refuse more."""
_FILE_LIMIT = 64 * 1024
log = structlog.get_logger("arcbridge.client")

_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}


class ClientAuthentication:
    """The client of one configured login. Raises ConfigError when the settings name more than one way."""

    def __init__(
        self,
        config: LoginConfig,
        clock: Callable[[], float] = time.time,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        ways = {
            "client_secret_file": config.client_secret_file,
            "client_key_file": config.client_key_file,
            "client_assertion_file": config.client_assertion_file,
            "client_assertion_command": config.client_assertion_command,
            "workload": is_azure_pipelines(config.workload),
        }
        given = [f"login.{name}" for name, value in ways.items() if value]
        if len(given) > 1:
            raise ConfigError(f"{given[0]}: given together with {' and '.join(given[1:])}; an issuer takes one of them")
        if config.client_key_id and config.client_key_file is None:
            raise ConfigError("login.client_key_id: names a key, but there is none; set login.client_key_file")
        self._config = config
        self._clock = clock
        self._warned = False
        self._job: AzurePipelines | None = None
        if ways["workload"]:
            self._job = AzurePipelines.of(config.workload, environment, config.ca_file)
        self.confidential = bool(given)
        """Whether the client proves anything; False: a public client, known by its id alone."""

    async def proof(self, endpoints: IssuerEndpoints) -> ClientProof:
        """Return what the next request to an endpoint of the issuer needs. Raises Unauthenticated, StateError."""
        config = self._config
        if config.client_secret_file is not None:
            self._warn_of_readers(config.client_secret_file, "login.client_secret_file")
            return self._secret(endpoints, _text(config.client_secret_file, "login.client_secret_file"))
        if config.client_key_file is not None:
            self._warn_of_readers(config.client_key_file, "login.client_key_file")
            return self._asserted(self._signed(endpoints.token, config.client_key_file))
        if config.client_assertion_file is not None:
            return self._asserted(_text(config.client_assertion_file, "login.client_assertion_file"))
        if config.client_assertion_command:
            output = await output_of("login.client_assertion_command", config.client_assertion_command)
            return self._asserted(_one_word(output, "login.client_assertion_command"))
        if self._job is not None:
            return self._asserted(await self._job.assertion())
        return ClientProof({"client_id": config.client_id}, {})

    def _warn_of_readers(self, path: Path, setting: str) -> None:
        """Say once that other users may read a secret. It is not refused: the volumes of pods are so by default."""
        try:
            others = others_may_use(path.stat())
        except OSError:
            return  # reading it says why
        if others and not self._warned:
            self._warned = True
            log.warning("other users may read a secret of the client", setting=setting, instead=f"chmod 600 {path}")

    def _secret(self, endpoints: IssuerEndpoints, secret: str) -> ClientProof:
        """HTTP Basic, which each issuer has to know (RFC 6749 §2.3.1), unless discovery offers the form alone."""
        if endpoints.secret_in_form:
            return ClientProof({"client_id": self._config.client_id, "client_secret": secret}, {})
        pair = f"{quote_plus(self._config.client_id)}:{quote_plus(secret)}"
        return ClientProof({}, {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"})

    def _asserted(self, assertion: str) -> ClientProof:
        form = {"client_assertion_type": ASSERTION_TYPE, "client_assertion": assertion}
        return ClientProof({"client_id": self._config.client_id, **form}, {})

    def _signed(self, audience: str, path: Path) -> str:
        """An assertion of our own (private_key_jwt), for the token endpoint and for one minute."""
        import jwt

        key, algorithm = _private_key(path)
        now = int(self._clock())
        claims = {
            "iss": self._config.client_id,
            "sub": self._config.client_id,
            "aud": audience,
            "jti": secrets.token_urlsafe(16),
            "iat": now,
            "exp": now + int(ASSERTION_LIFE),
        }
        headers = {"kid": self._config.client_key_id} if self._config.client_key_id else None
        return jwt.encode(claims, key, algorithm, headers)


def _private_key(path: Path) -> tuple[Any, str]:
    """The key in a PEM file and the algorithm that fits it. Raises Unauthenticated, ConfigError, StateError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read(path, "login.client_key_file")
    try:
        key = load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        # Not chained: the cause could quote the key.
        raise ConfigError(f"login.client_key_file: {path} holds no private key in PEM without a password") from None
    except UnsupportedAlgorithm:
        key = None
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        return key, "RS256"
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        return key, _CURVES[key.curve.name]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key, "EdDSA"
    raise ConfigError(
        f"login.client_key_file: the key in {path} cannot sign for an issuer; it has to be RSA of 2048 bits or more, "
        "P-256, P-384, P-521 or Ed25519"
    )


def _text(path: Path, setting: str) -> str:
    return _one_word(_read(path, setting), f"{setting}: {path}")


def _one_word(data: bytes, source: str) -> str:
    """The one text in `data`, without the line's end. Raises Unauthenticated."""
    try:
        text = data.decode().strip("\r\n")
    except UnicodeDecodeError:
        text = ""
    if not text or "\n" in text or "\r" in text or "\0" in text:
        raise Unauthenticated(f"{source} does not give one line of text")
    return text


def _read(path: Path, setting: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_FILE_LIMIT + 1)
    except FileNotFoundError as error:
        raise Unauthenticated(f"{setting}: {path} does not exist") from error
    except OSError as error:
        raise StateError(f"{setting}: cannot read {path}: {error.strerror}") from error
    if len(data) > _FILE_LIMIT:
        raise StateError(f"{setting}: {path} holds more than {_FILE_LIMIT // 1024} KiB")
    return data
