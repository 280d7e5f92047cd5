import os
from pathlib import Path

import pytest

from arcbridge.errors import ConfigError, StateError
from arcbridge.relay.data_dir import cluster_names, instance_lock, is_locked, open_authority, open_registry


async def test_everything_is_there_the_next_time(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "data"
    pin = open_authority(directory).pin
    registry = await open_registry(directory)
    await registry.close()
    assert open_authority(directory).pin == pin
    assert {"ca.crt", "ca.key", "registry.db"} <= {file.name for file in directory.iterdir()}


async def test_a_wrong_directory_is_told_and_not_filled(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="data_dir"):
        await open_registry(tmp_path, must_exist=True)
    assert list(tmp_path.iterdir()) == []


def test_one_relay_at_a_time(tmp_path: Path) -> None:
    with instance_lock(tmp_path), pytest.raises(ConfigError, match="another relay"), instance_lock(tmp_path):
        pass
    with instance_lock(tmp_path):
        pass


def test_root_waits_for_no_pipe_that_the_service_has_put_in_a_file_s_place(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "relay.lock")
    assert not is_locked(tmp_path)
    os.mkfifo(tmp_path / "registry.db")
    with pytest.raises(StateError, match="it is not a file"):
        cluster_names(tmp_path)
