"""Keeps the memory of a process, with the tokens and keys in it, out of core dumps and of other programs' reach.

The process has no core dump, whether the kernel writes it to a file or hands it to a program (systemd-coredump,
apport), and no program but root's attaches to it or reads its memory and environment in /proc, not even one of the same
user. Nor are keys of TLS sessions written to a file that SSLKEYLOGFILE names, as it is often set for browsers. It does
not hold up root, and does not follow into programs that this one starts. ARCBRIDGE_DEBUGGABLE=1 leaves all of it as the
system has it, for a debugger or a profiler (docs/threats.md#W10).
"""

from __future__ import annotations

import os
import sys

_PR_SET_DUMPABLE = 4  # prctl(2)


def forbid_core_dumps() -> None:
    """Do so for this process, as far as the system can; call it before the first secret is read."""
    if os.environ.get("ARCBRIDGE_DEBUGGABLE") == "1":
        return
    # Python's default TLS contexts follow it: those towards the issuer, the API server and NATS.
    os.environ.pop("SSLKEYLOGFILE", None)
    if sys.platform == "win32":
        return
    import resource

    # The hard limit stays: a browser or a login command that is started from here may ask for its own.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.platform != "linux":
        return
    # A core that is piped to a program takes no notice of RLIMIT_CORE (core(5)).
    try:
        import ctypes  # not at import time: 5 ms that `--help` should not pay

        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    except (ImportError, AttributeError, OSError):
        pass  # a Python without ctypes, or a C library without it
