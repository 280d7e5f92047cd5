"""The attacks, each the real protocol through the real modules with one lie: what a hostile caller would send.

An attack runs until it is cancelled. It tells how each of its tries ended (`Attacker.told`), comes again when it was
cut or refused, as an attacker does, and is bounded in what it holds and in how fast it tries. Addresses are 127.0.1.x.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from arcbridge.errors import ArcbridgeError, RemoteProtocolError
from arcbridge.mux.session import MuxSession
from arcbridge.wire.frames import FIRST_CREDIT
from arcbridge.wire.limits import DEFAULT, Limits
from bench.hostile.place import OBJECT, TARGET, Answer, Person, Place, request, word

ADDRESSES, PER_ADDRESS = 10, 100
"""Of strangers: together as many as the relay's places for connections without identity (`[limits]`, as shipped)."""
KEEP = 20.0
"""Seconds between two requests of a stranger's HTTPS connection."""
RAMP = 4.0
"""Seconds over which strangers come for the first time."""
STALLED = 671
"""Answers that a caller asks for and does not take."""
HEADS = 300
HEAD = request("/api").removesuffix(b"\r\n") + b"X-Filler: %b\r\n" % (b"x" * 65_000) * 15
"""A megabyte of a request head, without its end."""
BODIES_HELD = 8
TRICKLE_SESSIONS, TRICKLE_STREAMS = 10, 60
LARGE = "/openapi/v2"
"""An answer of some megabytes that every user may read."""
LISTED = "/api/v1/namespaces"
"""A path whose verb depends on its query: list or watch."""
PODS = "/api/v1/namespaces/default/pods"
TARGETS_PER_S, TARGETS_MOST = 5000, 30_000
CHURN_PER_S, CHURN_MOST = 240, 4000
JOINS_PER_S, JOINS_HELD = 30, 600
QUERIES_PER_S, QUERY_FIELDS = 20, 1200
NEIGHBOURS_PER_S = 20
LOCAL_PER_S, LOCAL_HELD = 100, 800
AGAIN = 0.5
"""Seconds until an attacker comes again who was cut off or refused."""


class Attacker:
    """What all attacks share: the place, tallies, and how to try steadily."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.outcomes: Counter[str] = Counter()
        self._people = itertools.cycle(place.people)
        self._tasks: set[asyncio.Task[None]] = set()

    def told(self, how: str) -> None:
        """Count one outcome."""
        self.outcomes[how] += 1

    def person(self) -> Person:
        """The next hostile user."""
        return next(self._people)

    async def trying(self, work: Awaitable[None]) -> None:
        """Await `work`, and count how it failed, if it did."""
        try:
            await work
        except (ArcbridgeError, OSError, EOFError, TimeoutError, asyncio.IncompleteReadError) as error:
            self.told(word(error))

    async def steadily(self, per_s: float, work: Callable[[], Awaitable[None]], *, held: int) -> None:
        """Begin `work` so often, with at most `held` under way."""
        due, tasks = time.monotonic(), set[asyncio.Task[None]]()
        while True:
            due = max(due + 1 / per_s, time.monotonic() - 1.0)  # never more than a second's worth at once
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if len(tasks) < held:
                task = asyncio.create_task(self.trying(work()))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

    async def each(self, count: int, work: Callable[[int], Awaitable[None]]) -> None:
        """Keep `count` workers at `work(number)`, each again AGAIN seconds after it ended."""

        async def worker(number: int) -> None:
            await asyncio.sleep(RAMP * number / count)
            while True:
                await self.trying(work(number))
                await asyncio.sleep(AGAIN)

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(worker(number))

    async def session(self, person: Person, limits: Limits | None = None) -> MuxSession:
        """A session, however long it takes; counts each refusal, and how the session ends."""
        while True:
            try:
                session = await self.place.establish(person, source=_source(0), limits=limits or _limits())
            except (ArcbridgeError, OSError, TimeoutError) as error:
                self.told(word(error))
                await asyncio.sleep(AGAIN)
                continue
            self.told("session")
            ended = asyncio.create_task(self._tell_end(session))
            self._tasks.add(ended)
            ended.add_done_callback(self._tasks.discard)
            return session

    def opens(self, session: MuxSession, target: str, answer: Answer) -> bool:
        """Open a stream and count it, unless the session has just ended."""
        try:
            session.open(target, answer)
        except ArcbridgeError:
            return False
        self.told("opened")
        return True

    async def _tell_end(self, session: MuxSession) -> None:
        self.told(f"session ended: {word(await session.wait_ended())}")


def _limits(window: int = DEFAULT.stream_window) -> Limits:
    """An attacker's own side holds nothing against the agent, and gives a stream `window` bytes of first credit."""
    return Limits(
        stream_window=window,
        max_stream_window=max(window, FIRST_CREDIT),
        churn_burst=10**9,
        small_frame_burst=10**9,
        handshake_timeout=120.0,
        ping_timeout=120.0,
    )


def _source(number: int) -> str:
    return f"127.0.1.{1 + number}"


# -- strangers --------------------------------------------------------------------------------------------------------


async def https(attacker: Attacker, count: int = ADDRESSES * PER_ADDRESS) -> None:
    """A stranger's HTTPS connections: each asks for the CA now and then, and stays."""

    async def one(number: int) -> None:
        place = attacker.place
        sock = await place.connect(place.relay_port, _source(number % ADDRESSES))
        try:
            reader, writer = await asyncio.open_connection(sock=sock, ssl=place.https, server_hostname=place.host)
        except BaseException:
            sock.close()
            raise
        try:
            begun = time.monotonic()
            while True:
                writer.write(request("/v1/ca"))
                head = await reader.readuntil(b"\r\n\r\n")
                attacker.told(head.split(b" ", 2)[1].decode("latin-1"))
                try:
                    async with asyncio.timeout(KEEP):
                        while await reader.read(16 * 1024):
                            pass
                    attacker.told(f"closed by the relay after {_about(time.monotonic() - begun)}")
                    return
                except TimeoutError:
                    continue  # it is still there: the next request
        finally:
            writer.transport.abort()

    await attacker.each(count, one)


async def handshakes(attacker: Attacker) -> None:
    """A third sends a ClientHello byte by byte, a third stops after it, a third finishes TLS for a join and says
    nothing."""

    async def one(number: int) -> None:
        place = attacker.place
        loop = asyncio.get_running_loop()
        begun = time.monotonic()
        sock = await place.connect(place.relay_port, _source(number % ADDRESSES))
        try:
            if number % 3 == 2:
                how = "TLS and nothing more"
                reader, _ = await asyncio.open_connection(sock=sock, ssl=place.joining, server_hostname=place.host)
                while await reader.read(16 * 1024):
                    pass
            else:
                hello = _client_hello(place.joining if number % 2 else place.https)
                how = "a byte at a time" if number % 3 else "half-open"
                for byte in (hello[at : at + 1] for at in range(len(hello))) if number % 3 else (hello,):
                    await loop.sock_sendall(sock, byte)
                    if number % 3:
                        await asyncio.sleep(1.0)
                while await loop.sock_recv(sock, 16 * 1024):
                    pass
            attacker.told(f"{how}: held for {_about(time.monotonic() - begun)}")
        except ConnectionError:
            attacker.told(f"{how}: held for {_about(time.monotonic() - begun)}")
        finally:
            sock.close()

    await attacker.each(ADDRESSES * PER_ADDRESS, one)


async def neighbours(attacker: Attacker) -> None:
    """Behind the address of the honest: joins and requests with bad tokens, and enrolments with bad join tokens."""
    place, numbers = attacker.place, itertools.count()

    async def one() -> None:
        number = next(numbers)
        match number % 4:
            case 0:
                await _http(
                    attacker, "POST", "/v1/enrol", f'{{"join_token":"{"0" * 26}.{number}","csr":"","cluster_ca":""}}'
                )
            case 1:
                await _http(attacker, "GET", "/v1/clusters", token=f"{place.people[0].access[:-8]}{number:08d}")
            case _:
                sock, _ = await place.join(attacker.person(), token=f"{place.people[0].access[:-8]}{number:08d}")
                sock.close()
                attacker.told("joined with a bad token")

    await attacker.steadily(NEIGHBOURS_PER_S, one, held=200)


async def _http(attacker: Attacker, method: str, path: str, body: str = "", token: str = "") -> None:
    place = attacker.place
    reader, writer = await asyncio.open_connection(
        place.host, place.relay_port, ssl=place.https, server_hostname=place.host
    )
    try:
        lines = [f"{method} {path} HTTP/1.1", "Host: relay", "Connection: close", f"Content-Length: {len(body)}"]
        lines += ["Content-Type: application/json"] if body else []
        lines += [f"Authorization: Bearer {token}"] if token else []
        writer.write(("\r\n".join(lines) + "\r\n\r\n" + body).encode())
        head = await reader.readuntil(b"\r\n")
        attacker.told(f"{method} {path}: {head.split(b' ', 2)[1].decode('latin-1')}")
    finally:
        writer.transport.abort()


async def local(attacker: Attacker) -> None:
    """On the workstation: connections to the local endpoint without the kubeconfig's certificate; half say nothing
    at all, half make TLS, ask, and stay."""
    place, numbers = attacker.place, itertools.count()
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    async def one() -> None:
        number = next(numbers)
        begun = time.monotonic()
        loop = asyncio.get_running_loop()
        sock = await place.connect(place.endpoint_port)
        how = "said nothing"
        try:
            if number % 2:
                how = "TLS without the certificate"
                reader, writer = await asyncio.open_connection(sock=sock, ssl=context, server_hostname="127.0.0.1")
                writer.write(request(OBJECT)[:-2])  # the head's end is missing
                while await reader.read(16 * 1024):
                    pass
            else:
                while await loop.sock_recv(sock, 16 * 1024):
                    pass
        except ConnectionError:
            pass  # a reset is an end, too
        finally:
            sock.close()
        attacker.told(f"{how}: held for {_about(time.monotonic() - begun)}")

    await attacker.steadily(LOCAL_PER_S, one, held=LOCAL_HELD)


# -- users ------------------------------------------------------------------------------------------------------------


async def stalled(attacker: Attacker, count: int = STALLED) -> None:
    """One session: `count` large answers at once, none of which is read, and no credit is granted for any."""
    limits = _limits(FIRST_CREDIT)
    while True:
        session = await attacker.session(attacker.person(), limits=limits)
        opened = 0
        while session.usable:
            if len(session.streams) < count:
                opened += attacker.opens(session, TARGET, Answer(request(LARGE), stalled=True, told=attacker.told))
            await asyncio.sleep(0.1 if len(session.streams) >= count or opened % 50 == 0 else 0.0)
        await asyncio.sleep(AGAIN)


async def heads(attacker: Attacker, count: int = HEADS) -> None:
    """One session: `count` requests at once whose heads do not end; each that is refused comes again."""
    while True:
        session = await attacker.session(attacker.person())
        while session.usable:
            if len(session.streams) < count:
                attacker.opens(session, TARGET, Answer(HEAD, told=attacker.told))
            await asyncio.sleep(0.1 if len(session.streams) >= count else 0.0)
        await asyncio.sleep(AGAIN)


async def bodies(attacker: Attacker) -> None:
    """Writes of pods whose bodies have one long name and many capabilities, some at a time."""
    body = privileged_pod()
    payload = request(PODS, f"Content-Length: {len(body)}", "Content-Type: application/json") + body
    payload = payload.replace(b"GET", b"POST", 1)
    while True:
        session = await attacker.session(attacker.person())
        while session.usable:
            if len(session.streams) < BODIES_HELD:
                attacker.opens(session, TARGET, Answer(payload, told=attacker.told))
            await asyncio.sleep(0.02)
        await asyncio.sleep(AGAIN)


def privileged_pod() -> bytes:
    """A body just below what is looked at (`agent.kube.pod_body.MAX_BODY`)."""
    return b'{"name":"%b","capabilities":{"add":[%b]}}' % (b"n" * 65_000, b",".join([b'"a"'] * 16_450))


async def trickle(attacker: Attacker) -> None:
    """Two users with some sessions each: every answer is read, but by a few bytes each second; half of the requests
    take the agent's general path."""

    async def sip(answer: Answer) -> None:
        while not answer.word.done():
            await asyncio.sleep(1.0)
            if answer.stream is not None and not answer.word.done():
                answer.stream.resume_reading()  # one delivery, then none again

    async def one(number: int) -> None:
        session = await attacker.session(attacker.person(), limits=_limits(FIRST_CREDIT))
        async with asyncio.TaskGroup() as group:
            for stream in range(TRICKLE_STREAMS):
                fields = ("TE: trailers",) if stream % 2 else ()
                answer = Answer(request(LARGE, *fields), stalled=True, sips=True, told=attacker.told)
                if attacker.opens(session, TARGET, answer):
                    group.create_task(sip(answer))
                await asyncio.sleep(0.02)
        session.close()

    await attacker.each(TRICKLE_SESSIONS, one)


async def targets(attacker: Attacker) -> None:
    """One user opens streams to targets that do not exist, as fast as a session takes them."""
    opened = 0
    while True:
        session = await attacker.session(attacker.person())
        due = time.monotonic()
        while session.usable:
            if opened < TARGETS_MOST and len(session.streams) < 4000:
                for _ in range(TARGETS_PER_S // 50):
                    opened += attacker.opens(session, f"tcp:nowhere-{opened}", Answer(told=attacker.told))
            due = max(due + 0.02, time.monotonic() - 0.5)
            await asyncio.sleep(max(0.001, due - time.monotonic()))
        await asyncio.sleep(AGAIN)


async def churn(attacker: Attacker) -> None:
    """One user: OPEN, a GET and FIN at once, so that the stream is over for the agent before its answer is."""
    opened = 0
    while True:
        session = await attacker.session(attacker.person())
        due = time.monotonic()
        while session.usable:
            if opened < CHURN_MOST:
                opened += attacker.opens(session, TARGET, Answer(request(OBJECT), finish=True, told=attacker.told))
            due = max(due + 1 / CHURN_PER_S, time.monotonic() - 0.5)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await asyncio.sleep(AGAIN)


async def joins(attacker: Attacker, per_s: float = JOINS_PER_S) -> None:
    """One user joins without end, makes the end-to-end TLS and never shows a token of the cluster."""
    numbers = itertools.count()

    async def one() -> None:
        source = _source(next(numbers) % ADDRESSES)
        session = await attacker.place.establish(
            attacker.place.people[0], source=source, limits=_limits(), authenticate=False
        )
        attacker.told("joined")
        try:
            begun = time.monotonic()
            error = await session.wait_ended()
            attacker.told(f"{word(error)} after {_about(time.monotonic() - begun)}")
        finally:
            session.abort()

    await attacker.steadily(per_s, one, held=JOINS_HELD)


async def queries(attacker: Attacker) -> None:
    """One user: GETs whose query has more fields than a parser takes."""
    path = f"{LISTED}?" + "&".join(f"f{number}=1" for number in range(QUERY_FIELDS))
    while True:
        session = await attacker.session(attacker.person())
        due = time.monotonic()
        while session.usable:
            attacker.opens(session, TARGET, Answer(request(path), told=attacker.told))
            due = max(due + 1 / QUERIES_PER_S, time.monotonic() - 0.5)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
        await asyncio.sleep(AGAIN)


async def mix(attacker: Attacker) -> None:
    """A fifth of all is hostile: two users of ten do all that users can, strangers hold a fifth of the places."""
    async with asyncio.TaskGroup() as group:
        group.create_task(https(attacker, ADDRESSES * PER_ADDRESS // 5))
        for work in (stalled, targets, churn, queries, joins):
            group.create_task(work(attacker))


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack as the harness knows it."""

    run: Callable[[Attacker], Awaitable[None]]
    title: str
    enrols: bool = False
    """Whether honest agents enrol beside it."""


ATTACKS: dict[str, Attack] = {
    "https": Attack(https, f"{ADDRESSES * PER_ADDRESS} HTTPS connections of {ADDRESSES} addresses at the relay"),
    "stalled": Attack(stalled, f"{STALLED} answers of {LARGE} on one session that grants no credit"),
    "heads": Attack(heads, f"{HEADS} request heads of a megabyte on one session, none of which ends"),
    "bodies": Attack(bodies, "pods with one name of 65 KB and 16,450 capabilities"),
    "trickle": Attack(
        trickle, f"{TRICKLE_SESSIONS * TRICKLE_STREAMS} answers of {LARGE} on {TRICKLE_SESSIONS} sessions, read slowly"
    ),
    "targets": Attack(targets, f"OPENs of unknown targets, {TARGETS_PER_S} each second"),
    "churn": Attack(churn, f"OPEN, GET, FIN, {CHURN_PER_S} each second"),
    "joins": Attack(joins, f"{JOINS_PER_S} joins of one user each second, without a token of the cluster"),
    "queries": Attack(queries, f"GETs with {QUERY_FIELDS} query fields, {QUERIES_PER_S} each second"),
    "neighbours": Attack(
        neighbours, "failed joins, requests and enrolments from the address of the honest", enrols=True
    ),
    "local": Attack(local, f"{LOCAL_PER_S} connections each second at the local endpoint, without its certificate"),
    "handshakes": Attack(handshakes, f"{ADDRESSES * PER_ADDRESS} connections that never finish their handshake"),
    "mix": Attack(mix, "a fifth hostile: two users of ten do all of it at once, and 200 HTTPS connections"),
}


def _client_hello(context: ssl.SSLContext) -> bytes:
    """The ClientHello that this context would send."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise RemoteProtocolError("a handshake ended before it began")


def _about(seconds: float) -> str:
    """Seconds in few words, so that outcomes can be counted."""
    for most in (1, 2, 3, 5, 6, 8, 11, 16, 31, 61, 91):
        if seconds < most:
            return f"less than {most} s"
    return "91 s or more"
