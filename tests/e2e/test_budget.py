"""What an open, an echo, a GET, an exec and a join cost each role is within 3 % of bench/budget.json.

What is counted does not depend on the machine or its load, so a failure is a change of the code, or of a library that
the message names. The totals that are beyond the budget are named with the functions that explain them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.budget.__main__ import FILE, verdict, versions
from bench.budget.comparison import Budget, compare
from bench.budget.counting import count
from bench.budget.paths import operations
from bench.budget.system_calls import NoStrace
from bench.load.build import NoCompiler
from tests.support.cluster import Cluster
from tests.support.processes import require_or_skip
from tests.support.world import ApiServer


@pytest.mark.timeout(300)
def test_no_path_costs_more_than_its_budget(cluster: Cluster, api: ApiServer, tmp_path: Path) -> None:
    kept, here = Budget.read(FILE.read_text()), versions()
    if kept.versions["python"] != here["python"]:
        pytest.skip(
            f"LEFT OUT: budget: {FILE.name} was counted on Python {kept.versions['python']}, and this is "
            f"{here['python']}, whose calls and allocations are others"
        )
    try:
        with operations(cluster, api, tmp_path / "paths") as paths:
            counted = Budget(here, count(paths, tmp_path / "paths"))
    except NoStrace as error:
        require_or_skip("strace", str(error))
    except NoCompiler as error:
        require_or_skip("compiler", str(error))
    text, _ = verdict(kept, counted)
    print(text)
    # What costs less is said alone: on a busy machine two reads become one.
    assert not [change for change in compare(kept.costs, counted.costs) if change.spends], text
