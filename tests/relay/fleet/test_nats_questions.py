"""An operator's question over a real NATS server: every relay answers once, the asking one not itself, and nonsense
stops nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.relay.conftest import Connections
from tests.relay.fleet.test_nats import settled, started


@pytest.fixture(autouse=True)
def _a_busy_machine_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcbridge.relay.fleet.nats_questions.DEADLINE", 30.0)


async def test_every_other_relay_answers_in_parts(connections: Connections) -> None:
    fleets = [await started(connections) for _ in range(3)]

    def answers(number: int) -> Any:
        def answer(question: Mapping[str, Any]) -> list[dict[str, Any]]:
            return [{"relay": number, "ask": question["ask"], "text": "x" * 1000} for _ in range(200)]

        return answer

    for number, fleet in enumerate(fleets):
        fleet.on_question = answers(number)
    await settled(*fleets)
    rows = await fleets[0].ask_others({"ask": "sessions"})
    assert sorted(row["relay"] for row in rows) == [1] * 200 + [2] * 200
    assert {row["ask"] for row in rows} == {"sessions"}
    for fleet in fleets:
        await fleet.close()


async def test_a_relay_alone_has_no_other_rows(connections: Connections) -> None:
    fleet = await started(connections)
    fleet.on_question = lambda question: [{"own": True}]
    assert await fleet.ask_others({"ask": "sessions"}) == []
    await fleet.close()


async def test_nonsense_on_the_subjects_is_passed_over(connections: Connections) -> None:
    fleet, other = await started(connections), await started(connections)
    other.on_question = lambda question: [{"other": True}]
    await settled(fleet, other)
    for text in (b"", b"nonsense", b"{}", b'{"from": 1, "question": 2}', b"[" * 200_000):
        await fleet._nats.publish(f"{fleet._prefix}.relay.questions", text, f"{fleet._prefix}.inbox.nowhere")
    assert await fleet.ask_others({"ask": "sessions"}) == [{"other": True}]
    for one in (fleet, other):
        await one.close()


async def test_without_nats_there_are_no_rows(connections: Connections) -> None:
    fleet = await started(connections)
    assert fleet.engine_connected
    await fleet.close()
    await fleet._nats.close()
    assert await fleet.ask_others({"ask": "sessions"}) == []
