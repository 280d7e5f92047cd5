"""Asks for groups for a time, and approves, denies and withdraws what was asked for, in one cluster.

All of it is requests to the cluster's API server as the user: its RBAC and its admission policies decide, and what the
agent lends follows (docs/how-to/elevation.md). It prints nothing. Invariant: a decision is written over the version
that was read, so that of two approvals none is lost.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from arcbridge.client.session.session_manager import SessionManager
from arcbridge.client.session.stream_http import api_client
from arcbridge.errors import ArcbridgeError, ConfigError, PermissionRefused, RemoteProtocolError, Unreachable
from arcbridge.observe.untrusted_text import clean
from arcbridge.tasks import cancel_and_wait
from arcbridge.untrusted_json import read_json_object

if TYPE_CHECKING:
    from arcbridge.client.service import ClientContext

_VERSION: Final = "access.arcbridge.io/v1alpha1"
_API: Final = f"/apis/{_VERSION}"
_WHO: Final = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
MOST_ANSWER: Final = 4 * 1024 * 1024
"""Bytes of one answer of the API server."""
PAGES: Final = (200, 20, 1)
"""Objects of one page: fewer where an answer is too long. Users choose how long theirs are, within the policies."""
MOST_LISTED: Final = 10_000
"""Objects of a list; behind them it is cut."""
LAPSES: Final = 24 * 3600.0
"""Seconds after its creation in which agents begin a request."""
AGENTS: Final = 30.0
"""Seconds in which an agent should have begun what has all approvals."""
POLL: Final = 1.0
"""Seconds between two looks at a request that waits."""
LONGEST: Final = 3600.0
"""Seconds that are asked for where no time is given, if the rule allows as much."""
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_NO_OBJECT: Final = (
    "no elevation here: the cluster's operator has not switched it on (elevation.enabled of the agent's chart)"
)

Document = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class OfferedRule:
    """A rule as the client reads it, to choose one."""

    name: str
    groups: tuple[str, ...]
    most_seconds: int
    users: tuple[str, ...]
    user_groups: tuple[str, ...]
    approvers: tuple[str, ...]
    approvals: int

    def names(self, user: str, groups: Sequence[str]) -> bool:
        """Return whether a user may ask by it."""
        return user in self.users or not set(groups).isdisjoint(self.user_groups)


@dataclass(frozen=True, slots=True)
class ElevationRequest:
    """A request as the client shows it."""

    name: str
    user: str
    rule: str
    groups: tuple[str, ...]
    reason: str
    seconds: int
    created: float
    """Unix seconds; 0: unknown."""
    approved_by: tuple[str, ...]
    ended: str
    """`denied by …`, `withdrawn by …`, or empty."""
    until: float
    """Unix seconds; 0: it has not begun."""
    document: Document

    def state(self, now: float) -> str:
        """Return `waiting`, `active`, `over`, `lapsed`, `denied` or `withdrawn`."""
        if self.ended:
            return self.ended.partition(" ")[0]
        if not self.until:
            return "lapsed" if self.created and self.created + LAPSES <= now else "waiting"
        return "active" if self.until > now else "over"


class Elevations:
    """Rules and requests of one cluster, over a session that is kept up meanwhile."""

    def __init__(self, sessions: SessionManager) -> None:
        self._sessions = sessions

    async def user(self) -> tuple[str, tuple[str, ...]]:
        """Return the name and the groups that the user has in the cluster."""
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        found = await self._ask("POST", _WHO, review)
        try:
            info = found["status"]["userInfo"]
            return str(info["username"]), tuple(map(str, info.get("groups") or ()))
        except (KeyError, TypeError, AttributeError) as error:
            raise RemoteProtocolError("the API server does not say who you are") from error

    async def rules(self) -> list[OfferedRule]:
        """Return all rules, by name."""
        return sorted(map(_rule, await self._list("accessrules")), key=lambda one: one.name)

    async def requests(self) -> list[ElevationRequest]:
        """Return all requests, the newest first."""
        found = await self._list("accessrequests")
        found.sort(key=lambda one: str(_at(one, "metadata", "creationTimestamp")), reverse=True)
        return [_elevation(one) for one in found]

    async def request(self, name: str) -> ElevationRequest:
        """Return one request."""
        return _elevation(await self._ask("GET", _path(name)))

    async def ask(
        self, user: str, rule: OfferedRule, groups: Sequence[str], seconds: int, reason: str
    ) -> ElevationRequest:
        """Ask for groups by a rule."""
        spec = {"user": user, "rule": rule.name, "groups": list(groups), "seconds": seconds, "reason": reason}
        prefix = re.sub(r"[^a-z0-9]+", "-", user.rpartition(":")[2].partition("@")[0].lower()).strip("-")[:40] or "user"
        document = {"apiVersion": _VERSION, "kind": "AccessRequest", "metadata": {"generateName": f"{prefix}-"}}
        return _elevation(await self._ask("POST", f"{_API}/accessrequests", {**document, "spec": spec}))

    async def begun(self, name: str, approvals: int) -> ElevationRequest:
        """Wait until a request that needs some approvals is a grant, and return it. Raises ElevationRefused where it is
        denied, withdrawn or lapsed, or no agent begins it."""
        approved = 0.0
        while True:
            found = await self.request(name)
            if found.ended:
                raise ElevationRefused(f"the request {name} was {found.ended}")
            if found.until:
                return found
            if found.state(time.time()) == "lapsed":
                raise ElevationRefused(f"the request {name} has lapsed: it was not approved within a day; ask anew")
            if len(found.approved_by) >= approvals:
                approved = approved or time.monotonic()
                if time.monotonic() >= approved + AGENTS:
                    raise ElevationRefused(
                        f"the request {name} has its approvals, and no agent begins it: its rule does not allow it, or "
                        f"the agents' self-check (elevation) says why; `arcbridge withdraw {name}` takes it back"
                    )
            await asyncio.sleep(POLL)

    async def approve(self, name: str) -> ElevationRequest:
        """Approve a request, by a group of the user's that its rule names."""
        user, groups = await self.user()

        def decide(found: ElevationRequest, rule: OfferedRule | None) -> Document:
            if found.state(time.time()) == "lapsed":
                raise ConfigError(f"the request {name} has lapsed: it is older than a day, and lends nothing any more")
            if rule is None or not rule.approvals:
                raise ConfigError(f"the request {name} needs no approval, or its rule {found.rule!r} is gone")
            by = next((group for group in rule.approvers if group in groups), "")
            if not by:
                raise ElevationRefused(
                    f"you are in no group that approves by the rule {rule.name}: {_words(rule.approvers)}"
                )
            before = _at(found.document, "status", "approvals") or []
            return {"approvals": [*before, {"user": user, "group": by}]}

        return await self._decide(name, decide)

    async def deny(self, name: str, reason: str) -> ElevationRequest:
        """Deny a request, or end what it lends."""
        user, _ = await self.user()
        denial = {"user": user, **({"reason": reason} if reason else {})}
        return await self._decide(name, lambda found, rule: {"denied": denial})

    async def withdraw(self, name: str) -> ElevationRequest:
        """Withdraw a request of the user's own, or one that the user may approve; what it lends ends."""
        user, _ = await self.user()
        return await self._decide(name, lambda found, rule: {"withdrawn": {"user": user}})

    # -- inside -------------------------------------------------------------------------------------------------------

    async def _decide(
        self, name: str, decide: Callable[[ElevationRequest, OfferedRule | None], Document]
    ) -> ElevationRequest:
        while True:
            found = await self.request(name)
            if found.ended:
                raise ConfigError(f"the request {name} was {found.ended}; nothing was done")
            rule = next((one for one in await self.rules() if one.name == found.rule), None)
            version = _at(found.document, "metadata", "resourceVersion")
            patch = {"metadata": {"resourceVersion": version}, "status": decide(found, rule)}
            try:
                return _elevation(await self._ask("PATCH", f"{_path(name)}/status", patch))
            except _Conflict:
                await asyncio.sleep(POLL / 4)  # another decision was written meanwhile

    async def _list(self, resource: str) -> list[Document]:
        found: list[Document] = []
        query: dict[str, str] = {}
        while len(found) < MOST_LISTED:
            page = await self._page(f"{_API}/{resource}", query)
            items = page.get("items")
            found += [one for one in items if isinstance(one, dict)] if isinstance(items, list) else []
            token = _at(page, "metadata", "continue")
            if not token:
                break
            query["continue"] = str(token)
        return found

    async def _page(self, path: str, query: Mapping[str, str]) -> dict[str, Any]:
        for size in PAGES:
            try:
                return await self._ask("GET", path, query={**query, "limit": str(size)})
            except _TooLong as error:
                failed = error
        raise failed

    async def _ask(
        self, method: str, path: str, document: object = None, query: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        body = None if document is None else json.dumps(document).encode()
        async with api_client(await self._sessions.ready()) as http:
            headers = {} if body is None else {"Content-Type": kind}
            async with http.request(
                method, path, data=body, headers=headers, params=query, allow_redirects=False
            ) as answer:
                text = bytearray()
                async for piece in answer.content.iter_any():
                    text += piece
                    if len(text) > MOST_ANSWER:
                        raise _TooLong("the API server's answer is too long")
                if answer.status in (200, 201):
                    return read_json_object(text, MOST_ANSWER)
                raise _refusal(answer.status, text)


class ElevationRefused(PermissionRefused):
    """The cluster refuses what was asked of it; that the user may reach the cluster is not in question."""

    status_code = 422
    reason = "Invalid"


class _TooLong(RemoteProtocolError):
    """An answer has more than `MOST_ANSWER` bytes."""


class _Conflict(ArcbridgeError):
    """The object is another since it was read."""


@asynccontextmanager
async def elevations_of(context: ClientContext) -> AsyncIterator[Elevations]:
    """Give the elevations of the one cluster of the settings. Raises ArcbridgeError."""
    cluster, *more = context.clusters()
    if more:
        raise ConfigError("flag --cluster: elevation is of one cluster; name one")
    context.require_login()
    session = context.session(cluster)
    running = None
    try:
        await session.connect_once()
        running = asyncio.get_running_loop().create_task(session.run(), name="session")
        yield Elevations(session)
    finally:
        if running is not None:
            await cancel_and_wait(running)
        session.close()
        await session.wait_closed()


def choose(
    rules: Sequence[OfferedRule], user: str, groups: Sequence[str], *, wanted: Sequence[str] = (), name: str = ""
) -> tuple[OfferedRule, tuple[str, ...]]:
    """Return the rule to ask by, and the groups to ask for: those that are wanted, or all of the rule's. Raises
    ElevationRefused or ConfigError, which say what there is."""
    own = [one for one in rules if one.names(user, groups)]
    fitting = [one for one in own if set(wanted) <= set(one.groups) and name in ("", one.name)]
    if not fitting:
        there = "; ".join(f"{one.name}: {_words(one.groups)}" for one in own) or "none names you"
        raise ElevationRefused(f"no rule of this cluster gives you that ({there})")
    if len(fitting) > 1:
        raise ConfigError(f"flag --rule: several rules fit, name one: {_words([one.name for one in fitting])}")
    return fitting[0], tuple(wanted) or fitting[0].groups


def seconds_of(rule: OfferedRule, given: float) -> int:
    """Return for how long to ask. Raises ConfigError where the rule gives less than `given` seconds; 0: none given."""
    if given > rule.most_seconds:
        raise ConfigError(f"flag --for: the rule {rule.name} gives its groups for {rule.most_seconds} s at most")
    return int(given) or int(min(LONGEST, rule.most_seconds))


def _path(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{clean(name, 60)!r} is no name of a request; `arcbridge elevations` lists them")
    return f"{_API}/accessrequests/{name}"


def _refusal(status: int, body: bytes | bytearray) -> ArcbridgeError:
    found = read_json_object(body)
    message = clean(str(found.get("message") or f"code {status}"), 800)
    if status == 409:
        return _Conflict(message)
    if status == 404:
        name = _at(found, "details", "name")  # it is there where the kind is known, and the object is not
        said = f"there is no request {clean(str(name), 253)!r}; `arcbridge elevations` lists them"
        return ConfigError(said) if name else ElevationRefused(_NO_OBJECT)
    if status in (401, 403, 422):
        return ElevationRefused(message)
    return Unreachable(f"the API server answered code {status}: {message}")


def _words(names: Sequence[str]) -> str:
    return ", ".join(clean(one, 100) for one in names[:20]) + " …" * (len(names) > 20)


def _rule(document: Document) -> OfferedRule:
    approvers = _at(document, "spec", "approvers")
    return OfferedRule(
        str(_at(document, "metadata", "name")),
        _texts(_at(document, "spec", "groups")),
        _whole(_at(document, "spec", "maxSeconds")),
        _texts(_at(document, "spec", "requesters", "users")),
        _texts(_at(document, "spec", "requesters", "groups")),
        _texts(_at(approvers, "groups")),
        max(1, _whole(_at(approvers, "count"))) if isinstance(approvers, dict) else 0,
    )


def _elevation(document: Document) -> ElevationRequest:
    status = _at(document, "status") or {}
    approvals = _at(status, "approvals")
    ended = ""
    for word in ("denied", "withdrawn"):
        if isinstance(one := _at(status, word), dict):
            why = f": {clean(str(one['reason']), 256)}" if one.get("reason") else ""
            ended = f"{word} by {clean(str(one.get('user')), 253)}{why}"
    return ElevationRequest(
        str(_at(document, "metadata", "name")),
        str(_at(document, "spec", "user")),
        str(_at(document, "spec", "rule")),
        _texts(_at(document, "spec", "groups")),
        str(_at(document, "spec", "reason")),
        _whole(_at(document, "spec", "seconds")),
        _seconds(_at(document, "metadata", "creationTimestamp")),
        tuple(str(_at(one, "user")) for one in approvals) if isinstance(approvals, list) else (),
        ended,
        _seconds(_at(status, "until")),
        document,
    )


def _at(document: Any, *path: str) -> Any:
    for name in path:
        document = document.get(name) if isinstance(document, dict) else None
    return document


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def _seconds(value: Any) -> float:
    try:
        return datetime.fromisoformat(value).timestamp() if isinstance(value, str) else 0.0
    except ValueError:
        return 0.0
