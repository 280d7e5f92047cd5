"""The administrators' page in a real browser: a real relay of two workers, real agents, ten faults.

`PAGE_SHOTS=DIR` has the screenshots written there; two of them are in docs/.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from arcbridge.pki.authority import Authority
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.relay import admin
from arcbridge.settings.config import RelayConfig
from arcbridge.settings.config_loader import load
from tests.support.axe import axe_script, judge
from tests.support.browser import Browser, Tab
from tests.support.cluster import Unavailable
from tests.support.fake_apiserver import FakeApiServer, reply
from tests.support.processes import require_or_skip, run
from tests.support.reports import wait_for_record
from tests.support.world import ALICE, BOB, ApiServer, User, World, arcbridge, fixed_port

SHOP = User("mallory", ("interns",))
POLICY = """
[[allow]]
groups = ["platform"]
clusters = ["*"]

[[admin]]
users = ["carol@example.com"]
clusters = ["*"]
what = ["read"]

[[admin]]
groups = ["interns"]
clusters = ["oslo*"]
what = ["tokens"]
"""
REVIEW = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
RULES = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
SERVING, NEVER = "amsterdam", "never-came"
FAULTS = {
    "berlin": (
        "the agent does not reach its API server",
        "the agent does not reach the issuer, and has no keys to verify logins with",
    ),
    "cork": (
        "the agent does not trust its API server's certificate",
        "the issuer calls itself by another URL than the agent's authentication file does",
    ),
    "dublin": ("the API server does not accept the agent's own credential",),
    "essen": ("the agent may not act as users, so that every request is refused",),
    "oslo": ("no agent of it is connected",),
    "oslo-2": ("an operator has revoked it",),
    NEVER: ("it has enrolled and no agent of it has ever connected",),
}
"""What the page says of each cluster; the tenth fault is the relay's own."""
WITH_AGENT = (SERVING, "berlin", "cork", "dublin", "essen", "oslo")


class Faulty(World):
    """Each agent has a cluster, an API server and a fault of its own."""

    def authentication(self, audience: str) -> str:
        text = super().authentication(audience)
        return text.replace(f'"{self.issuer.url}"', f'"{self.misspelt}"') if self.misspelt else text

    def join_token(self, cluster: str | None = None) -> tuple[str, str]:
        # As the command makes it, without a process for each.
        relay = admin.at(load(RelayConfig, self.relay_config))
        made = asyncio.run(admin.create_token(relay, cluster=cluster or self.cluster))
        self.relay_pin = made.relay_ca_pin
        return made.token, made.relay_ca_pin

    misspelt = ""
    """The issuer as the next agent is given it, where that is wrong."""


@asynccontextmanager
async def faulty(tmp_path: Path) -> AsyncIterator[Faulty]:
    async with AsyncExitStack() as stack:
        apis = {}
        for name in (SERVING, "cork", "dublin", "essen"):
            (tmp_path / name).mkdir()
            fake = await stack.enter_async_context(FakeApiServer.serving(tmp_path / name))
            apis[name] = ApiServer(fake.url, ca_file=fake.ca_file, token_file=fake.token_file)
            if name == "dublin":
                fake.routes[REVIEW] = reply(401, b"{}")
            if name == "essen":
                body = json.dumps({"status": {"resourceRules": [], "incomplete": False}}).encode()
                fake.routes[RULES] = reply(201, body)
        (tmp_path / "token").write_text("an-unused-token")
        nowhere = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=tmp_path / "token")
        apis["cork"] = ApiServer(apis["cork"].url, ca_file=apis[SERVING].ca_file, token_file=apis["cork"].token_file)
        world = stack.enter_context(
            Faulty(nowhere, cluster=SERVING, directory=tmp_path / "world", agents=len(WITH_AGENT))
        )
        world.agent_clusters = list(WITH_AGENT)
        world.policy = POLICY
        world.relay_settings = 'workers = 2\npage.client_id = "page"\npage.session = "1h"'
        await asyncio.to_thread(world.start_issuer)
        world.issuer.settings(auto_login="carol")
        await asyncio.to_thread(world.start_relay)
        wrong = {"berlin": f"https://127.0.0.1:{fixed_port()}", "cork": f"{world.issuer.url}/"}
        for index, name in enumerate(WITH_AGENT):
            world.api, world.misspelt = apis.get(name, nowhere), wrong.get(name, "")
            await asyncio.to_thread(world.start_agent, index, wait=False)
        yield world


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    with Browser(tmp_path / "browser", lenient=True) as browser:
        yield browser


@pytest.mark.timeout(600)
async def test_ten_faults_are_seen(tmp_path: Path, browser: Browser) -> None:
    try:
        axe_script()
    except Unavailable as error:
        require_or_skip("npm", str(error))
    async with faulty(tmp_path) as world, browser.tab() as tab:
        await log_in(tab, world)
        await tab.until("document.querySelector('#c-oslo') && !document.querySelector('.new')", "all have connected")
        # Faults while one looks: nothing is reloaded from here on.
        world.agents[-1].kill()
        world.relay_config.with_name("policy.toml").write_text(f"{POLICY}\n[[alow]]\n")
        for name in (NEVER, "oslo-2"):
            await enrol(world, name)
        await asyncio.to_thread(command, world, "cluster", "revoke", "oslo-2")
        for name, faults in FAULTS.items():
            for words in faults:
                row = f"document.getElementById('c-{name}')?.closest('tr').innerText"
                await tab.until(f"{row}?.includes({json.dumps(words[1:])})", name)
        await tab.until("document.querySelector('#relays').innerText.includes('alow')", "the relay's own")
        await tab.until("document.querySelector('#changes').innerText.includes('cluster revoke by root')", "the audit")
        await keyboard(tab)
        for width, height, dark in ((320, 900, False), (1280, 900, True), (2560, 1200, False)):
            await tab.shape(width, height, dark=dark, still=True)
            assert await judge(tab) == []
            assert await tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"it fits into {width}"
            assert await tab.evaluate("document.getAnimations().length") == 0
        await take_screenshots(tab, world)
        await lookups(tab, world)
        await another_person(tab, world)


async def keyboard(tab: Tab) -> None:
    """Each thing that can be used is reached by Tab, in its order, and shows that it is."""
    await tab.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    seen = []
    for _ in range(8):
        await tab.press("Tab")
        seen.append(await tab.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        assert await tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", seen[-1]
    assert seen == ["Skip to the clusters", "Log out", "q", "user", "Show", "c-oslo", "c-berlin", "c-cork"]
    # What is replaced while one looks keeps the focus.
    await tab.evaluate("document.getElementById('table').dataset.seen = '1'")
    await tab.until("document.activeElement.id === 'c-cork'", "the focus")


async def lookups(tab: Tab, world: World) -> None:
    """A user's reach, a cluster's refusals, a filter: as the commands have them."""
    client = world.start_client(BOB, ready=False)
    await asyncio.to_thread(wait_for_record, world.relay, "join failed", user=BOB.email)
    client.process.stop()
    (refusal, *_) = json.loads(command(world, "refusal", "list", "-o", "json"))
    assert (refusal["user"], refusal["cluster"], refusal["code"]) == (BOB.email, SERVING, "FORBIDDEN")
    await tab.open(f"{world.relay_url}/page?cluster={SERVING}")
    text = await tab.evaluate("document.querySelector('.look').innerText")
    assert f"{BOB.email}, {SERVING}: FORBIDDEN" in text
    assert refusal["session"] in text
    await tab.open(f"{world.relay_url}/page?q=oslo&user={BOB.email}")
    text = await tab.evaluate("document.body.innerText")
    assert ("No rule lets this user reach" in text, "FORBIDDEN" in text, "berlin\n" in text) == (True, True, False)
    assert await judge(tab) == []
    await tab.open(f"{world.relay_url}/page?user={ALICE.email}&q=%3Cscript%3Ealert(1)%3C/script%3E")
    assert await tab.evaluate("document.scripts.length") == 1


async def another_person(tab: Tab, world: World) -> None:
    """Log out, and come back as one who has two clusters, and then as one who has none."""
    for user, words, others in ((SHOP, "1 of 2 clusters need you", 0), (BOB, "no [[admin]] of the relay's policy", 0)):
        await tab.evaluate("document.querySelector('header form button').click()")
        await tab.until("document.body?.innerText.includes('log in to see your clusters')", "one is logged out")
        world.issuer.settings(auto_login=user.name)
        await tab.evaluate("document.querySelector('a.go').click()")
        await tab.until(f"document.body?.innerText.includes({json.dumps(words)})", user.name)
        assert (await tab.evaluate("document.body.innerText")).count("berlin") == others


async def log_in(tab: Tab, world: World) -> None:
    """Go by the page's own way to the issuer, and come back."""
    assert await tab.open(f"{world.relay_url}/page") == ""
    assert "log in to see your clusters" in await tab.evaluate("document.body.innerText")
    await tab.evaluate("document.querySelector('a.go').click()")
    await tab.until("document.querySelector('#summary') !== null", "the page")


async def enrol(world: World, name: str) -> None:
    """Enrol a cluster of which no agent ever connects."""
    token, _ = await asyncio.to_thread(world.join_token, name)
    csr, ca = make_csr(make_key()), Authority.create(name).certificate_pem
    async with aiohttp.ClientSession() as session:
        body = {"join_token": token, "csr": csr, "cluster_ca": ca}
        async with session.post(f"{world.relay_url}/v1/enrol", json=body, ssl=False) as answer:
            assert answer.status == 200, await answer.text()


def command(world: World, *words: str) -> str:
    """Run a command of the relay's machine."""
    return run(arcbridge("--role", "relay", *words, "--config", str(world.relay_config))).stdout.decode()


async def take_screenshots(tab: Tab, world: World) -> None:
    """Write screenshots where they are asked for, without what is this machine's."""
    if not (directory := os.environ.get("PAGE_SHOTS")):
        return
    await tab.evaluate(
        "[...document.querySelectorAll('#relays li')].filter((one) => /descriptors/.test(one.innerText))"
        ".forEach((one) => one.remove());"
        f"document.body.innerHTML = document.body.innerHTML.replaceAll({json.dumps(str(world.relay_config.parent))}, "
        f"'/etc/arcbridge').replaceAll({json.dumps(world.relay_listens[0])}, 'relay.example.org:443')"
    )
    for name, width, height in (
        ("light", 1280, 1000),
        ("dark", 1280, 1000),
        ("phone", 320, 1400),
        ("wide", 2560, 1200),
    ):
        await tab.shape(width, height, dark=name == "dark")
        await tab.evaluate("scrollTo(0, 0)")
        await tab.screenshot(Path(directory) / f"page-{name}.png")
