"""The executable: `arcbridge --role relay|agent|client …`.

`--version` and `version` are answered here, before a parser is imported, because scripts and package managers ask
often. Everything else goes through `arcbridge.cli.run`, which imports the parser first and each role's
libraries only once its sub-command is known (start-up budget: docs/change.md).
"""

from __future__ import annotations

import gc
import os
import sys

from arcbridge import __version__


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code (`arcbridge.errors.ExitCode`)."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["--version"], ["-V"]):
        print(f"arcbridge {__version__}")
        return 0
    if arguments == ["version"]:
        from arcbridge.build import version_line

        print(version_line())
        return 0

    # A container with a user ID of its own may have neither HOME nor an entry in /etc/passwd. Such a user gets `/`, as
    # container runtimes give it, and what cannot be written there is then named.
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = "/"
    if arguments[:1] == ["credential"]:  # run by each kubectl
        from arcbridge.cli.credential import print_credential

        code = print_credential(arguments[1:])
        if code is not None:
            return code

    # Imports make tens of thousands of objects that all stay: to look for garbage among them, again and again, is a
    # tenth of a client's start. `cli/loop.py` switches the collector on again before a role runs.
    gc.disable()
    try:
        from arcbridge.cli.run import run

        return run(arguments, program=sys.argv[0])
    finally:
        gc.enable()


if __name__ == "__main__":
    sys.exit(main())
