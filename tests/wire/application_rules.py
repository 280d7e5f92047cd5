"""What applications at both ends of a session may do, as rules of a Hypothesis state machine.

A machine derives from `ApplicationRules`, sets `pair`, and adds what the path between the ends may do.
"""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from arcbridge.errors import LocalProtocolError, SessionEnded
from arcbridge.wire.frames import ResetCode
from arcbridge.wire.session import State
from tests.support.pair import End, Pair, Seen


class ApplicationRules(RuleBasedStateMachine):
    """See the module's docstring."""

    pair: Pair
    written = 0
    """Writes so far: each one's bytes are its own."""

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
