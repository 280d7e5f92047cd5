"""`python -m bench.hostile [--only NAME] [--json FILE]`: each attack beside honest callers; what does it take?

Progress and tables go to stderr. The exit code says whether it could be measured, not whether goals were met.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from bench import machine
from bench.hostile.attacks import ATTACKS
from bench.hostile.run import Phases, api_server, goals, measure, table
from bench.peers.base import Unavailable
from tests.support.processes import ProcessFailed

SHORT = Phases(alone=3.0, attack=4.0, after=1.0)


def main(argv: list[str]) -> int:
    """Run the attacks and write what they did."""
    parser = argparse.ArgumentParser(prog="python -m bench.hostile", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", action="append", choices=tuple(ATTACKS), metavar="NAME", help=f"of {', '.join(ATTACKS)}; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the result; attacks that FILE has already are kept")
    parser.add_argument("--short", action="store_true", help="some seconds each: whether it works, not how much")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="logs and audit, which stay there")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)  # what was started is ended
    result = _begun(args.json)
    result["machine"], result["command"] = machine.describe(), f"python -m bench.hostile{' --short' * args.short}"
    try:
        with tempfile.TemporaryDirectory(prefix="arcbridge-hostile-") as temporary:
            directory: Path = args.keep or Path(temporary)
            directory.mkdir(parents=True, exist_ok=True)
            with api_server(directory) as (cluster, token):
                for name in args.only or ATTACKS:
                    found = measure(name, cluster, token, directory / name, SHORT if args.short else Phases())
                    result["attacks"][name] = found
                    result["goals"][name] = goals(found)
                    print(table(name, found), file=sys.stderr, flush=True)
                    if args.json is not None:
                        args.json.write_text(json.dumps(result, indent=1) + "\n")
    except (Unavailable, ProcessFailed) as error:
        print(f"bench.hostile: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps({name: found for name, found in result["goals"].items() if name in (args.only or ATTACKS)}))
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _begun(file: Path | None) -> dict[str, Any]:
    """The result so far: of the attacks that are not run now."""
    if file is not None and file.exists():
        begun: dict[str, Any] = json.loads(file.read_text())
        return begun
    return {"machine": {}, "command": "", "goals": {}, "attacks": {}}


if __name__ == "__main__":
    os.environ.setdefault("ARCBRIDGE_DEBUGGABLE", "1")  # an ordinary user counts the roles' descriptors in /proc
    sys.exit(main(sys.argv[1:]))
