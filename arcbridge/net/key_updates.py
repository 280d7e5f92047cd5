"""Bounds the KeyUpdates of a peer whose TLS aiofastnet reads: OpenSSL takes any number of them within one read.

OpenSSL reports each new secret to a callback (`SSL_CTX_set_keylog_callback`), for which Python has a file alone. The
one here reads the name of a secret and nothing of the secret; no other record costs anything. It finds OpenSSL's
context where aiofastnet does. Invariant: behind `MOST` secrets that KeyUpdates made, a connection reads no further
record, and its transport takes that for the peer's end (docs/threats.md#J34).
"""

from __future__ import annotations

import ctypes
import functools
import ssl
from typing import Any, Final

MOST: Final = 64
"""Secrets that KeyUpdates make in one connection. An answer to one makes another; one is due each 400 GB (RFC 8446
§5.5)."""
_BEGINS: Final = b"CLIENT_HANDSHAKE_TRAFFI"
_UPDATES: Final = b"CLIENT_TRAFFIC_SECRET_N", b"SERVER_TRAFFIC_SECRET_N"
"""Names of the first secret of a handshake and of those that a KeyUpdate makes; the same number of bytes of each."""
_RECEIVED_SHUTDOWN: Final = 2
"""SSL_RECEIVED_SHUTDOWN of OpenSSL's ssl.h: what comes from the peer now is dropped."""
_Callback: Final = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.POINTER(ctypes.c_char * len(_BEGINS)))
_made: dict[int, int] = {}
"""Secrets that KeyUpdates made, by OpenSSL's connection; those that had none since their handshake are left out."""


def bound_key_updates(context: ssl.SSLContext, libssl: str) -> None:
    """Bound the KeyUpdates in connections of a context; `libssl`: the path of the library that `ssl` uses."""
    openssl, callback = find_openssl(libssl)
    at = ctypes.c_void_p.from_address(id(context) + object.__basicsize__)
    openssl.SSL_CTX_set_keylog_callback(at, callback)


@functools.cache
def find_openssl(libssl: str) -> tuple[ctypes.CDLL, Any]:
    """Return the library and the callback, which lives as long as it. Raises OSError, AttributeError or MemoryError
    where one of them cannot be had."""
    openssl = ctypes.CDLL(libssl)
    openssl.SSL_CTX_set_keylog_callback.argtypes = ctypes.c_void_p, _Callback
    openssl.SSL_set_shutdown.argtypes = ctypes.c_void_p, ctypes.c_int

    def secret_made(tls: int, line: Any) -> None:
        name = line.contents.raw
        if name == _BEGINS:
            _made.pop(tls, None)
        elif name in _UPDATES:
            count = _made[tls] = _made.get(tls, 0) + 1
            if count > MOST:
                openssl.SSL_set_shutdown(tls, _RECEIVED_SHUTDOWN)

    return openssl, _Callback(secret_made)
