"""Makes what every command of the client needs from its settings: tokens, relays, the rule for trust, sessions.

Nothing here prints or reads a terminal: the command line gives a `Terminal`. It connects to nothing and serves nothing,
which `commands` do. Invariant: settings that cannot work are refused before anything is sent.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from arcbridge.client.credentials.identity_summary import cache_of
from arcbridge.client.credentials.token_files import check_token
from arcbridge.client.credentials.tokens import (
    NoLogin,
    TokenCommand,
    TokenPair,
    Tokens,
    refuse_contradictions,
    with_defaults,
)
from arcbridge.client.relay.relay_profile import RelayProfiles, has_login, login_command
from arcbridge.client.relay.relays import Relays
from arcbridge.client.session.restrictions import restrictions_of
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.client.session.trust import Ask, ClusterTrust
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ConfigError, Unauthenticated
from arcbridge.pki.names import check_cluster_name
from arcbridge.pki.pins import PinStore
from arcbridge.settings.choices import PROGRAM
from arcbridge.settings.config import ClientConfig

if TYPE_CHECKING:
    # aiohttp takes a quarter of a second to import: `login` needs it, `proxy` does not.
    from arcbridge.client.credentials.login import Login, OpenBrowser, Say, Wait
    from arcbridge.identity.proof import ProofKey


@dataclass(frozen=True, slots=True)
class Terminal:
    """How a command talks to its user; given by the command line. With the defaults there is no user to talk to."""

    tell: Say = field(default=lambda line: None)
    """Shows one line of the command's own output (stdout, or stderr where stdout is data)."""
    write_data: Callable[[str], None] = field(default=lambda text: None)
    """Writes a whole document to stdout: the kubeconfig of `--file -`."""
    ask_trust: Ask | None = None
    """Asks whether a cluster's pin is right; None: the user cannot be asked."""
    may_log_in: bool = False
    """Whether a login may wait for the user."""
    waiting: Wait = field(default=lambda text, limit: nullcontext())
    """Shows that the command waits, as long as the context is entered."""
    open_browser: OpenBrowser | None = None
    """Opens a URL in a browser and returns whether it could; None: it cannot."""


class ClientContext:
    """The parts that every command of the client needs, made from its settings.

    Raises ConfigError or StateError for settings that cannot work.
    """

    def __init__(
        self,
        config: ClientConfig,
        terminal: Terminal,
        *,
        token: str = "",
        lasts: float = 0.0,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        """`lasts`: seconds after which its sessions are over; 0: as long as they may."""
        login = with_defaults(config.login)
        self.given = config
        """The settings as they were given."""
        self.config = config if login is config.login else replace(config, login=login)
        self.terminal = terminal
        self.restrictions = restrictions_of(config.restrict, math.ceil(time.time() + lasts) if lasts else 0)
        self.environment = environment
        self.state = StateDirectory.find(config.state_dir, environment)
        self.token = check_token(token.encode(), "--token") if token else ""
        refuse_contradictions(login)
        token_file = None if token else config.token_file
        self.tokens = Tokens(
            login, self._token_pair(), token=self.token, token_file=token_file, no_login=self._no_login
        )
        self.tokens.interactive = terminal.may_log_in

    def _token_pair(self) -> TokenPair | None:
        """Return what gives the tokens, by the settings alone; None: files do."""
        login, environment = self.config.login, self.environment
        if login.workload and not login.issuer:
            from arcbridge.client.credentials.workload import WorkloadTokens

            return WorkloadTokens(login, key=self._proof_key(), environment=environment)
        if login.command:
            return TokenCommand(login.command, key=self._proof_key(), environment=environment)
        if login.issuer and (login.grant_type == PROGRAM or login.workload):
            from arcbridge.client.credentials.client_credentials import ClientCredentials

            return ClientCredentials(login, key=self._proof_key(), environment=environment)
        return self.login() if login.issuer else None

    def _proof_key(self) -> ProofKey | None:
        """Return the key of the settings, which must exist; None: each source of tokens has its own."""
        if self.config.login.proof_key_file is None:
            return None
        from arcbridge.client.credentials import proof_keys

        return proof_keys.required(self.config.login.proof_key_file)

    def login(self) -> Login:
        """Return the configured OIDC login; raises ConfigError when there is none."""
        login = self.config.login
        if not login.issuer:
            raise ConfigError("login.issuer: no OIDC login is configured; give --oidc-issuer-url and --oidc-client-id")
        if login.grant_type == PROGRAM or login.workload:
            raise ConfigError("login.grant_type: client-credentials has no login; each command asks for its tokens")
        from arcbridge.client.credentials.login import Login

        cache, terminal = cache_of(self.config, self.state), self.terminal
        command = self._login_command()
        return Login(
            login,
            cache,
            say=terminal.tell,
            waiting=terminal.waiting,
            open_browser=terminal.open_browser,
            command=command,
        )

    def require_login(self) -> None:
        """Raise Unauthenticated where it is plain, without the network, that there is no token for the relay.

        A command says so before it does anything that the user would take for success.
        """
        login = self.config.login
        if not has_login(login):
            raise self._no_login()
        others = login.command or login.workload or login.access_token_file or login.id_token_file is not None
        if not others and login.grant_type != PROGRAM and not self.tokens.interactive:
            cache = cache_of(self.config, self.state)
            if not cache.load():
                raise Unauthenticated(f"{cache.no_login}; run `{self._login_command()}`")

    def _no_login(self) -> NoLogin:
        """Return the error for settings that say nowhere where tokens come from; it says where there is a login."""
        from arcbridge.client.credentials.identity_summary import in_words, other_logins

        urls, others = self.config.relay_urls(), in_words(other_logins(self.config, self.state, self.terminal.tell))
        command = self._login_command() if urls else "arcbridge login https://RELAY"
        what = "no login is configured"
        if self.tokens.token_mode:
            what = "--token and --token-file are for the cluster, and the relay needs a login of its own"
        elif urls and others:
            what = f"no login at {urls[0]}, and there is one at {others}"
        return NoLogin(
            f"{what}; run `{command}`, or give --access-token-file and --id-token-file, or --oidc-issuer-url"
        )

    def _login_command(self) -> str:
        return login_command(self.config, RelayProfiles(self.state.path))

    @cached_property
    def relays(self) -> Relays:
        """The relays of the settings; raises Unauthenticated where there are none."""
        return Relays.of(self.config, self.state.successions, self.state.path / "round-trips.json")

    def clusters(self) -> list[str]:
        """Return the clusters that were named, canonical, each once; raises ConfigError when there is none."""
        names = list(dict.fromkeys(filter(None, (self.config.cluster, *self.config.clusters))))
        if not names:
            raise ConfigError("cluster: required but not set; give --cluster NAME (`clusters` lists them)")
        for name in names:
            check_name(name)
        return names

    def session(self, cluster: str, trust: ClusterTrust | None = None) -> SessionManager:
        """Return what keeps a session to a cluster; `trust`: another rule than that of the settings."""
        return SessionManager(
            self.relays.with_own_record(cluster),
            cluster,
            self.tokens.for_cluster(cluster),
            trust or self.trust(),
            resumption=self.config.resumption,
            restrictions=self.restrictions,
        )

    def trust(self, *, first_use: bool = True) -> ClusterTrust:
        """Return the rule for clusters; without `first_use` none is trusted unseen, whatever the settings say."""
        config = self.config
        return ClusterTrust(
            pin=config.cluster_ca_pin,
            pins_file=config.pins_file,
            remembered=PinStore(self.state.pins_file, relay=self.relays.names[0]),
            first_use=config.trust_first_use and first_use,
            ask=self.terminal.ask_trust,
            relays=self.relays.names,
            successions=self.state.successions,
        )


def check_name(name: str, where: str = "flag --cluster: ") -> None:
    """Raise ConfigError, which begins with `where`, for what is no cluster's name."""
    try:
        check_cluster_name(name)
    except ConfigError as error:
        raise ConfigError(f"{where}{name[:64]!r}: {error.message}") from error


def refuse_for_several(config: ClientConfig, count: int, *settings: str) -> None:
    """Raise ConfigError for settings of one cluster where several were named."""
    for setting in settings:
        if count > 1 and getattr(config, setting):
            own = "; each keeps its own" if setting == "port" else ""
            raise ConfigError(f"flag --{setting.replace('_', '-')}: fits one cluster, but {count} were named{own}")
