"""`proxy` as a whole, in process: the lines, the kubeconfig, and what is put back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcbridge.client.commands.proxy import run_proxy
from arcbridge.client.kubeconfig.file import KubeconfigFile
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.errors import ConfigError, Unauthenticated, Unreachable
from arcbridge.net.join import JoinCode
from arcbridge.wire.records import JoinReply
from tests.client.far_side import CLUSTER, FarSide
from tests.client.session.test_session_manager import settings
from tests.support.eventually import until
from tests.support.reports import rewrite
from tests.support.world import fixed_port


class Case:
    """A user's settings, the lines they see, and a running command."""

    def __init__(self, far: FarSide, directory: Path) -> None:
        self.directory = directory
        self.kubeconfig = directory / "kube" / "config"
        self.lines: list[str] = []
        self.stdout: list[str] = []
        self.config = settings(far, directory, cluster=CLUSTER, port=0, file=str(self.kubeconfig))
        self.terminal = Terminal(tell=self.lines.append, write_data=self.stdout.append)

    @contextlib.asynccontextmanager
    async def running(self, **changes: Any) -> AsyncIterator[None]:
        ready = asyncio.Event()
        async with started(run_proxy(self.context(**changes), ready=ready.set), ready):
            yield

    def context(self, **changes: Any) -> ClientContext:
        return ClientContext(replace(self.config, **changes), self.terminal, token=self.token, environment={})

    token = ""

    def document(self) -> Any:
        return yaml.safe_load(self.kubeconfig.read_text())


def short_lives(patch: pytest.MonkeyPatch) -> None:
    """Let the client certificate end within seconds, and be looked at as often."""
    patch.setattr("arcbridge.client.state.CLIENT_CERTIFICATE_LIFE", 2.0)
    patch.setattr("arcbridge.client.state.SERVER_CERTIFICATE_REUSE", 0.0)
    patch.setattr("arcbridge.client.serving.served_cluster.RENEWAL_CHECK", 0.05)


@contextlib.asynccontextmanager
async def started(work: Any, ready: asyncio.Event) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(ready.wait())
    await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        await task
        raise AssertionError("it ended by itself")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def case(far: FarSide, tmp_path: Path) -> Case:
    return Case(far, tmp_path)


class TestProxy:
    async def test_the_four_lines_and_the_way_back(self, case: Case) -> None:
        case.kubeconfig.parent.mkdir()
        case.kubeconfig.write_text("current-context: home\n")
        port = fixed_port()
        async with case.running(port=port):
            document = case.document()
            assert document["clusters"][0]["cluster"]["server"] == f"https://127.0.0.1:{port}"
            assert case.lines == [
                f"Proxy is listening on port {port}",
                f'Merged "prod" as current context in {case.kubeconfig}',
                f"Start sending kubectl requests on 'prod' context using kubeconfig at {case.kubeconfig}",
                "Press Ctrl+C to close proxy.",
            ]
            assert document["current-context"] == "prod"
        assert case.document()["current-context"] == "home"
        assert case.document()["contexts"][0]["name"] == "prod"
        with socket.socket() as free:
            free.bind(("127.0.0.1", port))

    async def test_a_context_of_another_name_that_is_removed(self, case: Case) -> None:
        async with case.running(kube_context="mine", context_switch=False, remove_context=True):
            assert case.document()["contexts"][0]["name"] == "mine"
            assert "current-context" not in case.document()
            assert case.lines[1] == f'Merged "mine" in {case.kubeconfig}'
        assert case.document()["contexts"] == []

    async def test_standard_output_is_the_kubeconfig_alone(self, case: Case) -> None:
        async with case.running(file="-"):
            assert len(case.stdout) == 1
            assert yaml.safe_load(case.stdout[0])["current-context"] == "prod"
            assert [line.split()[0] for line in case.lines] == ["Proxy", "Press"]
        assert not case.kubeconfig.exists()

    async def test_a_busy_port_changes_nothing(self, case: Case, far: FarSide) -> None:
        with socket.socket() as squatter:
            squatter.bind(("127.0.0.1", 0))
            squatter.listen()
            port = squatter.getsockname()[1]
            with pytest.raises(ConfigError) as caught:
                async with case.running(port=port):
                    pass
        assert caught.value.message.splitlines()[0] == (
            f"Port {port} is already in use. Please select a different port with --port option."
        )
        assert not case.kubeconfig.exists()
        assert far.requests == []

    @pytest.mark.parametrize(
        ("code", "kind"), [(JoinCode.NO_AGENT, Unreachable), (JoinCode.UNAUTHENTICATED, Unauthenticated)]
    )
    async def test_a_failed_start_changes_nothing(
        self, case: Case, far: FarSide, code: JoinCode, kind: type[Exception]
    ) -> None:
        far.reply = JoinReply(code=code)
        with pytest.raises(kind):
            async with case.running():
                pass
        assert not case.kubeconfig.exists()
        assert [line.split()[0] for line in case.lines] == ["Proxy"]

    async def test_a_foreign_entry_is_found_before_the_login(self, case: Case, far: FarSide) -> None:
        case.kubeconfig.parent.mkdir()
        case.kubeconfig.write_text("clusters:\n- name: prod\n  cluster: {server: x}\n")
        with pytest.raises(ConfigError, match="--kube-context"):
            async with case.running():
                pass
        assert (far.requests, case.lines) == ([], [])

    async def test_token_mode(self, case: Case, far: FarSide) -> None:
        case.token = "literal"
        async with case.running():
            assert case.document()["users"][0]["user"]["token"] == "literal"
        assert far.auths[0].kind == "bearer"
        case.token = ""
        (case.directory / "sa").write_text("from-file")
        async with case.running(token_file=case.directory / "sa"):
            user = case.document()["users"][0]["user"]
            assert (user["tokenFile"], "token" in user) == (str(case.directory / "sa"), False)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"cluster": ""}, "give --cluster"),
            ({"cluster": "UPPER"}, "flag --cluster"),
            ({"relay": ""}, "give --relay"),
            ({"clusters": ("b",)}, "fits one cluster"),
            ({"clusters": ("b",), "cluster_ca_pin": "", "port": 4711}, "fits one cluster"),
            ({"clusters": ("b",), "cluster_ca_pin": "", "file": "-"}, "one cluster"),
        ],
    )
    async def test_settings_that_cannot_work(self, case: Case, changes: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            async with case.running(**changes):
                pass


async def test_a_proxy_that_runs_long_renews_the_certificate_of_the_kubeconfig(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_lives(monkeypatch)
    async with case.running():
        with KubeconfigFile(case.kubeconfig).locked():  # as kubectl: else what is renewed meanwhile takes it back
            document = case.document()
            document["contexts"][0]["context"]["namespace"] = "mine"
            rewrite(case.kubeconfig, yaml.safe_dump(document))
        first = document["users"]
        await until(lambda: case.document()["users"] != first)
        assert case.document()["contexts"][0]["context"]["namespace"] == "mine"
        assert case.document()["current-context"] == document["current-context"]
