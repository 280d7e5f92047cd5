"""An audit log with sinks, as a role has it; as a program, one that writes records until it is killed, or so many.

    python role.py KIND ADDRESS CA LOG FIRST COUNT

It prints the number of each record that is on the disk to standard error, and imports little: tests start it often.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import structlog

from arcbridge.audit.log import ChainedLog
from arcbridge.audit.sinks.sender import Sinks
from arcbridge.settings.config import AuditSinkConfig, RelayAuditConfig


@asynccontextmanager
async def logging(path: Path, sinks: dict[str, AuditSinkConfig], **settings: Any) -> AsyncIterator[ChainedLog]:
    """An audit log with sinks, as a role has it."""
    audit = ChainedLog(
        str(path), sinks=Sinks(RelayAuditConfig(sinks=sinks, **settings), path, "relay"), instance="test"
    )
    audit.sinks.start(audit.put_or_fail)
    try:
        yield audit
    finally:
        await asyncio.to_thread(audit.close)
        await asyncio.to_thread(audit.sinks.close)


def put(audit: ChainedLog, *values: int) -> None:
    for value in values:
        audit.put(json.dumps({"ts": "2026-11-29T00:00:00.000Z", "event": "audit", "n": value, "name": "Jürgen"},
                             ensure_ascii=False))  # fmt: skip


async def main(kind: str, address: str, ca: str, path: str, first: str, count: str) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    sink = AuditSinkConfig(
        kind=kind, address=address, ca_file=Path(ca) if ca else None, interval=0.05, timeout=5.0, batch_records=10
    )
    async with logging(Path(path), {"siem": sink}) as audit:
        for number in range(int(first), int(first) + int(count)):
            put(audit, number)
            await audit.put_and_wait(lambda: '{"ts":"2026-11-29T00:00:00.000Z","event":"audit"}')
            print(f"recorded {number}", file=sys.stderr, flush=True)
            await asyncio.sleep(0.002)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
