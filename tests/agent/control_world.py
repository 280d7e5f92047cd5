"""Some relays in memory over one CA, and the control connections of an agent that knows them all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from arcbridge.agent.control import ControlConnections
from arcbridge.agent.enrol import CredentialKeeper
from arcbridge.agent.relay_choice import RelayChoice
from arcbridge.agent.sessions import Sessions
from arcbridge.net.address import parse_address
from arcbridge.net.backoff import Backoff
from arcbridge.pki.authority import Authority
from arcbridge.pki.credentials import DirectoryStore
from tests.support.clock import Clock
from tests.support.eventually import until

from .fake_relay import FakeRelay
from .pair import FakeAuthenticator, make_sessions


@dataclass
class World:
    """`relays` are in the order in which the agent prefers them."""

    relays: list[FakeRelay]
    control: ControlConnections
    sessions: Sessions
    choice: RelayChoice

    @property
    def relay(self) -> FakeRelay:
        return self.relays[0]

    @property
    def connected(self) -> list[int]:
        """Return which relays serve the agent, as both ends see it: a relay has the HELLO before the agent has its."""
        up = {str(link.relay) for link in self.control._links if link.up}
        return [number for number, relay in enumerate(self.relays) if relay.agents and relay.address in up]

    async def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until `condition()` holds; fail after half a minute."""
        try:
            await until(condition)
        except TimeoutError:
            raise AssertionError(f"never: {what}; connected to {self.connected}") from None


@asynccontextmanager
async def agent_of(
    directory: Path, *, relays: int = 1, wanted: int = 2, down: tuple[int, ...] = (), measures: bool = False
) -> AsyncIterator[World]:
    """An agent that has enrolled and begun to connect; the relays `down` do not listen. Unless it `measures`, all are
    equally near, whatever the machine does."""
    authority = Authority.create("relay")
    async with AsyncExitStack() as stack:
        made = [await stack.enter_async_context(FakeRelay.serving(authority=authority)) for _ in range(relays)]
        addresses = [parse_address(relay.address) for relay in made]
        made[0].tokens["id.secret"] = "one"
        (directory / "token").write_text("id.secret")
        keeper = CredentialKeeper(
            DirectoryStore(directory / "state"),
            addresses,
            relay_ca_pin=authority.pin,
            join_token_file=directory / "token",
        )
        await keeper.start()
        for number in down:
            await made[number].stop()
        judge = FakeAuthenticator(t="alice")
        sessions, _ = make_sessions(judge, Clock())
        choice = RelayChoice(addresses, wanted, draw=lambda: 0.0, make_backoff=lambda: Backoff(first=0.05, cap=0.2))
        if not measures:
            choice.round_trips.least = lambda name, within=0.0: 0.010
            choice.round_trips.age = lambda name: 0.0
        control = ControlConnections(addresses, keeper, sessions, instance="agent-1", choice=choice, draw=lambda: 0.5)
        control.start()
        try:
            yield World(made, control, sessions, choice)
        finally:
            await control.close()
            await sessions.close()
