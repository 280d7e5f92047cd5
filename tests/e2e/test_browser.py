"""docs/threats.md#W5: a hostile page in a real browser on the user's machine, against everything that listens there.

The browser runs where the client runs, so it reaches loopback; the page tries every way that a page has. The same ways
against a service that lets pages in show that they would be noticed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from arcbridge.pki.authority import Authority
from arcbridge.pki.enrolment import make_csr, make_key
from tests.support.browser import OPEN_TEXT, REBOUND, WAYS, Browser, HostileSite, attack
from tests.support.processes import ManagedProcess, run
from tests.support.reports import metrics, until
from tests.support.world import ALICE, CLUSTER, ApiServer, Client, World, arcbridge, fixed_port, login_ports

NOTHING = "nothing within the time"
READS = {"fetch", "fetch_with_token", "post", "remove"}
"""Ways that give the page an answer to read, where it may."""
REACHES = {"image", "script", "events", "socket"}
"""Ways that tell the page only that they worked."""
SECRETS = "/api/v1/namespaces/default/secrets"


@pytest.fixture(scope="module")
def site() -> Iterator[HostileSite]:
    with HostileSite() as site:
        yield site


@pytest.fixture(scope="module", params=["strict", "lenient"])
def browser(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One that refuses the certificates of relay and endpoint, as every browser does; and one that takes them all."""
    with Browser(tmp_path_factory.mktemp("browser"), lenient=request.param == "lenient") as browser:
        yield browser


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An organisation of this module's own: what it counts, no other test has caused."""
    with World(api, directory=tmp_path_factory.mktemp("browser-world")) as world:
        yield world.start()


@pytest.fixture(scope="module")
def observe() -> int:
    return fixed_port()


@pytest.fixture(scope="module")
def client(world: World, observe: int) -> Iterator[Client]:
    client = world.start_client(ALICE, "--observe-listen", f"127.0.0.1:{observe}", "--log-format", "json")
    client.process.wait_for_line("Press Ctrl")
    yield client
    client.process.stop()


@pytest.fixture
def ports() -> Iterator[None]:
    with login_ports():
        yield


def judge(found: list[tuple[str, str, str]]) -> None:
    """No way tells the page anything: at most its request was answered where it cannot look."""
    told = [one for one in found if one[2] not in ("error", "opaque", NOTHING)]
    assert told == []


def counted(world: World, observe: int) -> dict[str, float]:
    """What each role has counted of things that a page must not cause."""
    client, agent, relay = metrics(observe), metrics(world.agent_observe), metrics(world.relay_observe)
    return {
        "spliced": client['arcbridge_client_local_connections_total{result="spliced"}'],
        "requests": agent["arcbridge_agent_requests_total"],
        "sessions": agent["arcbridge_agent_sessions_total"],
        "joins": sum(value for name, value in relay.items() if name.startswith("arcbridge_relay_joins_total")),
        "audited": len(world.audit_lines()),
    }


def test_the_ways_work_where_nothing_stops_them(site: HostileSite, browser: Browser) -> None:
    """The control: each way is one that would be noticed."""
    site.seen.clear()
    target = f"http://127.0.0.1:{site.port}/open"
    found = {way: outcome for way, _, outcome in attack(browser, site.url(), {target: '{"a": "="}'}, patience=40)}
    assert set(found) == set(WAYS) == READS | REACHES | {"fetch_opaque", "post_opaque", "beacon", "frame", "form"}
    assert {way: found[way] for way in READS} == dict.fromkeys(READS, f"read: 200 {OPEN_TEXT}")
    assert {way: found[way] for way in REACHES} == dict.fromkeys(REACHES, "reached")
    assert {"GET /open", "POST /open", "DELETE /open"} <= set(site.seen)
    assert browser.run(f"http://{REBOUND}:{site.port}/open", "document.body.innerText") == OPEN_TEXT


def test_the_local_endpoint(site: HostileSite, browser: Browser, world: World, client: Client, observe: int) -> None:
    before = counted(world, observe)
    asked = metrics(observe)['arcbridge_client_local_connections_total{result="stranger"}']
    pod = json.dumps({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "a=b"}})
    hosts = ("127.0.0.1", "localhost", "[::1]", REBOUND)
    judge(
        attack(
            browser,
            site.url(),
            {f"{scheme}://{host}:{client.port}{SECRETS}": pod for scheme in ("https", "http") for host in hosts},
        )
    )
    # The page's own name leads to the endpoint by now: what the browser lets such a page read.
    for scheme in ("https", "http"):
        shown = browser.run(f"{scheme}://{REBOUND}:{client.port}{SECRETS}", "document.documentElement.innerText")
        if isinstance(shown, str):  # a browser that takes every certificate
            assert '"code": 401' in shown or '"code":401' in shown
            assert CLUSTER not in shown, "a stranger does not even learn the cluster's name"
            again = f"fetch('{SECRETS}', {{method: 'POST', body: 'x'}}).then(answer => answer.status)"
            assert browser.run(f"{scheme}://{REBOUND}:{client.port}/", again) == 401
        else:
            assert set(shown) == {"failed"}
    assert counted(world, observe) == before
    lenient = metrics(observe)['arcbridge_client_local_connections_total{result="stranger"}'] - asked
    strict = browser.run(
        site.url(), f"fetch('https://127.0.0.1:{client.port}/', {{mode: 'no-cors'}}).then(() => 0, () => 1)"
    )
    assert (lenient > 0) == (strict == 0), "the browser that takes all certificates has reached it, the other has not"


def test_metrics_and_health(site: HostileSite, browser: Browser, world: World, client: Client, observe: int) -> None:
    before = counted(world, observe)
    ports = (observe, world.agent_observe, world.relay_observe)
    urls = {
        f"http://{host}:{port}/{path}": "x=y"
        for port in ports
        for host in ("127.0.0.1", REBOUND)
        for path in ("metrics", "readyz?verbose")
    }
    judge(attack(browser, site.url(), urls))
    for port in ports:
        for path in ("metrics", "readyz?verbose", "livez"):
            shown = browser.run(f"http://{REBOUND}:{port}/{path}", "document.documentElement.innerText")
            assert shown.strip() == "this is not for web pages"
        # An operator who types the address sees it.
        assert "arcbridge_" in browser.run(f"http://127.0.0.1:{port}/metrics", "document.body.innerText")
    assert counted(world, observe) == before


def test_the_relays_api(site: HostileSite, browser: Browser, world: World, client: Client, observe: int) -> None:
    """The page even knows a join token that is good."""
    before = counted(world, observe)
    cluster = f"from-a-page-{len(world_command(world, 'token', 'list'))}"
    token, _ = world.join_token(cluster)
    enrolment = json.dumps(
        {
            "join_token": token,
            "csr": make_csr(make_key()),
            "cluster_ca": Authority.create("page").certificate_pem,
            "=": "",
        }
    )
    base = f"https://127.0.0.1:{world.relay_port}"
    rebound = f"https://{REBOUND}:{world.relay_port}"
    targets = {f"{one}{path}": enrolment for one in (base, rebound) for path in ("/v1/enrol", "/v1/ca", "/v1/clusters")}
    judge(attack(browser, site.url(), targets))
    shown = browser.run(
        f"{rebound}/v1/ca",
        f"fetch('/v1/enrol', {{method: 'POST', body: {json.dumps(enrolment)}}}).then(answer => answer.text())",
    )
    if isinstance(shown, str):
        assert json.loads(shown)["error"]["message"] == "the relay's API is not for web pages"
    else:
        assert set(shown) == {"failed"}
    done = world_command(world, "token", "list")
    (mine,) = [one for one in done if one["cluster"] == cluster]
    assert mine["used"] == 0
    enrolled = {one["name"] for one in world_command(world, "cluster", "list")}
    assert CLUSTER in enrolled
    assert cluster not in enrolled
    assert counted(world, observe) == before


def world_command(world: World, *words: str) -> list[dict[str, Any]]:
    done = run(arcbridge("--role", "relay", *words, "--config", str(world.relay_config), "-o", "json"))
    return list(json.loads(done.stdout))


@pytest.mark.usefixtures("ports")
def test_a_login(site: HostileSite, browser: Browser, world: World, tmp_path: Path) -> None:
    """Another page answers in the user's place, with codes, errors and guesses; the user's own answer counts."""
    world.issuer.settings(auto_login=ALICE.name)
    ca_file = tmp_path / "issuer.pem"
    ca_file.write_text(Path(world.issuer.ca_file).read_text())
    arguments = [
        *("--role", "client", "--relay", world.relay_url, "--relay-ca-pin", world.relay_pin),
        *("--oidc-issuer-url", world.issuer.url, "--oidc-client-id", "cli", "--oidc-ca-file", str(ca_file)),
        *("--grant-type", "authcode", "login", "--wait", "100s"),
    ]
    login = ManagedProcess(
        arcbridge(*arguments),
        log_dir=tmp_path,
        name="login",
        # A program that opens no browser: then the address is shown.
        env={**world.client_env(tmp_path / "home"), "BROWSER": "/bin/false", "DISPLAY": None},
    )
    try:
        url = login.wait_for_line(r"To log in, open (\S+)", timeout=60)[1]
        port = re.search(r"redirect_uri=http%3A%2F%2Flocalhost%3A(\d+)", url)
        assert port is not None
        answers = ("code=planted&state=guess", "error=access_denied&state=guess", "code=planted", "state=", "")
        hosts = ("localhost", "127.0.0.1", REBOUND)
        judge(
            attack(
                browser,
                site.url(),
                {f"http://{host}:{port[1]}/?{answer}": "a=b" for host in hosts for answer in answers},
            )
        )
        for answer in answers:
            shown = browser.run(f"http://{REBOUND}:{port[1]}/?{answer}", "document.body.innerText")
            assert shown.strip() in ("This answer belongs to another login.", "Nothing here.")
        assert login.running
        assert "planted" not in login.output()
        # The user's own browser comes back with the answer to this login, and with it twice.
        status, location = world.issuer.request("GET", url.partition(world.issuer.url)[2])
        assert status == 303
        shown = browser.run(location, "document.body.innerText")
        assert shown.strip() == "You are logged in. You may close this window."
        assert login.wait(30) == 0, login.tail()
        assert f"Logged in as {ALICE.name}" in login.output()
        again = browser.run(location, "document.body.innerText")
        assert set(again) == {"failed"}, "the listener is closed"
    finally:
        login.stop()
        world.issuer.settings(auto_login="")
    until(lambda: list((tmp_path / "home").rglob("tokens/*.json")), "the login is kept")
