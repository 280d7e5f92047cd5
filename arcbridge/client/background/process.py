"""The background process: answers the commands of its user about the clusters that it serves (`clusters`).

One process per user, which holds a lock for as long as it lives. It prints nothing and asks no question: a login, and
the question whether a pin is right, belong to the command at the terminal. It ends with the last cluster, or when it is
told to. A control socket that is taken out of its directory is made anew: the lock, which is elsewhere, says that this
process is the one. Where the lock's file was removed too, the process that locks the new file is the one.

Invariant: a peer of another user is refused before a byte of it is read.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog

from arcbridge import __version__
from arcbridge.client.background import caller, handover, local_channel, lock_holder
from arcbridge.client.background.caller import PROTOCOL, request
from arcbridge.client.background.clusters import AskAgain, ServedClusters
from arcbridge.client.background.connection_settings import ConnectionSettings, read_words
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.client.kubeconfig.private import sweep
from arcbridge.errors import ArcbridgeError, ConfigError, ExitCode, StateError, Unreachable
from arcbridge.pki.private_files import try_lock
from arcbridge.tasks import TaskSet, cancel_and_wait

REQUEST_LIMIT = 256 * 1024
IDLE_END = 10.0
"""Seconds without a cluster and without a request: then a process ends that never served, or no more does."""
TAKE_OVER_WAIT = 15.0
"""Seconds in which a process that ends has given the lock back."""
SOCKET_CHECK = 2.0
"""Seconds between two looks whether the control socket is where callers look for it; less than `TAKE_OVER_WAIT`, in
which a process that finds the lock held waits for an answer."""
BEAT = 1.0
"""Seconds between two bytes that a caller gets while its answer is prepared; less than `caller.SILENCE`."""
LOOK_TIME = 0.05
"""Seconds after which a command has let the lock go that it took to look whether a process holds it."""
SWEEP_INTERVAL = 3600.0
"""Seconds between two looks for what commands of `run` have left that were killed."""
_NOTHING = (0, 0)
"""Device and inode of no file."""

log = structlog.get_logger("arcbridge.client")


class BackgroundProcess:
    """`run` serves until the last cluster is disconnected, `stop` is asked for, or it is cancelled; it raises
    ArcbridgeError."""

    def __init__(self, place: BackgroundPaths, environment: Mapping[str, str]) -> None:
        self._place = place
        self._environment = environment
        self._clusters = ServedClusters(Path(place.connections), environment)
        self._control: socket.socket | None = None
        self._inode = _NOTHING
        """Device and inode of the control socket in its directory."""
        self._lock = -1
        self._leashes: list[socket.socket] = []
        self._former: list[socket.socket] = []
        """Connections to processes whose place this one took, and that have streams left."""
        self._tasks = TaskSet()
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
            self._forget_silence()
            await self._clusters.restore(inherited)
            asyncio.get_running_loop().add_reader(self._control, self._accept)
            log.info(
                "background process serves", pid=os.getpid(), version=__version__, clusters=len(self._clusters.served)
            )
            ready()
            self._look_whether_idle()
            work = (self._keep_socket(), self._keep_swept(), self._clusters.keep_retrying())
            looks = [asyncio.create_task(one) for one in work]
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
            self._forget_silence()
            await asyncio.sleep(SOCKET_CHECK)
            if self._over.is_set():
                return
            if self._has_the_socket() and self._has_the_lock():
                continue
            async with self._clusters.changing:
                if self._over.is_set() or self._control is None:
                    return
                try:
                    self._place.make()
                    if not self._has_the_lock() and not await self._lock_anew():
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

    def _forget_silence(self) -> None:
        """Remove the mark of callers that got no answer before this process went on."""
        with contextlib.suppress(OSError):
            os.unlink(self._place.silent)

    def _has_the_socket(self) -> bool:
        """Return whether callers find the socket on which this process listens."""
        return _inode(self._place.socket) == self._inode != _NOTHING

    def _has_the_lock(self) -> bool:
        """Return whether the file that the next process locks is the one that this process has locked."""
        status = os.fstat(self._lock)
        return (status.st_dev, status.st_ino) == _inode(self._place.process_lock)

    async def _lock_anew(self) -> bool:
        """Lock the file that is at the lock's path now; False where another process has it. Raises StateError."""
        lock = try_lock(Path(self._place.process_lock))
        if lock is None:
            await asyncio.sleep(LOOK_TIME)
            lock = try_lock(Path(self._place.process_lock))
        if lock is None:
            return False
        os.close(self._lock)
        self._hold(lock)
        return True

    def _hold(self, lock: int) -> None:
        self._lock = lock
        lock_holder.sign(lock)

    async def _keep_swept(self) -> None:
        while True:
            await asyncio.to_thread(sweep, self._environment)
            await asyncio.sleep(SWEEP_INTERVAL)

    async def _begin(self) -> dict[ConnectionSettings, list[socket.socket]]:
        """Get the lock and the control socket: fresh ones, or those of a process of another version.

        Returns the listening sockets that came along, by the settings of what they serve.
        """
        deadline = time.monotonic() + TAKE_OVER_WAIT
        while True:
            lock = try_lock(Path(self._place.process_lock))
            if lock is not None:
                self._hold(lock)
                self._control = _listen(self._place.socket)
                return {}
            taken = await asyncio.to_thread(self._take_over)
            if taken is not None:
                return taken
            if self._control is None and await asyncio.to_thread(self._is_served):
                return {}
            if time.monotonic() > deadline:
                raise StateError(f"{lock_holder.silence(self._place)}; `arcbridge stop` ends it")
            await asyncio.sleep(0.05)  # the process that has the lock is about to end, or to listen

    def _is_served(self) -> bool:
        """Return whether a process of this version answers."""
        try:
            caller.answer_of(caller.exchange(self._place, request("version"), timeout=handover.TIMEOUT))
        except (caller.NotRunning, caller.OtherVersion, ArcbridgeError, OSError, ValueError):
            return False
        return True

    def _take_over(self) -> dict[ConnectionSettings, list[socket.socket]] | None:
        """Take the place of a process of another version; None where there is none that hands over."""
        if self._is_served():
            return None
        sock = local_channel.new_socket()
        sock.settimeout(handover.TIMEOUT)
        try:
            sock.connect(self._place.socket)
        except OSError:
            sock.close()
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
        self._hold(given.lock)
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
                if served.endpoint is not None and not served.endpoint.busy:
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
        endpoints = [served.endpoint for served in self._clusters.served.values()]
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
            statics = [one for one in self._clusters.connections() if one.static]
            await self._clusters.close_all()
        # Where another process has the lock by now the entries are that one's.
        if not self._handed_over and self._has_the_lock():
            await self._clusters.make_plugins(statics)
        # Only now, because the tasks answer callers that are still there.
        await cancel_and_wait(*self._tasks)
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
            self._idle = asyncio.get_running_loop().call_later(IDLE_END, self._finish)

    # -- requests ---------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._control is not None
        while True:
            try:
                sock, _ = self._control.accept()
            except OSError:
                return  # no caller waits, or no descriptor is left, in which case the socket stays readable
            if (user := local_channel.foreign_user(sock)) is not None:
                log.warning("program of another user refused", user=user)
                sock.close()
                continue
            sock.setblocking(False)
            self._tasks.start(self._serve(sock))

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
        try:
            beating = asyncio.create_task(_beat(sock))
            try:
                return _line(await self._do(operation, arguments, asked)), False
            finally:
                beating.cancel()  # without waiting: where this process ends, the answer goes out first
        except AskAgain:
            return b"", False
        except ArcbridgeError as error:
            if self._clusters.leaving:
                return b"", False  # perhaps it failed because this process ends: the next one is asked
            return _error(error), False
        except Exception as error:  # a defect of ours: the caller must not wait, and the log has the trace
            log.exception("a request failed", operation=operation)
            return _error(StateError(f"internal error ({type(error).__name__}); see `arcbridge logs`")), False

    async def _do(self, operation: str, arguments: tuple[str, ...], asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return the document that answers a request; raises ArcbridgeError, AskAgain."""
        clusters = self._clusters
        match operation:
            case "version":
                return {"version": __version__, "pid": os.getpid()}
            case "status":
                process = {
                    "pid": os.getpid(),
                    "version": __version__,
                    "since": self._since,
                    "former_versions": sum(_is_open(former) for former in self._former),
                }
                return {"process": process, "clusters": clusters.describe()}
            case "credential":
                return await clusters.credential(read_words(arguments), str(asked.get("server", "")))
            case "connect":
                files = tuple(str(asked.get("kubeconfig", "")).split("\n"))
                static, switch = bool(asked.get("static")), bool(asked.get("switch"))
                return await clusters.connect(read_words(arguments), files, static=static, switch=switch)
            case "disconnect":
                answer = await clusters.disconnect(arguments, every=bool(asked.get("every")))
                if clusters.is_empty:  # this process ends with the last one
                    self._finish()
                return answer
        raise ConfigError(f"the request {operation[:32]!r} is not known")

    async def _hand_over(self, sock: socket.socket) -> tuple[bytes, bool]:
        """Give what this process listens on to the one that asks."""
        if self._over.is_set() or self._control is None:
            return _error(Unreachable("this process is ending")), False
        loop = asyncio.get_running_loop()
        async with self._clusters.changing:
            if self._over.is_set():
                return _error(Unreachable("this process is ending")), False
            loop.remove_reader(self._control)
            endpoints = [served.endpoint for served in self._clusters.served.values() if served.endpoint is not None]
            sockets = [endpoint.release() for endpoint in endpoints]
            about = [
                {"arguments": list(served.connections[0].settings.words())} for served in self._clusters.served.values()
            ]
            given = handover.Inheritance(
                self._control.fileno(),
                self._lock,
                [(one, [sock.fileno() for sock in found]) for one, found in zip(about, sockets, strict=True)],
                [former.fileno() for former in self._former],
            )
            lock_holder.unsign(self._lock)  # the next one may sign nothing
            try:
                await asyncio.to_thread(handover.send, sock, given)
            except (OSError, StateError) as error:
                log.warning("no other process took over", reason=str(error))
                lock_holder.sign(self._lock)
                for endpoint, found in zip(endpoints, sockets, strict=True):
                    endpoint.accept_again(found)
                loop.add_reader(self._control, self._accept)
                return b"", False
            for one in (*(one for found in sockets for one in found), self._control, *self._former):
                one.close()
            self._former = []
            os.close(self._lock)
            self._lock = -1
            sock.setblocking(False)
            self._leashes.append(sock)
            self._handed_over = True
            self._finish()
        return b"", True


def _listen(path: str) -> socket.socket:
    """Open the control socket, 0600, in the place of what a process that was killed left there. The lock is held."""
    Path(path).unlink(missing_ok=True)
    sock = local_channel.new_socket()
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


async def _beat(sock: socket.socket) -> None:
    """Show a caller that this process lives while it prepares an answer: spaces before JSON say nothing."""
    with contextlib.suppress(OSError):
        while True:
            await asyncio.get_running_loop().sock_sendall(sock, b" ")
            await asyncio.sleep(BEAT)


def _inode(path: str) -> tuple[int, int]:
    """Return device and inode of what is at a path; zeros where nothing is."""
    try:
        status = os.lstat(path)
    except OSError:
        return _NOTHING
    return status.st_dev, status.st_ino


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
        {
            "error": error.message,
            "exit_code": int(error.exit_code),
            "login": error.exit_code == ExitCode.LOGIN,
            "status_code": error.status_code,
        }
    )
