"""The client as one file: what is different about a program that brings its Python along.

Such a file is a shell script with an archive behind it (`.ci/release/client/head.sh`), which unpacks itself once and
runs what it has unpacked. `begin` undoes what that leaves in the environment, so that programs which the client starts
find their own libraries. Nothing here is done for an installed package.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import MutableMapping

_FILE = "_ARCBRIDGE_PROGRAM"
"""In the environment at the start: the path of the file as it was called."""
_LIBRARIES = "LD_LIBRARY_PATH"
_SAVED = "LD_LIBRARY_PATH_ORIG"
"""Where PyInstaller's loader keeps the caller's value of `LD_LIBRARY_PATH` (PyInstaller manual, "LD_LIBRARY_PATH")."""

_file = ""


def begin() -> None:
    """Put arguments and environment into the state that an installed package finds; called once, first of all."""
    global _file
    # What started this process again by itself has taken the name out; then it is the loader's own.
    _file = clean_environment(os.environ) or os.path.abspath(sys.executable)
    sys.argv[0] = _file


def is_single_file() -> bool:
    """Return whether this program is the single-file client."""
    return bool(_file)


def executable() -> str:
    """Return the path of the program that starts this one again: the single file itself, else Python.

    It stays good as long as the program is installed where it is. The directory that a single file has unpacked does
    not: a newer one removes it.
    """
    return _file or sys.executable


def clean_environment(environment: MutableMapping[str, str]) -> str:
    """Take the loader's variables out of `environment`; return the file's path, empty where none was given."""
    saved = environment.pop(_SAVED, None)
    if saved is not None:
        environment[_LIBRARIES] = saved
    else:
        environment.pop(_LIBRARIES, None)
    for name in [name for name in environment if name.startswith("_PYI_")]:
        del environment[name]
    return environment.pop(_FILE, "")
