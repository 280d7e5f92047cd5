"""Connections die at every byte; what was written is read, once, in order."""

from __future__ import annotations

import pytest

from tests.support.resuming import ResumingPair
from tests.wire.resumed import UP, answer, check, conclude, ready, script


def play(pair: ResumingPair) -> None:
    """Run the exchange to its end, resuming whenever the connection is gone."""
    first, second = script(pair)
    done = False
    for _ in range(200):
        pair.drive_resuming()
        answer(pair)
        pair.drive_resuming()
        if second.finished and not done:
            pair.client.write(second, UP[100:])
            pair.client.finish(second)
            pair.drive_resuming()
            done = True
        if done and pair.attached() and pair.quiet and not pair.client.machine.streams:
            break
    for end in pair.ends:
        end.note_ends()
    check(pair, first, second)


def test_an_exchange_without_a_cut() -> None:
    pair = ready()
    play(pair)
    assert pair.cuts == 0


def _bytes_of_an_exchange(end: str) -> int:
    pair = ready()
    before = getattr(pair, end).machine.stats.bytes_received
    play(pair)
    return int(getattr(pair, end).machine.stats.bytes_received - before)


@pytest.mark.parametrize("end", ["client", "agent"])
def test_a_cut_at_every_byte(end: str) -> None:
    total = _bytes_of_an_exchange(end)
    assert total > 600
    for at in range(total + 1):
        pair = ready()
        pair.cut_after[end] = at
        play(pair)
        assert pair.cuts == 1 or at == total


@pytest.mark.parametrize("end", ["client", "agent"])
def test_a_second_cut_at_every_byte_of_the_resumption(end: str) -> None:
    """HELLO, AUTH, the answers and what is sent again: the second connection dies there, then the third one works."""
    for at in range(700):
        pair = ready()
        first, second = script(pair)
        pair.flush()
        pair.deliver(pair.agent, 150)
        pair.cut()
        pair.resume()
        pair.cut_after[end] = at
        pair.drive_resuming()
        pair.cut_after.clear()
        conclude(pair, first, second)
