"""The way from the operator's commands to the relay that runs on the same data directory: a Unix socket in it.

`admin.sock` has mode 0600 in a directory of mode 0700, and only processes of the relay's own user, or of root, are
answered: who can read the relay's key can ask it. It is no port, and nothing of another machine reaches it. One
connection carries one question and its answer, each a line of JSON (`relay.operations`): `{"rows": [...]}`, or
`{"error": TEXT}` where the relay refuses. Questions are answered a few at a time, and written as fast as they are read,
so that no number of them takes much memory or holds up sessions. The process that holds the
data directory's lock serves it: the relay, or the supervisor of its workers.

The commands work without it, too: what the registry has does not need a relay that runs (`relay.admin`).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Final

import structlog

from arcbridge.errors import StateError
from arcbridge.net.peer_user import unix_peer
from arcbridge.relay.audit.log import RelayAudit
from arcbridge.relay.audit.record import Actor, os_actor
from arcbridge.relay.operations import Question, Row, parts
from arcbridge.tasks import cancel_and_wait
from arcbridge.untrusted_json import read_json

SOCKET: Final = "admin.sock"
DEADLINE: Final = 10.0
"""Seconds for a question and its answer."""
TURN: Final = DEADLINE / 2
"""Seconds that a question waits for its turn: a command that gives up after `DEADLINE` is told before it does."""
MAX_QUESTION: Final = 64 * 1024
MAX_ANSWER: Final = 256 * 1024 * 1024
"""Bytes: more than the rows of a million sessions, and an end for an answer that has none."""
CONNECTIONS: Final = 16
"""Questions at a time; one more is refused."""
ANSWERING: Final = 2
"""Questions that are being answered at a time; the others wait. Each takes memory for the rows of all sessions."""
BUSY: Final = "the relay is answering other commands; try again in some seconds"
_PATH: Final = 100
"""Bytes of a path that fit into the address of a Unix socket (unix(7): 108) with room to spare."""

log = structlog.get_logger("arcbridge.relay")

Handle = Callable[[Question], Awaitable[list[Row]]]


class AdminSocket:
    """The server's side. `start` once, `close` in any case."""

    def __init__(self, data_dir: Path, handle: Handle, audit: RelayAudit) -> None:
        """The caller holds the lock of `data_dir`. `handle` answers a question for the whole relay."""
        self._data_dir = data_dir
        self._handle = handle
        self._audit = audit
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Semaphore(ANSWERING)

    async def start(self) -> None:
        """Listen. A relay that cannot have the socket says so in its log, and serves without."""
        if not hasattr(socket, "AF_UNIX"):
            return
        sock = socket.socket(socket.AF_UNIX)
        try:
            with contextlib.suppress(FileNotFoundError):  # of a relay that was killed: no process listens there
                os.unlink(self._data_dir / SOCKET)
            with _address(self._data_dir) as address:
                before = os.umask(0o177)
                try:
                    sock.bind(address)
                finally:
                    os.umask(before)
            sock.listen(CONNECTIONS)
            self._server = await asyncio.start_unix_server(self._accepted, sock=sock, limit=MAX_QUESTION)
        except OSError as error:
            sock.close()
            log.warning(
                "admin socket not opened",
                reason=error.strerror or str(error),
                effect="`session` and `policy` commands do not work",
            )

    async def close(self) -> None:
        """Stop, and remove the socket."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        await cancel_and_wait(*self._open)
        with contextlib.suppress(OSError):
            os.unlink(self._data_dir / SOCKET)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            sock: socket.socket = writer.get_extra_info("socket")
            async with asyncio.timeout(DEADLINE):
                actor = await _actor(sock)
                if not _is_operator(sock):
                    self._audit.note_stranger("admin question", {}, actor, "another user than the relay's, or root")
                    return
                await self._serve(reader, writer, actor)
        except (ValueError, asyncio.LimitOverrunError) as error:
            self._audit.note_stranger("admin question", {}, actor, f"no question ({type(error).__name__})")
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            # The command was ended.
            pass
        finally:
            self._open.discard(task)
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, actor: Actor) -> None:
        if len(self._open) > CONNECTIONS:
            await self._refuse(reader, writer, BUSY)
            return
        question = read_json(await reader.readuntil(b"\n"))
        if not isinstance(question, dict):
            raise ValueError
        try:
            async with asyncio.timeout(TURN):
                await self._turn.acquire()
        except TimeoutError:
            await self._refuse(reader, writer, BUSY)
            return
        try:
            try:
                rows = await self._audit.answering(question, actor, self._handle)
            except StateError as error:
                await self._refuse(reader, writer, error.message)
                return
            writer.write(b'{"rows":[')
            before = b""
            for part, _ in parts(rows):
                if inner := part[1:-1]:
                    writer.write(before + inner)
                    before = b","
                # Behind a reader that is slow, and with time for what the relay is for.
                await writer.drain()
                await asyncio.sleep(0)
            writer.write(b"]}\n")
            await self._end(reader, writer)
        finally:
            self._turn.release()

    async def _refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, words: str) -> None:
        writer.write(json.dumps({"error": words}).encode() + b"\n")
        await self._end(reader, writer)

    async def _end(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await writer.drain()
        # All of it has to have left before the connection is closed.
        writer.write_eof()
        await reader.read(1)


async def ask(data_dir: Path, question: Question) -> list[Row] | None:
    """Ask the relay that runs on `data_dir`; None where none does. Raises `StateError` where it does not answer."""
    if not hasattr(socket, "AF_UNIX"):
        return None
    try:
        async with asyncio.timeout(DEADLINE):
            with _address(data_dir) as address:
                reader, writer = await asyncio.open_unix_connection(address, limit=MAX_ANSWER)
            try:
                writer.write(json.dumps(dict(question)).encode() + b"\n")
                answer = json.loads(await reader.readuntil(b"\n"))
            finally:
                writer.close()
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise StateError(
            f"{data_dir / SOCKET} may not be used by this user: run the command as the relay's user, or as root"
        ) from error
    except (OSError, ValueError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise StateError(f"the relay that runs on {data_dir} does not answer; its log may say why") from error
    if isinstance(answer, dict) and isinstance(answer.get("error"), str):
        raise StateError(answer["error"])
    rows = answer.get("rows") if isinstance(answer, dict) else None
    if not isinstance(rows, list):
        raise StateError(f"the relay that runs on {data_dir} gave no answer that this version knows")
    return [row for row in rows if isinstance(row, dict)]


def _is_operator(sock: socket.socket) -> bool:
    """Return whether the peer is a process of this user or of root. Where the system does not say, the modes of file
    and directory have to do."""
    peer = unix_peer(sock)
    return peer is None or peer.uid in (0, os.geteuid())


async def _actor(sock: socket.socket) -> Actor:
    peer = unix_peer(sock)
    return Actor("os") if peer is None else await os_actor(peer.uid, peer.pid)


@contextlib.contextmanager
def _address(data_dir: Path) -> Iterator[str]:
    """Yield the socket's path; a short way to it through /proc where the path is too long for an address."""
    path = str(data_dir / SOCKET)
    if len(os.fsencode(path)) <= _PATH or not os.path.isdir("/proc/self/fd"):
        yield path
        return
    descriptor = os.open(data_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)
