"""Where the background process is reached."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from arcbridge.client.background_paths import SOCKET_LIMIT, BackgroundPaths
from arcbridge.errors import StateError


def find(environment: dict[str, str], machine_id: str = "/does/not/exist") -> BackgroundPaths:
    return BackgroundPaths.find(environment, machine_id)


def test_it_is_in_the_state_directory() -> None:
    place = find({"HOME": "/home/u", "XDG_STATE_HOME": "/s"})
    assert (place.log, place.connections) == ("/s/arcbridge/background.log", "/s/arcbridge/connections.json")
    assert place.socket == "/s/arcbridge/run/control"
    assert {os.path.dirname(lock) for lock in (place.start_lock, place.process_lock)} == {"/s/arcbridge"}
    assert find({"HOME": "/home/u", "XDG_STATE_HOME": "relative"}).socket == (
        "/home/u/.local/state/arcbridge/run/control"
    )


def test_the_session_s_runtime_directory_changes_nothing(tmp_path: Path) -> None:
    """It goes at the last logout, and cron has none: each command must find the same process."""
    runtime = tmp_path / "user-1000"
    runtime.mkdir(mode=0o700)
    environment = {"HOME": "/home/u", "XDG_RUNTIME_DIR": str(runtime)}
    before = find(environment)
    shutil.rmtree(runtime)
    for later in (find(environment), find({"HOME": "/home/u"})):
        assert (later.socket, later.process_lock) == (before.socket, before.process_lock)


def test_machines_that_share_a_home_have_a_place_each(tmp_path: Path) -> None:
    places = []
    for name in ("0123456789abcdef0123456789abcdef\n", "f123456789abcdef0123456789abcdef\n", "", "no/id\n"):
        file = tmp_path / "machine-id"
        file.write_text(name)
        places.append(find({"HOME": "/home/u"}, str(file)))
    first, second, *without = places
    assert len({first.socket, second.socket, without[0].socket}) == 3
    assert len({first.process_lock, second.process_lock, without[0].process_lock}) == 3
    assert first.connections == second.connections
    assert "0123456789abcdef" not in first.socket
    assert without[0].socket == without[1].socket == "/home/u/.local/state/arcbridge/run/control"


def test_a_long_path_gives_way_to_a_short_one() -> None:
    first, second = (find({"HOME": f"/home/{letter * 120}"}) for letter in "ab")
    assert len(first.socket) <= SOCKET_LIMIT
    assert first.socket.startswith(f"/tmp/arcbridge-{os.geteuid()}-")
    assert first.socket != second.socket
    assert first.process_lock.startswith("/home/aaa")


def test_it_is_made_for_this_user_alone(tmp_path: Path) -> None:
    place = BackgroundPaths(str(tmp_path / "a" / "run"), str(tmp_path / "state"))
    before = os.umask(0)
    try:
        place.make()
        place.make()
    finally:
        os.umask(before)
    for made in (place.runtime, place.state):
        assert os.stat(made).st_mode & 0o777 == 0o700
    os.chmod(place.runtime, 0o770)
    with pytest.raises(StateError, match="not a directory of this user alone"):
        place.make()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root makes files for other users")
def test_root_removes_nothing_of_a_user(tmp_path: Path) -> None:
    """`sudo -E arcbridge status`: the user's process serves there."""
    place = BackgroundPaths(str(tmp_path / "run"), str(tmp_path))
    place.make()
    os.chown(place.runtime, 12345, 12345)
    with pytest.raises(StateError, match="belongs to user id 12345: run this as that user, without sudo"):
        place.refuse_foreign_runtime()


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir(mode=0o700)
    (tmp_path / "run").symlink_to(tmp_path / "other")
    with pytest.raises(StateError, match="not a directory of this user alone"):
        BackgroundPaths(str(tmp_path / "run"), str(tmp_path)).make()
