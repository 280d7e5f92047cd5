"""The cluster is of the versions that it claims, ends with its owner, and says why it does not start.

That kubectl works with it is seen in tests/e2e.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import KUBECTL_MINORS, Cluster, Unavailable
from tests.support.processes import ManagedProcess, require_or_skip

# A cold build of Kubernetes takes minutes; once built, everything here takes seconds.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        cluster = Cluster()
    except Unavailable as error:
        require_or_skip("apiserver", str(error))
    with cluster:
        yield cluster


def test_kubectl_is_the_version_it_is_taken_for(cluster: Cluster) -> None:
    for minor in KUBECTL_MINORS:
        answer = cluster.kubectl("version", version=minor).stdout
        assert f"Client Version: v{minor}." in answer
        assert "Server Version: v1.36.3" in answer


def test_delete_ends_the_processes(cluster: Cluster, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    cluster.add_pod("doomed", command=["sh", "-c", f"exec sleep infinity > {fifo}"])
    with fifo.open("rb") as reader:
        cluster.kubectl("delete", "pod", "doomed", "--timeout=20s")
        assert reader.read() == b""


def test_everything_ends_when_the_owner_is_killed(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    short = tmp_path_factory.mktemp("x")  # what it leaves behind should go with the test
    with ManagedProcess(
        [sys.executable, "-m", "tests.support.cluster", "--pod", "web"],
        log_dir=tmp_path,
        cwd=Path(__file__).parents[2],
        env={"TMPDIR": str(short)},
    ) as owner:
        owner.wait_for_line("^export KUBECONFIG=", timeout=60)
        children = _children(owner.pid)
        names = {Path(f"/proc/{pid}/comm").read_text().strip() for pid in children}
        assert names >= {"kube-apiserver", "node"}, names
        containers = [child for pid in children for child in _children(pid)]
        assert containers
        waits = [os.pidfd_open(pid) for pid in children + containers]
        owner.kill()
        for wait in waits:
            _wait_for_end(wait)


def test_a_failed_start_shows_why(cluster: Cluster, tmp_path: Path) -> None:
    # Also in a directory whose name is longer than the address of a Unix socket may be.
    with pytest.raises(AssertionError, match="unknown flag: --no-such-flag"):
        Cluster(directory=tmp_path / ("x" * 100), extra_args=["--no-such-flag"])


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.support import cluster as module

    (tmp_path / "kubectl").touch()
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    with pytest.raises(Unavailable, match="lacks kube-apiserver, etcd"):
        module.binaries.__wrapped__()
    monkeypatch.delenv("KUBEBUILDER_ASSETS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"install Go 1\.26 or later, or set KUBEBUILDER_ASSETS"):
        module.binaries.__wrapped__()


def test_nothing_listens_beyond_loopback(cluster: Cluster) -> None:
    inodes = {
        os.readlink(fd)[8:-1]
        for process in cluster.processes
        for fd in Path(f"/proc/{process.pid}/fd").iterdir()
        if os.readlink(fd).startswith("socket:[")
    }
    listening = [
        fields[1]
        for table in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
        if (fields := line.split())[3] == "0A" and fields[9] in inodes
    ]
    assert listening
    assert all(address.startswith("0100007F:") for address in listening), listening


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found += map(int, (task / "children").read_text().split())
    return found


def _wait_for_end(pidfd: int) -> None:
    ready, _, _ = select.select([pidfd], [], [], 20)
    os.close(pidfd)
    assert ready, "still running"
