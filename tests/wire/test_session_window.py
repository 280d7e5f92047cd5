"""The session's window alone: grants, extension, and what is taken back."""

from __future__ import annotations

from arcbridge.wire.backlog import Backlog
from arcbridge.wire.frames import FIRST_CREDIT, U32, FrameType, frame
from arcbridge.wire.limits import KIB, Limits
from tests.support.books import check_window
from tests.wire.parts import Parts

SIZE = 1024 * KIB
LIMITS = Limits(session_window=SIZE)


def grant(increment: int) -> bytes:
    return frame(FrameType.WINDOW, 0, U32.pack(increment))


def opened() -> Parts:
    parts = Parts(limits=LIMITS)
    parts.window.open()
    assert parts.written() == grant(SIZE - FIRST_CREDIT)
    return parts


def test_credit_comes_back_in_sixteenths() -> None:
    parts = opened()
    assert parts.window.account.receive(SIZE)
    parts.window.release(SIZE // 16 - 1)
    assert parts.written() == b""
    parts.window.release(1)
    assert parts.written() == grant(SIZE // 16)
    parts.window.release(0)
    assert parts.written() == b""
    check_window(parts.window.account)


def test_half_is_kept_free_of_readers_that_stopped() -> None:
    parts = opened()
    assert parts.window.account.receive(SIZE // 2)
    parts.window.keep_half_free()
    assert parts.written() == b"", "half is free"
    assert parts.window.account.receive(100)
    parts.window.keep_half_free()
    assert parts.window.extension.held == SIZE // 8, "no crumbs"
    assert parts.budget.held == SIZE // 8
    assert parts.written() == grant(SIZE // 8)
    check_window(parts.window.account)


def test_the_extension_is_taken_back_when_readers_go_on() -> None:
    parts = opened()
    assert parts.window.account.receive(SIZE)
    parts.window.keep_half_free()
    assert parts.window.account.size == SIZE * 3 // 2
    for _ in range(16):
        parts.window.release(SIZE // 16)
        check_window(parts.window.account)
    assert parts.window.account.unconsumed == 0
    assert parts.window.account.size == SIZE
    assert parts.window.extension.held == parts.budget.held == 0
    check_window(parts.window.account)


def test_it_is_no_larger_than_the_process_has_room_for() -> None:
    parts = opened()
    parts.budget.held = parts.budget.most
    assert parts.window.account.receive(SIZE)
    parts.window.keep_half_free()
    assert parts.window.account.size == SIZE
    assert parts.written() == b""


def test_m20_what_no_reader_has_taken_counts_for_the_user() -> None:
    user = Backlog(SIZE)
    parts = opened()
    parts.context.ahead.move(user)
    assert parts.window.account.receive(SIZE // 2)
    assert user.held == 0
    parts.window.keep_half_free()
    assert user.held == SIZE // 2
    parts.window.release(SIZE // 4)
    assert user.held == SIZE // 4
    parts.window.close(100)
    assert user.held == 100, "a complete stream goes on to its reader"
    parts.window.count()
    assert user.held == 100
