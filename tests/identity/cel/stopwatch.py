"""Measures that reading a text takes time in proportion to its length."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from arcbridge.identity.cel.values import EvaluationError

LENGTH = 48_000
"""Characters of the longest claim that a token of 64 KiB can hold."""


def seconds(read: Callable[[str], object], text: str) -> float:
    """Answer the seconds of CPU time that `read` takes for `text`, which it may refuse."""
    begin = time.process_time()
    with suppress(EvaluationError):
        read(text)
    return time.process_time() - begin
