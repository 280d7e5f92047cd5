"""What is not given follows from what is."""

from __future__ import annotations

import pytest

from arcbridge.mux.write_limits import write_limits


@pytest.mark.parametrize(
    ("high", "low", "limits"),
    [(None, None, (25, 100)), (80, None, (20, 80)), (None, 10, (10, 40)), (80, 0, (0, 80)), (0, None, (0, 0))],
)
def test_what_is_left_out(high: int | None, low: int | None, limits: tuple[int, int]) -> None:
    assert write_limits(high, low, 100) == limits


@pytest.mark.parametrize(("high", "low"), [(1, 2), (1, -1), (-1, None)])
def test_limits_that_cannot_be(high: int | None, low: int | None) -> None:
    with pytest.raises(ValueError, match="must be >= low"):
        write_limits(high, low, 100)
