"""Enrols the agent, and renews its certificate.

At the first start, in this order (docs/threats.md#E2, docs/threats.md#E3):

1. The store is read. Without a cluster CA in it one is made, with the agent's key, and stored at once, compare-and-set:
   of several pods one wins, the others adopt. So the CA that clients pin exists once, and every pod has the same key.
2. The join token, the request over that key and the CA go to a relay. The answer may get lost: the same key may redeem
   the same token again for ten minutes, by this pod or by its siblings.
3. The certificate is stored, again compare-and-set.

From then on the certificate is renewed over itself at two thirds of its life, spread by a tenth of that; the first pod
stores the new one and the others adopt it. The request is stored before it is sent, compare-and-set: pods that renew at
the same moment, and one whose answer was lost, send the same request, and a relay tells them from a thief by that
(docs/threats.md#E11). A certificate that has expired needs a new join token; the cluster's CA, and with it every
client's pin, stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import random
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from arcbridge.agent.relay_http import post
from arcbridge.errors import (
    ArcbridgeError,
    ConfigError,
    ConnectionLost,
    EnrolmentRefused,
    PinMismatch,
    StateError,
    Unreachable,
)
from arcbridge.net.address import Address
from arcbridge.net.backoff import Backoff
from arcbridge.net.tls import RelayTrust, fetch_relay_cas, outer_client_context
from arcbridge.pki import credentials as entries
from arcbridge.pki.authority import Authority, agent_ca_pin, certificate_validity, is_issued_by
from arcbridge.pki.credentials import AgentCredential, CredentialStore, Snapshot, VersionConflict, renew_at
from arcbridge.pki.enrolment import make_csr, make_key
from arcbridge.pki.names import check_cluster_name
from arcbridge.pki.pins import check_pin, pin_of, same_pin
from arcbridge.pki.rotation import Rotation
from arcbridge.pki.succession import Succession
from arcbridge.settings.named_files import is_there
from arcbridge.wire.records import CaSuccession

LOOK_AGAIN = 300.0
"""Seconds between two reads of the store, for a certificate that a sibling has renewed."""
SUPERSEDED_SPREAD = 10.0
"""Seconds within which agents renew a certificate of the relay's former CA, each at a time of its own; the relay tells
them of it one after the other."""
RENEW_AGAIN = 60.0
"""Seconds until such a renewal is tried again: another relay of the list may not have taken that step yet."""
REFUSED_WAIT = 60.0
"""Seconds after a refusal: a revoked cluster may be restored, which frequent requests do not hasten."""
REFUSED_AMONG = 15
"""Seconds at least where some relays refused and the rest did not answer."""
CONFLICTS = 20
"""Rounds of compare-and-set before giving up: so many writers are never active for long."""

TOO_MANY_WRITERS = "the agent's state is being written by others all the time"
log = structlog.get_logger("arcbridge.agent")


class CredentialKeeper:
    """The credential of one agent process: `start()` once, then `run()` as a task; `current` at any time.

    `relay_ca_file` replaces the stored relay CA where it is set; `relay_ca_pin` is checked against either.
    """

    def __init__(
        self,
        store: CredentialStore,
        relays: Sequence[Address],
        *,
        relay_ca_pin: str = "",
        relay_ca_file: Path | None = None,
        join_token_file: Path | None = None,
        clock: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._relays = tuple(relays)
        self._pin = check_pin(relay_ca_pin) if relay_ca_pin else ""
        self._ca_file = relay_ca_file
        self._token_file = join_token_file
        self._clock = clock
        self._jitter = jitter
        self._credential: AgentCredential | None = None
        self._stored: AgentCredential | None = None
        """What the store held when it was read last, where that was adopted."""
        self.renewals = 0
        self.failures = 0
        self.changed: Callable[[], None] = lambda: None
        """Called when what relays are told of this agent's CAs has changed."""
        self._wake = asyncio.Event()
        self._asked_again = -math.inf
        """When a certificate of the relay's present CA was asked for, unix seconds."""
        self.last_failure = ""
        """Why the agent could not enrol the last time; empty once it has, and before it has tried."""

    @property
    def current(self) -> AgentCredential:
        """The credential in use; raises StateError before `start()` is done."""
        if self._credential is None:
            raise StateError("the agent has not enrolled yet")
        return self._credential

    @property
    def enrolled(self) -> bool:
        """Whether there is a credential."""
        return self._credential is not None

    @property
    def now(self) -> float:
        """Unix seconds, by the clock that judges the certificate."""
        return self._clock()

    @property
    def trust(self) -> RelayTrust:
        """How the relay is verified."""
        return RelayTrust(self.current.relay_trust_pem)

    @property
    def known_relay_ca(self) -> str:
        """Pin of the newest of the relay's CAs that is known; empty where a file names several CAs, and the relay has
        announced none."""
        known = self.current.issuers if self.enrolled else None
        return known.pins[-1] if known is not None else ""

    @property
    def certificate_ca(self) -> str:
        """Pin of the relay's CA that has issued the certificate; empty where that is not known."""
        return _issuer_pin(self.current) if self.enrolled else ""

    @property
    def known_cluster_ca(self) -> str:
        """Pin of the newest of the cluster's CAs that this agent has read."""
        return _newest_cluster_ca(self.current) if self.enrolled else ""

    @property
    def announcement(self) -> CaSuccession | None:
        """What relays are told of the cluster's CAs; None while there was no rotation."""
        rotation = self.current.rotation if self.enrolled else None
        if rotation is None or not rotation.succession:
            return None
        return CaSuccession(rotation.succession, rotation.oldest)

    @property
    def stated_ca_pem(self) -> str:
        """The CA of the cluster that the certificate states, for relays that do not know the cluster yet."""
        credential = self.current
        if not credential.cluster_rotation:
            return credential.cluster_ca_certificate_pem
        stated = agent_ca_pin(ssl.PEM_cert_to_DER_cert(credential.certificate_pem))
        known = credential.rotation.list
        oldest = credential.rotation.oldest
        return known.cas[known.pins.index(stated)] if stated in known.pins and stated != pin_of(oldest) else oldest

    def look_soon(self) -> None:
        """Read the store now: another process has changed it."""
        self._wake.set()

    async def follow_relay(self, announced: str) -> None:
        """Take over what a relay announces of its CAs, over a connection that it was verified on, and keep it.

        Raises `ConfigError` or `PinMismatch` for what the CA that is known has not signed; nothing is changed then.
        """
        found, what = Succession.read(announced), "the relay's CA"
        for _ in range(CONFLICTS):
            entry, known = _continued(self.current, found)
            followed = known.follow(found, what, retire=True)
            if followed == known:
                return
            snapshot = await self._store.load()
            stored = None if snapshot is None else AgentCredential.from_entries(snapshot)
            if stored is not None and snapshot is not None:
                with contextlib.suppress(ConfigError, PinMismatch):  # a sibling may know more; the settings, another CA
                    followed = followed.follow(_continued(stored, followed)[1], what, retire=True)
                try:
                    await self._store.save(_update(entry, followed.text), expect_version=snapshot.version)
                except VersionConflict:
                    continue
            cas = {"relay_cas": followed.text} if entry == entries.RELAY_CAS else {"issuer_cas": followed.text}
            self._credential = replace(self.current, **{"issuer_cas": "", **cas})
            log.info("relay CA followed", pin=followed.pins[-1], present=followed.pins[followed.present])
            self.changed()
            self._wake.set()
            return
        raise StateError(TOO_MANY_WRITERS)

    @property
    def seconds_left(self) -> float:
        """Seconds until the certificate expires; negative once it has, 0 before there is one."""
        return self._credential.validity()[1] - self._clock() if self._credential is not None else 0.0

    async def start(self) -> AgentCredential:
        """Load the credential or enrol. Waits and tries again while no relay answers.

        Raises EnrolmentRefused, ConfigError, PinMismatch or StateError where waiting does not help.
        """
        backoff = Backoff()
        while True:
            try:
                snapshot = await self._prepared()
                stored = self._usable(snapshot)
                found = None if stored is None else await self._with_relay_ca(stored)
                if stored is None or found is None or self._is_void(stored, found):
                    found = await self._with_relay_ca(await self._enrol(snapshot))
                self._credential = found
                self.last_failure = ""
                return self._credential
            except Unreachable as error:
                self.failures += 1
                self.last_failure = error.message
                delay = backoff.next_delay(hint=error.retry_after)
                log.warning("enrolment waits", reason=error.message, retry_in=round(delay, 1))
                await asyncio.sleep(delay)

    async def run(self) -> None:
        """Renew in time, until cancelled. Failures are logged and tried again."""
        backoff = Backoff(first=5.0, cap=600.0)
        while True:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(max(self._renewal_due() - self._clock(), 0.0), LOOK_AGAIN)):
                    await self._wake.wait()
            try:
                await self._check_store()
                backoff.reset()
            except ArcbridgeError as error:
                self.failures += 1
                hint = REFUSED_WAIT if isinstance(error, EnrolmentRefused) else error.retry_after
                delay = backoff.next_delay(hint=hint)
                log.error(
                    "certificate not renewed",
                    reason=error.message,
                    seconds_left=round(self.seconds_left),
                    retry_in=round(delay),
                )
                await asyncio.sleep(delay)

    # -- inside -----------------------------------------------------------------------------------------------

    def _renewal_due(self) -> float:
        """Return when to renew: two thirds of the life, later by up to a tenth of it so that sibling pods do not renew
        all at once."""
        if self._superseded(self.current):
            return max(self._clock() + SUPERSEDED_SPREAD * self._jitter(), self._asked_again + RENEW_AGAIN)
        not_before, not_after = self.current.validity()
        spread = (not_after - not_before) / 10 * self._jitter()
        return renew_at(not_before, not_after) + spread

    async def _check_store(self) -> None:
        snapshot = await self._store.load()
        await self._adopt(snapshot)
        if self._fresh(self.current):
            return
        if self._superseded(self.current):
            if self._clock() < self._asked_again + RENEW_AGAIN:
                return
            self._asked_again = self._clock()
        if self.seconds_left <= 0:
            # Only a new join token helps now; the operator may provide one at any time.
            self._credential = await self._with_relay_ca(await self._enrol(await self._prepared()))
            return
        await self._renew(snapshot)

    async def _adopt(self, snapshot: Snapshot | None) -> bool:
        """Adopt the certificate that a sibling has stored; answers whether there was another one than ours."""
        stored = self._usable(snapshot)
        if stored is None or stored == self._stored:
            return False
        before = self.current
        found = await self._with_relay_ca(stored)
        _newest_cluster_ca(found)  # raises, as the next line does, where an entry is damaged: the former one serves on
        _issuer_pin(found)
        self._credential, self._stored = found, stored
        self.changed()
        if stored.certificate_pem == before.certificate_pem:
            return False
        log.info("certificate adopted", cluster=stored.cluster)
        return True

    def _usable(self, snapshot: Snapshot | None) -> AgentCredential | None:
        credential = AgentCredential.from_entries(snapshot) if snapshot is not None else None
        return None if credential is None or credential.validity()[1] <= self._clock() else credential

    async def _prepared(self) -> Snapshot:
        """Answer the store's entries with a cluster CA and a key among them; made and stored if they were missing."""
        for _ in range(CONFLICTS):
            snapshot = await self._store.load()
            made: dict[str, bytes] = {}
            found = snapshot if snapshot is not None else Snapshot({}, "")
            has_certificate, has_key = entries.CLUSTER_CA_CERTIFICATE in found, entries.CLUSTER_CA_KEY in found
            if has_certificate != has_key:
                raise StateError("the stored cluster CA is incomplete: restore the agent's state from a backup")
            if not has_key:
                authority = Authority.create("arcbridge cluster CA")
                made[entries.CLUSTER_CA_CERTIFICATE] = authority.certificate_pem.encode()
                made[entries.CLUSTER_CA_KEY] = authority.key_pem.encode()
            if not found.get(entries.KEY):
                made[entries.KEY] = make_key().encode()
            if snapshot is not None and not made:
                return snapshot
            seen = snapshot.version if snapshot is not None else None
            try:
                version = await self._store.save(made, expect_version=seen)
            except VersionConflict:
                continue  # a sibling was faster: adopt what it made
            if entries.CLUSTER_CA_KEY in made:
                log.info("cluster CA made", cluster_ca_pin=pin_of(made[entries.CLUSTER_CA_CERTIFICATE].decode()))
            return Snapshot({**found, **made}, version)
        raise StateError(TOO_MANY_WRITERS)

    async def _enrol(self, snapshot: Snapshot) -> AgentCredential:
        token = self._join_token(snapshot)
        key_pem = snapshot[entries.KEY].decode()
        request = {"join_token": token, "csr": make_csr(key_pem), "cluster_ca": oldest_cluster_ca(snapshot)}

        async def ask(relay: Address) -> tuple[dict[str, Any], str, str]:
            ca_pem, cas, trusted = await self._first_trust(relay)
            return await post(relay, "/v1/enrol", request, RelayTrust(trusted)), ca_pem, cas

        answer, ca_pem, cas = await self._any_relay(ask)
        cluster, certificate = self._checked(answer, key_pem)
        known = snapshot.get(entries.CLUSTER, b"").decode("ascii", "replace")
        if known and known != cluster:
            raise EnrolmentRefused(
                f"the join token is for cluster {cluster}, but this agent's state belongs to cluster {known}: "
                f"ask for a token for {known}, or start with an empty state"
            )
        update = {
            entries.CLUSTER: cluster.encode(),
            entries.CERTIFICATE: certificate.encode(),
            entries.RELAY_CA: ca_pem.encode(),
            **_update(entries.RELAY_CAS, cas),
        }
        credential = await self._store_certificate(snapshot, update)
        log.info("enrolled", cluster=credential.cluster, cluster_ca_pin=pin_of(credential.cluster_ca_certificate_pem))
        return credential

    async def _renew(self, snapshot: Snapshot | None) -> None:
        snapshot = await self._with_request(snapshot)
        if snapshot is None:
            return
        credential = self.current
        request = {"csr": snapshot[entries.RENEWAL_REQUEST].decode("ascii"), "stored": "yes"}
        pair = (credential.certificate_pem, credential.key_pem)

        async def ask(relay: Address) -> dict[str, Any]:
            return await post(relay, "/v1/renew", request, self.trust, certificate=pair)

        answer = await self._any_relay(ask)
        cluster, certificate = self._checked(answer, credential.key_pem)
        if cluster != credential.cluster:
            raise EnrolmentRefused("the relay renewed the certificate of another cluster; it is not taken")
        update = {entries.CERTIFICATE: certificate.encode(), entries.RENEWAL_REQUEST: b""}
        renewed = await self._store_certificate(snapshot, update)
        self._credential = await self._with_relay_ca(renewed)
        self.renewals += 1
        log.info("certificate renewed", cluster=cluster, seconds=round(self.seconds_left))

    async def _with_request(self, snapshot: Snapshot | None) -> Snapshot | None:
        """Return the store's entries with a request over our key among them; None once a sibling's certificate was
        adopted."""
        credential = self.current
        for _ in range(CONFLICTS):
            if snapshot is not None and _is_over(snapshot.get(entries.RENEWAL_REQUEST, b""), credential.key_pem):
                return snapshot
            made = {entries.RENEWAL_REQUEST: make_csr(credential.key_pem).encode()}
            if snapshot is None:  # the operator has removed the state: all that is in memory is stored again
                made = {**credential.to_entries(), **made}
            try:
                version = await self._store.save(made, expect_version=None if snapshot is None else snapshot.version)
                return Snapshot({**(snapshot or {}), **made}, version)
            except VersionConflict:
                snapshot = await self._store.load()
            # Also where it looks old, by a clock that is wrong: the former certificate must not be renewed again.
            if await self._adopt(snapshot):
                return None
        raise StateError(TOO_MANY_WRITERS)

    async def _store_certificate(self, snapshot: Snapshot, update: dict[str, bytes]) -> AgentCredential:
        for _ in range(CONFLICTS):
            try:
                version = await self._store.save(update, expect_version=snapshot.version or None)
                stored = Snapshot({**snapshot, **update}, version)
            except VersionConflict:
                loaded = await self._store.load()
                if loaded is None:
                    raise StateError("the agent's state has disappeared: restore it from a backup") from None
                adopted = self._usable(loaded)
                if adopted is not None and self._fresh(adopted):
                    return adopted
                if loaded.get(entries.KEY) != snapshot.get(entries.KEY):
                    raise StateError("the agent's state was replaced while a certificate was asked for") from None
                snapshot = loaded
                continue
            credential = AgentCredential.from_entries(stored)
            if credential is None:
                raise StateError("the agent's state is incomplete: restore it from a backup")
            return credential
        raise StateError(TOO_MANY_WRITERS)

    def _fresh(self, credential: AgentCredential) -> bool:
        not_before, not_after = credential.validity()
        return self._clock() < renew_at(not_before, not_after) and not self._superseded(credential)

    def _superseded(self, credential: AgentCredential) -> bool:
        """Return whether the certificate is of a former CA of the relay."""
        known = credential.issuers if credential.relay_cas or credential.issuer_cas else None
        return known is not None and _issuer_pin(credential) != known.pins[known.present]

    def _is_void(self, stored: AgentCredential, named: AgentCredential) -> bool:
        """Return whether the settings name, by its pin, a CA to which no known one has led, and that has not issued the
        certificate: the former CA was replaced, and another join token is needed."""
        unknown = bool(self._pin) and self._ca_file is None and self._pin not in _relay_pins(stored)
        return unknown and not _issuer_pin(named)

    async def _any_relay(self, ask: Callable[[Address], Any]) -> Any:
        """Ask the relays in turn; the first that accepts counts.

        A refusal of one relay does not decide for the others: each may have a registry of its own, and the token or the
        cluster may be known at one alone. When all have failed the error has every relay's answer. It is
        EnrolmentRefused if all refused; a relay that could not be asked might have accepted, so then it is Unreachable.
        """
        failures: list[ArcbridgeError] = []
        for relay in self._relays:
            try:
                return await ask(relay)
            except (Unreachable, EnrolmentRefused, ConnectionLost) as error:
                failures.append(error)
        if not failures:
            raise ConfigError("relays: at least one is needed")
        message = "; ".join(dict.fromkeys(failure.message for failure in failures))
        if all(isinstance(failure, EnrolmentRefused) for failure in failures):
            raise EnrolmentRefused(message)
        hints = [failure.retry_after for failure in failures if failure.retry_after is not None]
        if any(isinstance(failure, EnrolmentRefused) for failure in failures):
            hints.append(REFUSED_AMONG)
        raise Unreachable(message, retry_after=max(hints, default=None))

    async def _first_trust(self, relay: Address) -> tuple[str, str, str]:
        """Return the CA that the settings name, those that followed it, and by which of them to verify the relay."""
        if self._ca_file is not None:
            ca_pem = self._pinned(_read(self._ca_file, "relay_ca_file", "ignore"))
            return ca_pem, "", ca_pem
        if not self._pin:
            raise ConfigError("relay_ca_pin or relay_ca_file: one is needed to enrol; `token create` prints the pin")
        found = await fetch_relay_cas(relay, self._pin)
        return found.cas[0], _kept(found), found.trusted

    async def _with_relay_ca(self, credential: AgentCredential) -> AgentCredential:
        """Return the credential with the relay CA that the settings ask for, if they ask for another than the stored
        one."""
        ca_pem = credential.relay_ca_pem
        if self._ca_file is not None:
            ca_pem = self._pinned(_read(self._ca_file, "relay_ca_file", "ignore"))
        elif self._pin and self._pin not in _relay_pins(credential):
            found: AgentCredential = await self._any_relay(lambda relay: self._named(relay, credential))
            return found
        if ca_pem == credential.relay_ca_pem:
            return credential
        named = replace(credential, relay_ca_pem=ca_pem, relay_cas="")
        # The settings may still name a CA that was followed since.
        followed = bool(set(_relay_pins(named)) & set(_relay_pins(credential)))
        return replace(named, relay_cas=credential.relay_cas) if followed else named

    async def _named(self, relay: Address, credential: AgentCredential) -> AgentCredential:
        """Return the credential with the CA that the settings name, and those that followed it. Where the known one has
        led to it, its certificates count as before; no relay is verified by it any more."""
        with contextlib.suppress(ConfigError, PinMismatch):
            known = credential.relay_succession
            found = known.follow(await fetch_relay_cas(relay, known.pins[-1]), "the relay's CA")
            if self._pin in found.pins:
                return replace(credential, relay_cas=found.from_pin(self._pin).text)
        found = await fetch_relay_cas(relay, self._pin)
        return replace(credential, relay_ca_pem=found.cas[0], relay_cas=_kept(found))

    def _pinned(self, ca_pem: str) -> str:
        if self._pin and not same_pin(self._pin, pin_of(ca_pem)):
            raise ConfigError("relay_ca_file and relay_ca_pin contradict each other: remove the wrong one")
        return ca_pem

    def _join_token(self, snapshot: Snapshot) -> str:
        expired = bool(snapshot.get(entries.CERTIFICATE))
        why = "the agent's certificate has lapsed" if expired else "the agent is not enrolled"
        how = "make one with `arcbridge --role relay token create` and put it into join_token_file"
        if self._token_file is None:
            raise ConfigError(f"join_token_file: {why} and needs a join token; {how}")
        there = is_there(self._token_file)
        token = _read(self._token_file, "join_token_file").strip() if there else ""
        if not token:
            fault = f"{self._token_file} {'is empty' if there else 'does not exist'}"
            raise ConfigError(f"join_token_file: {why} and {fault}: it needs a join token; {how}")
        return token

    def _checked(self, answer: dict[str, Any], key_pem: str) -> tuple[str, str]:
        """(cluster, certificate) of an answer, if the certificate is over the agent's key and valid now
        (docs/threats.md#B8)."""
        cluster, certificate = answer.get("cluster"), answer.get("certificate")
        if not isinstance(cluster, str) or not isinstance(certificate, str):
            raise Unreachable("the relay's answer has no certificate: is this an arcbridge relay?")
        try:
            check_cluster_name(cluster)
            public = x509.load_pem_x509_certificate(certificate.encode()).public_key()
            own = serialization.load_pem_private_key(key_pem.encode(), None).public_key()
            _, not_after = certificate_validity(certificate)
        except (ValueError, TypeError, x509.InvalidVersion, ArcbridgeError) as error:
            raise Unreachable("the relay's answer holds no usable certificate") from error
        if public != own:
            raise EnrolmentRefused("the relay's certificate is over another key than ours; it is not taken")
        if not_after <= self._clock():
            raise Unreachable("the relay's certificate has lapsed already: compare the clocks of relay and agent")
        return cluster, certificate


@functools.lru_cache(maxsize=4)
def outer_context(credential: AgentCredential, alpn: str) -> ssl.SSLContext:
    """Return the TLS context towards relays for one protocol; kept, because to make one takes some milliseconds."""
    pair = (credential.certificate_pem, credential.key_pem)
    return outer_client_context(RelayTrust(credential.relay_trust_pem), alpn, client_certificate=pair)


def _relay_pins(credential: AgentCredential) -> tuple[str, ...]:
    """Return the pins of the relay's CAs that are known; none where a file names several CAs."""
    try:
        return credential.relay_succession.pins
    except ConfigError:
        return ()


def _continued(credential: AgentCredential, found: Succession) -> tuple[str, Succession]:
    """Return which entry an announcement of a relay continues, and what is known there: the CAs by which relays are
    verified; or, where another CA vouches for them, those that issue certificates, from the agent's own on."""
    try:
        known = credential.relay_succession
    except ConfigError:
        known = None
    if known is None or not set(known.pins) & set(found.pins):
        if credential.issuer_cas:
            return entries.ISSUER_CAS, Succession.read(credential.issuer_cas, own=True)
        for pin, pem in zip(found.pins, found.cas, strict=True):
            if is_issued_by(credential.certificate_pem, pem):
                return entries.ISSUER_CAS, Succession.of_pin(pin)
    if known is None:
        raise ConfigError("the relay announces CAs of which none has issued this agent's certificate")
    return entries.RELAY_CAS, known


def _update(entry: str, cas: str) -> dict[str, bytes]:
    """Return the entries that say how the relay's CAs followed each other; one of them counts."""
    return {entries.RELAY_CAS: b"", entries.ISSUER_CAS: b"", entry: cas.encode()}


@functools.lru_cache(maxsize=1)  # each second's look whether a report is due asks
def _newest_cluster_ca(credential: AgentCredential) -> str:
    return credential.rotation.list.pins[-1]


def _kept(cas: Succession) -> str:
    return cas.text if len(cas.pins) > 1 else ""


@functools.lru_cache(maxsize=4)
def _issuer_pin(credential: AgentCredential) -> str:
    """Return the pin of the relay's known CA that has issued the certificate; empty: none of them."""
    known = credential.issuers
    pairs = () if known is None else zip(known.pins, known.cas, strict=True)
    return next((pin for pin, pem in pairs if is_issued_by(credential.certificate_pem, pem)), "")


def oldest_cluster_ca(snapshot: Snapshot) -> str:
    """Return the oldest CA of the cluster that counts: the one that the relay knows."""
    certificate = snapshot[entries.CLUSTER_CA_CERTIFICATE].decode()
    rotation = snapshot.get(entries.CLUSTER_ROTATION)
    return Rotation.decode(rotation, certificate).oldest if rotation else certificate


def _is_over(request: bytes, key_pem: str) -> bool:
    """Return whether a stored request is one over this key."""
    try:
        public = x509.load_pem_x509_csr(request).public_key()
        return public == serialization.load_pem_private_key(key_pem.encode(), None).public_key()
    except (ValueError, TypeError, x509.InvalidVersion):
        return False


def _read(path: Path, setting: str, not_ascii: str = "strict") -> str:
    """Return the text of a file. `not_ascii`: what Python does with other bytes, which comments may have."""
    try:
        return path.read_text("ascii", not_ascii)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not ASCII text"
        raise ConfigError(f"{setting}: {path} cannot be read: {why}") from error
