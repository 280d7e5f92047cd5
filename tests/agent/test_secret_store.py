"""The shared Secret: compare-and-set by resourceVersion (docs/threats.md#E3)."""

from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trustme

from arcbridge.agent.kube.apiserver import ApiServer, endpoint_of
from arcbridge.agent.secret_store import SecretStore
from arcbridge.errors import ArcbridgeError, ConfigError, StateError, Unreachable
from arcbridge.pki.credentials import VersionConflict
from arcbridge.settings.config import AgentConfig
from tests.support.fake_apiserver import Exchange, FakeApiServer, reply

COLLECTION = "/api/v1/namespaces/arc/secrets"


class Secrets:
    """The API server's rules for one Secret."""

    def __init__(self, fake: FakeApiServer) -> None:
        self.document: dict[str, Any] | None = None
        self.version = 0
        fake.routes[COLLECTION] = fake.routes[f"{COLLECTION}/agent"] = self.serve

    def put(self, data: dict[str, bytes]) -> None:
        self.version += 1
        encoded = {name: base64.b64encode(value).decode() for name, value in data.items()}
        metadata = {"name": "agent", "resourceVersion": str(self.version), "labels": {"a": "b"}}
        self.document = {"kind": "Secret", "metadata": metadata, "data": encoded}

    async def serve(self, exchange: Exchange) -> None:
        request = exchange.request
        if request.method == "GET":
            await exchange.send(reply(200, json.dumps(self.document).encode()) if self.document else reply(404, b"{}"))
            return
        sent = json.loads(request.body)
        current = self.document["metadata"]["resourceVersion"] if self.document else None
        if (request.method == "POST") != (current is None) or (
            current is not None and sent["metadata"].get("resourceVersion") != current
        ):
            await exchange.send(reply(409, b"{}"))
            return
        self.version += 1
        sent["metadata"]["resourceVersion"] = str(self.version)
        self.document = sent
        await exchange.send(reply(200, json.dumps(sent).encode()))


@pytest.fixture
def made(fake: FakeApiServer, api: ApiServer) -> tuple[FakeApiServer, Secrets, SecretStore]:
    return fake, Secrets(fake), SecretStore(api, "arc/agent")


Made = tuple[FakeApiServer, Secrets, SecretStore]


async def test_nothing_then_created_then_changed(made: Made) -> None:
    fake, _, store = made
    assert await store.load() is None
    version = await store.save({"a": b"1"}, expect_version=None)
    found = await store.load()
    assert found == {"a": b"1"}
    assert found.version == version
    await store.save({"b": b"\x00\xff"}, expect_version=version)
    assert await store.load() == {"a": b"1", "b": b"\x00\xff"}
    assert fake.last.header("authorization") == [b"Bearer agent-own-token"]


async def test_the_manifest_ships_it_empty(made: Made) -> None:
    _, secrets, store = made
    secrets.put({})
    found = await store.load()
    assert found == {}
    await store.save({"a": b"1"}, expect_version=found.version)
    assert await store.load() == {"a": b"1"}
    assert secrets.document["metadata"]["labels"] == {"a": "b"}, "what is not ours stays"


async def test_an_older_version_writes_nothing(made: Made) -> None:
    _, secrets, store = made
    secrets.put({"a": b"1"})
    stale = secrets.version
    secrets.put({"a": b"2"})
    with pytest.raises(VersionConflict):
        await store.save({"a": b"3"}, expect_version=str(stale))
    with pytest.raises(VersionConflict):
        await store.save({"a": b"3"}, expect_version=None)
    assert await store.load() == {"a": b"2"}


async def test_e3_of_many_writers_one_wins(made: Made) -> None:
    _, secrets, store = made
    secrets.put({})
    version = str(secrets.version)
    results = await asyncio.gather(
        *(store.save({"who": str(n).encode()}, expect_version=version) for n in range(5)), return_exceptions=True
    )
    assert sum(isinstance(result, str) for result in results) == 1
    assert sum(isinstance(result, VersionConflict) for result in results) == 4


@pytest.mark.parametrize(
    ("code", "words", "kind"), [(403, "Role", StateError), (429, "429", Unreachable), (500, "500", Unreachable)]
)
async def test_refusals_say_what_to_do(made: Made, code: int, words: str, kind: type[ArcbridgeError]) -> None:
    fake, _, store = made
    fake.routes[f"{COLLECTION}/agent"] = reply(code, b'{"data":{"tls.key":"c2VjcmV0"}}')
    with pytest.raises(kind, match=words) as caught:
        await store.load()
    assert "c2VjcmV0" not in str(caught.value)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"metadata":{}}', b'{"metadata":{"resourceVersion":"1"},"data":{"a":"!"}}']
)
async def test_what_is_no_secret(made: Made, body: bytes) -> None:
    fake, _, store = made
    fake.routes[f"{COLLECTION}/agent"] = reply(200, body)
    with pytest.raises(StateError):
        await store.load()


async def test_an_api_server_that_is_down(made: Made) -> None:
    fake, _, store = made
    fake.stop()
    with pytest.raises(Unreachable, match=r"Secret arc/agent is not available: the API server cannot be reached \("):
        await store.load()


async def test_an_api_server_of_another_ca(config: AgentConfig, fake: FakeApiServer, tmp_path: Path) -> None:
    """The agent waits for the file to be corrected, and reads it again: the operator has to know which."""
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    api = ApiServer(endpoint_of(replace(config.kubernetes, ca_file=tmp_path / "other.pem"), {}))
    with pytest.raises(Unreachable, match=r"kubernetes\.ca_file"):
        await SecretStore(api, "arc/agent").load()
    await api.close()


@pytest.mark.parametrize("secret", ["agent", "/agent", "arc/", "Arc/agent", "arc/agent/x", "arc/../x"])
def test_names(secret: str) -> None:
    with pytest.raises(ConfigError, match=r"state\.secret"):
        SecretStore(None, secret)  # refused before it is used
