"""The check of rotation and sinks: each mistake by its setting; and what a doctor finds at collectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trustme

from arcbridge.audit.chain import Head
from arcbridge.audit.sinks.sender import Sinks
from arcbridge.audit.sinks.settings import LATE, check_sinks, look_at_collectors, sink_findings
from arcbridge.checks.diagnosis import FindingState
from arcbridge.settings.config import AuditConfig, AuditFilesConfig, AuditSinkConfig, RelayAuditConfig, RelayConfig
from arcbridge.settings.config_loader import load
from arcbridge.settings.problems import Problems
from tests.support.collector import Collector

HTTP = AuditSinkConfig(kind="http", address="https://collector.test/in")
SYSLOG = AuditSinkConfig(kind="syslog", address="collector.test")


def found(file: str = "", /, **audit: Any) -> list[tuple[str, str]]:
    problems = Problems()
    check_sinks(RelayAuditConfig(**audit), file or "/nowhere/audit.jsonl", problems)
    return [(one.setting, str(one)) for one in problems]


def of(kind: str, **settings: Any) -> AuditSinkConfig:
    address = {"http": "https://collector.test/in", "syslog": "collector.test:6514", "stdout": ""}[kind]
    return AuditSinkConfig(**{"kind": kind, "address": address, **settings})


def test_what_is_right_has_no_problem(tmp_path: Path) -> None:
    sinks = {"a": HTTP, "b": SYSLOG, "c": of("stdout"), "d": of("http", address="http://[::1]:8080/")}
    file = str(tmp_path / "audit.jsonl")
    assert found(file, sinks=sinks, rotate_bytes=1 << 20) == []
    assert found() == []


@pytest.mark.parametrize(
    ("sink", "words"),
    [
        (AuditSinkConfig(), 'kind: "http", "syslog" or "stdout" is needed'),
        (of("http", address=""), "address: "),
        (of("http", address="http://collector.test/"), "this machine's loopback alone"),
        (of("http", address="https://user:hunter2@collector.test/"), "a secret stands in a file of its own"),
        (of("http", address="ftp://collector.test/"), "a URL https://host"),
        (of("http", address="https://[/"), "address: "),
        (of("http", address="https://collector.test/#x"), "a URL https://host"),
        (of("syslog", address="tls://collector.test"), "address: "),
        (of("syslog", token_scheme="Splunk"), "token_scheme: is not for kind syslog"),
        (of("http", facility=3), "facility: is not for kind http"),
        (of("stdout", address="x"), "address: is not for kind stdout"),
        (of("syslog", facility=24), "facility: must be from 0 to 23"),
        (of("syslog", severity=8), "severity: must be from 0 to 7"),
        (of("syslog", max_message=2047), "max_message: must be from 2048"),
        (of("http", batch_records=0), "batch_records: must be from 1"),
        (of("http", batch_bytes=1 << 30), "batch_bytes: must be"),
        (of("http", interval=0.0), "interval: must be"),
        (of("http", timeout=0.5), "timeout: must be"),
        (of("http", format="xml"), 'format: "lines" or "array"'),
        (of("http", token_scheme="Be arer"), "token_scheme: is one word"),
        (of("http", token_scheme="a\r\nX: y"), "token_scheme: is one word"),
        (of("http", certificate=Path("/x")), "certificate and key go together"),
        (of("http", ca_file=Path("/nowhere")), "/nowhere does not exist"),
        (of("http", token_file=Path("/nowhere")), "it must be there when it is used"),
    ],
)
def test_a_mistake_is_named_by_its_setting(sink: AuditSinkConfig, words: str) -> None:
    problems = found(sinks={"siem": sink})
    assert len(problems) == 1, problems
    assert problems[0][0].startswith("audit.sinks.siem")
    assert words in problems[0][1]
    assert "hunter2" not in problems[0][1]


def test_a_sink_needs_a_file_and_a_directory_that_can_be_written(tmp_path: Path) -> None:
    for file in ("", "-"):
        problems = Problems()
        check_sinks(RelayAuditConfig(sinks={"a": HTTP}), file, problems)
        assert [one.setting for one in problems] == ["audit.sinks"]
        assert 'a sink of kind "stdout"' in str(next(iter(problems)))
    for audit in ({"sinks": {"a": HTTP}}, {"rotate_bytes": 1 << 20}):
        assert [one for one, _ in found("/proc/1/audit.jsonl", **audit)] == [f"audit.{name}" for name in audit]


def test_bounds_and_names() -> None:
    assert [one for one, _ in found(rotate_bytes=1000)] == ["audit.rotate_bytes"]
    assert [one for one, _ in found(rotate_bytes=1 << 20, keep_bytes=1)] == ["audit.keep_bytes"]
    assert found("-", rotate_bytes=1 << 20) == [
        ("audit.rotate_bytes", "audit.rotate_bytes: renames a file: set audit.file to a path")
    ]
    assert "8 at most" in found(sinks={f"s{n}": HTTP for n in range(9)})[0][1]
    assert "a name has 1 to 32" in found(sinks={"a/../b": HTTP})[0][1]


def test_a_token_that_all_may_read_is_warned_of(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("word")
    token.chmod(0o644)
    ((setting, words),) = found(sinks={"a": of("http", token_file=token)})
    assert setting == "audit.sinks.a.token_file"
    assert "every user of this machine may read" in words


def test_a_file_has_them_as_tables(tmp_path: Path) -> None:
    file = tmp_path / "relay.toml"
    file.write_text(
        '[audit]\nrotate_bytes = 70000\nkeep_age = "30d"\n[audit.sinks.siem]\nkind = "syslog"\naddress = "a:1"\n'
        'interval = "2s"\nca_file = "ca.pem"\n'
    )
    audit = load(RelayConfig, file).audit
    assert (audit.rotate_bytes, audit.keep_age) == (70000, 30 * 86400)
    assert audit.sinks["siem"] == AuditSinkConfig(
        kind="syslog", address="a:1", interval=2.0, ca_file=tmp_path / "ca.pem"
    )
    assert AuditConfig().sinks == {}


async def test_a_doctor_says_which_collector_can_be_reached(tmp_path: Path) -> None:
    with Collector("syslog", tmp_path / "collector") as collector:
        where = f"127.0.0.1:{collector.port}"
        other = tmp_path / "other.pem"
        trustme.CA().cert_pem.write_to_path(other)
        settings = {
            "good": of("syslog", address=where, ca_file=collector.ca),
            "web": of("http", address=f"https://{where}/", ca_file=collector.ca),
            "plain": of("http", address=f"http://{where}/"),
            "foreign": of("syslog", address=where, ca_file=other),
            "dead": of("http", address="https://127.0.0.1:1/"),
            "gone": of("http", address=f"https://{where}/", ca_file=tmp_path / "nowhere.pem"),
            "output": of("stdout"),
        }
        findings = await look_at_collectors(settings)
        assert collector.lines == [], "nothing is sent"
    failed = {one.hop: one.detail for one in findings if one.state is FindingState.FAILED}
    assert set(failed) == {"audit sink foreign", "audit sink dead", "audit sink gone"}
    assert "its certificate is not good" in failed["audit sink foreign"]
    assert "127.0.0.1:1" in failed["audit sink dead"]
    assert "nowhere.pem" in failed["audit sink gone"]
    assert [one.detail for one in findings if one.hop == "audit sink output"] == ["it writes to standard output"]


def test_what_a_sink_has_come_to(monkeypatch: pytest.MonkeyPatch) -> None:
    sinks = Sinks(AuditFilesConfig(sinks={"siem": HTTP}), Path("/nowhere"), "relay")
    (sender,) = sinks.senders
    assert [one.state for one in sink_findings(sinks)] == [FindingState.OK]
    sender.failure = "answered 401"
    (one,) = sink_findings(sinks)
    assert (one.state, one.code) == (FindingState.FAILED, "audit_sink")
    assert "answered 401" in one.detail
    sender.failure, sender._oldest = "", "2026-01-01T00:00:00.000Z"
    assert sender.lag > LATE
    assert [one.code for one in sink_findings(sinks)] == ["audit_sink_late"]


def test_a_file_that_cannot_be_renamed_is_said(tmp_path: Path) -> None:
    """It grows above its bound, and records are written all the same."""
    sinks = Sinks(AuditFilesConfig(rotate_bytes=1 << 20), tmp_path / "audit.jsonl")
    sinks.rotation.rename(str(tmp_path / "gone"), 1 << 20, Head("0123456789abcdef", 7, ""))
    (one,) = sink_findings(sinks)
    assert (one.state, one.code) == (FindingState.FAILED, "audit_rotation")
    assert "No such file or directory" in one.detail
    sinks.rotation.rename(str(tmp_path / "gone"), 1, Head("0123456789abcdef", 7, ""))
    assert sink_findings(sinks), "a small file says nothing of it"
    (tmp_path / "audit.jsonl").touch()
    sinks.rotation.rename(str(tmp_path / "audit.jsonl"), 1 << 20, Head("0123456789abcdef", 7, ""))
    assert sink_findings(sinks) == []
