"""The Kubernetes manifests, rendered by kubectl's own kustomize."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from arcbridge import __version__

from .rendered import (
    Rendered,
    check_daemonset,
    check_labels,
    check_network_policy,
    check_rules,
    check_secret_is_empty,
    check_settings,
)

ROOT = Path(__file__).resolve().parents[2]
MODES = ("legacy", "constrained")
_BIN = Path(sys.executable).parent


@cache
def rendered(mode: str) -> Rendered:
    command = [_BIN / "kubectl", "kustomize", ROOT / "config/kubernetes/overlays" / f"impersonation-{mode}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "kustomize warns about what it will stop to read"
    return Rendered.parse(done.stdout)


@pytest.mark.parametrize("mode", MODES)
def test_rights_are_exactly_the_list(mode: str) -> None:
    check_rules(rendered(mode), mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_pods(mode: str) -> None:
    check_daemonset(rendered(mode))
    check_network_policy(rendered(mode))
    check_secret_is_empty(rendered(mode))
    check_labels(rendered(mode))


def test_the_pods_fit_the_namespace_and_the_version() -> None:
    objects = rendered("legacy")
    namespace = objects.one("Namespace")["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    namespaced = [
        item for item in objects.objects if item["kind"] not in ("Namespace", "ClusterRole", "ClusterRoleBinding")
    ]
    assert {item["metadata"]["namespace"] for item in namespaced} == {namespace["name"]}
    (container,) = objects.one("DaemonSet")["spec"]["template"]["spec"]["containers"]
    assert container["image"].rpartition(":")[2] == __version__


def test_the_settings_load(tmp_path: Path) -> None:
    check_settings(rendered("legacy"), tmp_path)


def test_the_settings_roll_the_pods() -> None:
    objects = rendered("legacy")
    name = objects.one("ConfigMap")["metadata"]["name"]
    volumes = objects.one("DaemonSet")["spec"]["template"]["spec"]["volumes"]
    assert name.startswith("arcbridge-agent-settings-")
    assert name in [volume.get("configMap", {}).get("name") for volume in volumes]


def test_one_kind_of_impersonation_or_the_other() -> None:
    legacy = {verb for rule in rendered("legacy").rules() for verb in rule["verbs"]}
    constrained = {verb for rule in rendered("constrained").rules() for verb in rule["verbs"]}
    assert "impersonate" in legacy
    assert "impersonate" not in constrained
    assert not any(":" in verb for verb in legacy)


def test_yaml_is_tidy() -> None:
    command = [_BIN / "yamllint", "-c", "config/yamllint.yaml", "--strict", "config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
