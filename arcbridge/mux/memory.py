"""Memory of a whole process: glibc's allocator, how much history all sessions may keep, and how much may wait.

glibc is set once at start to keep the memory that bulk transfer uses again and again.

By default glibc gives blocks of 128 KiB and more straight back to the kernel, and every read of a large buffer then
faults its pages in anew; with both thresholds raised, one hop moved 1.7 GB/s where it had moved 0.64.
"""

from __future__ import annotations

from typing import Final

from arcbridge.wire.backlog import Backlog
from arcbridge.wire.replay import Budget

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
MMAP_THRESHOLD = 32 * 1024 * 1024
TRIM_THRESHOLD = 64 * 1024 * 1024

budget: Final = Budget(512 * 1024 * 1024)
"""What all sessions of this process keep of what they sent and the other ends have not confirmed, and what they
promised to receive beyond first credit. Sixteen sessions that each fill their own limit. From three quarters of it on
windows grow no more; while it is spent, sessions pause early and new ones are refused."""


backlog: Final = Backlog(256 * 1024 * 1024)
"""Bytes that wait towards the peers of all sessions of this process: two fifths of what the agent's pod has in the
manifests. Above it streams are fed in small portions, and an agent resets those that have been stalled longest
(`agent.relief`)."""


ahead: Final = Backlog(128 * 1024 * 1024)
"""Bytes that callers have sent ahead of readers that stopped, of all users of an agent: two users at their bounds, and
a fifth of what the agent's pod has. Above it sessions that hold such bytes are not read until some are taken
(`mux.session`), and the streams whose readers have stopped longest are reset (`agent.relief`)."""


arriving: Final = Backlog(32 * 1024 * 1024)
"""Bytes of requests that this process holds before they go on, of all users: eight users at their bounds."""


def tune_allocator() -> bool:
    """Raise both thresholds; false where the C library has no `mallopt` (musl, macOS, Windows)."""
    import ctypes  # not at import time: 5 ms that `--help` should not pay

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)) and bool(mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD))
