"""The commands that rotate a CA: what they print, and that a step that has to wait is an error."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from unittest import mock

import pytest

from arcbridge.cli import ca
from arcbridge.cli.parser import Invocation
from arcbridge.errors import StateError
from arcbridge.relay.data_dir import open_authority, open_registry, read_rotation
from tests.relay.conftest import relay_config


async def make_registry(data_dir: Path) -> None:
    await (await open_registry(data_dir)).close()


def test_steps_and_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = relay_config(tmp_path, "")
    open_authority(config.data_dir)
    asyncio.run(make_registry(config.data_dir))

    def run(command: str, **given: object) -> str:
        with mock.patch.object(ca, "load_settings", return_value=config):
            assert getattr(ca, command)(Invocation("relay", ("ca", command), given)) == 0
        return capsys.readouterr().out

    assert "is announced within minutes" in run("make_next")
    assert max(map(len, run("status").splitlines())) <= 104
    (present, following) = json.loads(run("status", output="json"))
    assert (present["ca"], following["ca"]) == ("present", "next")
    with pytest.raises(StateError, match="no relay runs here"):
        run("activate")
    assert following["pin"] in run("activate", force=True)
    run("retire", force=True)
    assert read_rotation(config.data_dir).list.pins == (present["pin"], following["pin"])
