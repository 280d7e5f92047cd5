"""How a draining pod leaves its workload: what is asked of the API server, and what its answers lead to."""

from __future__ import annotations

import asyncio
import json

import pytest
import structlog

from arcbridge.agent.kube.apiserver import ApiServer
from arcbridge.agent.workload import PodOfWorkload, parse_label, pod_name
from arcbridge.errors import ConfigError
from tests.support.eventually import until
from tests.support.fake_apiserver import Exchange, FakeApiServer, Route, Unanswered, closing, dying, reply

POD = "/api/v1/namespaces/arc/pods/agent-x"
LABEL = "app.kubernetes.io/instance=arc-draining"


@pytest.fixture
def pod(api: ApiServer) -> PodOfWorkload:
    return PodOfWorkload(api, "arc", "agent-x", LABEL)


async def test_one_label_is_patched(fake: FakeApiServer, pod: PodOfWorkload) -> None:
    fake.read_body = True
    fake.routes[POD] = closing(reply(200, b"{}"))
    with structlog.testing.capture_logs() as lines:
        await pod.leave()
    assert (fake.last.method, fake.last.target) == ("PATCH", POD)
    assert fake.last.header("content-type") == [b"application/merge-patch+json"]
    assert json.loads(fake.last.body) == {"metadata": {"labels": {"app.kubernetes.io/instance": "arc-draining"}}}
    assert [(line["event"], line["label"]) for line in lines] == [("pod left its workload", LABEL)]


@pytest.mark.parametrize("status", [400, 403, 404, 422])
async def test_a_refusal_is_logged_with_the_reason_and_not_repeated(
    fake: FakeApiServer, pod: PodOfWorkload, status: int
) -> None:
    fake.routes[POD] = closing(reply(status, json.dumps({"message": "no\nright" + "." * 5000}).encode()))
    with structlog.testing.capture_logs() as lines:
        await pod.leave()
    (line,) = lines
    assert (line["event"], line["log_level"], line["status"]) == ("pod stays in its workload", "warning", status)
    assert line["reason"].startswith("no\\nright")
    assert len(line["reason"].encode()) <= 1024
    assert len(fake.requests) == 1


@pytest.mark.parametrize("body", [b"", b"[1]", b'{"message": 5}'])
async def test_a_refusal_without_a_reason(fake: FakeApiServer, pod: PodOfWorkload, body: bytes) -> None:
    fake.routes[POD] = closing(reply(403, body))
    with structlog.testing.capture_logs() as lines:
        await pod.leave()
    assert [line["reason"] for line in lines] == ["the API server gives no reason"]


async def test_it_is_tried_again_while_the_api_server_is_away(
    fake: FakeApiServer, pod: PodOfWorkload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcbridge.agent.workload.DEADLINE", 0.1)
    monkeypatch.setattr("arcbridge.agent.workload.SLOWEST", 0.01)
    faults = [closing(reply(503, b"{}")), closing(reply(409, b"{}")), dying, Unanswered(), closing(reply(200, b"{}"))]

    async def route(exchange: Exchange) -> None:
        await faults.pop(0)(exchange)

    fake.routes[POD] = route
    with structlog.testing.capture_logs() as lines:
        await asyncio.wait_for(pod.leave(), 30)
    assert faults == []
    assert [line["event"] for line in lines] == ["pod cannot leave yet", "pod left its workload"], "once"


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        (closing(reply(401, b'{"message": "Unauthorized"}')), 401, "Unauthorized"),
        (closing(reply(429, b"")), 429, "the API server gives no reason"),
        (dying, 0, "the connection was closed without a usable answer"),
        (Unanswered(), 0, "the API server does not answer within 0.1 seconds"),
    ],
)
async def test_the_first_failure_is_logged_while_the_drain_goes_on(
    fake: FakeApiServer, pod: PodOfWorkload, monkeypatch: pytest.MonkeyPatch, fault: Route, status: int, reason: str
) -> None:
    monkeypatch.setattr("arcbridge.agent.workload.DEADLINE", 0.1 if reason.endswith("seconds") else 15.0)
    fake.routes[POD] = fault
    with structlog.testing.capture_logs() as lines:
        leaving = asyncio.create_task(pod.leave())
        await until(lambda: bool(lines))
        leaving.cancel()
    (line,) = lines
    assert (line["event"], line["log_level"], line["status"]) == ("pod cannot leave yet", "warning", status)
    assert line["reason"].startswith(reason)


async def test_an_error_of_its_own_is_logged(
    api: ApiServer, pod: PodOfWorkload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(api), "ask", lambda *_, **__: 1 / 0)
    with structlog.testing.capture_logs() as lines:
        await pod.leave()
    assert [(line["event"], line["reason"]) for line in lines] == [("pod stays in its workload", "ZeroDivisionError")]


async def test_it_ends_with_the_drain(fake: FakeApiServer, pod: PodOfWorkload) -> None:
    held = Unanswered()
    fake.routes[POD] = held
    leaving = asyncio.create_task(pod.leave())
    await until(lambda: len(fake.requests) == 1)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        (LABEL, ("app.kubernetes.io/instance", "arc-draining")),
        ("state=gone", ("state", "gone")),
        ("a.b/C_d.e-f=x.Y_z", ("a.b/C_d.e-f", "x.Y_z")),
    ],
)
def test_labels(text: str, parsed: tuple[str, str]) -> None:
    assert parse_label(text) == parsed


@pytest.mark.parametrize("text", ["", "a", "a=", "=b", "a=b=c", "-a=b", "a=b-", "/a=b", "a/=b", "a/b/c=d", "a=b\n"])
def test_what_is_no_label(text: str) -> None:
    with pytest.raises(ConfigError, match=r"kubernetes\.drain_label: write key=value"):
        parse_label(text)
    with pytest.raises(ConfigError):
        parse_label("a=" + "b" * 64)


def test_the_pods_name_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POD_NAME", "agent-x")
    assert pod_name() == "agent-x"
    assert pod_name({"POD_NAME": "agent-y"}) == "agent-y"
    with pytest.raises(ConfigError, match=r"kubernetes\.drain_label: needs the pod's name"):
        pod_name({})
