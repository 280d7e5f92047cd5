"""Sessions in some states, for tests of the session machine."""

from __future__ import annotations

from functools import partial

from arcbridge.wire.frames import IGNORABLE_FROM, PING_BODY, FrameType, GoawayCode, frame
from arcbridge.wire.session import Kind, Side, State
from tests.wire.scripted import AUTH, AUTH_OK, Scripted, agent, hello, opening

PING = frame(FrameType.PING, 0, PING_BODY.pack(7, 0))
UNKNOWN = sorted(set(range(IGNORABLE_FROM, 256)) - set(FrameType))
"""Types of the ignorable range that this version does not know."""

initiator_hello = partial(Scripted, Side.INITIATOR)
acceptor_hello = partial(Scripted, Side.ACCEPTOR)


def acceptor_open() -> Scripted:
    """An acceptor's machine with a stream of each end."""
    one = agent().feed(opening(1))
    one.machine.open_stream("kubernetes")
    return one


def control(side: Side, state: State) -> Scripted:
    """A machine of a control connection in a state."""
    one = Scripted(side, Kind.CONTROL)
    if state is not State.HELLO:
        one.feed(hello())
    if state is State.DRAINING:
        one.machine.goaway(GoawayCode.DRAINING, "bye", 3)
    return one


__all__ = ["AUTH", "AUTH_OK", "PING", "UNKNOWN", "acceptor_hello", "acceptor_open", "control", "initiator_hello"]
