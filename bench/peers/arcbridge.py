"""arcbridge itself, as its users run it: three processes of the executable, configuration files, an OIDC issuer, a join
token, a policy, an audit log; the client's `forward` leads to a TCP target that the agent allows to a group.
"""

from __future__ import annotations

from pathlib import Path

from arcbridge import __version__
from bench.address import Address
from bench.peers.base import Peer, Standing
from bench.process import NotReady
from bench.tap import Tap, send_canary
from tests.support.processes import ManagedProcess, ProcessFailed
from tests.support.world import ALICE, HEAVY_USERS, ApiServer, World, fixed_port

TARGET = "bench"
WITHOUT_RESUMPTION = "arcbridge-without-resumption"


class Arcbridge(Peer):
    """The product: nothing is switched off for the benchmark."""

    name = "arcbridge"
    encrypts = "end to end, client to agent, TLS 1.3; the relay moves what it cannot read"
    tuned = "policy, audit (to a file) and logs at level info are on; limits of one user are on, and above the load"
    agent_settings = HEAVY_USERS
    client_flags: tuple[str, ...] = ()

    standing: Standing = "ours"

    def __init__(self) -> None:
        super().__init__()
        self._world: World | None = None
        self._client: ManagedProcess | None = None

    def check(self) -> str:
        return __version__

    def start(self, target: Address, directory: Path) -> None:
        # A TCP target needs no API server, but an agent has one: at this address there is none.
        credential = directory / "agent-token"
        credential.write_text("never-asked-for")
        api = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=credential)
        self._world = world = World(api, directory=directory / "world")
        world.targets[TARGET] = (str(target), ALICE.groups)
        world.agent_settings = self.agent_settings
        try:
            world.start()
            world.client_routes = [str(self.through(Address("127.0.0.1", world.relay_port)))]
            self._client, port = world.start_forward(TARGET, ALICE, *self.client_flags)
        except ProcessFailed as error:
            raise NotReady(str(error)) from error
        self.endpoint = Address("127.0.0.1", port)

    def prove_encryption(self, target: Address) -> str:
        """A client of its own with a recording relay in front of the relay: the bytes that pass there are, but for
        the join, the very bytes that the relay pumps to the agent."""
        world = self._world
        assert world is not None
        with Tap(Address("127.0.0.1", world.relay_port)) as tap:
            routes, world.client_routes = world.client_routes, [str(tap.address)]
            process, port = world.start_forward(TARGET, ALICE, *self.client_flags)
            world.client_routes = routes
            try:
                send_canary(Address("127.0.0.1", port))
            finally:
                process.stop()
                world.processes.remove(process)
            return tap.require_unreadable()

    def stop(self) -> None:
        world, self._world, self._client = self._world, None, None
        if world is not None:
            world.stop()

    def roots(self) -> dict[str, int]:
        if self._world is None or self._client is None:
            return {}
        return {"client": self._client.pid, "relay": self._world.relay.pid, "agent": self._world.agent.pid}


class WithoutResumption(Arcbridge):
    """The same with resumption switched off at both ends: what keeping a session alive costs while nothing breaks."""

    name = WITHOUT_RESUMPTION
    tuned = "the same, but `resumption = false` at client and agent: a session ends with its connection"
    agent_settings = f"{HEAVY_USERS}resumption = false"
    client_flags = ("--no-resumption",)
    standing = "yardstick"
    special = True
