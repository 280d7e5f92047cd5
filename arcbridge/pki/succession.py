"""The succession of a CA: how an end that knows one CA comes to know those that follow it, without being asked.

Each CA certifies the key of the next one (the certificate "NewWithOld" of RFC 4210 §4.4). A succession is a list of CA
certificates, each signed with the key of the one before; an end that trusts one of them can trust those behind it. Its
text begins with two lines that say which one signs now and which is the oldest that still counts. It may come from a
party that is not trusted: `read` verifies every signature, and `follow` never gives up a successor or a certificate
that is known, so that an older list changes nothing and a second successor of one CA is refused. Two successions with
the same pins, of which the same ones sign and count, are equal.

The CAs of a succession have one name. A certificate of one of them over another's key is self-issued (RFC 5280 §3.2),
does not count for the path length, and so an end of any version, which trusts a former CA, verifies a certificate of
the present one where it comes with the certificates between.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from arcbridge.errors import ConfigError, PinMismatch, StateError
from arcbridge.pki.pins import check_pin, encoded, mismatch_message, pin_of
from arcbridge.pki.private_files import ensure_private_directory, locked, read_file, write_private

LONGEST = 9
"""CAs of one succession, so eight rotations: an end that was away for longer needs the new pin from a person."""
TEXT_LIMIT = 15 * 1024
"""Bytes of a succession's text; nine CAs that arcbridge makes take 7 KiB."""
_TOO_LONG = f"a succession of CAs has at most {TEXT_LIMIT // 1024} KiB"

_HEAD = re.compile(r"# present: (\S+)\n# since: (\S+)\n")
_CERTIFICATE = re.compile(
    r"-----BEGIN CERTIFICATE-----\n(?:[A-Za-z0-9+/]{64}\n)*[A-Za-z0-9+/]{1,64}={0,2}\n-----END CERTIFICATE-----\n"
)
"""The one spelling in which `encoded` writes it: a longer one would make what is kept too long to be read."""


@dataclass(frozen=True, slots=True)
class Succession:
    """CAs in the order in which they follow each other; never empty."""

    cas: tuple[str, ...] = field(compare=False)
    """PEM of each; empty for one of which the pin alone is known."""
    pins: tuple[str, ...]
    since: int = 0
    """Index of the oldest one that still counts."""
    present: int = 0
    """Index of the one that signs now."""

    @classmethod
    def of_pin(cls, pin: str) -> Succession:
        """Return the succession of an end that knows one pin."""
        return cls(("",), (check_pin(pin),))

    @classmethod
    def of_ca(cls, certificate_pem: str) -> Succession:
        """Return the succession of one CA certificate. Raises ConfigError."""
        return cls((encoded(certificate_pem),), (pin_of(certificate_pem),))

    @classmethod
    def read(cls, text: str, *, own: bool = False) -> Succession:
        """Read what `text` writes, and verify each signature; `own`: a text that this end has verified before.

        Raises ConfigError, which quotes nothing of it.
        """
        if len(text) > TEXT_LIMIT:
            raise ConfigError(_TOO_LONG)
        head = _HEAD.match(text)
        cas = tuple(_CERTIFICATE.findall(text, head.end())) if head else ()
        if head is None or not 1 <= len(cas) <= LONGEST or "".join((head[0], *cas)) != text:
            raise ConfigError(f"not a succession of CAs: two lines, and one to {LONGEST} certificates")
        pins = tuple(pin_of(one) for one in cas)
        if len(set(pins)) != len(pins) or head[1] not in pins or head[2] not in pins:
            raise ConfigError("a succession of CAs has one CA twice, or names one that is not in it")
        found = cls(cas, pins, pins.index(head[2]), pins.index(head[1]))
        if found.since > found.present:
            raise ConfigError("a succession of CAs in which the present one does not count")
        if not own:
            _check_signatures(cas)
        return found

    @property
    def text(self) -> str:
        """The succession for `read`; every CA's certificate has to be known."""
        return f"# present: {self.pins[self.present]}\n# since: {self.pins[self.since]}\n" + "".join(self.cas)

    @property
    def trusted(self) -> str:
        """The certificates of the CAs that count, as one PEM text."""
        return "".join(self.cas[self.since :])

    def follow(
        self, found: Succession, what: str, *, retire: bool = False, then: str = "change or remove the old one"
    ) -> Succession:
        """Return this succession with what `found` adds to it. `what` as in "the relay's CA", `then` as for
        `mismatch_message`.

        `retire`: `found` comes from the owner of the CA, over a connection that it vouches for, so that former CAs
        stop to count. Raises PinMismatch unless both agree from the last CA on that both know, and ConfigError for
        more than can be kept.
        """
        last = self.pins[-1]
        if last in found.pins:
            at = found.pins.index(last)
            cas = (*self.cas[:-1], self.cas[-1] or found.cas[at], *found.cas[at + 1 :])
            pins = (*self.pins, *found.pins[at + 1 :])
        elif found.pins[-1] in self.pins:
            cas, pins = self.cas, self.pins
        else:
            raise PinMismatch(
                f"{mismatch_message(what, last, found.pins[-1], then)}. No CA that is known here has announced the "
                "other one: it was replaced without an announcement, or this end was away for too many rotations"
            )

        def index(mine: int, pin: str) -> int:
            return max(mine, pins.index(pin)) if pin in pins else mine

        merged = replace(
            self,
            cas=cas,
            pins=pins,
            present=index(self.present, found.pins[found.present]),
            since=index(self.since, found.pins[found.since]) if retire else self.since,
        )._cut()
        if len(merged.text) > TEXT_LIMIT:
            raise ConfigError(_TOO_LONG)
        return merged

    def extended(self, link_pem: str) -> Succession:
        """Return the succession with one more CA, which the last one has certified."""
        return replace(self, cas=(*self.cas, link_pem), pins=(*self.pins, pin_of(link_pem)))._cut()

    def from_pin(self, pin: str) -> Succession:
        """Return the succession in which no CA before that of `pin` counts; one that is not known changes nothing."""
        if pin not in self.pins:
            return self
        since = max(self.since, self.pins.index(pin))
        return replace(self, since=since, present=max(self.present, since))

    def _cut(self) -> Succession:
        """Return at most `LONGEST` CAs, the last ones."""
        more = max(len(self.pins) - LONGEST, 0)
        return Succession(self.cas[more:], self.pins[more:], max(self.since - more, 0), max(self.present - more, 0))


def _check_signatures(cas: tuple[str, ...]) -> None:
    """Raise ConfigError unless each of these is a CA, and signed with the key of the one before it.

    The first one is signed with its own: else any party could make a certificate over its key that no end accepts, and
    that an end would keep. A list that was cut begins with one of which the issuer is no more in it.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    try:
        loaded = [x509.load_pem_x509_certificate(one.encode()) for one in cas]
        if not all(one.extensions.get_extension_for_class(x509.BasicConstraints).value.ca for one in loaded):
            raise ValueError("no CA")
        if len(loaded) < LONGEST:
            loaded[0].verify_directly_issued_by(loaded[0])
        for former, link in itertools.pairwise(loaded):
            link.verify_directly_issued_by(former)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
        raise ConfigError("a succession of CAs in which one is not signed by the one before it") from error


class SuccessionStore:
    """What is known of the CAs that followed each pin that this user was given: one file for each pin in a directory.

    The pin itself, wherever it was given, is never changed.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def known(self, pin: str) -> Succession:
        """Return the succession that is kept for a pin, else the pin's own, also where what is kept is damaged: relays
        and agents announce it again. Raises StateError, and ConfigError where the pin is none."""
        kept = read_file(self._file(pin))
        try:
            return (
                Succession.of_pin(pin) if kept is None else Succession.read(kept.decode("ascii", "replace"), own=True)
            )
        except ConfigError as error:
            import structlog  # a client that only shows what is kept does without

            log = structlog.get_logger("arcbridge.pki")
            log.warning("CAs that followed are not readable", path=str(self._file(pin)), reason=error.message)
            return Succession.of_pin(pin)

    def keep(self, pin: str, succession: Succession) -> None:
        """Keep what is known of a pin's successors, beside what another process has kept meanwhile; nothing is written
        where there is none. Raises StateError, and what `Succession.follow` raises."""
        if len(succession.pins) == 1 and succession.pins[0] == pin:
            return
        ensure_private_directory(self._directory)
        with locked(self._directory / ".lock"):
            merged = self.known(pin).follow(succession, "the CA that is kept", retire=True)
            write_private(self._file(pin), merged.text.encode())

    def forget(self, pin: str) -> None:
        """Give up what is kept for a pin, because its user has agreed to it anew. Raises StateError."""
        try:
            self._file(pin).unlink(missing_ok=True)
        except OSError as error:
            raise StateError(f"cannot remove {self._file(pin)}: {error.strerror}") from error

    def _file(self, pin: str) -> Path:
        return self._directory / f"{check_pin(pin).removeprefix('sha256:')}.pem"
