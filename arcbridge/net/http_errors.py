"""Says why an HTTP request got no answer, in words for a person: aiohttp's own name its classes and quote addresses.

It neither raises nor logs, and does not say what to do: the caller knows which server was asked, and for what.
Invariant: for an error of the operating system the text has its reason and no address.
"""

from __future__ import annotations

import os
import socket

import aiohttp

from arcbridge.net.http_connector import NotConnected


def reason(error: BaseException) -> str:
    """Say what went wrong, as `connection refused`; the class of the error where there are no better words."""
    if isinstance(error, NotConnected):
        return error.detail or error.message
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, socket.gaierror):
        return f"its name cannot be resolved: {(cause.strerror or 'no reason given').lower()}"
    if isinstance(cause, aiohttp.ServerDisconnectedError):
        return "it ended the connection without an answer"
    if isinstance(cause, OSError) and cause.errno and cause.errno > 0:
        # asyncio puts the addresses into the text of such an error; the number says what happened.
        return os.strerror(cause.errno).lower()
    return type(error).__name__
