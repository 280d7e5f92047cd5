"""Loads a certificate chain and its private key into a TLS context, from texts.

OpenSSL reads them from files only: the texts pass through a file in memory, or a private one that is removed at once.
Invariant: no key is left on a disk, and OpenSSL never asks a terminal for a passphrase.
"""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator

from arcbridge.errors import ConfigError


def load_chain(context: ssl.SSLContext, certificate_pem: str, key_pem: str) -> None:
    """Raises `ConfigError` when the PEMs are unreadable, encrypted, or do not belong together."""

    def no_password() -> str:
        # Without this OpenSSL would ask on the terminal.
        raise ConfigError("the private key is encrypted: give a key without a passphrase, in a file only you can read")

    with _private_file(joined(certificate_pem, key_pem)) as path:
        try:
            context.load_cert_chain(path, password=no_password)
        except ssl.SSLError as error:
            raise ConfigError("certificate and key are not readable PEM, or do not belong together") from error


def joined(certificate_pem: str, key_pem: str) -> str:
    """Return one text of both, of which OpenSSL takes the first certificate and the first key."""
    return certificate_pem.rstrip() + "\n" + key_pem


@contextlib.contextmanager
def _private_file(text: str) -> Iterator[str]:
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("arcbridge-pem", os.MFD_CLOEXEC)
        try:
            path = f"/proc/self/fd/{descriptor}"
            if os.path.exists(path):
                _write_all(descriptor, text.encode())
                yield path
                return
        finally:
            os.close(descriptor)
    import tempfile  # where there is no file in memory

    descriptor, path = tempfile.mkstemp(prefix="arcbridge-")
    try:
        try:
            _write_all(descriptor, text.encode())
        finally:
            os.close(descriptor)
        yield path
    finally:
        os.unlink(path)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]
