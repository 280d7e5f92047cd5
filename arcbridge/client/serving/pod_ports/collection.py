"""Follows a collection of the API server: lists it, watches it from there, and lists it anew when the watch has ended.

Its owner says how an object is read, page by page, so that no more than a page of documents is held. Invariants: a page
of a list and an event have bounds in size, and a list in objects; a list of more than `most` objects is cut, and the
receiver learns so; what cannot be read is an error in the API server's own words.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any

import aiohttp
from aiohttp.http_exceptions import LineTooLong

from arcbridge.client.session.session_manager import SessionManager
from arcbridge.client.session.stream_http import api_client
from arcbridge.errors import ArcbridgeError, PermissionRefused, RemoteProtocolError, Unreachable
from arcbridge.net.backoff import Backoff
from arcbridge.untrusted_json import read_json, read_json_object

PAGE = 50
"""Objects of one page of a list."""
PAGE_LIMIT = 1024 * 1024
"""Bytes of a page of several objects: while it is read nothing else of the process moves. Pods have 5 to 20 KiB. A page
that is larger is asked for again with half the objects."""
MAX_OBJECTS = 5000
"""Objects that are asked for in the pages of one list; the API server fills its pages."""
EVENT_LIMIT = 4 * 1024 * 1024
"""Bytes of one event, and of a page of one object, which may have 1.5 MiB in etcd."""
WATCH_SECONDS = 240
"""Seconds after which the API server ends a watch, before the deadline of an answer (`stream_http`)."""
RETRY_CAP = 5.0
"""Seconds between two tries, at most."""
LASTED = 1.0
"""Seconds after which a try has been good, and the next one may come soon."""

Listed = Callable[[list[Any], bool], None]
"""Takes all objects, and whether there are more."""
Changed = Callable[[str, Any], None]
"""Takes an event's type (ADDED, MODIFIED, DELETED) and its object."""


class Collection:
    """One collection, `path` with `query`; `run` follows it until cancelled."""

    def __init__(
        self,
        sessions: SessionManager,
        path: str,
        query: Mapping[str, str],
        listed: Listed,
        changed: Changed,
        failed: Callable[[ArcbridgeError], None],
        *,
        read: Callable[[Any], Any] = lambda document: document,
        most: int,
    ) -> None:
        """`read` makes of a document what is handed over; raises ValueError. `failed` gets the error of each try that
        failed; what it raises ends `run`."""
        self._sessions = sessions
        self._path = path
        self._query = query
        self._listed = listed
        self._changed = changed
        self._failed = failed
        self._read = read
        self._most = most

    async def run(self) -> None:
        """Follow it; raises what `failed` raises."""
        backoff = Backoff(first=0.2, cap=RETRY_CAP)
        while True:
            began = monotonic()
            try:
                async with api_client(await self._sessions.ready()) as http:
                    await self._watch(http, await self._list(http))
            except ArcbridgeError as error:
                self._failed(error)
            if monotonic() - began > LASTED:
                backoff.reset()
            await asyncio.sleep(backoff.next_delay())

    async def _list(self, http: aiohttp.ClientSession) -> str:
        """List all; return the version to watch from."""
        found: list[Any] = []
        query, size, asked = dict(self._query), PAGE, 0
        while (asked := asked + size) <= MAX_OBJECTS:
            page = await self._page(http, {**query, "limit": str(size)}, PAGE_LIMIT if size > 1 else EVENT_LIMIT)
            if page is None:
                size //= 2
                continue
            document, length = page
            if 2 * length <= PAGE_LIMIT:  # the large ones are behind it
                size = min(2 * size, PAGE)
            try:
                found += map(self._read, document["items"] or ())
                metadata = document["metadata"]
                version, more = str(metadata["resourceVersion"]), str(metadata.get("continue") or "")
                if not more or len(found) >= self._most:
                    self._listed(found[: self._most], bool(more) or len(found) > self._most)
                    return version
            except (KeyError, TypeError, ValueError) as error:
                raise RemoteProtocolError(f"the API server's answer to {self._path} is no list") from error
            query["continue"] = more
        raise RemoteProtocolError(f"the API server's answer to {self._path} has more than {MAX_OBJECTS} objects")

    async def _page(
        self, http: aiohttp.ClientSession, query: Mapping[str, str], most: int
    ) -> tuple[dict[str, Any], int] | None:
        """Return a page and its length; None where it is longer than `most` and more than one object was asked for."""
        async with http.get(self._path, params=query, allow_redirects=False) as answer:
            body = bytearray()
            async for piece in answer.content.iter_any():
                body += piece
                if len(body) > most and query["limit"] != "1":
                    answer.close()  # what is left of it is not wanted
                    return None
                if len(body) > most:
                    raise RemoteProtocolError(f"the API server's answer to {self._path} has more than {most} bytes")
            if answer.status != 200:
                raise refusal(answer.status, body, self._path)
            return read_json_object(body, most), len(body)

    async def _watch(self, http: aiohttp.ClientSession, version: str) -> None:
        """Pass events on until the watch ends."""
        query = {**self._query, "watch": "1", "resourceVersion": version, "timeoutSeconds": str(WATCH_SECONDS)}
        async with http.get(self._path, params=query, allow_redirects=False, read_bufsize=EVENT_LIMIT // 2) as answer:
            if answer.status != 200:
                raise refusal(answer.status, await answer.content.read(64 * 1024), self._path)
            try:
                while line := await answer.content.readline():
                    event = read_json(line, EVENT_LIMIT)
                    if event["type"] == "ERROR":  # 410: what has happened since is forgotten
                        return
                    self._changed(event["type"], self._read(event["object"]))
            except (LineTooLong, ValueError, KeyError, TypeError) as error:
                raise RemoteProtocolError(f"an event of {self._path} is too long, or is none") from error


def refusal(status: int, body: bytes | bytearray, what: str) -> ArcbridgeError:
    """Return the error of an answer of the API server (metav1.Status). `what`: the path, where it has no message."""
    otherwise = f"{what}: the API server answered with status {status}"
    message = str(read_json_object(body).get("message") or otherwise)[:1000]
    kind = PermissionRefused if status in (401, 403) else Unreachable
    return kind(message)
