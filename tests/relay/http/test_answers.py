"""What the API answers where it does not do what was asked."""

import pytest

from tests.relay.api_station import Relay, error


async def test_a_bug_is_logged_by_kind_and_place(relay: Relay, everything_logged: list[str]) -> None:
    status, answer, _ = await relay.call("GET", "/v1/clusters", headers={"Authorization": "Bearer bug"})
    assert (status, error(answer)[0]) == (500, "internal")
    (line,) = [line for line in everything_logged if "request failed" in line]
    assert "KeyError" in line
    assert "api_station.py" in line


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("POST", "/v1/ca", "method_not_allowed"),
        ("GET", "/nowhere", "not_found"),
        ("GET", "/v1/clusters", "unauthenticated"),
    ],
)
async def test_each_refusal_is_a_document_of_one_shape(relay: Relay, method: str, path: str, code: str) -> None:
    _, answer, headers = await relay.call(method, path)
    found, message = error(answer)
    assert found == code
    assert message
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert ("WWW-Authenticate" in headers) == (code == "unauthenticated")
