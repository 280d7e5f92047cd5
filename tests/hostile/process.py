"""A role as a process of its own, real but for one part: `python -m tests.hostile.process LIE ARGUMENTS…`.

The arguments are those of `arcbridge`. The lies are the classes that the tests in one event loop use.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from tests.hostile.agent_lies import shows
from tests.hostile.relay_lies import CrossingPumps, OwnCa
from tests.hostile.wire_lies import TO_CLIENT, MeddlingPumps, OnRecord, flip


class FlipsOneAnswer(MeddlingPumps):
    """Flips a bit in the first large record towards the first client."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, wire=_flips, **settings)


def _flips(pair: int) -> OnRecord:
    return OnRecord(direction=TO_CLIENT, when=lambda _, record: pair == 0 and len(record) > 10_000, act=flip)


def _stranger(credential: Any) -> tuple[str, str]:
    issued = OwnCa.ca.issue_server([f"{credential.cluster}.cluster.arcbridge"])
    return issued.certificate_pem, issued.key_pem


LIES: dict[str, tuple[str, Any]] = {
    "crosses-users": ("arcbridge.relay.service.Pumps", CrossingPumps),
    "flips-an-answer": ("arcbridge.relay.service.Pumps", FlipsOneAnswer),
    "strange-certificate": ("arcbridge.agent.dials.SessionCertificate", shows(_stranger)),
}


def main() -> int:
    """Put the lie into its module, and run the role."""
    path, part = LIES[sys.argv[1]]
    module, _, name = path.rpartition(".")
    setattr(importlib.import_module(module), name, part)
    from arcbridge.__main__ import main as run

    return run(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
