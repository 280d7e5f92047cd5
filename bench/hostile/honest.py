"""The honest callers, in one process: `python -m bench.hostile.honest` reads its place as a line of JSON.

Each kind of call is made at its own steady rate, whether the calls before it have ended or not, so that a stall shows
in every call that falls into it. Each call leaves one line on stdout: its kind, when it began (monotonic seconds, one
clock for all processes), its milliseconds, and `ok` or why it was refused. The process ends with its stdin.

| kind | what |
|---|---|
| `get` | a GET through the local endpoint of a real client process, on kept connections |
| `session` | join, end-to-end TLS, AUTH and a GET, each by the next of the people |
| `resume` | a session with an open watch loses its connection and is resumed |
| `https` | `GET /v1/ca` at the relay on a new connection |
| `control` | an agent's control connection is established, then closed |
| `enrol` | an agent enrols with a good join token (where there is one) |
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from arcbridge.agent.relay_http import post
from arcbridge.cli.loop import loop_factory
from arcbridge.errors import ArcbridgeError
from arcbridge.mux.session import BaseHandler, MuxSession
from arcbridge.net.address import Address
from arcbridge.net.tls import ALPN_CONTROL, RelayTrust, outer_client_context
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.wire.records import Auth
from arcbridge.wire.session import Introduction, Kind, Side
from bench.hostile.place import OBJECT, TARGET, Answer, Place, get, request, word

EVERY = {"get": 0.012, "session": 0.25, "resume": 0.5, "https": 0.5, "control": 1.0, "enrol": 1.0}
"""Seconds between two calls of a kind: about 80 GETs and four new sessions each second."""
DEADLINE = 10.0
"""Seconds after which a call counts as refused."""
CONNECTIONS = 6
"""Kept connections to the local endpoint."""
STANDING = 2
"""Sessions that are cut and resumed in turn."""
WATCH = "/api/v1/namespaces?watch=true"
MOST_UNDER_WAY = 200
"""Calls of one kind at once; more are not begun, and count as refused."""


class Refused(Exception):
    """An honest call got no answer of the kind it must have."""


class Honest:
    """All honest callers."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._people = itertools.cycle(place.people)
        self._idle: asyncio.LifoQueue[tuple[asyncio.StreamReader, asyncio.StreamWriter] | None] = asyncio.LifoQueue()
        for _ in range(CONNECTIONS):
            self._idle.put_nowait(None)
        self._standing: asyncio.Queue[MuxSession] = asyncio.Queue()
        self._control = outer_client_context(
            RelayTrust(place.relay_ca), ALPN_CONTROL, client_certificate=(place.agent_certificate, place.agent_key)
        )
        self._endpoint = ssl.create_default_context(cadata=place.endpoint_ca)
        with tempfile.TemporaryDirectory() as directory:
            certificate, key = Path(directory) / "certificate", Path(directory) / "key"
            certificate.write_text(place.endpoint_certificate)
            key.touch(mode=0o600)
            key.write_text(place.endpoint_key)
            self._endpoint.load_cert_chain(certificate, key)
        self._kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "get": self.get,
            "session": self.session,
            "resume": self.resume,
            "https": self.https,
            "control": self.control,
        }
        if place.join_token:
            self._kinds["enrol"] = self.enrol

    async def run(self) -> None:
        """Call until stdin ends."""
        over = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        for _ in range(STANDING):
            self._standing.put_nowait(await self._stand())
        print("ready", flush=True)
        tasks = [asyncio.create_task(self._steadily(kind, call)) for kind, call in self._kinds.items()]
        await over
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _steadily(self, kind: str, call: Callable[[], Awaitable[None]]) -> None:
        calls: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        try:
            while True:
                due += EVERY[kind]
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if len(calls) >= MOST_UNDER_WAY:
                    _say(kind, time.monotonic(), 0.0, "too many calls wait")
                    continue
                task = asyncio.create_task(self._call(kind, call))
                calls.add(task)
                task.add_done_callback(calls.discard)
        finally:
            for task in calls:
                task.cancel()

    async def _call(self, kind: str, call: Callable[[], Awaitable[None]]) -> None:
        begun = time.monotonic()
        how = "ok"
        try:
            async with asyncio.timeout(DEADLINE):
                await call()
        except Refused as refused:
            how = str(refused)
        except (ArcbridgeError, OSError, EOFError, TimeoutError) as error:
            how = word(error)
        _say(kind, begun, 1000 * (time.monotonic() - begun), how)

    # -- the kinds ----------------------------------------------------------------------------------------------------

    async def get(self) -> None:
        kept = await self._idle.get()
        try:
            if kept is None:
                kept = await asyncio.open_connection(
                    self._place.host, self._place.endpoint_port, ssl=self._endpoint, server_hostname="127.0.0.1"
                )
            reader, writer = kept
            try:
                writer.write(request(OBJECT))
                code = await _answer(reader)
            except BaseException:
                writer.transport.abort()
                kept = None
                raise
            if code != 200:
                raise Refused(str(code))
        finally:
            self._idle.put_nowait(kept)

    async def session(self) -> None:
        session = await self._place.establish(next(self._people))
        try:
            code = await get(session)
            if code != "200":
                raise Refused(code)
        finally:
            session.close()

    async def resume(self) -> None:
        """Cut and resume one of the standing sessions; where none can be had, that is the refusal."""
        session = await self._standing.get() if not self._standing.empty() else await self._stand()
        try:
            person = self._place.people[0]
            hello = session.peer_hello
            if session.transport is None or hello is None:
                raise Refused("the session had ended")
            session.transport.abort()
            await asyncio.sleep(0)
            sock, reply = await self._place.join(person, instance=hello.agent)
            try:
                connection = session.migration.start(Auth(token=person.cluster), label=reply.join_id)
                await self._place.carry(sock, reply, connection)
            except BaseException:
                sock.close()
                raise
            await session.migration.wait()
        except BaseException:
            session.abort()
            raise
        if self._standing.qsize() < STANDING:
            self._standing.put_nowait(session)
        else:
            session.close()  # it was made because the others were being resumed

    async def https(self) -> None:
        async with self._connection() as (reader, writer):
            writer.write(request("/v1/ca"))
            code = await _answer(reader)
            if code != 200:
                raise Refused(str(code))

    async def control(self) -> None:
        session = MuxSession(
            Side.INITIATOR,
            Kind.CONTROL,
            BaseHandler(),
            introduction=Introduction(f"spare-{time.monotonic_ns()}", "arcbridge bench", self._place.agent_ca),
        )
        sock = await self._place.connect(self._place.relay_port)
        try:
            await asyncio.get_running_loop().create_connection(
                session.protocol, sock=sock, ssl=self._control, server_hostname=self._place.host
            )
            await session.wait_established()
        finally:
            session.close()
            if session.transport is None:
                sock.close()

    async def enrol(self) -> None:
        place = self._place
        csr = await asyncio.to_thread(lambda: make_csr(make_key()))
        document = {"join_token": place.join_token, "csr": csr, "cluster_ca": place.cluster_ca}
        await post(Address(place.host, place.relay_port), "/v1/enrol", document, RelayTrust(place.relay_ca))

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _stand(self) -> MuxSession:
        """A session with an open watch: what a person has who looks at something."""
        session = await self._place.establish(self._place.people[0])
        session.open(TARGET, Answer(request(WATCH)))
        return session

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        place = self._place
        reader, writer = await asyncio.open_connection(
            place.host, place.relay_port, ssl=place.https, server_hostname=place.host
        )
        try:
            yield reader, writer
        finally:
            writer.transport.abort()


async def _answer(reader: asyncio.StreamReader) -> int:
    """Read one answer with a Content-Length; its code."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            await reader.readexactly(int(line.partition(b":")[2]))
    return int(head.split(b" ", 2)[1])


def _say(kind: str, begun: float, milliseconds: float, how: str) -> None:
    print(f"{kind}\t{begun:.6f}\t{milliseconds:.3f}\t{how}", flush=True)


def main() -> None:
    """Read the place, call."""
    place = Place.of(sys.stdin.readline())

    async def run() -> None:
        await Honest(place).run()

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(run())


if __name__ == "__main__":
    main()
