"""The key of a login on disk: made once, private, and never replaced unasked."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from arcbridge.client.credentials import proof_keys
from arcbridge.errors import StateError


def test_a_key_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "login.key"
    assert proof_keys.load(path) is None
    made = proof_keys.load_or_make(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    found = proof_keys.load(path)
    assert found is not None
    assert found.thumbprint == proof_keys.load_or_make(path).thumbprint == made.thumbprint


def test_many_at_once_get_one_key(tmp_path: Path) -> None:
    path = tmp_path / "login.key"
    with ThreadPoolExecutor(8) as pool:
        keys = list(pool.map(lambda _: proof_keys.load_or_make(path), range(16)))
    assert len({key.thumbprint for key in keys}) == 1


def test_a_removed_key_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "login.key"
    first = proof_keys.load_or_make(path)
    assert proof_keys.remove(path)
    assert not proof_keys.remove(path)
    assert proof_keys.load_or_make(path).thumbprint != first.thumbprint


@pytest.mark.parametrize("data", [b"", b"{}", b"x" * 10_000], ids=["empty", "no key", "large"])
def test_a_damaged_file_is_not_replaced(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "login.key"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(StateError, match=r"login\.key"):
        proof_keys.load_or_make(path)
    assert path.read_bytes() == data


def test_a_key_that_others_may_read_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "login.key"
    proof_keys.load_or_make(path)
    path.chmod(0o640)
    with pytest.raises(StateError, match="log in again"):
        proof_keys.load_or_make(path)
    with pytest.raises(StateError, match=r"chmod 600 .*login\.key"):
        proof_keys.load(path)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="only root makes files for other users")
def test_a_key_in_a_volume_of_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Secret with fsGroup: root's, and the pod's group may read it."""
    path = tmp_path / "key"
    made = proof_keys.load_or_make(path)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for mode in (0o440, 0o640):
        path.chmod(mode)
        found = proof_keys.load(path)
        assert found is not None
        assert found.thumbprint == made.thumbprint
    path.chmod(0o444)
    with pytest.raises(StateError, match="other users may read the key"):
        proof_keys.load(path)
