"""Finished recordings go to a bucket: signatures as Amazon documents them, and moto's server as the store."""

from __future__ import annotations

import hashlib
import http.server
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import pytest

from arcbridge.agent.recording.bucket import Credentials, RecordingBucket, signed_headers
from arcbridge.agent.recording.sealed_file import ENDING
from arcbridge.agent.recording.spool import Spool
from arcbridge.settings.config import RecordingBucketConfig
from tests.support.eventually import until
from tests.support.processes import ManagedProcess, require_or_skip
from tests.support.world import fixed_port

from .keys import RECIPIENTS, published, text_of

MOTO = "moto[s3,server]>=5.1,<6"
SCRIPTS = "import sysconfig; print(sysconfig.get_path('scripts'))"
"""Prints where an environment has its programs."""


def test_the_signature_of_amazons_example() -> None:
    """PUT Object of "Signature Calculations for the Authorization Header" in the API reference of Amazon's store."""
    headers = {
        "host": "examplebucket.s3.amazonaws.com",
        "date": "Fri, 24 May 2013 00:00:00 GMT",
        "x-amz-storage-class": "REDUCED_REDUNDANCY",
        "x-amz-content-sha256": "44ce7dd67c959e0d3524ffac1771dfbba87d2b6b4b4e99e42034a8b803f8b072",
    }
    keys = Credentials("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "us-east-1")
    signed = signed_headers("PUT", "/test%24file.text", headers, keys, 1_369_353_600.0)
    assert signed["x-amz-date"] == "20130524T000000Z"
    assert signed["authorization"] == (
        "AWS4-HMAC-SHA256 Credential=AKIAIOSFODNN7EXAMPLE/20130524/us-east-1/s3/aws4_request, "
        "SignedHeaders=date;host;x-amz-content-sha256;x-amz-date;x-amz-storage-class, "
        "Signature=98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"
    )


INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n"
RAW = {
    "a chunk of negative size": b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nx",
    "interim answers without end": INTERIM,
    "no HTTP": b"\x00" * 100,
}


class Store(http.server.BaseHTTPRequestHandler):
    """A store that answers as its class says."""

    status = 200
    raw = b""
    """What it answers instead; ends with an interim answer: that one again and again."""
    refused = ""
    """What the names have that are answered with 403, whatever the status."""
    got: ClassVar[list[tuple[str, str, bytes]]]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).got.append((self.path, self.headers["Authorization"], body))
        if raw := type(self).raw:
            self.close_connection = True
            self.wfile.write(raw)
            with suppress(OSError):
                while raw.endswith(INTERIM):
                    self.wfile.write(raw)
                    time.sleep(0.01)  # between two of them
            return
        refused = type(self).refused
        self.send_response(403 if refused and refused in self.path else type(self).status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def store() -> Iterator[tuple[str, type[Store]]]:
    class Own(Store):
        got: ClassVar[list[tuple[str, str, bytes]]] = []

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", Own
    server.shutdown()
    server.server_close()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "recordings", 1 << 30, RECIPIENTS)


@contextmanager
def bucket_of(endpoint: str, spool: Spool) -> Iterator[RecordingBucket]:
    for name, text in (("access", "AKIA"), ("secret", "s3cret")):
        (spool.directory.parent / name).write_text(text + "\n")
    access, secret = spool.directory.parent / "access", spool.directory.parent / "secret"
    config = RecordingBucketConfig(endpoint, "recordings", "berlin/", access_key_file=access, secret_key_file=secret)
    made = RecordingBucket(config, spool)
    try:
        yield made
    finally:
        made.close()


def finished(spool: Spool, name: str) -> Path:
    file = spool.create(name)
    spool.used += file.append(name.encode())
    published(file)
    return spool.directory / (name + ENDING)


async def test_a_file_goes_to_the_bucket_and_leaves_the_directory(spool: Spool, store: tuple[str, type[Store]]) -> None:
    endpoint, got = store
    first = finished(spool, "first")
    data = first.read_bytes()
    with bucket_of(endpoint, spool) as bucket:  # it begins with what is there
        await until(lambda: not first.exists())
        running = spool.create("running")
        second = finished(spool, "second")
        bucket.look_soon()
        await until(lambda: not second.exists())
        assert bucket.sent == 2
        assert bucket.url(first.name) == f"s3://recordings/berlin/{first.name}"
    path, authorization, body = got.got[0]
    assert path == f"/recordings/berlin/{first.name}"
    assert "Credential=AKIA/" in authorization
    assert "s3cret" not in authorization
    assert hashlib.sha256(body).digest() == hashlib.sha256(data).digest()
    running.discard()


async def test_what_the_store_does_not_take_stays(
    spool: Spool, store: tuple[str, type[Store]], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, kept = store
    kept.status = 503
    monkeypatch.setattr("arcbridge.net.backoff.FIRST", 0.01)
    path = finished(spool, "first")
    with bucket_of(endpoint, spool) as bucket:
        await until(lambda: bucket.failures)
        assert path.exists()
        assert bucket.sent == 0
        kept.status = 200
        await until(lambda: not path.exists())


async def test_a_file_that_the_store_never_takes_holds_up_no_other(
    spool: Spool, store: tuple[str, type[Store]], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint, kept = store
    kept.refused = "a-bad"
    monkeypatch.setattr("arcbridge.net.backoff.FIRST", 0.01)
    bad = finished(spool, "a-bad")
    with bucket_of(endpoint, spool) as bucket:
        for name in ("b", "c"):
            path = finished(spool, name)
            await until(lambda path=path: not path.exists())
        assert bad.exists()
        assert bad.name in bucket._failing


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW)
async def test_j37_whatever_a_store_answers_it_is_asked_again(
    spool: Spool, store: tuple[str, type[Store]], raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/threats.md#J37: a size that is negative ended the thread, and interim answers held it."""
    monkeypatch.setattr("arcbridge.agent.recording.bucket.TIMEOUT", 0.3)
    store[1].raw = raw
    path = finished(spool, "one")
    with bucket_of(store[0], spool) as bucket:
        await until(lambda: bucket.failures > 0)
        store[1].raw = b""
        await until(lambda: bucket.sent == 1)
    assert not path.exists()


async def test_what_is_finished_at_the_end_is_sent_before_it(spool: Spool, store: tuple[str, type[Store]]) -> None:
    endpoint, kept = store
    with bucket_of(endpoint, spool) as bucket:
        await until(lambda: bucket._left == 0)
        paths = [finished(spool, f"{number}") for number in range(5)]
    assert not any(path.exists() for path in paths)
    assert len(kept.got) == 5


async def test_a_store_that_is_away_holds_nothing_up(spool: Spool) -> None:
    path = finished(spool, "first")
    with bucket_of(f"http://127.0.0.1:{fixed_port()}", spool) as bucket:
        await until(lambda: bucket.failures)
    assert path.exists()
    assert bucket._left == 1


@pytest.fixture
def moto(tmp_path: Path) -> Iterator[str]:
    """moto's server with a bucket; its endpoint."""
    # By uv in an environment of its own: botocore and the kubernetes client want two versions of one library.
    there = [str(Path(sys.executable).with_name("uv")), "--no-config", "tool", "run", "--from", MOTO]
    found = subprocess.run([*there, "python", "-c", SCRIPTS], capture_output=True, text=True, timeout=120)
    if found.returncode:
        require_or_skip("moto", f"uv cannot install moto's server: {found.stderr[-300:]}")
    program = Path(found.stdout.strip()) / "moto_server"
    port = fixed_port()
    endpoint = f"http://127.0.0.1:{port}"
    with ManagedProcess([str(program), "-p", str(port)], log_dir=tmp_path) as process:
        process.wait_for_url(f"{endpoint}/moto-api/", timeout=60)
        asked(endpoint, "PUT", "/recordings")
        yield endpoint


def asked(endpoint: str, method: str, path: str) -> bytes:
    """What a store answers to a signed request without a body."""
    empty = hashlib.sha256(b"").hexdigest()
    headers = {"host": endpoint.removeprefix("http://"), "x-amz-content-sha256": empty}
    signed = signed_headers(method, path, headers, Credentials("AKIA", "s3cret", "us-east-1"), time.time())
    with urllib.request.urlopen(urllib.request.Request(endpoint + path, method=method, headers=signed)) as answer:
        return bytes(answer.read())


async def test_motos_server_has_what_was_recorded(spool: Spool, moto: str) -> None:
    path = finished(spool, "first")
    with bucket_of(moto, spool):
        await until(lambda: not path.exists())
    path.write_bytes(asked(moto, "GET", f"/recordings/berlin/{path.name}"))
    assert text_of(path) == b"first"
