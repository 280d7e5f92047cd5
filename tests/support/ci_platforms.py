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

import jwt
from aiohttp import web

from tests.support.issuer_server import ManyIssuers, form_of

GITHUB_USER = "repo:example/shop:environment:production"
GITLAB_USER = "project_path:example/shop:ref_type:branch:ref:main"
AZURE_USER = "77777777-7777-7777-7777-777777777777"
"""Object id of the application's service principal."""
CONNECTION = "88888888-8888-8888-8888-888888888888"
CLIENT_ID = "55555555-5555-5555-5555-555555555555"
EXCHANGE = "api://AzureADTokenExchange"
JOB_SECRET = "the-secret-of-the-job"


class CiPlatforms(ManyIssuers):
    """The server; its issuers are called `github`, `gitlab`, `azure-devops` and `entra`."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        """Every request for a token, in words."""
        self.routes = [
            web.get("/github/token", self._github),
            web.post("/azure-devops/oidctoken", self._azure_devops),
            web.post("/entra/token", self._entra),
        ]

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

    async def _github(self, request: web.Request) -> web.Response:
        given = request.headers.get("Authorization", "").lower()
        if given != f"bearer {JOB_SECRET}" or request.query.get("api-version") != "2.0":
            return web.json_response({"message": "no job"}, status=401)
        audience = request.query["audience"]
        self.asked.append(f"github {audience}")
        return web.json_response({"count": 1, "value": self._token("github", GITHUB_USER, audience)})

    async def _azure_devops(self, request: web.Request) -> web.Response:
        given = request.headers.get("Authorization")
        if given != f"Bearer {JOB_SECRET}" or request.query.get("api-version") != "7.1":
            return web.json_response({}, status=401)
        if request.query.get("serviceConnectionId") != CONNECTION:
            return web.json_response({}, status=404)
        self.asked.append("azure-devops")
        subject = "sc://example/shop/arcbridge-prod"
        return web.json_response({"oidcToken": self._token("azure-devops", subject, EXCHANGE)})

    async def _entra(self, request: web.Request) -> web.Response:
        form = form_of(await request.post())
        try:
            assertion = self.read(form.get("client_assertion", ""), EXCHANGE)
        except jwt.PyJWTError:
            words = {"error": "invalid_client", "error_description": "AADSTS700027: the assertion is not good"}
            return web.json_response(words, status=401)
        expected = (self.url("azure-devops"), "client_credentials", CLIENT_ID)
        if (assertion["iss"], form.get("grant_type"), form.get("client_id")) != expected:
            return web.json_response({"error": "invalid_request"}, status=400)
        scope = form.get("scope", "")
        self.asked.append(f"entra {scope}")
        # An application's v2.0 access token is for the id of the application that the scope names.
        audience = scope.removeprefix("api://").removesuffix("/.default")
        token = self._token("entra", AZURE_USER, audience, oid=AZURE_USER, idtyp="app")
        return web.json_response({"token_type": "Bearer", "expires_in": 3599, "access_token": token})

    def _token(self, issuer: str, subject: str, audience: object, **more: object) -> str:
        now = int(time.time())
        return self.mint(issuer, {"sub": subject, "aud": audience, "iat": now, "nbf": now, "exp": now + 600, **more})
