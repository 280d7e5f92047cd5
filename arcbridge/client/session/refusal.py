"""Errors as kubectl shows them: one `metav1.Status`, and the words for what can go wrong on the way to a cluster.

`Retry-After` makes kubectl wait and repeat up to ten times, POST as well: it is there only when the request surely
never left this process *and* another try soon may work.
"""

from __future__ import annotations

import errno
import json
from typing import Final, NamedTuple, NoReturn

from arcbridge import legacy_refusals
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
from arcbridge.net.dialer import ProxyRefused
from arcbridge.net.join import JoinCode
from arcbridge.observe.untrusted_text import clean
from arcbridge.refusals import Refusal, RefusalRule
from arcbridge.wire.frames import GoawayCode

SAID_LIMIT = 500
"""Bytes of an agent's sentence that are shown."""
RETRY_SOON = 1
"""Seconds: with kubectl's ten repeats this bridges ten seconds."""


def status_body(error: ArcbridgeError) -> bytes:
    """Return the Status object (Kubernetes API conventions, "Response Status Kind")."""
    return json.dumps(
        {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": f"arcbridge: {error.told()}",
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
_NO_KEYS: Final = "cannot fetch the keys of your login's issuer, so it cannot verify you; try again"


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


def relay_unreachable(url: str, error: ArcbridgeError) -> Unreachable:
    """Return the error for a relay to which there is no connection; some causes name their own cure."""
    cause = error.__cause__
    cured = isinstance(cause, ProxyRefused) or (
        isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE)
    )
    cure = "" if cured else "; check its address and this machine's network"
    return Unreachable(f"the relay {url} cannot be reached ({error.detail}){cure}")


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
    fields of its refusal are used, never its text."""
    name = f'cluster "{cluster}"'
    refusal = _refusal_of(error)
    asked = error.retry_after
    later = min(max(asked or RETRY_SOON, 1), 30)
    if error.code == JoinCode.UNAUTHENTICATED:
        return of_token("the relay does not accept the access token", refusal, "the relay", shown)
    if error.code == JoinCode.FORBIDDEN:
        return PermissionRefused(
            f"{name} does not exist or you may not reach it; ask the relay's operator for access{groups_of(refusal)}"
        )
    if error.code == JoinCode.INTERNAL and refusal.rule is RefusalRule.GROUPS_UNAVAILABLE:
        return Unreachable(
            "the relay cannot look up which groups you are in, because the place that has them does not answer; "
            "try again shortly, or tell the relay's operator"
        )
    if error.code == JoinCode.INTERNAL and refusal.rule is RefusalRule.ISSUER_KEYS:
        return Unreachable(f"the relay {_NO_KEYS}, or tell the relay's operator", retry_after=asked)
    sentences: dict[int, tuple[str, int | None]] = {
        JoinCode.NO_INSTANCE: (f"the agent of {name} that has the session is not connected", RETRY_SOON),
        # An agent that restarts is back within kubectl's ten repeats.
        JoinCode.NO_AGENT: (
            f"{name} has no connected agent; check that its agent runs and reaches the relay",
            RETRY_SOON if asked else None,
        ),
        # No Retry-After: each repeat would wait as long again, and kubectl would be silent for minutes.
        JoinCode.AGENT_TIMEOUT: (f"the agent of {name} did not answer in time; try again", None),
        JoinCode.AGENT_REFUSED: (f"the agent of {name} refused the session; its log says why", later),
        JoinCode.OVERLOADED: ("the relay has no room for another session; try again later", later),
        JoinCode.LIMIT: (
            "you have as many sessions as the relay allows a user, or opened too many in a minute; "
            "close some, or try again later",
            later,
        ),
        JoinCode.DRAINING: ("the relay is about to restart", later),
        JoinCode.BAD_REQUEST: ("the relay did not understand the request; are client and relay of one version?", None),
    }
    other = (f"the relay could not reach {name}; its log says why", asked)
    sentence, retry_after = sentences.get(error.code, other)
    return Unreachable(sentence, retry_after=retry_after)


def groups_of(refusal: Refusal) -> str:
    """Return the user's own groups as the relay got them, in brackets; empty where it does not say."""
    if refusal.rule is not RefusalRule.POLICY_RULE:
        return ""
    if refusal.wanted:
        return f' (the relay takes your groups from the claim "{refusal.wanted}", which your token does not have)'
    known = ", ".join(f'"{name}"' for name in refusal.groups) or "none"
    more = f"; {refusal.more_groups} more came" if refusal.more_groups else ""
    return f" (known groups: {known}{more})"


def of_token(what: str, refusal: Refusal, place: str, shown: Shown = NOTHING_SHOWN) -> Unauthenticated:
    """Turn a refused token into an error for the user, in this client's words; `place` is the end that refused."""
    from arcbridge.client.credentials.jwt_unverified import read_unverified  # no start needs it

    if why := _wrong_with(refusal, place, shown):
        found = Unauthenticated(f"{what}: {why}")
    else:
        # The other end gave no reason. The audience lets the user see that two token files are swapped.
        audiences = [one for one in read_unverified(shown.token).audiences if one.isprintable() and len(one) <= 200]
        about = f" (its audience is {' and '.join(audiences)})" if audiences else ""
        found = Unauthenticated(f"{what}{about}; log in again, or put a new token there")
    found.refusal = refusal
    return found


def _wrong_with(refusal: Refusal, place: str, shown: Shown) -> str:
    """Return what is wrong with the token that was shown; empty where the rule says nothing that helps its holder.

    What the token says, this client reads itself; of the other end there is but a name, in quotes.
    """
    from arcbridge.client.credentials.jwt_unverified import read_unverified
    from arcbridge.identity.proof import explain

    token, claims, wanted = shown.source or "the token", read_unverified(shown.token), refusal.wanted
    match refusal.rule:
        case RefusalRule.TOKEN_AUD if wanted:
            audiences = ", ".join(f'"{clean(one, 200)}"' for one in claims.audiences)
            says = f"is for audience {audiences}" if audiences else "names no audience"
            return f'{token} {says}, {place} wants "{wanted}"{_audience_setting(place, shown)}'
        case RefusalRule.TOKEN_AUD:
            return (
                f"{token} is for another audience; have one issued for {place} (login.audience, "
                "login.cluster_audience), and see whether the two token files are swapped"
            )
        case RefusalRule.TOKEN_AUD_FORBIDDEN:
            return (
                f"{token} is good at another place as well, which could use it there; have one issued for {place} alone"
            )
        case RefusalRule.TOKEN_ISS:
            return f'{token} comes from the issuer "{clean(claims.issuer, 200)}", which {place} does not accept'
        case RefusalRule.TOKEN_EXP:
            return f"{token} has expired; log in again, or put a new token there"
        case RefusalRule.TOKEN_NBF:
            return f"{token} is not valid yet by the clock of {place}; compare the clocks"
        case RefusalRule.TOKEN_LIFE:
            return f"{token} is valid for longer than {place} allows; have a shorter one issued"
        case RefusalRule.TOKEN_KEY | RefusalRule.TOKEN_SIGNATURE:
            return f"{token} is not signed with a key that its issuer publishes; log in again"
        case RefusalRule.CLAIMS_RULE if wanted:
            return f'{place} requires the claim "{wanted}", which {token} does not have, or with another value'
        case RefusalRule.CLAIMS_USERNAME | RefusalRule.CLAIMS_UID | RefusalRule.CLAIMS_EMAIL_VERIFIED if wanted:
            return f'{place} needs the claim "{wanted}", which {token} does not have as it has to be'
        case RefusalRule.CLAIMS_GROUPS_OVERAGE | RefusalRule.CLAIMS_GROUPS_MANY:
            return f"{token} has more groups than {place} takes; have the issuer send fewer"
        case RefusalRule.CLAIMS_ELSEWHERE if wanted:
            return f'{place} reads the claim "{wanted}", to which {token} only points; have the issuer put it there'
        case RefusalRule.CLAIMS_ACT:
            return (
                f"{token} says in a way that {place} cannot read who acts for its user; ask the operator of its issuer"
            )
        case RefusalRule.USER_RULE | RefusalRule.CLAIMS_RULE:
            return f"a rule of {place} does not let {token} in; ask its operator"
        case rule if rule.family == "claims":
            return (
                f"{token} lacks something that {place} requires of its users (a claim, a verified e-mail address, a "
                "group); ask the operator"
            )
        case rule if rule.family == "proof":
            return explain(rule, place)
        case _:
            return ""


def _audience_setting(place: str, shown: Shown) -> str:
    """Say which setting asks for a token's audience; nothing of a token from a file, which another program writes."""
    if shown.source:
        return ""
    setting, variable = ("login.cluster_audience", "ARCBRIDGE_CLUSTER_AUDIENCE")
    if place == "the relay":
        setting, variable = "login.audience", "ARCBRIDGE_OIDC_AUDIENCE"
    return f" ({setting}, {variable})"


class _Ending(NamedTuple):
    """The error for the user of a session that ended; the sentence names the cluster, and may quote the agent's."""

    sentence: str
    kind: type[ArcbridgeError] = Unreachable
    retry_after: int | None = RETRY_SOON


_UNAVAILABLE: Final = _Ending("the agent of {name} is not available now")
_BROKEN: Final = _Ending(
    "the agent of {name} ended the session because this client broke the protocol; its log says how"
)
_ANY: Final = RefusalRule.NONE
_ENDINGS: Final[dict[tuple[int, RefusalRule], _Ending]] = {
    (GoawayCode.PROTOCOL, _ANY): _BROKEN,
    (GoawayCode.FLOW_CONTROL, _ANY): _BROKEN,
    (GoawayCode.DRAINING, _ANY): _UNAVAILABLE,
    (GoawayCode.REPLACED, _ANY): _UNAVAILABLE,
    (GoawayCode.UNAVAILABLE, _ANY): _UNAVAILABLE,
    # No Retry-After: the agent has waited for seconds already, and would for each of kubectl's ten repeats.
    (GoawayCode.UNAVAILABLE, RefusalRule.GROUPS_UNAVAILABLE): _Ending("{name}: {said}", retry_after=None),
    (GoawayCode.UNAVAILABLE, RefusalRule.ISSUER_KEYS): _Ending(
        f"the agent of {{name}} {_NO_KEYS}, or tell the cluster's operator", retry_after=None
    ),
    (GoawayCode.EXPIRED, _ANY): _Ending("the login has expired; log in again", Unauthenticated, None),
    (GoawayCode.EXPIRED, RefusalRule.SESSION_AGE): _Ending(
        "the session with {name} reached its greatest age; start again what ran in it, and log in again if that is "
        "asked for"
    ),
    (GoawayCode.EXPIRED, RefusalRule.RESTRICTED_UNTIL): _Ending(
        "the time that --for gave the session with {name} is over; start the command again for more",
        PermissionRefused,
        None,
    ),
    (GoawayCode.FORBIDDEN, RefusalRule.RESTRICTED_UNKNOWN): _Ending("{name}: {said}", PermissionRefused, None),
    (GoawayCode.FORBIDDEN, _ANY): _Ending(
        "{name} does not let you in; ask its operator for access", PermissionRefused, None
    ),
    (GoawayCode.REVOKED, _ANY): _Ending("{name}: {said}", PermissionRefused, None),
    (GoawayCode.VERSION, _ANY): _Ending(
        "client and agent of {name} speak different protocol versions; update the older one", retry_after=None
    ),
    (GoawayCode.LIMIT, _ANY): _Ending(
        "the agent of {name} refused or ended your session at one of its limits; end sessions and commands that you do "
        "not need, or ask the cluster's operator for a higher limit",
        OverLimit,
    ),
    (GoawayCode.CROSSED, _ANY): _Ending(
        "the relay joined you to an agent of {name} that came for another user; if it happens again, tell the relay's "
        "operator"
    ),
    (GoawayCode.GONE, _ANY): _Ending(
        "the agent of {name} no longer has the session: it was restarted, or it waited too long"
    ),
}


def of_session(error: ArcbridgeError, cluster: str, shown: Shown = NOTHING_SHOWN) -> ArcbridgeError:
    """Say why a session could not begin or go on, as an error for the user."""
    name = f'cluster "{cluster}"'
    if isinstance(error, SessionEnded):
        refusal, said = _refusal_of(error), clean(error.message, SAID_LIMIT)
        if error.code == GoawayCode.UNAUTHENTICATED:
            return of_token(f"{name} does not accept the token", refusal, "its agent", shown)
        code_alone = _ENDINGS.get((error.code, _ANY), _Ending("the session with {name} ended"))
        ending = _ENDINGS.get((error.code, refusal.rule), code_alone)
        return ending.kind(ending.sentence.format(name=name, said=said), retry_after=ending.retry_after)
    if isinstance(error, ConnectionLost):
        return Unreachable(f"the connection to {name} was lost: {error.message}", retry_after=RETRY_SOON)
    if isinstance(error, RemoteProtocolError):
        return Unreachable(f"the session with {name} ended: {error.message}", retry_after=RETRY_SOON)
    return error


def _refusal_of(error: JoinRefused | SessionEnded) -> Refusal:
    return error.refusal if error.refusal.rule else legacy_refusals.read(error.message)
