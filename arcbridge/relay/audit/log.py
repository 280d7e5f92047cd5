"""Records acts of administrators before and after, and what changed who may come in, in each process of a relay.

One process writes one file: of several workers each gives its lines to the supervisor (`WorkerAudit`), and each relay
of a fleet records what it was asked. What strangers cause is bounded, and what is left out for that is counted in the
next record. Invariant: with `audit.on_failure = "refuse"` no administrator's act and no enrolment goes on while its
record cannot be written; sessions and the policy do.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final, Unpack

from arcbridge.audit.log import STALL, ChainedLog, LogOptions
from arcbridge.audit.sinks.sender import Sinks
from arcbridge.errors import ArcbridgeError, StateError
from arcbridge.limiters import KeyedTokenBucket
from arcbridge.relay.audit.record import FLEET, RELAY, Actor, act_line
from arcbridge.settings.config import RelayConfig

COMMAND_ACTS: Final = frozenset(
    {"token create", "token delete", "cluster revoke", "cluster restore", "cluster delete", "user revoke",
     "user restore", "backup", "restore", "recovery end", "ca next", "ca activate", "ca retire"}
)  # fmt: skip
"""What commands do to the registry themselves; they have it recorded by the relay that runs."""
ASKED_ACTS: Final = {"end": "session end", "accept_policy": "policy accept"}
"""Questions to a relay that are acts."""
KNOWN_QUESTIONS: Final = frozenset(
    {
        "sessions",
        "agents",
        "checks",
        "ca",
        "policy",
        "policy_rules",
        "user",
        "users",
        "refusals",
        "connected",
        *ASKED_ACTS,
    }
)
STRANGERS: Final = 128
"""Records that strangers may cause at once of each act (refused enrolments, refused administrators, refused callers of
the admin socket, certificates that were renewed twice), so that noise of one kind leaves out no record of another."""
STRANGERS_RATE: Final = 0.1
"""Such records a second and act that grow back: with 400 bytes each some 3 MiB a day, and 4 KiB at most, of a refused
administrator's long names, 35 MiB."""
STRANGERS_ACTS: Final = 16
"""Acts that are counted each by itself: more than there are."""
ANSWERED: Final = STALL + 2.0
"""Seconds within which a supervisor says that a line is written, or that it cannot be."""
_ID: Final = re.compile(r"[0-9a-f]{16}")

Row = dict[str, Any]
NOTHING: Final[Mapping[str, object]] = {}


class RelayAudit(ChainedLog):
    """The log of a relay that is one process, of a supervisor, or of a command where no relay runs."""

    refused_words = (
        "the relay cannot write its audit log ({}), and by its settings (audit.on_failure) nothing is done unrecorded: "
        "make room, or correct audit.file"
    )

    def __init__(
        self,
        file: str,
        *,
        worker: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        **options: Unpack[LogOptions],
    ) -> None:
        """Open the file at once. Raises ConfigError."""
        super().__init__(file, **options)
        self._worker = worker
        self._clock = clock
        self._strangers = KeyedTokenBucket[str](STRANGERS, STRANGERS_RATE, size=STRANGERS_ACTS)
        self._omitted = 0
        """Records of strangers that were left out and that no record counts yet."""
        self._started = False

    # -- the process's own ----------------------------------------------------------------------------------------

    def note(
        self,
        act: str,
        arguments: Mapping[str, object] = NOTHING,
        actor: Actor = RELAY,
        *,
        outcome: str = "done",
        reason: str = "",
        result: Mapping[str, object] | None = None,
    ) -> None:
        """Record what has happened; never waits."""
        self.put(self._line("complete", act, actor, arguments, outcome=outcome, reason=reason, result=result))

    def note_stranger(self, act: str, arguments: Mapping[str, object], actor: Actor, reason: str) -> None:
        """Record what was refused to a peer that can come as often as it likes; some are left out, and counted."""
        if self._strangers.reserve(act, self._clock()) is None:
            self._omitted += 1
            return
        self.note(act, arguments, actor, outcome="refused", reason=reason)

    def start(self, facts: Mapping[str, object]) -> None:
        """Record that the relay serves; from now on its stop is recorded too."""
        self._started = True
        self.note("relay start", facts)

    def stop(self) -> None:
        """Record that the relay goes, if it has served."""
        if self._started:
            self.note("relay stop")

    def close(self) -> None:
        """Write what is queued (2 s at most: call it at the very end) and close the file."""
        if self._omitted:
            self.note("records left out")
        super().close()

    # -- acts -----------------------------------------------------------------------------------------------------

    async def noted(self, act: str, arguments: Mapping[str, object], actor: Actor) -> None:
        """Record what has happened, and wait until that is written. Raises StateError where it is not, and must be."""
        await self.put_and_wait(lambda: self._line("complete", act, actor, arguments, outcome="done"))

    @contextlib.asynccontextmanager
    async def acting(self, act: str, arguments: Mapping[str, object], actor: Actor) -> AsyncIterator[dict[str, object]]:
        """Record an act before it is done and when it is over; what is put into the mapping is its result.

        Raises StateError where the act must not be done, because it cannot be recorded.
        """
        number = await self._begin(act, actor, arguments)
        result: dict[str, object] = {}
        outcome, reason = "failed", ""
        try:
            yield result
            outcome = "done"
        except ArcbridgeError as error:
            outcome, reason = "refused", error.message
            raise
        except BaseException as error:
            reason = type(error).__name__
            raise
        finally:
            self.put(
                self._line("ended", act, actor, arguments, id=number, outcome=outcome, reason=reason, result=result)
            )

    async def answering(
        self, question: Mapping[str, Any], actor: Actor, answer: Callable[[Mapping[str, Any]], Awaitable[list[Row]]]
    ) -> list[Row]:
        """Answer an operator's question; one that is an act is recorded before and after. Raises StateError."""
        asked = question.get("ask")
        if asked == "record":
            return await self.record(question, actor)
        if not isinstance(asked, str) or asked not in KNOWN_QUESTIONS:
            self.note_stranger("admin question", {"question": str(asked)[:64]}, actor, "no such question")
            return await answer(question)
        if asked not in ASKED_ACTS:
            return await answer(question)
        arguments = {name: value for name, value in question.items() if name != "ask"}
        async with self.acting(ASKED_ACTS[asked], arguments, actor) as result:
            rows = await answer(question)
            result.update(_result_of(rows))
        return rows

    def asked_by_fleet(
        self, question: Mapping[str, Any], answer: Callable[[Mapping[str, Any]], list[Row]]
    ) -> list[Row]:
        """Answer what another relay of the fleet passes on, and record it where it is an act."""
        rows = answer(question)
        if (act := ASKED_ACTS.get(str(question.get("ask")))) is not None:
            arguments = {name: value for name, value in question.items() if name != "ask"}
            self.put(self._line("complete", act, FLEET, arguments, outcome="done", result=_result_of(rows)))
        return rows

    async def record(self, question: Mapping[str, Any], actor: Actor) -> list[Row]:
        """Record what a command does to the registry, before and after; the answer is one row: `id`, or `refused`."""
        act, arguments, result = (question.get(name) for name in ("act", "arguments", "result"))
        number = str(question.get("id", ""))
        outcome = str(question.get("outcome", ""))
        if act not in COMMAND_ACTS or not isinstance(arguments, dict):
            self.note_stranger("admin question", {"question": str(act)[:64]}, actor, "no such act")
            return []
        if question.get("stage") == "begun":
            try:
                return [{"id": await self._begin(str(act), actor, arguments)}]
            except StateError as error:
                return [{"refused": error.message}]
        if _ID.fullmatch(number) is None or outcome not in ("done", "refused", "failed"):
            return []
        line = self._line(
            "ended", str(act), actor, arguments, id=number, outcome=outcome, reason=str(question.get("reason", "")),
            result=result if isinstance(result, dict) else None,
        )  # fmt: skip
        self.put(line)
        return [{"id": number}]

    # -- inside ---------------------------------------------------------------------------------------------------

    async def _begin(self, act: str, actor: Actor, arguments: Mapping[str, object]) -> str:
        number = secrets.token_hex(8)
        await self.put_and_wait(lambda: self._line("begun", act, actor, arguments, id=number))
        return number

    def _line(self, stage: str, act: str, actor: Actor, arguments: Mapping[str, object], **more: Any) -> str:
        omitted, self._omitted = self._omitted, 0
        return act_line(stage, act, actor, arguments, worker=self._worker, omitted=omitted or None, **more)


class WorkerAudit(RelayAudit):
    """One worker's: its lines go to the supervisor, whose file they are for."""

    def __init__(self, send: Callable[[str, int], None], *, on_failure: str, worker: int) -> None:
        """`send`: gives the supervisor a line, and a number where it is to answer once that is written; else 0."""
        super().__init__("", on_failure=on_failure, worker=worker)
        self._send = send
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[str]] = {}
        """What waits for its line, by number."""
        self.supervisors_failure = ""
        """Why the supervisor cannot write them now, as it has said last."""

    @property
    def failure(self) -> str:
        """Why records cannot be written now; empty while all is well."""
        return self.supervisors_failure

    def put(self, line: str) -> bool:
        self.records += 1
        self._send(line, 0)
        return True

    def recorded(self, number: int, refusal: str) -> None:
        """Note the supervisor's answer for a line: that it is written, or why what waits for it must not go on."""
        if (waiting := self._waiting.get(number)) is not None and not waiting.done():
            waiting.set_result(refusal)

    async def put_and_wait(self, line: Callable[[], str]) -> None:
        if refusal := self.refusal():
            raise StateError(refusal)
        number, done = next(self._numbers), asyncio.get_running_loop().create_future()
        self._waiting[number] = done
        self.records += 1
        self._send(line(), number)
        try:
            async with asyncio.timeout(ANSWERED):
                refusal = await done
        except TimeoutError:
            refusal = self.refused_words.format("the supervisor does not answer") if self.refuses else ""
        finally:
            del self._waiting[number]
        if refusal:
            raise StateError(refusal)


def audit_file(config: RelayConfig) -> str:
    """Return the path of the log, `-`, or nothing: a relative path is meant within `data_dir`."""
    file = config.audit.file
    return file if file in ("", "-") else str(config.data_dir / file)


def open_audit(config: RelayConfig, instance: str, *, output: str = "-", sinks: Sinks | None = None) -> RelayAudit:
    """Open the audit log of a relay, whose directory is there. `output`: what stands for `-`. Raises ConfigError."""
    settings, file = config.audit, audit_file(config)
    return RelayAudit(
        output if file == "-" else file,
        on_failure=settings.on_failure,
        fsync=settings.fsync,
        instance=instance,
        sinks=sinks or Sinks(),
    )


def _result_of(rows: list[Row]) -> dict[str, object]:
    """Return what an answer to an act says of it: how many rows, and whose sessions they are."""
    found: dict[str, object] = {"found": len(rows)}
    for name in ("user", "cluster", "hash"):
        if values := sorted({str(row[name]) for row in rows if row.get(name)}):
            found[name] = values[0] if len(values) == 1 else values
    return found
