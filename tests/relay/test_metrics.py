from __future__ import annotations

from types import SimpleNamespace

from arcbridge.identity.proof import ProofChecker, ProofPolicy
from arcbridge.net.join import JoinCode
from arcbridge.observe.metrics import Metrics
from arcbridge.pki.rotation import Rotation
from arcbridge.relay.counters import REJECTIONS
from arcbridge.relay.http.api import LIMITS as API_LIMITS
from arcbridge.relay.metrics import register
from arcbridge.relay.session_slots import LIMITS
from tests.net.ends import authority
from tests.relay.station import Agent, Station


async def test_every_metric_reads_and_the_series_are_fixed(relay: Station) -> None:
    rotated = Rotation(authority().certificate_pem, authority().key_pem).take("next", 5.0).authority()
    async with Agent(relay):
        metrics = Metrics("relay")
        lookups = {"answered": 5, "failed": 6}
        verifier = SimpleNamespace(
            verified=3,
            refused=1,
            refusals={"token.aud": 1},
            group_lookups=lambda: lookups,
            graph_tokens=lambda: {"granted": 1, "failed": 8},
            without_groups=2,
        )
        proofs = ProofChecker(ProofPolicy.IF_BOUND, "the relay")
        proofs.taken["cnf.jkt"], proofs.refused["missing"] = 2, 4
        basis = SimpleNamespace(
            counters=relay.counters,
            authority=rotated,
            verifier=verifier,
            checks=SimpleNamespace(proofs=proofs, access=relay.access),
            certificate=SimpleNamespace(loaded=SimpleNamespace(expires=5.0)),
        )
        entrances = SimpleNamespace(
            admission=relay.admission,
            control=relay.control,
            clients=relay.clients,
            pumps=relay.pumps,
            api=SimpleNamespace(limited=dict.fromkeys(API_LIMITS, 0)),
            http=SimpleNamespace(malformed=0, slow=0, outlived=0),
            page=None,
        )
        register(metrics, basis, entrances)
        relay.counters.rejected["cap_total"] += 7
        text = metrics.render()[0].decode()
        assert metrics.read_failures == 0
        assert 'arcbridge_relay_connections_rejected_total{reason="cap_total"} 7.0' in text
        assert 'arcbridge_relay_tokens_total{result="verified"} 3.0' in text
        assert 'arcbridge_relay_group_lookups_total{result="failed"} 6.0' in text
        assert 'arcbridge_relay_graph_tokens_total{result="failed"} 8.0' in text
        assert 'arcbridge_relay_tokens_accepted_total{bound="cnf.jkt"} 2.0' in text
        assert 'arcbridge_relay_proofs_refused_total{reason="missing"} 4.0' in text
        assert "arcbridge_relay_ca_rotation_step_timestamp_seconds 5.0" in text
        assert "arcbridge_relay_ca_rotation_agents_behind 1.0" in text
        for reason in REJECTIONS:
            assert f'reason="{reason}"' in text
        for limit in LIMITS:
            assert f'arcbridge_relay_joins_limited_total{{limit="{limit}"}} 0.0' in text
        for code in JoinCode:
            assert f'arcbridge_relay_joins_total{{result="{code.name.lower()}"}} 0.0' in text
