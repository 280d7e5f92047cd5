"""What must hold for the objects of agents and relays, whichever way they were rendered: by kustomize or by Helm."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from arcbridge.identity import authentication
from arcbridge.net.address import parse_address
from arcbridge.settings import config
from arcbridge.settings.config_loader import load
from arcbridge.wire.limits import DEFAULT

EIGHT_VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
OWN_EXTRAS = tuple(f"userextras/arcbridge.io/{one}" for one in ("actor", "original-user", "restricted"))

MOST_DRAIN = 30
"""Seconds in which a relay that is told to stop ends in any case (docs/change.md, "Upgrade")."""

Object = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A set of objects, by kind and name."""

    objects: tuple[Object, ...]

    @classmethod
    def parse(cls, text: str) -> Rendered:
        return cls(tuple(document for document in yaml.safe_load_all(text) if document))

    def of(self, kind: str) -> list[Object]:
        return [found for found in self.objects if found["kind"] == kind]

    def one(self, kind: str) -> Object:
        (found,) = self.of(kind)
        return found

    def workload(self) -> Object:
        """The DaemonSet, the Deployment or the StatefulSet: exactly one of them."""
        (found,) = (*self.of("DaemonSet"), *self.of("Deployment"), *self.of("StatefulSet"))
        return found

    def rules(self) -> list[Object]:
        """All rules that reach the agent, with the scope of their role (`namespace` or `cluster`)."""
        account = self.one("ServiceAccount")["metadata"]
        found = []
        for binding in (*self.of("RoleBinding"), *self.of("ClusterRoleBinding")):
            assert binding["subjects"] == [
                {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
            ]
            scope = "namespace" if binding["kind"] == "RoleBinding" else "cluster"
            roles = [role for role in self.of(binding["roleRef"]["kind"])
                     if role["metadata"]["name"] == binding["roleRef"]["name"]]  # fmt: skip
            assert len(roles) == 1, f"{binding['metadata']['name']} binds a role that is not there"
            found += [{"scope": scope, **rule} for rule in roles[0]["rules"]]
        return found


def expected_rules(mode: str, secret: str, users: list[str], groups: list[str], *, leaves: bool) -> list[Object]:
    """Return the rules that the agent may have, and no more (Kubernetes, "User impersonation"; KEP-5284).

    `leaves`: pods leave their workload when they drain.
    """
    core, verb = ("", "impersonate") if mode == "legacy" else ("authentication.k8s.io", "impersonate:user-info")
    rules = [
        {"scope": "namespace", "apiGroups": [""], "resources": ["secrets"], "resourceNames": [secret],
         "verbs": ["get", "update", "watch"]},
        {"scope": "cluster", "apiGroups": ["authorization.k8s.io"], "resources": ["subjectaccessreviews"],
         "verbs": ["create"]},
        {"scope": "cluster", "apiGroups": [core], "resources": ["users"], "resourceNames": users, "verbs": [verb]},
        {"scope": "cluster", "apiGroups": [core], "resources": ["groups"], "resourceNames": groups, "verbs": [verb]},
        {"scope": "cluster", "apiGroups": ["authentication.k8s.io"], "resources": ["uids", *OWN_EXTRAS],
         "verbs": [verb]},
    ]  # fmt: skip
    if leaves:
        rules += [{"scope": "namespace", "apiGroups": [""], "resources": ["pods"], "verbs": ["patch"]}]
    if mode == "constrained":
        rules += [
            {"scope": "cluster", "apiGroups": ["*"], "resources": ["*"],
             "verbs": [f"impersonate-on:user-info:{verb}" for verb in EIGHT_VERBS]},
            {"scope": "cluster", "nonResourceURLs": ["*"], "verbs": ["impersonate-on:user-info:get"]},
        ]  # fmt: skip
    return rules


def check_rules(rendered: Rendered, mode: str, users: list[str], groups: list[str]) -> None:
    """The rights are exactly the list, and a wildcard appears only where the verb itself grants the agent nothing.

    Users and groups are named, none of them a part of Kubernetes (docs/threats.md#H3).
    """
    rules = rendered.rules()
    leaves = "drain_label" in next(iter(rendered.of("ConfigMap")))["data"]["agent.toml"]
    assert len(rendered.of("ValidatingAdmissionPolicyBinding")) == leaves, "the right has what narrows it"
    expected = expected_rules(mode, rendered.one("Secret")["metadata"]["name"], users, groups, leaves=leaves)
    assert not [name for name in (*users, *groups) if name.startswith("system:") or "*" in name]

    def ordered(found: list[Object]) -> list[str]:
        return sorted(json.dumps(rule, sort_keys=True) for rule in found)

    assert ordered(rules) == ordered(expected)
    for rule in rules:
        assert "*" not in rule["verbs"]
        if "*" in (*rule.get("resources", ()), *rule.get("apiGroups", ()), *rule.get("nonResourceURLs", ())):
            assert all(verb.startswith("impersonate-on:") for verb in rule["verbs"])


def check_workload(rendered: Rendered) -> None:
    """Pods use nothing of the node, write no files and never run as root; a rollout leaves no gap and drains them."""
    workload = rendered.workload()
    spec = workload["spec"]
    rollout = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": 0}}
    if workload["kind"] == "Deployment":
        assert spec["strategy"] == rollout
        assert "updateStrategy" not in spec
        assert spec["replicas"] == 2
        (spread,) = spec["template"]["spec"]["affinity"]["podAntiAffinity"].values()
        assert spread[0]["podAffinityTerm"]["labelSelector"] == spec["selector"]
        budget = rendered.one("PodDisruptionBudget")
        assert budget["metadata"]["namespace"] == workload["metadata"]["namespace"]
        assert budget["spec"] == {"maxUnavailable": 1, "selector": spec["selector"]}
    else:
        assert spec["updateStrategy"] == rollout
        assert not {"strategy", "replicas"} & set(spec)
        assert "affinity" not in spec["template"]["spec"]
        assert rendered.of("PodDisruptionBudget") == []
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] > DEFAULT.drain_timeout
    assert spec["template"]["spec"]["automountServiceAccountToken"] is True
    check_pod(rendered)


def check_pod(rendered: Rendered, written: tuple[str, ...] = ("tmp",)) -> None:
    """Pods use nothing of the node, never run as root, and write nowhere but into the volumes `written`."""
    spec = rendered.workload()["spec"]
    pod = spec["template"]["spec"]
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    check_init_container(pod)
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & set(pod)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["runAsGroup"] == 65532
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    for one in (container, *pod["initContainers"]):
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert "memory" in one["resources"]["limits"]
        assert {"cpu", "memory"} <= set(one["resources"]["requests"])
        assert all(mount.get("readOnly") for mount in one["volumeMounts"] if mount["name"] not in written)
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}
    assert not any("hostPath" in volume or "hostPort" in str(container["ports"]) for volume in pod["volumes"])
    (tmp,) = [volume for volume in pod["volumes"] if volume["name"] == "tmp"]
    assert tmp["emptyDir"]["medium"] == "Memory"
    claims = {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", ())}
    mounted = {mount["name"] for one in (container, *pod["initContainers"]) for mount in one["volumeMounts"]}
    assert mounted == claims | {volume["name"] for volume in pod["volumes"]}
    assert pod["serviceAccountName"] == rendered.one("ServiceAccount")["metadata"]["name"]
    assert rendered.one("ServiceAccount")["automountServiceAccountToken"] is False


def check_init_container(pod: Object) -> None:
    """Just before the role, its own check of its settings, with the same files, environment and as few rights."""
    (role,) = pod["containers"]
    check = pod["initContainers"][-1]
    assert check["args"] == ["--role", role["name"], "config", "check", *role["args"][2:]]
    for name in ("image", "imagePullPolicy", "securityContext", "volumeMounts", "resources"):
        assert check[name] == role[name], name


def run_config_check(
    rendered: Rendered,
    directory: Path,
    environment: dict[str, str] | None = None,
    secrets: dict[str, dict[str, bytes]] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the init container's command, with the files of the pod below `directory` in place of /. Secrets and
    ConfigMaps that are not rendered are in `secrets`; every other volume is an empty directory."""
    pod = rendered.workload()["spec"]["template"]["spec"]
    check = pod["initContainers"][-1]
    maps = {one["metadata"]["name"]: one["data"] for one in rendered.of("ConfigMap")} | (secrets or {})
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    moved = {mount["mountPath"]: f"{directory}{mount['mountPath']}" for mount in check["volumeMounts"]}
    for mount in check["volumeMounts"]:
        (place := Path(moved[mount["mountPath"]])).mkdir(parents=True, exist_ok=True)
        volume = volumes.get(mount["name"], {})
        source = volume.get("configMap", {}).get("name") or volume.get("secret", {}).get("secretName")
        for name, data in (maps.get(source, {}) if source else {}).items():
            text = data if isinstance(data, str) else data.decode()
            text = re.sub(rf'(?<=["\s])({"|".join(moved)})(?=[/"\s])', lambda found: moved[found[0]], text)
            (place / name).write_text(text)
            (place / name).chmod(0o600)
    given = {**os.environ, "POD_NAME": "pod-0", **(environment or {})}
    given |= {
        one["name"]: one["value"].replace("$(POD_NAME)", given["POD_NAME"]) for one in check["env"] if "value" in one
    }
    arguments = [word.replace("/etc/arcbridge", moved["/etc/arcbridge"]) for word in check["args"]]
    command = [sys.executable, "-m", "arcbridge", *arguments]
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=60, check=False)


def check_relay(rendered: Rendered, replicas: int = 1) -> None:
    """Each relay has a volume of its own, asks nothing of Kubernetes, and ends after its drain; several are spread."""
    spec = rendered.workload()["spec"]
    pod = spec["template"]["spec"]
    check_pod(rendered, ("tmp", "data"))
    check_labels(rendered)
    assert (spec.get("replicas", 1), spec["podManagementPolicy"]) == (replicas, "Parallel")
    assert pod["automountServiceAccountToken"] is False
    assert pod["terminationGracePeriodSeconds"] > MOST_DRAIN
    assert pod["securityContext"]["fsGroup"] == 65532
    budgets = rendered.of("PodDisruptionBudget")
    assert [one["spec"] for one in budgets] == [{"maxUnavailable": 1, "selector": spec["selector"]}] * (replicas > 1)
    assert ("affinity" in pod) == (replicas > 1)
    (container,) = pod["containers"]
    assert pod["initContainers"][-1]["env"] == container["env"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["relay"] > 1023
    public, peers = sorted(rendered.of("Service"), key=lambda one: "clusterIP" in one["spec"])
    assert peers["spec"]["clusterIP"] == "None"
    assert peers["spec"]["publishNotReadyAddresses"] is True
    assert peers["metadata"]["name"] == spec["serviceName"]
    assert [port["port"] for port in peers["spec"]["ports"]] == [ports["relay"]]
    for service in (public, peers):
        assert service["spec"]["selector"] == spec["selector"]["matchLabels"]
        assert [port["targetPort"] for port in service["spec"]["ports"]] == ["relay"]
    settings = relay_settings(rendered)
    assert (settings["listen"], settings["observe"]["listen"]) == (f":{ports['relay']}", f":{ports['observe']}")
    assert settings["data_dir"] == "/var/lib/arcbridge/data"
    assert settings["audit"]["rotate_bytes"] > 0, "no other program renames a pod's file"
    for policy in rendered.of("NetworkPolicy"):
        assert policy["spec"]["podSelector"] == spec["selector"]
        everyone, monitoring = policy["spec"]["ingress"]
        assert everyone == {"ports": [{"protocol": "TCP", "port": "relay"}]}
        assert monitoring["ports"] == [{"protocol": "TCP", "port": "observe"}]
        assert monitoring["from"]


def relay_settings(rendered: Rendered) -> Object:
    """The settings of the relays, which are those that are checked before an upgrade."""
    (text,) = {one["data"]["relay.toml"] for one in rendered.of("ConfigMap") if "relay.toml" in one["data"]}
    return tomllib.loads(text)


def check_labels(rendered: Rendered) -> None:
    wanted = {f"app.kubernetes.io/{name}" for name in ("name", "instance", "component", "part-of", "managed-by")}
    for item in rendered.objects:
        assert wanted <= set(item["metadata"].get("labels", {})), item["kind"]


def check_secret_is_empty(rendered: Rendered) -> None:
    """Without `data`, applying it again does not touch what the agent wrote; and no token is in a manifest."""
    assert not {"data", "stringData"} & set(rendered.one("Secret"))


def egress_ports(rendered: Rendered) -> set[int]:
    """The TCP ports to which the network policy lets pods connect."""
    (rule,) = rendered.one("NetworkPolicy")["spec"]["egress"]
    return {port["port"] for port in rule["ports"] if port["protocol"] == "TCP"}


def check_network_policy(rendered: Rendered) -> None:
    policy = rendered.one("NetworkPolicy")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert [rule["ports"] for rule in policy["ingress"]] == [[{"protocol": "TCP", "port": "observe"}]]
    selected = {key: [value] for key, value in policy["podSelector"]["matchLabels"].items()}
    selected |= {one["key"]: one["values"] for one in policy["podSelector"].get("matchExpressions", ())}
    settings = tomllib.loads(next(iter(rendered.of("ConfigMap")))["data"]["agent.toml"])
    labels = {key: [value] for key, value in rendered.workload()["spec"]["selector"]["matchLabels"].items()}
    if label := settings["kubernetes"].get("drain_label"):
        # A pod that drains is out of its workload, and not of the network policy.
        key, _, value = label.partition("=")
        labels[key].append(value)
        check_leaving(rendered, key, value)
    assert selected == labels


def check_leaving(rendered: Rendered, key: str, value: str) -> None:
    """The policy is about this account, this namespace and this label, and pods know their names."""
    account = rendered.one("ServiceAccount")["metadata"]
    policy, binding = (rendered.one(f"ValidatingAdmissionPolicy{suffix}") for suffix in ("", "Binding"))
    assert binding["spec"] == {"policyName": policy["metadata"]["name"], "validationActions": ["Deny"]}
    spec = policy["spec"]
    assert spec["failurePolicy"] == "Fail"
    (resources,) = spec["matchConstraints"]["resourceRules"]
    assert (resources["resources"], resources["operations"]) == (["pods"], ["UPDATE"])
    (condition,) = spec["matchConditions"]
    if selector := spec["matchConstraints"].get("namespaceSelector"):
        assert selector == {"matchLabels": {"kubernetes.io/metadata.name": account["namespace"]}}
        who = f"'system:serviceaccount:{account['namespace']}:{account['name']}'"
    else:
        who = f"'system:serviceaccount:' + request.namespace + ':{account['name']}'"
    assert condition["expression"] == f"request.userInfo.username == {who}"
    assert any(f"object.metadata.labels['{key}'] == '{value}'" in one["expression"] for one in spec["validations"])
    pod = rendered.workload()["spec"]["template"]["spec"]
    for container in (*pod["containers"], *pod["initContainers"]):
        assert {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}} in container["env"]


def check_settings(rendered: Rendered, directory: Path) -> config.AgentConfig:
    """The files of the ConfigMap are what the agent reads: load them with its own loaders, and look at the paths."""
    pod = rendered.workload()["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    data = rendered.one("ConfigMap")["data"]
    for name, text in data.items():
        (directory / name).write_text(text)
    settings = load(config.AgentConfig, directory / "agent.toml")
    assert container["args"] == ["--role", "agent", "--config", "/etc/arcbridge/agent.toml"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["config"] == "/etc/arcbridge"
    assert str(settings.join_token_file).startswith(f"{mounts['join-token']}/")
    assert settings.authentication is not None
    authentication.load(settings.authentication)
    secret = rendered.one("Secret")["metadata"]
    assert settings.state.secret in (secret["name"], f"{secret['namespace']}/{secret['name']}")
    (port,) = container["ports"]
    assert settings.observe.listen == f":{port['containerPort']}"
    named = [name for rule in rendered.rules() if rule.get("resources") == ["groups"] for name in rule["resourceNames"]]
    assert list(settings.kubernetes.impersonate_groups) == named, "requests carry the groups that the role has"
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", settings.relay_ca_pin)
    assert math.ceil(settings.session.drain) == pod["terminationGracePeriodSeconds"] - 15
    reached = {parse_address(relay).port for relay in settings.relays}
    reached |= {urlsplit(issuer.url).port or 443 for issuer in authentication.load(settings.authentication).issuers}
    reached |= {parse_address(target.address).port for target in settings.targets.values()}
    assert not rendered.of("NetworkPolicy") or reached <= egress_ports(rendered)
    return settings
