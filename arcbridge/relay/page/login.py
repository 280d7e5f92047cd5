"""Logs administrators in at the organisation's issuer for the page: the code flow of OpenID Connect with PKCE.

Nothing is kept here between two requests: what a login has begun with, and who has logged in, is in two cookies that
the relay seals with a key derived from its CA's, so that each of its processes, and each relay behind one public
address, reads them. The id token never leaves the relay. It is verified as the access tokens of the same issuer are,
for the audience of the page's own client, so that neither kind of token is good in the other's place. Invariant: a
code, a secret or a token is in no error, log or page.

Source: OpenID Connect Core 1.0 §3.1, RFC 7636 (PKCE), RFC 9207 (`iss`), RFC 6265bis (`__Host-`).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Final, NamedTuple
from urllib.parse import quote, urlencode

import jwt
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from arcbridge.errors import ArcbridgeError, ConfigError, Unauthenticated, Unreachable
from arcbridge.identity.authentication import AuthenticationConfig, IssuerConfig
from arcbridge.identity.claims import Identity
from arcbridge.identity.fetch import SendRequest
from arcbridge.identity.policy import Policy
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.net.address import origin_of
from arcbridge.settings.config import RelayPageConfig
from arcbridge.tasks import TaskSet, cancel_and_wait, within
from arcbridge.untrusted_json import read_json_object

CALLBACK: Final = "/page/callback"
LOGIN_LIFE: Final = 600
"""Seconds that a person may take at the issuer."""
MOST_LOGINS: Final = 5
"""Logins that one browser may have begun at a time, each in a tab of its own; the oldest is forgotten first."""
MOST_COOKIE: Final = 3800
"""Characters of a cookie's value; browsers keep 4096 bytes of name and value."""
DISCOVERED: Final = 300.0
"""Seconds for which the issuer's discovery document is kept."""
FAILED: Final = 10.0
"""Seconds for which it is kept that the issuer does not answer."""
FINISHED: Final = 10.0
"""Seconds within which the issuer has to answer all that the end of a login asks."""
MOST_PARAMETER: Final = 4096
"""Characters of a parameter of the issuer's answer."""
_AGAIN: Final = "log in again"
_ERROR: Final = re.compile(r"[a-z_]{1,40}", re.ASCII)
"""What is shown of an error: a code of RFC 6749 §4.1.2.1, and nothing that was made up."""


class CookieSeal:
    """Seals small documents into cookies, and opens them for as long as they may live."""

    def __init__(self, secret: bytes, purpose: str) -> None:
        """`purpose`: a cookie of one purpose opens for no other; what all relays that share cookies call it."""
        info = b"arcbridge page 1\0" + purpose.encode()
        self._fernet = Fernet(base64.urlsafe_b64encode(HKDFExpand(SHA256(), 32, info).derive(secret)))

    def seal(self, document: Mapping[str, object], now: float) -> str:
        """Return the value of a cookie. Raises `Unauthenticated` for one that browsers would not keep."""
        data = json.dumps(document, separators=(",", ":")).encode()
        value = self._fernet.encrypt_at_time(data, int(now)).decode()
        if len(value) > MOST_COOKIE:
            raise Unauthenticated(
                "your login is too large for the page: your name and the groups that [[admin]] tables name"
            )
        return value

    def open(self, value: str, life: float, now: float) -> dict[str, Any] | None:
        """Return the document; None where it is too old, or not sealed here."""
        # A byte that is no UTF-8 arrives as a surrogate, which cannot be encoded.
        if not 0 < len(value) <= MOST_COOKIE or not value.isascii():
            return None
        try:
            return read_json_object(self._fernet.decrypt_at_time(value.encode(), int(life), int(now)))
        except InvalidToken:
            return None


class BegunLogin(NamedTuple):
    """A login that was begun in this browser, and to which the issuer's answer belongs."""

    state: str
    nonce: str
    proof: str
    """The verifier of RFC 7636."""
    answer: Mapping[str, str]


@dataclass(eq=False, repr=False)
class PageLogin:
    """Begins and ends logins at one issuer. `clock` returns unix seconds."""

    config: RelayPageConfig
    issuer_url: str
    redirect_uri: str
    verifier: TokenVerifier
    """One of the page's own."""
    tokens: TokenVerifier
    """The relay's, which follows each reload of the issuers."""
    ask: SendRequest
    seal: CookieSeal
    _: KW_ONLY
    clock: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._issuer: IssuerConfig | None = None
        self._known: dict[str, Any] | ArcbridgeError = {}
        """The discovery document, or why the issuer does not send it."""
        self._known_until = -math.inf
        """Monotonic seconds until which that counts."""
        self._discoveries = TaskSet()
        self._discovery: asyncio.Task[None] | None = None
        """The one for the issuer as it is now."""

    async def close(self) -> None:
        """End what is asked of the issuer."""
        await cancel_and_wait(*self._discoveries)

    async def begin(self, cookie: str = "") -> tuple[str, str]:
        """Return the issuer's address for a new login, and the cookie by which it is known when it ends. `cookie`: what
        the browser has of logins that other tabs have begun."""
        document = await self._discover()
        state, nonce, proof = (secrets.token_urlsafe(32) for _ in range(3))
        challenge = base64.urlsafe_b64encode(hashlib.sha256(proof.encode()).digest()).rstrip(b"=").decode()
        query = {
            "response_type": "code",
            "client_id": self.config.client_id,
            "redirect_uri": self.redirect_uri,
            "scope": " ".join(self.config.scopes),
            "state": state,
            "nonce": nonce,
            "code_challenge": challenge,
            "code_challenge_method": "S256",
        }
        url = document["authorization_endpoint"]
        new = {"state": state, "nonce": nonce, "proof": proof, "at": int(self.clock())}
        return f"{url}{'&' if '?' in url else '?'}{urlencode(query)}", self._sealed([*self._begun(cookie), new])

    def recognise(self, cookie: str, answer: Mapping[str, str]) -> BegunLogin:
        """Return the login to which the issuer's answer, through the browser, belongs. Raises `Unauthenticated`; the
        issuer is not asked."""
        logins = self._begun(cookie)
        if not logins:
            raise Unauthenticated(f"this login was not begun in this browser, or it took too long: {_AGAIN}")
        if any(len(value) > MOST_PARAMETER for value in answer.values()):
            raise Unauthenticated(f"the issuer's answer is too long: {_AGAIN}")
        state = answer.get("state", "").encode()
        for one in logins:
            if hmac.compare_digest(state, one["state"].encode()):
                return BegunLogin(one["state"], one["nonce"], one["proof"], answer)
        raise Unauthenticated(f"the answer belongs to another login: {_AGAIN}")

    def without(self, cookie: str, ended: BegunLogin) -> str:
        """Return the cookie with the logins that other tabs have begun; empty where there are none."""
        others = [one for one in self._begun(cookie) if one["state"] != ended.state]
        return self._sealed(others) if others else ""

    async def finish(self, begun: BegunLogin) -> Identity:
        """Return who has logged in. Raises `Unauthenticated`, and `Unreachable` where the issuer does not answer."""
        async with within(FINISHED, Unreachable("the issuer takes too long to answer; try again later")):
            return await self._identity(begun)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _begun(self, cookie: str) -> list[dict[str, Any]]:
        """Return the logins of a cookie that may still end; a cookie of an earlier version has none."""
        now = self.clock()
        logins = (self.seal.open(cookie, LOGIN_LIFE, now) or {}).get("logins", ())
        return [one for one in logins if now - one["at"] < LOGIN_LIFE]

    def _sealed(self, logins: list[dict[str, Any]]) -> str:
        return self.seal.seal({"logins": logins[-MOST_LOGINS:]}, self.clock())

    async def _identity(self, begun: BegunLogin) -> Identity:
        answer, document = begun.answer, await self._discover()
        # RFC 9207 §2.4: an issuer that announces it always sends it.
        if answer.get("iss", "" if self._sends_iss(document) else self.issuer_url) != self.issuer_url:
            raise Unauthenticated(f"the answer comes from another issuer: {_AGAIN}")
        if "error" in answer or not answer.get("code"):
            code = _ERROR.fullmatch(answer.get("error", ""))
            why = f" ({code[0]})" if code else ""
            raise Unauthenticated(f"the issuer did not log you in{why}: {_AGAIN}, or ask who administers it")
        token = await self._redeem(document["token_endpoint"], answer["code"], begun.proof)
        identity = await self.verifier.verify(token)
        claims = jwt.decode(token, options={"verify_signature": False})  # the very text that was verified
        if not hmac.compare_digest(str(claims.get("nonce", "")).encode(), begun.nonce.encode()):
            raise Unauthenticated(f"the id token belongs to another login: {_AGAIN}")
        if claims.get("azp", self.config.client_id) != self.config.client_id:
            raise Unauthenticated(f"the id token was issued to another client (azp): {_AGAIN}")
        return identity

    @staticmethod
    def _sends_iss(document: Mapping[str, Any]) -> bool:
        return document.get("authorization_response_iss_parameter_supported") is True

    def _follow(self) -> IssuerConfig:
        """Return the issuer as the authentication file has it now, for the page's audience alone."""
        current = self.tokens.config.issuer(self.issuer_url)
        if current is None:
            raise Unauthenticated("the page's issuer is not in the relay's authentication file any more")
        issuer, acceptance = replace(current, audiences=(self.config.client_id,)), self.tokens.acceptance
        if (issuer, acceptance) != (self._issuer, self.verifier.acceptance):
            self.verifier.replace(AuthenticationConfig((issuer,)), acceptance)
        if issuer != self._issuer:
            self._issuer, self._known_until, self._discovery = issuer, -math.inf, None
        return self._issuer

    async def _discover(self) -> dict[str, Any]:
        """Return the discovery document. However many logins wait for it, the issuer is asked once, and not again for
        `FAILED` after a failure."""
        issuer = self._follow()
        while self.monotonic() >= self._known_until:
            if self._discovery is None:
                self._discovery = self._discoveries.start(self._ask_discovery(issuer))
            await asyncio.shield(self._discovery)
            issuer = self._follow()
        if isinstance(self._known, ArcbridgeError):
            raise self._known.with_traceback(None)
        return self._known

    async def _ask_discovery(self, issuer: IssuerConfig) -> None:
        found: dict[str, Any] | ArcbridgeError
        kept = DISCOVERED
        try:
            found = await self._read_discovery(issuer)
        except ArcbridgeError as error:
            found, kept = error, FAILED
        finally:
            if self._issuer is issuer:
                self._discovery = None
        if self._issuer is issuer:
            self._known, self._known_until = found, self.monotonic() + kept

    async def _read_discovery(self, issuer: IssuerConfig) -> dict[str, Any]:
        url = issuer.discovery_url or issuer.url.rstrip("/") + "/.well-known/openid-configuration"
        reply = await self.ask("GET", url, issuer.ca_pem, headers={"Accept": "application/json"})
        document = read_json_object(reply.body) if reply.status == 200 else {}
        if document.get("issuer") != issuer.url:
            raise Unreachable("the issuer does not say how to log in there (its discovery document); try again later")
        try:
            for name in ("authorization_endpoint", "token_endpoint"):
                origin_of(str(document.get(name)))
        except ConfigError as error:
            raise Unreachable("the issuer's discovery document names an endpoint that is no https:// URL") from error
        return document

    async def _redeem(self, endpoint: str, code: str, proof: str) -> str:
        """Return the id token for a code."""
        client, file = self.config.client_id, self.config.client_secret_file
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": self.redirect_uri,
            "code_verifier": proof,
            **({"client_id": client} if file is None else {}),
        }
        headers = {"Accept": "application/json", "Content-Type": "application/x-www-form-urlencoded"}
        if file is not None:
            try:
                secret = file.read_text(encoding="ascii").strip()
            except (OSError, ValueError):
                raise ArcbridgeError("page.client_secret_file cannot be read") from None
            word = f"{quote(client, safe='')}:{quote(secret, safe='')}"  # RFC 6749 §2.3.1
            headers["Authorization"] = f"Basic {base64.b64encode(word.encode()).decode()}"
        ca_pem = None if self._issuer is None else self._issuer.ca_pem
        reply = await self.ask("POST", endpoint, ca_pem, headers=headers, body=urlencode(form).encode())
        token = read_json_object(reply.body).get("id_token") if reply.status == 200 else None
        if not isinstance(token, str):
            raise Unauthenticated(f"the issuer gave no id token for this login (code {reply.status}): {_AGAIN}")
        return token


class PageSessions:
    """Reads and writes the cookie of a person who has logged in."""

    def __init__(self, seal: CookieSeal, life: float, *, clock: Callable[[], float] = time.time) -> None:
        self._seal = seal
        self.life = life
        self._clock = clock

    def cookie(self, identity: Identity, policy: Policy) -> str:
        """Return the cookie's value. Of the groups it has those that an `[[admin]]` names."""
        administering = frozenset().union(*(one.rule.groups for one in policy.admins))
        document = {
            "user": identity.username,
            "subject": identity.subject,
            "issuer": identity.issuer,
            "actor": identity.actor,
            "issued_at": identity.issued_at,
            "groups": [group for group in identity.groups if group in administering],
        }
        return self._seal.seal(document, self._clock())

    def identity(self, cookie: str) -> Identity | None:
        """Return who has logged in; None where no login is under way any more."""
        now = self._clock()
        found = self._seal.open(cookie, self.life, now)
        if found is None:
            return None
        return Identity(
            found["user"], "", tuple(found["groups"]), found["subject"], found["issuer"], now + self.life,
            issued_at=found["issued_at"], actor=found.get("actor", ""),
        )  # fmt: skip
