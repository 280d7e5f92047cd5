"""Logs as an operator meets them: a line per event, ordered, bounded, no secrets (docs/threats.md#O1, #O2, #O4)."""

from __future__ import annotations

import io
import json
import logging as standard
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import structlog
from aiohttp.http_exceptions import BadStatusLine

from arcbridge.errors import ConfigError, Unauthenticated
from arcbridge.observe import logging as logs

CANARY = "eyJhbGciOiJub25lIn0.Y2FuYXJ5LWNhbmFyeQ.c2ln"


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    target = io.StringIO()
    logs.configure("relay", "info", "json", target)
    yield target
    logs.shutdown()
    structlog.reset_defaults()
    standard.captureWarnings(False)
    standard.getLogger().setLevel(standard.WARNING)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("hostile", ["a\r\nb", "\x1b[31mred", "\x9b2J", "<script>alert(1)</script>", "n" * 1_000_000])
@pytest.mark.parametrize("format", ["json", "console"])
def test_one_bounded_line_whatever_a_peer_sends(format: str, hostile: str) -> None:
    target = io.StringIO()
    logs.configure("agent", "info", format, target)
    structlog.get_logger("arcbridge.agent").bind(cluster=hostile).info(
        "request.refused", reason=hostile, agent=hostile.encode(), **{hostile[:80]: 1}
    )
    logs.shutdown()
    text = target.getvalue()
    assert text.count("\n") == 1
    assert len(text.encode()) < 8192
    assert text[:-1].isprintable()


def test_console_format_names_level_role_and_event() -> None:
    target = io.StringIO()
    logs.configure("client", "info", "console", target)
    structlog.get_logger("arcbridge.client").warning("relay.lost", cluster="prod", note="two words", empty="")
    logs.shutdown()
    moment, line = target.getvalue().split("Z ", 1)
    assert datetime.fromisoformat(f"{moment}Z") - datetime.now(UTC) < timedelta(minutes=1), "a log is kept for weeks"
    assert line == 'warning client: relay.lost cluster=prod note="two words" empty=""\n'


def test_lines_without_a_date_are_as_a_command_s_own_ones() -> None:
    target = io.StringIO()
    logs.configure("client", "warning", "console", target, dated=False)
    structlog.get_logger("arcbridge.client").warning("trusting a cluster at first use", cluster="prod")
    logs.shutdown()
    assert target.getvalue() == "warning: trusting a cluster at first use cluster=prod\n"


def test_a_line_of_the_client_takes_the_place_of_one_that_shows_a_wait() -> None:
    """On a terminal alone; a shorter line would leave the end of that one (`cli.screen.Waiting`)."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    found = []
    for role, target in (("client", Terminal()), ("client", io.StringIO()), ("relay", Terminal())):
        logs.configure(role, "info", "console", target)
        structlog.get_logger("arcbridge").info("event")
        logs.shutdown()
        found.append(target.getvalue().startswith("\r\x1b[K2"))
    assert found == [True, False, False]


def test_no_secret_comes_out(stream: io.StringIO) -> None:
    log = structlog.get_logger("arcbridge.relay")
    log.info(f"event {CANARY}", token=CANARY, note=f"Bearer {CANARY}", nested={"password": "hunter2", "x": [CANARY]})
    try:
        raise RuntimeError(f"unexpected {CANARY}")
    except RuntimeError:
        log.exception("broken")
    standard.getLogger("arcbridge.net").error("said %s", CANARY)
    text = stream.getvalue()
    assert len(text.splitlines()) == 3
    pieces = [CANARY[n : n + 12] for n in range(len(CANARY) - 12)]
    assert [piece for piece in pieces if piece in text] == []
    assert "hunter2" not in text


def test_a_peers_mistake_has_no_stack_trace_and_ours_has_one(stream: io.StringIO) -> None:
    log = structlog.get_logger("arcbridge.agent")
    try:
        raise Unauthenticated("the token has expired; log in again")
    except Unauthenticated:
        log.exception("auth.refused")
    try:
        raise KeyError("line one\nline two")
    except KeyError:
        log.exception("broken")
    refused, broken = lines(stream)
    assert refused["error"] == "the token has expired; log in again"
    assert "trace" not in refused
    assert broken["trace"][0].startswith("Traceback")
    assert broken["trace"][-1].startswith("KeyError")


def test_bytes_of_a_request_are_not_quoted(stream: io.StringIO) -> None:
    server = standard.getLogger("aiohttp.server")
    quoting = BadStatusLine("GET /secret-path")
    server.error("Error handling request from %s", "GET /secret-path HTTP/1.1", exc_info=quoting)
    try:
        try:
            raise quoting
        except BadStatusLine as error:
            raise RuntimeError("cannot parse") from error
    except RuntimeError:
        structlog.get_logger("arcbridge.agent").exception("broken", reason=quoting)
    first, second = lines(stream)
    assert first["message"] == "Error handling request from %s"
    assert first["error"] == "BadStatusLine"
    assert second["reason"] == "BadStatusLine"
    assert second["error"] == "RuntimeError: cannot parse"
    assert second["trace"][-1] == "RuntimeError"
    assert "secret-path" not in stream.getvalue()


def test_standard_loggers_and_warnings_are_routed(stream: io.StringIO, recwarn: pytest.WarningsRecorder) -> None:
    standard.getLogger("asyncio").error("Task was destroyed but it is pending!\ntask: %r", "x")
    standard.getLogger("asyncio").info("not wanted")
    standard.getLogger("arcbridge.mux").info("wanted")
    standard.getLogger("aiohttp.access").warning("GET /")
    first, second = lines(stream)
    assert first["event"] == "asyncio.log"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", first["timestamp"])
    assert first["origin"] == "asyncio"
    assert "\\ntask: 'x'" in first["message"]
    assert second["message"] == "wanted"


def test_a_record_that_cannot_be_formatted_costs_its_caller_nothing(stream: io.StringIO) -> None:
    (ours,) = (handler for handler in standard.getLogger().handlers if type(handler).__module__ == logs.__name__)
    ours.handle(standard.LogRecord("arcbridge.net", 30, "", 1, "%d bytes", ("no number",), None))
    standard.getLogger("arcbridge.net").warning("after")
    broken, after = lines(stream)
    assert (broken["event"], broken["origin"], broken["reason"]) == ("log.unreadable", "arcbridge.net", "TypeError")
    assert after["message"] == "after"


def test_console_format_shows_a_trace_below_its_line() -> None:
    target = io.StringIO()
    logs.configure("agent", "info", "console", target)
    log = structlog.get_logger("arcbridge.agent")
    try:
        raise KeyError("line one\nline two")
    except KeyError:
        log.exception("broken", stack="not\na line", exception="of its own")
    logs.shutdown()
    first, *trace = target.getvalue().splitlines()
    assert "broken" in first
    assert "stack_=" in first
    assert trace[0] == "    | Traceback (most recent call last):"
    assert all(line.startswith("    | ") for line in trace)


def test_level_changes_reach_loggers_that_exist(stream: io.StringIO) -> None:
    log = structlog.get_logger("arcbridge.relay").bind(session="s")
    log.debug("hidden")
    assert not log.is_enabled_for(10)
    assert logs.toggle_debug() == "debug"
    log.debug("shown")
    assert logs.toggle_debug() == "info"
    log.debug("hidden again")
    logs.set_level("error")
    log.warning("hidden too")
    assert logs.level() == "error"
    assert [line["event"] for line in lines(stream)] == ["log.level_changed", "shown", "log.level_changed"]


def test_a_flood_is_bounded_and_counted(stream: io.StringIO) -> None:
    log = structlog.get_logger("arcbridge.relay")
    for number in range(10_000):
        log.warning("join.refused", reason="bad token", port=number)
    log.warning("join.refused", reason="policy")
    assert logs.omitted() > 9000
    assert len(lines(stream)) < 200
    logs.shutdown()
    last = lines(stream)[-1]
    assert last["event"] == "log.omitted"
    assert last["omitted_event"] == "join.refused"
    # A slow machine lets some more through meanwhile, and each tells of those before it.
    assert sum(line.get("omitted", 0) for line in lines(stream)) == logs.omitted()


@pytest.mark.parametrize("arguments", [("loud", "json"), ("info", "xml"), ("in\x1bfo", "json")])
def test_unknown_settings_are_refused(arguments: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match="is unknown; use one of") as caught:
        logs.configure("relay", *arguments)
    assert "\x1b" not in str(caught.value)


def test_a_process_that_ends_at_once_has_written_its_lines() -> None:
    code = (
        "from arcbridge.observe import logging as logs; import structlog\n"
        "logs.configure('relay'); log = structlog.get_logger('arcbridge.relay')\n"
        "[log.info('event', n=n) for n in range(40)]\n"
        "raise SystemExit(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 3
    assert done.stdout == ""
    assert [json.loads(line)["n"] for line in done.stderr.splitlines()] == list(range(40))
