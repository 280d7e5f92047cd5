"""A server of Go's net/http, which answers each request with what it parsed, and Go's parsers beside it.

The program is `tests/nethttp/server`; Go builds it from the standard library alone. Texts of a peer are bytes here.
"""

from __future__ import annotations

import json
import select
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trustme

from tests.support.cluster import net_http_server
from tests.support.stopping import Stopping

DEADLINE = 20.0
"""Seconds for the answer to a command, which takes a millisecond."""


@dataclass(frozen=True)
class GoRequest:
    """A request as Go's server read it."""

    method: bytes
    target: bytes
    proto: str
    host: bytes
    headers: dict[bytes, list[bytes]]
    """Lower-case name -> values in their order; Host is not among them, nor what frames the body."""
    trailers: dict[bytes, list[bytes]]
    length: int
    """-1: chunked."""
    body: bytes
    error: str
    """Why the body could not be read to its end; empty: it was."""
    connection: int
    """Number of the connection it came on."""


@dataclass(frozen=True)
class GoResponse:
    """An answer as Go's client read it."""

    status: int
    interim: list[int]
    headers: dict[bytes, list[bytes]]
    trailers: dict[bytes, list[bytes]]
    length: int
    """-1: chunked, or up to the connection's end."""
    close: bool
    body: bytes
    error: str
    """Why there is no answer, or why its body could not be read to its end."""


class NetHttp(Stopping):
    """The running program. Its certificate is for 127.0.0.1, by the CA in `ca_file`."""

    def __init__(self, directory: Path) -> None:
        """Start it; files go to `directory`. Raises `cluster.Unavailable` where it is not there and there is no Go."""
        program = net_http_server()
        ca = trustme.CA()
        self.ca_file = directory / "ca.pem"
        ca.cert_pem.write_to_path(str(self.ca_file))
        leaf = ca.issue_cert("localhost", "127.0.0.1")
        certificate, key = directory / "server.pem", directory / "server.key"
        leaf.cert_chain_pems[0].write_to_path(str(certificate))
        leaf.private_key_pem.write_to_path(str(key))
        self._process = subprocess.Popen(
            [program, "-certificate", certificate, "-key", key], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.port = int(self._line()["port"])

    def stop(self) -> None:
        """End the program."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def seen(self) -> list[GoRequest]:
        """The requests that came over the network since this was asked last."""
        return [_request(one) for one in self._ask(do="seen") or []]

    def requests(self, data: bytes) -> list[GoRequest]:
        """What the server reads from a connection on which `data` comes, and then the end."""
        return [_request(one) for one in self._ask(do="requests", text=data.decode("latin-1")) or []]

    def response(self, data: bytes, method: str) -> GoResponse:
        """What a client reads that sends a request with this method and gets `data`, and then the end."""
        return _response(self._ask(do="response", text=data.decode("latin-1"), method=method))

    def _ask(self, **command: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> Any:
        stdout = self._process.stdout
        assert stdout is not None
        if not select.select([stdout], [], [], DEADLINE)[0]:
            raise AssertionError(f"the Go server said nothing within {DEADLINE:g} s")
        line = stdout.readline()
        assert line, f"the Go server ended with {self._process.wait()}"
        return json.loads(line)


def _bytes(text: str) -> bytes:
    return text.encode("latin-1")


def _headers(told: dict[str, list[str]] | None) -> dict[bytes, list[bytes]]:
    found: dict[bytes, list[bytes]] = {}
    for name, values in (told or {}).items():
        found.setdefault(_bytes(name).lower(), []).extend(map(_bytes, values))
    return found


def _request(told: dict[str, Any]) -> GoRequest:
    return GoRequest(
        _bytes(told["method"]), _bytes(told["target"]), told["proto"], _bytes(told["host"]), _headers(told["headers"]),
        _headers(told["trailers"]), told["length"], _bytes(told["body"]), told["error"], told["connection"],
    )  # fmt: skip


def _response(told: dict[str, Any]) -> GoResponse:
    return GoResponse(
        told["status"], told["interim"] or [], _headers(told["headers"]), _headers(told["trailers"]), told["length"],
        told["close"], _bytes(told["body"]), told["error"],
    )  # fmt: skip
