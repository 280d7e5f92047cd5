"""Names the process that holds the background process's lock, says that it does not answer, and ends it.

The process writes its id and the time of its start into the file that it has locked. It cannot be asked when it hangs,
the kernel's word on the socket (SO_PEERCRED) is that of the process which listened first, and its descriptors in /proc
are closed to this user (`cli.core_dumps`). Invariant: no signal goes to a process unless the lock is held, the file
names the process, and a process of that id is this user's and began at that time: an id that was used again is another
process. Where /proc hides this user's own processes (hidepid), the holder cannot be told.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from arcbridge.client.background.local_channel import NOT_HERE
from arcbridge.client.background_paths import BackgroundPaths
from arcbridge.errors import ConfigError, StateError
from arcbridge.pki.private_files import read_file, try_lock

END_TIMEOUT = 5.0
"""Seconds in which a process that got SIGTERM, or SIGKILL, has ended."""
_PROC = "/proc/self/stat"
_STATE, _START = 0, 19
"""Fields of /proc/PID/stat behind the name of the program (proc_pid_stat(5)): state, and start in ticks since boot."""


class Holder(NamedTuple):
    """A process that holds the lock."""

    pid: int
    start: str
    """When it began, as `_start_of` says."""


def sign(descriptor: int) -> None:
    """Write into the lock file, which this process has locked, that it is this one.

    On a full disk it stays unsigned, and the process serves: at worst it cannot be ended by force.
    """
    if sys.platform == "win32":
        raise ConfigError(NOT_HERE)
    pid = os.getpid()
    unsign(descriptor)
    with contextlib.suppress(OSError):
        os.pwrite(descriptor, f"{pid} {_start_of(pid)}\n".encode(), 0)


def unsign(descriptor: int) -> None:
    """Take this process's name out of the lock file: another process is about to hold the lock."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)


def holder_of(place: BackgroundPaths) -> Holder | None:
    """Return the process that holds the lock; None where none does, or which one it is cannot be told."""
    if not is_held(place):
        return None
    try:
        pid, _, start = (read_file(Path(place.process_lock)) or b"").decode("ascii").strip().partition(" ")
        found = Holder(int(pid), start)
    except (StateError, ValueError):
        return None  # one of a former version signs nothing
    return found if start and _start_of(found.pid) == start else None


def is_held(place: BackgroundPaths) -> bool:
    """Return whether a process holds the lock. Raises StateError."""
    if not os.path.exists(place.process_lock):
        return False
    if (lock := try_lock(Path(place.process_lock))) is not None:
        os.close(lock)
    return lock is None


def is_working(place: BackgroundPaths) -> bool:
    """Return whether the process runs, or waits for a processor or a disk: it is slow and does not hang."""
    holder = holder_of(place)
    return holder is not None and _state_of(holder.pid) in ("R", "D", "U")  # a wait that no signal ends: D, macOS U


def silence(place: BackgroundPaths) -> str:
    """Say of a process that does not answer which one it is, and since when.

    The first caller that gets no answer leaves a mark, which the process removes when it goes on.
    """
    with contextlib.suppress(OSError):  # the next caller then says a later time
        os.close(os.open(place.silent, os.O_WRONLY | os.O_CREAT, 0o600))
    holder, now = holder_of(place), time.time()
    since = min(now, _silent_since(place) or now)
    clock = time.strftime("%H:%M:%S" if now - since < 43200 else "%Y-%m-%d %H:%M", time.localtime(since))
    if holder is None:
        return f"the background process does not answer since {clock}"
    suspended = _state_of(holder.pid) in ("T", "t")
    why = f" because it is suspended (`kill -CONT {holder.pid}` lets it go on)" if suspended else ""
    return f"the background process (pid {holder.pid}) does not answer since {clock}{why}"


def _silent_since(place: BackgroundPaths) -> float:
    """Return when a caller first got no answer, unix seconds; 0: none is known to have waited in vain."""
    try:
        return os.stat(place.silent).st_mtime
    except OSError:
        return 0.0


def holder_to_end(place: BackgroundPaths) -> Holder | None:
    """Return the process that holds the lock, None where none does; raises StateError where it is not known to be
    ours."""
    holder = holder_of(place)
    if holder is None and is_held(place):
        raise StateError(
            f"which process holds {place.process_lock} cannot be told, so none is ended: "
            "look for `arcbridge --role client background` in the list of processes and end it by hand"
        )
    return holder


def end(place: BackgroundPaths, holder: Holder, *, kill: bool = False) -> bool:
    """Send SIGTERM, or SIGKILL, to this holder of the lock; return whether it has ended within END_TIMEOUT.

    One that was suspended is let go on, so that SIGTERM reaches it. The next process, which may hold the lock as soon
    as this one has ended, gets no signal.
    """
    if sys.platform == "win32":
        raise ConfigError(NOT_HERE)
    _send(holder, *((signal.SIGKILL,) if kill else (signal.SIGTERM, signal.SIGCONT)))
    return has_ended(place, holder, END_TIMEOUT)


def has_ended(place: BackgroundPaths, holder: Holder | None, timeout: float) -> bool:
    """Wait until this holder has let the lock go; None: until no process has the lock, or listens. Return whether."""
    deadline = time.monotonic() + timeout
    while holder_of(place) == holder if holder is not None else os.path.exists(place.socket) or is_held(place):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def _send(holder: Holder, *numbers: int) -> None:
    """Send signals to that process, and to no other that has its id by now."""
    if sys.platform == "win32":
        raise ConfigError(NOT_HERE)
    with contextlib.suppress(ProcessLookupError):
        if sys.platform != "linux":  # macOS has no descriptor of a process
            for number in numbers:
                os.kill(holder.pid, number)
            return
        process = os.pidfd_open(holder.pid)
        try:
            if _start_of(holder.pid) == holder.start:  # from here on the descriptor is that very process
                for number in numbers:
                    signal.pidfd_send_signal(process, number)
        finally:
            os.close(process)


def _start_of(pid: int) -> str:
    """Return when a process of this user began, in words that are the same for as long as it lives; empty where there
    is none."""
    if sys.platform == "win32":
        raise ConfigError(NOT_HERE)
    if os.path.exists(_PROC):
        user, start = _of_proc(pid, "status").partition("\nUid:")[2].split()[1:2], _of_stat(pid, _START)
    else:
        user, start = _ps(pid, "uid").split(), " ".join(_ps(pid, "lstart").split())
    return start if user == [str(os.geteuid())] else ""


def _state_of(pid: int) -> str:
    """Return the letter of a process's state, as of ps(1); empty where there is none."""
    return _of_stat(pid, _STATE) if os.path.exists(_PROC) else _ps(pid, "state").strip()[:1]


def _of_stat(pid: int, field: int) -> str:
    """Return a field of /proc/PID/stat; empty where there is no such process."""
    return "".join(_of_proc(pid, "stat").rpartition(")")[2].split()[field : field + 1])


def _of_proc(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def _ps(pid: int, column: str) -> str:
    """Return what ps(1) says of a process, where there is no /proc, as on macOS."""
    command = ["ps", "-o", f"{column}=", "-p", str(pid)]
    surroundings = {"PATH": "/bin:/usr/bin", "LC_ALL": "C", "TZ": "UTC"}
    try:
        done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
