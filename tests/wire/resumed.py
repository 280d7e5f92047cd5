"""Two sessions that write to each other through cut connections, for tests of resumption."""

from __future__ import annotations

import hashlib

from tests.support.pair import Seen
from tests.support.resuming import ResumingPair

UP = bytes(range(256)) * 2


DOWN = bytes(reversed(range(256))) * 3


def ready() -> ResumingPair:
    pair = ResumingPair()
    pair.established()
    return pair


def script(pair: ResumingPair) -> tuple[Seen, Seen]:
    """Two streams, both directions, half-close: all that one exchange has. The client's ends are returned."""
    first, second = pair.client.open("kubernetes"), pair.client.open("tcp:db")
    pair.client.write(first, UP)
    pair.client.finish(first)
    pair.client.write(second, UP[:100])
    return first, second


def answer(pair: ResumingPair) -> None:
    """The agent's part, as soon as it sees the streams; writes once."""
    for seen in pair.agent.seen.values():
        if not seen.written and seen.stream.id in pair.agent.machine.streams:
            pair.agent.write(seen, DOWN)
            pair.agent.finish(seen)


def conclude(pair: ResumingPair, first: Seen, second: Seen) -> None:
    """Run the rest of the exchange over a connection that stays, and check both streams."""
    answer(pair)
    pair.drive_resuming()
    pair.client.write(second, UP[100:])
    pair.client.finish(second)
    pair.drive_resuming()
    for one in pair.ends:
        one.note_ends()
    check(pair, first, second)


def check(pair: ResumingPair, *streams: Seen) -> None:
    pair.check_prefixes()
    for seen in streams:
        far = pair.agent.seen[seen.stream.id]
        assert hashlib.sha256(seen.read).digest() == hashlib.sha256(DOWN).digest()
        assert hashlib.sha256(far.read).digest() == hashlib.sha256(UP).digest()
        assert seen.ends == ["in order"]
        assert far.ends == ["in order"]
    pair.check_books()
