"""Requests of an attacker on the agent's streams: what passes, all parsers read alike (docs/threats.md#H5)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given, settings

from .request_inputs import BY_HAND, generated
from .requests import Requests
from .world import ENTRANCES, QUICK, entered, reading_beside, two_users


@pytest.fixture(scope="module", params=ENTRANCES)
def attacked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[asyncio.Runner, Requests]]:
    directory = tmp_path_factory.mktemp("differential")
    with (
        reading_beside(request.param, directory) as (runner, go),
        entered(runner, two_users(go.port, go.ca_file, directory)) as users,
    ):
        yield runner, Requests(users, go)


def test_by_hand(attacked: tuple[asyncio.Runner, Requests]) -> None:
    runner, requests = attacked
    wrong = []
    for kind, data in BY_HAND:
        middle = len(data) // 2
        for pieces in ([data], [data[:middle], data[middle:]], [data[:-1], data[-1:]]):
            try:
                runner.run(requests.attack(kind, pieces))
            except AssertionError as error:
                wrong.append(f"{kind}: {data[:300]!r}: {error}")
    assert not wrong, f"{len(wrong)} differ:\n" + "\n".join(wrong)
    assert requests.passed["plain"] == 9
    assert requests.passed["pipeline"] > 60
    assert requests.tried.total() == 3 * len(BY_HAND)


def test_generated(attacked: tuple[asyncio.Runner, Requests]) -> None:
    runner, requests = attacked
    before = requests.passed.total()

    @settings(max_examples=200, deadline=None, phases=QUICK, report_multiple_bugs=False)
    @given(generated())
    def attack(drawn: tuple[str, list[bytes]]) -> None:
        runner.run(requests.attack(*drawn))

    attack()
    # What is drawn depends on the versions of Hypothesis and Python: a tenth is enough to mean something.
    assert requests.passed.total() - before > 20
