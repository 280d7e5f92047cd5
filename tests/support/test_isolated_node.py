"""The test's node as it runs pods for real: what it would not do as a kubelet does, it refuses.

What it does is seen in tests/e2e/test_daemonset.py.
"""

from __future__ import annotations

from pathlib import Path

from tests.support.cluster import Cluster, Unavailable, require_isolation
from tests.support.processes import require_or_skip
from tests.support.reports import until

SHELL = "registry.example.org/shell"


def test_what_the_node_does_not_know_is_refused(tmp_path: Path) -> None:
    try:
        require_isolation()
    except Unavailable as error:
        require_or_skip("pods", str(error))
    try:
        cluster = Cluster(directory=tmp_path / "cluster", images={SHELL: ("/bin/sh", "-c")})
    except Unavailable as error:
        require_or_skip("apiserver", str(error))
    mount = {"name": "x", "mountPath": "/x", "subPath": "y"}
    container = {"name": "main", "image": f"{SHELL}:1", "args": ["true"], "volumeMounts": [mount]}
    spec = {"containers": [container], "volumes": [{"name": "x", "emptyDir": {}}]}
    with cluster:
        for what in ("serviceaccount/default", "configmap/kube-root-ca.crt"):
            until(lambda what=what: cluster.kubectl("get", what, check=False).returncode == 0, f"there is {what}")
        cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "broken"}, "spec": spec})

        def status(path: str) -> str:
            return cluster.kubectl("get", "pod", "broken", "-o", f"jsonpath={{.status.{path}}}").stdout

        until(lambda: status("phase") == "Failed", "it failed", timeout=30)
        assert "subPath" in status("message")
