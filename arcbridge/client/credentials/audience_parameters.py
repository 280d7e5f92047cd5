"""Makes the parameters of a token request that choose the access token's audience: the relay's, or one cluster's.

RFC 8707 has `resource` for it and some issuers `audience`; for others, Keycloak and Entra ID among them, the audience
follows from the scopes. This module makes parameters from the settings; it sends nothing and reads no token.
"""

from __future__ import annotations

from arcbridge.errors import ConfigError
from arcbridge.pki.names import check_cluster_name
from arcbridge.settings.config import LoginConfig

BY_PARAMETER = ("resource", "audience")
"""Values of `login.cluster_audience_by` that are themselves the parameter's name."""
BY_SCOPE = "scope"
BY_EXCHANGE = "exchange"
"""A token exchange (RFC 8693) of the login's access token."""


def for_cluster(login: LoginConfig, audience: str) -> dict[str, str]:
    """Return what asks for a token that is good for `audience`, in the way that the settings choose."""
    by, form = login.cluster_audience_by, {}
    scopes = login.cluster_scopes or (("{audience}",) if by == BY_SCOPE else ())
    if scopes:
        form["scope"] = " ".join(scope.replace("{audience}", audience) for scope in scopes)
    if by != BY_SCOPE:
        form["audience" if by == BY_EXCHANGE else by] = audience
    return form


def for_relay(login: LoginConfig) -> dict[str, str]:
    """Return what a refresh says so that the access token is the relay's; empty where the login's own is.

    It is said at each refresh, because the one before may have been for a cluster.
    """
    form = {}
    if login.relay_scopes:
        form["scope"] = " ".join(login.relay_scopes)
    if login.cluster_audience and login.audience and login.cluster_audience_by in BY_PARAMETER:
        form[login.cluster_audience_by] = login.audience
    return form


def is_clusters(audience: str, pattern: str) -> bool:
    """Return whether an audience is that of any cluster by `login.cluster_audience`, which may have `{cluster}` in it
    once or more."""
    before, placeholder, _ = pattern.partition("{cluster}")
    if not placeholder:
        return audience == pattern
    # More than one placeholder stands for the same name, whose length follows from that of the rest.
    name_length, rest = divmod(len(audience) - len(pattern.replace("{cluster}", "")), pattern.count("{cluster}"))
    name = audience[len(before) : len(before) + name_length]
    if rest or name_length < 1 or audience != pattern.replace("{cluster}", name):
        return False
    try:
        check_cluster_name(name)
    except ConfigError:
        return False
    return True


def overlap(one: str, other: str) -> bool:
    """Return whether two audiences, each of which may be a pattern for clusters, can be the same one."""
    return is_clusters(one.replace("{cluster}", "c"), other) or is_clusters(other.replace("{cluster}", "c"), one)
