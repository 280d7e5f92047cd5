"""A small certificate authority: the relay's for agents and itself, the cluster's for end-to-end TLS, the user's
for the local endpoint.

The CA signs end-entity certificates (pathlen 0, `keyCertSign` alone) and its successor's key (`pki.succession`). Every
certificate passes OpenSSL's strict checks (X509_V_FLAG_X509_STRICT, on by default in Python 3.13 and later, that is
RFC 5280 §4.2 as written): subject and authority key identifiers, critical basic constraints and key usage, serial
numbers of 159 random bits. A leaf has exactly one purpose: server or client.

A relay's certificate towards another relay says `arcbridge://relay`, which is no cluster's.

What an agent's certificate says is one URI, `arcbridge://cluster/<name>`, and in extensions the pin of that cluster's
own CA and a generation, all put there by the relay. Nothing else of it is ever read: not the subject, and nothing that
the agent's certificate request asked for. The pin lets another relay over the same CA know the cluster without having
enrolled it. It is no second name in the SAN, because a relay from before it existed takes exactly one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import ipaddress
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from arcbridge.errors import ConfigError, EnrolmentRefused, StateError
from arcbridge.pki.enrolment import AgentPublicKey, make_key, read_csr
from arcbridge.pki.names import check_cluster_name
from arcbridge.pki.pins import check_pin, pin_of, require_pin
from arcbridge.pki.private_files import ensure_private_directory, locked, read_file, write_private
from arcbridge.pki.succession import Succession

BACKDATE = 3600.0
"""Seconds by which `notBefore` lies in the past: peers whose clock is up to an hour slow still accept a fresh
certificate (docs/threats.md#E7). Capped at a tenth of the life, so that renewal at two thirds stays meaningful."""

CA_LIFE = 10 * 365 * 86400.0
"""Seconds. Ends know a CA by the pin of its key, so a new CA means telling every one of them: seldom."""

LEAF_LIFE = 90 * 86400.0
"""Seconds; for certificates whose key lives in the process that issued it and that it can issue again at will."""

_X509_ERRORS = (x509.InvalidVersion, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType)
"""What `cryptography` raises for a certificate that it reads only in part; none of them is a ValueError."""
CA_LIMIT = 16 * 1024
"""Bytes of a CA certificate that a peer sends; over an RSA key of 8192 bits it takes 4 KiB."""

CERTIFICATE_FILE = "ca.crt"
KEY_FILE = "ca.key"

_CLUSTER_URI = "arcbridge://cluster/"
_RELAY_URI = "arcbridge://relay"
_CLUSTER_CA_PIN = x509.ObjectIdentifier("2.25.301665752179587828294959758255742234323")
"""Of an extension that is not critical; its value is a UTF8String in DER. Under the arc of UUIDs, which needs no
registration (ITU-T X.667): e2f2b5e5-6ac5-4da0-ad55-8fb71d1baed3."""
_GENERATION = x509.ObjectIdentifier("2.25.315458682780411801386679276232189828535")
"""As above: how often the certificate of this key was issued, in decimal digits."""
_UTF8_STRING = b"\x0c"
_DNS_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate with its fresh private key, both PEM."""

    certificate_pem: str
    key_pem: str = field(repr=False)


class Authority:
    """One CA: its certificate, its P-256 key, and what it signs. `clock` answers unix seconds."""

    def __init__(
        self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, key_pem: str, clock: Callable[[], float]
    ) -> None:
        self._certificate = certificate
        self._key = key
        self._clock = clock
        self.key_pem = key_pem
        self.certificate_pem = certificate.public_bytes(Encoding.PEM).decode()
        self.pin = pin_of(self.certificate_pem)
        self.trusted_pem = self.certificate_pem
        """The CAs whose certificates count: this one and, while it is rotated, the next or the former one
        (`pki.rotation`)."""
        self.step_at = 0.0
        """When the last step of a rotation that is under way was taken, unix seconds; 0: none is."""
        self.next_key_pem, self.former_secret = "", b""
        """Of a rotation that is under way (`pki.rotation.Rotation`)."""
        self.succession = Succession.of_ca(self.certificate_pem)
        """This CA, those before it, and the next one where there is one."""

    def __repr__(self) -> str:
        return f"Authority({self.pin})"

    # Where authorities come from.

    @classmethod
    def create(cls, common_name: str, *, life: float = CA_LIFE, clock: Callable[[], float] = time.time) -> Authority:
        """Return a new CA; `life` in seconds."""
        return cls._self_signed(_common_name(common_name[:64]), make_key(), life, clock)

    @classmethod
    def load(cls, certificate_pem: str, key_pem: str, *, clock: Callable[[], float] = time.time) -> Authority:
        """Return the CA of this certificate and key; raises `StateError` when they are unreadable or no pair."""
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
            public_key = certificate.public_key()
            constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        except (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, x509.ExtensionNotFound) as error:
            raise StateError("the CA certificate is not readable: restore it from a backup") from error
        key = _load_key(key_pem)
        if not constraints.ca or public_key != key.public_key():
            raise StateError("the CA certificate and its key do not belong together: restore both from one backup")
        return cls(certificate, key, key_pem, clock)

    @classmethod
    def load_or_create(cls, directory: Path, common_name: str, *, clock: Callable[[], float] = time.time) -> Authority:
        """Return the CA kept in `directory` (`ca.crt`, `ca.key`), made at first use; raises `StateError`.

        Processes that start together agree on one CA: the first to get the lock makes it. The key is written
        before the certificate, so a crash between the two leaves a key, over which the certificate is then made;
        a certificate without its key is an error, never a reason to make another CA that no client has pinned.
        """
        ensure_private_directory(directory)
        with locked(directory / ".ca.lock"):
            certificate_pem, key_pem = kept_files(directory)
            if key_pem is None:
                key_pem = make_key().encode()
                write_private(directory / KEY_FILE, key_pem)
            if certificate_pem is None:
                authority = cls._self_signed(_common_name(common_name[:64]), _text(key_pem), CA_LIFE, clock)
                write_private(directory / CERTIFICATE_FILE, authority.certificate_pem.encode())
                return authority
        return cls._load_kept(directory, certificate_pem, key_pem, clock)

    @classmethod
    def read(cls, directory: Path, *, clock: Callable[[], float] = time.time) -> Authority | None:
        """Return the CA kept in `directory`, without making one; None where that is still to be done.

        Raises `StateError` as `load_or_create` does.
        """
        certificate_pem, key_pem = kept_files(directory)
        if certificate_pem is None or key_pem is None:
            return None
        return cls._load_kept(directory, certificate_pem, key_pem, clock)

    @classmethod
    def _load_kept(
        cls, directory: Path, certificate_pem: bytes, key_pem: bytes, clock: Callable[[], float]
    ) -> Authority:
        try:
            return cls.load(_text(certificate_pem), _text(key_pem), clock=clock)
        except StateError as error:
            raise StateError(f"{directory}: {error.message}") from error

    @property
    def expires(self) -> float:
        """When this CA ends, unix seconds."""
        return self._certificate.not_valid_after_utc.timestamp()

    def become(self, other: Authority) -> bool:
        """Be another CA from now on, as a rotation goes on; return whether anything is another."""
        changed = (other.succession, other.trusted_pem) != (self.succession, self.trusted_pem)
        self.__dict__.update(other.__dict__)
        return changed

    @property
    def announced(self) -> str:
        """How this CA follows others, for ends that know one of them (`Succession.text`); empty where it never did."""
        return self.succession.text if len(self.succession.pins) > 1 else ""

    @property
    def links_pem(self) -> str:
        """The certificates that lead from this CA back to the first of its succession, in TLS's order; mostly empty."""
        return "".join(self.succession.cas[self.succession.present : 0 : -1])

    # What an authority signs.

    def make_successor(self) -> tuple[Authority, str]:
        """Return a new CA of the same name, and the certificate over its key (PEM) that this one issues."""
        subject = self._certificate.subject
        successor = self._self_signed(subject, make_key(), CA_LIFE, self._clock)
        key = successor._key.public_key()
        own_identifier = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        # As long as the successor's own: an end that knows it by this certificate must not lose it before.
        validity = successor._certificate.not_valid_before_utc, successor._certificate.not_valid_after_utc
        builder = _builder(subject, subject, key, validity, own_identifier, is_ca=True)
        return successor, builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM).decode()

    def issue_server(self, names: list[str], *, life: float = LEAF_LIFE) -> Issued:
        """Issue a server certificate for DNS names and IP addresses, with a fresh key; a bad name raises
        `ConfigError`."""
        if not names:
            raise ConfigError("a server certificate needs at least one name")
        return self._issue(_common_name(names[0]), [_general_name(name) for name in names], server=True, life=life)

    def issue_client(self, common_name: str, *, uri: str = "", life: float = LEAF_LIFE) -> Issued:
        """Return a client certificate with a fresh key; `uri`: one more name, whose length is not bounded."""
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(uri)] if uri else []
        return self._issue(_common_name(common_name), names, server=False, life=life)

    def issue_relay(self) -> Issued:
        """Issue a client certificate with a fresh key, by which a relay shows itself to another one over the same
        CA."""
        return self._issue(x509.Name([]), [x509.UniformResourceIdentifier(_RELAY_URI)], server=False, life=LEAF_LIFE)

    def sign_agent(
        self, csr_pem: str, cluster: str, *, life: float, cluster_ca_pin: str = "", generation: int = 0
    ) -> str:
        """Issue the certificate (PEM) of an agent of `cluster` over the request's public key; raises
        `EnrolmentRefused`.

        The caller has decided that this requester may speak for `cluster`, whose own CA has this pin; nothing of that
        is in the request. Without the pin it is valid where the cluster enrolled, and nowhere else. `generation` counts
        the certificates of this key; 0 is not stated.
        """
        check_cluster_name(cluster)
        names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(_CLUSTER_URI + cluster)]
        pin = check_pin(cluster_ca_pin) if cluster_ca_pin else ""
        stated = {_CLUSTER_CA_PIN: pin, _GENERATION: f"{generation}" if generation else ""}
        certificate = self._sign(
            read_csr(csr_pem), _common_name(cluster), names, server=False, life=life, stated=stated
        )
        return certificate.public_bytes(Encoding.PEM).decode()

    def authenticate_agent(self, certificate_der: bytes) -> str:
        """Return the cluster whose agent holds this certificate (DER); raises `EnrolmentRefused` unless this CA signed
        it as a client certificate and it is valid now.

        TLS has verified all that already, where it was told to. This is for callers that answer for a cluster and
        would otherwise depend on how a listener is configured.
        """
        certificate = _load_certificate(certificate_der)
        now = datetime.fromtimestamp(self._clock(), UTC)
        try:
            _require_issuer(certificate, self.trusted_pem)
            purposes = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
            if ExtendedKeyUsageOID.CLIENT_AUTH not in purposes:
                raise ValueError("no client's")
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
            raise EnrolmentRefused("the certificate was not issued to an agent by this relay") from error
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise EnrolmentRefused("the agent's certificate has lapsed: enrol with a new join token")
        return _cluster_of(certificate)

    # How.

    @classmethod
    def _self_signed(cls, name: x509.Name, key_pem: str, life: float, clock: Callable[[], float]) -> Authority:
        key = _load_key(key_pem)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = _builder(name, name, key.public_key(), _validity(clock(), life), identifier, is_ca=True)
        return cls(builder.sign(key, hashes.SHA256()), key, key_pem, clock)

    def _issue(self, subject: x509.Name, names: list[x509.GeneralName], *, server: bool, life: float) -> Issued:
        key_pem = make_key()
        certificate = self._sign(_load_key(key_pem).public_key(), subject, names, server=server, life=life)
        return Issued(certificate.public_bytes(Encoding.PEM).decode(), key_pem)

    def _sign(
        self,
        key: AgentPublicKey,
        subject: x509.Name,
        names: list[x509.GeneralName],
        *,
        server: bool,
        life: float,
        stated: Mapping[x509.ObjectIdentifier, str] | None = None,
    ) -> x509.Certificate:
        now = self._clock()
        not_before, not_after = _validity(now, life)
        not_after = min(not_after, self._certificate.not_valid_after_utc)
        if not_after.timestamp() <= now:
            raise StateError("the CA's own certificate has expired: it can sign nothing any more")
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        own_identifier = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        validity = max(not_before, self._certificate.not_valid_before_utc), not_after
        builder = _builder(subject, self._certificate.subject, key, validity, own_identifier, is_ca=False)
        builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        if names:
            # RFC 5280 §4.2.1.6: critical exactly when the subject is empty.
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=not list(subject))
        for identifier, text in (stated or {}).items():
            if text:
                value = x509.UnrecognizedExtension(identifier, _UTF8_STRING + bytes([len(text)]) + text.encode())
                builder = builder.add_extension(value, critical=False)
        return builder.sign(self._key, hashes.SHA256())


def is_relay(certificate_der: bytes) -> bool:
    """Return whether a certificate (DER), which TLS has verified under the relay's CA, is that of a relay:
    `issue_relay`."""
    try:
        return _uris(_load_certificate(certificate_der)) == [_RELAY_URI]
    except (EnrolmentRefused, ValueError, x509.ExtensionNotFound):
        return False


def agent_cluster(certificate_der: bytes) -> str:
    """Return the cluster that an agent's certificate speaks for; raises `EnrolmentRefused` when it names none, or
    several.

    The certificate (DER, as TLS gives it) must already have been verified against the relay's CA: this reads only.
    """
    return _cluster_of(_load_certificate(certificate_der))


def agent_ca_pin(certificate_der: bytes) -> str:
    """Return the pin of the cluster's own CA that an agent's certificate (DER) states; empty when it states none.

    As `agent_cluster` this reads only. Raises `EnrolmentRefused` when there is one that is malformed.
    """
    return _stated(certificate_der, _CLUSTER_CA_PIN, check_pin, "pin")


def agent_generation(certificate_der: bytes) -> int:
    """Return how often the certificate of this key was issued, as an agent's certificate (DER) states; 0: it does not.

    As `agent_cluster` this reads only. Raises `EnrolmentRefused` when it is malformed.
    """
    return int(_stated(certificate_der, _GENERATION, _number, "generation") or 0)


@functools.lru_cache(maxsize=64)
def agent_key_hash(certificate_der: bytes) -> str:
    """Return the SHA-256 (hex) of the public key of a certificate (DER): the `enrolment.key_hash` of its request."""
    try:
        key = _load_certificate(certificate_der).public_key()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise EnrolmentRefused("the agent's certificate is not readable") from error
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _stated(certificate_der: bytes, identifier: x509.ObjectIdentifier, check: Callable[[str], str], what: str) -> str:
    """Return the text of an extension of ours, checked; empty when there is none. Raises `EnrolmentRefused`."""
    try:
        extension = _load_certificate(certificate_der).extensions.get_extension_for_oid(identifier).value
    except x509.ExtensionNotFound:
        return ""
    except ValueError as error:
        raise EnrolmentRefused("the agent's certificate is not readable") from error
    value = extension.value if isinstance(extension, x509.UnrecognizedExtension) else b""
    try:
        if value[:1] != _UTF8_STRING or value[1:2] != bytes([len(value) - 2]):
            raise ValueError("not a short UTF8String")
        return check(value[2:].decode("ascii", "replace"))
    except (ConfigError, ValueError) as error:
        why = f"the agent's certificate states a malformed {what}: enrol with a new join token"
        raise EnrolmentRefused(why) from error


def _number(text: str) -> str:
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise ValueError("no number")
    return text


def agent_expiry(certificate_der: bytes) -> float:
    """Return when a certificate (DER) lapses, in unix seconds; raises `EnrolmentRefused` when unreadable."""
    return _load_certificate(certificate_der).not_valid_after_utc.timestamp()


def agent_issued_at(certificate_der: bytes) -> float:
    """Return when a certificate of ours (DER) was issued, in unix seconds, give or take two; raises `EnrolmentRefused`.

    `notBefore` lies before that by `BACKDATE` or a tenth of the life, so by a definite part of the whole.
    """
    certificate = _load_certificate(certificate_der)
    start, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    return start + min(BACKDATE, (end - start) / 11)


def check_ca_certificate(certificate_pem: str) -> str:
    """Return the one CA certificate in `certificate_pem`, encoded by us; raises `EnrolmentRefused`.

    For a cluster's CA as an agent sends it: what a relay keeps and gives to clients is exactly one certificate,
    whose key its pin covers, that is allowed to sign certificates.
    """
    if len(certificate_pem) > CA_LIMIT:
        raise EnrolmentRefused(f"the cluster's CA certificate is larger than {CA_LIMIT // 1024} KiB")
    try:
        certificate_pem = require_pin("the cluster's CA", pin_of(certificate_pem), certificate_pem)
        certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
        if not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
            raise ValueError("no CA")
    except (ConfigError, ValueError, *_X509_ERRORS) as error:
        raise EnrolmentRefused("the cluster's CA is not exactly one CA certificate in PEM") from error
    return certificate_pem


def is_issued_by(certificate_pem: str, ca_pem: str) -> bool:
    """Return whether a certificate is of one of these CAs (PEM); raises `StateError` when it is unreadable."""
    try:
        _require_issuer(x509.load_pem_x509_certificate(certificate_pem.encode()), ca_pem)
    except (TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    except (ValueError, x509.InvalidVersion) as error:
        raise StateError("the certificate is not a readable PEM") from error
    return True


def _require_issuer(certificate: x509.Certificate, ca_pem: str) -> None:
    """Raise `InvalidSignature` unless one of these CAs has issued the certificate."""
    for one in x509.load_pem_x509_certificates(ca_pem.encode()):
        with contextlib.suppress(InvalidSignature, ValueError):
            return certificate.verify_directly_issued_by(one)
    raise InvalidSignature


def certificates_alone(pem: str) -> str:
    """Return the certificates of a PEM text and nothing else of it; raises `StateError` where there are none."""
    try:
        found = x509.load_pem_x509_certificates(pem.encode())
    except (ValueError, TypeError, x509.InvalidVersion) as error:
        raise StateError("there is no readable certificate") from error
    return "".join(one.public_bytes(Encoding.PEM).decode() for one in found)


def certificate_validity(certificate_pem: str) -> tuple[float, float]:
    """(notBefore, notAfter) of the first certificate, in unix seconds; raises `StateError` when unreadable."""
    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem.encode())
    except (ValueError, TypeError, x509.InvalidVersion) as error:
        raise StateError("the certificate is not a readable PEM") from error
    return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()


@functools.lru_cache(maxsize=64)
def _load_certificate(certificate_der: bytes) -> x509.Certificate:
    # Kept, because several questions are asked of one certificate in a row, and the parsed extensions are kept with it.
    try:
        return x509.load_der_x509_certificate(certificate_der)
    except (ValueError, TypeError, x509.InvalidVersion) as error:
        raise EnrolmentRefused("the agent's certificate is not readable") from error


def _uris(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _cluster_of(certificate: x509.Certificate) -> str:
    try:
        uris = _uris(certificate)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise EnrolmentRefused("the certificate is not an agent's: it names no cluster") from error
    if len(uris) != 1 or not uris[0].startswith(_CLUSTER_URI):
        raise EnrolmentRefused("the certificate is not an agent's: it must name exactly one cluster")
    try:
        return check_cluster_name(uris[0].removeprefix(_CLUSTER_URI))
    except ConfigError as error:
        raise EnrolmentRefused("the certificate is not an agent's: its cluster name is malformed") from error


def _load_key(key_pem: str) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(key_pem.encode(), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StateError("the CA's private key is not readable: restore it from a backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StateError("the CA's private key is not an ECDSA key: restore the one that arcbridge made")
    return key


def kept_files(directory: Path) -> tuple[bytes | None, bytes | None]:
    """Return certificate and key (PEM) of the CA that is kept in `directory`, as far as they are there.

    Raises `StateError` where they cannot be used: a certificate without its key, a key that every user may read.
    """
    certificate_path, key_path = directory / CERTIFICATE_FILE, directory / KEY_FILE
    certificate_pem, key_pem = read_file(certificate_path), read_file(key_path)
    if key_pem is not None:
        _require_private(key_path)
    elif certificate_pem is not None:
        raise StateError(
            f"{key_path} is missing beside {certificate_path}: restore it from a backup, or copy both from the relay "
            "that this one shares its CA with; without it every agent and client would have to be told a new pin"
        )
    return certificate_pem, key_pem


def _require_private(path: Path) -> None:
    """Refuse a key that all users can read. The group may: a volume with an fsGroup has its files opened to it."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from error
    if mode & 0o007:
        raise StateError(f"{path} is open to every user of this machine: run 'chmod 600 {path}'")


def _text(data: bytes) -> str:
    return data.decode("ascii", "replace")


def _validity(now: float, life: float) -> tuple[datetime, datetime]:
    """notBefore and notAfter; whole seconds, as X.509 has them, rounded so that the life is never shorter."""
    start = int(now - min(BACKDATE, life / 10))
    end = int(now + life) + 1
    return datetime.fromtimestamp(start, UTC), datetime.fromtimestamp(0, UTC) + timedelta(seconds=end)


def _common_name(name: str) -> x509.Name:
    # At most 64 characters (RFC 5280 appendix A.1); a longer name is in the SAN alone.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if 1 <= len(name) <= 64 else [])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
    except ValueError:
        pass  # not an address, so it has to be a DNS name
    if len(name) > 253 or _DNS_NAME.fullmatch(name) is None:
        raise ConfigError("not a server name: use a DNS name in ASCII (punycode where needed) or an IP address")
    return x509.DNSName(name)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: AgentPublicKey,
    validity: tuple[datetime, datetime],
    issuer_identifier: x509.SubjectKeyIdentifier,
    *,
    is_ca: bool,
) -> x509.CertificateBuilder:
    """Return what every certificate has: names, key, a serial number, validity and the extensions of RFC 5280 §4.2."""
    usage = x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    authority = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_identifier)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(validity[0])
        .not_valid_after(validity[1])
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=0 if is_ca else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(authority, critical=False)
    )
