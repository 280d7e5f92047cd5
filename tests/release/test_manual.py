"""Man pages and reference are those of the tables, and man reads them without a complaint."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from arcbridge.client.doctor.codes import CODES
from arcbridge.settings.flags import ROLES
from release import inventory, manual
from tests.config.test_prometheus import defined_metrics
from tests.support.processes import require_or_skip


def test_each_file_is_what_the_tables_say() -> None:
    for path, text in manual.files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run: make manual"


@pytest.mark.parametrize("role", ROLES)
def test_man_has_nothing_to_complain_of(role: str) -> None:
    if shutil.which("groff") is None:
        require_or_skip("man", "groff is not on this machine")
    command = ["groff", "-man", "-ww", "-Kutf8", "-Tutf8", "-rLL=80n", str(manual.MAN / manual.NAMES[role])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    shown = re.sub(r".\x08", "", done.stdout)
    assert "EXIT STATUS" in shown
    assert "--config FILE" in shown


@pytest.mark.parametrize("role", ROLES)
def test_each_setting_says_what_it_is(role: str) -> None:
    found = manual.settings(role)
    assert len(found) > 20
    assert [one.key for one in found if not one.about] == []


@pytest.mark.parametrize("role", ["relay", "agent"])
def test_the_metrics_are_those_that_the_source_registers(role: str) -> None:
    """Found twice, by the syntax tree and by a pattern of the text."""
    found = {one.name for one in inventory.metrics() if role in one.roles}
    assert found == defined_metrics(role)
    assert len(found) > 80


def test_an_event_is_found_however_its_name_and_level_are_chosen() -> None:
    found = {one.name: one for one in inventory.events()}
    assert len(found) > 150
    assert found["check failed"].fields >= {"check", "code", "reason", "remedy"}
    assert found["settings reloaded"].levels == {"info", "warning"}
    assert found["worker serving"].roles == {"relay"}
    assert "connections turned away" in found, "the name is an argument of the function that logs"


def test_codes_have_their_remedies() -> None:
    found = inventory.codes()
    assert set(found["client"]) == set(CODES)
    assert {"api_ca", "issuer_document", "token_clock", "public_address", "relay_pin"} <= set(found["operator"])
    assert sum(bool(remedy) for remedy in found["operator"].values()) > 50
