"""Three relays over one NATS server, as processes: they share a registry, and any of them reaches every agent."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from arcbridge.errors import ExitCode
from tests.support.nats_server import NatsServer
from tests.support.processes import run
from tests.support.reports import metrics, rewrite, until
from tests.support.targets import EchoServer
from tests.support.world import ALICE, BOB, ApiServer, User, World, arcbridge, fixed_port

# Some of these start twenty processes, one after the other.
pytestmark = pytest.mark.timeout(300)

CONTROL = b"arcbridge-control/1"
JOIN = b"arcbridge-join/"


Choose = Callable[[World, bytes], int | None]


class Front:
    """A load balancer: `choose(first bytes)` says to which port a connection goes; None closes it."""

    def __init__(self, choose: Callable[[bytes], int | None]) -> None:
        self._choose = choose
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True, name="front").start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            hello = b""
            try:
                # The record's own length is in bytes 3 and 4.
                while len(hello) < 5 or len(hello) < 5 + int.from_bytes(hello[3:5], "big"):
                    if not (data := sock.recv(65536)):
                        return
                    hello += data
                port = self._choose(hello)
                if port is None:
                    return
                with socket.create_connection(("127.0.0.1", port)) as to:
                    to.sendall(hello)
                    other = threading.Thread(target=_copy, args=(to, sock), daemon=True)
                    other.start()
                    _copy(sock, to)
                    other.join()
            except OSError:
                return

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def echo() -> Iterator[EchoServer]:
    with EchoServer() as server:
        yield server


@contextmanager
def fleet(
    directory: Path, echo: EchoServer, front: Choose | None = None, gate: int = -1
) -> Iterator[tuple[World, NatsServer]]:
    """NATS, three relays, an agent. `front`: all relays have one address, where that chooses. `gate`: the relay that
    gets no control connection."""
    token = directory / "unused-token"
    token.write_text("an-unused-token")
    api = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=token)
    fronts: list[Front] = []
    with NatsServer(directory / "nats") as nats, World(api, directory=directory / "world", relays=3) as world:
        world.targets["echo"] = (echo.address, ALICE.groups)
        if front is not None:
            fronts.append(Front(lambda hello: front(world, hello)))
            world.agent_routes = [fronts[0].address] * 3
            world.client_routes = [fronts[0].address]
        elif gate >= 0:
            port = int(world.relay_listens[gate].rpartition(":")[2])
            fronts.append(Front(lambda hello: None if CONTROL in hello else port))
            world.agent_routes[gate] = fronts[0].address
            world.client_routes = [world.relay_listens[gate]]
        world.start_issuer()
        (directory / "nats-url").write_text(nats.url)
        for index in range(3):
            world.start_relay(index, extra=fleet_settings(world, index))
        world.start_agent(wait=False)
        try:
            yield world, nats
        finally:
            for one in fronts:
                one.close()


def fleet_settings(world: World, index: int) -> str:
    """Return the end of a relay's configuration file."""
    url = (world.directory.parent / "nats-url").read_text()
    internal = world.relay_listens[index]
    return f'[fleet]\nservers = ["{url}"]\nname = "relay-{index}"\ninternal_address = "{internal}"\n'


def of(world: World, index: int, name: str) -> float:
    return float(metrics(world.relay_observes[index]).get(f"arcbridge_relay_{name}", 0))


def registered(world: World, index: int) -> bool:
    """Whether the agent is connected to a relay, and the other relays find it there: a moment later, when that is
    counted."""
    return of(world, index, "agents") == 1 and of(world, index, "agent_connections_total") >= 1


def seen_by_administrator(world: World) -> list[str]:
    """Return the sessions that an administrator sees over HTTPS; none while the policy names no administrator."""
    return world.run_client(ALICE, "admin", "session", "list", "-o", "name").stdout.split()


def talk(port: int, words: bytes) -> bytes:
    """Echo once through a forward; return b"" when it was refused."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        return exchanged(sock, words)


def exchanged(sock: socket.socket, words: bytes) -> bytes:
    try:
        sock.sendall(words)
        got = b""
        while len(got) < len(words) and (data := sock.recv(65536)):
            got += data
        return got
    except ConnectionError:
        return b""


def test_an_agent_of_another_relay(tmp_path: Path, echo: EchoServer) -> None:
    """The agent's control connections are at relays 1 and 2; its cluster enrolled at 0, where the client comes in. Then
    NATS goes away and comes back."""
    with fleet(tmp_path, echo, gate=0) as (world, nats):
        until(lambda: registered(world, 1) and registered(world, 2), "the agent is at relays 1 and 2", timeout=60)
        assert of(world, 0, "agents") == 0
        _, port = world.start_forward("echo")
        session = socket.create_connection(("127.0.0.1", port), timeout=60)
        assert exchanged(session, b"through relay 0") == b"through relay 0"
        assert of(world, 0, 'fleet_dials_total{result="remote"}') >= 1
        assert of(world, 0, "pumps_open") == 1
        # Any relay of the fleet lists the sessions and agents of all.
        for asked in range(3):
            assert len(listed(world, asked, "cluster", "agents", 1)) == 1
            (found,) = listed(world, asked, "session", "user", ALICE.email)
            assert found["relay"] == world.agent_routes[0]
        # So do they for an administrator, who is connected to another one than the client and the agent.
        for index in range(3):
            file = world.config_of("relay", index).parent / "policy.toml"
            rewrite(file, f'{world.policy}[[admin]]\ngroups = ["platform"]\nclusters = ["*"]\nwhat = ["read"]\n')
        world.client_routes = [world.relay_listens[2]]
        until(lambda: seen_by_administrator(world) == [found["session"]], "relay 2 lists the session at relay 0")
        world.client_routes = [world.relay_listens[0]]
        # NATS is gone: the relay serves its own agents and refuses what needs NATS.
        nats.stop()
        until(lambda: not any(of(world, n, "fleet_connected") for n in range(3)), "the relays have noticed")
        assert exchanged(session, b"still there") == b"still there"
        assert talk(port, b"a new stream of the session") == b"a new stream of the session"
        world.client_routes = [world.relay_listens[1]]
        _, beside = world.start_forward("echo")
        assert talk(beside, b"the agent is at the same relay") == b"the agent is at the same relay"
        world.client_routes = [world.relay_listens[0]]
        refused = world.run_client(ALICE, "forward", "echo", "--listen", "127.0.0.1:0")
        assert refused.returncode == ExitCode.UNREACHABLE, refused.stderr
        assert of(world, 0, 'fleet_dials_total{result="unavailable"}') >= 1
        for index in range(3):
            assert metrics(world.relay_observes[index])["arcbridge_relay_ready"] == 1
        nats.start()
        until(lambda: all(of(world, n, "fleet_connected") == 1 for n in range(3)), "the relays are back", timeout=30)
        _, again = world.start_forward("echo")
        assert talk(again, b"as before") == b"as before"
        assert exchanged(session, b"all the time") == b"all the time"
        # A relay that does not hold the session has it ended.
        command(world, 2, "session", "end", str(found["session"]))
        session.settimeout(30)
        with contextlib.suppress(ConnectionError):
            assert session.recv(1) == b""
        session.close()


def test_revoking_at_one_of_two_relays_that_share_nothing(tmp_path: Path, echo: EchoServer) -> None:
    """docs/threats.md#V3: without NATS each relay has a registry of its own. The agent, which is connected to both,
    ends sessions through either, and refuses the tokens of those who come through the other."""
    (tmp_path / "unused-token").write_text("an-unused-token")
    api = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=tmp_path / "unused-token")
    with World(api, directory=tmp_path / "world", relays=2) as world:
        world.targets["echo"] = (echo.address, (*ALICE.groups, *BOB.groups))
        world.start()
        until(lambda: registered(world, 0) and registered(world, 1), "the agent is at both", timeout=60)

        def session(user: User) -> socket.socket:
            _, port = world.start_forward("echo", user)
            sock = socket.create_connection(("127.0.0.1", port), timeout=60)
            assert exchanged(sock, b"through relay 0") == b"through relay 0"
            return sock

        world.client_routes = [world.relay_listens[0]]
        with session(ALICE) as alice, session(BOB) as bob:
            assert of(world, 0, "pumps_open") == 2
            command(world, 1, "user", "revoke", ALICE.email, "--before", "2099-01-01")
            alice.settimeout(30)
            with contextlib.suppress(ConnectionError):
                assert alice.recv(1) == b""
            assert exchanged(bob, b"bob goes on") == b"bob goes on"
            refused = world.run_client(ALICE, "forward", "echo", "--listen", "127.0.0.1:0")
            assert refused.returncode == ExitCode.DENIED, refused.stderr
            # Relay 0 knows of nothing: the agent has refused.
            assert of(world, 0, "users_revoked") == 0
            assert command(world, 0, "user", "list", "-o", "name") == ""
            command(world, 1, "user", "restore", ALICE.email)
            until(
                lambda: metrics(world.agent_observe)["arcbridge_agent_revocations"] == 0, "relay 1 has told the agent"
            )
            with session(ALICE):
                pass


def test_one_address_for_all(tmp_path: Path, echo: EchoServer) -> None:
    """docs/threats.md#J20: the agent's join comes out at another relay than the one that waits, and is passed on
    once.
    """
    joins = itertools.count()

    def choose(world: World, hello: bytes) -> int | None:
        ports = [int(listen.rpartition(":")[2]) for listen in world.relay_listens]
        if JOIN in hello:
            return ports[next(joins) % 3]
        return ports[2] if CONTROL in hello else ports[0]

    with fleet(tmp_path, echo, front=choose) as (world, nats):
        until(lambda: registered(world, 2), "the agent is at relay 2", timeout=60)
        sessions = []
        for _ in range(4):
            _, port = world.start_forward("echo")
            session = socket.create_connection(("127.0.0.1", port), timeout=60)
            words = b"x" * 3_000_000
            sender = threading.Thread(target=session.sendall, args=(words,))
            sender.start()
            got = b""
            while len(got) < len(words) and (data := session.recv(65536)):
                got += data
            sender.join()
            assert got == words
            sessions.append(session)
        hops = [of(world, n, 'hops_total{result="joined"}') for n in range(3)]
        assert sum(hops) == 4, hops
        # Two pumps a session: where the client came in, and where the agent did.
        assert sum(of(world, n, "pumps_open") for n in range(3)) == 8
        nats.stop()
        for session in sessions:
            assert exchanged(session, b"still there") == b"still there"
            session.close()


def test_relays_of_the_agent_go_away(tmp_path: Path, echo: EchoServer) -> None:
    """docs/threats.md#F8, #F4: one of the agent's two relays drains, then the other dies, while clients keep coming
    in at the third.
    """
    with fleet(tmp_path, echo, gate=0) as (world, _):
        until(lambda: registered(world, 1) and registered(world, 2), "the agent is at two relays", timeout=60)
        stopped = threading.Event()
        clients: list[bytes] = []

        def come() -> None:
            while True:
                last = stopped.is_set()
                process, port = world.start_forward("echo")
                clients.append(talk(port, b"words"))
                process.stop()
                if last:
                    return

        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(come)
            try:
                until(lambda: clients or coming.done(), "the first client was served", timeout=60)
                status, _ = world.stop_relay(1)
            finally:
                stopped.set()
            coming.result()  # raises what became of a client that was not served
        assert status == 0
        assert clients == [b"words"] * len(clients)
        assert len(clients) >= 2
        # A relay that dies tells no other; NATS learns it from the connection, so the refusal comes at once.
        world.kill_relay(2)
        refused = world.run_client(ALICE, "forward", "echo", "--listen", "127.0.0.1:0")
        assert refused.returncode == ExitCode.UNREACHABLE
        assert of(world, 0, 'fleet_dials_total{result="no_agent"}') >= 1
        world.start_relay(2, extra=fleet_settings(world, 2))
        until(lambda: registered(world, 2), "the agent is back", timeout=60)
        _, port = world.start_forward("echo")
        assert talk(port, b"again") == b"again"


def command(world: World, index: int, *arguments: str, status: int = 0) -> str:
    """Run an operator's command at a relay, which must end with `status`; return its output."""
    argv = arcbridge("--role", "relay", *arguments, "--config", str(world.config_of("relay", index)))
    done = run(argv, check=False, timeout=60)
    assert done.returncode == status, done.stderr
    return (done.stdout + done.stderr).decode()


def listed(world: World, index: int, what: str, column: str, value: object) -> list[dict[str, object]]:
    """The rows of an operator's list at a relay, once one of them has this value: what another relay of the fleet has
    not answered within half a second is missing from it."""

    def look() -> list[dict[str, object]]:
        rows = json.loads(command(world, index, what, "list", "-o", "json"))
        return rows if any(row[column] == value for row in rows) else []

    return until(look, f"relay {index} lists {column} {value!r}", timeout=30)


def connections(world: World) -> float:
    """Control connections at all three relays."""
    return sum(of(world, n, "agents") or 0 for n in range(3))


def test_commands_work_on_the_registry_of_the_fleet(tmp_path: Path, echo: EchoServer) -> None:
    """A cluster is listed, revoked and restored at different relays: all of them know."""
    with fleet(tmp_path, echo) as (world, nats):
        until(lambda: connections(world) == 2, "the agent is at two relays", timeout=60)
        assert not list(tmp_path.rglob("registry.db"))
        assert world.cluster in command(world, 2, "cluster", "list")
        command(world, 1, "cluster", "revoke", world.cluster)
        until(lambda: connections(world) == 0, "the agent is cut off", timeout=30)
        command(world, 2, "cluster", "restore", world.cluster)
        # An agent that was told that it is revoked takes its time.
        world.agent.kill()
        world.start_agent(wait=False)
        until(lambda: connections(world) == 2, "the agent is back", timeout=60)
        command(world, 2, "user", "revoke", ALICE.email, "--before", "2099-01-01")
        until(lambda: all(of(world, n, "users_revoked") == 1 for n in range(3)), "all relays refuse her")
        nats.stop()
        for words in (("token", "list"), ("user", "restore", ALICE.email)):
            (line,) = command(world, 0, *words, status=ExitCode.FAILURE).splitlines()
            assert line.startswith("error: the fleet's registry does not answer: NATS cannot be reached")
        refused = world.run_client(ALICE, "forward", "echo", "--listen", "127.0.0.1:0")
        assert refused.returncode == ExitCode.DENIED, refused.stderr
        # The doctor repeats what the relay found last: it looks when NATS goes, and not a minute later.
        world.relay.wait_for_line('"check":"fleet","code":"fleet"', timeout=30)
        found = command(world, 0, "doctor", "-o", "json", status=ExitCode.FAILURE)
        assert "fleet" in [hop["code"] for hop in json.loads(found)["hops"]]
