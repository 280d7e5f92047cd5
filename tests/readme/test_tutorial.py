"""docs/tutorial.md, block by block as a reader types it, with a real API server."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.readme.blocks import blocks
from tests.readme.machines import ROOT, Machines
from tests.support.cluster import Cluster, Unavailable
from tests.support.processes import require_or_skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    try:
        return Cluster(directory=tmp_path_factory.mktemp("cluster"))
    except Unavailable as error:
        require_or_skip("apiserver", str(error))


def is_secret(path: Path) -> bool:
    kubectls = ".kube" in path.parts and "cache" in path.parts
    return path.name in ("join-token", "agent-token") or (b"PRIVATE KEY" in path.read_bytes() and not kubectls)


def address(number: int) -> str:
    """Return a loopback address that no other test process has: the ports of a page stay as they are written."""
    pid = os.getpid()
    return f"127.{100 + number}.{pid >> 8 & 255}.{pid & 255 or 1}"


@pytest.mark.timeout(240)
def test_every_block_of_the_tutorial(cluster: Cluster, tmp_path: Path) -> None:
    vm = address(1)
    replaced = {"relay.example.com": vm, "localhost": vm, "0.0.0.0": vm}
    with (
        cluster,
        Machines(
            tmp_path, cluster.binaries.kubectl, dialled="vm", replaced=replaced, names=("vm", "workstation")
        ) as machines,
    ):
        kubeconfig = machines.at("workstation") / "home" / ".kube" / "config"
        kubeconfig.parent.mkdir()
        shutil.copy(cluster.kubeconfig, kubeconfig)
        for block in blocks(ROOT / "docs" / "tutorial.md"):
            machines.run(block)
            if "config check" in block.text:
                assert "warning" not in machines.output, f"{block.place}: of what the page itself has the reader write"
        for machine in ("vm", "workstation"):
            secrets = [path for path in machines.at(machine).rglob("*") if path.is_file() and is_secret(path)]
            assert len(secrets) > 1
            assert [path for path in secrets if path.stat().st_mode & 0o077] == []
        assert (
            "current-context: test" in kubeconfig.read_text() or '"current-context": "test"' in kubeconfig.read_text()
        )
