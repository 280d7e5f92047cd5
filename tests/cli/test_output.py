"""Tables, errors, colour."""

from __future__ import annotations

import io
import json

import pytest
import yaml

from arcbridge.checks.diagnosis import Finding, FindingState
from arcbridge.cli.output import (
    describe,
    format_document,
    format_findings,
    format_rows,
    plain,
    print_error,
    wants_colour,
)
from arcbridge.errors import ConfigError, Unreachable

ROWS = [
    {"name": "a", "state": "Connected", "agents": 2, "more": [1]},
    {"name": "longer\x1b[31m", "state": "", "agents": None, "more": []},
]
COLUMNS = (("name", "NAME"), ("state", "STATE"), ("agents", "AGENTS"))


def test_table() -> None:
    assert format_rows(ROWS, COLUMNS, "table").splitlines() == [
        "NAME             STATE       AGENTS",
        "a                Connected   2",
        "longer\\x1b[31m   -           -",
    ]


def test_machine_formats() -> None:
    assert json.loads(format_rows(ROWS, COLUMNS, "json")) == ROWS
    assert yaml.safe_load(format_rows(ROWS, COLUMNS, "yaml")) == ROWS
    assert format_rows(ROWS, COLUMNS, "name") == "a\nlonger\\x1b[31m\n"
    with pytest.raises(ConfigError, match="--output"):
        format_rows(ROWS, COLUMNS, "wide")


def test_errors_are_one_line_then_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("it broke\x1b[0m\nmend it")
    assert capsys.readouterr().err == "error: it broke\\x1b[0m\nmend it\n"
    print_error("", colour=True)
    assert capsys.readouterr().err == "\x1b[31merror:\x1b[0m \n"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("when", "environment", "wanted"),
    [
        ("auto", {}, True),
        ("auto", {"NO_COLOR": "1"}, False),
        ("auto", {"NO_COLOR": ""}, True),
        ("auto", {"TERM": "dumb"}, False),
        ("never", {}, False),
        ("always", {"NO_COLOR": "1"}, True),
    ],
)
def test_colour(when: str, environment: dict[str, str], wanted: bool) -> None:
    assert wants_colour(when, Terminal(), environment) is wanted
    assert wants_colour("auto", io.StringIO(), {}) is False


def test_descriptions() -> None:
    assert describe(Unreachable("no relay")) == "no relay"
    assert describe(FileNotFoundError(2, "No such file", "/x")) == "/x: No such file"
    assert "SECRET" not in describe(ValueError("SECRET"))
    assert plain("a\u202eb\n") == "a\\u202eb\\n"


def test_b48_documents_carry_no_character_that_steers_a_terminal() -> None:
    evil = "\x1b[2J\x9b31m\u202e\u2028"
    for output in ("json", "yaml"):
        text = format_document({"state": evil, evil: 1}, output)
        assert text.isascii()
        assert all(line.isprintable() for line in text.split("\n"))
        assert yaml.safe_load(text) == {"state": evil, evil: 1}


FINE = Finding("name resolution", FindingState.OK, "192.0.2.1")
WARNED = Finding("clock", FindingState.WARNING, "40 s slow", "set the clock", "clock")
CAUSE = Finding("relay certificate", FindingState.FAILED, "it has\x1b[2J expired", "renew it", "relay_certificate")
LATER = Finding("session", FindingState.FAILED, "none", "try again", "session")


def test_a_table_ends_with_what_to_do() -> None:
    assert format_findings([FINE, WARNED, CAUSE, LATER], "") == (
        "HOP                 STATE     DETAIL\n"
        "name resolution     ok        192.0.2.1\n"
        "clock               warning   40 s slow\n"
        "relay certificate   failed    it has\\x1b[2J expired\n"
        "session             failed    none\n"
        "\nclock: set the clock\n"
        "\nrelay certificate: renew it\n"
    )


def test_scripts_read_the_cause() -> None:
    document = json.loads(format_findings([FINE, CAUSE, LATER], "json"))
    assert document["ok"] is False
    assert document["cause"] == "relay_certificate"
    expected = {"hop": "name resolution", "state": "ok", "detail": "192.0.2.1", "remedy": "", "code": ""}
    assert document["hops"][0] == expected
    assert yaml.safe_load(format_findings([FINE, CAUSE, LATER], "yaml")) == document
    assert json.loads(format_findings([FINE], "json"))["cause"] == ""


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="use table, json or yaml"):
        format_findings([FINE], "name")
