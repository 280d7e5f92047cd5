"""Why another end took no token, told from its sentence, which is searched and never shown.

Relay and agent say a class (`identity.refusal`): they are of one program with this client, so their sentences are known
here. What a user reads are this module's words. A sentence that is not known gives no reason.
"""

from __future__ import annotations

from enum import StrEnum

from arcbridge.errors import Unauthenticated


class Reason(StrEnum):
    """A class of refusals."""

    EXPIRED = "expired"
    NOT_YET = "not_yet"
    AUDIENCE = "audience"
    OTHER_AUDIENCE = "other_audience"
    ISSUER = "issuer"
    SIGNATURE = "signature"
    CLAIM = "claim"
    LIFETIME = "lifetime"
    PROOF = "proof"
    UNKNOWN = ""


_KNOWN: tuple[tuple[str, Reason], ...] = (
    ("the token has expired", Reason.EXPIRED),
    ("the token is not valid yet", Reason.NOT_YET),
    ("the token is not meant for this place", Reason.AUDIENCE),
    ("the token is also meant for another place", Reason.OTHER_AUDIENCE),
    ("the token comes from an issuer that is not accepted here", Reason.ISSUER),
    ("the token is signed with a key that its issuer does not publish", Reason.SIGNATURE),
    ("the token's signature is not valid", Reason.SIGNATURE),
    ("the token is valid for more than", Reason.LIFETIME),
    ("does not have a claim that this place requires", Reason.CLAIM),
    ("does not hold for this token", Reason.CLAIM),
    ("the e-mail address in the token is not verified", Reason.CLAIM),
    ("the token has no user name that this place can use", Reason.CLAIM),
    ("the token has too many groups", Reason.CLAIM),
)
_SENTENCES = {
    Reason.EXPIRED: "it has expired there; log in again, or compare the clocks",
    Reason.NOT_YET: "it is not valid yet there; compare the clocks",
    Reason.AUDIENCE: "it is for another audience; have one issued for {place} (login.audience, "
    "login.cluster_audience), and see whether the two token files are swapped",
    Reason.OTHER_AUDIENCE: "it is good at another place as well, which could use it there; have one issued for {place} "
    "alone",
    Reason.ISSUER: "it comes from an issuer that {place} does not take; log in at the organisation's own",
    Reason.SIGNATURE: "its signature is not of its issuer; log in again",
    Reason.LIFETIME: "it is valid for longer than {place} allows; have a shorter one issued",
    Reason.CLAIM: "it lacks something that {place} requires of its users (a claim, a verified e-mail address, a "
    "group); ask the operator",
}


class TokenNotTaken(Unauthenticated):
    """A relay or an agent did not take the token that it was shown; `refusal` is what could be told."""

    def __init__(self, message: str, refusal: Reason) -> None:
        super().__init__(message)
        self.refusal = refusal


def reason_in(said: str) -> Reason:
    """Return the class that a refusal's sentence is of."""
    return next((reason for text, reason in _KNOWN if text in said), Reason.UNKNOWN)


def explain(reason: Reason, place: str) -> str:
    """Return what follows "does not accept the token: "; `place` is the end that refused, as in "the relay"."""
    return _SENTENCES.get(reason, "").format(place=place)
