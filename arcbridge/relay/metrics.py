"""The relay's metrics: each reads plain integers when it is scraped. Labels have fixed values only."""

from __future__ import annotations

from functools import partial
from typing import Final

from arcbridge.identity.proof import REFUSALS as PROOF_REFUSALS
from arcbridge.identity.proof import BindingKind, ProofChecker
from arcbridge.identity.refusal import RULES
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.net.join import JoinCode
from arcbridge.observe.metrics import Metrics
from arcbridge.relay.admission import Admission, Purpose
from arcbridge.relay.ca_rotation import is_behind
from arcbridge.relay.counters import COMMANDS_ENDS, LOSSES, REJECTIONS, Counters
from arcbridge.relay.http.api import LIMITS as API_LIMITS
from arcbridge.relay.parts import Basis, Entrances
from arcbridge.relay.session_slots import LIMITS as JOIN_LIMITS

_COUNTERS: Final = (
    ("connections_total", "accepted", "Connections accepted."),
    ("accept_pauses_total", "accept_pauses", "How often accepting waited for file descriptors."),
    ("agent_connections_total", "agents_total", "Control connections that were registered."),
    ("agents_refused_total", "agents_refused", "Control connections that were refused after their handshake."),
    ("agents_replaced_total", "agents_replaced", "Control connections that a newer one of the instance replaced."),
    ("agents_flapping_total", "agents_flapping", "Control connections refused because one instance id is used twice."),
    ("agents_paced_total", "agents_paced", "Control connections turned away because too many came at once."),
    ("certificates_renewed_twice_total", "certificates_renewed_twice", "Certificates renewed twice: one is a copy."),
    ("revocations_returned_total", "revocations_returned", "Lost revocations that agents gave back."),
    ("ledgers_forged_total", "ledgers_forged", "Times that an agent gave back what no relay has sealed."),
    ("clusters_adopted_total", "clusters_adopted", "Clusters taken over from another relay of the same CA."),
    ("agent_joins_refused_total", "agent_joins_refused", "Joins of agents that were refused."),
    ("dial_tokens_refused_total", "tokens_refused", "Dial tokens that were void, of another cluster, or guessed."),
    ("pumps_cut_total", "pumps_cut", "Sessions that had not left by themselves when the relay went away."),
)
"""Metrics that are one number of `Counters`: name, attribute, help."""
_API_COUNTERS: Final = (
    ("api_malformed_requests_total", "malformed", "Requests to the HTTP API that were no HTTP."),
    ("api_slow_connections_total", "slow", "Connections to the HTTP API that sent no request in time."),
    ("api_expired_connections_total", "outlived", "Connections to the HTTP API that outlived a stranger's time."),
)
"""The same of `HttpApiServer`."""


def register(metrics: Metrics, basis: Basis, entrances: Entrances) -> None:
    """Tell `metrics` where everything is read. The names are without their prefix `arcbridge_relay_`."""
    for rows, source in ((_COUNTERS, basis.counters), (_API_COUNTERS, entrances.http)):
        for name, attribute, help in rows:
            metrics.counter(name, help, None, partial(getattr, source, attribute))
    _register_connections(metrics, basis.counters, entrances.admission)
    _register_sessions(metrics, basis, entrances)
    _register_tokens(metrics, basis.verifier, basis.checks.proofs)
    metrics.counter("api_requests_limited_total", "Requests to the HTTP API refused by a limit.",
                    {"limit": API_LIMITS}, lambda: entrances.api.limited)  # fmt: skip
    metrics.counter("administration_total", "Commands of administrators over HTTPS, by how they ended.",
                    {"outcome": COMMANDS_ENDS}, lambda: basis.counters.administration)  # fmt: skip
    if entrances.page is not None:
        entrances.page.register(metrics)
    metrics.gauge("certificate_expires_timestamp_seconds", "When the relay's certificate lapses, unix time.", None,
                  lambda: basis.certificate.loaded.expires)  # fmt: skip


def _register_connections(metrics: Metrics, counters: Counters, admission: Admission) -> None:
    """Register connections until they have shown who they are."""
    counter, gauge = metrics.counter, metrics.gauge
    counter("connections_rejected_total", "Connections closed before it was known who they are.",
            {"reason": REJECTIONS}, lambda: counters.rejected)  # fmt: skip
    gauge("connections_unauthenticated", "Connections that have not shown who they are.", None,
          lambda: admission.waiting)  # fmt: skip
    purposes = tuple(purpose.value for purpose in Purpose)
    gauge("connection_places", "Connections that have not shown who they are, by purpose.", {"purpose": purposes},
          admission.held)  # fmt: skip
    counter("connections_evicted_total", "Connections closed to make room for others.", {"purpose": purposes},
            admission.evicted)  # fmt: skip
    counter("loop_over_share_seconds_total", "Seconds of the event loop that payers took beyond their share.", None,
            lambda: admission.loop_times.shares.over)  # fmt: skip


def _register_sessions(metrics: Metrics, basis: Basis, entrances: Entrances) -> None:
    """Register agents, joins, and the sessions that are pumped."""
    counter, gauge = metrics.counter, metrics.gauge
    counters, control, clients, pumps = basis.counters, entrances.control, entrances.clients, entrances.pumps
    gauge("agents", "Control connections of agents.", None, lambda: len(control))
    authority = basis.authority
    gauge("ca_rotation_step_timestamp_seconds", "When the last step of a rotation of the relay's CA was taken, 0: none "
          "is under way.", None, lambda: authority.step_at)  # fmt: skip
    gauge("ca_rotation_agents_behind", "Agents that have not followed that step.", None,
          lambda: sum(is_behind(report, authority) for _, report in control.reports()))  # fmt: skip
    counter("ca_rotation_joins_total", "Joins of users since the relay's CA was rotated, by whether their client keeps "
            "the newest CA.", {"newest": ("yes", "no")}, lambda: counters.joins_newest_ca)  # fmt: skip
    gauge("agents_waiting", "Control connections that wait for their turn to shake hands.", None,
          lambda: control.waiting)  # fmt: skip
    counter("joins_total", "Joins of clients, by how they ended.",
            {"result": tuple(code.name.lower() for code in JoinCode)}, lambda: counters.joins)  # fmt: skip
    metrics.histogram("join_seconds", "From a client's JOIN to its pump.", None, lambda: counters.join_seconds)
    counter("joins_limited_total", "Joins of clients refused by a limit of the relay.", {"limit": JOIN_LIMITS},
            lambda: clients.slots.refused)  # fmt: skip
    gauge("joins_pending", "Clients that wait for their agent.", None, lambda: clients.pending)
    gauge("draining", "Whether this relay is going away (0, 1).", None, lambda: clients.draining)
    gauge("pumps_open", "Sessions that are being pumped.", None, lambda: len(pumps))
    counter("pumps_total", "Sessions that were joined.", None, lambda: pumps.total)
    gauge("users_revoked", "Users whose logins are revoked.", None, lambda: len(basis.checks.access.users or ()))
    counter("sessions_cut_total", "Sessions that ran when their right was lost, by why it was.",
            {"reason": LOSSES}, lambda: counters.sessions_cut)  # fmt: skip
    counter("pumped_bytes_total", "Bytes moved, by direction: up is from client to agent.",
            {"direction": ("up", "down")}, lambda: dict(zip(("up", "down"), pumps.bytes(), strict=True)))  # fmt: skip
    gauge("pipes_open", "Pipes of the splice pool.", None, lambda: pumps.pipes.open)
    counter("pipes_refused_total", "How often the pump copied because no pipe was free.", None,
            lambda: pumps.pipes.refused)  # fmt: skip


def _register_tokens(metrics: Metrics, verifier: TokenVerifier, proofs: ProofChecker) -> None:
    """Register how access tokens were judged."""
    counter = metrics.counter
    counter("tokens_total", "Access tokens judged.", {"result": ("verified", "refused")},
            lambda: {"verified": verifier.verified, "refused": verifier.refused})  # fmt: skip
    counter("token_refusals_total", "Access tokens refused, by rule; the log line has what it was about.",
            {"rule": RULES}, lambda: verifier.refusals)  # fmt: skip
    counter("tokens_accepted_total", "Access tokens that were accepted, by how they are bound to a key.",
            {"bound": tuple(kind.value for kind in BindingKind)}, lambda: proofs.taken)  # fmt: skip
    counter("proofs_refused_total", "Good access tokens that were refused for want of a good proof of their key.",
            {"reason": PROOF_REFUSALS}, lambda: proofs.refused)  # fmt: skip
    counter("tokens_without_groups_total", "Access tokens accepted without the claim that the groups are taken from.",
            None, lambda: verifier.without_groups)  # fmt: skip
    counter("group_lookups_total", "Look-ups of groups that an access token did not hold.",
            {"result": ("answered", "failed")}, verifier.group_lookups)  # fmt: skip
    counter("graph_tokens_total", "Requests for the own token of Microsoft Graph.",
            {"result": ("granted", "failed")}, verifier.graph_tokens)  # fmt: skip
