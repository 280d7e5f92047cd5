"""What a proof says, and every way in which one that says something else is refused."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.errors import StateError
from arcbridge.identity.proof import (
    AUDIENCE_PREFIX,
    DPOP_TYPE,
    IAT_WINDOW,
    MAX_PROOF,
    NONCE_PREFIX,
    REFUSALS,
    TYPE,
    Binding,
    BindingKind,
    Peer,
    ProofChecker,
    ProofKey,
    ProofPolicy,
    ProofRefused,
    binding,
    check_proof,
    explain,
    key_of,
    peer_hash,
    place_of,
    thumbprint_of,
    token_hash,
)
from arcbridge.refusals import RefusalRule

NOW = 1_800_000_000.0
TOKEN = "head.claims.signature"
SPKI = b"the peer's key"
PIN = "sha256:" + "ab" * 32
KEY = ProofKey.generate()
OTHER = ProofKey.generate()
PROOF = KEY.sign_proof(TOKEN, SPKI, PIN, NOW)
HEADER = {"typ": TYPE, "alg": "ES256", "jwk": KEY.public_jwk()}
CLAIMS = {"ath": token_hash(TOKEN), "peer": peer_hash(SPKI), "pin": PIN, "iat": int(NOW)}


def private(key: ProofKey) -> ec.EllipticCurvePrivateKey:
    loaded = jwt.PyJWK(json.loads(key.to_jwk())).key
    assert isinstance(loaded, ec.EllipticCurvePrivateKey)
    return loaded


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed(header: Any, claims: Any, *, key: ProofKey = KEY) -> str:
    """A proof with any header and any claims, rightly signed; bytes are taken as they are."""
    texts = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in (header, claims)]
    text = ".".join(b64(one) for one in texts)
    r, s = utils.decode_dss_signature(private(key).sign(text.encode(), ec.ECDSA(hashes.SHA256())))
    return f"{text}.{b64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def checked(proof: str, *, token: str = TOKEN, peer_spki: bytes = SPKI, pin: str = PIN, now: float = NOW) -> str:
    return check_proof(proof, token=token, peer_spki=peer_spki, pin=pin, now=now, place="the agent")


def rule(proof: str, **changed: Any) -> str:
    with pytest.raises(ProofRefused) as caught:
        checked(proof, **changed)
    return caught.value.rule


# -- a good proof ------------------------------------------------------------------------------------------------------


def test_a_good_proof_names_its_key() -> None:
    assert checked(PROOF) == KEY.thumbprint
    assert checked(signed(HEADER, CLAIMS)) == KEY.thumbprint
    assert len(PROOF) < MAX_PROOF / 3


def test_another_implementation_reads_it() -> None:
    header = jwt.get_unverified_header(PROOF)
    assert header == HEADER
    key = jwt.PyJWK(header["jwk"]).key
    assert jwt.decode(PROOF, key, algorithms=["ES256"], options={"verify_iat": False}) == CLAIMS


def test_the_thumbprint_is_that_of_rfc_7638() -> None:
    members = KEY.public_jwk()
    canonical = json.dumps(members, sort_keys=True, separators=(",", ":")).encode()
    assert KEY.thumbprint == b64(hashlib.sha256(canonical).digest())
    # The key and thumbprint of RFC 9449 §6.1 (its access token is bound to the key of §4.1).
    assert (
        thumbprint_of("l8tFrhx-34tV3hRICRDY9zCkDlpBhF42UQUfWVAWBFs", "9VE4jf_Ok_o64zbTTlcuNJajHmt6v9TDVrU0CdvGRDA")
        == "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"
    )


def test_a_later_claim_is_ignored() -> None:
    assert checked(signed(HEADER, {**CLAIMS, "later": [1, {"a": None}]})) == KEY.thumbprint


@pytest.mark.parametrize("off", [0, 1, -1, IAT_WINDOW - 1, 1 - IAT_WINDOW])
def test_clocks_may_differ_a_little(off: float) -> None:
    assert checked(PROOF, now=NOW + off) == KEY.thumbprint


# -- a bad one ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"token": TOKEN + "x"}, "proof.ath"),
        ({"peer_spki": SPKI + b"x"}, "proof.peer"),
        ({"pin": "sha256:" + "cd" * 32}, "proof.peer"),
        ({"pin": ""}, "proof.peer"),
        ({"now": NOW + IAT_WINDOW + 1}, "proof.iat"),
        ({"now": NOW - IAT_WINDOW - 1}, "proof.iat"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_a_proof_is_of_one_token_one_peer_one_cluster_and_one_time(changed: dict[str, Any], expected: str) -> None:
    assert rule(PROOF, **changed) == expected


def without(table: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != name}


JWK = KEY.public_jwk()
P384 = ec.generate_private_key(ec.SECP384R1()).public_key().public_numbers()
BAD_MEMBERS: dict[str, list[Any]] = {
    "typ": [None, "JWT", DPOP_TYPE, TYPE.upper()],
    "alg": [None, "none", "HS256", "ES384", ["ES256"]],
    "jwk": [
        *(None, "key", [JWK]),
        {"kty": "RSA", "n": "AQAB", "e": "AQAB"},
        {"kty": "oct", "k": "AAAA"},
        {"kty": "EC", "crv": "P-384", "x": b64(P384.x.to_bytes(48)), "y": b64(P384.y.to_bytes(48))},
        json.loads(KEY.to_jwk()),
        without(JWK, "x"),
        *({**JWK, **more} for more in ({"k": "AAAA"}, {"kid": "1"}, {"kty": "OKP"}, {"crv": "secp256k1"})),
        *({**JWK, "x": x} for x in (1, JWK["x"] + "=", JWK["x"][:-1] + "+", "AA" + JWK["x"], JWK["x"][:-2], "")),
    ],
    **{"crit": [["exp"]], "kid": ["1"], "jku": ["https://attacker.example/"], "x5c": [[]]},
}
BAD_HEADERS: list[Any] = [
    *(without(HEADER, name) for name in HEADER),
    *({**HEADER, name: value} for name, values in BAD_MEMBERS.items() for value in values),
    *([HEADER], None, b"{", b"", b'{"typ": NaN}', b'{"typ": "\xff"}', b"[" * 1200),
    json.dumps(HEADER).encode("utf-16"),
    json.dumps(HEADER).replace('"alg"', '"alg": "none", "alg"', 1).encode(),
    json.dumps(HEADER).replace('"x"', '"x": "", "x"', 1).encode(),
]


@pytest.mark.parametrize("header", BAD_HEADERS, ids=range(len(BAD_HEADERS)))  # the key differs in each process
def test_a_header_that_says_anything_else(header: Any) -> None:
    assert rule(signed(header, CLAIMS)) in ("proof.shape", "proof.size")


def test_a_point_that_is_not_on_the_curve() -> None:
    for point in ({"y": OTHER.public_jwk()["y"]}, {"x": b64(bytes(32)), "y": b64(bytes(32))}):
        assert rule(signed({**HEADER, "jwk": {**JWK, **point}}, CLAIMS)) == "proof.signature"


BAD_CLAIMS: list[tuple[Any, str]] = [
    *((without(CLAIMS, name), f"proof.{name}") for name in ("ath", "peer")),
    (without(CLAIMS, "pin"), "proof.peer"),
    (without(CLAIMS, "iat"), "proof.shape"),
    *(
        ({**CLAIMS, "ath": value}, "proof.ath")
        for value in (None, hashlib.sha256(TOKEN.encode()).hexdigest(), "\ud800")
    ),
    *(({**CLAIMS, "peer": value}, "proof.peer") for value in ("", [CLAIMS["peer"]])),
    ({**CLAIMS, "pin": PIN.upper()}, "proof.peer"),
    *(({**CLAIMS, "iat": value}, "proof.shape") for value in (str(int(NOW)), True, NOW, 2**53, 10**300)),
    ({**CLAIMS, "iat": -int(NOW)}, "proof.iat"),
    ([CLAIMS], "proof.shape"),
    (json.dumps(CLAIMS).replace('"peer"', '"peer": "", "peer"', 1).encode(), "proof.shape"),
    (json.dumps(CLAIMS).replace(str(int(NOW)), "Infinity").encode(), "proof.shape"),
]


@pytest.mark.parametrize(("claims", "expected"), BAD_CLAIMS, ids=range(len(BAD_CLAIMS)))
def test_claims_that_say_anything_else(claims: Any, expected: str) -> None:
    assert rule(signed(HEADER, claims)) == expected


def _other_spelling(text: str) -> str:
    """The same bytes, with other unused bits in the last character."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    last = alphabet.index(text[-1])
    assert last % 16 == 0, "64 bytes leave four bits"
    return text[:-1] + alphabet[last + 1]


SIGNED, SIGNATURE = PROOF.rsplit(".", 1)
BAD_TEXTS = {
    "proof.shape": [
        *("", "..", SIGNED, PROOF + ".", SIGNED + ".", PROOF + "==", _other_spelling(PROOF)),
        *(" " + PROOF, PROOF.replace(".", ".\n", 1), "é" + PROOF, "\ud800" + PROOF),
        f"{SIGNED}.{b64(private(KEY).sign(SIGNED.encode(), ec.ECDSA(hashes.SHA256())))}",  # in DER
    ],
    "proof.signature": [
        *(f"{SIGNED}.{b64(octet * 64)}" for octet in (b"\x00", b"\xff")),
        signed(HEADER, CLAIMS, key=OTHER),
    ],
    "proof.size": [signed(HEADER, {**CLAIMS, "more": "x" * MAX_PROOF})],
}


@pytest.mark.parametrize("expected", BAD_TEXTS)
def test_a_text_that_is_anything_else(expected: str) -> None:
    for text in BAD_TEXTS[expected]:
        assert rule(text) == expected, text


@given(st.data())
def test_no_character_can_be_changed(data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(PROOF) - 1))
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."
    put = data.draw(st.sampled_from([one for one in letters if one != PROOF[at]]))
    assert rule(PROOF[:at] + put + PROOF[at + 1 :]).startswith("proof.")


@given(st.text(max_size=300) | st.text("AZaz09-_.eyJ", max_size=900))
def test_any_text_is_refused_in_order(text: str) -> None:
    assert rule(text).startswith("proof.")


_tokens = st.text("abcXYZ019-_.", min_size=1, max_size=200)
_pins = st.sampled_from(["", PIN, "sha256:" + "cd" * 32])
_shown = st.tuples(_tokens, st.binary(min_size=1, max_size=120), _pins, st.floats(0, 4e9))


@given(_shown, _shown, st.floats(-IAT_WINDOW, IAT_WINDOW))
def test_a_proof_is_good_for_what_it_was_made_for_and_for_nothing_else(
    made: tuple[str, bytes, str, float], other: tuple[str, bytes, str, float], off: float
) -> None:
    token, spki, pin, now = made
    proof = KEY.sign_proof(token, spki, pin, now)
    checked(proof, token=token, peer_spki=spki, pin=pin, now=int(now) + off)
    for changed in (
        (other[0], spki, pin, now),
        (token, other[1], pin, now),
        (token, spki, other[2], now),
        (token, spki, pin, other[3]),
    ):
        if changed[:3] == made[:3] and abs(changed[3] - int(now)) <= IAT_WINDOW:
            continue
        with pytest.raises(ProofRefused):
            checked(proof, token=changed[0], peer_spki=changed[1], pin=changed[2], now=changed[3])


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(_json)
def test_any_signed_value_in_any_place_is_refused_or_changes_nothing(value: Any) -> None:
    for name in HEADER:
        if value != HEADER[name]:
            assert rule(signed({**HEADER, name: value}, CLAIMS)).startswith("proof.")
    for name, good in CLAIMS.items():
        if value != good:
            assert rule(signed(HEADER, {**CLAIMS, name: value})).startswith("proof.")


@given(_json | st.dictionaries(st.sampled_from(["cnf", "nonce", "aud", "jkt"]), _json))
def test_any_claims_have_a_binding(value: Any) -> None:
    claims = value if isinstance(value, dict) else {"cnf": value, "nonce": value, "aud": value}
    found = binding(claims)
    assert (found.kind is BindingKind.NONE) == (found == Binding())
    found.names(KEY.thumbprint)


# -- which token is bound to which key -----------------------------------------------------------------------------


BOUND: dict[str, tuple[dict[str, Any], BindingKind]] = {
    "cnf": ({"cnf": {"jkt": KEY.thumbprint}}, BindingKind.CNF_JKT),
    "cnf with more": ({"cnf": {"jkt": KEY.thumbprint, "x5t#S256": "x"}}, BindingKind.CNF_JKT),
    "kid of Entra ID": ({"cnf": {"kid": KEY.thumbprint, "xms_ksl": "sw"}}, BindingKind.CNF_KID),
    "jkt before kid": ({"cnf": {"kid": OTHER.thumbprint, "jkt": KEY.thumbprint}}, BindingKind.CNF_JKT),
    "kid before nonce": ({"cnf": {"kid": KEY.thumbprint}, "nonce": OTHER.nonce()}, BindingKind.CNF_KID),
    "nonce": ({"nonce": KEY.nonce()}, BindingKind.NONCE),
    "audience": ({"aud": KEY.audience()}, BindingKind.AUDIENCE),
    "audiences": ({"aud": ["cluster", KEY.audience()]}, BindingKind.AUDIENCE),
    "cnf before nonce": ({"cnf": {"jkt": KEY.thumbprint}, "nonce": OTHER.nonce()}, BindingKind.CNF_JKT),
    "nonce before audience": ({"nonce": KEY.nonce(), "aud": [OTHER.audience()]}, BindingKind.NONCE),
    "any audience": ({"aud": [OTHER.audience(), KEY.audience()]}, BindingKind.AUDIENCE),
}


@pytest.mark.parametrize(("claims", "kind"), BOUND.values(), ids=BOUND)
def test_a_token_is_bound_to_the_key(claims: dict[str, Any], kind: BindingKind) -> None:
    found = binding(claims)
    assert found.kind is kind
    assert found.names(KEY.thumbprint)
    assert not found.names(ProofKey.generate().thumbprint)


def test_what_entra_id_is_asked_with() -> None:
    text = KEY.req_cnf()
    assert json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))) == {"kid": KEY.thumbprint}


NOT_BOUND: list[dict[str, Any]] = [
    *({}, {"cnf": None}),
    # Without the prefix it is a random nonce to all who lack the key.
    *({"nonce": nonce} for nonce in ("n-0S6_WzA2Mj", "", 1, KEY.nonce().removeprefix(NONCE_PREFIX))),
    *({"aud": audience} for audience in ("cluster", ["cluster", 1, None], None)),
]


@pytest.mark.parametrize("claims", NOT_BOUND)
def test_a_token_is_not_bound(claims: dict[str, Any]) -> None:
    assert binding(claims) == Binding()


NO_KEY: list[dict[str, Any]] = [
    *({"cnf": cnf} for cnf in ({}, [], "x", 0, {"jwk": KEY.public_jwk()})),
    *({"cnf": {"jkt": jkt}} for jkt in (1, None, "é", "")),
    *({"cnf": {"kid": kid}} for kid in ("1", None, [KEY.thumbprint], OTHER.thumbprint)),
    *(
        {"cnf": {"kid": KEY.thumbprint, **more}}
        for more in ({"jwk": KEY.public_jwk()}, {"x5t#S256": KEY.thumbprint}, {"jkt": None})
    ),
    {"cnf": {"x5t#S256": "x"}, "nonce": KEY.nonce()},
    {"cnf": {"jkt": OTHER.thumbprint}, "nonce": KEY.nonce(), "aud": KEY.audience()},
    {"nonce": OTHER.nonce(), "aud": KEY.audience()},
    *({"nonce": NONCE_PREFIX + rest} for rest in ("", KEY.thumbprint)),
    *({"aud": AUDIENCE_PREFIX + rest} for rest in ("", "é")),
    {"aud": [AUDIENCE_PREFIX + KEY.thumbprint + "x"]},
    {"aud": [OTHER.audience()] * 16 + [KEY.audience()]},
]


@pytest.mark.parametrize("claims", NO_KEY)
def test_what_is_bound_to_another_key_or_in_another_way_is_not_unbound(claims: dict[str, Any]) -> None:
    found = binding(claims)
    assert found.kind is not BindingKind.NONE
    assert not found.names(KEY.thumbprint)
    with pytest.raises(ProofRefused):
        ProofChecker(ProofPolicy.IF_BOUND, "the agent", clock=lambda: NOW).check(found, TOKEN, PROOF, Peer(SPKI, PIN))


@pytest.mark.parametrize(
    ("policy", "claims", "key", "reason"),
    [
        (ProofPolicy.REQUIRED, {}, "", "unbound"),
        (ProofPolicy.REQUIRED, {}, KEY.thumbprint, "unbound"),
        (ProofPolicy.IF_BOUND, {}, "", ""),
        (ProofPolicy.OFF, {}, "", ""),
        (ProofPolicy.OFF, {"nonce": KEY.nonce()}, "", "off"),
        (ProofPolicy.OFF, {"cnf": {"kid": "1"}}, "", "off"),
        (ProofPolicy.IF_BOUND, {"cnf": {"kid": "1"}}, KEY.thumbprint, "cnf"),
        (ProofPolicy.IF_BOUND, {"nonce": KEY.nonce()}, "", "key"),
        (ProofPolicy.IF_BOUND, {"nonce": KEY.nonce()}, OTHER.thumbprint, "key"),
        (ProofPolicy.REQUIRED, {"nonce": KEY.nonce()}, KEY.thumbprint, ""),
    ],
    ids=range(10),  # the key differs in each process of pytest
)
def test_each_setting_for_a_token_within_a_session(
    policy: ProofPolicy, claims: dict[str, Any], key: str, reason: str
) -> None:
    checker = ProofChecker(policy, "the agent", clock=lambda: NOW)
    with pytest.raises(ProofRefused) if reason else nullcontext() as caught:
        checker.check_within(binding(claims), key)
    assert caught is None or caught.value.rule.check == reason
    assert {name: count for name, count in checker.refused.items() if count} == ({reason: 1} if reason else {})


def test_key_of_an_audience() -> None:
    assert key_of(KEY.audience()) == KEY.thumbprint
    assert key_of("cluster") == ""


# -- what each setting takes ---------------------------------------------------------------------------------------


WRONG = OTHER.sign_proof(TOKEN, SPKI, PIN, NOW)


SETTINGS = [
    (ProofPolicy.IF_BOUND, {}, "", "taken"),
    (ProofPolicy.IF_BOUND, {}, "junk", "taken"),
    (ProofPolicy.REQUIRED, {}, "", "proof.unbound"),
    (ProofPolicy.REQUIRED, {}, PROOF, "proof.unbound"),
    (ProofPolicy.OFF, {}, "", "taken"),
    (ProofPolicy.OFF, {}, PROOF, "taken"),
    (ProofPolicy.IF_BOUND, BOUND["nonce"][0], WRONG, "proof.key"),
    (ProofPolicy.REQUIRED, BOUND["cnf"][0], WRONG, "proof.key"),
    (ProofPolicy.IF_BOUND, BOUND["audiences"][0], WRONG, "proof.key"),
    (ProofPolicy.IF_BOUND, {"cnf": {"x5t#S256": "x"}}, PROOF, "proof.cnf"),
]
for claims, _ in BOUND.values():
    SETTINGS += [(ProofPolicy.OFF, claims, proof, "proof.off") for proof in ("", PROOF, WRONG)]
    for policy in (ProofPolicy.IF_BOUND, ProofPolicy.REQUIRED):
        SETTINGS += [(policy, claims, PROOF, "taken"), (policy, claims, "", "proof.missing")]
        SETTINGS += [(policy, claims, text, "proof.shape") for text in ("junk", PROOF[:-1])]


@pytest.mark.parametrize(("policy", "claims", "proof", "expected"), SETTINGS)
def test_each_setting(policy: ProofPolicy, claims: dict[str, Any], proof: str, expected: str) -> None:
    bound, checker = binding(claims), ProofChecker(policy, "the agent", clock=lambda: NOW)
    refused = expected.removeprefix("proof.") if expected != "taken" else ""
    with pytest.raises(ProofRefused) if refused else nullcontext() as caught:
        proved = checker.check(bound, TOKEN, proof, Peer(SPKI, PIN))
        assert proved == ("" if bound.kind is BindingKind.NONE else KEY.thumbprint)
    assert caught is None or caught.value.rule == expected
    assert {name: count for name, count in checker.refused.items() if count} == ({refused: 1} if refused else {})
    assert [kind for kind, count in checker.taken.items() if count] == ([] if refused else [bound.kind.value])


# -- the key -------------------------------------------------------------------------------------------------------


def test_a_key_is_read_as_it_was_written() -> None:
    again = ProofKey.from_jwk(KEY.to_jwk())
    assert again.thumbprint == KEY.thumbprint
    assert checked(again.sign_proof(TOKEN, SPKI, PIN, NOW)) == KEY.thumbprint


def test_a_key_does_not_show_its_private_half() -> None:
    secret = json.loads(KEY.to_jwk())["d"]
    assert secret not in repr(KEY) + str(KEY) + PROOF + json.dumps(KEY.public_jwk())


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"{}", b"[]", b"\xff", json.dumps(KEY.public_jwk()).encode()),
        *(
            json.dumps({**json.loads(KEY.to_jwk()), **more}).encode()
            for more in ({"crv": "P-384"}, {"d": "AA"}, {"more": "x" * 5000})
        ),
    ],
    ids=range(8),
)
def test_another_file_is_no_key(data: bytes) -> None:
    with pytest.raises(StateError):
        ProofKey.from_jwk(data)


def test_halves_that_do_not_belong_together_sign_nothing() -> None:
    mixed = {**json.loads(KEY.to_jwk()), "d": json.loads(OTHER.to_jwk())["d"]}
    key = ProofKey.from_jwk(json.dumps(mixed).encode())
    with pytest.raises(StateError) as caught:
        key.sign_proof(TOKEN, SPKI, PIN, NOW)
    assert caught.value.__cause__ is None


def test_dpop() -> None:
    proof = KEY.dpop("POST", "https://issuer.example/token?a=1#b", NOW, nonce="n")
    header = jwt.get_unverified_header(proof)
    assert header == {**HEADER, "typ": DPOP_TYPE}
    claims = jwt.decode(proof, jwt.PyJWK(header["jwk"]).key, algorithms=["ES256"], options={"verify_iat": False})
    assert len(claims.pop("jti")) >= 16
    assert claims == {"htm": "POST", "htu": "https://issuer.example/token", "iat": int(NOW), "nonce": "n"}
    plain = jwt.decode(KEY.dpop("GET", "https://x/", NOW), options={"verify_signature": False})
    assert plain.keys() == {"jti", "htm", "htu", "iat"}
    assert rule(proof) == "proof.shape", "it is no proof for a peer"


T = "T" * 43


@pytest.mark.parametrize(
    ("audience", "key", "place"),
    [
        (f"arcbridge:key:{T}", T, f"arcbridge:key:{T}"),
        (f"arcbridge:key:{T}@relay", T, "relay"),
        (f"arcbridge:key:{T}@a@b", T, "a@b"),
        ("arcbridge:key:@relay", "", "relay"),
        (f"arcbridge:key:{T}@", T, ""),
        ("relay", "", "relay"),
        ("x@relay", "", "x@relay"),
    ],
    ids=["key", "both", "two signs", "no key", "no place", "place", "another prefix"],
)
def test_one_audience_can_name_a_key_and_a_place(audience: str, key: str, place: str) -> None:
    assert (key_of(audience), place_of(audience)) == (key, place)
    if audience.startswith("arcbridge:key:"):
        bound = binding({"aud": audience})
        assert bound.kind is BindingKind.AUDIENCE, "never taken for unbound"
        assert bound.names(T) is (key == T)


def test_every_end_that_verifies_a_token_asks_for_its_proof() -> None:
    """An identity says how its token is bound, and not that the proof came: each place that verifies has to ask."""
    package = Path(__file__).resolve().parents[2] / "arcbridge"
    places = {
        file.relative_to(package).as_posix()
        for role in ("agent", "relay", "client")
        for file in (package / role).rglob("*.py")
        if re.search(r"verifier\.verify\(", file.read_text())
    }
    # The page's id token comes from the issuer's token endpoint itself, and its nonce binds it to the browser's login.
    places.remove("relay/page/login.py")
    assert places == {"agent/authenticator.py", "relay/http/api.py", "relay/client_join.py"}
    for place in places:
        assert re.search(r"proofs\.check\(identity\.binding, ", (package / place).read_text()), place


def test_each_rule_of_a_proof_has_a_sentence() -> None:
    rules = [rule for rule in RefusalRule if rule.family == "proof"]
    assert [rule.check for rule in rules] == list(REFUSALS)
    for rule in rules:
        assert ProofRefused(rule, "the agent").message == explain(rule, "the agent")
