"""Decides whether a cluster's CA is the one it should be: no token goes to a cluster before that.

In this order: the pin that was given, the organisation's pins file, what this user trusted before, the user's answer
at the terminal, `--trust-first-use`. A pin that is known and differs is an error that names both; it is never replaced.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from arcbridge.errors import ArcbridgeError, ConfigError, PinMismatch, StateError
from arcbridge.pki.pins import PinStore, check_pin, mismatch_message
from arcbridge.pki.succession import Succession, SuccessionStore
from arcbridge.wire.records import JoinReply

log = structlog.get_logger("arcbridge.client")

Ask = Callable[[str, str], Awaitable[bool]]
"""Shows a cluster's name and pin to the user; returns whether the user trusts it."""


class ClusterTrust:
    """The rule for the clusters of the relays in `relays` (`host:port`), which are the same at each of them."""

    def __init__(
        self,
        *,
        pin: str = "",
        pins_file: Path | None = None,
        remembered: PinStore | None = None,
        first_use: bool = False,
        ask: Ask | None = None,
        relays: tuple[str, ...] = (),
        successions: SuccessionStore | None = None,
    ) -> None:
        """`remembered`: None: what the user trusts counts for this object alone, which is then for one cluster.
        `successions`: where it is kept which CAs followed a cluster's; None: nowhere."""
        self._successions = successions
        self._kept: tuple[str, Succession] | None = None
        """The cluster and its CAs that are known to be kept."""
        try:
            self._pin = check_pin(pin) if pin else ""
        except ConfigError as error:
            raise ConfigError(f"cluster_ca_pin: {error.message}") from error
        if pins_file is not None and not pins_file.is_file():
            # Absent must not mean "no pins": that would be trust on first use by mistake.
            raise StateError(f"pins_file: {pins_file} does not exist")
        self._remembered = remembered
        self._stores = [PinStore(pins_file, relay=relay) for relay in relays or ("",)] if pins_file is not None else []
        if remembered is not None:
            # What was remembered when there was another relay alone holds when there are several.
            others = [PinStore(remembered.path, relay=relay) for relay in relays if relay != remembered.relay]
            self._stores += [remembered, *others]
        self._first_use = first_use
        self._ask = ask

    def known(self, cluster: str) -> str:
        """Return the pin that the cluster must have; empty when nothing is known. Raises StateError."""
        return self._found(cluster)[0]

    def _found(self, cluster: str) -> tuple[str, str]:
        """Return the pin, and what to do once another one is right."""
        if self._pin:
            return self._pin, "give the new one (--cluster-ca-pin, ARCBRIDGE_CLUSTER_CA_PIN)"
        for store in self._stores:
            if pin := store.get(cluster):
                own = self._remembered is not None and store.path == self._remembered.path
                return pin, f"run `arcbridge trust {cluster} --renew`" if own else f"change it in {store.path}"
        return "", ""

    def check(self, cluster: str, found: Succession) -> Succession | None:
        """Return the CAs of the cluster that are trusted, of what a relay says; None when no pin is known.

        `found`: the CA that the relay states, with those that followed it. Raises PinMismatch for another CA than the
        known one, or than one that followed it.
        """
        pin, then = self._found(cluster)
        if not pin:
            return None
        known = self._known_succession(pin)
        followed = known.follow(found, f"the CA of cluster {cluster!r}", then=then)
        if followed == known:
            self._kept = cluster, known
        else:
            self.keep(cluster, followed)
        return followed

    def keep(self, cluster: str, followed: Succession) -> None:
        """Keep which CAs followed the known one; where that is not possible, the relay says it at the next join."""
        if self._successions is None or self._kept == (cluster, followed) or not (pin := self.known(cluster)):
            return
        try:
            if followed != self._known_succession(pin):
                self._successions.keep(pin, followed)
            self._kept = cluster, followed
        except ArcbridgeError as error:
            log.warning("cluster CA not kept", cluster=cluster, reason=error.message)

    def _known_succession(self, pin: str) -> Succession:
        return Succession.of_pin(pin) if self._successions is None else self._successions.known(pin)

    def contradiction(self, cluster: str, pin: str) -> str:
        """Say what is wrong with a pin that a relay states for a cluster; empty where no other one is kept here.

        The pin of the settings is left aside: it is for the one cluster that a command is about. Raises StateError.
        """
        kept = next((known for store in self._stores if (known := store.get(cluster))), "")
        try:
            if not kept or check_pin(pin) in self._known_succession(kept).pins:
                return ""
        except ConfigError:
            return f"the relay states a pin of cluster {cluster!r} that is none; do not use it"
        return f"the relay states another pin: {mismatch_message(f'the CA of cluster {cluster!r}', kept, pin)}"

    @property
    def asks(self) -> bool:
        """Whether the user decides at first contact, which takes longer than an agent waits."""
        return self._ask is not None and not self._first_use

    async def first_time(self, cluster: str, found: Succession) -> Succession:
        """Decide about a cluster without a known pin, by the oldest CA that counts, and remember it; return the CAs
        that are trusted. Raises PinMismatch when refused."""
        pin = found.pins[found.since]
        if self.asks and self._ask is not None:
            if not await self._ask(cluster, pin):
                raise PinMismatch(f"cluster {cluster!r} was not trusted (pin {pin}); ask its owner for the pin")
        elif self._first_use:
            # The one hole of trust on first use: a hostile relay at this very moment (docs/security.md).
            log.warning("trusting a cluster at first use", cluster=cluster, pin=pin)
        else:
            raise PinMismatch(
                f"cluster {cluster!r} is not known here (its pin would be {pin}); compare that with its owner's and "
                "give --cluster-ca-pin, or accept it unseen with --trust-first-use"
            )
        if self._remembered is not None:
            self._remembered.remember(cluster, pin)
        else:
            self._pin = pin
        return Succession.of_pin(pin).follow(found, f"the CA of cluster {cluster!r}")


def stated_cas(reply: JoinReply) -> Succession:
    """Return the cluster's CA as a relay states it, and those that followed it; none where they are no succession.

    Raises ConfigError where the CA is not one certificate.
    """
    stated = Succession.of_ca(reply.cluster_ca)
    if not reply.cluster_cas:
        return stated
    try:
        found = Succession.read(reply.cluster_cas)
    except ConfigError as error:
        log.warning("cluster CA not followed", reason=error.message)
        return stated
    # The relay does not vouch for when a CA stops to count: the agent says that itself, where it is known.
    return found.from_pin(stated.pins[0]) if stated.pins[0] in found.pins else stated
