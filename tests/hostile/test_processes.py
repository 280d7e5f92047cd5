"""One of the lies with real processes, started from settings: what a user reads at the command line, and exit codes.

The other tests of this folder run all roles in one event loop. This one shows that nothing of what they find depends on
that.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from arcbridge.errors import ExitCode
from tests.support.processes import ManagedProcess
from tests.support.reports import records, until
from tests.support.world import ALICE, BOB, ApiServer, User, World, fixed_port

CROSSES = """
import sys
from arcbridge.relay import service
from tests.hostile.relay_lies import CrossingPumps
service.Pumps = CrossingPumps
from arcbridge.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


class CrossedWorld(World):
    """An organisation whose relay joins the first client to the second one's agent, and the other way round."""

    def _start(self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None) -> ManagedProcess:
        if name == "relay":
            argv = [sys.executable, "-c", CROSSES, *argv[3:]]
        return super()._start(name, argv, env)


def refused(world: World, user: User) -> str:
    """Run a proxy, which must not start; the one line that it prints."""
    done = world.run_client(user, "--port", "0", timeout=40)
    assert done.returncode in (ExitCode.FAILURE, ExitCode.UNREACHABLE), done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return re.sub(r" \(session [0-9a-f]{16}\)\Z", "", line.removeprefix("error: "))


def test_b2_a_relay_that_crosses_two_users(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("unused")
    api = ApiServer(f"https://127.0.0.1:{fixed_port()}", token_file=token)
    with CrossedWorld(api, directory=tmp_path / "world") as world, ThreadPoolExecutor(2) as pool:
        world.start()
        for line in pool.map(lambda user: refused(world, user), (ALICE, BOB)):
            assert line == (
                f'the relay joined you to an agent of cluster "{world.cluster}" that came for another user; if it '
                "happens again, tell the relay's operator"
            )
        until(lambda: len(records(world.agent, "session refused")) == 2, "the agent has refused both")
        assert {one["reason"] for one in records(world.agent, "session refused")} == {
            "the client was joined under another id than this agent: the relay has crossed two joins"
        }
