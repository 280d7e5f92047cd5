"""The relay's outer certificate: given as files, or issued by the relay's own CA; renewed without a restart.

The handlers ask for their context at each connection, so a new certificate counts from the next handshake on and no
connection that stands is touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.net.tls import ServerContext, outer_server_contexts
from arcbridge.pki.authority import Authority, certificate_validity
from arcbridge.pki.credentials import renew_at
from arcbridge.settings.config import RelayTlsConfig

log = structlog.get_logger("arcbridge.relay")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A certificate and its key as they were read or issued; nothing of it is in force yet."""

    config: RelayTlsConfig
    stamp: tuple[object, ...]
    """Dates of the files before they were read."""
    chain_pem: str
    """What handshakes show: the certificate, and those of its CAs that came with it."""
    key_pem: str = field(repr=False)
    contexts: dict[str, ServerContext]
    """By ALPN protocol."""
    expires: float
    """Unix seconds."""
    renew_at: float

    @property
    def spki(self) -> bytes:
        """The key of the certificate, as handshakes show it."""
        return next(iter(self.contexts.values())).spki


class ServerCertificate:
    """`loaded` is in force; `refresh` is called once in a while. Raises `ConfigError` when made."""

    def __init__(
        self, config: RelayTlsConfig, authority: Authority, host: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._authority = authority
        self._host = host
        self._clock = clock
        if (config.certificate is None) != (config.key is None):
            raise ConfigError("tls: certificate and key go together; set both or neither")
        self.loaded = self._load(config)
        """What is in force."""

    def read(self, config: RelayTlsConfig) -> Loaded:
        """Read the files of `config` now, whatever their dates say, for `put`. Raises `ConfigError`.

        An own certificate stays the one in force.
        """
        if config.certificate is None and self.loaded.config.certificate is None:
            return replace(self.loaded, config=config)
        return self._load(config)

    def put(self, loaded: Loaded) -> bool:
        """Show this certificate from the next handshake on; return whether it is another. Raises nothing."""
        was, self.loaded = self.loaded, loaded
        return (loaded.spki, loaded.expires) != (was.spki, was.expires)

    @property
    def ca_pem(self) -> str | None:
        """The relay's own CA where it has issued the certificate; None where the certificate came as a file."""
        return self._authority.trusted_pem if self.loaded.config.certificate is None else None

    def refresh(self, *, rotated: bool = False) -> None:
        """Take over changed files; issue a new certificate at two thirds of the life of an own one, or where the CA was
        `rotated`. What it cannot read or issue it tries again the next time."""
        config = self.loaded.config
        if rotated:
            # From memory: which agents are let in must not depend on files that cannot be read now.
            self.loaded = replace(self.loaded, contexts=self._contexts(self.loaded), renew_at=0.0)
        try:
            if config.certificate is not None:
                if _stamp(config) == self.loaded.stamp:
                    return
            elif self._clock() < self.loaded.renew_at:
                return
            self.loaded = self._load(config)
            log.info("certificate renewed", expires=int(self.loaded.expires))
        except ArcbridgeError as error:
            # The two files are not replaced in one instant: the old pair goes on until both fit.
            log.warning("certificate not renewed", reason=error.message)

    def _load(self, config: RelayTlsConfig) -> Loaded:
        # Before the files are read: one that changes meanwhile is read again.
        stamp = _stamp(config)
        if config.certificate is not None and config.key is not None:
            certificate_pem = read_text("tls.certificate", config.certificate)
            key_pem = read_text("tls.key", config.key)
        else:
            issued = self._authority.issue_server([self._host])
            # With the way back to former CAs, for ends that do not know this one yet.
            certificate_pem, key_pem = issued.certificate_pem + self._authority.links_pem, issued.key_pem
        not_before, not_after = certificate_validity(certificate_pem)
        loaded = Loaded(config, stamp, certificate_pem, key_pem, {}, not_after, renew_at(not_before, not_after))
        return replace(loaded, contexts=self._contexts(loaded))

    def _contexts(self, loaded: Loaded) -> dict[str, ServerContext]:
        return outer_server_contexts(loaded.chain_pem, loaded.key_pem, self._authority.trusted_pem)


def _stamp(config: RelayTlsConfig) -> tuple[object, ...]:
    """Dates and numbers of the files; None for one that is not named or cannot be looked at."""
    found: list[object] = []
    for path in (config.certificate, config.key):
        try:
            status = None if path is None else path.stat()
        except OSError:
            status = None
        found.append(None if status is None else (status.st_mtime_ns, status.st_ino))
    return tuple(found)


def read_text(setting: str, path: Path, kind: str = "PEM text") -> str:
    """Return the text of the file that `setting` names; `kind`: what it has to be. Raises `ConfigError`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not {kind}"
        raise ConfigError(f"{setting}: {path} cannot be read: {reason}") from error
