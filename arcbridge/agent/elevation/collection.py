"""Follows a collection of the API server with the agent's own credential: lists it, watches it from there, again.

What was known stays known while the API server is away. The head of each watch gives the API server's clock, which
decides about grants (`ServerClock`). Invariants: an answer and an event have bounds in size, what is kept of a list one
in number, a watch one in time without its end; the receiver has seen everything up to what it is given (`current`).

Source: Kubernetes, "Efficient detection of changes".
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote

from arcbridge.agent.elevation.objects import API, Document
from arcbridge.agent.kube.apiserver import AnswerFailed, ApiServer
from arcbridge.agent.kube.response import ResponseHead
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.agent.kube.upstream_pool import UpstreamRequest
from arcbridge.errors import ArcbridgeError
from arcbridge.net.backoff import Backoff
from arcbridge.observe.untrusted_text import clean
from arcbridge.untrusted_json import MOST, read_json

PAGES: Final = (200, 20, 1)
"""Objects of one page: fewer where a page is longer than `MOST` bytes. One object has 1.5 MiB in etcd at most."""
MOST_LISTED: Final = 10_000
"""What is kept of one list."""
DEADLINE: Final = 15.0
"""Seconds for one page."""
WATCH: Final = 240
"""Seconds after which the API server ends a watch, and everything is listed again."""
SILENT: Final = 30.0
"""Seconds behind that in which the end has to come: else the connection is dead."""
PAUSE: Final = 1.0
"""Seconds between two tries at least; after failures up to ten times as many."""
Kept = TypeVar("Kept")
"""What is kept of an object."""
_DATE: Final = re.compile(rb"(?im)^date:[ \t]*([^\r\n]{1,64})")


class WatchFailed(ArcbridgeError):
    """A collection cannot be followed now."""


class ServerClock:
    """The API server's clock, as its answers have it: this machine's own may be wrong, and each agent's is another."""

    def __init__(self, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._monotonic = clock, monotonic
        self._at: tuple[float, float] | None = None
        """Unix seconds of the API server, and monotonic seconds at which it said so."""

    def take(self, head: bytes) -> None:
        """Take the time out of an answer's header lines: whole seconds, which have passed by half on average."""
        found = _DATE.search(head)
        try:
            if found is not None:
                self._at = parsedate_to_datetime(found[1].decode("ascii")).timestamp() + 0.5, self._monotonic()
        except (ValueError, TypeError):
            pass  # a header that is none says nothing

    @property
    def now(self) -> float:
        """Unix seconds; this machine's until an answer came."""
        return self._clock() if self._at is None else self._at[0] + self._monotonic() - self._at[1]

    @property
    def skew(self) -> float:
        """Seconds that this machine's clock is ahead."""
        return self._clock() - self.now


class _TooOld(Exception):
    """The API server has forgotten what has happened since the version from which a watch began."""


class _Events:
    """Takes the answer to a watch, line by line (`upstream_pool.ResponseHandler`)."""

    def __init__(self, event: Callable[[bytes], None], began: Callable[[ResponseHead], None]) -> None:
        self._event, self._began = event, began
        self._rest = bytearray()
        self._status = 0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def response_begins(self, head: ResponseHead) -> bytes:
        self._status = head.status
        if head.status == 200:
            self._began(head)
        return b""

    def response_data(self, data: bytes | memoryview, payload: int) -> None:
        if self.done.done() or self._status != 200:
            return
        begin = len(self._rest)
        self._rest += data
        try:
            while (end := self._rest.find(b"\n", begin)) >= 0:
                line, begin = bytes(self._rest[:end]), 0
                del self._rest[: end + 1]
                self._event(line)
            if len(self._rest) > MOST:
                raise ValueError("an event is too long")
        except _TooOld:
            self.response_complete()
        except (ValueError, KeyError, TypeError, AttributeError):
            self._fail("sent an event that is too long, or is none")

    def response_complete(self) -> None:
        if self._status != 200:
            self._fail(f"answered code {self._status} to a watch")
        elif not self.done.done():
            self.done.set_result(None)

    def response_failed(self, refusal: RequestRefusal | None) -> None:
        self._fail("has closed the connection of a watch")

    def response_switched(self, head: ResponseHead, rest: bytes) -> None:
        raise AssertionError("a watch asks for no upgrade")

    def _fail(self, what: str) -> None:
        if not self.done.done():
            self.done.set_exception(WatchFailed(f"the API server {what}"))


class WatchedCollection(Generic[Kept]):
    """One collection of the group `access.arcbridge.io`; `run` follows it until cancelled.

    Of a list no more than one page is held as documents: users choose how large theirs are."""

    def __init__(
        self,
        api: ApiServer,
        clock: ServerClock,
        resource: str,
        reduced: Callable[[list[Kept], list[Document]], list[Kept]],
        listed: Callable[[list[Kept]], None],
        changed: Callable[[str, Document], None],
        began: Callable[[], None],
    ) -> None:
        """`reduced` returns what is kept of a list so far and one more page, `listed` takes what is kept of all;
        `changed` takes an event's type (ADDED, MODIFIED, DELETED) and its object; `began` is called when a watch has
        begun."""
        self._api = api
        self._clock = clock
        self._path = f"{API}/{resource}"
        self._resource = resource
        self._reduced = reduced
        self._listed = listed
        self._changed = changed
        self._on_begin = began
        self.current = False
        """Whether a watch runs, so that nothing is missing."""
        self.failure = "it has not been listed yet"
        """Why it is not followed; empty while it is."""

    async def run(self) -> None:
        """Follow it."""
        backoff = Backoff(first=PAUSE, cap=10 * PAUSE)
        while True:
            began = time.monotonic()
            try:
                await self._watch(await self._list())
                self.failure = ""
            except WatchFailed as error:
                self.failure = error.message
            except TimeoutError:
                self.failure = "the API server does not answer"
            finally:
                self.current = False
            lasted = time.monotonic() - began
            if self.failure or lasted < PAUSE:
                await asyncio.sleep(backoff.next_delay(lasted=lasted))

    async def _list(self) -> str:
        """List all; return the version to watch from."""
        found: list[Kept] = []
        token = ""
        while True:
            page = await self._page(f"&continue={quote(token, safe='')}" if token else "")
            try:
                found = self._reduced(found, page["items"])
                version, token = str(page["metadata"]["resourceVersion"]), str(page["metadata"].get("continue") or "")
                if not token:
                    self._listed(found)
                    return version
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise WatchFailed(f"the API server's list of {self._resource} is none") from error
            if len(found) > MOST_LISTED:
                raise WatchFailed(f"there are more than {MOST_LISTED} {self._resource}: delete old ones")

    async def _page(self, query: str) -> Any:
        for size in PAGES:
            try:
                async with asyncio.timeout(DEADLINE):
                    status, page = await self._api.ask("GET", f"{self._path}?limit={size}{query}", most=MOST)
            except AnswerFailed as error:
                failed = error
                continue
            if status == 404:
                raise WatchFailed(f"the API server knows no {self._resource}: install the chart with elevation.enabled")
            if status != 200:
                said = page.get("message") if isinstance(page, dict) else None
                raise WatchFailed(f"code {status} to a list of {self._resource}: {clean(str(said), 400)}")
            return page
        raise WatchFailed(failed.message)

    async def _watch(self, version: str) -> None:
        """Pass events on until the watch ends."""
        tls, authorization = self._api.credentials(own=True)
        path = f"{self._path}?watch=1&resourceVersion={quote(version, safe='')}&timeoutSeconds={WATCH}"
        lines = [f"GET {path} HTTP/1.1", f"Host: {self._api.authority}", "Connection: close"]
        lines += ["Accept: application/json", "User-Agent: arcbridge-agent"]
        lines += [f"Authorization: {authorization}"] * bool(authorization)
        try:
            connection = await self._api.upstream.dial(tls)
        except RequestRefusal as refusal:
            raise WatchFailed(refusal.message) from None
        events = _Events(self._event, self._began)
        try:
            head = "\r\n".join(lines).encode() + b"\r\n\r\n"
            connection.send(events, UpstreamRequest(head, "GET", repeatable=False, framed=False))
            async with asyncio.timeout(WATCH + SILENT):
                await events.done
        finally:
            connection.drop()

    def _began(self, head: ResponseHead) -> None:
        self._clock.take(head.lines)
        self.current, self.failure = True, ""
        self._on_begin()

    def _event(self, line: bytes) -> None:
        event = read_json(line, MOST)
        if event["type"] == "ERROR":  # 410
            raise _TooOld
        if event["type"] != "BOOKMARK":
            self._changed(event["type"], event["object"])
