"""Groups that a token points to: distributed claims, and which place is asked for whose token (docs/threats.md#T50)."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from arcbridge.errors import ConfigError, Unreachable
from arcbridge.identity.authentication import parse
from arcbridge.identity.fetch import Reply
from arcbridge.identity.groups import GroupSources, Source, check, source_of
from arcbridge.identity.lookups import AT_ONCE, WAITING
from arcbridge.identity.refusal import GroupsUnavailable, TokenRefused
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.net.fetch import HttpFetcher
from arcbridge.settings.config import GraphConfig
from tests.support.clock import Clock
from tests.support.entra import CLUSTER, READER, RELAY, TENANT, Entra

from .issuer import CONFIG, EC, RSA_OTHER, URL, Issuer, claims, graph_settings, raw_token, token

ENDPOINT = "https://issuer.example/claims?user=alice"
POINTER = {
    "_claim_names": {"groups": "src1"},
    "_claim_sources": {"src1": {"endpoint": ENDPOINT, "access_token": "f005ba11"}},
}


@dataclass
class Place:
    """Answers each request with a JWT, or whatever it is told."""

    reply: Reply | None = None
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def give(self, key: Any = None, kid: str = "k1", status: int = 200, **changes: Any) -> None:
        given: dict[str, Any] = {"sub": None, "groups": ["ops", "dev"], **changes}
        found = claims(**given)
        text = token(found, kid=kid) if key is None else token(found, key=key, kid=kid)
        self.reply = Reply(status, text.encode())

    async def __call__(
        self, method: str, url: str, ca_pem: str | None, *, headers: Mapping[str, str], body: bytes = b""
    ) -> Reply:
        self.asked.append((method, url, dict(headers)))
        if self.reply is None:
            raise Unreachable("issuer.example: down")
        return self.reply


@dataclass
class End:
    """A verifier with a place to ask."""

    clock: Clock = field(default_factory=Clock)
    place: Place = field(default_factory=Place)

    def verifier(self, config: str = CONFIG, claim_sources: tuple[str, ...] = ()) -> TokenVerifier:
        issuers = parse(config)
        groups = GroupSources(self.place, claim_sources=claim_sources, clock=self.clock, monotonic=self.clock)
        return TokenVerifier(issuers, Issuer().fetch, self.clock, monotonic=self.clock, groups=groups)

    async def groups(self, **changes: Any) -> tuple[str, ...]:
        given: dict[str, Any] = {"groups": None, **POINTER, **changes}
        return (await self.verifier().verify(token(claims(**given)))).groups

    async def refusal(self, **changes: Any) -> str:
        with pytest.raises(TokenRefused) as caught:
            await self.groups(**changes)
        return caught.value.rule


def pointing(endpoint: object = ENDPOINT, **source: Any) -> dict[str, Any]:
    return {"_claim_names": {"groups": "src1"}, "_claim_sources": {"src1": {"endpoint": endpoint, **source}}}


async def test_the_claim_is_fetched_with_the_access_token_that_the_token_holds() -> None:
    end = End()
    end.place.give()
    assert await end.groups() == ("oidc:ops", "oidc:dev")
    assert end.place.asked == [("GET", ENDPOINT, {"Accept": "application/jwt", "Authorization": "Bearer f005ba11"})]
    end.place.give(groups="one")
    assert await end.groups(**pointing()) == ("oidc:one",)
    assert end.place.asked[1][2] == {"Accept": "application/jwt"}


async def test_it_is_fetched_once_for_a_token() -> None:
    end = End()
    end.place.give()
    verifier, pointer = end.verifier(), dict[str, Any](POINTER)
    text = token(claims(groups=None, **pointer))
    for _ in range(3):
        await verifier.verify(text)
    assert len(end.place.asked) == 1
    await verifier.verify(token(claims(sub="bob", groups=None, **pointer)))
    assert len(end.place.asked) == 2, "another token has nothing of it"


async def test_a_token_with_its_own_groups_is_not_looked_up() -> None:
    end = End()
    assert await end.groups(groups=["dev"]) == ("oidc:dev",)
    assert await end.groups(_claim_names={"other": "src1"}) == ()
    assert end.place.asked == []


async def test_no_answer_is_not_no_groups() -> None:
    end = End()
    with pytest.raises(GroupsUnavailable, match="the place that the token names does not answer"):
        await end.groups()
    end.place.give(status=500)
    with pytest.raises(GroupsUnavailable, match="answered with status 500"):
        await end.groups(jti="2")


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("another key", {"key": RSA_OTHER}, "token.signature"),
    ("a key that is not published", {"key": EC, "kid": "k9"}, "token.key"),
    ("another issuer", {"iss": "https://elsewhere.example"}, "token.iss"),
    ("another audience", {"aud": "relay"}, "token.aud"),
    ("no audience", {"aud": None}, "token.aud"),
    ("another subject", {"sub": "bob"}, "claims.groups.subject"),
    ("old", {"exp": 900.0}, "claims.groups.exp"),
    ("of just now", {"exp": 1000.0}, "claims.groups.exp"),
    ("not yet", {"nbf": 1061.0}, "claims.groups.exp"),
    ("a pointer of its own that is malformed", {"_claim_names": []}, "claims.groups.pointer"),
    ("no end", {"exp": None}, "token.exp"),
    ("another kind", {"events": {}}, "token.events"),
    ("without the claim", {"groups": None}, "claims.groups"),
    ("no list", {"groups": {"a": 1}}, "claims.groups"),
    ("an odd name", {"groups": ["a\nb"]}, "claims.groups.characters"),
]


@pytest.mark.parametrize(("given", "rule"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
async def test_t51_what_is_fetched_is_verified_as_the_token_was(given: dict[str, Any], rule: str) -> None:
    end = End()
    if given.get("key") is EC:
        end.place.reply = Reply(200, token(claims(), key=EC, alg="ES256", kid="k9").encode())
    else:
        end.place.give(**given)
    assert await end.refusal() == rule


@pytest.mark.parametrize("body", [b"", b"x", b"\xff.\xff.\xff", b"a" * 70_000])
async def test_t51_what_is_no_jwt_is_refused(body: bytes) -> None:
    end = End()
    end.place.reply = Reply(200, body)
    assert await end.refusal() == "token.shape"


ELSEWHERE = [
    "https://other.example/claims",
    "https://issuer.example:8443/claims",
    "http://issuer.example/claims",
    "https://issuer.example@other.example/",
    "https://user@issuer.example/claims",
    "https://other.example\\@issuer.example/claims",
    "https://issuer.example.other.example/",
    "https://169.254.169.254/metadata/identity",
    "https://127.0.0.1/",
    "https://[::1]/",
    "file:///etc/passwd",
    "//issuer.example/claims",
    "https://issuer.example#@other.example/",
    "https://issuer.example:x/",
    "https://issuer.example/\r\nHost: other",
    "https://ıssuer.example/",
]


@pytest.mark.parametrize("endpoint", ELSEWHERE, ids=range(len(ELSEWHERE)))
async def test_t50_only_the_issuer_itself_is_asked(endpoint: str) -> None:
    end = End()
    end.place.give()
    assert await end.refusal(**pointing(endpoint)) == "claims.groups.source"
    assert end.place.asked == []


async def test_t50_the_operator_names_further_places() -> None:
    end = End()
    end.place.give()
    verifier = end.verifier(claim_sources=("https://claims.example:8443/",))
    text = token(claims(groups=None, **pointing("https://claims.example:8443/alice")))
    assert (await verifier.verify(text)).groups == ("oidc:ops", "oidc:dev")
    with pytest.raises(TokenRefused):
        await verifier.verify(token(claims(groups=None, **pointing("https://claims.example/alice"))))


@pytest.mark.parametrize("url", ["claims.example", "http://claims.example", "https://c.example/path", "https://c/?q"])
def test_what_is_no_origin_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"claim_sources\[0\]: must be https://host:port"):
        check({}, (url,), parse(CONFIG))


MALFORMED: list[dict[str, Any]] = [
    {"_claim_names": []},
    {"_claim_names": {"groups": 1}},
    {"_claim_names": {"groups": "src1"}},
    {"_claim_names": {"groups": "src1"}, "_claim_sources": []},
    {"_claim_names": {"groups": "src1"}, "_claim_sources": {"src2": {"endpoint": ENDPOINT}}},
    {"_claim_names": {"groups": "src1"}, "_claim_sources": {"src1": ENDPOINT}},
    pointing(1),
    pointing(f"https://issuer.example/{'x' * 3000}"),
    pointing(access_token="a\r\nX: y"),
    pointing(access_token=1),
]


@pytest.mark.parametrize("given", MALFORMED, ids=range(len(MALFORMED)))
async def test_a_malformed_pointer_is_refused(given: dict[str, Any]) -> None:
    end = End()
    end.place.give()
    base = {"_claim_names": None, "_claim_sources": None}
    assert await end.refusal(**{**base, **given}) == "claims.groups.pointer"
    assert end.place.asked == []


WITHOUT_GROUPS = "\n".join(line for line in CONFIG.splitlines() if "groups:" not in line)


NAMES: list[Any] = [[], {"o": ["s"]}, {"o": ""}, {"o": "t"}]
SOURCES: list[Any] = [5, [], {"s": 5}, {"s": {"endpoint": 5}}]
POINTERS: list[dict[str, Any]] = [
    *({"_claim_names": names, "_claim_sources": {"s": {}}} for names in NAMES),
    *({"_claim_sources": sources} for sources in SOURCES),
]


@pytest.mark.parametrize("config", [CONFIG, WITHOUT_GROUPS], ids=["groups in the token", "no groups mapped"])
@pytest.mark.parametrize("given", POINTERS, ids=range(len(POINTERS)))
async def test_t61_a_malformed_pointer_is_refused_whether_or_not_it_is_followed(
    config: str, given: dict[str, Any]
) -> None:
    """As kube-apiserver does: what an issuer writes wrong for one claim, it may have written wrong for the groups."""
    end = End()
    with pytest.raises(TokenRefused) as caught:
        await end.verifier(config).verify(token(claims(**given)))
    assert caught.value.rule == "claims.groups.pointer"
    sound: list[dict[str, Any]] = [
        {"_claim_names": {}, "_claim_sources": {"s": {"endpoint": None}, "t": None}},
        {"_claim_names": {"other": "s"}, "_claim_sources": {"s": {"JWT": "a.b.c"}}},
        {"_claim_sources": {}},
    ]
    for one in sound:
        assert (await end.verifier(config).verify(token(claims(**one)))).username == "oidc:alice"


async def test_a_pointer_that_is_null_is_none() -> None:
    end = End()
    text = raw_token(b'{"alg":"RS256","kid":"k1"}', json.dumps({
        **claims(groups=None), "_claim_names": None, "_claim_sources": None,
    }).encode())  # fmt: skip
    assert (await end.verifier().verify(text)).groups == ()


async def test_an_aggregated_claim_is_refused_and_not_taken_for_no_groups() -> None:
    end = End()
    assert (
        await end.refusal(**{**pointing(""), "_claim_sources": {"src1": {"JWT": "a.b.c"}}}) == "claims.groups.overage"
    )
    assert source_of({"_claim_names": {"groups": "s"}, "_claim_sources": {"s": {"JWT": "x"}}}, "groups") is None
    assert source_of({"_claim_names": {"g": "s"}, "_claim_sources": {"s": {"endpoint": "e"}}}, "g") == Source("e", "")


TWO_ISSUERS = CONFIG + CONFIG.partition("jwt:\n")[2].replace(URL, "https://second.example")


class Stalling(Place):
    """Answers for all hosts but one, which takes requests and says nothing."""

    def __init__(self, host: str) -> None:
        super().__init__()
        self.host = host
        self.waiting = 0

    async def __call__(self, method: str, url: str, ca_pem: str | None, **given: Any) -> Reply:
        if url.startswith(f"https://{self.host}/"):
            self.waiting += 1
            await asyncio.Event().wait()
        return await super().__call__(method, url, ca_pem, **given)


@pytest.mark.parametrize("stalled", ["issuer.example", "claims.example"])
async def test_t55_a_place_that_stalls_holds_up_no_other(stalled: str) -> None:
    place = Stalling(stalled)
    place.give()
    issuers, clock = parse(CONFIG), Clock()
    sources = GroupSources(place, claim_sources=("https://claims.example",), clock=clock, monotonic=clock)
    verifier = TokenVerifier(issuers, Issuer().fetch, clock, monotonic=clock, groups=sources)
    other = {"issuer.example", "claims.example"} - {stalled}

    def held(n: int, host: str) -> str:
        return token(claims(groups=None, jti=str(n), **pointing(f"https://{host}/{n}")))

    held_up = [asyncio.create_task(verifier.verify(held(n, stalled))) for n in range(AT_ONCE + WAITING)]
    while place.waiting < AT_ONCE:
        await asyncio.sleep(0)
    with pytest.raises(GroupsUnavailable, match="too many look-ups"):
        await verifier.verify(held(1000, stalled))
    for n in range(20):
        assert (await verifier.verify(held(n, *other))).groups == ("oidc:ops", "oidc:dev")
    assert place.waiting == AT_ONCE
    await verifier.close()
    await asyncio.gather(*held_up, return_exceptions=True)


async def test_t55_users_of_one_issuer_hold_up_none_of_another_at_a_place_of_both() -> None:
    place, issuers = Stalling("claims.example"), parse(TWO_ISSUERS)
    sources = GroupSources(place, claim_sources=("https://claims.example",))

    async def verify(text: str) -> dict[str, Any]:
        return {"groups": ["ops"]}

    async def groups(issuer: int, n: int) -> Any:
        pointer = pointing(f"https://claims.example/{n}")
        return (await sources.expand(issuers.issuers[issuer], pointer, str(n).encode(), verify))["groups"]

    held_up = [asyncio.create_task(groups(0, n)) for n in range(AT_ONCE + WAITING)]
    while place.waiting < AT_ONCE:
        await asyncio.sleep(0)
    place.host = ""
    place.give()
    assert await groups(1, 0) == ["ops"]
    with pytest.raises(GroupsUnavailable, match="too many look-ups"):
        await groups(0, 1000)
    await sources.close()
    await asyncio.gather(*held_up, return_exceptions=True)


# -- Microsoft Graph ---------------------------------------------------------------------------------------------------

GROUPS = tuple(str(uuid.UUID(int=n)) for n in range(1, 251))


def config_of(entra: Entra, groups: str = '{claim: groups, prefix: ""}', audience: str = CLUSTER) -> str:
    ca = "\n".join(8 * " " + line for line in entra.ca_file.read_text().strip().splitlines())
    return f"""
apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
jwt:
- issuer:
    url: {entra.issuer}
    audiences: [{audience}]
    certificateAuthority: |
{ca}
  claimMappings:
    username: {{expression: "has(claims.upn) ? claims.upn : claims.oid"}}
    groups: {groups}
"""


def verifier_of(entra: Entra, fetcher: HttpFetcher, config: str = "", **changes: Any) -> TokenVerifier:
    sources = GroupSources(fetcher.ask, directories={"example": graph_settings(entra, **changes)})
    return TokenVerifier(parse(config or config_of(entra)), fetcher, groups=sources)


async def test_t50_entra_s_pointer_leads_to_graph_and_nowhere_else(entra: Entra, fetcher: HttpFetcher) -> None:
    anna = entra.hire("anna@example.org", groups=GROUPS)
    text = entra.token_for(anna, CLUSTER)
    identity = await verifier_of(entra, fetcher).verify(text)
    assert identity.username == "anna@example.org"
    assert identity.groups == GROUPS
    assert not [path for path in entra.requests if "trap" in path]
    # Without [graph.NAME] the pointer is a distributed claim of a host that is not the issuer's in Entra ID; here it
    # is, and what is found there is no JWT.
    without = TokenVerifier(parse(config_of(entra)), fetcher, groups=GroupSources(fetcher.ask))
    with pytest.raises(TokenRefused):
        await without.verify(text)


@pytest.mark.parametrize("groups", ['{claim: groups, prefix: ""}', "{expression: 'claims.?groups.orValue([])'}"])
async def test_t52_groups_are_those_of_the_token_s_own_user(groups: str, entra: Entra, fetcher: HttpFetcher) -> None:
    anna, bert = entra.hire("anna@example.org", groups=GROUPS), entra.hire("bert@example.org", groups=GROUPS[:201])
    verifier = verifier_of(entra, fetcher, config_of(entra, groups))
    for _ in range(2):
        for user in (anna, bert):
            assert (await verifier.verify(entra.token_for(user, CLUSTER))).groups == user.groups
    assert sorted(entra.graph.asked) == sorted(f"users/{one.object_id}" for one in (anna, bert))


async def test_hasgroups_counts_as_a_pointer(entra: Entra, fetcher: HttpFetcher) -> None:
    anna = entra.hire("anna@example.org", groups=GROUPS[:7])
    text = entra.token_for(anna, CLUSTER, groups=None, hasgroups=True)
    assert (await verifier_of(entra, fetcher).verify(text)).groups == GROUPS[:7]
    alone = TokenVerifier(parse(config_of(entra)), fetcher)
    with pytest.raises(TokenRefused, match="the token has too many groups"):
        await alone.verify(text)


async def test_t52_another_tenant_s_token_gets_nothing(entra: Entra, fetcher: HttpFetcher) -> None:
    anna = entra.hire("anna@example.org", groups=GROUPS)
    text = entra.token_for(anna, CLUSTER, tid=str(uuid.uuid4()))
    with pytest.raises(TokenRefused, match="another tenant"):
        await verifier_of(entra, fetcher).verify(text)
    assert entra.graph.asked == []


async def test_t53_a_token_that_is_not_good_costs_graph_nothing(entra: Entra, fetcher: HttpFetcher) -> None:
    anna = entra.hire("anna@example.org", groups=GROUPS)
    verifier = verifier_of(entra, fetcher)
    for text in (
        entra.token_for(anna, RELAY),
        entra.token_for(anna, CLUSTER, exp=1),
        entra.token_for(anna, CLUSTER, key=entra.foreign_key),
    ):
        with pytest.raises(TokenRefused):
            await verifier.verify(text)
    assert entra.graph.asked == []


async def test_where_no_groups_are_mapped_none_are_looked_up(entra: Entra, fetcher: HttpFetcher) -> None:
    anna = entra.hire("anna@example.org", groups=GROUPS)
    config = config_of(entra).replace('    groups: {claim: groups, prefix: ""}\n', "")
    config = config.replace('{expression: "has(claims.upn) ? claims.upn : claims.oid"}', '{claim: oid, prefix: ""}')
    assert (await verifier_of(entra, fetcher, config).verify(entra.token_for(anna, CLUSTER))).groups == ()
    assert entra.graph.asked == []


async def test_expressions_that_read_no_groups_need_none(entra: Entra, fetcher: HttpFetcher) -> None:
    anna = entra.hire("anna@example.org", groups=GROUPS)
    config = config_of(entra).replace('    groups: {claim: groups, prefix: ""}\n', "")
    assert (await verifier_of(entra, fetcher, config).verify(entra.token_for(anna, CLUSTER))).groups == ()
    assert entra.graph.asked == []


async def test_t54_without_graph_no_expression_takes_the_pointer_for_no_groups(
    entra: Entra, fetcher: HttpFetcher
) -> None:
    anna = entra.hire("anna@example.org", groups=GROUPS)
    issuers = parse(config_of(entra, "{expression: 'claims.?groups.orValue([])'}"))
    verifier = TokenVerifier(issuers, fetcher, groups=GroupSources(fetcher.ask))
    with pytest.raises(TokenRefused, match="the token has too many groups"):
        await verifier.verify(entra.token_for(anna, CLUSTER))
    assert verifier.refusals == {"claims.groups.overage": 1}
    bert = entra.hire("bert@example.org", groups=GROUPS[:2])
    assert (await verifier.verify(entra.token_for(bert, CLUSTER))).groups == GROUPS[:2]


def test_a_directory_belongs_to_issuers_of_the_file(entra: Entra) -> None:
    one = GraphConfig((URL,), TENANT, READER, client_secret_file=entra.ca_file)
    other = replace(one, issuers=("https://nowhere.example",))
    with pytest.raises(ConfigError, match=r"graph\.a\.issuers\[0\]: https://nowhere\.example is no issuer\.url"):
        check({"a": other}, (), parse(CONFIG))
    with pytest.raises(ConfigError, match=r"graph\.b\.issuers\[0\]: .* has another"):
        check({"a": one, "b": one}, (), parse(CONFIG))
