"""What the page reads of the relay's audit log: the end of it, and records alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arcbridge.audit.chain import Chain, Head
from arcbridge.relay.audit.record import RELAY, Actor, act_line
from arcbridge.relay.page.changes import MOST, MOST_REFUSALS, TAIL, TAILS, ChangeList, Changes


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
    found = Changes(path).since("2000-01-01T00:00:00Z").records
    assert [(one.act, one.actor, one.clusters, one.failure) for one in found] == [
        ("policy change", "this relay", (), "refused: line 3"),
        ("session end", "root", ("a", "b"), ""),
        ("cluster revoke", "root", ("a",), ""),
        ("relay start", "this relay", (), ""),
    ]
    assert found[1].about == (("cluster", "a, b"), ("user", "ann"))
    assert Changes(path).since("2999-01-01T00:00:00Z") == ChangeList()
    with pytest.raises(OSError, match="No such file"):
        Changes(tmp_path / "none").since("")


def test_k11_a_record_that_names_not_all_its_clusters_names_none(tmp_path: Path) -> None:
    """docs/threats.md#K11: with the names that are left one could not say whose it is."""
    many = [f"shop-{number}" for number in range(30)]
    write(tmp_path / "log", *(
        act_line("ended", "session end", RELAY, {}, outcome="done", result={"cluster": names})
        for names in (many, many[:3])
    ))  # fmt: skip
    found = Changes(tmp_path / "log").since("2000-01-01T00:00:00Z").records
    assert [one.clusters for one in found] == [tuple(many[:3]), ()]


def test_k13_a_log_of_any_length_costs_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#K13; a log that has not changed is not read again."""
    path, changes = tmp_path / "audit.jsonl", Changes(tmp_path / "audit.jsonl")
    lines = [act_line("complete", f"token delete {n}", Actor("os", "x" * 900), {}, outcome="done") for n in range(999)]
    path.write_bytes(b"\x00\xff not a record \xe2\x80" * 2_400_000)
    write(path, *lines, mode="ab")
    assert path.stat().st_size > 10 * TAIL
    found = changes.since("")
    assert (len(found.records), found.cut) == (MOST, found.records[-1].at)
    assert found.records[0].act == "token delete 998"
    monkeypatch.setattr("arcbridge.relay.page.changes._parsed", None)
    assert changes.since("") == found


def refusals(count: int) -> list[str]:
    """What an agent without a token causes."""
    stranger, args = Actor("agent", "", {"source": "192.0.2.1"}), {"token_id": "x" * 16}
    return [
        act_line("complete", "agent enrol", stranger, args, outcome="refused", reason=f"no token {number}")
        for number in range(count)
    ]


def test_k11_refusals_of_strangers_push_out_no_change(tmp_path: Path) -> None:
    """docs/threats.md#K11: a day of them, at the rate at which they are recorded."""
    path, revoked = tmp_path / "audit.jsonl", act_line("complete", "cluster revoke", RELAY, {"cluster": "a"})
    write(path, revoked, *refusals(8640))
    assert TAILS[0] < path.stat().st_size < TAIL
    found = Changes(path).since("2000-01-01T00:00:00Z")
    assert [one.act for one in found.records] == ["cluster revoke"]
    assert (len(found.refusals), found.more_refusals, found.cut) == (MOST_REFUSALS, 8640 - MOST_REFUSALS, "")
    # A refusal that is the relay's own, or of an administrator's command, is none of a stranger.
    own = act_line("complete", "policy change", RELAY, {}, outcome="refused", reason='"by":"os"')
    write(path, own, act_line("ended", "token create", Actor("person", "x"), {}, outcome="refused"), *refusals(30))
    assert len(Changes(path).since("").records) == 2


def test_what_was_not_read_is_said(tmp_path: Path) -> None:
    path, revoked = tmp_path / "audit.jsonl", act_line("complete", "cluster revoke", RELAY, {"cluster": "a"})
    write(path, revoked, *refusals(3 * TAIL // 400))
    changes = Changes(path)
    found = changes.since("2000-01-01T00:00:00Z")
    assert (found.records, found.cut[:2]) == ((), "20")
    assert changes.since("2999-01-01T00:00:00Z") == ChangeList()
    # Refusals from before the time that is asked for are not counted.
    assert Changes(path).since("2999-01-01T00:00:00Z").more_refusals == 0
    # A file that was rotated, by the relay or by another program: what was before is in another one.
    path.write_bytes(path.read_bytes().partition(b"\n")[2][: TAIL // 2].rpartition(b"\n")[0] + b"\n")
    assert Changes(path).since("2000-01-01T00:00:00Z").cut[:2] == "20"
    path.write_bytes(Chain().begin("rotated", "r", Head("a" * 16, 7, "b" * 64)) + b"\n")
    assert Changes(path).since("2000-01-01T00:00:00Z").cut[:2] == "20"
    path.write_bytes(Chain().begin("started", "r", None) + b"\n")
    assert Changes(path).since("2000-01-01T00:00:00Z") == ChangeList()
