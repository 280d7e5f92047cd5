"""Carries finished recordings to a bucket of an object store, and removes each once the store has it.

Source: the REST API of Amazon's object store (PutObject, AWS Signature Version 4), in paths that begin with the bucket.
It runs in a thread of its own, one file at a time, and begins with those that a former process left. A store that is
away holds up nothing but the files, for which the directory has a bound; a file that was not taken comes behind the
others. Invariant: a file is removed only after the store has answered 200 to all of its bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlsplit

import structlog

from arcbridge.agent.recording.sealed_file import sha256_of
from arcbridge.audit.sinks.collector import http_address, token_of
from arcbridge.errors import ArcbridgeError
from arcbridge.net.backoff import Backoff
from arcbridge.net.system_trust import read_cas, trusting_context

if TYPE_CHECKING:
    from arcbridge.agent.recording.spool import Spool
    from arcbridge.observe.metrics import Metrics
    from arcbridge.settings.config import RecordingBucketConfig

TIMEOUT: Final = 30.0
"""Seconds for each step of a request: the connection, a portion, the answer's status and headers together."""
LOOK: Final = 60.0
"""Seconds between two looks for files, where nothing says that there are some."""
CLOSING: Final = 5.0
"""Seconds for the files that are there when the agent stops; the rest is carried on by the next process, where it has
the same directory."""

log = structlog.get_logger("arcbridge.recording")


class StoreFailed(ArcbridgeError):
    """The store has not taken a file; it is sent again."""


class RecordingBucket:
    """The bucket of one agent; its thread runs from the beginning to `close`."""

    def __init__(self, config: RecordingBucketConfig, spool: Spool) -> None:
        """Raises ConfigError, StateError."""
        self._config = config
        self._spool = spool
        self._where, secure = http_address(config.endpoint)
        cas = read_cas(config.ca_file, "recording.bucket.ca_file") if config.ca_file is not None else None
        self._tls = trusting_context(cas) if secure else None
        self._path = urlsplit(config.endpoint).path.rstrip("/")
        self._wake = threading.Event()
        self._closing = threading.Event()
        self.sent = 0
        self.failures = 0
        self._failing = ""
        """Why the last file was not taken."""
        self._file = ""
        """Name of the file that is under way."""
        self._refused: dict[str, int] = {}
        """Failures of each file that is there, by its name."""
        self._left = 0
        """Files that were there at the last look and are not stored."""
        self._thread = threading.Thread(target=self._run, name="recordings-bucket", daemon=True)
        self._thread.start()

    def register(self, metrics: Metrics) -> None:
        """Tell `metrics` where to read."""
        metrics.counter("recordings_stored_total", "Recordings that the bucket has.", None, lambda: self.sent)
        metrics.counter("recordings_store_failures_total", "Times that the bucket did not take a recording.", None,
                        lambda: self.failures)  # fmt: skip

    def url(self, name: str) -> str:
        """Return where the file of this name is, or will be."""
        return f"s3://{self._config.bucket}/{self._config.prefix}{name}"

    def look_soon(self) -> None:
        """There is a file."""
        self._wake.set()

    def close(self) -> None:
        """End the thread, behind the files that are there if that is soon."""
        self._closing.set()
        self._wake.set()
        self._thread.join(CLOSING)
        if self._left:
            log.warning("recordings not stored before the end", files=self._left)

    # -- in the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        backoff = Backoff()
        while True:
            self._wake.clear()
            closing = self._closing.is_set()
            try:
                self._carry_all()
                backoff.reset()
                delay = LOOK
                if self._failing:
                    self._failing = ""
                    log.info("recordings are stored again")
            except Exception as error:  # whatever a store answers, the thread goes on (docs/threats.md#J37)
                self._note_failure(error)
                delay = backoff.next_delay()
            if closing:  # so this look was behind the last file
                return
            self._wait(delay)

    def _carry_all(self) -> None:
        """Send the files that are there; those that the store has not taken before come last, so that they hold up no
        other. Raises OSError, HTTPException, ArcbridgeError."""
        paths = self._spool.finished()
        self._left = len(paths)
        self._refused = {path.name: self._refused.get(path.name, 0) for path in paths}
        for path in sorted(paths, key=lambda path: self._refused[path.name]):
            self._refused[path.name] += 1
            self._file = path.name
            self._carry(path)
            self._left -= 1
        self._file = ""

    def _wait(self, seconds: float) -> None:
        """Wait for a file, or after a failure for the time alone."""
        if not self._failing:
            self._wake.wait(seconds)
            return
        end = time.monotonic() + seconds
        while not self._closing.is_set() and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))

    def _carry(self, path: Path) -> None:
        """Send one file and remove it. Raises OSError, HTTPException, ArcbridgeError."""
        try:
            digest, size = sha256_of(path)
        except FileNotFoundError:  # another agent of the same directory was faster
            return
        target = f"{self._path}/{quote(self._config.bucket)}/{quote(self._config.prefix + path.name)}"
        headers = {
            "host": str(self._where) if self._where.port not in (80, 443) else self._where.host,
            "content-length": str(size),
            "x-amz-content-sha256": digest,
        }
        config = self._config
        assert config.access_key_file is not None  # `agent.settings` has looked for both
        assert config.secret_key_file is not None
        access = token_of(config.access_key_file, "recording.bucket.access_key_file")
        secret = token_of(config.secret_key_file, "recording.bucket.secret_key_file")
        signed = signed_headers("PUT", target, headers, Credentials(access, secret, config.region), time.time())
        connection = self._connection()
        try:
            with path.open("rb") as file:
                connection.request("PUT", target, body=file, headers=signed)
            # `http.client` waits as long for each line, and reads interim answers without end.
            expiry = threading.Timer(TIMEOUT, _break, (connection.sock,))
            expiry.start()
            try:
                answer = connection.getresponse()
            finally:
                expiry.cancel()
                expiry.join()  # else it might break whatever has the descriptor's number by then
        finally:
            connection.close()
        if answer.status != 200:
            raise StoreFailed(f"{self._where}: the store answered {answer.status}")
        self._spool.remove(path, size)
        self.sent += 1

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._where.host, self._where.port
        if self._tls is None:
            return http.client.HTTPConnection(host, port, timeout=TIMEOUT)
        return http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=self._tls)

    def _note_failure(self, error: Exception) -> None:
        self.failures += 1
        words = error.message if isinstance(error, ArcbridgeError) else type(error).__name__
        if isinstance(error, ssl.SSLCertVerificationError):
            words = f"the store's certificate is not good: {error.verify_message}"
        elif isinstance(error, OSError) and error.strerror:
            words = error.strerror
        if f"{self._file}: {words}" != self._failing:
            self._failing = f"{self._file}: {words}"
            log.warning("recording not stored", file=self._file, reason=words)


def _break(sock: socket.socket) -> None:
    """End a connection under the thread that reads it."""
    with suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not TLS's own, which takes it away from the reader


class Credentials:
    """An access key, its secret, and the region that signatures are for."""

    __slots__ = ("access", "region", "secret")

    def __init__(self, access: str, secret: str, region: str) -> None:
        self.access, self.secret, self.region = access, secret, region


def signed_headers(
    method: str, target: str, headers: Mapping[str, str], credentials: Credentials, now: float
) -> dict[str, str]:
    """Return the headers (names in small letters) with the time and the signature.

    `target`: the path, escaped, without a query. `headers` have `host` and `x-amz-content-sha256`. `now`: Unix seconds.
    """
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    scope = f"{stamp[:8]}/{credentials.region}/s3/aws4_request"
    all_headers = {**headers, "x-amz-date": stamp}
    names = sorted(all_headers)
    lines = "".join([f"{name}:{all_headers[name].strip()}\n" for name in names])
    canonical = "\n".join([method, target, "", lines, ";".join(names), headers["x-amz-content-sha256"]])
    to_sign = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = b"AWS4" + credentials.secret.encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    return {
        **all_headers,
        "authorization": f"AWS4-HMAC-SHA256 Credential={credentials.access}/{scope}, "
        f"SignedHeaders={';'.join(names)}, Signature={signature}",
    }
