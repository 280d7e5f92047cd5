"""Seals what operators have said of access, for agents to keep, and reads what an agent gives back.

A registry can be lost, and a backup is older than what it replaces. So each revocation, and each that was taken back,
goes to the agents as an entry that this relay's CA key has sealed (AES-SIV, RFC 5297, by a key that HKDF derives from
it and the name of the registry): an agent can neither read nor make one, nor change the one that it has, nor carry it
to a relay with another registry. The same change has the same bytes at every relay of one registry, so a digest says
whether an agent holds just that. Invariant: only what opens is believed, and it is merged by its own time, so an older
entry undoes nothing; while the CA is rotated, entries of both CAs open (docs/decisions/0035-backup-and-revocations.md).
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Final, Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF, HKDFExpand
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from arcbridge.errors import RemoteProtocolError
from arcbridge.net.address import Address
from arcbridge.pki.authority import Authority
from arcbridge.relay.registry.base import AccessChange, change_of, merged
from arcbridge.settings.config import RelayConfig
from arcbridge.untrusted_json import read_json
from arcbridge.wire.ledger import ID_SIZE, MOST_ENTRY, MOST_HELD, LedgerEntries, entries_of, frames
from arcbridge.wire.records import Ledger

_INFO: Final = b"arcbridge ledger of revocations 1\0"


def registry_name(config: RelayConfig, public: Address) -> str:
    """Return what tells a relay's registry from others over one CA, and is the same for one that was lost and made
    anew: a fleet's bucket, or the address of a relay that stands alone, by which agents keep its ledger, too."""
    return f"bucket {config.fleet.bucket}" if config.fleet.servers else str(public)


def ledger_secret(ca_key_pem: str) -> bytes:
    """Return what the holders of a CA's key derive the keys of each registry's ledger from; it signs nothing."""
    key = load_pem_private_key(ca_key_pem.encode(), None)
    assert isinstance(key, EllipticCurvePrivateKey), "a CA's key"
    secret = key.private_numbers().private_value.to_bytes((key.key_size + 7) // 8, "big")
    return HKDF.extract(SHA256(), None, secret)


class Seal:
    """Seals entries with a key that only holders of the CA's key have, and opens those of the CA beside it in a
    rotation too: of the former one, and of the next one, by which another relay may seal already."""

    def __init__(self, ca_key_pem: str, registry: str, *, others: Iterable[bytes] = ()) -> None:
        """`registry`: its name (`registry_name`), for relays over one CA may have several. `others`: the secrets of the
        CAs beside this one (`ledger_secret`)."""
        self.secret = ledger_secret(ca_key_pem)
        info = _INFO + registry.encode()
        derived = [HKDFExpand(SHA256(), 96, info).derive(secret) for secret in (self.secret, *others)]
        self._ciphers, self._names = [AESSIV(one[:64]) for one in derived], derived[0][64:]

    @classmethod
    def of(cls, authority: Authority, registry: str) -> Seal:
        """Return the one of a relay with this CA."""
        following = [ledger_secret(authority.next_key_pem)] if authority.next_key_pem else []
        return cls(authority.key_pem, registry, others=[*following, *filter(None, [authority.former_secret])])

    def seal(self, change: AccessChange) -> bytes:
        """Return the entry: its id, which is the same for all changes of one name, and what was said."""
        about = hmac.digest(self._names, f"{change.kind}\0{change.name}".encode(), "sha256")[:ID_SIZE]
        said = json.dumps(change, ensure_ascii=False, separators=(",", ":")).encode()
        return about + self._ciphers[0].encrypt(said, [about])

    def open(self, entry: bytes) -> AccessChange | None:
        """Return what an entry says; None for what a newer relay says and this one does not know. Raises `ValueError`
        where no relay of this registry has sealed it."""
        for cipher in self._ciphers:
            try:
                said = cipher.decrypt(entry[ID_SIZE:], [entry[:ID_SIZE]])
            except InvalidTag:
                continue
            return change_of(read_json(said))
        raise ValueError("sealed by no relay of this registry")


class LedgerBook:
    """What this process knows of the registry's changes, open and sealed."""

    def __init__(self, seal: Seal) -> None:
        self.seal = seal
        self._changes: dict[tuple[Literal["user", "cluster"], str], tuple[AccessChange, bytes]] = {}
        """What is known of each name, and its entry."""
        self._sealed = LedgerEntries()
        self.digest = self._sealed.digest()
        self.left_out = 0
        """Changes for which a ledger has no room: no agent keeps them."""
        self._opened: dict[bytes, AccessChange | None] = {}
        """Entries that an agent has given back, for the next agent that gives back the same."""
        self._opened_size = 0

    def learn(self, changes: Iterable[AccessChange]) -> list[bytes]:
        """Take over what the registry says now; return the entries that agents do not have yet."""
        former, self._changes, fresh = self._changes, {}, []
        for change in changes:
            key = change.kind, change.name
            known = former.get(key)
            if known is None or known[0] != change:
                known = change, self.seal.seal(change)
                fresh.append(known[1])
            self._changes[key] = known
        if fresh or len(former) != len(self._changes):
            self._sealed.clear()
            # Where there is no room for all: revocations first, the newest first.
            for _, entry in sorted(self._changes.values(), key=lambda one: (not one[0].before, -one[0].at)):
                if len(entry) <= MOST_ENTRY:
                    self._sealed.put(entry)
            self.left_out = len(self._changes) - len(self._sealed)
            self.digest = self._sealed.digest()
        return [entry for entry in fresh if entry in self._sealed]

    async def use(self, seal: Seal) -> bool:
        """Seal with the CA that a rotation has come to; return whether agents have to be given all of it anew."""
        if seal.secret == self.seal.secret:
            self.seal, self._opened, self._opened_size = seal, {}, 0
            return False
        made = LedgerBook(seal)
        # A second for 30 000 changes. What changes meanwhile is learnt with the next look.
        await asyncio.to_thread(made.learn, [change for change, _ in self._changes.values()])
        self.__dict__.update(made.__dict__)
        return True

    def frames(self) -> Iterator[Ledger]:
        """Yield all of it, for an agent that begins."""
        return frames(self._sealed, first=True)

    def holds(self, entry: bytes) -> bool:
        return entry in self._sealed

    def open(self, entry: bytes) -> AccessChange | None:
        """Return what an entry says, as `Seal.open` does: after a loss all agents give back the same entries."""
        if entry not in self._opened:
            change = self.seal.open(entry)
            if self._opened_size + len(entry) > MOST_HELD:
                self._opened, self._opened_size = {}, 0
            self._opened[entry] = change
            self._opened_size += len(entry)
        return self._opened[entry]

    def news(self, change: AccessChange, now: float) -> bool:
        known = self._changes.get((change.kind, change.name))
        return merged(None if known is None else known[0], change, now) is not None


class Intake:
    """What one agent gives back when its connection begins: once, within bounds, and only what is sealed."""

    def __init__(self, book: LedgerBook, now: Callable[[], float]) -> None:
        self._book = book
        self._seal = book.seal
        self._now = now
        self._size = 0
        self._ids: dict[bytes, None] = {}  # an empty set has 216 bytes
        self._asked = False
        self._found: list[AccessChange] = []
        self.was_cut_off = False
        """Reading has ended before the agent had given back all."""
        self.forged = False
        """The agent has sent an entry that no relay over this CA has sealed; nothing behind it was read."""
        self.digest = b""
        """Of what the agent holds, as far as it is known here; empty: it keeps no ledger."""
        self.done: asyncio.Future[list[AccessChange]] = asyncio.get_running_loop().create_future()
        """What the registry lacks, once the agent has given back all."""

    @property
    def complete(self) -> bool:
        """Whether the agent has given back all that it keeps."""
        whole = self.done.done() and not self.done.cancelled() and not self.was_cut_off
        return whole and bool(self.digest) and not self.forged

    @property
    def received(self) -> int:
        """Bytes of entries that were taken so far."""
        return min(self._size, MOST_HELD)

    def receive(self, ledger: Ledger) -> Ledger | None:
        """Take a frame; return the one to send. What comes behind the end is not read."""
        if self.done.done():
            return None
        if not self._asked:
            self._asked, self.digest = True, ledger.digest or hashlib.sha256().digest()
            if self.digest != self._book.digest:
                return Ledger(wanted=True)
            self.end()
            return None
        if self._seal is not self._book.seal:
            # A step of a rotation came in between, and may have changed what opens: the agent comes again.
            self.cut_off()
            return None
        try:
            for entry in entries_of(ledger):
                self._take(entry)
        except RemoteProtocolError:
            self.forged = True
        if ledger.last or self.forged:
            self.end()
        return None

    def end(self) -> None:
        """The agent has given back all, or keeps no ledger."""
        if not self.done.done():
            self.done.set_result(self._found)

    def cut_off(self) -> None:
        """Read no more: what has come counts, and it is not all."""
        self.was_cut_off = True
        self.end()

    def _take(self, entry: bytes) -> None:
        self._size += len(entry)
        if self.forged or self._size > MOST_HELD or self._book.holds(entry):
            return
        # Each name once: to open an entry takes a tenth of a millisecond, and an agent has one of each.
        if entry[:ID_SIZE] in self._ids:
            self.forged = True
            return
        self._ids[entry[:ID_SIZE]] = None
        try:
            change = self._book.open(entry)
        except ValueError:
            self.forged = True
            return
        if change is not None and self._book.news(change, self._now()):
            self._found.append(change)
