"""The Helm chart: linted, rendered, and installed by a real Helm against a real API server."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcbridge import __version__
from arcbridge.errors import ConfigError
from tests.support.cluster import Cluster, Unavailable
from tests.support.cluster import helm as helm_binary
from tests.support.processes import require_or_skip

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
CHART = ROOT / "config/helm/arcbridge-agent"
VALUES = CHART / "ci/values.yaml"
MODES = ("legacy", "constrained")
NAMESPACE = "remote"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:arcbridge-agent"


class Helm:
    """A real Helm with a home of its own."""

    def __init__(self, binary: Path, home: Path, kubeconfig: Path | None = None) -> None:
        self.binary = binary
        self.env = {**os.environ, "HOME": str(home), "KUBECONFIG": str(kubeconfig or home / "none"),
                    "HELM_CACHE_HOME": str(home / "cache"), "HELM_CONFIG_HOME": str(home / "config"),
                    "HELM_DATA_HOME": str(home / "data")}  # fmt: skip

    def run(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [self.binary, *args]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=90, check=False)
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    @contextmanager
    def installed(self, *settings: str) -> Iterator[str]:
        """Install the chart, give its notes, uninstall it. No node runs its pods, so Helm does not wait for them."""
        release = ("arcbridge-agent", "--namespace", NAMESPACE)
        sources = (str(CHART), "-f", str(VALUES), "--wait=hookOnly", *settings)
        try:
            yield self.run("install", *release[:1], *sources, *release[1:], "--create-namespace").stdout
        finally:
            self.run("uninstall", *release)

    def upgrade(self, *settings: str) -> None:
        release = ("arcbridge-agent", str(CHART), "--namespace", NAMESPACE, "-f", str(VALUES), "--wait=hookOnly")
        self.run("upgrade", *release, *settings)

    def template(self, *args: str) -> Rendered:
        command = ("template", "arcbridge-agent", str(CHART), "--namespace", NAMESPACE, "-f", str(VALUES), *args)
        return Rendered.parse(self.run(*command).stdout)


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
        cluster = Cluster()
    except Unavailable as error:
        require_or_skip("apiserver", str(error))
    with cluster:
        yield cluster


@pytest.fixture
def installer(binary: Path, tmp_path: Path, cluster: Cluster) -> Helm:
    return Helm(binary, tmp_path, cluster.kubeconfig)


def test_lint(helm: Helm) -> None:
    for mode in MODES:
        command = ("lint", str(CHART), "--strict", "-f", str(VALUES), "--set", f"impersonation.mode={mode}")
        assert "0 chart(s) failed" in helm.run(*command).stdout


@pytest.mark.parametrize("mode", MODES)
def test_the_chart_has_the_manifests_objects(helm: Helm, mode: str, tmp_path: Path) -> None:
    rendered = helm.template("--set", f"impersonation.mode={mode}")
    check_rules(rendered, mode)
    check_daemonset(rendered)
    check_network_policy(rendered)
    check_secret_is_empty(rendered)
    check_labels(rendered)
    settings = check_settings(rendered, tmp_path)
    assert settings.targets["database"].groups == ("oidc:database-operators",)


def test_every_value_in_use(helm: Helm, tmp_path: Path) -> None:
    values = {
        "fullnameOverride": "gate", "relayCA": "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
        "tokenMode": False, "auditFile": "", "logLevel": "debug", "observe": {"port": 9999, "annotations": False},
        "targets": {"git": {"address": "git:22", "users": ["oidc:anna\\\"quoted"]}},
        "impersonation": {"mode": "constrained", "verbs": ["get", "list", "watch"], "userExtras": ["scopes"]},
        "serviceAccount": {"name": "other", "annotations": {"a": "b"}}, "credential": {"keep": True},
        "image": {"digest": "sha256:" + "0" * 64}, "imagePullSecrets": [{"name": "pull"}],
        "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}], "priorityClassName": "high",
        "networkPolicy": {"enabled": False}, "podLabels": {"team": "x"}, "podAnnotations": {"note": "yes"},
        "tolerations": [{"operator": "Exists"}], "affinity": {"nodeAffinity": {}}, "terminationGracePeriodSeconds": 90,
    }  # fmt: skip
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values))
    rendered = helm.template("-f", str(tmp_path / "values.yaml"))
    settings = check_settings(rendered, tmp_path)
    assert settings.targets["git"].users == ('oidc:anna\\"quoted',)
    assert (settings.token_mode, settings.audit.file, settings.observe.log_level) == (False, "", "debug")
    assert settings.relay_ca_file == tmp_path / "relay-ca.pem"
    assert (tmp_path / "relay-ca.pem").read_text().startswith("-----BEGIN CERTIFICATE-----\nMIIB\n")
    verbs = {verb for rule in rendered.rules() if rule.get("resources") == ["*"] for verb in rule["verbs"]}
    assert verbs == {f"impersonate-on:user-info:{verb}" for verb in ("get", "list", "watch")}
    assert any("userextras/scopes" in rule.get("resources", ()) for rule in rendered.rules())
    assert rendered.one("ServiceAccount")["metadata"]["name"] == "other"
    assert rendered.one("Secret")["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    assert not rendered.of("NetworkPolicy")
    pod = rendered.one("DaemonSet")["spec"]["template"]
    assert pod["spec"]["containers"][0]["image"].endswith("@sha256:" + "0" * 64)
    assert pod["metadata"]["labels"]["team"] == "x"
    assert "prometheus.io/scrape" not in pod["metadata"]["annotations"]


def test_what_exists_already_is_not_made(helm: Helm) -> None:
    rendered = helm.template(
        "--set", "serviceAccount.create=false,rbac.create=false", "--set", "credential.existingSecret=theirs",
        "--set", "joinToken.existingSecret=", "--set", "authentication=null",
    )  # fmt: skip
    assert {item["kind"] for item in rendered.objects} == {"ConfigMap", "DaemonSet", "NetworkPolicy"}
    pod = rendered.one("DaemonSet")["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "default"
    assert "join-token" not in str(pod)
    text = rendered.one("ConfigMap")["data"]["agent.toml"]
    assert f'secret = "{NAMESPACE}/theirs"' in text
    assert "join_token_file" not in text


def test_a_changed_setting_rolls_the_pods(helm: Helm) -> None:
    def checksum(*args: str) -> str:
        template = helm.template(*args).one("DaemonSet")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/config"])

    assert checksum() == checksum() != checksum("--set", "logLevel=debug")


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("relays=null", "relays"), ("relays={http://relay}", "relays"), ("relayCAPin=sha256:12", "relayCAPin"),
        ("relay=x", "relay"), ("joinToken.value=secret", "value"), ("impersonation.mode=both", "mode"),
        ("terminationGracePeriodSeconds=30", "terminationGracePeriodSeconds"), ("targets.x.address=a:1", "targets"),
        ("impersonation.verbs={*}", "verbs"), ("logLevel=loud", "logLevel"),
    ],
)  # fmt: skip
def test_the_schema_refuses_by_name(helm: Helm, setting: str, named: str) -> None:
    command = ("template", "x", str(CHART), "-f", str(VALUES), "--set", setting)
    done = helm.run(*command, check=False)
    assert done.returncode != 0
    assert named in done.stderr


def test_the_schema_knows_every_value() -> None:
    def names(node: Any, path: str = "") -> set[str]:
        return {path} | {name for key, child in node.items() for name in names(child, f"{path}.{key}")} if (
            isinstance(node, dict) and node) else {path}  # fmt: skip

    def declared(schema: dict[str, Any], path: str = "") -> set[str]:
        children = schema.get("properties", {}).items()
        return {path} | {name for key, child in children for name in declared(child, f"{path}.{key}")}

    schema = json.loads((CHART / "values.schema.json").read_text())
    open_ended = (".nodeSelector.", ".resources.")
    values = {
        name for name in names(yaml.safe_load((CHART / "values.yaml").read_text())) if not name.startswith(open_ended)
    }
    assert values <= declared(schema)


def test_versions_agree() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == __version__


def can(cluster: Cluster, *question: str) -> bool:
    done = cluster.kubectl("auth", "can-i", *question, f"--as={ACCOUNT}", check=False)
    answer = done.stdout.strip().splitlines()[0] if done.stdout.strip() else done.stderr
    assert answer in ("yes", "no", "no - no RBAC policy matched"), done.stderr
    return answer == "yes"


def left_over(cluster: Cluster) -> set[str]:
    kinds = "serviceaccounts,secrets,configmaps,daemonsets,networkpolicies,roles,rolebindings,clusterroles"
    kinds += ",clusterrolebindings"
    done = cluster.kubectl("get", kinds, "-n", NAMESPACE, "-l", "app.kubernetes.io/part-of=arcbridge", "-o", "name")
    return set(done.stdout.split())


@pytest.mark.parametrize("mode", MODES)
def test_install_rights_upgrade_uninstall(installer: Helm, cluster: Cluster, mode: str) -> None:
    mode_set = ("--set", f"impersonation.mode={mode}")
    with installer.installed(*mode_set) as notes:
        assert "https://relay.example.org:443" in notes
        assert "kubectl -n remote create secret generic arcbridge-join-token" in notes
        assert ("would void the constraint" in notes) == (mode == "constrained")
        assert len(left_over(cluster)) == 9
        cluster.settle_rbac()
        check_own_rights(cluster)
        check_impersonation(cluster, mode)

        # What the agent wrote into its Secret survives an upgrade, and the settings change.
        write_secret(cluster, NAMESPACE)
        installer.upgrade(*mode_set, "--set", "logLevel=debug")
        assert read_secret(cluster, NAMESPACE) == WRITTEN
        settings = cluster.request("GET", f"/api/v1/namespaces/{NAMESPACE}/configmaps/arcbridge-agent")
        assert 'log_level = "debug"' in settings["data"]["agent.toml"]
    assert left_over(cluster) == set()


def check_own_rights(cluster: Cluster) -> None:
    """The agent may use its own Secret and access reviews, and nothing else."""
    own = ("secrets/arcbridge-agent", "-n", NAMESPACE)
    verbs = ("get", "update", "watch", "list", "patch", "delete", "create")
    assert [verb for verb in verbs if can(cluster, verb, *own)] == ["get", "update", "watch"]
    for verb in ("get", "list", "create", "update", "delete"):
        for resource in ("pods", "configmaps", "clusterroles.rbac.authorization.k8s.io"):
            assert not can(cluster, verb, resource, "-n", NAMESPACE), f"{verb} {resource}"
    assert not can(cluster, "get", "secrets", "-n", NAMESPACE)
    assert not can(cluster, "get", "secrets/another", "-n", NAMESPACE)
    assert not can(cluster, "get", "secrets/arcbridge-agent", "-n", "default")
    assert not can(cluster, "create", "pods/exec", "-n", NAMESPACE)
    assert not can(cluster, "*", "*")
    assert not can(cluster, "escalate", "clusterroles.rbac.authorization.k8s.io")
    assert not can(cluster, "create", "tokenreviews.authentication.k8s.io")
    assert can(cluster, "create", "subjectaccessreviews.authorization.k8s.io")


def check_impersonation(cluster: Cluster, mode: str) -> None:
    """One kind or the other, never both. kubectl cannot ask for resources that discovery does not list: reviews do."""

    def allowed(verb: str, group: str, resource: str, subresource: str = "") -> bool:
        asked = {"verb": verb, "group": group, "resource": resource, "subresource": subresource, "name": "x"}
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{NAMESPACE}", "system:authenticated"]
        review = {"spec": {"user": ACCOUNT, "groups": groups, "resourceAttributes": asked}}
        answer = cluster.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
        return bool(answer["status"]["allowed"])

    own = "authentication.k8s.io"
    extra = (own, "userextras", "arcbridge.io/original-user")
    for attributes in (("", "users"), ("", "groups"), ("", "serviceaccounts"), (own, "uids"), extra):
        assert allowed("impersonate", *attributes) == (mode == "legacy"), attributes
    for attributes in ((own, "users"), (own, "groups"), (own, "uids"), extra):
        assert allowed("impersonate:user-info", *attributes) == (mode == "constrained"), attributes
    assert not allowed("impersonate", own, "userextras", "another")
    assert not allowed("impersonate:user-info", own, "userextras", "another")
    assert not allowed("impersonate:serviceaccount", own, "serviceaccounts")
    assert allowed("impersonate-on:user-info:delete", "apps", "deployments") == (mode == "constrained")
    assert not allowed("delete", "apps", "deployments")


@pytest.mark.parametrize("mode", MODES)
def test_the_account_impersonates_and_has_no_rights_of_its_own(installer: Helm, cluster: Cluster, mode: str) -> None:
    """Requests with the ServiceAccount's own token show the same as the reviews, with and without impersonation."""
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

        for command in (("get", "pods"), ("get", "secrets"), ("delete", "pod", "x"), ("get", "nodes")):
            alone = cluster.kubectl(*command, "-n", "default", *agent, check=False)
            assert f'User "{ACCOUNT}" cannot' in alone.stderr, command


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


def test_the_manifests_apply_and_apply_again(cluster: Cluster) -> None:
    overlay = str(ROOT / "config/kubernetes/overlays/impersonation-legacy")
    cluster.kubectl("apply", "-k", overlay)
    write_secret(cluster, "arcbridge")
    again = cluster.kubectl("apply", "-k", overlay).stdout
    assert "created" not in again
    assert read_secret(cluster, "arcbridge") == WRITTEN

    # A pod of the DaemonSet is admitted where Pod Security enforces "restricted"; one that asks for more is not.
    daemonset = cluster.request("GET", "/apis/apps/v1/namespaces/arcbridge/daemonsets/arcbridge-agent")
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe"},
        "spec": daemonset["spec"]["template"]["spec"],
    }
    create = ("create", "--dry-run=server", "-n", "arcbridge", "-f", "-")
    assert "pod/probe created" in cluster.kubectl(*create, input=json.dumps(pod)).stdout
    pod["spec"]["hostNetwork"] = True
    assert "violates PodSecurity" in cluster.kubectl(*create, input=json.dumps(pod), check=False).stderr
    cluster.kubectl("delete", "-k", overlay, "--wait=false")


def test_a_mistyped_setting_is_found_by_the_agents_own_loader(helm: Helm, tmp_path: Path) -> None:
    rendered = helm.template()
    data = rendered.one("ConfigMap")["data"]
    data["agent.toml"] = data["agent.toml"].replace("token_mode", "token_mod")
    with pytest.raises(ConfigError, match="token_mod"):
        check_settings(rendered, tmp_path)
