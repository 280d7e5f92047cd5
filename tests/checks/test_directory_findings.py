"""What is wrong with a directory in which groups are looked up: state and code of the finding."""

from __future__ import annotations

import pytest

from arcbridge.checks.diagnosis import State
from arcbridge.checks.directory_findings import directory_finding


@pytest.mark.parametrize(
    ("usable", "code", "state"),
    [
        (True, "", State.OK),
        (False, "graph_credential", State.FAILED),
        (False, "graph_unreachable", State.FAILED),
        (True, "graph_credential", State.WARNING),
        (True, "graph_permission", State.WARNING),
    ],
)
def test_a_directory_that_can_still_be_asked_is_a_warning(usable: bool, code: str, state: State) -> None:
    found = directory_finding("graph.example", usable, code, "why it is so" if code else "")
    assert (found.hop, found.state, found.code) == ("groups by graph.example", state, code)
    assert bool(found.remedy) is bool(code)
    assert not code or found.detail == "why it is so"
