"""The commands that rotate a CA: what they print, and that a step that has to wait is an error."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from unittest import mock

import pytest

from arcbridge.cli import ca
from arcbridge.cli.parser import Invocation
from arcbridge.errors import StateError
from arcbridge.pki.authority import Authority
from arcbridge.pki.rotation import NAMED, Rotation, RotationStatus
from arcbridge.relay.data_dir import ROTATION_FILE, open_authority, open_registry, read_rotation
from tests.relay.conftest import relay_config


async def make_registry(data_dir: Path) -> None:
    await (await open_registry(data_dir)).close()


def test_steps_and_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = relay_config(tmp_path, "")
    open_authority(config.data_dir)
    asyncio.run(make_registry(config.data_dir))

    def run(command: str, **given: object) -> str:
        with mock.patch("arcbridge.cli.settings.load_settings", return_value=config):
            assert getattr(ca, command)(Invocation("relay", ("ca", command), given)) == 0
        return capsys.readouterr().out

    said = run("make_next")
    assert "is announced within minutes" in said
    assert f"each other one needs a copy of {config.data_dir / ROTATION_FILE} now" in said
    assert max(map(len, run("status").splitlines())) <= 104
    (present, following) = json.loads(run("status", output="json"))
    assert (present["ca"], following["ca"]) == ("present", "next")
    with pytest.raises(StateError, match="no relay runs here"):
        run("activate")
    assert following["pin"] in run("activate", force=True)
    run("retire", force=True)
    assert read_rotation(config.data_dir).list.pins == (present["pin"], following["pin"])


def test_status_names_a_bounded_number_of_those_it_waits_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Authority.create("x")
    state = Rotation(made.certificate_pem, made.key_pem).take("next", time.time())
    found = RotationStatus(state, "0 of 3000 clusters", tuple(f"cluster c{n} is not connected" for n in range(3000)))
    with (
        mock.patch("arcbridge.cli.settings.load_settings", return_value=relay_config(tmp_path, "")),
        mock.patch("arcbridge.relay.ca_rotation.status", mock.AsyncMock(return_value=found)),
    ):
        assert ca.status(Invocation("relay", ("ca", "status"), {})) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == NAMED + 1
    assert "and 2980 more" in lines[-1]
