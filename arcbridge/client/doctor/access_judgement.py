"""Makes findings of what was seen behind the relay: login, policy, agent, session, API server.

Facts come in, findings go out, and no socket or clock is used. Text from outside is cleaned. An agent's and an API
server's sentence may be shown, because they come end to end; of a relay's nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from arcbridge.checks.diagnosis import Finding, ok, skipped
from arcbridge.client.credentials.jwt_unverified import UnverifiedClaims
from arcbridge.client.credentials.tokens import NoLogin, OneToken, TokenExpired
from arcbridge.client.doctor.codes import clip, fault, fault_to_come, sentence, when
from arcbridge.client.doctor.relay_hops import SKEW_FAILED
from arcbridge.errors import (
    ArcbridgeError,
    ConfigError,
    JoinRefused,
    PermissionRefused,
    PinMismatch,
    SessionEnded,
    StateError,
    StreamReset,
    Unauthenticated,
)
from arcbridge.net.join import JoinCode
from arcbridge.observe.untrusted_text import clean
from arcbridge.refusals import RefusalRule
from arcbridge.units import duration
from arcbridge.wire.frames import GoawayCode

TOKEN_ENDS_SOON = 120.0
"""Seconds."""

_LOGIN_FAULTS: tuple[tuple[type[ArcbridgeError], str], ...] = (
    (OneToken, "one_token"),
    (TokenExpired, "token_expired"),
    (ConfigError, "login_settings"),
    (StateError, "login_settings"),
    (Unauthenticated, "login_missing"),
    (ArcbridgeError, "issuer"),
)
"""What is wrong with the login, by the error that getting a token ended with; the first that fits counts."""

E = TypeVar("E", bound=ArcbridgeError)


# -- the login ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class LoginFacts:
    """The two tokens, or why there is none."""

    error: ArcbridgeError | None = None
    relay: UnverifiedClaims = field(default_factory=UnverifiedClaims)
    cluster: UnverifiedClaims = field(default_factory=UnverifiedClaims)
    not_before: float = 0.0
    """The later `nbf` of the two, unix seconds; 0: neither has one."""
    token_mode: bool = False
    bound: str = ""
    """How the cluster's token is bound to a key; empty: it is not."""
    one_token: bool = False
    """Whether relay and cluster get the same token, which a setting has to allow."""


def judge_login(facts: LoginFacts, now: float) -> Finding:
    """Judge the tokens as this machine has them."""
    hop, error = "login", facts.error
    if error is not None:
        code = next(code for kind, code in _LOGIN_FAULTS if isinstance(error, kind))
        # The table's remedy is for a login that has ended.
        remedy = "run `arcbridge login URL`, or give the tokens of a workload" if isinstance(error, NoLogin) else ""
        return fault(hop, sentence(error), code, remedy)
    ends = [end for end in (facts.relay.expires_at, facts.cluster.expires_at) if end]
    if ends and min(ends) <= now:
        return fault(hop, f"a token has expired at {when(min(ends))}", "token_expired")
    if facts.not_before > now + SKEW_FAILED:
        return fault(hop, f"a token is valid from {when(facts.not_before)} on", "token_not_yet")
    shown = [
        f"{name} for {audiences(claims)}{f' until {when(claims.expires_at)}' if claims.expires_at else ''}"
        for name, claims in (("relay's", facts.relay), ("cluster's", facts.cluster))
        if claims != UnverifiedClaims()
    ]
    detail = clip(facts.relay.subject) + ": " if facts.relay.subject else ""
    detail += "; ".join(shown) or "tokens that are no JWT"
    if facts.token_mode:
        detail += " (ServiceAccount token)"
    detail += f", bound to a key ({facts.bound})" if facts.bound else ""
    detail += "; one token for both" if facts.one_token else ""
    if ends and min(ends) < now + TOKEN_ENDS_SOON:
        return fault_to_come(hop, f"{detail}: ends in {duration(min(ends) - now)}", "token_ends")
    return ok(hop, detail)


def audiences(claims: UnverifiedClaims) -> str:
    """Write a token's audiences for people."""
    return ", ".join(f'"{clip(one)}"' for one in claims.audiences[:3]) or "no audience"


# -- relay, agent, session ---------------------------------------------------------------------------------------------


def judge_policy(
    error: ArcbridgeError | None, clusters: Sequence[str], cluster: str, token: UnverifiedClaims
) -> Finding:
    """Judge whether the relay takes the token, and lists the cluster (empty: there is none to look for).

    `error`: what asking for the list ended with.
    """
    hop = "policy"
    if isinstance(error, Unauthenticated):
        return _refused_token(hop, error, "the relay", token, "relay_token")
    if isinstance(error, PermissionRefused):
        return fault(
            hop, sentence(error), "policy", "run `arcbridge login --force`, or ask the relay's operator for access"
        )
    if error is not None:
        return fault(hop, sentence(error), "relay_busy")
    if not cluster:
        count = f"{len(clusters)} cluster{'s' if len(clusters) != 1 else ''}"
        return ok(hop, f"{count} may be reached")
    if cluster in clusters:
        return ok(hop, f'"{cluster}" may be reached')
    return _not_allowed(cluster)


def _not_allowed(cluster: str) -> Finding:
    return fault("policy", f'cluster "{cluster}" does not exist, or you may not reach it', "policy")


def _refused_token(hop: str, error: Unauthenticated, place: str, token: UnverifiedClaims, code: str) -> Finding:
    """Return the finding for a token that an end did not take; `code` is `relay_token` or `cluster_token`."""
    rule = error.refusal.rule
    setting = "login.audience" if code == "relay_token" else "login.cluster_audience"
    if rule in (RefusalRule.TOKEN_AUD, RefusalRule.TOKEN_AUD_FORBIDDEN):
        only = "" if rule is RefusalRule.TOKEN_AUD else "only "
        detail = f"the token is for {audiences(token)}, and {place} wants one {only}for itself"
        remedy = f"have a token issued for the audience that {place} names ({setting}); two token files may be swapped"
        return fault(hop, detail, f"{code}_audience", remedy)
    if rule in (RefusalRule.TOKEN_ISS, RefusalRule.TOKEN_KEY, RefusalRule.TOKEN_SIGNATURE):
        detail = f'{place} does not take tokens of "{clip(token.issuer)}", or not this one\'s signature'
        remedy = "log in at the issuer that the operator names; the operator finds the rule in the log of that end"
        return fault(hop, detail, f"{code}_issuer", remedy)
    if rule in (RefusalRule.TOKEN_EXP, RefusalRule.TOKEN_NBF):
        name = "token_expired" if rule is RefusalRule.TOKEN_EXP else "token_not_yet"
        remedy = "log in again; if the token is fresh, compare the clocks of the two machines"
        return fault(hop, sentence(error), name, remedy)
    if rule.family in ("claims", "user") and code == "cluster_token":
        return fault(hop, sentence(error), "cluster_token_claim")
    return fault(hop, sentence(error), code)


@dataclass(slots=True)
class SessionFacts:
    """What became of one attempt to have a session."""

    cluster: str
    error: ArcbridgeError | None = None
    subject: str = ""
    relay: str = ""
    others: str = ""
    """The other relays, each with the way through it as far as it is known."""
    session: str = ""
    """Its id, which the logs of all three roles have."""
    round_trip: float = 0.0
    """The smallest of the session's own PINGs, seconds; 0: none was answered in time."""
    known: bool = True
    """This machine knows the pin of the cluster."""


def judge_session(facts: SessionFacts, token: UnverifiedClaims) -> list[Finding]:
    """Judge the hops `agent` and `session`; a refusal of the relay's policy is a finding of the hop `policy` alone."""
    error, refused = facts.error, _cause(facts.error, JoinRefused)
    if error is not None and refused is not None:
        return _judge_join(facts.cluster, refused.code, error)
    agent = ok("agent", f'an agent of "{facts.cluster}" answers')
    if error is not None:
        return [agent, _judge_session_error(facts, error, token)]
    through = f" through {facts.relay}" if facts.relay else ""
    ping = f", {facts.round_trip * 1000:.1f} ms to the agent and back" if facts.round_trip else ""
    others = f"; {facts.others}" if facts.others else ""
    session = f"end to end as {clip(facts.subject)}{through}{ping}{others} (session {clip(facts.session)})"
    return [agent, ok("session", session)]


def _judge_join(cluster: str, code: int, error: ArcbridgeError) -> list[Finding]:
    match code:
        case JoinCode.FORBIDDEN:
            return [_not_allowed(cluster)]
        case JoinCode.UNAUTHENTICATED:
            return [fault("policy", sentence(error), "relay_token")]
        case JoinCode.NO_AGENT | JoinCode.NO_INSTANCE:
            agent = fault("agent", f'no agent of "{cluster}" is connected to the relay', "agent_missing")
        case JoinCode.AGENT_TIMEOUT:
            detail = f'the agent of "{cluster}" is connected and did not come to the session in time'
            agent = fault("agent", detail, "agent_silent")
        case JoinCode.AGENT_REFUSED:
            agent = fault("agent", sentence(error), "agent_refused")
        case _:
            agent = fault("agent", sentence(error), "relay_busy", "try again later; the relay's log says why")
    return [agent, skipped("session", "there is no agent to have one with")]


def _judge_session_error(facts: SessionFacts, error: ArcbridgeError, token: UnverifiedClaims) -> Finding:
    hop = "session"
    if isinstance(error, PinMismatch):
        if not facts.known:
            return fault(hop, f'this machine does not know "{facts.cluster}" yet', "cluster_unknown")
        return fault(hop, sentence(error), "cluster_pin")
    ended = _cause(error, SessionEnded)
    code = ended.code if ended is not None else None
    if code == GoawayCode.REVOKED:
        return fault(hop, sentence(error), "access_revoked")
    if code == GoawayCode.FORBIDDEN:
        return fault(hop, sentence(error), "agent_forbids")
    if isinstance(error, Unauthenticated):
        return _refused_token(hop, error, "the cluster's agent", token, "cluster_token")
    if code == GoawayCode.UNAVAILABLE:
        return fault(hop, "the agent cannot verify tokens now, or has no room for a session", "agent_unavailable")
    return fault(hop, sentence(error), "session")


def _cause(error: BaseException | None, kind: type[E]) -> E | None:
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__
    return None


# -- the API server ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class ApiFacts:
    """What asking the API server who one is ended with."""

    status: int = 0
    error: Exception | None = None
    message: str = ""
    """Of the Status object, where it is one."""
    more: str = ""
    """What the agent says behind its sentence: which right it lacks, in the API server's words."""
    rule: RefusalRule = RefusalRule.NONE
    """Of the agent, where the answer is its own refusal."""
    user: str = ""
    groups: tuple[str, ...] = ()
    seconds: float = 0.0
    token_mode: bool = False
    request_id: str = ""


def judge_api(facts: ApiFacts) -> Finding:
    """Judge the API server by an answer through the session: a SelfSubjectReview."""
    hop = "API server"
    which = f" (request {clip(facts.request_id)})" if facts.request_id else ""
    if isinstance(facts.error, ArcbridgeError):
        down = isinstance(facts.error, StreamReset)
        text = "the agent cannot reach the API server" if down else sentence(facts.error)
        return fault(hop, text, "api_server")
    # The agent's own sentence ends with the id already.
    said = clip(facts.message.removesuffix(f" (request {facts.request_id})"))
    if facts.rule is RefusalRule.AGENT_CREDENTIAL or (facts.status == 401 and not facts.token_mode):
        return fault(hop, f"the API server refuses the agent's own credential{which}", "agent_credential")
    if facts.status == 401:
        return fault(hop, f"the API server does not take the ServiceAccount token{which}", "cluster_credential")
    if facts.rule is RefusalRule.AGENT_IMPERSONATION:
        why = f". {clean(facts.more, 500)}" if facts.more else ""
        return fault(hop, f"the agent's account may not impersonate you{which}{why}", "agent_impersonation")
    if facts.status >= 500:
        return fault(
            hop,
            f"{said or f'it answers {facts.status}'}{which}",
            "api_server",
            "tell the cluster's operator: the API server is down or out of the agent's reach "
            "(`arcbridge --role agent doctor`)",
        )
    if facts.user:
        groups = f", in {', '.join(clip(group) for group in facts.groups[:6])}" if facts.groups else ""
        return ok(hop, f"knows you as {clip(facts.user)}{groups} ({facts.seconds * 1000:.0f} ms)")
    return ok(hop, f"answers {facts.status}, and does not say who you are ({facts.seconds * 1000:.0f} ms)")
