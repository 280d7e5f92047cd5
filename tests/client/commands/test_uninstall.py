"""What is taken away, what is left, and what stops it; with processes and logins: tests/e2e/test_uninstall.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcbridge.client.commands.uninstall import survey, uninstall
from arcbridge.client.kubeconfig.entries import Entry, Kubeconfig
from arcbridge.client.kubeconfig.running import running_of
from arcbridge.client.state import StateDirectory
from arcbridge.errors import StateError
from arcbridge.settings.config import ClientConfig

CONFIG = ClientConfig()


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        "HOME": str(tmp_path),
        **{f"XDG_{kind}_HOME": str(tmp_path / kind.lower()) for kind in ("STATE", "CACHE", "CONFIG")},
    }


def used(environment: dict[str, str], tmp_path: Path) -> StateDirectory:
    """A home in which a proxy has run."""
    state = StateDirectory.find(None, environment)
    state.keep_cluster_names(["prod"])
    (state.token_directory).mkdir()
    (state.token_directory / "x.json").write_text("{}")
    state.remember_port(("relay:443",), "prod", 47011)
    state.pins_file.write_text("")
    files = [tmp_path / "kubeconfig"]
    state.add_kubeconfig(files)
    Kubeconfig(files).merge(Entry("prod", "prod", "https://127.0.0.1:1", "CA", "CERT", "KEY"), switch=True)
    return state


async def test_what_arcbridge_made_goes_and_nothing_else(environment: dict[str, str], tmp_path: Path) -> None:
    state = used(environment, tmp_path)
    own = state.path / "own.txt"
    own.write_text("mine")
    settings = tmp_path / "config" / "arcbridge" / "client.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text("")
    found = survey(CONFIG, environment)
    assert found.left == [f"settings that you wrote: {settings}"]
    said = [sentence async for sentence in uninstall(CONFIG, found, environment)]
    assert said == ['context "prod"', f"keys, pins, ports and tokens in {state.path} and {state.cache}"]
    assert not state.cache.exists()
    assert list(state.path.iterdir()) == [own]
    assert not Kubeconfig([tmp_path / "kubeconfig"]).has_ours()
    own.unlink()
    again = survey(CONFIG, environment)
    assert [sentence async for sentence in uninstall(CONFIG, again, environment)] == []
    assert not state.path.exists()


async def test_a_kubeconfig_that_cannot_be_changed_keeps_the_state(environment: dict[str, str], tmp_path: Path) -> None:
    state = used(environment, tmp_path)
    (tmp_path / "kubeconfig").write_text("{")
    with pytest.raises(StateError):
        _ = [sentence async for sentence in uninstall(CONFIG, survey(CONFIG, environment), environment)]
    assert state.pins_file.exists()


def test_what_serves_now_is_to_be_ended_first(environment: dict[str, str], tmp_path: Path) -> None:
    running = running_of(used(environment, tmp_path), environment)
    running.begin()
    with pytest.raises(StateError, match="serves a context"):
        survey(CONFIG, environment)
    running.end()
    survey(CONFIG, environment)
