"""Chooses where a client's tokens come from, by its settings: a login, a program, a job's platform, or files.

It asks for no token itself, and for no login. Invariant: a source is chosen by the settings alone, so that a command
says before any request what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from arcbridge.client.credentials.identity_summary import cache_of
from arcbridge.client.credentials.tokens import TokenCommand, TokenPair, Tokens
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ConfigError, Unauthenticated
from arcbridge.settings.choices import PROGRAM
from arcbridge.settings.config import ClientConfig, LoginConfig

if TYPE_CHECKING:
    # aiohttp takes a quarter of a second to import: `login` needs it, `proxy` does not.
    from arcbridge.client.credentials.login import Login, OpenBrowser, Say
    from arcbridge.identity.proof import ProofKey


def token_pair(
    config: ClientConfig,
    state: StateDirectory,
    environment: Mapping[str, str],
    *,
    say: Say,
    open_browser: OpenBrowser | None,
) -> TokenPair | None:
    """Return what gives the tokens of these settings; None: files do. `say`, `open_browser`: as for `login_of`.

    Raises ConfigError for settings that cannot work, StateError.
    """
    login = config.login
    if login.workload and not login.issuer:
        from arcbridge.client.credentials.workload import WorkloadTokens

        return WorkloadTokens(login, key=_key(login), environment=environment)
    if login.command:
        return TokenCommand(login.command, key=_key(login), environment=environment)
    if login.issuer and (login.grant_type == PROGRAM or login.workload):
        from arcbridge.client.credentials.client_credentials import ClientCredentials

        return ClientCredentials(login, key=_key(login), environment=environment)
    return login_of(config, state, say=say, open_browser=open_browser) if login.issuer else None


def login_of(config: ClientConfig, state: StateDirectory, *, say: Say, open_browser: OpenBrowser | None) -> Login:
    """Return the configured OIDC login; raises ConfigError when there is none. `say` shows a line of it to the user;
    `open_browser` opens a URL, None: the system's own browser."""
    login = config.login
    if not login.issuer:
        raise ConfigError("login.issuer: no OIDC login is configured; give --oidc-issuer-url and --oidc-client-id")
    if login.grant_type == PROGRAM or login.workload:
        raise ConfigError("login.grant_type: client-credentials has no login; each command asks for its tokens")
    from arcbridge.client.credentials.login import Login

    command = _login_command(config, state)
    return Login(login, cache_of(config, state), say=say, open_browser=open_browser, command=command)


def require_login(config: ClientConfig, state: StateDirectory, tokens: Tokens) -> None:
    """Raise Unauthenticated where it is plain, without the network, that there is no token for the relay.

    A command says so before it does anything that the user would take for success.
    """
    login = config.login
    if login.command or login.workload or login.access_token_file is not None or login.id_token_file is not None:
        return
    if not login.issuer:
        what = "no login is configured"
        if tokens.token_mode:
            what = "--token and --token-file are for the cluster, and the relay needs a login of its own"
        command = _login_command(config, state) if config.relay_urls() else "arcbridge login https://RELAY"
        raise Unauthenticated(
            f"{what}; run `{command}`, or give --access-token-file and --id-token-file, or --oidc-issuer-url"
        )
    if login.grant_type != PROGRAM and not tokens.interactive:
        cache = cache_of(config, state)
        kept = cache.load()
        if not (kept.refresh_token or kept.access_token or kept.id_token):
            raise Unauthenticated(f"{cache.no_login}; run `{_login_command(config, state)}`")


def _login_command(config: ClientConfig, state: StateDirectory) -> str:
    """Return the command that logs in with these settings, for messages."""
    from arcbridge.client.relay.relay_profile import RelayProfiles, login_command

    return login_command(config, RelayProfiles(state.path))


def _key(login: LoginConfig) -> ProofKey | None:
    """Return the key of the settings, which must exist; None: each source of tokens has its own."""
    if login.proof_key_file is None:
        return None
    from arcbridge.client.credentials import proof_keys

    return proof_keys.required(login.proof_key_file)
