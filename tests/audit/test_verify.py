"""`audit verify`: each way to tamper with a log is found, and said of the right record in the right place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcbridge.audit.chain import Chain, Head
from arcbridge.audit.verify import Anchor, Report, read_anchors, verify
from arcbridge.errors import ConfigError

COUNT = 12


def log(count: int = COUNT, before: Head | None = None, cause: str = "started") -> tuple[list[bytes], Chain]:
    """The lines of a chain: its first record, and `count` more."""
    chain = Chain()
    lines = [chain.begin(cause, "agent-1", before)]
    lines += [chain.seal(json.dumps({"event": "audit", "request": f"r-{n}"})) for n in range(1, count + 1)]
    return lines, chain


def check(directory: Path, *files: list[bytes], anchors: list[Anchor] | None = None) -> Report:
    """Write each list of lines to a file (`0`, `1`, …) and check them."""
    paths = []
    for number, lines in enumerate(files):
        paths.append(directory / str(number))
        paths[-1].write_bytes(b"".join(line + b"\n" for line in lines))
    return verify(paths, anchors or [])


def found(report: Report) -> list[tuple[str, int, int]]:
    return [(one.kind, one.line, one.record) for one in report.findings]


def test_nothing_is_wrong(tmp_path: Path) -> None:
    lines, chain = log()
    report = check(tmp_path, lines)
    assert report.ok
    assert (report.records, report.notes) == (COUNT + 1, [])
    assert report.chains[0]["hash"] == chain.head.hash
    assert report.chains[0]["end"] == "open"


TAMPERED: list[tuple[str, list[tuple[str, int, int]], str]] = [
    ("0 2-12", [("missing", 2, 1)], "record 1 is missing"),
    ("0-4 6-12", [("missing", 6, 5)], "record 5 is missing"),
    ("0-10 12", [("missing", 12, 11)], "record 11 is missing"),
    ("0-2 6-12", [("missing", 4, 3)], "records 3 to 5 are missing before this one"),
    ("0x 1-12", [("changed", 1, 0)], "/0:2"),
    ("0-4 5x 6-12", [("changed", 6, 5)], "/0:7"),
    ("0-10 11x 12", [("changed", 12, 11)], "/0:13"),
    ("0-3 7 5 6 4 8-12", [("moved", 6, 5), ("moved", 7, 6), ("moved", 8, 4)], "behind record 7"),
    ("0-3 5-8 4x 9-12", [("moved", 9, 4), ("changed", 9, 4)], "behind record 8"),
    ("0-6 3 7-12", [("duplicate", 8, 3)], "/0:4"),
    ("0-6 3x 7-12", [("duplicate", 8, 3)], "with different contents"),
    ("0-4 5c 6-12", [("truncated", 6, -1), ("missing", 7, 5)], ""),
    ("0-2 f 3-12", [("foreign", 4, -1)], ""),
]


@pytest.mark.parametrize(("order", "expected", "words"), TAMPERED, ids=[order for order, _, _ in TAMPERED])
def test_lines_that_were_tampered_with(
    tmp_path: Path, order: str, expected: list[tuple[str, int, int]], words: str
) -> None:
    """The records by their numbers, in the order in which they stand: `x` is changed, `c` cut, `f` made up."""
    lines, tampered = log()[0], list[bytes]()
    for part in order.split():
        first, _, last = part.rstrip("xc").partition("-")
        part_of = (
            [b'{"event":"audit","request":"made up"}'] if part == "f" else lines[int(first) : int(last or first) + 1]
        )
        if part.endswith("x"):
            part_of = [part_of[0].replace(b'"r-', b'"x-').replace(b"agent-1", b"agent-2")]
        tampered += [line[:-9] for line in part_of] if part.endswith("c") else part_of
    report = check(tmp_path, tampered)
    assert found(report) == expected
    assert words in report.findings[0].text


def test_a_change_that_was_covered_up_shows_at_the_next_record(tmp_path: Path) -> None:
    """A record is changed and the next one names its new hash: then that one is not as it was written."""
    import hashlib

    lines, _ = log()
    old = hashlib.sha256(lines[5]).hexdigest().encode()
    lines[5] = lines[5].replace(b'"r-', b'"x-')
    lines[6] = lines[6].replace(old, hashlib.sha256(lines[5]).hexdigest().encode())
    assert found(check(tmp_path, lines)) == [("changed", 7, 6)]


def test_the_last_line_was_cut(tmp_path: Path) -> None:
    lines, _ = log()
    path = tmp_path / "cut"
    path.write_bytes(b"\n".join(lines)[:-9])
    assert found(verify([path])) == [("truncated", COUNT + 1, -1)]
    path.write_bytes(b"\n".join(lines))  # the last byte alone
    assert found(verify([path])) == [("truncated", COUNT + 1, COUNT)]


def test_a_tail_before_a_restart(tmp_path: Path) -> None:
    """Where the agent has started again, the cut shows, in one file and in two."""
    first, chain = log()
    second, _ = log(before=chain.head)
    report = check(tmp_path, first[:-2] + second)
    assert found(report) == [("truncated", COUNT, COUNT - 1)]
    assert report.findings[0].text == f"records {COUNT - 1} to {COUNT} are missing: the chain was cut off"
    assert found(check(tmp_path, first[:-2], second)) == [("truncated", 1, COUNT - 1)]
    changed = [*first[:-1], first[-1].replace(b'"r-', b'"x-')]
    assert found(check(tmp_path, changed, second)) == [("changed", COUNT + 1, COUNT)]
    assert check(tmp_path, first, second).ok


def test_records_that_were_added_behind_a_kill(tmp_path: Path) -> None:
    """The chain of a role that was killed is open, and has no key."""
    first, chain = log(4)
    last = chain.head
    second, _ = log(3, last)
    added = [chain.seal('{"event":"audit","request":"r-9"}') for _ in range(2)]
    for files in ([first + added, second], [first + added + second]):
        report = check(tmp_path, *files)
        assert [(one.kind, one.record) for one in report.findings] == [("changed", 6)]
        assert "records 5 to here were added later" in report.findings[0].text


def test_a_role_beside_another_one_writes_on(tmp_path: Path) -> None:
    """Both write one file: what the second found as the last record was not the first one's last."""
    first, chain = log(4)
    second, _ = log(3, chain.head)
    more = [chain.seal('{"event":"audit"}') for _ in range(2)]
    assert check(tmp_path, [*first, more[0], *second, more[1]]).ok
    end = chain.seal('{"event":"chain-end","cause":"stopped"}')
    assert check(tmp_path, [*first, *more, end, *second]).ok, "the first one ended while the second one began"


def test_a_whole_file_is_missing(tmp_path: Path) -> None:
    first, chain = log()
    _, chain = log(before=chain.head, cause="rotated")
    third, _ = log(before=chain.head, cause="rotated")
    report = check(tmp_path, first, third)
    assert report.ok
    assert "which is in none of these files" in report.notes[0]


def test_records_behind_the_end_of_a_chain(tmp_path: Path) -> None:
    lines, chain = log()
    lines += [chain.seal('{"event":"chain-end","cause":"stopped"}'), chain.seal('{"event":"audit"}')]
    assert found(check(tmp_path, lines)) == [("changed", COUNT + 3, COUNT + 2)]


def test_the_tail_of_the_newest_chain_needs_an_anchor(tmp_path: Path) -> None:
    lines, chain = log()
    assert check(tmp_path, lines[:-3]).ok, "no chain can show this"
    report = check(tmp_path, lines[:-3], anchors=[Anchor(chain.head, "2026-11-25T10:00:00Z")])
    assert found(report) == [("truncated", COUNT - 2, COUNT - 2)]
    assert check(tmp_path, lines, anchors=[Anchor(chain.head, "")]).ok


def test_a_chain_that_was_made_anew_needs_an_anchor(tmp_path: Path) -> None:
    _, chain = log()
    forged = Chain()
    forged.id = chain.id
    remade = [forged.begin("started", "agent-1", None), *[forged.seal('{"event":"audit"}') for _ in range(COUNT)]]
    assert check(tmp_path, remade).ok
    report = check(tmp_path, remade, anchors=[Anchor(chain.head, "")])
    assert found(report) == [("changed", COUNT + 1, COUNT)]
    other, _ = log()
    late, early = Anchor(chain.head, "2099-01-01T00:00:00Z"), Anchor(chain.head, "1999-01-01T00:00:00Z")
    assert found(check(tmp_path, other, anchors=[late])) == [("truncated", 0, 0)]
    assert check(tmp_path, other, anchors=[early]).ok


def test_lost_records_are_told(tmp_path: Path) -> None:
    lines, chain = log()
    lines.append(chain.seal('{"event":"audit-lost","records":7}'))
    report = check(tmp_path, lines)
    assert found(report) == [("lost", COUNT + 2, COUNT + 1)]


def test_files_in_any_order_and_compressed(tmp_path: Path) -> None:
    first, chain = log()
    second = [chain.seal('{"event":"audit","ts":"2099"}') for _ in range(3)]
    old = tmp_path / "audit.jsonl.2.gz"
    old.write_bytes(gzip.compress(b"".join(line + b"\n" for line in first)))
    new = tmp_path / "audit.jsonl"
    new.write_bytes(b"".join(line + b"\n" for line in second))
    report = verify([new, old, new])
    assert report.ok
    assert report.files == 2
    assert report.records == COUNT + 4


def test_what_a_collector_adds(tmp_path: Path) -> None:
    first, second = log()[0], log()[0]
    lines = [b"2026-11-25T10:00:00Z stdout F " + line for pair in zip(first, second, strict=True) for line in pair]
    lines.insert(2, b'2026-11-25T10:00:00Z stderr F {"event":"agent started"}')
    report = check(tmp_path, lines)
    assert report.ok
    assert len(report.chains) == 2


def test_a_part_of_a_chain(tmp_path: Path) -> None:
    lines, _ = log()
    report = check(tmp_path, lines[4:])
    assert report.ok
    assert "begins with record 4" in report.notes[0]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        verify([tmp_path / "missing"])
    bad = tmp_path / "bad.gz"
    bad.write_bytes(gzip.compress(b"x" * 1000)[:-5])
    with pytest.raises(ConfigError, match="no whole gzip"):
        verify([bad])
    damaged = bytearray(gzip.compress(bytes(range(256)) * 4))
    damaged[10:40] = b"\xff" * 30
    bad.write_bytes(damaged)
    with pytest.raises(ConfigError, match="no whole gzip"):
        verify([bad])
    with pytest.raises(ConfigError, match="audit head"):
        read_anchors(tmp_path / "nothing-in-it" if (tmp_path / "nothing-in-it").write_text("{}\n") else bad)


def test_anchors_are_read_from_an_agents_log(tmp_path: Path) -> None:
    path = tmp_path / "agent.log"
    path.write_text(
        'noise\n{"event":"agent started"}\n'
        '2026 stderr F {"timestamp":"2026-11-25T10:00:00Z","event":"audit head","chain":"aa","record":3,"hash":"bb"}\n'
        '{"event":"audit head","broken\n'
    )
    assert read_anchors(path) == [Anchor(Head("aa", 3, "bb"), "2026-11-25T10:00:00Z")]


@settings(max_examples=200)
@given(st.data())
def test_no_tampering_goes_unseen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is done to the lines before the last one, something is found; the last one's change needs an anchor."""
    lines, chain = log(6)
    anchor = Anchor(chain.head, "2026-11-25T10:00:00Z")
    before = list(lines)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        what = data.draw(st.sampled_from(["delete", "flip", "swap", "copy", "cut"]))
        if what == "delete" and len(lines) > 1:
            del lines[at]
        elif what == "flip":
            byte = data.draw(st.integers(0, len(lines[at]) - 1))
            lines[at] = lines[at][:byte] + bytes([lines[at][byte] ^ 1]) + lines[at][byte + 1 :]
        elif what == "swap":
            other = data.draw(st.integers(0, len(lines) - 1))
            lines[at], lines[other] = lines[other], lines[at]
        elif what == "copy":
            lines.insert(data.draw(st.integers(0, len(lines))), lines[at])
        elif what == "cut":
            lines[at] = lines[at][: data.draw(st.integers(1, len(lines[at])))]
    report = check(tmp_path_factory.mktemp("log"), lines, anchors=[anchor])
    if lines[0] == before[0] and lines != before:
        assert not report.ok
    elif lines != before:  # what was in front may have been taken away with an older file: that is a note
        assert not report.ok or report.notes
