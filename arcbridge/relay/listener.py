"""The relay's one port: accept, look at the ClientHello without taking it, and hand the socket to a handler.

Why not the loop's own server: it accepts and drops connections without a word when descriptors run out (uvloop), and
it starts TLS before it is known which. Here the listening socket has one callback; when descriptors run out,
accepting pauses and is counted, and a spare descriptor serves to turn one waiting connection away, so that its peer
hears something.

Why not just read: the TLS of the chosen handler needs the same bytes. So they are *peeked*; and because an incomplete
ClientHello keeps a level-triggered loop awake (65,000 wake-ups in 0.2 s from one idle peer, measured), SO_RCVLOWAT is
raised to what the parser needs, and set back before the socket is handed over.

Behind a load balancer that the settings name, a PROXY protocol header comes first. It is taken from the socket, and
from then on the connection counts for the address that the header names; header and ClientHello share one deadline.

The peek picks the handler and proves nothing: each handler checks what its handshake really selected.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Coroutine
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Final

import structlog

from arcbridge.errors import ConfigError
from arcbridge.limiters import Bursts
from arcbridge.net import client_hello
from arcbridge.net.address import Address
from arcbridge.net.descriptors import limit
from arcbridge.net.sockets import AcceptLoop, receive, reset, send_all, tune
from arcbridge.relay import proxy_protocol
from arcbridge.relay.admission import Admission, Purpose, Ticket
from arcbridge.relay.counters import Counters
from arcbridge.relay.proxy_protocol import Networks, ProxyIncomplete, ProxyRefusal, is_among
from arcbridge.relay.tcp_state import has_ended
from arcbridge.settings.surroundings import listeners, named
from arcbridge.tasks import TaskSet, cancel_and_wait

PEEK_DEADLINE: Final = 5.0
LOG_INTERVAL: Final = 10.0
"""Seconds between two lines in the log about connections that one bound refuses."""
HTTP_TURN: Final = 8
"""Of so many handlers that start while connections of both queues wait, one is for HTTP."""
_BACKLOG: Final = 4096
_REPEEK: Final = 0.1

_PLAIN_HTTP_ANSWER: Final = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 52\r\n"
    b"Connection: close\r\nServer: arcbridge\r\n\r\nThis port speaks TLS only: use https:// in the URL.\n"
)

_PURPOSES: Final = {client_hello.CONTROL: Purpose.CONTROL, client_hello.HTTP: Purpose.HTTP}
"""The purposes of connections by protocol; every other protocol is for joins."""

log = structlog.get_logger("arcbridge.relay")

ConnectionHandler = Callable[[socket.socket, Ticket], Coroutine[Any, Any, None]]
"""Takes over a socket; returns when the connection needs no task any more, and never leaks the socket."""


@dataclass(eq=False, repr=False)
class Listener:
    """`start`, then `stop` and `close`. `handlers` by ALPN protocol; `http/1.1` takes connections without one, too."""

    handlers: dict[bytes, ConnectionHandler]
    admission: Admission
    counters: Counters
    _: KW_ONLY
    peek_deadline: float = PEEK_DEADLINE
    balancers: Networks = ()
    """Where connections come from that begin with a PROXY protocol header."""

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._accepting: AcceptLoop | None = None
        self._spare = -1
        """A descriptor kept for the moment when there is no other; -1: none."""
        self._arrivals: set[_Arrival] = set()
        self._queues: tuple[dict[_Arrival, ConnectionHandler], ...] = ({}, {})
        """Connections that wait for their handler to start: joins and control connections, then HTTP, which strangers
        can ask for as often as they like."""
        self._starting = False
        """Whether `_start_next` is scheduled."""
        self._passed_over = 0
        """Handlers that started since the last one for HTTP, while HTTP connections waited."""
        self._tasks = TaskSet()
        self._told: Bursts[str] = Bursts(LOG_INTERVAL)
        """Connections for which there is no place, by the bound that refused them, and those closed to make room, by
        their purpose."""

    def start(self, listen: Address, *, shared: bool = False) -> Address:
        """Bind, accept, and return the bound address. Raises `ConfigError` that names the setting.

        `shared`: with other processes of this user that say so, too; the kernel chooses one for each connection.
        """
        sock = bind(listen, shared=shared)
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._accepting = AcceptLoop([sock], self._accepted, self._exhausted)
        self._accepting.start()
        host, port = sock.getsockname()[:2]
        return Address(host, port)

    def leave(self) -> None:
        """Take what the kernel has queued for this socket, then close it: what stays in the queue would be reset.

        For a port that others go on listening on. Those who are let in last are served as all others.
        """
        while self._accepting is not None and self._accepting.accept():
            # Again until the queue is empty, or descriptors are.
            pass
        self._close()

    def stop(self) -> None:
        """Accept nothing more, and close connections whose handler has not started; those handed on go on."""
        self._close()
        for arrival in list(self._arrivals):
            arrival.reject("peek_closed")

    def _close(self) -> None:
        if self._accepting is not None:
            self._accepting.close()
            self._accepting = None
            self._close_spare()

    async def close(self) -> None:
        """End, after `stop`, what the handlers run, and wait for it."""
        await cancel_and_wait(*self._tasks)

    @property
    def peeking(self) -> int:
        return len(self._arrivals)

    # -- accepting -------------------------------------------------------------------------------------------------

    def _accepted(self, sock: socket.socket, host: str) -> None:
        self.counters.accepted += 1
        through_proxy = is_among(host, self.balancers)
        ticket = self.admission.enter(host, through_proxy=through_proxy)
        if isinstance(ticket, str):
            self._turn_away(sock, host, ticket)
            return
        arrival = _Arrival(self, sock, ticket, through_proxy)
        self._arrivals.add(arrival)
        arrival.start(self.peek_deadline)

    def _exhausted(self, listening: socket.socket, _error: OSError, _again: bool) -> None:
        """Turn one connection away with the spare descriptor; the others wait in the kernel's queue."""
        self.counters.accept_pauses += 1
        log.warning(
            "out of file descriptors",
            available=limit(),
            advice="raise the hard limit (LimitNOFILE, docker --ulimit), or lower limits.sessions and limits.agents",
        )
        self._close_spare()
        try:
            reset(listening.accept()[0])
            self.counters.rejected["descriptors"] += 1
        except OSError:
            # Another part of this process took the descriptor, or the queue is empty.
            pass
        try:
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            # The next pause does without one.
            pass

    def _close_spare(self) -> None:
        if self._spare >= 0:
            os.close(self._spare)
            self._spare = -1

    # -- dispatch --------------------------------------------------------------------------------------------------

    def refused(self, arrival: _Arrival, reason: str) -> None:
        """Close a connection for which the bound `reason` has no place."""
        self._arrivals.discard(arrival)
        arrival.ticket.leave()
        self._turn_away(arrival.sock, arrival.ticket.address, reason)

    def arrived(self, arrival: _Arrival, hello: client_hello.ClientHello) -> None:
        self._arrivals.discard(arrival)
        offered = hello.alpn or (client_hello.HTTP,)
        protocol = next((name for name in offered if name in self.handlers), None)
        if protocol is None:
            self.rejected(arrival, "no_protocol")
            return
        purpose = _PURPOSES.get(protocol, Purpose.JOIN)
        if reason := arrival.ticket.becomes(purpose):
            self.refused(arrival, reason)
            return
        self._arrivals.add(arrival)
        self._queues[purpose is Purpose.HTTP][arrival] = self.handlers[protocol]
        arrival.ticket.on_evicted = partial(self.evict, arrival, purpose)
        self._start_soon()

    def _start_soon(self) -> None:
        if not self._starting:
            self._starting = True
            self._loop.call_soon(self._start_next)

    def _start_next(self) -> None:
        """Start one handler. Each begins with a handshake, a millisecond of work: a hundred that came together would
        keep every session waiting for a tenth of a second, so that the loop does all else between two of them.

        Joins and control connections come first, and every `HTTP_TURN`th handler is one for HTTP where one waits:
        agents renew their certificates over HTTP, and joins may come for as long as a fleet of clients reconnects.
        """
        self._starting = False
        first, http = self._queues
        queue = http if http and (not first or self._passed_over >= HTTP_TURN - 1) else first
        if not queue:  # those that waited were closed
            return
        self._passed_over = self._passed_over + 1 if http and queue is first else 0
        arrival = next(iter(queue))
        handler = queue.pop(arrival)
        self._arrivals.discard(arrival)
        self._run(handler, arrival)
        self._start_soon()

    def rejected(self, arrival: _Arrival, reason: str) -> None:
        self._forget(arrival)
        self.counters.rejected[reason] += 1
        if reason == client_hello.Reason.PLAIN_HTTP.value:
            self._run(_answer_plain_http, arrival)
        else:
            arrival.ticket.leave()
            reset(arrival.sock)

    def evict(self, arrival: _Arrival, purpose: Purpose) -> None:
        """Close a connection, whose handler has not started, because another one takes its place."""
        self._forget(arrival)
        reset(arrival.sock)
        self._tell("connections closed to make room", purpose.value, arrival.ticket.address)

    def _forget(self, arrival: _Arrival) -> None:
        self._arrivals.discard(arrival)
        for queue in self._queues:
            queue.pop(arrival, None)

    def _evict_task(self, task: asyncio.Task[None], purpose: Purpose, ticket: Ticket) -> None:
        # A handler that is cancelled closes its socket.
        task.cancel()
        self._tell("connections closed to make room", purpose.value, ticket.address)

    def _turn_away(self, sock: socket.socket, address: str, reason: str) -> None:
        """Close a connection for which there is no place."""
        self.counters.rejected[reason] += 1
        reset(sock)
        self._tell("connections turned away", reason, address)

    def _tell(self, event: str, reason: str, address: str) -> None:
        """Log what happens to connections for this reason, the last of them from `address`; not each one."""
        since_last = self._told.seen(reason, self._loop.time())
        if since_last is not None:
            log.warning(event, reason=reason, source=address, connections=since_last)

    async def _enter(self, handler: ConnectionHandler, sock: socket.socket, ticket: Ticket) -> None:
        try:
            if wait := ticket.held_for():
                ticket.waits()
                try:
                    await asyncio.sleep(wait)
                except BaseException:
                    reset(sock)
                    raise
            await handler(sock, ticket)
        except asyncio.CancelledError:
            raise
        except Exception:
            # One connection's bug ends one connection. The handler has closed the socket, or a transport owns it.
            self.counters.rejected["failed"] += 1
            log.exception("connection failed", source=ticket.address)
        finally:
            ticket.leave()

    def _run(self, handler: ConnectionHandler, arrival: _Arrival) -> None:
        ticket = arrival.ticket
        # Handshake, what the peer then says, and its token: each step is charged to the address.
        task = self._tasks.start(ticket.loop_time.steps(self._enter(handler, arrival.sock, ticket)))
        ticket.on_evicted = partial(self._evict_task, task, ticket.purpose or Purpose.ARRIVING, ticket)


class _Arrival:
    """A connection whose ClientHello, or the PROXY protocol header before it, is not complete; then one whose handler
    is yet to start."""

    __slots__ = (
        "_deadline",
        "_expects_header",
        "_left",
        "_listener",
        "_lowat",
        "_reading",
        "_repeek",
        "sock",
        "ticket",
    )

    def __init__(self, listener: Listener, sock: socket.socket, ticket: Ticket, expects_header: bool) -> None:
        self._listener = listener
        self._expects_header = expects_header
        self.sock = sock
        self.ticket = ticket
        ticket.on_evicted = self._evict
        self._lowat = 1
        self._left = False
        """Whether it waits for nothing more."""
        self._reading = False
        self._deadline: asyncio.TimerHandle | None = None
        self._repeek: asyncio.TimerHandle | None = None

    def start(self, deadline: float) -> None:
        """Look at once: where the loop has other work, the ClientHello is there already, and nothing is waited for."""
        self._readable()
        if self._left:
            return
        loop = asyncio.get_running_loop()
        self._deadline = loop.call_later(deadline, self.reject, "peek_timeout")
        self._reading = True
        loop.add_reader(self.sock.fileno(), self._readable)

    def _readable(self) -> None:
        self.ticket.loop_time.run(self._look)

    def _look(self) -> None:
        try:
            data = self.sock.recv(client_hello.MAX_HELLO, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.reject("peek_closed")
            return
        if not data:
            self.reject("peek_closed")
            return
        if self._expects_header:
            rest = self._header(data)
            if not rest:
                return
            data = rest
        answer = client_hello.peek(data)
        if isinstance(answer, client_hello.Incomplete):
            self._wait_for(answer.need, len(data))
            return
        self._leave()
        if isinstance(answer, client_hello.NotTls):
            self._listener.rejected(self, answer.reason.value)
            return
        if self._lowat != 1:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        self._listener.arrived(self, answer)

    def _header(self, data: bytes) -> bytes:
        """Take the balancer's header from the socket; return the bytes behind it that are there, or nothing where
        this connection goes on later, or not at all."""
        answer = proxy_protocol.peek(data)
        if isinstance(answer, ProxyIncomplete):
            self._wait_for(answer.need, len(data))
            return b""
        if isinstance(answer, ProxyRefusal):
            self.reject(answer.value)
            return b""
        # All of it is there: it was peeked at.
        self.sock.recv(answer.size)
        self._expects_header = False
        if self._lowat != 1:
            self._lowat = 1
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        if reason := self.ticket.came_from(answer.source or self.ticket.address):
            self._leave()
            self._listener.refused(self, reason)
            return b""
        return data[answer.size :]

    def _wait_for(self, need: int, have: int) -> None:
        """Sleep until `need` bytes are there."""
        if self._lowat < need:
            self._lowat = need
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, need)
            return
        # Awake with less than was asked for: the peer has ended its side (nothing can follow), or the kernel ignores
        # the mark; then look again by the clock, never by the level.
        if have < need and has_ended(self.sock):
            self.reject("peek_closed")
            return
        loop = asyncio.get_running_loop()
        self._reading = False
        loop.remove_reader(self.sock.fileno())
        self._repeek = loop.call_later(_REPEEK, self._look_again)

    def _look_again(self) -> None:
        self._repeek = None
        self._reading = True
        asyncio.get_running_loop().add_reader(self.sock.fileno(), self._readable)

    def reject(self, reason: str) -> None:
        self._leave()
        self._listener.rejected(self, reason)

    def _evict(self) -> None:
        self._leave()
        self._listener.evict(self, Purpose.ARRIVING)

    def _leave(self) -> None:
        """Remove every timer and callback from the socket."""
        self._left = True
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self._repeek is not None:
            self._repeek.cancel()
            self._repeek = None
        if self._reading:
            self._reading = False
            asyncio.get_running_loop().remove_reader(self.sock.fileno())


async def _answer_plain_http(sock: socket.socket, ticket: Ticket) -> None:
    """Send one 400, so that a user of http:// reads why. The request is read first, or closing would send RST."""
    try:
        async with asyncio.timeout(1.0):
            await receive(sock, 16 * 1024)
            await send_all(sock, _PLAIN_HTTP_ANSWER)
            sock.shutdown(socket.SHUT_WR)
            await receive(sock, 16 * 1024)
    except (OSError, TimeoutError):
        # It did not wait for the answer.
        pass
    finally:
        sock.close()


def bind(listen: Address, *, shared: bool = False, accept: bool = True) -> socket.socket:
    """Return a listening socket, or with `accept` False one that only holds the port among those that share it.

    Raises `ConfigError` that names the setting.
    """
    try:
        return _bind(listen, shared, accept)
    except OSError as error:
        raise ConfigError(_bind_message(listen, error)) from error


def _bind(listen: Address, shared: bool, accept: bool) -> socket.socket:
    host, family = listen.host, socket.AF_INET
    if not host and socket.has_dualstack_ipv6():
        host = "::"
    if host:
        candidates = socket.getaddrinfo(host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, sockaddr = socket.AddressFamily(candidates[0][0]), candidates[0][4]
    else:
        sockaddr = ("0.0.0.0", listen.port)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Restarting needs it. Two relays on one port are refused: one that stands alone does not set SO_REUSEPORT, and
        # one with several processes first looks whether it gets the port without.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if host == "::" else 1)
        sock.setblocking(False)
        sock.bind(sockaddr)
        if accept:
            tune(sock)  # each connection inherits these options (tcp(7)), which would be seven system calls of it
            sock.listen(_BACKLOG)
        return sock
    except BaseException:
        sock.close()
        raise


def _bind_message(listen: Address, error: OSError) -> str:
    where = f"listen {str(listen)!r}"
    if error.errno == errno.EADDRINUSE:
        return f"{where}: the port is in use{named(listeners(listen.port))}; stop what uses it, or choose another one"
    if error.errno == errno.EACCES:
        return f"{where}: ports below 1024 need CAP_NET_BIND_SERVICE; grant it, or choose a higher port"
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return f"{where}: this machine has no such address"
    return f"{where}: {error.strerror or error}"
