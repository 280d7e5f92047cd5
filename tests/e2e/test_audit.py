"""The audit log of a real agent: killed, on a full disk, beside the API server's own, and checked by the command."""

from __future__ import annotations

import asyncio
import base64
import http.client
import json
import re
import resource
import signal
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcbridge.agent.kube.pod_body import pod_details
from tests.support.cluster import Cluster
from tests.support.fake_apiserver import Exchange, FakeApiServer
from tests.support.processes import run
from tests.support.reports import audited, page, until, wait_for_record
from tests.support.world import ALICE, ApiServer, Client, World, arcbridge

PODS = "/api/v1/namespaces/default/pods"
WATCHES, WRITES, SHELLS = 140, 110, 50


@contextmanager
def fake_api(directory: Path) -> Iterator[FakeApiServer]:
    """An API server that answers nothing below PODS, in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True, name="fake-api-server")
    thread.start()
    serving = FakeApiServer.serving(directory)
    fake = asyncio.run_coroutine_threadsafe(serving.__aenter__(), loop).result(10)

    async def never(_: Exchange) -> None:
        await asyncio.Event().wait()

    for path in (PODS, f"{PODS}/p/exec"):
        fake.routes[path] = never
    try:
        yield fake
    finally:
        asyncio.run_coroutine_threadsafe(serving.__aexit__(None, None, None), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


@contextmanager
def organisation(directory: Path, audit: str = "") -> Iterator[tuple[World, Client, FakeApiServer]]:
    """Issuer, relay, agent and client before an API server that answers nothing below PODS."""
    (directory / "api").mkdir()
    with ExitStack() as stack:
        fake = stack.enter_context(fake_api(directory / "api"))
        api = ApiServer(fake.url, fake.ca_file, fake.token_file)
        world = stack.enter_context(World(api, directory=directory / "world"))
        world.agent_audit = audit
        world.agent_settings = "limits.apiserver_seats = 300\n"  # one user holds as many requests open as many do
        world.start()
        yield world, world.start_client(ALICE), fake


def connection(client: Client) -> http.client.HTTPSConnection:
    """A connection to the client's endpoint, with the certificate of its kubeconfig."""
    config = yaml.safe_load(client.kubeconfig.read_text())
    user, cluster = config["users"][0]["user"], config["clusters"][0]["cluster"]
    pem = client.directory / "endpoint.pem"
    pem.write_bytes(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
    authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
    context = ssl.create_default_context(cadata=authority)
    context.load_cert_chain(pem)
    return http.client.HTTPSConnection("127.0.0.1", client.port, context=context, timeout=30)


def ask(client: Client, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    """One request through the client; answers code and body."""
    made = connection(client)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        made.request(method, path, body or None, named)
        answer = made.getresponse()
        return answer.status, answer.read()
    finally:
        made.close()


def lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def verified(*arguments: object) -> tuple[int, str]:
    """Run `audit verify`; answers its exit code and what it printed."""
    done = run(arcbridge("audit", "verify", *map(str, arguments)), check=False)
    return done.returncode, done.stdout.decode()


@pytest.mark.timeout(300)
def test_a12_a_kill_takes_no_record_of_what_was_under_way(tmp_path: Path) -> None:
    upgrade = {
        "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Protocol": "v5.channel.k8s.io",
    }  # fmt: skip
    with organisation(tmp_path) as (world, client, fake):
        open_ones = []
        for number in range(WATCHES + WRITES + SHELLS):
            made = connection(client)
            if number < WATCHES:
                made.request("GET", f"{PODS}?watch=1")
            elif number < WATCHES + WRITES:
                made.request("POST", PODS, b"{}", {"Content-Type": "application/json"})
            else:
                made.request("GET", f"{PODS}/p/exec?command=id&container=c", headers=upgrade)
            open_ones.append(made)
        until(lambda: len(fake.requests) == len(open_ones), "all requests are at the API server", timeout=120)
        sent = {request.header("audit-id")[0].decode() for request in fake.requests}
        assert len(sent) == len(open_ones)
        world.agent.kill()
        found = [record for record in lines(world.audit_log) if record.get("stage") == "begun"]
        assert {record["request"] for record in found} == sent
        verbs = [record["verb"] for record in found]
        assert verbs.count("watch") == WATCHES
        assert sum(record.get("command") == ["id"] for record in found) == SHELLS
        assert not [record for record in lines(world.audit_log) if "outcome" in record]
        code, told = verified(world.audit_log)
        assert code == 0, told
        world.start_agent()
        code, told = verified(world.audit_log)
        assert code == 0, told
        assert "chains: 2" in told
        for made in open_ones:
            made.close()


def test_a11_a_full_disk(tmp_path: Path) -> None:
    """`refuse`: no user gets an answer that no record has; the agent says so, and comes back by itself."""
    with organisation(tmp_path, 'on_failure = "refuse"') as (world, client, fake):
        assert ask(client, "GET", "/version")[0] == 200
        until(lambda: len(lines(world.audit_log)) == 2, "the request is recorded")
        hard = resource.prlimit(world.agent.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(world.agent.pid, resource.RLIMIT_FSIZE, (world.audit_log.stat().st_size + 100, hard))
        before = len(fake.requests)
        code, body = ask(client, "POST", PODS + "/x", b"{}")
        assert code == 503
        assert json.loads(body)["message"].startswith(
            "arcbridge: the agent cannot write its audit log (File too large), and by its settings no request goes on"
        )
        assert ask(client, "GET", "/version")[0] == 503
        assert len(fake.requests) == before, "nothing reached the API server"

        def readiness() -> str:
            try:
                return page(world.agent_observe, "/readyz")
            except OSError as error:
                return error.read().decode() if hasattr(error, "read") else ""

        assert "the audit log cannot be written: File too large" in readiness()
        resource.prlimit(world.agent.pid, resource.RLIMIT_FSIZE, (hard, hard))
        until(lambda: ask(client, "GET", "/version")[0] == 200, "requests go on")
        assert "audit" not in page(world.agent_observe, "/readyz")
        wait_for_record(world.agent, "audit log is written again")
        until(lambda: lines(world.audit_log)[-1].get("status") == 200, "the request is recorded")
        assert [one["status"] for one in lines(world.audit_log) if one.get("outcome") == "refused"].count(503) >= 2
        world.agent.signal(signal.SIGTERM)
        assert world.agent.wait(30) == 0
        log = tmp_path / "agent.log"
        log.write_text("\n".join(world.agent.lines()) + "\n")
        code, told = verified(world.audit_log, "--anchors", log)
        assert code == 0, told
        whole = world.audit_log.read_bytes().splitlines(keepends=True)
        world.audit_log.write_bytes(b"".join(whole[:-2]))
        code, told = verified(world.audit_log, "--anchors", log)
        assert code == 1
        assert re.search(r"truncated .* records \d+ to \d+ are missing: the chain was cut off", told)


def test_a15_a19_the_api_server_has_the_agents_id_and_nothing_of_the_callers(
    world: World, alice: Client, cluster: Cluster
) -> None:
    forged = {"Audit-ID": "forged-id", "X-Forwarded-For": "6.6.6.6", "X-Real-Ip": "6.6.6.7", "X-Remote-User": "root"}
    for number, more in enumerate(({}, {"X-Http2-Settings": "a", "Expect": "100-continue"})):
        name = f"audited-{number}"
        assert ask(alice, "GET", f"/api/v1/namespaces/default/configmaps/{name}", **forged, **more)[0] == 404
        record = audited(world, "it", name=name)
        events = until(
            lambda record=record: [one for one in cluster.audit_events() if one["auditID"] == record["request"]],
            "the API server's own log has the same id",
        )
        assert len(str(record["request"])) <= 64
        for event in events:
            assert event["impersonatedUser"]["username"] == ALICE.email
            assert not {"6.6.6.6", "6.6.6.7"} & set(event["sourceIPs"])
    assert not [one for one in cluster.audit_events() if one["auditID"] == "forged-id"]


def test_a16_a_privileged_pod_as_the_api_server_itself_writes_it(world: World, alice: Client) -> None:
    """In JSON, and in the API server's own protobuf."""
    pod = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "audited-pod"},
        "spec": {
            "nodeName": "nowhere",  # so that no node changes it between GET and PUT
            "hostPID": True,
            "volumes": [{"name": "root", "hostPath": {"path": "/etc"}}],
            "containers": [
                {
                    "name": "c",
                    "image": "i",
                    "securityContext": {"privileged": True, "capabilities": {"add": ["SYS_ADMIN"]}},
                }
            ],
        },
    }  # fmt: skip
    wanted = ["capability SYS_ADMIN c", "hostPID", "hostPath /etc"]
    earlier = {line.get("request") for line in world.audit_lines()}
    code, body = ask(alice, "POST", PODS, json.dumps(pod).encode(), Content_Type="application/json")
    assert code == 422, body  # this API server runs without --allow-privileged
    refused = json.dumps(pod).replace('"privileged": true', '"privileged": false')
    code, body = ask(alice, "POST", PODS, refused.encode(), Content_Type="application/json")
    assert code == 201, body
    protobuf = "application/vnd.kubernetes.protobuf"
    code, body = ask(alice, "GET", f"{PODS}/audited-pod", Accept=protobuf)
    assert (code, body[:4]) == (200, b"k8s\x00")
    assert sorted(pod_details(body, protobuf, commands=True)["privileged"]) == sorted(wanted)
    assert ask(alice, "PUT", f"{PODS}/audited-pod", body, Content_Type=protobuf)[0] == 200
    debug = {
        "spec": {"ephemeralContainers": [{"name": "d", "image": "j", "command": ["sh"], "targetContainerName": "c"}]}
    }
    path = f"{PODS}/audited-pod/ephemeralcontainers"
    patch = "application/strategic-merge-patch+json"
    assert ask(alice, "PATCH", path, json.dumps(debug).encode(), Content_Type=patch)[0] == 200
    code, body = ask(alice, "GET", f"{PODS}/audited-pod", Accept=protobuf)
    found = pod_details(body, protobuf, commands=True)
    assert (found["ephemeral_containers"], found["images"], found["command"]) == (["d"], ["j"], ["sh"])
    assert ask(alice, "DELETE", f"{PODS}/audited-pod?gracePeriodSeconds=0")[0] == 200

    def stages(one: dict[str, Any]) -> list[str]:
        return [line["stage"] for line in world.audit_lines() if line.get("request") == one["request"]]

    def details() -> list[dict[str, Any]]:
        ours = [one for one in world.audit_lines() if one.get("request") not in earlier]
        return [one for one in ours if one["stage"] == "details" and one["verb"] != "delete"]

    until(lambda: len(details()) >= 4 and all("ended" in stages(one) for one in details()), "they are recorded")
    *bodies, patched = details()
    asked = [sorted(one.get("privileged", [])) for one in bodies]
    assert asked == [sorted([*wanted, "privileged c"]), sorted(wanted), sorted(wanted)]
    assert (patched["ephemeral_containers"], patched["target_containers"]) == (["d"], ["c"])
    assert [stages(one) for one in (*bodies, patched)] == [["begun", "details", "ended"]] * 4
    code, told = verified(world.audit_log)
    assert code == 0, told
