"""Tables, errors, colour."""

from __future__ import annotations

import json

import pytest
import yaml

from arcbridge.checks.diagnosis import Finding, FindingState
from arcbridge.cli.output import FindingPrinter, describe, format_document, format_rows, plain, print_error
from arcbridge.cli.screen import Column, use_colour
from arcbridge.errors import ConfigError, Unreachable

ROWS = [
    {"name": "a", "state": "Connected", "agents": 2, "more": [1]},
    {"name": "longer\x1b[31m", "state": "", "agents": None, "more": []},
]
COLUMNS = (Column("name"), Column("state", state=True), Column("agents"))


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
        format_rows(ROWS, COLUMNS, "text")


def test_errors_are_one_line_then_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    print_error("it broke\x1b[0m\nmend it")
    assert capsys.readouterr().err == "error: it broke\\x1b[0m\nmend it\n"
    use_colour("always")
    print_error("")
    use_colour("auto")
    assert capsys.readouterr().err == "\x1b[31merror:\x1b[0m \n"


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


def printed(findings: list[Finding], output: str, capsys: pytest.CaptureFixture[str]) -> str:
    printer = FindingPrinter(output)
    for finding in findings:
        printer.add(finding)
    printer.end()
    return capsys.readouterr().out


def test_a_table_ends_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed([FINE, WARNED, CAUSE, LATER], "", capsys) == (
        "HOP                 STATE     DETAIL\n"
        "name resolution     ok        192.0.2.1\n"
        "clock               warning   40 s slow\n"
        "relay certificate   failed    it has\\x1b[2J expired\n"
        "session             failed    none\n"
        "\nclock: set the clock\n"
        "\nrelay certificate: renew it\n"
    )


def test_rows_come_one_by_one_and_a_document_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    for output, shown in (("table", "192.0.2.1"), ("json", "")):
        printer = FindingPrinter(output)
        printer.add(FINE)
        assert shown in capsys.readouterr().out
        assert bool(shown) or not printer.end()
        capsys.readouterr()


def test_scripts_read_the_cause(capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(printed([FINE, CAUSE, LATER], "json", capsys))
    assert document["ok"] is False
    assert document["cause"] == "relay_certificate"
    expected = {"hop": "name resolution", "state": "ok", "detail": "192.0.2.1", "remedy": "", "code": ""}
    assert document["version"] == 1
    ages = [hop.pop("after_ms") for hop in document["hops"]]
    assert ages == sorted(ages)
    assert all(isinstance(age, int) and 0 <= age < 10_000 for age in ages)
    assert document["hops"][0] == expected
    of_yaml = yaml.safe_load(printed([FINE, CAUSE, LATER], "yaml", capsys))
    for hop in of_yaml["hops"]:
        del hop["after_ms"]
    assert of_yaml == document
    assert json.loads(printed([FINE], "json", capsys))["cause"] == ""


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="use table, json or yaml"):
        FindingPrinter("name")
