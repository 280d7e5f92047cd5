"""The agent as it runs in a cluster: Helm installs the chart, controllers make the pods, a node runs them with their
volumes, probes and security context, and kubectl goes through them while they are replaced."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.config.helm import AGENT as CHART
from tests.config.helm import Helm
from tests.support.cluster import Cluster, Kubectl, Unavailable, require_isolation
from tests.support.cluster import helm as helm_binary
from tests.support.pod_signer import PodSigner
from tests.support.processes import ProcessFailed, require_or_skip
from tests.support.reports import until
from tests.support.world import ALICE, CLUSTER_AUDIENCE, ApiServer, Client, World

NAMESPACE = "arcbridge"
RELEASE = "arcbridge-agent"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:{RELEASE}"
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
IMAGE = "registry.example.org/arcbridge"
MINUTES = "--timeout=5m"  # Helm's own


class Place:
    """A cluster that runs workloads, a relay outside it, and Helm."""

    def __init__(self, cluster: Cluster, world: World, helm: Helm, mode: str) -> None:
        self.cluster = cluster
        self.world = world
        self.helm = helm
        self.mode = mode
        self.values: dict[str, object] = {"workload": {"everyNode": True}}
        """What each install and upgrade has besides."""
        self._values = world.directory / "values.json"

    def helm_does(self, verb: str, *words: str, **changes: object) -> None:
        """Install or upgrade the release with the values of this place, changed; return when its pods are ready."""
        issuer_port = int(self.world.issuer.url.rpartition(":")[2].partition("/")[0])
        values: dict[str, object] = {
            "relays": [self.world.relay_url],
            "relayCAPin": self.world.relay_pin,
            "authentication": json.loads(self.world.authentication(CLUSTER_AUDIENCE)),
            "impersonation": {"mode": self.mode, "users": [ALICE.email], "groups": list(ALICE.groups)},
            "podAnnotations": {"node.test/host-ports": f"{self.world.relay_port},{issuer_port}"},
            **self.values,
            **changes,
        }
        self._values.write_text(json.dumps(values))
        place = ("--namespace", NAMESPACE, "-f", str(self._values), "--wait", MINUTES)
        self.helm.run(verb, RELEASE, str(CHART), *place, *words, timeout=320)

    def keep_join_token(self, token: str) -> None:
        """Make the Secret from which the agents enrol."""
        self.cluster.ensure_namespace(NAMESPACE)
        self.kubectl("create", "secret", "generic", "arcbridge-join-token", f"--from-literal=token={token}")

    def kubectl(self, *words: str) -> str:
        """Run kubectl as the administrator, straight to the API server."""
        return self.cluster.kubectl("--namespace", NAMESPACE, *words, timeout=320).stdout

    def all_pods(self) -> list[dict[str, Any]]:
        """The agent's pods, those that are being ended included."""
        return list(self.cluster.request("GET", f"/api/v1/namespaces/{NAMESPACE}/pods")["items"])

    def pods(self) -> list[dict[str, Any]]:
        """The agent's pods that do not end."""
        return [pod for pod in self.all_pods() if "deletionTimestamp" not in pod["metadata"]]

    def ready_pod(self) -> str:
        """The name of the one pod, which is ready."""

        def ready() -> str:
            pods = self.pods()
            # A pod that was just made has no conditions yet.
            states = {one["type"]: one["status"] for pod in pods for one in pod["status"].get("conditions", ())}
            return str(pods[0]["metadata"]["name"]) if len(pods) == 1 and states.get("Ready") == "True" else ""

        return until(ready, "one pod is there and ready", timeout=60)


@contextmanager
def place(
    directory: Path, mode: str, nodes: int = 1, *, relay: bool = True, pod_certificates: bool = False
) -> Iterator[Place]:
    """Start everything but the agent; without `relay` not the relay either, and its port is that of no process."""
    try:
        require_isolation()
    except Unavailable as error:
        require_or_skip("pods", str(error))
    if Path(sys.prefix).is_relative_to("/tmp"):
        require_or_skip("pods", "the checkout is under /tmp, and pods have a volume of their own there: move it")
    try:
        helm = helm_binary()
    except Unavailable as error:
        require_or_skip("helm", str(error))
    try:
        images = {IMAGE: (sys.executable, "-m", "arcbridge")}
        # Those from which `fixed_port` takes the relay's.
        ports = ["--service-node-port-range=15000-32767"]
        cluster = Cluster(
            directory=directory / "cluster",
            images=images,
            nodes=nodes,
            extra_args=ports,
            pod_certificates=pod_certificates,
        )
    except Unavailable as error:
        require_or_skip("apiserver", str(error))
    with cluster, World(ApiServer(cluster.api_url), directory=directory / "world") as world:
        cluster.grant("view", group=ALICE.groups[0])
        world.start_issuer()
        here = Place(cluster, world, Helm(helm, directory, cluster.kubeconfig), mode)
        if relay:
            world.start_relay()
            here.keep_join_token(world.join_token()[0])
        yield here


class Loop:
    """`kubectl get` without end, in a thread, for a third of the time; every failure is kept."""

    def __init__(self, kubectl: Kubectl) -> None:
        self._kubectl = kubectl
        self._over = threading.Event()
        self.done = 0
        self.failures: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._over.is_set():
            try:
                # Once each, as a script does: kubectl itself repeats what the client says was never sent.
                self._kubectl.run("get", "namespaces", "-o", "name", timeout=60)
            except ProcessFailed as error:
                self.failures.append(str(error))
            self.done += 1
            self._over.wait(0.3)

    def __enter__(self) -> Loop:
        self._thread.start()
        until(lambda: self.done, "the loop runs", timeout=60)
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join(90)

    def go_on(self) -> None:
        """Wait for two more calls, the second of which began after now."""
        goal = self.done + 2
        until(lambda: self.done >= goal, "the loop goes on", timeout=60)


def kubectl_of(place: Place, client: Client) -> Kubectl:
    return place.cluster.kubectl_for(kubeconfig=client.kubeconfig)


def renew_the_pod_certificate(here: Place, signer: PodSigner, pod: str) -> None:
    """Look at an agent that has its pod's certificate alone; have the kubelet renew it, and the agent use the new."""
    there = here.kubectl("exec", pod, "--", "ls", SERVICE_ACCOUNT).split()
    assert there == ["ca.crt", "credential-bundle.pem", "namespace"], "and no token"
    ca = here.kubectl("exec", pod, "--", "cat", f"{SERVICE_ACCOUNT}/ca.crt")
    assert ca.strip() == here.cluster.ca_pem.decode().strip()

    def credentials() -> list[str]:
        """Return by which credentials the API server has known the agent, in their order."""
        seen: dict[str, None] = {}
        for event in here.cluster.audit_events():
            if event["user"]["username"] == ACCOUNT:
                seen[event["user"]["extra"]["authentication.kubernetes.io/credential-id"][0]] = None
        return list(seen)

    before = list(signer.issued)
    assert before
    assert credentials()[-1] == before[-1]
    assert all(one["spec"]["serviceAccountName"] == RELEASE for one in signer.requests)
    signer.rotate(NAMESPACE)
    until(lambda: signer.issued != before, "the kubelet has asked for a new one", timeout=60)
    until(lambda: credentials()[-1] == signer.issued[-1], "the agent uses the new one", timeout=60)
    assert "credential read again" in here.kubectl("logs", pod)


@pytest.mark.timeout(600)
def test_the_chart_is_installed_rolled_upgraded_and_removed(tmp_path: Path) -> None:
    """The upgrade changes how the agent impersonates and what it shows the API server, and the rollback changes both
    back; under what runs for long: test_rollouts.py."""
    with place(tmp_path, "legacy", pod_certificates=True) as here, PodSigner(here.cluster) as signer:
        here.helm_does("install")
        first = here.ready_pod()
        # Its credential is in the Secret, where the next pod finds it.
        credential = json.loads(here.kubectl("get", "secret", "arcbridge-agent", "-o", "json"))["data"]
        assert credential
        assert "enrolled" in here.kubectl("logs", first)
        assert here.kubectl("exec", first, "--", "id", "-u").strip() == "65532"
        with pytest.raises(ProcessFailed, match="Read-only file system"):
            here.kubectl("exec", first, "--", "touch", "/etc/a-file")

        client = here.world.start_client(ALICE)
        alice = kubectl_of(here, client)

        def works() -> None:
            assert "namespace/default" in alice.run("get", "namespaces", "-o", "name").stdout
            assert alice.run("auth", "whoami", "-o", "jsonpath={.status.userInfo.username}").stdout == ALICE.email

        works()
        with Loop(alice) as loop:
            # A changed setting rolls the pods, and so does the way back.
            here.mode = "constrained"
            certificate = {
                "podCertificate": {"enabled": True},
                "clusterTrustBundle": {"signerName": "kubernetes.io/kube-apiserver-serving"},
            }
            here.helm_does("upgrade", logLevel="debug", **certificate)
            second = here.ready_pod()
            assert second != first
            works()
            loop.go_on()
            renew_the_pod_certificate(here, signer, second)
            works()
            loop.go_on()
            assert loop.failures == []
            here.helm.run("rollback", RELEASE, "1", "--namespace", NAMESPACE, "--wait", MINUTES)
            third = here.ready_pod()
            assert third != second
            loop.go_on()
            assert loop.failures == []
        now = json.loads(here.kubectl("get", "secret", "arcbridge-agent", "-o", "json"))["data"]
        assert now == credential, "every pod used the first one's enrolment"

        # A pod that is deleted by force, with no time to say that it ends, is made anew.
        here.kubectl("delete", "pod", third, "--grace-period=0", "--force")
        until(lambda: [pod["metadata"]["name"] for pod in here.pods()] not in ([], [third]), "another pod", timeout=60)
        here.ready_pod()
        until(
            lambda: alice.run("get", "namespaces", check=False, timeout=60).returncode == 0, "kubectl works", timeout=90
        )

        here.helm.run("uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", MINUTES)
        until(lambda: here.pods() == [], "the pods are gone", timeout=60)
        refused = alice.run("get", "namespaces", check=False, timeout=90)
        assert refused.returncode == 1
        assert "has no connected agent" in refused.stderr
