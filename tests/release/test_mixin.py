"""The dashboard is that of its tables, and Grafana's own types read it; copies of the mixin have operators' values."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from release import mixin
from tests.support.processes import require_or_skip


def missing(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Say what of a document another one does not have."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            fault
            for key, value in ours.items()
            for fault in (missing(value, theirs[key], f"{place}.{key}") if key in theirs else [f"{place}.{key}"])
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            fault for n, pair in enumerate(zip(ours, theirs, strict=True)) for fault in missing(*pair, f"{place}[{n}]")
        ]
    return [] if ours == theirs else [f"{place}: {ours!r} became {theirs!r}"]


def test_the_dashboard_is_what_the_tables_say() -> None:
    assert mixin.DASHBOARD.read_text(encoding="utf-8") == mixin.dashboard(), "run: make mixin"


def test_grafana_knows_each_field_of_the_dashboard() -> None:
    """Its published types read the dashboard, and write what they read: a field that they do not know would be gone."""
    document = json.loads(mixin.dashboard())
    read = json.loads(json.dumps(Dashboard.from_json(document), cls=JSONEncoder))
    assert missing(document, read) == []
    assert missing({**document, "titel": 1}, read) == [".titel"]


def test_panels_have_places_of_their_own() -> None:
    panels = json.loads(mixin.dashboard())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_a_copy_has_an_operators_values(tmp_path: Path) -> None:
    made = mixin.write(tmp_path, "https://docs.example.org/arcbridge/v0.1.0/", "0.9995")
    assert sorted(path.name for path in made) == ["arcbridge.json", "prometheusrule.yaml", "rules.yaml"]
    rules, written = yaml.safe_load(mixin.RULES.read_text()), yaml.safe_load((tmp_path / "rules.yaml").read_text())
    for group, ours in zip(written["groups"], rules["groups"], strict=True):
        for rule, original in zip(group["rules"], ours["rules"], strict=True):
            if "alert" in rule:
                links = rule["annotations"], original["annotations"]
                url, anchor = links[0].pop("runbook_url"), links[1].pop("runbook_url").partition("#")[2]
                assert url == f"https://docs.example.org/arcbridge/v0.1.0/docs/alerts.md#{anchor}"
            elif rule["record"] == "arcbridge:join_objective:ratio":
                assert rule["expr"] == "vector(0.9995)"
                rule["expr"] = original["expr"]
            assert rule == original, "nothing else differs"
    thing = yaml.safe_load((tmp_path / "prometheusrule.yaml").read_text())
    assert thing["kind"] == "PrometheusRule"
    assert thing["spec"] == yaml.safe_load((tmp_path / "rules.yaml").read_text())
    promtool = shutil.which("promtool")
    if promtool is None:
        require_or_skip("promtool", "promtool is not on this machine (Debian: package prometheus)")
    subprocess.run([promtool, "check", "rules", tmp_path / "rules.yaml"], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("out", "runbooks", "objective", "said"),
    [
        (True, "docs", "", "RUNBOOKS='docs'"),
        (True, 'https://a"b', "", "RUNBOOKS="),
        (True, "", "99.9", "OBJECTIVE='99.9'"),
        (True, "", "1", "OBJECTIVE='1'"),
        (True, "", "0.1", "OBJECTIVE='0.1'"),
        (True, "", "0.93", "OBJECTIVE='0.93'"),
        (False, "", "0.999", "say where, OUT=DIRECTORY"),
    ],
)
def test_what_cannot_work_is_said(tmp_path: Path, out: bool, runbooks: str, objective: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        mixin.write(tmp_path if out else None, runbooks, objective)
    assert list(tmp_path.iterdir()) == []


def test_each_burn_rate_can_be_reached_at_every_objective_that_is_taken() -> None:
    """A ratio is 1 at most: an alert that waits for more never fires."""
    factors = {float(found) for found in re.findall(r"\(([0-9.]+) \* \(1 - ", mixin.RULES.read_text())}
    assert max(factors) == 14.4
    assert all(factor * (1 - mixin.LEAST) < 1 for factor in factors)
    assert "vector(0.95)" in mixin.rules(objective=str(mixin.LEAST))
    with pytest.raises(ValueError, match="OBJECTIVE"):
        mixin.rules(objective="0.949999")


def test_the_number_of_clusters_has_those_that_have_no_series() -> None:
    (panel,) = (one for one in mixin.ROWS["Which clusters"] if one.title == "Clusters")
    assert "arcbridge_relay_clusters_without_metrics" in panel.queries[""]


def test_joins_have_the_lines_of_the_highest_and_of_the_lowest_burn_rate() -> None:
    (panel,) = (one for one in mixin.ROWS["Joins"] if one.title == "Joins that fail")
    factors = {float(found) for found in re.findall(r"\(([0-9.]+) \* \(1 - ", mixin.RULES.read_text())}
    lines = {float(query.split(" * ")[0]) for query in panel.queries.values() if "join_objective" in query}
    assert lines == {max(factors), min(factors)}


def test_a_timeline_has_no_row_for_a_cluster_that_was_well() -> None:
    """There may be thousands."""
    timelines = [one for one in mixin.ROWS["Which clusters"] if one.kind == "state-timeline"]
    assert [query for one in timelines for query in one.queries.values() if "[$__range] @ end()) == 0" in query]
    assert len(timelines) == 1


def test_the_table_calls_connections_what_are_connections() -> None:
    """An agent at two relays is in the sum twice."""
    (table,) = (one for one in mixin.ROWS["Which clusters"] if one.kind == "table")
    summed = [name for name, query in table.queries.items() if "cluster_agents{" in query]
    assert summed == ["connections"]
    assert "connections" in table.about
