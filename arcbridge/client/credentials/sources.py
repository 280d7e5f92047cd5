"""Chooses where a client's tokens come from, by its settings: a login, a program, a job's platform, or files.

It asks for no token itself, and for no login. Invariant: a source is chosen by the settings alone, so that a command
says before any request what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from arcbridge.client.credentials.identity_summary import cache_of
from arcbridge.client.credentials.token_cache import TokenCache
from arcbridge.client.credentials.tokens import TokenCommand, TokenPair, Tokens, refuse_contradictions
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ConfigError, Unauthenticated
from arcbridge.settings.choices import PROGRAM
from arcbridge.settings.config import ClientConfig

if TYPE_CHECKING:
    # aiohttp takes a quarter of a second to import: `login` needs it, `proxy` does not.
    from arcbridge.client.credentials.login import Login, OpenBrowser, Say
    from arcbridge.identity.proof import ProofKey


class TokenSources:
    """The sources that the settings of one client name."""

    def __init__(
        self,
        config: ClientConfig,
        state: StateDirectory,
        environment: Mapping[str, str],
        *,
        token: str,
        interactive: bool,
        say: Say,
        open_browser: OpenBrowser | None,
    ) -> None:
        """`token`: the cluster's, where it is in no file; `interactive`: whether a login may wait for the user; `say`
        shows a line of it; `open_browser` opens a URL, None: the system's own browser. Raises ConfigError, StateError.
        """
        refuse_contradictions(config.login)
        self._config = config
        self._state = state
        self._environment = environment
        self._say = say
        self._open_browser = open_browser
        token_file = None if token else config.token_file
        self.tokens = Tokens(config.login, self._pair(), token=token, token_file=token_file)
        self.tokens.interactive = interactive

    def require_login(self) -> None:
        """Raise Unauthenticated where it is plain, without the network, that there is no token for the relay.

        A command says so before it does anything that the user would take for success.
        """
        login = self._config.login
        if login.command or login.workload or login.access_token_file is not None or login.id_token_file is not None:
            return
        if not login.issuer:
            raise Unauthenticated(self._no_login())
        if login.grant_type != PROGRAM and not self.tokens.interactive:
            cache = self.cache()
            kept = cache.load()
            if not (kept.refresh_token or kept.access_token or kept.id_token):
                raise Unauthenticated(f"{cache.no_login}; run `{self.login_command()}`")

    def _no_login(self) -> str:
        what = "no login is configured"
        if self.tokens.token_mode:
            what = "--token and --token-file are for the cluster, and the relay needs a login of its own"
        command = self.login_command() if self._config.relay_urls() else "arcbridge login https://RELAY"
        return f"{what}; run `{command}`, or give --access-token-file and --id-token-file, or --oidc-issuer-url"

    def login_command(self) -> str:
        """Return the command that logs in with these settings, for messages."""
        from arcbridge.client.relay.relay_profile import RelayProfiles, login_command

        return login_command(self._config, RelayProfiles(self._state.path))

    def _pair(self) -> TokenPair | None:
        login = self._config.login
        if login.workload and not login.issuer:
            from arcbridge.client.credentials.workload import WorkloadTokens

            return WorkloadTokens(login, key=self._key(), environment=self._environment)
        if login.command:
            return TokenCommand(login.command, key=self._key(), environment=self._environment)
        if login.issuer and (login.grant_type == PROGRAM or login.workload):
            from arcbridge.client.credentials.client_credentials import ClientCredentials

            return ClientCredentials(login, key=self._key(), environment=self._environment)
        return self.login() if login.issuer else None

    def _key(self) -> ProofKey | None:
        """Return the key of the settings, which must exist; None: each source of tokens has its own."""
        file = self._config.login.proof_key_file
        if file is None:
            return None
        from arcbridge.client.credentials import proof_keys

        key = proof_keys.load(file, of_settings=True)
        if key is None:
            raise ConfigError(f"login.proof_key_file: {file} does not exist; `arcbridge --role client key` makes it")
        return key

    def login(self) -> Login:
        """Return the configured OIDC login; raises ConfigError when there is none."""
        login = self._config.login
        if not login.issuer:
            raise ConfigError("login.issuer: no OIDC login is configured; give --oidc-issuer-url and --oidc-client-id")
        if login.grant_type == PROGRAM or login.workload:
            raise ConfigError("login.grant_type: client-credentials has no login; each command asks for its tokens")
        from arcbridge.client.credentials.login import Login

        command = self.login_command()
        return Login(login, self.cache(), say=self._say, open_browser=self._open_browser, command=command)

    def cache(self) -> TokenCache:
        """Return where the tokens of the configured login are kept."""
        return cache_of(self._config, self._state)
