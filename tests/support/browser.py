"""A real browser (headless Chromium) that opens pages, led over its DevTools protocol, and the site of an attacker.

Names of `NAMES` lead to loopback, as an attacker's name server would have it; no other name is known, so that nothing
leaves this machine. Chromium's own wall around local networks is off: it is not there in every browser.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from tests.support.app_thread import AppThread
from tests.support.processes import ManagedProcess, require_or_skip
from tests.support.stopping import Stopping

PAGE = "page.example"
"""The attacker's name."""
REBOUND = "rebound.example"
"""A name of the attacker's that by now leads to 127.0.0.1."""
NAMES = (PAGE, REBOUND)
_IMAGE = base64.b64decode("R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==")
OPEN_TEXT = "readable by any page"


def chromium() -> str:
    """The browser's path; skips the test, or fails it where ARCBRIDGE_REQUIRE lists `chromium`, if there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    require_or_skip("chromium", "no Chromium: install the package chromium")


class Browser(Stopping):
    """One browser with an empty profile. `lenient`: it takes every certificate, as a user who clicks through it."""

    def __init__(self, directory: Path, *, lenient: bool) -> None:
        rules = ", ".join([*(f"MAP {name} 127.0.0.1" for name in NAMES), "MAP * ~NOTFOUND", "EXCLUDE localhost"])
        self._process = ManagedProcess(
            [
                chromium(),
                *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
                "--disable-features=LocalNetworkAccessChecks,BlockInsecurePrivateNetworkRequests,HttpsUpgrades",
                *(("--ignore-certificate-errors",) if lenient else ()),
                *("--remote-debugging-port=0", f"--user-data-dir={directory / 'profile'}"),
                f"--host-resolver-rules={rules}, EXCLUDE 127.0.0.1, EXCLUDE [::1]",
                "about:blank",
            ],
            log_dir=directory,
            name="chromium",
            env={"HOME": str(directory)},
        )
        found = self._process.wait_for_line(r"DevTools listening on ws://(127\.0\.0\.1:\d+)/", timeout=60)
        self._devtools = f"http://{found[1]}"

    def run(self, url: str, script: str = "undefined", timeout: float = 60) -> Any:
        """Open `url` in a tab of its own, run `script` there, and return what it gives (a promise is awaited).

        Returns `{"failed": REASON}` where the page cannot be opened.
        """
        return asyncio.run(self._run(url, script, timeout))

    async def _run(self, url: str, script: str, timeout: float) -> Any:
        async with asyncio.timeout(timeout), self.tab() as tab:
            failed = await tab.open(url)
            return {"failed": failed} if failed else await tab.evaluate(script)

    @contextlib.asynccontextmanager
    async def tab(self) -> AsyncIterator[Tab]:
        """Open a tab, which shares its cookies with the others of this browser."""
        async with aiohttp.ClientSession() as session:
            async with session.put(f"{self._devtools}/json/new?about:blank") as answer:
                made = await answer.json()
            async with session.ws_connect(made["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(_DevTools(socket))
                await tab.devtools.call("Page.enable")
                await tab.devtools.call("Page.setLifecycleEventsEnabled", enabled=True)
                yield tab
            async with session.get(f"{self._devtools}/json/close/{made['id']}"):
                pass

    def stop(self) -> None:
        self._process.stop()


class Tab:
    """One tab of a browser."""

    def __init__(self, devtools: _DevTools) -> None:
        self.devtools = devtools

    async def open(self, url: str) -> str:
        """Go to a page and wait until it has loaded; return why it cannot be opened, or nothing."""
        opened = await self.devtools.call("Page.navigate", url=url)
        if "errorText" in opened:
            return str(opened["errorText"])
        # By its loader: the empty page that the tab begins with tells of its own end of loading, too.
        await self.devtools.event("Page.lifecycleEvent", name="load", loaderId=opened["loaderId"])
        return ""

    async def evaluate(self, script: str) -> Any:
        """Run a script in the page; return what it gives (a promise is awaited)."""
        run = await self.devtools.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in run:
            raise AssertionError(f"the page's script failed: {json.dumps(run['exceptionDetails'])[:2000]}")
        return run["result"].get("value")

    async def until(self, script: str, what: str, timeout: float = 30) -> None:
        """Wait until a script gives something true."""
        try:
            async with asyncio.timeout(timeout):
                while not await self.evaluate(script):
                    await asyncio.sleep(0.05)  # between two looks
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise AssertionError(f"{what}: not within {timeout:g} s; the page says: {text[:3000]}") from None

    async def shape(self, width: int, height: int, *, dark: bool = False, still: bool = False) -> None:
        """Show the page at this size, light or dark; `still`: for a person who wants no motion."""
        await self.devtools.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"},
        ]
        await self.devtools.call("Emulation.setEmulatedMedia", features=features)

    async def screenshot(self, file: Path, *, of: str = "") -> None:
        """Write what is seen as PNG; `of`: the element that this expression gives, and 8 pixels beside it."""
        clip = {}
        if of:
            box = await self.evaluate(f"{of}.getBoundingClientRect().toJSON()")
            clip["clip"] = {
                "x": box["x"] - 8,
                "y": box["y"],
                "width": box["width"] + 16,
                "height": box["height"] + 8,
                "scale": 1,
            }
        shot = await self.devtools.call("Page.captureScreenshot", format="png", **clip)
        file.write_bytes(base64.b64decode(shot["data"]))

    async def press(self, key: str) -> None:
        """Press a key, such as `Tab`."""
        for kind in ("keyDown", "keyUp"):
            codes = {"Tab": 9, "Enter": 13}
            more = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            await self.devtools.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **more
            )


class _DevTools:
    """Calls and events of one tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0
        self._events: list[dict[str, Any]] = []

    async def call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self._events.append(message)

    async def event(self, method: str, **parameters: object) -> None:
        """Wait for an event with these parameters, unless it came before."""
        while not any(
            one.get("method") == method and parameters.items() <= one["params"].items() for one in self._events
        ):
            self._events.append(await self._socket.receive_json())


class HostileSite(AppThread):
    """The attacker's pages, and a service that lets every page in: what a page can do where nothing stops it.

    It counts requests by path, and answers each with what the browser asked for: an image, events, a WebSocket, text.
    """

    def __init__(self) -> None:
        super().__init__(tls=False)
        self.seen: list[str] = []

    @property
    def port(self) -> int:
        return int(self.urls[0].rpartition(":")[2])

    def url(self, path: str = "/") -> str:
        return f"http://{PAGE}:{self.port}{path}"

    def served(self) -> Sequence[web.Application]:
        """Return the one application."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        return [app]

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(f"{request.method} {request.path}")
        if request.headers.get("Upgrade", "").lower() == "websocket":
            upgraded = web.WebSocketResponse()
            await upgraded.prepare(request)
            return upgraded
        accept = request.headers.get("Accept", "")
        leave = {
            "Access-Control-Allow-Origin": request.headers.get("Origin", "*"),
            "Access-Control-Allow-Credentials": "true",
            "Access-Control-Allow-Headers": "authorization, content-type",
            "Access-Control-Allow-Methods": "GET, POST, DELETE",
        }
        if accept.startswith("text/event-stream"):
            return web.Response(text="data: x\n\n", content_type="text/event-stream", headers=leave)
        if accept.startswith("image/"):
            return web.Response(body=_IMAGE, content_type="image/gif", headers=leave)
        if request.path.endswith(".js"):
            return web.Response(text="1", content_type="text/javascript", headers=leave)
        kind = "text/html" if request.path == "/" else "text/plain"
        return web.Response(text=OPEN_TEXT, content_type=kind, headers=leave)


ATTACK = """
(async (targets, patience) => {
    const within = (promise) => Promise.race([
        promise, new Promise((done) => setTimeout(() => done("nothing within the time"), patience))]);
    const event = (thing, good, bad) => new Promise((done) => {
        for (const name of good) thing.addEventListener(name, () => done("reached"));
        for (const name of bad) thing.addEventListener(name, () => done("error"));
    });
    const read = async (promise) => {
        try {
            const answer = await promise;
            if (answer.type === "opaque") return "opaque";
            return "read: " + answer.status + " " + (await answer.text()).slice(0, 400);
        } catch (error) { return "error"; }
    };
    const element = (name, attributes) => {
        const made = Object.assign(document.createElement(name), attributes);
        document.body.appendChild(made);
        return made;
    };
    const framed = (make) => new Promise((done) => {
        const frame = element("iframe", {name: "frame" + Math.random()});
        frame.addEventListener("load", () => {
            let text = null;
            try { text = frame.contentDocument && frame.contentDocument.body.innerText; } catch (error) { }
            if (text === "" ) return;  // the empty page that a frame begins with
            done(text === null ? "opaque" : "read: " + text.slice(0, 400));
        });
        make(frame);
    });
    const ways = {
        fetch: (url) => read(fetch(url, {mode: "cors", credentials: "include"})),
        fetch_with_token: (url) => read(fetch(url, {headers: {Authorization: "Bearer x"}})),
        fetch_opaque: (url) => read(fetch(url, {mode: "no-cors", credentials: "include"})),
        post: (url, body) => read(fetch(url, {
            method: "POST", body: body, headers: {"Content-Type": "application/json"}})),
        post_opaque: (url, body) => read(fetch(url, {method: "POST", mode: "no-cors", body: body})),
        remove: (url) => read(fetch(url, {method: "DELETE"})),
        beacon: async (url, body) => navigator.sendBeacon(url, body) ? "opaque" : "error",
        image: (url) => event(element("img", {src: url}), ["load"], ["error"]),
        script: (url) => event(element("script", {src: url}), ["load"], ["error"]),
        events: (url) => { const source = new EventSource(url);
                           return event(source, ["open", "message"], ["error"]).finally(() => source.close()); },
        socket: (url) => { const made = new WebSocket(url.replace("http", "ws"));
                           return event(made, ["open"], ["error", "close"]); },
        frame: (url) => framed((frame) => { frame.src = url; }),
        form: (url, body) => framed((frame) => {
            const form = element("form", {action: url, method: "POST", target: frame.name, enctype: "text/plain"});
            // A form of this type sends NAME=VALUE as it is: with the sign inside a string of JSON it is a document.
            const [name, ...rest] = body.split("=");
            form.appendChild(Object.assign(document.createElement("input"), {name: name, value: rest.join("=")}));
            form.submit();
        }),
    };
    const found = [];
    await Promise.all(targets.flatMap(([url, body]) => Object.entries(ways).map(async ([way, go]) => {
        let outcome;
        try { outcome = await within(go(url, body)); } catch (error) { outcome = "error"; }
        found.push([way, url, outcome]);
    })));
    return found;
})(%s, %d)
"""
"""What a page tries against each target, `[URL, BODY]`, for so many milliseconds at most: gives `[WAY, URL, OUTCOME]`.
An outcome `read: …` or `reached` tells the page something; `opaque` means that something may have been answered, which
the page cannot see."""

WAYS = tuple(re.findall(r"^        (\w+): (?:async )?\(url", ATTACK, re.MULTILINE))


def attack(
    browser: Browser, page: str, targets: Mapping[str, str], *, patience: float = 4
) -> list[tuple[str, str, str]]:
    """Try every way of a page of `page` against targets (URL: body); returns way, URL and outcome of each.

    `patience`: seconds for which a way waits. Of targets that answer nothing each way takes all of it.
    """
    found = browser.run(page, ATTACK % (json.dumps(list(targets.items())), patience * 1000))
    assert isinstance(found, list), found
    assert len(found) == len(WAYS) * len(targets)
    return [(str(way), str(url), str(outcome)) for way, url, outcome in found]
