"""Makes the answer of `GET /v1/login`, from which clients learn where they log in.

It is made from the settings once, at the start, and holds no secret: an issuer's public client has none. It names no CA
for the issuer: a relay that could would stand in for any issuer. A client shows its user the issuer, keeps the
whole answer, and takes no other one without asking (`client.relay.relay_profile`).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from arcbridge.errors import ConfigError
from arcbridge.net.address import check_origins, issuer_origin
from arcbridge.settings.choices import AUDIENCE_BY, GRANTS
from arcbridge.settings.config import RelayLoginConfig


def login_document(config: RelayLoginConfig) -> dict[str, Any] | None:
    """Return the answer, None where the settings name no issuer; raises `ConfigError`, which names the setting."""
    if not config.issuer:
        if config.client_id:
            raise ConfigError("login.issuer: required with login.client_id; the https:// URL at which people log in")
        return None
    try:
        issuer_origin(config.issuer, "login.issuer")
    except ConfigError as error:
        raise ConfigError(f"{error.message}; clients refuse it") from None
    if not config.client_id:
        raise ConfigError("login.client_id: required with login.issuer; the id of the public client at the issuer")
    check_origins("login.issuer_origins", config.issuer_origins)
    if config.cluster_audience_by not in AUDIENCE_BY:
        raise ConfigError(f"login.cluster_audience_by: must be one of {', '.join(AUDIENCE_BY)}")
    if config.cluster_audience and "{cluster}" not in config.cluster_audience:
        raise ConfigError(
            "login.cluster_audience: must have {cluster} in it; clients refuse one that a relay names for all "
            "clusters, so leave it out and give it to them in their own settings"
        )
    unknown = [grant for grant in config.grant_types if grant not in GRANTS]
    if unknown or not config.grant_types:
        raise ConfigError(f"login.grant_types: each must be one of {', '.join(GRANTS)}, and there must be one")
    if config.cluster_audience and config.cluster_audience_by == "scope" and not config.relay_scopes:
        raise ConfigError(
            "login.relay_scopes: required with login.cluster_audience_by = scope; name the scopes of a token that is "
            "good at the relay alone"
        )
    if config.cluster_scopes and not config.cluster_audience:
        raise ConfigError("login.cluster_scopes: needs login.cluster_audience, whose token they are asked for with")
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
