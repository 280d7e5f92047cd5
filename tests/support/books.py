"""What a session owes its readers, and whether its accounts and those of a window balance; takes its events."""

from __future__ import annotations

from arcbridge.wire.events import Event
from arcbridge.wire.session import Session
from arcbridge.wire.stream import ReceiveState
from arcbridge.wire.window import MAX_CREDIT, ReceiveWindow


def take_events(machine: Session) -> list[Event]:
    """Take what happened in a session since the last call, in order."""
    events = machine.events.copy()
    machine.events.clear()
    return events


def unconsumed(machine: Session) -> int:
    """Return the bytes that a session received on all streams and that their consumers do not have yet."""
    return machine.session_window.account.unconsumed


def check_window(window: ReceiveWindow) -> None:
    """Raise AssertionError when the account is impossible."""
    assert 0 <= window.consumed <= window.received, "consumed more than was received"
    assert window.received <= window.granted, "received more than was granted"
    assert window.granted - window.consumed <= window.size, "granted more than the window can hold"
    assert window.size <= window.limit, "the window outgrew its limit"
    due_at = window.granted - window.size + min(window.size >> 2, window.grant)
    assert window.due_at == due_at, "the next grant is due at another moment"


def check_session(machine: Session) -> None:
    """Raise AssertionError when the accounts do not balance."""
    whole, sender = machine.session_window.account, machine.sender
    check_window(whole)
    assert 0 <= sender.credit <= MAX_CREDIT, "session credit out of range"
    held, waiting = 0, sender.history.held if sender.history is not None else 0
    for stream in machine.streams.values():
        waiting += stream.held
        check_window(stream.window)
        assert 0 <= stream.credit <= MAX_CREDIT, "stream credit out of range"
        assert stream.queued == sum(map(len, stream.outbox)), "queued bytes miscounted"
        assert stream.queued <= stream.held, "a stream holds less than waits in it"
        assert not stream.over, "a stream that is over was kept"
        if stream.receiving is ReceiveState.OPEN:
            held += stream.window.unconsumed
    assert held <= whole.unconsumed, "a stream holds bytes that the session does not know of"
    assert machine.backlog.held >= waiting, "bytes wait that are not counted"
