"""The background process: answers the commands of its user about the clusters that it serves (`clusters`).

One process per user, which holds a lock for as long as it lives. It prints nothing and asks no question: a login, and
the question whether a pin is right, belong to the command at the terminal. It ends with the last cluster, or when it is
told to. A control socket that is taken out of its directory is made anew: the lock, which is elsewhere, says that this
process is the one. Where the lock's file was removed too, the process that locks the new file is the one.

Invariant: a peer of another user is refused before a byte of it is read.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from arcbridge import __version__
from arcbridge.client.background import handover
from arcbridge.client.background.caller import PROTOCOL, peer_user_id, request
from arcbridge.client.background.clusters import Leaving, ServedClusters
from arcbridge.client.background.connection_settings import ConnectionSettings, read_words
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.kubeconfig.private import sweep
from arcbridge.errors import ArcbridgeError, ConfigError, ExitCode, StateError, Unreachable
from arcbridge.pki.private_files import try_lock

REQUEST_LIMIT = 256 * 1024

_NOTHING = (0, 0)
"""Device and inode of no file."""

log = structlog.get_logger("arcbridge.client")


class Timing(NamedTuple):
    """Seconds."""

    idle_end: float = 10.0
    """Without a cluster and without a request: then a process ends that never served, or no more does."""
    take_over_wait: float = 15.0
    """In which a process that ends has given the lock back."""
    socket_check: float = 2.0
    """Between two looks whether the control socket is where callers look for it; less than `take_over_wait`, in which a
    process that finds the lock held waits for an answer."""
    sweep_interval: float = 3600.0
    """Between two looks for what commands of `run` have left that were killed."""


DEFAULT = Timing()


class BackgroundProcess:
    """`run` serves until the last cluster is disconnected, `stop` is asked for, or it is cancelled."""

    def __init__(self, place: BackgroundPaths, environment: Mapping[str, str], timing: Timing = DEFAULT) -> None:
        self._place = place
        self._timing = timing
        self._environment = environment
        self._clusters = ServedClusters(Path(place.connections), environment)
        self._control: socket.socket | None = None
        self._inode = _NOTHING
        """Device and inode of the control socket in its directory."""
        self._lock = -1
        self._leashes: list[socket.socket] = []
        self._former: list[socket.socket] = []
        """Connections to processes whose place this one took, and that have streams left."""
        self._tasks: set[asyncio.Task[None]] = set()
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
            self._inode = _inode(self._place.socket)
            await self._clusters.restore(inherited)
            asyncio.get_running_loop().add_reader(self._control, self._accept)
            log.info(
                "background process serves", pid=os.getpid(), version=__version__, clusters=len(self._clusters.served)
            )
            ready()
            self._look_whether_idle()
            looks = [asyncio.create_task(self._keep_socket()), asyncio.create_task(self._keep_swept())]
            try:
                await self._over.wait()
            finally:
                for look in looks:
                    look.cancel()
            if self._handed_over:
                await self._drain()
        finally:
            await self._end()

    def _finish(self) -> None:
        """End: from now on requests are for the next process."""
        self._clusters.leaving = True
        self._over.set()

    async def _keep_socket(self) -> None:
        """Listen anew where the control socket, or its directory, was removed: cleaners of /tmp do that.

        Where the state directory was removed, with the file of the lock, another process may have taken the new one.
        """
        told = False
        while True:
            await asyncio.sleep(self._timing.socket_check)
            if self._over.is_set():
                return
            if self._has_the_socket() and self._has_the_lock():
                continue
            async with self._clusters.changing:
                if self._over.is_set() or self._control is None:
                    return
                try:
                    self._place.make()
                    if not self._has_the_lock() and not self._lock_anew():
                        log.warning(
                            "background process gives way",
                            reason="the state directory was removed, and another one has begun",
                        )
                        self._finish()
                        return
                    if self._has_the_socket():
                        continue
                    control = _listen(self._place.socket)
                except (StateError, OSError) as error:
                    if not told:
                        log.warning("control socket not made anew", reason=str(error))
                    told = True
                    continue
                loop = asyncio.get_running_loop()
                loop.remove_reader(self._control)
                self._control.close()
                self._control, self._inode, told = control, _inode(self._place.socket), False
                loop.add_reader(self._control, self._accept)
            log.warning("control socket made anew", path=self._place.socket)

    def _has_the_socket(self) -> bool:
        """Return whether callers find the socket on which this process listens."""
        return _inode(self._place.socket) == self._inode != _NOTHING

    def _has_the_lock(self) -> bool:
        """Return whether the file that the next process locks is the one that this process has locked."""
        status = os.fstat(self._lock)
        return (status.st_dev, status.st_ino) == _inode(self._place.process_lock)

    def _lock_anew(self) -> bool:
        """Lock the file that is at the lock's path now; False where another process has it. Raises StateError."""
        lock = try_lock(Path(self._place.process_lock))
        if lock is None:
            return False
        os.close(self._lock)
        self._lock = lock
        return True

    async def _keep_swept(self) -> None:
        while True:
            await asyncio.to_thread(sweep, self._environment)
            await asyncio.sleep(self._timing.sweep_interval)

    async def _begin(self) -> dict[ConnectionSettings, list[socket.socket]]:
        """Get the lock and the control socket: fresh ones, or those of a process of another version.

        Returns the listening sockets that came along, by the settings of what they serve.
        """
        deadline = time.monotonic() + self._timing.take_over_wait
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
            await asyncio.sleep(0.05)  # the process that has the lock is about to end, or to listen

    def _is_served(self) -> bool:
        """Return whether a process of this version answers."""
        try:
            with _connected(self._place.socket) as sock:
                sock.sendall(request("version"))
                answer = json.loads(handover.read_line(sock))
                return "error" not in answer
        except (OSError, StateError, ValueError):
            return False

    def _take_over(self) -> dict[ConnectionSettings, list[socket.socket]] | None:
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
        except (OSError, StateError) as error:
            sock.close()
            log.warning("former background process did not hand over", reason=str(error))
            return None
        self._control = socket.socket(fileno=given.control)
        self._control.setblocking(False)
        self._lock = given.lock
        sock.setblocking(False)
        self._former = [sock, *(socket.socket(fileno=descriptor) for descriptor in given.leashes)]
        inherited: dict[ConnectionSettings, list[socket.socket]] = {}
        for about, descriptors in given.clusters:
            sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
            for one in sockets:
                one.setblocking(False)
            # By settings, because the arguments name one of perhaps several contexts, and not the first to be restored.
            try:
                inherited[read_words(about["arguments"]).without_context()] = sockets
            except ConfigError:  # flags that this version does not have: its context says what to do
                for one in sockets:
                    one.close()
        log.info("took the place of another version", clusters=len(inherited))
        return inherited

    async def _drain(self) -> None:
        """After another process took the place: serve what runs, and end with the last connection."""
        log.info("another version took the place of this process", streams=self._open_connections())
        while (self._open_connections() or self._busy) and not await self._told_to_end():
            for served in list(self._clusters.served.values()):
                if served.cluster.endpoint is not None and not served.cluster.endpoint.busy:
                    await self._clusters.close(served)
        log.info("former version has ended its last stream")

    async def _told_to_end(self) -> bool:
        """Wait for a moment; return whether the next process says that this one is to end."""
        for leash in list(self._leashes):
            try:
                said = leash.recv(64)
            except BlockingIOError:
                continue
            except OSError:
                said = b""
            if said:
                return True
            self._leashes.remove(leash)  # the next process has ended, so its word is not waited for any more
        await asyncio.sleep(0.2)
        return False

    def _open_connections(self) -> int:
        endpoints = [served.cluster.endpoint for served in self._clusters.served.values()]
        return sum(endpoint.busy for endpoint in endpoints if endpoint is not None)

    async def _end(self) -> None:
        self._clusters.leaving = True
        loop = asyncio.get_running_loop()
        if self._idle is not None:
            self._idle.cancel()
        if self._control is not None and not self._handed_over:
            loop.remove_reader(self._control)
            self._control.close()
            if _inode(self._place.socket) == self._inode:
                Path(self._place.socket).unlink(missing_ok=True)
            for former in self._former:
                try:
                    former.send(handover.END)
                except OSError:
                    pass  # the former process has ended by itself
        async with self._clusters.changing:  # waits for a connect that is writing the kubeconfig
            statics = [one for served in self._clusters.served.values() for one in served.connections if one.static]
            statics += [one for one in self._clusters.failed if one.static]
            await self._clusters.close_all()
        # Where another process has the lock by now the entries are that one's.
        if not self._handed_over and self._has_the_lock():
            await self._clusters.make_plugins(statics)
        # Only now, because the tasks answer callers that are still there.
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        # The next process may take the lock at once, and what was being proved here has ports that it wants.
        await self._clusters.wait_closed()
        if self._lock >= 0:
            os.close(self._lock)
        log.info("background process ends")

    def _look_whether_idle(self) -> None:
        """End after a while in which nothing is served and nothing asked."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._clusters.is_empty and not self._busy and not self._over.is_set():
            self._idle = asyncio.get_running_loop().call_later(self._timing.idle_end, self._finish)

    # -- requests ---------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._control is not None
        while True:
            try:
                sock, _ = self._control.accept()
            except OSError:
                return  # no caller waits, or no descriptor is left, in which case the socket stays readable
            if (user := peer_user_id(sock)) not in (None, os.geteuid()):
                log.warning("program of another user refused", user=user)
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
        """Return the answer to a request, and whether the connection is kept."""
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
        if self._handed_over:
            return b"", False  # as a process that has ended would: the caller then asks the next one
        if operation == "stop":
            self._finish()
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
        except Leaving:
            return b"", False
        except ArcbridgeError as error:
            if self._clusters.leaving:
                return b"", False  # perhaps it failed because this process ends: the next one is asked
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
        async with self._clusters.changing:
            if self._over.is_set():
                return _error(Unreachable("this process is ending")), False
            loop.remove_reader(self._control)
            listening = []
            clusters = []
            for served in self._clusters.served.values():
                assert served.cluster.endpoint is not None
                sockets = served.cluster.endpoint.release()
                listening.append((served, sockets))
                about = {"arguments": list(served.connections[0].settings.words())}
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
            self._finish()
        return b"", True

    # -- what is asked ----------------------------------------------------------------------------------------------

    async def _credential(self, arguments: tuple[str, ...], server: str) -> dict[str, Any]:
        return await self._clusters.credential(read_words(arguments), server)

    async def _connect(self, arguments: tuple[str, ...], asked: Mapping[str, Any]) -> dict[str, Any]:
        files = tuple(str(asked.get("kubeconfig", "")).split("\n"))
        return await self._clusters.connect(
            read_words(arguments), files, static=bool(asked.get("static")), switch=bool(asked.get("switch"))
        )

    async def _disconnect(self, names: tuple[str, ...], *, every: bool) -> dict[str, Any]:
        """Take clusters off and, with the last one, this process."""
        answer = await self._clusters.disconnect(names, every=every)
        if self._clusters.is_empty:
            self._finish()
        return answer

    async def _status(self) -> dict[str, Any]:
        return {
            "process": {
                "pid": os.getpid(),
                "version": __version__,
                "since": self._since,
                "former_versions": sum(_is_open(former) for former in self._former),
            },
            "clusters": self._clusters.describe(),
        }


async def run_background(
    place: BackgroundPaths, environment: Mapping[str, str], *, ready: Callable[[], None], timing: Timing = DEFAULT
) -> None:
    """Be the background process; raises ArcbridgeError."""
    await BackgroundProcess(place, environment, timing).run(ready)


def _listen(path: str) -> socket.socket:
    """Open the control socket, 0600, in the place of what a process that was killed left there. The lock is held."""
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


def _inode(path: str) -> tuple[int, int]:
    """Return device and inode of what is at a path; zeros where nothing is."""
    try:
        status = os.lstat(path)
    except OSError:
        return _NOTHING
    return status.st_dev, status.st_ino


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
