"""Makes outgoing connections: names, address families, proxies, deadlines.

Happy Eyeballs (RFC 8305) where a name has several addresses: they alternate between families and each attempt gets
a head start of 250 ms before the next one runs beside it; the first that connects wins and all others are closed.
Names are resolved in threads of our own, because a slow DNS server must not starve the file and crypto work of the
default pool, and each name in one thread at a time, so that a slow one keeps no other waiting however often it is
asked for; an IP address needs neither thread nor race.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING, Final, cast

from arcbridge.errors import Unreachable
from arcbridge.net.address import Address
from arcbridge.net.descriptors import explain
from arcbridge.net.proxy import Proxy, proxy_for
from arcbridge.net.sockets import receive, send_all, tune, writable
from arcbridge.net.tlstransport import connect_tls

if TYPE_CHECKING:
    from python_socks.async_.asyncio import Proxy as SocksProxy

RESOLVE_DEADLINE: Final = 5.0
HEAD_START: Final = 0.25
"""RFC 8305 §8: connection attempt delay."""
DIRECT: Final = "direct"
"""As `proxy`: no proxy, whatever the environment says."""
_MAX_ADDRESSES: Final = 16
_MAX_PROXY_ANSWER: Final = 16 * 1024

_NON_BLOCKING_STREAM: Final = socket.SOCK_STREAM | getattr(socket, "SOCK_NONBLOCK", 0)
"""Where the system can make a socket so, which saves a system call."""
_UNDER_WAY: Final = frozenset({errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK, errno.EAGAIN})

SockAddr = tuple[str, int] | tuple[str, int, int, int]
Candidate = tuple[int, SockAddr]

_NAMES: Final = 32
"""Names that are resolved at once: those of relays and of TCP targets, from the settings."""
_resolver: ThreadPoolExecutor | None = None
_queries: dict[Address, Future[list[Candidate]]] = {}
"""Those that run, by name and port: they outlive the deadline of who asked."""


async def connect(address: Address, *, deadline: float, proxy: Proxy | str | None = None) -> socket.socket:
    """Return a connected, tuned, non-blocking socket to `address` (through the proxy, if any); the caller owns it.

    `deadline` is in seconds and bounds everything. `proxy` None means: as the environment says. Raises `Unreachable`
    which names the address and what failed, `ConfigError` for a malformed proxy setting. Cancelled or failed, it
    leaves no socket.
    """
    if proxy is None:
        proxy = proxy_for(address, os.environ)
    via = proxy if isinstance(proxy, Proxy) else None
    first = address if via is None else via.address
    try:
        async with asyncio.timeout(deadline):
            sock = await _race(await resolve(first))
            try:
                if via is not None:
                    await (_open_by_socks if via.socks else _open_tunnel)(sock, address, via)
            except BaseException:
                sock.close()
                raise
            return sock
    except TimeoutError as error:
        raise _unreachable(address, f"no answer within {deadline:.0f} s", via) from error
    except OSError as error:
        raise _unreachable(address, _words(error), via) from error


async def try_tls(
    address: Address, context: ssl.SSLContext, *, deadline: float, proxy: Proxy | str | None = None
) -> None:
    """Make TLS with a server and end the connection at once, to see whether it is the one that `context` trusts.

    Raises what `connect` raises, and OSError, of which ssl.SSLError is one.
    """
    sock = await connect(address, deadline=deadline, proxy=proxy)
    transport = await connect_tls(sock, context, asyncio.Protocol(), address.host)
    transport.abort()


def begin(address: Address) -> tuple[socket.socket, bool] | None:
    """Begin to connect to an IP address without waiting: the socket, and whether it is connected already.

    On the same host, and mostly on the same node, the peer has answered when the call returns: then neither a task
    nor a turn of the loop is needed. Otherwise await `finish`. None for a name: use `connect`. The caller owns the
    socket, which has no user timeout (`sockets.disable_user_timeout`). Raises `Unreachable`.
    """
    literal = _literal(address.host, address.port)
    if literal is None:
        return None
    try:
        return _begin(*literal, user_timeout=False)
    except OSError as error:
        raise _unreachable(address, _words(error)) from error


async def finish(sock: socket.socket, address: Address, *, deadline: float) -> None:
    """Until the socket of `begin` is connected. Raises `Unreachable`; failed or cancelled, the socket is closed."""
    try:
        async with asyncio.timeout(deadline):
            await _finish(sock)
    except TimeoutError as error:
        raise _unreachable(address, f"no answer within {deadline:.0f} s") from error
    except OSError as error:
        raise _unreachable(address, _words(error)) from error


async def resolve(address: Address) -> list[Candidate]:
    """Socket addresses in the order to try them, families alternating (RFC 8305 §4). Raises `OSError`."""
    literal = _literal(address.host, address.port)
    if literal is not None:
        return [literal]
    global _resolver
    if _resolver is None:
        _resolver = ThreadPoolExecutor(_NAMES, thread_name_prefix="resolver")
    query = _queries.get(address)
    if query is None:
        query = _queries[address] = _resolver.submit(_look_up, address.host, address.port)
        query.add_done_callback(lambda _: _queries.pop(address, None))  # sinks resolve in threads of their own
    try:
        async with asyncio.timeout(RESOLVE_DEADLINE):
            found = await asyncio.shield(asyncio.wrap_future(query))
            return interleave(found)
    except TimeoutError as error:
        raise OSError(f"the name {address.host} was not resolved within {RESOLVE_DEADLINE:.0f} s") from error


def interleave(found: Sequence[Candidate]) -> list[Candidate]:
    """Return the system's order (RFC 6724) kept within a family, families in turn, duplicates out."""
    unique = list(dict.fromkeys(found))
    if not unique:
        return []
    first = [candidate for candidate in unique if candidate[0] == unique[0][0]]
    other = [candidate for candidate in unique if candidate[0] != unique[0][0]]
    return [one for pair in zip_longest(first, other) for one in pair if one is not None][:_MAX_ADDRESSES]


@lru_cache(maxsize=256)
def _literal(host: str, port: int) -> Candidate | None:
    """Return the candidate of an IP address, which no thread has to look up; an agent dials such targets for each
    stream.

    None also for an address with a zone (`fe80::1%eth0`): its number is the resolver's business.
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return family, (host, port)
    return None


def _look_up(host: str, port: int) -> list[Candidate]:
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [
        (family, sockaddr)
        for family, _, _, _, sockaddr in answers
        if family in (socket.AF_INET, socket.AF_INET6) and isinstance(sockaddr[0], str)
    ]


async def _race(candidates: list[Candidate]) -> socket.socket:
    if not candidates:
        raise OSError("the name has no address")
    if len(candidates) == 1:
        return await _attempt(*candidates[0])  # a single address needs no race, and no task
    attempts: set[asyncio.Task[socket.socket]] = set()
    errors: list[OSError] = []
    waiting = list(candidates)
    winner: socket.socket | None = None
    try:
        while waiting or attempts:
            if waiting:
                family, sockaddr = waiting.pop(0)
                attempts.add(asyncio.create_task(_attempt(family, sockaddr)))
            done, attempts = await asyncio.wait(
                attempts, timeout=HEAD_START if waiting else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                error = task.exception()
                if error is None:
                    if winner is None:
                        winner = task.result()
                    else:
                        task.result().close()
                elif isinstance(error, OSError):
                    errors.append(error)
                else:
                    raise error
            if winner is not None:
                return winner
        # The first error is about the preferred address, which is what people ask about.
        raise errors[0]
    finally:
        # No await here: a cancellation that hit it would lose the winner. A cancelled attempt closes its socket in
        # the loop's next turn, one that has just connected is closed by the callback.
        for task in attempts:
            task.add_done_callback(_close_result)
            task.cancel()


def _close_result(task: asyncio.Task[socket.socket]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close()


async def _attempt(family: int, sockaddr: SockAddr) -> socket.socket:
    sock, connected = _begin(family, sockaddr)
    if not connected:
        await _finish(sock)
    return sock


def _begin(family: int, sockaddr: SockAddr, *, user_timeout: bool = True) -> tuple[socket.socket, bool]:
    sock = socket.socket(family, _NON_BLOCKING_STREAM, socket.IPPROTO_TCP)
    try:
        tune(sock, user_timeout=user_timeout)
        code = sock.connect_ex(sockaddr)
        if code in _UNDER_WAY:
            # Linux says "in progress" even when the peer has answered within the call; the second call tells.
            code = sock.connect_ex(sockaddr)
        if code in _UNDER_WAY:
            return sock, False
        if code not in (0, errno.EISCONN):
            raise OSError(code, os.strerror(code))
        return sock, True
    except BaseException:
        sock.close()
        raise


async def _finish(sock: socket.socket) -> None:
    try:
        await writable(sock)
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        sock.close()
        raise


class ProxyRefused(OSError):
    """The proxy does not let us through; the words say what to do."""


class CredentialsMissing(ProxyRefused):
    """The proxy asks for credentials, and none are set."""


async def _open_tunnel(sock: socket.socket, address: Address, proxy: Proxy) -> None:
    lines = [f"CONNECT {address} HTTP/1.1", f"Host: {address}"]
    if proxy.authorization:
        lines.append(f"Proxy-Authorization: {proxy.authorization}")
    await send_all(sock, ("\r\n".join(lines) + "\r\n\r\n").encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        chunk = await receive(sock, 4096)
        if not chunk:
            raise OSError("the proxy closed the connection")
        answer += chunk
        if len(answer) > _MAX_PROXY_ANSWER:
            raise OSError("the proxy's answer is not HTTP")
    head, _, rest = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n", 1)[0].split(b" ", 2)
    if len(status) < 2 or not status[0].startswith(b"HTTP/1.") or len(status[1]) != 3 or not status[1].isdigit():
        raise OSError("the proxy's answer is not HTTP")
    code = int(status[1])
    if code in (401, 407):  # tinyproxy answers 401 where the password is wrong
        takes = "HTTPS_PROXY takes them as http://user:password@host:port"
        if proxy.authorization:
            raise ProxyRefused(f"the proxy does not take these credentials; {takes}")
        raise CredentialsMissing(f"the proxy asks for credentials; {takes}")
    if not 200 <= code < 300:
        raise ProxyRefused(f"the proxy refused with status {code}; ask its owner to allow CONNECT to {address}")
    if rest:
        # A TLS server never speaks first: the sender of this is not the relay.
        raise OSError("the proxy sent data of its own into the connection")


class _Connected:
    """A connection to a SOCKS proxy in the place where python-socks expects what connects to it.

    That library dials one address after the other and knows none of our socket options; here it negotiates alone.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def connect(self, **_: object) -> socket.socket:
        return self._sock


async def _open_by_socks(sock: socket.socket, address: Address, proxy: Proxy) -> None:
    """Let a SOCKS 5 proxy connect `sock` to `address`; raises `OSError`."""
    from python_socks import ProxyError, ProxyType  # for those who have such a proxy
    from python_socks.async_.asyncio import Proxy as SocksProxy

    negotiation = SocksProxy(
        ProxyType.SOCKS5,
        proxy.address.host,
        proxy.address.port,
        username=proxy.username or None,
        password=proxy.password or None,
        rdns=True,
        forward=cast("SocksProxy", _Connected(sock)),
    )
    try:
        # The caller's deadline is shorter, and counts for all of it.
        await negotiation.connect(address.host, address.port, timeout=3600)
    except ProxyError as error:
        if error.error_code is not None:
            raise OSError(f"the proxy refused: {str(error).lower()}") from error
        if "uthentication" in str(error):
            raise ProxyRefused(
                "the proxy does not take these credentials; put them into ALL_PROXY as socks5://user:password@host:port"
            ) from error
        raise OSError("the proxy does not speak SOCKS 5") from error


def _unreachable(address: Address, why: str, via: Proxy | None = None) -> Unreachable:
    through = "" if via is None else f" through the proxy {via.address}"
    error = Unreachable(f"cannot reach {address}{through}: {why}")
    error.detail = f"{why}{through}"
    return error


def _words(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"the name cannot be resolved ({error.strerror})"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return explain(error)
    return (error.strerror or str(error)).lower() if error.errno else str(error)
