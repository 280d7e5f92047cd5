"""Logins of administrators at the page: what the issuer is asked, and every answer that is not the right one."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import urllib.parse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arcbridge.errors import ArcbridgeError, Unauthenticated, Unreachable
from arcbridge.identity.authentication import AuthenticationConfig
from arcbridge.identity.claims import Identity
from arcbridge.identity.policy import Policy
from arcbridge.identity.verifier import Acceptance, TokenVerifier
from arcbridge.relay.page import login
from arcbridge.relay.page.login import FAILED, LOGIN_LIFE, MOST_COOKIE, MOST_LOGINS, CookieSeal, PageLogin, PageSessions
from tests.relay.page.page_station import ADMINS, CLIENT, CONFIG, ISSUER, REDIRECT, MemoryIssuer, login_of
from tests.support.clock import Clock

CODE = "the-code-that-must-not-be-seen"


class Attempt:
    """One login that has begun."""

    def __init__(self, **config: Any) -> None:
        self.clock = Clock(1_900_000_000.0)
        self.issuer = MemoryIssuer(self.clock)
        self.tokens = TokenVerifier(CONFIG, self.issuer, self.clock)
        self.login: PageLogin = login_of(self.issuer, self.clock, self.tokens, **config)

    async def begin(self) -> Attempt:
        self.url, self.cookie = await self.login.begin()
        self.asked = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.url).query))
        self.issuer.nonce = self.asked["nonce"]
        self.answer = {"code": CODE, "state": self.asked["state"], "iss": ISSUER}
        return self

    async def finish(self, **changes: str) -> Identity:
        return await self.login.finish(self.login.recognise(self.cookie, {**self.answer, **changes}))

    async def refused(self, words: str, **changes: str) -> None:
        with pytest.raises(Unauthenticated, match=words) as error:
            await self.finish(**changes)
        assert CODE not in str(error.value)


def changed(**settings: Any) -> AuthenticationConfig:
    """The authentication file with other settings of the issuer."""
    return AuthenticationConfig(tuple(replace(one, **settings) for one in CONFIG.issuers))


async def test_a_login_by_code_pkce_state_and_nonce() -> None:
    attempt = await Attempt().begin()
    assert attempt.url.startswith(f"{ISSUER}/authorize?")
    assert (attempt.asked["response_type"], attempt.asked["client_id"]) == ("code", CLIENT)
    assert (attempt.asked["redirect_uri"], attempt.asked["scope"]) == (REDIRECT, "openid profile email")
    assert attempt.asked["code_challenge_method"] == "S256"
    assert min(len(attempt.asked[name]) for name in ("state", "nonce", "code_challenge")) >= 43
    identity = await attempt.finish()
    assert (identity.username, identity.issuer) == ("chief", ISSUER)
    ((form, headers),) = attempt.issuer.requests
    proof = hashlib.sha256(form.pop("code_verifier").encode()).digest()
    assert base64.urlsafe_b64encode(proof).rstrip(b"=").decode() == attempt.asked["code_challenge"]
    assert form == {"grant_type": "authorization_code", "code": CODE, "redirect_uri": REDIRECT, "client_id": CLIENT}
    assert "Authorization" not in headers
    # What is secret is in the cookie, and nobody reads it there.
    assert attempt.asked["state"] not in attempt.cookie
    assert (await Attempt().begin()).asked["state"] != attempt.asked["state"]


async def test_a_client_with_a_secret(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("a:secret\n")
    attempt = await Attempt(client_secret_file=tmp_path / "secret", scopes=("openid", "groups")).begin()
    assert attempt.asked["scope"] == "openid groups"
    await attempt.finish()
    form, headers = attempt.issuer.requests[0]
    assert headers["Authorization"] == "Basic " + base64.b64encode(b"page:a%3Asecret").decode()
    assert "client_id" not in form
    (tmp_path / "secret").unlink()
    with pytest.raises(ArcbridgeError, match="client_secret_file cannot be read"):
        await attempt.finish()


async def test_k10_an_answer_of_another_login_is_refused() -> None:
    """docs/threats.md#K10."""
    attempt = await Attempt().begin()
    other = (await attempt.login.begin())[1]
    await attempt.refused("another login", state="x")
    await attempt.refused("another login", state="")
    own, attempt.cookie = attempt.cookie, other
    await attempt.refused("another login")
    for attempt.cookie in ("", own[:-4] + "AAAA", "x" * 10_000, CookieSeal(b"other", "login").seal({}, 1.9e9)):
        await attempt.refused("not begun in this browser")
    attempt.cookie = own
    attempt.issuer.nonce = "another"
    await attempt.refused("belongs to another login")
    attempt.clock.now += LOGIN_LIFE + 1
    await attempt.refused("took too long")
    assert len(attempt.issuer.requests) == 1


async def test_k10_each_tab_ends_the_login_that_it_has_begun() -> None:
    """docs/threats.md#K10: a second tab breaks no first one, and what is kept of them is bounded."""
    attempt = await Attempt().begin()
    cookie, asked = attempt.cookie, [attempt.asked]
    for _ in range(MOST_LOGINS + 20):
        url, cookie = await attempt.login.begin(cookie)
        asked.append(dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(url).query)))
        assert len(cookie) < MOST_COOKIE / 2
        attempt.clock.now += 1
    attempt.cookie = cookie
    for one in asked[:-MOST_LOGINS]:
        await attempt.refused("another login", state=one["state"])
    for one in (asked[-1], *asked[-MOST_LOGINS:-1]):
        attempt.issuer.nonce = one["nonce"]
        begun = attempt.login.recognise(attempt.cookie, {**attempt.answer, "state": one["state"]})
        assert (await attempt.login.finish(begun)).username == "chief"
        attempt.cookie = attempt.login.without(attempt.cookie, begun)
        if attempt.cookie:
            await attempt.refused("another login", state=one["state"])
    assert attempt.cookie == ""


async def test_a_later_tab_makes_no_login_live_longer() -> None:
    attempt = await Attempt().begin()
    attempt.clock.now += LOGIN_LIFE - 1
    _, attempt.cookie = await attempt.login.begin(attempt.cookie)
    attempt.login.recognise(attempt.cookie, attempt.answer)
    attempt.clock.now += 1
    await attempt.refused("another login")


async def test_k10_an_answer_of_another_issuer_or_for_another_client_is_refused() -> None:
    """docs/threats.md#K10; RFC 9207."""
    attempt = await Attempt().begin()
    await attempt.refused("another issuer", iss="https://evil.test")
    del attempt.answer["iss"]
    await attempt.refused("another issuer")
    attempt.issuer.document["authorization_response_iss_parameter_supported"] = False
    attempt.clock.now += 301
    attempt.issuer.claims = {"aud": "arcbridge-relay"}
    await attempt.refused("audience")
    attempt.issuer.claims = {"aud": [CLIENT, "another"], "azp": "another"}
    await attempt.refused("another client")
    attempt.issuer.claims = {"iss": "https://evil.test"}
    await attempt.refused("issuer")
    attempt.issuer.claims = {"exp": 1}
    await attempt.refused("expired")
    attempt.issuer.claims = {}
    assert (await attempt.finish()).username == "chief"


async def test_what_the_issuer_refuses_and_what_is_no_answer() -> None:
    attempt = await Attempt().begin()
    await attempt.refused(r"did not log you in \(access_denied\)", error="access_denied")
    await attempt.refused("did not log you in: ", error="Call +1 555 now")
    await attempt.refused("did not log you in", code="")
    await attempt.refused("too long", code="x" * 5000)
    attempt.issuer.status = 400
    await attempt.refused("code 400")
    assert len(attempt.issuer.requests) == 1
    for change in ({"issuer": "https://evil.test"}, {"token_endpoint": "http://issuer.test/token"}):
        attempt.issuer.document |= change
        attempt.clock.now += 301
        with pytest.raises(Unreachable, match="discovery document"):
            await attempt.login.begin()


async def test_k13_a_silent_issuer_is_asked_once() -> None:
    """docs/threats.md#K13: however many strangers begin a login, and again only after a while."""
    attempt = Attempt()
    issuer, begin = attempt.issuer, attempt.login.begin
    issuer.answers.clear()
    first, *others = [asyncio.create_task(begin()) for _ in range(50)]
    await asyncio.sleep(0.01)
    first.cancel()  # one that leaves takes nothing from the others
    issuer.document["issuer"] = "https://evil.test"
    issuer.answers.set()
    found = await asyncio.gather(*others, return_exceptions=True)
    assert {type(one) for one in found} == {Unreachable}
    for _ in range(50):
        with pytest.raises(Unreachable, match="discovery document"):
            await begin()
    assert issuer.discoveries == 1
    issuer.document["issuer"] = ISSUER
    attempt.clock.now += FAILED
    await asyncio.gather(*(begin() for _ in range(50)))
    assert issuer.discoveries == 2
    # Another issuer's answer counts for nothing.
    attempt.tokens.replace(changed(discovery_url="https://issuer.test/other"), Acceptance())
    issuer.answers.clear()
    waiting = asyncio.create_task(begin())
    await asyncio.sleep(0.01)
    attempt.tokens.replace(CONFIG, Acceptance())
    issuer.answers.set()
    await waiting
    assert issuer.discoveries == 4
    await attempt.login.close()


async def test_k13_the_end_of_a_login_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#K13."""
    monkeypatch.setattr(login, "FINISHED", 0.05)
    attempt = await Attempt().begin()
    attempt.issuer.answers.clear()
    with pytest.raises(Unreachable, match="takes too long"):
        await attempt.finish()


async def test_a_reload_of_the_issuers_counts() -> None:
    attempt = await Attempt().begin()
    assert (await attempt.finish()).username == "chief"
    attempt.tokens.replace(CONFIG, Acceptance(max_lifetime=300.0))  # id tokens here are valid for 600 s
    await attempt.refused("valid for more than 5 min")
    attempt.tokens.replace(CONFIG, Acceptance())
    assert (await attempt.finish()).username == "chief"
    attempt.tokens.replace(AuthenticationConfig(()), Acceptance())
    await attempt.refused("not in the relay's authentication file")


def test_cookies_of_sessions() -> None:
    clock = Clock(1_900_000_000.0)
    seal = CookieSeal(b"secret", "session")
    sessions, policy = PageSessions(seal, 3600.0, clock=clock), Policy.load(ADMINS)
    identity = Identity("sam", "", ("shop-operators", "chess"), f"{ISSUER}#sam", ISSUER, 0.0, issued_at=7.0)
    cookie = sessions.cookie(identity, policy)
    found = sessions.identity(cookie)
    assert (found.names, found.groups, found.issued_at) == (identity.names, ("shop-operators",), 7.0)
    assert PageSessions(CookieSeal(b"secret", "login"), 3600.0, clock=clock).identity(cookie) is None
    assert PageSessions(CookieSeal(b"another", "session"), 3600.0, clock=clock).identity(cookie) is None
    for broken in ("", "x", cookie[:-1], cookie[:40] + "A" + cookie[41:], "é" * 10, "x" * (MOST_COOKIE + 1)):
        assert sessions.identity(broken) is None, broken
    clock.now += 3601
    assert sessions.identity(cookie) is None
    long = Identity("s" * 4000, "", (), "", ISSUER, 0.0)
    with pytest.raises(Unauthenticated, match="too large"):
        sessions.cookie(long, policy)
