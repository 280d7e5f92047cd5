"""What is wrong with a directory in which groups are looked up: state and code of the finding."""

from __future__ import annotations

import pytest

from arcbridge.checks.diagnosis import FindingState
from arcbridge.checks.directory_findings import directory_finding


@pytest.mark.parametrize(
    ("usable", "code", "state"),
    [
        (True, "", FindingState.OK),
        (False, "graph_credential", FindingState.FAILED),
        (False, "graph_unreachable", FindingState.FAILED),
        (True, "graph_credential", FindingState.WARNING),
        (True, "graph_permission", FindingState.WARNING),
    ],
)
def test_a_directory_that_can_still_be_asked_is_a_warning(usable: bool, code: str, state: FindingState) -> None:
    found = directory_finding("graph.example", usable, code, "why it is so" if code else "")
    assert (found.hop, found.state, found.code) == ("groups by graph.example", state, code)
    assert bool(found.remedy) is bool(code)
    assert not code or found.detail == "why it is so"
