"""The mixin: recording rules and alerts for Prometheus, and the dashboard for Grafana that reads them.

`config/prometheus/rules.yaml` is the source of the rules, the tables below are that of the dashboard. `make mixin`
writes `config/grafana/arcbridge.json`; with `OUT` it writes all of the mixin there, with an operator's own values for
where the runbooks are and for the objective of joins. `tests/release/test_mixin.py` fails where the dashboard is stale,
and `tests/e2e/test_cluster_alerts.py` has a real Prometheus answer each expression.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from release.number import ROOT

RULES: Final = ROOT / "config" / "prometheus" / "rules.yaml"
DASHBOARD: Final = ROOT / "config" / "grafana" / "arcbridge.json"
_RUNBOOKS: Final = re.compile(r"(runbook_url: )https://\S+?/(docs/alerts\.md#)")
_OBJECTIVE: Final = re.compile(r"(record: arcbridge:join_objective:ratio\n +expr: )vector\(([0-9.]+)\)")
LEAST: Final = 0.95
"""The lowest objective: no more than all joins fail, so from 0.9305 down 14.4 times too many could not."""
_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH: Final = 24
"""Columns of Grafana's grid."""


class Panel(NamedTuple):
    """One panel: what it asks, by the legend of each answer, and how it is shown."""

    title: str
    about: str
    queries: Mapping[str, str]
    kind: str = "timeseries"
    unit: str = "short"
    width: int = 8
    height: int = 8
    red_from: float | None = None
    """The value from which on it is red; of what is better when higher, `red_below`."""
    red_below: float | None = None


_CLUSTERS: Final = (
    Panel("Clusters", "Clusters that are enrolled and not revoked.",
          {"": "(count(count by (cluster) (arcbridge_relay_cluster_agents)) or vector(0))\n"
               "+ (max(arcbridge_relay_clusters_without_metrics) or vector(0))"}, "stat", width=4, height=4),
    Panel("Out of reach", "Clusters without an agent at any relay.",
          {"": "count(sum by (cluster) (arcbridge_relay_cluster_agents) == 0) or vector(0)"},
          "stat", width=4, height=4, red_from=1),
    Panel("Cannot serve", "Clusters whose agents are connected, and none of them is ready.",
          {"": "count(sum by (cluster) (arcbridge_relay_cluster_agents) > 0\n"
               "and sum by (cluster) (arcbridge_relay_cluster_agents_ready) == 0) or vector(0)"},
          "stat", width=4, height=4, red_from=1),
    Panel("Failing checks", "Self-checks that fail at an agent of a cluster.",
          {"": "count(min by (cluster, check) (arcbridge_relay_cluster_check_ok) == 0) or vector(0)"},
          "stat", width=4, height=4, red_from=1),
    Panel("Sessions", "Sessions at all relays.", {"": "sum(arcbridge_relay_pumps_open)"}, "stat", width=4, height=4),
    Panel("Alerts", "Alerts of arcbridge that fire.",
          {"": 'count(ALERTS{alertname=~"Arcbridge.+", alertstate="firing"}) or vector(0)'},
          "stat", width=4, height=4, red_from=1),
    Panel("Clusters, bad first", "An agent has connections to two relays, and is ready at both or at none.",
          {"ready": 'sum by (cluster) (arcbridge_relay_cluster_agents_ready{cluster=~"$cluster"})',
           "connections": 'sum by (cluster) (arcbridge_relay_cluster_agents{cluster=~"$cluster"})',
           "failing checks":
               'sum by (cluster) (1 - min by (cluster, check) (arcbridge_relay_cluster_check_ok{cluster=~"$cluster"}))',
           "joins failing in 1 h": 'arcbridge:cluster_join_errors:ratio_rate1h{cluster=~"$cluster"}',
           "certificate, days":
               "(max by (cluster) (arcbridge_relay_cluster_certificate_expires_timestamp_seconds"
               '{cluster=~"$cluster"}) - time()) / 86400'},
          "table", width=12, height=12),
    Panel("Clusters that could not serve", "Those that, within the time that is shown, had no agent that was ready.",
          {"{{cluster}}": 'arcbridge:cluster_agents_ready:sum{cluster=~"$cluster"}\n'
                          'and min_over_time(arcbridge:cluster_agents_ready:sum{cluster=~"$cluster"}[$__range] @ end())'
                          " == 0"},
          "state-timeline", width=12, height=12, red_below=1),
)  # fmt: skip
_JOINS: Final = (
    Panel("Joins that fail",
          "Without users' own mistakes. Above 14.4 a month's errors are used up in two days, below 1 they last.",
          {"{{instance}}, 5 min": 'arcbridge:relay_join_errors:ratio_rate5m{instance=~"$relay"}',
           "{{instance}}, 1 h": 'arcbridge:relay_join_errors:ratio_rate1h{instance=~"$relay"}',
           "burn rate 14.4": "14.4 * (1 - arcbridge:join_objective:ratio)",
           "burn rate 1": "1 * (1 - arcbridge:join_objective:ratio)"}, unit="percentunit"),
    Panel("Errors left of three days", "Of the joins that the objective lets fail, the part that has not failed.",
          {"{{instance}}": '1 - arcbridge:relay_join_errors:ratio_rate3d{instance=~"$relay"}\n'
                           "/ on () group_left () (1 - arcbridge:join_objective:ratio)"},
          unit="percentunit", red_below=0),
    Panel("Clusters whose joins fail most", "The ten worst of an hour.",
          {"{{cluster}}": 'topk(10, arcbridge:cluster_join_errors:ratio_rate1h{cluster=~"$cluster"})'},
          unit="percentunit"),
    Panel("Joins", "By how they ended. forbidden and unauthenticated are users' mistakes, or the policy.",
          {"{{result}}": 'sum by (result) (rate(arcbridge_relay_joins_total{instance=~"$relay"}[$__rate_interval]))'},
          unit="reqps"),
    Panel("Time of a join", "From the client's JOIN to its session.",
          {f"{name}": f"histogram_quantile({part}, sum by (le)"
                      ' (rate(arcbridge_relay_join_seconds_bucket{instance=~"$relay"}[$__rate_interval])))'
           for name, part in (("half", 0.5), ("19 of 20", 0.95), ("99 of 100", 0.99))}, unit="s"),
    Panel("Tokens refused", "Of relays and agents, by rule.",
          {"{{rule}}": 'sum by (rule) (rate({__name__=~"arcbridge_(relay|agent)_token_refusals_total"}'
                       "[$__rate_interval])) > 0"}, unit="reqps"),
)  # fmt: skip
_RELAYS: Final = (
    Panel("Ready", "0: a relay that runs and cannot serve.",
          {"{{instance}}": 'arcbridge_relay_ready{instance=~"$relay"}'}, "state-timeline", red_below=1),
    Panel("Agents connected", "An agent keeps connections to two relays.",
          {"{{instance}}": 'arcbridge_relay_agents{instance=~"$relay"}'}),
    Panel("Sessions", "Sessions whose bytes a relay moves.",
          {"{{instance}}": 'arcbridge_relay_pumps_open{instance=~"$relay"}'}),
    Panel("Bytes", "To the cluster (up) and to users (down).",
          {"{{instance}} {{direction}}":
               'sum by (instance, direction) (rate(arcbridge_relay_pumped_bytes_total{instance=~"$relay"}'
               "[$__rate_interval]))"}, unit="Bps"),
    Panel("Connections turned away", "Before it is known who they are, by reason.",
          {"{{reason}}": 'sum by (reason) (rate(arcbridge_relay_connections_rejected_total{instance=~"$relay"}'
                         "[$__rate_interval])) > 0"}, unit="reqps"),
    Panel("Certificate", "Days until the relay's certificate lapses.",
          {"{{instance}}": '(arcbridge_relay_certificate_expires_timestamp_seconds{instance=~"$relay"} - time())'
                           " / 86400"}, "stat", red_below=14),
)  # fmt: skip
_AGENTS: Final = (
    Panel("Answers", "Requests of users, by class of code.",
          {"{{code}}": "sum by (code) (rate(arcbridge_agent_responses_total[$__rate_interval]))"}, unit="reqps"),
    Panel("Requests under way", "Watches and exec count for as long as they last.",
          {"{{instance}}": "arcbridge_agent_requests_in_flight"}),
    Panel("Users over a limit", "Refusals by limit.",
          {"{{limit}}": "sum by (limit) (rate(arcbridge_agent_limit_refusals_total[$__rate_interval])) > 0"},
          unit="reqps"),
    Panel("API server unreachable", "Connections to the API server that failed.",
          {"{{instance}}": "rate(arcbridge_agent_apiserver_unreachable_total[$__rate_interval])"}, unit="reqps"),
    Panel("Sessions", "Open sessions, and those that wait for a connection.",
          {"{{instance}}": "arcbridge_agent_sessions", "{{instance}}, detached": "arcbridge_agent_sessions_detached"}),
    Panel("Memory of sessions", "Part of the budget at which new sessions are refused.",
          {"{{instance}}": "arcbridge_agent_memory_held_bytes / arcbridge_agent_memory_budget_bytes"},
          unit="percentunit", red_from=1),
)  # fmt: skip
_PROCESSES: Final = (
    Panel("Event loop", "How late the event loop ran: the pause that every session of a process feels, 99 of 100.",
          {"{{instance}}": "histogram_quantile(0.99, sum by (instance, le) (rate("
                           '{__name__=~"arcbridge_(relay|agent)_event_loop_delay_seconds_bucket"}'
                           "[$__rate_interval])))"}, unit="s", red_from=0.1),
    Panel("CPU", "Cores that each process uses.",
          {"{{role}} {{instance}}": "rate(process_cpu_seconds_total[$__rate_interval])\n"
                                    "* on (job, instance) group_left (role) arcbridge_build_info"}),
    Panel("Memory", "Resident memory.",
          {"{{role}} {{instance}}": "process_resident_memory_bytes\n"
                                    "* on (job, instance) group_left (role) arcbridge_build_info"}, unit="bytes"),
    Panel("Audit records that wait", "Age of the oldest record that a collector does not have.",
          {"{{instance}} {{sink}}": '{__name__=~"arcbridge_(relay|agent)_audit_sink_lag_seconds"}'}, unit="s",
          red_from=900),
    Panel("Lost", "Audit records and log lines that were lost. Always 0.",
          {"{{__name__}} {{instance}}":
               '{__name__=~"arcbridge_(relay|agent)_(audit_dropped|log_lines_dropped)_total"}'},
          red_from=1),
    Panel("Versions", "Processes by role and version.",
          {"{{role}} {{version}}": "count by (role, version) (arcbridge_build_info)"}, "stat"),
    Panel("Clients that are scraped", "Pipelines and jump hosts: sessions that are up, and that came back.",
          {"{{instance}} sessions": "arcbridge_client_sessions",
           "{{instance}} resumed ({{cause}})": "rate(arcbridge_client_sessions_resumed_total[$__rate_interval])"}),
)  # fmt: skip
ROWS: Final = {
    "Which clusters": _CLUSTERS,
    "Joins": _JOINS,
    "Relays": _RELAYS,
    "Agents that are scraped": _AGENTS,
    "Processes": _PROCESSES,
}
"""In the order of an operator's questions: which of my clusters is bad, do users get in, is it a relay, is it the
cluster, does a process lack something. One dashboard, because the answer to one leads to the next."""


def dashboard() -> str:
    """Return the dashboard, as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"id": len(panels) + 1, "type": "row", "title": title, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": _WIDTH, "h": 1}})  # fmt: skip
        x, y, height = 0, y + 1, 0
        for panel in row:
            if x + panel.width > _WIDTH:
                x, y, height = 0, y + height, 0
            panels.append(_panel(panel, len(panels) + 1, x, y))
            x, height = x + panel.width, max(height, panel.height)
        y += height
    return json.dumps(
        {
            "uid": "arcbridge",
            "title": "arcbridge",
            "description": "Clusters, joins, relays and agents. The alerts' runbooks are docs/alerts.md.",
            "tags": ["arcbridge"],
            "schemaVersion": 39,
            "editable": True,
            "refresh": "30s",
            "time": {"from": "now-6h", "to": "now"},
            "timezone": "",
            "templating": {"list": [
                {"name": "datasource", "type": "datasource", "label": "Prometheus", "query": "prometheus"},
                _variable("cluster", "Cluster", "label_values(arcbridge_relay_cluster_agents, cluster)"),
                _variable("relay", "Relay", "label_values(arcbridge_relay_ready, instance)"),
            ]},
            "annotations": {"list": [{
                "name": "Alerts that fire", "enable": True, "iconColor": "red", "datasource": _SOURCE,
                "expr": 'ALERTS{alertname=~"Arcbridge.+", alertstate="firing", severity="critical"}',
            }]},
            "panels": panels,
        },
        indent=1,
    ) + "\n"  # fmt: skip


def _panel(panel: Panel, number: int, x: int, y: int) -> dict[str, Any]:
    table, instant = panel.kind == "table", panel.kind in ("table", "stat")
    targets = [
        {"refId": chr(ord("A") + n), "datasource": _SOURCE, "expr": expr, "legendFormat": legend or "__auto",
         "instant": instant, "range": not instant, "format": "table" if table else "time_series"}
        for n, (legend, expr) in enumerate(panel.queries.items())
    ]  # fmt: skip
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.red_from is not None or panel.red_below is not None:
        steps = [{"color": "green", "value": None}, {"color": "red", "value": panel.red_from}]
        if panel.red_below is not None:
            steps = [{"color": "red", "value": None}, {"color": "green", "value": panel.red_below}]
        defaults |= {"thresholds": {"mode": "absolute", "steps": steps}, "color": {"mode": "thresholds"}}
        if panel.kind == "timeseries":
            defaults |= {"color": {"mode": "palette-classic"}, "custom": {"thresholdsStyle": {"mode": "line"}}}
    made: dict[str, Any] = {
        "id": number, "type": panel.kind, "title": panel.title, "description": panel.about, "datasource": _SOURCE,
        "gridPos": {"x": x, "y": y, "w": panel.width, "h": panel.height},
        "targets": targets, "fieldConfig": {"defaults": defaults, "overrides": []}, "options": {},
    }  # fmt: skip
    if table:
        made |= _joined(list(panel.queries))
    return made


def _joined(columns: Sequence[str]) -> dict[str, Any]:
    """Return what makes one table of several answers: a row for each cluster, those without a ready agent first."""
    letters = {f"Value #{chr(ord('A') + n)}": column for n, column in enumerate(columns)}
    times = {f"Time {n}": True for n in range(1, len(columns) + 1)}
    bad: list[dict[str, Any]] = [
        {"matcher": {"id": "byName", "options": column}, "properties": properties}
        for column, properties in {
            "ready": [_thresholds("red", "green", 1), _coloured()],
            "failing checks": [_thresholds("green", "red", 1), _coloured()],
            "joins failing in 1 h": [
                {"id": "unit", "value": "percentunit"}, _thresholds("green", "red", 0.01), _coloured()
            ],
            "certificate, days": [{"id": "decimals", "value": 0}, _thresholds("red", "green", 3), _coloured()],
        }.items()
    ]  # fmt: skip
    return {
        "transformations": [
            {"id": "joinByField", "options": {"byField": "cluster", "mode": "outer"}},
            {"id": "organize", "options": {"excludeByName": {"Time": True, **times}, "renameByName": letters}},
        ],
        "fieldConfig": {"defaults": {"unit": "short"}, "overrides": bad},
        "options": {"sortBy": [{"displayName": "ready", "desc": False}]},
    }


def _thresholds(below: str, above: str, value: float) -> dict[str, Any]:
    steps = [{"color": below, "value": None}, {"color": above, "value": value}]
    return {"id": "thresholds", "value": {"mode": "absolute", "steps": steps}}


def _coloured() -> dict[str, Any]:
    return {"id": "custom.cellOptions", "value": {"type": "color-background"}}


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {"name": name, "type": "query", "label": label, "datasource": _SOURCE, "query": query, "refresh": 2,
            "sort": 1, "multi": True, "includeAll": True, "allValue": ".*",
            "current": {"text": "All", "value": "$__all"}}  # fmt: skip


def rules(runbooks: str = "", objective: str = "") -> str:
    """Return the rules, with an operator's own values. Raises `ValueError` for values that cannot work."""
    text = RULES.read_text(encoding="utf-8")
    if runbooks:
        if re.fullmatch(r"https?://[^\s'\"{}]+", runbooks) is None:
            raise ValueError(
                f"RUNBOOKS={runbooks!r}: where docs/alerts.md is below, as https://docs.example.org/v0.1.0"
            )
        text = _RUNBOOKS.sub(lambda found: f"{found[1]}{runbooks.rstrip('/')}/{found[2]}", text)
    if objective:
        if re.fullmatch(r"0\.[0-9]{1,6}", objective) is None or not LEAST <= float(objective) < 1:
            raise ValueError(f"OBJECTIVE={objective!r}: the part of joins that shall succeed, {LEAST} to 0.999999")
        text = _OBJECTIVE.sub(lambda found: f"{found[1]}vector({objective})", text)
    return text


def prometheus_rule(text: str) -> str:
    """Return rules as the object that the Prometheus Operator reads."""
    head = "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata: {name: arcbridge}\nspec:\n"
    body = text[text.index("\ngroups:") + 1 :]
    return head + "".join(f"  {line}\n" if line else "\n" for line in body.splitlines())


def write(out: Path | None, runbooks: str = "", objective: str = "") -> list[Path]:
    """Write the dashboard of this tree anew, or all of the mixin to `out`; return the paths."""
    if out is None:
        if runbooks or objective:
            raise ValueError("RUNBOOKS and OBJECTIVE are for a copy of the mixin: say where, OUT=DIRECTORY")
        made = {DASHBOARD: dashboard()}
    else:
        text = rules(runbooks, objective)
        made = {
            out / "rules.yaml": text,
            out / "prometheusrule.yaml": prometheus_rule(text),
            out / DASHBOARD.name: dashboard(),
        }
    for path, content in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return list(made)
