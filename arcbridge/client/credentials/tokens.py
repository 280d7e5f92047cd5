"""Chooses the token for each end: an access token for the relay, an id token (or a ServiceAccount's) for the cluster.

The relay sees the first and must not be able to use it at the cluster. Invariant: neither is handed out while both are
the same text, wherever they come from, unless `login.one_token` says so; then a warning says what that means
(docs/threats.md#T10). Audiences are compared only where `login.cluster_audience` names the cluster's. Files are read at
every use, because other programs refresh them.

Where `login.cluster_audience` is set, each cluster has a token of its own, which `for_cluster` keeps apart. Tokens may
be bound to a key of this client (`identity.proof`); `prove` shows that they are this client's.
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import structlog

from arcbridge.client.credentials.jwt_unverified import claims_unverified, positive, read_unverified
from arcbridge.client.credentials.token_cache import MemoryTokens, TokenSet, token_set
from arcbridge.client.credentials.token_files import read_token
from arcbridge.client.credentials.token_program import output_of
from arcbridge.errors import ArcbridgeError, ConfigError, Unauthenticated, Unreachable
from arcbridge.settings.choices import PROGRAM
from arcbridge.settings.config import LoginConfig
from arcbridge.untrusted_json import read_json_object

if TYPE_CHECKING:
    # Imported late otherwise, because a client whose tokens are bound to no key never needs it.
    from arcbridge.identity.proof import ProofKey

T = TypeVar("T")

log = structlog.get_logger("arcbridge.client")


@dataclass(frozen=True, slots=True)
class ClusterToken:
    """What AUTH carries: `kind` is `oidc` or `bearer`; `expires_at` unix seconds, 0 when the token does not say."""

    kind: str
    text: str = field(repr=False)
    expires_at: float = 0.0


class NoLogin(Unauthenticated):
    """No setting says where tokens come from, and at the relay that is meant there is no login."""

    about = ("relay", "relays")
    """The settings that say which relay is meant; the command line says where they come from."""


class TokenExpired(Unauthenticated):
    """A token that was given as a text or in a file is over."""


class OneToken(ConfigError):
    """The relay's token is the cluster's, or is good there too, and the settings do not allow that."""

    status_code = 403
    reason = "Forbidden"


class TokenPair(Protocol):
    """What gives the tokens: a login, a command, a workload's surroundings. `force`: not those it has kept."""

    @property
    def key(self) -> ProofKey | None:
        """The key to which its tokens are bound; None: they are bound to none that it knows of. Raises StateError."""
        ...

    async def tokens(self, *, interactive: bool, force: bool = False) -> TokenSet:
        """Return the relay's and the cluster's token together."""
        ...

    async def for_audience(self, audience: str, *, interactive: bool, force: bool = False) -> TokenSet:
        """Return a token for `audience`, which is one cluster's."""
        ...


RELAY_AUDIENCE = "arcbridge-relay"
CLUSTER_AUDIENCE = "arcbridge-{cluster}"


def is_azure_pipelines(workload: str) -> bool:
    """Return whether `login.workload` is this one: `azure-pipelines` or `azure-pipelines:SERVICE-CONNECTION-ID`."""
    return workload.partition(":")[0] == "azure-pipelines"


def with_defaults(login: LoginConfig) -> LoginConfig:
    """Return the settings with the usual audiences where a workload's tokens need some and none are set.

    A workload that is a client of an issuer has that issuer's audiences.
    """
    if not login.workload or login.issuer:
        return login
    return replace(
        login, audience=login.audience or RELAY_AUDIENCE, cluster_audience=login.cluster_audience or CLUSTER_AUDIENCE
    )


def refuse_contradictions(login: LoginConfig) -> None:
    """Raise ConfigError where one setting would silently take the place of another."""
    contradictions = (
        # The file's one token would be shown at every cluster, which is what the audience is there to prevent.
        ("cluster_audience", "id_token_file", bool(login.cluster_audience and login.id_token_file)),
        ("workload", "command", bool(login.workload and login.command)),
        ("workload", "issuer", bool(login.workload and login.issuer) and not is_azure_pipelines(login.workload)),
    )
    for one, other, given in contradictions:
        if given:
            raise ConfigError(f"login.{one}: given together with login.{other}; take one of them out")
    if is_azure_pipelines(login.workload) and not login.issuer:
        # Its token has one audience, which is the issuer's: relay and cluster would be given the same token.
        raise ConfigError(
            "login.workload: azure-pipelines needs login.issuer and login.client_id, where its token is traded in "
            "(docs/how-to/ci.md)"
        )
    if login.grant_type == PROGRAM and not login.issuer:
        raise ConfigError("login.grant_type: client-credentials needs login.issuer; give --oidc-issuer-url URL")
    if login.cluster_scopes and not login.cluster_audience:
        raise ConfigError("login.cluster_scopes: needs login.cluster_audience, whose token they are asked for with")


class Tokens:
    """The tokens of one client. `access` and `cluster` raise Unauthenticated or OneToken, which say what to do."""

    def __init__(
        self,
        login: LoginConfig,
        pair: TokenPair | None,
        *,
        token: str = "",
        token_file: Path | None = None,
        clock: Callable[[], float] = time.time,
        no_login: Callable[[], NoLogin] = lambda: NoLogin("no login is configured"),
    ) -> None:
        """`no_login`: makes the error for settings that say nowhere where tokens come from."""
        self._login = login
        self._no_login = no_login
        self._pair = pair
        self._token = token
        self._token_file = token_file
        self._clock = clock
        self._cluster = ""
        self._refused = False
        self._audience_refused = False
        self._shown = ""  # what the relay was given last
        self._warned = False
        self.interactive = False
        """Whether the user may be asked to log in now; set by the command, which knows whether there is a terminal."""

    @property
    def token_mode(self) -> bool:
        """Whether the cluster gets the caller's own bearer token."""
        return bool(self._token or self._token_file)

    @property
    def access_source(self) -> str:
        """The file of the relay's token; empty where it comes from a login or a command."""
        return str(self._login.access_token_file or "")

    @property
    def cluster_source(self) -> str:
        """The file of the cluster's token; empty where it comes from a login or a command."""
        return str(self._token_file or self._login.id_token_file or "")

    def for_cluster(self, cluster: str) -> Tokens:
        """Return the same sources for one cluster, with a memory of its own of what was shown and what was refused."""
        found = copy(self)
        found._cluster = cluster
        found._shown = ""
        return found

    async def access(self) -> str:
        """Return the token for the relay."""
        try:
            token, source = await self._relay_token()
        except Unauthenticated:
            # There is no login any more. What was refused belongs to the former one: the next one's tokens are new.
            self._shown = ""
            self._refused = self._audience_refused = False
            raise
        try:
            other = (await self._cluster_token()).text if self._cluster or not self._audience() else ""
        except ArcbridgeError:
            other = ""  # `cluster` says why, and compares then
        self._keep_apart(token, other, source)
        if self._audience():
            self._refuse_for_both(token)
        self._shown = token
        return token

    async def cluster(self) -> ClusterToken:
        """Return the token for the cluster."""
        token = await self._cluster_token()
        if self._login.require_bound and self._key_of(token.text) is None:
            raise Unauthenticated(
                "the token for the cluster is bound to no key of this client (login.require_bound): see "
                "docs/security.md for how your issuer can bind tokens"
            )
        if self._shown:
            self._keep_apart(token.text, self._shown, "the relay has it already")
        return token

    def prepare(self) -> None:
        """Import in a thread what `prove` needs, which takes 40 ms once: meanwhile the relay is being connected to.

        Raises StateError where a key cannot be used.
        """
        if "arcbridge.identity.p256" not in sys.modules and any(True for _ in self._keys()):
            asyncio.get_running_loop().run_in_executor(None, importlib.import_module, "arcbridge.identity.p256")

    def prove(self, token: str, certificate: bytes, pin: str = "") -> str:
        """Return the proof that `token` is this client's, towards the peer that showed `certificate` (DER); `pin`: of
        the cluster, empty towards a relay. Empty where the token is bound to none of this client's keys.

        Raises StateError where a key cannot be used, Unreachable for a certificate that cannot be read.
        """
        key = self._key_of(token)
        if key is None:
            return ""
        from arcbridge.identity.proof import spki_of

        try:
            spki = spki_of(certificate)
        except ValueError as error:
            raise Unreachable(
                "the certificate of the other end cannot be read, so that no proof can be made for it; "
                "have it issued anew, or use a token that is bound to no key"
            ) from error
        return key.sign_proof(token, spki, pin, self._clock())

    @property
    def were_shown(self) -> bool:
        """Whether a token of the present login was shown to the relay."""
        return bool(self._shown)

    def refused(self) -> None:
        """Get new tokens next time, even if the kept ones look fresh: the other end did not take one."""
        self._refused = self._audience_refused = True

    def _key_of(self, token: str) -> ProofKey | None:
        """Return the one of this client's keys to which a token is bound; None: it is bound to none of them."""
        for key in self._keys():
            from arcbridge.identity.proof import binding

            if binding(claims_unverified(token)).names(key.thumbprint):
                return key
        return None

    def _keys(self) -> Iterator[ProofKey]:
        if self._pair is not None and (own := self._pair.key) is not None:
            yield own
        if self._login.proof_key_file is not None:
            from arcbridge.client.credentials import proof_keys

            if (key := proof_keys.load(self._login.proof_key_file)) is not None:
                yield key

    async def retry_once(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Do `attempt`, and once more where an end refused the token that it was shown and there may be another.

        A login keeps tokens for as long as they last, and its issuer may have taken back the key that signed them.
        """
        try:
            return await attempt()
        except Unauthenticated:
            if self._pair is None or not self._shown:
                raise
            self.refused()
            return await attempt()

    async def _relay_token(self) -> tuple[str, str]:
        """Return the relay's token, and where it comes from."""
        login = self._login
        if login.access_token_file is not None:
            return self._read(login.access_token_file)
        if self._pair is not None:
            tokens = await self._tokens(self._pair)
            if tokens.access_token:
                return tokens.access_token, "the login gives it for both"
            return tokens.id_token, "the login gives no access token"
        if login.id_token_file is not None:
            return self._read(login.id_token_file)
        raise self._no_login()

    async def _cluster_token(self) -> ClusterToken:
        if self._token_file is not None:
            return _cluster_token("bearer", self._read(self._token_file)[0])
        if self._token:
            return _cluster_token("bearer", self._current(self._token, "--token"))
        if self._login.id_token_file is not None:
            return _cluster_token("oidc", self._read(self._login.id_token_file)[0])
        if self._pair is not None and (audience := self._audience()):
            force, self._audience_refused = self._audience_refused, False
            one = await self._pair.for_audience(audience, interactive=self.interactive, force=force)
            return ClusterToken("oidc", one.id_token or one.access_token, one.expires_at)
        if self._pair is not None:
            tokens = await self._tokens(self._pair)
            return _cluster_token("oidc", tokens.id_token or tokens.access_token)
        return _cluster_token("oidc", (await self._relay_token())[0])

    def cluster_at_hand(self) -> str:
        """Return the token that `cluster` would give if a file or flag has it; empty where a login or command would be
        asked.

        It has no effect and raises nothing.
        """
        file = self._token_file or (None if self._token else self._login.id_token_file)
        if file is None:
            return self._token
        try:
            return read_token(file)
        except ArcbridgeError:
            return ""

    def _audience(self) -> str:
        """Return the audience that the cluster's token has to have; empty: every cluster gets the same token."""
        return self._login.cluster_audience.replace("{cluster}", self._cluster)

    def _refuse_for_both(self, token: str) -> None:
        """Refuse, or warn of, a token for the relay that the agent of any cluster would take."""
        from arcbridge.client.credentials.audience_parameters import is_clusters
        from arcbridge.identity.proof import place_of

        pattern, own = self._login.cluster_audience, self._login.audience or RELAY_AUDIENCE
        # The usual audience of the relay is of the usual pattern, too; and `{cluster}` alone is of any audience.
        tells = pattern != "{cluster}"
        found = [
            one
            for one in map(place_of, read_unverified(token).audiences)
            if one == self._audience() or (tells and one != own and is_clusters(one, pattern))
        ]
        if found:
            self._refuse_or_warn(
                f"the token for the relay has the audience of a cluster as well ({found[0]}), so the relay could act "
                "as you in the cluster; have the issuer give a token for the relay alone (login.relay_scopes, "
                "login.audience)"
            )

    def _keep_apart(self, token: str, other: str, source: str) -> None:
        """Refuse, or warn of, a token that the other end gets too."""
        if token == other:
            self._refuse_or_warn(
                f"relay and cluster would get the same token ({source}), with which the relay could act as you in the "
                "cluster; give a token of its own for each (login.cluster_audience, where the issuer gives one for "
                "each audience; --access-token-file and --id-token-file; or both from login.command)"
            )

    def _refuse_or_warn(self, what: str) -> None:
        if not self._login.one_token:
            raise OneToken(f"{what}, or set one_token = true under [login] if you accept that")
        if not self._warned:
            self._warned = True
            log.warning(
                "one token serves relay and cluster",
                meaning="the relay could act as you in the cluster",
                instead="give a token of its own for each: --access-token-file and --id-token-file",
            )

    def _read(self, path: Path) -> tuple[str, str]:
        return self._current(read_token(path), str(path)), str(path)

    async def _tokens(self, pair: TokenPair) -> TokenSet:
        tokens = await pair.tokens(interactive=self.interactive, force=self._refused)
        self._refused = False
        return tokens

    def _current(self, token: str, source: str) -> str:
        expires_at = read_unverified(token).expires_at
        if expires_at and expires_at <= self._clock():
            raise TokenExpired(f"the token of {source} has expired; put a new one there")
        return token


class TokenCommand(MemoryTokens):
    """`login.command`: a program that prints both tokens as JSON; its answer is kept until it grows old.

    It finds in its environment what can bind tokens to this process's key: the key's thumbprint (RFC 7638), and the
    audience and the nonce that name it. With `login.cluster_audience` it is run for each cluster besides, with the
    audience that is wanted; what it prints as id token then (or as access token, where that is all) is for the cluster.
    """

    def __init__(
        self,
        command: tuple[str, ...],
        *,
        key: ProofKey | None = None,
        clock: Callable[[], float] = time.time,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`environment`: what the program finds besides."""
        super().__init__(key, clock)
        self._command = command
        self._environment = dict(environment or {})

    async def _ask(self, audience: str) -> TokenSet:
        key = await asyncio.to_thread(self._own_key)  # 40 ms for the import, in which the loop goes on
        names = {
            "ARCBRIDGE_PROOF_THUMBPRINT": key.thumbprint,
            "ARCBRIDGE_PROOF_AUDIENCE": key.audience(),
            "ARCBRIDGE_PROOF_NONCE": key.nonce(),
            "ARCBRIDGE_TOKEN_AUDIENCE": audience,
        }
        output = await output_of("login.command", self._command, {**self._environment, **names})
        document = read_json_object(output)
        now = self._clock()
        tokens = token_set(document, now)
        end = positive(document.get("expires_at"))
        if end > now:
            tokens = replace(tokens, refresh_token="", expires_at=min(filter(None, (tokens.expires_at, end))))
        if not tokens.access_token and not tokens.id_token:
            # What it printed may be a token: it is never quoted.
            raise Unauthenticated(
                f'login.command: {self._command[0]} did not print JSON with "access_token" or "id_token"'
            )
        return tokens


def _cluster_token(kind: str, token: str) -> ClusterToken:
    return ClusterToken(kind, token, read_unverified(token).expires_at)
