"""What a doctor prints."""

from __future__ import annotations

import json

import pytest
import yaml

from arcbridge.checks.diagnosis import Finding, FindingState
from arcbridge.cli.diagnosis import format_findings
from arcbridge.errors import ConfigError

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
