"""The codes: each one that can be found is in the table, and the table is on the page."""

from __future__ import annotations

import re
from pathlib import Path

from arcbridge.checks.diagnosis import failed, ok, warning
from arcbridge.client.doctor import access_judgement, kubeconfig_hop, machine_hops, relay_hops
from arcbridge.client.doctor.codes import CODES, exit_code
from arcbridge.errors import ExitCode
from tests.support import pages

PAGE = Path(__file__).resolve().parents[3] / "docs" / "broken.md"


def test_the_table_has_what_the_judgements_give() -> None:
    modules = (relay_hops, access_judgement, kubeconfig_hop, machine_hops)
    sources = "".join(Path(str(module.__file__)).read_text() for module in modules)
    used = {code for code in re.findall(r'"([a-z]+(?:_[a-z]+)*)"', sources) if code in CODES}
    made = {f"{kind}_token{end}" for kind in ("relay", "cluster") for end in ("", "_audience", "_issuer")}
    assert used | made | {"settings"} == set(CODES)


def test_the_page_has_the_table() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\d+) \|$", pages.read(PAGE), re.MULTILINE)
    assert {code: int(number) for code, number in rows} == {code: int(number) for code, number in CODES.items()}


def test_exit_codes() -> None:
    findings = [ok("a", ""), warning("b", "", "", "relay_certificate_ends"), failed("c", "", "", "policy")]
    assert exit_code(findings) == ExitCode.DENIED
    assert exit_code([*findings[:2]]) == ExitCode.DONE
    assert exit_code([]) == ExitCode.DONE
