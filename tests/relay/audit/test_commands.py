"""Commands of an operator: the relay that runs records them, and without one they do it themselves."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from arcbridge.audit.verify import verify
from arcbridge.errors import ConfigError, StateError
from arcbridge.relay import admin
from arcbridge.relay.admin_socket import AdminSocket
from arcbridge.relay.audit.commands import acting
from arcbridge.relay.audit.log import RelayAudit, open_audit
from arcbridge.relay.data_dir import open_registry
from arcbridge.settings.config import RelayAuditConfig, RelayConfig
from tests.relay.audit.test_log import answer, records
from tests.relay.audit.test_record import hanging_directory
from tests.relay.conftest import relay_config


@pytest.fixture
async def config(tmp_path: Path) -> RelayConfig:
    made = relay_config(tmp_path, "", public_address="relay.test:8443")
    await (await open_registry(made.data_dir)).close()
    return made


async def test_without_a_relay_the_command_writes_itself(config: RelayConfig) -> None:
    token = await admin.create_token(admin.at(config), cluster="prod", uses=2)
    await admin.delete_token(admin.at(config), token.token)
    with pytest.raises(StateError):
        await admin.delete_token(admin.at(config), token.id)
    await admin.revoke_user(admin.at(config), "bob", "2026-11-25", "lost a laptop")
    await admin.restore_user(admin.at(config), "bob")
    await admin.revoke_cluster(admin.at(config), "prod")
    await admin.restore_cluster(admin.at(config), "prod")
    path = config.data_dir / "audit.jsonl"
    ends = [one for one in records(path) if one["stage"] == "ended"]
    assert [(one["act"], one["outcome"]) for one in ends] == [
        ("token create", "done"),
        ("token delete", "done"),
        ("token delete", "refused"),
        ("user revoke", "done"),
        ("user restore", "done"),
        ("cluster revoke", "done"),
        ("cluster restore", "done"),
    ]
    assert {(one["by"], one["uid"]) for one in ends} == {("os", os.getuid())}
    assert ends[0]["arguments"]["cluster"] == "prod"
    assert ends[0]["result"] == {"token_id": token.id}
    assert ends[3]["arguments"] == {"user": "bob", "before": "2026-11-25T00:00:00Z", "reason": "lost a laptop"}
    assert ends[5]["result"] == {"known": False}
    assert token.token.partition(".")[2] not in path.read_text(), "never the secret"
    assert verify([path]).ok, "each command's chain follows on the one before"


async def test_a_directory_of_users_that_hangs_holds_up_no_command(
    config: RelayConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hanging_directory(monkeypatch), acting(config, "user revoke", user="bob"):
        pass
    found = records(config.data_dir / "audit.jsonl")
    assert [(one["stage"], one["uid"], "actor" in one) for one in found] == [
        ("begun", os.getuid(), False),
        ("ended", os.getuid(), False),
    ]


async def test_the_relay_that_runs_writes_it(config: RelayConfig) -> None:
    audit = open_audit(config, "relay-1")
    socket = AdminSocket(config.data_dir, answer, audit)
    await socket.start()
    token = await admin.create_token(admin.at(config), cluster="prod")
    await admin.end_session(admin.at(config), "a" * 16, "why")
    reader, writer = await asyncio.open_unix_connection(str(config.data_dir / "admin.sock"))
    writer.write(b"nonsense\n")
    await reader.read()
    writer.close()
    await socket.close()
    audit.close()
    path = config.data_dir / "audit.jsonl"
    report = verify([path])
    assert report.ok
    assert len(report.chains) == 1, "one process has written"
    found = [(one["act"], one["stage"], one["uid"]) for one in records(path)]
    uid = os.getuid()
    assert found == [
        ("token create", "begun", uid), ("token create", "ended", uid), ("session end", "begun", uid),
        ("session end", "ended", uid), ("admin question", "complete", uid),
    ]  # fmt: skip
    assert records(path)[1]["result"] == {"token_id": token.id}


async def test_k1_another_os_user_is_recorded(config: RelayConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    audit = open_audit(config, "relay-1")
    socket = AdminSocket(config.data_dir, answer, audit)
    await socket.start()
    monkeypatch.setattr("arcbridge.relay.admin_socket._is_operator", lambda sock: False)
    with pytest.raises(StateError):
        await admin.end_session(admin.at(config), "a" * 16)
    await socket.close()
    audit.close()
    (one,) = records(config.data_dir / "audit.jsonl")
    assert (one["act"], one["outcome"], one["uid"]) == ("admin question", "refused", os.getuid())


async def test_nothing_is_done_unrecorded_where_the_settings_say_so(config: RelayConfig) -> None:
    def full(on_failure: str) -> RelayConfig:
        audit = RelayAuditConfig(file="/dev/full", on_failure=on_failure)
        return RelayConfig(public_address=config.public_address, data_dir=config.data_dir, audit=audit)

    with pytest.raises(StateError, match="No space left"):
        await admin.revoke_user(admin.at(full("refuse")), "bob")
    socket = AdminSocket(config.data_dir, answer, RelayAudit("/dev/full", on_failure="refuse"))
    await socket.start()
    with pytest.raises(StateError, match="No space left"):
        await admin.revoke_user(admin.at(config), "bob")
    with pytest.raises(StateError, match="No space left"):
        await admin.end_session(admin.at(config), "a" * 16)
    await socket.close()
    assert await admin.list_users(admin.at(config)) == []
    await admin.revoke_user(admin.at(full("continue")), "bob")
    assert [row["user"] for row in await admin.list_users(admin.at(config))] == ["bob"]


async def test_a_log_that_cannot_be_opened(config: RelayConfig, tmp_path: Path) -> None:
    def nowhere(on_failure: str) -> RelayConfig:
        return RelayConfig(
            data_dir=config.data_dir, audit=RelayAuditConfig(str(tmp_path / "no" / "a"), on_failure=on_failure)
        )

    async with acting(nowhere("continue"), "user revoke", user="bob"):
        pass
    with pytest.raises(ConfigError):
        async with acting(nowhere("refuse"), "user revoke", user="bob"):
            pytest.fail("it is not recorded")


async def test_switched_off(config: RelayConfig) -> None:
    async with acting(RelayConfig(data_dir=config.data_dir, audit=RelayAuditConfig("")), "user revoke", user="bob"):
        pass
    assert not (config.data_dir / "audit.jsonl").exists()
