"""The allocator takes its two settings where the C library has them."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_it_is_tuned_on_glibc() -> None:
    code = "from arcbridge.mux.memory import tune_allocator; assert tune_allocator() is True"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_a_c_library_without_it_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import ctypes

    from arcbridge.mux import memory

    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.tune_allocator() is False
