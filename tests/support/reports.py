"""Reads what the roles report (log records, audit records, metrics), and starts an agent again."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from prometheus_client.parser import text_string_to_metric_families

from tests.support.processes import START, ManagedProcess, Mark, ProcessFailed
from tests.support.world import World, arcbridge

T = TypeVar("T")


def until(look: Callable[[], T], what: str, *, timeout: float = 15) -> T:
    """Wait for a true value of `look` and return it. Raises `ProcessFailed` at the deadline."""
    deadline = (began := time.monotonic()) + timeout
    while not (found := look()):
        if (now := time.monotonic()) > deadline:
            raise ProcessFailed(f"not within {timeout} s: {what} (last: {found!r})")
        # Nothing is decided by how long it is. A look that starts a process leaves most of the time to the others.
        time.sleep(min(max(0.02, 3 * (now - began)), 1.0))
        began = time.monotonic()
    return found


def records(process: ManagedProcess, event: str = "", *, after: Mark = START, **fields: object) -> list[dict[str, Any]]:
    """The JSON log records of a role since `after` (a `mark`): those of one event, with these fields."""
    found = []
    for line in process.lines(after=after):
        if not line.startswith("{"):
            continue
        record = json.loads(line)
        if (not event or record.get("event") == event) and all(record.get(k) == v for k, v in fields.items()):
            found.append(record)
    return found


def wait_for_record(
    process: ManagedProcess, event: str, *, after: Mark = START, timeout: float = 15, **fields: object
) -> dict[str, Any]:
    """Wait for the first such record and return it."""

    def look() -> list[dict[str, Any]]:
        over = not process.running
        if over:
            process.wait()  # until its last output was read, too
        found = records(process, event, after=after, **fields)
        if over and not found:
            raise ProcessFailed(f"ended without {event!r} {fields}")
        return found

    try:
        return until(look, f"{process.name} logs {event!r} {fields}", timeout=timeout)[0]
    except ProcessFailed as error:
        raise ProcessFailed(f"{error}\n{process.tail()}") from None


def audited(world: World, what: str, **values: object) -> dict[str, Any]:
    """Wait for the first audit record of a request that is over and has `values`, and return it."""
    return until(
        lambda: next((one for one in world.audit_records() if values.items() <= one.items()), {}),
        f"the agent has recorded {what}",
    )


def page(port: int, path: str = "/metrics") -> str:
    """Return a page of a role's observe listener."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
        return str(answer.read().decode())


def metrics(port: int) -> dict[str, float]:
    """All samples of a role, by name with labels as the page has them: `arcbridge_relay_joins_total{result="ok"}`."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(page(port)):
        for sample in family.samples:
            labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = float(sample.value)
    return found


def agent_again(world: World, *, wait: bool = True) -> ManagedProcess:
    """Start the agent as it was configured, on the state it has; no join token is made."""
    world.agent = world._start("agent", arcbridge("--role", "agent", "--config", str(world.agent_config)))
    if wait:
        world.wait_for_agent()
    return world.agent


def rewrite(path: Path, text: str) -> None:
    """Replace a file atomically, as a program that refreshes tokens does."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)
