"""Administration over the HTTP API: what an operator's commands do, for people whom an `[[admin]]` of the policy names.

    POST /v1/admin   {command, …} -> {rows, more}     `command` is one of `COMMANDS`; its other members are its
                                                      arguments, strings

It needs an access token with its proof, as `/v1/clusters` does, and gives each caller the clusters of its own
`[[admin]]` alone; what is not about one cluster (users, the policy) is for callers who have all of them. `more` says
that there are more rows than were sent. The policy, and whose login is revoked, are asked again when the whole request
is there.

Invariants: a caller who administers nothing gets one answer, whether the relay has administrators or not; no command
changes the policy or accepts a version of it, so that no administrator gives a right to any user; each act leaves a
line in the log with the person, and a join token is in its answer and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import Final, NamedTuple

import structlog
from aiohttp import web

from arcbridge.errors import ArcbridgeError, ConfigError, PermissionRefused, StateError
from arcbridge.identity.claims import Identity
from arcbridge.identity.policy import EVERY_CLUSTER, WHAT
from arcbridge.identity.policy_rules import covers
from arcbridge.limiters import KeyedTokenBucket
from arcbridge.net.address import source_of
from arcbridge.net.join import JOIN_ID
from arcbridge.observe.untrusted_text import clean
from arcbridge.pki.names import check_cluster_name
from arcbridge.relay import admin
from arcbridge.relay.admin import Administered
from arcbridge.relay.audit.log import NOTHING
from arcbridge.relay.audit.record import Actor
from arcbridge.relay.http.answers import ApiRefusal
from arcbridge.relay.http.api import SOURCES, SUBJECTS, Api
from arcbridge.relay.http.server import address_of, read_body
from arcbridge.relay.operations import Question, Row
from arcbridge.tasks import cancel_and_wait

COMMANDS_AT_ONCE: Final = 60
"""Commands that one person has at once."""
COMMANDS_RATE: Final = 0.5
"""Commands per second and person that grow back."""
REFUSALS: Final = 30
"""Refusals that one address has at once; each is a line in the log."""
REFUSALS_RATE: Final = 0.1
"""Refusals per second and address that grow back."""
MOST_ROWS: Final = 5000
"""Rows of an answer: 2 MiB of sessions."""
MOST_TOKENS: Final = 10_000
"""Join tokens in the registry, used up and expired ones too, above which none is made here."""
OWN_TOKENS: Final = 1000
"""Of them those of one caller's clusters, so that no team takes the room of all."""
MAX_TTL: Final = 7 * 86400.0
"""Seconds of a join token that is made here: it outlives the right of its maker by no more."""
AT_ONCE: Final = 2
"""Commands that are worked on at a time; each takes memory for its rows."""
TURN: Final = 5.0
"""Seconds that a command waits for its turn."""
ENDING: Final = 2.0
"""Seconds that the relay waits at its stop for commands that are under way."""
MOST_CHARACTERS: Final = 2048
"""Of each argument: as the longest name of a user."""
ARGUMENTS: Final = ("cluster", "uses", "ttl", "rebind", "id", "session", "user", "before", "reason")
REFUSED: Final = (
    "you may not do this, or there is no such thing: [[admin]] in the relay's policy says who administers which "
    "clusters, and what of them; users and the policy are for those who administer every cluster"
)
"""The one answer to a caller who administers nothing, and about what is not the caller's."""

log = structlog.get_logger("arcbridge.relay")


class Scope(NamedTuple):
    """What one caller administers, of what the command is about."""

    relay: Administered
    clusters: tuple[str, ...]
    """Names and patterns."""
    revocable: tuple[str, ...]
    """Those that the caller may revoke."""

    def own(self, name: str) -> str:
        """Return the name of a cluster of the caller's. Raises `ConfigError`, `PermissionRefused`."""
        name = check_cluster_name(name)
        if not covers(self.clusters, name):
            raise PermissionRefused(REFUSED)
        return name

    def among(self, rows: list[Row], key: str = "cluster") -> list[Row]:
        """Return the rows about clusters of the caller's."""
        return [row for row in rows if covers(self.clusters, str(row.get(key)))]


Given = Mapping[str, str]
Run = Callable[[Scope, Given], Awaitable[list[Row]]]


@dataclass(frozen=True, slots=True)
class AdminCommand:
    """One command, named as on the relay's machine."""

    what: tuple[str, ...]
    """An `[[admin]]` that gives any of these gives it."""
    run: Run
    takes: tuple[str, ...] = ()
    """Its arguments. Another one is refused, because what it was meant to do would not be done."""
    whole: bool = False
    """Whether it is about the whole relay."""

    @property
    def acts(self) -> bool:
        """Whether it changes anything."""
        return "read" not in self.what


async def _token_create(scope: Scope, given: Given) -> list[Row]:
    cluster, ttl = scope.own(given["cluster"]), admin.parse_ttl(given["ttl"])
    rebind = given["rebind"] == "yes"
    if rebind and not covers(scope.revocable, cluster):
        # An enrolment under another CA has all present agents of the cluster refused, as a revocation has.
        raise PermissionRefused(REFUSED)
    if ttl > MAX_TTL:
        raise ConfigError("a join token that is made over HTTPS lives for 7d at most")
    tokens = await admin.list_tokens(scope.relay)
    if EVERY_CLUSTER not in scope.clusters and len(scope.among(tokens)) >= OWN_TOKENS:
        raise StateError(f"your clusters have {OWN_TOKENS} join tokens: delete some of them first")
    if len(tokens) >= MOST_TOKENS:
        raise StateError(f"the relay has {MOST_TOKENS} join tokens: delete some of them first")
    made = await admin.create_token(
        scope.relay, cluster=cluster, uses=admin.parse_uses(given["uses"]), ttl=ttl, rebind=rebind
    )
    return [{key: value for key, value in asdict(made).items() if key not in ("command", "in_cluster")}]


async def _token_list(scope: Scope, given: Given) -> list[Row]:
    return scope.among(await admin.list_tokens(scope.relay))


async def _token_delete(scope: Scope, given: Given) -> list[Row]:
    token_id = given["id"].strip().partition(".")[0]
    if not any(row["id"] == token_id for row in await _token_list(scope, given)):
        raise PermissionRefused(REFUSED)
    return [{"id": await admin.delete_token(scope.relay, token_id)}]


async def _cluster_list(scope: Scope, given: Given) -> list[Row]:
    return scope.among((await admin.list_clusters(scope.relay, scope.clusters)).rows, "name")


async def _cluster_revoke(scope: Scope, given: Given) -> list[Row]:
    name = scope.own(given["cluster"])
    async with scope.relay.registry(True) as registry:
        # The command on the relay's machine keeps unknown names too; here they could fill the registry.
        if await registry.cluster(name) is None:
            raise StateError(f"there is no cluster {name}: 'cluster list' shows those that are")
    await admin.revoke_cluster(scope.relay, name)
    return [{"cluster": name}]


async def _cluster_restore(scope: Scope, given: Given) -> list[Row]:
    return [{"cluster": await admin.restore_cluster(scope.relay, scope.own(given["cluster"]))}]


async def _cluster_delete(scope: Scope, given: Given) -> list[Row]:
    return [{"cluster": await admin.delete_cluster(scope.relay, scope.own(given["cluster"]))}]


async def _session_list(scope: Scope, given: Given, session: str = "") -> list[Row]:
    question = {"ask": "sessions", "clusters": list(scope.clusters), "most": MOST_ROWS + 1, "session": session}
    rows = await scope.relay.ask(question) or []
    return sorted(scope.among(rows), key=lambda row: float(row.get("since", 0.0)))


async def _refusal_list(scope: Scope, given: Given) -> list[Row]:
    rows = await scope.relay.ask({"ask": "refusals", "clusters": list(scope.clusters)}) or []
    return sorted(scope.among(rows), key=lambda row: float(row.get("at", 0.0)))


async def _session_end(scope: Scope, given: Given) -> list[Row]:
    wanted = given["session"]
    if JOIN_ID.fullmatch(wanted) is None:
        raise ConfigError("which session? give its id: 'session list' shows those that run")
    rows = await _session_list(scope, given, wanted)
    found = [row for row in rows if wanted in (row["session"], row["first_session"])]
    if not found:
        raise PermissionRefused(REFUSED)
    # Each by its present id: a client says itself which one was its first.
    return [ended for row in found for ended in await admin.end_session(scope.relay, row["session"], given["reason"])]


async def _user_list(scope: Scope, given: Given) -> list[Row]:
    return await admin.list_users(scope.relay)


async def _user_revoke(scope: Scope, given: Given) -> list[Row]:
    made = await admin.revoke_user(scope.relay, given["user"], given["before"], given["reason"])
    return [{"user": made.user, "before": made.before}]


async def _user_restore(scope: Scope, given: Given) -> list[Row]:
    return [{"user": await admin.restore_user(scope.relay, given["user"])}]


async def _policy_list(scope: Scope, given: Given) -> list[Row]:
    return await admin.list_policies(scope.relay)


COMMANDS: Final = {
    "token create": AdminCommand(("tokens",), _token_create, ("cluster", "uses", "ttl", "rebind")),
    "token list": AdminCommand(("tokens", "read"), _token_list),
    "token delete": AdminCommand(("tokens",), _token_delete, ("id",)),
    "cluster list": AdminCommand(WHAT, _cluster_list),
    "cluster revoke": AdminCommand(("revocations",), _cluster_revoke, ("cluster",)),
    "cluster restore": AdminCommand(("revocations",), _cluster_restore, ("cluster",)),
    "cluster delete": AdminCommand(("revocations",), _cluster_delete, ("cluster",)),
    "session list": AdminCommand(("sessions", "read"), _session_list),
    "refusal list": AdminCommand(("read",), _refusal_list),
    "session end": AdminCommand(("sessions",), _session_end, ("session", "reason")),
    "user list": AdminCommand(("revocations", "read"), _user_list, whole=True),
    "user revoke": AdminCommand(("revocations",), _user_revoke, ("user", "before", "reason"), whole=True),
    "user restore": AdminCommand(("revocations",), _user_restore, ("user",), whole=True),
    "policy list": AdminCommand(("read",), _policy_list, whole=True),
}


class AdminApi:
    """Answers administrators at one process of the relay."""

    relay: Administered
    """The relay that this process is of, reached from within; set before the port is open."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._access = api.checks.access
        self._people = KeyedTokenBucket[str](COMMANDS_AT_ONCE, COMMANDS_RATE, size=SUBJECTS)
        self._refusals = KeyedTokenBucket[str](REFUSALS, REFUSALS_RATE, size=SOURCES)
        self._turn = asyncio.Semaphore(AT_ONCE)
        self._working: dict[str, asyncio.Task[list[Row]]] = {}
        """The commands that have their turn, each with its request or without, by subject: one person has one turn."""

    def install(self, app: web.Application) -> None:
        """Add the route, and what ends with the application."""
        app.router.add_route("POST", "/v1/admin", partial(self._api.for_caller, answer=self._answer))
        app.on_cleanup.append(self._end)

    async def _answer(self, request: web.Request, identity: Identity) -> web.Response:
        source = address_of(request)
        if not self._access.administered(identity, *WHAT):
            # Before the body is read: such a caller costs no more than a request for the clusters.
            raise self._refusal(identity, source, "no [[admin]] is for this user")
        self._api.spend("administration", self._people, identity.subject, "you give this relay too many commands")
        if request.content_type != "application/json":
            raise ApiRefusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send the command as application/json")
        name, *values = await read_body(request, "command", optional=ARGUMENTS, strict=True)
        if (known := COMMANDS.get(name)) is None:
            raise ApiRefusal(
                HTTPStatus.BAD_REQUEST, "this relay does not know the command; it may be of another version"
            )
        if surplus := [key for key, value in zip(ARGUMENTS, values, strict=True) if value and key not in known.takes]:
            raise ApiRefusal(HTTPStatus.BAD_REQUEST, f"{name} has no argument {surplus[0]} at this relay")
        if any(len(value) > MOST_CHARACTERS for value in values):
            raise ApiRefusal(HTTPStatus.BAD_REQUEST, f"an argument has more than {MOST_CHARACTERS} characters")
        given = {key: value.strip() for key, value in zip(ARGUMENTS, values, strict=True)}
        await self._take_turn(identity.subject)
        # A task of its own, which goes on when the client goes (`handler_cancellation`): what it does to the registry
        # cannot be called back, so that it keeps its turn and its record has its true end.
        task = asyncio.create_task(self._api.payer_of(identity).steps(self._work(name, given, identity, source)))
        self._working[identity.subject] = task
        task.add_done_callback(partial(self._worked, identity.subject))
        await asyncio.wait({task})
        rows = task.result()
        return web.json_response({"rows": rows[:MOST_ROWS], "more": len(rows) > MOST_ROWS})

    async def _work(self, name: str, given: Given, identity: Identity, source: str) -> list[Row]:
        async with self._recorded(name, given, identity, source):
            # Only now: a right that was lost while the request came is lost.
            return await self._run(COMMANDS[name], given, identity, source)

    def _worked(self, subject: str, task: asyncio.Task[list[Row]]) -> None:
        self._turn.release()
        del self._working[subject]
        if not task.cancelled():
            task.exception()  # it is logged; where the client is gone no one else asks for it

    async def _end(self, app: web.Application) -> None:
        """Let the commands end whose clients are gone."""
        if self._working:
            await asyncio.wait(self._working.values(), timeout=ENDING)
        await cancel_and_wait(*self._working.values())

    async def _run(self, command: AdminCommand, given: Given, identity: Identity, source: str) -> list[Row]:
        clusters = self._access.administered(identity, *command.what)
        if not clusters or (command.whole and EVERY_CLUSTER not in clusters):
            raise PermissionRefused(REFUSED)
        relay, audit, actor = self.relay, self._api.audit, _actor(identity, source)

        async def answer(question: Question) -> list[Row]:
            return await relay.ask(question) or []

        recorded = replace(
            relay,
            ask=lambda question: audit.answering(question, actor, answer),
            acting=lambda act, **arguments: audit.acting(act, arguments, actor),
        )
        revocable = self._access.administered(identity, "revocations")
        return await command.run(Scope(recorded, clusters, revocable), given)

    def _refusal(
        self, identity: Identity, source: str, reason: str, command: str = "", arguments: Mapping[str, object] = NOTHING
    ) -> ArcbridgeError:
        """Log and count a refusal; return what is answered: of too many from one address, that there are too many."""
        self._api.counters.administration["refused"] += 1
        try:
            self._api.spend("administration", self._refusals, source_of(source), "too many refusals of this address")
        except ApiRefusal as error:
            return error
        facts = {"command": command, "arguments": arguments} if command else {}
        log.warning("administrator refused", user=identity.username, source=source, reason=reason, **facts)
        shown = {"command": command, **arguments}
        self._api.audit.note_stranger("administration", shown, _actor(identity, source), reason)
        return PermissionRefused(REFUSED)

    async def _take_turn(self, subject: str) -> None:
        try:
            async with asyncio.timeout(TURN):
                while True:
                    while (own := self._working.get(subject)) is not None:
                        await asyncio.wait({own})
                    await self._turn.acquire()
                    if subject not in self._working:
                        return
                    self._turn.release()
        except TimeoutError:
            busy = "the relay works on other commands, of yours or of other administrators: try again in some seconds"
            raise ApiRefusal(HTTPStatus.SERVICE_UNAVAILABLE, busy, retry_after=5) from None

    @contextlib.asynccontextmanager
    async def _recorded(self, name: str, given: Given, identity: Identity, source: str) -> AsyncIterator[None]:
        """Log and count what becomes of a command, and answer its errors in their words. Acts are in the audit besides
        (`_run`)."""
        arguments = _loggable(given)
        outcome, reason = "failed", "the relay stopped; it may have been done"
        try:
            yield
            outcome, reason = "done", ""
        except PermissionRefused:
            outcome = "refused"
            raise self._refusal(identity, source, "no [[admin]] gives this user so much", name, arguments) from None
        except ArcbridgeError as error:
            reason = error.message
            if isinstance(error, ConfigError):
                raise ApiRefusal(HTTPStatus.BAD_REQUEST, reason) from error
            if isinstance(error, StateError) and error.__cause__ is None:  # else it is about this machine
                raise ApiRefusal(HTTPStatus.CONFLICT, reason) from error
            raise
        except Exception as error:
            reason = type(error).__name__
            raise
        finally:
            if outcome != "refused":
                self._api.counters.administration[outcome] += 1
            if outcome != "refused" and COMMANDS[name].acts:
                log.info("administrator's command", user=identity.username, subject=identity.subject, source=source,
                         command=name, arguments=arguments, outcome=outcome, reason=reason)  # fmt: skip


def _actor(identity: Identity, source: str) -> Actor:
    return Actor("person", identity.username, {"subject": identity.subject, "source": source})


def _loggable(given: Given) -> dict[str, str]:
    """Return the arguments as they may be logged: of a join token that was pasted its id alone, and no name of a
    cluster that cannot be one."""
    shown = {key: clean(value, 200) for key, value in given.items() if value}
    if "id" in shown:
        shown["id"] = clean(given["id"].partition(".")[0], 64)
    if "cluster" in shown:
        try:
            check_cluster_name(given["cluster"])
        except ConfigError:
            shown["cluster"] = "?"
    return shown
