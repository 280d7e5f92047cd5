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
from bench.budget.paths import NAMESPACE, POD, operations
from bench.budget.system_calls import NoStrace
from bench.load.build import NoCompiler
from tests.support.cluster import Cluster
from tests.support.processes import require_or_skip
from tests.support.world import ApiServer

TIMES = 3
"""A busy machine delivers in two pieces what is one on a quiet one, in most operations of a count: what the code spends
is spent in each count."""


@pytest.mark.timeout(600)
def test_no_path_costs_more_than_its_budget(cluster: Cluster, api: ApiServer, tmp_path: Path) -> None:
    kept, here = Budget.read(FILE.read_text()), versions()
    if kept.versions["python"] != here["python"]:
        pytest.skip(
            f"LEFT OUT: budget: {FILE.name} was counted on Python {kept.versions['python']}, and this is "
            f"{here['python']}, whose calls and allocations are others"
        )
    spent: set[tuple[str, str, str]] | None = None
    for time in range(TIMES):
        try:
            with operations(cluster, api, tmp_path / f"paths{time}") as paths:
                counted = Budget(here, count(paths, tmp_path / f"paths{time}"))
        except NoStrace as error:
            require_or_skip("strace", str(error))
        except NoCompiler as error:
            require_or_skip("compiler", str(error))
        text, _ = verdict(kept, counted)
        print(text)
        # What costs less is said alone: on a busy machine two reads become one.
        more = {
            (change.path, change.role, change.what) for change in compare(kept.costs, counted.costs) if change.spends
        }
        spent = more if spent is None else spent & more
        if not spent:
            return
        cluster.kubectl("delete", "pod", POD, "-n", NAMESPACE, "--now")
    assert not spent, text
