"""Runs arcbridge's code as if on Windows: without POSIX modules, without what `os`, `signal` and `socket` lack there.

    python -m tests.support.windows arcbridge --role client clusters
    python -m tests.support.windows pytest tests/client/test_state.py
    python -m tests.support.windows collect tests/client

Only modules whose name begins with `arcbridge` see it: the standard library and other libraries have code of their own
for Windows, which does not run here. With the first word `arcbridge` the system also says that it is Windows, so that
the branches for it are taken; with `pytest` it stays Linux, and modules alone are missing. `collect` has pytest import
tests as on Windows, which see it, too, and run none.
"""

from __future__ import annotations

import asyncio
import builtins
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
POSIX_TESTS: Final = (
    *("cli/test_admin.py", "cli/test_backup.py", "cli/test_ca.py", "cli/test_snapshots.py", "cli/test_worker.py"),
    *("client/commands/test_first_contact.py", "client/commands/test_sign_in.py"),
    *("cli/test_completion.py", "cli/test_core_dumps.py", "cli/test_login.py", "cli/test_loop.py"),
    "net/test_loopback.py",
)
"""Of the tests that `make unit-client` runs, those that no Windows can import: they have parts of a relay, which does
not run there, or terminals, signals and limits of POSIX."""
_IMPORT: Final = builtins.__import__
_seen: dict[str, types.ModuleType] = {}
_blinded = {"arcbridge"}


class _Without(types.ModuleType):
    """A module without some of its names; what is set in it is set in the real one."""

    def __init__(self, real: types.ModuleType, missing: frozenset[str], changed: dict[str, object]) -> None:
        super().__init__(real.__name__)
        self.__dict__.update({name: value for name, value in vars(real).items() if name not in missing})
        self.__dict__.update(changed)


def _import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    importer = str((globals or {}).get("__name__", ""))
    if level or importer.partition(".")[0] not in _blinded:
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
    builtins.__import__ = _import
    if windows:

        def refused(*_: object) -> None:
            raise NotImplementedError

        # As on Windows' loops.
        for loop in (asyncio.SelectorEventLoop, asyncio.BaseEventLoop):
            loop.add_signal_handler = loop.remove_signal_handler = refused


def main() -> None:
    """Run `arcbridge` or `pytest` with the arguments behind it."""
    program, *arguments = sys.argv[1:]
    pretend(windows=program != "pytest")
    if program == "collect":
        _blinded.add("tests")
        program, arguments = "pytest", ["--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    sys.argv = [program, *arguments]
    runpy.run_module(program, run_name="__main__", alter_sys=False)


if __name__ == "__main__":
    main()
