"""Groups from Microsoft Graph: a small Graph and a token endpoint of Entra ID's shape answer over HTTPS."""

from __future__ import annotations

import asyncio
import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from arcbridge.errors import ConfigError
from arcbridge.identity import graph
from arcbridge.identity.claims import MAX_GROUPS
from arcbridge.identity.graph import BACK_OFF, KEEP_DENIED, MAX_BACK_OFF, Directory, is_application, points_elsewhere
from arcbridge.identity.graph_token import FIRST_DELAY, MOST_SPREAD
from arcbridge.identity.lookups import AT_ONCE, KEEP_FAILURE, Lookups
from arcbridge.identity.refusal import GroupsUnavailable, TokenRefused
from arcbridge.net.fetch import MAX_DOCUMENT, HttpFetcher
from arcbridge.settings.config import GraphConfig
from tests.support.clock import Clock
from tests.support.entra import READER, TENANT, Certificate, Entra, Federated
from tests.support.issuer import Issuer

from .issuer import graph_settings as settings

GROUPS = tuple(str(uuid.UUID(int=n)) for n in range(1, 301))
CERTIFICATE = Certificate.make("arcbridge")


def by_certificate(entra: Entra) -> GraphConfig:
    entra.applications[READER].certificates.append(CERTIFICATE)
    certificate, key = CERTIFICATE.write(entra.directory, "reader")
    return settings(entra, client_secret_file=None, certificate_file=certificate, key_file=key)


def claims_of(object_id: str, **changes: Any) -> dict[str, Any]:
    return {"tid": TENANT, "oid": object_id, "sub": "pairwise", "hasgroups": True, **changes}


async def unavailable(directory: Directory, object_id: str) -> str:
    """Why, for the caller."""
    found = await failure(directory, object_id)
    return found.detail or found.message.partition("now: ")[2].removesuffix("; try again shortly")


async def failure(directory: Directory, object_id: str) -> GroupsUnavailable:
    with pytest.raises(GroupsUnavailable) as caught:
        await directory.groups(claims_of(object_id))
    return caught.value


async def refused(directory: Directory, claims: dict[str, Any]) -> str:
    with pytest.raises(TokenRefused) as caught:
        await directory.groups(claims)
    return caught.value.rule


async def test_all_groups_of_a_user_by_certificate(entra: Entra, fetcher: HttpFetcher) -> None:
    anna = entra.hire("anna@example.org", groups=GROUPS)
    directory = Directory("example", by_certificate(entra), fetcher.ask)
    assert await directory.groups(claims_of(anna.object_id)) == GROUPS
    assert entra.graph.asked == [f"users/{anna.object_id}"]
    assert entra.graph.tokens == {"certificate": 1}


async def test_an_application_s_groups_are_its_service_principal_s(entra: Entra, fetcher: HttpFetcher) -> None:
    pipeline = entra.applications[READER]
    pipeline.groups = GROUPS[:3]
    directory = Directory("example", settings(entra), fetcher.ask)
    object_id = pipeline.object_id
    assert await directory.groups(claims_of(object_id, sub=object_id)) == GROUPS[:3]
    assert entra.graph.asked == [f"servicePrincipals/{object_id}"]
    assert entra.graph.tokens == {"secret": 1}


async def test_by_a_federated_token_of_another_issuer(entra: Entra, fetcher: HttpFetcher, tmp_path: Path) -> None:
    anna = entra.hire("anna@example.org", groups=GROUPS)
    file = tmp_path / "token"
    with Issuer(tmp_path / "issuer") as issuer:
        subject = "system:serviceaccount:arcbridge:arcbridge-agent"
        entra.applications[READER].federated = [Federated(issuer.url, subject, issuer.ca_file)]
        file.write_text(issuer.mint(sub=subject, aud="api://AzureADTokenExchange"))
        directory = Directory(
            "example", settings(entra, client_secret_file=None, federated_token_file=file), fetcher.ask
        )
        assert await directory.groups(claims_of(anna.object_id)) == GROUPS
        assert entra.graph.tokens == {"federated": 1}
        # It is read again each time, since a pod's token rotates.
        file.write_text(issuer.mint(sub="system:serviceaccount:other:other", aud="api://AzureADTokenExchange"))
        other = Directory("example", settings(entra, client_secret_file=None, federated_token_file=file), fetcher.ask)
        assert "(status 401, invalid_client)" in (await failure(other, anna.object_id)).detail


async def test_of_many_users_at_once_few_are_asked_for(entra: Entra, fetcher: HttpFetcher) -> None:
    users = [entra.hire(f"u{n}@example.org", groups=GROUPS[: n + 1]) for n in range(30)]
    entra.graph.slow = 0.02
    directory = Directory("example", settings(entra), fetcher.ask)
    asking = [directory.groups(claims_of(one.object_id)) for one in users for _ in range(3)]
    found = await asyncio.gather(*asking)
    assert found == [one.groups for one in users for _ in range(3)]
    assert len(entra.graph.asked) == 30
    assert entra.graph.most_at_once <= AT_ONCE
    assert entra.graph.tokens == {"secret": 1}


@pytest.mark.parametrize("status", [500, 502, 400, 204])
async def test_no_answer_is_not_no_groups(status: int, entra: Entra, fetcher: HttpFetcher) -> None:
    anna = entra.hire("anna@example.org", groups=GROUPS)
    clock = Clock()
    entra.graph.status = status
    directory = Directory("example", settings(entra), fetcher.ask, monotonic=clock)
    assert f"(status {status})" in await unavailable(directory, anna.object_id)
    entra.graph.status = 200
    await unavailable(directory, anna.object_id)
    clock.now += KEEP_FAILURE
    assert await directory.groups(claims_of(anna.object_id)) == GROUPS


BROKEN = [b"", b"[]", b"{}", b'{"value": null}', b'{"value": [1]}', b'{"value": "x"}', b"[" * 100_000]


@pytest.mark.parametrize("body", BROKEN, ids=range(len(BROKEN)))
async def test_a_broken_answer_is_not_no_groups(body: bytes, entra: Entra, fetcher: HttpFetcher) -> None:
    anna = entra.hire("anna@example.org")
    entra.graph.body = body or b" "
    directory = Directory("example", settings(entra), fetcher.ask)
    assert "gave no list of groups" in await unavailable(directory, anna.object_id)


async def test_more_groups_than_can_be_sent_are_none(entra: Entra, fetcher: HttpFetcher) -> None:
    anna = entra.hire("anna@example.org")
    many = [str(uuid.UUID(int=n)) for n in range(MAX_GROUPS + 1)]
    entra.graph.body = json.dumps({"value": many}).encode()
    directory = Directory("example", settings(entra), fetcher.ask)
    assert await refused(directory, claims_of(anna.object_id)) == "claims.groups.many"
    # Beyond 11,000 Graph itself gives none.
    entra.graph.body, entra.graph.status = b"", 400
    entra.graph.code = "Directory_ResultSizeLimitExceeded"
    directory = Directory("example", settings(entra), fetcher.ask)
    assert await refused(directory, claims_of(anna.object_id)) == "claims.groups.many"


@pytest.mark.parametrize("link", ["https://graph.example.org/next", "", None, "$self"])
async def test_t57_a_page_is_not_all_groups_and_the_next_is_not_asked_for(
    link: str | None, entra: Entra, fetcher: HttpFetcher
) -> None:
    anna = entra.hire("anna@example.org")
    link = f"{entra.graph_url}/v1.0/users/{anna.object_id}/getMemberObjects" if link == "$self" else link
    entra.graph.body = json.dumps({"value": GROUPS[:2], "@odata.nextLink": link}).encode()
    directory = Directory("example", settings(entra), fetcher.ask)
    assert "gave a part of the groups alone" in await unavailable(directory, anna.object_id)
    assert len(entra.graph.asked) == 1


async def test_t57_an_answer_that_is_too_large_or_silent_is_none(entra: Entra, fetcher: HttpFetcher) -> None:
    anna = entra.hire("anna@example.org", groups=GROUPS)
    entra.graph.body = b'{"value": []' + b" " * MAX_DOCUMENT + b"}"
    directory = Directory("example", settings(entra), fetcher.ask)
    assert "the document is larger than 1048576 bytes" in await unavailable(directory, anna.object_id)
    entra.graph.body, entra.graph.slow = b"", 30.0
    directory = Directory("example", settings(entra), fetcher.ask)
    directory.lookups = Lookups(Clock(), 300.0, deadline=0.2)
    assert "Microsoft Graph did not answer within" in await unavailable(directory, anna.object_id)


async def test_t57_names_that_are_no_ids_are_no_groups(entra: Entra, fetcher: HttpFetcher) -> None:
    anna = entra.hire("anna@example.org")
    for name in ("system:masters", "x" * 100_000, GROUPS[0] + "\n", ""):
        entra.graph.body = json.dumps({"value": [GROUPS[1], name]}).encode()
        directory = Directory("example", settings(entra), fetcher.ask)
        assert "gave no list of groups" in await unavailable(directory, anna.object_id)
    entra.graph.body = json.dumps({"value": [GROUPS[1], GROUPS[1]]}).encode()
    assert await Directory("example", settings(entra), fetcher.ask).groups(claims_of(anna.object_id)) == (GROUPS[1],)


@pytest.mark.parametrize(
    ("given", "wait"), [("", BACK_OFF), ("30", 30.0), ("0", 1.0), ("86400", MAX_BACK_OFF), ("soon", BACK_OFF)]
)
async def test_a_busy_graph_is_left_alone(given: str, wait: float, entra: Entra, fetcher: HttpFetcher) -> None:
    anna, bert = (entra.hire(f"{name}@example.org", groups=GROUPS) for name in ("anna", "bert"))
    clock = Clock()
    directory = Directory("example", settings(entra), fetcher.ask, monotonic=clock)
    entra.graph.status, entra.graph.retry_after = 429, given
    assert await unavailable(directory, anna.object_id) == "Microsoft Graph is busy (status 429)"
    entra.graph.status = 200
    assert await unavailable(directory, bert.object_id) == "Microsoft Graph is busy"
    assert len(entra.graph.asked) == 1
    clock.now += max(wait, KEEP_FAILURE)
    assert await directory.groups(claims_of(bert.object_id)) == GROUPS


async def test_what_the_application_lacks_is_said_to_the_operator_and_not_to_the_caller(
    entra: Entra, fetcher: HttpFetcher
) -> None:
    anna = entra.hire("anna@example.org", groups=GROUPS)

    async def detail(settings: GraphConfig) -> str:
        found = await failure(Directory("example", settings, fetcher.ask), anna.object_id)
        for ours in ("graph.example", str(entra.directory), READER, "127.0.0.1"):
            assert ours not in found.message
        return found.detail

    entra.graph.permitted = False
    assert "refuses the application of graph.example (status 403)" in await detail(settings(entra))
    wrong = entra.directory / "wrong"
    wrong.write_text("another secret")
    said = await detail(settings(entra, client_secret_file=wrong))
    assert "gets no token for Microsoft Graph (status 401, invalid_client)" in said
    assert "another secret" not in said
    missing = settings(entra, client_secret_file=entra.directory / "missing")
    assert "graph.example.client_secret_file: " in await detail(missing)
    said = await detail(settings(entra, ca_file=None))
    assert said.startswith("graph.example: the token endpoint for Microsoft Graph does not answer (127.0.0.1: ")


async def test_t56_users_do_not_show_a_refused_credential_again_and_it_recovers(
    entra: Entra, fetcher: HttpFetcher
) -> None:
    users = [entra.hire(f"u{n}@example.org", groups=GROUPS) for n in range(20)]
    clock, reader = Clock(), entra.applications[READER]
    directory = Directory("example", settings(entra), fetcher.ask, monotonic=clock)
    secret, reader.secret = reader.secret, "another one"
    said = await asyncio.gather(*(unavailable(directory, one.object_id) for one in users))
    assert all("(status 401, invalid_client); it is asked for again in" in one for one in said)
    assert (entra.graph.tokens_asked, entra.graph.asked) == (1, [])
    failure = await directory.look()
    assert failure is not None
    assert failure.code == "graph_credential"
    assert entra.graph.tokens_asked == 1, "a self-check asks no sooner"
    reader.secret = secret
    clock.now += FIRST_DELAY + MOST_SPREAD
    assert await directory.look() is None
    assert await directory.groups(claims_of(users[0].object_id)) == GROUPS
    assert entra.graph.tokens_asked == 2


async def test_a_new_secret_counts_at_once_for_a_user_who_was_refused_for_lack_of_one(
    entra: Entra, fetcher: HttpFetcher
) -> None:
    anna = entra.hire("anna@example.org", groups=GROUPS)
    directory = Directory("example", settings(entra), fetcher.ask, monotonic=Clock())
    secret, reader = entra.applications[READER].secret, entra.applications[READER]
    reader.secret = f"{secret}-next"
    try:
        assert "invalid_client" in await unavailable(directory, anna.object_id)
        assert "invalid_client" in await unavailable(directory, anna.object_id)
        assert (directory.token.failed, directory.lookups.failed) == (1, 2)
        settings(entra)  # the file has the new secret
        assert await directory.look() is None
        assert await directory.groups(claims_of(anna.object_id)) == GROUPS
    finally:
        reader.secret = secret


async def test_t56_a_graph_that_takes_no_token_is_not_asked_for_each_user(entra: Entra, fetcher: HttpFetcher) -> None:
    users = [entra.hire(f"u{n}@example.org", groups=GROUPS) for n in range(12)]
    clock = Clock()
    directory = Directory("example", settings(entra), fetcher.ask, monotonic=clock)
    entra.graph.status = 401
    for one in users:
        assert "refuses the application of graph.example (status 401)" in await unavailable(directory, one.object_id)
    assert (entra.graph.tokens_asked, len(entra.graph.asked)) == (2, 2)
    failure = await directory.look()
    assert failure is not None
    assert failure.code == "graph_permission"
    entra.graph.status = 200
    clock.now += FIRST_DELAY + MOST_SPREAD
    assert await directory.groups(claims_of(users[0].object_id)) == GROUPS
    assert await directory.look() is None


async def test_what_graph_does_not_permit_is_told_of_the_kind_it_is_about(entra: Entra, fetcher: HttpFetcher) -> None:
    anna, reader = entra.hire("anna@example.org", groups=GROUPS), entra.applications[READER]
    clock = Clock()
    directory = Directory("example", settings(entra), fetcher.ask, monotonic=clock)
    entra.graph.permitted = False
    with pytest.raises(GroupsUnavailable):
        await directory.groups(claims_of(reader.object_id, sub=reader.object_id))
    entra.graph.permitted = True
    assert await directory.groups(claims_of(anna.object_id)) == GROUPS, "users are asked for all the same"
    failure = await directory.look()
    assert failure is not None
    assert failure.why.endswith("asked about servicePrincipals")
    clock.now += KEEP_DENIED
    assert await directory.look() is None


async def test_who_is_not_in_the_directory_is_refused(entra: Entra, fetcher: HttpFetcher) -> None:
    directory = Directory("example", settings(entra), fetcher.ask)
    assert await refused(directory, claims_of(str(uuid.uuid4()))) == "claims.groups.unknown"


@pytest.mark.parametrize("value", [None, "", "me", "../me", "1/../2", 7, "x" * 36, f"{READER}/x"])
async def test_only_an_object_id_is_put_into_a_url(value: Any, entra: Entra, fetcher: HttpFetcher) -> None:
    directory = Directory("example", settings(entra), fetcher.ask)
    assert await refused(directory, claims_of(value)) == "claims.groups.oid"
    assert await refused(directory, claims_of(READER, tid=value)) == "claims.groups.tenant"
    assert entra.graph.asked == []


def test_which_tokens_point_elsewhere() -> None:
    assert points_elsewhere({"hasgroups": True})
    assert points_elsewhere({"hasgroups": "true", "groups": None})
    assert points_elsewhere({"_claim_names": {"groups": "src1"}})
    assert not points_elsewhere({"_claim_names": {"wids": "src1"}, "hasgroups": False})
    assert not points_elsewhere({"groups": [], "_claim_names": {"groups": "src1"}, "hasgroups": True})
    assert not points_elsewhere({})


def test_who_is_an_application() -> None:
    assert is_application({"idtyp": "app", "oid": "1", "sub": "2"})
    assert is_application({"oid": "1", "sub": "1"})
    assert not is_application({"oid": "1", "sub": "2"})
    assert not is_application({"idtyp": "user", "oid": "1", "sub": "1"})


WRONG = [
    ({"issuers": ()}, "graph.example.issuers: missing"),
    ({"tenant": "example.org"}, "graph.example.tenant: must be the directory"),
    ({"client_id": ""}, "graph.example.client_id: missing"),
    ({"client_secret_file": None}, "graph.example: exactly one of"),
    ({"federated_token_file": Path("x")}, "and there are client_secret_file and federated_token_file"),
    ({"key_file": Path("x")}, "graph.example.key_file: needed with certificate_file"),
    ({"client_secret_file": None, "certificate_file": Path("x")}, "graph.example.key_file: needed"),
    ({"url": "http://graph.example.org"}, "graph.example.url: must be an https URL"),
    ({"url": "https://user@graph.example.org"}, "graph.example.url: must have no user information"),
    ({"token_endpoint": "https://login.example.org/token?x=1"}, "graph.example.token_endpoint: must have no"),
    ({"token_endpoint": "https://login.example.org:x/token"}, "graph.example.token_endpoint: not a URL"),
    ({"cache": 0.0}, "graph.example.cache: must be above 0"),
    ({"cache": 4000.0}, "at most 1 h"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG, ids=[words for _, words in WRONG])
def test_settings_that_cannot_work(changes: dict[str, Any], words: str, entra: Entra) -> None:
    with pytest.raises(ConfigError, match=words):
        graph.check("example", settings(entra, **changes))


async def test_a_ca_that_is_none(entra: Entra, fetcher: HttpFetcher, tmp_path: Path) -> None:
    for file in (tmp_path / "missing", entra.directory / "secret"):
        with pytest.raises(ConfigError, match=r"graph\.example\.ca_file: "):
            Directory("example", settings(entra, ca_file=file), fetcher.ask)
