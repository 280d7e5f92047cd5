"""The end of a log in a bundle: lines of ours in both forms, frames of stack traces, and nothing else."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from arcbridge.bundle.contents import Contents
from arcbridge.bundle.log_lines import last_lines, read_lines
from arcbridge.errors import ConfigError
from arcbridge.observe import logging
from tests.support.growth import growth


@pytest.fixture
def _quiet() -> Iterator[None]:
    yield
    logging.shutdown()


def written(form: str) -> list[str]:
    """What the log of a relay has on disk after some events."""
    stream = io.StringIO()
    logging.configure("relay", "debug", form, stream)
    log = structlog.get_logger("arcbridge.relay").bind(session="01K5ABC", cluster="berlin-factory")
    log.info("joined", user="alice@example.com", groups=["platform", "the developers"], ms=4.5, agents=2)
    log.warning("join refused", rule="policy.user", reason="alice@example.com may not reach berlin-factory", n=0)
    try:
        raise ValueError("berlin-factory of alice")
    except ValueError:
        log.error("a defect", exc_info=True)
    logging.shutdown()
    return stream.getvalue().splitlines()


def read(lines: list[str], *, without_names: bool = False) -> tuple[list[dict[str, Any]], int]:
    text, strange = read_lines("\n".join(lines).encode(), Contents(without_names=without_names))
    return [json.loads(line) for line in text.splitlines()], strange


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.usefixtures("_quiet")
def test_both_forms_say_the_same(form: str) -> None:
    found, strange = read(written(form))
    joined, refused, defect = found
    assert (joined["level"], joined["event"], joined["cluster"]) == ("info", "joined", "berlin-factory")
    assert (joined["user"], joined["ms"], joined["agents"]) == ("alice@example.com", 4.5, 2)
    assert joined["groups"] == ["platform", "the developers"]
    assert refused["reason"] == "alice@example.com may not reach berlin-factory"
    assert defect["error"] == "ValueError: berlin-factory of alice"
    (frame,) = defect["trace"]
    assert frame.startswith("test_log_lines.py:")
    assert frame.endswith(" in written")
    # In the console form: what is between the frames.
    assert strange == (0 if form == "json" else strange)


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.usefixtures("_quiet")
def test_without_names_no_text_of_another_author_is_there(form: str) -> None:
    found, _ = read(written(form), without_names=True)
    text = json.dumps(found)
    for name in ("alice", "berlin", "platform", "developers"):
        assert name not in text
    joined, refused, _ = found
    assert (joined["cluster"], joined["user"], joined["session"]) == ("cluster-1", "user-1", "01K5ABC")
    assert joined["groups"] == ["group-1", "group-2"]
    assert (refused["event"], refused["rule"], refused["n"]) == ("join refused", "policy.user", 0)
    assert "reason" not in refused


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.usefixtures("_quiet")
def test_without_names_a_user_s_name_of_digits_is_none_of_the_numbers(form: str) -> None:
    stream = io.StringIO()
    logging.configure("relay", "debug", form, stream)
    log = structlog.get_logger("arcbridge.relay")
    log.warning("revocation came back", kind="user", name="104711", cluster="104712", users=7104713, n=5)
    log.info("administrator's command", user="104714", subject="104715", groups=["104716"], ms=4.5)
    log.info("joined", user="1e4714", name="007")
    logging.shutdown()
    lines = stream.getvalue().splitlines()
    found, _ = read(lines, without_names=True)
    assert "1047" not in json.dumps(found)
    assert [one.get("n", one.get("ms")) for one in found] == [5, 4.5, None]
    shown, _ = read(lines)
    assert (shown[0]["name"], shown[1]["subject"], shown[2]["user"], shown[2]["name"]) == (
        "104711", "104715", "1e4714", "007"
    )  # fmt: skip


def test_without_names_no_relay_s_host_is_there() -> None:
    """An agent names its relays where a relay names its agents, whose ids are of our making."""
    relay, instance = "relay.customer.example.org:443", "agent-0123456789abcdef"
    values = (relay, "10.1.2.3:443", relay, instance, "agent-of-customer")
    lines = [json.dumps({**BASE, "connection": value}) for value in values]
    found, _ = read(lines, without_names=True)
    numbers = ["connection-1", "connection-2", "connection-1", instance, "connection-3"]
    assert [one["connection"] for one in found] == numbers
    found, _ = read(lines)
    assert [one["connection"] for one in found] == list(values)


SECRET = "correct-horse-battery-staple"
BASE = {"timestamp": "2026-11-29T12:00:00.000000Z", "level": "info", "event": "x", "role": "relay"}


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"time": "x", "user": "anna", "request": SECRET}),  # a record of the audit log
        json.dumps({**BASE, "level": SECRET}),
        json.dumps([{**BASE, "reason": SECRET}]),
        f"sshd: {SECRET}",
        f"2026-11-29 12:00:00.000Z info    sshd: x password={SECRET}",
        f"{{{SECRET}",
        f"Traceback: {SECRET}",
        f"    {SECRET}()",
    ],
)  # fmt: skip
def test_what_is_not_of_our_log_is_left_out_and_counted(line: str) -> None:
    found, strange = read([json.dumps(BASE), line, json.dumps(BASE)])
    assert len(found) == 2
    assert strange == 1
    assert SECRET not in json.dumps(found)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("reason", f"Authorization: Bearer {SECRET}"),
        ("reason", f"Cookie: session={SECRET}"),
        ("reason", f"http://anna:{SECRET}@proxy:3128 refuses"),
        ("reason", f"client_secret={SECRET}&x=1"),
        ("reason", f"-----BEGIN PRIVATE KEY-----\n{SECRET}"),
        ("client_secret", SECRET),
        ("password", [SECRET]),
        ("headers", {"authorization": SECRET}),
        (SECRET, "x"),
        ("trace", [SECRET, f'  File "/home/x.py", line 3, in f: {SECRET}']),
    ],
)
def test_secrets_in_fields_are_taken_out_once_more(field: str, value: object) -> None:
    """The writer of the log has redacted each line; a file that `--log` names may have another writer."""
    for without_names in (False, True):
        found, _ = read([json.dumps({**BASE, field: value})], without_names=without_names)
        assert len(found) == 1
        assert SECRET not in json.dumps(found)
    if isinstance(value, str) and "\n" not in value:
        line = f"2026-11-29 12:00:00.000Z info    relay: x {field.replace('-', '_')}={json.dumps(value)}"
        found, _ = read([line])
        assert SECRET not in json.dumps(found)


@pytest.mark.usefixtures("_quiet")
def test_an_error_of_an_operator_has_no_trace() -> None:
    stream = io.StringIO()
    logging.configure("agent", "info", "json", stream)
    structlog.get_logger("arcbridge.agent").error("reload", exc_info=ConfigError("relays: empty"))
    logging.shutdown()
    (record,), _ = read(stream.getvalue().splitlines())
    assert record["error"] == "relays: empty"
    assert "trace" not in record


def test_frames_behind_a_line_are_its_trace() -> None:
    """As Python writes what no handler has caught, and faulthandler at a crash."""
    lines = [json.dumps(BASE), "Traceback (most recent call last):", '  File "/opt/x/arcbridge/y.py", line 7, in f']
    lines += ['  File "/usr/lib/python3.11/site-packages/aiohttp/web.py", line 8, in <module>', "    call(hunter2)"]
    lines += ['File "/home/alice/mine.py", line 9 in g']
    (record,), strange = read(lines)
    assert record["trace"] == ["arcbridge/y.py:7 in f", "aiohttp/web.py:8 in <module>", "mine.py:9 in g"]
    assert strange == 2


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        (r"C:\Users\alice\mine.py", "mine.py"),
        (r"C:\Users\alice\arcbridge\client\x.py", "arcbridge/client/x.py"),
        (r"C:\Users\alice\venv\Lib\site-packages\aiohttp\web.py", "aiohttp/web.py"),
        (r"C:\Users\alice\AppData\Local\Programs\Python\Python311\Lib\asyncio\x.py", "asyncio/x.py"),
        (r"\\server\alice\mine.py", "mine.py"),
        (r"C:/Users/alice\mine.py", "mine.py"),
        ("alice/mine.py", "mine.py"),
        ("/home/alice/Library/lib/python3.13/asyncio/x.py", "asyncio/x.py"),
        ("<frozen runpy>", "<frozen runpy>"),
    ],
)
def test_a_frame_names_no_directory_of_a_user(file: str, shown: str) -> None:
    frame = f'  File "{file}", line 7, in f'
    (record,), _ = read([json.dumps({**BASE, "trace": [frame]}), frame], without_names=True)
    assert record["trace"] == [f"{shown}:7 in f"] * 2


@pytest.mark.parametrize(("most", "kept"), [(9, "é1\né2\n"), (8, "é1\né2\n"), (7, "é2\n"), (4, "é2\n"), (3, "")])
def test_of_a_long_log_the_last_lines_are_kept(most: int, kept: str) -> None:
    assert last_lines("é1\né2\n", most).decode() == kept


@pytest.mark.parametrize(
    "piece", [' a="', " a=[", " a=x", '\\"', "{", "[", 'File "', "2026-11-29 12:00:00.000Z info relay: "]
)
def test_a_line_takes_time_in_proportion(piece: str) -> None:
    """docs/threats.md#H20 for the lines of a log."""
    for head in ("2026-11-29 12:00:00.000Z info    relay: x", "{", ""):
        text = head + piece * (4096 // len(piece))

        def work(line: str) -> None:
            read([line])

        assert growth(work, text, text + piece * (7 * 4096 // len(piece))) < 24
