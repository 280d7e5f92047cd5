"""A frame that has no line, as the deadline of a test can meet one."""

from __future__ import annotations

import types

import pytest

from tests.support.tracebacks import numbered


def without_lines() -> None:
    raise TimeoutError("at an instruction that has no line")


def test_a_frame_without_a_line_gets_that_of_its_function() -> None:
    """A frame whose line is `None` fails one test; pytest used to end with an internal error."""
    blank = types.FunctionType(without_lines.__code__.replace(co_linetable=b""), {"TimeoutError": TimeoutError})
    with pytest.raises(TimeoutError) as caught:
        blank()
    assert [entry.tb_lineno for entry in entries(caught.value.__traceback__)][-1] is None
    mended = entries(numbered(caught.value.__traceback__))
    assert mended[-1].tb_lineno == without_lines.__code__.co_firstlineno
    assert [entry.tb_frame for entry in mended] == [entry.tb_frame for entry in entries(caught.value.__traceback__)]
    assert mended[0].tb_lineno == entries(caught.value.__traceback__)[0].tb_lineno


def entries(trace: types.TracebackType | None) -> list[types.TracebackType]:
    found = []
    while trace is not None:
        found.append(trace)
        trace = trace.tb_next
    return found
