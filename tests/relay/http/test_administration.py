"""Administration over the HTTP API, over real TLS: two teams, each with clusters of its own, and those with none."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from arcbridge.audit.log import Recorded
from arcbridge.audit.query import Wanted
from arcbridge.errors import StateError
from arcbridge.identity import policy
from arcbridge.identity.proof import HEADER
from arcbridge.pki.authority import Authority
from arcbridge.relay.audit.log import RelayAudit
from arcbridge.relay.http import administration
from arcbridge.relay.http.administration import COMMANDS, COMMANDS_AT_ONCE, MAX_TTL, MOST_ROWS, REFUSALS, REFUSED
from arcbridge.relay.http.server import BODY_LIMIT, read_body
from arcbridge.relay.registry.base import RegistryUnavailable, UserRevocation
from arcbridge.settings.config import RelayLimitsConfig
from arcbridge.tasks import cancel_and_wait
from tests.relay.api_station import CANARY, KEY, POLICY, Relay, error
from tests.support.eventually import until

ADMINS = """
[[admin]]
users = ["shop"]
clusters = ["shop-*"]
what = ["tokens", "sessions", "revocations"]

[[admin]]
users = ["bank"]
clusters = ["bank"]
what = ["tokens", "sessions", "revocations"]

[[admin]]
users = ["joiner"]
clusters = ["shop-*"]
what = ["tokens"]

[[admin]]
users = ["joiner"]
clusters = ["shop-9"]
what = ["revocations"]

[[admin]]
users = ["reader"]
clusters = ["*"]
what = ["read"]

[[admin]]
users = ["chief"]
clusters = ["*"]
what = ["tokens", "sessions", "revocations", "read"]

[[admin]]
users = ["nearly"]
clusters = ["*-*", "bank*"]
what = ["tokens", "sessions", "revocations", "read"]
"""
SESSIONS = [
    {"session": "a" * 16, "first_session": "", "user": "ann", "cluster": "shop-1", "since": 2.0},
    {"session": "b" * 16, "first_session": "", "user": "bob", "cluster": "bank", "since": 1.0},
    # A client says itself which session it resumes.
    {"session": "c" * 16, "first_session": "a" * 16, "user": "eve", "cluster": "bank", "since": 3.0},
]


@pytest.fixture(autouse=True)
def administered(relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # In a test no second passes between two looks at the file.
    monkeypatch.setattr(policy, "CHECK_INTERVAL", 0.0)
    write(tmp_path, POLICY + ADMINS)
    relay.rows["sessions"] = SESSIONS
    relay.rows["policy"] = [{"hash": "0" * 12, "rules": 2}]


def write(tmp_path: Path, text: str) -> None:
    (tmp_path / "policy.toml").write_text(text)


async def ask(relay: Relay, who: str, command: str, **given: str) -> tuple[int, Any]:
    """Return the status and the rows, or the message of the refusal."""
    body = {"command": command, **given}
    status, answer, _ = await relay.call("POST", "/v1/admin", body, headers={"Authorization": f"Bearer token-of-{who}"})
    return status, answer["rows"] if status == 200 else error(answer)[1]


async def enrol(relay: Relay, *names: str) -> None:
    for name in names:
        await relay.registry.adopt(name, Authority.create(name).certificate_pem, time.time())


async def test_a_team_runs_its_own_clusters(relay: Relay, everything_logged: list[str]) -> None:
    status, (made,) = await ask(relay, "shop", "token create", cluster="shop-1", ttl="2h", uses="3")
    assert status == 200
    assert set(made) == {"id", "token", "cluster", "uses", "expires_at", "relay", "relay_ca_pin"}
    assert (made["cluster"], made["uses"], made["relay"]) == ("shop-1", 3, "https://relay.test:8443")
    assert made["relay_ca_pin"] == relay.authority.pin
    assert made["expires_at"] == pytest.approx(relay.clock.now + 7200)
    await ask(relay, "bank", "token create", cluster="bank")
    assert [row["id"] for row in (await ask(relay, "shop", "token list"))[1]] == [made["id"]]
    assert await ask(relay, "shop", "token delete", id=made["token"]) == (200, [{"id": made["id"]}])
    await enrol(relay, "shop-1", "bank")
    assert [row["name"] for row in (await ask(relay, "shop", "cluster list"))[1]] == ["shop-1"]
    assert relay.questions[-1] == {"ask": "agents", "patterns": ["shop-*"]}
    assert await ask(relay, "shop", "cluster revoke", cluster="shop-1") == (200, [{"cluster": "shop-1"}])
    assert await relay.registry.revocations() == {"shop-1"}
    assert await ask(relay, "shop", "cluster restore", cluster="shop-1") == (200, [{"cluster": "shop-1"}])
    assert [row["user"] for row in (await ask(relay, "shop", "session list"))[1]] == ["ann"]
    assert relay.questions[-1]["clusters"] == ["shop-*"]
    relay.rows["end"] = SESSIONS[:1]
    assert (await ask(relay, "shop", "session end", session="a" * 16, reason="now"))[1] == SESSIONS[:1]
    assert [one for one in relay.questions if one["ask"] == "end"] == [
        {"ask": "end", "session": "a" * 16, "reason": "now"}
    ]
    assert await ask(relay, "shop", "cluster delete", cluster="shop-1") == (200, [{"cluster": "shop-1"}])
    assert relay.questions[-1] == {"ask": "agents", "clusters": ["shop-1"]}
    acts = [line for line in everything_logged if "administrator's command" in line]
    assert len(acts) == 7
    assert all("'user': 'shop'" in line or "'user': 'bank'" in line for line in acts)
    assert made["token"].partition(".")[2] not in "".join(everything_logged)
    assert made["id"] in "".join(acts)


class Book(RelayAudit):
    """An audit that keeps its lines."""

    def __init__(self) -> None:
        super().__init__("")
        self.lines: list[dict[str, Any]] = []

    def put(self, line: str) -> bool:
        self.lines.append(json.loads(line))
        return super().put(line)

    def put_before(self, line: Callable[[], str], recorded: Recorded, begun: Callable[[bool], None]) -> None:
        self.lines.append(json.loads(line()))
        super().put_before(line, recorded, begun)


async def test_the_audit_names_the_person(relay: Relay) -> None:
    """docs/threats.md#K7. Acts before and after, whichever function does them, and refusals; never a secret."""
    book = relay.api.audit = Book()
    _, (made,) = await ask(relay, "shop", "token create", cluster="shop-1")
    relay.rows["end"] = SESSIONS[:1]
    await ask(relay, "shop", "session end", session="a" * 16)
    await ask(relay, "bank", "cluster revoke", cluster="shop-1")
    await ask(relay, "shop", "session list")
    found = [(line["act"], line["stage"], line["actor"], line.get("outcome", "")) for line in book.lines]
    assert found == [
        ("token create", "begun", "shop", ""),
        ("token create", "ended", "shop", "done"),
        ("session end", "begun", "shop", ""),
        ("session end", "ended", "shop", "done"),
        ("administration", "complete", "bank", "refused"),
    ]
    assert all((line["by"], line["source"]) == ("person", "127.0.0.1") for line in book.lines)
    assert book.lines[1]["result"] == {"token_id": made["id"]}
    assert made["token"].partition(".")[2] not in json.dumps(book.lines)
    # What was refused about a cluster is found by it.
    assert book.lines[-1]["arguments"] == {"command": "cluster revoke", "cluster": "shop-1"}
    assert [Wanted(cluster="shop-1").takes(line) for line in book.lines][-1]


@pytest.mark.parametrize(
    ("who", "command", "given"),
    [
        ("bank", "token create", {"cluster": "shop-1"}),
        ("bank", "cluster revoke", {"cluster": "shop-1"}),
        ("bank", "cluster restore", {"cluster": "shop-1"}),
        ("bank", "cluster delete", {"cluster": "shop-1"}),
        ("shop", "session end", {"session": "b" * 16}),
        ("shop", "session end", {"session": "d" * 16}),
        ("shop", "token create", {"cluster": "shop"}),
        ("shop", "user revoke", {"user": "bob"}),
        ("shop", "user list", {}),
        ("shop", "policy list", {}),
        ("nearly", "user revoke", {"user": "bob"}),
        ("nearly", "policy list", {}),
        ("reader", "token create", {"cluster": "shop-1"}),
        ("reader", "user revoke", {"user": "bob"}),
        ("reader", "session end", {"session": "a" * 16}),
        ("joiner", "token create", {"cluster": "shop-1", "rebind": "yes"}),
        ("ann", "cluster list", {}),
        ("ann", "no such command", {}),
    ],
)
async def test_what_is_anothers_is_refused_in_one_way(
    relay: Relay, who: str, command: str, given: dict[str, str], everything_logged: list[str]
) -> None:
    """docs/threats.md#K5."""
    await enrol(relay, "shop-1", "bank")
    assert await ask(relay, who, command, **given) == (403, REFUSED)
    assert not await relay.registry.revocations()
    assert not await relay.registry.user_revocations()
    assert not await relay.registry.list_join_tokens()
    assert await relay.registry.cluster("shop-1")
    assert "end" not in [one["ask"] for one in relay.questions]
    (line,) = [line for line in everything_logged if "administrator refused" in line]
    assert f"'user': '{who}'" in line


async def test_a_token_for_another_ca_needs_the_right_to_revoke(relay: Relay) -> None:
    """It cuts the cluster's agents off: both rights have to be for the same cluster."""
    assert (await ask(relay, "joiner", "token create", cluster="shop-1"))[0] == 200
    assert (await ask(relay, "joiner", "token create", cluster="shop-9", rebind="yes"))[0] == 200
    assert (await ask(relay, "shop", "token create", cluster="shop-1", rebind="yes"))[0] == 200
    assert sorted(token.rebind for token in await relay.registry.list_join_tokens()) == [False, True, True]


async def test_a_session_that_names_a_foreign_one_its_first_leads_to_no_other(relay: Relay) -> None:
    relay.rows["end"] = SESSIONS[2:]
    assert await ask(relay, "bank", "session end", session="a" * 16) == (200, SESSIONS[2:])
    assert [one["session"] for one in relay.questions if one["ask"] == "end"] == ["c" * 16]


async def test_anothers_token_is_as_one_that_is_not_there(relay: Relay) -> None:
    token = await relay.token("shop-1")
    assert await ask(relay, "bank", "token delete", id=token) == await ask(relay, "bank", "token delete", id="none")
    assert len(await relay.registry.list_join_tokens()) == 1


async def test_without_administrators_nobody_learns_that_there_could_be(relay: Relay, tmp_path: Path) -> None:
    """A stranger, a user and a former administrator get what they get where there are some."""
    with_some = [await relay.refused("POST", "/v1/admin", {}), await ask(relay, "ann", "cluster list")]
    write(tmp_path, POLICY)
    assert [await relay.refused("POST", "/v1/admin", {}), await ask(relay, "ann", "cluster list")] == with_some
    assert with_some == [(401, "unauthenticated"), (403, REFUSED)]
    assert await ask(relay, "chief", "cluster list") == (403, REFUSED)


async def test_the_whole_relay_is_for_who_has_every_cluster(relay: Relay) -> None:
    assert (await ask(relay, "chief", "user revoke", user="bob", reason="left"))[0] == 200
    assert set(await relay.registry.user_revocations()) == {"bob"}
    assert [row["user"] for row in (await ask(relay, "reader", "user list"))[1]] == ["bob"]
    assert await ask(relay, "chief", "user restore", user="bob") == (200, [{"user": "bob"}])
    assert (await ask(relay, "reader", "policy list"))[1] == relay.rows["policy"]
    assert len((await ask(relay, "reader", "session list"))[1]) == 3


async def test_no_command_changes_the_policy() -> None:
    """docs/threats.md#K6: an administrator gives no right to anybody, himself included."""
    assert {command for command in COMMANDS if command.startswith("policy")} == {"policy list"}


async def test_a_right_that_is_lost_while_the_request_comes_is_lost(
    relay: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/threats.md#K7: by the policy, and by a revocation of the login."""
    lose: list[Callable[[], object]] = [
        lambda: write(tmp_path, POLICY),
        lambda: relay.access.learn_users({"chief": UserRevocation("chief", 1 << 32)}),
    ]

    async def read_and_lose(request: web.Request, *names: str, **more: Any) -> list[str]:
        values = await read_body(request, *names, **more)
        lose.pop(0)()
        return values

    monkeypatch.setattr(administration, "read_body", read_and_lose)
    while lose:
        write(tmp_path, POLICY + ADMINS)
        assert await ask(relay, "chief", "token create", cluster="prod") == (403, REFUSED)
    assert not await relay.registry.list_join_tokens()


async def test_a_revoked_user_and_a_token_without_its_proof(relay: Relay, tmp_path: Path) -> None:
    relay.access.learn_users({"shop": UserRevocation("shop", 1 << 32, "left")})
    status, words = await ask(relay, "shop", "cluster list")
    assert (status, "were revoked (left)" in words) == (403, True)
    write(tmp_path, POLICY + ADMINS.replace('"bank"]\nclusters', '"bank", "bound"]\nclusters'))
    token = "token-of-bound.bound"
    body, bearer = {"command": "cluster list"}, {"Authorization": f"Bearer {token}"}
    assert (await relay.call("POST", "/v1/admin", body, headers=bearer))[0] == 401
    proof = KEY.sign_proof(token, relay.spki, "", time.time())
    assert (await relay.call("POST", "/v1/admin", body, headers={**bearer, HEADER: proof}))[0] == 200


@pytest.mark.parametrize(
    ("command", "given", "status", "words"),
    [
        ("policy accept", {}, 400, "does not know the command"),
        ("policy accept", {"hash": "0" * 12}, 400, "a member that this relay does not know"),
        ("token create", {"cluster": "Shop"}, 400, "cluster name"),
        ("token create", {"cluster": "../x"}, 400, "cluster name"),
        ("token create", {}, 400, "cluster name"),
        ("token create", {"cluster": "prod", "ttl": "8d"}, 400, "7d at most"),
        ("token create", {"cluster": "prod", "ttl": "x" * 2000}, 400, "the life of a join token"),
        ("token create", {"cluster": "prod", "uses": "1" * 2000}, 400, "whole number"),
        ("token create", {"cluster": "x" * 2049}, 400, "2048 characters"),
        ("cluster revoke", {"cluster": "prod"}, 409, "there is no cluster prod"),
        ("cluster delete", {"cluster": "prod"}, 409, "there is no cluster prod"),
        ("session end", {"session": "all of them"}, 400, "which session"),
        ("user revoke", {"user": ""}, 400, "which user"),
        ("user revoke", {"user": "a\nb"}, 400, "ISSUER#SUBJECT"),
        ("user revoke", {"user": "a", "before": "9" * 2000}, 400, "--before"),
        ("cluster revoke", {"cluster": "prod", "until": "tomorrow"}, 400, "a member that this relay does not know"),
        ("token create", {"cluster": "prod", "reason": "x"}, 400, "token create has no argument reason"),
        ("user restore", {"user": "nobody"}, 409, "is not revoked"),
    ],
)
async def test_mistakes(relay: Relay, command: str, given: dict[str, str], status: int, words: str) -> None:
    found, message = await ask(relay, "chief", command, **given)
    assert (found, words in message) == (status, True), message
    assert not await relay.registry.list_join_tokens()
    assert not await relay.registry.revocations()


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b'{"command": 1}', b'{"command": "token create", "cluster": ["a"]}', b"[" * 60_000, CANARY.encode()],
)
async def test_hostile_bodies(relay: Relay, data: bytes, everything_logged: list[str]) -> None:
    """docs/threats.md#K8."""
    headers = {"Authorization": "Bearer token-of-chief", "Content-Type": "application/json"}
    status, answer, _ = await relay.call("POST", "/v1/admin", data=data, headers=headers)
    assert (status, error(answer)[0]) == (400, "bad_request")
    assert CANARY[:12] not in json.dumps(answer) + "".join(everything_logged)
    too_large = b" " * (BODY_LIMIT + 1)
    assert (await relay.call("POST", "/v1/admin", data=too_large, headers=headers))[0] == 413
    headers["Authorization"] = "Bearer token-of-ann"
    for body in (data, too_large):
        status, answer, _ = await relay.call("POST", "/v1/admin", data=body, headers=headers)
        assert (status, error(answer)[1]) == (403, REFUSED), "who is no administrator is refused before the body"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.test"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    ],
)
async def test_w5_a_page_administers_nothing(relay: Relay, headers: dict[str, str], status: int) -> None:
    body = json.dumps({"command": "token create", "cluster": "prod"}).encode()
    sent = {"Authorization": "Bearer token-of-chief", "Content-Type": "application/json", **headers}
    assert (await relay.call("POST", "/v1/admin", data=body, headers=sent))[0] == status
    assert (await relay.call("OPTIONS", "/v1/admin", headers=sent))[0] in (403, 405)
    assert not await relay.registry.list_join_tokens()


async def test_commands_and_refusals_have_a_rate(relay: Relay, everything_logged: list[str]) -> None:
    """docs/threats.md#K8: of one person, and refusals of one address, which lock no administrator out."""
    relay.api.change_limits(RelayLimitsConfig(requests_per_minute_per_user=10_000))
    for _ in range(REFUSALS):
        assert (await ask(relay, "ann", "cluster list"))[0] == 403
    assert (await ask(relay, "bob", "cluster list"))[0] == 429
    assert len([line for line in everything_logged if "administrator refused" in line]) == REFUSALS
    for _ in range(COMMANDS_AT_ONCE):
        assert (await ask(relay, "reader", "policy list"))[0] == 200
    assert (await ask(relay, "reader", "policy list"))[0] == 429
    assert (await ask(relay, "shop", "cluster list"))[0] == 200
    assert relay.limited["administration"] == 2
    assert relay.counters.administration == {"done": COMMANDS_AT_ONCE + 1, "refused": REFUSALS + 1, "failed": 0}


async def test_an_answer_has_an_end_and_says_so(relay: Relay) -> None:
    relay.rows["sessions"] = [{**SESSIONS[0], "since": float(n)} for n in range(MOST_ROWS + 1)]
    headers = {"Authorization": "Bearer token-of-chief"}
    _, answer, _ = await relay.call("POST", "/v1/admin", {"command": "session list"}, headers=headers)
    assert (len(answer["rows"]), answer["more"]) == (MOST_ROWS, True)
    assert relay.questions[-1]["most"] == MOST_ROWS + 1


async def test_a_team_does_not_take_the_room_of_all(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(administration, "OWN_TOKENS", 1)
    assert (await ask(relay, "shop", "token create", cluster="shop-1"))[0] == 200
    status, words = await ask(relay, "shop", "token create", cluster="shop-2")
    assert (status, "your clusters have 1 join tokens" in words) == (409, True)
    for who in ("bank", "chief"):
        assert (await ask(relay, who, "token create", cluster="bank"))[0] == 200


async def test_a_full_registry_and_one_that_does_not_answer(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(administration, "MOST_TOKENS", 1)
    assert (await ask(relay, "shop", "token create", cluster="shop-1", ttl=f"{MAX_TTL:.0f}s"))[0] == 200
    assert (await ask(relay, "shop", "token create", cluster="shop-1"))[0] == 409

    async def out(*_: object) -> None:
        raise RegistryUnavailable("the registry is locked by another process: try again in a moment")

    async def damaged(*_: object) -> None:
        raise StateError("/var/lib/arcbridge/registry is damaged") from OSError()

    for fault, expected in ((out, 503), (damaged, 500)):
        monkeypatch.setattr(relay.registry, "list_join_tokens", fault)
        status, words = await ask(relay, "shop", "token list")
        assert (status, "/var/lib" in words) == (expected, False)
    assert relay.counters.administration["failed"] == 3


async def test_two_commands_at_a_time(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(administration, "TURN", 0.05)
    hold, begun = asyncio.Event(), asyncio.Semaphore(0)

    async def slow(*_: object) -> list[Any]:
        begun.release()
        await hold.wait()
        return []

    monkeypatch.setattr(relay.registry, "list_join_tokens", slow)
    running = [asyncio.create_task(ask(relay, "chief", "token list"))]
    await begun.acquire()
    # One person has one turn, and leaves the other to the others.
    assert (await ask(relay, "chief", "token list"))[0] == 503
    running.append(asyncio.create_task(ask(relay, "reader", "token list")))
    await begun.acquire()
    assert (await ask(relay, "shop", "token list"))[0] == 503
    hold.set()
    assert [status for status, _ in await asyncio.gather(*running)] == [200, 200]
    monkeypatch.setattr(administration, "TURN", 5.0)
    several = await asyncio.gather(*(ask(relay, "chief", "token list") for _ in range(4)))
    assert [status for status, _ in several] == [200] * 4, "one after the other"


async def test_a_command_goes_on_without_its_client(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry does not call back what it has begun: the turn is kept, and the record has the true end."""
    book = relay.api.audit = Book()
    begun, hold, revoke = asyncio.Event(), asyncio.Event(), relay.registry.revoke_cluster

    async def slow(name: str) -> bool:
        begun.set()
        await hold.wait()
        return await revoke(name)

    monkeypatch.setattr(relay.registry, "revoke_cluster", slow)
    await enrol(relay, "shop-1")
    asked = asyncio.create_task(ask(relay, "shop", "cluster revoke", cluster="shop-1"))
    await begun.wait()
    await cancel_and_wait(asked)
    await until(lambda: not relay.server._runner.server.connections)
    await asyncio.sleep(0.02)
    assert [line["stage"] for line in book.lines] == ["begun"]
    hold.set()
    await until(lambda: len(book.lines) == 2)
    assert book.lines[1]["outcome"] == "done"
    await until(lambda: relay.counters.administration["done"] == 1)
    assert await relay.registry.revocations() == {"shop-1"}
