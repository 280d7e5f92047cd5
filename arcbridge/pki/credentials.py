"""An agent's credential, and the places that keep it.

A credential is a flat table of named byte strings, because that is what a Kubernetes Secret is: every pod of the
DaemonSet shares one, and a directory on disk holds the same table for an agent outside of a cluster. Stores
compare and set: who writes says which version it has read, so of several pods that start on an empty store one
creates, and the others get `VersionConflict`, load again and adopt what is there (docs/threats.md#E3).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Protocol

from arcbridge.errors import ConfigError, StateError
from arcbridge.pki.authority import certificate_validity
from arcbridge.pki.names import check_cluster_name
from arcbridge.pki.private_files import ensure_private_directory, locked, read_file, write_private
from arcbridge.pki.rotation import Rotation
from arcbridge.pki.succession import Succession

# The names of the entries, fit for a Secret's `data`.
CLUSTER = "cluster"
CERTIFICATE = "tls.crt"
KEY = "tls.key"
RELAY_CA = "relay-ca.crt"
CLUSTER_CA_CERTIFICATE = "cluster-ca.crt"
CLUSTER_CA_KEY = "cluster-ca.key"
RELAY_CAS = "relay-cas.pem"
CLUSTER_ROTATION = "cluster-ca-rotation.json"
ISSUER_CAS = "issuer-cas.pem"
RENEWAL_REQUEST = "renewal.csr"
"""The request of a renewal that is under way; empty otherwise. No part of a credential."""


class VersionConflict(StateError):
    """Another process has written the store since it was read: load again and decide again."""


class Snapshot(dict[str, bytes]):
    """The entries of a store as read at one moment, with the `version` to give back to `save`."""

    def __init__(self, entries: Mapping[str, bytes], version: str) -> None:
        super().__init__(entries)
        self.version = version

    def __repr__(self) -> str:
        # The entries are keys.
        return f"Snapshot({sorted(self)}, version={self.version!r})"


class CredentialStore(Protocol):
    """A place that keeps one credential. Both methods raise `StateError` when the place cannot be used,
    and `Unreachable` when it is away for now."""

    async def load(self) -> Snapshot | None:
        """Return what is kept, or None when there is nothing yet."""

    async def save(self, update: Mapping[str, bytes], *, expect_version: str | None) -> str:
        """Set the entries of `update`, leave the others, return the new version.

        `expect_version` is the version that was read; None means that nothing may be kept yet. Raises
        `VersionConflict` when that is not how things are; nothing is changed then. All entries or none are written.
        """


@dataclass(frozen=True, slots=True)
class AgentCredential:
    """The identity of an agent: a certificate for relays, and the CA of its cluster, which clients pin. All PEM."""

    cluster: str
    certificate_pem: str
    key_pem: str = field(repr=False)
    relay_ca_pem: str
    cluster_ca_certificate_pem: str
    cluster_ca_key_pem: str = field(repr=False)
    relay_cas: str = ""
    """The CAs that followed the relay's (`pki.succession`); empty: none did."""
    cluster_rotation: str = field(default="", repr=False)
    """How far the rotation of the cluster's CA is (`pki.rotation`); empty: there was none."""
    issuer_cas: str = ""
    """The CAs by which a relay issues certificates that is itself verified by another one; empty: it is by these."""

    @property
    def issuers(self) -> Succession | None:
        """The CAs by which the relay issues certificates, as far as they are known; None where a file of several CAs
        says how it is verified, and it has announced none."""
        if self.issuer_cas:
            return Succession.read(self.issuer_cas, own=True)
        try:
            return self.relay_succession
        except ConfigError:
            return None

    @property
    def relay_succession(self) -> Succession:
        """The relay's CAs as far as they are known; raises `ConfigError` where the CA is a file of several."""
        return Succession.read(self.relay_cas, own=True) if self.relay_cas else Succession.of_ca(self.relay_ca_pem)

    @property
    def relay_trust_pem(self) -> str:
        """The CAs by which relays are verified, as one PEM text."""
        return self.relay_succession.trusted if self.relay_cas else self.relay_ca_pem

    @property
    def rotation(self) -> Rotation:
        """The cluster's CA, and how far its rotation is. Raises `StateError`."""
        if not self.cluster_rotation:
            return Rotation(self.cluster_ca_certificate_pem, self.cluster_ca_key_pem)
        return Rotation.decode(self.cluster_rotation.encode(), self.cluster_ca_certificate_pem)

    def to_entries(self) -> dict[str, bytes]:
        """Return the table that a store keeps."""
        return {name: value.encode() for name, value in zip(_ENTRIES, astuple(self), strict=True) if value}

    @classmethod
    def from_entries(cls, entries: Mapping[str, bytes]) -> AgentCredential | None:
        """Return the credential in a store's table, or None while entries are missing (before enrolment).

        Unknown entries are left alone. Raises `StateError` for one that is not text, or a malformed cluster name.
        """
        if any(not entries.get(name) for name in _ENTRIES[:_REQUIRED]):
            return None
        try:
            values = [entries.get(name, b"").decode("ascii") for name in _ENTRIES]
            check_cluster_name(values[0])
        except (UnicodeDecodeError, ConfigError) as error:
            raise StateError("the stored credential is damaged: remove it and enrol with a new join token") from error
        return cls(*values)

    def validity(self) -> tuple[float, float]:
        """(notBefore, notAfter) of the certificate, in unix seconds; raises `StateError`."""
        return certificate_validity(self.certificate_pem)


# In the order of the fields of AgentCredential.
_ENTRIES = (
    CLUSTER,
    CERTIFICATE,
    KEY,
    RELAY_CA,
    CLUSTER_CA_CERTIFICATE,
    CLUSTER_CA_KEY,
    RELAY_CAS,
    CLUSTER_ROTATION,
    ISSUER_CAS,
)
_REQUIRED = 6
"""The first so many of them make a credential."""


def renew_at(not_before: float, not_after: float) -> float:
    """Return when to renew, in unix seconds: two thirds of the life, so a relay may be away for a third of it."""
    return not_before + (not_after - not_before) * 2 / 3


class DirectoryStore:
    """A credential in a directory (0700), as one file `credential.json` (0600) that looks like a Secret:

    `{"version": "7", "data": {"tls.crt": "<base64>", …}}`. One file, so that certificate and key change together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path / "credential.json"

    async def load(self) -> Snapshot | None:
        """See `CredentialStore.load`."""
        return await asyncio.to_thread(self.read)

    async def save(self, update: Mapping[str, bytes], *, expect_version: str | None) -> str:
        """See `CredentialStore.save`. When cancelled, the write may still complete: load to find out."""
        return await asyncio.to_thread(self._write, dict(update), expect_version)

    def read(self) -> Snapshot | None:
        """Read what is kept; blocks on the disk. Raises `StateError` for a file that is damaged."""
        data = read_file(self._file)
        if data is None:
            return None
        try:
            document = json.loads(data)
            entries = {str(name): base64.b64decode(value, validate=True) for name, value in document["data"].items()}
            return Snapshot(entries, str(document["version"]))
        except (ValueError, TypeError, KeyError, AttributeError, binascii.Error) as error:
            raise StateError(f"{self._file} is damaged: move it away and enrol with a new join token") from error

    def _write(self, update: dict[str, bytes], expect_version: str | None) -> str:
        ensure_private_directory(self.path)
        with locked(self.path / ".lock"):
            current = self.read()
            if (current.version if current is not None else None) != expect_version:
                raise VersionConflict(f"{self._file} was written by another process in the meantime")
            version = str(int(current.version) + 1 if current is not None and current.version.isdecimal() else 1)
            entries = {**(current or {}), **update}
            data = {name: base64.b64encode(value).decode() for name, value in sorted(entries.items())}
            write_private(self._file, json.dumps({"version": version, "data": data}, indent=1).encode())
            return version
