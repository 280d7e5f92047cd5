"""`python -m tests.differential [--seconds N]`: inputs by hand, then generated ones until the time is over, half of it
for requests and half for answers; says how many of which class were tried, and how many were passed on whole.

What differs is printed with the input, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
import uvloop
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.support.net_http import NetHttp

from . import answer_inputs, request_inputs
from .answers import Answers, HostileApiServer
from .requests import Requests
from .world import entered, two_users

BATCH = 500
"""Generated inputs between two looks at the clock."""


def main(argv: list[str]) -> int:
    """Try inputs, and say what came of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.differential", description="Compare HTTP parsers.")
    parser.add_argument("--seconds", type=int, default=60, help="for the generated inputs")
    options = parser.parse_args(argv)
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner, tempfile.TemporaryDirectory() as scratch:
        directory, api_directory = Path(scratch, "go"), Path(scratch, "api")
        directory.mkdir()
        api_directory.mkdir()
        with NetHttp(directory) as go:
            requests = _Campaign(options.seconds / 2)
            with entered(runner, two_users(go.port, go.ca_file, directory)) as users:
                one = Requests(users, go)
                by_hand = [(kind, [data]) for kind, data in request_inputs.BY_HAND]
                requests.run(by_hand, request_inputs.generated(), lambda drawn: runner.run(one.attack(*drawn)))
            answers = _Campaign(options.seconds / 2)
            with (
                entered(runner, HostileApiServer.serving(api_directory)) as api,
                entered(runner, two_users(api.port, api.ca_file, directory)) as users,
            ):
                assert isinstance(api, HostileApiServer)
                other = Answers(users, api, go)
                by_hand_answers, drawn = answer_inputs.BY_HAND, answer_inputs.generated()
                answers.run(by_hand_answers, drawn, lambda answer: runner.run(other.attack(answer)))
    _say("requests, by class", one.tried, one.passed)
    _say("answers, by class", other.tried, other.passed)
    failures = requests.failures + answers.failures
    print(f"{failures} differ")
    return 1 if failures else 0


class _Campaign:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.failures = 0

    def run(self, by_hand: list[Any], strategy: Any, attack: Callable[[Any], None]) -> None:
        """Try those by hand, then generated ones."""
        for one in by_hand:
            self._try(attack, one)
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:

            @seed(random.getrandbits(64))
            @settings(
                max_examples=BATCH, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            @given(strategy)
            def batch(drawn: Any) -> None:
                if time.monotonic() < end:
                    self._try(attack, drawn)

            batch()

    def _try(self, attack: Callable[[Any], None], one: Any) -> None:
        try:
            attack(one)
        except AssertionError as error:
            self.failures += 1
            print(f"{one!r}\n    {error}", flush=True)


def _say(title: str, tried: Counter[str], passed: Counter[str]) -> None:
    print(f"\n{title:24}{'tried':>8}{'passed':>8}")
    for kind in sorted(tried):
        print(f"{kind:24}{tried[kind]:8}{passed[kind]:8}")
    print(f"{'':24}{tried.total():8}{passed.total():8}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
