"""Serves the single-file clients of a directory, so that a new user needs no other place to download from.

    GET  /client/                    [{platform, version, sha256, size, path}]
    GET  /client/{platform}          the file, such as /client/linux-x86_64; HEAD and If-None-Match are answered
    GET  /client/{platform}.sha256   its SHA-256 as sha256sum(1) checks it, for a download to `arcbridge`

No credential is needed, so what a stranger can take is bounded: downloads at once, those of one address, and bytes per
second of all together. Where all places are taken, a newcomer gets one of an address that has more, or that of a
download which is slower than an even share (`giving_way`). A platform's name is looked up in what was found in the
directory, and is never part of a path. Every answer to a request for clusters names the versions in a header, from
which older clients learn of newer ones.
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
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Final

import structlog
from aiohttp import web

from arcbridge.limiters import KeyedTokenBucket, TokenBucket
from arcbridge.net.address import source_of
from arcbridge.relay.http.answers import ApiRefusal, expect, wrong_method
from arcbridge.relay.http.server import address_of, allow_time

HEADER: Final = "Arcbridge-Client"
"""`platform=version`, several separated by commas."""

DOWNLOADS: Final = 32
"""Downloads at once."""

DOWNLOADS_OF_ADDRESS: Final = 8
"""Those of one address, which may stand for an office full of people."""

REQUESTS: Final = 120
"""Requests that one address has at once."""

REQUESTS_RATE: Final = 1.0
"""Such requests per second that grow back."""

RATE: Final = 16 * 1024**2
"""Bytes per second of all downloads together: a client in a second, and an eighth of what a small relay moves."""

SLOWEST: Final = 32 * 1024
"""Bytes per second below which a download is cut off in the end: 17 MiB then take nine minutes."""

GRACE: Final = 30.0
"""Seconds that each download has besides, and for which it keeps its place whatever its pace."""

EVEN_SHARE: Final = RATE // DOWNLOADS
"""Bytes per second below which a download gives way where all places are taken: others could use what it does not."""

CHUNK: Final = 128 * 1024
"""Bytes that are read and sent at a time."""

LOOK_INTERVAL: Final = 2.0
"""Seconds for which what was found in the directory counts."""

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
    """Empty where the file does not tell."""
    sha256: str
    """Hexadecimal digits."""
    identity: tuple[int, int, int]
    """Inode, size in bytes, and time of the last change in nanoseconds."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.identity[1]

    @property
    def tag(self) -> str:
        """The entity tag (RFC 9110 §8.8.3)."""
        return f'"{self.sha256}"'


@dataclass(eq=False, slots=True)
class Download:
    """One download under way."""

    address: str
    """The key under which its peer is counted."""
    transport: asyncio.Transport | None
    began: float
    """Monotonic seconds."""
    sent: int = 0
    """Bytes that the peer's connection has taken."""

    def pace(self, now: float) -> float:
        """Return its bytes per second since it began; infinity within GRACE."""
        age = now - self.began
        return math.inf if age < GRACE else self.sent / age


def giving_way(downloads: Collection[Download], address: str, now: float) -> Download | None:
    """Return the download that makes room for another one of `address`, None where the newcomer has to wait.

    The address that has most loses one first, where it keeps as many as the newcomer's has then: a few addresses keep
    out no other one. Else the slowest gives way, if it is slower than an even share, and of the newcomer's own address
    or of one that has more: who begins anew again and again takes no place of an address that has fewer.
    """
    counts = Counter(one.address for one in downloads)
    most = max(counts.values(), default=0)
    if most > counts[address] + 1:
        return min((one for one in downloads if counts[one.address] == most), key=lambda one: one.pace(now))
    others = (one for one in downloads if one.address == address or counts[one.address] > counts[address])
    slowest = min(others, key=lambda one: one.pace(now), default=None)
    return slowest if slowest is not None and slowest.pace(now) < EVEN_SHARE else None


class ClientFiles:
    """The clients of one directory; `install` puts them into the relay's API."""

    def __init__(self, directory: Path | None) -> None:
        """`directory`: the setting `client.directory`, checked (`relay.settings`); None: no client is served."""
        self._directory = directory
        self._found: dict[str, ClientFile] = {}
        self._looked_at = -math.inf
        self._refused: set[str] = set()
        """What was logged as not served."""
        self._looking = asyncio.Lock()
        self._under_way: set[Download] = set()
        self._requests: KeyedTokenBucket[str] = KeyedTokenBucket(REQUESTS, REQUESTS_RATE, size=4096)
        self._bytes = TokenBucket(RATE, RATE)

    def install(self, app: web.Application) -> None:
        """Add the routes and the header to an application, where a directory is set."""
        if self._directory is None:
            return
        for path, handler in (
            ("/client/", self._list),
            ("/client/{platform:[a-z0-9_-]+}", self._download),
            ("/client/{platform:[a-z0-9_-]+}.sha256", self._sum),
        ):
            app.router.add_route("GET", path, handler, expect_handler=expect)
            app.router.add_route("HEAD", path, handler, expect_handler=expect)
            app.router.add_route("*", path, wrong_method, expect_handler=expect)
        app.on_response_prepare.append(self._tell_versions)

    async def look(self) -> dict[str, ClientFile]:
        """Return what the directory holds, by platform; a file that has changed is read again."""
        async with self._looking:
            now = time.monotonic()
            if self._directory is not None and now - self._looked_at >= LOOK_INTERVAL:
                self._found = await asyncio.to_thread(self._look_again, self._directory, self._found)
                self._looked_at = time.monotonic()
        return self._found

    def _look_again(self, directory: Path, before: dict[str, ClientFile]) -> dict[str, ClientFile]:
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
                known = before.get(platform)
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
        found = await self.look()
        return web.json_response(
            [
                {
                    "platform": file.platform,
                    "version": file.version,
                    "sha256": file.sha256,
                    "size": file.size,
                    "path": f"/client/{file.platform}",
                }
                for file in found.values()
            ]
        )

    async def _sum(self, request: web.Request) -> web.StreamResponse:
        self._spend(request)
        return web.Response(text=f"{(await self._file(request)).sha256}  arcbridge\n")

    async def _download(self, request: web.Request) -> web.StreamResponse:
        self._spend(request)
        file = await self._file(request)
        answer = web.StreamResponse(
            headers={
                "ETag": file.tag,
                "Content-Disposition": 'attachment; filename="arcbridge"',
                "Accept-Ranges": "none",
            }
        )
        answer.content_type = "application/octet-stream"
        known = [tag.strip().removeprefix("W/") for tag in request.headers.get("If-None-Match", "").split(",")]
        if file.tag in known or "*" in known:
            answer.set_status(HTTPStatus.NOT_MODIFIED)
            await answer.prepare(request)
            return answer
        answer.content_length = file.size
        if request.method == "HEAD":
            await answer.prepare(request)
            return answer
        address = source_of(address_of(request))
        self._make_room(address)
        download = Download(address, request.transport, time.monotonic())
        self._under_way.add(download)
        try:
            with await asyncio.to_thread(_open, file) as descriptor:
                await self._send(request, answer, file, descriptor, download)
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
        finally:
            self._under_way.discard(download)
        log.info("client downloaded", platform=file.platform, version=file.version, source=address_of(request))
        return answer

    def _make_room(self, address: str) -> None:
        """Have a place for one more download of `address`. Raises ApiRefusal."""
        leaves: Download | None = None
        full = len(self._under_way) >= DOWNLOADS
        if full:
            leaves = giving_way(self._under_way, address, time.monotonic())
        mine = sum(one.address == address for one in self._under_way if one is not leaves)
        if mine >= DOWNLOADS_OF_ADDRESS or (full and leaves is None):
            raise ApiRefusal(
                HTTPStatus.SERVICE_UNAVAILABLE, "too many downloads at once: try again in a minute", retry_after=60
            )
        if leaves is not None:
            self._under_way.discard(leaves)
            log.info("client download cut off", source=leaves.address, sent=leaves.sent, reason="others wait")
            if leaves.transport is not None:
                leaves.transport.abort()

    async def _send(
        self,
        request: web.Request,
        answer: web.StreamResponse,
        file: ClientFile,
        descriptor: _Descriptor,
        download: Download,
    ) -> None:
        """Send a file in chunks, no faster than all downloads together may be, and reading no more than is sent."""
        allow_time(request, GRACE + file.size / SLOWEST)
        await answer.prepare(request)
        left = file.size
        while left:
            chunk = await asyncio.to_thread(os.read, descriptor.number, min(CHUNK, left))
            if not chunk:
                raise OSError("the file became shorter")
            left -= len(chunk)
            now = time.monotonic()
            if wait := self._bytes.wait(now, len(chunk)):
                # Taken before the wait, so that turns come in the order of the calls.
                self._bytes.take(now, len(chunk))
                await asyncio.sleep(wait)
            else:
                self._bytes.take(now, len(chunk))
            await answer.write(chunk)
            download.sent += len(chunk)
        await answer.write_eof()

    async def _file(self, request: web.Request) -> ClientFile:
        file = (await self.look()).get(request.match_info["platform"])
        if file is None:
            raise ApiRefusal(
                HTTPStatus.NOT_FOUND, "there is no client for this platform: /client/ lists those that there are"
            )
        return file

    def _spend(self, request: web.Request) -> None:
        now, address = time.monotonic(), source_of(address_of(request))
        if self._requests.reserve(address, now) is None:
            wait = max(math.ceil(self._requests.wait(address, now)), 1)
            raise ApiRefusal(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"too many requests from this address: wait {wait} s and try again",
                retry_after=wait,
            )

    async def _tell_versions(self, request: web.Request, response: web.StreamResponse) -> None:
        if response.status == HTTPStatus.OK and request.path.startswith("/v1/clusters"):
            offered = [f"{file.platform}={file.version}" for file in (await self.look()).values() if file.version]
            if offered:
                response.headers[HEADER] = ",".join(offered)


class _Descriptor:
    """An open file, closed at the end of `with`."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __enter__(self) -> _Descriptor:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.number)


def _open(file: ClientFile) -> _Descriptor:
    """Open a file that is still the one whose SHA-256 is known; raises OSError."""
    descriptor = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
    if _identity(os.fstat(descriptor)) != file.identity:
        os.close(descriptor)
        raise OSError("another file is there now")
    return _Descriptor(descriptor)


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
