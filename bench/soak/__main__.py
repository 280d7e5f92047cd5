"""`python -m bench.soak --duration SECONDS`: many streams with checksums both ways while relays are killed.

The last line of stdout is the result as JSON; progress goes to stderr. The exit code is 0 when no byte was lost,
doubled or wrong and every stream that failed has an explanation; 1 otherwise, also when the soak itself broke; 130
when interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

from bench.soak.conversation import PATIENCE
from bench.soak.run import Broken, Plan, run, summary, tell
from tests.support.processes import ProcessFailed


def main(argv: list[str]) -> int:
    """Run the soak and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description="Kill relays under load; count each byte."
    )
    parser.add_argument("--duration", type=float, default=1200.0, help="seconds of load (1200)")
    parser.add_argument("--streams", type=int, default=200, help="streams that are open at any time (200)")
    parser.add_argument("--clients", type=int, default=8, help="client processes, a session each (8)")
    parser.add_argument("--relays", type=int, default=2, help="relays, killed in turn (2)")
    parser.add_argument("--every", type=float, default=30.0, help="seconds between two kills (30)")
    parser.add_argument("--kills", type=int, default=10_000, help="at most so many kills")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds until a silent stream has hung (150)")
    parser.add_argument("--seed", type=bytes.fromhex, help="32 hex digits: what the streams say (random)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the result with its details, as JSON")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="logs and ledgers, which stay there")
    args = parser.parse_args(argv)
    if min(args.duration, args.streams, args.clients, args.relays, args.every) <= 0 or args.clients > args.streams:
        parser.error("durations and counts are above 0, and each client has a stream")
    if args.seed is not None and len(args.seed) != 16:
        parser.error("--seed has 32 hex digits")
    plan = Plan(
        duration=args.duration,
        command=shlex.join(["python", "-m", "bench.soak", *argv]),
        streams=args.streams,
        clients=args.clients,
        relays=args.relays,
        every=args.every,
        most_kills=args.kills,
        patience=args.patience,
        **({"seed": args.seed} if args.seed else {}),
    )
    directory: Path = args.keep or Path(tempfile.mkdtemp(prefix="arcbridge-soak-"))
    directory.mkdir(parents=True, exist_ok=True)
    sound = False
    try:
        result = run(plan, directory)
        sound = bool(result["sound"])
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")
    except (Broken, ProcessFailed) as error:
        print(f"bench.soak: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        if sound and not args.keep:
            shutil.rmtree(directory, ignore_errors=True)
        else:
            tell(f"logs and ledgers are in {directory}")
    print(json.dumps(summary(result)), flush=True)
    return 0 if sound else 1


if __name__ == "__main__":
    os.environ.setdefault("ARCBRIDGE_DEBUGGABLE", "1")  # an ordinary user counts the roles' descriptors in /proc
    sys.exit(main(sys.argv[1:]))
