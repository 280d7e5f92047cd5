"""Looks at the hops and returns facts; decides nothing (`judgement`).

Each probe has its own deadline, leaves no connection open, and raises nothing that belongs to its hop. Until the
relay's certificate is verified nothing secret is sent; the kubeconfig and the kept ports are read and never changed.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from arcbridge.client.doctor.access_judgement import ContextFacts
from arcbridge.client.doctor.judgement import CertificateFacts, NameFacts, ProxyFacts, RelayFacts, TcpFacts, TlsFacts
from arcbridge.client.kubeconfig.entries import MARK, Kubeconfig
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ArcbridgeError, ConfigError, Unreachable
from arcbridge.mux.session import MuxSession
from arcbridge.net.address import Address
from arcbridge.net.dialer import DIRECT, CredentialsMissing, connect, resolve
from arcbridge.net.loopback import port_holder
from arcbridge.net.proxy import Proxy, proxy_for
from arcbridge.net.tls import ALPN_HTTP, ALPN_JOIN
from arcbridge.net.tlspipe import TlsPipe

CONNECT_DEADLINE = 5.0
TLS_DEADLINE = 5.0
LOCAL_DEADLINE = 2.0
PING_DEADLINE = 2.0
_ANSWER_LIMIT = 64 * 1024


# -- name, proxy, TCP --------------------------------------------------------------------------------------------------


def find_proxy(address: Address, environment: Mapping[str, str]) -> tuple[Proxy | None, str]:
    """Return the proxy for a relay, and what is wrong with the setting."""
    try:
        return proxy_for(address, environment), ""
    except ConfigError as error:
        return None, error.message


async def look_up(address: Address, *, by_proxy: bool) -> NameFacts:
    """Resolve the relay's name as a connection does."""
    if by_proxy:
        return NameFacts(address.host, by_proxy=True)
    try:
        ip_address(address.host)
        return NameFacts(address.host, literal=True)
    except ValueError:
        pass
    try:
        found = await resolve(address)
    except OSError as error:
        return NameFacts(address.host, error=error.strerror or str(error))
    if not found:
        return NameFacts(address.host, error="it has no address")
    return NameFacts(address.host, tuple(str(sockaddr[0]) for _, sockaddr in found))


async def through_proxy(address: Address, proxy: Proxy) -> ProxyFacts:
    """Connect to the proxy, then through it."""
    name = str(proxy.address)
    try:
        (await connect(proxy.address, deadline=CONNECT_DEADLINE, proxy=DIRECT)).close()
    except Unreachable as error:
        return ProxyFacts(name, unreachable=error.message)
    try:
        (await connect(address, deadline=CONNECT_DEADLINE, proxy=proxy)).close()
    except Unreachable as error:
        credentials = isinstance(error.__cause__, CredentialsMissing)
        return ProxyFacts(name, refused=error.message, asks_for_credentials=credentials)
    return ProxyFacts(name)


async def reach(address: Address, proxy: Proxy | None) -> TcpFacts:
    """Connect to the relay's port, through the proxy where there is one."""
    began = time.monotonic()
    try:
        (await connect(address, deadline=CONNECT_DEADLINE, proxy=proxy or DIRECT)).close()
    except Unreachable as error:
        cause = error.__cause__
        return TcpFacts(
            str(address),
            error=error.message,
            refused=isinstance(cause, OSError) and cause.errno == errno.ECONNREFUSED,
            silent=isinstance(cause, TimeoutError),
        )
    return TcpFacts(str(address), seconds=time.monotonic() - began)


# -- TLS and the relay -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UnverifiedHandshake:
    """What a server showed in a handshake in which nothing was verified."""

    tls: TlsFacts
    relay: RelayFacts
    certificate: bytes = b""
    """DER; empty where the handshake failed."""


async def shown_by(address: Address, proxy: Proxy | None) -> UnverifiedHandshake:
    """Make a handshake without verification, to see what the server is. Nothing is sent in it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN_JOIN])
    name = str(address)
    try:
        async with asyncio.timeout(TLS_DEADLINE):
            with await connect(address, deadline=CONNECT_DEADLINE, proxy=proxy or DIRECT) as sock:
                pipe = TlsPipe(sock, context, server_hostname=address.host)
                await pipe.handshake()
                certificate = pipe.peer_certificate or b""
                return UnverifiedHandshake(TlsFacts(name), RelayFacts(name, pipe.alpn == ALPN_JOIN), certificate)
    except ssl.SSLError as error:
        if error.reason == "TLSV1_ALERT_NO_APPLICATION_PROTOCOL":
            return UnverifiedHandshake(TlsFacts(name), RelayFacts(name, False))
        words = (error.reason or "unknown").replace("_", " ").lower()
        return UnverifiedHandshake(TlsFacts(name, error=words), RelayFacts(name, False))
    except TimeoutError:
        return UnverifiedHandshake(
            TlsFacts(name, error=f"no answer within {TLS_DEADLINE:.0f} s"), RelayFacts(name, False)
        )
    except (OSError, EOFError, ArcbridgeError):
        return UnverifiedHandshake(TlsFacts(name, error="it ended the connection"), RelayFacts(name, False))


async def verified(
    relay: RelayAccess, shown: UnverifiedHandshake, proxy: Proxy | None, pinned: bool, ca_file: str
) -> CertificateFacts:
    """Make the handshake of a join, verified as joins are, and read what the certificate says."""
    host = relay.address.host
    names, not_before, not_after = _read_certificate(shown.certificate)
    error: ArcbridgeError | ssl.SSLCertVerificationError | None = None
    try:
        async with asyncio.timeout(CONNECT_DEADLINE + TLS_DEADLINE):
            context = await relay.context(ALPN_JOIN)
            with await connect(relay.address, deadline=CONNECT_DEADLINE, proxy=proxy or DIRECT) as sock:
                await TlsPipe(sock, context, server_hostname=host).handshake()
    except ArcbridgeError as found:
        error = found
    except ssl.SSLCertVerificationError as found:
        relay.forget()
        error = found
    except (OSError, EOFError, TimeoutError) as found:
        error = Unreachable(f"the handshake ended ({type(found).__name__})")
    return CertificateFacts(host, names, not_before, not_after, error, pinned, ca_file)


def _read_certificate(der: bytes) -> tuple[tuple[str, ...], float, float]:
    """Read names and life (unix seconds) of a certificate that may be anything."""
    from cryptography import x509

    try:
        found = x509.load_der_x509_certificate(der)
        life = found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()
        extension = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [str(name) for name in extension.get_values_for_type(x509.DNSName)]
        names += [str(name) for name in extension.get_values_for_type(x509.IPAddress)]
    except x509.ExtensionNotFound:
        return (), *life
    except ValueError:
        return (), 0.0, 0.0
    return tuple(names), *life


async def clock_ahead(relay: RelayAccess, proxy: Proxy | None) -> float | None:
    """Return the seconds by which this machine's clock is ahead of the relay's, by the Date of an answer; None: it has
    none."""
    try:
        async with asyncio.timeout(CONNECT_DEADLINE + TLS_DEADLINE):
            context = await relay.context(ALPN_HTTP)
            with await connect(relay.address, deadline=CONNECT_DEADLINE, proxy=proxy or DIRECT) as sock:
                pipe = TlsPipe(sock, context, server_hostname=relay.address.host)
                await pipe.handshake()
                asked = time.time()
                await pipe.write(f"GET /v1/ca HTTP/1.0\r\nHost: {relay.address}\r\nAccept: */*\r\n\r\n".encode())
                answer = b""
                while b"\r\n\r\n" not in answer and len(answer) < _ANSWER_LIMIT:
                    if not (chunk := await pipe.read()):
                        break
                    answer += chunk
                now = time.time()
    except (ArcbridgeError, OSError, EOFError, TimeoutError):
        return None
    said = date_of(answer)
    if said is None:
        return None
    # Whole seconds, rounded down, of some moment between the question and the answer.
    return min((asked - said - 1.0, now - said), key=abs) if asked - said - 1.0 > 0 or now - said < 0 else 0.0


def date_of(answer: bytes) -> float | None:
    """Return the unix seconds of the Date header in the head of an answer; None where there is none that can be
    read."""
    for line in answer.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]:
        name, _, value = line.decode("latin-1").partition(":")
        if name.lower() == "date":
            try:
                return parsedate_to_datetime(value.strip()).timestamp()
            except (ValueError, TypeError, OverflowError):
                return None
    return None


async def round_trip(session: MuxSession) -> float:
    """Return the session's own round trip, seconds: it sends a PING as soon as it is up; 0 where none is answered."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PING_DEADLINE
    while not session.round_trip and loop.time() < deadline:
        await asyncio.sleep(0.01)
    return session.round_trip


# -- this machine ------------------------------------------------------------------------------------------------------


def find_kubeconfig(file: str, environment: Mapping[str, str]) -> Kubeconfig:
    """Find the kubeconfig of the settings. `-` is standard output, which cannot be looked at."""
    return Kubeconfig.find("" if file == "-" else file, environment)


async def contexts(kubeconfig: Kubeconfig, state: StateDirectory) -> list[ContextFacts]:
    """Return our contexts, each with what listens at its port. Raises StateError for a file that cannot be read."""
    found: dict[str, ContextFacts] = {}
    current = ""
    sections: dict[str, dict[str, Mapping[str, Any]]] = {"clusters": {}, "users": {}, "contexts": {}}
    for file in kubeconfig.files:
        file.read()
        current = current or str(file.current_context or "")
        for section, entries in sections.items():
            for item in file.document.get(section) or []:
                if isinstance(item, dict) and isinstance(body := item.get(section[:-1]), dict):
                    entries.setdefault(str(item.get("name")), body)
    for name, body in sections["contexts"].items():
        cluster = sections["clusters"].get(str(body.get("cluster")), {})
        managed = _managed(body)
        port = _local_port(str(cluster.get("server", "")))
        if managed is None or port == 0:
            continue
        user = sections["users"].get(str(body.get("user")), {})
        facts = ContextFacts(name, managed, port, current=name == current, starts_itself=_starts(user))
        found[name] = await at_port(facts, state)
    return list(found.values())


def _starts(user: Mapping[str, Any]) -> bool:
    """Return whether kubectl starts what serves: the plugin of a `proxy` that has ended only says so."""
    plugin = user.get("exec")
    return isinstance(plugin, dict) and "--ended" not in (plugin.get("args") or [])


async def at_port(facts: ContextFacts, state: StateDirectory) -> ContextFacts:
    """Return the same facts with what listens at the context's port."""
    listening, ours = await _look_at_port(facts.port, state.path / "local-ca" / "ca.crt")
    holder = port_holder(facts.port) if listening and not ours else ""
    return ContextFacts(
        facts.name, facts.cluster, facts.port, facts.current, facts.starts_itself, listening, ours, holder
    )


async def kept_port(state: StateDirectory, relays: tuple[str, ...], cluster: str) -> ContextFacts | None:
    """Return what listens at the port that is kept for a cluster; None where none is kept."""
    import json

    try:
        ports = json.loads((state.path / "ports.json").read_bytes())
    except (OSError, ValueError):
        return None
    keys = [f"{cluster} at {relay}" for relay in relays]
    port = next((ports[key] for key in keys if key in ports), None) if isinstance(ports, dict) else None
    if not isinstance(port, int):
        return None
    return await at_port(ContextFacts("", cluster, port), state)


async def _look_at_port(port: int, ca_file: Path) -> tuple[bool, bool]:
    """Return whether something listens at a port of loopback, and whether it shows a certificate of this user's local
    CA."""
    address = Address("127.0.0.1", port)
    try:
        async with asyncio.timeout(LOCAL_DEADLINE):
            sock = await connect(address, deadline=LOCAL_DEADLINE, proxy=DIRECT)
    except (ArcbridgeError, OSError, TimeoutError):
        return False, False
    with sock:
        try:
            context = ssl.create_default_context(cafile=ca_file)
            async with asyncio.timeout(LOCAL_DEADLINE):
                await TlsPipe(sock, context, server_hostname="127.0.0.1").handshake()
        except (OSError, EOFError, TimeoutError):
            return True, False
    return True, True


def _managed(body: Mapping[str, Any]) -> str | None:
    """Return the cluster for which we made an entry; None: we did not."""
    extensions = body.get("extensions")
    for item in extensions if isinstance(extensions, list) else []:
        if isinstance(item, dict) and item.get("name") == MARK and isinstance(item.get("extension"), dict):
            return str(item["extension"].get("cluster", ""))
    return None


def _local_port(server: str) -> int:
    """Return the port of a server on loopback; 0 for any other."""
    try:
        url = urlsplit(server)
        return (url.port or 0) if url.hostname in ("127.0.0.1", "localhost", "::1") else 0
    except ValueError:
        return 0
