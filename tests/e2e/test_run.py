"""`arcbridge run`: real commands against real clusters, with a kubeconfig that ends with them.

Two clusters share a relay and one API server; a third is enrolled and its agent is gone.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, kubectl_binary
from tests.support.processes import ManagedProcess, run
from tests.support.reports import until
from tests.support.world import ALICE, ApiServer, World, arcbridge

BERLIN, MUNICH, PARIS = "prod-berlin", "prod-munich", "prod-paris"


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(api, cluster=BERLIN, directory=tmp_path_factory.mktemp("run"), agents=3)
    world.agent_clusters = [BERLIN, MUNICH, PARIS]
    with world:
        world.start()
        world.agents[2].stop()
        listed = world.run_client(ALICE, "clusters", "-o", "json", check=True).stdout
        rows = "".join(f'{json.dumps(row["name"])} = "{row["cluster_ca_pin"]}"\n' for row in json.loads(listed))
        (world.directory / "pins.toml").write_text(f"[clusters]\n{rows}")  # as an organisation ships it
        yield world


class Job:
    """A pipeline's machine: a home, a kubeconfig of its user's, and the command lines that it runs."""

    def __init__(self, world: World, cluster: Cluster, directory: Path) -> None:
        self.world = world
        self.directory = directory
        self.kubectl = str(kubectl_binary("1.36"))
        self.runtime = directory / "runtime"
        self.runtime.mkdir(mode=0o700)
        self.own = directory / ".kube" / "config"
        self.own.parent.mkdir()
        self.own.write_text("apiVersion: v1\nkind: Config\ncurrent-context: mine\n")
        access, identity = world.login_files(ALICE, directory)
        self.login = ["--access-token-file", str(access), "--id-token-file", str(identity)]
        self.env = {
            **os.environ,
            **world.client_env(directory),
            "XDG_RUNTIME_DIR": str(self.runtime),
            "KUBECONFIG": str(self.own),
        }

    def line(self, *arguments: str, known: bool = True) -> list[str]:
        relay = ["--relay", self.world.relay_url, "--relay-ca-pin", self.world.relay_pin]
        trust = ["--pins-file", str(self.world.directory / "pins.toml")] if known else ["--trust-first-use"]
        return arcbridge("run", *relay, *self.login, *trust, *arguments)

    def run(self, *arguments: str, known: bool = True, input: bytes | None = None) -> subprocess.CompletedProcess[str]:
        done = run(self.line(*arguments, known=known), env=self.env, check=False, input=input)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def start(self, *arguments: str, terminal: tuple[int, int] | None = None) -> ManagedProcess:
        return ManagedProcess(
            self.line(*arguments), log_dir=self.directory / "logs", name="run", env=self.env, terminal=terminal
        )

    def left(self) -> list[str]:
        return sorted(entry.name for entry in self.runtime.iterdir())


@pytest.fixture
def job(world: World, cluster: Cluster, tmp_path: Path) -> Iterator[Job]:
    job = Job(world, cluster, tmp_path)
    before = job.own.read_bytes(), job.own.stat().st_mtime_ns
    yield job
    assert (job.own.read_bytes(), job.own.stat().st_mtime_ns) == before
    assert job.left() == []
    assert sorted(entry.name for entry in job.own.parent.iterdir()) == ["config"]


def test_one_cluster_s_output_is_the_command_s_alone(job: Job, cluster: Cluster) -> None:
    direct = cluster.kubectl("get", "namespaces", "-o", "name")
    done = job.run("-n", BERLIN, "--", job.kubectl, "get", "namespaces", "-o", "name")
    assert (done.returncode, done.stdout, done.stderr) == (0, direct.stdout, "")


def test_the_command_has_our_input_and_we_its_exit_code(job: Job, cluster: Cluster) -> None:
    manifest = json.dumps({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "from-run"}}).encode()
    done = job.run("-n", BERLIN, "--", job.kubectl, "apply", "-f", "-", input=manifest)
    assert (done.returncode, done.stdout) == (0, "configmap/from-run created\n")
    done = job.run("-n", BERLIN, "--", job.kubectl, "get", "configmap", "no-such")
    assert done.returncode == 1
    assert done.stderr == 'Error from server (NotFound): configmaps "no-such" not found\n'
    done = job.run("-n", BERLIN, "--", "sh", "-c", 'echo "$ARCBRIDGE_CLUSTER $KUBECONFIG"; exit 7')
    assert done.returncode == 7
    name, kubeconfig = done.stdout.split()
    assert name == BERLIN
    assert kubeconfig.startswith(f"{job.runtime}/arcbridge-run-")


def test_the_command_has_the_terminal(job: Job) -> None:
    script = 'test -t 0 && test -t 1 && test -t 2 && stty size; read word; echo "read $word"'
    process = job.start("-n", BERLIN, "--", "sh", "-c", script, terminal=(33, 101))
    process.wait_for_line("^33 101$")
    process.send("hello\n")
    process.wait_for_line("^read hello$")
    assert process.wait() == 0


def test_an_interrupt_at_the_terminal_comes_once(job: Job) -> None:
    script = 'count=0; trap "count=\\$((count + 1)); echo got \\$count" INT; echo ready; read word; read word; exit 5'
    process = job.start("-n", BERLIN, "--", "bash", "-c", script, terminal=(24, 80))
    process.wait_for_line("^ready$")
    process.send("\x03")
    process.wait_for_line("got 1$")
    process.send("\x03")
    process.wait_for_line("got 2$")
    process.send("x\n")
    process.send("x\n")
    assert process.wait() == 5
    assert "got 3" not in process.output()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["int", "term", "hup"])
def test_a_signal_is_passed_on_and_the_end_is_the_command_s(job: Job, number: signal.Signals) -> None:
    script = f'trap "echo ending; exit 9" {number.name[3:]}; echo ready; while :; do sleep 0.05; done'
    process = job.start("-n", BERLIN, "--", "sh", "-c", script)
    process.wait_for_line("^ready$")
    process.signal(number)
    assert process.wait() == 9, process.tail()
    assert process.output().split() == ["ready", "ending"]


def test_a_command_that_is_killed_leaves_nothing(job: Job) -> None:
    done = job.run("-n", BERLIN, "--", "sh", "-c", f"{job.kubectl} get ns >/dev/null && kill -KILL $$")
    assert (done.returncode, done.stdout, done.stderr) == (137, "", "")


def test_what_a_killed_run_leaves_the_next_one_removes(job: Job) -> None:
    process = job.start("-n", BERLIN, "--", "sh", "-c", "echo ready; exec sleep 30")
    process.wait_for_line("^ready$")
    (left,) = job.left()
    assert job.run("-n", BERLIN, "--", "true").returncode == 0
    assert job.left() == [left]  # its process lives
    process.kill()
    assert job.left() == [left]
    assert job.run("-n", BERLIN, "--", "true").returncode == 0


def test_many_clusters_side_by_side_and_the_worst_exit_code(job: Job) -> None:
    script = f'{job.kubectl} get ns default -o name && echo "problem of $ARCBRIDGE_CLUSTER" >&2; cat; exit 3'
    done = job.run("-n", "prod-*", "--parallel", "8", "--", "sh", "-c", script)
    assert done.returncode == 125, done.stderr
    assert sorted(done.stdout.splitlines()) == ["prod-berlin | namespace/default", "prod-munich | namespace/default"]
    assert sorted(re.sub(r" \(session [0-9a-f]{16}\)", "", done.stderr).splitlines()) == [
        "error: prod-berlin: the command ended with exit code 3",
        "error: prod-munich: the command ended with exit code 3",
        'error: prod-paris: cluster "prod-paris" has no connected agent; check that its agent runs and reaches the '
        "relay",
        "prod-berlin | problem of prod-berlin",
        "prod-munich | problem of prod-munich",
    ]
    done = job.run("-n", "prod-[bm]*", "--", "true")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_pattern_trusts_no_cluster_unseen(job: Job) -> None:
    """The relay chooses what a pattern matches, so `--trust-first-use` would let it choose where the command goes."""
    started = job.directory / "started"
    done = job.run("-n", "prod-b*", "--", "touch", str(started), known=False)
    assert done.returncode == 125
    assert "is not trusted unseen; give --pins-file, or name it once with --cluster" in done.stderr
    assert not started.exists()
    assert job.run("-n", BERLIN, "--", "true", known=False).returncode == 0
    assert job.run("-n", "prod-b*", "--", "touch", str(started), known=False).returncode == 0
    assert started.exists()


def test_the_token_of_the_environment_is_not_passed_on(job: Job, cluster: Cluster) -> None:
    """In token mode: the kubeconfig has it, the environment does not."""
    job.env["ARCBRIDGE_TOKEN"] = cluster.service_account_token("default", "no-rights")
    done = job.run("-n", BERLIN, "--", "sh", "-c", 'printf %s "$ARCBRIDGE_TOKEN"; grep -c "token:" "$KUBECONFIG"')
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_a_reader_that_goes_away_ends_the_commands(job: Job) -> None:
    line = job.line("-n", "prod-[bm]*", "--", "yes")
    process = ManagedProcess(
        ["sh", "-c", '"$@" | head -n 3', "sh", *line], log_dir=job.directory / "logs", name="piped", env=job.env
    )
    assert process.wait(30) == 0, process.tail()
    assert len(process.output().splitlines()) >= 3
    until(lambda: job.left() == [], "the directories are removed")
