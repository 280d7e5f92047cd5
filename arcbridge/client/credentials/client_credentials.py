"""Tokens of a program and no person: the grant `client_credentials` (RFC 6749 §4.4), for pipelines and daemons.

Each audience is asked for on its own, and each token is kept in this process's memory until it grows old; there is no
refresh token, and nothing is written. How the client proves who it is has `client.credentials.client_authentication`.
Invariant: a token for a cluster is handed out only if it has the audience that was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from arcbridge.client.credentials import audience_parameters
from arcbridge.client.credentials.client_authentication import ClientAuthentication
from arcbridge.client.credentials.issuer import Issuer, IssuerError
from arcbridge.client.credentials.jwt_unverified import read_unverified
from arcbridge.client.credentials.token_cache import MemoryTokens, TokenSet, token_set
from arcbridge.errors import ConfigError, Unauthenticated, Unreachable
from arcbridge.identity.proof import ProofKey
from arcbridge.settings.config import LoginConfig

WRONG_KEPT = 60.0
"""Seconds for which a token with another audience is kept at most: the issuer may be set up for the right one."""


class ClientCredentials(MemoryTokens):
    """The tokens of one configured client. Raises ConfigError for settings that cannot work."""

    def __init__(
        self,
        config: LoginConfig,
        *,
        key: ProofKey | None = None,
        clock: Callable[[], float] = time.time,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__(key, clock)
        self._authentication = ClientAuthentication(config, clock, environment)
        if not self._authentication.confidential:
            raise ConfigError(
                "login.grant_type: client-credentials needs the credentials of the client; set "
                "login.client_secret_file, client_key_file, client_assertion_file, client_assertion_command, "
                "client_assertion_workload or workload"
            )
        by = (*audience_parameters.BY_PARAMETER, audience_parameters.BY_SCOPE)
        if config.cluster_audience and config.cluster_audience_by not in by:
            raise ConfigError(f"login.cluster_audience_by: must be one of {', '.join(by)} with client-credentials")
        self._config = config

    async def _ask(self, audience: str) -> TokenSet:
        config = self._config
        wanted = audience_parameters.for_relay(config)
        if audience:
            wanted = audience_parameters.for_cluster(config, audience)
        elif config.audience:
            wanted.setdefault("audience", config.audience)
        async with Issuer(config, self._authentication, key=self._own_key, clock=self._clock) as issuer:
            try:
                answer = await issuer.ask({"grant_type": "client_credentials", **wanted})
            except IssuerError as error:
                raise Unauthenticated(
                    f"the issuer gives the client {config.client_id} no token ({error.words})"
                ) from error
        tokens = token_set(answer, self._clock())
        if not tokens.access_token:
            raise Unreachable(f"the issuer {config.issuer} answered without an access token")
        if audience and audience not in read_unverified(tokens.access_token).audiences:
            ends = tokens.obtained_at + WRONG_KEPT
            tokens = replace(tokens, expires_at=min(tokens.expires_at or ends, ends))
        return replace(tokens, id_token="") if audience else tokens

    async def for_audience(self, audience: str, *, interactive: bool, force: bool = False) -> TokenSet:
        # Behind the keeping: an issuer that gives the wrong one is not asked at each call.
        tokens = await super().for_audience(audience, interactive=interactive, force=force)
        if audience and audience not in read_unverified(tokens.access_token).audiences:
            raise ConfigError(
                f"login.cluster_audience: the issuer's token for {audience} has another audience; have the issuer set "
                "up for it (docs/security.md), or change the setting"
            )
        return tokens
