"""The order of the way: each hop is looked at once what is before it works, and the first that fails is the cause.

What does not depend on a hop that failed is looked at all the same: the clock, the login, the kubeconfig. With several
relays each has its own findings, and one that fails beside one that works is a warning.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace

from arcbridge import legacy_refusals
from arcbridge.checks.diagnosis import Finding, FindingState, ReportedFindings, first_failure, skipped
from arcbridge.client.credentials.jwt_unverified import claims_unverified, positive, read_unverified
from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.doctor.access_judgement import (
    ApiFacts,
    LoginFacts,
    SessionFacts,
    judge_api,
    judge_login,
    judge_policy,
    judge_session,
)
from arcbridge.client.doctor.kubeconfig_hop import look_at_kubeconfig
from arcbridge.client.doctor.machine_hops import look_at_background, look_at_directories
from arcbridge.client.doctor.relay_hops import RelayHops
from arcbridge.client.doctor.throughput import measure
from arcbridge.client.service import ClientContext
from arcbridge.client.session.stream_http import api_client
from arcbridge.errors import ArcbridgeError
from arcbridge.identity.proof import BindingKind, binding
from arcbridge.mux.session import MuxSession
from arcbridge.refusals import read_refusal
from arcbridge.untrusted_json import read_json

REVIEW = json.dumps({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}).encode()
REVIEW_PATH = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
PING_DEADLINE = 2.0
"""Seconds."""


async def examine(
    context: ClientContext, cluster: str, report: Callable[[Finding], None], *, throughput: bool = False
) -> None:
    """Look at the whole way to `cluster` (empty: as far as the relay), and report each finding as soon as it is made.

    `throughput`: measure it, which takes seconds. Nothing is asked of the user, and nothing is changed but tokens that
    are renewed.
    """
    context.tokens.interactive = False
    findings = ReportedFindings(report)
    findings.append(look_at_directories(context.config.state_dir, context.environment))
    of_machine = len(findings)
    await _all_relays(context, findings)
    reached = first_failure(findings[of_machine:]) is None
    tokens = context.tokens.for_cluster(cluster) if cluster else context.tokens
    login, login_finding = await _login(context, tokens, cluster)
    findings.append(login_finding)
    if not reached or login_finding.state is FindingState.FAILED:
        why = "the relay cannot be used" if not reached else "there is no login to use"
        behind = ("policy", *(("agent", "session", "API server") if cluster else ()))
        findings.extend(skipped(hop, why) for hop in behind)
    else:
        await _behind_relay(context, tokens, cluster, login, findings, throughput=throughput)
    background = await asyncio.to_thread(look_at_background, context.environment, cluster)
    findings.append(background)
    silent = background.state is FindingState.FAILED
    findings.append(await look_at_kubeconfig(context, cluster, silent=silent))


# -- the relays --------------------------------------------------------------------------------------------------------


async def _all_relays(context: ClientContext, findings: ReportedFindings) -> None:
    relays = context.relays.all
    if len(relays) == 1:
        await RelayHops(relays[0], context.config, context.environment).examine(findings)
        return
    # One that fails is a warning where another works, which the last of them decides.
    found: list[list[Finding]] = [[] for _ in relays]
    for relay, own in zip(relays, found, strict=True):
        await RelayHops(relay, context.config, context.environment).examine(own)
    any_works = any(first_failure(one) is None for one in found)
    findings.extend(
        replace(
            finding,
            hop=f"{finding.hop} ({relay.address})",
            state=FindingState.WARNING if any_works and finding.state is FindingState.FAILED else finding.state,
        )
        for relay, one in zip(relays, found, strict=True)
        for finding in one
    )


# -- login, policy, session --------------------------------------------------------------------------------------------


async def _login(context: ClientContext, tokens: Tokens, cluster: str) -> tuple[LoginFacts, Finding]:
    facts = LoginFacts(token_mode=tokens.token_mode)
    own = "{cluster}" in context.config.login.cluster_audience and not cluster and not tokens.token_mode
    try:
        access = await tokens.access()
        facts.relay, facts.not_before = read_unverified(access), _not_before(access)
        if not own:  # each cluster has its own, and none was named
            token = (await tokens.cluster()).text
            kind = binding(claims_unverified(token)).kind
            facts.cluster, facts.not_before = read_unverified(token), max(facts.not_before, _not_before(token))
            facts.bound = "" if kind is BindingKind.NONE else str(kind)
            facts.one_token = token == access
    except ArcbridgeError as error:
        facts.error = error
    return facts, judge_login(facts, time.time())


def _not_before(token: str) -> float:
    return positive(claims_unverified(token).get("nbf"))


async def _behind_relay(
    context: ClientContext,
    tokens: Tokens,
    cluster: str,
    login: LoginFacts,
    findings: ReportedFindings,
    *,
    throughput: bool,
) -> None:
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
        findings.extend([policy, *(skipped(hop, "policy failed") for hop in behind)])
        return
    session = context.session(cluster)
    facts = SessionFacts(cluster)
    try:
        try:
            facts.known = bool(context.trust().known(cluster))
            await session.connector.nearest.learn(only_near=False)
            await session.connect_once()
            facts.subject = session.subject
            if session.relay is not None and len(context.relays) > 1:
                facts.relay = session.relay.address.url
                lengths = session.connector.relays.lengths
                known = {one: lengths.length(one) for one in context.relays.all if one is not session.relay}
                ways = [f"{one.address.url} {ms * 1000:.0f} ms" for one, ms in known.items() if ms < math.inf]
                facts.others = f"others are about {', '.join(ways)}" if ways else ""
            if session.current is not None:
                facts.session, facts.round_trip = session.current.label, await _round_trip(session.current)
        except ArcbridgeError as error:
            facts.error = error
        found = judge_session(facts, login.cluster)
        if found[0].hop == "policy":
            findings.extend([*found, *(skipped(hop, "policy failed") for hop in behind)])
            return
        findings.extend([policy, *found])
        if session.current is None or first_failure(found) is not None:
            findings.append(skipped("API server", "there is no session to ask it through"))
            return
        findings.append(judge_api(await _who_am_i(session.current, login.token_mode)))
        if throughput:
            findings.append(await measure(session.current))
    finally:
        session.close()
        await session.wait_closed()


async def _who_am_i(session: MuxSession, token_mode: bool) -> ApiFacts:
    began = time.monotonic()
    facts = ApiFacts(token_mode=token_mode)
    try:
        headers = {"Content-Type": "application/json"}
        async with (
            api_client(session) as http,
            http.post(REVIEW_PATH, data=REVIEW, headers=headers, allow_redirects=False) as answer,
        ):
            body = await answer.read()
    except ArcbridgeError as error:
        facts.error = error
        return facts
    facts.status, facts.seconds = answer.status, time.monotonic() - began
    facts.request_id = answer.headers.get("Audit-ID", "")
    try:
        document = read_json(body)
        if answer.status >= 300:
            facts.message = str(document.get("message", ""))
            causes = document.get("details", {}).get("causes") or [{}]
            facts.more = str(causes[0].get("message") or "")
            facts.rule = read_refusal(causes[0].get("reason")).rule or legacy_refusals.read(facts.message).rule
        else:
            user = document["status"]["userInfo"]
            facts.groups = tuple(str(group) for group in user.get("groups", []) if group != "system:authenticated")
            facts.user = str(user["username"])
    except (ValueError, LookupError, TypeError, AttributeError):
        pass  # it does not say who one is
    return facts


async def _round_trip(session: MuxSession) -> float:
    """Return the session's own round trip, seconds: it sends a PING as soon as it is up; 0 where none is answered."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PING_DEADLINE
    while not session.round_trip and loop.time() < deadline:
        await asyncio.sleep(0.01)
    return session.round_trip
