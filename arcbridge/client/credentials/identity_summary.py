"""Reads the logged-in user from the tokens that are kept on this machine: no network, and nothing is verified.

It imports no event loop and no HTTP: `whoami` is asked often, by shells' prompts too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arcbridge.client.credentials.jwt_unverified import claims_unverified, read_unverified
from arcbridge.client.credentials.token_cache import TokenCache
from arcbridge.client.credentials.token_files import read_token
from arcbridge.client.relay.relay_profile import RelayProfiles, apply, login_command, organisation, short_url
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ConfigError, StateError, Unauthenticated
from arcbridge.net.address import parse_address
from arcbridge.settings.choices import PROGRAM
from arcbridge.settings.config import ClientConfig

_GROUPS = 200
"""Groups that are shown at most: a token may have thousands."""


@dataclass(frozen=True, slots=True)
class IdentitySummary:
    """A login as this machine knows it; texts are empty where the tokens do not say."""

    user: str = ""
    subject: str = ""
    issuer: str = ""
    relay: str = ""
    expires: float = 0.0
    """Unix seconds at which the present tokens end; 0: they do not say."""
    renews: bool = False
    """Whether new tokens come without the user."""
    key: str = ""
    """Thumbprint (RFC 7638) of the key that the relay's token is bound to; empty: it is a bearer token."""
    source: str = "login"
    """Where the tokens come from: `login`, `files`, `command`, `workload` or `client-credentials`."""
    groups: tuple[str, ...] = ()
    """What the identity's claim `groups` has; relay and agents may read another one."""


def summary_of(config: ClientConfig, state: StateDirectory, *, now: float | None = None) -> IdentitySummary:
    """Read who is logged in with these settings; raises Unauthenticated, which says what to do, where no user is, and
    StateError where what is kept cannot be used."""
    now = time.time() if now is None else now
    login = config.login
    relays = config.relay_urls()
    relay = short_url(parse_address(relays[0])) if relays else ""
    if login.workload or login.command:
        return IdentitySummary(relay=relay, renews=True, source="workload" if login.workload else "command")
    if login.access_token_file is not None or login.id_token_file is not None:
        file = login.access_token_file or login.id_token_file
        assert file is not None
        token = read_token(file)
        found = _described(token, token, relay)
        if found.expires and found.expires <= now:
            raise Unauthenticated(f"the token of {file} has expired; put a new one there")
        return found
    command = login_command(config, RelayProfiles(state.path))
    if not login.issuer:
        raise Unauthenticated(f"you are not logged in; run `{command if relay else 'arcbridge login https://RELAY'}`")
    if login.grant_type == PROGRAM:
        return IdentitySummary(user=login.client_id, issuer=login.issuer, relay=relay, renews=True, source=PROGRAM)
    cache = cache_of(config, state)
    tokens = cache.load()
    if not tokens:
        raise Unauthenticated(f"{cache.no_login}; run `{command}`")
    if not tokens.refresh_token and not tokens.usable(now):
        raise Unauthenticated(f"the login at {login.issuer} has ended; run `{command}`")
    found = _described(tokens.id_token or tokens.access_token, tokens.access_token, relay, cache.key_path)
    renews = bool(tokens.refresh_token)
    return replace(found, issuer=login.issuer, expires=tokens.expires_at, renews=renews, source="login")


def login_meant(config: ClientConfig, state: StateDirectory) -> list[IdentitySummary]:
    """Return the login that these settings mean, where there is one; raises StateError where it is damaged."""
    try:
        return [summary_of(config, state)]
    except (Unauthenticated, ConfigError):
        return []


def other_logins(config: ClientConfig, state: StateDirectory, warn: Callable[[str], None]) -> list[IdentitySummary]:
    """Return the logins at other relays; `warn` gets a sentence for each that is damaged. Raises StateError where the
    list of relays is."""
    meant = {parse_address(url).url for url in config.relay_urls()}
    others = []
    for profile in RelayProfiles(state.path).all():
        if meant.isdisjoint(profile.relays):
            try:
                others.append(summary_of(apply(ClientConfig(state_dir=config.state_dir), profile), state))
            except (Unauthenticated, ConfigError):
                continue
            except StateError as error:
                warn(f"the login at {profile.url} cannot be read: {error.message}")
    return others


def in_words(found: Sequence[IdentitySummary]) -> str:
    """Write logins for people: where, and as whom."""
    return ", ".join(f"{one.relay} as {one.user}" if one.user else one.relay for one in found)


def cache_of(config: ClientConfig, state: StateDirectory) -> TokenCache:
    """Return the cache in which the tokens of the configured login are kept, for these relays alone.

    Raises ConfigError where no relay is set; StateError where what is kept of it is damaged.
    """
    return TokenCache(state.token_directory, organisation(config, state), config.login)


def user_name(claims: Mapping[str, Any]) -> str:
    """Return what a person is known by: a verified e-mail address, the preferred user name, else the subject."""
    email, verified = claims.get("email"), claims.get("email_verified", True)
    for value in (email if verified is True else None, claims.get("preferred_username"), claims.get("sub")):
        if isinstance(value, str) and value:
            return value
    return ""


def _described(identity: str, access: str, relay: str, key_file: Path | None = None) -> IdentitySummary:
    """Return what the tokens say: `identity` of the person, `access` of the key."""
    said = read_unverified(identity)
    claims, key = claims_unverified(identity), _key(access, key_file)
    name, listed = user_name(claims), claims.get("groups")
    groups = tuple(one for one in listed[:_GROUPS] if isinstance(one, str)) if isinstance(listed, list) else ()
    return IdentitySummary(
        name, said.subject, said.issuer, relay, said.expires_at, key=key, source="files", groups=groups
    )


def _key(token: str, key_file: Path | None) -> str:
    """Return the thumbprint of the key that a token is bound to."""
    claims = claims_unverified(token)
    if not ({"cnf", "nonce"} & set(claims)) and "arcbridge:key:" not in str(claims.get("aud")):
        return ""
    from arcbridge.identity.proof import BindingKind, binding  # only where a key is named

    found = binding(claims)
    if found.kind is not BindingKind.NONCE:
        return found.thumbprints[0] if found.thumbprints else ""
    from arcbridge.client.credentials import proof_keys

    own = proof_keys.load(key_file) if key_file is not None else None
    return own.thumbprint if own is not None and found.names(own.thumbprint) else ""
