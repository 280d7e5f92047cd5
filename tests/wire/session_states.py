"""Sessions in each state, and every frame as an input, for tests of the session machine."""

from __future__ import annotations

from arcbridge.wire.frames import (
    IGNORABLE_FROM,
    PING_BODY,
    FrameType,
    GoawayCode,
    frame,
)
from arcbridge.wire.limits import Limits
from arcbridge.wire.records import Auth
from arcbridge.wire.session import Kind, Side, State
from tests.wire.scripted import OK, Scripted, agent, hello, opening

AUTH = frame(FrameType.AUTH, 0, Auth("oidc", "canary-token").encode())


AUTH_OK = frame(FrameType.AUTH_OK, 0, OK.encode())


PING = frame(FrameType.PING, 0, PING_BODY.pack(7, 0))


UNCAPPED = Limits(under_way=0)
"""For a peer that confirms nothing."""


UNKNOWN = sorted(set(range(IGNORABLE_FROM, 256)) - set(FrameType))
"""Types of the ignorable range that this version does not know."""


def initiator_hello() -> Scripted:
    return Scripted(Side.INITIATOR)


def acceptor_hello() -> Scripted:
    return Scripted(Side.ACCEPTOR)


def acceptor_open() -> Scripted:
    one = agent().feed(opening(1))
    one.machine.open_stream("kubernetes")
    return one


def control(side: Side, state: State) -> Scripted:
    one = Scripted(side, Kind.CONTROL)
    if state is not State.HELLO:
        one.feed(hello())
    if state is State.DRAINING:
        one.machine.goaway(GoawayCode.DRAINING, "bye", 3)
    return one
