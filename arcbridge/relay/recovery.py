"""Takes back revocations that the registry has lost: from what agents were given to keep (`relay.ledger`).

A registry that was restored from a backup, or made anew, lacks what was revoked since. Every agent that connects gives
back what it was told, and what the registry lacks is merged, whether a loss was known or not. Where one was
(`Recovery`), users begin nothing until each known cluster was heard, or `recovery_wait` has passed since a relay first
served with it; after that the relay serves with what it knows, and goes on to say what is missing.

Invariant: only what an operator of this CA's relays has said counts, the later of two sayings of one name, whichever of
them comes first. Nothing here reads a session.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

import structlog

from arcbridge.checks.diagnosis import Finding
from arcbridge.errors import EnrolmentRefused
from arcbridge.observe.metrics import Metrics
from arcbridge.pki.authority import BACKDATE, Authority, certificate_validity
from arcbridge.relay.control import ControlServer
from arcbridge.relay.ledger import Intake, LedgerBook, Seal, registry_name
from arcbridge.relay.parts import Basis
from arcbridge.relay.recovery_words import recovery_finding, recovery_words
from arcbridge.relay.registry.base import REVOKED, AccessChange, Recovery, Registry, RegistryUnavailable

FRESH: Final = 3600.0
"""Seconds for which a CA counts as new: a registry without clusters beside an older one may be a lost one."""
MOST_LOGGED: Final = 100
"""Revocations of one agent that have a line each."""

log = structlog.get_logger("arcbridge.relay")


async def void_join_tokens(registry: Registry, now: float) -> int:
    """Delete the join tokens that could be used: one of them may have been used since the backup. Return how
    many they were."""
    found = [one for one in await registry.list_join_tokens() if one.used < one.uses and one.expires_at > now]
    for one in found:
        await registry.delete_join_token(one.id)
    return len(found)


class RevocationRecovery:
    """That of one relay process."""

    def __init__(
        self, basis: Basis, control: ControlServer, wait: float, *, clock: Callable[[], float] = time.time
    ) -> None:
        """`wait`: seconds for which users are kept waiting at most."""
        self._registry = basis.registry
        self._access = basis.checks.access
        self._counters = basis.counters
        self._control = control
        self._wait = wait
        self._clock = clock
        # The oldest that is known: one that a rotation has brought is younger than the registry.
        self._ca_made = certificate_validity(basis.authority.succession.cas[0])[0] + BACKDATE
        self._name = registry_name(basis.checked.config, basis.checked.public)
        self.book = LedgerBook(Seal.of(basis.authority, self._name))
        self._looked = False
        """Whether it was looked, at the start, whether the registry may have been lost."""
        self.recovery: Recovery | None = None
        """What was lost, as the registry said last."""
        self._heard = False
        """Whether an agent has given back all that it keeps to this process."""
        self._returning = asyncio.Lock()
        """Held while what one agent gave back is merged: all agents give back the same after a loss."""
        self._logged: Recovery | None = None
        """What the log says of it."""
        self.refresh: Callable[[], Awaitable[None]]
        """Takes over at once what the registry says is revoked; set by the relay."""
        control.book = self.book
        control.on_returned = self.returned

    async def look(self) -> None:
        """Read how the recovery stands: before what is revoked is read, so that its end never comes first."""
        now = self._clock()
        found = await self._registry.recovery()
        if not self._looked and found is None and now - self._ca_made > FRESH and not await self._registry.clusters():
            lost = Recovery("lost", now)
            found = await self._registry.change_recovery(lambda known: known or lost)
        self._looked = True
        if found is not None:
            try:
                left = {one.name for one in await self._registry.clusters() if not one.revoked}
                found = await self._registry.change_recovery(lambda known: self._proceed(known, left, now))
            except RegistryUnavailable as error:
                # A copy answers for the registry: the recovery waits, and what is revoked is read all the same.
                log.debug("recovery not continued", reason=error.message)
        self._tell(found)
        self.recovery = found
        self._control.recovering = found is not None
        # A clock that was set back far is no reason to hold users until it has caught up.
        held = found is not None and 0 <= now - (found.serving or now) < self._wait
        self._access.held = (
            "the relay's registry was restored or lost, and the relay waits for the revocations that agents know"
            if held
            else ""
        )

    def _proceed(self, known: Recovery | None, clusters: set[str], now: float) -> Recovery | None:
        """Return the recovery without clusters that are no more; None at its end."""
        if known is None:
            return None
        # Who was heard before that was found to be an older registry has given back all to just this one.
        left = clusters - self._control.heard() if known.cause == "older" else clusters
        known = replace(known, serving=known.serving or now, awaited=tuple(one for one in known.awaited if one in left))
        if known.cause == "lost":
            # Which clusters there were is lost, too. Where one has given back its ledger, and no revocation, there was
            # none to lose.
            over = self._heard and not known.returned and now >= known.serving + self._wait
        else:
            over = not known.awaited
        return None if over else known

    async def share(self) -> None:
        """Have the agents keep what has changed."""
        self._control.share_ledger(self.book.learn(await self._registry.access_changes()))

    async def rotated(self, authority: Authority) -> None:
        """Have the agents follow the relay's CA, and keep all of the ledger as it is sealed now, before the former one
        is retired."""
        await self.book.use(Seal.of(authority, self._name))
        self._control.announce()

    async def returned(self, cluster: str, intake: Intake) -> None:
        """Take what an agent of `cluster` has given back. Raises `EnrolmentRefused` where that revokes it."""
        async with self._returning:
            await self._take(cluster, intake)

    async def _take(self, cluster: str, intake: Intake) -> None:
        if intake.forged:
            self._counters.ledgers_forged += 1
            log.warning(
                "ledger not believed",
                cluster=cluster,
                reason="an entry was not sealed by a relay of this CA and registry",
            )
        now = self._clock()
        # Once more, for another agent may have given back the same meanwhile.
        given = [one for one in intake.done.result() if self.book.news(one, now)]
        known = {(one.kind, one.name): one for one in await self._registry.access_changes()} if given else {}

        def refuses_more(one: AccessChange) -> bool:
            before = known.get((one.kind, one.name))
            return one.before > (0 if before is None else before.before)

        if any(map(refuses_more, given)):
            # Before the merge: where this process dies in between, the agent gives back the same again.
            await self._begin(now)
        news = await self._registry.merge(given) if given else []
        revoked = list(filter(refuses_more, news))
        if revoked:
            await self._came_back(cluster, revoked)
        self._heard = self._heard or intake.complete
        heard = False
        if intake.complete and (revoked or self._awaits(cluster)):
            self.recovery = await self._registry.change_recovery(
                lambda known: known and replace(known, awaited=tuple(one for one in known.awaited if one != cluster))
            )
            heard = self.recovery is None or not self.recovery.awaited
        if news or heard:
            await self.refresh()
        if ("cluster", cluster) in {(one.kind, one.name) for one in revoked}:
            raise EnrolmentRefused(REVOKED)

    def _awaits(self, cluster: str) -> bool:
        return self.recovery is not None and cluster in self.recovery.awaited

    async def _came_back(self, cluster: str, revoked: list[AccessChange]) -> None:
        """Say which revocations came back."""
        self._counters.revocations_returned += len(revoked)
        for one in revoked[:MOST_LOGGED]:
            log.warning("revocation came back", kind=one.kind, name=one.name, cluster=cluster, reason=one.reason)
        await self._registry.change_recovery(
            lambda known: known and replace(known, returned=known.returned + len(revoked))
        )

    async def _begin(self, now: float) -> None:
        """Say that the registry is an older one, where no loss was known. Its join tokens go first: the recovery says
        that they are gone."""
        if await self._registry.recovery() is None:
            await void_join_tokens(self._registry, now)
            awaited = tuple(one.name for one in await self._registry.clusters() if not one.revoked)
            await self._registry.change_recovery(
                lambda known: known or Recovery("older", now, serving=now, awaited=awaited)
            )

    def _tell(self, found: Recovery | None) -> None:
        """Log what has changed."""
        if found is None:
            if self._logged is not None:
                log.info("revocations are complete", returned=self._logged.returned)
        elif self._logged is None or (found.cause, found.awaited) != (self._logged.cause, self._logged.awaited):
            log.error("revocations may be missing", reason=recovery_words(found), clusters=list(found.awaited[:20]))
        self._logged = found

    def finding(self) -> Finding:
        """Return what `doctor` shows of it."""
        return recovery_finding(self.recovery, self.book.left_out)

    def register(self, metrics: Metrics) -> None:
        """Tell `metrics` where to read."""
        metrics.gauge("revocations_missing", "1 while the registry may lack revocations that were made before.", None,
                      lambda: int(self.recovery is not None))  # fmt: skip
        metrics.gauge("ledger_left_out", "Changes of access that no agent keeps, for want of room in the ledger.", None,
                      lambda: self.book.left_out)  # fmt: skip
        metrics.gauge("clusters_awaited", "Clusters whose agents have not given back the revocations they know.", None,
                      lambda: 0 if self.recovery is None else len(self.recovery.awaited))  # fmt: skip
