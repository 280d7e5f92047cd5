"""Conversations that know every byte before it comes: what fault tests carry through arcbridge and check at both ends.

A `Talk` dials, says its number and sends records; a `TalkServer` sends records of its own back. Record `n` of a
direction is a pseudo-random function of (number, direction, n): a byte that is lost, doubled, late or another
conversation's is seen at once, and where. Both send as long as the talk lasts. `finish` ends the near direction; the
far end then sends a last record and ends its own, so the half-close is part of every talk.
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from dataclasses import dataclass, field

from tests.support.stopping import Stopping

_HELLO = struct.Struct("!4sIId")
_MAGIC = b"talk"
_TCP_CLOSE = 7  # tcp_states.h


class Source:
    """The bytes of one direction of one talk."""

    def __init__(self, number: int, direction: str, most: int) -> None:
        self._name = f"{number}-{direction}"
        self._most = most
        self._sequence = 0

    def record(self) -> bytes:
        """The next record: its sequence number, its length, its bytes."""
        rng = random.Random(f"{self._name}-{self._sequence}")
        payload = rng.randbytes(rng.randint(1, self._most))
        head = struct.pack("!II", self._sequence, len(payload))
        self._sequence += 1
        return head + payload


class Wrong(AssertionError):
    """A received byte differs from the one that belongs at its position."""


class Checker:
    """Compares received bytes with the expected ones; a record may arrive in any pieces."""

    def __init__(self, source: Source, name: str) -> None:
        self._source = source
        self._name = name
        self._expected = bytearray()
        self.count = 0

    def feed(self, data: bytes) -> None:
        """Raises Wrong at the first byte that differs."""
        while len(self._expected) < len(data):
            self._expected += self._source.record()
        expected = bytes(self._expected[: len(data)])
        if expected != data:
            at = next(i for i, (a, b) in enumerate(zip(expected, data, strict=True)) if a != b)
            raise Wrong(
                f"{self._name}: byte {self.count + at} is wrong: expected {expected[at : at + 16].hex()}, "
                f"got {data[at : at + 16].hex()}"
            )
        del self._expected[: len(data)]
        self.count += len(data)

    @property
    def whole(self) -> bool:
        """Tell whether the received bytes end with a record's end."""
        return not self._expected


@dataclass
class Side:
    """What one end of a talk has sent and received."""

    sent: int = 0
    received: int = 0
    end: str = "open"
    """How the other's direction ended here: `fin`, `rst`, or what was wrong."""
    longest_gap: float = 0.0
    """Seconds without a byte, at most."""
    done: threading.Event = field(default_factory=threading.Event)


class _Speaker:
    """One end of one talk: a sending and a receiving thread over a socket."""

    def __init__(self, sock: socket.socket, number: int, mine: str, theirs: str, *, most: int, pause: float) -> None:
        self._sock = sock
        self._pause = pause
        self._source = Source(number, mine, most)
        self._checker = Checker(Source(number, theirs, most), f"talk {number}, {theirs}")
        self.side = Side()
        self._shut = False
        """Whether our direction was ended."""
        self.finishing = threading.Event()
        self.moved = threading.Condition()
        self._threads = [
            threading.Thread(target=self._send, daemon=True, name=f"talk {number} sends"),
            threading.Thread(target=self._receive, daemon=True, name=f"talk {number} receives"),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self, timeout: float) -> bool:
        """Whether both directions have ended."""
        deadline = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _send(self) -> None:
        side = self.side
        last = False
        try:
            while not last:
                last = self.finishing.is_set()
                record = self._source.record()
                self._sock.sendall(record)
                side.sent += len(record)
                if self._pause and not last:
                    self.finishing.wait(self._pause)
            self._shut = True
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            return  # the receiving thread says how it ended

    def _receive(self) -> None:
        side = self.side
        before = time.monotonic()
        try:
            while data := self._sock.recv(65536):
                now = time.monotonic()
                side.longest_gap = max(side.longest_gap, now - before)
                before = now
                self._checker.feed(data)
                with self.moved:
                    side.received += len(data)
                    self.moved.notify_all()
            side.end = "fin" if self._checker.whole else "fin inside a record"
            if not self._shut and self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
                side.end = "rst"  # the kernel tells of a reset once, and told the sending thread
        except Wrong as error:
            side.end = str(error)
        except OSError:
            side.end = "rst"
        self.finishing.set()
        with self.moved:
            self.moved.notify_all()
        side.done.set()


class Talk:
    """The near end. `pause`: seconds between two records, `most`: bytes of the largest."""

    def __init__(self, to: int | socket.socket, number: int, *, most: int = 20_000, pause: float = 0.01) -> None:
        """`to`: a port of loopback, or a socket that is connected already."""
        self._sock = socket.create_connection(("127.0.0.1", to), timeout=20) if isinstance(to, int) else to
        self._sock.settimeout(None)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock.sendall(_HELLO.pack(_MAGIC, number, most, pause))
        self.number = number
        self._speaker = _Speaker(self._sock, number, "up", "down", most=most, pause=pause)
        self._speaker.start()

    @property
    def side(self) -> Side:
        """Return what this end has sent and received."""
        return self._speaker.side

    def wait_moves(self, more: int = 100_000, timeout: float = 45) -> None:
        """Wait for `more` bytes from now on. Raises AssertionError at the deadline or when the talk ended before."""
        side, moved = self.side, self._speaker.moved
        start, deadline = side.received, time.monotonic() + timeout
        with moved:
            while side.received < start + more:
                left = deadline - time.monotonic()
                assert side.end == "open", f"talk {self.number} ended: {side}"
                assert left > 0, f"talk {self.number} stands still: {side}"
                moved.wait(left)

    def wait_end(self, timeout: float = 45) -> str:
        """Wait until the other direction has ended by itself; return how. Raises AssertionError at the deadline."""
        assert self.side.done.wait(timeout), f"talk {self.number} has no end: {self.side}"
        return self.side.end

    def finish(self, timeout: float = 45) -> Side:
        """End this direction and wait for the other's end. Raises AssertionError at the deadline."""
        self._speaker.finishing.set()
        assert self._speaker.join(timeout), f"talk {self.number} does not end: {self.side}"
        self._sock.close()
        return self.side

    def close(self) -> None:
        """Close the socket; harmless when the talk has ended."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # not connected any more
        self._speaker.join(5)
        self._sock.close()


class TalkServer(Stopping):
    """The far ends, on a TCP port of loopback (or on a socket that listens already)."""

    def __init__(self, listening: socket.socket | None = None) -> None:
        self._listening = listening or socket.create_server(("127.0.0.1", 0), backlog=256)
        self._speakers: dict[int, _Speaker] = {}
        self._doubles: list[int] = []
        self._socks: list[socket.socket] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._accept, daemon=True, name="talk server").start()

    @property
    def address(self) -> str:
        """`host:port`."""
        host, port = self._listening.getsockname()[:2]
        return f"{host}:{port}"

    def side(self, number: int) -> Side:
        """Wait for the far end of a talk and return what it has seen."""
        with self._changed:
            assert self._changed.wait_for(lambda: number in self._speakers, 15), f"talk {number} never came"
            assert number not in self._doubles, f"talk {number} came twice"
            return self._speakers[number].side

    def check(self, talk: Talk) -> Side:
        """Finish a talk, require that both ends have seen the same, whole, and return the near end's account."""
        near = talk.finish()
        far = self.side(talk.number)
        assert far.done.wait(15), f"talk {talk.number}: the far end is still open: {far}"
        with self._changed:
            speaker = self._speakers[talk.number]
        assert speaker.join(15)
        assert (near.end, far.end) == ("fin", "fin"), (near, far)
        # Each byte was compared as it came: what is left to compare is how many there were.
        assert (near.sent, far.sent) == (far.received, near.received), (near, far)
        assert near.sent > 0
        assert near.received > 0
        return near

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return  # stopped
            threading.Thread(target=self._greet, args=(sock,), daemon=True, name="talk greeting").start()

    def _greet(self, sock: socket.socket) -> None:
        hello = sock.recv(_HELLO.size, socket.MSG_WAITALL)
        if len(hello) < _HELLO.size:
            sock.close()  # the client left before its first byte
            return
        magic, number, most, pause = _HELLO.unpack(hello)
        assert magic == _MAGIC
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        speaker = _Speaker(sock, number, "down", "up", most=most, pause=pause)
        with self._changed:
            if number in self._speakers:
                self._doubles.append(number)
            self._speakers[number] = speaker
            self._socks.append(sock)
            self._changed.notify_all()
        speaker.start()

    def stop(self) -> None:
        """Stop listening and cut the open talks."""
        try:
            self._listening.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # some systems do not shut down what only listens
        self._listening.close()
        for sock in self._socks:
            sock.close()
