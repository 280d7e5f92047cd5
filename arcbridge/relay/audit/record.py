"""Makes the lines of the relay's records: an act, on whose behalf, its arguments, how it ended.

Arguments and results come from commands and from peers. Invariants: a line is one JSON object of 16 KiB at most,
whatever is in them; control characters are escaped, so that nothing begins another line; a value whose name is that of
a secret is left out. Names of users and clusters are never taken for secrets, because a name could hide behind that.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from arcbridge.audit.chain import timestamp
from arcbridge.observe.untrusted_text import REDACTED, clean, escape, names_secret

TEXT_LIMIT: Final = 1024
"""Bytes of a text: the longest name of a user that the agent's records have."""
SHORT_LIMIT: Final = 32
"""Bytes of each text of a line that would be longer than `MAX_LINE` with the whole of them."""
MAX_FIELDS: Final = 12
"""Arguments, and parts of a result."""
MAX_LISTED: Final = 20
MAX_LINE: Final = 16 * 1024
DIRECTORY_DEADLINE: Final = 2.0
"""Seconds for the name of a user: neither a revocation nor a question waits for a directory over the network."""
_looking: Final[dict[int, Future[str]]] = {}
"""Names that are being looked up, by user: one that hangs has one thread, however often it is asked for."""


@dataclass(frozen=True, slots=True)
class Actor:
    """On whose behalf an act is done."""

    by: str
    """`os`: a user of the relay's machine; `person`: a user by an access token; `agent`; `fleet`: another relay of the
    fleet; `relay`: the relay itself."""
    name: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)
    """What is known besides: `uid`, `login`, `source`."""


RELAY: Final = Actor("relay")
FLEET: Final = Actor("fleet")


async def os_actor(uid: int, pid: int) -> Actor:
    """Return the user of a process of this machine; without a name where the system's directory of users does not
    answer soon.

    `login` is who logged in to the session that the process is of, as the kernel keeps it behind `sudo` and `su`.
    """
    facts: dict[str, object] = {"uid": uid}
    login = _login(pid)
    if not 0 <= login < 2**32 - 1:
        return Actor("os", await _name_of(uid), facts)
    facts["login_uid"] = login
    name, login_name = await asyncio.gather(_name_of(uid), _name_of(login))
    if login_name:
        facts["login"] = login_name
    return Actor("os", name, facts)


async def own_actor() -> Actor:
    """Return the user of this process."""
    return await os_actor(os.getuid() if hasattr(os, "getuid") else -1, os.getpid())


def act_line(
    stage: str,
    act: str,
    actor: Actor,
    arguments: Mapping[str, object],
    *,
    outcome: str = "",
    reason: str = "",
    result: Mapping[str, object] | None = None,
    **more: object,
) -> str:
    """Return a record. `stage`: `begun`, `ended` or `complete`; `outcome`: `done`, `refused` or `failed`."""
    for limit in (TEXT_LIMIT, SHORT_LIMIT):
        fields: dict[str, object] = {"ts": timestamp(), "event": "audit", "stage": stage, "act": act}
        fields |= {name: value for name, value in more.items() if value is not None}
        fields["by"] = actor.by
        if actor.name:
            fields["actor"] = _cut(actor.name, limit)
        fields |= _shaped(actor.facts, limit)
        if arguments:
            fields["arguments"] = _shaped(arguments, limit)
        if outcome:
            fields["outcome"] = outcome
        if reason:
            fields["reason"] = clean(reason, limit)
        if result:
            fields["result"] = _shaped(result, limit)
        line = json.dumps(fields, ensure_ascii=False, separators=(",", ":"))
        if len(line.encode("utf-8", "replace")) <= MAX_LINE:
            break
    return line


def _shaped(values: Mapping[str, object], limit: int) -> dict[str, object]:
    pairs = list(values.items())
    shaped = {
        _cut(str(name), 64): REDACTED if names_secret(str(name)) else _value(value, limit)
        for name, value in pairs[:MAX_FIELDS]
        if value not in ("", None)
    }
    if len(pairs) > MAX_FIELDS:
        shaped["fields_omitted"] = len(pairs) - MAX_FIELDS
    return shaped


def _value(value: object, limit: int) -> object:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and value.bit_length() <= 64:
        return value
    if isinstance(value, float):
        return round(value, 3) if abs(value) < 1e18 else str(value)
    if isinstance(value, list | tuple):
        shown = [_cut(str(item), limit // 4) for item in value[:MAX_LISTED]]
        return shown + [f"… {len(value) - MAX_LISTED} more"] * (len(value) > MAX_LISTED)
    return _cut(str(value)[: 4 * TEXT_LIMIT], limit)


def _cut(text: str, limit: int) -> str:
    data = escape(text).encode("utf-8", "replace")
    return data.decode() if len(data) <= limit else data[: limit - 3].decode("utf-8", "ignore") + "…"


def _login(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/loginuid", encoding="ascii") as file:
            return int(file.read(16))
    except (OSError, ValueError):
        return -1


async def _name_of(uid: int) -> str:
    """Return the name of a user, empty where it is not known in time.

    Each look-up has a thread of its own, which is a daemon: one that hangs would take a thread from the event loop's
    few, of which a relay's look at revocations needs one, and hold up the end of the process.
    """
    found = _looking.get(uid)
    if found is None:
        found = _looking[uid] = Future()
        threading.Thread(target=_look, args=(uid, found), name="user-name", daemon=True).start()
    try:
        async with asyncio.timeout(DIRECTORY_DEADLINE):
            return await asyncio.shield(asyncio.wrap_future(found))
    except TimeoutError:
        return ""


def _look(uid: int, found: Future[str]) -> None:
    name = ""
    try:
        name = _user_name(uid)
    finally:
        _looking.pop(uid, None)
        found.set_result(name)


def _user_name(uid: int) -> str:
    try:
        import pwd

        return pwd.getpwuid(uid).pw_name
    except (ImportError, KeyError):  # no such system; a user that was deleted, or of another container
        return ""
