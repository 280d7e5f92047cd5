"""The groups of one Entra ID tenant's users and applications, as Microsoft Graph knows them.

Entra ID leaves `groups` out of a token where there are too many, and says so with `hasgroups` or `_claim_names`. This
module then asks Graph (`getMemberObjects`) as an application of its own. Where Graph is, and of which tenant it tells,
the settings say; an address in the token is not looked at. Invariant: the answer is either all groups of the object
that the verified token names, or an error.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlencode, urlsplit

from arcbridge.errors import ArcbridgeError, ConfigError, Unreachable
from arcbridge.identity.claims import MAX_GROUPS
from arcbridge.identity.client_assertion import asserted, read_word, sign_assertion
from arcbridge.identity.fetch import Ask, ReplyDocument
from arcbridge.identity.lookups import Lookups
from arcbridge.identity.refusal import GroupsUnavailable, TokenRefused

TOKEN_ENDPOINT = "https://login.microsoftonline.com/{tenant}/oauth2/v2.0/token"
MAX_KEEP = 3600.0
"""Seconds: the largest `cache`. A token lives for 60 to 90 minutes, and its groups are no newer than it."""
BACK_OFF = 5.0
"""Seconds without requests after Graph has said that it is busy, where it does not say how long."""
MAX_BACK_OFF = 120.0
_MARGIN = 300.0
"""Seconds before its end at which the own token is renewed, at most half of its life."""
_GUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.ASCII)
_OAUTH_ERROR: Final = re.compile(r"[a-z_]{1,40}", re.ASCII)
_QUESTION: Final = b'{"securityEnabledOnly": true}'
"""Security groups, direct and nested, and neither distribution lists nor roles: what can be bound in a cluster."""


class GraphSettings(Protocol):
    """`config.GraphConfig`, which says what each is."""

    @property
    def issuers(self) -> tuple[str, ...]: ...
    @property
    def tenant(self) -> str: ...
    @property
    def client_id(self) -> str: ...
    @property
    def certificate_file(self) -> Path | None: ...
    @property
    def key_file(self) -> Path | None: ...
    @property
    def client_secret_file(self) -> Path | None: ...
    @property
    def federated_token_file(self) -> Path | None: ...
    @property
    def url(self) -> str: ...
    @property
    def token_endpoint(self) -> str: ...
    @property
    def ca_file(self) -> Path | None: ...
    @property
    def cache(self) -> float: ...


def check(name: str, settings: GraphSettings) -> None:
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
            _check_https(value, f"{at}.{key}")
    if not 0 < settings.cache <= MAX_KEEP:
        raise ConfigError(f"{at}.cache: must be above 0 and at most {MAX_KEEP / 3600:.0f} h")


def points_elsewhere(claims: Mapping[str, Any]) -> bool:
    """Tell whether Entra ID left the groups out of this token because they were too many."""
    if claims.get("groups") is not None:
        return False
    names = claims.get("_claim_names")
    return claims.get("hasgroups") in (True, "true") or (isinstance(names, Mapping) and "groups" in names)


def is_application(claims: Mapping[str, Any]) -> bool:
    """Tell whether a token of Entra ID is an application's or managed identity's, and no user's.

    `idtyp` says it where it is configured; without it `sub` and `oid` of such a token are the same (Microsoft, "Access
    token claims reference").
    """
    kind = claims.get("idtyp")
    return kind == "app" or (kind is None and claims.get("oid") == claims.get("sub"))


class Directory:
    """One tenant at Microsoft Graph. `clock`: unix seconds; `monotonic`: seconds. Raises ConfigError."""

    def __init__(
        self,
        name: str,
        settings: GraphSettings,
        ask: Ask,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        check(name, settings)
        self._at = f"graph.{name}"
        self._settings = settings
        self._tenant = settings.tenant.lower()
        self._url = settings.url.rstrip("/")
        self._token_endpoint = settings.token_endpoint or TOKEN_ENDPOINT.format(tenant=self._tenant)
        self._ca_pem = None if settings.ca_file is None else _read_ca(settings.ca_file, f"{self._at}.ca_file")
        self._ask = ask
        self._clock = clock
        self._monotonic = monotonic
        self.lookups = Lookups(monotonic, settings.cache)
        self._renewing = asyncio.Lock()
        self._token = ""
        self._renew_at = 0.0
        self._busy_until = 0.0

    async def groups(self, claims: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the object ids of all security groups of whom a verified token speaks for.

        Raises TokenRefused, or GroupsUnavailable where Graph does not say.
        """
        tenant, object_id = claims.get("tid"), claims.get("oid")
        if not isinstance(tenant, str) or tenant.lower() != self._tenant:
            raise TokenRefused(
                "claims.groups.tenant", "the token is of another tenant than the one whose groups can be looked up here"
            )
        if not isinstance(object_id, str) or _GUID.fullmatch(object_id.lower()) is None:
            raise TokenRefused(
                "claims.groups.oid", "the token has too many groups, and does not say whose they are (claim oid)"
            )
        kind = "servicePrincipals" if is_application(claims) else "users"
        key = (kind, object_id.lower())
        return await self.lookups.get(key, partial(self._members, *key), "Microsoft Graph")

    async def close(self) -> None:
        """End what is under way."""
        await self.lookups.close()

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _members(self, kind: str, object_id: str) -> tuple[str, ...]:
        reply = await self._question(kind, object_id, await self._own_token())
        if reply.status == 401:  # the own token may have been revoked
            reply = await self._question(kind, object_id, await self._own_token(renew=True))
        if reply.status == 404:
            raise TokenRefused("claims.groups.unknown", "the directory does not know the user of the token (any more)")
        if reply.status in (401, 403):
            raise GroupsUnavailable(
                _NOT_ASKED,
                detail=f"Microsoft Graph refuses the application of {self._at} (status {reply.status}): it needs the "
                "permissions of docs/how-to/entra-id.md, with admin consent",
            )
        if reply.status in (429, 503):
            wait = BACK_OFF if reply.retry_after is None else min(max(reply.retry_after, 1.0), MAX_BACK_OFF)
            self._busy_until = self._monotonic() + wait
            raise GroupsUnavailable(f"Microsoft Graph is busy (status {reply.status})")
        document = _json_object(reply) if reply.status == 200 else {}
        found = document.get("value")
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise GroupsUnavailable(f"Microsoft Graph gave no list of groups (status {reply.status})")
        if len(found) > MAX_GROUPS or "@odata.nextLink" in document:
            raise TokenRefused("claims.groups.many", f"the user of the token has more than {MAX_GROUPS} groups")
        return tuple(dict.fromkeys(found))

    async def _question(self, kind: str, object_id: str, token: str) -> ReplyDocument:
        return await self._send(
            f"{self._url}/v1.0/{kind}/{object_id}/getMemberObjects",
            {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "Accept": "application/json"},
            _QUESTION,
            "Microsoft Graph",
        )

    async def _own_token(self, *, renew: bool = False) -> str:
        async with self._renewing:
            if not self._token or renew or self._monotonic() >= self._renew_at:
                await self._renew()
            return self._token

    async def _renew(self) -> None:
        self._token = ""
        settings = self._settings
        try:
            form = self._credential()
        except ArcbridgeError as error:
            raise GroupsUnavailable(
                _NOT_ASKED, detail=f"the credential for Microsoft Graph cannot be used ({error.message})"
            ) from error
        form |= {"grant_type": "client_credentials", "scope": f"{self._url}/.default"}
        reply = await self._send(
            self._token_endpoint,
            {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"},
            urlencode(form).encode(),
            "the token endpoint for Microsoft Graph",
        )
        document = _json_object(reply)
        token, life = document.get("access_token"), document.get("expires_in")
        if reply.status != 200 or not isinstance(token, str) or not token.isascii() or not token.isprintable():
            word = document.get("error")
            said = f", {word}" if isinstance(word, str) and _OAUTH_ERROR.fullmatch(word) else ""
            raise GroupsUnavailable(
                _NOT_ASKED,
                detail=f"the application {settings.client_id} of {self._at} gets no token for Microsoft Graph "
                f"(status {reply.status}{said})",
            )
        lasts = float(life) if isinstance(life, int | float) and not isinstance(life, bool) and life > 0 else 600.0
        self._renew_at = self._monotonic() + max(lasts - _MARGIN, lasts / 2)
        self._token = token

    def _credential(self) -> dict[str, str]:
        """The fields of a form that prove which application this is."""
        settings, at = self._settings, self._at
        if settings.certificate_file is not None and settings.key_file is not None:
            signed = sign_assertion(
                settings.client_id,
                self._token_endpoint,
                self._clock(),
                key=(settings.key_file, f"{at}.key_file"),
                certificate=(settings.certificate_file, f"{at}.certificate_file"),
            )
            return asserted(settings.client_id, signed)
        if settings.federated_token_file is not None:
            return asserted(settings.client_id, read_word(settings.federated_token_file, f"{at}.federated_token_file"))
        assert settings.client_secret_file is not None
        secret = read_word(settings.client_secret_file, f"{at}.client_secret_file")
        return {"client_id": settings.client_id, "client_secret": secret}

    async def _send(self, url: str, headers: Mapping[str, str], body: bytes, place: str) -> ReplyDocument:
        if self._monotonic() < self._busy_until:
            raise GroupsUnavailable("Microsoft Graph is busy")
        try:
            return await self._ask("POST", url, self._ca_pem, headers=headers, body=body)
        except Unreachable as error:
            raise GroupsUnavailable(f"{place} does not answer", detail=f"{self._at}: {error.message}") from error


_NOT_ASKED = "Microsoft Graph does not answer this end"
"""What a caller is told where the operator's application or its credential is at fault."""


def _json_object(reply: ReplyDocument) -> dict[str, Any]:
    try:
        document = json.loads(reply.body)
    except (ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _check_https(url: str, setting: str) -> None:
    try:
        parts = urlsplit(url)
        usable = parts.scheme == "https" and bool(parts.hostname) and not (parts.query or parts.fragment)
        usable = usable and "@" not in parts.netloc and url.isascii() and url.isprintable() and " " not in url
        _ = parts.port
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{setting}: must be an https URL without user information, query or fragment")


def _read_ca(path: Path, setting: str) -> str:
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting}: {path} cannot be read: {type(error).__name__}") from error
    if "-----BEGIN CERTIFICATE-----" not in text:
        raise ConfigError(f"{setting}: {path} holds no PEM certificate")
    return text
