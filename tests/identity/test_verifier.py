"""What a token may not do, and what a valid one says (docs/threats.md#T1, docs/threats.md#T2, docs/threats.md#T5)."""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding

from arcbridge.errors import ConfigError, Unauthenticated
from arcbridge.identity import verifier as verifier_module
from arcbridge.identity.authentication import parse
from arcbridge.identity.refusal import TokenRefused
from arcbridge.identity.verifier import (
    DEFAULT_LIFETIME,
    LEEWAY,
    MAX_LIFETIME,
    MAX_TOKEN,
    MIN_LIFETIME,
    NOT_BEFORE_LEEWAY,
    Acceptance,
    TokenVerifier,
)
from arcbridge.settings.config import AgentConfig, RelayConfig
from tests.support.clock import Clock

from .issuer import CONFIG, EC, ED, RSA, RSA_OTHER, URL, Issuer, b64, claims, jwk, raw_token, token


def verifier(
    issuer: Issuer | None = None, clock: Clock | None = None, config: str = CONFIG, accept: Acceptance | None = None
) -> TokenVerifier:
    wall = clock or Clock()
    return TokenVerifier(parse(config), (issuer or Issuer()).fetch, wall, monotonic=wall, accept=accept)


async def refused(text: str, subject: TokenVerifier | None = None) -> str:
    with pytest.raises(Unauthenticated) as caught:
        await (subject or verifier()).verify(text)
    assert isinstance(caught.value, TokenRefused)
    return caught.value.rule


async def test_a_good_token() -> None:
    identity = await verifier().verify(token(claims()))
    assert identity.username == "oidc:alice"
    assert identity.groups == ("oidc:dev",)
    assert identity.subject == URL + "#alice"
    assert identity.expires_at == 1600.0


@pytest.mark.parametrize(
    ("key", "alg"), [(RSA, "RS256"), (RSA, "PS384"), (EC, "ES256")], ids=lambda v: v if isinstance(v, str) else ""
)
async def test_each_key_type_verifies_its_own_algorithms(key: Any, alg: str) -> None:
    subject = verifier(Issuer([jwk(key)]))
    assert (await subject.verify(token(claims(), key=key, alg=alg))).username == "oidc:alice"


async def test_an_algorithm_that_kube_apiserver_does_not_know_is_refused() -> None:
    subject = verifier(Issuer([jwk(RSA), jwk(ED, "k2")]))
    assert await refused(token(claims(), key=ED, alg="EdDSA", kid="k2"), subject) == "token.alg"


PUBLIC_PEM = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
GOOD = json.dumps(claims()).encode()


def _hmac_with_public_key() -> str:
    import hashlib
    import hmac

    signed = f"{b64(json.dumps({'alg': 'HS256', 'kid': 'k1'}).encode())}.{b64(GOOD)}"
    return f"{signed}.{b64(hmac.new(PUBLIC_PEM, signed.encode(), hashlib.sha256).digest())}"


ATTACKS = [
    ("none", b64(b'{"alg":"none"}') + f".{b64(GOOD)}.", "token.shape"),
    ("nOnE", b64(b'{"alg":"nOnE","kid":"k1"}') + f".{b64(GOOD)}.AA", "token.alg"),
    ("no alg", raw_token(b'{"kid":"k1"}', GOOD), "token.alg"),
    ("alg list", raw_token(b'{"alg":["RS256"],"kid":"k1"}', GOOD), "token.alg"),
    ("HS256 with the public key", _hmac_with_public_key(), "token.alg"),
    ("ES256 header over an RSA key", raw_token(b'{"alg":"ES256","kid":"k1"}', GOOD), "token.key"),
    ("embedded jwk", token(claims(), key=RSA_OTHER, kid=None, jwk=jwk(RSA_OTHER)), "token.signature"),
    ("jku", token(claims(), key=RSA_OTHER, jku="https://evil.example/keys"), "token.signature"),
    ("x5u", token(claims(), key=RSA_OTHER, x5u="https://evil.example/cert"), "token.signature"),
    ("kid path", token(claims(), kid="../../dev/null"), "token.key"),
    ("kid number", raw_token(b'{"alg":"RS256","kid":1}', GOOD), "token.kid"),
    ("unknown crit", token(claims(), crit=["exp"]), "token.crit"),
    ("b64 crit", raw_token(b'{"alg":"RS256","kid":"k1","b64":false,"crit":["b64"]}', GOOD), "token.crit"),
    ("duplicate header key", raw_token(b'{"alg":"RS256","alg":"RS256","kid":"k1"}', GOOD), "token.shape"),
    ("duplicate claim", raw_token(b'{"alg":"RS256","kid":"k1"}', GOOD[:-1] + b',"sub":"bob"}'), "token.shape"),
    ("nested", raw_token(b'{"alg":"RS256","kid":"k1","cty":"JWT"}', GOOD), "token.nested"),
    ("JWE", ".".join([b64(b'{"alg":"RSA-OAEP","enc":"A256GCM"}'), "a", "b", "c", "d"]), "token.shape"),
    ("100 KB", "a" * 100_000, "token.size"),
    ("empty", "", "token.shape"),
    ("not ASCII", "ä.b.c", "token.shape"),
    ("opaque", "gho_0123456789", "token.shape"),
    ("payload list", raw_token(b'{"alg":"RS256","kid":"k1"}', b"[1]"), "token.shape"),
    ("deep JSON", raw_token(b'{"alg":"RS256","kid":"k1"}', b"[" * 20_000), "token.shape"),
    ("NaN exp", raw_token(b'{"alg":"RS256","kid":"k1"}', GOOD.replace(b"1600.0", b"NaN")), "token.shape"),
]


@pytest.mark.parametrize(("text", "rule"), [row[1:] for row in ATTACKS], ids=[row[0] for row in ATTACKS])
async def test_t1_the_token_decides_nothing(text: str, rule: str) -> None:
    assert await refused(text) == rule


async def test_t1_a_changed_payload_is_refused() -> None:
    head, _, signature = token(claims()).split(".")
    assert await refused(f"{head}.{b64(json.dumps(claims(sub='root')).encode())}.{signature}") == "token.signature"


@pytest.mark.parametrize("part", range(3))
async def test_t60_a_signed_token_has_one_text(part: int) -> None:
    """Padding is refused (RFC 7515 §2), also where the signature covers it."""
    header, payload = b'{"alg":"RS256","kid":"k1"  }', json.dumps(claims()).encode()
    parts = [b64(header), b64(payload + b" " * (2 - len(payload) % 3))]
    if part < 2:
        parts[part] += "=" * (-len(parts[part]) % 4)
    signature = RSA.sign(".".join(parts).encode(), padding.PKCS1v15(), hashes.SHA256())
    text = ".".join([*parts, b64(signature) + "==" * (part == 2)])
    assert "=" in text
    assert await refused(text) == "token.shape"
    assert (await verifier().verify(raw_token(header, payload))).username == "oidc:alice"


@pytest.mark.parametrize("changes", [{"nonce": 5}, {"at_hash": ["x"]}, {"nonce": {}}], ids=repr)
async def test_claims_of_openid_connect_are_texts(changes: dict[str, Any]) -> None:
    assert await refused(token(claims(**changes))) == "token.claims"


async def test_t1_a_jwk_bound_to_one_algorithm_verifies_no_other() -> None:
    subject = verifier(Issuer([jwk(RSA, alg="RS512")]))
    assert await refused(token(claims()), subject) == "token.key"


async def test_a_token_just_under_the_bound_is_read() -> None:
    many = [f"group-{n:05}" for n in range(900)]
    text = token(claims(groups=many, filler="x" * 20_000))
    assert 30_000 < len(text) < MAX_TOKEN
    assert len((await verifier().verify(text)).groups) == 900


CLAIMS = [
    ("other audience", {"aud": "relay"}, "token.aud"),
    ("no audience", {"aud": None}, "token.aud"),
    ("audience list without ours", {"aud": ["a", "b"]}, "token.aud"),
    ("audience of numbers", {"aud": [1]}, "token.aud"),
    ("trailing slash", {"iss": URL + "/"}, "token.iss"),
    ("prefix of the issuer", {"iss": URL[:-1]}, "token.iss"),
    ("other tenant", {"iss": "https://issuer.example/other"}, "token.iss"),
    ("no issuer", {"iss": None}, "token.iss"),
    ("issuer list", {"iss": [URL]}, "token.iss"),
    ("no exp", {"exp": None}, "token.exp"),
    ("exp text", {"exp": "1600"}, "token.exp"),
    ("exp true", {"exp": True}, "token.exp"),
    ("exp huge", {"exp": 2**70}, "token.exp"),
    ("exp of 2^53", {"exp": 2**53}, "token.exp"),
    ("exp of 2^53 - 1", {"exp": 2**53 - 1}, "token.life"),
    ("exp of 2^53 as a float", {"exp": float(2**53)}, "token.life"),
    ("exp in a thousand years", {"exp": 1000 + 365_000 * 86400}, "token.life"),
    ("exp beyond the bound", {"exp": 1000 + DEFAULT_LIFETIME + 1}, "token.life"),
    ("iat at the beginning of time", {"iat": 0, "exp": DEFAULT_LIFETIME + 1}, "token.life"),
    ("no iat", {"iat": None}, "token.iat"),
    ("lapsed", {"exp": 1000}, "token.exp"),
    ("lapsed just now", {"exp": 999.5}, "token.exp"),
    ("not yet", {"nbf": 1000 + NOT_BEFORE_LEEWAY + 1}, "token.nbf"),
    ("from the future", {"iat": 1000 + LEEWAY + 1}, "token.nbf"),
]


@pytest.mark.parametrize(("changes", "rule"), [row[1:] for row in CLAIMS], ids=[row[0] for row in CLAIMS])
async def test_t2_issuer_audience_and_times(changes: dict[str, Any], rule: str) -> None:
    assert await refused(raw_token(b'{"alg":"RS256","kid":"k1"}', json.dumps(claims(**changes)).encode())) == rule


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": 1000.5},
        {"exp": 1000 + DEFAULT_LIFETIME},
        {"nbf": 1000 + NOT_BEFORE_LEEWAY},
        {"iat": 1000 + LEEWAY},
        {"aud": ["x", "cluster"]},
    ],
)
async def test_t2_inside_the_skew(changes: dict[str, Any]) -> None:
    assert (await verifier().verify(token(claims(**changes)))).username == "oidc:alice"


async def test_t3_the_relay_s_audience_is_not_the_cluster_s() -> None:
    assert await refused(token(claims(aud="arcbridge-relay"))) == "token.aud"


@pytest.mark.parametrize(
    ("audience", "rule"),
    [
        ("arcbridge:key:T@cluster", ""),
        (["arcbridge:key:T", "cluster"], ""),
        ("arcbridge:key:T", "token.aud"),
        ("arcbridge:key:T@", "token.aud"),
        ("arcbridge:key:T@other", "token.aud"),
        ("arcbridge:key:T@x@cluster", "token.aud"),
        ("x@cluster", "token.aud"),
        (["arcbridge:key:T@cluster", "arcbridge:key:T@relay"], "token.aud.forbidden"),
    ],
)
async def test_an_audience_may_name_the_place_and_a_key(audience: object, rule: str) -> None:
    """Whether the token is bound to the key is `identity.proof`'s to say; here it must be meant for this place."""
    subject = verifier(accept=Acceptance(frozenset({"relay"})))
    if rule:
        assert await refused(token(claims(aud=audience)), subject) == rule
    else:
        assert (await subject.verify(token(claims(aud=audience)))).username == "oidc:alice"


TYPES = [
    *("logout+jwt", "application/logout+jwt", "Logout+JWT"),
    *("dpop+jwt", "arcbridge-proof+jwt", "application/arcbridge-proof+jwt"),
    *("secevent+jwt", "token-introspection+jwt", "oauth-authz-req+jwt", "kb+jwt", "JWS", "application/", "", " JWT"),
    *("at+jwt; v=1", "text/at+jwt", "application/application/jwt", "at+jwt\u0000"),
    *(1, True, [], ["JWT"], {}),
]


@pytest.mark.parametrize("kind", TYPES, ids=repr)
async def test_t20_a_jwt_of_another_purpose_is_refused(kind: object) -> None:
    header = json.dumps({"alg": "RS256", "kid": "k1", "typ": kind}).encode()
    assert await refused(raw_token(header, GOOD)) == "token.typ"


@pytest.mark.parametrize("kind", [None, "JWT", "jwt", "at+jwt", "AT+JWT", "application/at+jwt", "Application/JWT"])
async def test_t20_a_token_says_its_type_or_nothing(kind: str | None) -> None:
    header = json.dumps({"alg": "RS256", "kid": "k1", "typ": kind} if kind else {"alg": "RS256", "kid": "k1"}).encode()
    assert (await verifier().verify(raw_token(header, GOOD))).username == "oidc:alice"


async def test_t20_a_logout_token_without_a_type_is_refused() -> None:
    """It has issuer, audience, subject and times of an id token (OpenID Connect Back-Channel Logout 1.0 §2.4)."""
    event: dict[str, object] = {"http://schemas.openid.net/event/backchannel-logout": {}}
    assert await refused(token(claims(events=event))) == "token.events"
    assert await refused(token(claims(events={}))) == "token.events"


@pytest.mark.parametrize("audience", [["cluster", "relay"], ["relay", "cluster"], ["x", "cluster", "relay", "x"]])
async def test_t21_a_token_that_is_good_at_the_relay_as_well_is_refused(audience: list[str]) -> None:
    subject = verifier(accept=Acceptance(frozenset({"relay", "other"})))
    assert await refused(token(claims(aud=audience)), subject) == "token.aud.forbidden"
    with pytest.raises(TokenRefused, match="also meant for another place"):
        await subject.verify(token(claims(aud=audience)))
    assert (await subject.verify(token(claims(aud=["cluster", "x"])))).username == "oidc:alice"
    assert (await subject.verify(token(claims(aud="cluster")))).username == "oidc:alice"
    assert await refused(token(claims(aud="relay")), subject) == "token.aud"
    # What is not forbidden is accepted: an id token may name several of an organisation's programs.
    assert (await verifier().verify(token(claims(aud=audience)))).username == "oidc:alice"


async def test_t22_the_operator_says_how_long_a_token_may_be_valid() -> None:
    hour = verifier(accept=Acceptance(max_lifetime=3600))
    assert (await hour.verify(token(claims(exp=4600)))).expires_at == 4600
    assert await refused(token(claims(exp=4601)), hour) == "token.life"
    with pytest.raises(TokenRefused, match=r"more than 1 h; .*max_token_lifetime"):
        await hour.verify(token(claims(exp=4601)))
    year = verifier(accept=Acceptance(max_lifetime=MAX_LIFETIME))
    assert (await year.verify(token(claims(exp=1000 + MAX_LIFETIME)))).username == "oidc:alice"
    assert await refused(token(claims(exp=1000 + MAX_LIFETIME + 1)), year) == "token.life"


def test_t22_the_settings_have_the_default_of_the_verifier() -> None:
    assert AgentConfig().max_token_lifetime == RelayConfig().max_token_lifetime == DEFAULT_LIFETIME


@pytest.mark.parametrize(
    ("accept", "words"),
    [
        (Acceptance(max_lifetime=MIN_LIFETIME - 1), "max_token_lifetime"),
        (Acceptance(max_lifetime=MAX_LIFETIME + 1), "max_token_lifetime"),
        (Acceptance(frozenset({"relay", "cluster"})), r"forbidden_audiences: 'cluster' is an audience of jwt\[0\]"),
    ],
)
def test_settings_that_let_no_token_in_are_an_error_at_the_start(accept: Acceptance, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        verifier(accept=accept)


async def test_results_are_kept_a_minute_and_never_past_the_end() -> None:
    clock, issuer = Clock(), Issuer()
    subject = verifier(issuer, clock)
    text = token(claims(exp=1030))
    first = await subject.verify(text)
    assert await subject.verify(text) is first
    clock.now = 1030.0
    assert await refused(text, subject) == "token.exp"


async def test_results_do_not_outlive_a_withdrawn_key() -> None:
    clock, issuer = Clock(), Issuer()
    issuer.max_age = 0
    subject = verifier(issuer, clock)
    text = token(claims())
    await subject.verify(text)
    issuer.keys = [jwk(RSA_OTHER, "k2")]
    clock.now += 61
    # The set is past its time: it is fetched again in the background, this caller still gets the old answer.
    await subject.verify(text)
    await subject.close()
    await subject.verify(token(claims(), key=RSA_OTHER, kid="k2"))
    assert await refused(text, subject) == "token.key"


EXPENSIVE = (
    CONFIG
    + """  claimValidationRules:
  - {expression: "!has(claims.l) || dyn(claims.l).all(a, dyn(claims.l).all(b, a + b >= 0.0))"}
"""
)


@pytest.fixture
def _long_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the event loop may evaluate is told by its cost alone: a machine that stands still for 20 ms in the middle
    of a cheap token would send it to the thread."""
    monkeypatch.setattr(verifier_module, "LOOP_TIME", 3600.0)


@pytest.mark.usefixtures("_long_turns")
async def test_t41_what_costs_much_is_evaluated_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Usual tokens never wait for a thread, and at most one thread evaluates, however many expensive ones come."""
    running, most, threads = 0, 0, 0
    original = asyncio.to_thread

    async def counted(*args: Any) -> Any:
        nonlocal running, most, threads
        running, threads = running + 1, threads + 1
        most = max(most, running)
        await asyncio.sleep(0)
        try:
            return await original(*args)
        finally:
            running -= 1

    monkeypatch.setattr(asyncio, "to_thread", counted)
    subject = verifier(config=EXPENSIVE)
    assert (await subject.verify(token(claims()))).username == "oidc:alice"
    assert (await subject.verify(token(claims(l=[1, 2])))).username == "oidc:alice"
    assert threads == 0
    costly = [token(claims(l=list(range(60)), jti=str(n))) for n in range(4)]
    found = await asyncio.gather(*map(subject.verify, costly))
    assert {identity.username for identity in found} == {"oidc:alice"}
    assert (threads, most) == (4, 1)
    assert await refused(token(claims(l=list(range(2000)))), subject) == "claims.cost"


@pytest.fixture
def held(_long_turns: None, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Semaphore, threading.Event]:
    """Threads that map claims wait: released for each that begins, and set to let them go on."""
    begun, go_on = threading.Semaphore(0), threading.Event()
    original = verifier_module.map_claims

    def mapped(issuer: Any, found: Any, budget: Any = None, clients: Any = ()) -> Any:
        if threading.current_thread() is not threading.main_thread():
            begun.release()
            assert go_on.wait(30)
        return original(issuer, found, budget, clients)

    monkeypatch.setattr(verifier_module, "map_claims", mapped)
    return begun, go_on


async def test_t41_the_event_loop_turns_while_a_thread_evaluates(
    held: tuple[threading.Semaphore, threading.Event],
) -> None:
    begun, go_on = held
    subject = verifier(config=EXPENSIVE)
    waiting = asyncio.create_task(subject.verify(token(claims(l=list(range(60))))))
    assert await asyncio.to_thread(begun.acquire, True, 30)
    # Another user's token is verified meanwhile.
    assert (await subject.verify(token(claims(sub="bob")))).username == "oidc:bob"
    assert not waiting.done()
    go_on.set()
    assert (await waiting).username == "oidc:alice"


async def test_t41_a_caller_that_leaves_does_not_make_room_for_another_thread(
    held: tuple[threading.Semaphore, threading.Event],
) -> None:
    begun, go_on = held
    subject = verifier(config=EXPENSIVE)
    costly = [token(claims(l=list(range(60)), jti=str(n))) for n in range(2)]
    first, second = (asyncio.create_task(subject.verify(text)) for text in costly)
    assert await asyncio.to_thread(begun.acquire, True, 30)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    for _ in range(20):
        await asyncio.sleep(0)
    assert not begun.acquire(blocking=False), "a second thread evaluates"
    go_on.set()
    assert (await second).username == "oidc:alice"


async def test_other_settings_count_from_the_next_token_on_and_keys_are_kept() -> None:
    issuer = Issuer()
    subject = verifier(issuer)
    text = token(claims())
    assert (await subject.verify(text)).issuer == URL
    subject.replace(parse(CONFIG), Acceptance())
    assert (await subject.verify(text)).issuer == URL
    assert issuer.key_fetches == 1, "the issuer is the same, and its keys are known"
    subject.replace(parse(CONFIG), Acceptance(max_lifetime=60.0))
    assert await refused(text, subject) == "token.life"
    subject.replace(parse(CONFIG.replace(URL, "https://other.example")), Acceptance())
    assert await refused(text, subject) == "token.iss"
    with pytest.raises(ConfigError, match="max_token_lifetime"):
        subject.replace(parse(CONFIG), Acceptance(max_lifetime=1.0))
    assert await refused(text, subject) == "token.iss", "what cannot be had changes nothing"
    subject.replace(parse(CONFIG), Acceptance())
    assert (await subject.verify(text)).issuer == URL
    assert issuer.key_fetches == 2
    await subject.close()


async def test_a_token_that_is_being_verified_is_judged_by_the_newer_settings() -> None:
    class Slow(Issuer):
        async def fetch(self, url: str, ca_pem: str | None) -> Any:
            document = await super().fetch(url, ca_pem)
            if url == self.jwks_uri:
                # While the keys are on their way, the operator takes the audience away.
                subject.replace(parse(CONFIG.replace("[cluster]", "[elsewhere]")), Acceptance())
            return document

    subject = verifier(Slow())
    assert await refused(token(claims()), subject) == "token.aud"
    await subject.close()


async def test_the_refusal_names_no_claim() -> None:
    with pytest.raises(TokenRefused) as caught:
        await verifier().verify(token(claims(aud="secret-audience", sub="mallory")))
    assert "secret-audience" not in str(caught.value)
    assert "mallory" not in str(caught.value)


async def test_a_token_without_the_claim_of_the_groups_counts_and_is_told() -> None:
    """Whether others of the issuer have the claim says whether its name may be wrong."""
    subject = verifier()
    told: list[tuple[str, bool]] = []
    subject.on_missing_groups = lambda user, claim, issuer, usual: told.append((claim, usual))
    without = token({name: value for name, value in claims().items() if name != "groups"})
    assert (await subject.verify(without)).groups == ()
    await subject.verify(token(claims()))
    await subject.verify(without)
    assert told == [("groups", False), ("groups", True)]
    assert (subject.without_groups, subject.verified) == (2, 3)
    config = parse(CONFIG)
    subject.replace(config, Acceptance())
    await subject.verify(without)
    assert told[-1] == ("groups", False), "other settings, other names"


async def test_who_takes_no_groups_misses_none() -> None:
    subject = verifier(config=CONFIG[: CONFIG.index("    groups")])
    assert (await subject.verify(token(claims()))).missing_groups_claim == ""
    assert subject.without_groups == 0


@pytest.mark.parametrize(
    "config", [CONFIG, CONFIG.replace('{claim: sub, prefix: "oidc:"}', '{expression: "claims.sub"}')]
)
async def test_the_client_of_a_token_is_its_actor_where_the_settings_name_it(config: str) -> None:
    subject = verifier(config=config)
    text = token(claims(azp="bot"))
    assert (await subject.verify(text)).actor == ""
    subject.replace(parse(config), Acceptance(actor_clients=frozenset({"bot"})))
    assert (await subject.verify(text)).actor == "bot", "no former result counts"
    assert (await subject.verify(token(claims(act={"sub": "ci"}, azp="bot")))).actor == "ci"
    await subject.close()
