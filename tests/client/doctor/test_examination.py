"""The order of the way, against a far side in this process; `tests/e2e/test_doctor.py` has real relays and faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcbridge.checks.diagnosis import Finding, FindingState, failed, first_failure
from arcbridge.client.doctor.examination import examine
from arcbridge.client.service import ClientContext, Terminal
from tests.client.far_side import CLUSTER, FarSide
from tests.client.session.test_session_manager import settings
from tests.support.world import fixed_port


def context(far: FarSide, directory: Path, **changes: object) -> ClientContext:
    config = settings(far, directory, **changes)
    return ClientContext(config, Terminal(), environment={"KUBECONFIG": str(directory / "kubeconfig")})


async def test_what_is_behind_a_failure_is_skipped_and_what_is_not_is_looked_at(far: FarSide, tmp_path: Path) -> None:
    found: list[Finding] = []
    await examine(context(far, tmp_path, relay=f"https://127.0.0.1:{fixed_port()}"), CLUSTER, found.append)
    failure = first_failure(found)
    assert failure is not None
    assert failure.hop == "TCP"
    states = {finding.hop: finding.state for finding in found}
    for hop in ("TLS", "relay", "relay certificate", "clock", "policy", "agent", "session", "API server"):
        assert states[hop] is FindingState.SKIPPED
    assert states["login"] is FindingState.OK


async def test_a_state_directory_that_cannot_be_used_hides_no_relay(
    far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = failed("state directory", "is full", "", "disk_full")
    monkeypatch.setattr("arcbridge.client.doctor.examination.look_at_directories", lambda *_: full)
    found: list[Finding] = []
    await examine(context(far, tmp_path, relay=f"https://127.0.0.1:{fixed_port()}"), "", found.append)
    hops = {finding.hop: finding for finding in found}
    assert hops["TCP"].code == "relay_port_closed"
    assert hops["TLS"].detail == "TCP failed"
    assert hops["policy"].detail == "the relay cannot be used"


async def test_without_a_cluster_it_ends_at_the_relay(far: FarSide, tmp_path: Path) -> None:
    found: list[Finding] = []
    await examine(context(far, tmp_path), "", found.append)
    assert "session" not in [finding.hop for finding in found]
    # The far side speaks joins and has no HTTP API.
    failure = first_failure(found)
    assert failure is not None
    assert (failure.hop, failure.code) == ("policy", "relay_busy")


async def test_of_two_relays_one_that_fails_is_a_warning(far: FarSide, tmp_path: Path) -> None:
    closed = f"https://127.0.0.1:{fixed_port()}"
    found: list[Finding] = []
    await examine(context(far, tmp_path, relay="", relays=(far.address, closed)), "", found.append)
    assert [finding.state for finding in found if finding.code == "relay_port_closed"] == [FindingState.WARNING]
    assert all(finding.hop.endswith(")") for finding in found if finding.hop.startswith("TCP"))
