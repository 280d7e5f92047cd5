"""The relay's outer certificate: given as files, or issued by the relay's own CA; renewed without a restart.

The handlers ask for their context at each connection, so a new certificate counts from the next handshake on and no
connection that stands is touched.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import structlog

from arcbridge.config import RelayTlsConfig
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.net.tls import ServerContext, outer_server_contexts
from arcbridge.pki.authority import Authority, certificate_validity
from arcbridge.pki.credentials import renew_at

log = structlog.get_logger("arcbridge.relay")


class ServerCertificate:
    """`contexts` by ALPN protocol; `refresh` is called once in a while. Raises `ConfigError` when made."""

    def __init__(
        self,
        config: RelayTlsConfig,
        authority: Authority,
        host: str,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._authority = authority
        self._host = host
        self._clock = clock
        if (config.certificate is None) != (config.key is None):
            raise ConfigError("tls: certificate and key go together; set both or neither")
        self._stamp = self._files_stamp()
        self.expires = 0.0
        """Unix seconds."""
        self._renew_at = 0.0
        self.contexts: dict[str, ServerContext] = {}
        self._load()

    def take(self, config: RelayTlsConfig) -> bool:
        """Take over the files of `config` now, whatever their dates say; return whether the certificate is another.

        Raises `ConfigError`, and changes nothing then.
        """
        before, was = self._config, (self.spki, self.expires)
        self._config = config
        try:
            stamp = self._files_stamp()
            if config.certificate is not None or before.certificate is not None:
                self._load()
        except ArcbridgeError:
            self._config = before
            raise
        self._stamp = stamp
        return (self.spki, self.expires) != was

    @property
    def spki(self) -> bytes:
        """The key of the certificate, as handshakes show it."""
        return next(iter(self.contexts.values())).spki

    def refresh(self) -> None:
        """Take over changed files; issue a new certificate at two thirds of the life of an own one."""
        try:
            if self._config.certificate is not None:
                stamp = self._files_stamp()
                if stamp == self._stamp:
                    return
                self._load()
                self._stamp = stamp
            elif self._clock() < self._renew_at:
                return
            else:
                self._load()
            log.info("certificate renewed", expires=int(self.expires))
        except ArcbridgeError as error:
            # The two files are not replaced in one instant: the old pair goes on until both fit.
            log.warning("certificate not renewed", reason=error.message)

    def _load(self) -> None:
        if self._config.certificate is not None and self._config.key is not None:
            certificate_pem = _read("tls.certificate", self._config.certificate)
            key_pem = _read("tls.key", self._config.key)
        else:
            issued = self._authority.issue_server([self._host])
            certificate_pem, key_pem = issued.certificate_pem, issued.key_pem
        not_before, not_after = certificate_validity(certificate_pem)
        self.contexts = outer_server_contexts(certificate_pem, key_pem, self._authority.certificate_pem)
        self.expires = not_after
        self._renew_at = renew_at(not_before, not_after)

    def _files_stamp(self) -> tuple[object, ...]:
        return tuple(
            (path.stat().st_mtime_ns, path.stat().st_ino) if path is not None and path.exists() else None
            for path in (self._config.certificate, self._config.key)
        )


def _read(setting: str, path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not PEM text"
        raise ConfigError(f"{setting}: {path} cannot be read: {reason}") from error
