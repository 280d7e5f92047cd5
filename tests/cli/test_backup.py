"""What `backup`, `restore` and `recovery` print."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from arcbridge.cli import backup, relay
from arcbridge.cli.parser import Invocation
from arcbridge.errors import StateError
from arcbridge.pki.authority import Authority
from arcbridge.relay.data_dir import open_authority, open_registry
from arcbridge.relay.registry.sqlite import SCHEMA_VERSION
from arcbridge.settings.config import RelayConfig
from tests.relay.conftest import relay_config


def printed(config: RelayConfig, command: Callable[[Invocation], int], *words: str, **given: object) -> str:
    out = io.StringIO()
    settings = mock.patch("arcbridge.cli.settings.load_settings", return_value=config)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), settings:
        assert command(Invocation("relay", words, given)) == 0
    return out.getvalue()


def test_each_says_what_is_there_and_what_to_do(tmp_path: Path) -> None:
    config = relay_config(tmp_path, "", public_address="relay.test:8443")
    open_authority(config.data_dir)

    async def enrol() -> None:
        registry = await open_registry(config.data_dir)
        await registry.adopt("prod", Authority.create("prod").certificate_pem, 5.0)
        await registry.revoke_cluster("bad")
        await registry.close()

    asyncio.run(enrol())
    file = str(tmp_path / "file")
    made = printed(config, backup.backup, "backup", file=file)
    assert "NOT encrypted" in made
    assert "1 names revoked (bad)" in made
    assert f"schema {SCHEMA_VERSION}" in printed(config, backup.restore, "restore", file=file, show=True)
    done = printed(config, backup.restore, "restore", file=file, overwrite=True, settings=str(tmp_path / "settings"))
    assert f"make data_dir {config.data_dir}," in done
    assert "Revocations made after 20" in done
    assert "make new ones" in done
    listed = printed(config, relay.cluster_list, "cluster", "list")
    assert "was restored from a backup: revocations made after" in listed
    awaited = printed(config, relay.recovery_list, "recovery", "list")
    assert ("prod" in awaited, "bad" in awaited) == (True, False)
    assert "as it stood: the registry was restored" in printed(config, relay.recovery_end, "recovery", "end")
    with pytest.raises(StateError, match="no revocation is known to be missing"):
        printed(config, relay.recovery_end, "recovery", "end")
    assert "prod" not in printed(config, relay.recovery_list, "recovery", "list")
