"""An API server of pods and services in a few lines: lists, watches, and port-forwards to pods of the test."""

from __future__ import annotations

import asyncio
import json
import urllib.parse
from collections.abc import Callable
from typing import Any, cast

from tests.client.serving.pod_ports.test_workload import SERVICE, pod

SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"
    b"X-Stream-Protocol-Version: portforward.k8s.io\r\n\r\n"
)


class Api:
    """What is there; `protocol` is for `FarSide.protocol`."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {"services/web": {"metadata": {"name": "web"}, "spec": SERVICE}}
        """By resource and name."""
        self.requests: list[str] = []
        self.refusals: dict[str, tuple[int, str]] = {}
        """By the end of a path: status and message."""
        self.behaviour: dict[str, Callable[[Connection], None]] = {}
        """What pods do with a connection, by name; others greet with their name and echo."""
        self.connections: list[Connection] = []
        self.watches: list[tuple[str, dict[str, str], Connection]] = []
        self.events: list[tuple[str, str, dict[str, Any]]] = []
        """Kind, type and object; a version is how many there were."""
        self.lists = 0

    def protocol(self, target: str) -> asyncio.Protocol:
        assert target == "kubernetes"
        return Connection(self)

    def put(self, kind: str, document: dict[str, Any]) -> None:
        """Add or change an object, and tell the watches."""
        key = f"{kind}/{document['metadata']['name']}"
        self._tell(kind, "MODIFIED" if key in self.objects else "ADDED", document)
        self.objects[key] = document

    def remove(self, kind: str, name: str) -> None:
        self._tell(kind, "DELETED", self.objects.pop(f"{kind}/{name}"))

    def _tell(self, kind: str, event: str, document: dict[str, Any]) -> None:
        self.events.append((kind, event, document))
        for watch in self.watches:
            self._send(watch, kind, event, document)

    @staticmethod
    def _send(watch: tuple[str, dict[str, str], Connection], kind: str, event: str, document: dict[str, Any]) -> None:
        watched, query, connection = watch
        name = query.get("fieldSelector", "").partition("=")[2]
        if watched == kind and name in ("", document["metadata"]["name"]):
            connection.event({"type": event, "object": document})

    def watch(self, watch: tuple[str, dict[str, str], Connection]) -> None:
        for event in self.events[int(watch[1]["resourceVersion"]) :]:
            self._send(watch, *event)
        self.watches.append(watch)

    def end_watches(self) -> None:
        for _, _, connection in self.watches:
            connection.stream.write(b"0\r\n\r\n")
        self.watches.clear()


class Connection(asyncio.Protocol):
    """One stream: a request and its answer, or a port-forward."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._received = b""
        self.forwarding = False
        self.stream: Any = None
        self.pod = ""
        self.received = b""
        self.ended = False
        """Whether the program's end has come."""
        self.lost = False
        self.answers_pings = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.stream = cast(Any, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True

    def data_received(self, data: bytes) -> None:
        self._received += data
        while not self.forwarding and b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            self._answer(*head.split(b" ", 2)[:2])
        if self.forwarding:
            self._read_frames()

    def _answer(self, method: bytes, target: bytes) -> None:
        path, _, text = target.decode().partition("?")
        query = dict(urllib.parse.parse_qsl(text))
        self._api.requests.append(f"{method.decode()} {path}")
        for end, (status, message) in self._api.refusals.items():
            if path.endswith(end):
                self._reply(status, {"kind": "Status", "message": message}, close=method == b"POST")
                return
        if method == b"POST":
            self.pod = path.split("/")[-2]
            if f"pods/{self.pod}" not in self._api.objects:
                self._reply(404, {"message": f'pods "{self.pod}" not found'}, close=True)
                return
            self.forwarding = True
            self._api.connections.append(self)
            self.stream.write(SWITCH)
            return
        kind = path.rpartition("/")[2]
        if query.get("watch"):
            self.stream.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            self._api.watch((kind, query, self))
            return
        self._api.lists += 1
        name = query.get("fieldSelector", "").partition("=")[2]
        items = [one for key, one in self._api.objects.items() if key.startswith(f"{kind}/{name}")]
        at, size = int(query.get("continue", 0)), int(query["limit"])
        more = {"continue": str(at + size)} if len(items) > at + size else {}
        self._reply(
            200, {"metadata": {"resourceVersion": str(len(self._api.events)), **more}, "items": items[at : at + size]}
        )

    def _reply(self, status: int, document: Any, *, close: bool = False) -> None:
        body = json.dumps(document).encode()
        self.stream.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
        if close:
            self.stream.write_eof()

    def event(self, document: Any) -> None:
        line = json.dumps(document).encode() + b"\n"
        self.stream.write(b"%x\r\n%b\r\n" % (len(line), line))

    # -- a port-forward ---------------------------------------------------------------------------------------------

    def send(self, data: bytes, *, stream: int = 3, fin: bool = False) -> None:
        self.stream.write(stream.to_bytes(4, "big") + (fin << 24 | len(data)).to_bytes(4, "big") + data)

    def fail(self, text: bytes) -> None:
        """What a kubelet does that cannot go on."""
        self.send(text, stream=1, fin=True)
        self.send(b"", fin=True)

    def _read_frames(self) -> None:
        while len(self._received) >= 8:
            size = int.from_bytes(self._received[5:8], "big")
            if len(self._received) < 8 + size:
                return
            frame, self._received = self._received[: 8 + size], self._received[8 + size :]
            if frame[0] & 0x80:
                self._control(frame)
            elif int.from_bytes(frame[:4], "big") == 3:
                self.received += frame[8:]
                self.ended = self.ended or bool(frame[4] & 1)
                if self.pod not in self._api.behaviour:
                    self.send(frame[8:], fin=bool(frame[4] & 1))

    def _control(self, frame: bytes) -> None:
        kind = frame[3]
        if kind == 6 and self.answers_pings:
            self.stream.write(frame)
        if kind == 1 and frame[11] == 3:  # both streams are open
            self._api.behaviour.get(self.pod, lambda one: one.send(one.pod.encode() + b"\n"))(self)


def ready(name: str, **changes: Any) -> dict[str, Any]:
    """A pod that may serve, with a time of creation that goes by its name."""
    made = pod(name, **changes)
    made["metadata"]["creationTimestamp"] = f"2026-11-29T08:00:{name.rpartition('-')[2]:0>2}Z"
    return made
