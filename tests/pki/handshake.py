"""A real TLS 1.3 handshake between two ssl objects in memory, as strict as Python 3.13 and later are by default."""

from __future__ import annotations

import ssl
import tempfile
from pathlib import Path

from arcbridge.pki.authority import Issued


def context(side: int, ca_pem: str, own: Issued | None = None) -> ssl.SSLContext:
    made = ssl.SSLContext(side)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.load_verify_locations(cadata=ca_pem)
    made.verify_mode = ssl.CERT_REQUIRED
    if own is not None:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "pair.pem"
            file.write_text(own.certificate_pem + own.key_pem)
            made.load_cert_chain(file)
    return made


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> tuple[bytes, bytes]:
    """Both ends' view of the other's certificate (DER); raises `ssl.SSLError` as the end that refuses does."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(to_client, to_server, server_hostname=name)
    far = server.wrap_bio(to_server, to_client, server_side=True)
    waiting = [near, far]
    for _ in range(10):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
        if not waiting:
            return near.getpeercert(True) or b"", far.getpeercert(True) or b""
    raise AssertionError("the handshake made no progress")
