"""What the page reads of the relay's audit log: the end of it, and records alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arcbridge.audit.chain import Chain
from arcbridge.relay.audit.record import RELAY, Actor, act_line
from arcbridge.relay.page.changes import MOST, TAIL, Changes


def write(path: Path, *lines: str, mode: str = "wb") -> None:
    chain = Chain()
    with path.open(mode) as file:
        file.write(b"".join(chain.seal(line) + b"\n" for line in lines))


def test_acts_with_who_and_what(tmp_path: Path) -> None:
    path, root = tmp_path / "audit.jsonl", Actor("os", "root")
    write(
        path,
        act_line("complete", "relay start", RELAY, {"version": "1"}),
        act_line("begun", "cluster revoke", root, {"cluster": "a"}, id="0" * 16),
        act_line(
            "ended", "cluster revoke", root, {"cluster": "a"}, id="0" * 16, outcome="done", result={"known": True}
        ),
        act_line("ended", "session end", root, {}, outcome="done", result={"cluster": ["a", "b"], "user": "ann"}),
        act_line("complete", "admin question", root, {"question": "x"}, outcome="refused", reason="no such question"),
        act_line("complete", "policy change", RELAY, {}, outcome="refused", reason="line 3"),
        act_line("complete", "policy change", RELAY, {}, outcome="refused", reason="line 3"),
        json.dumps({"event": "audit-lost", "lost": 3}),
    )
    found = Changes(path).since("2000-01-01T00:00:00Z")
    assert [(one.act, one.actor, one.clusters, one.failure) for one in found] == [
        ("policy change", "this relay", (), "refused: line 3"),
        ("session end", "root", ("a", "b"), ""),
        ("cluster revoke", "root", ("a",), ""),
        ("relay start", "this relay", (), ""),
    ]
    assert found[1].about == (("cluster", "a, b"), ("user", "ann"))
    assert Changes(path).since("2999-01-01T00:00:00Z") == ()
    with pytest.raises(OSError, match="No such file"):
        Changes(tmp_path / "none").since("")


def test_k11_a_record_that_names_not_all_its_clusters_names_none(tmp_path: Path) -> None:
    """docs/threats.md#K11: with the names that are left one could not say whose it is."""
    many = [f"shop-{number}" for number in range(30)]
    write(tmp_path / "log", *(
        act_line("ended", "session end", RELAY, {}, outcome="done", result={"cluster": names})
        for names in (many, many[:3])
    ))  # fmt: skip
    found = Changes(tmp_path / "log").since("2000-01-01T00:00:00Z")
    assert [one.clusters for one in found] == [tuple(many[:3]), ()]


def test_k13_a_log_of_any_length_costs_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#K13; a log that has not changed is not read again."""
    path, changes = tmp_path / "audit.jsonl", Changes(tmp_path / "audit.jsonl")
    lines = [act_line("complete", f"token delete {n}", Actor("os", "x" * 900), {}, outcome="done") for n in range(999)]
    path.write_bytes(b"\x00\xff not a record \xe2\x80" * 200_000)
    write(path, *lines, mode="ab")
    assert path.stat().st_size > 10 * TAIL
    found = changes.since("")
    assert len(found) == MOST
    assert found[0].act == "token delete 998"
    monkeypatch.setattr("arcbridge.relay.page.changes._parsed", None)
    assert changes.since("") == found
