"""`gateway` as a whole, in process: it serves without a login of its own, and takes over younger certificates."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from arcbridge.client.commands import gateway as module
from arcbridge.client.commands.gateway import CertificateFiles, run_gateway
from arcbridge.client.service import Terminal
from arcbridge.errors import ConfigError
from arcbridge.settings.config import ClientConfig, LoginConfig, ObserveConfig
from tests.client.commands.test_proxy import started
from tests.client.far_side import CLUSTER, RELAY_CA, FarSide
from tests.client.serving.gateway.station import GATEWAY_CA, NamingFarSide, headers
from tests.support.eventually import until


class Case:
    """A gateway's settings, its files, and the lines that it shows."""

    def __init__(self, far: FarSide | None, directory: Path) -> None:
        (directory / "relay-ca.pem").write_text(RELAY_CA.certificate_pem)
        self.certificate, self.key = directory / "tls.crt", directory / "tls.key"
        self.issue()
        self.lines: list[str] = []
        self.config = ClientConfig(
            relay=far.address if far is not None else "",
            relay_ca_file=directory / "relay-ca.pem",
            trust_first_use=True,
            state_dir=directory / "state",
            login=LoginConfig(one_token=True),
        )

    def issue(self) -> None:
        issued = GATEWAY_CA.issue_server(["127.0.0.1"])
        self.certificate.write_text(issued.certificate_pem)
        self.key.write_text(issued.key_pem)

    @contextlib.asynccontextmanager
    async def running(self, config: ClientConfig | None = None) -> AsyncIterator[str]:
        ready = asyncio.Event()
        work = run_gateway(
            config or self.config,
            Terminal(tell=self.lines.append),
            "127.0.0.1:0",
            self.certificate,
            self.key,
            environment={},
            ready=ready.set,
        )
        async with started(work, ready):
            yield self.lines[-1].rpartition(" ")[2]


async def test_it_serves_and_ends(tmp_path: Path) -> None:
    async with NamingFarSide() as far:
        case = Case(far, tmp_path)
        tls = ssl.create_default_context(cadata=GATEWAY_CA.certificate_pem)
        async with case.running() as url, aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as client:
            assert case.lines == [f"Gateway is listening on {url}"]
            for caller in ("alice", "bob", "alice"):
                async with client.get(f"{url}/clusters/{CLUSTER}/api", headers=headers(caller)) as answer:
                    assert (await answer.json())["caller"] == caller
        await until(lambda: all(session.closed for session in far.sessions))


async def test_settings_that_cannot_work(tmp_path: Path, far: FarSide) -> None:
    from dataclasses import replace

    case = Case(far, tmp_path)
    with pytest.raises(ConfigError, match="cluster_ca_pin: is for one cluster"):
        async with case.running(replace(case.config, cluster_ca_pin=RELAY_CA.pin)):
            pass
    with pytest.raises(ConfigError, match=r"observe\.listen"):
        async with case.running(replace(case.config, observe=ObserveConfig(listen="nowhere"))):
            pass
    with pytest.raises(ConfigError, match="pins_file: required"):
        async with case.running(replace(case.config, trust_first_use=False)):
            pass
    for login in (LoginConfig(require_bound=True), LoginConfig(access_token_file=case.key)):
        with pytest.raises(ConfigError, match=r"login\..*has no effect at a gateway"):
            async with case.running(replace(case.config, login=login)):
                pass
    with pytest.raises(ConfigError, match="relays: required, because a gateway has no login"):
        async with Case(None, tmp_path).running():
            pass


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    case = Case(None, tmp_path)
    with pytest.raises(ConfigError, match=r"--certificate: cannot read .*none\.crt: No such file"):
        CertificateFiles(tmp_path / "none.crt", case.key).load()
    case.key.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"--key: .*tls\.key is no PEM file"):
        CertificateFiles(case.certificate, case.key).load()
    case.key.write_text("nothing")
    with pytest.raises(ConfigError, match="flags --certificate and --key: "):
        CertificateFiles(case.certificate, case.key).load()


async def test_younger_certificates_are_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CERTIFICATE_CHECK", 0.01)
    async with NamingFarSide() as far:
        case = Case(far, tmp_path)
        tls = ssl.create_default_context(cadata=GATEWAY_CA.certificate_pem)

        async def shown() -> bytes:
            port = int(case.lines[-1].rpartition(":")[2])
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
            writer.close()
            found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            return found

        async with case.running():
            first = await shown()
            case.key.write_text("damaged")
            case.issue()

            async def changed() -> bool:
                return await shown() != first

            await until(changed)
