"""One line per record, whatever callers put into it."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import arcbridge
from arcbridge.agent.audit import record as record_module
from arcbridge.agent.audit.record import (
    MAX_LISTED,
    TRANSITIONS,
    AuditRecord,
    AuditSubject,
    RequestOutcome,
    Value,
    path_fields,
    words_sha256,
)
from arcbridge.observe.untrusted_text import clean, escape

SUBJECT = AuditSubject("s")


def test_o2_names_cannot_break_a_line() -> None:
    evil = 'x\r\n{"user":"root"}\x1b[2J\u2028<script>' + "y" * 1_000_000
    record = AuditRecord(
        "r", AuditSubject("s", evil), name=evil, reason=evil, as_user=evil, as_groups=(evil,) * 100,
        details={"command": [evil] * 100, "container": evil},
    )  # fmt: skip
    for text in (record.line(1.0), record.begun_line(), record.details_line()):
        assert len(text.encode()) < 16 * 1024
        json.loads(text)
        assert not {"\n", "\r", "\x1b", "\u2028"} & set(text)


_TEXTS = (
    "method",
    "verb",
    "group",
    "resource",
    "subresource",
    "namespace",
    "name",
    "path",
    "target",
    "upgrade",
    "limit",
    "reason",
)


@given(
    texts=st.fixed_dictionaries({key: st.text(st.characters(), max_size=40) for key in _TEXTS}),
    names=st.tuples(st.text(max_size=100), st.text(max_size=100)),
    numbers=st.tuples(*[st.integers(0, 2**53)] * 4),
    command=st.lists(st.text(max_size=40), max_size=5),
)
@example(texts=dict.fromkeys(_TEXTS, 'a"b\\c\n\x00\ud800'), names=('"\\', '\u2028"'), numbers=(0, 0, 0, 0), command=[])
def test_o2_a_line_is_json_that_says_what_the_record_says(
    texts: dict[str, str], names: tuple[str, str], numbers: tuple[int, int, int, int], command: list[str]
) -> None:
    """The log composes its lines by hand, and most texts in them come from callers."""
    groups, status, up, down = numbers
    record = AuditRecord(
        "s-1-1", AuditSubject("s", names[0], groups), as_user=names[1], status=status, bytes_up=up,
        bytes_down=down, started=1.0, details={"command": list(command), "tty": True} if command else None, **texts,
    )  # fmt: skip
    line = record.line(3.5)
    assert "\n" not in line
    line.encode()  # also what no encoding knows was escaped
    found = json.loads(line)
    assert datetime.fromisoformat(found.pop("ts")).tzinfo is UTC
    asked = {
        "request": "s-1-1", "session": "s", "user": escape(names[0]), "groups": groups, "bound": "none",
        **({"as": escape(names[1])} if names[1] else {}),
        **{key: escape(text) for key, text in texts.items() if text and key not in ("reason", "limit", "upgrade")},
        **({"upgrade": clean(texts["upgrade"])} if texts["upgrade"] else {}),
        **({"command": [escape(word) for word in command], "tty": True} if command else {}),
    }  # fmt: skip
    assert found == {
        "event": "audit", "stage": "complete", **asked,
        **{key: clean(texts[key]) for key in ("limit", "reason") if texts[key]},
        **({"status": status} if status else {}),
        "outcome": "answered", "bytes_up": up, "bytes_down": down, "duration": 2.5,
    }  # fmt: skip
    for stage, text in (("begun", record.begun_line()), ("details", record.details_line())):
        found = json.loads(text)
        del found["ts"]
        assert found == {"event": "audit", "stage": stage, **asked}


def test_a_request_that_was_begun_ends() -> None:
    record = AuditRecord("r", SUBJECT, begun=True)
    assert json.loads(record.line(1.0))["stage"] == "ended"


def test_what_is_asked_for_may_be_given_as_it_is_written() -> None:
    path = dict(verb="list", group="apps", resource="deployments", subresource="", namespace="n", name="", path="")
    fields = {"method": "GET", **path}
    spelt, given_text = (
        AuditRecord("r", SUBJECT, **fields),
        AuditRecord("r", SUBJECT, path_fields=path_fields(**fields)),
    )
    assert spelt.line(1.0).split(",")[1:-1] == given_text.line(1.0).split(",")[1:-1]


def test_a_burst_of_refusals_is_one_record() -> None:
    found = json.loads(AuditRecord("r", SUBJECT, limit="requests", omitted=7, outcome="refused").line(1.0))
    assert (found["limit"], found["omitted"]) == ("requests", 7)
    assert "omitted" not in json.loads(AuditRecord("r", SUBJECT, limit="requests").line(1.0))


def test_groups_of_as_are_names_and_bounded() -> None:
    token_like = "A1b2C3d4" * 8
    record = AuditRecord("r", SUBJECT, as_user="", as_groups=("system:masters", token_like, *["g"] * 500))
    found = json.loads(record.line(1.0))
    assert found["as"] == ""
    assert found["as_groups"][:2] == ["system:masters", token_like]
    assert len(found["as_groups"]) == MAX_LISTED
    assert found["more"] == {"as_groups": f"{502 - MAX_LISTED} left out"}
    assert found["sha256"] == {"as_groups": words_sha256(record.as_groups)}


def written(details: dict[str, Value]) -> dict[str, object]:
    line = AuditRecord("r", SUBJECT, details=details).begun_line()
    assert len(line.encode()) < 12 * 1024
    found = json.loads(line)
    for key in ("ts", "event", "stage", "request", "session", "user", "groups", "bound"):
        del found[key]
    return found


def test_a21_what_does_not_fit_into_a_list_is_counted_and_hashed() -> None:
    words = ["x" * 2000, *["y" * 100] * 500]
    found = written({"images": words, "ports": "1"})
    assert found["images"] == ["x" * 1021 + "…", *["y" * 100] * 10, "y" * 10 + "…"]
    assert found["more"] == {"images": "2 cut, 489 left out"}
    assert found["sha256"] == {"images": hashlib.sha256(b"".join(word.encode() + b"\0" for word in words)).hexdigest()}
    assert found["ports"] == "1"
    assert "more" not in written({"images": ["a"] * MAX_LISTED})


def test_a21_the_lists_of_a_record_are_bounded_together() -> None:
    found = written({key: ["\x1b" * 1000] * 50 for key in ("privileged", "images", "command", "target_containers")})
    assert set(found["more"]) == {"privileged", "images", "command", "target_containers"}


@pytest.mark.parametrize(
    "name", ["worker-1." + "a" * 32, "eyJhbGciOiJIUzI1NiJ9", "A1b2C3d4" * 8, "bearer abcdefghijklmnop"]
)
def test_a23_names_of_objects_are_never_taken_for_secrets(name: str) -> None:
    keys = ("group", "resource", "namespace", "name", "target", "method", "verb")
    found = json.loads(
        AuditRecord("r", AuditSubject("s", name), details={"container": name}, **dict.fromkeys(keys, name)).line(1.0)
    )
    assert {found[key] for key in (*keys, "user", "container")} == {name}


def test_a23_names_are_cut_with_a_mark() -> None:
    found = json.loads(AuditRecord("r", AuditSubject("s", "u" * 2000), name="n" * 254, namespace="é" * 200).line(1.0))
    assert found["name"] == "n" * 250 + "…"
    assert found["namespace"] == "é" * 125 + "…"
    assert found["user"] == "u" * 1021 + "…"
    assert json.loads(AuditRecord("r", SUBJECT, name="n" * 253).line(1.0))["name"] == "n" * 253


def test_a25_kubectls_own_words_are_marked_as_such() -> None:
    lines = b"Accept: x\r\nKubectl-Command: kubectl get\r\nX: y\r\nKubectl-Session: 5f2c\r\nX-Kubectl-Command: z\r\n"
    found = json.loads(AuditRecord("r", SUBJECT, client=lines).line(1.0))
    assert found["client_says"] == {"command": "kubectl get", "session": "5f2c"}
    assert "more" not in found
    evil = b"Kubectl-Command: \x1b[2J\xff" + b"x" * 5000 + b"\r\nKubectl-Session: eyJhbGciOiJIUzI1NiJ9.e30.c2ln\r\n"
    found = json.loads(AuditRecord("r", SUBJECT, client=evil).line(1.0))
    assert found["client_says"]["command"].startswith("\\x1b[2J\\xff") or "ÿ" in found["client_says"]["command"]
    assert len(found["client_says"]["command"].encode()) <= 128
    assert found["client_says"]["session"] == "[redacted]"
    assert found["more"] == {"client_says": "cut or redacted"}
    assert "client_says" not in json.loads(AuditRecord("r", SUBJECT, client=b"X: Kubectl-Command: y\r\n").line(1.0))


def test_h20_what_two_records_of_a_request_share_is_cleaned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned: list[str] = []

    def counted(text: str, limit: int = 0) -> str:
        cleaned.append(text)
        return text

    monkeypatch.setattr(record_module, "clean", counted)
    monkeypatch.setattr(record_module, "escape", counted)
    details = {"command": ["x\n" * 250, "y\n"]}
    record = AuditRecord("r", SUBJECT, as_user="b\n" * 250, as_groups=("g\n" * 250,), details=details)
    begun = json.loads(record.begun_line())
    assert len(cleaned) == 4
    ended = json.loads(record.line(record.started))
    assert len(cleaned) == 4
    assert {**ended, **begun} == {**begun, **ended, "ts": begun["ts"], "stage": "begun"}
    record.details = {"privileged": ["z\n"]}  # of its body, later
    assert json.loads(record.line(record.started))["privileged"] == ["z\n"]
    assert len(cleaned) == 7, "all of the rest once more"


# -- changes --------------------------------------------------------------------------------------------------------

CHANGES = [
    (lambda record: record.refuse("no", 403), RequestOutcome.REFUSED),
    (lambda record: record.cut(), RequestOutcome.CUT),
    (lambda record: record.fail(ValueError()), RequestOutcome.FAILED),
    (AuditRecord.switch, RequestOutcome.UPGRADED),
    (AuditRecord.connect, RequestOutcome.CONNECTED),
]


@pytest.mark.parametrize("outcome", RequestOutcome)
def test_an_outcome_changes_as_the_table_says_and_else_stays(outcome: RequestOutcome) -> None:
    for change, wanted in CHANGES:
        record = AuditRecord("r", SUBJECT, outcome=outcome)
        change(record)
        assert record.outcome is (wanted if wanted in TRANSITIONS[outcome] else outcome)
    record = AuditRecord("r", SUBJECT, outcome=outcome)
    record.revoke("a right was lost")
    assert record.outcome is (RequestOutcome.FAILED if outcome is RequestOutcome.FAILED else RequestOutcome.CUT)


def test_what_was_upgraded_is_not_cut_by_its_own_end_but_by_a_lost_right() -> None:
    record = AuditRecord("r", SUBJECT)
    record.switch()
    record.break_off(ConnectionResetError())
    record.cut()
    assert (record.outcome, record.reason) == ("upgraded", "ConnectionResetError")
    record.revoke("the user lost a group")
    record.break_off(ConnectionResetError())
    assert (record.outcome, record.reason) == ("cut", "the user lost a group")


def test_a40_a_record_that_has_begun_keeps_its_user() -> None:
    record, renewed = AuditRecord("r", SUBJECT), AuditSubject("s", "renewed")
    record.is_of(renewed)
    assert '"user":"renewed"' in record.begun_line()
    record.begin()
    record.is_of(SUBJECT)
    assert record.subject is renewed


def test_no_other_module_writes_into_a_record() -> None:
    fields = {field.name for field in dataclasses.fields(AuditRecord)}
    package = Path(arcbridge.__file__).parent
    found = []
    for path in package.rglob("*.py"):
        if path.parts[-2:] == ("audit", "record.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr in fields:
                owner = node.value
                name = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
                if name in ("record", "_record"):
                    found.append(f"{path.relative_to(package)}:{node.lineno}")
    assert found == []
