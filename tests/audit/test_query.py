"""Which records are found, in which order, and that a log without end costs no memory."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

import pytest

from arcbridge.audit.chain import Chain
from arcbridge.audit.query import Wanted, find_records, with_rotated
from arcbridge.errors import ConfigError


def write(path: Path, *records: dict[str, object]) -> Path:
    chain = Chain()
    lines = [chain.begin("started", "relay-1", None), *(chain.seal(json.dumps(one)) for one in records)]
    data = b"".join(line + b"\n" for line in lines)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def numbers(found: Iterable[dict[str, object]]) -> list[object]:
    return [one["n"] for one in found]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    acts: list[dict[str, object]] = [
        {"act": "user revoke", "actor": "root", "login": "alice", "arguments": {"user": "bob"}},
        {"act": "cluster revoke", "actor": "carol", "arguments": {"cluster": "prod"}},
        {"act": "session end", "actor": "root", "result": {"user": "bob", "cluster": ["prod", "test"]}},
        {"act": "policy change", "result": {"users": ["bob", "dora"]}},
        {"stage": "complete", "user": "eve", "as": "bob"},
        {"event": "audit-lost", "records": 3},
        {"act": "agent enrol", "by": "agent", "omitted": 7},
    ]
    records = [{"ts": f"2026-11-29T0{n}:00:00.000Z", "event": "audit", **one, "n": n} for n, one in enumerate(acts)]
    return write(tmp_path / "audit.jsonl", *records)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(), [0, 1, 2, 3, 4, 5, 6]),
        (Wanted(user="bob"), [0, 2, 3, 4, 5, 6]),
        (Wanted(user="alice"), [0, 5, 6]),
        (Wanted(user="dora"), [3, 5, 6]),
        (Wanted(user="bo"), [5, 6]),
        (Wanted(cluster="prod"), [1, 2, 5, 6]),
        (Wanted(cluster="None"), [5, 6]),
        (Wanted(cluster="test", user="root"), [2, 5, 6]),
        (Wanted(since="2026-11-29T03:00:00.000Z"), [3, 4, 5, 6]),
    ],
)
def test_which_records(path: Path, wanted: Wanted, expected: list[int]) -> None:
    """What the log lacks is said whatever was asked for: it may have been that."""
    assert numbers(find_records([path], wanted)) == expected


def test_rotated_files_come_in_the_order_of_their_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def record(n: int) -> dict[str, object]:
        return {"ts": f"2026-11-{n:02}T00:00:00.000Z", "event": "audit", "n": n}

    chains = {"audit.jsonl": 4, "audit.jsonl-20261103": 3, "audit.jsonl.1": 2, "audit.jsonl.2.gz": 1}
    for name, n in chains.items():
        monkeypatch.setattr("arcbridge.audit.chain.timestamp", lambda n=n: record(n)["ts"])
        write(tmp_path / name, record(n))
    write(tmp_path / "audit.jsonlines", record(9))
    (tmp_path / "audit.jsonl.d").mkdir()
    found = with_rotated(tmp_path / "audit.jsonl")
    assert sorted(one.name for one in found) == sorted(chains)
    assert numbers(find_records(found, Wanted())) == [1, 2, 3, 4]


def test_a_long_log_costs_no_memory(tmp_path: Path) -> None:
    line = {"ts": "2026-11-29T00:00:00.000Z", "event": "audit", "user": "x" * 400, "n": 0}
    short, long = (write(tmp_path / f"{count}.jsonl", *[line] * count) for count in (200, 20_000))

    def peak(path: Path) -> int:
        tracemalloc.start()
        assert sum(1 for _ in find_records([path], Wanted())) > 0
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(short)
    assert peak(long) < peak(short) + 256 * 1024


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        list(find_records([tmp_path / "none"], Wanted()))
