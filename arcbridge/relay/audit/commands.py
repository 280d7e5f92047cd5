"""Has an operator's command recorded: by the relay that runs on the same data, or, where none does, by itself.

The relay knows by SO_PEERCRED whose process it is. Where no relay runs, or one that does not answer or is older, the
command writes into the relay's file as a chain of its own, which follows on what stands there: a revocation waits for
no relay.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path

import structlog

from arcbridge.errors import ArcbridgeError, ConfigError, StateError
from arcbridge.relay.admin_socket import ask
from arcbridge.relay.audit.log import RelayAudit, Row, audit_file, open_audit
from arcbridge.relay.audit.record import own_actor
from arcbridge.settings.config import RelayConfig

log = structlog.get_logger("arcbridge.relay")


@contextlib.asynccontextmanager
async def acting(config: RelayConfig, act: str, **arguments: object) -> AsyncIterator[dict[str, object]]:
    """Record an act before it is done and when it is over; what is put into the mapping is its result.

    Raises StateError where the act must not be done, because it cannot be recorded.
    """
    book, result = _Book(config), dict[str, object]()
    try:
        begun = await book.tell({"act": act, "arguments": arguments, "stage": "begun"})
        if "refused" in begun:
            raise StateError(str(begun["refused"]))
        end = {"act": act, "arguments": arguments, "stage": "ended", "id": begun.get("id", ""), "result": result}
        try:
            yield result
        except ArcbridgeError as error:
            await book.tell({**end, "outcome": "refused", "reason": error.message})
            raise
        except BaseException as error:
            await book.tell({**end, "outcome": "failed", "reason": type(error).__name__})
            raise
        await book.tell({**end, "outcome": "done"})
    finally:
        await book.close()


class _Book:
    """Where one command is recorded."""

    def __init__(self, config: RelayConfig) -> None:
        self._config = config
        self._own: RelayAudit | None = None

    async def tell(self, question: Mapping[str, object]) -> Row:
        """Have a stage recorded; return the answer, empty where it is not recorded."""
        if not audit_file(self._config):
            return {}
        if self._own is None:
            try:
                rows = await ask(self._config.data_dir, {"ask": "record", **question})
            except StateError:
                rows = None
            if rows:
                return rows[0]
            try:
                self._own = await asyncio.to_thread(_open, self._config)
            except ConfigError as error:
                if self._config.audit.on_failure == "refuse":
                    raise
                log.warning("command not recorded", reason=error.message)
                return {}
        rows = await self._own.record(question, await own_actor())
        return rows[0] if rows else {}

    async def close(self) -> None:
        if self._own is not None:
            await asyncio.to_thread(self._own.close)


def _open(config: RelayConfig) -> RelayAudit:
    with _as_owner_of(Path(audit_file(config)).parent):
        return open_audit(config, f"command-{os.getpid()}", output="/dev/stderr")


@contextlib.contextmanager
def _as_owner_of(directory: Path) -> Iterator[None]:
    """Act as the relay's own user where root runs the command: the relay has to go on with the file, and what that user
    may not write root does not write in its place."""
    if os.name != "posix" or os.geteuid() != 0 or not directory.is_dir():
        yield
        return
    owner, group = directory.stat(), os.getegid()
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
