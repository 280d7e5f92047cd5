"""`forward TYPE/NAME`: local ports whose connections go to a pod behind the name, each by a `Tunnel` of its own.

A connection that comes while no pod may serve, or whose pod goes before it is open, waits for the next one: nothing of
it was sent yet. One that is open when its pod goes is reset with a reason, and the next one finds the next pod.
Invariants: no more than MAX_WAITING connections wait, each at most WAIT seconds; all end with the forward.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic
from typing import cast

import structlog

from arcbridge.client.serving.local_port import ForwardStats, LocalPort
from arcbridge.client.serving.pod_ports.pod_watch import PodWatch
from arcbridge.client.serving.pod_ports.spdy import CHUNK
from arcbridge.client.serving.pod_ports.target import LOOPBACK, PodTarget, PortPair
from arcbridge.client.serving.pod_ports.tunnel import DialRefused, LocalLost, Program, Tunnel
from arcbridge.client.serving.pod_ports.workload import NoSuchPort, Pod
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.errors import ArcbridgeError, PermissionRefused, Unreachable
from arcbridge.mux.splice import reset_transport
from arcbridge.net.backoff import Backoff
from arcbridge.net.loopback import listen_at, listen_local
from arcbridge.net.sockets import reset
from arcbridge.tasks import cancel_and_wait, in_time

WAIT = 30.0
"""Seconds that a connection waits for a pod that may serve."""
MAX_WAITING = 128
"""Connections of one forward that wait at a time; each holds two chunks of what its program has sent."""
GRACE = 1.0
"""Seconds in which the last bytes of a pod that is gone may come, before its connections are reset."""
RETRY, RETRY_CAP = 0.2, 2.0
"""Seconds between two tries of a connection at a pod that should serve and does not: at most, at first and later."""
STARTING = 10.0
"""Seconds in which a pod that has just become ready may not listen yet: without a readiness probe it is so at once."""
SETTLING = 1.0
"""Seconds for the news that a pod which does not listen any more is being ended."""
OPTION = "LOCAL:REMOTE"
"""Where another local port is given, for the error of one that is taken."""

log = structlog.get_logger("arcbridge.client")


@dataclass(eq=False)
class _ForwardedConnection:
    """One local connection."""

    task: asyncio.Task[None] | None = None
    pod: Pod | None = None
    """The pod that it has reached."""
    leaving: Pod | None = None
    """The pod that is gone, whose end it is given GRACE seconds for."""
    cut: ArcbridgeError | None = None
    """Why it is to end."""
    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once new connections go elsewhere than where its last try went."""
    backoff: Backoff = field(default_factory=lambda: Backoff(first=RETRY, cap=RETRY_CAP))

    async def pause(self) -> None:
        """Wait before the next try at a pod."""
        await in_time(self.news.wait(), self.backoff.next_delay())


class PodForward:
    """Serves one target; `run` until cancelled, `open` once `run` is under way, and `close` at the end."""

    def __init__(
        self, sessions: SessionManager, target: PodTarget, say: Callable[[str], None], *, any_user: bool = False
    ) -> None:
        """`say` shows a sentence to the user. `any_user`: programs of other users of this machine are served too."""
        self.target = target
        self.stats = ForwardStats()
        self._sessions = sessions
        self._say = say
        self._any_user = any_user
        self._watch = PodWatch(sessions, target, self._pods_changed)
        self._connections: set[_ForwardedConnection] = set()
        self._news = asyncio.Event()
        """Set, and replaced, when new connections go elsewhere."""
        self._chosen: Pod | None = None
        """The pod that they go to."""
        self._shown: str | None = None
        """Uid of the pod, or the state without one, that the user was shown last."""
        self._shown_at = 0.0
        """When that was, and a pod of this uid was chosen, in monotonic seconds."""
        self._listening: list[LocalPort] = []
        self._log = log.bind(cluster=sessions.cluster, target=str(target))

    async def run(self) -> None:
        """Follow the pods until cancelled."""
        await self._watch.run()

    async def open(self, addresses: Sequence[str]) -> None:
        """Wait until the pods are known, then serve the local ports. Raises ArcbridgeError, and then serves none."""
        await self._watch.started()
        workload = self._watch.workload
        if workload is None:
            raise ArcbridgeError(self._watch.state())
        for pair, number in [(pair, workload.number(pair.remote)) for pair in self.target.ports]:
            self._listen(pair, number, addresses)
        for port in self._listening:
            port.start()
        self._tell()

    def _listen(self, pair: PortPair, number: int, addresses: Sequence[str]) -> None:
        local = number if pair.local is None else pair.local
        taken = partial(self._taken, pair.remote)
        for address in addresses:
            own = address == LOOPBACK
            sockets = listen_local(local, option=OPTION) if own else [listen_at(address, local, option=OPTION)]
            local = int(sockets[0].getsockname()[1])
            self._listening.append(LocalPort(sockets, taken, self.stats, self._log, any_user=self._any_user))
            host = f"[{address}]" if ":" in address else address
            self._say(f"Forwarding {host}:{local} to port {pair.remote} of {self.target}")
            if not own and not ipaddress.ip_address(address).is_loopback:
                self._say(f"Every machine that reaches {host}:{local} is served, with your rights")

    async def close(self) -> None:
        """Stop accepting; what is open is reset."""
        for port in self._listening:
            port.close()
        await cancel_and_wait(*(one.task for one in self._connections if one.task is not None))

    # -- connections ------------------------------------------------------------------------------------------------

    def _taken(self, remote: str, sock: socket.socket) -> None:
        if sum(one.pod is None for one in self._connections) >= MAX_WAITING:
            self.stats.failed += 1
            self._log.warning("connection refused", reason=f"{MAX_WAITING} others wait for a pod")
            reset(sock)
            return
        connection = _ForwardedConnection()
        self._connections.add(connection)
        self.stats.open += 1
        connection.task = asyncio.get_running_loop().create_task(self._serve(connection, remote, sock))

    async def _serve(self, connection: _ForwardedConnection, remote: str, sock: socket.socket) -> None:
        """Lead a connection to a pod, and see it to its end."""
        error: ArcbridgeError | None = None
        program: Program | None = None
        in_order = False
        try:
            program = Program(*await asyncio.open_connection(sock=sock, limit=CHUNK))
            until = monotonic() + SETTLING
            while not await self._carry(connection, program, remote, until):
                await connection.pause()
            in_order = True
        except ArcbridgeError as refused:
            error = refused
        except (LocalLost, OSError):
            pass  # the program's own business
        except asyncio.CancelledError:
            if (error := connection.cut) is None:
                raise
        finally:
            self._connections.discard(connection)
            self.stats.open -= 1
            if program is None:
                reset(sock)
            elif in_order:
                program.writer.close()
            else:
                reset_transport(cast(asyncio.Transport, program.writer.transport))
            if error is not None:
                self.stats.failed += 1
                pod = connection.pod.name if connection.pod is not None else ""
                self._log.warning("connection cut", pod=pod, reason=error.message)

    async def _carry(self, connection: _ForwardedConnection, program: Program, remote: str, until: float) -> bool:
        """Carry it through one pod; return False where that does not listen (yet), and another try may help."""
        tunnel = await self._reach(connection, remote)
        try:
            await tunnel.run(program)
            return True
        except DialRefused:
            if monotonic() > max(until, self._shown_at + STARTING):
                raise
            connection.pod = None
            return False
        finally:
            tunnel.close()
            self.stats.bytes_to_cluster += tunnel.bytes_to_cluster
            self.stats.bytes_from_cluster += tunnel.bytes_from_cluster

    async def _reach(self, connection: _ForwardedConnection, remote: str) -> Tunnel:
        """Open a tunnel to the pod that may serve, or to the next one. Raises ArcbridgeError."""
        error: ArcbridgeError | None = None
        try:
            async with asyncio.timeout(WAIT):
                while True:
                    connection.news, pod, workload = self._news, self._watch.chosen, self._watch.workload
                    if pod is None or workload is None:
                        await connection.news.wait()
                        continue
                    try:
                        tunnel = await self._open(pod, workload.port_of(remote, pod))
                    except (NoSuchPort, PermissionRefused):
                        raise
                    except ArcbridgeError as refused:
                        error = refused
                        self._log.debug("pod not reached", pod=pod.name, reason=error.message)
                        await connection.pause()
                        continue
                    connection.pod = pod
                    return tunnel
        except TimeoutError:
            raise error or Unreachable(self._watch.state()) from None

    async def _open(self, pod: Pod, port: int) -> Tunnel:
        tunnel = Tunnel(await self._sessions.ready())
        try:
            await tunnel.open(self.target.namespace, pod.name, port)
        except BaseException:
            tunnel.close()
            raise
        return tunnel

    # -- pods -------------------------------------------------------------------------------------------------------

    def _pods_changed(self) -> None:
        if self._watch.chosen != self._chosen:
            self._chosen = self._watch.chosen
            news, self._news = self._news, asyncio.Event()
            news.set()
        for connection in self._connections:
            pod = connection.pod
            if pod is not None and pod is not connection.leaving and not self._watch.alive(pod):
                connection.leaving = pod
                asyncio.get_running_loop().call_later(GRACE, self._cut, connection, pod)
        if self._listening or (self._watch.starting and self._watch.failure is not None):
            self._tell()

    def _cut(self, connection: _ForwardedConnection, gone: Pod) -> None:
        """Reset a connection, unless it has found another pod meanwhile."""
        if connection.pod is gone and connection.task is not None:
            connection.cut = Unreachable(f"pod {gone.name} is gone; the next connection goes to another one")
            connection.task.cancel()

    def _tell(self) -> None:
        """Tell the user which pod new connections go to, or why there is none, where that has changed."""
        pod = self._watch.chosen
        now = pod.uid if pod is not None else self._watch.state()
        if now != self._shown:
            self._shown, self._shown_at = now, monotonic()
            waits = "connections wait" if self._listening else "it is tried again"
            self._say(f"{now}; {waits}" if pod is None else f"{self.target}: new connections go to pod {pod.name}")
