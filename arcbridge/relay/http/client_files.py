"""Serves the single-file clients of a directory, so that a new user needs no other place to download from.

    GET  /client/                    [{platform, version, sha256, size, path}]
    GET  /client/{platform}          the file, such as /client/linux-x86_64; HEAD is answered, too
    GET  /client/{platform}.sha256   its SHA-256 as sha256sum(1) checks it, for a download to `arcbridge`

No credential is needed, so what strangers can take is bounded: requests of an address as for every path without a
credential, connections by `relay.admission`, which closes one that waits for its peer where another needs the place,
and here the bytes per second of all downloads and of each address, and the time of each download. A platform's name is
looked up in what was found in the directory, and is never part of a path. Every answer to a request for clusters names
the versions in a header, from which older clients learn of newer ones.
A relay that is taken over can serve another client: docs/threats.md#B30 says what that is worth, and what helps.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import re
import stat
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, Final

import structlog
from aiohttp import web

from arcbridge.limiters import KeyedTokenBucket, TokenBucket
from arcbridge.net.address import source_of
from arcbridge.relay.http.answers import ApiRefusal
from arcbridge.relay.http.server import address_of, allow_time
from arcbridge.tasks import TaskSet, cancel_and_wait

HEADER: Final = "Arcbridge-Client"
"""`platform=version`, several separated by commas."""
RATE: Final = 16 * 1024**2
"""Bytes per second of all downloads together: a client in a second, and an eighth of what a small relay moves."""
ADDRESS_RATE: Final = RATE // 2
"""Bytes per second of all downloads of one address."""
ADDRESSES: Final = 1024
"""Addresses whose bytes are counted at once."""
SLOWEST: Final = 32 * 1024
"""Bytes per second below which a download is cut off in the end: 17 MiB then take nine minutes."""
GRACE: Final = 30.0
"""Seconds that each download has besides."""
CHUNK: Final = 64 * 1024
"""Bytes that are read and sent at a time."""
LOOK_INTERVAL: Final = 2.0
"""Seconds for which what was found in the directory counts."""
LOOK_WAIT: Final = 0.5
"""Seconds for which an answer to a request for clusters waits for a look: the directory's disk may stall."""

_NAME: Final = re.compile(r"arcbridge-([a-z0-9]{1,20}-[a-z0-9_]{1,20})(?:\.exe)?")
_VERSION: Final = re.compile(r"[0-9][0-9A-Za-z.+-]{0,40}")
_HEAD: Final = re.compile(rb"# arcbridge ([0-9][0-9A-Za-z.+-]{0,40}), the client,")
"""In the first lines of a file whose head is a script (`.ci/release/client/head.sh`)."""
_LARGEST: Final = 512 * 1024**2

log = structlog.get_logger("arcbridge.relay")


@dataclass(frozen=True, slots=True)
class ClientFile:
    """One file of the directory, as it was when its SHA-256 was made."""

    platform: str
    path: Path
    version: str
    """Empty where the file does not name one."""
    sha256: str
    """Hexadecimal digits."""
    identity: tuple[int, int, int]
    """Inode, size in bytes, and time of the last change in nanoseconds."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.identity[1]


class DownloadRate:
    """Bounds the bytes per second of all downloads together and of each address.

    Chunks of one address take turns, and one of them at a time takes turns with the other addresses: an address delays
    another one by one chunk, however many downloads it has. A wait that is cancelled takes nothing.
    """

    def __init__(self) -> None:
        self.bytes = TokenBucket(RATE, RATE)
        self._address_bytes: KeyedTokenBucket[str] = KeyedTokenBucket(ADDRESS_RATE, ADDRESS_RATE, size=ADDRESSES)
        self._turn = asyncio.Lock()
        self._address_turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        """Held by the chunks that wait, and gone with the last of them."""

    async def wait(self, address: str, count: int) -> None:
        """Wait until `count` bytes may be sent to `address`, and count them."""
        address_turn = self._address_turns.setdefault(address, asyncio.Lock())
        async with address_turn:
            await _sleep(self._address_bytes.wait(address, time.monotonic(), count))
            async with self._turn:
                await _sleep(self.bytes.wait(time.monotonic(), count))
                # Not before the waits: for a peer that leaves meanwhile others would wait in vain.
                now = time.monotonic()
                self._address_bytes.take(address, now, count)
                self.bytes.take(now, count)


class ClientFiles:
    """The clients of one directory; `install` puts them into the relay's API."""

    def __init__(self, directory: Path | None, spend: Callable[[web.Request], None]) -> None:
        """`directory`: the setting `client.directory`, checked (`relay.settings`); None: no client is served. `spend`
        counts a request without a credential; raises `ApiRefusal`."""
        self._directory = directory
        self._spend = spend
        self._found: dict[str, ClientFile] = {}
        self._looked_at = -math.inf
        self._refused: set[str] = set()
        """What was logged as not served."""
        self._looking = asyncio.Lock()
        self._looks = TaskSet()
        self._rate = DownloadRate()

    def install(self, app: web.Application) -> None:
        """Add the routes and the header to an application, where a directory is set."""
        if self._directory is None:
            return
        for path, handler in (
            ("/client/", self._list),
            ("/client/{platform:[a-z0-9_-]+}", self._download),
            ("/client/{platform:[a-z0-9_-]+}.sha256", self._sum),
        ):
            for method in ("GET", "HEAD"):
                app.router.add_route(method, path, handler)
        app.on_response_prepare.append(self._name_versions)
        app.on_cleanup.append(self._end)

    async def look(self) -> dict[str, ClientFile]:
        """Return what the directory holds, by platform; a file that has changed is read again."""
        async with self._looking:
            if self._directory is not None and time.monotonic() - self._looked_at >= LOOK_INTERVAL:
                self._found = await asyncio.to_thread(self._look_again, self._directory)
                self._looked_at = time.monotonic()
        return self._found

    def _look_again(self, directory: Path) -> dict[str, ClientFile]:
        found: dict[str, ClientFile] = {}
        try:
            paths = sorted(directory.iterdir())
        except OSError as error:
            self._refuse("directory", f"cannot be read: {error.strerror}")
            return {}
        for path in paths:
            matched = _NAME.fullmatch(path.name)
            if matched is None:
                continue  # checksums and other artifacts of a release lie beside them
            platform = matched[1]
            try:
                status = path.stat()
                known = self._found.get(platform)
                if known is not None and known.path == path and known.identity == _identity(status):
                    found[platform] = known
                elif not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= _LARGEST:
                    self._refuse(path.name, "is no file of a client")
                elif status.st_mode & stat.S_IWOTH:
                    self._refuse(path.name, "every user of this machine can change it (chmod o-w)")
                else:
                    found[platform] = made = _read(platform, path)
                    self._refused.discard(path.name)
                    log.info("client offered", platform=platform, version=made.version, sha256=made.sha256)
            except OSError as error:
                self._refuse(path.name, f"cannot be read: {error.strerror}")
        return found

    def _refuse(self, name: str, reason: str) -> None:
        if name not in self._refused:
            self._refused.add(name)
            log.warning("client not offered", file=name, reason=reason)

    async def _list(self, request: web.Request) -> web.StreamResponse:
        self._spend(request)
        return web.json_response(
            [
                {
                    "platform": file.platform,
                    "version": file.version,
                    "sha256": file.sha256,
                    "size": file.size,
                    "path": f"/client/{file.platform}",
                }
                for file in (await self.look()).values()
            ]
        )

    async def _sum(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text=f"{(await self._file(request)).sha256}  arcbridge\n")

    async def _file(self, request: web.Request) -> ClientFile:
        self._spend(request)
        file = (await self.look()).get(request.match_info["platform"])
        if file is None:
            raise ApiRefusal(
                HTTPStatus.NOT_FOUND, "there is no client for this platform: /client/ lists those that there are"
            )
        return file

    async def _download(self, request: web.Request) -> web.StreamResponse:
        file = await self._file(request)
        answer = web.StreamResponse(headers={"Content-Disposition": 'attachment; filename="arcbridge"'})
        answer.content_type = "application/octet-stream"
        answer.content_length = file.size
        if request.method == "HEAD":
            await answer.prepare(request)
            return answer
        try:
            with await asyncio.to_thread(_open, file) as opened:
                await self._send(request, answer, file, opened)
        except OSError as error:
            if isinstance(error, ConnectionError):
                raise
            # What was replaced is looked at anew; what was sent cannot be taken back, so the answer is cut off.
            self._looked_at = -math.inf
            log.warning("client not served", platform=file.platform, reason=error.strerror or str(error))
            if answer.prepared:
                raise ConnectionAbortedError("the file cannot be read any more") from error
            raise ApiRefusal(
                HTTPStatus.SERVICE_UNAVAILABLE, "the file was replaced just now: try again", retry_after=2
            ) from error
        log.info("client downloaded", platform=file.platform, version=file.version, source=address_of(request))
        return answer

    async def _send(
        self, request: web.Request, answer: web.StreamResponse, file: ClientFile, opened: IO[bytes]
    ) -> None:
        """Send a file in chunks, no faster than `DownloadRate` lets it, and reading no more than is sent."""
        allow_time(request, GRACE + file.size / SLOWEST)
        await answer.prepare(request)
        left, source = file.size, source_of(address_of(request))
        while left:
            chunk = await asyncio.to_thread(opened.read, min(CHUNK, left))
            if not chunk:
                raise OSError("the file became shorter")
            left -= len(chunk)
            await self._rate.wait(source, len(chunk))
            await answer.write(chunk)
        await answer.write_eof()

    async def _name_versions(self, request: web.Request, response: web.StreamResponse) -> None:
        if response.status == HTTPStatus.OK and request.path.startswith("/v1/clusters"):
            if not self._looking.locked():
                await asyncio.wait({self._looks.start(self.look())}, timeout=LOOK_WAIT)
            offered = [f"{file.platform}={file.version}" for file in self._found.values() if file.version]
            if offered:
                response.headers[HEADER] = ",".join(offered)

    async def _end(self, app: web.Application) -> None:
        await cancel_and_wait(*self._looks)


async def _sleep(seconds: float) -> None:
    if seconds > 0.0:
        await asyncio.sleep(seconds)


def _open(file: ClientFile) -> IO[bytes]:
    """Open a file that is still the one whose SHA-256 is known; raises OSError."""
    opened = file.path.open("rb", buffering=0)
    if _identity(os.fstat(opened.fileno())) != file.identity:
        opened.close()
        raise OSError("another file is there now")
    return opened


def _read(platform: str, path: Path) -> ClientFile:
    """Hash a file and find its version: in its head, or in a file beside it named `NAME.version`."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        head = _HEAD.search(file.read(512))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if head is not None:
        version = head[1].decode("ascii")
    else:
        try:
            text = path.with_name(f"{path.name}.version").read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            text = ""
        version = text if _VERSION.fullmatch(text) else ""
    return ClientFile(platform, path, version, digest, _identity(status))


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns
