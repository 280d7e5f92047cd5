"""File descriptors: as many as the system lets this process have, and what to tell when they run out.

The soft limit is what a program gets without asking, and often 1,024 for the sake of programs that use select(2),
which breaks on numbers above that. Nothing here does: the loop uses epoll or kqueue. So each role raises its soft
limit to the hard one at its start; the hard one is the operator's to raise.
"""

from __future__ import annotations

import errno
import sys
from typing import Final

UNLIMITED: Final = sys.maxsize
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""What `accept` and `socket` fail with when there is none left, or no memory for one: to be tried again later, and
never at once, because a listening socket stays readable."""
_MOST_USEFUL: Final = 1 << 20
"""Beyond this a higher soft limit has no use; and macOS refuses its own "unlimited"."""


def raise_limit() -> int:
    """Raise the soft limit to the hard one; return how many descriptors this process may open now."""
    try:
        import resource
    except ImportError:  # Windows: sockets are no descriptors there
        return UNLIMITED
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_USEFUL if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):
            # The kernel has a bound of its own (fs.nr_open, kern.maxfilesperproc): what there is has to do.
            pass
    return limit()


def limit() -> int:
    """Return how many descriptors this process may open."""
    try:
        import resource
    except ImportError:
        return UNLIMITED
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UNLIMITED if soft == resource.RLIM_INFINITY else soft


def advice(needed: int) -> str:
    """Say where an operator sets a limit of `needed`."""
    return (
        f"set the hard limit to {needed} or more: LimitNOFILE={needed} in the systemd unit, "
        f"--ulimit nofile={needed}:{needed} with docker; Kubernetes has no field for it, a pod gets what the node's "
        f"container runtime has (LimitNOFILE of containerd or CRI-O)"
    )


def explain(error: OSError) -> str:
    """Say why a socket could not be had, and what to do."""
    if error.errno == errno.EMFILE:
        return (
            f"this process has no file descriptor left of the {limit()} it may open: close connections, or raise its "
            f"limit (LimitNOFILE in systemd, ulimit -n in a shell)"
        )
    if error.errno == errno.ENFILE:
        return "the system has no file descriptor left: raise fs.file-max, or close what holds so many"
    return error.strerror or str(error)
