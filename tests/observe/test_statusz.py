"""`/statusz` as people and programs ask for it; test_cluster_alerts (tests/e2e) has an API server's beside it."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge import __version__
from arcbridge.observe import statusz
from arcbridge.observe.health import Checks
from arcbridge.observe.metrics import Metrics
from arcbridge.observe.server import PATHS, ObserveServer

OBJECT = statusz.OBJECT


@pytest.fixture
async def url() -> AsyncIterator[str]:
    server = ObserveServer("127.0.0.1:0", Metrics("relay"), Checks())
    yield f"http://{await server.start()}/statusz"
    await server.stop()


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False),
        ("*/*", False),
        ("text/plain;q=0.5", False),
        ("text/html, */*", False),
        (OBJECT, True),
        ("application/json; v=v1beta1; as=Statusz; g=config.k8s.io", True),
        (f"application/yaml, {OBJECT}, text/plain", True),
        ("application/json", None),
        ("application/json;g=config.k8s.io;v=v1alpha1;as=Statusz", None),
        ("application/json;g=config.k8s.io;v=v1beta1;as=Flagz", None),
        ("text/html", None),
    ],
)
def test_what_is_asked_for(accept: str, wanted: bool | None) -> None:
    assert statusz.is_object(accept) is wanted


@given(st.text(max_size=200))
def test_any_accept_is_read(accept: str) -> None:
    assert statusz.is_object(accept) in (True, False, None)


@pytest.mark.parametrize("entries", [10, 1_000, 100_000])
def test_of_many_media_types_the_first_are_read(entries: int) -> None:
    assert statusz.is_object("a/b," * entries + "*/*") is (False if entries < 32 else None)


def test_the_page_has_the_form_of_kubernetes() -> None:
    text = statusz.page("arcbridge-relay", 1729112623.0, 3 * 3600 + 61, {"Binary version": "1"}, PATHS)
    assert text.startswith("\narcbridge-relay statusz\nWarning: This endpoint is not meant to be machine parseable,")
    assert text.endswith(
        "\n\nStarted: Wed Oct 16 21:03:43 UTC 2024\nUp: 3 hr 01 min 01 sec\nBinary version: 1\n"
        "Paths: /healthz /livez /metrics /readyz /statusz\n"
    )
    assert "Started: Thu Oct  3 " in statusz.page("arcbridge-relay", 1727989423.0, 1, {}, PATHS)


async def test_a_role_answers_both(url: str) -> None:
    async with aiohttp.ClientSession() as session:
        async with session.get(url) as answer:
            assert answer.content_type == "text/plain"
            assert "\nBinary version: " + __version__ in await answer.text()
        async with session.get(url, headers={"Accept": OBJECT}) as answer:
            assert answer.content_type == "application/json"
            found = json.loads(await answer.text())
        async with session.get(url, headers={"Accept": "application/json"}) as answer:
            assert (answer.status, await answer.text()) == (406, f"text/plain is here, and {OBJECT}\n")
    assert (found["kind"], found["apiVersion"]) == ("Statusz", "config.k8s.io/v1beta1")
    assert found["metadata"] == {"name": "arcbridge-relay"}
    assert found["binaryVersion"].startswith(__version__)
    assert 0 <= found["uptimeSeconds"] < 60
    assert found["paths"] == list(PATHS)


async def test_a_clock_that_is_set_does_not_change_how_long_a_role_runs(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = time.time() + 10**6
    monkeypatch.setattr(time, "time", lambda: later)
    async with aiohttp.ClientSession() as session, session.get(url, headers={"Accept": OBJECT}) as answer:
        assert json.loads(await answer.text())["uptimeSeconds"] < 10**5
