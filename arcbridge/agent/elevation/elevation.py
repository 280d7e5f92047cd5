"""Lends groups to users: follows rules and requests, begins what was approved, and ends what runs by a grant with it.

A grant is in force once an agent has written `from` and `until` into the request's status, by the API server's clock:
all agents then read the same times, and of several that begin one request the API server takes the first. It decides
nothing about a request to the API server (`kube.authorize`). Invariants: while rules or requests cannot be followed, or
the admission policies are missing, no grant is added, and those that are known run to their end; a stream that began
by a grant is reset within `TICK` seconds of the grant's end.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from dataclasses import replace
from typing import Final

import structlog

from arcbridge.agent.elevation.collection import ServerClock, WatchedCollection
from arcbridge.agent.elevation.default_restrictions import DefaultRestrictions
from arcbridge.agent.elevation.grants import ENDINGS, GrantBook, by_user
from arcbridge.agent.elevation.objects import (
    API,
    API_GROUP,
    API_VERSION,
    REQUESTS,
    RULES,
    AccessRequest,
    AccessRule,
    Document,
    is_deleted,
    read_request,
    read_rule,
)
from arcbridge.agent.kube.apiserver import AnswerFailed, ApiServer
from arcbridge.agent.kube.caller import Caller, Lent
from arcbridge.agent.restrictions.session_restrictions import SessionRestrictions
from arcbridge.identity.authentication import ELEVATED
from arcbridge.identity.claims import Identity
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.untrusted_text import clean
from arcbridge.settings.choices import READ_ONLY
from arcbridge.settings.config import ElevationConfig
from arcbridge.tasks import cancel_and_wait, report_failure
from arcbridge.units import rfc3339

TICK: Final = 5.0
"""Seconds between two looks at the clock, where no event and no end of a grant comes before."""
DEADLINE: Final = 10.0
"""Seconds for beginning one request, and for the question whether the policies hold."""
REFUSES: Final = "an access request is its writer's own"
"""What the chart's admission policy says of a request in another's name; the agent looks for it."""
REFUSES_DECISION: Final = "a withdrawal is its writer's own"
"""What its policy on decisions says of a withdrawal in another's name."""
_NOBODY: Final = "arcbridge:nobody"
_FORGED: Final = {
    "apiVersion": f"{API_GROUP}/{API_VERSION}",
    "kind": "AccessRequest",
    "metadata": {"generateName": "probe-"},
    "spec": {"user": _NOBODY, "rule": "none", "groups": ["arcbridge:none"], "seconds": 60, "reason": "probe"},
}
_log = structlog.get_logger("arcbridge.agent")


class Elevation:
    """What is lent in one agent; `run` keeps it. It is the `Lender` of the sessions' callers."""

    def __init__(self, config: ElevationConfig, api: ApiServer) -> None:
        self._config = config
        self._api = api
        self.clock = ServerClock()
        self.book = GrantBook(config.groups)
        self.rules = WatchedCollection(
            api, self.clock, RULES, self._more_rules, self._rules_listed, self._rule_changed, self._wake
        )
        self.requests = WatchedCollection(
            api, self.clock, REQUESTS, self._more_requests, self._requests_listed, self._request_changed, self._wake
        )
        self._callers: dict[int, Caller] = {}
        """Those of all sessions, by `id`: they are changed, and have no hash."""
        self._in_force: dict[str, AccessRequest] = {}
        """By uid, the grants as the callers have them."""
        self._of_user: dict[str, list[AccessRequest]] = {}
        self._closed: dict[str, str] = {}
        """By uid, why a grant in force is none any more, where that is not its time or its rule."""
        self._rules_changed = False
        """Whether a rule is another since the last look: it may name other users."""
        self._news = asyncio.Event()
        self._working: asyncio.Task[None] | None = None
        """Asks the API server, which may take its time: the ends of grants do not wait for that."""
        self._look_at = 0.0
        """When it is asked about the policies again, in seconds of the loop; a list has that done at once."""
        self._begin_at = 0.0
        """When requests are begun again, in seconds of the loop: the API server is slow or away."""
        self._not_begun: set[str] = set()
        """Uids of requests that the API server did not let begin since the last list."""
        self._began = 0
        self._ended = dict.fromkeys(ENDINGS, 0)
        self._streams_ended = 0
        self._requests_hold = False
        """Whether the API server refuses a request in another's name."""
        self._decisions_hold: bool | None = None
        """Whether it refuses a withdrawal in another's name; None: there was no request to ask by."""

    # -- the sessions -------------------------------------------------------------------------------------------------

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups that rules may lend."""
        return self._config.groups

    def enter(self, caller: Caller) -> None:
        """Lend to a session that begins, for as long as it lasts."""
        self._callers[id(caller)] = caller
        caller.lender = self
        caller.borrow()

    def leave(self, caller: Caller) -> None:
        """Forget a session that is over."""
        self._callers.pop(id(caller), None)

    def lend(self, identity: Identity, own: SessionRestrictions | None, *, token_mode: bool = False) -> Lent | None:
        """Return what holds of a session of an identity besides its token (`kube.caller.Lender`)."""
        now = self.clock.now
        # A grant is the person's: a program that acts for one gets nothing by the user's name alone (decision 0066). A
        # session in token mode runs as its own token, with that token's groups. One that gave up rights when it began
        # has what it was given, and no more because its user asked for more (decision 0053).
        may_ask = not (identity.actor or token_mode)
        of_user = self._of_user.get(identity.username, ()) if may_ask and own is None else ()
        grants = [one for one in of_user if one.until > now and self.book.rule_gives(one, identity)]
        if grants:
            groups = dict.fromkeys((*identity.groups, *(group for one in grants for group in one.groups)))
            extra = {**identity.extra, ELEVATED: tuple(one.text for one in grants)}
            lent = replace(identity, groups=tuple(groups), extra=extra)
            return Lent(lent, None, tuple((one.uid, one.text) for one in grants))
        named = self._config.default_groups
        if self._config.default == READ_ONLY and ("*" in named or not identity.groups_at_api_server.isdisjoint(named)):
            return Lent(identity, DefaultRestrictions.over(own, may_ask=may_ask))
        return None

    # -- keeping it ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Follow rules and requests, and lend, until cancelled."""
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(one.run(), name="elevation-watch") for one in (self.rules, self.requests)]
        for task in tasks:
            task.add_done_callback(report_failure)
        try:
            while True:
                now = self.clock.now
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, min(TICK, self.book.next_end(now) - now))):
                        await self._news.wait()
                self._news.clear()
                self.settle()
                if self.current and (self._working is None or self._working.done()):
                    self._working = loop.create_task(self.work(), name="elevation-work")
        finally:
            await cancel_and_wait(*tasks, *filter(None, (self._working,)))

    @property
    def current(self) -> bool:
        """Whether nothing of rules and requests is missing."""
        return self.rules.current and self.requests.current

    @property
    def policies_hold(self) -> bool:
        """Whether no policy is known to be missing."""
        return self._requests_hold and self._decisions_hold is not False

    @property
    def not_begun(self) -> int:
        """How many approved requests the API server did not let begin since the last list."""
        return len(self._not_begun)

    def settle(self) -> None:
        """Have every session borrow what is in force now, and count what began and ended since the last time."""
        now = self.clock.now
        self.book.forget_past(now)
        grants = self.book.grants(now)
        if not (self.current and self._requests_hold and self._decisions_hold):
            grants = {uid: one for uid, one in grants.items() if uid in self._in_force}
        before, self._in_force = self._in_force, grants
        changed = {uid: one for uid, one in (before | grants).items() if before.get(uid) != grants.get(uid)}
        if not changed and not self._rules_changed:
            return
        self._of_user = by_user(grants)
        users = {one.user for one in changed.values()}
        some = [one for one in self._callers.values() if self._rules_changed or one.identity.username in users]
        self._rules_changed = False
        ended = sum(caller.borrow() for caller in some)
        self._streams_ended += ended
        for uid, one in changed.items():
            if uid not in before:
                self._note_begin(one)
            elif uid not in grants:
                self._note_end(one, self._closed.get(uid, "expired" if one.until <= now else "rule"))
        self._closed.clear()
        if ended:
            _log.info("elevated streams ended", streams=ended)

    def _note_begin(self, grant: AccessRequest) -> None:
        self._began += 1
        _log.info(
            "elevation begun",
            user=grant.user,
            elevation=grant.name,
            rule=grant.rule,
            groups=",".join(grant.groups),
            until=rfc3339(grant.until),
            approved_by=",".join(user for user, _ in grant.approvals),
            reason=grant.reason,
        )

    def _note_end(self, grant: AccessRequest, why: str) -> None:
        self._ended[why] += 1
        _log.info("elevation ended", user=grant.user, elevation=grant.name, reason=why)

    async def work(self) -> None:
        """Ask whether the policies hold, once for each list and each `TICK` where they do not, and begin the requests
        that may begin."""
        loop = asyncio.get_running_loop()
        unasked = self._decisions_hold is None and bool(self.book.requests)
        if loop.time() >= self._look_at or (unasked and self._look_at == math.inf):
            self._look_at, before = math.inf, (self._requests_hold, self._decisions_hold)
            await self._look_at_policies()
            if not self.policies_hold or (self.book.requests and not self._decisions_hold):
                self._look_at = min(self._look_at, loop.time() + TICK)
            if (self._requests_hold, self._decisions_hold) != before:
                self._news.set()
        if self._requests_hold and self._decisions_hold and loop.time() >= self._begin_at:
            for request in self.book.may_begin(self.clock.now):
                if request.uid not in self._not_begun and not await self._begin(request):
                    self._begin_at = loop.time() + TICK
                    break

    async def _begin(self, request: AccessRequest) -> bool:
        """Write when a request begins and ends; return whether the API server has answered for this request. Of several
        agents the first one's times count: the version that was read goes with it."""
        now = int(self.clock.now)
        times = {"from": rfc3339(now), "until": rfc3339(now + request.seconds)}
        patch = {"metadata": {"resourceVersion": request.version}, "status": times}
        code, said = await self._ask("PATCH", f"{API}/{REQUESTS}/{request.name}/status", patch)
        if code in (400, 403, 413, 422):
            self._not_begun.add(request.uid)
            _log.warning("elevation not begun", elevation=request.name, status=code, reason=clean(said, 400))
        return code in (200, 404, 409) or request.uid in self._not_begun

    async def _look_at_policies(self) -> None:
        """Ask the API server, as dry runs, for a request and a withdrawal in another's name: it has to refuse both."""
        code, said = await self._ask("POST", f"{API}/{REQUESTS}?dryRun=All", _FORGED)
        if code:
            self._requests_hold = code in (403, 422) and REFUSES in said
        if name := next(iter(self.book.requests), ""):
            forged = {"status": {"withdrawn": {"user": _NOBODY}}}
            code, said = await self._ask("PATCH", f"{API}/{REQUESTS}/{name}/status?dryRun=All", forged)
            if code not in (0, 404, 409):  # it is gone meanwhile, or another: that says nothing
                self._decisions_hold = code in (403, 422) and REFUSES_DECISION in said

    async def _ask(self, method: str, path: str, document: object) -> tuple[int, str]:
        """Return the code and the message of an answer; code 0 where there is none."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        try:
            async with asyncio.timeout(DEADLINE):
                code, answer = await self._api.ask(method, path, document, content_type=kind)
        except (AnswerFailed, TimeoutError):
            return 0, ""  # the watch fails too, and says so
        return code, str(answer.get("message", "")) if isinstance(answer, dict) else ""

    # -- what the watches bring ---------------------------------------------------------------------------------------

    def _wake(self) -> None:
        self._news.set()

    def _more_rules(self, found: list[AccessRule], page: list[Document]) -> list[AccessRule]:
        for document in page:
            with suppress(ValueError):  # it was written past the schema: it lends nothing
                found.append(read_rule(document))
        return found

    def _rules_listed(self, found: list[AccessRule]) -> None:
        self.book.rules = {one.name: one for one in found}
        self._rules_changed = True

    def _rule_changed(self, kind: str, document: Document) -> None:
        name = str(document["metadata"]["name"])
        self.book.rules.pop(name, None)
        if kind != "DELETED":
            self.book.rules |= {one.name: one for one in self._more_rules([], [document])}
        self._rules_changed = True
        self._wake()

    def _more_requests(self, found: list[AccessRequest], page: list[Document]) -> list[AccessRequest]:
        more = []
        for document in page:
            with suppress(ValueError):
                more.append(read_request(document))
                self._note_closed(more[-1])
        return self.book.bounded([*found, *more], self.clock.now)

    def _requests_listed(self, found: list[AccessRequest]) -> None:
        self._look_at = 0.0
        self._not_begun.clear()
        left = self._in_force.keys() - {one.uid for one in found} - self._closed.keys()
        self._closed |= dict.fromkeys((uid for uid in left if self._in_force[uid].until > self.clock.now), "deleted")
        self.book.replace_requests(found, self.clock.now)

    def _request_changed(self, kind: str, document: Document) -> None:
        name, uid = str(document["metadata"]["name"]), str(document["metadata"]["uid"])
        self.book.requests.pop(name, None)
        if kind == "DELETED" or is_deleted(document):
            if uid in self._in_force:
                self._closed[uid] = "deleted"
        else:
            with suppress(ValueError):
                request = read_request(document)
                self._note_closed(request)
                self.book.keep(request, self.clock.now)
        self._wake()

    def _note_closed(self, request: AccessRequest) -> None:
        if request.uid in self._in_force and (request.withdrawn or request.denied):
            self._closed[request.uid] = "withdrawn" if request.withdrawn else "denied"

    # -- what operators see -------------------------------------------------------------------------------------------

    def register(self, metrics: Metrics) -> None:
        """Register what is counted."""
        counter, gauge = metrics.counter, metrics.gauge
        gauge("elevations", "Grants in force.", None, lambda: len(self._in_force))
        counter("elevations_total", "Grants that came in force.", None, lambda: self._began)
        counter("elevations_ended_total", "Grants that ended, by why.", {"reason": ENDINGS}, lambda: self._ended)
        counter("elevated_streams_ended_total", "Streams reset because the grant by which they began had ended.", None,
                lambda: self._streams_ended)  # fmt: skip
        gauge("elevation_current", "1 while rules and requests are followed and the policies hold.", None,
              lambda: self.current and self.policies_hold)  # fmt: skip
        counter("elevation_requests_left_out_total", "Requests that were not kept, because there are too many.", None,
                lambda: self.book.left_out)  # fmt: skip
