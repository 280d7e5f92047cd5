"""`Pair` with connections that die and are replaced: plays the shells of both ends through a resumption."""

from __future__ import annotations

from arcbridge.errors import ConnectionLost
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.limits import DEFAULT, Limits
from arcbridge.wire.records import Auth, AuthOk
from arcbridge.wire.session import Introduction, Kind, Session, Side, State
from tests.support.books import take_events
from tests.support.pair import SECRET, TOKEN, End, Pair


class ResumingPair(Pair):
    """`cut` kills the connection, `resume` makes another; `cut_after` kills it at a byte of the link's traffic."""

    def __init__(self, *, limits: Limits = DEFAULT, eager: bool = True, latency: float = 0.01) -> None:
        super().__init__(limits=limits, eager=eager, latency=latency)
        self.newcomer: Session | None = None
        """The acceptor's side of a connection that asks to resume, until the session takes it over."""
        self.refused = 0
        self.cut_after: dict[str, int] = {}
        """`client` or `agent` -> bytes that may still arrive there before the connection dies."""
        self.cuts = 0

    def cut(self) -> None:
        """Kill the connection: both ends learn of the loss, and bytes on their way are lost."""
        self.lost = True
        self.cuts += 1
        self.cut_after.clear()
        error = ConnectionLost("cut by the test")
        for end in self.ends:
            end.arrivals.clear()
            end.machine.connection_lost(self.now, error)
            end.collect()
        self._drop_newcomer()

    def resume(self) -> None:
        """Make a new connection on which the client names its session."""
        self.lost = False
        for end in self.ends:
            end.arrivals.clear()
        self._drop_newcomer()
        self.client.machine.resumption.begin(Auth("oidc", TOKEN), self.now)
        self.newcomer = Session(Side.ACCEPTOR, Kind.SESSION, self.now, introduction=Introduction("instance-1"))
        self.flush()

    def deliver(self, end: End, most: int | None = None) -> bool:
        name = "client" if end is self.client else "agent"
        left = self.cut_after.get(name)
        if left is not None and end.arrivals:
            size = len(end.arrivals[0][1])
            if size >= left:
                if left:
                    self._deliver_part(end, left)
                self.cut()
                return True
            self.cut_after[name] = left - size
        return self._deliver_part(end, most)

    def _deliver_part(self, end: End, most: int | None) -> bool:
        newcomer = self.newcomer
        if end is not self.agent or newcomer is None:
            return super().deliver(end, most)
        if not end.arrivals:
            return False
        when, data = end.arrivals.popleft()
        if most is not None and most < len(data):
            end.arrivals.appendleft((when, data[most:]))
            data = data[:most]
        newcomer.receive_data(memoryview(data), self.now)
        for event in take_events(newcomer):
            if isinstance(event, Auth):
                self._judge(newcomer)
        return True

    def _judge(self, newcomer: Session) -> None:
        hello, agent = newcomer.resumption.resuming, self.agent.machine
        assert hello is not None
        good = hello.session_id == agent.resumption.session_id and hello.resume_secret == agent.resumption.secret
        if not good or agent.state is State.CLOSED or hello.epoch <= agent.resumption.epoch:
            self.refused += 1
            newcomer.close(GoawayCode.GONE, "there is no such session here")
            answer = b"".join(newcomer.sender.data_to_send(1 << 20))
            self.client.arrivals.append((self.now + self.latency, answer))
            return
        agent.resumption.take_over(hello, AuthOk(agent.resumption.session_id, SECRET, "jane", 3600), self.now)
        newcomer.resumption.hand_over(self.now)
        assert not newcomer.sender.data_to_send(1 << 20)
        self.newcomer = None
        self.agent.collect()

    def _drop_newcomer(self) -> None:
        if self.newcomer is not None:
            self.newcomer.connection_lost(self.now, ConnectionLost("cut by the test"))
            self.newcomer = None

    def attached(self) -> bool:
        """Tell whether both ends are on the same connection."""
        return all(end.machine.state in (State.OPEN, State.DRAINING) for end in self.ends)

    def drive_resuming(self, steps: int = 20_000) -> None:
        """Step until nothing is on its way, resuming whenever the connection is gone."""
        self.flush()
        for _ in range(steps):
            if State.CLOSED in (self.client.machine.state, self.agent.machine.state):
                return
            if self.lost:
                self.resume()
            if self.attached() and self.quiet:
                self.flush()
                if self.quiet:
                    return
            self.step()
        raise AssertionError(f"not at rest within {steps} steps: {self!r}")
