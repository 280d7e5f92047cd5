"""Runs arcbridge's code as if on Windows: without POSIX modules, without what `os`, `signal` and `socket` lack there.

    python -m tests.support.windows arcbridge --role client clusters
    python -m tests.support.windows pytest tests/client/test_state.py

Only modules whose name begins with `arcbridge` see it: the standard library and other libraries have code of their own
for Windows, which does not run here. With the first word `arcbridge` the system also says that it is Windows, so that
the branches for it are taken; with `pytest` it stays Linux, and modules alone are missing.
"""

from __future__ import annotations

import asyncio
import builtins
import ctypes
import os
import runpy
import sys
import types
from typing import Any, Final

MODULES: Final = frozenset(
    {"fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty", "uvloop"}
)
"""Modules that Windows does not have."""
MISSING: Final = {
    "os": frozenset(
        {
            *("O_CLOEXEC", "O_DIRECTORY", "O_NOFOLLOW", "chown", "fchmod", "fchown", "fork", "getegid", "geteuid"),
            *("getgid", "getuid", "killpg", "memfd_create", "MFD_CLOEXEC", "mkfifo", "sendfile", "setsid", "uname"),
            *("pidfd_open", "posix_spawn", "openpty", "wait4", "sched_getaffinity"),
        }
    ),
    "signal": frozenset({"SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGCHLD"}),
    "socket": frozenset({"AF_UNIX", "SOCK_CLOEXEC", "SCM_RIGHTS", "SO_PEERCRED", "socketpair_unix", "SO_REUSEPORT"}),
}
"""What modules lack there that both have."""
OWN_SID: Final = "S-1-5-21-1-2-3-1000"
"""The user of the simulated machine."""
_IMPORT: Final = builtins.__import__
_seen: dict[str, types.ModuleType] = {}


class _Without(types.ModuleType):
    """A module without some of its names; what is set in it is set in the real one."""

    def __init__(self, real: types.ModuleType, missing: frozenset[str], changed: dict[str, object]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update({name: value for name, value in vars(real).items() if name not in missing})
        self.__dict__.update(changed)


class _Library:
    """`ctypes.WinDLL`, as far as `arcbridge.settings.windows_owner` calls it: SIMULATED_OWNER owns each path."""

    def __init__(self, name: str, *, use_last_error: bool) -> None:
        assert name in ("advapi32", "kernel32")
        assert use_last_error
        self.GetCurrentProcess = lambda: -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self, f"_{name}")

    def _GetNamedSecurityInfoW(self, path: Any, kind: int, what: int, owner: Any, *more: Any) -> int:
        assert (kind, what) == (1, 1)
        assert os.path.exists(path.value)
        if not os.environ["SIMULATED_OWNER"]:
            return 5
        owner._obj.value, more[-1]._obj.value = _POINTERS["owner"], 1
        return 0

    def _OpenProcessToken(self, process: Any, access: int, token: Any) -> int:
        assert (process.value, access) == (2**64 - 1, 8)
        token._obj.value = 2
        return 1

    def _GetTokenInformation(self, token: Any, kind: int, buffer: Any, given: Any, size: Any) -> int:
        assert (token.value, kind) == (2, 1)
        size._obj.value = 44
        if buffer is None:
            return 0
        ctypes.c_void_p.from_buffer(buffer).value = _POINTERS["own"]
        return 1

    def _ConvertSidToStringSidW(self, identifier: Any, text: Any) -> int:
        owner = identifier.value == _POINTERS["owner"]
        text._obj.value = os.environ["SIMULATED_OWNER"] if owner else OWN_SID
        return 1

    def _CloseHandle(self, handle: Any) -> int:
        return 1

    def _LocalFree(self, memory: Any) -> None:
        assert memory.value


_POINTERS: Final = {"owner": 4096, "own": 8192}


def _import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    importer = str((globals or {}).get("__name__", ""))
    if level or not (importer == "arcbridge" or importer.startswith("arcbridge.")):
        return _IMPORT(name, globals, locals, fromlist, level)
    if name.partition(".")[0] in MODULES:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return _seen.get(name) or _IMPORT(name, globals, locals, fromlist, level)


def pretend(*, windows: bool) -> None:
    """Begin. `windows`: the system's name is that of Windows, too; call it before arcbridge is imported."""
    assert not any(name.partition(".")[0] == "arcbridge" for name in sys.modules)
    changed: dict[str, dict[str, object]] = {"sys": {"platform": "win32"}, "os": {"name": "nt"}} if windows else {}
    missing = MISSING if windows else {}
    for name in {*missing, *changed}:
        _seen[name] = _Without(_IMPORT(name), missing.get(name, frozenset()), changed.get(name, {}))
    if windows:
        libraries = {"WinDLL": _Library, "FormatError": lambda code: f"error {code}", "get_last_error": lambda: 5}
        _seen["ctypes"] = _Without(ctypes, frozenset(), libraries)
    builtins.__import__ = _import
    if windows:

        def refused(*_: object) -> None:
            raise NotImplementedError

        # As on Windows' loops.
        for loop in (asyncio.SelectorEventLoop, asyncio.BaseEventLoop):
            loop.add_signal_handler = loop.remove_signal_handler = refused  # type: ignore[assignment,method-assign]


def main() -> None:
    """Run `arcbridge` or `pytest` with the arguments behind it."""
    program, *arguments = sys.argv[1:]
    pretend(windows=program == "arcbridge")
    sys.argv = [program, *arguments]
    runpy.run_module(program, run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
