"""Errors as kubectl shows them: one `metav1.Status`, and the words for what can go wrong on the way to a cluster.

`Retry-After` makes kubectl wait and repeat up to ten times, POST as well: it is there only when the request surely
never left this process *and* another try soon may work.
"""

from __future__ import annotations

import json
from typing import NamedTuple, NoReturn

from arcbridge.client.credentials import token_refusal
from arcbridge.client.credentials.token_refusal import Reason, TokenNotTaken, reason_in
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
from arcbridge.observe.untrusted_text import clean
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
    """Return the Status object (Kubernetes API conventions, "Response Status Kind")."""
    message = error.told() if error.message.startswith("arcbridge: ") else f"arcbridge: {error.told()}"
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
    """Return a whole HTTP/1.1 response that ends its connection."""
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
        # kubectl waits up to ten times and says nothing meanwhile: ten longer waits would look like a hang.
        lines.append(f"Retry-After: {error.retry_after}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii") + (b"" if head_only else body)


class Shown(NamedTuple):
    """A token that this client has shown, to say what is wrong with it; the text itself is never said."""

    token: str = ""
    source: str = ""
    """The file it comes from; empty where it comes from none."""


NOTHING_SHOWN = Shown()


def raise_user_error(
    error: ArcbridgeError, cluster: str, *, shown: Shown = NOTHING_SHOWN, session: str = ""
) -> NoReturn:
    """Raise an error whose message is for the user in place of `error`, which becomes its cause.

    `shown`: the token that was shown to the end that refused; `session`: the join id, for a session that ended.
    """
    found = error
    if isinstance(error, JoinRefused):
        found = of_join(error, cluster, shown)
    elif isinstance(error, SessionEnded | ConnectionLost):
        found = of_session(error, cluster, shown)
    elif isinstance(error, RemoteProtocolError):
        found = Unreachable(f'cannot reach cluster "{cluster}": {error.message}')
    if found is error:
        raise error
    found.session = error.session or session
    raise found from error


def is_elsewhere(error: BaseException | None) -> bool:
    """Return whether the relay has agents of the cluster, but not the one that was asked for, or brings another one."""
    while error is not None:
        if isinstance(error, WrongAgent):
            return True
        if isinstance(error, JoinRefused):
            return error.code == JoinCode.NO_INSTANCE
        error = error.__cause__
    return False


def is_unanswered(error: Unreachable) -> bool:
    """Return whether no relay has answered the join that failed so."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, JoinRefused):
        cause = cause.__cause__
    return cause is None


def of_join(error: JoinRefused, cluster: str, shown: Shown = NOTHING_SHOWN) -> ArcbridgeError:
    """Turn a refused join into an error for the user. Of what the relay sent only the retry time, the join's id and the
    name of a rule with what it wants are used (`identity.refusal`), never its text."""
    name = f'cluster "{cluster}"'
    later = min(max(error.retry_after or RETRY_SOON, 1), 30)
    match error.code:
        case JoinCode.UNAUTHENTICATED:
            return of_token("the relay does not accept the access token", error.message, "the relay", shown)
        case JoinCode.INTERNAL if error.message.startswith(GROUPS_UNAVAILABLE):
            return Unreachable(
                "the relay cannot look up which groups you are in, because the place that has them does not answer; "
                "try again shortly, or tell the relay's operator"
            )
        case JoinCode.INTERNAL if error.message.endswith("(issuer.keys)"):
            return Unreachable(
                "the relay cannot fetch the keys of your login's issuer, so it cannot verify you; "
                "try again, or tell the relay's operator",
                retry_after=error.retry_after,
            )
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


def of_token(what: str, said: str, place: str, shown: Shown = NOTHING_SHOWN) -> TokenNotTaken:
    """Turn a refused token into an error for the user, in this client's words; `said` by the end that refused, the
    `place`."""
    from arcbridge.client.credentials.jwt_unverified import read_unverified
    from arcbridge.identity.proof import explain, refusal_in  # no start needs it
    from arcbridge.identity.refusal import told_in

    if proof := refusal_in(said):
        return TokenNotTaken(f"{what}: {explain(proof, place)}", Reason.PROOF)
    reason, told = reason_in(said), told_in(said)
    why = "" if told is None else _wrong_with(told.rule, told.wanted, place, shown)
    if why := why or token_refusal.explain(reason, place):
        return TokenNotTaken(f"{what}: {why}", reason)
    # The relay gave no reason. The audience lets the user see that two token files are swapped.
    audiences = [one for one in read_unverified(shown.token).audiences if one.isprintable() and len(one) <= 200]
    about = f" (its audience is {' and '.join(audiences)})" if audiences else ""
    return TokenNotTaken(f"{what}{about}; log in again, or put a new token there", reason)


def _wrong_with(rule: str, wanted: str, place: str, shown: Shown) -> str:
    """Say what is wrong with the token that was shown, by the rule that the other end names; empty: nothing that helps.

    What the token says, this client reads itself; of the other end there is but a name, in quotes.
    """
    from arcbridge.client.credentials.jwt_unverified import read_unverified

    token, claims = shown.source or "the token", read_unverified(shown.token)
    match rule:
        case "token.aud" if wanted:
            audiences = ", ".join(f'"{clean(one, 200)}"' for one in claims.audiences) or "none"
            return f'{token} is for audience {audiences}, {place} wants "{wanted}"'
        case "token.iss":
            return f'{token} comes from the issuer "{clean(claims.issuer, 200)}", which {place} does not accept'
        case "token.exp":
            return f"{token} has expired; log in again, or put a new token there"
        case "token.nbf":
            return f"{token} is not valid yet by the clock of {place}; compare the clocks"
        case "token.life":
            return f"{token} is valid for longer than {place} allows; have a shorter one issued"
        case "token.key" | "token.signature":
            return f"{token} is not signed with a key that its issuer publishes; log in again"
        case "claims.rule" if wanted:
            return f'{place} requires the claim "{wanted}", which {token} does not have, or with another value'
        case "claims.username" | "claims.uid" | "claims.email_verified" if wanted:
            return f'{place} needs the claim "{wanted}", which {token} does not have as it has to be'
        case "claims.groups.overage" | "claims.groups.many":
            return f"{token} has more groups than {place} takes; have the issuer send fewer"
        case "claims.elsewhere" if wanted:
            return f'{place} reads the claim "{wanted}", to which {token} only points; have the issuer put it there'
        case "user.rule" | "claims.rule":
            return f"a rule of {place} does not let {token} in; ask its operator"
        case _:
            return ""


def of_session(error: ArcbridgeError, cluster: str, shown: Shown = NOTHING_SHOWN) -> ArcbridgeError:
    """Say why a session could not begin or go on, as an error for the user."""
    name = f'cluster "{cluster}"'
    if isinstance(error, SessionEnded):
        match error.code:
            case GoawayCode.UNAUTHENTICATED:
                return of_token(f"{name} does not accept the token", error.message, "its agent", shown)
            case GoawayCode.UNAVAILABLE if error.message.endswith("(issuer.keys)"):
                return Unreachable(
                    f"the agent of {name} cannot fetch the keys of your login's issuer, so it cannot verify "
                    f"you; try again, or tell the cluster's operator"
                )
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
                # No Retry-After: the agent has waited for seconds already, and would for each of kubectl's ten repeats.
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
    """Return the agent's sentence, fit for a terminal: it may quote an operator, of the cluster or of a relay."""
    return clean(error.message, SAID_LIMIT)
