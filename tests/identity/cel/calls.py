"""Calls of a function by its name, as an expression makes them."""

from __future__ import annotations

from arcbridge.identity.cel.functions import FUNCTIONS
from arcbridge.identity.cel.values import Value


def called(name: str, *values: Value) -> Value:
    """The result of a function for these operands."""
    return FUNCTIONS[name, len(values)].call(*values)
