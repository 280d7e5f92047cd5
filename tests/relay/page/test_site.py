"""The administrators' page over real TLS: who sees what, what another origin gets, and how much of it there may be."""

from __future__ import annotations

import asyncio
import html
import json
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp import web

from arcbridge.observe.metrics import Metrics
from arcbridge.relay.http import api
from arcbridge.relay.page import site
from arcbridge.relay.page.facts import EVERY
from arcbridge.relay.page.login import CALLBACK
from arcbridge.relay.page.site import LOGIN_COOKIE, LOGINS, REFUSED, SESSION_COOKIE
from arcbridge.relay.registry.base import UserRevocation
from tests.relay.page.page_station import ADMINS, CAME_BACK, ISSUER, PageRelay, at_once, paging
from tests.support.eventually import until

AGENT = {"agent": "a", "version": "1", "since": 1.0, "ready": True, "failing": "", "sessions": 2, "round_trip": 0.01,
         "relay_ca": "", "relay": "relay.test:443", "worker": None}  # fmt: skip
HOSTILE = '<img src=x onerror=alert(1)>\u202e"&'
PAGE = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}


@pytest.fixture
async def station(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PageRelay]:
    at_once(monkeypatch)
    record = {"ts": "2999-01-01T00:00:00Z", "stage": "complete", "by": "os", "actor": "root", "outcome": "done"}
    log = tmp_path / "audit.jsonl"
    with log.open("w") as file:
        for cluster in ("shop-1", "bank"):
            line = json.dumps({**record, "act": "cluster revoke", "arguments": {"cluster": cluster, "reason": HOSTILE}})
            file.write(f'{{"chain":"{"0" * 16}","seq":0,"prev":"{"0" * 64}",{line[1:]}\n')
    async with paging(tmp_path, str(log)) as station:
        for name in ("shop-1", "shop-2", "bank"):
            await station.relay.enrolled(name)
        relay = station.relay
        relay.rows["agents"] = [{**AGENT, "cluster": "shop-1"}, {**AGENT, "cluster": "bank", "failing": "audit:audit"}]
        relay.rows["policy"] = [{"relay": "relay.test:443", "worker": None, "hash": "0" * 12, "held": ""}]
        relay.rows["checks"] = [{"state": "failed", "hop": HOSTILE, "detail": HOSTILE, "remedy": HOSTILE, "worker": 1}]
        relay.rows["user"] = [{"from": "join", "at": 1.0, "groups": [HOSTILE], "more": 3}]
        sessions = [
            {"session": "5" * 16, "user": "ann", "cluster": one, "source": "1.2.3.4"} for one in ("shop-1", "bank")
        ]
        relay.rows["sessions"] = sessions
        relay.rows["refusals"] = [
            {"at": 1.0, "user": HOSTILE, "cluster": one, "code": "FORBIDDEN", "rule": "", "reason": HOSTILE, "times": 2,
             "session": "6" * 16} for one in ("shop-1", "bank")
        ]  # fmt: skip
        yield station


async def events(station: PageRelay, path: str = "/page/events") -> AsyncIterator[tuple[str, str]]:
    """Yield the events of a stream."""
    async with station.asked(path, **PAGE) as answer:
        assert answer.status == 200, await answer.text()
        name, data = "", list[str]()
        async for line in answer.content:
            field, _, value = line.decode().rstrip("\n").partition(": ")
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
            elif not field and data:
                yield name, "\n".join(data)
                data = []


async def test_other_cookies_are_not_parsed(station: PageRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 KiB of them took aiohttp's parser 0.2 s, of any stranger."""
    await station.log_in("chief")
    monkeypatch.setattr(web.BaseRequest, "cookies", property(lambda _: pytest.fail("all cookies are parsed")))
    ours = f'{SESSION_COOKIE}="{station.kept[SESSION_COOKIE]}"'
    assert "shop-1" in (await station.text(cookies={}, Cookie=f"{'a;' * 20_000} {ours}; b=c"))[1]
    assert "log in to see" in (await station.text(cookies={}, Cookie="a;" * 20_000))[1]
    for blank in ("\u2000", "\u00a0", "\x85"):
        other = f"{blank}{SESSION_COOKIE}=of-another-host; {ours}"
        assert "shop-1" in (await station.text(cookies={}, Cookie=other))[1]


async def test_the_way_in_and_out(station: PageRelay) -> None:
    status, text = await station.text()
    assert (status, "log in to see your clusters" in text, "shop-1" in text) == (200, True, False)
    async with station.asked("/page/login") as answer:
        cookie = answer.headers["Set-Cookie"]
    for word in (f"{LOGIN_COOKIE}=", "HttpOnly", "Secure", "SameSite=Lax", "Path=/", "Max-Age=600"):
        assert word in cookie
    station.kept.clear()  # what another tab has begun waits for its end
    assert await station.log_in("chief") == (303, "")
    assert station.kept.keys() == {SESSION_COOKIE}
    async with station.asked("/page") as answer:
        text, headers = await answer.text(), answer.headers
    assert headers["Content-Security-Policy"].startswith(
        "default-src 'none'; style-src 'self'; script-src 'self'; connect"
    )
    assert "'unsafe" not in headers["Content-Security-Policy"]
    assert (headers["Cache-Control"], headers["X-Content-Type-Options"]) == ("no-store", "nosniff")
    assert headers["Cross-Origin-Opener-Policy"] == headers["Cross-Origin-Resource-Policy"] == "same-origin"
    for word in ("shop-1", "shop-2", "bank", "relay.test:443", "2 of 3 clusters need you", "cluster revoke"):
        assert word in text, word
    for path, kind in (("/page/style.css", "text/css"), ("/page/script.js", "text/javascript")):
        async with station.asked(path, **PAGE) as answer:
            assert (answer.status, answer.content_type) == (200, kind)
    # As a browser sends the form of a page with this policy.
    assert headers["Referrer-Policy"] == "same-origin"
    form = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert await station.text("/page/logout", method="POST", Origin="https://relay.test", **form) == (303, "")
    assert station.kept == {}
    assert "log in to see" in (await station.text())[1]
    metrics = Metrics("relay")
    station.site.register(metrics)
    shown = metrics.render()[0].decode()
    assert metrics.read_failures == 0
    for line in ('page_logins_total{outcome="done"} 1.0', "page_streams 0.0", "page_facts_total 1.0"):
        assert f"arcbridge_relay_{line}" in shown


async def test_k10_a_link_of_another_site_breaks_no_login(station: PageRelay) -> None:
    """docs/threats.md#K10."""
    state = (await station.begin())["state"]
    for query in ("", "?code=x&state=y", f"?code=x&state={state}x"):
        assert (await station.text(f"{CALLBACK}{query}", **CAME_BACK))[0] == 401
        assert LOGIN_COOKIE in station.kept, query
    assert (await station.text(f"{CALLBACK}?code=x&state={state}&iss={ISSUER}", **CAME_BACK))[0] == 303
    assert station.kept.keys() == {SESSION_COOKIE}


async def test_two_tabs_log_in_one_after_the_other(station: PageRelay) -> None:
    station.issuer.user = "chief"
    first, second = await station.begin(), await station.begin()
    for asked, kept in ((first, {LOGIN_COOKIE, SESSION_COOKIE}), (second, {SESSION_COOKIE})):
        station.issuer.nonce = asked["nonce"]
        assert (await station.text(f"{CALLBACK}?code=x&state={asked['state']}&iss={ISSUER}", **CAME_BACK))[0] == 303
        assert station.kept.keys() == kept


async def test_k11_each_sees_what_is_theirs(station: PageRelay) -> None:
    """docs/threats.md#K11."""
    await station.log_in("sam")  # who makes join tokens for shop-*, and reads nothing else
    for path in ("/page", "/page?user=ann", "/page?cluster=bank", "/page?cluster=shop-1", "/page?q=bank"):
        status, text = await station.text(path)
        assert (status, "bank" in text.replace("“bank”", "").replace('value="bank"', "").replace(">bank<", "")) == (
            200,
            False,
        )
        assert ("cluster revoke" in text, "FORBIDDEN" in text, "1.2.3.4" in text) == (False, False, False)
    assert "1 of 2 clusters need you" in (await station.text())[1]
    async for name, data in events(station):
        assert name == "facts"
        assert ("shop-1" in data, "bank" in data, "cluster revoke" in data) == (True, False, False)
        break
    station.kept.clear()
    await station.log_in("reader")  # of shop-*
    text = (await station.text("/page?user=ann"))[1]
    assert "allow[0] (line 2), by the <bdi>user &quot;ann&quot;</bdi>: <bdi>shop-1</bdi>, <bdi>shop-2</bdi>" in text
    assert ("bank" in text, text.count("1.2.3.4"), "cluster revoke" in text, "Relays" in text) == (
        False,
        1,
        True,
        False,
    )
    text = (await station.text("/page?cluster=shop-1"))[1]
    assert ("FORBIDDEN" in text, "2 times" in text) == (True, True)
    assert "is not yours" in (await station.text("/page?cluster=bank"))[1]


async def test_k11_read_for_some_and_another_right_for_others(station: PageRelay) -> None:
    """docs/threats.md#K11: of a cluster that one may not read the page has what `cluster list` has, and no more."""
    await station.log_in("twice")  # who reads shop-*, and has every other right to bank
    text = (await station.text())[1]
    rows = [re.sub("<[^>]*>", "", one) for one in re.findall("<li>.*?</li>", text)]
    assert ("bank</a>" in text.replace("</bdi>", ""), len(rows)) == (True, 1), rows
    assert "cluster shop-1" in rows[0]
    text = (await station.text("/page?user=ann"))[1]
    assert ("<bdi>shop-2</bdi>" in text, "<bdi>bank</bdi> since" in text, text.count("1.2.3.4")) == (True, False, 1)
    assert "by the <bdi>user &quot;ann&quot;</bdi>: <bdi>shop-1</bdi>, <bdi>shop-2</bdi></li>" in text
    text = (await station.text("/page?cluster=bank"))[1]
    assert ("is not yours" in text, "FORBIDDEN" in text) == (True, False)
    async for _, data in events(station):
        assert ("cluster <bdi>shop-1" in data, "cluster <bdi>bank" in data, "Relays" in data) == (True, False, False)
        break


async def test_k11_who_administers_nothing_gets_one_answer(station: PageRelay) -> None:
    """docs/threats.md#K11."""
    status, text = await station.log_in("ann")
    assert (status, html.escape(REFUSED) in text) == (403, True)
    assert SESSION_COOKIE not in station.kept
    assert station.site.logins["refused"] == 1
    station.change_policy("")
    assert (await station.log_in("chief"))[0] == 403


async def test_k11_a_right_that_is_lost_ends_what_is_seen(station: PageRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#K11: at the next request, and before the next event of a page that is open."""
    monkeypatch.setattr("arcbridge.relay.page.facts.EVERY", 0.0)
    await station.log_in("chief")
    stream = events(station)
    assert (await anext(stream))[0] == "facts"
    station.change_policy(ADMINS.replace('"chief"', '"another"'))
    while (found := await anext(stream))[0] == "now":
        pass
    assert found[0] == "over"
    assert REFUSED in found[1]
    assert (await station.text())[0] == 403
    station.change_policy(ADMINS)
    assert (await station.text())[0] == 200
    now = int(station.relay.clock.now)
    station.relay.access.learn_users({"chief": UserRevocation("chief", now + 60, "stolen")})
    assert "were revoked (stolen)" in (await station.text())[1]
    assert (await station.text("/page/events", **PAGE))[0] == 401
    station.relay.access.learn_users({})
    station.relay.clock.now += 3601
    assert "your login is over" in (await station.text())[1]


async def test_k11_a_lost_right_is_noticed_while_no_facts_come(
    station: PageRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/threats.md#K11: of thousands of clusters there are new facts three times a minute, and none while another
    process does not answer."""
    monkeypatch.setattr(site, "LOOK", 0.1)
    await station.log_in("chief")
    stream = events(station)
    assert [(await anext(stream))[0], (await anext(stream))[0]] == ["facts", "now"]
    station.change_policy("")
    began = time.monotonic()
    assert (await anext(stream))[0] == "over"
    assert time.monotonic() - began < EVERY / 2
    station.change_policy(ADMINS)
    hangs = asyncio.Event()

    async def hang() -> None:
        await hangs.wait()

    monkeypatch.setattr(station.facts, "get", hang)
    stream = events(station)
    waiting = asyncio.create_task(anext(stream))
    await until(lambda: station.site.streams.total() == 1)
    station.change_policy("")
    assert (await asyncio.wait_for(waiting, 5))[0] == "over"


async def test_k12_another_origin_gets_nothing(station: PageRelay) -> None:
    """docs/threats.md#K12: a link leads here; nothing else does, and the API stays closed to the page too."""
    await station.log_in("chief")
    cross = {"Sec-Fetch-Site": "cross-site"}
    for path, method, headers in (
        ("/page", "GET", {**cross, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}),
        ("/page", "GET", {**cross, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}),
        ("/page", "GET", {"Origin": "https://evil.test"}),
        ("/page/events", "GET", {**cross, "Sec-Fetch-Mode": "cors", "Origin": "https://evil.test"}),
        ("/page/events", "GET", {**CAME_BACK, "Sec-Fetch-Site": "same-site"}),
        ("/page/script.js", "GET", {**cross, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}),
        ("/page/login", "GET", CAME_BACK),
        ("/page/logout", "POST", CAME_BACK),
        ("/page/logout", "POST", {}),
        ("/page/logout", "POST", {"Origin": "null", "Sec-Fetch-Site": "same-origin"}),
    ):
        status, text = await station.text(path, method=method, **headers)
        assert (status, "shop-1" in text) == (403, False), (path, headers)
    assert SESSION_COOKIE in station.kept
    assert (await station.text("/page", **CAME_BACK))[0] == 200
    assert (await station.text("/page", Origin="https://relay.test"))[0] == 200
    for path in ("/v1/clusters", "/v1/ca", "/page/../v1/ca"):
        assert (await station.text(path, **PAGE))[0] in (403, 404), path
    assert (await station.text("/page/logout"))[0] == 405


async def test_k12_texts_of_peers_are_no_markup(station: PageRelay) -> None:
    """docs/threats.md#K12."""
    await station.log_in("chief")
    for path in (
        "/page?user=%3Cimg%20src%3Dx%3E",
        "/page?cluster=shop-1",
        "/page?q=%3Cimg%20src%3Dx%3E",
        "/page?user=ann",
    ):
        text = (await station.text(path))[1]
        assert ("<img" in text, "\u202e" in text, "onerror" in text) == (False, False, "onerror" in text)
        assert "&lt;img" in text
    async for _, data in events(station):
        assert ("<img" in data, "\u202e" in data, "&lt;img" in data) == (False, False, True)
        break


async def test_k13_nothing_is_computed_while_nobody_looks(station: PageRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#K13: fifty pages cost what one does, and none costs nothing."""
    monkeypatch.setattr(site, "OWN_STREAMS", 50)
    await station.log_in("chief")
    assert station.facts.computed == 0
    streams = [events(station) for _ in range(50)]
    assert {(await anext(one))[0] for one in streams} == {"facts"}
    assert (station.facts.computed, station.site.streams.total()) == (1, 50)
    station.relay.clock.now += 6
    await asyncio.gather(*(one.aclose() for one in streams))
    await until(lambda: not station.site.streams)
    computed = station.facts.computed
    station.relay.clock.now += 600
    await asyncio.sleep(0)
    assert station.facts.computed == computed


async def test_k13_streams_and_requests_are_bounded(station: PageRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#K13."""
    monkeypatch.setattr(site, "OWN_STREAMS", 2)
    await station.log_in("chief")
    waiting, streams = station.relay.admission.waiting, [events(station) for _ in range(2)]
    for one in streams:
        await anext(one)
    # A stream is no stranger's connection: it leaves its place for others.
    assert station.relay.admission.waiting == waiting
    status, text = await station.text("/page/events", **PAGE)
    assert (status, "too many pages" in text) == (503, True)
    await streams[0].aclose()
    await until(lambda: station.site.streams.total() == 1)
    # One that has lived for long enough ends, and its browser begins another one.
    monkeypatch.setattr("arcbridge.relay.page.facts.EVERY", 0.0)
    station.relay.clock.now += 301
    assert [name async for name, _ in streams[1]][-1] == "now"
    statuses = [(await station.text())[0] for _ in range(site.VIEWS + 1)]
    assert (statuses[0], statuses[-1]) == (200, 429)


async def test_k13_pages_that_wake_together_leave_turns_to_others(
    station: PageRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/threats.md#K13: each with a question of its own is rendered in a turn of the loop of its own, and who takes
    too much of the loop waits."""
    await station.log_in("chief")
    monkeypatch.setattr("arcbridge.relay.page.facts.EVERY", 0.2)
    turn, rendered, render = 0, list[int](), site.view.live_parts

    async def count() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    def live_parts(*args: Any, **more: Any) -> str:
        rendered.append(turn)
        return render(*args, **more)

    monkeypatch.setattr(site.view, "live_parts", live_parts)
    counting = asyncio.create_task(count())
    streams = [events(station, f"/page/events?q={number}") for number in range(site.OWN_STREAMS)]
    for one in streams:
        assert [(await anext(one))[0], (await anext(one))[0]] == ["facts", "now"]
    rendered.clear()
    station.relay.clock.now += 60
    # Now all of them wait for one computation, and wake in the same turn.
    await asyncio.gather(*(anext(one) for one in streams))
    assert len(set(rendered)) == len(rendered) >= len(streams)
    station.relay.payers.of("chief", 0.0).held_until = time.monotonic() + 60
    await asyncio.sleep(0.3)
    rendered.clear()
    await asyncio.sleep(0.5)
    assert rendered == []
    await asyncio.gather(*(one.aclose() for one in streams))
    counting.cancel()


async def test_k13_logins_of_an_address_are_bounded(station: PageRelay) -> None:
    """docs/threats.md#K13: each costs a request to the issuer, and nothing is kept of one that never ends."""
    statuses = [(await station.text(f"{CALLBACK}?code=x&state=y"))[0] for _ in range(LOGINS)]
    assert set(statuses) == {401}
    assert (await station.text(CALLBACK))[0] == 429
    assert (await station.text("/page/login"))[0] == 429
    assert station.issuer.requests == []
    assert station.relay.limited["page"] == 2


async def test_k13_made_up_logins_keep_nobody_out(station: PageRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#K13: they take no turn, and a turn is over when the issuer takes too long."""
    monkeypatch.setattr(station.site, "_ending", asyncio.Semaphore(2))
    monkeypatch.setattr("arcbridge.relay.page.login.FINISHED", 1.0)
    end, more = (
        f"{CALLBACK}?code=x&iss={ISSUER}&state={(await station.begin())['state']}",
        {"cookies": {**station.kept}},
    )
    station.issuer.answers.clear()
    ends = [asyncio.create_task(station.text(end, **more)) for _ in range(2)]
    await until(lambda: len(station.issuer.requests) == 2)
    status, text = await station.text(f"{end}x", **more)
    assert (status, "another login" in text) == (401, True)
    assert not any(one.done() for one in ends), "it has waited for no turn"
    station.issuer.user = "chief"
    waiting = asyncio.create_task(station.text(end, **more))
    assert {(await one)[0] for one in ends} == {503}
    station.issuer.answers.set()
    assert (await waiting)[0] == 303


async def test_k13_bytes_that_are_no_text_are_refused_without_an_error(station: PageRelay) -> None:
    """docs/threats.md#K13: a stranger's bytes make no line of the log."""
    await station.log_in("chief")
    good = f"{SESSION_COOKIE}={station.kept[SESSION_COOKIE]}; x"
    login = (await station.begin())["state"].encode()
    for path, cookie, status in (
        (b"/page", SESSION_COOKIE, 200),
        (b"/page/events", SESSION_COOKIE, 401),
        (f"{CALLBACK}?code=x&state=".encode() + login, LOGIN_COOKIE, 401),
        (f"{CALLBACK}?code=x&state=%FF%ED%A0%80".encode(), f"{LOGIN_COOKIE}={station.kept[LOGIN_COOKIE]}; x", 401),
        (b"/page?q=%FF&user=%ED%A0%80&cluster=%FF", good, 200),
    ):
        head = b"GET " + path + b" HTTP/1.1\r\nHost: relay.test\r\nConnection: close\r\nCookie: "
        with structlog.testing.capture_logs() as logs:
            answer = await station.relay.raw(head + cookie.encode() + b"=\xff\r\n\r\n")
        assert answer.split()[1] == str(status).encode(), (path, answer)
        assert [one for one in logs if one["log_level"] == "error"] == []


async def test_k13_strangers_pay_for_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#K13."""
    monkeypatch.setattr(api, "STRANGERS", 2)
    monkeypatch.setattr(api, "STRANGERS_RATE", 0.001)
    async with paging(tmp_path) as station:
        statuses = [(await station.text("/page/events", **PAGE))[0] for _ in range(3)]
        assert (statuses, station.relay.limited["address"]) == ([401, 401, 429], 1)


async def test_a_mistake_cuts_off_a_stream(station: PageRelay, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second head is sent into an answer that has begun."""
    await station.log_in("chief")

    def mistaken(*args: object, **more: object) -> str:
        raise KeyError("a mistake")

    monkeypatch.setattr("arcbridge.relay.page.view.live_parts", mistaken)
    head = f"GET /page/events HTTP/1.1\r\nHost: relay.test\r\nCookie: {SESSION_COOKIE}={station.kept[SESSION_COOKIE]}"
    with structlog.testing.capture_logs() as logs:
        answer = await station.relay.raw(f"{head}\r\n\r\n".encode())
    assert (answer.count(b"HTTP/1.1"), b"retry: 3000" in answer, answer.endswith(b"0\r\n\r\n")) == (1, True, False)
    assert (logs[0]["event"], logs[0]["reason"]) == ("page stream failed", "KeyError")
    assert not station.site.streams


async def test_a_relay_that_cannot_read_its_state_says_so(station: PageRelay) -> None:
    await station.log_in("chief")
    assert "shop-1" in (await station.text())[1]
    await station.relay.registry.close()
    station.relay.clock.now += 60
    text = (await station.text())[1]
    assert "cannot read its own state" in text
    assert "shop-1" in text
