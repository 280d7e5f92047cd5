"""Proof of possession: a token that is bound to a key is good only together with a proof made with that key.

A proof is a JWS (RFC 7515) in compact form, signed with ES256 by the P-256 key whose public half is in its header, over
the token (`ath`), the peer it is shown to (`peer`, the key of the certificate that this peer showed in the same TLS
connection), the cluster (`pin`, empty at a relay) and the time (`iat`). The token alone says which key it is bound to:
`binding` reads that from claims that were verified before. This module verifies no token and keeps nothing of what it
saw; it makes the client's DPoP proofs (RFC 9449) for the issuer's token endpoint, too.

Invariant: `ProofChecker.check` returns only where the token may be used by the party at the other end of the
connection: a bound token without the proof of its key never passes, whatever the setting.

`cryptography` is imported when a key is first made or used, because a client without bound tokens never needs it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn

from arcbridge.errors import ConfigError, LocalProtocolError, StateError
from arcbridge.identity.refusal import TokenRefused
from arcbridge.identity.strict_json import parse_object
from arcbridge.refusals import RefusalRule

if TYPE_CHECKING:
    from arcbridge.identity.p256 import PrivateKey

TYPE: Final = "arcbridge-proof+jwt"
"""`typ` of a proof: a signature that was made for another purpose is none (RFC 8725 §3.11)."""
HEADER: Final = "Arcbridge-Proof"
"""The header of an HTTP request to a relay that carries the proof of its access token."""
DPOP_TYPE: Final = "dpop+jwt"
MAX_PROOF: Final = 2048
"""Characters of a proof; those made here have about 650."""
IAT_WINDOW: Final = 300.0
"""Seconds by which a proof's `iat` may differ from the clock of the end that checks it, before and behind. A proof is
made for one connection, so this forgives the clock of a workstation; it must be longer than a session may be detached
(120 s), because an AUTH that renewed the token is sent again when the session is resumed."""
NONCE_PREFIX: Final = "arcbridge-proof."
"""How a nonce that names a key begins. Without it such a nonce would look like a random one, and a token that is
bound by its nonce would pass for unbound as soon as its proof is left out."""
AUDIENCE_PREFIX: Final = "arcbridge:key:"
"""How an audience that names a key begins."""
MAX_KEY_FILE: Final = 4096
"""Bytes of a key that is read from a file."""
_THUMBPRINT: Final = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)
"""A SHA-256 in base64url."""
_OTHER_CONFIRMATIONS: Final = frozenset({"jwk", "jwe", "jku", "x5t#S256"})
"""Members of `cnf` that name a key by themselves (RFC 7800 §3, RFC 8705 §3.1)."""
_MAX_KEY_AUDIENCES: Final = 16
"""Audiences of one token that name a key; the others beyond it name none."""


_SENTENCES: Final = {
    "unbound": '{place} takes only tokens that are bound to a key (proof = "required"), and this one is not: update '
    "arcbridge, log in again, and see docs/security.md for how your issuer can bind tokens",
    "off": 'the token is bound to a key, and {place} checks no proofs (proof = "off"): use a token that is not bound, '
    'or ask the operator to set proof = "if-bound"',
    "cnf": "the token is bound to a key by its issuer in a way that is not known here: have tokens issued that are "
    "bound by DPoP (cnf.jkt) or by a thumbprint (cnf.kid), or not bound",
    "missing": "the token is bound to a key and came without a proof of it: log in again on this machine, or update "
    "arcbridge here; a token that was copied from elsewhere is of no use without its key",
    "key": "the token is bound to another key than this machine's: log in again on this machine; a token that was "
    "copied from elsewhere is of no use without its key",
    "size": "the proof of the token's key is too long: update arcbridge at both ends",
    "shape": "the proof of the token's key is malformed: update arcbridge at both ends",
    "ath": "the proof of the token's key belongs to another token: log in again",
    "peer": "the proof of the token's key was made for another end than {place}: another party may be in between, or "
    "took it elsewhere; tell the operator",
    "iat": "the proof of the token's key is not of now: the clocks of this machine and of {place} differ by more than "
    f"{IAT_WINDOW / 60:.0f} minutes; set the wrong one",
    "signature": "the proof of the token's key is not signed with that key: log in again",
}
"""What each refusal says to the user, who may be at another machine than the end that refused."""
REFUSALS: Final = tuple(_SENTENCES)
"""Why a good token is refused for want of a good proof, as the metrics have it."""


def explain(rule: RefusalRule, place: str) -> str:
    """Return the sentence for a rule `proof.…`; `place` is the end that refused, as in "the relay"."""
    return _SENTENCES[rule.check].format(place=place)


class ProofRefused(TokenRefused):
    """A good token came without a good proof of the key it is bound to."""

    def __init__(self, rule: RefusalRule, place: str) -> None:
        super().__init__(rule, explain(rule, place))


class BindingKind(StrEnum):
    """By what a token is bound to a key; the values are those of the audit log and of the metric."""

    NONE = "none"
    CNF_JKT = "cnf.jkt"
    """By the issuer (RFC 7800, RFC 9449 §6.1): the strongest, because the issuer saw a proof itself."""
    CNF_KID = "cnf.kid"
    """By the issuer, which did not see a proof: it got the key's thumbprint with the request for the token, and put
    it into `cnf` as `kid` (RFC 7800 §3.4). Entra ID's proof-of-possession tokens have it."""
    NONCE = "nonce"
    AUDIENCE = "audience"
    UNKNOWN = "cnf"
    """By the issuer, in a way that is not known here: no proof is good for it."""


class ProofPolicy(StrEnum):
    """The setting `proof` of agents and relays (docs/protocol.md §6)."""

    REQUIRED = "required"
    """Tokens must be bound, and come with their proof."""
    IF_BOUND = "if-bound"
    """Bound tokens must come with their proof; others are bearer tokens."""
    OFF = "off"
    """No proof is looked at: others are bearer tokens, and bound ones are refused."""


def policy_of(setting: str) -> ProofPolicy:
    """Read the setting `proof`. Raises ConfigError."""
    try:
        return ProofPolicy(setting)
    except ValueError:
        known = ", ".join(f'"{policy}"' for policy in ProofPolicy)
        raise ConfigError(f"proof: one of {known} is needed") from None


class Binding(NamedTuple):
    """How a token is bound: by what, and to which keys (thumbprints of RFC 7638; any one of them is enough)."""

    kind: BindingKind = BindingKind.NONE
    thumbprints: tuple[str, ...] = ()

    def names(self, thumbprint: str) -> bool:
        """Return whether the token is bound to the key with this thumbprint."""
        if self.kind is BindingKind.NONCE:
            thumbprint = _nonce_of(thumbprint)
        wanted = thumbprint.encode()
        return any(hmac.compare_digest(one.encode(), wanted) for one in self.thumbprints)


UNBOUND: Final = Binding()


def binding(claims: Mapping[str, Any]) -> Binding:
    """Return how a token of these claims is bound to a key: by the first of `cnf`, `nonce` and `aud` that names one.

    Whatever names a key in a way that is malformed, or not known here, binds to no key at all: such a token is refused
    and does not pass for unbound.
    """
    confirmation = claims.get("cnf")
    if confirmation is not None:
        return _confirmed(confirmation) if isinstance(confirmation, Mapping) else Binding(BindingKind.UNKNOWN)
    nonce = claims.get("nonce")
    if isinstance(nonce, str) and nonce.startswith(NONCE_PREFIX):
        well_formed = _THUMBPRINT.fullmatch(nonce.removeprefix(NONCE_PREFIX))
        return Binding(BindingKind.NONCE, (nonce,) if well_formed else ())
    audience = claims.get("aud")
    audiences = audience if isinstance(audience, list) else [audience]
    named = [key_of(one) for one in audiences if isinstance(one, str) and one.startswith(AUDIENCE_PREFIX)]
    if named:
        keys = tuple(one for one in named[:_MAX_KEY_AUDIENCES] if _THUMBPRINT.fullmatch(one))
        return Binding(BindingKind.AUDIENCE, keys)
    return UNBOUND


def _confirmed(confirmation: Mapping[str, Any]) -> Binding:
    """Return to which key a `cnf` (RFC 7800) binds. `kid` counts as the thumbprint of RFC 7638 that Entra ID's clients
    give there, and only where no other member names a key, of which `kid` would be the label."""
    if "jkt" in confirmation:
        kind, thumbprint = BindingKind.CNF_JKT, confirmation["jkt"]
    elif "kid" in confirmation and not _OTHER_CONFIRMATIONS & confirmation.keys():
        kind, thumbprint = BindingKind.CNF_KID, confirmation["kid"]
    else:
        return Binding(BindingKind.UNKNOWN)
    if isinstance(thumbprint, str) and _THUMBPRINT.fullmatch(thumbprint):
        return Binding(kind, (thumbprint,))
    return Binding(BindingKind.UNKNOWN)


def key_of(audience: str) -> str:
    """Return the thumbprint of the key that an audience names; empty where it names none."""
    return audience.removeprefix(AUDIENCE_PREFIX).partition("@")[0] if audience.startswith(AUDIENCE_PREFIX) else ""


def place_of(audience: str) -> str:
    """Return the audience proper of one that also names a key, `arcbridge:key:THUMBPRINT@AUDIENCE`; otherwise itself.

    An issuer that gives one audience only, as GitHub Actions does, says both in it.
    """
    if audience.startswith(AUDIENCE_PREFIX):
        _, at, place = audience.partition("@")
        return place if at else audience
    return audience


def _nonce_of(thumbprint: str) -> str:
    return NONCE_PREFIX + _encode(hashlib.sha256(f"arcbridge-proof:{thumbprint}".encode()).digest())


class ProofKey:
    """A P-256 key of this client. Its text form is a private JWK (RFC 7518 §6.2.2)."""

    __slots__ = ("_d", "_header", "_private", "_x", "_y", "thumbprint")

    def __init__(self, x: str, y: str, d: str) -> None:
        """`x`, `y`, `d`: members of the JWK; whether they belong together is checked when the key is first used."""
        self._x, self._y, self._d = x, y, d
        self.thumbprint = thumbprint_of(x, y)
        """RFC 7638, SHA-256, base64url."""
        self._private: PrivateKey | None = None
        self._header: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"ProofKey({self.thumbprint})"

    @classmethod
    def generate(cls) -> ProofKey:
        """Make a new key."""
        from arcbridge.identity.p256 import PrivateKey

        private = PrivateKey.generate()
        key = cls(*(_encode(number) for number in private.numbers()))
        key._private = private
        return key

    @classmethod
    def from_jwk(cls, data: bytes) -> ProofKey:
        """Read what `to_jwk` wrote. Raises StateError, without a byte of it."""
        try:
            document = parse_object(data) if len(data) <= MAX_KEY_FILE else {}
            if document.get("kty") == "EC" and document.get("crv") == "P-256":
                x, y, d = (document.get(name) for name in ("x", "y", "d"))
                if isinstance(x, str) and isinstance(y, str) and isinstance(d, str):
                    for member in (x, y, d):
                        _decode(member, 32)
                    return cls(x, y, d)
        except ValueError:
            pass
        raise StateError("not a private JWK of a P-256 key")

    def to_jwk(self) -> bytes:
        """Return the private key: for a file with mode 0600, and nothing else."""
        return json.dumps({"kty": "EC", "crv": "P-256", "x": self._x, "y": self._y, "d": self._d}).encode()

    def public_jwk(self) -> dict[str, str]:
        """Return the public key, as it stands in the header of a proof."""
        return {"kty": "EC", "crv": "P-256", "x": self._x, "y": self._y}

    def req_cnf(self) -> str:
        """Return the parameter of a token request by which Entra ID binds an access token to this key (`cnf.kid`)."""
        return _encode(_dump({"kid": self.thumbprint}))

    def nonce(self) -> str:
        """Return the nonce (OpenID Connect Core §3.1.2.1) that binds an id token to this key."""
        return _nonce_of(self.thumbprint)

    def audience(self) -> str:
        """Return the audience that binds a workload's token to this key."""
        return AUDIENCE_PREFIX + self.thumbprint

    def sign_proof(self, token: str, peer_spki: bytes, pin: str, now: float) -> str:
        """Prove that `token` comes from the holder of this key.

        `peer_spki`: DER of the SubjectPublicKeyInfo of the certificate that the peer showed in this connection;
        `pin`: of the cluster (`pki.pins`), empty towards a relay; `now`: unix seconds.
        """
        return self._sign(TYPE, {"ath": token_hash(token), "peer": peer_hash(peer_spki), "pin": pin, "iat": int(now)})

    def dpop(self, method: str, url: str, now: float, nonce: str | None = None) -> str:
        """Return the value of a DPoP header (RFC 9449 §4.2) for a request. `url` is taken without query and fragment;
        `nonce`: what the server gave."""
        claims: dict[str, Any] = {
            "jti": _encode(os.urandom(16)),
            "htm": method,
            "htu": url.partition("#")[0].partition("?")[0],
            "iat": int(now),
        }
        if nonce is not None:
            claims["nonce"] = nonce
        return self._sign(DPOP_TYPE, claims)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _sign(self, kind: str, claims: dict[str, Any]) -> str:
        header = self._header.get(kind)
        if header is None:
            header = _encode(_dump({"typ": kind, "alg": "ES256", "jwk": self.public_jwk()}))
            self._header[kind] = header
        signed = f"{header}.{_encode(_dump(claims))}"
        return f"{signed}.{_encode(self._key().sign(signed.encode()))}"

    def _key(self) -> PrivateKey:
        if self._private is None:
            from arcbridge.identity.p256 import PrivateKey

            try:
                self._private = PrivateKey.load(*(_decode(member, 32) for member in (self._x, self._y, self._d)))
            except ValueError:
                # Not chained: the cause could quote the numbers.
                raise StateError("the key that this login is bound to is damaged; log in again") from None
        return self._private


class Peer(NamedTuple):
    """The end that checks a proof, as the proof has to name it."""

    spki: bytes
    """DER of the SubjectPublicKeyInfo of the certificate that this end showed in the connection."""
    pin: str = ""
    """The cluster's pin at an agent; empty at a relay."""
    other_pins: tuple[str, ...] = ()
    """Pins of that cluster's former CAs, or of its next one: ends learn of a rotation one after the other."""


NO_PEER: Final = Peer(b"")
"""An end that has shown no certificate; no proof is good for it, since none is made with this."""


class ProofChecker:
    """What one end demands of the tokens it is shown, and how many of each kind came."""

    def __init__(self, policy: ProofPolicy, place: str, *, clock: Callable[[], float] = time.time) -> None:
        """`place`: "the agent" or "the relay", for sentences; `clock`: unix seconds."""
        self.policy = policy
        self._place = place
        self._clock = clock
        self.taken = {kind.value: 0 for kind in BindingKind}
        """Tokens that were taken, by how they were bound."""
        self.refused = dict.fromkeys(REFUSALS, 0)
        """Tokens that were refused for want of a good proof, by why."""

    def check(self, bound: Binding, token: str, proof: str, peer: Peer) -> str:
        """Raise ProofRefused unless a verified token that is bound as `bound` says may be used with `proof`; count it.

        Returns the thumbprint of the key that was proved; empty for a token that is not bound, beside which a proof
        says nothing about the token's user and is not looked at.
        """
        proved = ""
        if self._needs_proof(bound):
            if not proof:
                self._refuse(RefusalRule.PROOF_MISSING)
            try:
                proved = check_proof(
                    proof,
                    token=token,
                    peer_spki=peer.spki,
                    pin=peer.pin,
                    other_pins=peer.other_pins,
                    now=self._clock(),
                    place=self._place,
                )
            except ProofRefused as error:
                self._refuse(error.rule)
            if not bound.names(proved):
                self._refuse(RefusalRule.PROOF_KEY)
        self.taken[bound.kind.value] += 1
        return proved

    def check_within(self, bound: Binding, proved: str) -> None:
        """Raise ProofRefused unless a verified token that a request carries may be used in a session whose own token
        came with a proof of the key `proved` (empty: with none)."""
        if self._needs_proof(bound) and not (proved and bound.names(proved)):
            self._refuse(RefusalRule.PROOF_KEY)

    def _needs_proof(self, bound: Binding) -> bool:
        """Return whether a token is good with its proof alone. Raises ProofRefused where no proof makes it good."""
        if bound.kind is BindingKind.NONE:
            if self.policy is ProofPolicy.REQUIRED:
                self._refuse(RefusalRule.PROOF_UNBOUND)
            return False
        if self.policy is ProofPolicy.OFF:
            self._refuse(RefusalRule.PROOF_OFF)
        if bound.kind is BindingKind.UNKNOWN:
            self._refuse(RefusalRule.PROOF_CNF)
        return True

    def _refuse(self, rule: RefusalRule) -> NoReturn:
        self.refused[rule.check] += 1
        raise ProofRefused(rule, self._place)


def check_proof(
    proof: str,
    *,
    token: str,
    peer_spki: bytes,
    pin: str,
    now: float,
    place: str = "this end",
    other_pins: tuple[str, ...] = (),
) -> str:
    """Check a proof in full and return the thumbprint of the key that made it. Raises ProofRefused.

    `place` names the end that checks, for the sentence about clocks.
    """
    if len(proof) > MAX_PROOF:
        raise ProofRefused(RefusalRule.PROOF_SIZE, place)
    parts = proof.split(".")
    try:
        if len(parts) != 3:
            raise ValueError("not three parts")
        header, claims = decode_object(parts[0]), decode_object(parts[1])
        signature = _decode(parts[2], 64)
        # No member beside these: a header that says more could mean more to another reader.
        if header.keys() != {"typ", "alg", "jwk"} or header["typ"] != TYPE or header["alg"] != "ES256":
            raise ValueError("another header")
        x, y = _public_point(header["jwk"])
        issued = claims.get("iat")
        if not isinstance(issued, int) or isinstance(issued, bool) or issued.bit_length() > 53:
            raise ValueError("no time")
    except ValueError:
        raise ProofRefused(RefusalRule.PROOF_SHAPE, place) from None
    if not _same(claims.get("ath"), token_hash(token)):
        raise ProofRefused(RefusalRule.PROOF_ATH, place)
    named = any(_same(claims.get("pin"), one) for one in (pin, *other_pins))
    if not (_same(claims.get("peer"), peer_hash(peer_spki)) and named):
        raise ProofRefused(RefusalRule.PROOF_PEER, place)
    if abs(now - issued) > IAT_WINDOW:
        raise ProofRefused(RefusalRule.PROOF_IAT, place)
    from arcbridge.identity.p256 import is_signed

    if not is_signed(x, y, signature, proof[: -len(parts[2]) - 1].encode()):
        raise ProofRefused(RefusalRule.PROOF_SIGNATURE, place)
    return thumbprint_of(header["jwk"]["x"], header["jwk"]["y"])


def decode_object(part: str) -> dict[str, Any]:
    """Return the JSON object that a part of a JWS in compact form holds: in the one spelling of base64url, with no name
    twice. Raises ValueError."""
    return parse_object(_decode(part))


def token_hash(token: str) -> str:
    """Return `ath` of RFC 9449 §4.2."""
    if not token.isascii():
        raise LocalProtocolError("a token is ASCII")
    return _encode(hashlib.sha256(token.encode("ascii")).digest())


def peer_hash(spki: bytes) -> str:
    """Return `peer` for the key of an end's certificate."""
    return _encode(hashlib.sha256(spki).digest())


def spki_of(certificate: bytes) -> bytes:
    """Return the SubjectPublicKeyInfo (DER) of a certificate (DER). Raises ValueError."""
    from arcbridge.identity import p256

    return p256.spki_of(certificate)


def thumbprint_of(x: str, y: str) -> str:
    """Return the thumbprint (RFC 7638 §3, SHA-256) of a P-256 key from its members of a JWK."""
    return _encode(hashlib.sha256(f'{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}'.encode()).digest())


def _public_point(jwk: object) -> tuple[bytes, bytes]:
    """Return the coordinates of a public P-256 JWK that has no other members, private ones above all. Raises
    ValueError."""
    if not isinstance(jwk, dict) or jwk.keys() != {"kty", "crv", "x", "y"}:
        raise ValueError("another JWK")
    x, y = jwk["x"], jwk["y"]
    if jwk["kty"] != "EC" or jwk["crv"] != "P-256" or not isinstance(x, str) or not isinstance(y, str):
        raise ValueError("another kind of key")
    return _decode(x, 32), _decode(y, 32)


def _same(value: object, wanted: str) -> bool:
    return isinstance(value, str) and hmac.compare_digest(value.encode(errors="replace"), wanted.encode())


_COMPACT: Final = json.JSONEncoder(separators=(",", ":"))


def _dump(value: dict[str, Any]) -> bytes:
    return _COMPACT.encode(value).encode()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _decode(text: str, size: int | None = None) -> bytes:
    """Read base64url as RFC 7515 §2 has it, in its one spelling, of `size` bytes. Raises ValueError."""
    # Lenient, because the comparison is exact: it refuses whatever the decoder passes over.
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if _encode(data) != text or (size is not None and len(data) != size):
        raise ValueError("another spelling or length")
    return data
