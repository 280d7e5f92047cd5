"""The test's node as it runs pods for real: what a kubelet does for the agent's pods is done, and seen, here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.cluster import Cluster, Unavailable, require_isolation
from tests.support.processes import ProcessFailed, require_or_skip
from tests.support.reports import until

SHELL = "registry.example.org/shell"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    try:
        require_isolation()
    except Unavailable as error:
        require_or_skip("pods", str(error))
    try:
        cluster = Cluster(directory=tmp_path_factory.mktemp("cluster"), images={SHELL: ("/bin/sh", "-c")})
    except Unavailable as error:
        require_or_skip("apiserver", str(error))
    with cluster:
        cluster.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "words"}, "data": {"word": "one"}})
        until(
            lambda: cluster.kubectl("get", "serviceaccount", "default", check=False).returncode == 0,
            "the ServiceAccount",
        )
        until(
            lambda: cluster.kubectl("get", "configmap", "kube-root-ca.crt", check=False).returncode == 0, "the root CA"
        )
        yield cluster


def pod(name: str, script: str, *, volumes: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    """A pod of one container that runs a shell script; `main` of `spec` is merged into the container."""
    main = spec.pop("main", {})
    mounts = [{"name": volume, "mountPath": f"/volumes/{volume}"} for volume in volumes or {}]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "terminationGracePeriodSeconds": 20,
            "containers": [{"name": "main", "image": f"{SHELL}:1", "args": [script], "volumeMounts": mounts, **main}],
            "volumes": [{"name": volume, **source} for volume, source in (volumes or {}).items()],
            **spec,
        },
    }


def status(cluster: Cluster, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(cluster.kubectl("get", "pod", name, "-o", "json").stdout)["status"]
    return found


def is_ready(cluster: Cluster, name: str) -> bool:
    return any(
        condition["type"] == "Ready" and condition["status"] == "True"
        for condition in status(cluster, name).get("conditions", ())
    )


def test_a_pod_has_its_volumes_its_user_and_its_environment(cluster: Cluster) -> None:
    mounted = {"words": {"configMap": {"name": "words", "defaultMode": 0o440}}, "shared": {"emptyDir": {}}}
    init = {
        "name": "first",
        "image": SHELL,
        "args": ["echo from the first > /volumes/shared/file"],
        "volumeMounts": [{"name": "shared", "mountPath": "/volumes/shared"}],
    }
    environment = [
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "WORD", "valueFrom": {"configMapKeyRef": {"name": "words", "key": "word"}}},
        {"name": "BOTH", "value": "$(NAME) $(WORD)"},
    ]
    cluster.apply(
        pod(
            "whole",
            'echo "$BOTH"; cat /volumes/shared/file; exec sleep infinity',
            volumes=mounted,
            initContainers=[init],
            securityContext={"runAsUser": 65532, "runAsGroup": 65532, "fsGroup": 65532},
            main={"env": environment, "securityContext": {"readOnlyRootFilesystem": True}},
        )
    )
    until(lambda: is_ready(cluster, "whole"), "the pod is ready", timeout=30)
    until(lambda: cluster.kubectl("logs", "whole").stdout == "whole one\nfrom the first\n", "both lines are in its log")

    def inside(script: str) -> str:
        return cluster.kubectl("exec", "whole", "--", "sh", "-c", script).stdout.strip()

    assert inside("id -u; id -g") == "65532\n65532"
    with pytest.raises(ProcessFailed, match="Read-only file system"):
        inside("echo > /etc/new")
    # A loopback of its own, where the API server is.
    token = "/var/run/secrets/kubernetes.io/serviceaccount/token"
    assert inside(f"cat {token} | cut -c1-2") == "ey"
    assert "127.0.0.1" in inside("echo $KUBERNETES_SERVICE_HOST")
    assert cluster.kubectl("exec", "whole", "--", "cat", "/proc/net/dev").stdout.count(":") == 1
    # What is changed comes to the pod.
    assert inside("cat /volumes/words/word") == "one"
    cluster.kubectl("patch", "configmap", "words", "-p", '{"data": {"word": "two"}}')
    until(lambda: inside("cat /volumes/words/word") == "two", "the change is there", timeout=30)
    cluster.kubectl("delete", "pod", "whole", "--grace-period=1")


def test_probes_decide_and_a_dead_process_is_started_again(cluster: Cluster) -> None:
    probes = {
        "readinessProbe": {
            "exec": {"command": ["test", "-f", "/volumes/shared/ready"]},
            "periodSeconds": 1,
            "timeoutSeconds": 15,
        },
        "livenessProbe": {
            "exec": {"command": ["test", "!", "-f", "/volumes/shared/sick"]},
            "periodSeconds": 1,
            "timeoutSeconds": 15,
            "failureThreshold": 1,
        },
    }
    script = "rm -f /volumes/shared/sick; exec sleep infinity"
    cluster.apply(pod("probed", script, volumes={"shared": {"emptyDir": {}}}, main=probes))
    until(lambda: status(cluster, "probed").get("phase") == "Running", "it runs", timeout=30)
    assert not is_ready(cluster, "probed")
    cluster.kubectl("exec", "probed", "--", "touch", "/volumes/shared/ready")
    until(lambda: is_ready(cluster, "probed"), "it is ready", timeout=30)
    cluster.kubectl("exec", "probed", "--", "touch", "/volumes/shared/sick")
    # Once more where the probe looks before the new process has removed the file.
    until(lambda: status(cluster, "probed")["containerStatuses"][0]["restartCount"] >= 1, "it is restarted", timeout=30)
    until(lambda: is_ready(cluster, "probed"), "it is ready again", timeout=30)
    cluster.kubectl("delete", "pod", "probed", "--grace-period=1")


def test_a_pod_that_ends_runs_its_hook_and_has_its_time(cluster: Cluster) -> None:
    script = "trap 'cat /volumes/shared/hook; echo ended; exit 0' TERM; echo begun; while :; do sleep 0.1; done"
    hook = {"preStop": {"exec": {"command": ["sh", "-c", "echo hooked > /volumes/shared/hook"]}}}
    cluster.apply(pod("hooked", script, volumes={"shared": {"emptyDir": {}}}, main={"lifecycle": hook}))
    until(lambda: cluster.kubectl("logs", "hooked", check=False).stdout == "begun\n", "it has begun", timeout=30)
    follower = cluster.kubectl_for().start("logs", "-f", "hooked")
    follower.wait_for_line("begun")
    cluster.kubectl("delete", "pod", "hooked")
    follower.wait(30)
    # The shell also says that its `sleep` was terminated: a signal is for the whole process group here.
    said = [line for line in follower.output("stdout").splitlines() if line != "Terminated"]
    assert said == ["begun", "hooked", "ended"]


def test_what_the_node_does_not_know_is_refused(cluster: Cluster) -> None:
    broken = pod("broken", "true", main={"volumeMounts": [{"name": "x", "mountPath": "/x", "subPath": "y"}]})
    broken["spec"]["volumes"] = [{"name": "x", "emptyDir": {}}]
    cluster.apply(broken)
    until(lambda: status(cluster, "broken").get("phase") == "Failed", "it failed", timeout=30)
    assert "subPath" in status(cluster, "broken")["message"]
    cluster.kubectl("delete", "pod", "broken", "--grace-period=0", "--force")
