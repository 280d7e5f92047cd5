"""A state machine over two sessions, a link that loses connections and a clock: what a session may meet in its life.

Applications at both ends open, write, read, finish and reset; the link delivers any part of what is on its way, goes
deaf, dies at any byte, for both ends or for one that alone hears of it; the client resumes, also where nothing was
lost; tokens are renewed, either end drains, the agent revokes; and time passes. The rules below say what may happen;
`_check` and `teardown` say what must hold (docs/protocol.md §3).
"""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from arcbridge.errors import ConnectionLost, LocalProtocolError, SessionEnded
from arcbridge.wire.frames import FIRST_CREDIT, GoawayCode, ResetCode
from arcbridge.wire.lifecycle import Change, Lifecycle
from arcbridge.wire.limits import Limits
from arcbridge.wire.records import Auth
from arcbridge.wire.session import State
from tests.support.books import check_session, unconsumed
from tests.support.pair import SECRET, TOKEN, End, Seen
from tests.support.resuming import ResumingPair

SMALL = Limits(
    stream_window=FIRST_CREDIT,
    max_stream_window=4 * FIRST_CREDIT,
    session_window=3 * FIRST_CREDIT,
    frame_alone=40_000,
    frame_shared=5_000,
    ack_every=20_000,
    max_streams=6,
    early_streams=6,
    replay=256 * 1024,
    backlog=256 * 1024,
)
"""Small enough that a few operations reach every bound."""

_S, _C = State, Change
LAWFUL = frozenset(
    {
        (_S.HELLO, _C.GREET, _S.AUTH),
        (_S.AUTH, _C.ESTABLISH, _S.OPEN),
        *((state, _C.DRAIN, _S.DRAINING) for state in (_S.HELLO, _S.AUTH, _S.OPEN, _S.DRAINING)),
        *((_S.DRAINING, change, _S.DRAINING) for change in (_C.GREET, _C.ESTABLISH)),
        *((state, _C.DETACH, _S.DETACHED) for state in (_S.OPEN, _S.DRAINING)),
        (_S.DETACHED, _C.DRAIN, _S.DETACHED),
        (_S.DETACHED, _C.RESUME, _S.OPEN),
        (_S.DETACHED, _C.RESUME_DRAINING, _S.DRAINING),
        *((state, _C.CLOSE, _S.CLOSED) for state in State if state is not _S.CLOSED),
    }
)
"""Changes of state that a session may make, as docs/protocol.md §3 has them: written once more, not imported."""
HONEST_ENDS = (ConnectionLost, SessionEnded)
"""How a session between two ends that keep the protocol may end."""


class Link(ResumingPair):
    """`ResumingPair` whose connection may go deaf, die for one end alone, or be replaced while it works."""

    def __init__(self, latency: float) -> None:
        super().__init__(limits=SMALL, eager=False, latency=latency)
        self.deaf = False
        """What is written arrives nowhere, and neither end is told."""

    def flush(self) -> None:
        """As `Pair.flush`; but what the agent writes on a connection that the client has given up arrives nowhere."""
        for end in self.ends:
            end.collect()
            while parts := end.machine.sender.data_to_send(self.portion):
                given_up = end is self.agent and self.newcomer is not None
                if not (self.lost or self.deaf or given_up):
                    self.other(end).arrivals.append((self.now + self.latency, b"".join(parts)))
            end.machine.sender.take_unblocked()
            end.collect()
            end.note_ends()
            if end.machine.state is not State.CLOSED:
                check_session(end.machine)
            end.check_backlog()

    def go_deaf(self) -> None:
        """The path loses everything from now on."""
        self.deaf = True
        for end in self.ends:
            end.arrivals.clear()

    def lose(self, end: End) -> None:
        """One end hears that its connection is gone; the other one will find out."""
        self.lost = True
        for each in self.ends:
            each.arrivals.clear()
        end.machine.connection_lost(self.now, ConnectionLost("lost by the test"))
        end.collect()
        self._drop_newcomer()

    def resume(self) -> None:
        self.deaf = False
        self.cut_after.clear()
        super().resume()


class LossyLink(RuleBasedStateMachine):
    """See the module's docstring."""

    written = 0
    """Writes so far: each one's bytes are its own."""

    def __init__(self) -> None:
        super().__init__()
        self.changes: list[tuple[State, Change, State]] = []
        plain = Lifecycle.change

        def change(lifecycle: Lifecycle, what: Change) -> None:
            before = lifecycle.state
            plain(lifecycle, what)
            self.changes.append((before, what, lifecycle.state))

        self.watched = patch.object(Lifecycle, "change", change)
        self.watched.start()
        self.pair: Link = Link(0.0)
        self.budgets = []
        for end in self.pair.ends:
            history = end.machine.sender.history
            self.budgets.append(history._budget)

    @initialize(latency=st.sampled_from([0.0, 0.001, 0.3]), established=st.sampled_from([True, True, True, False]))
    def begin(self, latency: float, established: bool) -> None:
        self.pair.latency = latency
        if established:
            self.pair.established()

    # -- what applications do -----------------------------------------------------------------------------------------

    def end(self, client: bool) -> End:
        return self.pair.client if client else self.pair.agent

    def pick(self, client: bool, number: int) -> tuple[End, Seen | None]:
        """An end, and one of the streams that it has seen last; None before the first."""
        end = self.end(client)
        known = list(end.seen.values())[-8:]
        return end, (known[number % len(known)] if known else None)

    @rule(client=st.booleans(), to=st.sampled_from(["kubernetes", "tcp:db"]))
    def open(self, client: bool, to: str) -> None:
        try:
            self.end(client).open(to)
        except SessionEnded:
            pass  # draining, without a connection, closed, or at the limit
        except LocalProtocolError:
            assert not client, "an agent opens nothing before it has accepted"

    @rule(client=st.booleans(), number=st.integers(0, 7), size=st.sampled_from([0, 1, 100, 5_000, 70_000, 300_000]))
    def write(self, client: bool, number: int, size: int) -> None:
        end, seen = self.pick(client, number)
        if seen is not None:
            self.written += 1
            tag = self.written.to_bytes(4, "big") + seen.stream.id.to_bytes(4, "big")
            end.write(seen, (tag * (size // 8 + 1))[:size])

    @rule(client=st.booleans(), number=st.integers(0, 7), size=st.sampled_from([1, 1000, 40_000, 10**6]))
    def read(self, client: bool, number: int, size: int) -> None:
        end, seen = self.pick(client, number)
        if seen is not None:
            end.take(seen, size)

    @rule(client=st.booleans(), number=st.integers(0, 7))
    def half_close(self, client: bool, number: int) -> None:
        end, seen = self.pick(client, number)
        if seen is not None and end.machine.state is not State.CLOSED:
            end.finish(seen)

    @rule(
        client=st.booleans(), number=st.integers(0, 7), code=st.sampled_from([ResetCode.CANCELLED, ResetCode.NO_ERROR])
    )
    def reset(self, client: bool, number: int, code: ResetCode) -> None:
        end, seen = self.pick(client, number)
        if seen is not None:
            end.reset(seen, code)

    @rule(client=st.booleans(), size=st.sampled_from([5_000, 70_000, 200_000]), steps=st.integers(0, 12))
    def talk(self, client: bool, size: int, steps: int) -> None:
        """Both ends write on a stream, a new one or the last, and some of it travels."""
        end = self.end(client)
        if not end.machine.streams:
            self.open(client, "kubernetes")
        for one in self.pair.ends:
            for seen in list(one.seen.values())[-1:]:
                self.written += 1
                one.write(seen, self.written.to_bytes(8, "big") * (size // 8))
                one.take(seen, size // 2)
        self.step(steps)

    # -- what the owners of the sessions do ---------------------------------------------------------------------------

    @precondition(lambda self: self.pair.client.machine.state in (State.OPEN, State.DRAINING))
    @rule()
    def renew(self) -> None:
        self.pair.client.machine.authenticate(Auth("oidc", TOKEN))

    @precondition(lambda self: self.written > 6)
    @rule(client=st.booleans(), code=st.sampled_from([GoawayCode.DRAINING, GoawayCode.DONE]))
    def drain(self, client: bool, code: GoawayCode) -> None:
        end = self.end(client)
        end.machine.goaway(code, "restart")
        end.collect()

    @precondition(lambda self: self.written > 12)
    @rule()
    def revoke(self) -> None:
        self.pair.agent.machine.close(GoawayCode.REVOKED, "the user was revoked")
        self.pair.agent.collect()

    @precondition(lambda self: self.pair.agent.machine.state is State.OPEN)
    @rule()
    def ask_to_move(self) -> None:
        self.pair.agent.machine.resumption.ask_to_move("join")

    # -- what the path does -------------------------------------------------------------------------------------------

    @rule(client=st.booleans(), most=st.sampled_from([1, 7, 9, 100, 5_000, 10**6]))
    def deliver(self, client: bool, most: int) -> None:
        self.pair.deliver(self.end(client), most)

    @rule(client=st.booleans(), writable=st.booleans())
    def socket(self, client: bool, writable: bool) -> None:
        machine = self.end(client).machine
        if machine.state is not State.DETACHED:  # without a connection there is no socket
            machine.sender.set_writable(writable)

    @rule()
    def flush(self) -> None:
        self.pair.flush()

    @rule(steps=st.sampled_from([1, 1, 5, 30]))
    def step(self, steps: int) -> None:
        """What is next happens."""
        for _ in range(steps):
            if not self.pair.step():
                break

    @rule(seconds=st.sampled_from([0.01, 0.01, 1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 26.0, 26.0, 26.0, 130.0]))
    def wait(self, seconds: float) -> None:
        """Time passes; the timers of both ends run as they are due, and what is on its way arrives."""
        until = self.pair.now + seconds
        for _ in range(2000):
            self.pair.flush()
            at = self.pair.next_wakeup()
            if at is None or at > until:
                break
            self.pair.step()
        self.pair.now = max(self.pair.now, until)

    @rule()
    def cut(self) -> None:
        self.pair.flush()
        self.pair.cut()

    @rule(client=st.booleans(), at=st.integers(0, 3000))
    def cut_later(self, client: bool, at: int) -> None:
        self.pair.cut_after["client" if client else "agent"] = at

    @rule(client=st.booleans())
    def lose(self, client: bool) -> None:
        self.pair.flush()
        self.pair.lose(self.end(client))

    @rule()
    def go_deaf(self) -> None:
        self.pair.flush()
        self.pair.go_deaf()

    @precondition(lambda self: self.pair.client.machine.resumption.possible)
    @rule(steps=st.sampled_from([0, 1, 2, 3, 20]))
    def resume(self, steps: int) -> None:
        """On another connection; the one before may be lost, may be about to be, or may work."""
        self.pair.flush()
        self.pair.resume()
        self.step(steps)

    # -- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def check(self) -> None:
        pair = self.pair
        pair.check_prefixes()
        assert LAWFUL.issuperset(self.changes), set(self.changes) - LAWFUL
        for end in pair.ends:
            machine, other = end.machine, pair.other(end).machine
            text = repr(machine) + repr(end.events) + str(end.error)
            assert TOKEN not in text
            assert SECRET.hex() not in text
            assert end.error is None or isinstance(end.error, HONEST_ENDS), repr(end.error)
            if machine.state is State.CLOSED:
                assert machine.next_deadline() is None
                assert machine.backlog.held == 0, "a session that is over counts for what waits"
                continue
            check_session(machine)
            window = SMALL.session_window + machine.session_window.extension.held
            assert sum(seen.unread for seen in end.seen.values()) <= window, "more than the session's window"
            for stream in machine.streams.values():
                peer = other.streams.get(stream.id)
                if peer is not None:
                    assert stream.bytes_sent <= peer.window.granted, "more than the stream's window"

    def teardown(self) -> None:
        """Both ends read and finish, and connections last: then every stream ends once, what was read is what was
        written, or the session has ended at both ends; and no account holds anything."""
        try:
            self._come_to_rest()
            self._end_all()
        finally:
            self.watched.stop()

    def _come_to_rest(self) -> None:
        pair = self.pair
        pair.cut_after.clear()
        for _ in range(4000):
            for end in pair.ends:
                end.eager = True
                end.collect()
                if end.machine.state is not State.DETACHED:
                    end.machine.sender.set_writable(True)
                for seen in list(end.seen.values()):
                    end.take(seen, seen.unread)
                    if end.machine.state is not State.CLOSED:
                        end.finish(seen)
            if pair.deaf or (pair.lost and pair.newcomer is None):
                if not pair.client.machine.resumption.possible:
                    pair.deaf, pair.lost = False, True
                    for end in pair.ends:
                        end.machine.connection_lost(pair.now, ConnectionLost("the end of the test"))
                        end.collect()
                    if all(end.machine.state is State.CLOSED for end in pair.ends):
                        return
                else:
                    pair.resume()
            pair.flush()
            states = [end.machine.state for end in pair.ends]
            if all(state is State.CLOSED for state in states):
                return
            waits = any(end.machine.sender.has_output for end in pair.ends)
            if pair.attached() and pair.quiet and not waits and not any(end.machine.streams for end in pair.ends):
                pair.check_books()
                assert all(unconsumed(end.machine) == 0 for end in pair.ends), "session credit was lost"
                return
            if State.CLOSED in states and pair.quiet and pair.newcomer is None:
                # One end is over, and said so or could not; the other one hears that its connection is gone.
                for end in pair.ends:
                    end.machine.connection_lost(pair.now, ConnectionLost("the other end is over"))
                    end.collect()
                if pair.client.machine.resumption.possible and pair.client.machine.resumption.handshake is None:
                    pair.resume()
            pair.step()
        raise AssertionError(f"not at rest: {pair!r}")

    def _end_all(self) -> None:
        pair = self.pair
        for end in pair.ends:
            end.note_ends()
            assert end.error is None or isinstance(end.error, HONEST_ENDS), repr(end.error)
            for seen in end.seen.values():
                assert len(seen.ends) == 1, f"stream {seen.stream.id} ended {len(seen.ends)} times"
                if seen.ends == ["in order"] and seen.finished:
                    assert bytes(seen.read) == bytes(pair.other(end).seen[seen.stream.id].written)
        for end, budget in zip(pair.ends, self.budgets, strict=True):
            end.machine.give_up(pair.now, SessionEnded(GoawayCode.DONE, "the end of the test"))
            end.collect()
            assert end.machine.backlog.held == 0, "bytes wait in a session that is over"
            assert budget.held == 0, "the budget holds something of a session that is over"
            assert not end.machine.sender.scheduler, "a stream of a session that is over waits for its turn"
        self.check()
