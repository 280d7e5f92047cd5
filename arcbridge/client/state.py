"""Keeps what this user's client needs between runs: its local CA, pins, ports; and what it may lose: tokens, names.

State is in `$XDG_STATE_HOME/arcbridge` (0700, keys 0600), the cache in `$XDG_CACHE_HOME/arcbridge`; on Windows and
macOS where those systems have them (`arcbridge.settings.user_directories`). With an explicit
state directory the cache is inside it, so that one directory holds, and can remove, everything.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from arcbridge.errors import StateError
from arcbridge.pki.names import is_cluster_name
from arcbridge.pki.private_files import (
    ensure_private_directory,
    locked,
    read_file,
    refuse_foreign_directory,
    write_private,
)
from arcbridge.pki.succession import SuccessionStore
from arcbridge.settings.user_directories import user_directory

if TYPE_CHECKING:
    from arcbridge.pki.authority import Authority

FIRST_PORT = 47011
"""Azure Arc's port: scripts that know it go on working."""
CLIENT_CERTIFICATE_LIFE = 366 * 86400.0
"""Seconds. The certificate is in a kubeconfig that only its user can read; copies go on working for a while."""
SERVER_CERTIFICATE_REUSE = 86400.0
"""Seconds for which later starts use the endpoint's certificate again: to make one takes `cryptography`, a sixth of a
client's start to import."""
_ONE_TIME = "arcbridge://one-time"
_LOCAL_NAMES = ["localhost", "127.0.0.1", "::1"]


@dataclass(frozen=True, slots=True)
class LocalCertificates:
    """What the endpoint of one cluster needs: PEM texts."""

    relay: str
    """The URI that the client certificate has beside the cluster's name."""
    ca_pem: str
    server_certificate_pem: str
    server_key_pem: str = field(repr=False)
    client_certificate_pem: str
    client_key_pem: str = field(repr=False)


class StateDirectory:
    """The directory of one user; made at first use. Every method raises StateError."""

    def __init__(self, path: Path, cache: Path) -> None:
        self.path = path
        self.cache = cache

    @classmethod
    def find(cls, explicit: Path | None, environment: Mapping[str, str]) -> StateDirectory:
        """Return the directory of the settings, else the one of `environment`; raises StateError for another user's."""
        if explicit is not None:
            found = cls(explicit, explicit / "cache")
        else:
            found = cls(user_directory("state", environment), user_directory("cache", environment))
        for directory in (found.path, found.cache):
            refuse_foreign_directory(directory)
        return found

    @property
    def pins_file(self) -> Path:
        return self.path / "pins.toml"

    @property
    def successions(self) -> SuccessionStore:
        """What is known of the CAs that followed those whose pins this user has."""
        return SuccessionStore(self.path / "successions")

    @property
    def token_directory(self) -> Path:
        return self.cache / "tokens"

    def certificates(self, cluster: str, organisation: str, now: float) -> LocalCertificates:
        """Return the local CA (made once), the endpoint's certificate of today, and the cluster's client certificate.

        `organisation`: whose relays serve the cluster (`client.relay.relay_profile`), because two may have one of this
        name.

        The CA and the client certificate outlive the process: a program that loaded the kubeconfig before a restart
        goes on working. A client certificate is replaced when less than a third of its life is left. A process that
        runs for longer than a day asks again when one of them grows old (`ServedCluster.renew`).
        """
        relay = f"arcbridge://organisation/{quote(organisation, safe='')}"
        # A cluster's name has no @ in it, and a relay's pin is longer than a file's name should be.
        file = self.path / "clusters" / f"{cluster}@{hashlib.sha256(relay.encode()).hexdigest()[:16]}.json"
        try:
            ca = (read_file(self.path / "local-ca" / "ca.crt") or b"").decode("ascii", "replace")
            exposed = (self.path / "local-ca" / "ca.key").stat().st_mode & 0o077
            kept, made_at = _read(file)
            if not exposed and kept.ca_pem == ca and made_at <= now < made_at + SERVER_CERTIFICATE_REUSE:
                return kept
        except (OSError, StateError, ValueError, TypeError, KeyError):
            pass
        return self._make_certificates(file, cluster, relay, now)

    def _make_certificates(self, file: Path, cluster: str, relay: str, now: float) -> LocalCertificates:
        from arcbridge.pki.authority import Authority

        authority = Authority.load_or_create(self.path / "local-ca", "arcbridge local endpoint", clock=lambda: now)
        server = authority.issue_server(_LOCAL_NAMES)
        ensure_private_directory(file.parent)
        with locked(self.path / ".clusters.lock"):
            try:
                kept, _ = _read(file)
                client = kept.client_certificate_pem, kept.client_key_pem
                good = _issued_by(authority, client[0]) and not _worn(client[0], now)
            except (ValueError, TypeError, KeyError):
                good = False
            if not good:
                issued = authority.issue_client(cluster, uri=relay, life=CLIENT_CERTIFICATE_LIFE)
                client = issued.certificate_pem, issued.key_pem
            made = LocalCertificates(relay, authority.certificate_pem, server.certificate_pem, server.key_pem, *client)
            # One file, replaced at once: a start that reads it now has each certificate with its key.
            write_private(file, json.dumps({**asdict(made), "made_at": now}).encode())
        return made

    # -- ports --------------------------------------------------------------------------------------------------------

    def kept_port(self, relays: tuple[str, ...], cluster: str) -> int | None:
        """Return the port that is kept for a cluster at its relays; None: it was not reached yet."""
        ports = self._ports()
        return ports.get(_port_key(ports, relays, cluster))

    def free_ports(self) -> Iterator[int]:
        """Yield the ports that no cluster has, in their order."""
        taken = set(self._ports().values())
        return (port for port in range(FIRST_PORT, 65536) if port not in taken)

    def remember_port(self, relays: tuple[str, ...], cluster: str, port: int) -> None:
        """Keep the port at which a cluster was reached."""
        ports = self._ports()
        if ports.get(_port_key(ports, relays, cluster)) != port:
            ensure_private_directory(self.path)
            self._change_ports(lambda ports: {**ports, _port_key(ports, relays, cluster): port})

    def forget_port(self, relays: tuple[str, ...], cluster: str) -> None:
        """Give the port of a cluster back."""

        def without(ports: dict[str, int]) -> dict[str, int]:
            key = _port_key(ports, relays, cluster)
            return {name: port for name, port in ports.items() if name != key}

        if self._ports():
            self._change_ports(without)

    def _change_ports(self, change: Callable[[dict[str, int]], dict[str, int]]) -> None:
        with locked(self.path / ".ports.lock"):
            ports = self._ports()
            if (wanted := change(ports)) != ports:
                write_private(self.path / "ports.json", json.dumps(wanted, indent=1).encode())

    # -- the kubeconfigs that hold entries of ours --------------------------------------------------------------------

    def kubeconfigs(self) -> list[list[Path]]:
        """Return the lists of files in which entries of ours may be, each as kubectl reads it; a damaged file names
        none."""
        try:
            found = json.loads(read_file(self.path / "kubeconfigs.json") or b"[]")
            return [[Path(str(one)) for one in files] for files in found if isinstance(files, list)]
        except (StateError, ValueError, TypeError):
            return []

    def add_kubeconfig(self, files: Iterable[str | Path]) -> None:
        """Note where entries of ours are put, before they are."""
        wanted = [Path(os.path.abspath(file)) for file in files]
        if wanted not in self.kubeconfigs():
            ensure_private_directory(self.path)
            self._save_kubeconfigs(lambda kept: kept if wanted in kept else [*kept, wanted])

    def drop_kubeconfig(self, files: list[Path]) -> None:
        """Forget a list of files in which no entry of ours is any more."""
        self._save_kubeconfigs(lambda kept: [one for one in kept if one != files])

    def _save_kubeconfigs(self, change: Callable[[list[list[Path]]], list[list[Path]]]) -> None:
        with locked(self.path / ".kubeconfigs.lock"):
            kept = self.kubeconfigs()
            if (wanted := change(kept)) != kept:
                document = json.dumps([[str(file) for file in files] for files in wanted], indent=1)
                write_private(self.path / "kubeconfigs.json", document.encode())

    def _ports(self) -> dict[str, int]:
        data = read_file(self.path / "ports.json")
        try:
            ports = json.loads(data) if data else {}
        except ValueError:
            ports = None
        if not isinstance(ports, dict) or not all(type(port) is int for port in ports.values()):
            raise StateError(f"{self.path / 'ports.json'} is damaged: remove it, and clusters get new ports")
        return ports

    # -- names, for completion ----------------------------------------------------------------------------------------

    def keep_cluster_names(self, names: list[str]) -> None:
        """Write the names that completion offers; they are a convenience, so failing to is nothing.

        A shell that completes reads them: what is not a cluster's name is left out (docs/threats.md#B3).
        """
        names = [name for name in names if is_cluster_name(name)]
        try:
            ensure_private_directory(self.cache)
            write_private(self.cache / "clusters", "".join(f"{name}\n" for name in sorted(names)).encode())
        except StateError:
            pass  # the names are for completion alone

    def cluster_names(self) -> list[str]:
        """Return the names that the relay listed last, and those that were reached since."""
        return (read_file(self.cache / "clusters") or b"").decode("utf-8", "replace").split()

    def add_cluster_name(self, name: str) -> None:
        known = self.cluster_names()
        if name not in known:
            self.keep_cluster_names([*known, name])


def one_time_certificates(authority: Authority, cluster: str) -> LocalCertificates:
    """Return the certificates of an endpoint whose CA is in memory alone."""
    server = authority.issue_server(_LOCAL_NAMES)
    client = authority.issue_client(cluster, uri=_ONE_TIME)
    return LocalCertificates(
        _ONE_TIME,
        authority.certificate_pem,
        server.certificate_pem,
        server.key_pem,
        client.certificate_pem,
        client.key_pem,
    )


def _port_key(ports: Mapping[str, int], relays: tuple[str, ...], cluster: str) -> str:
    """Return the name under which a port is kept: the first relay's, unless another relay of them has it already."""
    keys = [f"{cluster} at {relay}" for relay in relays]
    return next((key for key in keys if key in ports), keys[0])


def _read(file: Path) -> tuple[LocalCertificates, float]:
    """Return what is kept for a cluster, and when it was made. Raises StateError; ValueError, TypeError or KeyError for
    what is damaged or absent."""
    kept = json.loads(read_file(file) or b"")
    texts = [kept[one.name] for one in fields(LocalCertificates)]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("not a text")
    return LocalCertificates(*texts), float(kept["made_at"])


def aged_at(certificate_pem: str) -> float:
    """Return the unix seconds at which a certificate has a third of its life left; raises StateError."""
    from arcbridge.pki.authority import certificate_validity

    begin, end = certificate_validity(certificate_pem)
    return begin + (end - begin) * 2 / 3


def _worn(certificate_pem: str, now: float) -> bool:
    from arcbridge.pki.authority import certificate_validity

    return not certificate_validity(certificate_pem)[0] <= now < aged_at(certificate_pem)


def _issued_by(authority: Authority, certificate_pem: str) -> bool:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    try:
        x509.load_pem_x509_certificate(certificate_pem.encode()).verify_directly_issued_by(
            x509.load_pem_x509_certificate(authority.certificate_pem.encode())
        )
    except (ValueError, TypeError, InvalidSignature, x509.InvalidVersion):
        return False
    return True
