"""The Kubernetes study: what it takes from a kubeconfig, what it makes of answers, and what it does not believe."""

from __future__ import annotations

import base64
import json
import stat
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.load.generator import LoadFailed
from bench.studies import kubernetes
from bench.studies.kubernetes import EXECS, Way, _Bench, _Setting, _way_of_kubeconfig
from tests.support.cluster import Kubectl

VALUES = {
    *("get_p50_us", "get_p90_us", "get_p99_us", "get_p50_overhead_ms", "get_per_s", "get_8_per_s", "get_ratio"),
    *(
        "get_8_ratio",
        "list_mb_per_s",
        "list_gzip_mb_per_s",
        "list_protobuf_mb_per_s",
        "list_ratio",
        "first_byte_p50_us",
    ),
    *("watch_event_p50_ms", "watch_event_p99_ms", "client_cpu_us_per_request", "relay_cpu_us_per_request"),
    *("agent_cpu_us_per_request", "apiserver_cpu_us_per_request", "agent_watch_rss_mb"),
    *("direct_get_p50_us", "direct_get_per_s", "direct_list_mb_per_s", "direct_watch_event_p99_ms"),
    *("direct_apiserver_cpu_us_per_request", "agent_list_cpu_s_per_gb"),
    *("exec_p50_ms", "direct_exec_p50_ms", "agent_cpu_ms_per_exec", "apiserver_cpu_ms_per_exec"),
}


def test_a_way_is_what_the_kubeconfig_says(tmp_path: Path) -> None:
    def data(text: str) -> str:
        return base64.b64encode(text.encode()).decode()

    file = tmp_path / "config"
    cluster = {"server": "https://127.0.0.1:1", "certificate-authority-data": data("ca")}
    user = {"client-certificate-data": data("certificate"), "client-key-data": data("key")}
    file.write_text(json.dumps({"clusters": [{"cluster": cluster}], "users": [{"user": user}]}))
    directory = kubernetes._private(tmp_path / "through")
    way = _way_of_kubeconfig(file, directory)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert way.server == "https://127.0.0.1:1"
    assert [path.read_text() for path in (way.certificate, way.key, way.roots)] == ["certificate", "key", "ca"]


class _World:
    """The agent's audit log."""

    def __init__(self) -> None:
        self.records: list[dict[str, object]] = []

    def audit_records(self) -> list[dict[str, object]]:
        return self.records


class _Tools:
    """What vegeta and the receiver would say: through takes twice as long as direct."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.report: dict[str, Any] = {}
        self.listed: dict[str, Any] = {
            "consistent": True,
            "sha256": "1",
            "bytes": 8e6,
            "wire_bytes": 6e6,
            "requests": 4,
        }

    def __call__(self, command: list[Any], seconds: float, text: str = "") -> str:
        words = [str(word) for word in command]
        self.calls.append(words)
        slow = 1 if any("direct" in word for word in words) else 2
        if words[1] == "attack":
            Path(next(word for word in words if word.startswith("-output=")).partition("=")[2]).touch()
            latencies = {f"{p}th": slow * 1e6 for p in (50, 90, 99)}
            self.report = {"requests": 100, "status_codes": {"200": 100}, "errors": [], "latencies": latencies}
            self.report["throughput"] = 1000 / slow
            return ""
        if words[1] == "report":
            return json.dumps(self.report)
        encoding = {"sha256": self.listed["sha256"] + ("p" if "-protobuf" in words else "")}
        rest = {"seconds": slow, "first_byte_s": 1, "compressed": "-gzip" in words, "bytes_per_list": 2_000_000}
        return json.dumps(self.listed | encoding | rest)


def _execute(kubectl: Kubectl, *args: str) -> subprocess.CompletedProcess[str]:
    """What `kubectl exec … -- echo TEXT` would say."""
    assert json.loads(kubectl.kubeconfig.read_text())["clusters"][0]["cluster"]["server"].startswith("https://")
    return subprocess.CompletedProcess(args, 0, f"{args[-1]}\n", "")


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> _Tools:
    tools = _Tools()
    monkeypatch.setattr(kubernetes, "_run", tools)
    return tools


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Bench:
    through, direct = (
        Way(name, f"https://{name}", tmp_path / name, tmp_path, tmp_path) for name in ("through", "direct")
    )
    roles = dict.fromkeys(("client", "relay", "agent", "apiserver", "etcd"), 0)
    cluster = SimpleNamespace(binaries=SimpleNamespace(kubectl=tmp_path / "kubectl"))
    setting = _Setting(cluster, _World(), through, direct, roles)  # type: ignore[arg-type]
    made = _Bench(setting, tmp_path, tmp_path)
    watched = {"watch_event_p50_ms": 1.0, "watch_event_p99_ms": 2.0, "agent_watch_rss_mb": 3.0}
    monkeypatch.setattr(made, "watch", lambda way: watched)
    monkeypatch.setattr(kubernetes.Kubectl, "run", _execute)
    return made


def test_a_round_has_what_the_goals_ask_for(bench: _Bench, tools: _Tools) -> None:
    run = bench.round(0, 1)
    assert run.keys() >= VALUES
    assert not any(name.startswith(("direct_agent", "direct_client", "direct_relay")) for name in run)
    assert run["get_p50_us"] == 2000
    assert run["get_p50_overhead_ms"] == 1
    assert (run["get_ratio"], run["get_8_ratio"], run["list_ratio"]) == (0.5, 0.5, 0.5)
    assert run["direct_list_mb_per_s"] == 8


def test_the_ways_take_turns(bench: _Bench, tools: _Tools) -> None:
    def first() -> bool:
        words = next(words for words in tools.calls if words[1] == "attack")
        return any("direct" in word for word in words)

    bench.round(0, 1)
    before = first()
    tools.calls.clear()
    bench.round(1, 1)
    assert before != first()


@pytest.mark.parametrize("wrong", [{"consistent": False}, {"sha256": "other"}])
def test_a_list_that_differs_is_no_result(bench: _Bench, tools: _Tools, wrong: dict[str, Any]) -> None:
    way = bench._setting.ways[0]
    bench.lists(way, seconds=1)
    tools.listed |= wrong
    with pytest.raises(LoadFailed, match="bytes"):
        bench.lists(way, seconds=1)


def test_requests_that_are_not_in_the_audit_log_are_no_result(bench: _Bench, tools: _Tools) -> None:
    bench.get(bench._setting.ways[1], workers=1, seconds=1)
    world: Any = bench._setting.world
    world.records = [{"verb": "get", "resource": "namespaces", "status": 200}] * 99
    with pytest.raises(LoadFailed, match="99 records of 100 requests"):
        bench.compare_audit()
    world.records *= 2
    assert bench.compare_audit()
    bench.exec(bench._setting.ways[1])
    world.records += [{"subresource": "exec", "outcome": "upgraded"}] * (EXECS - 1)
    with pytest.raises(LoadFailed, match=f"{EXECS - 1} records of {EXECS} commands"):
        bench.compare_audit()
    world.records += world.records[-1:]
    assert bench.compare_audit()


def test_a_command_that_says_something_else_is_no_result(bench: _Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kubectl, "run", lambda *args: subprocess.CompletedProcess(args, 0, "another's answer\n", ""))
    with pytest.raises(LoadFailed, match="exec direct: it said"):
        bench.exec(bench._setting.ways[0])
