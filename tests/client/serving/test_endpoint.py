"""The local endpoint: who gets a stream, what the others are told, and that a cut never looks like an end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.kubeconfig.entries import Entry, render
from arcbridge.client.serving.endpoint import MAX_UNPROVEN, LocalEndpoint, UnprovenConnections, server_context
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.client.state import LocalCertificates, StateDirectory
from arcbridge.errors import Unauthenticated
from arcbridge.net.join import JoinCode
from arcbridge.net.loopback import listen_local
from arcbridge.pki.authority import Authority
from arcbridge.wire.frames import ResetCode
from arcbridge.wire.records import JoinReply
from tests.client.far_side import CLUSTER, Echo, FarSide
from tests.client.session.test_session_manager import make, running
from tests.support.descriptors import held as descriptors
from tests.support.descriptors import none_left, pauses_of
from tests.support.eventually import until
from tests.support.processes import require_or_skip

KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
RELAY = "https://relay.example.org:443"
REQUEST = b"GET /api HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


class Place:
    """An endpoint, its session, its far side, and what a kubeconfig would know."""

    def __init__(self, far: FarSide, session: SessionManager, state: StateDirectory) -> None:
        self.far = far
        self.session = session
        self.state = state
        self.certificates: LocalCertificates = state.certificates(CLUSTER, RELAY, time.time())
        self.endpoint = LocalEndpoint(CLUSTER, session, self.certificates, listen_local(0))

    def context(self, certificate: tuple[str, str] | None = None, *, none: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.certificates.ca_pem)
        if not none:
            pem, key = certificate or (self.certificates.client_certificate_pem, self.certificates.client_key_pem)
            file = self.state.path / "test-client.pem"
            file.write_text(pem + key)
            context.load_cert_chain(file)
        return context

    async def connect(self, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.endpoint.port, ssl=self.context(**options))

    async def echoing(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection through which a byte has gone to the cluster and back."""
        reader, writer = await self.connect()
        await echo(reader, writer)
        return reader, writer


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"x")
    async with asyncio.timeout(20):
        assert await reader.readexactly(1) == b"x"


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with FarSide() as far, running(make(far, tmp_path)) as session:
        place = Place(far, session, StateDirectory(tmp_path / "state", tmp_path / "cache"))
        await place.endpoint.start()
        yield place
        await place.endpoint.close()


async def ask(place: Place, request: bytes = REQUEST, **options: Any) -> tuple[int, dict[str, str], Any]:
    """Send a request and read the whole answer until the end of the connection."""
    reader, writer = await place.connect(**options)
    writer.write(request)
    async with asyncio.timeout(10):
        data = await reader.read()
    writer.close()
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, json.loads(body) if body else None


def write_kubeconfig(place: Place, directory: Path, port: int = 0, token: str = "") -> Path:
    kubeconfig, known = directory / "kubeconfig", place.certificates
    url = f"https://127.0.0.1:{port or place.endpoint.port}"
    entry = Entry(CLUSTER, CLUSTER, url, known.ca_pem, known.client_certificate_pem, known.client_key_pem, token=token)
    kubeconfig.write_text(render(entry))
    return kubeconfig


async def kubectl(kubeconfig: Path, home: Path) -> subprocess.CompletedProcess[str]:
    command = [str(KUBECTL), f"--kubeconfig={kubeconfig}", f"--cache-dir={home}", "get", "--raw", "/api"]
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=30, env={"HOME": str(home)}, check=False
    )


async def _end_of(reader: asyncio.StreamReader) -> str:
    """Read to the end: `end` in order, or `cut`."""
    try:
        async with asyncio.timeout(10):
            while await reader.read(65536):
                pass
    except (ConnectionError, ssl.SSLError):
        return "cut"
    return "end"


class TestTheGoodWay:
    async def test_bytes_pass_unchanged(self, place: Place) -> None:
        reader, writer = await place.connect()
        blob = os.urandom(300_000)
        writer.write(blob)
        async with asyncio.timeout(20):
            assert await reader.readexactly(len(blob)) == blob
        assert place.far.targets == ["kubernetes"]
        writer.close()

    async def test_out_of_descriptors_waits_says_so_once_and_recovers(
        self, place: Place, capsys: pytest.CaptureFixture[str]
    ) -> None:
        reader, writer = await place.echoing()
        with socket.socket() as waiting:
            waiting.setblocking(False)
            pauses = pauses_of(place.endpoint._accepting)
            with none_left():
                waiting.connect_ex(("127.0.0.1", place.endpoint.port))
                begin = time.process_time()
                async with asyncio.timeout(20):
                    while len(pauses) < 2:  # the second try found none either
                        await asyncio.sleep(0.01)
                assert time.process_time() - begin < 0.2, "it waits instead of asking at once"
            told = "".join(capsys.readouterr())
            assert told.count("cannot accept") == 1
            assert "no file descriptor left" in told
            await echo(reader, writer)
            _, second = await place.echoing()
            for way in (writer, second):
                way.close()

    async def test_alpn_is_http_1_1_or_nothing(self, place: Place) -> None:
        for offered, chosen in ((["h2", "http/1.1"], "http/1.1"), (["h2"], None), ([], None)):
            context = place.context()
            if offered:
                context.set_alpn_protocols(offered)
            reader, writer = await asyncio.open_connection("127.0.0.1", place.endpoint.port, ssl=context)
            assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == chosen
            await echo(reader, writer)
            writer.close()

    async def test_no_stream_before_the_first_byte(self, place: Place) -> None:
        await place.session.ready()
        _, silent = await place.connect()
        _, writer = await place.echoing()
        assert len(place.far.targets) == 1
        silent.close()
        writer.close()

    async def test_a_connection_waits_for_the_session(self, place: Place) -> None:
        # Nothing was established before: the first bytes of several connections share one attempt.
        for _, writer in await asyncio.gather(*(place.echoing() for _ in range(5))):
            writer.close()
        assert len(place.far.requests) == 1

    async def test_ipv6_loopback(self, place: Place) -> None:
        try:
            reader, writer = await asyncio.open_connection("::1", place.endpoint.port, ssl=place.context())
        except OSError:
            pytest.skip("no IPv6 loopback")
        await echo(reader, writer)
        writer.close()


class TestStrangers:
    async def test_no_certificate_is_told_so(self, place: Place) -> None:
        status, headers, body = await ask(place, none=True)
        assert (status, body["kind"], body["reason"], body["code"]) == (401, "Status", "Unauthorized", 401)
        assert body["message"].startswith("arcbridge: this endpoint is for the user whose kubeconfig")
        assert "retry-after" not in headers
        assert place.far.targets == []
        assert place.endpoint.stats.strangers == 1

    async def test_the_certificate_of_another_cluster(self, place: Place) -> None:
        other = place.state.certificates("other", RELAY, time.time())
        status, _, body = await ask(place, certificate=(other.client_certificate_pem, other.client_key_pem))
        assert status == 401
        assert "of another" in body["message"]
        assert place.far.targets == []

    async def test_b44_the_certificate_of_another_organisations_cluster_of_this_name(self, place: Place) -> None:
        """A user may put both on one port, one after the other."""
        other = place.state.certificates(CLUSTER, "https://relay.example.net:443", time.time())
        status, _, body = await ask(place, certificate=(other.client_certificate_pem, other.client_key_pem))
        assert status == 401
        assert "or of another relay's; run arcbridge again" in body["message"]
        # Nor one that names no relay, as earlier versions made them.
        authority = Authority.load_or_create(place.state.path / "local-ca", "", clock=time.time)
        former = authority.issue_client(CLUSTER)
        assert (await ask(place, certificate=(former.certificate_pem, former.key_pem)))[0] == 401
        assert place.far.targets == []

    async def test_a_foreign_certificate_fails_in_tls(self, place: Place, tmp_path: Path) -> None:
        foreign = StateDirectory(tmp_path / "foreign", tmp_path).certificates(CLUSTER, RELAY, time.time())
        with pytest.raises((ssl.SSLError, ConnectionError, json.JSONDecodeError, ValueError, IndexError)):
            await ask(place, certificate=(foreign.client_certificate_pem, foreign.client_key_pem))
        assert place.far.targets == []


FLOOD = """
import socket, ssl, sys
port, quick = int(sys.argv[1]), ssl.create_default_context()
quick.check_hostname, quick.verify_mode = False, ssl.CERT_NONE
held = []
for number in range(10_000_000):  # it is ended by the test, or by the endpoint that closes
    sock = socket.create_connection(("127.0.0.1", port), timeout=10)
    try:
        if number % 50 == 0:
            sock = quick.wrap_socket(sock)
            if number % 100 == 0:
                sock.sendall(b"POST /x HTTP/1.1\\r\\nContent-Length: 1000000000\\r\\n\\r\\n" + b"x" * 60_000)
        elif number % 3 == 0:
            sock.sendall(bytes.fromhex("160301010001000100"))  # the beginning of a ClientHello
        elif number % 7 == 0:
            sock.sendall(b"x" * 200)
    except OSError:  # displaced by a later one
        continue
    held.append(sock)
    if len(held) > 400:
        held.pop(0).close()
    if number == 2_000:  # more than it and the endpoint hold
        print("flooding", flush=True)
"""


class TestFloods:
    """docs/threats.md#W1: other processes of the machine connect, and never show a certificate."""

    async def test_the_newest_takes_the_place_of_the_oldest(self, place: Place) -> None:
        place.endpoint.unproven = UnprovenConnections(8)
        address = ("127.0.0.1", place.endpoint.port)
        reader, stranger = await place.connect(none=True)
        silent = [await asyncio.open_connection(*address) for _ in range(20)]
        await until(lambda: place.endpoint.stats.displaced >= 13)
        assert len(place.endpoint.unproven) == 8
        for end in (reader, *(end for end, _ in silent[:12])):  # a caller without the certificate before any handshake
            assert await _end_of(end) in ("end", "cut")
        assert not any(end.at_eof() for end, _ in silent[12:])

        # One that shows it takes no place, however long it stays.
        proven = [await place.connect() for _ in range(20)]
        await until(lambda: place.endpoint.stats.open >= 20)
        for end, way in proven:
            await echo(end, way)
        for _, way in (*silent, *proven, (reader, stranger)):
            way.close()
        await until(lambda: not len(place.endpoint.unproven))

    async def test_a_failed_handshake_gives_its_place_back(self, place: Place) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", place.endpoint.port)
        async with asyncio.timeout(10):
            await until(lambda: len(place.endpoint.unproven))
            writer.write(b"GET / HTTP/1.1\r\n\r\n")
            await until(lambda: not len(place.endpoint.unproven))
        assert place.endpoint.connections == set()
        writer.close()

    async def test_what_is_in_its_handshake_is_closed_with_the_endpoint(self, place: Place) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", place.endpoint.port)
        await until(lambda: len(place.endpoint.unproven))
        await place.endpoint.close()
        assert await _end_of(reader) in ("end", "cut")
        writer.close()

    async def test_kubectl_works_while_another_process_floods(self, place: Place, tmp_path: Path) -> None:
        if KUBECTL is None:
            require_or_skip("kubectl", "no kubectl")

        class Api(Echo):
            def data_received(self, data: bytes) -> None:
                self.stream.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}")

        place.far.protocol = lambda target: Api()
        await place.session.ready()
        kubeconfig = write_kubeconfig(place, tmp_path)
        before = descriptors()
        flood = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FLOOD, str(place.endpoint.port), stdout=asyncio.subprocess.PIPE
        )
        try:
            assert flood.stdout is not None
            assert await asyncio.wait_for(flood.stdout.readline(), 60) == b"flooding\n"
            held, done = 0, []
            for _ in range(5):
                done.append(await kubectl(kubeconfig, tmp_path))
                held = max(held, len(place.endpoint.unproven))
            assert [(one.returncode, one.stdout) for one in done] == [(0, "{}")] * 5, done[-1].stderr
            assert 0 < held <= MAX_UNPROVEN
            assert flood.returncode is None, "it went on all the time"
        finally:
            flood.kill()
            await flood.wait()
        # uvloop opens /dev/null once for a process.
        await until(lambda: {kind for _, kind in descriptors() - before} <= {"/dev/null"})


class TestRefusals:
    @pytest.mark.parametrize(
        ("code", "status", "words", "retry"),
        [
            (
                JoinCode.NO_AGENT,
                503,
                'arcbridge: cluster "prod" has no connected agent; check that its agent runs and reaches the relay',
                None,
            ),
            (JoinCode.DRAINING, 503, "arcbridge: the relay is about to restart", "1"),
            (JoinCode.UNAUTHENTICATED, 401, "arcbridge: the relay does not accept the access token", None),
            (JoinCode.FORBIDDEN, 403, 'arcbridge: cluster "prod" does not exist or you may not reach it', None),
        ],
    )
    async def test_one_status(self, place: Place, code: JoinCode, status: int, words: str, retry: str | None) -> None:
        place.far.reply = JoinReply(code=code)
        got, headers, body = await ask(place)
        assert (got, body["code"], body["status"]) == (status, status, "Failure")
        assert body["message"].startswith(words)
        assert headers.get("retry-after") == retry
        assert headers["content-type"] == "application/json"

    async def test_a_body_does_not_drown_the_answer(self, place: Place) -> None:
        place.far.reply = JoinReply(code=JoinCode.NO_AGENT)
        post = b"POST /api HTTP/1.1\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200_000
        status, _, _ = await ask(place, post)
        assert status == 503

    async def test_an_endless_head_is_cut(self, place: Place) -> None:
        place.far.reply = JoinReply(code=JoinCode.NO_AGENT)
        reader, writer = await place.connect()
        writer.write(b"GET / HTTP/1.1\r\nX: " + b"x" * 200_000)
        assert await _end_of(reader) == "cut"
        writer.close()

    @pytest.mark.parametrize(
        ("code", "status"),
        [
            (ResetCode.REFUSED, 503),
            (ResetCode.CONNECT_FAILED, 503),
            (ResetCode.FORBIDDEN, 403),
            (ResetCode.EXPIRED, 401),
            (ResetCode.LIMIT, 429),
        ],
    )
    async def test_a_stream_that_never_ran(self, place: Place, code: ResetCode, status: int) -> None:
        place.far.protocol = lambda target: code
        got, headers, body = await ask(place)
        assert (got, body["code"]) == (status, status)
        assert headers.get("retry-after") == ("1" if status == 503 else None)


class TestCuts:
    async def test_a_cut_stream_is_a_reset(self, place: Place) -> None:
        class Half(Echo):
            def data_received(self, data: bytes) -> None:
                self.stream.write(b"HTTP/1.1 200 OK\r\n")
                asyncio.get_running_loop().call_later(0.05, self.stream.abort, ResetCode.TRUNCATED)

        place.far.protocol = lambda target: Half()
        reader, writer = await place.connect()
        writer.write(REQUEST)
        assert await _end_of(reader) == "cut"
        writer.close()

    async def test_an_end_in_order_is_an_end(self, place: Place) -> None:
        class Whole(Echo):
            def data_received(self, data: bytes) -> None:
                self.stream.write(b"whole")
                self.stream.close()

        place.far.protocol = lambda target: Whole()
        reader, writer = await place.connect()
        writer.write(REQUEST)
        assert await reader.read() == b"whole"
        writer.close()

    async def test_a_killed_caller_resets_the_stream(self, place: Place) -> None:
        ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

        class Watch(Echo):
            def connection_lost(self, exc: Exception | None) -> None:
                ended.set_result(exc)

        place.far.protocol = lambda target: Watch()
        _, writer = await place.echoing()
        writer.transport.abort()
        assert await asyncio.wait_for(ended, 10) is not None

    async def test_nothing_is_left(self, place: Place) -> None:
        reader, writer = await place.echoing()
        await place.endpoint.close()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert await reader.read() == b""
        writer.close()
        endpoint = place.endpoint
        await until(lambda: not (endpoint.stats.open or endpoint.splices or endpoint.connections))


class TestKubectl:
    async def test_its_words(self, place: Place, tmp_path: Path) -> None:
        """A real kubectl shows the sentence of each Status, and asks once."""
        if KUBECTL is None:
            require_or_skip("kubectl", "no kubectl")
        kubeconfig = write_kubeconfig(place, tmp_path)
        place.far.reply = JoinReply(code=JoinCode.NO_AGENT)
        text = await self._kubectl(kubeconfig, tmp_path)
        assert 'Error from server (ServiceUnavailable): arcbridge: cluster "prod" has no connected agent' in text
        assert place.endpoint.stats.refused == 1, "it has not tried again"
        place.far.reply = JoinReply(code=JoinCode.UNAUTHENTICATED)
        await until(lambda: isinstance(place.session.failure, Unauthenticated))  # it tries again by itself
        text = await self._kubectl(kubeconfig, tmp_path)
        assert "You must be logged in to the server (arcbridge: the relay does not accept" in text
        assert place.endpoint.stats.refused == 2

    async def test_w2_another_program_at_its_port_gets_nothing(self, place: Place, tmp_path: Path) -> None:
        if KUBECTL is None:
            require_or_skip("kubectl", "no kubectl")
        got: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            got.append(await reader.read(65536))

        foreign = StateDirectory(tmp_path / "foreign", tmp_path).certificates(CLUSTER, RELAY, time.time())
        async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_context(foreign)) as squatter:
            kubeconfig = write_kubeconfig(place, tmp_path, squatter.sockets[0].getsockname()[1], token="bearer")
            assert "certificate signed by unknown authority" in await self._kubectl(kubeconfig, tmp_path)
        assert got == []

    async def _kubectl(self, kubeconfig: Path, home: Path) -> str:
        done = await kubectl(kubeconfig, home)
        assert done.returncode == 1
        return done.stderr
