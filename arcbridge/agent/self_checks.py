"""The agent's self-checks: what of the things that it depends on works, and which of them make it unready.

The API server answers; it takes the agent's own credential; the agent may impersonate; each issuer's keys are there;
changed files of the API server's CA and credential were read; audit, relays and certificate are well. The same looks
serve the running process (`checks_of`) and `doctor`. They change nothing: the API server is asked for reviews of the
agent.

Unready makes a rollout stop and nothing else: no liveness depends on it (docs/decisions/0022-self-checks.md).

Source: Kubernetes, SelfSubjectReview (authentication.k8s.io/v1), SelfSubjectRulesReview and SelfSubjectAccessReview
(authorization.k8s.io/v1), open to every authenticated user by the default role `system:basic-user`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final

from arcbridge.agent.audit import AuditLog
from arcbridge.agent.authenticator import REVIEW
from arcbridge.agent.control import ControlConnections
from arcbridge.agent.enrol import CredentialKeeper
from arcbridge.agent.kube.apiserver import AnswerFailed, ApiServer
from arcbridge.agent.kube.own_credential import POD_CERTIFICATE
from arcbridge.agent.parts import AgentParts
from arcbridge.agent.rights import (
    ACCESS,
    ACTOR,
    CONSTRAINED,
    GROUPS,
    LEGACY,
    RESTRICTED,
    USERS,
    VERBS,
    Right,
    Rules,
    attributes_of,
)
from arcbridge.audit.sinks.settings import sink_findings
from arcbridge.checks.diagnosis import Finding, directory_finding, failed, key_finding, ok, skipped, warning
from arcbridge.checks.self_checks import SelfCheck
from arcbridge.identity.authentication import AuthenticationConfig
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.refusals import RefusalRule
from arcbridge.units import duration, rfc3339

RULES: Final = "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews"
CERTIFICATE_SOON: Final = 86400.0
"""Seconds before its end at which a certificate should have been renewed long ago; of a life of less than ten days it
is a tenth."""
POD_CERTIFICATE_SOON: Final = 300.0
"""The same for a pod's certificate, which the kubelet may renew as late as ten minutes before its end."""

API_SERVER, CREDENTIAL, IMPERSONATION = "API server", "agent's credential at the API server", "right to impersonate"
RELOAD, AUDIT, RELAYS, CERTIFICATE = "files of the API server", "audit log", "control connections", "certificate"

_CONNECTS: Final = "check `relays`, their pin, and that this cluster may connect to them"
_MAY_ACT: Final = (
    "install the chart, or the rules of config/kubernetes, and bind them to the agent's account; "
    "`impersonation.users` and `impersonation.groups` name whom it may act as"
)
_UPDATE_RULES: Final = (
    "update the rules of the agent's account with the agent: install the chart, or config/kubernetes, of this version"
)
_REMEDIES: Final = {
    "api_ca": "put the CA of this API server into kubernetes.ca_file, or correct kubernetes.server",
    "api_unreachable": "check kubernetes.server (host and port), that the API server runs, and network policies",
    "agent_credential": "check kubernetes.token_file, credential_bundle_file or client_certificate_file, that the "
    "ServiceAccount exists and that token or certificate are of this cluster and not expired",
    "credential_renewal": "see the events of the agent's pod and its PodCertificateRequests (`kubectl describe`), or "
    "renew the file that `kubernetes` names; the agent reads it again by itself",
    "review": "Kubernetes has this review from 1.28 on; elsewhere the agent cannot check its credential",
    "impersonation": _MAY_ACT,
    "impersonation_attributes": "give the agent's account this right (userExtras of the chart, for extra keys, or "
    "config/kubernetes), or take the mapping out of the authentication file",
    "impersonation_verbs": "give the agent's account the verbs, as the chart and config/kubernetes have them",
    "impersonation_restricted": _UPDATE_RULES,
    "impersonation_actor": _UPDATE_RULES,
    "impersonation_unknown": _MAY_ACT,
    "impersonation_groups": _MAY_ACT,
    "impersonation_users": _MAY_ACT,
    "reload": "correct the file; until then the agent goes on with what it read before",
    "audit": "make room, or let the agent's user write audit.file",
    "enrolment": f"{_CONNECTS}; where the state is in a Secret, that the API server answers",
    "relay": _CONNECTS,
    "public_address": "correct public_address at the relay, or add the address to `relays`",
    "join": "see `join failed` in the log",
    "relays": "see whether all relays run",
}
"""What to do about a fault, by its code."""


def _bad(hop: str, code: str, detail: str, make: Callable[[str, str, str, str], Finding] = failed) -> Finding:
    return make(hop, detail, _REMEDIES[code], code)


# --- the API server -------------------------------------------------------------------------------------------------


async def look_at_api_server(api: ApiServer) -> Finding:
    """Look whether the API server answers over TLS of the configured CA; any HTTP answer will do.

    `/version` is open to every caller by default.
    """
    where = api.authority
    try:
        await api.ask("GET", "/version")
    except AnswerFailed as error:
        code = "api_ca" if error.refusal.rule is RefusalRule.AGENT_API_CA else "api_unreachable"
        return _bad(API_SERVER, code, f"{where}: {error.message}")
    return ok(API_SERVER, f"{where} answers")


async def look_at_credential(api: ApiServer) -> Finding:
    """Look whether the API server takes the agent's own credential; learns the agent's user name by that."""
    code, answer = await _review(api, REVIEW, {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"})
    if code in (200, 201):
        user = _at(answer, "status", "userInfo", "username")
        if user == "system:anonymous":
            code = 401
        elif isinstance(user, str) and user:
            api.upstream.own_refusals.user = user
            return credential_finding(user, api.credential.kind, api.credential.validity, time.time())
    if code == 401:
        return _bad(CREDENTIAL, "agent_credential", "the API server does not accept the agent's own credential")
    if code == 0:
        return skipped(CREDENTIAL, "the API server does not answer")
    return _bad(CREDENTIAL, "review", f"the API server answered code {code} to a review of the agent itself", warning)


def credential_finding(user: str, kind: str, validity: tuple[float, float] | None, now: float) -> Finding:
    """Return the finding for a credential that the API server takes: which it is, and when it ends (unix seconds)."""
    detail = f"the agent is {user}, by {kind}"
    if validity is None:
        return ok(CREDENTIAL, detail)
    begin, end = validity
    detail = f"{detail} that ends in {duration(end - now)} ({rfc3339(end)})"
    soon = POD_CERTIFICATE_SOON if kind == POD_CERTIFICATE else CERTIFICATE_SOON
    if end - now < min(soon, (end - begin) / 10):
        return _bad(CREDENTIAL, "credential_renewal", f"{detail} and was not renewed", warning)
    return ok(CREDENTIAL, detail)


async def look_at_impersonation(
    api: ApiServer, issuers: AuthenticationConfig, refused: Callable[[], int] = lambda: 0
) -> Finding:
    """Look whether the agent may impersonate users and groups, and what the mappings of `issuers` give besides.

    `refused`: how many requests the API server has refused lately because a rule does not name their user.
    """
    own = api.upstream.own_refusals
    spec = {"namespace": "default"}
    kind = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": spec}
    code, answer = await _review(api, RULES, kind)
    status = _at(answer, "status")
    listed = _at(status, "resourceRules")
    if code not in (200, 201) or listed is None:
        words = "the API server does not say which rights the agent has"
        if code in (0, 401):
            return skipped(IMPERSONATION, words)
        remedy = "let the agent's account ask for reviews of itself (the default role system:basic-user)"
        return warning(IMPERSONATION, f"{words} (code {code})", remedy, "review")
    count = refused()  # also where a right is missing: once it is given, what was refused until then is over
    rules = Rules(listed if isinstance(listed, list) else ())
    # With both, the API server falls back on the older right, and what it allows counts.
    verb = next((one for one in (LEGACY, CONSTRAINED) if rules.gives(USERS, one)), "")
    for one in (LEGACY, CONSTRAINED):
        verb = verb or (one if await _may(api, USERS, one) else "")
    complete = _at(status, "incomplete") is not True
    if not verb and not complete:
        own.legacy, own.lacking = False, None
        detail = "no rule of RBAC lets the agent impersonate users; another authorizer may"
        return _bad(IMPERSONATION, "impersonation_unknown", detail, warning)
    has_groups = api.impersonable is None or bool(api.impersonable)
    wanted = [USERS, *attributes_of(issuers), *[GROUPS] * has_groups]
    verb = verb or LEGACY
    lacking = [one for one in wanted if not rules.gives(one, verb) and not await _may(api, one, verb)]
    own.legacy = verb == LEGACY
    own.lacking = next(((one.resource, one.sentence(own.user, verb)) for one in lacking if one.always), None)
    if finding := _lacking(lacking, lambda one: one.sentence(own.user, verb), certain=complete):
        return finding
    if verb == CONSTRAINED and complete and not rules.has_verbs:
        detail = f"no rule says what for (`{VERBS}get` and the like), so that the API server refuses every request"
        return _bad(IMPERSONATION, "impersonation_verbs", detail)
    if count:
        detail = f"the API server has refused {count} requests because no rule names their user or a group of theirs"
        return _bad(IMPERSONATION, "impersonation_users", f"{detail}; the last one: {own.sentence}", warning)
    for right, fault, whose in (
        (RESTRICTED, "impersonation_restricted", "of a restricted session"),
        (ACTOR, "impersonation_actor", "in which an actor acts for the user"),
    ):
        if not rules.gives(right, verb) and not await _may(api, right, verb):
            detail = f"the API server refuses every request {whose}: {right.sentence(own.user, verb)}"
            return _bad(IMPERSONATION, fault, detail, warning)
    return ok(IMPERSONATION, f"the agent may impersonate {', '.join(one.resource for one in wanted)}")


def _lacking(lacking: Sequence[Right], sentence: Callable[[Right], str], *, certain: bool) -> Finding | None:
    """Return what it means that the agent lacks rights; None where it lacks none. `certain`: no other authorizer may
    grant them by name."""
    if USERS in lacking:
        return _bad(IMPERSONATION, "impersonation", f"the agent may not impersonate users: {sentence(USERS)}")
    if attributes := [one for one in lacking if one.sources]:
        worst = next((one for one in attributes if one.always), attributes[0])
        others = ", ".join(one.resource for one in attributes if one is not worst)
        detail = (
            f"{sentence(worst)}, and {' and '.join(worst.sources)} of the authentication file gives it, so that the "
            f"API server refuses the user{f'; also {others}' if others else ''}"
        )
        make = failed if worst.always and certain else warning
        return _bad(IMPERSONATION, "impersonation_attributes", detail, make)
    if lacking:
        detail = "the agent may impersonate users, but no group; users with groups are refused"
        return _bad(IMPERSONATION, "impersonation_groups", f"{detail}: {sentence(GROUPS)}", warning)
    return None


async def _may(api: ApiServer, right: Right, verb: str) -> bool:
    _, answer = await _review(api, ACCESS, right.question(verb))
    return _at(answer, "status", "allowed") is True


async def look_at_reload(api: ApiServer) -> Finding:
    """Look whether the files of CA, token and certificate could be read when they changed."""
    api.credentials(own=True)  # looks at the files, when it is time
    if api.reload_error:
        return _bad(RELOAD, "reload", api.reload_error)
    return ok(RELOAD, "as they were read")


# --- everything else ------------------------------------------------------------------------------------------------


async def look_at_audit(audit: AuditLog) -> Sequence[Finding]:
    """Look whether records are written now, and whether sinks deliver them."""
    found = ok(AUDIT, "records are written")
    if failure := audit.failure:
        then = "requests are refused" if audit.refuses else "requests go on unrecorded"
        found = _bad(AUDIT, "audit", f"the audit log cannot be written ({failure}); {then}")
    return [found, *sink_findings(audit.sinks)]


async def look_at_relays(control: ControlConnections, keeper: CredentialKeeper) -> Finding:
    """Look whether control connections are up, and whether a relay's last join worked."""
    if not keeper.enrolled and keeper.last_failure:
        return _bad(RELAYS, "enrolment", f"the agent cannot enrol: {keeper.last_failure}")
    if control.draining or not keeper.enrolled or not (control.up or control.last_failure):
        return skipped(RELAYS, "the agent is starting or stopping")
    reason, wrong = control.unready(), control.dials.wrong_address
    if reason is not None and not control.up:
        return _bad(RELAYS, "relay", reason)
    if wrong:
        detail = f"a relay asks this agent to come to {wrong}, which is not among `relays`"
        return _bad(RELAYS, "public_address", detail)
    if reason is not None:
        return _bad(RELAYS, "join", reason)
    if control.up < min(control.wanted, len(control.relays)):
        last = f"the last attempt: {control.last_failure or 'none yet'}"
        return _bad(RELAYS, "relays", f"{control.up} of {control.wanted} are up; {last}", warning)
    return ok(RELAYS, f"{control.up} up")


async def look_at_certificate(keeper: CredentialKeeper) -> Finding:
    """Look whether the agent's certificate is valid, and was renewed in time."""
    if not keeper.enrolled:
        return skipped(CERTIFICATE, "the agent has not enrolled yet")
    return certificate_finding(*keeper.current.validity(), keeper.now)


def certificate_finding(not_before: float, not_after: float, now: float) -> Finding:
    """Return the finding for a certificate that is renewed at two thirds of its life."""
    left = not_after - now
    remedy = "see `certificate not renewed` in the log; a cluster that is revoked has to be restored at the relay"
    if left <= 0:
        return failed(
            CERTIFICATE, "it has lapsed", "make a new join token at the relay; the cluster keeps its pin", "certificate"
        )
    if left < min(CERTIFICATE_SOON, (not_after - not_before) / 10):
        return failed(CERTIFICATE, f"it lapses in {left / 3600:.1f} h and was not renewed", remedy, "certificate")
    return ok(CERTIFICATE, f"valid for {left / 86400:.1f} days")


# --- together -------------------------------------------------------------------------------------------------------


def api_checks(
    api: ApiServer, issuers: Callable[[], AuthenticationConfig | None], refused: Callable[[], int] = lambda: 0
) -> list[SelfCheck]:
    """Return the checks of the API server, which need no other part of the agent. `issuers`: whose tokens count now."""

    async def impersonation() -> Finding:
        current = issuers()
        if current is None:
            return skipped(IMPERSONATION, "token mode alone: the agent impersonates no user")
        return await look_at_impersonation(api, current, refused)

    return [
        _check("api_server", partial(look_at_api_server, api), gates=True),
        _check("credential", partial(look_at_credential, api), gates=True),
        _check("impersonation", impersonation, gates=True),
        _check("reload", partial(look_at_reload, api)),
    ]


def _check(name: str, look: Callable[[], Awaitable[Finding]], *, gates: bool = False) -> SelfCheck:
    async def found() -> Sequence[Finding]:
        return [await look()]

    return SelfCheck(name, found, gates=gates)


def issuers_check(verifier: TokenVerifier | None, *, token_mode: Callable[[], bool]) -> SelfCheck:
    """Return the check of the issuers: unready is an agent that could verify no token at all."""

    async def issuers() -> Sequence[Finding]:
        if verifier is None:
            return [skipped("issuers", "no issuer is configured: the agent takes ServiceAccount tokens")]
        return [key_finding(*one) for one in await verifier.look_at_keys()]

    return SelfCheck(
        "issuers", issuers, gates=lambda: not token_mode() and verifier is not None and not verifier.has_keys
    )


def groups_checks(verifier: TokenVerifier | None) -> list[SelfCheck]:
    """Return the check of directories, where the settings have one. It gates nothing: users whose groups are in their
    tokens come in."""
    if verifier is None or not verifier.has_directories:
        return []
    looked_at = verifier

    async def groups() -> Sequence[Finding]:
        return [directory_finding(*one) for one in await looked_at.look_at_directories()]

    return [SelfCheck("groups", groups)]


def elevation_checks(parts: AgentParts) -> list[SelfCheck]:
    """Return the check of elevation, where groups may be lent. It gates nothing: what users may do without it works."""
    elevation = parts.sessions.elevation
    if elevation is None:
        return []
    from arcbridge.agent.elevation.check import look_at_elevation

    return [_check("elevation", partial(look_at_elevation, parts.api, elevation))]


def checks_of(parts: AgentParts) -> list[SelfCheck]:
    """Return all checks of a running agent. Audit and relays gate readiness by themselves (`agent.service`)."""
    sessions, verifier = parts.sessions, parts.verifier
    counts = parts.api.upstream.own_refusals.counts
    seen = counts["impersonation"]

    def refused() -> int:
        nonlocal seen
        fresh, seen = counts["impersonation"] - seen, counts["impersonation"]
        return fresh

    return [
        *api_checks(parts.api, lambda: None if verifier is None else verifier.config, refused),
        issuers_check(verifier, token_mode=lambda: sessions.authenticator.token_mode),
        *groups_checks(verifier),
        SelfCheck("audit", partial(look_at_audit, sessions.audit)),
        _check("relays", partial(look_at_relays, parts.control, parts.keeper)),
        _check("certificate", partial(look_at_certificate, parts.keeper)),
        *elevation_checks(parts),
    ]


async def _review(api: ApiServer, path: str, document: dict[str, Any]) -> tuple[int, Any]:
    """Ask for a review of the agent itself; code 0 where the API server does not answer."""
    try:
        return await api.ask("POST", path, document)
    except AnswerFailed:
        return 0, None


def _at(document: Any, *path: str) -> Any:
    for name in path:
        document = document.get(name) if isinstance(document, dict) else None
    return document
