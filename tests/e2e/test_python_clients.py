"""Programs other than kubectl: the official Python client and its asynchronous sister, on the saved kubeconfig.

Each is imported where it is used: that takes seconds, for which no other test of the process should wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.cluster import Cluster
from tests.support.world import Client

NAMESPACE = "python-clients"


@pytest.fixture(scope="module")
def pod(cluster: Cluster) -> Iterator[str]:
    cluster.add_pod("target", NAMESPACE)
    yield "target"
    cluster.delete_pod("target", NAMESPACE)


@pytest.fixture
def core(alice: Client) -> Iterator[Any]:
    """The official client's API object; a client of its own, since `stream` changes it while it runs."""
    import kubernetes

    with kubernetes.config.new_client_from_config(str(alice.kubeconfig)) as client:
        yield kubernetes.client.CoreV1Api(client)


def test_list(core: Any, cluster: Cluster) -> None:
    names = {item.metadata.name for item in core.list_namespace().items}
    assert names == {item["metadata"]["name"] for item in cluster.request("GET", "/api/v1/namespaces")["items"]}


def test_exec(core: Any, pod: str) -> None:
    from kubernetes.stream import stream

    shell = stream(
        core.connect_get_namespaced_pod_exec,
        pod,
        NAMESPACE,
        command=["sh", "-c", "read line; echo got $line; echo bad >&2; exit 5"],
        stdin=True,
        stdout=True,
        stderr=True,
        tty=False,
        _preload_content=False,
    )
    shell.write_stdin("hello\n")
    shell.run_forever(timeout=20)
    assert shell.read_stdout() == "got hello\n"
    assert shell.read_stderr() == "bad\n"
    assert shell.returncode == 5


async def test_asynchronous_list_and_exec(alice: Client, cluster: Cluster, pod: str) -> None:
    import kubernetes_asyncio
    from kubernetes_asyncio.stream import WsApiClient

    configuration = kubernetes_asyncio.client.Configuration()
    await kubernetes_asyncio.config.load_kube_config(str(alice.kubeconfig), client_configuration=configuration)
    async with asyncio.timeout(30), kubernetes_asyncio.client.ApiClient(configuration) as client:
        core = kubernetes_asyncio.client.CoreV1Api(client)
        answers = await asyncio.gather(*(core.list_namespace() for _ in range(10)))
        names = {item["metadata"]["name"] for item in cluster.request("GET", "/api/v1/namespaces")["items"]}
        assert [{item.metadata.name for item in answer.items} for answer in answers] == [names] * 10
    async with asyncio.timeout(30), WsApiClient(configuration) as client:
        answer = await kubernetes_asyncio.client.CoreV1Api(client).connect_get_namespaced_pod_exec(
            pod, NAMESPACE, command=["echo", "over a websocket"], stdout=True, stderr=True, stdin=False, tty=False
        )
        assert answer == "over a websocket\n"
