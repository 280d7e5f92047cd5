"""Reads the ports of a port-forward from the stream behind its upgrade: kubectl names them there and nowhere else.

It looks at the caller's bytes after they have gone on: at the headers of SPDY streams
(draft-mbelshe-httpbis-spdy-00), as they are, or within the WebSocket frames of kubectl's tunnel (RFC 6455, Kubernetes'
KEP-4006). Payload is counted and not looked at. At anything that it does not understand it gives up, and says why
(`unread`). Invariants: no byte is delayed or changed, nothing is raised, at most one block of headers is kept, and the
work is bounded by the bytes that passed, whatever they inflate to.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable

from arcbridge.agent.audit import AuditRecord
from arcbridge.agent.audit.record import Value
from arcbridge.agent.kube.upgrade import chosen_protocol
from arcbridge.net.spdy_dictionary import DICTIONARY

TUNNEL = b"SPDY/3.1+portforward.k8s.io"
"""The WebSocket subprotocol of kubectl since 1.31."""
MAX_PORTS = 64
"""Different ports that are recorded of one stream."""
MAX_BLOCK = 16 * 1024
"""Bytes of one block of headers, compressed and not; kubectl's have about 80."""
MAX_FRAMES = 65536
"""Frames that are looked at, and one more for each FRAME_BYTES that pass: a microsecond each, about."""
FRAME_BYTES = 256
MAX_HEADERS = 16
"""Headers of one stream, and ports that it names; kubectl has three and one."""
INFLATED = 64 * 1024, 4
"""Bytes that all blocks of headers become: as many, and so many for each byte that passes. kubectl's become twice as
many as they were; 50 bytes can become 16 KiB (docs/threats.md#A28)."""

INTERVAL = 1.0
"""Seconds between two records of one stream's ports, which each have all of them."""

_SYN_STREAM, _SYN_REPLY, _HEADERS = 1, 2, 8
_BEFORE_BLOCK = {_SYN_STREAM: 10, _SYN_REPLY: 4, _HEADERS: 4}
"""Bytes before the block of headers in the frames that have one; all of them share one compression."""
_CONTINUATION, _BINARY, _FIRST_CONTROL = 0, 2, 8


class _Unreadable(Exception):
    """The stream has something that is not understood; the message says what."""


class ForwardedPorts:
    """The ports of one stream; `feed` takes the caller's bytes behind the 101."""

    def __init__(self, websocket: bool, found: Callable[[], None]) -> None:
        """`found` is called whenever there is a new port."""
        self.ports: list[str] = []
        """In the order in which they were asked for, each once."""
        self.unread = ""
        """Why no more is read; empty while all is understood."""
        self._found = found
        self._websocket = websocket
        self._bytes = self._frames = self._inflated = 0
        self._outer = bytearray()
        """The head of a WebSocket frame, as far as it has come."""
        self._payload = self._masked = self._control = 0
        """Bytes of the WebSocket frame that are still to come, that have come, and whether it is a control frame."""
        self._mask = bytes(4)
        self._kept = bytearray()
        """The head of a SPDY frame, or all of one with headers, as far as it has come."""
        self._wanted = 8
        """Bytes of it that are wanted."""
        self._skip = 0
        """Bytes of a SPDY frame that are passed over."""
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)

    def feed(self, view: memoryview) -> None:
        """Look at bytes that have gone on."""
        if self.unread:
            return
        self._bytes += len(view)
        try:
            if self._websocket:
                self._read_websocket(view)
            else:
                self._read_spdy(view, bytes(4), 0)
        except _Unreadable as error:
            self.unread = str(error)
        except Exception as error:  # a defect here must not end what the user does
            self.unread = f"the reader failed ({type(error).__name__})"
        if self.unread:
            self._outer, self._kept = bytearray(), bytearray()

    # -- WebSocket ------------------------------------------------------------------------------------------------

    def _read_websocket(self, view: memoryview) -> None:
        position = 0
        while position < len(view):
            if self._payload:
                part = view[position : position + self._payload]
                if not self._control:
                    self._read_spdy(part, self._mask, self._masked)
                self._masked += len(part)
                self._payload -= len(part)
                position += len(part)
                continue
            self._outer.append(view[position])
            position += 1
            if len(self._outer) >= 6 and len(self._outer) == _head_size(self._outer[1]):
                self._begin_frame()

    def _begin_frame(self) -> None:
        self._count_frame()
        head = bytes(self._outer)
        self._outer.clear()
        opcode = head[0] & 0x0F
        if head[0] & 0x70 or not head[1] & 0x80 or (opcode not in (_CONTINUATION, _BINARY) and opcode < _FIRST_CONTROL):
            raise _Unreadable("a WebSocket frame is not understood")
        self._payload = int.from_bytes(head[2:-4], "big") if len(head) > 6 else head[1] & 0x7F
        self._masked, self._control, self._mask = 0, opcode >= _FIRST_CONTROL, head[-4:]

    # -- SPDY -----------------------------------------------------------------------------------------------------

    def _read_spdy(self, view: memoryview, mask: bytes, offset: int) -> None:
        """Look at bytes of the SPDY session, the first of which is masked by byte `offset` of the mask."""
        position = 0
        while position < len(view):
            if self._skip:
                passed = min(self._skip, len(view) - position)
                self._skip -= passed
                position += passed
                continue
            part = view[position : position + self._wanted - len(self._kept)]
            self._kept += unmasked(part, mask, offset + position)
            position += len(part)
            if len(self._kept) == self._wanted:
                self._take(bytes(self._kept))

    def _take(self, frame: bytes) -> None:
        """Take the head of a frame, or a whole frame with headers."""
        kind = int.from_bytes(frame[2:4], "big")
        if len(frame) > 8:
            self._read_headers(kind, frame[8 + _BEFORE_BLOCK[kind] :])
        else:
            self._count_frame()
            length = int.from_bytes(frame[5:8], "big")
            control = frame[0] & 0x80
            if control and frame[:2] != b"\x80\x03":
                raise _Unreadable("a frame of another version of SPDY")
            if control and kind in _BEFORE_BLOCK:
                if not _BEFORE_BLOCK[kind] < length <= MAX_BLOCK:
                    raise _Unreadable("a block of headers is empty or too long")
                self._wanted = 8 + length
                return
            self._skip = length
        self._kept.clear()
        self._wanted = 8

    def _read_headers(self, kind: int, block: bytes) -> None:
        try:
            data = self._inflate.decompress(block, MAX_BLOCK)
        except zlib.error:
            raise _Unreadable("a block of headers is not compressed as it should be") from None
        if self._inflate.unconsumed_tail or self._inflate.eof:
            raise _Unreadable("a block of headers is too long, or the last one")
        self._inflated += len(data)
        if self._inflated > INFLATED[0] + INFLATED[1] * self._bytes:
            raise _Unreadable("the headers are much longer than what was sent of them")
        if kind != _SYN_STREAM:  # read for the sake of the compression alone
            return
        asked = [value for name, value in _pairs(data) if name.lower() == b"port"]
        if sum(value.count(b"\0") + 1 for value in asked) > MAX_HEADERS:
            raise _Unreadable(f"a stream names more than {MAX_HEADERS}")
        for port in dict.fromkeys(raw[:32].decode("latin-1") for value in asked for raw in value.split(b"\0")):
            if port in self.ports:
                continue
            if len(self.ports) >= MAX_PORTS:
                raise _Unreadable(f"there are more than {MAX_PORTS}")
            self.ports.append(port)
            self._found()

    def _count_frame(self) -> None:
        self._frames += 1
        if self._frames > MAX_FRAMES + self._bytes // FRAME_BYTES:
            raise _Unreadable("there are too many small frames")


class PortRecords:
    """Records which ports a stream has asked for: the first at once, and further ones each INTERVAL, while its user may
    write. The record of the stream's end has them all in any case."""

    def __init__(self, record: AuditRecord, websocket: bool, changed: Callable[[dict[str, Value]], None]) -> None:
        self.ports = ForwardedPorts(websocket, self._found)
        self._record = record
        self._changed = changed
        self._timer: asyncio.TimerHandle | None = None
        self._unrecorded = False

    def close(self) -> None:
        """Write no more records, and put the ports into the record, which is about to be written."""
        if self._timer is not None:
            self._timer.cancel()
        self._record.has_details(with_ports(self._record, self.ports))

    def _found(self) -> None:
        self._unrecorded = True
        if self._timer is None:
            self._record_ports()

    def _record_ports(self) -> None:
        self._timer = None
        if not self._unrecorded:
            return
        self._timer = asyncio.get_running_loop().call_later(INTERVAL, self._record_ports)
        budget = self._record.subject.budget
        if budget is None or not budget.is_spent(time.monotonic()):
            self._unrecorded = False
            self._changed(with_ports(self._record, self.ports))


def forwarded_ports(
    record: AuditRecord, answer: bytes, changed: Callable[[dict[str, Value]], None]
) -> PortRecords | None:
    """Return what reads the ports of an upgrade; None where it is no port-forward, or names them in its query.

    `answer`: header lines of the 101. `changed` is called with the record's details when there are new ports.
    """
    path = (record.details or {}).get("proxy_path")
    kubelet = isinstance(path, str) and path.lower().startswith("/portforward/")
    if not (kubelet or record.subresource == "portforward"):
        return None
    chosen = chosen_protocol(answer)
    websocket = record.upgrade == "websocket"
    if chosen.endswith(b"channel.k8s.io"):
        return None
    records = PortRecords(record, websocket, changed)
    if websocket and chosen != TUNNEL:
        records.ports.unread = "another protocol was chosen"
    return records


def with_ports(record: AuditRecord, ports: ForwardedPorts) -> dict[str, Value]:
    """Return a record's details with the ports that were read so far, instead of those of a query."""
    details: dict[str, Value] = {**(record.details or {}), "ports": list(ports.ports)}
    if ports.unread:
        more = details.get("more")
        details["more"] = {**(more if isinstance(more, dict) else {}), "ports": f"not all read: {ports.unread}"}
    return details


def _head_size(second: int) -> int:
    """Return the bytes of the head of a masked WebSocket frame with this second byte."""
    return {126: 8, 127: 14}.get(second & 0x7F, 6)


def unmasked(part: memoryview, mask: bytes, offset: int) -> bytes:
    """Return a part of a WebSocket frame's payload, which begins `offset` bytes behind the frame's head, as it was
    before it was masked (RFC 6455 §5.3)."""
    size = len(part)
    if mask == b"\0\0\0\0":
        return bytes(part)
    key = (mask * (size // 4 + 2))[offset % 4 :][:size]
    return (int.from_bytes(part, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")


def _pairs(data: bytes) -> list[tuple[bytes, bytes]]:
    """Read a block of headers: their number, and the length before each name and value, in four bytes each."""
    texts: list[bytes] = []
    position = 4
    count = int.from_bytes(data[:4], "big")
    if count > MAX_HEADERS:
        raise _Unreadable(f"a stream has more than {MAX_HEADERS} headers")
    for _ in range(2 * count):
        begin = position + 4
        position = begin + int.from_bytes(data[position:begin], "big")
        if begin > len(data) or position > len(data):
            raise _Unreadable("a block of headers is not whole")
        texts.append(data[begin:position])
    if position != len(data):
        raise _Unreadable("a block of headers has something behind it")
    return list(zip(texts[::2], texts[1::2], strict=True))
