"""The Helm chart: linted, rendered, and installed by a real Helm against a real API server."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcbridge import __version__
from arcbridge.agent.kube.apiserver import SERVICE_ACCOUNT, endpoint_of
from arcbridge.errors import ConfigError
from tests.support.cluster import Cluster, Unavailable
from tests.support.cluster import helm as helm_binary
from tests.support.processes import require_or_skip
from tests.support.reports import until

from .helm import AGENT, NAMESPACE, RELAY, ROOT, Helm
from .rendered import (
    Rendered,
    check_labels,
    check_network_policy,
    check_pod,
    check_rules,
    check_secret_is_empty,
    check_settings,
    check_workload,
    egress_ports,
    run_config_check,
)
from .test_manifests import built

CHART = AGENT
VALUES = CHART / "ci/values.yaml"
MODES = ("legacy", "constrained")
KINDS = ("DaemonSet", "Deployment")
USERS, GROUPS = ["oidc:anna@example.org", "oidc:editor@example.org"], ["oidc:team"]  # of ci/values.yaml
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:arcbridge-agent"

# Some tests ask kubectl dozens of times, and the first one starts the API server: 24 s of a machine with other work.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def binary() -> Path:
    try:
        return helm_binary()
    except Unavailable as error:
        require_or_skip("helm", str(error))


@pytest.fixture
def helm(binary: Path, tmp_path: Path) -> Helm:
    return Helm(binary, tmp_path)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        # With NodeRestriction, as every installer of Kubernetes has it: it decides which labels a node may give itself.
        cluster = Cluster(pod_certificates=True)
    except Unavailable as error:
        require_or_skip("apiserver", str(error))
    with cluster:
        yield cluster


@pytest.fixture
def installer(binary: Path, tmp_path: Path, cluster: Cluster) -> Helm:
    return Helm(binary, tmp_path, cluster.kubeconfig)


def test_lint(helm: Helm) -> None:
    examples = [("-f", str(path)) for path in sorted((CHART / "examples").iterdir())]
    for mode in ("auto", *MODES):
        for variant in ((), ("--set", "workload.kind=Deployment"), *examples):
            command = ("lint", str(CHART), "--strict", "-f", str(VALUES), *variant)
            assert "0 chart(s) failed" in helm.run(*command, "--set", f"impersonation.mode={mode}").stdout


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_chart_has_the_manifests_objects(helm: Helm, mode: str, kind: str, tmp_path: Path) -> None:
    rendered = helm.template("--set", f"impersonation.mode={mode},workload.kind={kind}")
    assert rendered.workload()["kind"] == kind
    check_rules(rendered, mode, USERS, GROUPS)
    check_workload(rendered)
    check_network_policy(rendered)
    check_secret_is_empty(rendered)
    check_labels(rendered)
    settings = check_settings(rendered, tmp_path)
    assert settings.targets["database"].groups == ("oidc:database-operators",)
    assert not settings.token_mode


@pytest.mark.parametrize(
    ("version", "mode"),
    [("1.25.0", "legacy"), ("1.35.9", "legacy"), ("1.36.0", "constrained"), ("1.36.3-gke.100", "constrained"),
     ("1.37.0", "constrained")],
)  # fmt: skip
def test_constrained_impersonation_is_the_choice_where_it_is_there(helm: Helm, version: str, mode: str) -> None:
    check_rules(helm.template("--kube-version", version), mode, USERS, GROUPS)


@pytest.mark.parametrize(
    ("settings", "leaves"),
    [
        (("--kube-version", "1.30.0"), True),
        (("--kube-version", "1.29.9"), False),
        (("--set", "workload.kind=Deployment"), False),
        (("--set", "workload.leaveWhileDraining=false"), False),
    ],
)
def test_where_a_pod_that_drains_leaves(helm: Helm, settings: tuple[str, ...], leaves: bool) -> None:
    """Only with the policy that narrows the right, and only of a DaemonSet: a Deployment waits for no old pod."""
    rendered = helm.template(*settings)
    assert bool(rendered.of("ValidatingAdmissionPolicy")) == leaves
    assert (["pods"] in [rule.get("resources") for rule in rendered.rules()]) == leaves
    assert ("drain_label" in rendered.one("ConfigMap")["data"]["agent.toml"]) == leaves
    check_network_policy(rendered)


@pytest.mark.parametrize(("name", "leaves"), [("", False), ("default", False), ("agents", True)])
def test_updates_of_pods_by_others_are_not_refused(helm: Helm, name: str, leaves: bool) -> None:
    """The policy is about the agent's account, and `default` is that of other pods besides."""
    rendered = helm.template("--set", f"serviceAccount.create=false,serviceAccount.name={name}")
    pods = [role for role in rendered.of("Role") if any(rule["resources"] == ["pods"] for rule in role["rules"])]
    found = (pods, rendered.of("ValidatingAdmissionPolicy"), rendered.of("ValidatingAdmissionPolicyBinding"))
    assert [bool(one) for one in found] == [leaves] * 3
    assert ("drain_label" in rendered.one("ConfigMap")["data"]["agent.toml"]) == leaves


def test_nodes_of_their_own(helm: Helm, tmp_path: Path) -> None:
    rendered = helm.template("-f", str(CHART / "examples/dedicated-nodes.yaml"))
    check_workload(rendered)
    check_settings(rendered, tmp_path)
    pod = rendered.workload()["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "kubernetes.io/os": "linux",
        "arcbridge.node-restriction.kubernetes.io/agent": "true",
    }
    assert [one["key"] for one in pod["tolerations"]] == ["arcbridge.io/agent"]


Nodes = dict[str, str] | list[list[tuple[str, str]]]

RESTRICTED = "arcbridge.node-restriction.kubernetes.io/agent"
EVERY_NODE: list[Nodes] = [
    {},
    {"beta.kubernetes.io/os": "linux"},
    {"kubernetes.io/arch": "amd64", "topology.kubernetes.io/region": "north"},
    {"failure-domain.beta.kubernetes.io/zone": "a"},
    [[("kubernetes.io/os", "Exists")]],
    [[("kubernetes.io/hostname", "Exists")]],
    [[("kubernetes.io/os", "In"), ("node-role.kubernetes.io/control-plane", "DoesNotExist")]],
    [[("metadata.name", "NotIn")]],
    [[("pool", "In")], [("beta.kubernetes.io/arch", "In")]],
    [[]],
]
NAMED = [
    ({"pool": "a"}, "label pool to"),
    ({"kubernetes.io/hostname": "a"}, "label kubernetes.io/hostname to"),
    ({"pool": "a", RESTRICTED: "true"}, None),
    ([[("pool", "Exists")]], "label pool to"),
    ([[("pool", "In"), ("kubernetes.io/os", "In")], [("other", "Gt")]], "label pool, other to"),
    ([[(RESTRICTED, "Exists")], [("pool", "In")]], "label pool to"),
    ([[(RESTRICTED, "In"), ("pool", "In")]], None),
    ([[("metadata.name", "In")]], None),
]


def install_on(helm: Helm, nodes: Nodes, path: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    """Install with a nodeSelector, or with an affinity of terms, each by key and operator."""
    values = {**yaml.safe_load(VALUES.read_text()), "nodeSelector": nodes if isinstance(nodes, dict) else {}}
    if not isinstance(nodes, dict):
        terms: list[dict[str, Any]] = []
        for term in nodes:
            terms.append({})
            for key, operator in term:
                kind = "matchFields" if key == "metadata.name" else "matchExpressions"
                wanted = ["1"] if operator in ("In", "NotIn", "Gt") else []
                terms[-1].setdefault(kind, []).append({"key": key, "operator": operator, "values": wanted})
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        values["affinity"] = {"nodeAffinity": required}
    (path / "values.yaml").write_text(yaml.safe_dump(values))
    command = ("install", "x", str(CHART), "--dry-run=client", "-f", str(path / "values.yaml"))
    return helm.run(*command, *settings, check=False)


@pytest.mark.parametrize("nodes", EVERY_NODE, ids=str)
def test_t64_what_every_node_has_names_no_nodes(helm: Helm, nodes: Nodes, tmp_path: Path) -> None:
    refused = install_on(helm, nodes, tmp_path)
    assert refused.returncode != 0
    assert "nodeSelector: names no nodes" in refused.stderr
    assert "Root of every node would have what the pod has" in refused.stderr
    accepted = install_on(helm, nodes, tmp_path, "--set", "workload.everyNode=true")
    assert "root of every node has what an agent's pod has" in accepted.stdout


@pytest.mark.parametrize(("nodes", "warning"), NAMED, ids=str)
def test_t64_labels_that_a_kubelet_gives_itself_are_warned_of(
    helm: Helm, nodes: Nodes, warning: str | None, tmp_path: Path
) -> None:
    done = install_on(helm, nodes, tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("a kubelet may give the" in done.stdout) is (warning is not None)
    assert warning is None or f"{warning} its own node" in done.stdout


def test_settings_without_a_value(helm: Helm, tmp_path: Path) -> None:
    text = '[limits.groups."oidc:ci"]\nrequests_per_second = 500\n[audit]\nfile = ""\n'
    (tmp_path / "values.yaml").write_text(yaml.safe_dump({"settings": text}))
    rendered = helm.template("-f", str(tmp_path / "values.yaml"))
    check_workload(rendered)
    settings = check_settings(rendered, tmp_path)
    assert settings.audit.file == ""
    assert set(settings.limits.groups) == {"oidc:ci"}
    assert settings.targets["database"].groups == ("oidc:database-operators",)


@pytest.mark.parametrize("mode", MODES)
def test_any_name_is_a_rule_without_names(helm: Helm, mode: str) -> None:
    """The name `*` would let the API server take it for a wildcard, where a request has many groups."""
    rendered = helm.template("--set", f"impersonation.mode={mode}", "--set", "impersonation.users={*}",
                             "--set", "impersonation.groups={*}")  # fmt: skip
    rules = [rule for rule in rendered.rules() if rule.get("resources") in (["users"], ["groups"])]
    assert len(rules) == 2
    assert not any("resourceNames" in rule for rule in rules)
    assert 'impersonate_groups = ["*"]' in rendered.one("ConfigMap")["data"]["agent.toml"]


def test_token_mode_alone_impersonates_no_user(helm: Helm) -> None:
    alone = ("--set", "tokenMode=true", "--set", "authentication=null", "--set", "impersonation.users=null")
    for mode in MODES:
        verbs = {verb for rule in helm.template(*alone, "--set", f"impersonation.mode={mode}").rules()
                 for verb in rule["verbs"]}  # fmt: skip
        assert verbs == {"get", "update", "watch", "create", "patch"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("impersonation.users=null", "impersonation.users: empty"),
        ("authentication=null", "tokenMode is off"),
        ("nodeSelector=null", "nodeSelector: names no nodes"),
        (
            "terminationGracePeriodSeconds=599",
            "terminationGracePeriodSeconds: 599 is too short for session.drain (585s)",
        ),
        (
            "impersonation.mode=constrained,impersonation.serviceAccounts={shop/deployer}",
            "impersonation.serviceAccounts",
        ),
    ],
)
def test_values_that_cannot_work_are_named(helm: Helm, settings: str, words: str) -> None:
    done = helm.run("template", "x", str(CHART), "-f", str(VALUES), "--set", settings, check=False)
    assert done.returncode != 0
    assert words in done.stderr


def test_what_helm_cannot_see_the_init_container_finds(helm: Helm, tmp_path: Path) -> None:
    """It has the arguments that `check_init_container` looks at, and the files of the ConfigMap."""
    values = yaml.safe_load(VALUES.read_text())
    values["authentication"]["jwt"][0]["claimValidationRules"] = [{"expression": "claims.hd ="}]
    values["relays"] = ["https://relay.test:8443"]
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    rendered = helm.template("-f", str(tmp_path / "values.yaml"))
    done = run_config_check(rendered, tmp_path, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert done.returncode == 2
    file = tmp_path / "etc/arcbridge/authentication.yaml"
    words = rf"error: {file}, line \d+, column \d+: jwt\[0\]\.claimValidationRules\[0\]\.expression: "
    assert re.search(words, done.stderr)


def test_egress_follows_from_what_pods_connect_to(helm: Helm, tmp_path: Path) -> None:
    values = {
        "relays": ["https://a.test:8443", "https://b.test", "https://[2001:db8::1]:9443"],
        "networkPolicy": {"egressPorts": [6443]},
        "targets": {"db": {"address": "db:5432", "groups": ["a"]}},
    }
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    assert egress_ports(helm.template("-f", str(tmp_path / "values.yaml"))) == {53, 443, 5432, 6443, 8443, 9443}
    authentication = yaml.safe_load(VALUES.read_text())["authentication"]
    authentication["jwt"][0]["issuer"] |= {"url": "https://x.test:7443/realm", "discoveryURL": "https://y.test:7444/d"}
    values |= {"authentication": authentication, "relays": ["https://a.test:8443"], "targets": {"db": None}}
    values["targets"] = {"database": {"address": "db:1", "groups": ["a"]}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    assert egress_ports(helm.template("-f", str(tmp_path / "values.yaml"))) == {53, 1, 6443, 7443, 7444, 8443}


def test_audit_sinks(helm: Helm, tmp_path: Path) -> None:
    values = {
        "auditSinks": {
            "siem": {"kind": "http", "address": "https://c.test:8088/in", "gzip": True, "batch_records": 70,
                     "token_file": "/run/secrets/arcbridge-audit/token", "interval": "2s"},
            "central": {"kind": "syslog", "address": "s.test"}, "odd": {"kind": "syslog", "address": "s.test:1514"},
            "output": {"kind": "stdout"},
        },
        "auditSpool": {"existingSecret": "siem", "bytes": 100 << 20},
    }  # fmt: skip
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    rendered = helm.template("-f", str(tmp_path / "values.yaml"))
    audit = check_settings(rendered, tmp_path).audit
    assert (audit.file, audit.rotate_bytes, audit.keep_bytes) == (
        "/var/lib/arcbridge-audit/audit.jsonl", 16 << 20, 100 << 20,
    )  # fmt: skip
    siem = audit.sinks["siem"]
    assert (siem.gzip, siem.batch_records, siem.interval) == (True, 70, 2.0)
    assert set(audit.sinks) == {"siem", "central", "odd", "output"}
    assert {8088, 6514, 1514} <= egress_ports(rendered)
    pod = rendered.workload()["spec"]["template"]["spec"]
    for container in (*pod["containers"], *pod["initContainers"]):
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert (mounts["audit"], mounts["audit-secret"]) == ("/var/lib/arcbridge-audit", "/run/secrets/arcbridge-audit")
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["audit"]["emptyDir"]["sizeLimit"] == (100 << 20) + (64 << 20)
    assert volumes["audit-secret"]["secret"]["secretName"] == "siem"
    claim = {"persistentVolumeClaim": {"claimName": "audit"}}
    values |= {"auditSpool": {"volume": claim}, "workload": {"kind": "Deployment", "replicas": 1}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    pod = helm.template("-f", str(tmp_path / "values.yaml")).workload()["spec"]["template"]["spec"]
    assert {"name": "audit", **claim} in pod["volumes"]
    for several in ("workload.replicas=2", "workload.kind=DaemonSet"):
        command = ("template", "x", str(CHART), "-f", str(VALUES), "-f", str(tmp_path / "values.yaml"))
        done = helm.run(*command, "--set", several, check=False)
        assert done.returncode != 0
        assert "auditSpool.volume: all pods would write the one file" in done.stderr


def test_a_collector_of_spans_with_a_ca_of_its_own(helm: Helm, tmp_path: Path) -> None:
    tracing = {"endpoint": "https://c.test:4318/", "existingSecret": "otel", "caKey": "ca.crt", "tokenKey": "t"}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump({"tracing": tracing}))
    rendered = helm.template("-f", str(tmp_path / "values.yaml"))
    made = tomllib.loads(rendered.one("ConfigMap")["data"]["agent.toml"])["tracing"]
    files = {"ca_file": "/run/secrets/arcbridge-tracing/ca.crt", "token_file": "/run/secrets/arcbridge-tracing/t"}
    assert made == {"endpoint": tracing["endpoint"], **files}
    assert 4318 in egress_ports(rendered)
    pod = rendered.workload()["spec"]["template"]["spec"]
    for container in (*pod["containers"], *pod["initContainers"]):
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts["tracing"] == "/run/secrets/arcbridge-tracing"
    (volume,) = (one for one in pod["volumes"] if one["name"] == "tracing")
    assert volume["secret"]["secretName"] == "otel"
    text = rendered.one("ConfigMap")["data"]["agent.toml"]
    assert text.index("[tracing]") < text.index("[observe]")


REQUESTS = "certificates.k8s.io/v1beta1/PodCertificateRequest"
PODS_OWN = ("--set", "podCertificate.enabled=true", "--api-versions", REQUESTS)
CONSTRAINED = ("--set", "impersonation.mode=constrained")
BUNDLE = ("--set", "clusterTrustBundle.signerName=kubernetes.io/kube-apiserver-serving")


def own_files(rendered: Rendered) -> list[dict[str, Any]]:
    """The sources of the volume at the place of a ServiceAccount's files, which both containers have."""
    pod = rendered.workload()["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    for container in (*pod["containers"], *pod["initContainers"]):
        (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == "api-server"]
        assert mount == {"name": "api-server", "mountPath": str(SERVICE_ACCOUNT), "readOnly": True}
    (volume,) = [volume["projected"] for volume in pod["volumes"] if volume["name"] == "api-server"]
    assert volume["defaultMode"] == 0o440
    check_pod(rendered)
    return list(volume["sources"])


def test_h58_with_a_pod_certificate_no_pod_has_a_token(helm: Helm, tmp_path: Path) -> None:
    annotations = 'podCertificate.userAnnotations={"example.org/a": "b"}'
    rendered = helm.template(*PODS_OWN, *CONSTRAINED, "--set-json", annotations)
    certificate, ca, namespace = own_files(rendered)
    assert certificate["podCertificate"] == {
        "signerName": "kubernetes.io/kube-apiserver-client-pod", "keyType": "ECDSAP256", "maxExpirationSeconds": 86400,
        "credentialBundlePath": "credential-bundle.pem", "userAnnotations": {"example.org/a": "b"},
    }  # fmt: skip
    assert ca["configMap"]["name"] == "kube-root-ca.crt"
    assert namespace["downwardAPI"]["items"][0]["path"] == "namespace"
    settings = check_settings(rendered, tmp_path)
    assert settings.kubernetes.credential_bundle_file == SERVICE_ACCOUNT / "credential-bundle.pem"
    end = endpoint_of(settings.kubernetes, {"KUBERNETES_SERVICE_HOST": "a"})
    assert (end.token_file, end.ca_file) == (None, SERVICE_ACCOUNT / "ca.crt")
    # Such a certificate does not say which pod it is of, and the policy asks for that.
    check_rules(rendered, "constrained", USERS, GROUPS)
    assert rendered.of("ValidatingAdmissionPolicy") == []
    assert own_files(helm.template(*PODS_OWN, *BUNDLE))[1] == {
        "clusterTrustBundle": {"path": "ca.crt", "signerName": BUNDLE[1].partition("=")[2], "labelSelector": {}}
    }


def test_a_trust_bundle_beside_the_token(helm: Helm) -> None:
    token, ca, _ = own_files(helm.template("--set", "clusterTrustBundle.name=theirs"))
    assert token == {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}}
    assert ca == {"clusterTrustBundle": {"path": "ca.crt", "name": "theirs"}}


def test_a_pod_certificate_where_there_is_its_api(helm: Helm, cluster: Cluster) -> None:
    """And the API server takes the volume as it is; one that does not know it would leave it out."""
    assert "podCertificate.enabled: this cluster has no PodCertificateRequest" in helm.refusal(*PODS_OWN[:2])
    assert "podCertificate.signerName: empty" in helm.refusal(*PODS_OWN, "--set", "podCertificate.signerName=")
    rendered = helm.template(*PODS_OWN, *BUNDLE, "--set", "workload.kind=Deployment")
    cluster.ensure_namespace(NAMESPACE)
    create = ("create", "-n", NAMESPACE, "--dry-run=server", "--validate=strict", "-f", "-", "-o", "json")
    made = json.loads(cluster.kubectl(*create, input=json.dumps(rendered.workload())).stdout)
    (volume,) = [one for one in made["spec"]["template"]["spec"]["volumes"] if one["name"] == "api-server"]
    assert volume["projected"]["sources"][:2] == own_files(rendered)[:2]


def test_recordings_with_a_bucket(helm: Helm, tmp_path: Path) -> None:
    rule = {"namespaces": ["production"], "required": False}
    bucket = {"endpoint": "https://s3.test:9000", "name": "recordings", "existingSecret": "s3", "caKey": "ca.crt"}
    values = {"recording": {"recipients": ["age1x"], "rules": {"all": rule}, "bytes": 100 << 20, "bucket": bucket}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    rendered = helm.template("-f", str(tmp_path / "values.yaml"))
    made = tomllib.loads(rendered.one("ConfigMap")["data"]["agent.toml"])["recording"]
    assert made == {
        "recipients": ["age1x"],
        "directory": "/var/lib/arcbridge-recordings",
        "directory_bytes": 100 << 20,
        "rules": {"all": rule},
        "bucket": {
            "endpoint": "https://s3.test:9000",
            "bucket": "recordings",
            "prefix": "",
            "region": "us-east-1",
            "access_key_file": "/run/secrets/arcbridge-bucket/access-key",
            "secret_key_file": "/run/secrets/arcbridge-bucket/secret-key",
            "ca_file": "/run/secrets/arcbridge-bucket/ca.crt",
        },
    }
    assert 9000 in egress_ports(rendered)
    pod = rendered.workload()["spec"]["template"]["spec"]
    for container in (*pod["containers"], *pod["initContainers"]):
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        wanted = ("/var/lib/arcbridge-recordings", "/run/secrets/arcbridge-bucket")
        assert (mounts["recordings"], mounts["bucket"]) == wanted
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["recordings"]["emptyDir"]["sizeLimit"] == (100 << 20) + (64 << 20)
    assert volumes["bucket"]["secret"]["secretName"] == "s3"
    claim = {"persistentVolumeClaim": {"claimName": "recordings"}}
    values["recording"]["volume"] = claim
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    pod = helm.template("-f", str(tmp_path / "values.yaml")).workload()["spec"]["template"]["spec"]
    assert {"name": "recordings", **claim} in pod["volumes"]


def test_every_value_in_use(helm: Helm, tmp_path: Path) -> None:
    values = {
        "fullnameOverride": "gate", "relayCA": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
        "tokenMode": False, "auditFile": "", "logLevel": "debug", "observe": {"port": 9999, "annotations": False},
        "region": "eu", "regions": {"eu": ["https://relay.example.org:443"], 'u"s': []},
        "targets": {"git": {"address": "git:22", "users": ["oidc:anna\\\"quoted"], "actors": ["bot"]}},
        "limits": {"bytes_per_day": 2**40, "streams": 9, "groups": {'oidc:c"i': {"streams": 70, "bytes_per_day": 0}},
                   "users": {"oidc:anna@example.org": {"sessions": 2}}, "actors": {"*": {"sessions": 3}}},
        "actorClients": ["ci"],
        "impersonation": {"mode": "constrained", "verbs": ["get", "list", "watch"], "userExtras": ["scopes"],
                          "users": ["a"], "groups": ["b"]},
        "workload": {"kind": "Deployment", "replicas": 3}, "session": {"maxAge": "90m", "drain": "1m14.5s"},
        "denylist": {"existingConfigMap": "denied"},
        "forbiddenAudiences": ["arcbridge-relay", 'o"dd'], "maxTokenLifetime": "2h",
        "claimSources": ["https://claims.example.org"], "graph": {"existingSecret": "groups"},
        "settings": '[graph.example]\ncertificate_file = "/run/secrets/arcbridge-graph/certificate.pem"\n',
        "serviceAccount": {"name": "other", "annotations": {"a": "b"}}, "credential": {"keep": True},
        "image": {"digest": "sha256:" + "0" * 64}, "imagePullSecrets": [{"name": "pull"}],
        "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}], "priorityClassName": "high",
        "networkPolicy": {"enabled": False}, "podLabels": {"team": "x"}, "podAnnotations": {"note": "yes"},
        "tolerations": [{"operator": "Exists"}], "affinity": {"nodeAffinity": {}},
    }  # fmt: skip
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    rendered = helm.template("-f", str(tmp_path / "values.yaml"))
    settings = check_settings(rendered, tmp_path)
    assert settings.targets["git"].users == ('oidc:anna\\"quoted',)
    assert (settings.limits.streams, settings.limits.bytes_per_day, settings.limits.sessions) == (9, 2**40, 32)
    assert (settings.region, settings.regions["eu"].relays) == ("eu", ("https://relay.example.org:443",))
    assert settings.regions['u"s'].relays == ()
    of_group = settings.limits.groups['oidc:c"i']
    assert (of_group.streams, of_group.bytes_per_day, of_group.sessions) == (70, 0, None)
    assert settings.limits.users["oidc:anna@example.org"].sessions == 2
    assert (settings.limits.actors["*"].sessions, settings.targets["git"].actors) == (3, ("bot",))
    assert settings.actor_clients == ("ci",)
    assert (settings.token_mode, settings.audit.file, settings.observe.log_level) == (False, "", "debug")
    assert settings.session.max_age == 90 * 60
    assert (settings.forbidden_audiences, settings.max_token_lifetime) == (("arcbridge-relay", 'o"dd'), 7200)
    assert settings.denylist_file == Path("/etc/arcbridge-denylist/denylist.toml")
    assert {"name": "denylist", "configMap": {"name": "denied"}} in rendered.workload()["spec"]["template"]["spec"][
        "volumes"
    ]
    assert settings.claim_sources == ("https://claims.example.org",)
    pod = rendered.workload()["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert settings.graph["example"].certificate_file == Path(mounts["graph"]) / "certificate.pem"
    (secret,) = [volume["secret"] for volume in pod["volumes"] if volume["name"] == "graph"]
    assert secret == {"secretName": "groups", "defaultMode": 0o440}
    assert settings.relay_ca_file == tmp_path / "relay-ca.pem"
    assert (tmp_path / "relay-ca.pem").read_text().startswith("-----BEGIN CERTIFICATE-----\nMIIB\n")
    verbs = {verb for rule in rendered.rules() if rule.get("resources") == ["*"] for verb in rule["verbs"]}
    assert verbs == {f"impersonate-on:user-info:{verb}" for verb in ("get", "list", "watch")}
    assert any("userextras/scopes" in rule.get("resources", ()) for rule in rendered.rules())
    assert rendered.one("ServiceAccount")["metadata"]["name"] == "other"
    assert rendered.one("Secret")["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert not rendered.of("NetworkPolicy")
    pod = rendered.workload()["spec"]["template"]
    assert pod["spec"]["containers"][0]["image"].endswith("@sha256:" + "0" * 64)
    assert pod["metadata"]["labels"]["team"] == "x"
    assert "prometheus.io/scrape" not in pod["metadata"]["annotations"]


def test_what_exists_already_is_not_made(helm: Helm) -> None:
    rendered = helm.template(
        "--set", "serviceAccount.create=false,rbac.create=false", "--set", "credential.existingSecret=theirs",
        "--set", "joinToken.existingSecret=", "--set", "authentication=null,tokenMode=true",
    )  # fmt: skip
    assert {item["kind"] for item in rendered.objects} == {"ConfigMap", "DaemonSet", "NetworkPolicy"}
    pod = rendered.workload()["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "default"
    assert "join-token" not in str(pod)
    text = rendered.one("ConfigMap")["data"]["agent.toml"]
    assert f'secret = "{NAMESPACE}/theirs"' in text
    assert "join_token_file" not in text


def test_a_changed_setting_rolls_the_pods(helm: Helm) -> None:
    def checksum(*args: str) -> str:
        template = helm.template(*args).workload()["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum() == checksum() != checksum("--set", "logLevel=debug")


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("relays=null", "relays"), ("relays={http://relay}", "relays"), ("relayCAPin=sha256:12", "relayCAPin"),
        ("relay=x", "relay"), ("joinToken.value=secret", "value"), ("impersonation.mode=both", "mode"),
        ("terminationGracePeriodSeconds=15", "terminationGracePeriodSeconds"), ("session.drain=", "drain"),
        ("terminationGracePeriodSeconds=x", "terminationGracePeriodSeconds"), ("targets.x.address=a:1", "targets"),
        ("impersonation.verbs={*}", "verbs"), ("limits.streams=-1", "streams"), ("limits.streams=x", "streams"),
        ("logLevel=loud", "logLevel"), ("workload.kind=StatefulSet", "kind"),
        ("impersonation.users={system:kube-controller-manager}", "users"), ("impersonation.users={a,*}", "users"),
        ("impersonation.groups={system:masters}", "groups"), ("impersonation.groups={oidc:*}", "groups"),
        ("impersonation.serviceAccounts={system:serviceaccount:a:b}", "serviceAccounts"),
        ("session.maxAge=forever", "maxAge"), ("denylist.users={anna}", "users"),
        ("auditSinks.a.kind=ftp", "kind"), ("auditSpool.bytes=1", "bytes"),
        ("podCertificate.keyType=RSA2048", "keyType"), ("clusterTrustBundle.labelSelector=", "clusterTrustBundle"),
        ("clusterTrustBundle.name=a,clusterTrustBundle.labelSelector.matchLabels.b=c", "clusterTrustBundle"),
        ("clusterTrustBundle.name=a,clusterTrustBundle.signerName=b/c", "clusterTrustBundle"),
        ("podCertificate.maxExpirationSeconds=60", "maxExpirationSeconds"),
    ],
)  # fmt: skip
def test_the_schema_refuses_by_name(helm: Helm, setting: str, named: str) -> None:
    command = ("template", "x", str(CHART), "-f", str(VALUES), "--set", setting)
    done = helm.run(*command, check=False)
    assert done.returncode != 0
    assert named in done.stderr


@pytest.mark.parametrize("chart", [AGENT, RELAY], ids=lambda chart: chart.name)
def test_the_schema_knows_every_value(chart: Path) -> None:
    def names(node: Any, path: str = "") -> set[str]:
        return {path} | {name for key, child in node.items() for name in names(child, f"{path}.{key}")} if (
            isinstance(node, dict) and node) else {path}  # fmt: skip

    def declared(schema: dict[str, Any], path: str = "") -> set[str]:
        children = schema.get("properties", {}).items()
        return {path} | {name for key, child in children for name in declared(child, f"{path}.{key}")}

    schema = json.loads((chart / "values.schema.json").read_text())
    open_ended = (".nodeSelector.", ".resources.")
    values = {
        name for name in names(yaml.safe_load((chart / "values.yaml").read_text())) if not name.startswith(open_ended)
    }
    assert values <= declared(schema)


def test_the_charts_agree() -> None:
    """They have one version, the product's, and read what they have in common by one schema and one template."""
    for chart in (AGENT, RELAY):
        assert yaml.safe_load((chart / "Chart.yaml").read_text())["appVersion"] == __version__
    schemas = [json.loads((chart / "values.schema.json").read_text()) for chart in (AGENT, RELAY)]
    for part in ("definitions", "properties"):
        one, other = (schema[part] for schema in schemas)
        for name in (
            "issuer",
            "mapping",
            "labels",
            "authentication",
            "auditSinks",
            "image",
            "observe",
            "networkPolicy",
        ):
            assert one.get(name) == other.get(name), name
    monitors = [(chart / "templates/podmonitor.yaml").read_text() for chart in (AGENT, RELAY)]
    assert monitors[0].replace('"agent.', '"relay.') == monitors[1]


@pytest.mark.parametrize("chart", [AGENT, RELAY], ids=lambda chart: chart.name)
def test_a_pod_monitor_where_there_is_its_api(binary: Path, tmp_path: Path, chart: Path) -> None:
    helm = Helm(binary, tmp_path, chart=chart)
    assert helm.template("--api-versions", "monitoring.coreos.com/v1/PodMonitor").of("PodMonitor") == []
    on = ("--set", "observe.podMonitor.enabled=true,observe.podMonitor.labels.release=prometheus")
    assert "observe.podMonitor.enabled: this cluster has no PodMonitor" in helm.refusal(*on)
    rendered = helm.template(*on, "--api-versions", "monitoring.coreos.com/v1/PodMonitor")
    monitor = rendered.one("PodMonitor")
    check_labels(rendered)
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    pod = rendered.workload()["spec"]["template"]
    assert monitor["spec"]["selector"] == rendered.workload()["spec"]["selector"]
    assert pod["metadata"]["labels"][monitor["spec"]["jobLabel"]] == chart.name, "the job that the rules name"
    assert not [name for name in pod["metadata"]["annotations"] if name.startswith("prometheus.io")]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] in [port["name"] for port in pod["spec"]["containers"][0]["ports"]]


def left_over(cluster: Cluster) -> set[str]:
    kinds = "serviceaccounts,secrets,configmaps,daemonsets,networkpolicies,roles,rolebindings,clusterroles"
    kinds += ",clusterrolebindings,validatingadmissionpolicies,validatingadmissionpolicybindings"
    done = cluster.kubectl("get", kinds, "-n", NAMESPACE, "-l", "app.kubernetes.io/part-of=arcbridge", "-o", "name")
    return set(done.stdout.split())


@pytest.mark.parametrize("mode", MODES)
def test_install_upgrade_uninstall(installer: Helm, cluster: Cluster, mode: str) -> None:
    mode_set = ("--set", f"impersonation.mode={mode}")
    with installer.installed(*mode_set) as notes:
        assert "https://relay.example.org:443" in notes
        assert "kubectl -n remote create secret generic arcbridge-join-token" in notes
        assert ("would void the constraint" in notes) == (mode == "constrained")
        assert len(left_over(cluster)) == 11

        # What the agent wrote into its Secret survives an upgrade, and the settings change.
        write_secret(cluster, NAMESPACE)
        installer.upgrade(*mode_set, "--set", "logLevel=debug")
        assert read_secret(cluster, NAMESPACE) == WRITTEN
        settings = cluster.request("GET", f"/api/v1/namespaces/{NAMESPACE}/configmaps/arcbridge-agent")
        assert 'log_level = "debug"' in settings["data"]["agent.toml"]
    assert left_over(cluster) == set()


@pytest.mark.parametrize("mode", MODES)
def test_the_account_impersonates_and_has_no_rights_of_its_own(installer: Helm, cluster: Cluster, mode: str) -> None:
    """Asked with the ServiceAccount's own token, with and without impersonation."""
    with installer.installed("--set", f"impersonation.mode={mode}"):
        agent = as_agent(cluster)
        cluster.grant("view", user="oidc:anna@example.org")
        anna = ("--as=oidc:anna@example.org", "--as-group=oidc:team", "--as-uid=42")
        extra = "--as-user-extra=arcbridge.io/original-user=oidc:root@example.org"

        who = cluster.kubectl("auth", "whoami", "-o", "json", *agent, *anna, extra)
        user = json.loads(who.stdout)["status"]["userInfo"]
        assert user["username"] == "oidc:anna@example.org"
        assert "oidc:team" in user["groups"]
        assert user["uid"] == "42"
        assert user["extra"] == {"arcbridge.io/original-user": ["oidc:root@example.org"]}
        assert cluster.kubectl("get", "pods", "-n", "default", *agent, *anna).returncode == 0
        refused = cluster.kubectl("delete", "pod", "x", "-n", "default", *agent, *anna, check=False)
        assert 'User "oidc:anna@example.org" cannot delete resource "pods"' in refused.stderr

        own = ("secret", "arcbridge-agent", "-n", NAMESPACE)
        assert cluster.kubectl("get", *own, *agent).returncode == 0
        others: list[tuple[str, ...]] = [
            (what, "-n", place) for what in ("pods", "secrets") for place in ("default", NAMESPACE)
        ]
        others += [("secret", "another", "-n", NAMESPACE), ("nodes",), ("clusterroles",)]
        for command in (*(("get", *other) for other in others), ("delete", *own), ("delete", "pod", "x")):
            alone = cluster.kubectl(*command, *agent, check=False)
            assert f'User "{ACCOUNT}" cannot' in alone.stderr, command


LEAVES = {"metadata": {"labels": {"app.kubernetes.io/instance": "arcbridge-agent-draining"}}}
# What else a patch of the agent's own pod could be, and what the policy says of it.
NOTHING_BUT = "an agent may change nothing of its pod but a label"
NO_LABEL_BUT = "an agent may set no label of its pod but the one"
PATCHES: list[tuple[dict[str, Any], str]] = [
    ({"spec": {"containers": [{"name": "main", "image": "theirs"}]}}, NOTHING_BUT),
    ({"spec": {"activeDeadlineSeconds": 9}}, NOTHING_BUT),
    ({"metadata": {"annotations": {"a": "b"}}}, NOTHING_BUT),
    ({"metadata": {"finalizers": ["example.org/stays"]}}, "no new finalizers can be added"),
    ({"metadata": {"ownerReferences": [{"apiVersion": "v1", "kind": "Node", "name": "n", "uid": "u"}]}}, NOTHING_BUT),
    ({"metadata": {"labels": {"app.kubernetes.io/name": "other"}}}, NO_LABEL_BUT),
    ({"metadata": {"labels": {"further": "label"}}}, NO_LABEL_BUT),
    ({"metadata": {"labels": {"app.kubernetes.io/name": None}}}, NO_LABEL_BUT),
    ({"metadata": {"labels": {"app.kubernetes.io/instance": "other"}}}, NO_LABEL_BUT),
]


def test_h42_a_pod_may_patch_one_label_of_itself_while_it_is_ended(
    installer: Helm, cluster: Cluster, tmp_path: Path
) -> None:
    """Asked with the tokens that the pods have (docs/threats.md#H42)."""
    with installer.installed():
        tokens = {name: pod_of_the_account(cluster, name) for name in ("own", "other")}
        cluster.settle_rbac()
        unbound = cluster.service_account_token(NAMESPACE, "arcbridge-agent")
        here = f"/api/v1/namespaces/{NAMESPACE}/pods"

        def patch(token: str, pod: str, document: object, query: str = "") -> tuple[int, str]:
            merge = "application/strategic-merge-patch+json"
            headers = {"Authorization": f"Bearer {token}", "Content-Type": merge}
            return answer(cluster, "PATCH", f"{here}/{pod}{query}", document, headers)

        # The API server takes a policy over a moment after it was made.
        early = until(
            lambda: [found for found in [patch(tokens["own"], "own", LEAVES, "?dryRun=All")] if found[0] != 200],
            "the policy is in force",
            timeout=30,
        )
        assert "an agent's pod stays in its DaemonSet until it is being ended" in early[0][1]
        for pod in tokens:
            cluster.request("DELETE", f"{here}/{pod}", {"gracePeriodSeconds": 300})
        for document, words in PATCHES:
            status, text = patch(tokens["own"], "own", document)
            assert (status, words in text) == (422, True), f"{document}: {status} {text}"
        status, text = patch(tokens["other"], "own", LEAVES)
        assert (status, "an agent may patch its own pod alone" in text) == (422, True), text
        assert patch(unbound, "own", LEAVES)[0] == 422
        # Nor may one with a certificate, which is of the same account and says nothing of a pod (docs/threats.md#H58).
        bundle = tmp_path / "bundle.pem"
        bundle.write_bytes(b"".join(cluster.client_certificate(ACCOUNT, ["system:serviceaccounts"])))
        merge = {"Content-Type": "application/strategic-merge-patch+json"}
        status, text = answer(cluster, "PATCH", f"{here}/own", LEAVES, merge, bundle)
        assert (status, "no such key: authentication.kubernetes.io/pod-uid" in text) == (422, True), text
        assert answer(cluster, "DELETE", f"{here}/own", None, {"Authorization": f"Bearer {tokens['own']}"})[0] == 403
        assert patch(tokens["own"], "own", LEAVES)[0] == 200
        for pod in tokens:
            cluster.delete_pod(pod, NAMESPACE)


def pod_of_the_account(cluster: Cluster, name: str) -> str:
    """Start a pod of the agent's account that takes its time to end, and return the token that it has."""
    labels = {"app.kubernetes.io/name": "arcbridge-agent", "app.kubernetes.io/instance": "arcbridge-agent"}
    command = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
    spec = {"nodeName": "node-1", "serviceAccountName": "arcbridge-agent", "terminationGracePeriodSeconds": 300}
    containers = [{"name": "main", "image": "local", "command": command}]
    body = {"metadata": {"name": name, "labels": labels}, "spec": {**spec, "containers": containers}}
    pod = cluster.request("POST", f"/api/v1/namespaces/{NAMESPACE}/pods", body)["metadata"]
    until(
        lambda: cluster.request("GET", f"/api/v1/namespaces/{NAMESPACE}/pods/{name}")["status"]["phase"] == "Running",
        f"{name} runs",
    )
    bound = {"kind": "Pod", "apiVersion": "v1", "name": name, "uid": pod["uid"]}
    path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/arcbridge-agent/token"
    return str(cluster.request("POST", path, {"spec": {"boundObjectRef": bound}})["status"]["token"])


def answer(
    cluster: Cluster, method: str, path: str, document: object, headers: dict[str, str], bundle: Path | None = None
) -> tuple[int, str]:
    """Ask the API server without the administrator's certificate. `bundle`: another one, with its key."""
    body = None if document is None else json.dumps(document).encode()
    request = urllib.request.Request(cluster.api_url + path, method=method, data=body, headers=headers)
    context = ssl.create_default_context(cafile=cluster.ca_file)
    if bundle is not None:
        context.load_cert_chain(bundle)
    try:
        with urllib.request.urlopen(request, context=context, timeout=30) as done:
            return done.status, done.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


REVIEW = json.dumps({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"})
MANY = tuple(f"--as-group=oidc:group-{number}" for number in range(5))
# What the agent's account tries to be, and the rules that let it: by name or for any name ("any"), of both modes.
ATTEMPTS: dict[tuple[str, ...], set[str]] = {
    ("--as=oidc:anna@example.org", "--as-group=oidc:team"): {"legacy", "constrained", "legacy any", "constrained any"},
    ("--as=oidc:other@example.org",): {"legacy any", "constrained any"},
    ("--as=oidc:anna@example.org", "--as-group=oidc:other"): {"legacy any", "constrained any"},
    # From four groups on constrained impersonation asks for all of them at once.
    ("--as=oidc:anna@example.org", *MANY): {"legacy any", "constrained any"},
    ("--as=oidc:anna@example.org", "--as-group=system:masters"): {"legacy any"},
    ("--as=oidc:anna@example.org", *MANY, "--as-group=system:masters"): {"legacy any"},
    ("--as=oidc:anna@example.org", "--as-group=system:nodes"): {"legacy any", "constrained any"},
    ("--as=system:admin", "--as-group=system:masters"): {"legacy any"},
    ("--as=system:kube-controller-manager",): {"legacy any", "constrained any"},
    ("--as=system:node:node-1",): {"legacy any"},
    ("--as=system:serviceaccount:kube-system:clusterrole-aggregation-controller",): set(),
}


@pytest.mark.parametrize("names", ["", " any"])
@pytest.mark.parametrize("mode", MODES)
def test_whom_the_account_can_be(installer: Helm, cluster: Cluster, mode: str, names: str) -> None:
    """docs/threats.md#H3, asked with requests: no `system:` by the rules as shipped, and what `*` opens as
    docs/security.md says."""
    any_name = ("--set", "impersonation.users={*}", "--set", "impersonation.groups={*}") if names else ()
    with installer.installed("--set", f"impersonation.mode={mode}", *any_name) as notes:
        assert ("WARNING" in notes) == bool(names)
        agent = as_agent(cluster)
        for attempt, rules in ATTEMPTS.items():
            ask = ("create", "--raw", "/apis/authentication.k8s.io/v1/selfsubjectreviews", "-f", "-")
            done = cluster.kubectl(*ask, *agent, *attempt, input=REVIEW, check=False)
            assert (done.returncode == 0) == (f"{mode}{names}" in rules), f"{attempt}: {done.stdout}{done.stderr}"
            if done.returncode == 0:
                who = json.loads(done.stdout)["status"]["userInfo"]["username"]
                assert who == attempt[0].removeprefix("--as=")
            else:
                assert f'User "{ACCOUNT}" cannot impersonate' in done.stderr or "is not allowed" in done.stderr, attempt


def test_a_node_cannot_attract_the_agent(cluster: Cluster, tmp_path: Path) -> None:
    """Root of a node has its kubelet's rights. It may label its own node, but not with the label that the agent's pods
    ask for."""
    node = "system:node:node-1"
    cluster.grant("system:node", user=node)
    kubelet = cluster.write_kubeconfig(tmp_path / "kubelet", user=node, groups=["system:nodes"])
    (label,) = yaml.safe_load((CHART / "examples/dedicated-nodes.yaml").read_text())["nodeSelector"]
    command = ("label", "--overwrite", "node", "node-1", f"--kubeconfig={kubelet}")
    assert cluster.kubectl(*command, "example.org/agent=true").returncode == 0
    refused = cluster.kubectl(*command, f"{label}=true", check=False)
    assert "is not allowed to modify labels" in refused.stderr


def test_a_read_only_agent_is_enforced_by_the_api_server(installer: Helm, cluster: Cluster) -> None:
    read_only = ("--set", "impersonation.mode=constrained", "--set", "impersonation.verbs={get,list,watch}")
    with installer.installed(*read_only):
        cluster.grant("edit", user="oidc:editor@example.org")
        agent = (*as_agent(cluster), "--as=oidc:editor@example.org")
        assert cluster.kubectl("get", "configmaps", "-n", "default", *agent).returncode == 0
        refused = cluster.kubectl("create", "configmap", "x", "-n", "default", *agent, check=False)
        assert refused.returncode != 0
        assert "forbidden" in refused.stderr.lower()


def as_agent(cluster: Cluster) -> tuple[str, ...]:
    """Return kubectl's flags that act as the ServiceAccount itself, without a kubeconfig."""
    token = cluster.service_account_token(NAMESPACE, "arcbridge-agent")
    cluster.settle_rbac()
    return (f"--token={token}", "--kubeconfig=/dev/null", f"--server={cluster.api_url}",
            f"--certificate-authority={cluster.ca_file}")  # fmt: skip


WRITTEN = {"tls.crt": "eA=="}


def write_secret(cluster: Cluster, namespace: str) -> None:
    path = f"/api/v1/namespaces/{namespace}/secrets/arcbridge-agent"
    cluster.request("PATCH", path, {"data": WRITTEN}, content_type="application/merge-patch+json")


def read_secret(cluster: Cluster, namespace: str) -> object:
    return cluster.request("GET", f"/api/v1/namespaces/{namespace}/secrets/arcbridge-agent").get("data")


@pytest.mark.parametrize(
    ("overlay", "kind"), [("impersonation-legacy", "daemonsets"), ("dedicated-nodes", "deployments")]
)
def test_the_manifests_apply_and_apply_again(cluster: Cluster, overlay: str, kind: str) -> None:
    cluster.ensure_namespace("arcbridge")
    directory = str(ROOT / "config/kubernetes/overlays" / overlay)
    cluster.kubectl("apply", "-k", directory)
    write_secret(cluster, "arcbridge")
    again = cluster.kubectl("apply", "-k", directory).stdout
    assert "created" not in again
    assert read_secret(cluster, "arcbridge") == WRITTEN

    # A pod of the workload is admitted where Pod Security enforces "restricted"; one that asks for more is not.
    workload = cluster.request("GET", f"/apis/apps/v1/namespaces/arcbridge/{kind}/arcbridge-agent")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe"},
        "spec": workload["spec"]["template"]["spec"],
    }
    create = ("create", "--dry-run=server", "-n", "arcbridge", "-f", "-")
    assert "pod/probe created" in cluster.kubectl(*create, input=json.dumps(pod)).stdout
    pod["spec"]["hostNetwork"] = True
    assert "violates PodSecurity" in cluster.kubectl(*create, input=json.dumps(pod), check=False).stderr
    # All but the namespace, which nothing here would finish to delete.
    rendered = cluster.kubectl("kustomize", directory).stdout
    items = "\n---\n".join(one for one in rendered.split("\n---\n") if "kind: Namespace" not in one)
    cluster.kubectl("delete", "-f", "-", input=items)


def test_a_mistyped_setting_is_found_by_the_agents_own_loader(helm: Helm, tmp_path: Path) -> None:
    rendered = helm.template()
    data = rendered.one("ConfigMap")["data"]
    data["agent.toml"] = data["agent.toml"].replace("token_mode", "token_mod")
    with pytest.raises(ConfigError, match="token_mod"):
        check_settings(rendered, tmp_path)


ELEVATION = ("--set", "elevation.enabled=true,elevation.groups={oidc:operators},elevation.default=read-only")


@pytest.mark.parametrize("mode", MODES)
def test_what_may_be_lent_is_in_the_agents_role_and_settings(helm: Helm, mode: str, tmp_path: Path) -> None:
    plain = helm.template("--set", f"impersonation.mode={mode}")
    rendered = helm.template("--set", f"impersonation.mode={mode}", *ELEVATION)
    settings = check_settings(rendered, tmp_path)
    assert settings.kubernetes.impersonate_groups == (*GROUPS, "oidc:operators")
    assert (settings.elevation.groups, settings.elevation.default) == (("oidc:operators",), "read-only")
    check_labels(rendered)
    more = [rule for rule in rendered.rules() if rule not in plain.rules()]
    own = [rule for rule in more if rule["apiGroups"] == ["access.arcbridge.io"]]
    assert sorted((tuple(rule["resources"]), tuple(rule["verbs"])) for rule in own) == [
        (("accessrequests",), ("create",)), (("accessrequests/status",), ("patch",)),
        (("accessrules", "accessrequests"), ("list", "watch")),
    ]  # fmt: skip
    groups, attributes = (rule for rule in more if rule not in own)
    assert groups["resourceNames"] == [*GROUPS, "oidc:operators"]
    assert "userextras/arcbridge.io/elevated" in attributes["resources"]
    policies = {one["metadata"]["name"] for one in rendered.of("ValidatingAdmissionPolicy")}
    bound = {one["spec"]["policyName"] for one in rendered.of("ValidatingAdmissionPolicyBinding")}
    names = {f"{NAMESPACE}.arcbridge-agent.{name}" for name in ("requests", "decisions", "rules")}
    assert policies == bound == names | {f"{NAMESPACE}.arcbridge-agent"}
    assert {one["spec"]["names"]["kind"] for one in rendered.of("CustomResourceDefinition")} == {
        "AccessRule", "AccessRequest"
    }  # fmt: skip
    assert not any("access.arcbridge.io" in str(one) for one in plain.objects), "only on demand"


def lending(rendered: Rendered) -> list[str]:
    """Return what is made for elevation, by the names of the manifests and without labels."""
    named = re.compile(r"\w+([.:]arcbridge-agent[.:])")
    objects = [one for one in rendered.objects if one["kind"] == "CustomResourceDefinition"
               or named.match(one["metadata"]["name"])]  # fmt: skip
    plain = [{**one, "metadata": {**one["metadata"], "labels": None}} for one in objects]
    rules = [one for one in rendered.rules() if "access.arcbridge.io" in str(one) or "uids" in str(one)]
    texts = [json.dumps(one, sort_keys=True) for one in (*plain, *rules)]
    return sorted(named.sub(r"arcbridge\1", text).replace(ACCOUNT, "system:serviceaccount:arcbridge:arcbridge-agent")
                  for text in texts)  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_the_manifests_lend_as_the_chart_does(helm: Helm, mode: str, tmp_path: Path) -> None:
    place = os.path.relpath(ROOT / "config/kubernetes", tmp_path.resolve())
    variant = {"resources": [f"{place}/overlays/impersonation-{mode}"], "components": [f"{place}/components/elevation"]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(variant))
    manifests = built(tmp_path)
    check_labels(manifests)
    made = lending(manifests)
    assert made == lending(helm.template("--set", f"impersonation.mode={mode}", *ELEVATION))
    assert len(made) == 2 + 3 + 3 + 2 + 4  # definitions, policies, bindings, roles; rules of the account
    (groups,) = [rule for rule in manifests.rules() if rule.get("resources") == ["groups"]]
    assert groups["resourceNames"] == ["oidc:developers", "oidc:operators"]


def test_elevation_of_an_agent_that_is_no_pod_knows_its_account(helm: Helm) -> None:
    """Else the policy lets nobody begin what is approved."""
    for named, account in (("", f"system:serviceaccount:{NAMESPACE}:arcbridge-agent"), ("edge@example.org",) * 2):
        settings = ("--set", f"elevation.account={named}")
        policies = helm.template(*ELEVATION, *settings).of("ValidatingAdmissionPolicy")
        (decisions,) = [one for one in policies if one["metadata"]["name"].endswith(".decisions")]
        assert f"variables.me == '{account}'" in str(decisions["spec"]["validations"][-1]["expression"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("elevation.enabled=true", "elevation.groups: empty"),
        ("elevation.enabled=true,elevation.groups={system:masters}", "elevation"),
        ("elevation.enabled=true,elevation.groups={*}", "elevation"),
        ("elevation.enabled=true,elevation.groups={a},elevation.default=none", "elevation"),
    ],
)
def test_elevation_that_cannot_work_is_named(helm: Helm, settings: str, words: str) -> None:
    assert words in helm.refusal("--set", settings)


def test_elevation_needs_the_policies_of_the_api_server(helm: Helm) -> None:
    assert "from 1.30 on" in helm.refusal(*ELEVATION, "--kube-version", "1.29.9")


def second_release(installer: Helm) -> subprocess.CompletedProcess[str]:
    """Install the chart with elevation once more, by other names."""
    command = ("install", "second", str(CHART), "--namespace", "other", "--create-namespace", "-f", str(VALUES))
    return installer.run(*command, "--wait=hookOnly", *ELEVATION, check=False)


def test_elevation_is_installed_and_leaves_its_record(installer: Helm, cluster: Cluster) -> None:
    """By a real Helm: the definitions come before the policies that need them."""
    with installer.installed(*ELEVATION):
        names = cluster.kubectl("get", "crd,validatingadmissionpolicy", "-o", "name").stdout
        assert "accessrequests.access.arcbridge.io" in names
        assert f"{NAMESPACE}.arcbridge-agent.decisions" in names
        installer.upgrade(*ELEVATION)
        refused = second_release(installer)
        assert refused.returncode != 0
        assert f"one release of a cluster can have elevation, and in this one the release {NAMESPACE}" in refused.stderr
    assert "access.arcbridge.io" in cluster.kubectl("get", "crd", "-o", "name").stdout, (
        "with the record of who had what"
    )
    assert "arcbridge-agent.decisions" not in cluster.kubectl("get", "validatingadmissionpolicy", "-o", "name").stdout
    (take_over,) = re.findall(r"kubectl (annotate .*)", second_release(installer).stderr)
    cluster.kubectl(*take_over.split())
    assert second_release(installer).returncode == 0
    installer.run("uninstall", "second", "--namespace", "other")
    cluster.kubectl("delete", "crd", "accessrules.access.arcbridge.io", "accessrequests.access.arcbridge.io")
