"""Pins: how one end knows a CA without being introduced by the relay.

A pin is `sha256:` and 64 lower-case hex digits: the SHA-256 of the CA's SubjectPublicKeyInfo in DER, the same
fingerprint that RFC 7469 §2.4 uses. It survives a CA certificate that is signed again over the same key.

A pins file is TOML, alike for what this program remembers and for what an organisation ships:

    [clusters]                          # whatever the relay
    "prod-eu" = "sha256:…"

    [relays."relay.example.org:443"]    # clusters as that relay knows them
    "prod-eu" = "sha256:…"

`cryptography` reads certificates, and is a sixth of a client's start to import. Every CA that arcbridge makes has a
P-256 key in a certificate of one spelling; the pin of such a one is found without it, by the boundaries of the fields.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import re
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from arcbridge.errors import ConfigError, PinMismatch, StateError
from arcbridge.pki.names import check_cluster_name
from arcbridge.pki.private_files import ensure_private_directory, locked, read_file, write_private

if TYPE_CHECKING:
    from cryptography import x509

_PIN = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_RELAY = re.compile(r"[\]\[A-Za-z0-9._:-]{1,300}", re.ASCII)
_PLAIN_PEM = re.compile(
    r"-----BEGIN CERTIFICATE-----\n((?:[A-Za-z0-9+/]{64}\n)*[A-Za-z0-9+/]{1,64}={0,2}\n)-----END CERTIFICATE-----\n",
    re.ASCII,
)
"""The one spelling in which `cryptography` and OpenSSL write a certificate."""
_P256_KEY = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d03010703420004")
"""How the SubjectPublicKeyInfo of each uncompressed P-256 key begins (RFC 5480 §2); 64 bytes of the point follow."""
_SEQUENCE, _INTEGER, _VERSION = 0x30, 0x02, 0xA0
_BEFORE_THE_KEY = (_VERSION, _INTEGER, _SEQUENCE, _SEQUENCE, _SEQUENCE, _SEQUENCE)
"""Tags of a TBSCertificate's fields up to its key: version, serial number, signature, issuer, validity, subject."""


@lru_cache(maxsize=32)
def pin_of(certificate_pem: str) -> str:
    """Return the pin of the one certificate in `certificate_pem`; raises `ConfigError` when it is not exactly one.

    A second one would not be covered by the pin, yet `ssl` would trust it as well as the first.
    """
    spki = _p256_key(certificate_pem)
    if spki is None:
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        key = _one_certificate(certificate_pem).public_key()
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return "sha256:" + hashlib.sha256(spki).hexdigest()


def check_pin(pin: str) -> str:
    """Return `pin` in its one spelling (trimmed, lower case); raises `ConfigError` for another hash or length."""
    normal = pin.strip().lower() if len(pin) <= 200 else ""
    if _PIN.fullmatch(normal) is None:
        raise ConfigError("not a pin: a pin is 'sha256:' followed by 64 hexadecimal digits")
    return normal


def is_pin(pin: str) -> bool:
    """Return whether `pin` is one in its one spelling."""
    return _PIN.fullmatch(pin) is not None


def same_pin(a: str, b: str) -> bool:
    """Return whether two pins are the same, in constant time; raises `ConfigError` when one is malformed."""
    return hmac.compare_digest(check_pin(a), check_pin(b))


def require_pin(what: str, expected: str, certificate_pem: str) -> str:
    """Raise `PinMismatch` unless the certificate's key is the expected one. `what` as in "the relay's CA".

    Returns the certificate as `encoded` does: trust this text and not the one that came over the network.
    """
    found = pin_of(certificate_pem)
    if not same_pin(expected, found):
        raise PinMismatch(mismatch_message(what, expected, found))
    return encoded(certificate_pem)


@lru_cache(maxsize=32)
def encoded(certificate_pem: str) -> str:
    """Return the one certificate alone, encoded by us; raises `ConfigError` when it is not exactly one."""
    if _p256_key(certificate_pem) is not None:
        return certificate_pem
    from cryptography.hazmat.primitives.serialization import Encoding

    return _one_certificate(certificate_pem).public_bytes(Encoding.PEM).decode()


def mismatch_message(what: str, expected: str, found: str, then: str = "change or remove the old one") -> str:
    """Return the sentence that every pin mismatch says; `then`: what to do once the owner has confirmed."""
    return (
        f"{what} is not the one that is trusted: expected {check_pin(expected)}, found {check_pin(found)}. "
        "Another party may be in between. "
        f"Go on only when the owner confirms the new pin, then {then}"
    )


class PinStore:
    """Pins in a file: those this program remembers, or those an organisation ships (then only `get` is used).

    With `relay` (its `host:port`) the pins of that relay's clusters are kept apart from another relay's, and a pin
    that the file gives for every relay, in `[clusters]`, counts first.
    """

    def __init__(self, path: Path, *, relay: str = "") -> None:
        if relay and _RELAY.fullmatch(relay) is None:
            raise ConfigError("not a relay address: use host:port")
        self.path = path
        self.relay = relay

    def get(self, cluster: str) -> str | None:
        """Return the pin kept for `cluster`, or None; raises `StateError` when the file is malformed."""
        return self._find(self._read(), check_cluster_name(cluster))

    def remember(self, cluster: str, pin: str) -> None:
        """Keep `pin` for `cluster`. Another one that is already kept is not replaced: raises `PinMismatch`."""
        check_cluster_name(cluster)
        pin = check_pin(pin)
        with self._changing() as tables:
            known = self._find(tables, cluster)
            if known is not None and not same_pin(known, pin):
                raise PinMismatch(mismatch_message(f"the CA of cluster {cluster}", known, pin))
            if known is None:
                tables.setdefault(self.relay, {})[cluster] = pin

    def replace(self, cluster: str, pin: str, relays: Iterable[str]) -> None:
        """Keep `pin` for `cluster` in the place of those kept for any relay and for `relays`."""
        check_cluster_name(cluster)
        pin = check_pin(pin)
        with self._changing() as tables:
            for relay in ("", *relays):
                tables.get(relay, {}).pop(cluster, None)
            tables.setdefault(self.relay, {})[cluster] = pin

    def entries(self) -> list[tuple[str, str, str]]:
        """Return relay (empty: any), cluster and pin of each; raises `StateError`."""
        return [(relay, name, pin) for relay, pins in self._read().items() for name, pin in pins.items()]

    @contextmanager
    def _changing(self) -> Iterator[dict[str, dict[str, str]]]:
        """Yield what is kept, and write what was changed of it at once; raises StateError."""
        ensure_private_directory(self.path.parent)
        with locked(self.path.with_name(f".{self.path.name}.lock")):
            tables = self._read()
            before = _format(tables)
            yield tables
            if (after := _format(tables)) != before:
                write_private(self.path, after.encode())

    def _find(self, tables: dict[str, dict[str, str]], cluster: str) -> str | None:
        return tables.get("", {}).get(cluster) or tables.get(self.relay, {}).get(cluster)

    def _read(self) -> dict[str, dict[str, str]]:
        """Read relay (empty: every relay) -> cluster -> pin."""
        data = read_file(self.path)
        return {} if data is None else {relay: dict(pins) for relay, pins in _parsed(self.path, data).items()}


@lru_cache(maxsize=4)
def _parsed(path: Path, data: bytes) -> dict[str, dict[str, str]]:
    """Return what a pins file says, which was read from `path`; the result is shared. Raises StateError.

    The file is read at each join, and has what it had before at nearly all of them.
    """
    try:
        document = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # also a number too long for Python, or nesting
        raise StateError(f"{path} is not a TOML file of pins: correct it or move it away") from error
    unknown = sorted(set(document) - {"clusters", "relays"})
    if unknown:
        raise StateError(f"{path}: unknown table '{unknown[0]}'; known are 'clusters' and 'relays'")
    relays = document.get("relays", {})
    if not isinstance(relays, dict):
        raise StateError(f"{path}: 'relays' is not a table")
    tables = {relay: _checked_table(path, f"relays.{relay}", table) for relay, table in relays.items()}
    tables[""] = _checked_table(path, "clusters", document.get("clusters", {}))
    return tables


def _checked_table(path: Path, where: str, table: object) -> dict[str, str]:
    if not isinstance(table, dict):
        raise StateError(f"{path}: '{where}' is not a table")
    pins: dict[str, str] = {}
    for name, pin in table.items():
        try:
            pins[check_cluster_name(name)] = check_pin(pin if isinstance(pin, str) else "")
        except ConfigError as error:
            raise StateError(f"{path}: {where}.{name}: {error.message}") from error
    return pins


def _format(tables: dict[str, dict[str, str]]) -> str:
    """Return TOML text; names, relays and pins were checked, so none needs escaping."""
    parts = ["# Pins of cluster CAs that arcbridge trusts. Remove a line to be asked again.\n"]
    for relay in sorted(tables):
        if tables[relay]:
            parts.append(f'\n[relays."{relay}"]\n' if relay else "\n[clusters]\n")
            parts.extend(f'"{name}" = "{pin}"\n' for name, pin in sorted(tables[relay].items()))
    return "".join(parts)


def _p256_key(certificate_pem: str) -> bytes | None:
    """Return the SubjectPublicKeyInfo (DER) of a certificate as arcbridge makes them; None for every other text.

    Where each field has the tag that RFC 5280 §4.1 says and a definite length, its end is beyond dispute: OpenSSL,
    which will trust this certificate, finds the key at the same place. Whatever differs is left to `cryptography`.
    """
    found = _PLAIN_PEM.fullmatch(certificate_pem)
    if found is None:
        return None
    try:
        der = binascii.a2b_base64(found[1])
        at, end = _field(der, 0, len(der), _SEQUENCE)
        if end != len(der):
            return None
        at, end = _field(der, at, end, _SEQUENCE)
        for tag in _BEFORE_THE_KEY:
            _, at = _field(der, at, end, tag)
        _, key_end = _field(der, at, end, _SEQUENCE)
    except ValueError:
        return None
    key = der[at:key_end]
    return key if key.startswith(_P256_KEY) and len(key) == len(_P256_KEY) + 64 else None


def _field(der: bytes, at: int, end: int, tag: int) -> tuple[int, int]:
    """Return where the content of the field at `at` begins and ends; raises `ValueError` unless it is DER with this
    tag."""
    if end - at < 2 or der[at] != tag:
        raise ValueError("another field")
    length = der[at + 1]
    at += 2
    if length >= 0x80:
        size = length - 0x80
        if not 1 <= size <= 3 or end - at < size:
            raise ValueError("no definite length of a certificate's size")
        length = int.from_bytes(der[at : at + size], "big")
        at += size
        if length < 0x80 or length < 1 << 8 * (size - 1):
            raise ValueError("not the shortest spelling of the length")
    if end - at < length:
        raise ValueError("longer than what holds it")
    return at, at + length


def _one_certificate(certificate_pem: str) -> x509.Certificate:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        # Counted by hand: OpenSSL also trusts blocks with labels that this parser skips ("TRUSTED CERTIFICATE").
        if certificate_pem.count("-----BEGIN") != 1:
            raise ValueError("not one PEM block")
        certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
        certificate.public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion) as error:
        raise ConfigError("not a PEM certificate: exactly one CA certificate is needed here") from error
    return certificate
