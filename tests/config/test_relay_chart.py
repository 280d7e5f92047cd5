"""The relay's chart: linted, rendered, and what it renders checked by the relay's own `config check`.

tests/e2e/test_relay_chart.py installs it."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from arcbridge.identity.policy import Policy
from arcbridge.settings import config
from arcbridge.settings.config_loader import load
from tests.support.cluster import Unavailable
from tests.support.cluster import helm as helm_binary
from tests.support.processes import require_or_skip

from .helm import RELAY, ROOT, Helm
from .rendered import Rendered, check_relay, egress_ports, relay_settings, run_config_check
from .test_manifests import built

EXAMPLES = sorted((RELAY / "examples").iterdir())
FLEET = RELAY / "examples/fleet.yaml"
Values = dict[str, Any]

pytestmark = pytest.mark.timeout(300)  # Helm is built the first time


@pytest.fixture
def helm(tmp_path: Path) -> Helm:
    try:
        return Helm(helm_binary(), tmp_path, chart=RELAY)
    except Unavailable as error:
        require_or_skip("helm", str(error))


def render(helm: Helm, directory: Path, values: Values, *arguments: str) -> Rendered:
    (directory / "values.yaml").write_text(yaml.safe_dump(values))
    return helm.template("-f", str(directory / "values.yaml"), *arguments)


def make_ca(directory: Path) -> dict[str, bytes]:
    """Make a CA with the command that examples/fleet.yaml has for it."""
    (command,) = re.findall(r"^#\s+(openssl (?:.*\\\n)*.*)$", FLEET.read_text(), re.MULTILINE)
    directory.mkdir(exist_ok=True)
    subprocess.run(
        ["sh", "-c", command.replace("\n#", "\n")], cwd=directory, check=True, capture_output=True, timeout=30
    )
    return {name: (directory / name).read_bytes() for name in ("ca.crt", "ca.key")}


def test_lint(helm: Helm) -> None:
    for example in ((), *(("-f", str(path)) for path in EXAMPLES)):
        command = ("lint", str(RELAY), "--strict", "-f", str(RELAY / "ci/values.yaml"), *example)
        assert "0 chart(s) failed" in helm.run(*command).stdout


def test_one_relay(helm: Helm, tmp_path: Path) -> None:
    rendered = helm.template()
    check_relay(rendered)
    done = run_config_check(rendered, tmp_path)
    assert done.returncode == 0, done.stderr
    (claim,) = rendered.workload()["spec"]["volumeClaimTemplates"]
    assert claim["spec"] == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "2Gi"}}}
    service = rendered.of("Service")[0]["spec"]
    assert (service["type"], service["externalTrafficPolicy"], service["ports"][0]["port"]) == (
        "LoadBalancer", "Local", 443,
    )  # fmt: skip
    assert egress_ports(rendered) == {53, 443, 8443}


def test_the_manifests_are_what_the_chart_makes_of_its_defaults(helm: Helm) -> None:
    def comparable(rendered: Rendered) -> dict[str, Any]:
        found: dict[str, Any] = {"settings": {**relay_settings(rendered), "public_address": ""}}
        for item in rendered.objects:
            hook = "helm.sh/hook" in item["metadata"].get("annotations", ())
            if item["kind"] not in ("ConfigMap", "Namespace") and not hook:
                found[f"{item['kind']} {item['metadata']['name']}"] = {**item, "metadata": {}}
        text = yaml.safe_dump(found)
        text = re.sub(r"name: arcbridge-relay(-settings-\w+)?$", "name: settings", text, flags=re.MULTILINE)
        # What names the tool, and the application by its release.
        text = re.sub(
            r".*(app.kubernetes.io/(managed-by|version|instance)|helm.sh/chart|checksum/config): .*\n", "", text
        )
        return dict(yaml.safe_load(text))

    manifests, chart = comparable(built(ROOT / "config/kubernetes/relay")), comparable(helm.template())
    for name in (
        "agent_certificate_life",
        "max_token_lifetime",
        "policy_hold",
        "policy_share",
        "proof",
        "recovery_wait",
    ):
        del chart["settings"][name]  # at their defaults, which another test compares
    del chart["settings"]["workers"], chart["settings"]["observe"]["log_level"]
    assert chart == manifests


def test_its_values_are_the_relays_own_defaults(helm: Helm, tmp_path: Path) -> None:
    (tmp_path / "relay.toml").write_text(helm.template().of("ConfigMap")[0]["data"]["relay.toml"])
    settings, default = load(config.RelayConfig, tmp_path / "relay.toml"), config.RelayConfig()
    its_own = {"listen", "public_address", "data_dir", "authentication", "policy", "audit", "observe"}
    for field in fields(default):
        if field.name not in its_own:
            assert getattr(settings, field.name) == getattr(default, field.name), field.name
    assert settings.audit.keep_bytes == default.audit.keep_bytes


def test_a_fleet(helm: Helm, tmp_path: Path) -> None:
    rendered = helm.template("-f", str(FLEET))
    check_relay(rendered, replicas=3)
    secrets = {"arcbridge-nats": {"nats.creds": b"-----BEGIN NATS USER JWT-----\nx\n------END NATS USER JWT------\n"}}
    done = run_config_check(rendered, tmp_path, secrets=secrets)
    assert done.returncode == 0, done.stderr
    assert "nats.creds does not exist" in run_config_check(rendered, tmp_path / "without").stderr
    refused = run_config_check(rendered, tmp_path, {"POD_NAME": "no name"}, secrets)
    assert re.search(r"fleet.*no name", refused.stderr), "each relay has the name of its pod"
    environment = {one["name"]: one.get("value") for one in rendered.workload()["spec"]["template"]["spec"][
        "containers"][0]["env"]}  # fmt: skip
    assert environment["ARCBRIDGE_FLEET_NAME"] == "$(POD_NAME)"
    peers = rendered.workload()["spec"]["serviceName"]
    assert environment["ARCBRIDGE_FLEET_INTERNAL_ADDRESS"] == f"$(POD_NAME).{peers}.remote.svc:8443"
    assert relay_settings(rendered)["fleet"]["replicas"] == 3
    assert {4222, 8443} <= egress_ports(rendered)


def copy_ca(rendered: Rendered, directory: Path) -> subprocess.CompletedProcess[str]:
    """Run the init container that brings the CA to the volume, with `directory` in place of /."""
    init = rendered.workload()["spec"]["template"]["spec"]["initContainers"][0]
    script = re.sub(r"(?<==)/(run|var)", rf"{directory}/\1", init["args"][0])
    (directory / "var/lib/arcbridge").mkdir(parents=True, exist_ok=True)
    command = [*init["command"], script]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_the_ca_of_a_secret_comes_to_a_volume_that_has_none(helm: Helm, tmp_path: Path) -> None:
    rendered = helm.template("-f", str(FLEET))
    secret, data = tmp_path / "run/secrets/arcbridge-ca", tmp_path / "var/lib/arcbridge/data"
    secret.mkdir(parents=True)
    refused = copy_ca(rendered, tmp_path)
    assert refused.returncode == 1
    assert "error: the Secret arcbridge-relay-ca needs the keys ca.crt and ca.key" in refused.stderr
    ca, other = make_ca(tmp_path / "one"), make_ca(tmp_path / "other")
    for name in ca:
        (secret / name).write_bytes(ca[name])
    for _ in range(2):  # a pod that starts again finds it there
        assert copy_ca(rendered, tmp_path).returncode == 0
        assert {path.name: path.read_bytes() for path in data.iterdir()} == ca
    assert (data / "ca.key").stat().st_mode & 0o777 == 0o600
    assert run_config_check(helm.template(), tmp_path).returncode == 0, "the relay reads a CA that openssl has made"

    for name in other:
        (secret / name).write_bytes(other[name])
    refused = copy_ca(rendered, tmp_path)
    assert refused.returncode == 1
    assert "error: the volume has another CA than the Secret arcbridge-relay-ca" in refused.stderr
    assert (data / "ca.crt").read_bytes() == ca["ca.crt"]
    # Where it was rotated since, the volume is ahead.
    (data / "ca-rotation.json").write_text("{}")
    assert copy_ca(rendered, tmp_path).returncode == 0
    assert (data / "ca.crt").read_bytes() == ca["ca.crt"]
    # A pod that was killed while it copied begins anew, and a Secret of a rotated CA brings that along.
    shutil.rmtree(data)
    data.mkdir()
    (data / "ca.key").write_bytes(ca["ca.key"])
    (secret / "ca-rotation.json").write_text("{}")
    assert copy_ca(rendered, tmp_path).returncode == 0
    assert {path.name: path.read_bytes() for path in data.iterdir()} == {**other, "ca-rotation.json": b"{}"}


def test_i8_one_container_alone_has_the_secret(helm: Helm) -> None:
    """docs/threats.md#I8"""
    pod = helm.template("-f", str(FLEET)).workload()["spec"]["template"]["spec"]
    (secret,) = [volume["name"] for volume in pod["volumes"] if "arcbridge-relay-ca" in str(volume)]
    containers = (*pod["initContainers"], *pod["containers"])
    assert [one["name"] for one in containers if secret in str(one["volumeMounts"])] == ["ca"]


def test_a_certificate_of_another_ca(helm: Helm, tmp_path: Path) -> None:
    """The keys of its Secret are those of cert-manager, and a directory brings renewed ones."""
    rendered = helm.template("-f", str(RELAY / "examples/certificate.yaml"))
    check_relay(rendered)
    authority = trustme.CA()
    for host, fits in (("relay.test", True), ("other.test", False)):
        leaf = authority.issue_cert(host)
        pair = {"tls.crt": leaf.cert_chain_pems[0].bytes(), "tls.key": leaf.private_key_pem.bytes()}
        done = run_config_check(rendered, tmp_path, secrets={"arcbridge-relay-tls": pair})
        assert done.returncode == 0, done.stderr
        assert ("is not for relay.test" not in done.stderr) == fits, "the Secret's files are what is checked"
    mounts = rendered.workload()["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert not [mount for mount in mounts if "subPath" in mount]


def test_proxy_protocol(helm: Helm, tmp_path: Path) -> None:
    rendered = helm.template("-f", str(RELAY / "examples/proxy-protocol.yaml"))
    assert relay_settings(rendered)["proxy_protocol_from"] == ["10.0.0.0/20"]
    assert run_config_check(rendered, tmp_path).returncode == 0
    service = rendered.of("Service")[0]
    assert service["spec"]["loadBalancerClass"] == "service.k8s.aws/nlb"
    assert len(service["metadata"]["annotations"]) == 3


def test_the_service(helm: Helm, tmp_path: Path) -> None:
    values: Values = {"publicAddress": "[2001:db8::1]:8443", "service": {
        "nodePort": 30443, "externalTrafficPolicy": "Cluster", "loadBalancerSourceRanges": ["192.0.2.0/24"],
        "ipFamilyPolicy": "PreferDualStack"}}  # fmt: skip
    service = render(helm, tmp_path, values).of("Service")[0]["spec"]
    assert service["ports"] == [
        {"name": "relay", "protocol": "TCP", "port": 8443, "targetPort": "relay", "nodePort": 30443}
    ]
    assert service["loadBalancerSourceRanges"] == ["192.0.2.0/24"]
    assert (service["externalTrafficPolicy"], service["ipFamilyPolicy"]) == ("Cluster", "PreferDualStack")
    values["service"] |= {"type": "ClusterIP", "nodePort": None, "port": 443}
    service = render(helm, tmp_path, values).of("Service")[0]["spec"]
    assert service["ports"][0]["port"] == 443
    assert not {"externalTrafficPolicy", "loadBalancerSourceRanges"} & set(service), "which Kubernetes would refuse"


def test_every_value_in_use(helm: Helm, tmp_path: Path) -> None:
    values: Values = {
        "fullnameOverride": "gate", "login": {"issuer": "https://login.test", "client_id": "arcbridge", "dpop": False,
                                             "scopes": ["openid", "a<b"], "cluster_audience": "a-{cluster}"},
        "policy": {"admin": [{"users": ['oidc:o"dd'], "clusters": ["*"], "what": ["read"]}]}, "policyShare": 0,
        "policyHold": "0s", "proof": "required", "maxTokenLifetime": "2h",
        "page": {"settings": {"client_id": "board", "session": "30m", "scopes": ["openid", "groups"]},
                 "existingSecret": "board"}, "claimSources": ["https://claims.test:444"],
        "graph": {"existingSecret": "groups"}, "agentCertificateLife": "1d", "recoveryWait": "0s", "workers": 0,
        "limits": {"sessions": 7, "join_deadline": "5s", "groups": {'oidc:c"i': {"sessions": 70}},
                   "users": {"oidc:anna@example.org": {"joins_per_minute": 2}}, "actors": {"*": {"sessions": 3}}},
        "actorClients": ["ci"],
        "auditSinks": {"siem": {"kind": "http", "address": "https://c.test:8088/in", "gzip": True, "batch_records": 70,
                                "token_file": "/run/secrets/arcbridge-audit/token", "interval": "2s"},
                       "central": {"kind": "syslog", "address": "s.test"}, "output": {"kind": "stdout"}},
        "auditSpool": {"existingSecret": "siem", "bytes": 1 << 30}, "logLevel": "debug", "listenPort": 9443,
        "clientFiles": {"volume": {"persistentVolumeClaim": {"claimName": "client", "readOnly": True}}},
        "settings": '[graph.example]\ncertificate_file = "/run/secrets/arcbridge-graph/certificate.pem"\n',
        "persistence": {"size": "9Gi", "storageClass": "fast", "accessModes": ["ReadWriteOncePod"]},
        "serviceAccount": {"name": "other", "annotations": {"a": "b"}}, "image": {"digest": "sha256:" + "0" * 64},
        "imagePullSecrets": [{"name": "pull"}], "env": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "observe": {"port": 9999, "annotations": False}, "networkPolicy": {"egressPorts": [3128]},
        "podLabels": {"team": "x"}, "podAnnotations": {"note": "yes"}, "priorityClassName": "high",
        "tolerations": [{"operator": "Exists"}], "terminationGracePeriodSeconds": 60,
    }  # fmt: skip
    rendered = render(helm, tmp_path, values)
    check_relay(rendered)
    (tmp_path / "relay.toml").write_text(rendered.of("ConfigMap")[0]["data"]["relay.toml"])
    settings = load(config.RelayConfig, tmp_path / "relay.toml")
    assert (settings.listen, settings.policy_share, settings.policy_hold, settings.proof) == (":9443", 0, 0, "required")
    assert (settings.max_token_lifetime, settings.agent_certificate_life, settings.recovery_wait) == (7200, 86400, 0)
    assert (settings.workers, settings.claim_sources) == (0, ("https://claims.test:444",))
    assert (settings.login.dpop, settings.login.scopes) == (False, ("openid", "a<b"))
    assert settings.login.cluster_audience == "a-{cluster}"
    assert (settings.page.client_id, settings.page.session, settings.page.issuer) == ("board", 1800.0, "")
    assert str(settings.page.client_secret_file) == "/run/secrets/arcbridge-page/client-secret"
    assert (settings.limits.sessions, settings.limits.join_deadline, settings.limits.agents) == (7, 5.0, 10000)
    assert settings.limits.groups['oidc:c"i'].sessions == 70
    assert settings.limits.users["oidc:anna@example.org"].joins_per_minute == 2
    assert (settings.limits.actors["*"].sessions, settings.actor_clients) == (3, ("ci",))
    siem = settings.audit.sinks["siem"]
    assert (siem.gzip, siem.batch_records, siem.interval, settings.audit.keep_bytes) == (True, 70, 2.0, 1 << 30)
    assert egress_ports(rendered) == {53, 443, 444, 3128, 6514, 8088, 9443}
    pod = rendered.workload()["spec"]["template"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
    assert settings.graph["example"].certificate_file == Path(mounts["graph"]) / "certificate.pem"
    assert str(siem.token_file).startswith(f"{mounts['audit-secret']}/")
    assert settings.client.directory == Path(mounts["client"])
    (policy,) = [one["data"] for one in rendered.of("ConfigMap") if one["metadata"]["name"] == "gate-policy"]
    document, problems = Policy.inspect(policy["policy.toml"], source="policy.toml")
    assert not problems
    assert document.admins[0].rule.users == {'oidc:o"dd'}
    claim = rendered.workload()["spec"]["volumeClaimTemplates"][0]["spec"]
    assert (claim["storageClassName"], claim["resources"]["requests"]) == ("fast", {"storage": "9Gi"})
    assert pod["spec"]["containers"][0]["image"].endswith("@sha256:" + "0" * 64)
    assert pod["metadata"]["labels"]["team"] == "x"
    assert "prometheus.io/scrape" not in pod["metadata"]["annotations"]
    assert rendered.one("ServiceAccount")["metadata"]["name"] == "other"


def test_what_exists_already_is_not_made(helm: Helm, tmp_path: Path) -> None:
    values = {
        "authentication": None, "authenticationConfigMap": "issuers", "policy": None, "policyConfigMap": "rules",
        "persistence": {"existingClaim": "restored"}, "networkPolicy": {"enabled": False},
    }  # fmt: skip
    rendered = render(helm, tmp_path, values)
    check_relay(rendered)
    kinds = {"ConfigMap", "Pod", "Service", "ServiceAccount", "StatefulSet"}
    assert {item["kind"] for item in rendered.objects} == kinds
    assert [one["metadata"]["name"] for one in rendered.of("ConfigMap")] == ["arcbridge-relay", "arcbridge-relay-check"]
    spec = rendered.workload()["spec"]
    assert "volumeClaimTemplates" not in spec
    claim = {"persistentVolumeClaim": {"claimName": "restored"}, "name": "data"}
    assert claim in spec["template"]["spec"]["volumes"]
    theirs = yaml.safe_load((RELAY / "ci/values.yaml").read_text())["authentication"]
    files = {
        "issuers": {"authentication.yaml": yaml.safe_dump(theirs).encode()},
        "rules": {"policy.toml": b"allow = []"},
    }
    done = run_config_check(rendered, tmp_path, secrets=files)
    assert done.returncode == 0, done.stderr
    assert "no user may reach any cluster" in done.stderr, "which is read from their ConfigMap"


def test_a_changed_setting_rolls_the_pods_and_a_changed_policy_does_not(helm: Helm) -> None:
    def pods(*arguments: str) -> Any:
        return helm.template(*arguments).workload()["spec"]["template"]

    policy = ("--set", "policy.allow[0].groups={oidc:other}", "--set", "policy.allow[0].clusters={*}")
    assert pods() == pods(*policy) != pods("--set", "logLevel=debug")
    assert pods("--set", "policyShare=10") != pods()
    changed = {one["data"].get("policy.toml", "") for one in helm.template(*policy).of("ConfigMap")} - {""}
    assert tomllib.loads(changed.pop())["allow"][0]["groups"] == ["oidc:other"]


@pytest.mark.parametrize("values", [(), ("-f", str(FLEET)), ("-f", str(RELAY / "examples/certificate.yaml"))], ids=str)
def test_an_upgrade_is_checked_before_it_touches_a_relay(helm: Helm, values: tuple[str, ...]) -> None:
    """By the container that a start has, with its files, in a pod that no Service and no StatefulSet takes for its."""
    rendered = helm.template(*values)
    hook, template = rendered.one("Pod"), rendered.workload()["spec"]["template"]
    pod = template["spec"]
    assert hook["metadata"]["annotations"]["helm.sh/hook"] == "pre-upgrade"
    assert hook["spec"]["containers"] == pod["initContainers"][-1:]
    assert hook["spec"]["securityContext"] == pod["securityContext"]
    assert (hook["spec"]["restartPolicy"], hook["spec"]["automountServiceAccountToken"]) == ("Never", False)
    name = hook["metadata"]["name"]
    theirs = {
        "config": {"configMap": {"name": name}},
        "policy": {"configMap": {"name": name}},
        "data": {"emptyDir": {}},
    }
    same = [volume for volume in pod["volumes"] if volume["name"] not in (*theirs, "ca")]
    assert hook["spec"]["volumes"] == [*({"name": key, **theirs[key]} for key in ("config", "policy", "data")), *same]
    assert not rendered.workload()["spec"]["selector"]["matchLabels"].items() <= hook["metadata"]["labels"].items()
    files = {one["metadata"]["name"]: one["data"] for one in rendered.of("ConfigMap")}
    assert files[name] == {**files["arcbridge-relay"], **files["arcbridge-relay-policy"]}
    assert not helm.template(*values, "--set", "checkBeforeUpgrade=false").of("Pod")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("replicas=3", "replicas: several relays without fleet.servers would each have a registry and a CA"),
        ("fleet.servers={nats://n:4222}", "ca.existingSecret: the relays of a fleet share a CA"),
        ("fleet.servers={nats://n:4222},ca.existingSecret=ca,workers=4", "workers: more than one cannot be had"),
        ("persistence.enabled=false", "persistence.enabled: a relay without a fleet has its registry and its CA"),
        ("fleet.servers={nats://n},ca.existingSecret=c,replicas=2,persistence.existingClaim=c", "existingClaim: each"),
        ("authentication=null", "authentication: set either this or authenticationConfigMap"),
        ("authenticationConfigMap=x", "authentication: set either this or authenticationConfigMap"),
        ("policy.allow=null", "policy.allow: set either this or policyConfigMap"),
        ("policyConfigMap=x", "policy.allow: set either this or policyConfigMap"),
        ("auditSinks.a.kind=stdout,auditFile=-", "auditFile: auditSinks carry the records of a file on"),
    ],
)
def test_values_that_cannot_work_are_named(helm: Helm, settings: str, words: str) -> None:
    assert words in helm.refusal("--set", settings)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("publicAddress=null", "publicAddress"), ("publicAddress=", "publicAddress"),
        ("publicAddress=https://relay.test:443", "publicAddress"), ("publicAddress=relay.test", "publicAddress"),
        ("replicas=0", "replicas"), ("relay=x", "relay"), ("listenPort=443", "listenPort"),
        ("policy.allow[0].clusters=null", "clusters"), ("policy.allow[0].cluster={a}", "cluster"),
        ("policy.admin[0].users={a},policy.admin[0].clusters={a},policy.admin[0].what={all}", "what"),
        ("policy.deny[0].users={a}", "deny"), ("login.issuer=http://x", "issuer"), ("limits.sessions=-1", "sessions"),
        ("page.settings.id=x", "settings"), ("page.settings.session=1h", "client_id"),
        ("page.existingSecret=board", "client_id"), ("fleet.servers={http://n:4222}", "servers"),
        ("fleet.settings.name=x", "name"),
        ("service.type=ExternalName", "type"), ("service.loadBalancerSourceRanges={home}", "loadBalancerSourceRanges"),
        ("service.externalTrafficPolicy=local", "externalTrafficPolicy"), ("proxyProtocolFrom={lb.test}", "proxy"),
        ("tls.certificate=x", "certificate"), ("persistence.size=much", "size"), ("auditSinks.a.kind=ftp", "kind"),
        ("persistence.accessModes={ReadOnlyMany}", "accessModes"), ("terminationGracePeriodSeconds=30", "termination"),
        ("auditSpool.bytes=1", "bytes"), ("logLevel=loud", "logLevel"), ("workers=65", "workers"),
    ],
)  # fmt: skip
def test_the_schema_refuses_by_name(helm: Helm, setting: str, named: str) -> None:
    assert named in helm.refusal("--set", setting)


def test_what_helm_cannot_see_the_init_container_finds(helm: Helm, tmp_path: Path) -> None:
    rendered = helm.template("--set", "settings=[limits]\nagents_per_secnd = 3")
    done = run_config_check(rendered, tmp_path)
    assert done.returncode == 2
    assert "did you mean 'limits.agents_per_second'?" in done.stderr


@pytest.mark.parametrize(
    ("settings", "said", "unsaid"),
    [
        ((), ("status.loadBalancer.ingress[0]", "token create --cluster NAME", "everyone who reaches the Service",
              "the volume has the key", "and goes on; new commands fail meanwhile."), "until `helm rollback`"),
        (("--set", "checkBeforeUpgrade=false"), ("until `helm rollback`",), "WARNING"),
        (("--set", "service.type=NodePort"), (".spec.ports[0].nodePort",), "loadBalancer"),
        (("--set", "service.type=ClusterIP"), ("from inside of this cluster alone",), "externalTrafficPolicy"),
        (("--set", "service.externalTrafficPolicy=Cluster"), ("count all that come through a node as one",), "fleet"),
        (("--set", "service.loadBalancerSourceRanges={192.0.2.0/24}"), ("Open to 192.0.2.0/24:",), "everyone"),
        (("-f", str(FLEET)), ("Secret arcbridge-relay-ca,", "sessions resume through"), "stands still"),
        (("-f", str(FLEET), "--set", "persistence.enabled=false"), ("the audit file goes with each pod, and no",),
         "`helm uninstall` leaves"),
    ],
)  # fmt: skip
def test_notes(helm: Helm, settings: tuple[str, ...], said: tuple[str, ...], unsaid: str) -> None:
    notes = helm.notes(*settings)
    assert [words for words in said if words not in notes] == []
    assert unsaid not in notes


def test_a_fleet_without_volumes(helm: Helm) -> None:
    rendered = helm.template("-f", str(FLEET), "--set", "persistence.enabled=false")
    check_relay(rendered, replicas=3)
    volumes = {volume["name"]: volume for volume in rendered.workload()["spec"]["template"]["spec"]["volumes"]}
    assert volumes["data"]["emptyDir"]["sizeLimit"] > 1 << 30
