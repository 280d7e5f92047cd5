"""What is shown of clusters: metrics with their names, bounded, from what agents report."""

from __future__ import annotations

import pytest

from arcbridge.net.join import JoinCode
from arcbridge.observe.metrics import Metrics
from arcbridge.pki.authority import Authority
from arcbridge.pki.rotation import Rotation
from arcbridge.relay.cluster_reports import MAX_CHECKS, ClusterReports, read_report
from arcbridge.relay.counters import Counters
from arcbridge.relay.fleet.base import AgentReport
from arcbridge.relay.registry.base import ClusterRecord
from arcbridge.wire.records import Status

WELL = AgentReport(checks={"api_server": "", "audit": ""})
ILL = AgentReport(ready=False, checks={"api_server": "api_refused", "audit": ""})


def records(*names: str, revoked: str = "") -> list[ClusterRecord]:
    return [ClusterRecord(name, "", "", 0.0, certificate_expires=9.0, revoked=float(name == revoked)) for name in names]


def shown(reports: ClusterReports) -> dict[str, dict[tuple[str, ...], float]]:
    """The series of each metric, by its name without prefix."""
    metrics = Metrics("relay")
    reports.register(metrics)
    return {name.removeprefix("arcbridge_relay_"): dict(series) for name, _, _, _, series in metrics.read()}


def test_every_cluster_has_a_number_of_agents_and_a_check_is_ok_where_it_is_at_all_of_them() -> None:
    connected = [("a", WELL), ("a", ILL), ("b", AgentReport()), ("x", WELL)]
    reports = ClusterReports(lambda: connected, Counters(), 10)
    reports.learn(records("a", "b", "gone", "shut", revoked="shut"))
    assert not reports.misses_cluster(), "x is not in the registry, and asking again does not help"
    reports.learn(records("a"))
    connected.append(("new", WELL))
    assert reports.misses_cluster(), "it has enrolled since"
    connected.pop()
    reports.learn(records("a", "b", "gone", "shut", revoked="shut"))
    found = shown(reports)
    assert found["cluster_agents"] == {("a",): 2, ("b",): 1, ("gone",): 0}
    assert found["cluster_agents_ready"] == {("a",): 1, ("b",): 1, ("gone",): 0}, "an older agent counts as ready"
    assert found["cluster_check_ok"] == {("a", "api_server"): 0, ("a", "audit"): 1}
    assert found["cluster_certificate_expires_timestamp_seconds"] == {("a",): 9.0, ("b",): 9.0, ("gone",): 9.0}
    assert found["clusters_without_metrics"] == {(): 0}


def test_agents_are_counted_that_know_the_newest_ca_of_the_relay_and_of_their_cluster() -> None:
    own = Authority.create("a")
    state = Rotation(own.certificate_pem, own.key_pem).take("next", 1.0).list
    read: list[str] = []

    class Record(ClusterRecord):
        @property
        def newest_ca_pin(self) -> str:
            read.append(self.name)
            return super().newest_ca_pin

    def record(**more: str) -> Record:
        return Record("a", own.certificate_pem, own.pin, 0.0, **more)

    told = [AgentReport(relay_ca="r2", cluster_ca=state.pins[1]), AgentReport(relay_ca="r1", cluster_ca=own.pin)]
    reports = ClusterReports(lambda: [("a", one) for one in told], Counters(), 1, lambda: "r2")
    for now, known in ((record(), 1), (record(cas=state.text), 1)):
        reports.learn([now])
        assert shown(reports)["cluster_agents_newest_ca"] == {("a", "relay"): 1, ("a", "cluster"): known}
    told[1] = told[0]
    assert shown(reports)["cluster_agents_newest_ca"] == {("a", "relay"): 2, ("a", "cluster"): 2}
    reports.learn([record(cas=state.text)])
    assert read == ["a", "a"], "certificates are read where they have changed, not each minute"


def test_no_more_clusters_than_the_setting_allows() -> None:
    reports = ClusterReports(lambda: [("c", WELL)], Counters(), 2)
    reports.learn(records("c", "b", "a"))
    found = shown(reports)
    assert set(found["cluster_agents"]) == {("a",), ("b",)}
    assert found["cluster_check_ok"] == {}
    assert found["clusters_without_metrics"] == {(): 1}
    reports.change(3)
    assert set(shown(reports)["cluster_agents"]) == {("a",), ("b",), ("c",)}, "a reload counts at once"


def test_two_thousand_clusters_have_a_series_each_where_the_setting_says_so() -> None:
    names = [f"c{number}" for number in range(2000)]
    reports = ClusterReports(lambda: [(name, WELL) for name in names], Counters(), 2000)
    reports.learn(records(*names))
    found = shown(reports)
    assert len(found["cluster_agents"]) == 2000
    assert len(found["cluster_check_ok"]) == 4000


def test_joins_count_where_the_user_may_reach_the_cluster_and_made_no_mistake() -> None:
    counters = Counters()
    reports = ClusterReports(list, counters, 10)
    reports.learn(records("a", "b"))
    for cluster, code in (
        ("a", JoinCode.OK),
        ("a", JoinCode.NO_AGENT),
        ("a", JoinCode.LIMIT),
        ("", JoinCode.FORBIDDEN),
    ):
        counters.joined(cluster, code)
    found = shown(reports)
    assert found["cluster_joins_total"] == {("a",): 2, ("b",): 0}
    assert found["cluster_joins_failed_total"] == {("a",): 1, ("b",): 0}
    assert sum(counters.joins.values()) == 4
    reports.learn(records("b"))
    assert dict(counters.cluster_joins) == {}, "a cluster that is deleted is forgotten"


@pytest.mark.parametrize(
    ("checks", "read"),
    [
        ("", None),
        ("api_server audit:audit_disk", {"api_server": "", "audit": "audit_disk"}),
        ('a{b="c"} A:x audit: audit:y:z made_up:fault relays', {"relays": ""}),
        (" ".join(["x"] * MAX_CHECKS + ["audit"]), {}),
    ],
)
def test_an_agents_words_are_names_of_checks_or_nothing(checks: str, read: dict[str, str] | None) -> None:
    status = Status(ready=False, unready="control \x1b[2J No", checks=checks, sessions=3, round_trip=1500)
    report = read_report(status)
    assert report.checks == read
    assert (report.ready, report.unready, report.sessions, report.round_trip) == (False, "control", 3, 0.0015)


def test_what_fails_is_named_once() -> None:
    report = read_report(Status(ready=False, unready="api_server control", checks="audit:full api_server:api_refused"))
    assert report.failing == "audit:full api_server:api_refused control"
