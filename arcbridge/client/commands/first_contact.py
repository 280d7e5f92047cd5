"""The first contact with a relay: by which CA it is known, and where it says that one logs in.

Nothing is decided here. `ask_relay` says what the relay shows and whether anything vouches for it; `check_known` holds
it against what the user trusted before (`client.relay.relay_profile`). Invariant: until the user has agreed, nothing
that is secret is sent, and nothing that a relay says is kept.
"""

from __future__ import annotations

import contextlib
import ssl
from dataclasses import dataclass, field
from http import HTTPStatus

from arcbridge.client.credentials.login_question import shown
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relay_profile import LoginOffer, RelayProfile, short_url
from arcbridge.errors import ConfigError, ConnectionLost, PinMismatch, Unreachable
from arcbridge.net.address import Address, parse_address
from arcbridge.net.tls import (
    ALPN_HTTP,
    RelayTrust,
    fetch_relay_cas,
    fetch_unverified_ca,
    get_once,
    outer_client_context,
)
from arcbridge.pki.pins import pin_of, require_pin
from arcbridge.pki.succession import Succession, SuccessionStore
from arcbridge.settings.choices import DEVICE, PROGRAM
from arcbridge.untrusted_json import read_json


@dataclass(frozen=True, slots=True)
class Contact:
    """What one relay showed."""

    address: Address
    vouched_for: bool
    """Whether the CA is the system's, or one that the user has given; False: only the relay itself says so."""
    ca_pem: str = field(default="", repr=False)
    """The CA under which its certificate was verified, or the one that it followed and that the user knows; empty: the
    system's."""
    offer: LoginOffer | None = None
    """Where the relay says that one logs in; None: it does not say."""
    cas: Succession | None = None
    """That CA and those that followed it, as far as it was asked for; to be kept once the user has agreed."""

    @property
    def ca_pin(self) -> str:
        return pin_of(self.ca_pem) if self.ca_pem else ""


async def ask_relay(access: RelayAccess, *, given: bool) -> Contact:
    """Ask a relay that is not known yet. `given`: the user named its CA or its pin.

    Raises PinMismatch for another CA than the given one, Unreachable, ConnectionLost, ConfigError, StateError.
    """
    address = access.address
    if given:
        trust = await access.trust()
        try:
            offer = await _offer(address, trust)
            given_pem = access.cas.cas[0] if access.cas is not None else trust.ca_pem or ""
            return Contact(address, True, given_pem, offer, access.cas)
        except ssl.SSLCertVerificationError as error:
            raise PinMismatch(
                f"the certificate of {short_url(address)} is not of the CA that was given "
                f"({error.verify_message}); check the relay's address and --relay-ca-file or --relay-ca-pin"
            ) from error
    try:
        return Contact(address, True, "", await _offer(address, RelayTrust()))
    except ssl.SSLCertVerificationError:
        pass  # no public CA vouches for it, so it may have a CA of its own
    pem = await fetch_unverified_ca(address)
    pem = require_pin("the relay's CA", pin_of(pem), pem)
    try:
        return Contact(address, False, pem, await _offer(address, RelayTrust(pem)))
    except ssl.SSLCertVerificationError as error:
        raise Unreachable(
            f"the certificate of {short_url(address)} is neither of a public CA nor of the relay's own "
            f"({error.verify_message}); check the address"
        ) from error


async def ask_known(profile: RelayProfile, successions: SuccessionStore | None = None) -> Contact:
    """Ask the relays of a profile, of which any serves, by the CA that was trusted, or by one that is kept in
    `successions` as its successor; see `check_known`.

    The CA of the contact has the pin that was trusted, whichever of its successors vouches for the relay today. Raises
    PinMismatch, which names both pins, where a relay has another CA; Unreachable or ConnectionLost where none answers.
    """
    trust = profile.ca_pem
    if profile.ca_pin and successions is not None and len((known := successions.known(profile.ca_pin)).pins) > 1:
        trust = known.trusted
    *others, last = [parse_address(relay) for relay in profile.relays]
    for address in others:
        with contextlib.suppress(Unreachable, ConnectionLost):
            return await _ask_known(address, profile, trust)
    return await _ask_known(last, profile, trust)


async def _ask_known(address: Address, profile: RelayProfile, ca_pem: str) -> Contact:
    renew = f"ask its operator, and run `arcbridge login --renew-trust {profile.url}` when that is right"
    try:
        return Contact(address, True, profile.ca_pem, await _offer(address, RelayTrust(ca_pem or None)))
    except ssl.SSLCertVerificationError as error:
        if not profile.ca_pin:
            raise PinMismatch(
                f"the certificate of {short_url(address)} is not of a public CA any more ({error.verify_message}): "
                f"another party may be in between; {renew}"
            ) from error
        try:
            found = await fetch_relay_cas(address, profile.ca_pin)
        except PinMismatch as mismatch:
            raise PinMismatch(f"{mismatch.message}; {renew}") from error
    # The CA has the key that was trusted, in a new certificate; or it has ended, and others followed it.
    try:
        return Contact(address, True, found.cas[0], await _offer(address, RelayTrust(found.trusted)), found)
    except ssl.SSLCertVerificationError as error:
        raise PinMismatch(
            f"the certificate of {short_url(address)} is not of its CA ({error.verify_message}): another party may be "
            f"in between; {renew}"
        ) from error


def check_known(profile: RelayProfile, contact: Contact) -> None:
    """Raise `PinMismatch` where the relay names another login than the one that the user trusted.

    A relay that names none any more changes nothing: what was trusted goes on to count.
    """
    if contact.offer is None or not profile.from_relay:
        return
    before, now = profile.login, contact.offer
    changed = before.differs(now)
    if before.settings["dpop"] and "dpop" in changed:
        changed.remove("dpop")  # the kept setting binds tokens and stays, so a relay cannot weaken it
    changes = [f"{name}: {shown(before.settings[name])} → {shown(now.settings[name])}" for name in changed]
    if now.only_grant == DEVICE and profile.grant not in (DEVICE, PROGRAM):
        changes.append(f"grant_type: {profile.grant} → {DEVICE}")
    if changes:
        raise PinMismatch(
            f"{profile.url} now names another login than the one that you trusted ({'; '.join(changes)}). Another "
            f"server may answer for the relay; ask its operator, and run `arcbridge login --renew-trust {profile.url}` "
            "when that is right"
        )


async def _offer(address: Address, trust: RelayTrust) -> LoginOffer | None:
    """Ask the relay what it says about logins. Raises `ssl.SSLCertVerificationError` where `trust` does not know it."""
    context = outer_client_context(trust, ALPN_HTTP)
    status, _, body = await get_once(address, "/v1/login", context)
    if status == HTTPStatus.NOT_FOUND:
        return None  # it has no [login], or is older than this path
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        raise Unreachable(f"{short_url(address)} has too many requests from here: wait a minute and try again")
    if status != HTTPStatus.OK:
        raise Unreachable(f"{short_url(address)} answered with status {status}: is this an arcbridge relay?")
    try:
        return LoginOffer.read_from_relay(read_json(body))
    except ValueError as error:
        raise Unreachable(f"{short_url(address)} did not answer with JSON: is this an arcbridge relay?") from error
    except ConfigError as error:
        raise Unreachable(
            f"what {short_url(address)} says about logins cannot be used: {error.message}; tell the relay's operator"
        ) from error
