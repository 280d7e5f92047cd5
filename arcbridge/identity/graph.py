"""The groups of one Entra ID tenant's users and applications, as Microsoft Graph knows them.

Entra ID leaves `groups` out of a token where there are too many, and says so with `hasgroups` or `_claim_names`. This
module then asks Graph (`getMemberObjects`) as an application of its own. Where Graph is, and of which tenant it tells,
the settings say; an address in the token is not looked at. Invariant: the answer is either all groups of the object
that the verified token names, or an error.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from arcbridge.errors import ConfigError, Unreachable
from arcbridge.identity.authentication import is_ca, wrong_with_url
from arcbridge.identity.claims import MAX_GROUPS
from arcbridge.identity.fetch import Reply, SendRequest
from arcbridge.identity.graph_token import TOLD_CALLER, Failure, GraphToken
from arcbridge.identity.lookups import Lookups
from arcbridge.identity.refusal import GroupsUnavailable, TokenRefused
from arcbridge.refusals import RefusalRule
from arcbridge.untrusted_json import read_json_object

if TYPE_CHECKING:
    from arcbridge.settings.config import GraphConfig

TOKEN_ENDPOINT = "https://login.microsoftonline.com/{tenant}/oauth2/v2.0/token"
MAX_KEEP = 3600.0
"""Seconds: the largest `cache`. A token lives for 60 to 90 minutes, and its groups are no newer than it."""
BACK_OFF = 5.0
"""Seconds without requests after Graph has said that it is busy, where it does not say how long."""
MAX_BACK_OFF = 120.0
KEEP_DENIED = 900.0
"""Seconds for which a self-check tells that Graph has refused the application (403)."""
_GUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII)
_TOO_MANY: Final = "Directory_ResultSizeLimitExceeded"
"""Graph's code for a user with more groups than it tells, which is 11,000 ("directoryObject: getMemberObjects")."""
_QUESTION: Final = b'{"securityEnabledOnly": true}'
"""Security groups, direct and nested, and neither distribution lists nor roles: what can be bound in a cluster."""


def check(name: str, settings: GraphConfig) -> None:
    """Raise ConfigError, which names the setting, unless `[graph.NAME]` can work. Reads no file."""
    at = f"graph.{name}"
    if not settings.issuers:
        raise ConfigError(f"{at}.issuers: missing: the issuers (issuer.url of the authentication file) it is for")
    if _GUID.fullmatch(settings.tenant.lower()) is None:
        raise ConfigError(f"{at}.tenant: must be the directory (tenant) id, as in the claim tid")
    if not settings.client_id:
        raise ConfigError(f"{at}.client_id: missing: the application as which Microsoft Graph is asked")
    ways = [
        name
        for name in ("certificate_file", "client_secret_file", "federated_token_file")
        if getattr(settings, name) is not None
    ]
    if len(ways) != 1:
        raise ConfigError(
            f"{at}: exactly one of certificate_file (with key_file), client_secret_file and federated_token_file is "
            f"needed{', and there are ' + ' and '.join(ways) if ways else ''}"
        )
    if (settings.key_file is None) != (settings.certificate_file is None):
        raise ConfigError(f"{at}.key_file: needed with certificate_file, and with nothing else")
    for key in ("url", "token_endpoint"):
        if value := getattr(settings, key):
            why = wrong_with_url(value) or ("" if value.isascii() else "must have ASCII characters alone")
            if why:
                raise ConfigError(f"{at}.{key}: {why}")
    if not 0 < settings.cache <= MAX_KEEP:
        raise ConfigError(f"{at}.cache: must be above 0 and at most {MAX_KEEP / 3600:.0f} h")


def points_elsewhere(claims: Mapping[str, Any]) -> bool:
    """Return whether Entra ID left the groups out of this token because they were too many."""
    if claims.get("groups") is not None:
        return False
    names = claims.get("_claim_names")
    return claims.get("hasgroups") in (True, "true") or (isinstance(names, Mapping) and "groups" in names)


def is_application(claims: Mapping[str, Any]) -> bool:
    """Return whether a token of Entra ID is an application's or managed identity's, and no user's.

    `idtyp` says it where it is configured; without it `sub` and `oid` of such a token are the same (Microsoft, "Access
    token claims reference").
    """
    kind = claims.get("idtyp")
    return kind == "app" or (kind is None and claims.get("oid") == claims.get("sub"))


class Directory:
    """One tenant at Microsoft Graph, by settings that have passed `check`. `clock`: unix seconds; `monotonic`: seconds.
    Raises ConfigError for a CA that cannot be read."""

    def __init__(
        self,
        name: str,
        settings: GraphConfig,
        ask: SendRequest,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.at = f"graph.{name}"
        """The table of the settings."""
        self._tenant = settings.tenant.lower()
        self._url = settings.url.rstrip("/")
        self._token_endpoint = settings.token_endpoint or TOKEN_ENDPOINT.format(tenant=self._tenant)
        self._ca_pem = None if settings.ca_file is None else _read_ca(settings.ca_file, f"{self.at}.ca_file")
        self._ask = ask
        self._monotonic = monotonic
        self.lookups = Lookups(monotonic, settings.cache)
        self.token = GraphToken(
            self.at,
            settings,
            self._token_endpoint,
            f"{self._url}/.default",
            self._ca_pem,
            ask,
            clock=clock,
            monotonic=monotonic,
        )
        """The own token for Graph."""
        self._denied: dict[str, tuple[float, Failure]] = {}
        """Of which kinds of objects Graph does not tell this application, and until when (monotonic) it is known."""
        self._busy_until = 0.0

    async def groups(self, claims: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the object ids of all security groups of whom a verified token speaks for.

        Raises TokenRefused, or GroupsUnavailable where Graph does not say.
        """
        tenant, object_id = claims.get("tid"), claims.get("oid")
        if not isinstance(tenant, str) or tenant.lower() != self._tenant:
            raise TokenRefused(
                RefusalRule.CLAIMS_GROUPS_TENANT,
                "the token is of another tenant than the one whose groups can be looked up here",
            )
        if not isinstance(object_id, str) or _GUID.fullmatch(object_id.lower()) is None:
            raise TokenRefused(
                RefusalRule.CLAIMS_GROUPS_OID,
                "the token has too many groups, and does not say whose they are (claim oid)",
            )
        kind = "servicePrincipals" if is_application(claims) else "users"
        key = (kind, object_id.lower())
        return await self.lookups.get(key, partial(self._members, *key), "Microsoft Graph")

    async def look(self) -> Failure | None:
        """See to it that there is an own token; return why there is none, or no new one, or what Graph refuses."""
        failure = await self.token.look()
        now = self._monotonic()
        return failure or next((denied for until, denied in self._denied.values() if now < until), None)

    async def close(self) -> None:
        """End what is under way."""
        await self.lookups.close()
        await self.token.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _members(self, kind: str, object_id: str) -> tuple[str, ...]:
        token = await self.token.get()
        reply = await self._question(kind, object_id, token)
        if reply.status == 401:  # this application's token may have been revoked before its end
            token = await self.token.get(refused=token)
            reply = await self._question(kind, object_id, token)
        if reply.status == 404:
            raise TokenRefused(
                RefusalRule.CLAIMS_GROUPS_UNKNOWN, "the directory does not know the user of the token (any more)"
            )
        if reply.status in (401, 403):
            why = (
                f"Microsoft Graph refuses the application of {self.at} (status {reply.status}): it needs the "
                "permissions of docs/how-to/entra-id.md, with admin consent"
            )
            if reply.status == 401:
                self.token.reject(token, why)
            else:
                # Per kind, because an application may be allowed to read users and not service principals.
                known_until = self._monotonic() + KEEP_DENIED
                self._denied[kind] = (known_until, Failure("graph_permission", f"{why}; asked about {kind}"))
                self.token.on_failure()
            raise GroupsUnavailable(TOLD_CALLER, detail=why)
        if reply.status in (429, 503):
            wait = BACK_OFF if reply.retry_after is None else min(max(reply.retry_after, 1.0), MAX_BACK_OFF)
            self._busy_until = self._monotonic() + wait
            raise GroupsUnavailable(f"Microsoft Graph is busy (status {reply.status})")
        document = read_json_object(reply.body)
        if reply.status == 400 and _code_of(document) == _TOO_MANY:
            raise _too_many()
        if reply.status != 200:
            raise GroupsUnavailable(f"Microsoft Graph gave no list of groups (status {reply.status})")
        self._denied.pop(kind, None)
        self.token.accepted()
        found = document.get("value")
        if not isinstance(found, list) or not all(map(_is_guid, found)):
            raise GroupsUnavailable(f"Microsoft Graph gave no list of groups (status {reply.status})")
        if len(found) > MAX_GROUPS:
            raise _too_many()
        if any(name.endswith("nextLink") for name in document):
            raise GroupsUnavailable("Microsoft Graph gave a part of the groups alone, which is never taken for all")
        return tuple(dict.fromkeys(found))

    async def _question(self, kind: str, object_id: str, token: str) -> Reply:
        if self._monotonic() < self._busy_until:
            raise GroupsUnavailable("Microsoft Graph is busy", asked=False)
        url = f"{self._url}/v1.0/{kind}/{object_id}/getMemberObjects"
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Accept": "application/json"}
        try:
            return await self._ask("POST", url, self._ca_pem, headers=headers, body=_QUESTION)
        except Unreachable as error:
            raise GroupsUnavailable("Microsoft Graph does not answer", detail=f"{self.at}: {error.message}") from error


def _is_guid(value: object) -> bool:
    return isinstance(value, str) and _GUID.fullmatch(value.lower()) is not None


def _code_of(document: Mapping[str, Any]) -> object:
    """Return the code of an error of Graph (Microsoft, "Microsoft Graph error responses")."""
    error = document.get("error")
    return error.get("code") if isinstance(error, Mapping) else None


def _too_many() -> TokenRefused:
    return TokenRefused(RefusalRule.CLAIMS_GROUPS_MANY, f"the user of the token has more than {MAX_GROUPS} groups")


def _read_ca(path: Path, setting: str) -> str:
    try:
        text = path.read_text("ascii", "ignore")  # comments may be in UTF-8
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read: {type(error).__name__}") from error
    if not is_ca(text):
        raise ConfigError(f"{setting}: {path} holds no PEM certificate")
    return text
