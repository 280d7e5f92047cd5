"""The background process: serves any number of clusters on local ports, and answers the commands of its user.

One process per user, which holds a lock for as long as it lives. Clusters are added and removed while it runs; what is
connected is kept, and served again by the next one. It prints nothing and asks no question: a login, and the question
whether a pin is right, belong to the command at the terminal. It ends with the last cluster, or when it is told to.

Invariant: a peer of another user is refused before a byte of it is read.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from arcbridge import __version__
from arcbridge.client.background import handover
from arcbridge.client.background.caller import PROTOCOL, peer_user_id, request
from arcbridge.client.background.connections import Connection, Connections
from arcbridge.client.background.exec_credential import exec_credential
from arcbridge.client.background.place import Place
from arcbridge.client.background.removal import SettingsOf, choose, remove_connection
from arcbridge.client.kubeconfig import Kubeconfig
from arcbridge.client.kubeconfig_repair import running_of
from arcbridge.client.running import BACKGROUND
from arcbridge.client.served_cluster import ServedCluster
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.errors import ArcbridgeError, ConfigError, ExitCode, StateError, Unreachable
from arcbridge.pki.private_files import try_lock

REQUEST_LIMIT = 256 * 1024
SESSION_WAIT = 25.0
"""Seconds that a caller waits for a session: kubectl's user sees nothing meanwhile."""
IDLE_END = 10.0
"""Seconds without a cluster and without a request after which a process ends that never served, or no more does."""
TAKE_OVER_WAIT = 15.0
"""Seconds in which a process that ends has given the lock back."""

log = structlog.get_logger("arcbridge.client")


class _Served:
    """A cluster, and the contexts for which it is served."""

    def __init__(self, cluster: ServedCluster, since: float) -> None:
        self.cluster = cluster
        self.connections: list[Connection] = []
        self.since = since
        self.moved = False
        """Whether the port is another one than the kubeconfig may say."""
        self.task: asyncio.Task[None] | None = None


class BackgroundProcess:
    """`run` serves until the last cluster is disconnected, `stop` is asked for, or it is cancelled."""

    def __init__(self, place: Place, settings_of: SettingsOf, environment: Mapping[str, str]) -> None:
        self._place = place
        self._settings_of = settings_of
        self._environment = environment
        self._connections = Connections(Path(place.connections))
        self._served: dict[tuple[str, ...], _Served] = {}
        """By settings: what is connected with others has a port of its own."""
        self._failed: dict[Connection, str] = {}
        """Connections that were kept and could not be served again, and why."""
        self._control: socket.socket | None = None
        self._lock = -1
        self._leashes: list[socket.socket] = []
        self._former: list[socket.socket] = []
        """Connections to processes whose place this one took, and that have streams left."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()
        self._over = asyncio.Event()
        self._handed_over = False
        self._busy = 0
        self._idle: asyncio.TimerHandle | None = None
        self._since = time.time()

    # -- the life of the process ------------------------------------------------------------------------------------

    async def run(self, ready: Callable[[], None]) -> None:
        """Serve; `ready` is called when requests are answered, or when another process answers them already."""
        self._place.make()
        inherited = await self._begin()
        if self._control is None:
            log.info("another background process serves")
            ready()
            return
        try:
            await self._restore(inherited)
            asyncio.get_running_loop().add_reader(self._control, self._accept)
            log.info("background process serves", pid=os.getpid(), version=__version__, clusters=len(self._served))
            ready()
            self._look_whether_idle()
            await self._over.wait()
            if self._handed_over:
                await self._drain()
        finally:
            await self._end()

    async def _begin(self) -> dict[tuple[str, ...], list[socket.socket]]:
        """Get the lock and the control socket: fresh ones, or those of a process of another version.

        Returns the listening sockets that came along, by the arguments of their connections.
        """
        deadline = time.monotonic() + TAKE_OVER_WAIT
        while True:
            lock = try_lock(Path(self._place.process_lock))
            if lock is not None:
                self._lock = lock
                self._control = _listen(self._place.socket)
                return {}
            taken = await asyncio.to_thread(self._take_over)
            if taken is not None:
                return taken
            if self._control is None and await asyncio.to_thread(self._is_served):
                return {}
            if time.monotonic() > deadline:
                raise StateError("a background process holds the lock and does not answer; see `arcbridge logs`")
            await asyncio.sleep(0.05)  # it is about to end, or to listen

    def _is_served(self) -> bool:
        """Whether a process of this version answers."""
        try:
            with _connected(self._place.socket) as sock:
                sock.sendall(request("version"))
                answer = json.loads(handover.read_line(sock))
                return "error" not in answer
        except (OSError, StateError, ValueError):
            return False

    def _take_over(self) -> dict[tuple[str, ...], list[socket.socket]] | None:
        """Take the place of a process of another version; None where there is none that hands over."""
        if self._is_served():
            return None
        try:
            sock = _connected(self._place.socket)
        except OSError:
            return None
        try:
            sock.sendall(request("hand-over"))
            given = handover.receive(sock)
            sock.sendall(handover.TAKEN)
        except (OSError, StateError) as error:
            sock.close()
            log.warning("the former background process did not hand over", reason=str(error))
            return None
        self._control = socket.socket(fileno=given.control)
        self._control.setblocking(False)
        self._lock = given.lock
        sock.setblocking(False)
        self._former = [sock, *(socket.socket(fileno=descriptor) for descriptor in given.leashes)]
        inherited: dict[tuple[str, ...], list[socket.socket]] = {}
        for about, descriptors in given.clusters:
            sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
            for one in sockets:
                one.setblocking(False)
            inherited[tuple(about["arguments"])] = sockets
        log.info("took the place of another version", clusters=len(inherited))
        return inherited

    async def _restore(self, inherited: dict[tuple[str, ...], list[socket.socket]]) -> None:
        """Serve what was connected; what cannot be served now is told by `status`, and tried when it is asked for."""
        try:
            kept = self._connections.all()
        except StateError as error:
            log.warning("what was connected is not known", reason=error.message)
            kept = []
        for connection in kept:
            try:
                await self._add(connection, inherited.pop(connection.arguments, None))
            except ArcbridgeError as error:
                self._failed[connection] = error.message
                log.warning("a cluster is not served", cluster=connection.cluster, reason=error.message)
        for sockets in inherited.values():
            for sock in sockets:
                sock.close()

    async def _drain(self) -> None:
        """After another process took the place: serve what runs, and end with the last connection."""
        log.info("another version took the place of this process", streams=self._open_connections())
        while (self._open_connections() or self._busy) and not await self._told_to_end():
            for served in list(self._served.values()):
                if served.cluster.endpoint is not None and not served.cluster.endpoint.busy:
                    await self._close(served)
        log.info("the last stream of a former version has ended")

    async def _told_to_end(self) -> bool:
        """Wait for a moment; whether the next process says that this one is to end."""
        for leash in list(self._leashes):
            try:
                said = leash.recv(64)
            except BlockingIOError:
                continue
            except OSError:
                said = b""
            if said:
                return True
            self._leashes.remove(leash)  # the next one has ended; this one goes on by itself
        await asyncio.sleep(0.2)
        return False

    def _open_connections(self) -> int:
        endpoints = [served.cluster.endpoint for served in self._served.values()]
        return sum(endpoint.busy for endpoint in endpoints if endpoint is not None)

    async def _end(self) -> None:
        loop = asyncio.get_running_loop()
        if self._idle is not None:
            self._idle.cancel()
        if self._control is not None and not self._handed_over:
            loop.remove_reader(self._control)
            self._control.close()
            Path(self._place.socket).unlink(missing_ok=True)
            for former in self._former:
                try:
                    former.send(handover.END)
                except OSError:
                    pass  # it has ended
        statics = [one for served in self._served.values() for one in served.connections if one.static]
        await asyncio.gather(*(self._close(served) for served in list(self._served.values())))
        if not self._handed_over:
            for connection in statics:
                # From now on the plugin starts the process for whom it can.
                await asyncio.to_thread(_make_plugins, connection)
        # What answers callers that are still there; a listening socket that is closed answers none.
        for task in self._tasks:
            task.cancel()
        if self._lock >= 0:
            os.close(self._lock)
        log.info("background process ends")

    async def _close(self, served: _Served) -> None:
        for key, one in list(self._served.items()):
            if one is served:
                del self._served[key]
        if served.task is not None:
            served.task.cancel()
            await asyncio.wait([served.task])
        await served.cluster.close()

    def _look_whether_idle(self) -> None:
        """End after a while in which nothing is served and nothing asked."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if not self._served and not self._failed and not self._busy and not self._over.is_set():
            self._idle = asyncio.get_running_loop().call_later(IDLE_END, self._over.set)

    # -- requests ---------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._control is not None
        while True:
            try:
                sock, _ = self._control.accept()
            except OSError:
                return  # none waits, or no descriptor is left: it stays readable
            if (user := peer_user_id(sock)) not in (None, os.geteuid()):
                log.warning("a program of another user was refused", user=user)
                sock.close()
                continue
            sock.setblocking(False)
            task = asyncio.get_running_loop().create_task(self._serve(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: socket.socket) -> None:
        """Answer one request."""
        loop = asyncio.get_running_loop()
        self._busy += 1
        kept = False
        try:
            line = await self._read_request(sock)
            if line:
                answer, kept = await self._answer(line, sock)
                if answer:
                    await loop.sock_sendall(sock, answer)
        except (OSError, TimeoutError):
            pass  # the caller has gone
        finally:
            self._busy -= 1
            if not kept:
                sock.close()
            self._look_whether_idle()

    async def _read_request(self, sock: socket.socket) -> bytes:
        loop = asyncio.get_running_loop()
        line = bytearray()
        async with asyncio.timeout(10):
            while not line.endswith(b"\n"):
                received = await loop.sock_recv(sock, 65536)
                line += received
                if not received or len(line) > REQUEST_LIMIT:
                    return b""
        return bytes(line)

    async def _answer(self, line: bytes, sock: socket.socket) -> tuple[bytes, bool]:
        """The answer to a request; and whether the connection is kept."""
        try:
            asked = json.loads(line)
            operation, version = str(asked["operation"]), str(asked["version"])
            arguments = tuple(map(str, asked["arguments"]))
            if asked.get("protocol") != PROTOCOL and operation != "hand-over":
                version = ""
        except (ValueError, KeyError, TypeError):
            return _error(ConfigError("the request is not one of this protocol")), False
        if operation == "hand-over":
            return await self._hand_over(sock)
        if operation == "stop":
            self._over.set()
            return _line({"stopped": True}), False
        if version != __version__:
            return _line(
                {"error": "this process is of another version", "code": "version", "version": __version__}
            ), False
        handlers: dict[str, Callable[[], Coroutine[Any, Any, dict[str, Any]]]] = {
            "version": self._version,
            "status": self._status,
            "credential": partial(self._credential, arguments, str(asked.get("server", ""))),
            "connect": partial(self._connect, arguments, asked),
            "disconnect": partial(self._disconnect, arguments, every=bool(asked.get("every"))),
        }
        handler = handlers.get(operation)
        if handler is None:
            return _error(ConfigError(f"the request {operation[:32]!r} is not known")), False
        try:
            return _line(await handler()), False
        except ArcbridgeError as error:
            return _error(error), False
        except Exception as error:  # a defect of ours: the caller must not wait, and the log has the trace
            log.exception("a request failed", operation=operation)
            return _error(StateError(f"internal error ({type(error).__name__}); see `arcbridge logs`")), False

    async def _version(self) -> dict[str, Any]:
        return {"version": __version__, "pid": os.getpid()}

    async def _hand_over(self, sock: socket.socket) -> tuple[bytes, bool]:
        """Give what this process listens on to the one that asks."""
        if self._over.is_set() or self._control is None:
            return _error(Unreachable("this process is ending")), False
        loop = asyncio.get_running_loop()
        async with self._changing:
            loop.remove_reader(self._control)
            listening = []
            clusters = []
            for served in self._served.values():
                assert served.cluster.endpoint is not None
                sockets = served.cluster.endpoint.release()
                listening.append((served, sockets))
                about = {"arguments": list(served.connections[0].arguments)}
                clusters.append((about, [one.fileno() for one in sockets]))
            given = handover.Inheritance(
                self._control.fileno(), self._lock, clusters, [former.fileno() for former in self._former]
            )
            try:
                await asyncio.to_thread(handover.send, sock, given)
            except (OSError, StateError) as error:
                log.warning("no other process took over", reason=str(error))
                for served, sockets in listening:
                    assert served.cluster.endpoint is not None
                    served.cluster.endpoint.accept_again(sockets)
                loop.add_reader(self._control, self._accept)
                return b"", False
            for _, sockets in listening:
                for one in sockets:
                    one.close()
            self._control.close()
            for former in self._former:
                former.close()
            self._former = []
            os.close(self._lock)
            self._lock = -1
            sock.setblocking(False)
            self._leashes.append(sock)
            self._handed_over = True
            self._over.set()
        return b"", True

    # -- clusters ---------------------------------------------------------------------------------------------------

    async def _add(self, connection: Connection, sockets: list[socket.socket] | None = None) -> _Served:
        """Serve a connection's cluster, unless it is served already; raises ArcbridgeError."""
        async with self._changing:
            if (served := self._of(connection.arguments)) is None:
                config = self._settings_of(connection.arguments)
                context = ClientContext(config, Terminal(), environment=self._environment)
                key = _settings(connection.arguments)
                if (served := self._served.get(key)) is None:
                    served = _Served(context.served(connection.cluster), time.time())
                    moved = ""
                    if sockets:
                        served.cluster.take(sockets)
                    else:
                        moved = served.cluster.bind()
                    self._served[key] = served
                    served.task = asyncio.create_task(served.cluster.session.run())
                    await served.cluster.serve()
                    if moved:
                        served.moved = True
                        log.warning("port moved", reason=moved)
            if connection not in served.connections:
                served.connections.append(connection)
                self._failed.pop(connection, None)
                if served.moved or connection.static:
                    await self._update_kubeconfig(served, connection)
            return served

    async def _update_kubeconfig(self, served: _Served, connection: Connection) -> None:
        """Let the context of a connection that was kept name the port and the process of today."""
        if not connection.kubeconfig or connection not in self._connections.all():
            return
        try:
            await asyncio.to_thread(_refresh, served.cluster, connection)
        except ArcbridgeError as error:
            log.warning("the kubeconfig was not changed", reason=error.message)

    def _of(self, arguments: tuple[str, ...]) -> _Served | None:
        for served in self._served.values():
            if any(connection.arguments == arguments for connection in served.connections):
                return served
        return None

    async def _credential(self, arguments: tuple[str, ...], server: str) -> dict[str, Any]:
        """What kubectl's plugin prints: the client certificate, once the endpoint serves and a session is up."""
        served = self._of(arguments)
        if served is None:
            config = self._settings_of(arguments)
            connection = Connection(arguments, config.cluster, config.kube_context or config.cluster)
            served = await self._add(connection)
            self._connections.add(connection)
        cluster = served.cluster
        if server and server != f"https://127.0.0.1:{cluster.port}":
            known = [one for one in served.connections if one.kubeconfig]
            what = (
                "the context says so now: run the command again"
                if known
                else f"run `arcbridge connect {cluster.cluster}` to save the context anew"
            )
            for connection in known:
                await self._update_kubeconfig(served, connection)
            raise ConfigError(
                f'cluster "{cluster.cluster}" has port {cluster.port} now, because {server} was taken by another '
                f"program; {what}"
            )
        if cluster.session.current is None:
            await self._session(served)
        return exec_credential(cluster)

    async def _session(self, served: _Served) -> None:
        """Wait for a session; raises the error of the attempt."""
        try:
            async with asyncio.timeout(SESSION_WAIT):
                await served.cluster.session.ready()
        except TimeoutError:
            raise Unreachable(
                f'cluster "{served.cluster.cluster}" did not answer within {SESSION_WAIT:.0f} s; see `arcbridge logs`'
            ) from None
        served.cluster.keep_port()

    async def _connect(self, arguments: tuple[str, ...], asked: Mapping[str, Any]) -> dict[str, Any]:
        """Serve a cluster and put its context into the kubeconfig; a failure changes nothing."""
        files = tuple(str(asked.get("kubeconfig", "")).split("\n"))
        config = self._settings_of(arguments)
        name = config.kube_context or config.cluster
        connection = Connection(arguments, config.cluster, name, files, bool(asked.get("static")))
        kubeconfig = Kubeconfig([Path(file) for file in files])
        context = ClientContext(config, Terminal(), environment=self._environment)
        await asyncio.to_thread(kubeconfig.check, name, config.cluster, context.relays.names)
        process, server = kubeconfig.served(name)
        if process not in ("", BACKGROUND) and running_of(context.state, self._environment).alive(process):
            raise ConfigError(
                f'context "{name}" belongs to a proxy in the foreground (port {server.rpartition(":")[2]}): '
                "end it with Ctrl-C, then connect"
            )
        # One context has one connection: the one of before gives way, and its port with it.
        replaced = await self._withdraw(name, files, connection)
        try:
            served = await self._add(connection)
        except BaseException:
            await self._restore_replaced(replaced)
            raise
        try:
            await self._session(served)
            context.state.add_kubeconfig([Path(file) for file in files])
            entry = _entry(served.cluster, connection)
            merged = await asyncio.to_thread(kubeconfig.merge, entry, switch=bool(asked.get("switch")))
            self._connections.add(connection)
        except BaseException:
            if connection not in self._connections.all():
                await self._withdraw(name, files, None)
                await self._restore_replaced(replaced)
            raise
        context.state.add_cluster_name(config.cluster)
        return {
            "cluster": config.cluster,
            "context": name,
            "port": served.cluster.port,
            "kubeconfig": str(merged.path),
            "current": merged.switched,
        }

    async def _withdraw(self, name: str, files: tuple[str, ...], but: Connection | None) -> list[Connection]:
        """Serve a context no more, unless by the connection `but`; returns what served it."""
        found = []
        for served in list(self._served.values()):
            for one in list(served.connections):
                if (one.context, one.kubeconfig) == (name, files) and one != but:
                    found.append(one)
                    served.connections.remove(one)
            if not served.connections:
                await self._close(served)
        return found

    async def _restore_replaced(self, replaced: Sequence[Connection]) -> None:
        for connection in replaced:
            try:
                await self._add(connection)
            except ArcbridgeError as error:
                self._failed[connection] = error.message

    async def _disconnect(self, names: tuple[str, ...], *, every: bool) -> dict[str, Any]:
        """Take clusters off: their ports, their contexts and, with the last one, this process."""
        known = [*(one for served in self._served.values() for one in served.connections), *self._failed]
        chosen = choose(known, names, every=every)
        for connection in chosen:
            await asyncio.to_thread(
                remove_connection, connection, self._connections, self._settings_of, self._environment
            )
            self._failed.pop(connection, None)
            for served in list(self._served.values()):
                if connection in served.connections:
                    served.connections.remove(connection)
                    if not served.connections:
                        await self._close(served)
        if not self._served and not self._failed:
            self._over.set()
        return {"disconnected": [{"cluster": one.cluster, "context": one.context} for one in chosen]}

    async def _status(self) -> dict[str, Any]:
        clusters = [self._describe(served) for served in self._served.values()]
        clusters += [
            {"name": one.cluster, "contexts": [one.context], "state": "failed", "reason": reason}
            for one, reason in self._failed.items()
        ]
        return {
            "process": {
                "pid": os.getpid(),
                "version": __version__,
                "since": self._since,
                "former_versions": sum(_is_open(former) for former in self._former),
            },
            "clusters": sorted(clusters, key=lambda one: str(one["name"])),
        }

    def _describe(self, served: _Served) -> dict[str, Any]:
        cluster, session = served.cluster, served.cluster.session
        endpoint = cluster.endpoint
        up, down = endpoint.moved() if endpoint is not None else (0, 0)
        state = "connected" if session.current is not None else "resuming" if session.detached_count else "waiting"
        return {
            "name": cluster.cluster,
            "contexts": [one.context for one in served.connections],
            "port": cluster.port,
            "state": state,
            "reason": session.failure.message if session.failure is not None else "",
            "user": session.subject,
            "relay": str(session.relay.address) if session.relay is not None else cluster.relays[0],
            "since": served.since,
            "connections": endpoint.stats.open if endpoint is not None else 0,
            "bytes_to_cluster": up,
            "bytes_from_cluster": down,
            "token_expires": session.token_ends_at(),
        }


async def run_background(
    place: Place, settings_of: SettingsOf, environment: Mapping[str, str], *, ready: Callable[[], None]
) -> None:
    """Be the background process; raises ArcbridgeError."""
    await BackgroundProcess(place, settings_of, environment).run(ready)


def _settings(arguments: Sequence[str]) -> tuple[str, ...]:
    """The arguments of a connection without the name of its context."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word == "--kube-context":
            next(words, None)
        else:
            kept.append(word)
    return tuple(kept)


def _entry(cluster: ServedCluster, connection: Connection) -> Any:
    return cluster.entry(
        connection.context, process=BACKGROUND, arguments=connection.arguments, plugin=not connection.static
    )


def _refresh(cluster: ServedCluster, connection: Connection) -> None:
    """Write a connection's entry anew where it is still there and ours."""
    kubeconfig = Kubeconfig([Path(file) for file in connection.kubeconfig])
    kubeconfig.refresh(_entry(cluster, connection))


def _make_plugins(connection: Connection) -> None:
    try:
        Kubeconfig([Path(file) for file in connection.kubeconfig]).repair(lambda process: process != BACKGROUND)
    except ArcbridgeError as error:
        log.warning("the kubeconfig was not changed", reason=error.message)


def _listen(path: str) -> socket.socket:
    """The control socket, 0600; what a process that was killed left there goes. The lock is held."""
    Path(path).unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        before = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise StateError(f"cannot listen at {path}: {error.strerror}") from error
    sock.setblocking(False)
    return sock


def _connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(handover.TIMEOUT)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return sock


def _is_open(sock: socket.socket) -> bool:
    try:
        return sock.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode() + b"\n"


def _error(error: ArcbridgeError) -> bytes:
    return _line(
        {"error": error.message, "exit_code": int(error.exit_code), "login": error.exit_code == ExitCode.LOGIN}
    )
