"""The assertion of a job of Azure Pipelines: a token of its service connection, for the issuer to trade in.

The job asks Azure DevOps for it (`SYSTEM_OIDCREQUESTURI`, as azure-identity's AzurePipelinesCredential does), with its
own `SYSTEM_ACCESSTOKEN`. The token has one audience, that of the exchange at Entra ID, so neither relay nor cluster is
ever shown it. The service is a public one, so the system's CAs vouch for it, and `login.ca_file`, which is for the
issuer and may come with a login at a relay, does not. Invariant: neither of the two tokens is in an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from arcbridge.client.credentials.token_request import request
from arcbridge.errors import ConfigError, NotInThisJob, Unauthenticated, Unreachable

KIND = "azure-pipelines"
API_VERSION = "7.1"
CONNECTION_VARIABLES = ("AZURESUBSCRIPTION_SERVICE_CONNECTION_ID", "ARM_OIDC_AZURE_SERVICE_CONNECTION_ID")
"""Where tasks of Azure Pipelines say which service connection they were given."""
_CONNECTION = re.compile(r"[0-9A-Za-z-]{1,64}", re.ASCII)


def is_azure_pipelines(workload: str) -> bool:
    """Return whether `login.workload` is this one: `azure-pipelines` or `azure-pipelines:SERVICE-CONNECTION-ID`."""
    return workload.partition(":")[0] == KIND


@dataclass(frozen=True, slots=True)
class AzurePipelines:
    """One job, and the service connection whose token it asks for."""

    url: str
    connection: str
    secret: str

    @classmethod
    def of(cls, workload: str, environment: Mapping[str, str]) -> AzurePipelines:
        """Find the service connection by the setting and the job's environment. Raises ConfigError."""
        url, secret = environment.get("SYSTEM_OIDCREQUESTURI", ""), environment.get("SYSTEM_ACCESSTOKEN", "")
        if urlsplit(url).scheme != "https" or not secret:
            raise NotInThisJob(
                "login.workload",
                "this is no step of Azure Pipelines that may ask for tokens; give the step "
                "`env: SYSTEM_ACCESSTOKEN: $(System.AccessToken)` (SYSTEM_OIDCREQUESTURI, SYSTEM_ACCESSTOKEN)",
            )
        named = workload.partition(":")[2]
        known = next((environment[name] for name in CONNECTION_VARIABLES if environment.get(name)), "")
        connection = named or known
        if not _CONNECTION.fullmatch(connection):
            raise ConfigError(
                "login.workload: no service connection is named; write azure-pipelines:ID with the id of one that has "
                "a federated credential, or run in a task that has one (AzureCLI@2)"
            )
        return cls(url, connection, secret)

    async def assertion(self) -> str:
        """Ask for a token of the service connection. Raises Unauthenticated, Unreachable."""
        joint = "&" if urlsplit(self.url).query else "?"
        url = f"{self.url}{joint}api-version={API_VERSION}&serviceConnectionId={quote(self.connection, safe='')}"
        # Without this header a refusal is a redirect to a page for people.
        headers = {"X-TFS-FedAuthRedirect": "Suppress"}
        status, answer = await request("POST", url, f"Bearer {self.secret}", None, None, headers)
        token = answer.get("oidcToken")
        if status in (302, 401, 403):
            raise Unauthenticated(
                "Azure Pipelines gives this step no token: check `env: SYSTEM_ACCESSTOKEN: $(System.AccessToken)`, and "
                f"that the pipeline may use the service connection {self.connection}"
            )
        if status == 404:
            raise Unauthenticated(f"Azure Pipelines knows no service connection {self.connection}; see login.workload")
        if status not in (200, 201) or not isinstance(token, str) or not token:
            raise Unreachable(f"Azure Pipelines gave no token (status {status}); try again")
        return token
