"""Relays as they run in a cluster: Helm installs their chart, a node runs their pods with volumes, probes and security
context, a Service leads to them, and an agent in a pod and kubectl go through them while they are replaced."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.config.helm import AGENT, RELAY, ROOT
from tests.config.test_relay_chart import EXAMPLES, make_ca
from tests.e2e.test_daemonset import MINUTES, Place, kubectl_of, place
from tests.e2e.test_rollouts import took
from tests.e2e.test_survival_kubectl import Ticks
from tests.support.nats_server import NatsServer
from tests.support.processes import ManagedProcess
from tests.support.reports import until
from tests.support.world import ALICE, BOB, CLUSTER, RELAY_AUDIENCE

NAMESPACE = "relays"
RUN = ROOT / "docs/run.md"
POD_MONITOR = "monitoring.coreos.com/v1/PodMonitor"
FIELDS = {
    "jobLabel": {"type": "string"},
    "selector": {"type": "object", "properties": {"matchLabels": {"type": "object", "additionalProperties": {
        "type": "string"}}}},
    "podMetricsEndpoints": {"type": "array", "items": {"type": "object", "properties": {
        "port": {"type": "string"}, "path": {"type": "string"}, "interval": {"type": "string"}}}},
}  # fmt: skip
"""The fields of the Prometheus Operator's PodMonitor that the charts use; a strict API server refuses any other."""


class Relays:
    """A release of the relay's chart."""

    def __init__(self, here: Place, name: str, **values: object) -> None:
        self._here = here
        self._name = name
        issuer_port = int(here.world.issuer.url.rpartition(":")[2].partition("/")[0])
        self._values = {
            "publicAddress": f"127.0.0.1:{here.world.relay_port}",
            "authentication": json.loads(here.world.authentication(RELAY_AUDIENCE)),
            "policy": {"allow": [{"groups": list(ALICE.groups), "clusters": ["*"]}]},
            "podAnnotations": {"node.test/host-ports": f"{here.world.relay_port},{issuer_port}"},
            **values,
        }
        self._file = here.world.directory / f"{name}.json"

    def does(self, verb: str, *, wait: str = "--wait", check: bool = True, **changes: object) -> str:
        """Install or upgrade, and return when all pods are ready, with what Helm says."""
        self._file.write_text(json.dumps({**self._values, **changes}))
        where = ("--namespace", NAMESPACE, "-f", str(self._file), wait, MINUTES)
        done = self._here.helm.run(verb, self._name, str(RELAY), *where, check=check, timeout=320)
        assert check or done.returncode != 0, done.stdout
        return done.stdout + done.stderr

    def helm(self, verb: str, *words: str) -> None:
        self._here.helm.run(verb, self._name, *words, "--namespace", NAMESPACE, "--wait", MINUTES, timeout=320)

    def kubectl(self, *words: str) -> str:
        return self._here.cluster.kubectl("--namespace", NAMESPACE, *words, timeout=320).stdout

    def arcbridge(self, *words: str, pod: str = "") -> str:
        """Run an operator's command in a pod, as the chart's notes say it."""
        where = pod or f"statefulset/{self._name}"
        return self.kubectl("exec", where, "-c", "relay", "--", "arcbridge", "--role", "relay", *words)

    def pods(self) -> dict[str, dict[str, Any]]:
        """The relays by their uid."""
        relays = f"labelSelector=app.kubernetes.io/name=arcbridge-relay,app.kubernetes.io/instance={self._name}"
        found = self._here.cluster.request("GET", f"/api/v1/namespaces/{NAMESPACE}/pods?{relays}")["items"]
        return {pod["metadata"]["uid"]: pod for pod in found}

    def kept(self) -> tuple[str, list[str]]:
        """What the volume has: the pin of the CA, and the clusters of the registry."""
        token = json.loads(self.arcbridge("token", "create", "--cluster", "unused", "-o", "json"))
        return token["relay_ca_pin"], self.arcbridge("cluster", "list", "-o", "name").split()

    def has_agent(self) -> bool:
        return any(row["agents"] for row in json.loads(self.arcbridge("cluster", "list", "-o", "json")))


def test_nothing_of_it_is_refused(here: Place) -> None:
    """An API server validates all that the charts render, in a namespace for restricted pods."""
    names = {"group": "monitoring.coreos.com", "scope": "Namespaced", "names": {
        "plural": "podmonitors", "singular": "podmonitor", "kind": "PodMonitor"}}  # fmt: skip
    schema = {"type": "object", "properties": {"spec": {"type": "object", "properties": FIELDS}}}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    definition = {"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
                  "metadata": {"name": "podmonitors.monitoring.coreos.com"}}  # fmt: skip
    here.cluster.apply({**definition, "spec": {**names, "versions": [version]}})
    here.cluster.kubectl("wait", "--for=condition=Established", "crd/podmonitors.monitoring.coreos.com")
    fleet = (*("-f", str(RELAY / "examples/fleet.yaml")), "--set", "persistence.enabled=false,service.type=ClusterIP")
    examples = tuple(word for example in EXAMPLES for word in ("-f", str(example)))
    variants = {"one": (RELAY, ()), "examples": (RELAY, examples), "fleet": (RELAY, fleet), "agent": (AGENT, ()),
                "nodes": (RELAY, ("--set", "service.type=NodePort"))}  # fmt: skip
    monitor = ("--set", "observe.podMonitor.enabled=true", "--api-versions", POD_MONITOR)
    text = ""
    for name, (chart, words) in variants.items():
        where = ("--namespace", NAMESPACE, "-f", str(chart / "ci/values.yaml"))
        text += here.helm.run("template", name, str(chart), *where, *words, *monitor).stdout
    command = ("create", "--namespace", NAMESPACE, "--dry-run=server", "--validate=strict", "-f", "-")
    done = here.cluster.kubectl(*command, input=text)
    assert done.stdout.count("podmonitor.monitoring.coreos.com/") == len(variants)
    assert done.stderr == "", "no warning, of Pod Security's neither"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One cluster for all of it, and an issuer. Pods have the executable in their PATH, as the image has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        with place(tmp_path_factory.mktemp("relays"), "legacy", relay=False) as found:
            found.cluster.ensure_namespace(NAMESPACE)
            found.cluster.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted",
                                  "pod-security.kubernetes.io/warn=restricted")  # fmt: skip
            yield found


@pytest.mark.timeout(600)
def test_a_relay_is_installed_upgraded_rolled_back_and_removed_under_a_session(here: Place) -> None:
    relay = Relays(here, "arcbridge-relay", service={"nodePort": here.world.relay_port})
    relay.does("install")
    (first,) = relay.pods()
    token = json.loads(relay.arcbridge("token", "create", "--cluster", CLUSTER, "-o", "json"))
    here.world.relay_pin = token["relay_ca_pin"]
    here.keep_join_token(token["token"])
    here.helm_does("install")
    client = here.world.start_client(ALICE)
    alice = kubectl_of(here, client)
    here.cluster.add_pod("ticks", command=("sh", "-c", Ticks.SCRIPT), env={"STOP": "/stop"})
    with closing(Work(alice.start("logs", "-f", "ticks"), client.process)) as session:
        session.ticks.wait_moves()
        kept = relay.kept()
        assert kept == (here.world.relay_pin, [CLUSTER])

        # A changed setting: the old pod drains, the next one finds the volume, and the session goes on.
        began = time.monotonic()
        relay.does("upgrade", logLevel="debug")
        took(began, "upgrade of a relay with a session")
        (second,) = relay.pods()
        assert second != first
        session.ticks.wait_moves()
        took(began, "until kubectl goes on")
        assert relay.kept() == kept
        assert alice.run("get", "namespaces", "-o", "name", timeout=90).stdout

        # A changed policy: no pod is replaced, and it counts.
        assert CLUSTER not in here.world.run_client(BOB, "clusters", "-o", "name").stdout
        policy = {"allow": [{"users": [ALICE.email, BOB.email], "clusters": ["*"]}]}
        relay.does("upgrade", logLevel="debug", policy=policy)
        until(lambda: CLUSTER in here.world.run_client(BOB, "clusters", "-o", "name").stdout, "the policy", timeout=60)

        # A mistake ends the upgrade, in the words of the check, and the relay that serves is not touched.
        mistake = "[limits]\nagents_per_secnd = 3"
        assert "did you mean 'limits.agents_per_second'?" in relay.does("upgrade", check=False, settings=mistake)
        assert list(relay.pods()) == [second]
        session.ticks.wait_moves()
        here.cluster.kubectl("exec", "ticks", "--", "touch", "/stop")
        session.ticks.check()

    # From here on without a session, for which a relay that is alone waits when it ends. Without that check a mistake
    # stops at the init container, and the way back needs no other hand.
    relay.does("upgrade", wait="--wait=hookOnly", checkBeforeUpgrade=False, settings=mistake)
    until(lambda: second not in relay.pods() and relay.pods(), "the next pod", timeout=90)
    until(lambda: "agents_per_second'?" in config_check(relay), "the init container says why", timeout=60)
    relay.helm("rollback", "3")
    assert relay.kept() == kept

    # What is left of an uninstalled relay is its volume, which the next one of its name finds.
    relay.helm("uninstall")
    until(lambda: not relay.pods(), "the pod is gone", timeout=60)
    kinds = "statefulsets,services,configmaps,secrets,serviceaccounts,networkpolicies,persistentvolumeclaims"
    left = relay.kubectl("get", kinds, "-l", "app.kubernetes.io/part-of=arcbridge", "-o", "name").split()
    assert left == ["persistentvolumeclaim/data-arcbridge-relay-0"]
    relay.does("install")
    assert relay.kept() == kept
    until(relay.has_agent, "the agent comes back", timeout=90)
    again = kubectl_of(here, here.world.start_client(ALICE))
    assert "namespace/default" in again.run("get", "namespaces", "-o", "name", timeout=90).stdout
    # One chain of records over all pods, on the volume.
    relay.arcbridge("audit", "verify", "/var/lib/arcbridge/data/audit.jsonl")
    relay.helm("uninstall")


class Work:
    """A command that stays, with its ticks, and the client whose session it is in."""

    def __init__(self, *processes: ManagedProcess) -> None:
        self.ticks = Ticks(processes[0])
        self._processes = processes

    def close(self) -> None:
        for process in self._processes:
            process.stop()


def config_check(relay: Relays) -> str:
    """What the init container of the one pod says; empty while there is none."""
    command = ("--namespace", NAMESPACE, "logs", "arcbridge-relay-0", "-c", "config-check")
    return relay._here.cluster.kubectl(*command, check=False).stdout


def permissions(names: tuple[str, ...]) -> str:
    """Return those that docs/run.md has for one relay, for several."""
    (text,) = re.findall(r"^    (permissions \{.*?^    \})", RUN.read_text(), re.DOTALL | re.MULTILINE)

    def for_each(found: re.Match[str]) -> str:
        return ", ".join(found[0].replace("relay-1", name) for name in names)

    return re.sub(r'"[^"]*relay-1[^"]*"', for_each, text)


@pytest.mark.timeout(300)
def test_a_fleet_of_pods_has_one_ca_and_one_registry(here: Place, tmp_path: Path) -> None:
    """Each relay logs in to NATS under the name of its pod, which is all that it may be there."""
    pods = ("fleet-arcbridge-relay-0", "fleet-arcbridge-relay-1")
    (tmp_path / "password").write_text("a-password")
    user = f'user: "relays", password: "a-password", {permissions(pods)}'
    with NatsServer(tmp_path / "nats", config=f"authorization {{ users: [{{ {user} }}] }}\n") as nats:
        make_ca(tmp_path / "ca")
        fleet = Relays(
            here, "fleet", replicas=2, service={"type": "ClusterIP"}, ca={"existingSecret": "fleet-ca"},
            fleet={"servers": [nats.url], "existingSecret": "fleet-nats",
                   "settings": {"user": "relays", "password_file": "/run/secrets/arcbridge-nats/password"}},
            podAnnotations={"node.test/host-ports": f"{nats.port},{here.world.issuer.url.rpartition(':')[2]}"},
        )  # fmt: skip
        files = [f"--from-file={tmp_path / 'ca' / name}" for name in ("ca.crt", "ca.key")]
        fleet.kubectl("create", "secret", "generic", "fleet-ca", *files)
        fleet.kubectl("create", "secret", "generic", "fleet-nats", f"--from-file={tmp_path / 'password'}")
        fleet.does("install")
        assert len(fleet.pods()) == 2
        made = json.loads(fleet.arcbridge("token", "create", "--cluster", "shop", "-o", "json", pod=pods[0]))
        assert made["token"].partition(".")[0] in fleet.arcbridge("token", "list", "-o", "name", pod=pods[1])
        ours = fleet.kubectl("exec", pods[1], "-c", "relay", "--", "cat", "/var/lib/arcbridge/data/ca.crt")
        assert ours.encode() == (tmp_path / "ca/ca.crt").read_bytes()
        fleet.helm("uninstall")
