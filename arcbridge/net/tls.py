"""TLS as every connection of arcbridge uses it: version 1.3 only, full handshakes only.

No session tickets and no early data: resuming is how a client certificate is skipped (nginx CVE-2025-23419), and a
full handshake costs less than a millisecond. Each context offers one ALPN protocol, or both versions of the join, so
what a handshake selected says which handler it was made for. Certificates never come from the network into the system's
trust: each context trusts one thing.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from arcbridge.errors import ConfigError, ConnectionLost, Unreachable
from arcbridge.net.address import Address
from arcbridge.net.dialer import connect
from arcbridge.net.proxy import Proxy
from arcbridge.net.system_trust import system_context
from arcbridge.net.tlspipe import TlsPipe
from arcbridge.pki.chain import joined, load_chain

if TYPE_CHECKING:
    from arcbridge.pki.succession import Succession

ALPN_CONTROL: Final = "arcbridge-control/1"
ALPN_JOIN: Final = "arcbridge-join/2"
ALPN_JOIN_1: Final = "arcbridge-join/1"
"""What relays, agents and clients of 0.1 speak (docs/protocol.md, "Join")."""
ALPN_HOP: Final = "arcbridge-hop/1"
ALPN_SESSION: Final = "arcbridge-session/1"
ALPN_HTTP: Final = "http/1.1"

_PARTIAL_CHAIN: Final = ssl.VERIFY_X509_PARTIAL_CHAIN
"""A CA may be known by the certificate that the one before it has issued (`pki.succession`)."""
_CIPHERS: Final = "TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"
_CERTIFICATE: Final = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
_MAX_ANSWER: Final = 64 * 1024
_MAX_CAS: Final = 12
"""Certificates of an answer that are looked at: a relay gives three CAs at most, and then the nine of a succession."""

ClientCertificate = tuple[Path, Path] | tuple[str, str]
"""Certificate chain and key: both paths, or both PEM texts."""


class ServerContext(ssl.SSLContext):
    """The context of a server, which knows the key that its handshakes show.

    A peer names that key when it proves that a token is its own (`identity.proof`), and OpenSSL does not tell a
    connection's own certificate.
    """

    spki: bytes = b""
    """SubjectPublicKeyInfo (DER) of the certificate."""


@dataclass(frozen=True, slots=True)
class RelayTrust:
    """How to know a relay: the PEM of its own CA, or None for the system's CAs."""

    ca_pem: str | None = None


def outer_server_contexts(certificate_pem: str, key_pem: str, agent_ca_pem: str) -> dict[str, ServerContext]:
    """Return the relay's contexts by ALPN protocol.

    Control: a certificate of `agent_ca_pem` is required. Join and HTTP: one is asked for (clients have none), and if
    one is given it must be of that CA.
    """
    contexts = {}
    for alpn in (ALPN_CONTROL, ALPN_JOIN, ALPN_HTTP):
        context = _server(certificate_pem, key_pem, alpn)
        add_trust(context, agent_ca_pem)
        context.verify_mode = ssl.CERT_REQUIRED if alpn == ALPN_CONTROL else ssl.CERT_OPTIONAL
        contexts[alpn] = context
    return contexts


def hop_server_context(certificate_pem: str, key_pem: str, relay_ca_pem: str) -> ServerContext:
    """For the connections of other relays: a client certificate of the relays' own CA is required."""
    context = _server(certificate_pem, key_pem, ALPN_HOP)
    add_trust(context, relay_ca_pem)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def outer_client_context(
    trust: RelayTrust, alpn: str, *, client_certificate: ClientCertificate | None = None
) -> ssl.SSLContext:
    """For connections to a relay; verifies the relay's name and certificate. Raises `ConfigError` for a bad PEM."""
    if trust.ca_pem is None:
        context = system_context()
        _harden(context, alpn)
    else:
        context = _client(alpn)
        add_trust(context, trust.ca_pem)
    if client_certificate is not None:
        certificate, key = client_certificate
        if isinstance(certificate, Path) or isinstance(key, Path):
            certificate, key = Path(certificate).read_text(), Path(key).read_text()
        load_chain(context, certificate, key)
    return context


def inner_server_context(certificate_pem: str, key_pem: str) -> ServerContext:
    """Return the agent's end of the end-to-end TLS."""
    return _server(certificate_pem, key_pem, ALPN_SESSION)


def inner_client_context(cluster_ca_pem: str = "") -> ssl.SSLContext:
    """Return the client's end of the end-to-end TLS: trusts this cluster's CA and nothing else; without a CA it trusts
    none until `add_trust` is called, which may be after its ClientHello was sent."""
    context = _client(ALPN_SESSION)
    if cluster_ca_pem:
        add_trust(context, cluster_ca_pem)
    return context


async def fetch_relay_cas(
    address: Address, pin: str, *, deadline: float = 10.0, proxy: Proxy | str | None = None
) -> Succession:
    """Fetch the CA whose key has this pin, as the relay at `address` gives it; for the first contact only.

    It may be a former one, and have ended: those that followed it come with it, each signed by the one before. Raises
    `PinMismatch` which names both pins, and what `fetch_unverified_ca` raises.
    """
    from arcbridge.pki.pins import check_pin, pin_of, require_pin
    from arcbridge.pki.succession import Succession

    pin, what = check_pin(pin), f"the CA of {address.url}"
    found, listed = await _fetch_cas(address, deadline=deadline, proxy=proxy)
    pem = next((one for one in found if pin_of(one) == pin), found[0])
    known = Succession.of_ca(require_pin(what, pin, pem))
    return known if listed is None or pin not in listed.pins else known.follow(listed, what)


async def fetch_unverified_ca(address: Address, *, deadline: float = 10.0, proxy: Proxy | str | None = None) -> str:
    """Fetch the PEM of the CA by which the relay at `address` says that it signs. Nothing vouches for it: compare its
    pin before it is used.

    The certificate of the connection is not verified (that is what the answer is for) and nothing secret is sent.
    Raises `Unreachable` or `ConnectionLost`.
    """
    from arcbridge.pki.pins import pin_of

    found, listed = await _fetch_cas(address, deadline=deadline, proxy=proxy)
    return next((one for one in found if listed and pin_of(one) == listed.pins[listed.present]), found[0])


async def _fetch_cas(
    address: Address, *, deadline: float, proxy: Proxy | str | None
) -> tuple[list[str], Succession | None]:
    """Return the CAs of a relay, of which none is verified, and how they followed each other where they did."""
    from arcbridge.pki.succession import Succession

    context = _client(ALPN_HTTP)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    status, _, body = await get_once(address, "/v1/ca", context, deadline=deadline, proxy=proxy)
    # JSON writes a line's end as two characters.
    text = body.decode("ascii", "replace").replace("\\n", "\n")
    found = _CERTIFICATE.findall(text)[:_MAX_CAS] if status == 200 else []
    if not found:
        raise Unreachable(f"{address.url} has no CA to give: is this an arcbridge relay?")
    listed: Succession | None = None
    with contextlib.suppress(ConfigError, ValueError):
        listed = Succession.read(text[text.index("# present: ") :])
    return [f"{one}\n" for one in found], listed


def cure_of(error: ssl.SSLCertVerificationError, otherwise: str) -> str:
    """Return what to do about a relay's certificate that is refused; `otherwise`: where its dates are not the cause."""
    return _OF_DATES.get(getattr(error, "verify_code", 0), otherwise)


def untrusted(server_name: str, error: ssl.SSLCertVerificationError) -> Unreachable:
    """Return the error for a relay whose certificate is refused."""
    cure = cure_of(
        error,
        "check the relay's address and CA (relay_ca_file, relay_ca_pin); where it was replaced, its operator has the "
        "new pin",
    )
    return Unreachable(f"the relay's certificate is not trusted for {server_name}: {error.verify_message}; {cure}")


_OF_DATES: Final = {
    9: "set the clock of this machine; where it is right, tell the relay's operator",
    10: "ask the relay's operator to renew it; where it is good elsewhere, set the clock of this machine",
}
"""What to do, by X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED of OpenSSL."""


async def measure_round_trip(address: Address, context: ssl.SSLContext) -> float:
    """Return the seconds of a round trip to a relay, by a handshake of its own that ends at once.

    It has no deadline but that of `connect`. Raises OSError, EOFError, `Unreachable`, `ConfigError`.
    """
    with await connect(address, deadline=10.0) as sock:
        pipe = TlsPipe(sock, context, server_hostname=address.host)
        await pipe.handshake()
        pipe.feed_close_notify()  # behind the end of the handshake, so that the relay sees no broken one
        await pipe.flush()
        return pipe.round_trip


async def get_once(
    address: Address,
    path: str,
    context: ssl.SSLContext,
    *,
    deadline: float = 10.0,
    proxy: Proxy | str | None = None,
    limit: int = _MAX_ANSWER,
    fields: Callable[[bytes], str] = lambda certificate: "",
    document: bytes | None = None,
    measured: Callable[[float], None] = lambda seconds: None,
) -> tuple[int, bytes, bytes]:
    """Return status, head and body of one GET over a connection of its own, or of one POST of a JSON `document`;
    `context`: whom to trust.

    `fields` makes further header lines, each with its end, once the relay has shown this certificate (DER). `measured`
    is called with the round trip to the relay, seconds. Raises
    `ssl.SSLCertVerificationError` where the context does not trust the relay, `Unreachable`, `ConnectionLost`.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + deadline
    sock = await connect(address, deadline=deadline, proxy=proxy)
    with sock:
        pipe = TlsPipe(sock, context, server_hostname=address.host)
        try:
            async with asyncio.timeout_at(until):
                await pipe.handshake()
                measured(pipe.round_trip)
                # HTTP/1.0: the answer is neither chunked nor kept alive, so its end is the end of the connection.
                more = fields(pipe.peer_certificate or b"")
                if document is not None:
                    more += f"Content-Type: application/json\r\nContent-Length: {len(document)}\r\n"
                first = f"{'GET' if document is None else 'POST'} {path} HTTP/1.0\r\nHost: {address}\r\n"
                await pipe.write(f"{first}Accept: */*\r\n{more}\r\n".encode() + (document or b""))
                answer = bytearray()
                while chunk := await pipe.read():
                    answer += chunk
                    if len(answer) > limit:
                        raise Unreachable(
                            f"{address.url} answered more than {limit} bytes: is this an arcbridge relay?"
                        )
        except TimeoutError as error:
            raise Unreachable(f"{address.url} did not answer within {deadline:.0f} s") from error
        except ssl.SSLCertVerificationError:
            raise
        except (OSError, EOFError) as error:
            what = "ended the connection before it answered"
            if isinstance(error, ssl.SSLError):
                what = f"makes no TLS connection ({(error.reason or 'unknown').replace('_', ' ').lower()})"
            lost = ConnectionLost(f"{address.url} {what}: is this an arcbridge relay?")
            lost.detail = f"it {what}"
            raise lost from error
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    status = head.split(b" ", 2)
    if len(status) < 2 or not status[0].startswith(b"HTTP/1.") or len(status[1]) != 3 or not status[1].isdigit():
        raise Unreachable(f"{address.url} did not answer in HTTP: is this an arcbridge relay?")
    return int(status[1]), head, body


def _server(certificate_pem: str, key_pem: str, alpn: str) -> ServerContext:
    context = ServerContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_flags |= _PARTIAL_CHAIN
    _harden(context, alpn)
    context.num_tickets = 0
    load_chain(context, certificate_pem, key_pem)
    context.spki = _spki(joined(certificate_pem, key_pem))
    return context


def _spki(pem: str) -> bytes:
    """Return the SubjectPublicKeyInfo (DER) of the certificate that a context shows; `pem` is what it was loaded from.

    It is derived from the private key, which OpenSSL has found to belong to that certificate: of the certificates in a
    text OpenSSL also shows one that begins with `BEGIN TRUSTED CERTIFICATE` or `BEGIN X509 CERTIFICATE`.
    """
    from arcbridge.identity.p256 import spki_of_key

    try:
        return spki_of_key(pem)
    except ValueError:
        # A key that OpenSSL reads and `cryptography` does not: no proof names it, and no other one is taken for it.
        return b""


def _client(alpn: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.verify_flags |= _PARTIAL_CHAIN
    _harden(context, alpn)
    return context


def versions(alpn: str) -> list[str]:
    """Return the protocols of which a context for `alpn` takes the first that the peer has."""
    return [ALPN_JOIN, ALPN_JOIN_1] if alpn == ALPN_JOIN else [alpn]


def _harden(context: ssl.SSLContext, alpn: str) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    context.set_alpn_protocols(versions(alpn))
    # AES-128-GCM first, where this interpreter can say so (3.15): a third faster than AES-256 per byte.
    set_ciphersuites = getattr(context, "set_ciphersuites", None)
    if set_ciphersuites is not None:
        set_ciphersuites(_CIPHERS)


def add_trust(context: ssl.SSLContext, ca_pem: str) -> None:
    """Have a context trust these CAs, too. Raises `ConfigError` for a bad PEM."""
    try:
        context.load_verify_locations(cadata=ca_pem)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError("not a PEM certificate: a CA certificate is needed here") from error
