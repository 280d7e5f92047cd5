"""The same configuration for a real kube-apiserver and for us: the same user, or no user for both.

The tables of `tests/identity/cel` are given to `--authentication-config`, and each token is shown to that API server in
a SelfSubjectReview (what `kubectl auth whoami` asks). The same file and token go through our verifier, and what it maps
goes to the API server as the headers with which the agent impersonates a user. Where they differ on purpose the table
says so, with the reason. Hypothesis makes further expressions and claims; kubectl goes through relay and agent.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import ssl
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from arcbridge.agent.kube.impersonation import Subject, impersonated_headers
from arcbridge.errors import ConfigError
from arcbridge.identity.authentication import parse
from arcbridge.identity.claims import Identity
from arcbridge.identity.fetch import Reply
from arcbridge.identity.groups import GroupSources
from arcbridge.identity.names import is_plain
from arcbridge.identity.refusal import GroupsUnavailable, TokenRefused
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.net.fetch import HttpFetcher
from tests.identity.cel.corpus import AUDIENCE, Configuration, Token, configurations, expressions, token_claims
from tests.support.cluster import Cluster, Unavailable
from tests.support.issuer_server import ManyIssuers
from tests.support.processes import require_or_skip
from tests.support.world import ALICE, BOB, CLUSTER_AUDIENCE, ApiServer, Client, World

REVIEW = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
BODY = json.dumps({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"})
CREDENTIAL_ID = "authentication.kubernetes.io/credential-id"
KEY = "example.com/x"
BATCHES = 8
"""Issuers over which the expressions with a result are spread: what one token's expressions may cost is bounded."""

User = dict[str, Any] | None
"""User name, uid, groups and extra, without what is empty; None where the token is refused."""


@dataclass
class Server:
    """A kube-apiserver, its configuration file, and the issuers that stand in it."""

    cluster: Cluster
    issuers: ManyIssuers
    file: Path
    _connections: dict[str, http.client.HTTPSConnection] = field(default_factory=dict)

    def configuration(self, entries: Mapping[str, Mapping[str, Any]]) -> str:
        """A file with an issuer for each name."""
        jwt = [
            {
                "issuer": {
                    "url": self.issuers.url(name),
                    "audiences": [AUDIENCE],
                    "certificateAuthority": self.issuers.ca_pem,
                },
                **entry,
            }
            for name, entry in entries.items()
        ]
        return json.dumps(
            {"apiVersion": "apiserver.config.k8s.io/v1", "kind": "AuthenticationConfiguration", "jwt": jwt}
        )

    def straight(self, token: str) -> User:
        """Whom the API server takes the bearer of a token for."""
        code, answer = self._ask("token", {"Authorization": f"Bearer {token}"})
        assert code in (201, 401), answer
        return user(answer["status"]["userInfo"]) if code == 201 else None

    def wait_for_issuers(self, name: str, timeout: float = 30) -> None:
        """Return when the API server has fetched the documents of an issuer, and accepts a plain token of it."""
        token = self.issuers.mint(name, token_claims({**TABLE.claims, "case": -1}, "", int(time.time())))
        deadline = time.monotonic() + timeout
        while self.straight(token) is None:
            assert time.monotonic() < deadline, f"the API server does not know the issuer {name}"
            time.sleep(0.1)

    def through_us(self, identity: Identity) -> User:
        """Whom the API server takes the agent for that acts as `identity`."""
        headers = dict[str, Any]()
        for name, value in impersonated_headers([], Subject.of(identity)):
            headers.setdefault(name, []).append(value)
        code, answer = self._ask("admin", headers)
        assert code == 201, answer
        return user(answer["status"]["userInfo"])

    def reload(self, text: str, timeout: float = 60) -> None:
        """Exchange the file, and return when the API server has it."""
        before = self._reloaded("success")
        self.file.write_text(text)
        deadline = time.monotonic() + timeout
        while self._reloaded("success") == before:
            assert time.monotonic() < deadline, "the API server did not reload its configuration"
            time.sleep(0.05)

    def refused_fields(self, text: str, timeout: float = 60) -> set[str]:
        """Give the API server a file that it must refuse, and answer the fields that it names."""
        mark = len(self._log())
        self.file.write_text(text)
        deadline = time.monotonic() + timeout
        # An error of several lines ends with a line of its own.
        end = re.compile(r'"failed to validate authentication config" err=(?:<\n(.*?)\n >|(".*"))\n', re.S)
        while (said := end.search(self._log()[mark:])) is None:
            assert time.monotonic() < deadline, "the API server did not look at its configuration"
            time.sleep(0.05)
        # What is wrong with a field begins after its path, and quotes the expression, which may look like a path.
        return set(re.findall(r"(?:\[|, )(jwt\[\d+\][A-Za-z0-9.\[\]]*): [A-Z]", said[1] or said[2]))

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()

    def _log(self) -> str:
        return next(process for process in self.cluster.processes if "kube-apiserver" in repr(process)).output()

    def _reloaded(self, status: str) -> float:
        with self.cluster._open("GET", "/metrics") as answer:
            text = answer.read().decode()
        found = re.findall(
            rf'^apiserver_authentication_config_controller_automatic_reloads_total{{[^}}]*status="{status}"}} (\S+)',
            text,
            re.M,
        )
        return float(found[0]) if found else 0.0

    def _ask(self, who: str, headers: Mapping[str, str | list[str]]) -> tuple[int, Any]:
        if who in self._connections:
            try:
                return self._ask_once(who, headers)
            except ConnectionError:  # the API server closes what was idle for a minute and a half
                self._connections.pop(who).close()
        return self._ask_once(who, headers)

    def _ask_once(self, who: str, headers: Mapping[str, str | list[str]]) -> tuple[int, Any]:
        connection = self._connections.get(who)
        if connection is None:
            context = ssl.create_default_context(cafile=self.cluster.ca_file)
            if who == "admin":
                context.load_cert_chain(self.cluster.directory / "admin.crt", self.cluster.directory / "admin.key")
            connection = http.client.HTTPSConnection("127.0.0.1", self.cluster.port, context=context, timeout=30)
            self._connections[who] = connection
        connection.putrequest("POST", REVIEW)
        for name, values in {**headers, "Content-Type": "application/json", "Accept": "application/json"}.items():
            for value in [values] if isinstance(values, str) else values:
                connection.putheader(name, value.encode())
        connection.putheader("Content-Length", str(len(BODY)))
        connection.endheaders(BODY.encode())
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"{}")


class Ours:
    """Our verifier with a file of the API server's."""

    def __init__(self, server: Server, text: str) -> None:
        async def fetch(url: str, ca_pem: str | None) -> Reply:
            assert ca_pem == server.issuers.ca_pem
            document = server.issuers.document(url.partition("127.0.0.1")[2].partition("/")[2])
            return Reply(200, json.dumps(document).encode(), max_age=3600)

        self._verifier = TokenVerifier(parse(text), fetch)

    def identities(self, tokens: Sequence[str]) -> list[Identity | None]:
        """Whom we take the bearer of each token for."""

        async def verified() -> list[Identity | None]:
            found: list[Identity | None] = []
            for token in tokens:
                try:
                    found.append(await self._verifier.verify(token))
                except TokenRefused:
                    found.append(None)
            await self._verifier.close()
            return found

        return asyncio.run(verified())


def user(info: Mapping[str, Any]) -> dict[str, Any]:
    """A SelfSubjectReview's user, without the group that the API server gives to all."""
    groups = [group for group in info.get("groups", ()) if group != "system:authenticated"]
    found = {
        "username": info["username"],
        "uid": info.get("uid", ""),
        "groups": groups,
        "extra": dict(info.get("extra", {})),
    }
    return {key: value for key, value in found.items() if value}


TABLE = expressions()
WITH_RESULT = [(source, values) for source, values in TABLE.rows if isinstance(values, list)]
REFUSED = [source for source, values in TABLE.rows if values == "refused"]
INVALID = [source for source, values in TABLE.rows if values == "invalid"]
CONFIGURATIONS = configurations()
ACCEPTED = [config for config in CONFIGURATIONS if config.tokens]
SUBJECT = {"username": {"claim": "sub", "prefix": ""}}


def guarded(sources: Sequence[str]) -> dict[str, Any]:
    """An entry whose expressions are evaluated one at a time: for a token with `case: N` the N-th, by itself."""
    extra = [
        {"key": f"example.com/{n}", "valueExpression": f"claims.case == {n}.0 ? dyn({source}\n) : dyn('')"}
        for n, source in enumerate(sources)
    ]
    return {"claimMappings": {**SUBJECT, "extra": extra}}


def mapped(sources: Sequence[str]) -> dict[str, Any]:
    """An entry in which every expression gives an extra key of its own."""
    extra = [{"key": f"example.com/{n}", "valueExpression": source} for n, source in enumerate(sources)]
    return {"claimMappings": {**SUBJECT, "extra": extra}}


BATCH = [[source for source, _ in WITH_RESULT[n::BATCHES]] for n in range(BATCHES)]
ENTRIES: dict[str, dict[str, Any]] = {
    **{f"batch-{n}": mapped(sources) for n, sources in enumerate(BATCH)},
    **{f"configuration-{n}": config.jwt for n, config in enumerate(ACCEPTED)},
    "distributed": {"claimMappings": {**SUBJECT, "groups": {"claim": "groups", "prefix": ""}}},
    # Last: the API server fetches the documents of the issuers in their order.
    "refused": guarded(REFUSED),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A kube-apiserver with all of the tables' configurations that it accepts."""
    directory = tmp_path_factory.mktemp("cel")
    file = directory / "authentication.json"
    with ManyIssuers() as issuers:
        made = Server.__new__(Server)
        made.issuers = issuers
        file.write_text(made.configuration(ENTRIES))
        try:
            cluster = Cluster(directory=directory / "cluster", extra_args=[f"--authentication-config={file}"])
        except Unavailable as error:
            require_or_skip("apiserver", str(error))
        with cluster:
            server = Server(cluster, issuers, file)
            for name in ENTRIES:
                if name.startswith(("batch", "refused")):
                    server.wait_for_issuers(name)
            yield server
            server.close()


@pytest.fixture(scope="module")
def ours(server: Server) -> Ours:
    """Our verifier with the same file."""
    return Ours(server, server.configuration(ENTRIES))


def test_expressions_with_a_result(server: Server, ours: Ours) -> None:
    now = int(time.time())
    tokens = [
        server.issuers.mint(f"batch-{n}", token_claims(TABLE.claims, server.issuers.url(f"batch-{n}"), now))
        for n in range(BATCHES)
    ]
    expected = dict(WITH_RESULT)
    for token, sources in zip(tokens, BATCH, strict=True):
        straight = server.straight(token)
        assert straight is not None
        found = {source: straight.get("extra", {}).get(f"example.com/{n}", []) for n, source in enumerate(sources)}
        assert found == {source: expected[source] for source in sources}
    assert len(WITH_RESULT) >= 500
    # Ours has a bound of extra values, and none with control characters: each expression alone, where it has neither.
    plain = [source for source, values in WITH_RESULT if len(values) < 90 and all(map(is_plain, values))]
    assert len(plain) > 500
    text = server.configuration({f"part-{n}": guarded(plain[n::20]) for n in range(20)})
    cases = [(n, case, source) for n in range(20) for case, source in enumerate(plain[n::20])]
    asked = [
        server.issuers.mint(
            f"part-{n}", token_claims({**TABLE.claims, "case": case}, server.issuers.url(f"part-{n}"), now)
        )
        for n, case, _ in cases
    ]
    for (_, case, source), identity in zip(cases, Ours(server, text).identities(asked), strict=True):
        assert identity is not None, source
        through = server.through_us(identity)
        assert through is not None
        assert through.get("extra", {}).get(f"example.com/{case}", []) == expected[source], source


def test_expressions_without_a_result(server: Server, ours: Ours) -> None:
    now = int(time.time())
    claims = [{**TABLE.claims, "case": n} for n in range(len(REFUSED))]
    control = server.issuers.mint("refused", token_claims({**TABLE.claims, "case": -1}, "", now))
    assert server.straight(control) == {"username": "user-1"}
    tokens = [server.issuers.mint("refused", token_claims(changes, "", now)) for changes in claims]
    assert [source for source, token in zip(REFUSED, tokens, strict=True) if server.straight(token) is not None] == []
    mapped_here = ours.identities([control, *tokens])
    assert mapped_here[0] is not None
    assert [source for source, found in zip(REFUSED, mapped_here[1:], strict=True) if found is not None] == []
    assert len(REFUSED) >= 100


def test_configurations(server: Server, ours: Ours) -> None:
    now = int(time.time())
    cases: list[tuple[Configuration, Token, str]] = []
    for n, config in enumerate(ACCEPTED):
        for token in config.tokens:
            cases.append(
                (config, token, server.issuers.mint(f"configuration-{n}", token_claims(token.claims, "", now)))
            )
    identities = ours.identities([text for _, _, text in cases])
    differing = 0
    for (config, token, text), identity in zip(cases, identities, strict=True):
        what = f"{config.name}: {token.claims}"
        straight = server.straight(text)
        assert straight == token.user, what
        through = None if identity is None else server.through_us(identity)
        assert through == token.here, what
        differing += straight != through
    assert differing == sum(bool(token.why) for config in ACCEPTED for token in config.tokens)
    assert len(cases) >= 170


DISTRIBUTED: list[tuple[str, dict[str, Any], dict[str, Any], list[str] | None, list[str] | None]] = [
    ("a list", {}, {"groups": ["ops", "dev"]}, ["ops", "dev"], ["ops", "dev"]),
    ("a string", {}, {"groups": "ops"}, ["ops"], ["ops"]),
    ("its own groups", {"groups": ["dev"]}, {"groups": ["ops"]}, ["dev"], ["dev"]),
    ("a pointer for another claim", {"_claim_names": {"roles": "src1"}}, {"groups": ["ops"]}, [], []),
    ("no claim there", {}, {"roles": ["ops"]}, None, None),
    ("no list", {}, {"groups": {"a": "b"}}, None, None),
    ("expired", {}, {"groups": ["ops"], "exp": 1}, None, None),
    ("another audience", {}, {"groups": ["ops"], "aud": "another"}, None, None),
    ("another issuer's", {}, {"groups": ["ops"], "iss": "https://127.0.0.1:1/none"}, None, None),
    ("no source", {"_claim_sources": {}}, {"groups": ["ops"]}, None, None),
    ("malformed names", {"_claim_names": {"groups": 1}}, {"groups": ["ops"]}, None, None),
    ("no token for it", {"access_token": ""}, {"groups": ["ops"]}, None, None),
    # Meant: docs/authentication.md#differences-that-are-meant.
    ("aggregated", {"_claim_sources": {"src1": {"JWT": "a.b.c"}}}, {"groups": ["ops"]}, [], None),
    ("another user's", {}, {"groups": ["ops"], "sub": "bob"}, ["ops"], None),
]


def test_distributed_claims(server: Server) -> None:
    """kube-apiserver and we take the groups of a token from the place that it names (docs/authentication.md)."""
    now = int(time.time())
    cases = []
    for n, (_, changes, found, _, _) in enumerate(DISTRIBUTED):
        base = {"sub": "alice", "aud": AUDIENCE, "iat": now, "exp": now + 600}
        text = server.issuers.mint("distributed", {**base, **found}, issuer=found.get("iss", ""))
        source = server.issuers.source(str(n), text)
        source |= {name: changes[name] for name in changes if name in source}
        pointer = {"_claim_names": {"groups": "src1"}, "_claim_sources": {"src1": source}}
        own = {name: value for name, value in changes.items() if name not in source}
        cases.append(server.issuers.mint("distributed", {**base, **pointer, **own}))
    # The API server learns about an issuer of such claims when it meets the first one.
    deadline = time.monotonic() + 30
    while server.straight(cases[0]) is None:
        assert time.monotonic() < deadline, "the API server does not know the issuer of the claims"
        time.sleep(0.1)

    async def here() -> list[list[str] | None]:
        fetcher, issuers = HttpFetcher(), parse(server.configuration({"distributed": ENTRIES["distributed"]}))
        verifier = TokenVerifier(issuers, fetcher, groups=GroupSources(fetcher.ask))
        answers: list[list[str] | None] = []
        for text in cases:
            try:
                answers.append(list((await verifier.verify(text)).groups))
            except (TokenRefused, GroupsUnavailable):
                answers.append(None)
        await verifier.close()
        await fetcher.close()
        return answers

    ours = asyncio.run(here())
    for (name, _, _, straight, through), text, found_here in zip(DISTRIBUTED, cases, ours, strict=True):
        user = server.straight(text)
        assert (None if user is None else user.get("groups", [])) == straight, name
        assert found_here == through, name


def test_what_neither_accepts(server: Server) -> None:
    """Last of the tables: the API server's file is one that it refuses afterwards, and it goes on with the old one."""
    files = {
        **{f"invalid-{n}": config.jwt for n, config in enumerate(c for c in CONFIGURATIONS if not c.tokens)},
        "expressions": mapped(INVALID),
    }
    named = server.refused_fields(server.configuration(files))
    last = len(files) - 1
    assert {int(path[4:].partition("]")[0]) for path in named} == set(range(len(files)))
    expected = {f"jwt[{last}].claimMappings.extra[{n}].valueExpression" for n in range(len(INVALID))}
    assert {path for path in named if path.startswith(f"jwt[{last}]")} == expected
    for name, entry in files.items():
        if name != "expressions":
            with pytest.raises(ConfigError):
                parse(server.configuration({name: entry}))
    for source in INVALID:
        with pytest.raises(ConfigError, match=r"jwt\[0\]\.claimMappings\.extra\[0\]\.valueExpression"):
            parse(server.configuration({"a": mapped([source])}))
    assert len(INVALID) >= 80


# Hypothesis: expressions of a grammar that has the functions of every library, on claims of every kind.

NAMES = ["sub", "a", "b", "list", "map", "n", "missing"]
TEXTS = st.sampled_from(["", "a", "b", "a,b", "é", "A b", "1", "true", "10.0.0.1", "x@y.z"])
STRINGS = st.deferred(lambda: _STRINGS)
BOOLS = st.deferred(lambda: _BOOLS)
LISTS = st.deferred(lambda: _LISTS)
INTS = st.deferred(lambda: _INTS)


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def shaped(shape: str, *parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*parts).map(lambda found: shape.format(*found))


CLAIM = st.sampled_from(NAMES).map("claims.{}".format)
_STRINGS = st.one_of(
    TEXTS.map(quoted),
    CLAIM,
    CLAIM.map(lambda claim: f"string({claim})"),
    st.sampled_from(NAMES).map("claims.?{}.orValue('d')".format),
    shaped("{} + {}", STRINGS, STRINGS),
    shaped("{}.{}()", CLAIM, st.sampled_from(["lowerAscii", "upperAscii", "trim"])),
    shaped("string({}).replace({}, {})", CLAIM, TEXTS.map(quoted), TEXTS.map(quoted)),
    shaped("({} ? {} : {})", BOOLS, STRINGS, STRINGS),
    shaped("{}.join(',')", LISTS),
    shaped("{}[{}]", LISTS, INTS),
    shaped("string({})", INTS),
    shaped("claims.map[{}]", STRINGS),
    shaped("{}.find('[a-z]+')", CLAIM),
    shaped("{}.substring({})", CLAIM, INTS),
    shaped("'%s-%d'.format([dyn({}), {}])", STRINGS, INTS),
    shaped("{}.first().orValue({})", LISTS, STRINGS),
)
_INTS = st.one_of(
    st.integers(-2, 4).map(str),
    shaped("size({})", LISTS),
    shaped("{}.size()", CLAIM),
    shaped("({} + {})", INTS, INTS),
    shaped("({} / {})", INTS, INTS),
    shaped("int({})", CLAIM),
    shaped("{}.indexOf('a')", CLAIM),
)
_BOOLS = st.one_of(
    st.sampled_from(["true", "false", "claims.n == 1", "has(claims.a)", "has(claims.map.x)", "claims.missing"]),
    shaped("({} {} {})", BOOLS, st.sampled_from(["&&", "||", "=="]), BOOLS),
    shaped("!{}", BOOLS),
    shaped("({} {} {})", INTS, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), INTS),
    shaped("({} == {})", CLAIM, STRINGS),
    shaped("({} in {})", STRINGS, LISTS),
    shaped("{}.exists(x, x == {})", LISTS, STRINGS),
    shaped("{}.all(x, x.startsWith({}))", LISTS, STRINGS),
    shaped("{}.startsWith({})", CLAIM, STRINGS),
    shaped("{}.matches('^[a-z]*$')", CLAIM),
    shaped("isIP({})", CLAIM),
    shaped("sets.contains({}, {})", LISTS, LISTS),
    shaped("type({}) == string", CLAIM),
)
_LISTS = st.one_of(
    st.lists(TEXTS.map(quoted), max_size=3).map(lambda texts: f"[{', '.join(texts)}]"),
    st.sampled_from(["dyn(claims.list)", "dyn(claims.a)", "dyn(claims.map)", "claims.?list.orValue([])"]),
    shaped("string({}).split(',')", CLAIM),
    shaped("({} + {})", LISTS, LISTS),
    shaped("{}.map(x, {} + 'm')", LISTS, STRINGS),
    shaped("{}.filter(x, {})", LISTS, BOOLS),
    shaped("{}.{}()", LISTS, st.sampled_from(["distinct", "reverse", "sort"])),
    shaped("dyn(claims.list).transformList(i, v, string(i) + string(v))"),
    shaped("{}.slice({}, {})", LISTS, INTS, INTS),
)
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([1.5, 1e30, 2**60]),
    TEXTS,
    st.lists(st.one_of(TEXTS, st.integers(0, 2)), max_size=3),
    st.lists(TEXTS, max_size=3),
    # One key at most: Go goes through a map in an order that is another one each time.
    st.dictionaries(st.sampled_from(["x", "a", "b.c"]), TEXTS, max_size=1),
)
LONGEST = 250
"""Characters of an expression: what nests deeper than the library's parser goes is refused here alone."""
CLAIMS = st.dictionaries(st.sampled_from(["a", "b", "list", "map", "n"]), VALUES, min_size=2)
CASES = st.tuples(st.one_of(_STRINGS, _LISTS, _BOOLS.map("string({})".format)), CLAIMS).filter(
    lambda case: len(case[0]) <= LONGEST
)
EXAMPLES = 600
PER_ISSUER = 20


# Relay and agent, for kubectl.

MAPPING: dict[str, Any] = {
    "claimValidationRules": [{"expression": "claims.email_verified == true", "message": "not verified"}],
    "claimMappings": {
        "username": {"expression": "'cel:' + claims.email.lowerAscii()"},
        "groups": {"expression": "dyn(claims.groups).map(g, 'team:' + g)"},
        "uid": {"expression": "claims.sub + '-id'"},
        "extra": [{"key": "example.com/host", "valueExpression": "url(claims.iss).getHostname()"}],
    },
    "userValidationRules": [{"expression": "user.groups.all(g, g.startsWith('team:'))"}],
}


class CelWorld(World):
    """An organisation whose relay and agent map users by expressions."""

    def authentication(self, audience: str) -> str:
        """The configuration with the mapping of this module."""
        document = json.loads(super().authentication(audience))
        document["jwt"][0].update(MAPPING)
        return json.dumps(document)


@pytest.fixture(scope="module")
def world(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CelWorld]:
    """Issuer, relay and agent at that API server."""
    cluster = server.cluster
    cluster.install_agent()
    cluster.apply(
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "acts-with-extra"},
            "rules": [
                {
                    "apiGroups": ["authentication.k8s.io"],
                    "resources": ["userextras/example.com/host"],
                    "verbs": ["impersonate"],
                }
            ],
        }
    )
    cluster.grant("acts-with-extra", service_account=("arcbridge", "arcbridge-agent"))
    cluster.grant("view", group="team:developers")
    cluster.grant("cluster-admin", user="cel:alice@example.com")
    token = tmp_path_factory.mktemp("cel-agent") / "token"
    token.write_text(cluster.service_account_token("arcbridge", "arcbridge-agent"))
    api = ApiServer(cluster.api_url, Path(cluster.ca_file), token)
    with CelWorld(api, directory=tmp_path_factory.mktemp("cel-world")) as world:
        world.policy = world.policy.replace('"platform", "developers"', '"team:platform", "team:developers"')
        yield world.start()


@dataclass
class Made:
    """The examples, which of their expressions the API server does not accept, and the file it has for the others."""

    cases: list[tuple[str, dict[str, Any]]]
    invalid: set[str]
    parts: list[list[tuple[str, dict[str, Any]]]]
    text: str


@pytest.fixture(scope="module")
def made(server: Server, world: CelWorld) -> Made:
    """Examples of Hypothesis at the API server, and the agent's own configuration.

    A reload takes the API server ten seconds: all examples are collected first, and then asked at once.
    """
    cases: list[tuple[str, dict[str, Any]]] = []

    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        derandomize=True,  # the same examples at each run: a run fails for what its commit changed
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(CASES)
    def collect(case: tuple[str, dict[str, Any]]) -> None:
        if case not in cases:
            cases.append(case)

    collect()
    sources = list(dict.fromkeys(source for source, _ in cases))
    # `nothing` is wrong whatever else is: the API server refuses the file, and names what else is wrong with it.
    named = server.refused_fields(server.configuration({"all": mapped([*sources, "nothing"])}))
    invalid = {
        source for n, source in enumerate(sources) if f"jwt[0].claimMappings.extra[{n}].valueExpression" in named
    }
    good = [case for case in cases if case[0] not in invalid]
    parts = [good[n : n + PER_ISSUER] for n in range(0, len(good), PER_ISSUER)][:60]
    file = json.loads(
        server.configuration({f"made-{n}": guarded([source for source, _ in part]) for n, part in enumerate(parts)})
    )
    file["jwt"] += json.loads(world.authentication(CLUSTER_AUDIENCE))["jwt"]
    server.reload(json.dumps(file))
    return Made(cases, invalid, parts, json.dumps(file))


def test_expressions_of_hypothesis(server: Server, made: Made) -> None:
    assert len(made.cases) > EXAMPLES // 2
    invalid_here = set()
    for source in {source for source, _ in made.cases}:
        try:
            parse(server.configuration({"a": mapped([source])}))
        except ConfigError:
            invalid_here.add(source)
    assert invalid_here == made.invalid
    now = int(time.time())
    asked = [(f"made-{n}", case, *pair) for n, part in enumerate(made.parts) for case, pair in enumerate(part)]
    tokens = [
        server.issuers.mint(name, token_claims({**claims, "case": case}, "", now)) for name, case, _, claims in asked
    ]
    accepted = 0
    identities = Ours(server, made.text).identities(tokens)
    for (_, _, source, claims), token, identity in zip(asked, tokens, identities, strict=True):
        straight = server.straight(token)
        through = None if identity is None else server.through_us(identity)
        extra = {} if straight is None else straight.get("extra", {})
        if not all(is_plain(value) for values in extra.values() for value in values):
            assert through is None, (source, claims)
            continue
        assert through == straight, (source, claims)
        accepted += straight is not None
    print(f"{len(asked)} tokens of Hypothesis, {accepted} accepted; {len(made.invalid)} invalid expressions")
    assert min(accepted, len(asked) - accepted) > 30


@pytest.mark.parametrize("person", [ALICE, BOB], ids=["alice", "bob"])
def test_kubectl_is_the_same_user_with_the_same_rights(
    server: Server, world: CelWorld, made: Made, person: Any
) -> None:
    client: Client = world.start_client(person)
    through = server.cluster.kubectl_for(kubeconfig=client.kubeconfig)
    straight = server.cluster.kubectl_for()
    flags = [f"--token={world.token(person, CLUSTER_AUDIENCE)}", f"--server={server.cluster.api_url}"]
    flags += [f"--certificate-authority={server.cluster.ca_file}", "--kubeconfig=/dev/null"]

    def whoami(kubectl: Any, *extra: str) -> dict[str, Any]:
        answer = json.loads(kubectl.run("auth", "whoami", "-o", "json", *extra).stdout)
        found = user(answer["status"]["userInfo"])
        found.get("extra", {}).pop(CREDENTIAL_ID, None)
        return found

    mine = whoami(through)
    assert mine == whoami(straight, *flags)
    assert mine["username"] == f"cel:{person.email}"
    assert mine["groups"] == [f"team:{group}" for group in person.groups]
    assert mine["uid"] == f"{person.name}-id"
    assert mine["extra"] == {"example.com/host": ["127.0.0.1"]}
    for verb, allowed in (("get", True), ("delete", person is ALICE)):
        for kubectl, extra in ((through, []), (straight, flags)):
            done = kubectl.run("auth", "can-i", verb, "pods", *extra, check=False)
            assert (done.returncode == 0) is allowed
