"""Looks at the hops to one relay, and makes a finding of each.

Each look has its own deadline, leaves no connection open, and raises nothing that belongs to its hop. Until the relay's
certificate is verified nothing secret is sent. Text that came from outside is cleaned before it is part of a finding,
and of what a relay says nothing is shown.
"""

from __future__ import annotations

import asyncio
import errno
import re
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import NamedTuple

from arcbridge.checks.diagnosis import Finding, failed, first_failure, ok, skipped, warning
from arcbridge.client.doctor.codes import clip, fault, fault_to_come, sentence, when
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.errors import ArcbridgeError, ConfigError, PinMismatch, StateError, Unreachable
from arcbridge.net.dialer import DIRECT, CredentialsMissing, connect, resolve
from arcbridge.net.proxy import Proxy, proxy_for
from arcbridge.net.tls import ALPN_HTTP, ALPN_JOIN, get_once, versions
from arcbridge.net.tlspipe import TlsPipe
from arcbridge.settings.config import ClientConfig
from arcbridge.units import duration

CONNECT_DEADLINE = 5.0
TLS_DEADLINE = 5.0
SKEW_WARNED = 30.0
"""Seconds by which clocks may differ unnoticed: a Date header has whole seconds, and an answer takes time."""
SKEW_FAILED = 120.0
"""Seconds at which fresh tokens begin to be refused: verifiers allow a minute or two."""
CERTIFICATE_ENDS_SOON = 7 * 86400.0
"""Seconds."""

# Verification errors of OpenSSL (x509_vfy.h).
_NOT_YET_VALID, _EXPIRED, _WRONG_NAME, _WRONG_ADDRESS = 9, 10, 62, 64

_DATE = re.compile(rb"(?i)\r\ndate:([^\r\n]*)")


class RelayHops:
    """The hops to one relay."""

    def __init__(self, relay: RelayAccess, config: ClientConfig, environment: Mapping[str, str]) -> None:
        self._relay = relay
        self._address = relay.address
        self._ca = "a CA of this system"
        if config.relay_ca_pin or config.relay_ca_file:
            self._ca = "the pinned CA" if config.relay_ca_pin else f"the CA in {config.relay_ca_file}"
        self._proxy: Proxy | None = None
        self._wrong_proxy = ""
        try:
            self._proxy = proxy_for(relay.address, environment)
        except ConfigError as error:
            self._wrong_proxy = error.message
        self._speaks_join = False
        self._certificate = b""
        """DER; empty where the handshake failed."""

    async def examine(self, findings: list[Finding]) -> None:
        """Add what is found of each hop in the order of the way; those behind one that failed are skipped."""
        looks: dict[str, Callable[[str], Awaitable[Finding]]] = {
            "name resolution": self.look_up,
            "outbound proxy": self.tunnel,
            "TCP": self.reach,
            "TLS": self.shake_hands,
            "relay": self.recognize,
            "relay certificate": self.verify,
            "clock": self.compare_clocks,
        }
        before = len(findings)
        for hop, look in looks.items():
            failure = first_failure(findings[before:])
            findings.append(await look(hop) if failure is None else skipped(hop, f"{failure.hop} failed"))

    async def look_up(self, hop: str) -> Finding:
        """Resolve the relay's name as a connection does."""
        host = self._address.host
        if self._proxy is not None:
            return skipped(hop, f"the proxy looks {host} up")
        try:
            ip_address(host)
            return ok(hop, f"{host} is an address")
        except ValueError:
            pass
        try:
            found = await resolve(self._address)
        except OSError as error:
            return fault(hop, f"{host} cannot be resolved ({clip(error.strerror or str(error))})", "relay_name")
        if not found:
            return fault(hop, f"{host} cannot be resolved (it has no address)", "relay_name")
        return ok(hop, f"{host} is {', '.join(str(sockaddr[0]) for _, sockaddr in found[:4])}")

    async def tunnel(self, hop: str) -> Finding:
        """Connect to the proxy of the environment, then through it."""
        if self._wrong_proxy:
            return fault(hop, clip(self._wrong_proxy), "proxy_settings")
        if self._proxy is None:
            return skipped(hop, "none for this relay (HTTPS_PROXY, ALL_PROXY, NO_PROXY)")
        name = self._proxy.address
        try:
            (await connect(name, deadline=CONNECT_DEADLINE, proxy=DIRECT)).close()
        except Unreachable as error:
            return fault(hop, clip(error.message), "proxy_unreachable")
        try:
            (await self._connect()).close()
        except Unreachable as error:
            if isinstance(error.__cause__, CredentialsMissing):
                return fault(hop, f"{name} asks for credentials", "proxy_credentials")
            return fault(hop, clip(error.message), "proxy_refused")
        return ok(hop, f"{name} opens a tunnel to the relay")

    async def reach(self, hop: str) -> Finding:
        """Connect to the relay's port, through the proxy where there is one."""
        began = time.monotonic()
        try:
            (await self._connect()).close()
        except Unreachable as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno == errno.ECONNREFUSED:
                return fault(hop, f"{self._address} refuses connections", "relay_port_closed")
            if isinstance(cause, TimeoutError):
                return fault(hop, f"{self._address} does not answer", "relay_silent")
            return fault(hop, clip(error.message), "relay_unreachable")
        return ok(hop, f"{self._address} accepts connections ({(time.monotonic() - began) * 1000:.0f} ms)")

    async def shake_hands(self, hop: str) -> Finding:
        """Make a handshake without verification, to see what the server is. Nothing is sent in it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.set_alpn_protocols(versions(ALPN_JOIN))
        wrong = ""
        try:
            async with asyncio.timeout(TLS_DEADLINE):
                pipe = await self._handshake(context)
            self._speaks_join, self._certificate = pipe.alpn in versions(ALPN_JOIN), pipe.peer_certificate or b""
        except ssl.SSLError as error:
            if error.reason != "TLSV1_ALERT_NO_APPLICATION_PROTOCOL":  # it speaks TLS, and is no relay
                wrong = (error.reason or "unknown").replace("_", " ").lower()
        except TimeoutError:
            wrong = f"no answer within {TLS_DEADLINE:.0f} s"
        except (OSError, EOFError, ArcbridgeError):
            wrong = "it ended the connection"
        if wrong:
            return fault(hop, f"{self._address} makes no TLS 1.3 connection ({clip(wrong)})", "relay_tls")
        return ok(hop, "TLS 1.3")

    async def recognize(self, hop: str) -> Finding:
        """Judge by the handshake whether the server is a relay of arcbridge."""
        if self._speaks_join:
            return ok(hop, f"{self._address} is an arcbridge relay")
        detail = f"{self._address} speaks TLS, and not arcbridge-join: it is no arcbridge relay"
        return fault(hop, detail, "relay_other")

    async def verify(self, hop: str) -> Finding:
        """Make the handshake of a join, verified as joins are, and read what the certificate says."""
        wrong: ArcbridgeError | ssl.SSLCertVerificationError | None = None
        try:
            async with asyncio.timeout(CONNECT_DEADLINE + TLS_DEADLINE):
                await self._handshake(await self._relay.context(ALPN_JOIN))
        except ArcbridgeError as error:
            wrong = error
        except ssl.SSLCertVerificationError as error:
            self._relay.forget()
            wrong = error
        except (OSError, EOFError, TimeoutError) as error:
            wrong = Unreachable(f"the handshake ended ({type(error).__name__})")
        shown = read_certificate(self._certificate)
        return judge_certificate(hop, self._address.host, shown, wrong, self._ca, time.time())

    async def compare_clocks(self, hop: str) -> Finding:
        """Compare this machine's clock with the Date of an answer of the relay."""
        asked = 0.0

        def begin(_: bytes) -> str:
            nonlocal asked
            asked = time.time()
            return ""

        try:
            context = await self._relay.context(ALPN_HTTP)
            _, head, _ = await get_once(
                self._address,
                "/v1/ca",
                context,
                deadline=CONNECT_DEADLINE + TLS_DEADLINE,
                proxy=self._proxy or DIRECT,
                fields=begin,
            )
            now = time.time()
            date = _DATE.search(head)
            said = parsedate_to_datetime(date[1].decode("ascii") if date else "").timestamp()
        except (ArcbridgeError, OSError, ValueError, TypeError, OverflowError):
            return judge_clock(hop, None)
        # Whole seconds, rounded down, of some moment between the question and the answer.
        apart = asked - said - 1.0 > 0 or now - said < 0
        return judge_clock(hop, min((asked - said - 1.0, now - said), key=abs) if apart else 0.0)

    async def _connect(self) -> socket.socket:
        return await connect(self._address, deadline=CONNECT_DEADLINE, proxy=self._proxy or DIRECT)

    async def _handshake(self, context: ssl.SSLContext) -> TlsPipe:
        """Shake hands and hang up; the pipe says what the server showed."""
        with await self._connect() as sock:
            pipe = TlsPipe(sock, context, server_hostname=self._address.host)
            await pipe.handshake()
            return pipe


class CertificateText(NamedTuple):
    """What a certificate says."""

    names: tuple[str, ...] = ()
    not_before: float = 0.0
    not_after: float = 0.0
    """Unix seconds; 0: the certificate could not be read."""


def read_certificate(der: bytes) -> CertificateText:
    """Read names and life of a certificate that may be anything."""
    from cryptography import x509

    try:
        found = x509.load_der_x509_certificate(der)
        life = found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()
        extension = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = [str(name) for name in extension.get_values_for_type(x509.DNSName)]
        names += [str(name) for name in extension.get_values_for_type(x509.IPAddress)]
    except x509.ExtensionNotFound:
        return CertificateText((), *life)
    except ValueError:
        return CertificateText()
    return CertificateText(tuple(names), *life)


def judge_certificate(
    hop: str,
    host: str,
    shown: CertificateText,
    error: ArcbridgeError | ssl.SSLCertVerificationError | None,
    ca: str,
    now: float,
) -> Finding:
    """Judge the relay's certificate; `error`: why it is not trusted, `ca`: in words, by which CA it should be."""
    if isinstance(error, PinMismatch):
        return fault(hop, sentence(error), "relay_pin")
    if isinstance(error, ConfigError | StateError):
        return fault(hop, sentence(error), "relay_ca_file")
    if isinstance(error, ArcbridgeError):
        return fault(hop, sentence(error), "relay_other", "check the relay's address: a relay gives its CA at /v1/ca")
    if error is None:
        if 0 < shown.not_after < now + CERTIFICATE_ENDS_SOON:
            ends = duration(shown.not_after - now)
            return fault_to_come(hop, f"trusted, and ends in {ends}", "relay_certificate_ends")
        return ok(hop, f"of {ca}{f', until {when(shown.not_after)}' if shown.not_after else ''}")
    if error.verify_code == _EXPIRED or 0 < shown.not_after <= now:
        ended = f"the certificate, or its CA's, has expired (the relay's own ended at {when(shown.not_after)})"
        return fault(hop, ended, "relay_certificate_expired")
    if error.verify_code == _NOT_YET_VALID or shown.not_before > now:
        begins = f"the certificate is not valid yet (from {when(shown.not_before)})"
        return fault(hop, begins, "relay_certificate_not_yet")
    if error.verify_code in (_WRONG_NAME, _WRONG_ADDRESS):
        names = ", ".join(clip(name) for name in shown.names[:4]) or "no name"
        return fault(hop, f"the certificate is for {names}, not for {host}", "relay_certificate_name")
    return fault(hop, f"the certificate is not of {ca} ({clip(error.verify_message)})", "relay_ca")


def judge_clock(hop: str, ahead: float | None) -> Finding:
    """Judge this machine's clock against the relay's; `ahead` in seconds, None: the relay did not say its time."""
    if ahead is None:
        return skipped(hop, "the relay did not say its time")
    if abs(ahead) < SKEW_WARNED:
        return ok(hop, "as the relay's")
    detail = f"this machine is {duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} the relay"
    remedy = "set the clock of the one that is wrong (NTP): tokens and certificates are valid by the clock"
    return (failed if abs(ahead) >= SKEW_FAILED else warning)(hop, detail, remedy, "clock")
