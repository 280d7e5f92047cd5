"""The rules: each metric that they name exists, runbooks have four parts, and promtool lets each alert fire and end."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcbridge import __version__
from arcbridge.agent.reload import RELOADABLE as AGENT_RELOADABLE
from arcbridge.cli.audit import _line as shown
from arcbridge.cli.parser import parse
from arcbridge.cli.words import role_of
from arcbridge.relay.reload import RELOADABLE as RELAY_RELOADABLE
from tests.support.processes import require_or_skip

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "config/prometheus/rules.yaml"
PARTS = ("What one sees", "Which cause", "What to type", "It worked when")
"""Of each runbook, in this order."""
LIVES: dict[str, tuple[str, ...]] = {
    "ArcbridgeRelayDown": ('up{job="arcbridge-relay"}: 1x5 0x20 1x40',),
    "ArcbridgeRelayNotReady": ("arcbridge_relay_ready: 1x5 0x20 1x40",),
    "ArcbridgeCheckFails": ('arcbridge_relay_check_ok{check="policy"}: 1x5 0x20 1x40',),
    "ArcbridgeRevocationsMissing": ("arcbridge_relay_revocations_missing: 0x5 1x20 0x40",),
    "ArcbridgeRelayWithoutAgents": ("arcbridge_relay_agents: 3x5 0x20 3x40",),
    "ArcbridgeClusterOffline": ('arcbridge_relay_cluster_agents{cluster="c"}: 1x5 0x20 1x40',),
    "ArcbridgeClustersWithoutMetrics": ("arcbridge_relay_clusters_without_metrics: 0x5 7x20 0x40",),
    "ArcbridgeClusterUnready": (
        'arcbridge_relay_cluster_agents{cluster="c"}: 1x65',
        'arcbridge_relay_cluster_agents_ready{cluster="c"}: 1x5 0x20 1x40',
    ),
    "ArcbridgeClusterCheckFails": ('arcbridge_relay_cluster_check_ok{cluster="c", check="audit"}: 1x5 0x20 1x40',),
    # All joins fail for twenty minutes, then none does: the long window still remembers, the short one does not.
    "ArcbridgeClusterJoinsFail": (
        'arcbridge_relay_cluster_joins_total{cluster="c"}: 0+4x240',
        'arcbridge_relay_cluster_joins_failed_total{cluster="c"}: 0x10 4+4x20 84x210',
    ),
    "ArcbridgeJoinsFail": (
        'arcbridge_relay_joins_total{result="ok"}: 0+4x10 40x20 44+4x120',
        'arcbridge_relay_joins_total{result="agent_timeout"}: 0x10 4+4x20 84x120',
    ),
    # One join in sixteen fails: less than the fast alert is for.
    "ArcbridgeJoinsFailOften": (
        'arcbridge_relay_joins_total{result="ok"}: 0+15x480',
        'arcbridge_relay_joins_total{result="overloaded"}: 0x10 1+1x30 31x440',
    ),
    "ArcbridgeJoinsSlow": (
        'arcbridge_relay_join_seconds_bucket{le="2.5"}: 0+1x10 11x30 11+20x40',
        'arcbridge_relay_join_seconds_bucket{le="5.0"}: 0+1x10 11+20x30 631+20x40',
        'arcbridge_relay_join_seconds_bucket{le="+Inf"}: 0+1x10 11+20x30 631+20x40',
    ),
    "ArcbridgeRelayRefusesConnections": (
        'arcbridge_relay_connections_rejected_total{reason="cap_total"}: 0x5 60+60x30 1860x40',
    ),
    "ArcbridgeAgentsPaced": ("arcbridge_relay_agents_paced_total: 0x5 20+20x30 620x40",),
    "ArcbridgeAgentsFlap": ("arcbridge_relay_agents_flapping_total: 0x5 1+1x10 11x60",),
    "ArcbridgeAgentCredentialCopied": ("arcbridge_relay_certificates_renewed_twice_total: 0x5 1x100",),
    "ArcbridgeWorkersDie": ("arcbridge_relay_worker_restarts_total: 0x5 1+1x10 11x60",),
    # The clock of a test begins at 0.
    "ArcbridgeCaRotationUnfinished": ("arcbridge_relay_ca_rotation_step_timestamp_seconds: -1300000x90 0x30",),
    "ArcbridgeRelayCertificateExpires": (
        "arcbridge_relay_certificate_expires_timestamp_seconds: 1000000x90 9000000x30",
    ),
    "ArcbridgeAgentNotReady": ("arcbridge_agent_ready: 1x5 0x20 1x40",),
    "ArcbridgeAgentRelayMissing": (
        "arcbridge_agent_control_connections: 2x5 1x30 2x40",
        "arcbridge_agent_control_connections_wanted: 2x75",
    ),
    "ArcbridgeAgentCertificateExpires": (
        "arcbridge_agent_certificate_remaining_seconds: 9000x90 600000x30",
        "arcbridge_agent_certificate_failures_total: 0+1x90 91x30",
    ),
    "ArcbridgeAgentApiServerUnreachable": ("arcbridge_agent_apiserver_unreachable_total: 0x5 3+3x30 93x40",),
    "ArcbridgeUsersOverLimit": ('arcbridge_agent_limit_refusals_total{limit="streams"}: 0x5 60+60x40 2460x40',),
    "ArcbridgeAuditLost": ("arcbridge_relay_audit_dropped_total: 0x5 5x60",),
    "ArcbridgeAuditFailing": ("arcbridge_agent_audit_failing: 0x5 1x20 0x40",),
    "ArcbridgeAuditSinkLate": ('arcbridge_agent_audit_sink_lag_seconds{sink="s"}: 0x5 1000x20 0x40',),
    "ArcbridgeAuditSinkFailing": ('arcbridge_relay_audit_sink_failing{sink="s"}: 0x5 1x30 0x40',),
    "ArcbridgeAuditUndelivered": ('arcbridge_relay_audit_sink_dropped_total{sink="s"}: 0x5 5x60',),
    "ArcbridgeRecordingsFail": ("arcbridge_agent_recordings_failed_total: 0x5 1x60",),
    "ArcbridgeRecordingsRefused": ('arcbridge_agent_recordings_refused_total{reason="fault"}: 0x5 1x60',),
    "ArcbridgeRecordingsMissing": ("arcbridge_agent_recordings_missing_total: 0x5 1x60",),
    "ArcbridgeRecordingsNotStored": ("arcbridge_agent_recordings_store_failures_total: 0x5 2+2x40 82x40",),
    "ArcbridgeSpansDropped": ('arcbridge_agent_spans_dropped_total{reason="full"}: 0x5 9+9x40 369x40',),
    "ArcbridgeSpansUndelivered": ("arcbridge_agent_span_export_failures_total: 0x5 2+2x40 82x40",),
    "ArcbridgeTokensRefused": ('arcbridge_agent_token_refusals_total{rule="token.aud"}: 0x5 3+3x30 93x40',),
    "ArcbridgeTokenWithoutItsKey": ('arcbridge_agent_proofs_refused_total{reason="peer"}: 0x5 1x100',),
    "ArcbridgeTokensWithoutGroups": (
        "arcbridge_agent_tokens_without_groups_total: 0+1x60 60x60",
        "arcbridge_agent_tokens_verified_total: 0+1x120",
    ),
    "ArcbridgeEventLoopDelay": (
        'arcbridge_agent_event_loop_delay_seconds_bucket{le="0.1"}: 0+10x5 50x30 60+20x40',
        'arcbridge_agent_event_loop_delay_seconds_bucket{le="0.5"}: 0+10x5 60+10x30 360+20x40',
        'arcbridge_agent_event_loop_delay_seconds_bucket{le="+Inf"}: 0+10x5 60+10x30 360+20x40',
    ),
    "ArcbridgeLogsLost": ("arcbridge_relay_log_lines_dropped_total: 0x5 5x60",),
    "ArcbridgeMetricUnreadable": ("arcbridge_relay_metric_read_failures_total: 0x5 1x60",),
}
"""For each alert the series that fire it, a value a minute, and then are well again."""


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def runbooks() -> dict[str, str]:
    """The sections of the page of runbooks, by their anchors."""
    sections = re.split(r"(?m)^## (.+)$", (ROOT / "docs/alerts.md").read_text())[1:]
    return {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-"): text
        for heading, text in zip(sections[::2], sections[1::2], strict=True)
    }


def named_metrics(expression: str) -> set[tuple[str, str]]:
    """(role, name) of each metric, also where the role is written as a set."""
    found: set[tuple[str, str]] = set()
    for roles, name in re.findall(r"arcbridge_\(?([a-z|]+?)\)?_([a-z_]+)", expression):
        found |= {(role, re.sub(r"_(bucket|sum|count)$", "", name)) for role in roles.split("|")}
    return found


def defined_metrics(role: str) -> set[str]:
    """Names that the source of a role, or what all roles share, registers: by a call, or by a row of a table."""
    call, row = (
        r'(?:counter|gauge|histogram)\(\s*"([a-z_]+)"',
        r'^    \(\s*"([a-z_]+)",\s*"|^_FAILURES: Final = "([a-z_]+)"',
    )
    files = [
        *(ROOT / "arcbridge/observe").rglob("*.py"),
        *(ROOT / "arcbridge/checks").rglob("*.py"),
        *(ROOT / "arcbridge/audit").rglob("*.py"),
        *(ROOT / "arcbridge" / role).rglob("*.py"),
    ]
    return {
        found[found.lastindex or 0]
        for file in files
        for pattern in ([call, row] if file.name == "metrics.py" else [call])
        for found in re.finditer(pattern, file.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("alert", alerts(), ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_is_wrong_and_what_to_do(alert: dict[str, Any]) -> None:
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url"}
    assert alert["labels"]["severity"] in ("warning", "critical")
    base, _, anchor = annotations["runbook_url"].partition("docs/alerts.md#")
    assert re.fullmatch(rf"https://git\.example\.org/\S+/v{re.escape(__version__)}/", base), "see `make mixin`"
    section = runbooks()[anchor]
    assert f"`{alert['alert']}`" in section, "the runbook names its alert"


@pytest.mark.parametrize(("anchor", "section"), [one for one in runbooks().items() if "`Arcbridge" in one[1]])
def test_a_runbook_has_four_parts(anchor: str, section: str) -> None:
    found = re.findall(r"(?m)^\*\*([A-Z][a-z ]+)\.\*\*", section)
    assert tuple(found) == PARTS
    typed = section.partition("**What to type.**")[2].partition("**It worked when.**")[0]
    assert re.search(r"(?m)^    \S", typed), "a command"
    named = set(re.findall(r"`(Arcbridge\w+)`", section.partition("**What one sees.**")[0]))
    assert named <= {alert["alert"] for alert in alerts()}, "alerts that are no more"


def commands() -> list[list[str]]:
    """The commands of arcbridge that runbooks have a person type, without what is typed before and behind them."""
    found = []
    for line in re.findall(r"(?m)^    (.+)$", (ROOT / "docs/alerts.md").read_text()):
        _, begin, words = line.partition("arcbridge " if line.startswith("arcbridge ") else " -- arcbridge ")
        if begin:
            found.append(list(takewhile(lambda word: word not in ("|", ";", ">"), shlex.split(words, comments=True))))
    return found


@pytest.mark.parametrize("words", {" ".join(words): words for words in commands()}.values(), ids=" ".join)
def test_arcbridge_knows_each_command_of_a_runbook(words: list[str]) -> None:
    role = role_of(words)
    assert parse(words, role).role == role, "or it raises"


def test_a_runbook_restarts_for_what_a_reload_does_not_take() -> None:
    assert not any(name.partition(".")[0] == "audit" for name in AGENT_RELOADABLE | RELAY_RELOADABLE)
    typed = runbooks()["audit-records-undelivered"]
    assert "systemctl restart" in typed
    assert "systemctl reload" not in typed


def test_runbooks_can_be_followed_in_kubernetes() -> None:
    """Its port is shut and its image has no curl, a dead pod takes no exec, and a token goes into a Secret."""
    page = (ROOT / "docs/alerts.md").read_text()
    assert "POD_IP" not in page
    head = page.partition("\n## ")[0]
    assert "port-forward POD 9464" in head
    assert re.search(r"token create .* > token\)\n.*create secret generic arcbridge-join-token --from-file=token", head)
    assert not [line for _, text in runbooks().items() for line in text.splitlines() if "token create" in line]
    for words in ("logs POD -c relay --previous", "describe pod", "rollout restart"):
        assert words in runbooks()["relay-down"]
    daemonset = (ROOT / "config/kubernetes/base/daemonset.yaml").read_text()
    assert "secretName: arcbridge-join-token" in daemonset


def test_no_runbook_reads_the_label_that_no_alert_has() -> None:
    """Prometheus drops the name of the metric from each alert."""
    assert not [anchor for anchor, text in runbooks().items() if "`__name__`" in text]


def test_the_record_of_a_token_without_its_key_is_found() -> None:
    (pattern,) = re.findall(r"audit show .* grep -E '([^']+)'", runbooks()["token-without-its-key"])
    for verb in ("authenticate", "resume"):
        record = {"ts": "2026-11-29T16:00:00Z", "user": "anna", "verb": verb, "outcome": "refused", "session": "s"}
        assert re.search(pattern, shown(record))
        assert not re.search(pattern, shown({**record, "outcome": "answered"}))


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: str(rule.get("alert", rule.get("record"))))
def test_every_metric_exists(rule: dict[str, Any]) -> None:
    for role, name in named_metrics(rule["expr"]):
        assert name in defined_metrics(role), f"arcbridge_{role}_{name}"
    records = set(re.findall(r"arcbridge:[\w:]+", rule["expr"]))
    assert records <= {one.get("record") for one in rules()}
    assert named_metrics(rule["expr"]) or records or rule["expr"].startswith(("up{", "vector("))


def test_days_are_read_by_a_slow_group_alone() -> None:
    """Of thousands of clusters they are many samples."""
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        joins = [rule["expr"] for rule in group["rules"] if "_joins_" in rule["expr"]]
        long = [expression for expression in joins if re.search(r"\[(6h|1d|3d)\]", expression)]
        assert not long or group["interval"] == "3m"


def test_an_alert_on_joins_stays_while_nobody_joins() -> None:
    """A short window without a join has no ratio; without this each such window would end the alert."""
    burning = [alert for alert in alerts() if "_join_errors:ratio_rate" in alert["expr"]]
    assert [alert["keep_firing_for"] for alert in burning] == ["1h"] * 3


def promtool(directory: Path, *arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        require_or_skip("promtool", "promtool is not on this machine (Debian: package prometheus)")
    command = [program, *arguments]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("arguments", [("check", "rules", "rules.yaml"), ("test", "rules", "rules-test.yaml")])
def test_promtool_agrees(arguments: tuple[str, ...]) -> None:
    promtool(RULES.parent, *arguments)


def test_each_alert_fires_and_ends(tmp_path: Path) -> None:
    """Once within the life of its series, and no more when all are well again."""
    assert set(LIVES) == {alert["alert"] for alert in alerts()}
    lives = [(alert, *series.rpartition(": ")[::2]) for alert, some in LIVES.items() for series in some]
    minutes = max(length(values) for _, _, values in lives)
    series = [{"series": labelled(name, alert), "values": prolonged(values, minutes)} for alert, name, values in lives]
    queries = []
    for alert in LIVES:
        firing = f'ALERTS{{alertname="{alert}", alertstate="firing"}}'
        fired = f"max_over_time((count({firing}) > bool 0)[{minutes}m:1m])"
        queries.append({"expr": fired, "eval_time": f"{minutes}m", "exp_samples": [{"labels": "{}", "value": 1}]})
        queries.append({"expr": firing, "eval_time": f"{minutes}m", "exp_samples": []})
    (tmp_path / "rules.yaml").write_text(RULES.read_text())
    test = {"interval": "1m", "input_series": series, "promql_expr_test": queries}
    (tmp_path / "lives.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [test]}))
    promtool(tmp_path, "test", "rules", "lives.yaml")


def length(values: str) -> int:
    """Minutes from the first to the last value of a series."""
    return sum(1 + int(count) for count in re.findall(r"x(\d+)", values)) - 1


def prolonged(values: str, minutes: int) -> str:
    """The series, which goes on as it ends."""
    begin, _, count = values.rpartition("x")
    return f"{begin}x{int(count) + minutes - length(values)}"


def labelled(name: str, alert: str) -> str:
    """A series as one of an instance, and where it has one of a cluster, that no other alert is about."""
    metric, _, labels = name.replace('cluster="c"', f'cluster="{alert}"').partition("{")
    return f'{metric}{{instance="{alert}"{", " + labels if labels else "}"}'


def test_prometheus_reads_the_scrape_example(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "config/monitoring", tmp_path / "monitoring")
    shutil.copy(RULES, tmp_path / "monitoring/rules.yaml")
    promtool(tmp_path / "monitoring", "check", "config", "prometheus.yml")
    jobs = yaml.safe_load((ROOT / "config/monitoring/prometheus.yml").read_text())["scrape_configs"]
    assert {job["job_name"] for job in jobs} == {f"arcbridge-{role}" for role in ("relay", "agent", "client")}
