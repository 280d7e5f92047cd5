"""Answers of a hostile API server: the caller gets what all parsers read, or sees that it has none
(docs/threats.md#H9)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given, settings

from .answer_inputs import BY_HAND, Answer, generated
from .answers import Answers, HostileApiServer
from .world import ENTRANCES, QUICK, entered, reading_beside, two_users


@pytest.fixture(scope="module", params=ENTRANCES)
def attacked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[asyncio.Runner, Answers]]:
    directory = tmp_path_factory.mktemp("differential")
    api_directory = tmp_path_factory.mktemp("api")
    with (
        reading_beside(request.param, directory) as (runner, go),
        entered(runner, HostileApiServer.serving(api_directory)) as api,
        entered(runner, two_users(api.port, api.ca_file, directory)) as users,
    ):
        assert isinstance(api, HostileApiServer)
        yield runner, Answers(users, api, go)


def test_by_hand(attacked: tuple[asyncio.Runner, Answers]) -> None:
    runner, answers = attacked
    wrong = []
    for answer in BY_HAND:
        try:
            runner.run(answers.attack(answer))
        except AssertionError as error:
            answers.users.failures.clear()
            wrong.append(f"{answer.kind}, {answer.method}, {answer.end}: {answer.data[:300]!r}: {error}")
    assert not wrong, f"{len(wrong)} differ:\n" + "\n".join(wrong)
    assert answers.tried.total() == len(BY_HAND)
    assert answers.passed["plain"] == answers.tried["plain"]
    assert answers.passed["stray"] == answers.tried["stray"], "what is whole is passed on, and nothing behind it"


def test_generated(attacked: tuple[asyncio.Runner, Answers]) -> None:
    runner, answers = attacked
    before = answers.passed.total()

    @settings(max_examples=200, deadline=None, phases=QUICK, report_multiple_bugs=False)
    @given(generated())
    def attack(answer: Answer) -> None:
        runner.run(answers.attack(answer))

    attack()
    # What is drawn depends on the versions of Hypothesis and Python: a tenth is enough to mean something.
    assert answers.passed.total() - before > 20
