"""The issuer's keys: when they are fetched, and what happens when they cannot be (docs/threats.md#T4)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from arcbridge.errors import Unreachable
from arcbridge.identity.authentication import parse
from arcbridge.identity.fetch import Reply
from arcbridge.identity.keys import LAST_GOOD, UNKNOWN_KEY_INTERVAL, KeySet, parse_keys
from arcbridge.identity.refusal import IssuerUnavailable
from tests.support.clock import Clock

from .issuer import CONFIG, EC, ED, RSA, RSA_OTHER, Issuer, jwk


def key_set(issuer: Issuer, clock: Clock) -> KeySet:
    return KeySet(parse(CONFIG).issuers[0], issuer.fetch, clock)


async def fetched() -> tuple[Issuer, Clock, KeySet]:
    """An issuer whose keys were fetched."""
    issuer, clock = Issuer(), Clock()
    keys = key_set(issuer, clock)
    assert await keys.candidates("k1", "RS256")
    return issuer, clock, keys


async def settle(keys: KeySet) -> None:
    """Lets a background fetch finish: the fake issuer answers without waiting for anything."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_storm_of_unknown_ids_is_one_fetch() -> None:
    issuer, clock, keys = await fetched()
    clock.now += 5
    await asyncio.gather(*(keys.candidates(f"made-up-{n}", "RS256") for n in range(500)))
    assert issuer.key_fetches == 2
    clock.now += UNKNOWN_KEY_INTERVAL - 1
    assert await keys.candidates("again", "RS256") == []
    assert issuer.key_fetches == 2
    clock.now += 2
    await keys.candidates("again", "RS256")
    assert issuer.key_fetches == 3


async def test_a_rotated_key_is_found_at_once() -> None:
    issuer, clock, keys = await fetched()
    issuer.keys.append(jwk(RSA_OTHER, "k2"))
    clock.now += 5
    assert len(await keys.candidates("k2", "RS256")) == 1


async def test_whether_a_key_is_published_is_not_known_while_the_issuer_is_away() -> None:
    """Else a rotation of keys in an outage sends users to log in again, and ends sessions that renew their tokens."""
    issuer, clock, keys = await fetched()
    issuer.keys.append(jwk(RSA_OTHER, "k2"))
    issuer.down = True
    clock.now += 5
    for _ in range(2):
        with pytest.raises(IssuerUnavailable):
            await keys.candidates("k2", "RS256")
    assert await keys.candidates("k1", "RS256")
    assert await keys.candidates("k1", "ES256") == []
    issuer.down = False
    clock.now += UNKNOWN_KEY_INTERVAL
    assert await keys.candidates("k2", "RS256")


async def test_the_first_use_by_many_is_one_fetch() -> None:
    issuer = Issuer()
    keys = key_set(issuer, Clock())
    found = await asyncio.gather(*(keys.candidates("k1", "RS256") for _ in range(50)))
    assert all(found)
    assert issuer.key_fetches == 1


async def test_an_outage_leaves_the_last_good_set_for_a_day_then_closes() -> None:
    issuer, clock, keys = await fetched()
    issuer.down = True
    clock.now += LAST_GOOD - 1
    assert await keys.candidates("k1", "RS256")
    await settle(keys)
    clock.now += 40
    with pytest.raises(IssuerUnavailable):
        await keys.candidates("k1", "RS256")
    issuer.down = False
    clock.now += 40
    assert await keys.candidates("k1", "RS256")


async def test_an_issuer_that_is_down_from_the_start_is_not_hammered() -> None:
    issuer, clock = Issuer(), Clock()
    issuer.down = True
    keys = key_set(issuer, clock)
    for _ in range(20):
        with pytest.raises(IssuerUnavailable):
            await keys.candidates("k1", "RS256")
    assert len(issuer.urls) == 1
    issuer.down = False
    clock.now += 3
    assert await keys.candidates("k1", "RS256")


async def test_a_set_is_fetched_again_in_the_background() -> None:
    issuer, clock = Issuer(), Clock()
    issuer.max_age = 100_000  # an hour at most, whatever the issuer says
    keys = key_set(issuer, clock)
    await keys.candidates("k1", "RS256")
    issuer.keys = [jwk(RSA_OTHER, "k2")]
    clock.now += 3601
    assert await keys.candidates("k1", "RS256"), "callers go on with the old set meanwhile"
    await settle(keys)
    assert await keys.candidates("k1", "RS256") == []
    assert keys.generation == 2


async def test_the_discovery_document_must_be_the_issuer_s() -> None:
    issuer = Issuer()
    issuer.issuer = issuer.issuer + "/"
    with pytest.raises(IssuerUnavailable):
        await key_set(issuer, Clock()).candidates("k1", "RS256")
    assert issuer.key_fetches == 0


async def test_keys_are_never_fetched_in_clear() -> None:
    issuer = Issuer()
    issuer.jwks_uri = "http://issuer.example/keys"
    with pytest.raises(IssuerUnavailable):
        await key_set(issuer, Clock()).candidates("k1", "RS256")
    assert issuer.key_fetches == 0


async def test_close_ends_a_fetch_under_way() -> None:
    started = asyncio.Event()

    async def hang(url: str, ca_pem: str | None) -> Any:
        started.set()
        await asyncio.Event().wait()

    keys = KeySet(parse(CONFIG).issuers[0], hang, Clock())
    caller = asyncio.ensure_future(keys.candidates("k1", "RS256"))
    await started.wait()
    await keys.close()
    with pytest.raises(IssuerUnavailable):
        await caller


WEAK = rsa.generate_private_key(public_exponent=65537, key_size=1024)
UNUSABLE = [
    jwk(WEAK),
    {**jwk(RSA), "e": jwk(WEAK)["n"]},  # docs/threats.md#J35: a long exponent, and a long modulus
    {**jwk(RSA), "n": "_" * 2730 + "w"},
    jwk(RSA, use="enc"),
    jwk(RSA, key_ops=["encrypt"]),
    jwk(RSA, alg="HS256"),
    jwk(EC, alg="RS256"),
    {"kty": "oct", "k": "c2VjcmV0", "kid": "k1"},
    {"kty": "RSA", "kid": "k1", "n": "!!", "e": "AQAB"},
    {"kty": "EC", "crv": "P-256", "x": "AA", "y": "AA"},
    {"kid": "k1"},
    "text",
    {**jwk(RSA), "kid": 7},
    jwk(ec.generate_private_key(ec.SECP256K1())),
    jwk(ED),
]


@pytest.mark.parametrize("entry", UNUSABLE, ids=range(len(UNUSABLE)))
def test_an_unusable_key_is_left_out_and_the_rest_is_used(entry: Any) -> None:
    keys = parse_keys({"keys": [entry, jwk(EC, "good")]})
    assert [key.kid for key in keys] == ["good"]


@pytest.mark.parametrize("member", ["use", "alg"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_member_that_is_empty_counts_as_absent(member: str, value: str | None) -> None:
    assert parse_keys({"keys": [jwk(RSA, **{member: value})]}) == parse_keys({"keys": [jwk(RSA)]})


def test_no_keys_at_all() -> None:
    assert parse_keys({}) == ()
    assert parse_keys({"keys": {"a": 1}}) == ()


@pytest.mark.parametrize("body", [b"", b"[]", b"[" * 100_000, b"\xff"], ids=["empty", "list", "deep", "binary"])
async def test_an_answer_that_is_no_json_object(body: bytes) -> None:
    async def fetch(url: str, ca_pem: str | None) -> Reply:
        return Reply(200, body)

    with pytest.raises(Unreachable):
        await KeySet(parse(CONFIG).issuers[0], fetch, Clock()).candidates("k1", "RS256")


TENANT = "https://login.example.org/11111111-1111-1111-1111-111111111111/v2.0"
WHOSE = [
    (None, True),
    (TENANT, True),
    ("https://login.example.org/{tenantid}/v2.0", True),
    ("https://login.example.org/9188040d-6c67-4c5b-b112-36a304b66dad/v2.0", False),
    ("https://elsewhere.example.org/{tenantid}/v2.0", False),
    ("https://login.example.org/{tenantid}", False),
    ("https://login.example.org/11111111-1111-1111-1111-111111111111/v2.0{tenantid}", False),
    ("{tenantid}", False),
    ("", False),
    (7, False),
    ([TENANT], False),
]


@pytest.mark.parametrize(("whose", "usable"), WHOSE, ids=[str(whose) for whose, _ in WHOSE])
def test_a_key_that_names_its_issuer_is_good_for_that_one_alone(whose: object, usable: bool) -> None:
    entry = jwk(RSA) if whose is None else jwk(RSA, issuer=whose)
    assert bool(parse_keys({"keys": [entry]}, TENANT)) is usable


def test_a_template_stands_for_one_part_of_the_path() -> None:
    entry = jwk(RSA, issuer="https://login.example.org/{tenantid}/v2.0")
    for url in (
        "https://login.example.org//v2.0",
        "https://login.example.org/a/b/v2.0",
        "https://login.example.org/v2.0",
    ):
        assert parse_keys({"keys": [entry]}, url) == ()
