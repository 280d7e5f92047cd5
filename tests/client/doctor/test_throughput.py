"""What is read to measure the rate, and what is said where nothing can be; tests/e2e/test_doctor.py reads really."""

from __future__ import annotations

from typing import Any

import pytest

from arcbridge.checks.diagnosis import Finding, FindingState
from arcbridge.client.doctor.throughput import LARGE, measure
from arcbridge.client.session.stream_http import Answer
from arcbridge.errors import ArcbridgeError, ConnectionLost


class Api:
    """The documents of an API server, by path: their sizes, or what reading them ends with."""

    def __init__(self, documents: dict[str, int | ArcbridgeError]) -> None:
        self.documents = documents
        self.asked: list[str] = []
        self.closed = 0

    async def request(self, method: str, path: str, **_: Any) -> Answer:
        self.asked.append(path)
        found = self.documents.get(path)
        if isinstance(found, ArcbridgeError):
            raise found
        return Answer(404 if found is None else 200, size=found or 10)

    def close(self) -> None:
        self.closed += 1


async def measured(api: Api, monkeypatch: pytest.MonkeyPatch) -> Finding:
    monkeypatch.setattr("arcbridge.client.doctor.throughput.StreamHttp", lambda session: api)
    found = await measure(None, 0.001)
    assert api.closed == len(set(api.asked)), "no stream is left open"
    return found


async def test_the_first_large_document_is_read_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    api = Api({"/openapi/v2": LARGE - 1, "/openapi/v3": LARGE})
    found = await measured(api, monkeypatch)
    assert found.state is FindingState.OK
    assert "a second from the cluster (/openapi/v3, " in found.detail
    assert api.asked[:2] == ["/openapi/v2", "/openapi/v3"]
    assert len(api.asked) > 2


@pytest.mark.parametrize(
    ("documents", "said"),
    [
        ({}, "the largest document that you may read has 0 bytes"),
        ({"/openapi/v2": 2048}, "the largest document that you may read has 2 KiB"),
        ({"/openapi/v2": ConnectionLost("the session is gone")}, "the session is gone"),
    ],
    ids=["none", "small", "lost"],
)
async def test_what_cannot_be_measured_is_said(
    documents: dict[str, int | ArcbridgeError], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = await measured(Api(documents), monkeypatch)
    assert (found.state, found.detail) == (FindingState.SKIPPED, f"not measured: {said}")
