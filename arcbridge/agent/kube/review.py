"""Asks the API server whether a user may impersonate another one (`kubectl --as`).

Source: Kubernetes, "User impersonation" and SubjectAccessReview. One review per part: the user (or service account),
each group, the uid, each extra value; all must be allowed. A review takes the user's groups as given, so
`system:authenticated`, which the API server adds to every authenticated user, is added here.

Answers, yes and no alike, are cached for 30 s at most. Invariant: a review that gets no answer is 503 and never a yes.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from arcbridge.agent.accounts import Account
from arcbridge.agent.kube.apiserver import AnswerFailed, ApiServer
from arcbridge.agent.kube.impersonation import Subject
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.identity.claims import Identity

PATH = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
CACHE_TIME = 30.0
CACHE_SIZE = 4096
DEADLINE = 10.0
MAX_PARTS = 64
"""Reviews that one request may cause; a `--as` with more groups and extras is refused."""

_SERVICE_ACCOUNT = "system:serviceaccount:"


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a subject that is impersonated, as resource attributes of a review."""

    group: str
    resource: str
    name: str
    namespace: str = ""
    subresource: str = ""


def parts_of(target: Subject) -> list[Part]:
    """Return the parts of `target`, the user first."""
    user = target.user
    if user.startswith(_SERVICE_ACCOUNT) and user.count(":") == 3:
        namespace, name = user.removeprefix(_SERVICE_ACCOUNT).split(":")
        parts = [Part("", "serviceaccounts", name, namespace)]
    else:
        parts = [Part("", "users", user)]
    parts += [Part("", "groups", group) for group in target.groups]
    if target.uid:
        parts.append(Part("authentication.k8s.io", "uids", target.uid))
    parts += [Part("authentication.k8s.io", "userextras", value, subresource=key) for key, value in target.extra]
    return parts


@dataclass(frozen=True, slots=True)
class Approval:
    """The API server's permission that `identity` may run as `subject`."""

    identity: Identity
    subject: Subject


class Reviewer:
    """Reviews and caches the answers; one for the whole agent."""

    def __init__(self, api: ApiServer, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._api = api
        self._clock = clock
        self._answers: OrderedDict[bytes, tuple[bool, float]] = OrderedDict()
        """(allowed, deadline) by the digest of whole identity and part, the earliest deadline first. Not by these
        themselves: a caller chooses names of 64 KiB (docs/threats.md#H25)."""
        self.asked = 0
        """Reviews sent to the API server."""

    async def approve(self, identity: Identity, target: Subject, account: Account) -> Approval:
        """Return the approval that `identity`, of this account, may run as `target`.

        Raises RequestRefusal: 403 in Kubernetes' words, 429 where the user has no turn to ask, 502 to 504
        without an answer.
        """
        user = Subject.of(identity, self._api.impersonable)
        parts = parts_of(target)
        if len(parts) > MAX_PARTS:
            raise RequestRefusal(400, f"impersonation (--as) of more than {MAX_PARTS} groups and extras is not carried")
        for part in parts:
            if not await self._allowed(user, part, account):
                raise RequestRefusal(403, _denied(user, part), prefix="")
        return Approval(identity, target)

    async def _allowed(self, user: Subject, part: Part, account: Account) -> bool:
        key = hashlib.sha256(repr((user, part)).encode("utf-8", "surrogatepass")).digest()
        known = self._answers.get(key)
        now = self._clock()
        if known is not None and now < known[1]:
            return known[0]
        allowed = await self._ask(user, part, account)
        self._answers[key] = (allowed, now + CACHE_TIME)
        self._answers.move_to_end(key)
        while len(self._answers) > CACHE_SIZE or next(iter(self._answers.values()))[1] <= now:
            self._answers.popitem(last=False)
        return allowed

    async def _ask(self, user: Subject, part: Part, account: Account) -> bool:
        self.asked += 1
        try:
            async with asyncio.timeout(DEADLINE):
                code, answer = await self._api.ask("POST", PATH, _review(user, part), account=account)
            if code == 401:
                raise self._api.upstream.own_refusals.credential()
            if code != 201:
                raise RequestRefusal(503, f"the API server refused to review impersonation (code {code})")
            # An evaluation error with `allowed: true` is still a yes of the authorizer; without, it is a no.
            return answer["status"].get("allowed") is True
        except TimeoutError as error:  # the user's turn to connect may have come late
            raise RequestRefusal(503, f"the review of impersonation (--as) took longer than {DEADLINE:g} s") from error
        except (AnswerFailed, KeyError, TypeError, AttributeError) as error:
            raise RequestRefusal(
                503, "impersonation (--as) cannot be reviewed: the API server does not answer"
            ) from error


def _review(user: Subject, part: Part) -> dict[str, Any]:
    extra: dict[str, list[str]] = {}
    for key, value in user.extra:
        extra.setdefault(key, []).append(value)
    attributes = {name: value for name, value in asdict(part).items() if value} | {"verb": "impersonate"}
    spec: dict[str, Any] = {
        "user": user.user,
        "groups": [*user.groups, "system:authenticated"],
        "resourceAttributes": attributes,
    }
    if user.uid:
        spec["uid"] = user.uid
    if extra:
        spec["extra"] = extra
    return {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}


def _denied(user: Subject, part: Part) -> str:
    where = f'in the namespace "{part.namespace}"' if part.namespace else "at the cluster scope"
    resource = f"{part.resource}/{part.subresource}" if part.subresource else part.resource
    group = f".{part.group}" if part.group else ""
    return (
        f'{part.resource}{group} "{part.name}" is forbidden: User "{user.user}" cannot impersonate resource '
        f'"{resource}" in API group "{part.group}" {where}'
    )
