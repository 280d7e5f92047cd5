"""Registers what the agent shows at /metrics: counters that other modules keep, read at scrape time.

Invariant: no label is a user or a path.
"""

from __future__ import annotations

from arcbridge.agent.accounts import Limit
from arcbridge.agent.kube.attempt import RESTRICTIONS
from arcbridge.agent.kube.own_refusal import KINDS
from arcbridge.agent.kube.warm_connections import FATES
from arcbridge.agent.parts import AgentParts
from arcbridge.agent.resume import REFUSALS
from arcbridge.agent.sessions import Sessions
from arcbridge.audit.metrics import register as register_audit
from arcbridge.identity.proof import REFUSALS as PROOF_REFUSALS
from arcbridge.identity.proof import BindingKind
from arcbridge.identity.refusal import RULES
from arcbridge.mux import memory
from arcbridge.observe.metrics import Metrics

CODES = ("1xx", "2xx", "3xx", "4xx", "5xx")
RESULTS = ("ok", "failed", "refused")
DIRECTIONS = ("to_cluster", "to_user")


def register(metrics: Metrics, parts: AgentParts) -> None:
    """Register every metric of the agent."""
    sessions = parts.sessions
    _register_control(metrics, parts)
    _register_sessions(metrics, sessions)
    _register_resumption(metrics, sessions)
    _register_memory(metrics, sessions)
    _register_requests(metrics, sessions)
    _register_audit(metrics, sessions)
    _register_tokens(metrics, parts)
    if (tracer := sessions.proxy.context.tracer) is not None:
        tracer.register(metrics)
    if sessions.elevation is not None:
        sessions.elevation.register(metrics)
    if (recorder := sessions.proxy.context.recorder) is not None:
        recorder.register(metrics)


def _register_control(metrics: Metrics, parts: AgentParts) -> None:
    """Register the connections to relays, the joins that relays ask for, and the certificate that they ask for."""
    counter, gauge = metrics.counter, metrics.gauge
    control, dials, keeper, denylist = parts.control, parts.control.dials, parts.keeper, parts.denylist
    gauge("control_connections_wanted", "Control connections to keep.", None, lambda: control.wanted)
    gauge("ledger_entries", "Sealed entries that this agent keeps for its relays.", None,
          lambda: sum(map(len, control.ledgers.values())))  # fmt: skip
    gauge("control_connections", "Those that are up, to relays that stay.", None, lambda: control.up)
    gauge("control_round_trip_seconds", "The least round trip to a relay that is connected.", None, control.round_trip)
    counter("control_connect_failures_total", "Attempts to connect that failed.", None, lambda: control.connects_failed)
    counter("joins_total", "Joins that relays asked for, by result.", {"result": RESULTS},
            lambda: {"ok": dials.joins, "failed": dials.join_failures, "refused": dials.refused})  # fmt: skip
    gauge("joins_pending", "Joins under way.", None, lambda: len(dials))
    gauge("certificate_remaining_seconds", "Until the agent's certificate expires.", None, lambda: keeper.seconds_left)
    counter("certificate_renewals_total", "Renewals by this process.", None, lambda: keeper.renewals)
    counter("certificate_failures_total", "Failed enrolments and renewals.", None, lambda: keeper.failures)
    if denylist is not None:
        gauge("denylist_error", "1 while the denylist's file has no effect and the last good one has.", None,
              lambda: bool(denylist.error))  # fmt: skip


def _register_sessions(metrics: Metrics, sessions: Sessions) -> None:
    """Register how sessions begin and end, and which users are revoked."""
    counter, gauge = metrics.counter, metrics.gauge
    counters = sessions.counters
    gauge("sessions", "Sessions that are open, detached ones included.", None, lambda: len(sessions))
    gauge("sessions_restricted", "Sessions that gave up rights of their users.", None, lambda: sessions.restricted)
    counter("sessions_total", "Sessions that were authenticated.", None, lambda: counters.opened)
    counter("sessions_refused_total", "AUTHs that were refused.", None, lambda: counters.refused)
    counter("sessions_expired_total", "Sessions that ended with their token, or at their greatest age.", None,
            lambda: counters.expired)  # fmt: skip
    counter("sessions_revoked_total", "Sessions that ended, and AUTHs that were refused, because the user is revoked.",
            None, lambda: counters.revoked)  # fmt: skip
    counter(
        "upgrades_ended_total",
        "Upgraded streams that were reset because the token was renewed with fewer groups, or with another name.",
        None,
        lambda: counters.upgrades_ended,
    )
    revocations = sessions.revocations
    gauge("revocations", "Users on the lists of relays and denylist.", None, lambda: len(revocations))
    counter("revocations_left_out_total", "Revocations of relays whose lists are too long.", None,
            lambda: revocations.left_out)  # fmt: skip


def _register_resumption(metrics: Metrics, sessions: Sessions) -> None:
    """Register sessions without a connection, and what was sent again."""
    counter, gauge = metrics.counter, metrics.gauge
    counters = sessions.counters
    gauge("sessions_detached", "Sessions that wait for a connection.", None, lambda: sessions.detached)
    counter("sessions_resumed_total", "Times that a session came back.", None, lambda: counters.resumed)
    counter("resumes_refused_total", "Connections that wanted a session back and did not get it.",
            {"reason": REFUSALS}, lambda: sessions.resumes.refused)  # fmt: skip
    counter("replayed_bytes_total", "Bytes sent again after resumptions.", None, lambda: sessions.replayed_bytes)
    counter("detached_seconds_total", "Seconds that sessions were detached, all together.", None,
            lambda: counters.detached_seconds)  # fmt: skip


def _register_memory(metrics: Metrics, sessions: Sessions) -> None:
    """Register the memory of all sessions together, and what was ended for want of it."""
    counter, gauge = metrics.counter, metrics.gauge
    counters = sessions.counters
    gauge("memory_held_bytes",
          "Kept to be sent again, or promised to peers beyond first credit, by all sessions together.",
          None, lambda: memory.budget.held)  # fmt: skip
    gauge("memory_budget_bytes", "At which new sessions are refused; windows stop growing at three quarters of it.",
          None, lambda: memory.budget.most)  # fmt: skip
    gauge("waiting_bytes", "Bytes that wait towards all users together.", None, lambda: memory.backlog.held)
    gauge("waiting_limit_bytes", "At which streams that are stalled are reset.", None, lambda: memory.backlog.most)
    counter("stalled_streams_reset_total", "Streams reset because their callers read nothing and memory was needed.",
            None, lambda: sessions.relief.streams_reset)  # fmt: skip
    counter("stalled_sessions_ended_total", "Sessions without a connection ended because memory was needed.",
            None, lambda: sessions.relief.sessions_ended)  # fmt: skip
    gauge("ahead_bytes", "Bytes that callers sent ahead of readers that stopped.", None, lambda: memory.ahead.held)
    gauge("ahead_limit_bytes", "At which streams whose readers stopped are reset.", None, lambda: memory.ahead.most)
    counter("unread_streams_reset_total", "Streams reset because their readers stopped and memory was needed.",
            None, lambda: sessions.ahead_relief.streams_reset)  # fmt: skip
    counter("moves_asked_total", "Sessions asked to leave a relay.", None, lambda: counters.moves_asked)


def _register_requests(metrics: Metrics, sessions: Sessions) -> None:
    """Register requests, connections to the API server and to TCP targets, and what users take of all that."""
    counter, gauge = metrics.counter, metrics.gauge
    stats, upstream = sessions.proxy.stats, sessions.proxy.api.upstream
    targets, accounts, warm = sessions.targets, sessions.accounts, sessions.proxy.warm
    counter("requests_total", "Requests for the API server.", None, lambda: stats.requests)
    gauge("requests_in_flight", "Requests under way, upgraded ones included.", None, lambda: stats.in_flight)
    counter("responses_total", "Answers by class of code.", {"code": CODES},
            lambda: {code: getattr(stats, f"code_{code}") for code in CODES})  # fmt: skip
    counter("requests_refused_total", "Requests that the agent refused itself.", None, lambda: stats.refused)
    counter("requests_cut_total", "Requests that broke off on either side.", None, lambda: stats.cut)
    counter("restricted_refusals_total", "Requests refused because their session gave up the right.",
            {"restriction": RESTRICTIONS}, lambda: stats.restricted)  # fmt: skip
    counter("upgrades_total", "Requests to upgrade (exec, attach, port-forward).", None, lambda: stats.upgrades)
    gauge("upgrades_open", "Upgraded streams that are open.", None, lambda: stats.upgrades_open)
    gauge("users", "Users with at least one session.", None, lambda: len(accounts))
    counter("limit_refusals_total", "Requests, streams and sessions refused because a user was over a limit.",
            {"limit": tuple(limit.value for limit in Limit)}, lambda: accounts.refusals)  # fmt: skip
    counter("paced_seconds_total", "Seconds that connections waited because their users reached their bytes a second.",
            {"direction": DIRECTIONS}, lambda: accounts.paced_seconds)  # fmt: skip
    counter("loop_over_share_seconds_total",
            "Seconds of the event loop that users took beyond their share while others waited.",
            None, lambda: accounts.loop.over)  # fmt: skip
    gauge("apiserver_connections", "Connections to the API server that requests hold.", None,
          lambda: upstream.limit.held)  # fmt: skip
    counter("apiserver_connects_delayed_total", "Connections to the API server that had to wait for their turn.", None,
            lambda: upstream.limit.delayed)  # fmt: skip
    gauge("apiserver_warm_connections", "Unused connections to the API server that sessions keep.", None,
          lambda: warm.held)  # fmt: skip
    counter("apiserver_warm_connections_total", "The same, by what became of them.", {"fate": FATES},
            lambda: warm.counts)  # fmt: skip
    counter("apiserver_unreachable_total", "Connections to the API server that failed.", None,
            lambda: upstream.unreachable)  # fmt: skip
    counter("apiserver_refused_agent_total",
            "Requests of users that the API server refused because of the agent itself, by what it refused.",
            {"what": KINDS}, lambda: upstream.own_refusals.counts)  # fmt: skip
    counter("targets_total", "Connections made to TCP targets.", None, lambda: targets.opened)
    gauge("targets_open", "Connections to TCP targets that are open.", None, lambda: targets.open)
    counter("targets_refused_total", "TCP targets refused to a caller.", None, lambda: targets.refused)
    counter("targets_ended_total", "Connections to TCP targets that were reset because their user's right was lost.",
            None, lambda: targets.ended)  # fmt: skip
    counter("targets_failed_total", "TCP targets that could not be reached.", None, lambda: targets.failed)


def _register_audit(metrics: Metrics, sessions: Sessions) -> None:
    """Register the audit log."""
    audit = sessions.audit
    register_audit(metrics, audit)
    metrics.counter("audit_left_out_total", "Audit records left out because their user is over a bound.", None,
                    lambda: audit.left_out)  # fmt: skip


def _register_tokens(metrics: Metrics, parts: AgentParts) -> None:
    """Register how tokens are bound, proofs that were refused, and the verification of tokens."""
    counter, gauge = metrics.counter, metrics.gauge
    proofs, verifier = parts.sessions.authenticator.proofs, parts.verifier
    counter("auths_total", "AUTHs that were accepted, by how the token is bound to a key.",
            {"bound": tuple(kind.value for kind in BindingKind)}, lambda: proofs.taken)  # fmt: skip
    counter("proofs_refused_total", "Good tokens that were refused because no good proof of their key came with them.",
            {"reason": PROOF_REFUSALS}, lambda: proofs.refused)  # fmt: skip
    if verifier is None:
        return
    counter("tokens_verified_total", "OIDC tokens accepted.", None, lambda: verifier.verified)
    counter("tokens_refused_total", "OIDC tokens refused.", None, lambda: verifier.refused)
    counter("token_refusals_total", "OIDC tokens refused, by rule; the log line has what it was about.",
            {"rule": RULES}, lambda: verifier.refusals)  # fmt: skip
    counter("tokens_without_groups_total", "OIDC tokens accepted without the claim that the groups are taken from.",
            None, lambda: verifier.without_groups)  # fmt: skip
    counter("group_lookups_total", "Look-ups of groups that a token did not hold.",
            {"result": ("answered", "failed")}, verifier.group_lookups)  # fmt: skip
    counter("graph_tokens_total", "Requests for the own token of Microsoft Graph.",
            {"result": ("granted", "failed")}, verifier.graph_tokens)  # fmt: skip
    gauge("jwks_age_seconds", "Age of the oldest key set in use.", None, verifier.oldest_keys)
