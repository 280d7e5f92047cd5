"""Bad days: what the person at kubectl or at the command line is told, and what the role that knows the cause logs.

Each trouble is made as it comes: a process is stopped, frozen or killed, a file is rewritten, a port is taken. Each
gives one clear sentence that says what to do, the exit code or `metav1.Status`, and one line in the log that knows.
"""

from __future__ import annotations

import base64
import http.client
import json
import math
import os
import re
import shutil
import signal
import ssl
import subprocess
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcbridge.errors import ExitCode
from tests.support.cluster import Cluster, Kubectl
from tests.support.fault_proxy import FaultProxy
from tests.support.processes import ManagedProcess, Mark, run
from tests.support.reports import agent_again, audited, metrics, page, records, rewrite, until, wait_for_record
from tests.support.world import (
    ALICE,
    CLUSTER,
    CLUSTER_AUDIENCE,
    RELAY_AUDIENCE,
    ApiServer,
    Client,
    World,
    arcbridge,
    fixed_port,
)

NAMESPACE = "bad-days"


@pytest.fixture(scope="module")
def door(api: ApiServer) -> Iterator[FaultProxy]:
    """What stands before the API server, so that it can go down and come back."""
    host, _, port = api.url.removeprefix("https://").rpartition(":")
    with FaultProxy((host, int(port)), listen=("127.0.0.1", fixed_port())) as door:
        yield door


@pytest.fixture(scope="module")
def world(api: ApiServer, door: FaultProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An organisation of this module's own, since its parts are broken."""
    behind = ApiServer(f"https://127.0.0.1:{door.port}", api.ca_file, api.token_file)
    with World(behind, directory=tmp_path_factory.mktemp("bad-days")) as world:
        yield world.start()


@pytest.fixture(scope="module")
def alice(world: World) -> Iterator[Client]:
    """The client that lives through all of it and is never restarted."""
    client = world.start_client(ALICE)
    yield client
    client.process.stop()  # first: a relay waits for sessions


@pytest.fixture
def kubectl(cluster: Cluster, alice: Client) -> Kubectl:
    return cluster.kubectl_for(kubeconfig=alice.kubeconfig)


def start(world: World, *flags: str) -> subprocess.CompletedProcess[str]:
    """One `proxy` that is expected to fail at its start; of most flags the last one counts."""
    return world.run_client(ALICE, *flags, "--file", os.devnull, "--port", "0", timeout=40)


def said_by(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one `error: …` line."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0].removeprefix("error: ")


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The same without the session's id, which stands behind what a relay or an agent has refused."""
    return re.sub(r" \(session [0-9a-f]{16}\)\Z", "", said_by(done))


def only(process: ManagedProcess, event: str, *, after: Mark) -> dict[str, Any]:
    """Wait for the one log record of an event: a thread writes the logs."""
    wait_for_record(process, event, after=after)
    (record,) = records(process, event, after=after)
    return record


class Caller:
    """A TLS client that speaks to the local endpoint as kubectl does, but shows the answer as it is."""

    def __init__(self, client: Client, *, certificate: bool = True) -> None:
        config = yaml.safe_load(client.kubeconfig.read_text())
        self.server = config["clusters"][0]["cluster"]["server"].removeprefix("https://")
        ca = base64.b64decode(config["clusters"][0]["cluster"]["certificate-authority-data"]).decode()
        self.context = ssl.create_default_context(cadata=ca)
        if certificate:
            user = config["users"][0]["user"]
            pair = client.directory / "pair.pem"
            pair.touch(mode=0o600)
            pair.write_bytes(
                base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"])
            )
            self.context.load_cert_chain(pair)

    def get(self, path: str = "/version", *, timeout: float = 30) -> tuple[int, http.client.HTTPMessage, Any]:
        connection = http.client.HTTPSConnection(self.server, context=self.context, timeout=timeout)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.headers, json.loads(answer.read())
        finally:
            connection.close()


def test_a_cluster_that_is_unknown(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "cluster", "no-such-cluster")
    mark = world.relay.mark()
    done = start(world)
    assert done.returncode == ExitCode.DENIED
    assert error_of(done) == (
        'cluster "no-such-cluster" does not exist or you may not reach it; ask the relay\'s operator for access '
        '(known groups: "platform")'
    )
    record = only(world.relay, "join failed", after=mark)
    assert record["reason"] == "the cluster is unknown"
    assert (record["cluster"], record["user"]) == ("no-such-cluster", ALICE.email)


@pytest.mark.parametrize("token", ["audience", "foreign", "garbage"])
def test_a_token_that_the_agent_does_not_take(world: World, tmp_path: Path, token: str) -> None:
    path = tmp_path / "token"
    path.write_text(wrong_token(world, token, RELAY_AUDIENCE))
    mark = world.agent.mark()
    done = start(world, "--id-token-file", str(path))
    assert done.returncode == ExitCode.LOGIN
    record = only(world.agent, "session refused", after=mark)
    expected = {
        "audience": f': {path} is for audience "{RELAY_AUDIENCE}", its agent wants "{CLUSTER_AUDIENCE}"',
        "foreign": f": {path} is not signed with a key that its issuer publishes",
        "garbage": "; log in again, or put a new token there",
    }[token]
    said = said_by(done)
    assert said.startswith(f'cluster "{CLUSTER}" does not accept the token{expected}')
    assert said.endswith(f" (session {record['session']})")
    assert record["reason"].startswith("the token")
    assert path.read_text() not in world.agent.output() + done.stderr


def wrong_token(world: World, kind: str, audience: str) -> str:
    """A token of the wrong audience, one that another issuer signed, or no token at all."""
    if kind == "garbage":
        return "c2VjcmV0LWdhcmJhZ2U.bm90LWEtdG9rZW4.AAAA"
    right = CLUSTER_AUDIENCE if audience == RELAY_AUDIENCE else RELAY_AUDIENCE
    return world.issuer.mint(
        sub="alice",
        email=ALICE.email,
        groups=list(ALICE.groups),
        aud=audience if kind == "audience" else right,
        foreign=kind == "foreign",
    )


@pytest.mark.parametrize("role", ["relay", "agent"])
def test_a_wrong_pin_sends_no_token(world: World, role: str) -> None:
    wrong = "sha256:" + "01" * 32
    mark, before = world.relay.mark(), tokens_judged(world, role)
    done = start(world, "--relay-ca-pin" if role == "relay" else "--cluster-ca-pin", wrong)
    assert done.returncode == ExitCode.FAILURE
    assert wrong in error_of(done)
    assert role == "agent" or world.relay_pin in error_of(done)
    assert error_of(done).count("sha256:") == 2, "that of the other end, too"
    assert tokens_judged(world, role) == before
    assert role == "agent" or not records(world.relay, "join failed", after=mark)


def tokens_judged(world: World, role: str) -> float:
    """Return how many tokens a role has judged."""
    found = metrics(world.agent_observe if role == "agent" else world.relay_observe)
    return sum(value for name, value in found.items() if name.startswith(f"arcbridge_{role}_tokens_"))


def test_a_caller_without_the_client_certificate_reads_why(alice: Client) -> None:
    code, headers, status = Caller(alice, certificate=False).get()
    assert (code, status["kind"], status["code"], status["reason"]) == (401, "Status", 401, "Unauthorized")
    assert "Retry-After" not in headers, "kubectl would repeat it ten times before it says why"
    assert "client certificate" in status["message"]
    assert "arcbridge --role client" in status["message"]


def test_an_api_server_that_is_down(world: World, alice: Client, kubectl: Kubectl, door: FaultProxy) -> None:
    assert kubectl.works()
    mark = world.agent.mark()
    door.refuse()
    door.cut()
    try:
        code, headers, status = Caller(alice).get("/api/v1/namespaces")
        assert (code, status["kind"], status["code"]) == (503, "Status", 503)
        assert status["message"].startswith("arcbridge: the API server cannot be reached")
        assert headers["Retry-After"] == "1"
        record = only(world.agent, "request failed", after=mark)
        assert status["message"].startswith(f"{record['reason']} (request ")
        # One id from end to end: the request's begins with the session's.
        request = status["message"].rpartition("(request ")[2].removesuffix(")")
        assert audited(world, "the refusal", request=request)["status"] == 503
        session = request[:16]
        for process, event in (
            (alice.process, "session established"),
            (world.relay, "joined"),
            (world.agent, "session opened"),
        ):
            wait_for_record(process, event, session=session)
        with kubectl.start("exec", "no-pod", "--", "true") as shell:
            done = kubectl.run("get", "namespaces", check=False)
            assert shell.wait(30) == 1
        assert done.returncode == 1
        assert "arcbridge: the API server cannot be reached" in done.stderr
        assert "arcbridge: the API server cannot be reached" in shell.output("stderr")
    finally:
        door.accept_again()
    assert kubectl.works()


def test_an_agent_that_starts_while_its_api_server_is_down(world: World, door: FaultProxy) -> None:
    """Its state is in the Secret of the manifests: it is alive and not ready, ends when it is asked to, and goes on."""
    directory, port = world.directory / "waiting", fixed_port()
    shutil.copytree(world.agent_config.parent, directory, ignore=shutil.ignore_patterns("state", "audit*"))
    (directory / "join-token").write_text(world.join_token("waiting")[0])
    text = world.agent_config.read_text().replace('directory = "state"', 'secret = "arcbridge/arcbridge-agent"')
    (directory / "agent.toml").write_text(text.replace(str(world.agent_observe), str(port)))
    command = arcbridge("--role", "agent", "--config", str(directory / "agent.toml"))
    door.refuse()
    door.cut()
    try:
        agent = world._start("waiting", command)
        waits = wait_for_record(agent, "enrolment waits")
        assert "Secret arcbridge/arcbridge-agent is not available: the API server cannot be reached" in waits["reason"]
        assert page(port, "/livez")
        with pytest.raises(urllib.error.HTTPError, match="503"):
            page(port, "/readyz")
        found = wait_for_record(agent, "check failed", code="enrolment")
        assert waits["reason"] in found["reason"]
        assert agent.stop() == 0
        agent = world._start("waiting", command)
        wait_for_record(agent, "enrolment waits")
    finally:
        door.accept_again()
    agent.wait_for_url(f"http://127.0.0.1:{port}/readyz", timeout=40)
    assert wait_for_record(agent, "agent started")["cluster"] == "waiting"
    assert agent.stop() == 0


def test_an_agent_that_is_gone_and_comes_back(world: World, alice: Client, kubectl: Kubectl) -> None:
    assert kubectl.works()
    assert world.agent.stop(30) == 0
    mark = world.relay.mark()
    try:
        done = start(world)
        assert done.returncode == ExitCode.UNREACHABLE
        assert (
            error_of(done)
            == f'cluster "{CLUSTER}" has no connected agent; check that its agent runs and reaches the relay'
        )
        told = kubectl.run("get", "namespaces", check=False)
        assert told.returncode == 1
        shown = re.search(
            rf'arcbridge: cluster "{CLUSTER}" has no connected agent.* \(session ([0-9a-f]{{16}})\)', told.stderr
        )
        assert shown is not None, told.stderr
        wait_for_record(world.relay, "join failed", session=shown[1])
        found = records(world.relay, "join failed", after=mark)
        assert {record["code"] for record in found} == {"NO_AGENT"}
        # The log has one line for each join that was asked for, and no other.
        assert len(found) == len({record["session"] for record in found})
    finally:
        agent_again(world)
    until(kubectl.works, "kubectl works again", timeout=40)
    assert alice.process.running


def test_an_agent_without_a_relay_is_alive_and_not_ready(world: World, kubectl: Kubectl) -> None:
    world.kill_relay()

    def reason() -> str:
        try:
            page(world.agent_observe, "/readyz")
        except urllib.error.HTTPError as error:
            return f"{error.code} {error.read().decode()}"
        return ""

    assert until(reason, "the agent is not ready").startswith("503 [-] control: ")
    assert page(world.agent_observe, "/healthz")
    world.start_relay()
    until(lambda: not reason(), "the agent is ready again", timeout=40)
    until(kubectl.works, "kubectl works again", timeout=40)


def test_a_token_that_ends_during_a_watch(world: World, cluster: Cluster) -> None:
    """The watch ends and kubectl is told; with a new token in the file the same client works again."""
    _, identity = world.login_files(ALICE, world.directory / "ends")
    begun = time.monotonic()
    world.run_client(ALICE, "run", "--", "true", check=True)
    # A client and kubectl begin before the token ends: where they take longer, the token lives longer.
    life = max(8, math.ceil(5 * (time.monotonic() - begun)))
    rewrite(identity, world.token(ALICE, CLUSTER_AUDIENCE, lifetime=life))
    client = world.start_client(ALICE, "--id-token-file", str(identity))
    ending = wait_for_record(client.process, "session established")["session"]
    with cluster.kubectl_for(kubeconfig=client.kubeconfig).start("get", "namespaces", "--watch", "-o", "name") as ended:
        ended.wait_for_line("namespace/default")
        # client-go takes every end of a watch, a reset too, for the server's timeout, and kubectl ends without a word.
        ended.wait(life + 30)
    record = wait_for_record(world.agent, "session ended", session=ending)
    assert record["reason"] == "the token has expired; log in again"
    assert wait_for_record(client.process, "no session")["reason"] == "the login has expired; log in again"
    told = cluster.kubectl_for(kubeconfig=client.kubeconfig).run("get", "namespaces", check=False)
    assert told.returncode == 1
    assert "You must be logged in to the server (arcbridge: " in told.stderr
    assert "expired" in told.stderr
    rewrite(identity, world.token(ALICE, CLUSTER_AUDIENCE))
    until(lambda: cluster.kubectl_for(kubeconfig=client.kubeconfig).works(), "the new token is taken")
    client.process.stop()


def test_a_session_at_its_greatest_age(world: World, cluster: Cluster) -> None:
    """What runs ends though the token is good for an hour; the next command works, and no one has to log in."""
    text = world.agent_config.read_text()
    world.agent.stop()
    world.agent_config.write_text(f'{text}\n[session]\nmax_age = "12s"\n')
    client = None
    try:
        agent_again(world)
        mark = world.agent.mark()
        client = world.start_client(ALICE)
        with cluster.kubectl_for(kubeconfig=client.kubeconfig).start(
            "get", "namespaces", "--watch", "-o", "name"
        ) as watch:
            watch.wait_for_line("namespace/default")
            watch.wait(40)
        record = wait_for_record(world.agent, "session ended", after=mark, user=ALICE.email)
        sentence = (
            "a session lasts 12 s here at most; start again what ran in it, and log in again if that is asked for"
        )
        assert record["reason"] == sentence
        assert wait_for_record(client.process, "the agent drains the session")["reason"] == sentence
        assert cluster.kubectl_for(kubeconfig=client.kubeconfig).works()
    finally:
        if client is not None:
            client.process.stop()
        world.agent.stop()
        world.agent_config.write_text(text)
        agent_again(world)


def test_a_cluster_that_is_revoked_and_restored(
    world: World, alice: Client, kubectl: Kubectl, cluster: Cluster
) -> None:
    mark = world.relay.mark()
    with kubectl.start("get", "namespaces", "--watch", "-o", "name") as watch:
        watch.wait_for_line("namespace/default")
        relay_command(world, "cluster", "revoke", CLUSTER)
        watch.wait(30)
    told = kubectl.run("get", "namespaces", check=False)
    assert told.returncode == 1
    # The session that was cut says the one, an attempt to make another one the other.
    revoked = f'arcbridge: cluster "{CLUSTER}": access was revoked'
    assert revoked in told.stderr or f'arcbridge: cluster "{CLUSTER}" does not exist or you may not' in told.stderr
    only(world.relay, "sessions cut off", after=mark)
    only(world.relay, "agent cut off", after=mark)
    done = start(world)
    assert done.returncode == ExitCode.DENIED
    world.agent.stop()
    relay_command(world, "cluster", "restore", CLUSTER)
    agent_again(world)
    until(kubectl.works, "kubectl works again", timeout=40)


def relay_command(world: World, *arguments: str) -> None:
    run(arcbridge("--role", "relay", *arguments, "--config", str(world.relay_config)))


@pytest.mark.parametrize("protocol", ["true", "false"], ids=["websocket", "spdy"])
def test_ctrl_c_leaves_nothing_open(
    world: World, cluster: Cluster, kubectl: Kubectl, door: FaultProxy, protocol: str
) -> None:
    cluster.add_pod("left", NAMESPACE)
    assert kubectl.works()

    def under_way() -> tuple[float, float]:
        found = metrics(world.agent_observe)
        return found["arcbridge_agent_requests_in_flight"], found["arcbridge_agent_upgrades_open"]

    until(lambda: under_way() == (0, 0), "nothing runs before")
    env = {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": protocol}
    try:
        with (
            kubectl.start("exec", "-n", NAMESPACE, "left", "--", "sh", "-c", "echo on; sleep 600", env=env) as shell,
            kubectl.start("get", "namespaces", "--watch", "-o", "name") as watch,
        ):
            shell.wait_for_line("on", stream="stdout")
            watch.wait_for_line("namespace/default")
            # The watch of one kubectl may be a list and a watch; what counts is that all of it goes.
            assert under_way()[1] == 1
            shell.signal(signal.SIGINT)
            watch.signal(signal.SIGINT)
            shell.wait()
            watch.wait()
        until(lambda: under_way() == (0, 0), "the agent holds nothing")
        # The pool drops idle connections to the API server after 15 s; one that carried a stream ends at once.
        until(lambda: door.passing <= 4, "upstream connections are closed", timeout=40)
    finally:
        cluster.delete_pod("left", NAMESPACE)


def test_h29_a_warm_connection(world: World, cluster: Cluster, kubectl: Kubectl, door: FaultProxy) -> None:
    """The next `exec` leaves on a connection that was there before kubectl; what becomes of it where none comes."""
    cluster.add_pod("warm", NAMESPACE)
    line = "x" * 100_000

    def kept() -> dict[str, float]:
        name = "arcbridge_agent_apiserver_warm_connections"
        found = metrics(world.agent_observe)
        fates = {fate: found[f'{name}_total{{fate="{fate}"}}'] for fate in ("used", "expired", "closed")}
        return {"held": found[name], **fates}

    def run_one() -> None:
        assert kubectl.run("exec", "-n", NAMESPACE, "warm", "--", "echo", "done").stdout == "done\n"

    def wait_until_held(count: int) -> None:
        until(lambda: kept()["held"] == count, f"{count} are held")

    def shell() -> ManagedProcess:
        return kubectl.start("exec", "-i", "-n", NAMESPACE, "warm", "--", "cat", stdin=True)

    try:
        run_one()
        wait_until_held(1)
        before, used = {one.number: one.up for one in door.passages}, kept()["used"]
        with shell() as first:
            first.send(line + "\n")
            first.wait_for_line(line)
            (carrier,) = [one for one in door.passages if one.up - before.get(one.number, 0) >= len(line)]
            assert carrier.number in before, "it needed no connection, and no handshake, of its own"
            assert kept()["used"] == used + 1

        # The API server goes down and comes back. The next command makes its own connection.
        wait_until_held(1)
        door.cut("fin")
        wait_until_held(0)
        run_one()

        # The agent's token is replaced, as kubelet does.
        wait_until_held(1)
        assert world.api.token_file is not None
        rewrite(world.api.token_file, world.api.token_file.read_text())
        world.agent.signal(signal.SIGHUP)
        wait_until_held(0)
        run_one()

        # The session loses its relay: what runs goes on over the next connection, and nothing is kept meanwhile.
        with shell() as second:
            second.send("one\n")
            second.wait_for_line("one")
            wait_until_held(1)
            world.kill_relay()
            wait_until_held(0)
            world.start_relay()
            second.send("two\n")
            second.wait_for_line("two", timeout=40)
        assert kept()["used"] == used + 2, "that of the last command before the relay died"
        run_one()
    finally:
        cluster.delete_pod("warm", NAMESPACE)


def test_a_cluster_that_came_back_with_another_ca(
    world: World, alice: Client, kubectl: Kubectl, cluster: Cluster, tmp_path: Path
) -> None:
    """The agent lost its state: a client that trusted the old CA is told both pins, and sends no token."""
    world.agent.stop()
    token = json.loads(
        run(
            arcbridge(
                *("--role", "relay", "token", "create", "--cluster", CLUSTER, "--rebind", "-o", "json"),
                *("--config", str(world.relay_config)),
            )
        ).stdout
    )["token"]
    world.agent_config.with_name("join-token").write_text(token)
    text = world.agent_config.read_text()
    world.agent_config.write_text(text.replace('directory = "state"', 'directory = "state-2"'))
    mark = world.relay.mark()
    agent_again(world)
    verified = tokens_judged(world, "agent")
    told = kubectl.run("get", "namespaces", check=False)
    assert told.returncode == 1
    assert "arcbridge: the CA of cluster" in told.stderr
    assert told.stderr.count("sha256:") == 2
    # At the command line of the same person, whose state remembers the pin.
    arguments = world.client_arguments(ALICE, alice.directory)
    done = run(
        arcbridge(*arguments, "--file", str(tmp_path / "kubeconfig"), "--port", "0"),
        env={**os.environ, **alice.env},
        check=False,
    )
    text = done.stderr.decode()
    assert done.returncode == ExitCode.FAILURE
    assert text.count("sha256:") >= 2
    assert "Go on only when the owner confirms the new pin" in text
    assert tokens_judged(world, "agent") == verified
    wait_for_record(world.relay, "joined", after=mark)  # the relay cannot know; the client does


def test_nothing_raised_in_all_this(world: World, alice: Client) -> None:
    processes: list[ManagedProcess] = [process for process in world.processes]
    assert [process.name for process in processes if "Traceback" in process.output()] == []
