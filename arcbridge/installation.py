"""Knows how this installation is started again, and by which path kubectl runs it as its credential plugin.

The path in a kubeconfig is absolute: an IDE or a desktop's launcher has another PATH than a terminal. Of several names
of one program the one in PATH is taken, because package managers keep it at an upgrade and move what it leads to. Each
`arcbridge credential` imports this module, so it imports nothing that takes time.
"""

from __future__ import annotations

import os
import sys

from arcbridge.single_file import executable, is_single_file

NAME = "arcbridge"


def program() -> list[str]:
    """Return the command line that runs this very installation."""
    if is_single_file():
        return [executable()]
    file = os.path.abspath(sys.argv[0]) if sys.argv and sys.argv[0] else ""
    name = os.path.basename(file)
    if name.endswith((".pyz", ".pex")) or (name in (NAME, "kubectl-arcbridge") and _is_python(file)):
        return [sys.executable, file]
    # -P: kubectl may run in a directory that has modules of its own.
    return [sys.executable, "-P", "-m", NAME]


def _is_python(file: str) -> bool:
    """Return whether a program is a script of Python, as installers make them."""
    try:
        with open(file, "rb") as script:
            first = script.readline(256)
    except OSError:
        return False
    return first.startswith(b"#!") and b"python" in first


def own_path() -> str:
    """Return the path of this program; its bare name where it is no file that can be run."""
    from shutil import which

    file = program()[-1]
    if file == NAME:  # `python -m arcbridge`
        file = os.path.join(os.path.dirname(sys.executable), NAME)
    found = which(os.path.basename(file))
    if not (os.path.isfile(file) and os.access(file, os.X_OK)):
        return os.path.abspath(found) if found else NAME
    return os.path.abspath(found) if found and os.path.samefile(found, file) else os.path.abspath(file)


def is_there(command: str, path: str | None = None) -> bool:
    """Return whether a plugin's command can be run, here at least. `path`: PATH; None: that of this process."""
    from shutil import which

    return which(command, path=path) is not None


def is_another(command: str) -> bool:
    """Return whether a plugin's command is a program that is there, and not this one."""
    try:
        return os.path.isabs(command) and not os.path.samefile(command, own_path())
    except OSError:
        return False
