"""The Kubernetes manifests, rendered by kubectl's own kustomize."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import yaml

from arcbridge import __version__
from arcbridge.agent.kube.apiserver import SERVICE_ACCOUNT
from arcbridge.settings.flags import AGENT, flags_of

from .rendered import (
    Rendered,
    check_labels,
    check_network_policy,
    check_relay,
    check_rules,
    check_secret_is_empty,
    check_settings,
    check_workload,
    run_config_check,
)

ROOT = Path(__file__).resolve().parents[2]
MODES = ("legacy", "constrained")
OVERLAYS = ("impersonation-legacy", "impersonation-constrained", "dedicated-nodes")
_BIN = Path(sys.executable).parent


def rendered(mode: str) -> Rendered:
    return overlay(f"impersonation-{mode}")


@cache
def overlay(name: str) -> Rendered:
    return built(ROOT / "config/kubernetes/overlays" / name)


def built(directory: Path) -> Rendered:
    command = [_BIN / "kubectl", "kustomize", directory]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "kustomize warns about what it will stop to read"
    return Rendered.parse(done.stdout)


@pytest.mark.parametrize("mode", MODES)
def test_rights_are_exactly_the_list(mode: str) -> None:
    check_rules(rendered(mode), mode, ["oidc:anna@example.org"], ["oidc:developers"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_pods(name: str) -> None:
    check_workload(overlay(name))
    check_network_policy(overlay(name))
    check_secret_is_empty(overlay(name))
    check_labels(overlay(name))


def test_v22_pods_run_on_nodes_that_are_named(tmp_path: Path) -> None:
    label = {"arcbridge.node-restriction.kubernetes.io/agent": "true"}
    for name in OVERLAYS:
        pod = overlay(name).workload()["spec"]["template"]["spec"]
        assert pod["nodeSelector"] == {"kubernetes.io/os": "linux", **label}
    place = os.path.relpath(ROOT / "config/kubernetes", tmp_path.resolve())
    accepted = {
        "resources": [f"{place}/overlays/impersonation-legacy"],
        "components": [f"{place}/components/every-node"],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(accepted))
    pod = built(tmp_path).workload()["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux"}


def test_a_pod_certificate_in_place_of_the_token(tmp_path: Path) -> None:
    """The component and the chart's values give pods the same files at the same place."""
    place = os.path.relpath(ROOT / "config/kubernetes", tmp_path.resolve())
    variant = {
        "resources": [f"{place}/overlays/impersonation-constrained"],
        "components": [f"{place}/components/deployment", f"{place}/components/pod-certificate"],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(variant))
    pod = built(tmp_path).workload()["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    (volume,) = [one["projected"] for one in pod["volumes"] if one["name"] == "api-server"]
    assert [next(iter(source)) for source in volume["sources"]] == ["podCertificate", "configMap", "downwardAPI"]
    bundle = SERVICE_ACCOUNT / volume["sources"][0]["podCertificate"]["credentialBundlePath"]
    (flag,) = [flag for flag in flags_of(AGENT) if flag.key == "kubernetes.credential_bundle_file"]
    for container in (*pod["containers"], *pod["initContainers"]):
        assert {"name": flag.variable, "value": str(bundle)} in container["env"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["api-server"] == str(SERVICE_ACCOUNT)


def test_another_namespace_keeps_what_narrows_the_right_to_patch_pods(tmp_path: Path) -> None:
    place = os.path.relpath(ROOT / "config/kubernetes/overlays/impersonation-legacy", tmp_path.resolve())
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"namespace": "other", "resources": [place]}))
    objects = built(tmp_path)
    (role,) = [one for one in objects.of("Role") if any("pods" in rule["resources"] for rule in one["rules"])]
    assert role["metadata"]["namespace"] == objects.one("ServiceAccount")["metadata"]["namespace"] == "other"
    check_rules(objects, "legacy", ["oidc:anna@example.org"], ["oidc:developers"])
    check_network_policy(objects)
    check_settings(objects, tmp_path)
    policy = yaml.safe_dump(objects.one("ValidatingAdmissionPolicy")["spec"])
    assert "namespaceSelector" not in policy
    assert "arcbridge:" not in policy


def test_nodes_of_their_own() -> None:
    """The overlay and the chart's example ask for the same nodes, and differ from the DaemonSet in nothing else."""
    objects = overlay("dedicated-nodes")
    pod = objects.workload()["spec"]["template"]["spec"]
    example = yaml.safe_load((ROOT / "config/helm/arcbridge-agent/examples/dedicated-nodes.yaml").read_text())
    assert objects.workload()["kind"] == example["workload"]["kind"] == "Deployment"
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux", **example["nodeSelector"]}
    assert pod["tolerations"] == example["tolerations"]
    (label,) = example["nodeSelector"]
    assert label.partition("/")[0].endswith(".node-restriction.kubernetes.io")
    check_rules(objects, "constrained", ["oidc:anna@example.org"], ["oidc:developers"])
    plain = rendered("constrained").workload()["spec"]["template"]["spec"]
    assert {**pod, "nodeSelector": 0, "tolerations": 0, "affinity": 0} == {
        **plain,
        "nodeSelector": 0,
        "tolerations": 0,
        "affinity": 0,
    }


def test_the_pods_fit_the_namespace_and_the_version() -> None:
    objects = rendered("legacy")
    namespace = objects.one("Namespace")["metadata"]
    assert namespace["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    namespaced = [
        item
        for item in objects.objects
        if not item["kind"].startswith(("Namespace", "ClusterRole", "ValidatingAdmissionPolicy"))
    ]
    assert {item["metadata"]["namespace"] for item in namespaced} == {namespace["name"]}
    (container,) = objects.one("DaemonSet")["spec"]["template"]["spec"]["containers"]
    assert container["image"].rpartition(":")[2] == __version__


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_settings_load(name: str, tmp_path: Path) -> None:
    assert not check_settings(overlay(name), tmp_path).token_mode


def test_the_settings_roll_the_pods() -> None:
    objects = rendered("legacy")
    name = objects.one("ConfigMap")["metadata"]["name"]
    volumes = objects.one("DaemonSet")["spec"]["template"]["spec"]["volumes"]
    assert name.startswith("arcbridge-agent-settings-")
    assert name in [volume.get("configMap", {}).get("name") for volume in volumes]


def test_the_relay(tmp_path: Path) -> None:
    """tests/config/test_relay_chart.py compares it with what the chart makes of its defaults."""
    objects = built(ROOT / "config/kubernetes/relay")
    check_relay(objects)
    check_labels(objects)
    refused = run_config_check(objects, tmp_path)
    assert "public_address" in refused.stderr
    assert refused.returncode == 2, "names of the files as they are shipped stop a start"
    edited = Rendered.parse(yaml.safe_dump_all(objects.objects).replace("example.org", "example.test"))
    done = run_config_check(edited, tmp_path)
    assert done.returncode == 0, done.stderr
    names = {one["metadata"]["name"] for one in objects.of("ConfigMap")}
    assert "arcbridge-relay-policy" in names, "a changed policy replaces no pod"
    (settings,) = names - {"arcbridge-relay-policy"}
    assert settings.startswith("arcbridge-relay-settings-"), "changed settings do"
    (container,) = objects.workload()["spec"]["template"]["spec"]["containers"]
    assert container["image"].rpartition(":")[2] == __version__


def test_yaml_is_tidy() -> None:
    command = [_BIN / "yamllint", "-c", "config/yamllint.yaml", "--strict", "config"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
