"""The relay's metrics: each reads plain integers when it is scraped. Labels have fixed values only."""

from __future__ import annotations

from arcbridge.identity.proof import REFUSALS as PROOF_REFUSALS
from arcbridge.identity.proof import BindingKind, ProofChecker
from arcbridge.identity.refusal import RULES
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.net.join import JoinCode
from arcbridge.observe.metrics import Metrics
from arcbridge.relay.access import Access
from arcbridge.relay.admission import Admission, Purpose
from arcbridge.relay.certificate import ServerCertificate
from arcbridge.relay.control import ControlServer
from arcbridge.relay.counters import LOSSES, REJECTIONS, Counters
from arcbridge.relay.hop import OUTCOMES as HOP_OUTCOMES
from arcbridge.relay.hop import Hops
from arcbridge.relay.http.api import Limited
from arcbridge.relay.http.server import HttpApiServer
from arcbridge.relay.pump import Pumps
from arcbridge.relay.rendezvous import Rendezvous
from arcbridge.relay.session_places import LIMITS as JOIN_LIMITS
from arcbridge.relay.siblings.handover import OUTCOMES as HANDOVER_OUTCOMES
from arcbridge.relay.siblings.handover import Handovers


def register(
    metrics: Metrics,
    *,
    counters: Counters,
    admission: Admission,
    control: ControlServer,
    rendezvous: Rendezvous,
    pumps: Pumps,
    verifier: TokenVerifier,
    proofs: ProofChecker,
    api: HttpApiServer,
    api_refusals: Limited,
    certificate: ServerCertificate,
    access: Access,
) -> None:
    """Tell `metrics` where everything is read. The names are without their prefix `arcbridge_relay_`."""
    _register_connections(metrics, counters, admission)
    _register_agents(metrics, counters, control)
    _register_joins(metrics, counters, rendezvous)
    _register_pumps(metrics, counters, rendezvous, pumps, access)
    _register_tokens(metrics, verifier, proofs)
    _register_api(metrics, api, api_refusals, certificate)


def _register_connections(metrics: Metrics, counters: Counters, admission: Admission) -> None:
    """Register connections until they have shown who they are."""
    counter, gauge = metrics.counter, metrics.gauge
    counter("connections_total", "Connections accepted.", None, lambda: counters.accepted)
    counter(
        "connections_rejected_total",
        "Connections closed before it was known who they are.",
        {"reason": REJECTIONS},
        lambda: counters.rejected,
    )
    gauge("connections_unauthenticated", "Connections that have not shown who they are.", None,
          lambda: admission.waiting)  # fmt: skip
    purposes = tuple(purpose.value for purpose in Purpose)
    gauge("connection_places", "Connections that have not shown who they are, by purpose.", {"purpose": purposes},
          admission.held)  # fmt: skip
    counter("connections_evicted_total", "Connections closed to make room for others.", {"purpose": purposes},
            admission.evicted)  # fmt: skip
    counter("loop_over_share_seconds_total", "Seconds of the event loop that payers took beyond their share.", None,
            lambda: admission.loop_times.shares.over)  # fmt: skip
    counter("accept_pauses_total", "How often accepting waited for file descriptors.", None,
            lambda: counters.accept_pauses)  # fmt: skip


def _register_agents(metrics: Metrics, counters: Counters, control: ControlServer) -> None:
    """Register the control connections of agents."""
    counter, gauge = metrics.counter, metrics.gauge
    gauge("agents", "Control connections of agents.", None, lambda: len(control))
    counter("agent_connections_total", "Control connections that were registered.", None,
            lambda: counters.agents_total)  # fmt: skip
    counter("agents_refused_total", "Control connections that were refused after their handshake.", None,
            lambda: counters.agents_refused)  # fmt: skip
    counter("agents_replaced_total", "Control connections replaced by a newer one of the same instance id.", None,
            lambda: counters.agents_replaced)  # fmt: skip
    counter("agents_flapping_total", "Control connections refused because one instance id is used twice.", None,
            lambda: counters.agents_flapping)  # fmt: skip
    counter("agents_paced_total", "Control connections turned away because too many came at once.", None,
            lambda: counters.agents_paced)  # fmt: skip
    gauge("agents_waiting", "Control connections that wait for their turn to shake hands.", None,
          lambda: control.waiting)  # fmt: skip
    counter("certificates_renewed_twice_total", "Agents' certificates renewed twice: there is a copy of a credential.",
            None, lambda: counters.certificates_renewed_twice)  # fmt: skip
    counter("clusters_adopted_total", "Clusters taken over from another relay of the same CA.", None,
            lambda: counters.clusters_adopted)  # fmt: skip


def _register_joins(metrics: Metrics, counters: Counters, rendezvous: Rendezvous) -> None:
    """Register the joins of clients and agents."""
    counter, gauge = metrics.counter, metrics.gauge
    counter(
        "joins_total",
        "Joins of clients, by how they ended.",
        {"result": tuple(code.name.lower() for code in JoinCode)},
        lambda: counters.joins,
    )
    metrics.histogram("join_seconds", "From a client's JOIN to its pump.", None, lambda: counters.join_seconds)
    counter("joins_limited_total", "Joins of clients refused by a limit of the relay.", {"limit": JOIN_LIMITS},
            lambda: rendezvous.places.refused)  # fmt: skip
    gauge("joins_pending", "Clients that wait for their agent.", None, lambda: rendezvous.pending)
    counter("agent_joins_refused_total", "Joins of agents that were refused.", None,
            lambda: counters.agent_joins_refused)  # fmt: skip
    counter("dial_tokens_refused_total", "Dial tokens that were void, of another cluster, or guessed.", None,
            lambda: counters.tokens_refused)  # fmt: skip


def _register_pumps(metrics: Metrics, counters: Counters, rendezvous: Rendezvous, pumps: Pumps, access: Access) -> None:
    """Register the sessions that are pumped, and what ends them."""
    counter, gauge = metrics.counter, metrics.gauge
    gauge("draining", "Whether this relay is going away (0, 1).", None, lambda: rendezvous.draining)
    gauge("pumps_open", "Sessions that are being pumped.", None, lambda: len(pumps))
    counter("pumps_total", "Sessions that were joined.", None, lambda: pumps.total)
    counter("pumps_cut_total", "Sessions that had not left by themselves when the relay went away.", None,
            lambda: counters.pumps_cut)  # fmt: skip
    gauge("users_revoked", "Users whose logins are revoked.", None, lambda: len(access.users or ()))
    counter("sessions_cut_total", "Sessions that ran when their right was lost, by why it was.",
            {"reason": LOSSES}, lambda: counters.sessions_cut)  # fmt: skip
    counter(
        "pumped_bytes_total",
        "Bytes moved, by direction: up is from client to agent.",
        {"direction": ("up", "down")},
        lambda: dict(zip(("up", "down"), pumps.bytes(), strict=True)),
    )
    gauge("pipes_open", "Pipes of the splice pool.", None, lambda: pumps.pipes.open)
    counter("pipes_refused_total", "How often the pump copied because no pipe was free.", None,
            lambda: pumps.pipes.refused)  # fmt: skip


def _register_tokens(metrics: Metrics, verifier: TokenVerifier, proofs: ProofChecker) -> None:
    """Register how access tokens were judged."""
    counter = metrics.counter
    counter(
        "tokens_total",
        "Access tokens judged.",
        {"result": ("verified", "refused")},
        lambda: {"verified": verifier.verified, "refused": verifier.refused},
    )
    counter("token_refusals_total", "Access tokens refused, by rule; the log line has what it was about.",
            {"rule": RULES}, lambda: verifier.refusals)  # fmt: skip
    counter("tokens_accepted_total", "Access tokens that were accepted, by how they are bound to a key.",
            {"bound": tuple(kind.value for kind in BindingKind)}, lambda: proofs.taken)  # fmt: skip
    counter("proofs_refused_total", "Good access tokens that were refused for want of a good proof of their key.",
            {"reason": PROOF_REFUSALS}, lambda: proofs.refused)  # fmt: skip
    counter("group_lookups_total", "Look-ups of groups that an access token did not hold.",
            {"result": ("answered", "failed")}, verifier.group_lookups)  # fmt: skip
    counter("graph_tokens_total", "Requests for the own token of Microsoft Graph.",
            {"result": ("granted", "failed")}, verifier.graph_tokens)  # fmt: skip


def _register_api(metrics: Metrics, api: HttpApiServer, api_refusals: Limited, certificate: ServerCertificate) -> None:
    """Register the HTTP API, and the certificate that it shows."""
    counter, gauge = metrics.counter, metrics.gauge
    counter("api_malformed_requests_total", "Requests to the HTTP API that were no HTTP.", None,
            lambda: api.malformed)  # fmt: skip
    counter("api_slow_connections_total", "Connections to the HTTP API that sent no request in time.", None,
            lambda: api.slow)  # fmt: skip
    counter("api_expired_connections_total", "Connections to the HTTP API whose life without a credential was over.",
            None, lambda: api.outlived)  # fmt: skip
    counter("api_requests_limited_total", "Requests to the HTTP API refused by a limit.", {"limit": Limited.LIMITS},
            lambda: api_refusals.counts)  # fmt: skip
    gauge("certificate_expires_timestamp_seconds", "When the relay's certificate lapses, unix time.", None,
          lambda: certificate.expires)  # fmt: skip


def register_hops(metrics: Metrics, hops: Hops) -> None:
    """Register what a relay counts that passes joins on to other relays."""
    metrics.counter(
        "hops_total",
        "Joins of agents that were passed on to the relay they are for, by how that ended.",
        {"result": HOP_OUTCOMES},
        lambda: hops.outcomes,
    )


def register_handovers(metrics: Metrics, handovers: Handovers) -> None:
    """Register what each of several processes of one relay counts."""
    metrics.counter(
        "handovers_total",
        "Joins of agents that came out at another worker than the one that waited, by how their hand-over ended.",
        {"result": HANDOVER_OUTCOMES},
        lambda: handovers.outcomes,
    )
