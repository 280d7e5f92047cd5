"""The services of CI platforms from which a job has its tokens, at one HTTPS server.

* GitHub Actions: `ACTIONS_ID_TOKEN_REQUEST_URL`, a token for the audience that the job asks for.
* GitLab: no service; the runner puts the tokens of `id_tokens` into variables.
* Azure DevOps: `SYSTEM_OIDCREQUESTURI`, a token of a service connection; and the token endpoint of Entra ID, where it
  is traded in as a client's assertion (RFC 7523) for an access token of a scope.

Each method answers the environment that the platform gives to a job.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jwt

from tests.support.oidc_server import OidcServer

GITHUB_USER = "repo:example/shop:environment:production"
GITLAB_USER = "project_path:example/shop:ref_type:branch:ref:main"
AZURE_USER = "77777777-7777-7777-7777-777777777777"
"""Object id of the application's service principal."""
CONNECTION = "88888888-8888-8888-8888-888888888888"
CLIENT_ID = "55555555-5555-5555-5555-555555555555"
EXCHANGE = "api://AzureADTokenExchange"
JOB_SECRET = "the-secret-of-the-job"


class CiPlatforms(OidcServer):
    """The server; its issuers are called `github`, `gitlab`, `azure-devops` and `entra`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        """Every request for a token, in words."""
        self.routes["GET /github/token"] = self._github
        self.routes["POST /azure-devops/oidctoken"] = self._azure_devops
        self.routes["POST /entra/token"] = self._entra

    def github(self) -> dict[str, str]:
        """What a job with `id-token: write` finds."""
        return {
            "GITHUB_ACTIONS": "true",
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.url('github')}/token?api-version=2.0",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": JOB_SECRET,
        }

    def gitlab(self, id_tokens: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        """What a job with these `id_tokens` finds."""
        return {
            "GITLAB_CI": "true",
            "CI_SERVER_URL": self.url("gitlab"),
            **{name: self._token("gitlab", GITLAB_USER, one["aud"]) for name, one in id_tokens.items()},
        }

    def azure(self) -> dict[str, str]:
        """What a step of AzureCLI@2 with `SYSTEM_ACCESSTOKEN` finds."""
        return {
            "TF_BUILD": "True",
            "SYSTEM_OIDCREQUESTURI": f"{self.url('azure-devops')}/oidctoken",
            "SYSTEM_ACCESSTOKEN": JOB_SECRET,
            "AZURESUBSCRIPTION_SERVICE_CONNECTION_ID": CONNECTION,
        }

    def _github(self, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, Any]]:
        asked = parse_qs(urlsplit(path).query)
        if headers.get("Authorization", "").lower() != f"bearer {JOB_SECRET}" or asked.get("api-version") != ["2.0"]:
            return 401, {"message": "no job"}
        (audience,) = asked["audience"]
        self.asked.append(f"github {audience}")
        return 200, {"count": 1, "value": self._token("github", GITHUB_USER, audience)}

    def _azure_devops(self, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, Any]]:
        asked = parse_qs(urlsplit(path).query)
        if headers.get("Authorization") != f"Bearer {JOB_SECRET}" or asked.get("api-version") != ["7.1"]:
            return 401, {}
        if asked.get("serviceConnectionId") != [CONNECTION]:
            return 404, {}
        self.asked.append("azure-devops")
        return 200, {"oidcToken": self._token("azure-devops", "sc://example/shop/arcbridge-prod", EXCHANGE)}

    def _entra(self, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, Any]]:
        form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        try:
            assertion = self.read(form.get("client_assertion", ""), EXCHANGE)
        except jwt.PyJWTError:
            return 401, {"error": "invalid_client", "error_description": "AADSTS700027: the assertion is not good"}
        expected = (self.url("azure-devops"), "client_credentials", CLIENT_ID)
        if (assertion["iss"], form.get("grant_type"), form.get("client_id")) != expected:
            return 400, {"error": "invalid_request"}
        scope = form.get("scope", "")
        self.asked.append(f"entra {scope}")
        # An application's v2.0 access token is for the id of the application that the scope names.
        audience = scope.removeprefix("api://").removesuffix("/.default")
        token = self._token("entra", AZURE_USER, audience, oid=AZURE_USER, idtyp="app")
        return 200, {"token_type": "Bearer", "expires_in": 3599, "access_token": token}

    def _token(self, issuer: str, subject: str, audience: object, **more: object) -> str:
        now = int(time.time())
        return self.mint(issuer, {"sub": subject, "aud": audience, "iat": now, "nbf": now, "exp": now + 600, **more})
