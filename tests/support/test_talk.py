"""A talk that is disturbed says so: the checks of the fault tests must be able to fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.fault_proxy import FaultProxy, Plan
from tests.support.talk import Checker, Source, Talk, TalkServer, Wrong


@pytest.fixture
def server() -> Iterator[TalkServer]:
    with TalkServer() as server:
        yield server


def target(server: TalkServer) -> tuple[str, int]:
    host, _, port = server.address.partition(":")
    return host, int(port)


def test_an_undisturbed_talk_is_equal_at_both_ends(server: TalkServer) -> None:
    talks = [Talk(target(server)[1], number, pause=0) for number in range(5)]
    for talk in talks:
        talk.wait_moves(300_000)
    for talk in talks:
        side = server.check(talk)
        assert side.sent > 20_000


def test_a_flipped_bit_is_found(server: TalkServer) -> None:
    with FaultProxy(target(server), plan=lambda number: Plan(flip_down=5000)) as proxy:
        talk = Talk(proxy.port, 1)
        assert "byte 5000 is wrong" in talk.wait_end()
        talk.close()


def test_a_cut_is_no_clean_end(server: TalkServer) -> None:
    with FaultProxy(target(server)) as proxy:
        talk = Talk(proxy.port, 1)
        talk.wait_moves(5000)
        proxy.cut("rst")
        assert talk.wait_end() == "rst"
        with pytest.raises(AssertionError, match="rst"):
            server.check(talk)
        talk.close()


def test_bytes_of_another_talk_or_direction_are_found() -> None:
    source = Source(7, "up", 500)
    right = b"".join(source.record() for _ in range(3))
    checker = Checker(Source(7, "up", 500), "talk 7")
    for at in range(0, len(right), 7):  # in any pieces
        checker.feed(right[at : at + 7])
    assert checker.whole
    assert checker.count == len(right)
    for other in (Source(8, "up", 500), Source(7, "down", 500)):
        checker = Checker(Source(7, "up", 500), "talk 7")
        with pytest.raises(Wrong):
            checker.feed(other.record())
