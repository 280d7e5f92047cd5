"""Tests have a short form, which is part of every run, and a long one for the night: ARCBRIDGE_LONG=1."""

from __future__ import annotations

import os


def long_form() -> bool:
    """Tell whether tests that take minutes are to run."""
    return os.environ.get("ARCBRIDGE_LONG", "") not in ("", "0")
