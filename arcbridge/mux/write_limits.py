"""Computes how much a transport's write buffer may hold before its writer is paused, as asyncio's transports do.

Only the numbers are worked out here; a transport keeps them and acts on them.
"""

from __future__ import annotations


def write_limits(high: int | None, low: int | None, default_high: int) -> tuple[int, int]:
    """Return (low, high) in bytes, as `asyncio.WriteTransport.set_write_buffer_limits` fills in what is not given.

    `low` defaults to a quarter of `high`, and `high` to four times `low`, or to `default_high` where neither is given.
    Raises ValueError unless high >= low >= 0.
    """
    if high is None:
        high = default_high if low is None else 4 * low
    if low is None:
        low = high // 4
    if not high >= low >= 0:
        raise ValueError(f"high ({high}) must be >= low ({low}) must be >= 0")
    return low, high
