"""Authenticates this client at the issuer's endpoints: with nothing, a secret, a key, or an assertion.

It makes what a form to an endpoint of the issuer needs (RFC 6749 §2.3, RFC 7523 §2.2) and
sends nothing there. Files are read, a program is run, and a job's or pod's own token is asked for
(`client.credentials.workload`), for each request, because all of them are renewed elsewhere.
Invariant: a secret, a key or an assertion is in no error, and a key never leaves this process.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote_plus

import structlog

from arcbridge.client.credentials.token_program import output_of
from arcbridge.client.credentials.tokens import is_azure_pipelines
from arcbridge.client.credentials.workload import assertion_of
from arcbridge.errors import ConfigError
from arcbridge.identity.client_assertion import asserted, one_word, read_word, sign_assertion
from arcbridge.pki.private_files import others_may_use
from arcbridge.settings.config import CLIENT_CREDENTIALS, LoginConfig

log = structlog.get_logger("arcbridge.client")


@dataclass(frozen=True, slots=True)
class IssuerEndpoints:
    """What discovery names; empty where the issuer has none."""

    token: str
    issuer: str = ""
    """The issuer's own URL."""
    authorization: str = ""
    device_authorization: str = ""
    revocation: str = ""
    """RFC 7009."""
    dpop: bool = False
    """Whether the token endpoint takes DPoP proofs with ES256 (RFC 9449 §5.1)."""
    secret_in_form: bool = False
    """Whether a client's secret belongs into the form, because the issuer takes no HTTP Basic (RFC 6749 §2.3.1)."""
    response_iss: bool = False
    """Whether the issuer announces that it names itself in its answers through the browser (RFC 9207 §3)."""


class ClientAuthentication:
    """The client of one configured login. Raises ConfigError when the settings name more than one way."""

    def __init__(
        self,
        config: LoginConfig,
        clock: Callable[[], float] = time.time,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        if not config.client_id:
            raise ConfigError("login.client_id: required with login.issuer; give --oidc-client-id ID")
        given = [f"login.{name}" for name in CLIENT_CREDENTIALS if getattr(config, name)]
        given += ["login.workload"] if is_azure_pipelines(config.workload) else []
        if len(given) > 1:
            raise ConfigError(f"{given[0]}: given together with {' and '.join(given[1:])}; an issuer takes one of them")
        if config.client_key_id and config.client_key_file is None:
            raise ConfigError("login.client_key_id: names a key, but there is none; set login.client_key_file")
        if config.client_certificate_file is not None and config.client_key_file is None:
            raise ConfigError("login.client_certificate_file: belongs to a key; set login.client_key_file")
        self._config = config
        self._clock = clock
        self._warned = False
        self._of_job = assertion_of(config, environment)
        self.confidential = bool(given)
        """Whether the client proves anything; False: a public client, known by its id alone."""

    async def proof(self, endpoints: IssuerEndpoints, url: str) -> tuple[dict[str, str], dict[str, str]]:
        """Return fields and headers that the next form to `url`, an endpoint of the issuer, needs beside its grant.

        Raises Unauthenticated, StateError.

        An assertion that is signed here is for the token endpoint where it goes there, as Entra ID and Okta want it,
        and for the issuer otherwise: a hostile issuer gets none that is good at another one (docs/threats.md#B33).
        """
        config = self._config
        if config.client_secret_file is not None:
            self._warn_of_readers(config.client_secret_file, "login.client_secret_file")
            secret = read_word(config.client_secret_file, "login.client_secret_file")
            if endpoints.secret_in_form:
                return {"client_id": config.client_id, "client_secret": secret}, {}
            # Each issuer has to know HTTP Basic (RFC 6749 §2.3.1), unless discovery offers the form alone.
            pair = f"{quote_plus(config.client_id)}:{quote_plus(secret)}"
            return {}, {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}
        if config.client_key_file is not None:
            self._warn_of_readers(config.client_key_file, "login.client_key_file")
            certificate = config.client_certificate_file
            assertion = sign_assertion(
                config.client_id,
                url if url == endpoints.token else endpoints.issuer,
                self._clock(),
                key=(config.client_key_file, "login.client_key_file"),
                certificate=None if certificate is None else (certificate, "login.client_certificate_file"),
                key_id=config.client_key_id,
            )
        elif config.client_assertion_file is not None:
            assertion = read_word(config.client_assertion_file, "login.client_assertion_file")
        elif config.client_assertion_command:
            output = await output_of("login.client_assertion_command", config.client_assertion_command)
            assertion = one_word(output, "login.client_assertion_command")
        elif self._of_job is not None:
            assertion = await self._of_job()
        else:
            return {"client_id": config.client_id}, {}
        return asserted(config.client_id, assertion), {}

    def _warn_of_readers(self, path: Path, setting: str) -> None:
        """Warn once that other users may read a secret. It is not refused: the volumes of pods are so by default."""
        try:
            others = others_may_use(path.stat())
        except OSError:
            return  # what reads the file next raises, and says why
        if others and not self._warned:
            self._warned = True
            log.warning("other users may read a secret of the client", setting=setting, instead=f"chmod 600 {path}")
