"""A running relay's reload: what is taken over, what needs a restart, and that a mistake changes nothing."""

from __future__ import annotations

import asyncio
import importlib
import os
import signal
from collections.abc import AsyncIterator, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from arcbridge.audit.verify import verify
from arcbridge.checks.diagnosis import FindingState
from arcbridge.checks.self_checks import SelfCheck
from arcbridge.errors import JoinRefused
from arcbridge.net.join import JoinCode
from arcbridge.observe import logging as logs
from arcbridge.observe.reloads import merged
from arcbridge.pki.authority import Authority
from arcbridge.relay import service, settings
from arcbridge.relay.admin_socket import ask
from arcbridge.relay.operations import Row
from arcbridge.relay.reload import RELOADABLE, RelayReload
from arcbridge.relay.service import RelayInfo, serve
from arcbridge.settings.config import RelayConfig, RelayLimitsConfig, RelayTlsConfig, RelayUserLimitsConfig
from tests.identity.issuer import CONFIG
from tests.relay.audit.test_log import records
from tests.relay.test_service import POLICY, Running, config  # noqa: F401  the fixture
from tests.support.eventually import until
from tests.support.world import fixed_port


class Reloading(Running):
    """A relay that serves, and reads `config` again at SIGHUP."""

    async def start(self) -> None:
        ready: asyncio.Future[RelayInfo] = asyncio.get_running_loop().create_future()
        serving = serve(self.config, ready.set_result, self.stopping, self.hurry, reread=lambda: self.config)
        self.task = asyncio.create_task(serving)
        await asyncio.wait([ready, self.task], return_when=asyncio.FIRST_COMPLETED)
        if self.task.done():
            self.task.result()
        self.info = ready.result()
        self.ca = ""

    async def reload(self, result: str) -> None:
        """Have the relay reload; return when a scrape says that it has."""
        before = await self.count(result)
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(10):
            while await self.count(result) == before:
                await asyncio.sleep(0.01)

    async def told(self, result: str, event: str) -> list[MutableMapping[str, object]]:
        """Have the relay reload, and return what its log says of it."""
        with capture_logs() as lines:
            await self.reload(result)
        return [line for line in lines if line["event"] == event]

    async def count(self, result: str) -> float:
        return await self.metric(f'arcbridge_relay_reloads_total{{result="{result}"}}')

    async def metric(self, name: str) -> float:
        lines = (await self.metrics()).splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


@pytest.fixture
async def relay(config: RelayConfig) -> AsyncIterator[Reloading]:  # noqa: F811
    made = Reloading(config)
    await made.start()
    yield made
    await made.stop()


async def test_what_changes_is_told_and_what_needs_a_restart_too(relay: Reloading) -> None:
    logs.reconfigure_level(relay.config.observe.log_level)
    level = logs.level()
    limits = RelayLimitsConfig(sessions=7, users={"oidc:alice": RelayUserLimitsConfig(sessions=1)})
    relay.config.policy.write_text(POLICY.replace("alice", "bob"))
    relay.config = replace(relay.config, limits=limits, workers=2, listen="127.0.0.1:1")
    (told,) = await relay.told("ok", "settings reloaded")
    assert told["taken"] == ["limits.sessions", "limits.users", "policy"]
    assert told["needs_restart"] == ["listen", "workers"]
    assert logs.level() == level
    # A second one has nothing new, and still names what waits for a restart.
    (again,) = await relay.told("ok", "settings reloaded")
    assert (again["taken"], again["needs_restart"]) == ([], ["listen", "workers"])


async def test_a_reload_is_recorded_in_the_file_of_that_name(relay: Reloading) -> None:
    path = relay.config.data_dir / "audit.jsonl"
    rotated = path.with_name("audit.jsonl.1")
    await until(lambda: records(path))  # that it started: a thread writes it
    path.rename(rotated)
    relay.config = replace(relay.config, limits=RelayLimitsConfig(sessions=7), listen="127.0.0.1:1")
    await relay.reload("ok")
    relay.config = replace(relay.config, limits=RelayLimitsConfig(sessions=0))
    await relay.reload("failed")
    await relay.stop()
    taken, refused, stop = records(path)
    assert taken["act"] == refused["act"] == "settings reload"
    assert taken["result"] == {"taken": ["limits.sessions"], "needs_restart": ["listen"]}
    assert (refused["outcome"], stop["act"]) == ("refused", "relay stop")
    assert "limits.sessions: must be at least 1" in refused["reason"]
    assert verify([rotated, path]).ok


async def test_descriptors_are_judged_by_the_limits_that_count(
    config: RelayConfig,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`doctor` says to lower the limits, and a reload does."""
    made, checks_of = [], service.checks_of

    def make(*arguments: Any, **named: Any) -> list[SelfCheck]:
        made.extend(checks_of(*arguments, **named))
        return made

    monkeypatch.setattr(service, "checks_of", make)
    relay = Reloading(config)
    await relay.start()
    (look,) = (one.look for one in made if one.name == "descriptors")
    for sessions, state in ((10**9, FindingState.WARNING), (7, FindingState.OK)):
        relay.config = replace(relay.config, limits=RelayLimitsConfig(sessions=sessions))
        await relay.reload("ok")
        assert [one.state for one in await look()] == [state]
    await relay.stop()


async def test_a_mistake_changes_nothing(relay: Reloading) -> None:
    relay.config.authentication.write_text(CONFIG.replace("kind: Auth", "kind: Other"))
    relay.config.policy.write_text(POLICY)
    relay.config = replace(relay.config, limits=RelayLimitsConfig(sessions=0))
    (told,) = await relay.told("failed", "settings not reloaded")
    assert "limits.sessions: must be at least 1, not 0 (and 1 more" in str(told["reason"])
    assert await relay.count("ok") == 0
    assert not relay.task.done()
    relay.config.authentication.write_text(CONFIG)
    relay.config = replace(relay.config, limits=RelayLimitsConfig())
    await relay.reload("ok")


async def test_an_issuer_that_is_taken_out_counts_no_more(config: RelayConfig, relay: Reloading) -> None:  # noqa: F811
    from arcbridge.net.address import parse_address
    from arcbridge.net.dialer import DIRECT
    from arcbridge.net.tls import fetch_relay_cas

    relay.ca = (await fetch_relay_cas(parse_address(relay.info.address), relay.info.relay_ca_pin, proxy=DIRECT)).trusted
    with pytest.raises(JoinRefused) as refused:
        await relay.join()
    assert refused.value.code == JoinCode.FORBIDDEN, "the token is good, and there is no such cluster"
    config.authentication.write_text(CONFIG.replace("issuer.example", "other.example"))
    await relay.reload("ok")
    with pytest.raises(JoinRefused) as refused:
        await relay.join()
    assert refused.value.code == JoinCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    "part",
    [
        "arcbridge.relay.certificate.ServerCertificate.read",
        "arcbridge.relay.certificate.ServerCertificate.put",
        "arcbridge.identity.verifier.TokenVerifier.replace",
        "arcbridge.relay.client_join.ClientJoins.change_limits",
    ],
)
async def test_whatever_goes_wrong_the_last_good_settings_stay(
    config: RelayConfig,  # noqa: F811
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not an error of ours alone: the parts that had the new settings already get the old ones back."""
    # The relay looks at the policy's file by itself, too, and would take over what is right in it.
    monkeypatch.setattr("arcbridge.identity.policy.CHECK_INTERVAL", 3600.0)
    made: list[RelayReload] = []

    def make(*arguments: Any, **named: Any) -> RelayReload:
        made.append(RelayReload(*arguments, **named))
        return made[0]

    monkeypatch.setattr(service, "RelayReload", make)
    relay = Reloading(config)
    await relay.start()
    before = in_force(made[0])
    good = relay.config
    relay.config.policy.write_text(POLICY.replace("alice", "bob"))
    relay.config.authentication.write_text(CONFIG.replace("issuer.example", "other.example"))
    relay.config = replace(relay.config, proof="off", limits=RelayLimitsConfig(sessions=7, loop_share_per_user=7))
    with monkeypatch.context() as patch:
        patch.setattr(part, _once(part))
        (told,) = await relay.told("failed", "settings not reloaded")
    assert told["reason"] == "RuntimeError"
    assert await relay.count("ok") == 0
    assert in_force(made[0]) == before
    # Nothing was noted as taken over either: to set that again takes nothing over.
    relay.config = good
    good.policy.write_text(POLICY)
    good.authentication.write_text(CONFIG)
    (told,) = await relay.told("ok", "settings reloaded")
    assert told["taken"] == []
    await relay.stop()


def in_force(reload: RelayReload) -> list[object]:
    """What the parts of a relay go by."""
    basis, entrances = reload._basis, reload._entrances
    return [
        entrances.clients.limits,
        basis.verifier._config.issuers,
        basis.checks.proofs.policy,
        basis.policy._policy.rules,
        basis.certificate.loaded,
        entrances.pumps.payers._share,
    ]


def _once(path: str) -> object:
    """A method that raises after it has done its work, the first time."""
    module, kind, name = path.rsplit(".", 2)
    real = getattr(getattr(importlib.import_module(module), kind), name)
    failed = False

    def method(*arguments: object, **named: object) -> object:
        nonlocal failed
        found = real(*arguments, **named)
        if not failed:
            failed = True
            raise RuntimeError("a defect")
        return found

    return method


async def test_files_are_checked_once_for_a_reload(relay: Reloading, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is removed behind the check is no failure of settings that are in force."""
    checks, check = 0, settings.check

    def counted(of: RelayConfig) -> settings.CheckedRelay:
        nonlocal checks
        checks += 1
        return check(of)

    monkeypatch.setattr(settings, "check", counted)
    await relay.reload("ok")
    assert checks == 1


async def test_the_self_checks_judge_by_the_certificate_in_force(config: RelayConfig, tmp_path: Path) -> None:  # noqa: F811
    """From the relay's own CA to files of a private one: the public address still leads here, and is found to."""
    private = Authority.create("private")
    port = fixed_port()
    relay = Reloading(replace(config, listen=f"127.0.0.1:{port}", public_address=f"127.0.0.1:{port}"))
    await relay.start()
    own = await public_address(relay)
    assert own["detail"] == f"127.0.0.1:{port} leads to this relay"
    issued = private.issue_server(["127.0.0.1"])
    (tmp_path / "tls.crt").write_text(issued.certificate_pem)
    (tmp_path / "tls.key").write_text(issued.key_pem)
    relay.config = replace(relay.config, tls=RelayTlsConfig(tmp_path / "tls.crt", tmp_path / "tls.key"))
    await relay.reload("ok")
    async with asyncio.timeout(10):
        while (await public_address(relay))["detail"] == own["detail"]:
            await asyncio.sleep(0.02)
    found = await public_address(relay)
    assert found["state"] == "ok"
    assert "agents and clients need relay_ca_file" in found["detail"]
    await relay.stop()


async def public_address(relay: Reloading) -> Row:
    """What the relay that runs says of its public address, once it has looked."""
    async with asyncio.timeout(10):
        while True:
            rows = await ask(relay.config.data_dir, {"ask": "checks"})
            for row in rows or []:
                if row["hop"] == "public address":
                    return row
            await asyncio.sleep(0.02)


def test_what_runs_after_a_reload_is_what_it_takes_over() -> None:
    old = RelayConfig(public_address="a:1")
    new = RelayConfig(
        public_address="b:1",
        policy=Path("p"),
        proof="off",
        limits=RelayLimitsConfig(sessions=1),
        observe=replace(old.observe, listen="x", log_level="debug"),
    )
    found = merged(old, new, RELOADABLE)
    assert found == replace(
        old, policy=Path("p"), proof="off", limits=new.limits, observe=replace(old.observe, log_level="debug")
    )
    assert {"authentication", "policy", "tls", "limits", "observe.log_level"} <= RELOADABLE
