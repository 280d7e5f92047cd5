"""What one user may take of an agent: a real kubectl shows the sentence, others notice nothing, and the defaults are
above what one person does with kubectl, helm and fifty port-forwards (docs/threats.md#L21 to #L26).
"""

from __future__ import annotations

import re
import socket
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from arcbridge.errors import ExitCode
from tests.support.cluster import Cluster, Unavailable, helm
from tests.support.processes import ProcessFailed, require_or_skip, run
from tests.support.reports import metrics, records, until, wait_for_record
from tests.support.targets import EchoServer
from tests.support.world import ALICE, ApiServer, User, World, arcbridge

NAMESPACE = "limits"
SLOW = User("slow", ("platform",))
BUSY = User("busy", ("platform",))
LONE = User("lone", ("platform",))
FEW = User("few", ("platform",))
SPENT = User("spent", ("platform",))
TWICE = User("twice", ("platform",))
LIMITS = {
    SLOW: {"requests_per_second": 1, "request_burst": 1},
    BUSY: {"concurrent_requests": 1},
    LONE: {"upgraded_streams": 1},
    FEW: {"streams": 1},
    SPENT: {"bytes_per_day": 300_000},
    TWICE: {"sessions": 1},
}
ANSWER_TIME = 60.0


@pytest.fixture(scope="module")
def world(api: ApiServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An organisation whose agent has the defaults, and for some users limits that are reached at once."""
    tables = [
        "\n".join([f'[limits.users."{user.email}"]', *(f"{name} = {value}" for name, value in limits.items())])
        for user, limits in LIMITS.items()
    ]
    with World(api, directory=tmp_path_factory.mktemp("limits")) as world:
        world.start_issuer()
        world.start_relay()
        world.start_agent(extra="\n" + "\n".join(tables) + "\n")
        yield world


def refusals(world: World) -> dict[str, float]:
    """The agent's refusals by limit, of those that there were."""
    pattern = re.compile(r'arcbridge_agent_limit_refusals_total\{limit="(\w+)"\}')
    found = {match[1]: value for name, value in metrics(world.agent_observe).items() if (match := pattern.match(name))}
    return {limit: value for limit, value in found.items() if value}


def audited(world: World, user: User) -> list[dict[str, object]]:
    """The audit records of a user's refusals by a limit."""
    return [one for one in world.audit_records() if one.get("user") == user.email and one.get("limit")]


def test_kubectl_waits_out_a_short_excess_of_requests(cluster: Cluster, world: World) -> None:
    kubectl = cluster.kubectl_for(kubeconfig=world.start_client(SLOW).kubeconfig)

    def excess() -> bool:
        """Four at once, all of which are answered: where each takes a second, none after the other is too many."""
        asking = [kubectl.start("get", "--raw", "/api/v1/namespaces/default") for _ in range(4)]
        assert [process.wait(ANSWER_TIME) for process in asking] == [0] * 4, asking[0].tail()
        return "requests_per_second" in refusals(world)

    until(excess, "there was an excess")


def test_kubectl_ends_with_the_sentence_of_a_limit_that_lasts(cluster: Cluster, world: World) -> None:
    kubectl = cluster.kubectl_for(kubeconfig=world.start_client(BUSY).kubeconfig)
    with kubectl.start("get", "--raw", "/api/v1/namespaces?watch=1") as watch:
        watch.wait_for_line("ADDED", timeout=20)
        began = time.monotonic()
        done = kubectl.run("get", "--raw", "/version", check=False, timeout=ANSWER_TIME)
        took = time.monotonic() - began
    sentence = (
        "arcbridge: 1 requests of yours are under way, as many as one user may have; end watches and commands that you "
        "do not need, or ask the cluster's operator for a higher limit"
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error from server (TooManyRequests): {sentence} (request ")
    assert took > 8, "kubectl has repeated the request ten times"
    assert refusals(world)["concurrent_requests"] == 11
    until(lambda: audited(world, BUSY), "one record of the burst")
    line = wait_for_record(world.agent, "limit reached", user=BUSY.email)
    assert line["reason"] == "concurrent_requests"
    assert (len(audited(world, BUSY)), len(records(world.agent, "limit reached", user=BUSY.email))) == (1, 1)
    until(lambda: kubectl.run("get", "--raw", "/version", check=False).returncode == 0, "kubectl works again")


def test_kubectl_shows_the_sentence_for_one_connection_too_many(cluster: Cluster, world: World) -> None:
    kubectl = cluster.kubectl_for(kubeconfig=world.start_client(FEW).kubeconfig)
    with kubectl.start("get", "--raw", "/api/v1/namespaces?watch=1") as watch:
        watch.wait_for_line("ADDED", timeout=20)
        done = kubectl.run("get", "--raw", "/version", check=False, timeout=ANSWER_TIME)
    assert done.returncode == 1
    assert done.stderr.startswith("Error from server (TooManyRequests): arcbridge: the agent of cluster")
    assert "ended the connection at one of its limits" in done.stderr
    assert "ask the cluster's operator" in done.stderr


def test_the_client_shows_the_sentence_for_one_session_too_many(world: World) -> None:
    first = world.start_client(TWICE)
    directory = world.directory / "second-of-twice"
    arguments = world.client_arguments(TWICE, directory)
    done = run(
        arcbridge(*arguments, "--file", str(directory / "kubeconfig"), "--port", "0"),
        env=world.client_env(directory),
        check=False,
        timeout=ANSWER_TIME,
    )
    assert done.returncode == ExitCode.UNREACHABLE
    assert "refused or ended your session at one of its limits" in done.stderr.decode()
    assert refusals(world)["sessions"] == 1
    first.process.stop()
    wait_for_record(world.agent, "session ended", user=TWICE.email)
    world.start_client(TWICE).process.stop()


@pytest.mark.timeout(300)  # a hundred processes
def test_one_person_with_kubectl_helm_and_fifty_port_forwards_meets_no_limit(
    cluster: Cluster, world: World, tmp_path: Path
) -> None:
    """What k9s does besides, watching some dozens of kinds, twelve watches stand for."""
    try:
        helm_binary = helm()
    except Unavailable as error:
        require_or_skip("helm", str(error))
    client = world.start_client(ALICE)
    kubectl = cluster.kubectl_for(kubeconfig=client.kubeconfig)
    before = refusals(world)
    with EchoServer() as echo, ExitStack() as stack:
        port = int(echo.address.rsplit(":", 1)[1])
        cluster.add_pod("fifty", NAMESPACE, ports=[port])
        for kind in WATCHED:
            stack.enter_context(kubectl.start("get", "--raw", f"{kind}?watch=1"))
        forwards = [
            stack.enter_context(kubectl.start("port-forward", "-n", NAMESPACE, "pod/fifty", f":{port}"))
            for _ in range(50)
        ]
        for forward in forwards:
            local = int(forward.wait_for_line(r"Forwarding from 127\.0\.0\.1:(\d+)", timeout=90)[1])
            with socket.create_connection(("127.0.0.1", local), timeout=20) as sock:
                sock.sendall(b"hello")
                assert sock.recv(5, socket.MSG_WAITALL) == b"hello"
        _use_helm(helm_binary, client.kubeconfig, tmp_path)
        for number in range(3):  # each with a cold cache: every group of the API is asked for
            cold = {"KUBECACHEDIR": str(tmp_path / f"cold-{number}")}
            assert "deployments" in kubectl.run("api-resources", env=cold, timeout=ANSWER_TIME).stdout
        kubectl.run("get", "all", "-A", timeout=ANSWER_TIME)
        assert metrics(world.agent_observe)["arcbridge_agent_upgrades_open"] >= 50

        def all_open() -> bool:
            return metrics(world.agent_observe)["arcbridge_agent_requests_in_flight"] >= 50 + len(WATCHED)

        until(all_open, "all forwards and watches are open at once")
    cluster.delete_pod("fifty", NAMESPACE)
    assert refusals(world) == before


WATCHED = [
    f"/api/v1/{name}"
    for name in ("namespaces", "pods", "services", "events", "configmaps", "secrets", "nodes", "serviceaccounts")
] + [f"/apis/apps/v1/{name}" for name in ("deployments", "replicasets", "daemonsets", "statefulsets")]


def _use_helm(binary: Path, kubeconfig: Path, directory: Path) -> None:
    """Install a chart, upgrade it, list, and take it out."""
    chart = directory / "chart"
    (chart / "templates").mkdir(parents=True)
    (chart / "Chart.yaml").write_text("apiVersion: v2\nname: small\nversion: 1.0.0\n")
    for number in range(20):
        (chart / "templates" / f"map-{number}.yaml").write_text(
            textwrap.dedent(
                f"""\
                apiVersion: v1
                kind: ConfigMap
                metadata:
                  name: small-{number}
                data:
                  value: "{{{{ .Values.value }}}}"
                """
            )
        )
    home = directory / "helm-home"
    home.mkdir()
    env = {"HOME": str(home), "KUBECONFIG": str(kubeconfig), "PATH": "/usr/bin:/bin"}
    for words in (
        ("install", "small", str(chart), "--set", "value=one"),
        ("upgrade", "small", str(chart), "--set", "value=two"),
        ("list", "-A"),
        ("get", "manifest", "small"),
        ("uninstall", "small"),
    ):
        try:
            run([binary, *words, "-n", "default"] if "-A" not in words else [binary, *words], env=env, timeout=90)
        except ProcessFailed as error:
            raise AssertionError(f"helm {words[0]}: {error}") from error
