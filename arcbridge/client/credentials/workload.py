"""Tokens of a job or a pod: asked for at a service of its platform, or given to it before (`environment_tokens`).

Two services let the caller choose the audience, so each token names the place that it is for and the key that it is
bound to (`identity.proof`): with Kubernetes as two audiences, with GitHub, which gives one, as
`arcbridge:key:THUMBPRINT@AUDIENCE`. `assertion_of` asks for a token that names no key: a program proves with it to an
issuer which client it is there (`client.credentials.client_authentication`). Azure Pipelines gives such a one alone, as
azure-identity's AzurePipelinesCredential asks for it. Nothing is written, and nothing but these services is asked.
Public ones are known by the system's CAs and not by `login.ca_file`, which is for the issuer and may come with a login
at a relay. Invariants: a token is handed out only if it has the audiences that were asked for, and nothing of what was
sent or received is in an error.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from arcbridge.client.credentials.environment_tokens import ENVIRONMENT, FILE, GITLAB, EnvironmentTokens
from arcbridge.client.credentials.jwt_unverified import claims_unverified, read_unverified
from arcbridge.client.credentials.token_cache import MemoryTokens, TokenSet
from arcbridge.client.credentials.token_files import read_token
from arcbridge.client.credentials.tokens import is_azure_pipelines
from arcbridge.errors import ConfigError, NotInThisJob, Unauthenticated, Unreachable, UntrustedCertificate
from arcbridge.identity.proof import ProofKey
from arcbridge.net.system_trust import read_cas
from arcbridge.settings.config import LoginConfig
from arcbridge.untrusted_json import read_json_object

KINDS = "github, gitlab, kubernetes, file:PATH, env:NAME, or azure-pipelines with an issuer"
"""Values of `login.workload`, for messages."""
TOKEN_LIFE = 3600
"""Seconds for which TokenRequest is asked; the API server gives 600 at least, and less than this where it is set so."""
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CONNECTION_VARIABLES = ("AZURESUBSCRIPTION_SERVICE_CONNECTION_ID", "ARM_OIDC_AZURE_SERVICE_CONNECTION_ID")
"""Where tasks of Azure Pipelines say which service connection they were given."""
_AZURE_VERSION = "7.1"
_CONNECTION = re.compile(r"[0-9A-Za-z-]{1,64}", re.ASCII)
_DEADLINE = 20.0
"""Seconds for one request."""
_LIMIT = 256 * 1024


@dataclass(frozen=True, slots=True)
class _Service:
    """A service that gives a token with the audiences that `ask` is called with, of which it may take one alone."""

    name: str
    ask: Callable[[list[str]], Awaitable[str]]
    one_audience: bool = False

    async def token(self, audience: str, key: ProofKey | None) -> str:
        """Return a token for an audience that is bound to `key`; None: to none."""
        wanted = [audience]
        if key is not None:
            wanted = [f"{key.audience()}@{audience}"] if self.one_audience else [audience, key.audience()]
        text = await self.ask(wanted)
        if not set(wanted) <= set(read_unverified(text).audiences):
            raise Unauthenticated(f"{self.name} gave a token for other audiences than were asked for")
        return text


class WorkloadTokens(MemoryTokens):
    """`login.workload`: a token for each audience. Raises ConfigError for settings that cannot work, such as a job
    without the environment that it needs. Tokens that were made before are bound to no key."""

    def __init__(
        self,
        login: LoginConfig,
        *,
        environment: Mapping[str, str],
        key: ProofKey | None = None,
        clock: Callable[[], float] = time.time,
        service_account: Path = SERVICE_ACCOUNT,
    ) -> None:
        super().__init__(key, clock)
        for name in ("audience", "cluster_audience"):
            if not getattr(login, name):
                raise ConfigError(f"login.{name}: required with login.workload: each token is for one place")
        self._audience = login.audience
        self._service: _Service | None = None
        self._given: EnvironmentTokens | None = None
        if login.workload in SERVICES:
            self._service = SERVICES[login.workload](environment, "login.workload", service_account)
        elif login.workload == GITLAB or login.workload.startswith((FILE, ENVIRONMENT)):
            self._given = EnvironmentTokens(login.workload, environment, clock)
        else:
            raise ConfigError(f"login.workload: {login.workload[:40]!r} is unknown; use {KINDS}")

    async def _ask(self, audience: str) -> TokenSet:
        audience = audience or self._audience
        if self._service is not None:
            text = await self._service.token(audience, self._own_key())
        else:
            assert self._given is not None
            text = self._given.for_audience(audience)
        return TokenSet(text, obtained_at=self._clock(), expires_at=read_unverified(text).expires_at)


def assertion_of(
    login: LoginConfig, environment: Mapping[str, str], service_account: Path = SERVICE_ACCOUNT
) -> Callable[[], Awaitable[str]] | None:
    """Return what asks for a token of this job or pod for `login.client_assertion_audience`, bound to no key; None: the
    settings name no such job.

    Raises NotInThisJob where this is no such job or pod, ConfigError; what it returns, Unauthenticated or Unreachable.
    """
    if is_azure_pipelines(login.workload):
        return _azure_pipelines(login.workload, environment)
    kind, setting = login.client_assertion_workload, "login.client_assertion_workload"
    if not kind:
        return None
    if kind not in SERVICES:
        raise ConfigError(f"{setting}: must be one of {', '.join(SERVICES)}")
    service = SERVICES[kind](environment, setting, service_account)
    return lambda: service.token(login.client_assertion_audience, None)


def _github(environment: Mapping[str, str], setting: str, _: Path) -> _Service:
    """Return the token service of a job of GitHub Actions with the permission `id-token: write`."""
    url, secret = _of_job(
        environment,
        ("ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"),
        setting,
        "this is no job of GitHub Actions that may ask for tokens: give the job `permissions: id-token: write`",
    )

    async def ask(audiences: list[str]) -> str:
        status, answer = await _request("GET", f"{url}audience={quote(audiences[0], safe='')}", f"bearer {secret}")
        token = answer.get("value")
        if status in (401, 403):
            raise Unauthenticated("GitHub Actions gives this job no token: it needs `permissions: id-token: write`")
        if status != 200 or not isinstance(token, str):
            raise _no_token("GitHub Actions", status, "is ACTIONS_ID_TOKEN_REQUEST_URL what the job was given?")
        return token

    return _Service("GitHub Actions", ask, one_audience=True)


def _kubernetes(environment: Mapping[str, str], setting: str, directory: Path) -> _Service:
    """Return the API server of the pod's own cluster, asked with the pod's own ServiceAccount token."""
    host, port = environment.get("KUBERNETES_SERVICE_HOST", ""), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not (directory / "token").exists():
        raise NotInThisJob(
            setting,
            f"this is no pod with a ServiceAccount token (KUBERNETES_SERVICE_HOST, and {directory}/token; "
            "automountServiceAccountToken)",
        )

    async def ask(audiences: list[str]) -> str:
        own = read_token(directory / "token")
        subject = read_unverified(own).subject.split(":")
        if len(subject) != 4 or subject[:2] != ["system", "serviceaccount"]:
            raise Unauthenticated(f"the token in {directory} is not a ServiceAccount's")
        namespace, account = subject[2:]
        spec: dict[str, Any] = {"audiences": audiences, "expirationSeconds": TOKEN_LIFE}
        if (pod := _pod(claims_unverified(own))) is not None:
            spec["boundObjectRef"] = pod  # the token ends with the pod
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        server = f"https://{f'[{host}]' if ':' in host else host}:{port}"
        path = f"namespaces/{quote(namespace, safe='')}/serviceaccounts/{quote(account, safe='')}/token"
        status, answer = await _request(
            "POST", f"{server}/api/v1/{path}", f"Bearer {own}", body=body, ca_file=directory / "ca.crt"
        )
        if status in (401, 403):
            raise Unauthenticated(
                f"the API server gives this pod no token (status {status}): the ServiceAccount {account} of "
                f"{namespace} needs the right to create serviceaccounts/token for itself (docs/security.md)"
            )
        token = answer.get("status", {}).get("token") if isinstance(answer.get("status"), dict) else None
        if status != 201 or not isinstance(token, str):
            raise _no_token("the API server", status, "is KUBERNETES_SERVICE_HOST what the pod was given?")
        return token

    return _Service("the API server", ask)


SERVICES = {"github": _github, "github-actions": _github, "kubernetes": _kubernetes}
"""Those that give a token for any audience that is asked for; each raises NotInThisJob elsewhere than there."""


def _azure_pipelines(workload: str, environment: Mapping[str, str]) -> Callable[[], Awaitable[str]]:
    """Return what asks Azure DevOps for a token of a service connection, which the settings or the job name.

    The token has one audience, that of the exchange at Entra ID, so neither relay nor cluster is ever shown it.
    """
    url, secret = _of_job(
        environment,
        ("SYSTEM_OIDCREQUESTURI", "SYSTEM_ACCESSTOKEN"),
        "login.workload",
        "this is no step of Azure Pipelines that may ask for tokens; give the step "
        "`env: SYSTEM_ACCESSTOKEN: $(System.AccessToken)`",
    )
    known = next((environment[name] for name in CONNECTION_VARIABLES if environment.get(name)), "")
    connection = workload.partition(":")[2] or known
    if not _CONNECTION.fullmatch(connection):
        raise ConfigError(
            "login.workload: no service connection is named; write azure-pipelines:ID with the id of one that has a "
            "federated credential, or run in a task that has one (AzureCLI@2)"
        )

    async def ask() -> str:
        # Without this header a refusal is a redirect to a page for people.
        headers = {"X-TFS-FedAuthRedirect": "Suppress"}
        where = f"{url}api-version={_AZURE_VERSION}&serviceConnectionId={connection}"
        status, answer = await _request("POST", where, f"Bearer {secret}", headers=headers)
        token = answer.get("oidcToken")
        if status in (302, 401, 403):
            raise Unauthenticated(
                "Azure Pipelines gives this step no token: check `env: SYSTEM_ACCESSTOKEN: $(System.AccessToken)`, and "
                f"that the pipeline may use the service connection {connection}"
            )
        if status == 404:
            raise Unauthenticated(f"Azure Pipelines knows no service connection {connection}; see login.workload")
        if status not in (200, 201) or not isinstance(token, str) or not token:
            raise _no_token("Azure Pipelines", status, "is SYSTEM_OIDCREQUESTURI what the step was given?")
        return token

    return ask


def _of_job(environment: Mapping[str, str], names: tuple[str, str], setting: str, missing: str) -> tuple[str, str]:
    """Return the URL of a job's token service, to which parameters can be appended, and the job's secret there."""
    url, secret = (environment.get(name, "") for name in names)
    if urlsplit(url).scheme != "https" or not secret:
        raise NotInThisJob(setting, f"{missing} ({', '.join(names)})")
    return f"{url}{'&' if urlsplit(url).query else '?'}", secret


def _no_token(service: str, status: int, question: str) -> Unreachable:
    """Return the refusal for an answer without a token; `question`: what to look at where asking again changes nothing.

    An answer of 408, 429 or 5xx passes (RFC 9110 §15).
    """
    passes = status in (408, 429) or status >= 500
    return Unreachable(f"{service} gave no token (status {status}){'; try again' if passes else f': {question}'}")


async def _request(
    method: str,
    url: str,
    authorization: str,
    *,
    body: Mapping[str, Any] | None = None,
    ca_file: Path | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, Any]]:
    """Send one request; return the status and the JSON object of the answer, empty where it is none.

    `ca_file`: the CA of the service; None: the system's. Raises Unreachable, without a word of what was sent, and what
    `read_cas` raises.
    """
    from arcbridge.net.fetch import HttpFetcher  # aiohttp: a quarter of a second, for those who ask

    ca_pem = None if ca_file is None else read_cas(ca_file, "the CA of the token service")
    fetcher = HttpFetcher(deadline=_DEADLINE, limit=_LIMIT)
    sent = {"Authorization": authorization, "Accept": "application/json", "Content-Type": "application/json"}
    try:
        data = b"" if body is None else json.dumps(body).encode()
        reply = await fetcher.ask(method, url, ca_pem, headers={**sent, **(headers or {})}, body=data)
    except Unreachable as error:
        advice = ""
        if isinstance(error, UntrustedCertificate):
            advice = "; have this system trust the right CA (SSL_CERT_FILE names a file of CAs)"
            advice = advice if ca_file is None else f"; that CA is in {ca_file}"
        raise Unreachable(f"a token cannot be asked for: {error.message}{advice}") from error
    finally:
        await fetcher.close()
    return reply.status, read_json_object(reply.body, _LIMIT)


def _pod(claims: Mapping[str, Any]) -> dict[str, str] | None:
    """Return the pod that the token says it was made for."""
    private = claims.get("kubernetes.io")
    pod = private.get("pod") if isinstance(private, dict) else None
    if isinstance(pod, dict) and isinstance(pod.get("name"), str) and isinstance(pod.get("uid"), str):
        return {"apiVersion": "v1", "kind": "Pod", "name": pod["name"], "uid": pod["uid"]}
    return None
