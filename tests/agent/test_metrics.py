"""What the agent shows at /metrics: all of it can be read, and nothing of it has a label from outside."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

from arcbridge.agent.accounts import Accounts, Limit
from arcbridge.agent.elevation.elevation import Elevation
from arcbridge.agent.kube.attempt import ProxyStats
from arcbridge.agent.kube.connect_limit import ConnectLimit
from arcbridge.agent.kube.own_refusal import OwnRefusals
from arcbridge.agent.metrics import register
from arcbridge.agent.parts import AgentParts
from arcbridge.agent.recording.recorder import Recorder
from arcbridge.agent.relief import AheadRelief, BacklogRelief
from arcbridge.agent.resume import Resumes
from arcbridge.agent.revocations import Revocations
from arcbridge.agent.tracing.exporter import SpanExporter
from arcbridge.identity.proof import ProofChecker, ProofPolicy
from arcbridge.mux import memory
from arcbridge.observe.metrics import Metrics
from arcbridge.settings.config import ElevationConfig, TracingConfig
from arcbridge.wire.records import Revoke


class Counters(SimpleNamespace):
    """Answers 0 to every counter."""

    def __getattr__(self, name: str) -> Any:
        return 0

    def __len__(self) -> int:
        return 3


class Verifier(Counters):
    refusals: ClassVar[dict[str, int]] = {"token.iss": 2}

    def oldest_keys(self) -> float:
        return 7.0

    def group_lookups(self) -> dict[str, int]:
        return {"answered": 4, "failed": 1}

    def graph_tokens(self) -> dict[str, int]:
        return {"granted": 2, "failed": 3}


def test_every_metric_can_be_read() -> None:
    metrics = Metrics("agent")
    sessions = Counters(detached=2, counters=Counters(detached_seconds=1.5, revoked=4))
    sessions.accounts, sessions.resumes, sessions.revocations = Accounts(), Resumes(), Revocations()
    sessions.relief, sessions.ahead_relief = BacklogRelief(memory.backlog), AheadRelief()
    sessions.elevation = Elevation(ElevationConfig(("operators",)), Counters())
    sessions.accounts.refusals[Limit.STREAMS] = 6
    sessions.resumes.refuse("secret")
    sessions.revocations.hear("relay:443", Revoke("alice", 1, True))
    own = OwnRefusals()
    own.credential()
    api = Counters(upstream=Counters(unreachable=5, limit=ConnectLimit(), own_refusals=own))
    warm = Counters(held=7, counts={"used": 12})
    tracer = SpanExporter(TracingConfig("https://collector.test/v1/traces"), "agent-1")
    tracer.dropped["full"] = 13
    recorder = Counters(bucket=None, refused={"fault": 14, "client": 15}, _spool=Counters(used=8))
    recorder.register = partial(Recorder.register, recorder)
    context = Counters(tracer=tracer, recorder=recorder)
    sessions.proxy = Counters(stats=ProxyStats(requests=4, code_2xx=3), api=api, warm=warm, context=context)
    proofs = ProofChecker(ProofPolicy.IF_BOUND, "the agent")
    proofs.taken["nonce"], proofs.refused["peer"] = 8, 9
    sessions.authenticator = Counters(proofs=proofs)
    sinks = Counters(senders=[Counters(name="siem", delivered=11, failure="x", lag=2.5)])
    sessions.targets, sessions.audit, keeper = Counters(), Counters(sinks=sinks), Counters()
    control = Counters(up=1, dials=Counters(joins=2), ledgers={}, round_trip=lambda: 0.012)
    denylist = Counters(error="broken")
    register(metrics, AgentParts(api, Verifier(), keeper, denylist, sessions, control))
    text = metrics.render()[0].decode()
    assert metrics.read_failures == 0
    assert "arcbridge_agent_requests_total 4.0" in text
    assert 'arcbridge_agent_spans_dropped_total{reason="full"} 13.0' in text
    assert 'arcbridge_agent_recordings_refused_total{reason="fault"} 14.0' in text
    assert 'arcbridge_agent_audit_sink_delivered_total{sink="siem"} 11.0' in text
    assert 'arcbridge_agent_audit_sink_failing{sink="siem"} 1.0' in text
    assert 'arcbridge_agent_audit_sink_lag_seconds{sink="siem"} 2.5' in text
    assert 'arcbridge_agent_auths_total{bound="nonce"} 8.0' in text
    assert 'arcbridge_agent_group_lookups_total{result="failed"} 1.0' in text
    assert 'arcbridge_agent_graph_tokens_total{result="failed"} 3.0' in text
    assert 'arcbridge_agent_proofs_refused_total{reason="peer"} 9.0' in text
    assert 'arcbridge_agent_responses_total{code="2xx"} 3.0' in text
    assert "arcbridge_agent_apiserver_unreachable_total 5.0" in text
    assert "arcbridge_agent_apiserver_warm_connections 7.0" in text
    assert 'arcbridge_agent_apiserver_warm_connections_total{fate="used"} 12.0' in text
    assert 'arcbridge_agent_apiserver_refused_agent_total{what="credential"} 1.0' in text
    assert 'arcbridge_agent_token_refusals_total{rule="token.iss"} 2.0' in text
    assert "arcbridge_agent_control_connections 1.0" in text
    assert "arcbridge_agent_sessions 3.0" in text
    assert "arcbridge_agent_sessions_detached 2.0" in text
    assert "arcbridge_agent_detached_seconds_total 1.5" in text
    assert 'arcbridge_agent_resumes_refused_total{reason="secret"} 1.0' in text
    assert 'arcbridge_agent_joins_total{result="ok"} 2.0' in text
    assert 'arcbridge_agent_limit_refusals_total{limit="streams"} 6.0' in text
    assert "arcbridge_agent_sessions_revoked_total 4.0" in text
    assert "arcbridge_agent_revocations 1.0" in text
    assert "arcbridge_agent_denylist_error 1.0" in text
    assert "arcbridge_agent_jwks_age_seconds 7.0" in text
    read = dict(line.split() for line in text.splitlines() if line.startswith("arcbridge_agent_memory_"))
    assert float(read["arcbridge_agent_memory_budget_bytes"]) == memory.budget.most
    waiting = dict(line.split() for line in text.splitlines() if line.startswith("arcbridge_agent_waiting_"))
    assert float(waiting["arcbridge_agent_waiting_limit_bytes"]) == memory.backlog.most
    assert float(read["arcbridge_agent_memory_held_bytes"]) == memory.budget.held
