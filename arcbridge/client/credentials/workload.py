"""Tokens of a job or a pod: asked for at GitHub Actions or an API server, or given to it before (`tokens_given`).

The two services let the caller choose the audience, so each token names the place that it is for and the key that it is
bound to (`identity.proof`): with Kubernetes as two audiences, with GitHub, which gives one, as
`arcbridge:key:THUMBPRINT@AUDIENCE`. The key is in this process's memory, unless `login.proof_key_file` names one.
Nothing is written, and nothing but the two services is asked. Invariant: a token is handed out only if it has the
audiences that were asked for. `assertion` asks for one that names no key: a program proves with it to an issuer which
client it is there (`client.credentials.client_authentication`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from arcbridge.client.credentials.environment_tokens import ENVIRONMENT, FILE, GITLAB, EnvironmentTokens
from arcbridge.client.credentials.jwt_unverified import claims_unverified, read_unverified
from arcbridge.client.credentials.token_cache import AudienceToken, TokenMemory, TokenSet
from arcbridge.client.credentials.token_files import read_token
from arcbridge.client.credentials.token_request import request
from arcbridge.errors import ConfigError, NotInThisJob, Unauthenticated, Unreachable
from arcbridge.identity.proof import ProofKey
from arcbridge.settings.config import LoginConfig

GITHUB = ("github", "github-actions")
KUBERNETES = "kubernetes"
SERVICES = (*GITHUB, KUBERNETES)
"""Those that give a token for any audience that is asked for."""
KINDS = "github, gitlab, kubernetes, file:PATH, env:NAME, or azure-pipelines with an issuer"
"""Values of `login.workload`, for messages."""
TOKEN_LIFE = 3600
"""Seconds for which TokenRequest is asked; the API server gives 600 at least, and less than this where it is set so."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class WorkloadTokens:
    """`login.workload`: a token for each audience, kept until it grows old. Raises ConfigError for settings that cannot
    work, such as a job without the environment that it needs."""

    def __init__(
        self,
        login: LoginConfig,
        *,
        environment: Mapping[str, str],
        key: ProofKey | None = None,
        clock: Callable[[], float] = time.time,
        service_account: Path = SERVICE_ACCOUNT,
    ) -> None:
        for name in ("audience", "cluster_audience"):
            if not getattr(login, name):
                raise ConfigError(f"login.{name}: required with login.workload: each token is for one place")
        self._audience = login.audience
        self._key = key
        self._clock = clock
        self._kept = TokenMemory[AudienceToken](clock)
        self._service: _GitHubActions | _Kubernetes | None = None
        self._given: EnvironmentTokens | None = None
        if login.workload in SERVICES:
            self._service = _service(login.workload, environment, service_account, "login.workload")
        elif login.workload == GITLAB or login.workload.startswith((FILE, ENVIRONMENT)):
            self._given = EnvironmentTokens(login.workload, environment, clock)
        else:
            raise ConfigError(f"login.workload: {login.workload[:40]!r} is unknown; use {KINDS}")

    @property
    def key(self) -> ProofKey | None:
        """In memory alone, unless it comes from a file; None: the tokens were made before, and are bound to no key."""
        if self._key is None and self._service is not None:
            self._key = ProofKey.generate()
        return self._key

    async def tokens(self, *, interactive: bool, force: bool = False) -> TokenSet:
        """Return the relay's token; those for clusters come by their audiences."""
        token = await self.for_audience(self._audience, interactive=interactive, force=force)
        return TokenSet(token.text, "", "", token.obtained_at, token.expires_at)

    async def for_audience(self, audience: str, *, interactive: bool, force: bool = False) -> AudienceToken:
        """Return a token for `audience`, bound to the key. Raises Unauthenticated or Unreachable, which say what to
        do."""
        return await self._kept.get(audience, partial(self._ask, audience), force=force)

    async def _ask(self, audience: str) -> AudienceToken:
        if self._given is not None:
            text = self._given.for_audience(audience)
            return AudienceToken(text, self._clock(), read_unverified(text).expires_at)
        service, key = self._service, self.key
        assert service is not None
        assert key is not None
        wanted = service.audiences(audience, key)
        text = await service.ask(wanted)
        found = read_unverified(text)
        if not set(wanted) <= set(found.audiences):
            raise Unauthenticated(f"{service.name} gave a token for other audiences than were asked for")
        return AudienceToken(text, self._clock(), found.expires_at)


def check_kind(kind: str, setting: str) -> None:
    """Raise ConfigError unless `kind` is one of `SERVICES`."""
    if kind not in SERVICES:
        raise ConfigError(f"{setting}: must be one of {', '.join(SERVICES)}")


async def assertion(login: LoginConfig, environment: Mapping[str, str], service_account: Path = SERVICE_ACCOUNT) -> str:
    """Return a token of this job or pod for `login.client_assertion_audience`, bound to no key.

    Raises NotInThisJob where this is no such job or pod, Unauthenticated or Unreachable.
    """
    setting = "login.client_assertion_workload"
    service = _service(login.client_assertion_workload, environment, service_account, setting)
    audience = login.client_assertion_audience
    text = await service.ask([audience])
    if audience not in read_unverified(text).audiences:
        raise Unauthenticated(f"{service.name} gave a token for another audience than {audience}")
    return text


def _service(
    kind: str, environment: Mapping[str, str], service_account: Path, setting: str
) -> _GitHubActions | _Kubernetes:
    if kind in GITHUB:
        return _GitHubActions.of(environment, setting)
    return _Kubernetes.of(environment, service_account, setting)


@dataclass(frozen=True, slots=True)
class _GitHubActions:
    """The token service of a job with the permission `id-token: write`: a public one, by the system's CAs."""

    url: str
    secret: str
    name: str = "GitHub Actions"

    @classmethod
    def of(cls, environment: Mapping[str, str], setting: str) -> _GitHubActions:
        url = environment.get("ACTIONS_ID_TOKEN_REQUEST_URL", "")
        secret = environment.get("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "")
        if urlsplit(url).scheme != "https" or not secret:
            raise NotInThisJob(
                setting,
                "this is no job of GitHub Actions that may ask for tokens: give the job "
                "`permissions: id-token: write` (ACTIONS_ID_TOKEN_REQUEST_URL and ACTIONS_ID_TOKEN_REQUEST_TOKEN)",
            )
        return cls(url, secret)

    def audiences(self, audience: str, key: ProofKey) -> list[str]:
        return [f"{key.audience()}@{audience}"]

    async def ask(self, audiences: list[str]) -> str:
        joint = "&" if urlsplit(self.url).query else "?"
        url = f"{self.url}{joint}audience={quote(audiences[0], safe='')}"
        status, answer = await request("GET", url, f"bearer {self.secret}", None, None)
        token = answer.get("value")
        if status in (401, 403):
            raise Unauthenticated("GitHub Actions gives this job no token: it needs `permissions: id-token: write`")
        if status != 200 or not isinstance(token, str):
            raise Unreachable(f"GitHub Actions gave no token (status {status}); try again")
        return token


@dataclass(frozen=True, slots=True)
class _Kubernetes:
    """The API server of the pod's own cluster, asked with the pod's own ServiceAccount token."""

    server: str
    directory: Path
    name: str = "the API server"

    @classmethod
    def of(cls, environment: Mapping[str, str], directory: Path, setting: str) -> _Kubernetes:
        host, port = environment.get("KUBERNETES_SERVICE_HOST", ""), environment.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not (directory / "token").exists():
            raise NotInThisJob(
                setting,
                f"this is no pod with a ServiceAccount token (KUBERNETES_SERVICE_HOST, and {directory}/token; "
                "automountServiceAccountToken)",
            )
        return cls(f"https://{f'[{host}]' if ':' in host else host}:{port}", directory)

    def audiences(self, audience: str, key: ProofKey) -> list[str]:
        return [audience, key.audience()]

    async def ask(self, audiences: list[str]) -> str:
        own = read_token(self.directory / "token")
        claims = claims_unverified(own)
        subject = read_unverified(own).subject.split(":")
        if len(subject) != 4 or subject[:2] != ["system", "serviceaccount"]:
            raise Unauthenticated(f"the token in {self.directory} is not a ServiceAccount's")
        namespace, account = subject[2:]
        spec: dict[str, Any] = {"audiences": audiences, "expirationSeconds": TOKEN_LIFE}
        if (pod := _pod(claims)) is not None:
            spec["boundObjectRef"] = pod  # the token ends with the pod
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        path = f"namespaces/{quote(namespace, safe='')}/serviceaccounts/{quote(account, safe='')}/token"
        url = f"{self.server}/api/v1/{path}"
        status, answer = await request("POST", url, f"Bearer {own}", self.directory / "ca.crt", body)
        if status in (401, 403):
            raise Unauthenticated(
                f"the API server gives this pod no token (status {status}): the ServiceAccount {account} of "
                f"{namespace} needs the right to create serviceaccounts/token for itself (docs/security.md)"
            )
        token = answer.get("status", {}).get("token") if isinstance(answer.get("status"), dict) else None
        if status != 201 or not isinstance(token, str):
            raise Unreachable(f"the API server gave no token (status {status}); try again")
        return token


def _pod(claims: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the pod that the token says it was made for."""
    private = claims.get("kubernetes.io")
    pod = private.get("pod") if isinstance(private, dict) else None
    if isinstance(pod, dict) and isinstance(pod.get("name"), str) and isinstance(pod.get("uid"), str):
        return {"apiVersion": "v1", "kind": "Pod", "name": pod["name"], "uid": pod["uid"]}
    return None
