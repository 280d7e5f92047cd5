"""The rotation of a CA that this end owns, the relay's or a cluster's: its steps, and what has to be kept between them.

    next       the next CA is made, and the present one certifies its key; every other end is told, and trusts both
    activate   the next CA signs from now on; certificates of the former one count as before
    retire     the former CA counts no more

Nothing is read or written here but the one JSON document that an owner keeps. Invariant: a step that does not fit the
state is refused and changes nothing; after `activate` the former CA's key is kept nowhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

from arcbridge.errors import ConfigError, StateError
from arcbridge.pki.authority import Authority, certificate_validity
from arcbridge.pki.succession import Succession
from arcbridge.untrusted_json import read_json

NAMED: Final = 20
"""Clusters and relays that a refusal names."""
LATER_BACKUP: Final = "Restore a later backup, or copy ca-rotation.json from the relay that has this CA"


@dataclass(frozen=True)
class Rotation:
    """One CA with its successor or its predecessor; every member is text, PEM unless stated."""

    certificate: str
    key: str
    succession: str = ""
    """`Succession.text`; empty while the CA was never rotated."""
    next_certificate: str = ""
    next_key: str = ""
    former_certificate: str = ""
    began: str = ""
    """Unix seconds of the last step, in decimal digits."""
    former_secret: str = ""
    """A relay's, hex: what entries of its ledger under the former CA open with; it signs nothing."""

    def __repr__(self) -> str:
        # The members are keys.
        return f"Rotation({', '.join(self.list.pins)})"

    @property
    def list(self) -> Succession:
        return Succession.read(self.succession, own=True) if self.succession else Succession.of_ca(self.certificate)

    @property
    def oldest(self) -> str:
        """The CA certificate, over its own key, of the oldest CA that counts."""
        return self.former_certificate or self.certificate

    @property
    def seconds(self) -> float:
        """When the last step was taken, unix seconds."""
        return float(self.began or 0)

    def authority(self, clock: Callable[[], float] = time.time) -> Authority:
        """Return the CA that signs now. Raises StateError."""
        found = Authority.load(self.certificate, self.key, clock=clock)
        found.succession = self.list
        if found.pin != found.succession.pins[found.succession.present]:
            raise StateError("what is kept of the CA's rotation is damaged: restore it from a backup")
        found.step_at = self.seconds if self.next_certificate or self.former_certificate else 0.0
        found.trusted_pem = self.former_certificate + self.certificate + self.next_certificate
        found.next_key_pem, found.former_secret = self.next_key, bytes.fromhex(self.former_secret)
        return found

    def take(self, step: str, now: float) -> Rotation:
        """Return the state behind a step (`next`, `activate` or `retire`); raises StateError where another one comes
        next."""
        if step != self.step:
            raise StateError(
                f"'ca {step}' does not come now: the next step is 'ca {self.step}', and 'ca status' shows why"
            )
        known, began = self.list, f"{now:.0f}"
        if step == "next":
            successor, link = Authority.load(self.certificate, self.key, clock=lambda: now).make_successor()
            keys = {"next_certificate": successor.certificate_pem, "next_key": successor.key_pem}
            return replace(self, succession=known.extended(link).text, began=began, **keys)
        if step == "activate":
            known = replace(known, present=len(known.pins) - 1)
            former = self.certificate
            return Rotation(self.next_certificate, self.next_key, known.text, former_certificate=former, began=began)
        known = replace(known, since=known.present)
        return replace(self, former_certificate="", former_secret="", succession=known.text, began=began)

    @property
    def step(self) -> str:
        """The step that comes next."""
        return "activate" if self.next_certificate else "retire" if self.former_certificate else "next"

    def encode(self) -> bytes:
        """Return the document that `decode` reads."""
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def decode(cls, data: bytes, certificate_pem: str) -> Rotation:
        """Read a document; `certificate_pem` is the CA that is kept beside it. Raises StateError."""
        try:
            document = read_json(data)
            found = cls(**{one.name: str(document[one.name]) for one in fields(cls)})
            pins = found.authority().succession.pins
            beside = Succession.of_ca(certificate_pem).pins[0]
        except (ValueError, TypeError, KeyError, ConfigError) as error:
            raise StateError("what is kept of the CA's rotation is damaged: restore it from a backup") from error
        if beside not in pins:
            raise StateError(
                "what is kept of the CA's rotation is of another CA than the certificate beside it: where the CA was "
                "replaced, remove the rotation too; else restore both from one backup"
            )
        return found


@dataclass(frozen=True, slots=True)
class RotationStatus:
    """How far a rotation is."""

    rotation: Rotation
    followed: str
    """How many have followed the last step, in words."""
    missing: tuple[str, ...]
    """Why the next step has to wait: clusters, relays and processes that have not followed, or a time."""
    relays: tuple[str, ...] = ()
    """Relays that have answered: one of a fleet that is frozen is missing, and no other knows of it."""
    agents: str = ""
    """How many agents have followed that step, in words."""
    users: str = ""
    """How many users' clients keep the newest CA, in words; no step waits for them."""
    strayed: tuple[str, ...] = ()
    """Of `missing`: agents that follow a CA that is not known here, so that a next one would be of no use to them."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """One row for each CA that counts, in their order."""
        state, pins, at = self.rotation, self.rotation.list.pins, self.rotation.list.present
        cas = {"former": state.former_certificate, "present": state.certificate, "next": state.next_certificate}
        newest = "next" if state.next_certificate else "present"
        return [
            {
                "ca": name,
                "pin": pins[at + index],
                "certificate_expires": certificate_validity(pem)[1],
                "followed": self.followed if name == newest else "",
                "agents": self.agents if name == newest else "",
                "users": self.users if name == newest else "",
                "relays": list(self.relays) if name == newest else [],
            }
            for index, (name, pem) in enumerate(cas.items(), -1)
            if pem
        ]

    def require(self, step: str) -> None:
        """Raise StateError, which names who has not followed, where a step has to wait."""
        if step == "next" and self.strayed:
            raise StateError(f"{'; '.join(named(self.strayed))}. {LATER_BACKUP}")
        if step != "next" and step == self.rotation.step and self.missing:
            counted = f" ({self.followed}, {self.agents})" if self.agents else ""
            raise StateError(
                f"not all have followed the step before{counted}: {'; '.join(named(self.missing))}. Wait for them "
                "('ca status'), or give --force: what is away follows when it comes back, and only an agent whose "
                "certificate is of a retired CA enrols again"
            )


def named(who: Sequence[str]) -> list[str]:
    """Return the first `NAMED` of these, and how many more there are."""
    return [*who[:NAMED], *([f"and {len(who) - NAMED} more"] if len(who) > NAMED else [])]
