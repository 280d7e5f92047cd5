"""Judges renewals of an agent's certificate: each generation is renewed once (docs/threats.md#E11).

A renewal keeps the agent's key and counts the generation that its certificate states up by one. A thief with a copy of
the credential can renew it too, and then two renewals of one generation reach the registry, with two requests. This
module decides what a renewal is, from what the registry holds of the key; it stores nothing and knows no engine.

Pods that share a credential, and an agent whose answer was lost, repeat the *same* request, because it was stored
before it was sent: they get a certificate of the same generation. docs/decisions/0014-certificate-generations.md says
what follows for several relays, backups and older agents. Invariant: a certificate of a generation that was found to
be renewed twice, or of an earlier one, never counts again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from arcbridge.errors import EnrolmentRefused

MOST_KEYS: Final = 256
"""Keys of one cluster that are remembered; the one that was heard of last longest ago goes first. A key that is not
remembered renews like one of a cluster that enrolled elsewhere."""

OLDER_AGENT: Final = "-"
"""In the place of a request: an agent that does not store its request has sent it, and may send another."""

RENEW_AGAIN: Final = 600.0
"""Seconds in which an older agent, or a pod beside it, may renew a generation again."""


@dataclass(frozen=True, slots=True)
class KeyState:
    """What the registry holds of one key of a cluster's agents."""

    generation: int
    """Of the newest certificate; the first has 1."""
    request: str = ""
    """SHA-256 (hex) of the request that it was renewed with; empty: it was enrolled."""
    at: float = 0.0
    """When, unix seconds."""
    void: int = 0
    """Certificates up to this generation do not count; 0: all do."""


Keys = Mapping[str, KeyState]
"""By the hash of the key, `pki.enrolment.key_hash`."""


class ShownCertificate(NamedTuple):
    """What the certificate says with which a renewal comes."""

    key: str
    """The hash of its public key."""
    generation: int
    """0: it was issued before generations were counted, or by a relay that does not count them."""
    issued_at: float
    """Unix seconds, give or take two."""


class RenewedTwice(EnrolmentRefused):
    """Two renewals of one generation: the credential has a copy. Its cluster is revoked."""

    def __init__(self) -> None:
        super().__init__(
            "the agent's certificate was renewed twice with different requests, so there is a copy of its credential: "
            "the cluster is revoked, and the relay's operator has to restore it and to make a new join token"
        )


class CountedRenewal(NamedTuple):
    """What comes of a renewal."""

    keys: Keys
    """What is to be held from now on."""
    generation: int
    """Of the certificate to be issued; 0: none, the generation was renewed twice."""


def enrolled(keys: Keys, key: str, now: float, *, repeated: bool) -> Keys:
    """Return what is to be held once a join token was redeemed by `key`; `repeated`: because the answer was lost."""
    known = keys.get(key)
    if known is None:
        return _with(keys, key, KeyState(1, "", now))
    if repeated:
        return keys
    return _with(keys, key, replace(known, generation=max(known.generation, known.void) + 1, request="", at=now))


def renewed(keys: Keys, shown: ShownCertificate, request: str, now: float) -> CountedRenewal:
    """Judge a renewal by what is held; `request` is the SHA-256 of a stored request, or `OLDER_AGENT`.

    Raises `EnrolmentRefused` for a certificate that does not count.
    """
    known = keys.get(shown.key)
    check_generation(keys, shown.key, shown.generation)
    # Not known, or newer than what is known: another relay, whose registry is its own, has issued it, or this registry
    # is a backup. The CA's signature says that it is genuine.
    if known is None or shown.generation >= known.generation:
        void = 0 if known is None else known.void
        return _next(keys, shown, request, now, shown.generation + 1, void)
    if shown.generation == known.generation - 1:
        if request == known.request != OLDER_AGENT:
            return CountedRenewal(keys, known.generation)
        if known.request == OLDER_AGENT and abs(now - known.at) <= RENEW_AGAIN:
            return CountedRenewal(keys, known.generation)
    if shown.generation == 0 and shown.issued_at > known.at + 2:
        # A relay of this fleet that does not count yet has issued it since.
        return _next(keys, shown, request, now, known.generation + 1, known.void)
    return CountedRenewal(_with(keys, shown.key, replace(known, void=known.generation)), 0)


def check_generation(keys: Keys, key: str, generation: int) -> None:
    """Raise `EnrolmentRefused` for a certificate that does not count any more."""
    known = keys.get(key)
    if known is not None and 0 < known.void >= generation:
        raise EnrolmentRefused(
            "the agent's certificate is void, because it was renewed twice and so has a copy: empty the agent's state "
            "and enrol with a new join token"
        )


def to_json(keys: Keys) -> dict[str, list[Any]]:
    """Return the state as the engines store it."""
    return {key: [state.generation, state.request, state.at, state.void] for key, state in keys.items()}


def from_json(stored: Mapping[str, Any]) -> dict[str, KeyState]:
    """Read what `to_json` has made."""
    return {key: KeyState(*values) for key, values in stored.items()}


def _next(keys: Keys, shown: ShownCertificate, request: str, now: float, generation: int, void: int) -> CountedRenewal:
    return CountedRenewal(_with(keys, shown.key, KeyState(generation, request, now, void)), generation)


def _with(keys: Keys, key: str, state: KeyState) -> Keys:
    found = {**keys, key: state}
    while len(found) > MOST_KEYS:
        # A void key is kept while there is another one to drop: the certificate that it refuses may still be valid.
        del found[min((one for one in found if one != key), key=lambda one: (found[one].void > 0, found[one].at))]
    return found
