"""A background process in this one, before a relay and an agent of its own."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcbridge.client.background.caller import answer_of, exchange, request
from arcbridge.client.background.connection_settings import read_words
from arcbridge.client.background.process import BackgroundProcess
from arcbridge.client.background_paths import BackgroundPaths
from tests.client.far_side import CLUSTER, CLUSTER_CA, RELAY_CA, FarSide
from tests.client.session.test_session_manager import login
from tests.support.world import fixed_port


class Background:
    """A user of the background process."""

    def __init__(self, far: FarSide, directory: Path, callers: ThreadPoolExecutor) -> None:
        (directory / "relay-ca.pem").write_text(RELAY_CA.certificate_pem)
        self.far = far
        self._callers = callers
        self.place = BackgroundPaths(str(directory / "run"), str(directory / "state"))
        self.kubeconfig = directory / "config"
        self._settings = directory / "arcbridge" / "client.toml"
        self._settings.parent.mkdir()
        tokens = login(directory)
        self._text = (
            f'relay = "{far.address}"\nrelay_ca_file = "{directory}/relay-ca.pem"\n'
            f'cluster_ca_pin = "{CLUSTER_CA.pin}"\n'
            f'state_dir = "{directory}/state"\n[login]\naccess_token_file = "{tokens.access_token_file}"\n'
            f'id_token_file = "{tokens.id_token_file}"\n'
        )
        self._settings.write_text(self._text)
        self.environment = {"XDG_CONFIG_HOME": str(directory), "HOME": str(directory)}
        self.arguments = ("--cluster", CLUSTER)
        self.settings = read_words(self.arguments)

    def take_settings_away(self, away: bool) -> None:
        """Let the settings be unreadable, or readable again."""
        self._settings.write_text("away" if away else self._text)

    def restrict(self, table: str) -> None:
        """Let the settings file restrict sessions."""
        self._settings.write_text(f"{self._text}[restrict]\n{table}\n")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        ready = asyncio.Event()
        task = asyncio.create_task(BackgroundProcess(self.place, self.environment).run(ready.set))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait([task, waiting], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        try:
            if task.done():
                await task
            yield task
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def ask(self, operation: str, *arguments: str, **more: str) -> dict[str, Any]:
        """The answer; raises the error that it states."""
        line = request(operation, arguments, **more)
        loop = asyncio.get_running_loop()
        return answer_of(await loop.run_in_executor(self._callers, exchange, self.place, line))

    async def connect(self, *more: str, **texts: str) -> dict[str, Any]:
        texts = {"kubeconfig": str(self.kubeconfig), "switch": "yes", "static": "", **texts}
        return await self.ask("connect", *self.arguments, *more, **texts)

    async def open(self, port: int, pem: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the local endpoint with a client certificate and its key."""
        file = Path(self.place.state) / "pem"
        file.write_text(pem)
        context = ssl.create_default_context(cafile=str(Path(self.place.state) / "local-ca" / "ca.crt"))
        context.load_cert_chain(file)
        return await asyncio.open_connection("127.0.0.1", port, ssl=context)

    def document(self) -> Any:
        return yaml.safe_load(self.kubeconfig.read_text())


@pytest.fixture
def place(tmp_path: Path) -> BackgroundPaths:
    return BackgroundPaths(str(tmp_path), str(tmp_path))


@pytest.fixture
def background(far: FarSide, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Background]:
    # Ports that clients of other tests, which begin at 47011, do not take while a process is away.
    monkeypatch.setattr("arcbridge.client.state.FIRST_PORT", fixed_port())
    # Threads of their own: on one CPU the loop has five, which the process needs while its callers wait in them.
    with ThreadPoolExecutor(16) as callers:
        yield Background(far, tmp_path, callers)


@pytest.fixture
async def port(background: Background) -> AsyncIterator[int]:
    """The port of a cluster that is connected; the process runs."""
    async with background.running():
        yield (await background.connect())["port"]
