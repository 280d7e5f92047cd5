"""Recordings are found in audit logs, compared with what those say, and opened with an identity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arcbridge.agent.recording.opened import compare, find_recordings, open_recording, read_identities, unfinished
from arcbridge.agent.recording.sealed_file import ENDING, PART, FinishedFile, RecordingFile
from arcbridge.audit.chain import Chain
from arcbridge.errors import ConfigError, SealingError
from tests.sealing.keys import HYBRID_IDENTITY, X25519_IDENTITY

from .keys import RECIPIENTS, published


def made(directory: Path, name: str, *texts: bytes) -> FinishedFile:
    directory.mkdir(exist_ok=True)
    file = RecordingFile.create(directory / (name + ENDING), RECIPIENTS)
    for text in texts:
        file.append(text)
    return published(file)


def log_of(path: Path, *records: dict[str, Any]) -> Path:
    chain = Chain()
    lines = [chain.begin("started", "agent-1", None), *[chain.seal(json.dumps(one)) for one in records]]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def recorded(file: FinishedFile, request: str = "r-1", **fields: Any) -> dict[str, Any]:
    found = {"file": file.name, "sha256": file.sha256, "bytes": file.size}
    return {"ts": "2026-11-29T10:00:00.000Z", "stage": "recorded", "request": request, "recording": found, **fields}


def begun(request: str, user: str) -> dict[str, Any]:
    of = {"user": user, "namespace": "shop", "name": "web", "subresource": "exec", "command": ["sh", "-c", "ls"]}
    return {"ts": "2026-11-29T09:59:00.000Z", "stage": "begun", "request": request, **of}


def test_recordings_of_a_log(tmp_path: Path) -> None:
    first, second = made(tmp_path, "a", b"a"), made(tmp_path, "b", b"b")
    log = log_of(
        tmp_path / "audit.jsonl",
        begun("r-1", "alice"),
        {**begun("r-1", "alice"), "stage": "ended"},
        recorded(first, user="alice", namespace="shop", name="web", container="app"),
        begun("r-2", "bob"),
        {**begun("r-2", "bob"), "stage": "ended"},  # of a full disk: its file was finished later
        recorded(second, "r-2"),  # of an agent that was killed: `begun` says whose it is
    )
    rows = list(find_recordings([log]))
    assert [(row["user"], row["pod"], row["file"]) for row in rows] == [
        ("alice", "shop/web", first.name),
        ("bob", "shop/web", second.name),
    ]
    assert rows[1]["command"] == "sh -c ls"
    assert [row["user"] for row in find_recordings([log], user="bob")] == ["bob"]
    assert list(find_recordings([log], since="2026-11-29T10:00:01Z")) == []


def test_what_differs_from_the_log(tmp_path: Path) -> None:
    where = tmp_path / "recordings"
    good, changed, gone = (made(where, name, name.encode()) for name in ("good", "changed", "gone"))
    stored = FinishedFile(f"s3://bucket/x{ENDING}", "0" * 64, 1)
    log = log_of(tmp_path / "audit.jsonl", *[recorded(one) for one in (good, changed, gone, stored)])
    with (where / changed.name).open("r+b") as file:
        file.seek(700)
        other = bytes([file.read(1)[0] ^ 1])
        file.seek(700)
        file.write(other)
    (where / gone.name).unlink()
    unknown = made(where, "unknown", b"x")
    count, found = compare([where], find_recordings([log]))
    assert count == 1
    assert {(Path(one.file).name, one.kind) for one in found} == {
        (changed.name, "changed"), (gone.name, "missing"), (unknown.name, "unknown"), (f"x{ENDING}", "missing"),
    }  # fmt: skip
    assert compare([where / good.name], find_recordings([log])) == (1, [])
    with pytest.raises(ConfigError, match="cannot be read"):
        compare([where / "nowhere"], find_recordings([log]))


def test_a_bucket_that_was_copied_is_compared_by_the_names_of_its_files(tmp_path: Path) -> None:
    where = tmp_path / "recordings"
    where.mkdir()
    stored = made(where / "berlin", "a", b"a")
    named = FinishedFile(f"s3://bucket/berlin/{stored.name}", stored.sha256, stored.size)
    left = where / ("b" + ENDING + PART)
    left.touch()
    without = {"stage": "recorded", "request": "r-2", "recording": {"failure": "its protocol cannot be recorded"}}
    log = log_of(tmp_path / "audit.jsonl", recorded(named), without)
    assert compare([where], find_recordings([log])) == (1, [])
    assert unfinished([where]) == [left]


def test_a_recording_is_opened_by_its_recipient_alone(tmp_path: Path) -> None:
    found = made(tmp_path, "a", b"one", b"two")
    path, keys = tmp_path / found.name, tmp_path / "keys"
    keys.write_text(f"# created\n{X25519_IDENTITY}\n")
    assert b"".join(open_recording(path, read_identities(keys))) == b"onetwo"
    keys.write_text(HYBRID_IDENTITY)
    with pytest.raises(SealingError, match="not sealed to the key"):
        list(open_recording(path, read_identities(keys)))
    with pytest.raises(ConfigError, match=r"--identity: .* cannot be read"):
        read_identities(tmp_path / "nowhere")


def test_what_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"x" * 2000)
    with pytest.raises(SealingError, match="is no recording"):
        list(open_recording(tmp_path / "x", []))
    with pytest.raises(ConfigError, match="cannot be read"):
        list(open_recording(tmp_path / "nowhere", []))


def test_a_member_that_was_changed_is_not_shown(tmp_path: Path) -> None:
    found = made(tmp_path, "a", b"one", b"two")
    path = tmp_path / found.name
    data = bytearray(path.read_bytes())
    data[1024 + 512 + 100] ^= 1
    path.write_bytes(data)
    keys = tmp_path / "keys"
    keys.write_text(X25519_IDENTITY)
    with pytest.raises(SealingError):
        list(open_recording(path, read_identities(keys)))
