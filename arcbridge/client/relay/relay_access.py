"""Knows one relay: its address, and the CA by which its certificate is verified (a file, a pin, or the system's CAs).

It opens no connection to the relay but the one that fetches a pinned CA. Invariant: with a file or a pin no other CA
vouches for the relay, and a CA that contradicts the pin is an error, also when both are given.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import structlog

from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.net.address import parse_address
from arcbridge.net.system_trust import read_cas
from arcbridge.net.tls import RelayTrust, fetch_relay_cas, outer_client_context
from arcbridge.pki.pins import check_pin, pin_of, require_pin
from arcbridge.pki.succession import Succession, SuccessionStore

log = structlog.get_logger("arcbridge.client")


class RelayAccess:
    """One relay. TLS contexts are made once; a pinned CA is fetched at first use."""

    def __init__(
        self, relay: str, *, ca_file: Path | None = None, ca_pin: str = "", successions: SuccessionStore | None = None
    ) -> None:
        """`successions`: where it is kept which CAs followed that one; None: nowhere."""
        self.address = parse_address(relay)
        self._ca_file = ca_file
        try:
            self._pin = check_pin(ca_pin) if ca_pin else ""
        except ConfigError as error:
            raise ConfigError(f"relay_ca_pin: {error.message}") from error
        self._successions = successions
        self._root = ""
        """Pin of the CA that was given."""
        self.cas: Succession | None = None
        """The relay's CAs as far as they are known; None where another CA vouches for it."""
        self._trust: RelayTrust | None = None
        self._doubted = False
        """Whether a trust did not hold."""
        self._contexts: dict[str, ssl.SSLContext] = {}
        self.offered_client = ""
        """The clients that the relay offers, by its last answer (`client.relay.update_notice`)."""

    def __repr__(self) -> str:
        return f"<RelayAccess {self.address}>"

    async def context(self, alpn: str) -> ssl.SSLContext:
        """Return a TLS context for one protocol of the relay.

        Raises PinMismatch which names both pins, Unreachable when a pinned CA cannot be fetched, StateError.
        """
        if alpn not in self._contexts:
            self._contexts[alpn] = outer_client_context(await self.trust(), alpn)
        return self._contexts[alpn]

    async def trust(self) -> RelayTrust:
        """Return the CA by which the relay is known, found once. Raises as `context` does."""
        if self._trust is None:
            self._trust = await self._find_trust()
        return self._trust

    def forget(self) -> None:
        """Forget a trust that did not hold: a pinned CA, whose certificate may have been renewed, or which may have
        ended, is fetched again, and those that followed it."""
        self._trust, self._doubted = None, True
        self._contexts.clear()

    def follow(self, announced: str) -> None:
        """Take over what the relay announces of its CAs, on a connection that was verified; `announced`: as
        `Succession.text`, empty for nothing. What they have not signed changes nothing."""
        if not announced or self.cas is None or announced == self.cas.text:
            return
        try:
            followed = self.cas.follow(Succession.read(announced), f"the CA of {self.address.url}", retire=True)
            if followed != self.cas:
                self.cas, self._trust = followed, RelayTrust(followed.trusted)
                self._contexts.clear()
                self._keep(followed)
        except ArcbridgeError as error:
            log.warning("relay CA not followed", relay=str(self.address), reason=error.message)

    @property
    def followed_ca(self) -> str:
        """Pin of the newest of the relay's CAs that is kept here; empty while none has followed the one that was
        given."""
        return self.cas.pins[-1] if self.cas is not None and len(self.cas.pins) > 1 else ""

    def _keep(self, known: Succession) -> None:
        if self._successions is not None:
            self._successions.keep(self._root, known)

    async def _find_trust(self) -> RelayTrust:
        ca_pem = ""
        if self._ca_file is not None:
            ca_pem = read_cas(self._ca_file, "relay_ca_file")
            if self._pin:
                require_pin(f"the CA in {self._ca_file}", self._pin, ca_pem)
            try:
                self._root = pin_of(ca_pem)
            except ConfigError:
                return RelayTrust(ca_pem)  # a file of several CAs has no pin, and no successor
        elif self._pin:
            self._root = self._pin
        else:
            return RelayTrust()
        known = Succession.of_pin(self._root) if self._successions is None else self._successions.known(self._root)
        if len(known.pins) == 1 and ca_pem:
            known = Succession.of_ca(ca_pem)
        if self._pin and (self._doubted or not known.trusted):
            found = await fetch_relay_cas(self.address, known.pins[-1])
            known = known.follow(found, f"the CA of {self.address.url}")
            self._keep(known)
        self.cas = known
        return RelayTrust(known.trusted)
