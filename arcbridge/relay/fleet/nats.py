"""The fleet of several relays over NATS.

A relay that holds an agent of cluster X listens, in one queue group with its peers, to X's subject and to that of the
agent's instance. So "who has an agent of X" is asked of NATS itself: a subject without listeners is refused at once,
and what a relay held is gone with its connection. There is nothing that could be stale.

A dial between relays takes two requests:

1. ASK → OFFER. The asking relay asks the subject; NATS picks one relay of the group, which names the agent it would ask
   and a subject of its own, good for one ACCEPT within two seconds.
2. ACCEPT → ANSWER. With the DIAL. The holder asks its agent and answers with the agent's status, or with why not.

Why two: an ASK that was held up, doubled, or taken by a relay that then froze changes nothing, because the asking relay
accepts one offer, of the request that it still waits for, and an offer lapses by the holder's own monotonic clock. So
no clocks of two machines are ever compared, a late DIAL never reaches an agent, and of two relays that both heard the
ASK one acts. And it is known within a second whether a relay has such an agent, while an agent may take ten.

Every reply names what it answers (the random request, or the dial's token) and the cluster, and both are compared: a
crossed reply is counted and treated as silence. Whatever is on these subjects, AUTH goes only to an agent that
holds the cluster's own CA.

Subjects, behind the fleet's prefix:

    dial.CLUSTER             ASK, any that stays      queue group `relays`
    dial.CLUSTER.INSTANCE    ASK, this instance       queue group `relays`; INSTANCE is a hash of the id
    offer.NAME.ID.*          ACCEPT, to this relay process
    relay.ID                 "at which internal address are you?", or "who was to join you cannot" (relay.hop)
    relay.lost               "this user has lost the right to this cluster", to all
    relay.questions          a question to all: an operator's, or which agents each has (`nats_questions`)
    inbox.NAME.>             replies
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import secrets
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog

from arcbridge.errors import ArcbridgeError, ConfigError, JoinRefused
from arcbridge.net.address import parse_address
from arcbridge.net.join import JoinCode
from arcbridge.observe.metrics import Metrics
from arcbridge.relay.fleet.base import FIRST_SHARE, AgentLink, Fleet, Lost, RelayPeers, no_agent
from arcbridge.relay.fleet.nats_questions import NatsQuestions
from arcbridge.relay.nats import NatsConnection, NatsUnavailable, NoReply, NoResponder, Subscription, end, subject_token
from arcbridge.tasks import TaskSet, cancel_and_wait
from arcbridge.wire.records import Dial, Record, Status

if TYPE_CHECKING:
    from nats.aio.msg import Msg

ASK_DEADLINE: Final = 0.8
"""Seconds for an OFFER, twice at most: with NATS frozen, which looks like this, a refusal comes within two."""
OFFER_LIFE: Final = 2.0
_ASKS: Final = 5
_MAX_OFFERS: Final = 10_000
_MAX_DIALS: Final = 10_000
_GRACE: Final = 0.5
"""The holder's own deadline strikes first, so that the asking relay hears why."""
COUNT_DEADLINE: Final = 0.5
COUNT_SILENCE: Final = 0.1
"""Counting is over when nothing came for this long after the first answer: all hear the question in one instant."""
_MOST_NAMED: Final = 200
"""Clusters that a question names: of more, each relay says all agents that it has."""
_ADDRESSES: Final = 1000
ADDRESS_LIFE: Final = 60.0
"""Seconds for which another relay's address is kept: a false one heals without a restart (docs/threats.md#F21)."""
_QUEUE: Final = "relays"
_RETRY_AFTER: Final = 5

OUTCOMES: Final = ("local", "remote", "no_agent", "refused", "unavailable")
"""How dials ended, for the metrics: consent of an agent here or at another relay, or why not."""

log = structlog.get_logger("arcbridge.relay")


@dataclass(frozen=True, slots=True)
class DialAsk(Record):
    """Who would ask an agent of `cluster`? `instance`: of this id only; `avoid`: not of this one."""

    request: str = ""
    cluster: str = ""
    instance: str = ""
    avoid: str = ""


@dataclass(frozen=True, slots=True)
class Offer(Record):
    """I would ask `instance`: accept on `subject`. Without a subject: no suitable agent is here."""

    request: str = ""
    cluster: str = ""
    instance: str = ""
    subject: str = ""


@dataclass(frozen=True, slots=True, repr=False)
class Accept(Record):
    """Send this `dial` (a Dial record), and answer within `wait` milliseconds. `wait` 0: forget it."""

    cluster: str = ""
    dial: bytes = b""
    wait: int = 0


@dataclass(frozen=True, slots=True, repr=False)
class DialAnswer(Record):
    """The agent's consent (`status`, a Status record), or the `code` and words of a refusal."""

    token: str = ""
    cluster: str = ""
    code: int = 0
    message: str = ""
    retry_after: int = 0
    status: bytes = b""


@dataclass(frozen=True, slots=True)
class _DialAttempt:
    """One agent that can be asked."""

    instance: str
    ask: Callable[[Dial, float], Coroutine[object, object, Status]]
    outcome: str


class NatsFleet(Fleet):
    """The caller starts and closes `connection`. `internal_address` is given to relays that ask for it."""

    def __init__(self, connection: NatsConnection, *, internal_address: str = "") -> None:
        super().__init__()
        self._nats = connection
        connection.on_change = lambda: self.on_engine()
        self._internal_address = internal_address
        self.relay_id = secrets.token_hex(8)
        """This process, for the tokens that other relays may see; another one after a restart."""
        self._prefix = connection.prefix
        self._offers_at = f"{self._prefix}.offer.{connection.name}.{self.relay_id}"
        self._listening: dict[str, Subscription] = {}
        self._own: list[Subscription] = []
        self._changing = asyncio.Lock()
        self._draining = False
        self._numbers = itertools.count()
        self._offers: dict[str, tuple[AgentLink, asyncio.TimerHandle]] = {}
        self._dials: dict[str, asyncio.Task[None]] = {}
        self._addresses: dict[str, tuple[str, float]] = {}
        """Addresses of relay processes, each with the time of the loop until which it is not asked for again."""
        self._tasks = TaskSet()
        self._questions = NatsQuestions(
            connection, self.relay_id, lambda question: self.on_question(question), self._tasks
        )
        self.on_failed: Callable[[bytes], None] = lambda key: None
        """Called with the SHA-256 of a dial token whose agent came to a relay that could not pass it on."""
        self.dials = dict.fromkeys(OUTCOMES, 0)
        self.crossed = 0
        """Replies that answered something else than what was asked."""

    @property
    def peers(self) -> RelayPeers:
        return self

    @property
    def engine_connected(self) -> bool | None:
        return self._nats.connected

    async def ask_others(self, question: Mapping[str, Any]) -> list[dict[str, Any]]:
        return await self._questions.ask(question)

    def add_metrics(self, metrics: Metrics) -> None:
        counter = metrics.counter
        counter(
            "fleet_dials_total",
            "Dial requests, by how they ended: consent of an agent here or at another relay, or why not.",
            {"result": OUTCOMES},
            lambda: self.dials,
        )
        metrics.gauge("fleet_connected", "Whether NATS answers.", None, lambda: self._nats.connected)
        counter("fleet_connections_total", "Connections to NATS.", None, lambda: self._nats.connections)
        counter("fleet_slow_consumers_total", "Subscriptions that could not keep up and were made anew.", None,
                lambda: self._nats.slow_consumers)  # fmt: skip
        counter("fleet_crossed_replies_total", "Replies to another request, and requests with a foreign reply subject.",
                None, lambda: self.crossed + self._nats.foreign_replies)  # fmt: skip

    async def start(self) -> None:
        listen = self._nats.subscribe
        self._own = [
            await listen(f"{self._offers_at}.*", self._accepted),
            await listen(f"{self._prefix}.relay.{self.relay_id}", self._told_or_asked),
            await listen(f"{self._prefix}.relay.lost", self._heard_of_loss),
            *await self._questions.start(),
        ]

    async def close(self) -> None:
        await self.drain()
        for subscription in self._own:
            await self._nats.unsubscribe(subscription)
        self._own.clear()
        for _, lapse in self._offers.values():
            lapse.cancel()
        self._offers.clear()
        await end([*self._tasks, *self._dials.values()])
        await super().close()

    async def drain(self) -> None:
        async with self._changing:
            self._draining = True
            gone, self._listening = self._listening, {}
        for subscription in gone.values():
            await self._nats.unsubscribe(subscription)
        if gone:
            try:
                # Until the server knows: after that no ASK is sent here any more.
                await self._nats.flush(1.0)
            except NatsUnavailable:
                # Then other relays cannot ask either.
                pass

    async def register(self, link: AgentLink) -> None:
        await super().register(link)
        await self._listen(link)

    async def unregister(self, link: AgentLink) -> None:
        await super().unregister(link)
        await self._listen(link)

    def reported(self, link: AgentLink) -> None:
        if link.draining:
            self._tasks.start(self._listen(link))

    async def _listen(self, link: AgentLink) -> None:
        """Listen to exactly the subjects of the agents that are here. For the subject of a cluster those alone count
        that stay: else relays whose agents drain would be asked in the place of the others."""
        of_cluster = f"{self._prefix}.dial.{subject_token(link.cluster)}"
        of_instance = f"{of_cluster}.{_hashed(link.instance)}"
        async with self._changing:
            for subject, instance in ((of_cluster, ""), (of_instance, link.instance)):
                here = self.has(link.cluster, instance) if instance else self.pick(link.cluster, "") is not None
                wanted = here and not self._draining
                if wanted and subject not in self._listening:
                    self._listening[subject] = await self._nats.subscribe(subject, self._asked, _QUEUE)
                elif not wanted and subject in self._listening:
                    await self._nats.unsubscribe(self._listening.pop(subject))

    # -- asking ----------------------------------------------------------------------------------------------------

    async def dial(self, cluster: str, dial: Dial, timeout: float) -> Status:
        try:
            status, outcome = await self._dial(cluster, dial, timeout)
        except JoinRefused as error:
            of = {JoinCode.NO_AGENT: "no_agent", JoinCode.NO_INSTANCE: "no_agent", JoinCode.INTERNAL: "unavailable"}
            self.dials[of.get(JoinCode(error.code), "refused")] += 1
            raise
        self.dials[outcome] += 1
        return status

    async def _dial(self, cluster: str, dial: Dial, timeout: float) -> tuple[Status, str]:
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        tried: list[AgentLink] = []
        first = await self._find(cluster, dial.instance, tried, "")
        if first is None:
            wanted = dial.instance
            others = wanted and (self.has(cluster) or await self._ask(cluster, "", "") is not None)
            raise no_agent(cluster, wanted if others else "")
        asking = loop.create_task(first.ask(dial, until - loop.time()))
        try:
            # A silent first one gets its share of the time, and all of it when there is no other.
            await asyncio.wait({asking}, timeout=(until - loop.time()) * FIRST_SHARE)
            if asking.done() and asking.exception() is None:
                return asking.result(), first.outcome
            try:
                second = await self._find(cluster, dial.instance, tried, first.instance)
            except JoinRefused:
                second = None
            if second is None or (asking.done() and asking.exception() is None):  # the first one's consent came late
                return await asking, first.outcome
            asking.cancel()
            return await second.ask(dial, max(until - loop.time(), 0.05)), second.outcome
        finally:
            await cancel_and_wait(asking)

    async def _find(self, cluster: str, wanted: str, tried: list[AgentLink], avoid: str) -> _DialAttempt | None:
        """Return the next agent to ask, by promise 2; a link of this relay before one of another. None: no agent is
        left.

        Raises `JoinRefused` INTERNAL when no agent is here and the other relays cannot be asked.
        """
        if wanted:
            # Through another relay, too, if the first way to it failed.
            return self._here(cluster, wanted, tried, ()) or await self._ask(cluster, wanted, "")
        again = bool(avoid)
        here = self._here(cluster, "", tried, (avoid,) if avoid else ())
        if here is not None:
            return here
        there = await self._ask(cluster, "", avoid)
        if there is None and again:
            # The same instance through another connection is still another way to it.
            return self._here(cluster, "", tried, ())
        return there

    def _here(self, cluster: str, wanted: str, tried: list[AgentLink], avoid: Sequence[str]) -> _DialAttempt | None:
        link = self.pick(cluster, wanted, tried, avoid)
        if link is None:
            return None
        tried.append(link)
        return _DialAttempt(link.instance, partial(self.ask, link), "local")

    async def _ask(self, cluster: str, instance: str, avoid: str) -> _DialAttempt | None:
        """Return an offer of another relay; None when there is none."""
        try:
            subject = f"{self._prefix}.dial.{subject_token(cluster)}"
        except ConfigError:
            return None
        if instance:
            subject += f".{_hashed(instance)}"
        silent = 0
        for _ in range(_ASKS):
            ask = DialAsk(secrets.token_hex(8), cluster, instance, avoid)
            try:
                offer = Offer.decode(await self._nats.request(subject, ask.encode(), ASK_DEADLINE))
            except NoResponder:
                return None
            except (NoReply, ArcbridgeError) as error:
                # One relay may be frozen, and the next pick of the group another; NATS itself may be.
                silent += 1
                if silent == 2 or isinstance(error, NatsUnavailable):
                    raise JoinRefused(
                        JoinCode.INTERNAL,
                        f"no agent of cluster {cluster} is connected to this relay, and the other relays of the fleet "
                        "cannot be asked now; try again",
                        retry_after=_RETRY_AFTER,
                    ) from error
                continue
            foreign = offer.subject and not self._nats.is_below("offer", offer.subject)
            if foreign or (offer.request, offer.cluster) != (ask.request, cluster):
                self._cross("offer", cluster)
            elif offer.subject and offer.instance != avoid and instance in ("", offer.instance):
                return _DialAttempt(offer.instance, partial(self._accept, offer.subject, cluster), "remote")
        return None

    async def _accept(self, subject: str, cluster: str, dial: Dial, timeout: float) -> Status:
        accept = Accept(cluster, dial.encode(), max(int(timeout * 1000), 1))
        try:
            answer = DialAnswer.decode(await self._nats.request(subject, accept.encode(), timeout + _GRACE))
            if (answer.token, answer.cluster) != (dial.token, cluster):
                self._cross("answer", cluster)
                raise NoReply("the answer belongs to another dial")
            if answer.code:
                raise JoinRefused(answer.code, answer.message, retry_after=answer.retry_after or None)
            status = Status.decode(answer.status)
            if status.token != dial.token:
                self._cross("status", cluster)
                raise NoReply("the status belongs to another dial")
            return status
        except JoinRefused:
            raise
        except NoResponder as error:
            raise JoinRefused(
                JoinCode.NO_AGENT, f"the relay that held the agent of cluster {cluster} is gone", retry_after=2
            ) from error
        except ArcbridgeError as error:
            raise JoinRefused(
                JoinCode.AGENT_TIMEOUT,
                f"the relay that holds an agent of cluster {cluster} did not answer the dial request",
                retry_after=_RETRY_AFTER,
            ) from error
        except asyncio.CancelledError:
            self._tasks.start(self._say(subject, Accept(cluster).encode()))
            raise

    def _cross(self, what: str, cluster: str) -> None:
        self.crossed += 1
        log.warning("fleet reply of another request", reply=what, cluster=cluster)

    # -- answering -------------------------------------------------------------------------------------------------

    def _asked(self, message: Msg) -> None:
        try:
            ask = DialAsk.decode(message.data)
        except ArcbridgeError:
            return
        link = self.pick(ask.cluster, ask.instance, (), (ask.avoid,) if ask.avoid else ())
        subject = ""
        if link is not None and not self._draining and len(self._offers) < _MAX_OFFERS:
            number = f"{next(self._numbers)}-{secrets.token_hex(4)}"
            subject = f"{self._offers_at}.{number}"
            lapse = asyncio.get_running_loop().call_later(OFFER_LIFE, self._offers.pop, number, None)
            self._offers[number] = (link, lapse)
        instance = link.instance if link is not None else ""
        self._reply(message, Offer(ask.request, ask.cluster, instance, subject).encode())

    def _accepted(self, message: Msg) -> None:
        number = message.subject.rpartition(".")[2]
        try:
            accept = Accept.decode(message.data)
            dial = Dial.decode(accept.dial)
        except ArcbridgeError:
            return
        if not accept.wait:
            if (running := self._dials.get(number)) is not None:
                running.cancel()
            return
        offer = self._offers.pop(number, None)
        if offer is None or len(self._dials) >= _MAX_DIALS:
            # Lapsed, or accepted before: the relay that waits for this has no dial here.
            refusal = no_agent(accept.cluster)
            self._reply(message, _refusal(dial.token, accept.cluster, refusal))
            return
        link, lapse = offer
        lapse.cancel()
        if accept.cluster != link.cluster or dial.cluster != link.cluster:
            self._cross("accept", link.cluster)
            return
        task = asyncio.get_running_loop().create_task(self._serve(message, link, dial, accept.wait / 1000))
        self._dials[number] = task
        task.add_done_callback(lambda _: self._dials.pop(number, None))

    async def _serve(self, message: Msg, link: AgentLink, dial: Dial, timeout: float) -> None:
        try:
            if link.draining and not dial.instance:
                raise no_agent(link.cluster)
            status = await self.ask(link, dial, timeout)
        except JoinRefused as error:
            self._reply(message, _refusal(dial.token, link.cluster, error))
        else:
            self._reply(message, DialAnswer(dial.token, link.cluster, status=status.encode()).encode())

    # -- who is there ----------------------------------------------------------------------------------------------

    async def count(self, clusters: Sequence[str]) -> Mapping[str, int]:
        parts = [clusters[begin : begin + _MOST_NAMED] for begin in range(0, len(clusters), _MOST_NAMED)]
        answers = await asyncio.gather(
            *(
                self._questions.ask({"ask": "agents", "clusters": list(part)}, COUNT_DEADLINE, COUNT_SILENCE)
                for part in parts
            )
        )
        # An agent is connected to several relays and counts once.
        found = {(str(row.get("cluster")), str(row.get("agent"))) for rows in answers for row in rows}
        found |= {(link.cluster, link.instance) for cluster in clusters for link in self.links(cluster)}
        counts = Counter(cluster for cluster, _ in found)
        return {cluster: counts[cluster] for cluster in clusters}

    # -- where the others are --------------------------------------------------------------------------------------

    async def address_of(self, relay_id: str) -> str:
        """Return the internal address of the relay process with this id; empty when there is none (any more).

        Raises `NatsUnavailable`, and `NoReply` also where the reply is no address.
        """
        if len(relay_id) != 16 or not set(relay_id) <= set("0123456789abcdef"):
            return ""
        now = asyncio.get_running_loop().time()
        address, until = self._addresses.get(relay_id, ("", now))
        if until <= now:
            try:
                answer = await self._nats.request(f"{self._prefix}.relay.{relay_id}", b"", ASK_DEADLINE)
            except NoResponder:
                return ""
            address = answer.decode("ascii", "replace")
            if address:
                try:
                    parse_address(address)
                except ConfigError as error:
                    raise NoReply("another relay of the fleet sent something that is no address") from error
            if len(self._addresses) >= _ADDRESSES:
                self._addresses.clear()
            self._addresses[relay_id] = address, now + ADDRESS_LIFE
        return address

    async def tell_failed(self, relay_id: str, token: str) -> None:
        """Tell that relay that the agent under this dial token came out here and cannot be passed on."""
        await self._say(f"{self._prefix}.relay.{relay_id}", hashlib.sha256(token.encode()).digest())

    def _told_or_asked(self, message: Msg) -> None:
        if message.data:
            self.on_failed(bytes(message.data))
        else:
            self._reply(message, self._internal_address.encode())

    # -- rights that are lost --------------------------------------------------------------------------------------

    def tell_lost(self, lost: Lost) -> None:
        # It comes back to this relay, too, which has done it already: doing it twice changes nothing.
        self._tasks.start(self._say(f"{self._prefix}.relay.lost", lost.encode()))

    def _heard_of_loss(self, message: Msg) -> None:
        try:
            lost = Lost.decode(message.data)
        except ArcbridgeError:
            return
        self.on_lost(lost)

    # -- small things ----------------------------------------------------------------------------------------------

    def _reply(self, message: Msg, payload: bytes) -> None:
        if message.reply:
            self._tasks.start(self._say(message.reply, payload))

    async def _say(self, subject: str, payload: bytes) -> None:
        try:
            await self._nats.publish(subject, payload)
        except NatsUnavailable:
            # The asking relay finds out by its own deadline.
            pass


def _hashed(instance: str) -> str:
    """Return an instance id, which an agent chooses freely, as one token of a subject."""
    return hashlib.sha256(instance.encode()).hexdigest()[:32]


def _refusal(token: str, cluster: str, error: JoinRefused) -> bytes:
    return DialAnswer(token, cluster, error.code, error.message, error.retry_after or 0).encode()
