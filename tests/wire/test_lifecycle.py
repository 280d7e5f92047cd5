"""The states alone: the table, the deadlines, and how a session ends."""

from __future__ import annotations

import pytest

from arcbridge.errors import LocalProtocolError, SessionEnded
from arcbridge.refusals import Refusal, RefusalRule
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.lifecycle import TRANSITIONS, Change, Deadline, Lifecycle, ended_by
from arcbridge.wire.limits import Limits
from arcbridge.wire.records import Goaway
from arcbridge.wire.state import Kind, State

LIMITS = Limits(handshake_timeout=10.0, drain_timeout=30.0, detached_timeout=120.0, ping_interval=7.0)


def lifecycle(kind: Kind = Kind.SESSION) -> Lifecycle:
    return Lifecycle(kind, LIMITS, 100.0)


def established() -> Lifecycle:
    one = lifecycle()
    one.change(Change.GREET)
    one.establish(101.0)
    return one


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("change", list(Change))
def test_the_table_is_what_is_executed(state: State, change: Change) -> None:
    one = lifecycle()
    one.state = state
    following = TRANSITIONS[state].get(change)
    if following is None:
        with pytest.raises(LocalProtocolError, match=state.value):
            one.change(change)
        assert one.state is state
    else:
        one.change(change)
        assert one.state is following


def test_tls_alone_authenticates_a_control_connection() -> None:
    assert lifecycle(Kind.CONTROL).authenticated
    assert not lifecycle().authenticated
    one = established()
    assert one.authenticated
    assert one.state is State.OPEN


def test_a_handshake_that_does_not_come_is_due() -> None:
    one = lifecycle()
    assert one.next_deadline() == 110.0
    assert one.due(109.9) is None
    assert one.due(110.0) is Deadline.HANDSHAKE


def test_an_open_session_waits_for_its_keepalive_alone() -> None:
    one = established()
    assert one.next_deadline() == 108.0
    assert one.due(1e9) is None


def test_a_draining_session_has_a_deadline() -> None:
    one = established()
    one.drain()
    one.await_streams(105.0)
    assert one.state is State.DRAINING
    assert one.next_deadline() == 108.0, "the keepalive goes on"
    assert one.due(134.9) is None
    assert one.due(135.0) is Deadline.DRAIN


@pytest.mark.parametrize("when", ["never", "before", "meanwhile"])
def test_a_resumed_session_drains_where_goaway_was_said(when: str) -> None:
    one = established()
    if when == "before":
        one.drain()
    one.detach(110.0)
    assert one.state is State.DETACHED
    assert one.next_deadline() == 230.0, "without a connection there is no keepalive"
    if when == "meanwhile":
        one.drain()
        assert one.state is State.DETACHED
    one.await_handshake(111.0)
    assert one.next_deadline() == 121.0
    assert one.due(121.0) is Deadline.HANDSHAKE
    assert one.due(230.0) is Deadline.RESUMPTION, "it comes before all others"
    one.resume()
    assert one.state is (State.OPEN if when == "never" else State.DRAINING)
    assert one.detached_deadline is one.handshake_deadline is None


def test_ping_numbers_go_on_over_a_new_connection() -> None:
    one = established()
    assert one.keepalive.ping(102.0) == 1
    one.watch(150.0)
    assert one.keepalive.ping(151.0) == 2


def test_the_end_is_kept_and_nothing_is_awaited_any_more() -> None:
    one = established()
    one.drain()
    one.await_streams(105.0)
    error = SessionEnded(GoawayCode.DONE, "over")
    one.close(error)
    assert (one.state, one.error) == (State.CLOSED, error)
    assert one.next_deadline() is None
    assert one.due(1e9) is None
    with pytest.raises(LocalProtocolError):
        one.close(error)


def test_a_goaway_becomes_the_sessions_end() -> None:
    error = ended_by(Goaway(5, GoawayCode.REVOKED, "no more", 7, True, "token.aud", "relay"))
    assert isinstance(error, SessionEnded)
    assert (error.code, error.retry_after) == (GoawayCode.REVOKED, 7)
    assert error.refusal == Refusal(RefusalRule.TOKEN_AUD, "relay")
    assert "no more" in str(error)
    foreign = ended_by(Goaway(5, GoawayCode.REVOKED, rule="token.aud", wanted='a"\x1b[2J'))
    assert foreign.refusal == Refusal(RefusalRule.TOKEN_AUD), "what could end a quotation is left out"
    silent = ended_by(Goaway(0, GoawayCode.DONE))
    assert "the other end ended the session" in str(silent)
    assert silent.retry_after is None
