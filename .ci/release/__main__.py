"""`python -m release`: what `make lock`, `sbom`, `dist`, `client-file`, `site`, `manual` and `mixin` run."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from release import artifacts, lock, manual, mixin, site


def main() -> int:
    """Run one of the commands; a tool that fails says why."""
    parser = argparse.ArgumentParser(prog="python -m release", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    renew = commands.add_parser("lock", help="write the lock files anew")
    renew.add_argument("--upgrade", action="store_true", help="to the newest version of each dependency")
    for name, text in (
        ("sbom", "write the bill of materials of the committed tree"),
        ("dist", "build a release"),
        ("client-file", "build the single-file client of this platform"),
    ):
        commands.add_parser(name, help=text).add_argument("--out", type=Path, default=lock.ROOT / "dist")
    made = commands.add_parser("site", help="make a site of the documentation as it lies here")
    made.add_argument("--out", type=Path, default=lock.ROOT / "build" / "site")
    commands.add_parser("manual", help="write the man pages and the reference anew")
    monitoring = commands.add_parser("mixin", help="write the dashboard anew, or the mixin with values of your own")
    monitoring.add_argument("--out", type=Path)
    monitoring.add_argument("--runbooks", default="")
    monitoring.add_argument("--objective", default="")
    arguments = parser.parse_args()
    try:
        if arguments.command == "lock":
            lock.renew(upgrade=arguments.upgrade)
            for file in (lock.RUNTIME, lock.BUILD, lock.CLIENT, lock.SITE):
                lock.check_platforms(file)
                print(f"{file.relative_to(lock.ROOT)}: Python {lock.IMAGE_PYTHON} on {', '.join(lock.PLATFORMS)}")
        elif arguments.command == "manual":
            for path in manual.write():
                print(path.relative_to(lock.ROOT))
        elif arguments.command == "mixin":
            for path in mixin.write(arguments.out, arguments.runbooks, arguments.objective):
                print(path)
        elif arguments.command == "site":
            print(site.build(lock.ROOT, arguments.out, Path(sys.executable)))
        elif arguments.command == "sbom":
            print(artifacts.bill_of_materials(arguments.out))
        else:
            build = artifacts.build if arguments.command == "dist" else artifacts.client_file
            for path in build(arguments.out):
                print(path)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"{error.stderr or ''}\nerror: {' '.join(map(str, error.cmd[:4]))} … failed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
