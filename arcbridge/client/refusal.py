"""Errors as kubectl shows them: one `metav1.Status`, and the words for what can go wrong on the way to a cluster.

`Retry-After` makes kubectl wait and repeat up to ten times, POST as well: it is there only when the request surely
never left this process *and* another try soon may work.
"""

from __future__ import annotations

import json
from typing import NoReturn

from arcbridge.errors import (
    ArcbridgeError,
    ConnectionLost,
    JoinRefused,
    OverLimit,
    PermissionRefused,
    RemoteProtocolError,
    SessionEnded,
    Unauthenticated,
    Unreachable,
    WrongAgent,
)
from arcbridge.net.join import JoinCode
from arcbridge.observe.foreign_text import clean
from arcbridge.wire.frames import GoawayCode

ACCESS_REVOKED = "access was revoked: "
"""What the sentence of an agent that has revoked a user begins with."""
SESSION_TOO_OLD = "a session lasts "
"""What the sentence of an agent begins with that ends a session not with its token but at its greatest age."""
GROUPS_UNAVAILABLE = "the groups of this login cannot be looked up now: "
"""What the sentence of an agent begins with that got no answer about a user's groups (`identity.refusal`)."""
SAID_LIMIT = 500
"""Bytes of an agent's sentence that are shown."""
RETRY_SOON = 1
"""Seconds: with kubectl's ten repeats this bridges ten seconds."""


def status_body(error: ArcbridgeError) -> bytes:
    """The Status object (Kubernetes API conventions, "Response Status Kind")."""
    message = error.message if error.message.startswith("arcbridge: ") else f"arcbridge: {error.message}"
    return json.dumps(
        {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": error.reason,
            "code": error.status_code,
        }
    ).encode()


def response(error: ArcbridgeError, *, head_only: bool = False) -> bytes:
    """A whole HTTP/1.1 response that ends its connection."""
    from http import HTTPStatus  # no start needs it

    body = status_body(error)
    phrase = HTTPStatus(error.status_code).phrase
    lines = [
        f"HTTP/1.1 {error.status_code} {phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
    ]
    if error.retry_after is not None and error.retry_after <= RETRY_SOON:
        # A longer one would be ten times as much silence at kubectl, which says nothing while it waits.
        lines.append(f"Retry-After: {error.retry_after}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii") + (b"" if head_only else body)


def raise_user_error(error: ArcbridgeError, cluster: str) -> NoReturn:
    """Raise an error whose message is for the user in place of `error`, which becomes its cause."""
    if isinstance(error, JoinRefused):
        raise of_join(error, cluster) from error
    if isinstance(error, SessionEnded | ConnectionLost):
        raise of_session(error, cluster) from error
    if isinstance(error, RemoteProtocolError):
        raise Unreachable(f'cannot reach cluster "{cluster}": {error.message}') from error
    raise error


def is_elsewhere(error: BaseException | None) -> bool:
    """Whether the relay has agents of the cluster, but not the one that was asked for, or brings another one."""
    while error is not None:
        if isinstance(error, WrongAgent):
            return True
        if isinstance(error, JoinRefused):
            return error.code == JoinCode.NO_INSTANCE
        error = error.__cause__
    return False


def of_join(error: JoinRefused, cluster: str) -> ArcbridgeError:
    """A refused join as an error for the user. Of what the relay sent only the retry time is used, never its text."""
    name = f'cluster "{cluster}"'
    later = min(max(error.retry_after or RETRY_SOON, 1), 30)
    match error.code:
        case JoinCode.UNAUTHENTICATED:
            return of_token("the relay does not accept the access token", error.message, "the relay")
        case JoinCode.FORBIDDEN:
            return PermissionRefused(
                f"{name} does not exist or you may not reach it; ask the relay's operator for access"
            )
        case JoinCode.NO_INSTANCE:
            return Unreachable(f"the agent of {name} that has the session is not connected", retry_after=RETRY_SOON)
        case JoinCode.NO_AGENT:
            return Unreachable(
                f"{name} has no connected agent; check that its agent runs and reaches the relay",
                # An agent that restarts is back within kubectl's ten repeats.
                retry_after=RETRY_SOON if error.retry_after else None,
            )
        case JoinCode.AGENT_TIMEOUT:
            # No Retry-After: each repeat would wait as long again, and kubectl would be silent for minutes.
            return Unreachable(f"the agent of {name} did not answer in time; try again")
        case JoinCode.AGENT_REFUSED:
            return Unreachable(f"the agent of {name} refused the session; its log says why", retry_after=later)
        case JoinCode.OVERLOADED:
            return Unreachable("the relay has no room for another session; try again later", retry_after=later)
        case JoinCode.LIMIT:
            return Unreachable(
                "you have as many sessions as the relay allows a user, or opened too many in a minute; "
                "close some, or try again later",
                retry_after=later,
            )
        case JoinCode.DRAINING:
            return Unreachable("the relay is about to restart", retry_after=later)
        case JoinCode.BAD_REQUEST:
            return Unreachable("the relay did not understand the request; are client and relay of one version?")
        case _:
            return Unreachable(f"the relay could not reach {name}; its log says why", retry_after=error.retry_after)


def of_token(what: str, said: str, place: str) -> Unauthenticated:
    """A refused token as an error for the user, in this client's words; `said` by the end that refused, the `place`."""
    from arcbridge.identity.proof import explain, refusal_in  # no start needs it

    reason = refusal_in(said)
    return Unauthenticated(
        f"{what}; log in again, or put a new token there" if not reason else f"{what}: {explain(reason, place)}"
    )


def of_session(error: ArcbridgeError, cluster: str) -> ArcbridgeError:
    """Why a session could not begin or go on, as an error for the user."""
    name = f'cluster "{cluster}"'
    if isinstance(error, SessionEnded):
        match error.code:
            case GoawayCode.UNAUTHENTICATED:
                return of_token(f"{name} does not accept the token", error.message, "its agent")
            case GoawayCode.EXPIRED if error.message.startswith(SESSION_TOO_OLD):
                return Unreachable(
                    f"the session with {name} reached its greatest age; start again what ran in it, and log in again "
                    "if that is asked for",
                    retry_after=RETRY_SOON,
                )
            case GoawayCode.EXPIRED:
                return Unauthenticated("the login has expired; log in again")
            case GoawayCode.FORBIDDEN:
                return PermissionRefused(f"{name} does not let you in; ask its operator for access")
            case GoawayCode.REVOKED:
                said = _said(error).removeprefix(ACCESS_REVOKED)
                return PermissionRefused(f"access to {name} was revoked: {said or 'ask its operator for access'}")
            case GoawayCode.VERSION:
                return Unreachable(
                    f"client and agent of {name} speak different protocol versions; update the older one"
                )
            case GoawayCode.LIMIT:
                return OverLimit(
                    f"the agent of {name} refused or ended your session at one of its limits; "
                    "end sessions and commands that you do not need, or ask the cluster's operator for a higher limit",
                    retry_after=RETRY_SOON,
                )
            case GoawayCode.UNAVAILABLE if error.message.startswith(GROUPS_UNAVAILABLE):
                # No Retry-After: the agent itself has just waited for seconds, and would ten times more.
                said = _said(error).removeprefix(GROUPS_UNAVAILABLE)
                return Unreachable(f"the agent of {name} cannot say which groups you are in: {said}")
            case GoawayCode.DRAINING | GoawayCode.REPLACED | GoawayCode.UNAVAILABLE:
                return Unreachable(f"the agent of {name} is not available now", retry_after=RETRY_SOON)
            case GoawayCode.CROSSED:
                return Unreachable(
                    f"the relay joined you to an agent of {name} that came for another user; if it happens again, tell "
                    "the relay's operator",
                    retry_after=RETRY_SOON,
                )
            case GoawayCode.PROTOCOL | GoawayCode.FLOW_CONTROL:
                return Unreachable(
                    f"the agent of {name} ended the session because this client broke the protocol; its log says how",
                    retry_after=RETRY_SOON,
                )
            case GoawayCode.GONE:
                return Unreachable(
                    f"the agent of {name} no longer has the session: it was restarted, or it waited too long",
                    retry_after=RETRY_SOON,
                )
            case _:
                return Unreachable(f"the session with {name} ended", retry_after=RETRY_SOON)
    if isinstance(error, ConnectionLost):
        return Unreachable(f"the connection to {name} was lost: {error.message}", retry_after=RETRY_SOON)
    if isinstance(error, RemoteProtocolError):
        return Unreachable(f"the session with {name} ended: {error.message}", retry_after=RETRY_SOON)
    return error


def _said(error: SessionEnded) -> str:
    """The agent's sentence, fit for a terminal: it may quote an operator, of the cluster or of a relay."""
    return clean(error.message, SAID_LIMIT)
