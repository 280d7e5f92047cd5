"""The fleet of one relay with several processes: each worker knows which agents the others have.

An agent's control connection is in one worker; each worker tells its siblings, over their ordered channels, what it
registers and unregisters. What a sibling has stands in this worker's own table as a link like any other, whose `dial`
is a message. So all promises of `fleet.base` are kept by the code that keeps them in one process, and a dial needs no
question first. Stale is nothing: what a worker had is gone with its channel, in the same breath.

Of two connections of one instance the newer stays, wherever the two are: a registration carries the time of the
machine's monotonic clock, which all processes share.

Messages, behind the sibling's HELLO: `link` and `unlink` (a registration and its end), `trip` (the round trip that the
agent has measured has become another, or it drains), `dial` (a question: one dial request), `lost` (a user's right to a
cluster is).
"""

from __future__ import annotations

import time
from typing import Final

from arcbridge.errors import ArcbridgeError, JoinRefused
from arcbridge.net.join import JoinCode
from arcbridge.observe.metrics import Metrics
from arcbridge.relay.fleet.base import AgentLink, AgentReport, Fleet, Lost, lost_agent
from arcbridge.relay.siblings.channel import ChannelClosed, Head, Received
from arcbridge.relay.siblings.group import Sibling, Siblings
from arcbridge.tasks import cancel_and_wait
from arcbridge.wire.records import Dial, Status

TRIP_CHANGE: Final = 0.1
"""Share by which an agent's round trip has to change before siblings are told: agents report each half a minute."""


class _Remote:
    """An agent's connection in another worker; an `AgentLink`."""

    def __init__(self, fleet: WorkersFleet, sibling: Sibling, head: Head) -> None:
        self._fleet = fleet
        self.sibling = sibling
        self.cluster = str(head["cluster"])
        self.instance = str(head["instance"])
        self.version = str(head["version"])
        self.since = float(head["since"])
        self.report = AgentReport(round_trip=float(head["trip"]))
        self.stamp = float(head["stamp"])
        self.pending = 0
        """Dials from here; those of other workers are not known, which only makes the choice less even."""
        self.draining = bool(head["draining"])

    async def dial(self, dial: Dial) -> Status:
        self.pending += 1
        try:
            return await self._fleet.dial_there(self, dial)
        finally:
            self.pending -= 1

    def replaced(self) -> None:
        """Do nothing: the worker that has the link is told by the same registration that we heard of."""


class WorkersFleet(Fleet):
    """See the module's docstring. The caller connects and closes `siblings`, after this object is made."""

    def __init__(self, siblings: Siblings) -> None:
        super().__init__()
        self._siblings = siblings
        self._own: dict[AgentLink, float] = {}
        self._trips: dict[AgentLink, float] = {}
        """What the siblings were told last of own links' round trips, seconds."""
        self._remote: dict[tuple[int, str, str], _Remote] = {}
        self.dials_from_siblings = 0
        siblings.on_joined.append(self._joined)
        siblings.on_left.append(self._left)
        siblings.answerers["dial"] = self._dialled
        siblings.handlers.update(link=self._linked, unlink=self._unlinked, trip=self._measured)
        siblings.handlers.update(lost=self._heard_of_loss)

    def add_metrics(self, metrics: Metrics) -> None:
        metrics.counter("worker_dials_total", "Dial requests that went to an agent through another worker.", None,
                        lambda: self.dials_from_siblings)  # fmt: skip

    async def close(self) -> None:
        await cancel_and_wait(*(task for sibling in self._siblings for task in sibling.serving.values()))
        self._own.clear()
        self._trips.clear()
        self._remote.clear()
        await super().close()

    async def register(self, link: AgentLink) -> None:
        if link in self._own:
            return
        stamp = self._own[link] = time.monotonic()
        self._trips[link] = link.report.round_trip
        self.add(link)
        for sibling in self._siblings:
            sibling.tell(_link(link, stamp))

    async def unregister(self, link: AgentLink) -> None:
        stamp = self._own.pop(link, None)
        if stamp is None:
            return
        self._trips.pop(link, None)
        self.remove(link)
        for sibling in self._siblings:
            sibling.tell({"t": "unlink", **_name(link, stamp)})

    def reported(self, link: AgentLink) -> None:
        stamp, trip, told = self._own.get(link), link.report.round_trip, self._trips.get(link, 0.0)
        if stamp is None or (abs(trip - told) <= TRIP_CHANGE * told and not link.draining):
            return
        self._trips[link] = trip
        for sibling in self._siblings:
            sibling.tell({"t": "trip", **_name(link, stamp), **_state(link)})

    def tell_lost(self, lost: Lost) -> None:
        for sibling in self._siblings:
            sibling.tell({"t": "lost"}, lost.encode())

    def links(self, cluster: str | None = None) -> list[AgentLink]:
        return [link for link in super().links(cluster) if link in self._own]

    # -- dials to other workers ------------------------------------------------------------------------------------

    async def dial_there(self, remote: _Remote, dial: Dial) -> Status:
        """Have the worker that has this connection send the request; see `AgentLink.dial`."""
        head = {"cluster": remote.cluster, "instance": remote.instance, "stamp": remote.stamp}
        try:
            answer = await remote.sibling.ask({"t": "dial", **head}, dial.encode())
        except ChannelClosed as error:
            raise lost_agent(remote.cluster) from error
        if code := int(answer.head["code"]):
            retry_after = int(answer.head["retry_after"]) or None
            raise JoinRefused(code, str(answer.head["message"]), retry_after=retry_after)
        return Status.decode(answer.body)

    async def _dialled(self, sibling: Sibling, message: Received) -> tuple[Head, bytes]:
        """Send the request of another worker to an agent that is connected here."""
        head = message.head
        self.dials_from_siblings += 1
        link = self.find(str(head["cluster"]), str(head["instance"]))
        try:
            dial = Dial.decode(message.body)
            if link is None or (link.draining and not dial.instance) or self._own.get(link) != head["stamp"]:
                raise lost_agent(str(head["cluster"]))
            return {"code": 0}, (await link.dial(dial)).encode()
        except JoinRefused as error:
            return {"code": error.code, "message": error.message, "retry_after": error.retry_after or 0}, b""
        except ArcbridgeError as error:
            return {"code": int(JoinCode.INTERNAL), "message": error.message, "retry_after": 0}, b""

    def _heard_of_loss(self, sibling: Sibling, message: Received) -> None:
        self.on_lost(Lost.decode(message.body))

    # -- who has whom ----------------------------------------------------------------------------------------------

    def _joined(self, sibling: Sibling) -> None:
        for link, stamp in self._own.items():
            sibling.tell(_link(link, stamp))

    def _linked(self, sibling: Sibling, message: Received) -> None:
        remote = _Remote(self, sibling, message.head)
        current = self.find(remote.cluster, remote.instance)
        if current is not None and self._stamp(current) > remote.stamp:
            # Older than what is known already; the worker that has the newer one is about to tell it so.
            return
        self._remote[sibling.index, remote.cluster, remote.instance] = remote
        # This tells an older one of ours that it is replaced.
        self.add(remote)

    def _stamp(self, link: AgentLink) -> float:
        return link.stamp if isinstance(link, _Remote) else self._own.get(link, 0.0)

    def _unlinked(self, sibling: Sibling, message: Received) -> None:
        head = message.head
        key = (sibling.index, str(head["cluster"]), str(head["instance"]))
        remote = self._remote.get(key)
        if remote is not None and remote.stamp == float(head["stamp"]):
            self._remove(key, remote)

    def _measured(self, sibling: Sibling, message: Received) -> None:
        head = message.head
        remote = self._remote.get((sibling.index, str(head["cluster"]), str(head["instance"])))
        if remote is not None and remote.stamp == float(head["stamp"]):
            remote.report, remote.draining = AgentReport(round_trip=float(head["trip"])), bool(head["draining"])

    def _left(self, sibling: Sibling) -> None:
        for key, remote in list(self._remote.items()):
            if remote.sibling is sibling:
                self._remove(key, remote)

    def _remove(self, key: tuple[int, str, str], remote: _Remote) -> None:
        del self._remote[key]
        remote.draining = True
        self.remove(remote)


def _link(link: AgentLink, stamp: float) -> Head:
    return {"t": "link", **_name(link, stamp), "version": link.version, "since": link.since, **_state(link)}


def _state(link: AgentLink) -> Head:
    return {"trip": link.report.round_trip, "draining": link.draining}


def _name(link: AgentLink, stamp: float) -> Head:
    return {"cluster": link.cluster, "instance": link.instance, "stamp": stamp}
