"""The script of the administrators' page in a real browser: when it asks again, and when it shows nothing any more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from arcbridge.relay.page import site
from arcbridge.relay.page.site import REFUSED
from tests.relay.page.page_station import ADMINS, PageRelay, at_once, paging
from tests.support.browser import Browser, Tab

SOON = "const real = setTimeout; setTimeout = (work, wait) => real(work, wait === 30000 ? 300 : wait)"
"""Has the page ask again after 0.3 s and not after 30 s."""
SHOWN = "document.querySelector('main').innerText"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser"), lenient=True) as browser:
        yield browser


@pytest.fixture
async def station(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PageRelay]:
    at_once(monkeypatch)
    monkeypatch.setattr("arcbridge.relay.page.facts.EVERY", 0.1)
    async with paging(tmp_path) as station:
        await station.relay.enrolled("shop-1")
        await station.log_in("chief")
        yield station


@asynccontextmanager
async def opened(browser: Browser, station: PageRelay) -> AsyncIterator[Tab]:
    """Open the page in a tab as one who has logged in."""
    async with browser.tab() as tab:
        await tab.devtools.call("Page.addScriptToEvaluateOnNewDocument", source=SOON)
        url = f"https://127.0.0.1:{station.relay.port}/page"
        for name, value in station.kept.items():
            await tab.devtools.call("Network.setCookie", url=url, name=name, value=value, secure=True, path="/")
        assert await tab.open(url) == ""
        assert "shop-1" in await tab.evaluate(SHOWN)
        yield tab


async def live(tab: Tab, words: str) -> None:
    await tab.until(f"document.getElementById('live').innerText.includes({words!r})", words)


async def test_a_page_that_is_refused_for_now_asks_again(
    browser: Browser, station: PageRelay, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wall display outlives too many pages, too many requests, and a balancer without a relay."""
    with monkeypatch.context() as patch:
        patch.setattr(site, "OWN_STREAMS", 0)
        async with opened(browser, station) as tab:
            await live(tab, "it is asked again")
            assert "shop-1" in await tab.evaluate(SHOWN)
            patch.undo()
            await live(tab, "live, as of")


@pytest.mark.parametrize("change", ["while the stream runs", "when it begins"])
async def test_who_may_look_no_more_sees_nothing_any_more(
    browser: Browser, station: PageRelay, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    if change == "when it begins":
        monkeypatch.setattr(site, "OWN_STREAMS", 0)
    async with opened(browser, station) as tab:
        if change == "when it begins":
            await live(tab, "it is asked again")
            station.relay.clock.now += 3601
            await live(tab, "your login is over")
        else:
            await live(tab, "live, as of")
            station.change_policy(ADMINS.replace('"chief"', '"another"'))
            await live(tab, REFUSED[:20])
        await tab.until(f"{SHOWN} === 'Open the page again'", "nothing is shown")
        await tab.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        assert "shop-1" not in await tab.evaluate("document.documentElement.innerText + document.title")
        assert not station.site.streams


async def test_k10_one_who_logs_out_sees_nothing_in_other_windows(browser: Browser, station: PageRelay) -> None:
    """docs/threats.md#K10."""
    async with opened(browser, station) as tab, opened(browser, station) as other:
        await live(other, "live, as of")
        await tab.evaluate("document.querySelector('header form button').click()")
        await live(other, "you have logged out in another window")
        assert await other.evaluate(SHOWN) == "Open the page again"
