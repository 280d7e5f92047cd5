"""The order of the way: each hop is looked at once what is before it works, and the first that fails is the cause.

What does not depend on a hop that failed is looked at all the same: the clock, the login, the kubeconfig. With several
relays each has its own findings, and one that fails beside one that works is a warning.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace

from arcbridge import legacy_refusals
from arcbridge.checks.diagnosis import Finding, FindingState, first_failure, skipped
from arcbridge.client.credentials.jwt_unverified import claims_unverified, read_unverified
from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.doctor import probes
from arcbridge.client.doctor.access_judgement import (
    ApiFacts,
    LoginFacts,
    SessionFacts,
    judge_api,
    judge_kubeconfig,
    judge_login,
    judge_policy,
    judge_session,
)
from arcbridge.client.doctor.judgement import (
    ProxyFacts,
    judge_certificate,
    judge_clock,
    judge_name,
    judge_proxy,
    judge_relay,
    judge_tcp,
    judge_tls,
)
from arcbridge.client.doctor.throughput import measure
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.service import ClientContext
from arcbridge.client.session.stream_http import StreamHttp
from arcbridge.errors import ArcbridgeError
from arcbridge.identity.proof import BindingKind, binding
from arcbridge.mux.session import MuxSession
from arcbridge.refusals import read_refusal
from arcbridge.untrusted_json import read_json

REVIEW = json.dumps({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}).encode()
REVIEW_PATH = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
TO_RELAY = ("name resolution", "outbound proxy", "TCP", "TLS", "relay", "relay certificate")


async def examine(context: ClientContext, cluster: str, *, throughput: bool = False) -> list[Finding]:
    """Look at the whole way to `cluster` (empty: as far as the relay). `throughput`: measure it, which takes seconds.

    Nothing is asked of the user, and nothing is changed but tokens that are renewed.
    """
    context.tokens.interactive = False
    findings = await _all_relays(context)
    reached = first_failure(findings) is None
    tokens = context.tokens.for_cluster(cluster) if cluster else context.tokens
    login, login_finding = await _login(context, tokens, cluster)
    findings.append(login_finding)
    if not reached or login_finding.state is FindingState.FAILED:
        why = "the relay cannot be used" if not reached else "there is no login to use"
        findings += [skipped(hop, why) for hop in ("policy", *(("agent", "session", "API server") if cluster else ()))]
    else:
        findings += await _behind_relay(context, tokens, cluster, login, throughput=throughput)
    return [*findings, await _kubeconfig(context, cluster)]


# -- the relays --------------------------------------------------------------------------------------------------------


async def _all_relays(context: ClientContext) -> list[Finding]:
    relays = context.relays.all
    found = [await _relay(context, relay) for relay in relays]
    if len(relays) == 1:
        return found[0]
    any_works = any(first_failure(one) is None for one in found)
    return [
        replace(
            finding,
            hop=f"{finding.hop} ({relay.address})",
            state=FindingState.WARNING if any_works and finding.state is FindingState.FAILED else finding.state,
        )
        for relay, one in zip(relays, found, strict=True)
        for finding in one
    ]


async def _relay(context: ClientContext, relay: RelayAccess) -> list[Finding]:
    """Look at the hops to one relay and at its clock; those behind one that failed are skipped."""
    findings: list[Finding] = []

    def over() -> bool:
        return first_failure(findings) is not None

    proxy, wrong = probes.find_proxy(relay.address, context.environment)
    findings.append(judge_name(await probes.look_up(relay.address, by_proxy=proxy is not None)))
    if not over():
        tunnel = ProxyFacts(settings_error=wrong)
        if proxy is not None:
            tunnel = await probes.through_proxy(relay.address, proxy)
        findings.append(judge_proxy(tunnel))
    if not over():
        findings.append(judge_tcp(await probes.reach(relay.address, proxy)))
    if not over():
        shown = await probes.shown_by(relay.address, proxy)
        findings.append(judge_tls(shown.tls))
        if not over():
            findings.append(judge_relay(shown.relay))
        if not over():
            config = context.config
            facts = await probes.verified(
                relay, shown, proxy, bool(config.relay_ca_pin), str(config.relay_ca_file or "")
            )
            findings.append(judge_certificate(facts, time.time()))
    if over():
        last = findings[-1].hop
        rest = TO_RELAY[TO_RELAY.index(last) + 1 :]
        return [*findings, *(skipped(hop, f"{last} failed") for hop in (*rest, "clock"))]
    findings.append(judge_clock(await probes.clock_ahead(relay, proxy)))
    return findings


# -- login, policy, session --------------------------------------------------------------------------------------------


async def _login(context: ClientContext, tokens: Tokens, cluster: str) -> tuple[LoginFacts, Finding]:
    facts = LoginFacts(token_mode=tokens.token_mode)
    own = "{cluster}" in context.config.login.cluster_audience and not cluster and not tokens.token_mode
    try:
        access = await tokens.access()
        facts = replace(facts, relay=read_unverified(access), not_before=_not_before(access))
        if not own:  # each cluster has its own, and none was named
            token = (await tokens.cluster()).text
            later = max(facts.not_before, _not_before(token))
            kind = binding(claims_unverified(token)).kind
            facts = replace(
                facts,
                cluster=read_unverified(token),
                not_before=later,
                bound="" if kind is BindingKind.NONE else str(kind),
                one_token=token == access,
            )
    except ArcbridgeError as error:
        facts = replace(facts, error=error)
    return facts, judge_login(facts, time.time())


def _not_before(token: str) -> float:
    found = claims_unverified(token).get("nbf")
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) and 0 < found < 1e12 else 0.0


async def _behind_relay(
    context: ClientContext, tokens: Tokens, cluster: str, login: LoginFacts, *, throughput: bool
) -> list[Finding]:
    from arcbridge.client.commands.directory import list_clusters

    behind = ("agent", "session", "API server") if cluster else ()
    names: list[str] = []
    failure: ArcbridgeError | None = None
    try:
        names = [str(row["name"]) for row in await list_clusters(context.relays, tokens)]
    except ArcbridgeError as error:
        failure = error
    policy = judge_policy(failure, names, cluster, login.relay)
    if not cluster or policy.state is FindingState.FAILED:
        return [policy, *(skipped(hop, "policy failed") for hop in behind)]
    session = context.session(cluster)
    facts = SessionFacts(cluster)
    try:
        try:
            known = bool(context.trust().known(cluster))
            facts = replace(facts, known=known)
            await session.connect_once()
            facts = replace(
                facts,
                subject=session.subject,
                relay=session.relay.address.url if session.relay is not None and len(context.relays) > 1 else "",
                session=session.current.label if session.current is not None else "",
                round_trip=await probes.round_trip(session.current) if session.current is not None else 0.0,
            )
        except ArcbridgeError as error:
            facts = replace(facts, error=error)
        found = judge_session(facts, login.cluster)
        if found[0].hop == "policy":
            return [*found, *(skipped(hop, "policy failed") for hop in behind)]
        if session.current is None or first_failure(found) is not None:
            return [policy, *found, skipped("API server", "there is no session to ask it through")]
        found.append(judge_api(await _who_am_i(session.current, login.token_mode)))
        if throughput:
            found.append(await measure(session.current))
        return [policy, *found]
    finally:
        session.close()
        await session.wait_closed()


async def _who_am_i(session: MuxSession, token_mode: bool) -> ApiFacts:
    began = time.monotonic()
    facts = ApiFacts(token_mode=token_mode)
    connection: StreamHttp | None = None
    try:
        connection = StreamHttp.open(session)
        answer = await connection.request("POST", REVIEW_PATH, REVIEW)
    except ArcbridgeError as error:
        return replace(facts, error=error)
    finally:
        if connection is not None:
            connection.close()
    facts = replace(
        facts,
        status=answer.status,
        seconds=time.monotonic() - began,
        request_id=answer.headers.get("audit-id", ""),
    )
    try:
        document = read_json(answer.body)
        if answer.status >= 300:
            message = str(document.get("message", ""))
            causes = document.get("details", {}).get("causes") or [{}]
            rule = read_refusal(causes[0].get("reason")).rule or legacy_refusals.read(message).rule
            return replace(facts, message=message, rule=rule)
        user = document["status"]["userInfo"]
        groups = tuple(str(group) for group in user.get("groups", []) if group != "system:authenticated")
        return replace(facts, user=str(user["username"]), groups=groups)
    except (ValueError, LookupError, TypeError, AttributeError):
        return facts


# -- this machine ------------------------------------------------------------------------------------------------------


async def _kubeconfig(context: ClientContext, cluster: str) -> Finding:
    config, kept = context.config, None
    try:
        found = await probes.contexts(probes.find_kubeconfig(config.file, context.environment), context.state)
    except ArcbridgeError as error:
        return judge_kubeconfig([], cluster, error=error.message)
    if cluster:
        kept = await probes.kept_port(context.state, context.relays.names, cluster)
    return judge_kubeconfig(found, cluster, kept)
