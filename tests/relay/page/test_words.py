"""What the page says of clusters: a sentence for each code that an agent of this version reports."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import arcbridge
from arcbridge.relay.page.words import DEGRADED, DOWN, FAULTS, NEVER, SERVING, fault_of, judge

ROW = {"name": "berlin", "revoked": False, "revoked_at": 0.0, "agents": 1, "ready": 1, "failing": "", "last_seen": 5.0,
       "state": "Connected"}  # fmt: skip
WARNINGS = {"impersonation_unknown", "impersonation_groups", "impersonation_users", "impersonation_restricted",
            "impersonation_actor", "review", "relays", "audit_sink_late", "config", "credential_renewal"}  # fmt: skip
"""Codes of findings that are warnings in every case, or of settings, which no report has."""
SOURCES = ("agent/self_checks.py", "checks/diagnosis.py", "identity/graph_token.py", "audit/sinks/settings.py")


def codes() -> set[str]:
    """The codes of `_REMEDIES` of the agent, and the last arguments of `failed(…)`, in the sources of its checks."""
    found: set[str] = set()
    package = Path(arcbridge.__file__).parent
    for source in SOURCES:
        for node in ast.walk(ast.parse((package / source).read_text(encoding="utf-8"))):
            values: list[ast.expr | None] = []
            if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Dict):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                values = list(node.value.keys) if ast.unparse(target) == "_REMEDIES" else []
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("failed", "Failure"):
                values = [node.args[-1 if ast.unparse(node.func) == "failed" else 0]]
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("code", "(code, remedy)"):
                values = [one for one in ast.walk(node.value) if isinstance(one, ast.expr)]
            found |= {one.value for one in values if isinstance(one, ast.Constant) and isinstance(one.value, str)}
    return {one for one in found if one and " " not in one}


def test_each_code_has_a_sentence() -> None:
    assert codes() - WARNINGS - FAULTS.keys() == set()
    assert FAULTS.keys() - codes() <= {"graph_unreachable", "graph_permission"}
    for what, remedy in FAULTS.values():
        assert not what.endswith(".")
        assert remedy


@pytest.mark.parametrize(
    ("change", "state", "words"),
    [
        ({}, SERVING, ""),
        ({"failing": "api_server:api_ca"}, DEGRADED, "does not trust its API server"),
        ({"failing": "control"}, DEGRADED, "too few connections"),
        ({"failing": "issuers:issuers_slow"}, DEGRADED, "`issuers` has no answer"),
        ({"failing": "novel:unheard_of"}, DEGRADED, "`novel` fails (unheard_of)"),
        ({"failing": "a b c d e f"}, DEGRADED, "`a` fails"),
        ({"agents": 3}, DEGRADED, "2 of its agents are not ready"),
        ({"agents": 0, "ready": 0, "state": "Offline"}, DOWN, "no agent of it is connected"),
        ({"agents": 0, "ready": 0, "state": "Expired"}, DOWN, "its certificate has lapsed"),
        ({"agents": 0, "ready": 0, "state": "Connecting", "last_seen": 0.0}, NEVER, "has ever connected"),
        ({"agents": None, "ready": None, "state": "Offline"}, DOWN, "no agent"),
        ({"state": "Revoked", "revoked_at": 9.0}, DOWN, "an operator has revoked it"),
    ],
)
def test_how_a_cluster_is(change: dict[str, Any], state: str, words: str) -> None:
    judged = judge(ROW | change)
    assert judged.state == state
    assert words in "".join(fault.what for fault in judged.faults)
    assert len(judged.faults) <= 3
    assert judged.since == (0.0 if state != DOWN else change.get("revoked_at", 5.0))


def test_faults_of_two_agents_are_one() -> None:
    assert len(judge(ROW | {"failing": "audit:audit audit:audit"}).faults) == 1
    assert fault_of("api_server:api_ca") == FAULTS["api_ca"]
