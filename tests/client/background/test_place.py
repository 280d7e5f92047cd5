"""Where the background process is reached."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from arcbridge.client.background.place import SOCKET_LIMIT, Place
from arcbridge.errors import StateError


def test_the_runtime_directory_of_the_session(tmp_path: Path) -> None:
    place = Place.find({"HOME": "/home/u", "XDG_RUNTIME_DIR": "/", "XDG_STATE_HOME": "/s"})
    if os.stat("/").st_uid == os.geteuid():
        assert place.runtime == "/arcbridge"
    assert (place.log, place.connections) == ("/s/arcbridge/background.log", "/s/arcbridge/connections.json")


@pytest.mark.parametrize("given", ["", "relative", "/does/not/exist"])
def test_else_a_private_one(given: str) -> None:
    place = Place.find({"HOME": "/home/u", "XDG_RUNTIME_DIR": given})
    assert place.runtime == "/home/u/.local/state/arcbridge/run"
    assert place.socket == f"{place.runtime}/control"


def test_a_long_path_gives_way_to_a_short_one() -> None:
    first, second = (Place.find({"HOME": f"/home/{letter * 120}"}) for letter in "ab")
    assert len(first.socket) <= SOCKET_LIMIT
    assert first.socket.startswith(f"/tmp/arcbridge-{os.geteuid()}-")
    assert first.socket != second.socket


def test_it_is_made_for_this_user_alone(tmp_path: Path) -> None:
    place = Place(str(tmp_path / "a" / "run"), str(tmp_path))
    before = os.umask(0)
    try:
        place.make()
        place.make()
    finally:
        os.umask(before)
    assert os.stat(place.runtime).st_mode & 0o777 == 0o700
    os.chmod(place.runtime, 0o770)
    with pytest.raises(StateError, match="not a directory of this user alone"):
        place.make()


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir(mode=0o700)
    (tmp_path / "run").symlink_to(tmp_path / "other")
    with pytest.raises(StateError, match="not a directory of this user alone"):
        Place(str(tmp_path / "run"), str(tmp_path)).make()
