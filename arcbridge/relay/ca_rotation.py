"""The rotation of the relay's CA: its steps as an operator takes them, and how running processes take them over.

A step is refused while an agent, or a relay of the fleet, has not followed the one before; `force` takes it all the
same. Agents report over their control connections whether they have followed. Clients are not waited for: they follow
at their next join, also much later, by the certificates that lead from CA to CA (`pki.succession`). How many keep the
newest one is shown all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

from arcbridge.errors import ArcbridgeError, StateError
from arcbridge.net.address import parse_address
from arcbridge.pki.authority import Authority
from arcbridge.pki.private_files import read_file
from arcbridge.pki.rotation import Rotation, RotationStatus, named
from arcbridge.pki.succession import Succession
from arcbridge.relay.admin_socket import ask
from arcbridge.relay.audit.commands import acting
from arcbridge.relay.backend import registry_of
from arcbridge.relay.data_dir import ROTATION_FILE, change_authority, read_rotation
from arcbridge.relay.fleet.base import AgentReport
from arcbridge.relay.operations import Row
from arcbridge.settings.config import RelayConfig

_ALONE = (
    "no agent is connected at all: if this relay was restored from a backup, agents may have followed to the next CA, "
    "and trust it alone: then 'ca activate --force' brings them back"
)
_RECOVERING = (
    "revocations may be missing, and behind 'ca retire' the clusters that are awaited can no longer give them back: "
    "'recovery list' names them"
)


def is_behind(report: AgentReport, authority: Authority) -> bool:
    """Return whether an agent has not followed the last step of a rotation that is under way."""
    known = authority.succession
    knows = report.relay_ca == known.pins[-1]
    renewed = known.present < len(known.pins) - 1 or report.certificate_ca == known.pins[known.present]
    return bool(authority.step_at) and not (knows and renewed)


class RotationWatch:
    """Looks whether the rotation's document has changed. It waits for no lock, and makes nothing."""

    def __init__(self, data_dir: Path) -> None:
        self._file = data_dir / ROTATION_FILE
        self._seen: bytes | None = None
        """The document that was taken over last; None: none was there yet."""
        self._due = False
        """Whether a step was taken over of which `done` was not called."""

    async def look(self, authority: Authority) -> bool:
        """Have `authority` be what the document says; return whether it has become another since `done` was called.
        Raises StateError."""
        if (data := await asyncio.to_thread(read_file, self._file)) != self._seen:
            if data is None:
                raise StateError(f"{self._file} has disappeared; is its volume still mounted?")
            found = Rotation.decode(data, authority.certificate_pem).authority()
            self._require_newer(found.succession, authority.succession)
            self._due = authority.become(found) or self._due
            self._seen = data  # not before: one that cannot be read is looked at again
        return self._due

    def _require_newer(self, found: Succession, known: Succession) -> None:
        """Refuse an older step, or another next CA: agents have followed this one, and forget nothing."""
        with contextlib.suppress(ArcbridgeError):
            if found.follow(known, "the relay's CA", retire=True) == found:
                return
        raise StateError(
            f"{self._file} is older than the CA that this relay runs with, or has another next CA. If it was copied "
            "from another relay, copy the newest one of all relays here instead; if not, restore it from a backup"
        )

    def done(self) -> None:
        """Note that all that depends on the CA has followed it."""
        self._due = False


async def status(config: RelayConfig, clock: Callable[[], float] = time.time) -> RotationStatus:
    """Return how far the rotation is, as the relay that runs says. Raises StateError, also where there is no CA."""
    rotation = await asyncio.to_thread(read_rotation, config.data_dir)
    known = rotation.list
    wanted = known.pins[-1]
    async with registry_of(config, must_exist=True, clock=clock) as registry:
        records = [one for one in await registry.clusters() if not one.revoked and one.certificate_expires > clock()]
        recovering = await registry.recovery() is not None
    agents, processes, checks = [await ask(config.data_dir, {"ask": one}) for one in ("agents", "ca", "checks")]
    seen = [] if config.tls.certificate is not None else await ask(config.data_dir, {"ask": "users"}) or []
    if agents is None or processes is None or checks is None:
        return RotationStatus(rotation, "", ("no relay runs here that could say who has followed",))
    state = {"pins": list(known.pins), "present": known.present, "since": known.since}
    has = {_origin(one): all(one.get(key) == value for key, value in state.items()) for one in processes}
    others = [f"{who} has another {ROTATION_FILE}" for who, same in has.items() if not same]
    # Also of an earlier version, or in the middle of its start.
    silent = dict.fromkeys(who for one in (*agents, *checks) if (who := _origin(one)) not in has)
    others += [f"{who} does not say which CA it has" for who in silent]
    here = sum(one.get("relay") == str(parse_address(config.public_address)) for one in processes)
    if here < config.workers:
        others.append(f"{config.workers - here} of {config.workers} processes of this relay do not answer")
    agents_of = defaultdict[str, list[Row]](list)
    for one in agents:
        agents_of[str(one.get("cluster"))].append(one)
    missing, counts = [], Counter[bool]()
    strayed = followers_of_another_ca(agents, known)
    for record in records:
        rows = agents_of[record.name]
        knows, renewed = _agents(rows, "relay_ca", wanted), _agents(rows, "certificate_ca", wanted)
        behind = knows if False in knows.values() or not rotation.former_certificate else renewed
        counts.update(behind.values())
        left = f"{list(behind.values()).count(False)} of its {len(behind)} agents"
        if not rows:
            missing.append(f"cluster {record.name} is not connected")
        elif False in knows.values():
            missing.append(f"cluster {record.name} has an agent that does not know {wanted} ({left})")
        elif False in behind.values():
            missing.append(f"cluster {record.name} has an agent with a certificate of the former CA ({left})")
    relays = sorted({str(one.get("relay")) for one in processes})
    followed = f"{len(records) - len(missing)} of {len(records)} clusters"
    if rotation.step == "activate" and records and not agents:
        others.insert(0, _ALONE)
    if rotation.step == "retire" and recovering:
        others.append(_RECOVERING)
    agents_words = f"{counts[True]} of {counts.total()} agents" if counts else ""
    users = _users(seen, wanted) if len(known.pins) > 1 else ""
    return RotationStatus(
        rotation, followed, (*strayed, *others, *missing), tuple(relays), agents_words, users, strayed
    )


def _agents(rows: Iterable[Row], key: str, wanted: str) -> dict[str, bool]:
    """Return the agents of these rows, and of each whether it has followed: one agent is connected to two relays."""
    found: dict[str, bool] = {}
    for one in rows:
        name = str(one.get("agent"))
        found[name] = found.get(name, True) and one.get(key) == wanted
    return found


def _users(rows: Iterable[Row], wanted: str) -> str:
    """Say how many users' clients keep a CA, each by the last join that a process of the relay or fleet remembers."""
    newest = {str(row.get("user")): row for row in sorted(rows, key=lambda row: float(row.get("at", 0.0)))}
    behind = sorted(user for user, row in newest.items() if row.get("relay_ca") != wanted)
    without = f"; not at the last join of {', '.join(named(behind))}" if behind else ""
    return f"{len(newest) - len(behind)} of {len(newest)} users{without}" if newest else ""


def followers_of_another_ca(agents: Iterable[Row], known: Succession) -> tuple[str, ...]:
    """Return which agents have followed the relay's CA to one that this relay does not have.

    An agent that verifies relays by another CA than that of its certificate reports the one it verifies by.
    """
    found = {
        f"cluster {one.get('cluster')} has an agent that follows {pin}, which this relay does not have": None
        for one in agents
        if one.get("certificate_ca") and (pin := one.get("relay_ca")) and pin not in known.pins
    }
    return tuple(found)


def _origin(row: Row) -> str:
    worker = "" if row.get("worker") is None else f" (worker {row['worker']})"
    return f"relay {row.get('relay')}{worker}"


async def take_step(config: RelayConfig, step: str, *, force: bool, clock: Callable[[], float] = time.time) -> Rotation:
    """Take a step as `Rotation.take` does; return what is in force then. Raises StateError, which names who has not
    followed the step before."""
    async with acting(config, f"ca {step}", force=force) as result:
        if not force:
            (await status(config, clock)).require(step)
        found = await asyncio.to_thread(change_authority, config.data_dir, lambda state: state.take(step, clock()))
        result["relay_ca_pin"] = found.list.pins[-1]
    return found
