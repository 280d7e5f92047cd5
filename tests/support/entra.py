"""Microsoft Entra ID and Microsoft Graph as far as arcbridge meets them: two HTTPS servers on loopback, in a thread.

    with Entra(tmp_path / "entra") as entra:
        anna = entra.hire("anna@example.org", groups=["…"])
        entra.issuer                       # https://127.0.0.1:PORT/TENANT/v2.0

The shapes are those of Microsoft's documentation ("Access token claims reference", "OAuth 2.0 … flow", "Certificate
credentials", "getMemberObjects"): one tenant, v1.0 and v2.0 tokens by what the resource wants, keys with `x5t` and
`issuer`, refresh tokens that are good for every resource with consent, errors with AADSTS numbers. No user has a
password. What the tests change is plain data: `users`, `applications`, `graph`. `tests.support.issuer` is the issuer
for all else.
"""

from __future__ import annotations

import asyncio
import base64
import datetime
import hashlib
import hmac
import json
import secrets
import ssl
import time
import urllib.parse
import urllib.request
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import jwt
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.support.app_thread import AppThread
from tests.support.issuer_server import DEVICE_GRANT, Device, Grant, Refused, b64, credentials_of, form_of

TENANT = "11111111-1111-1111-1111-111111111111"
"""Tenant and applications have the ids of config/examples/entra-id."""
RELAY, CLUSTER, PROGRAM, PIPELINE = (
    f"{digit * 8}-{digit * 4}-{digit * 4}-{digit * 4}-{digit * 12}" for digit in "2345"
)
READER = "88888888-8888-8888-8888-888888888888"
"""The application as which agent and relay ask Graph."""
CONSUMERS = "9188040d-6c67-4c5b-b112-36a304b66dad"
"""The tenant of personal accounts, whose keys stand in the same documents."""
MOST_GROUPS = 200
"""Groups of a JWT; with more, a pointer takes their place."""
EXCHANGE_AUDIENCE = "api://AzureADTokenExchange"
ASSERTION = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
OPENID = {"openid", "profile", "email", "offline_access"}
EARLIER = 300
"""Seconds by which `iat` and `nbf` lie before the time of issue."""
LIFETIME = 4200


@dataclass(slots=True)
class Certificate:
    """A key and its self-signed certificate."""

    key: rsa.RSAPrivateKey
    certificate: x509.Certificate

    @classmethod
    def make(cls, name: str) -> Certificate:
        key = rsa.generate_private_key(65537, 2048)
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate)

    @property
    def x5t(self) -> str:
        return b64(self.certificate.fingerprint(hashes.SHA1()))

    @property
    def x5t_s256(self) -> str:
        return b64(self.certificate.fingerprint(hashes.SHA256()))

    def write(self, directory: Path, name: str) -> tuple[Path, Path]:
        """Write certificate and key as PEM files; return their paths."""
        certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
        certificate.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        key.touch(mode=0o600)
        private = serialization.PrivateFormat.PKCS8
        key.write_bytes(self.key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()))
        return certificate, key


@dataclass(frozen=True, slots=True)
class Federated:
    """A federated credential of an application: whose tokens are its assertions."""

    issuer: str
    subject: str
    ca_file: Path
    audience: str = EXCHANGE_AUDIENCE


@dataclass(slots=True)
class Application:
    """An app registration with its enterprise application (service principal)."""

    client_id: str
    object_id: str
    """Of the service principal: `oid` of its tokens."""
    version: int = 2
    """`requestedAccessTokenVersion`, of tokens for this application."""
    public: bool = False
    secret: str = ""
    certificates: list[Certificate] = field(default_factory=list)
    federated: list[Federated] = field(default_factory=list)
    consent: set[str] = field(default_factory=set)
    """Resources (client ids) for which delegated permissions have admin consent."""
    groups: tuple[str, ...] = ()
    optional: tuple[str, ...] = ("upn", "idtyp")
    """Optional claims of access tokens for this application."""
    assigned: tuple[str, ...] | None = None
    """`ApplicationGroup`: tokens for this application name the groups that are assigned to it; None: all."""


@dataclass(slots=True)
class User:
    """A user of the tenant."""

    upn: str
    object_id: str
    groups: tuple[str, ...] = ()


@dataclass(slots=True)
class GraphState:
    """How the small Graph behaves."""

    status: int = 200
    """Another one than 200 is answered to every question."""
    retry_after: str = ""
    code: str = "ServiceError"
    """Of the error."""
    slow: float = 0.0
    permitted: bool = True
    """Whether the application may read memberships."""
    body: bytes = b""
    """Answered instead of the groups."""
    asked: list[str] = field(default_factory=list)
    """`KIND/ID` of each question."""
    tokens: Counter[str] = field(default_factory=Counter)
    """How often the token endpoint gave a token for Graph, by the way in which the application proved itself."""
    at_once: int = 0
    most_at_once: int = 0
    revoked: bool = False
    """The next question is refused as if its token had been revoked."""
    token_status: int = 200
    """Another one than 200 is answered to every application that asks for a token for Graph."""
    tokens_asked: int = 0
    """Requests for tokens for Graph, whatever became of them."""


class Entra(AppThread):
    """The tenant. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        super().__init__("the CA of login.microsoftonline.com")
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.ca_file = directory / "ca.pem"
        self.ca_file.write_text(self.ca_pem)
        self.keys = [Certificate.make("accounts.accesscontrol.windows.net")]
        """Newest last; the last one signs."""
        self.foreign_key = Certificate.make("consumers")
        self.users: dict[str, User] = {}
        self.applications = {
            one.client_id: one
            for one in (
                Application(RELAY, _guid()),
                Application(CLUSTER, _guid()),
                Application(PROGRAM, _guid(), public=True, consent={RELAY, CLUSTER}),
                Application(PIPELINE, _guid(), secret=secrets.token_urlsafe(24)),
                Application(READER, _guid(), secret=secrets.token_urlsafe(24)),
            )
        }
        self.graph = GraphState()
        self.requests: Counter[str] = Counter()
        self._codes: dict[str, Grant] = {}
        self._refresh: dict[str, Grant] = {}
        self._devices: dict[str, Device] = {}
        self._user_codes: dict[str, str] = {}
        self._assertions: set[str] = set()

    # -- what tests use -----------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return self.urls[0]

    @property
    def graph_url(self) -> str:
        return self.urls[1]

    @property
    def issuer(self) -> str:
        """The issuer of v2.0 tokens."""
        return f"{self.url}/{TENANT}/v2.0"

    @property
    def issuer_v1(self) -> str:
        """The issuer of v1.0 tokens, which is another host's name; its discovery document is at `discovery_v1`."""
        return f"https://sts.windows.net/{TENANT}/"

    @property
    def discovery_v1(self) -> str:
        return f"{self.url}/{TENANT}/.well-known/openid-configuration"

    @property
    def token_url(self) -> str:
        return f"{self.url}/{TENANT}/oauth2/v2.0/token"

    def hire(self, upn: str, *, groups: Sequence[str] = ()) -> User:
        """Make a user."""
        user = self.users[upn] = User(upn, _guid(), tuple(groups))
        return user

    def token_for(
        self, who: User | Application, resource: str, *, key: Certificate | None = None, **changes: Any
    ) -> str:
        """Sign an access token; a change to None removes a claim, `header` changes the header."""
        header = changes.pop("header", {})
        claims = self._access(who, self.applications[resource], self.applications[PROGRAM], "access")
        claims = {name: value for name, value in {**claims, **changes}.items() if value is not None}
        return self._sign(claims, key, header)

    def approve(self, user_code: str, upn: str) -> None:
        """Log a user in on another device."""
        device = self._devices[self._user_codes[user_code]]
        device.grant.user = upn
        device.state = "approved"

    def rotate(self) -> None:
        """Make a new key; the former one stays published."""
        self.keys.append(Certificate.make("accounts.accesscontrol.windows.net"))

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _sign(
        self, claims: Mapping[str, Any], key: Certificate | None = None, header: Mapping[str, Any] | None = None
    ) -> str:
        used = key or self.keys[-1]
        head: dict[str, Any] = {"typ": "JWT", "kid": used.x5t}
        if claims.get("ver") == "1.0":
            head["x5t"] = used.x5t
        head |= header or {}
        return jwt.encode(dict(claims), used.key, "RS256", headers=head)

    def _common(self, who: User | Application, audience: str, version: int) -> dict[str, Any]:
        now = int(time.time())
        return {
            "aud": audience,
            "iss": self.issuer if version == 2 else self.issuer_v1,
            "iat": now - EARLIER,
            "nbf": now - EARLIER,
            "exp": now + LIFETIME,
            "aio": secrets.token_urlsafe(24),
            "oid": who.object_id,
            "rh": secrets.token_urlsafe(12),
            "tid": TENANT,
            "uti": secrets.token_urlsafe(16),
            "ver": f"{version}.0",
        }

    def _access(self, who: User | Application, resource: Application, client: Application, scp: str) -> dict[str, Any]:
        """The claims of an access token for `resource`, whose version and optional claims it has."""
        version = resource.version
        claims = self._common(who, resource.client_id if version == 2 else f"api://{resource.client_id}", version)
        claims["azp" if version == 2 else "appid"] = client.client_id
        claims["azpacr" if version == 2 else "appidacr"] = "0" if client.public else "1"
        if isinstance(who, User):
            pairwise = hashlib.sha256(f"{who.object_id}{resource.client_id}".encode()).digest()
            claims |= {"sub": b64(pairwise), "scp": scp, "name": who.upn, "wids": [_guid()]}
            if version == 2:
                claims["preferred_username"] = who.upn
            else:
                claims |= {"unique_name": who.upn, "amr": ["pwd", "mfa"]}
            if version == 1 or "upn" in resource.optional:
                claims["upn"] = who.upn
        else:
            # Of an application or managed identity `sub` and `oid` are the same.
            claims |= {"sub": who.object_id, "wids": [_guid()]}
            if "idtyp" in resource.optional:
                claims["idtyp"] = "app"
        return claims | self._groups(who, resource)

    def _groups(self, who: User | Application, resource: Application) -> dict[str, Any]:
        assigned = resource.assigned
        named = [one for one in who.groups if assigned is None or one in assigned]
        if len(named) <= MOST_GROUPS:
            return {"groups": named} if named else {}
        kind = "users" if isinstance(who, User) else "servicePrincipals"
        # As with Microsoft, the pointer is not the one that is to be asked; here it is a trap.
        endpoint = f"{self.url}/trap/{TENANT}/{kind}/{who.object_id}/getMemberObjects"
        return {"_claim_names": {"groups": "src1"}, "_claim_sources": {"src1": {"endpoint": endpoint}}}

    def _answer(self, grant: Grant, client: Application, form: Mapping[str, str]) -> dict[str, Any]:
        who = self.users[grant.user] if grant.user else client
        scopes = grant.scope.split()
        resource = self._resource(scopes, client, delegated=bool(grant.user))
        if resource is None:  # Graph's own resource
            claims = self._common(who, self.graph_url, 1) | {"sub": who.object_id, "appid": client.client_id}
        else:
            claims = self._access(who, resource, client, "access")
        pop = form.get("token_type") == "pop"
        if pop:
            wanted = json.loads(_unb64(form["req_cnf"]))
            claims["cnf"] = {"kid": wanted["kid"], "xms_ksl": "sw"}
        answer: dict[str, Any] = {
            "token_type": "pop" if pop else "Bearer",
            "scope": " ".join(one for one in scopes if one not in OPENID),
            "expires_in": LIFETIME,
            "ext_expires_in": LIFETIME,
            "access_token": self._sign(claims),
        }
        if isinstance(who, User):
            if "openid" in scopes:
                identity = self._common(who, client.client_id, 2)
                identity |= {"sub": who.object_id, "preferred_username": who.upn, "name": who.upn}
                if grant.nonce:
                    identity["nonce"] = grant.nonce
                answer["id_token"] = self._sign(identity)
            if "offline_access" in scopes:
                token = f"1.{secrets.token_urlsafe(48)}"
                self._refresh[token] = replace(grant, nonce="")
                answer["refresh_token"] = token
        return answer

    def _resource(self, scopes: Sequence[str], client: Application, *, delegated: bool) -> Application | None:
        """The one resource that the scopes name; None is Graph."""
        named = {one.rpartition("/")[0] for one in scopes if one not in OPENID}
        if len(named) != 1:
            raise Refused("invalid_request", "AADSTS28000: Provided value for the input parameter scope is not valid")
        (uri,) = named
        if uri == self.graph_url:
            return None
        found = self.applications.get(uri.removeprefix("api://"))
        if found is None or not uri.startswith("api://"):
            raise Refused("invalid_resource", f"AADSTS500011: The resource principal named {uri} was not found")
        if delegated and found.client_id not in client.consent:
            raise Refused("invalid_grant", "AADSTS65001: The user or administrator has not consented")
        if not delegated and [one for one in scopes if one not in OPENID] != [f"{uri}/.default"]:
            raise Refused("invalid_scope", "AADSTS1002012: The provided value for scope is not valid")
        return found

    # -- who asks -----------------------------------------------------------------------------------------------------

    async def _client(self, request: web.Request, form: Mapping[str, str]) -> tuple[Application, str]:
        """The application that asks, and how it proved that: `secret`, `certificate`, `federated`, or nothing."""
        client_id, secret = credentials_of(request, form)
        found = self.applications.get(client_id)
        if found is None:
            raise Refused("unauthorized_client", "AADSTS700016: Application was not found in the directory")
        if form.get("client_assertion"):
            if form.get("client_assertion_type") != ASSERTION:
                raise Refused("invalid_request", "AADSTS900144: client_assertion_type")
            return found, await asyncio.to_thread(self._check_assertion, found, form["client_assertion"])
        if secret:
            if not found.secret or not hmac.compare_digest(found.secret, secret):
                raise Refused("invalid_client", "AADSTS7000215: Invalid client secret provided", 401)
            return found, "secret"
        if not found.public:
            raise Refused("invalid_client", "AADSTS7000218: The request body must contain a client_assertion", 401)
        return found, ""

    def _check_assertion(self, client: Application, assertion: str) -> str:
        try:
            header = jwt.get_unverified_header(assertion)
            claims = jwt.decode(assertion, options={"verify_signature": False})
            if claims.get("iss") == client.client_id:
                registered = {one.x5t_s256: one for one in client.certificates}
                used = registered[header["x5t#S256"]]
                claims = jwt.decode(assertion, used.key.public_key(), ["PS256"], audience=self.token_url)
                if claims["sub"] != client.client_id or claims["jti"] in self._assertions:
                    raise ValueError("sub or jti")
                self._assertions.add(claims["jti"])
                return "certificate"
            credential = next(
                one for one in client.federated if (one.issuer, one.subject) == (claims.get("iss"), claims.get("sub"))
            )
            jwt.decode(assertion, _key_of(credential, header["kid"]), ["RS256"], audience=credential.audience)
            return "federated"
        except StopIteration:
            raise Refused("invalid_client", "AADSTS700213: No matching federated identity record found", 401) from None
        except (jwt.PyJWTError, KeyError, ValueError) as error:
            raise Refused("invalid_client", f"AADSTS700027: The assertion is not valid: {error!r}", 401) from None

    # -- pages --------------------------------------------------------------------------------------------------------

    async def _discovery(self, request: web.Request) -> web.Response:
        base = f"{self.url}/{TENANT}"
        first = not request.path.startswith(f"/{TENANT}/v2.0/")
        return web.json_response(
            {
                "issuer": self.issuer_v1 if first else self.issuer,
                "jwks_uri": f"{base}/discovery/keys" if first else f"{base}/discovery/v2.0/keys",
                "token_endpoint": f"{base}/oauth2/v2.0/token",
                "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                "device_authorization_endpoint": f"{base}/oauth2/v2.0/devicecode",
                "token_endpoint_auth_methods_supported": [
                    *("client_secret_post", "private_key_jwt", "client_secret_basic", "self_signed_tls_client_auth")
                ],
            }
        )

    async def _jwks(self, request: web.Request) -> web.Response:
        entries = []
        for used, tenant in [*((key, TENANT) for key in self.keys), (self.foreign_key, CONSUMERS)]:
            numbers = used.key.public_key().public_numbers()
            der = used.certificate.public_bytes(serialization.Encoding.DER)
            entry = {
                "kty": "RSA",
                "use": "sig",
                "kid": used.x5t,
                "x5t": used.x5t,
                "n": b64(numbers.n.to_bytes(256, "big")),
                "e": "AQAB",
                "x5c": [base64.b64encode(der).decode()],
                "cloud_instance_name": "microsoftonline.com",
            }
            if "v2.0" in request.path:  # the document for v1.0 has no issuers
                entry["issuer"] = f"{self.url}/{tenant}/v2.0"
            entries.append(entry)
        return web.json_response({"keys": entries}, headers={"Cache-Control": "max-age=86400, private"})

    async def _authorize(self, request: web.Request) -> web.Response:
        query = request.query
        where = urllib.parse.urlsplit(query.get("redirect_uri", ""))
        client = self.applications.get(query.get("client_id", ""))
        # One redirect URI is registered, as docs/how-to/entra-id.md says; its port is ignored.
        registered = "http", "localhost", f"/{self.issuer.removeprefix('https://')}"
        if client is None or (where.scheme, where.hostname, where.path) != registered:
            raise Refused("invalid_request", "AADSTS50011: The redirect URI does not match")
        if query.get("response_type") != "code" or query.get("code_challenge_method") != "S256":
            raise Refused("invalid_request", "AADSTS9002325: Proof Key for Code Exchange is required")
        self._resource(query.get("scope", "").split(), client, delegated=True)
        upn = query.get("login_hint", "")
        if upn not in self.users:
            answer = {"error": "access_denied", "state": query.get("state", "")}
        else:
            code = f"0.{secrets.token_urlsafe(32)}"
            self._codes[code] = Grant(
                client=client.client_id,
                scope=query.get("scope", ""),
                user=upn,
                nonce=query.get("nonce", ""),
                challenge=query["code_challenge"],
                redirect_uri=query["redirect_uri"],
            )
            answer = {"code": code, "state": query.get("state", ""), "session_state": _guid()}
        location = f"{query['redirect_uri']}?{urllib.parse.urlencode(answer)}"
        return web.Response(status=302, headers={"Location": location})

    async def _device_code(self, request: web.Request) -> web.Response:
        form = form_of(await request.post())
        client, _ = await self._client(request, form)
        self._resource(form.get("scope", "").split(), client, delegated=True)
        device_code = f"DAQAB{secrets.token_urlsafe(32)}"
        user_code = "".join(secrets.choice("BCDFGHJKLMNPQRSTVWXZ23456789") for _ in range(9))
        self._devices[device_code] = Device(Grant(client.client_id, form.get("scope", "")))
        self._user_codes[user_code] = device_code
        page = f"{self.url}/common/oauth2/deviceauth"
        return web.json_response(
            {
                "user_code": user_code,
                "device_code": device_code,
                "verification_uri": page,
                "expires_in": 900,
                "interval": 1,
                "message": f"To sign in, use a web browser to open the page {page} and enter the code {user_code}",
            }
        )

    async def _token(self, request: web.Request) -> web.Response:
        form = form_of(await request.post())
        state = self.graph
        for_graph = form.get("scope") == f"{self.graph_url}/.default"
        if for_graph:
            state.tokens_asked += 1
            if state.token_status != 200:
                return _graph_error(state.token_status, "temporarily_unavailable", state.retry_after)
        client, how = await self._client(request, form)
        match form.get("grant_type"):
            case "authorization_code":
                grant = self._codes.pop(form.get("code", ""), None)
                challenge = b64(hashlib.sha256(form.get("code_verifier", "").encode()).digest())
                if grant is None or grant.redirect_uri != form.get("redirect_uri") or grant.challenge != challenge:
                    raise Refused("invalid_grant", "AADSTS70008: The provided authorization code is not valid")
            case "refresh_token":
                # It is good for every resource with consent, and is not used up.
                grant = self._refresh.get(form.get("refresh_token", ""))
                if grant is not None:
                    grant = replace(grant, scope=form.get("scope", grant.scope))
            case grant_type if grant_type == DEVICE_GRANT:
                device = self._devices.get(form.get("device_code", ""))
                if device is not None and device.state == "pending":
                    raise Refused("authorization_pending", "AADSTS70016: OAuth 2.0 device flow error")
                grant = None if device is None or device.used else device.grant
                if device is not None:
                    device.used = True
            case "client_credentials":
                if not how:
                    raise Refused("invalid_client", "AADSTS7000216: client_assertion or client_secret is required", 401)
                grant = Grant(client.client_id, form.get("scope", ""))
            case other:
                raise Refused("unsupported_grant_type", f"AADSTS70003: {other}")
        if grant is None or grant.client != client.client_id:
            raise Refused("invalid_grant", "AADSTS9002313: Invalid request")
        if not grant.user and for_graph:
            state.tokens[how] += 1
        headers = {"Cache-Control": "no-store, no-cache"}
        return web.json_response(self._answer(grant, client, form), headers=headers)

    async def _trap(self, request: web.Request) -> web.Response:
        return web.json_response({"value": []})

    # -- Graph --------------------------------------------------------------------------------------------------------

    async def _member_objects(self, request: web.Request) -> web.Response:
        state, kind, object_id = self.graph, request.match_info["kind"], request.match_info["id"]
        state.asked.append(f"{kind}/{object_id}")
        state.at_once += 1
        state.most_at_once = max(state.most_at_once, state.at_once)
        try:
            until = time.monotonic() + state.slow
            while self.graph is state and (left := until - time.monotonic()) > 0:
                await asyncio.sleep(min(left, 0.1))
        finally:
            state.at_once -= 1
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        try:
            claims = jwt.decode(token, self.keys[-1].key.public_key(), ["RS256"], audience=self.graph_url)
            if scheme != "Bearer" or claims["appid"] not in self.applications or state.revoked:
                raise ValueError("not a token for Graph")
        except (jwt.PyJWTError, KeyError, ValueError):
            state.revoked = False
            return _graph_error(401, "InvalidAuthenticationToken")
        if not state.permitted:
            return _graph_error(403, "Authorization_RequestDenied")
        if state.status != 200:
            return _graph_error(state.status, state.code, state.retry_after)
        if state.body:
            return web.Response(body=state.body, content_type="application/json")
        if (await request.json()) != {"securityEnabledOnly": True}:
            return _graph_error(400, "Request_BadRequest")
        people: Sequence[User | Application]
        people = list(self.users.values()) if kind == "users" else list(self.applications.values())
        found = next((one for one in people if one.object_id == object_id), None)
        if found is None:
            return _graph_error(404, "Request_ResourceNotFound")
        context = f"{self.graph_url}/v1.0/$metadata#Collection(Edm.String)"
        return web.json_response({"@odata.context": context, "value": list(found.groups)})

    # -- running ------------------------------------------------------------------------------------------------------

    @web.middleware
    async def _middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.requests[request.path.replace(TENANT, "TENANT")] += 1
        try:
            return await handler(request)
        except Refused as error:
            number = str(error.body["error_description"]).partition(":")[0].removeprefix("AADSTS")
            body = {**error.body, "error_codes": [int(number)] if number.isdigit() else [], "trace_id": _guid()}
            return web.json_response(body, status=error.status)

    def served(self) -> Sequence[web.Application]:
        """Return the login's and Graph's."""
        login = web.Application(middlewares=[self._middleware])
        login.add_routes(
            [
                web.get(f"/{TENANT}/v2.0/.well-known/openid-configuration", self._discovery),
                web.get(f"/{TENANT}/.well-known/openid-configuration", self._discovery),
                web.get(f"/{TENANT}/discovery/v2.0/keys", self._jwks),
                web.get(f"/{TENANT}/discovery/keys", self._jwks),
                web.get(f"/{TENANT}/oauth2/v2.0/authorize", self._authorize),
                web.post(f"/{TENANT}/oauth2/v2.0/token", self._token),
                web.post(f"/{TENANT}/oauth2/v2.0/devicecode", self._device_code),
                web.route("*", "/trap/{rest:.*}", self._trap),
            ]
        )
        graph = web.Application()
        members = r"/v1.0/{kind:users|servicePrincipals}/{id}/getMemberObjects"
        graph.add_routes([web.post(members, self._member_objects)])
        return [login, graph]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.graph = GraphState()  # requests that are held back end
        super().__exit__(kind, error, trace)


def _key_of(credential: Federated, kid: str) -> Any:
    """The public key of another issuer, by its discovery document."""
    context = ssl.create_default_context(cafile=credential.ca_file)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    with opener.open(f"{credential.issuer}/.well-known/openid-configuration", timeout=10) as answer:
        where = json.load(answer)["jwks_uri"]
    with opener.open(where, timeout=10) as answer:
        entry = next(one for one in json.load(answer)["keys"] if one["kid"] == kid)
    return jwt.PyJWK(entry, "RS256").key


def _graph_error(status: int, code: str, retry_after: str = "") -> web.Response:
    headers = {"Retry-After": retry_after} if retry_after else {}
    return web.json_response({"error": {"code": code, "message": code}}, status=status, headers=headers)


def _guid() -> str:
    return str(uuid.uuid4())


def _unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
