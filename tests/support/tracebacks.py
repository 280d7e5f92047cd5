"""Tracebacks that pytest can print: it computes with the line of every frame, and Python may have none."""

from __future__ import annotations

from types import TracebackType


def numbered(trace: TracebackType | None) -> TracebackType | None:
    """Return the traceback with the first line of the function where a frame has no line."""
    frames = []
    while trace is not None:
        line: int | None = trace.tb_lineno  # the stub knows only numbers
        frames.append((trace.tb_frame, trace.tb_lasti, trace.tb_frame.f_code.co_firstlineno if line is None else line))
        trace = trace.tb_next
    for frame in reversed(frames):
        trace = TracebackType(trace, *frame)
    return trace
