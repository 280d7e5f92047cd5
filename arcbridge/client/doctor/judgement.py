"""Makes findings of what the probes saw on the way to the relay: facts in, one `Finding` out, and no socket or clock.

`access_judgement` does the same for what comes behind it. Text that came from outside (a certificate's names, a token's
claims, an agent's sentence) is cleaned before it is part of a finding. Of what a relay says, nothing is shown. Each
code is in `codes.CODES`.
"""

from __future__ import annotations

import ssl
import time
from dataclasses import dataclass

from arcbridge.checks.diagnosis import Finding, failed, ok, skipped, warning
from arcbridge.client.doctor.codes import fault, fault_to_come
from arcbridge.errors import ArcbridgeError, ConfigError, PinMismatch, StateError
from arcbridge.observe.untrusted_text import clean
from arcbridge.units import duration

SKEW_WARNED = 30.0
"""Seconds by which clocks may differ unnoticed: a Date header has whole seconds, and an answer takes time."""
SKEW_FAILED = 120.0
"""Seconds at which fresh tokens begin to be refused: verifiers allow a minute or two."""
CERTIFICATE_ENDS_SOON = 7 * 86400.0
"""Seconds."""
_SHOWN = 200
"""Bytes of a name or a claim from outside."""
_SENTENCE = 500
"""Bytes of an error's message, which may hold two pins."""

# Verification errors of OpenSSL (x509_vfy.h).
_NOT_YET_VALID, _EXPIRED, _WRONG_NAME, _WRONG_ADDRESS = 9, 10, 62, 64


def clip(text: str) -> str:
    """Return a text from outside as a finding may hold it."""
    return clean(text, _SHOWN)


def sentence(error: ArcbridgeError) -> str:
    """Return the message of an error as a finding may hold it."""
    return clean(error.message, _SENTENCE)


def when(moment: float) -> str:
    """Write unix seconds in this machine's time zone, for people."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


@dataclass(frozen=True, slots=True)
class NameFacts:
    """What a name's look-up gave."""

    host: str
    addresses: tuple[str, ...] = ()
    error: str = ""
    literal: bool = False
    """It is an address and no name."""
    by_proxy: bool = False
    """The proxy looks it up."""


def judge_name(facts: NameFacts) -> Finding:
    """Judge name resolution."""
    hop = "name resolution"
    if facts.by_proxy:
        return skipped(hop, f"the proxy looks {facts.host} up")
    if facts.literal:
        return ok(hop, f"{facts.host} is an address")
    if facts.error:
        return fault(hop, f"{facts.host} cannot be resolved ({clip(facts.error)})", "relay_name")
    return ok(hop, f"{facts.host} is {', '.join(facts.addresses[:4])}")


@dataclass(frozen=True, slots=True)
class ProxyFacts:
    """What became of a tunnel through the proxy of the environment."""

    proxy: str = ""
    """`host:port`; empty: there is none for this relay."""
    settings_error: str = ""
    unreachable: str = ""
    """Why the proxy itself could not be connected to."""
    refused: str = ""
    """What it answered to CONNECT."""
    asks_for_credentials: bool = False


def judge_proxy(facts: ProxyFacts) -> Finding:
    """Judge the outbound proxy."""
    hop = "outbound proxy"
    if facts.settings_error:
        return fault(hop, clip(facts.settings_error), "proxy_settings")
    if not facts.proxy:
        return skipped(hop, "none for this relay (HTTPS_PROXY, ALL_PROXY, NO_PROXY)")
    if facts.unreachable:
        return fault(hop, clip(facts.unreachable), "proxy_unreachable")
    if facts.asks_for_credentials:
        return fault(hop, f"{facts.proxy} asks for credentials", "proxy_credentials")
    if facts.refused:
        return fault(hop, clip(facts.refused), "proxy_refused")
    return ok(hop, f"{facts.proxy} opens a tunnel to the relay")


@dataclass(frozen=True, slots=True)
class TcpFacts:
    """What became of a connection to the relay's port."""

    address: str
    seconds: float = 0.0
    error: str = ""
    refused: bool = False
    silent: bool = False


def judge_tcp(facts: TcpFacts) -> Finding:
    """Judge the relay's port."""
    hop = "TCP"
    if not facts.error:
        return ok(hop, f"{facts.address} accepts connections ({facts.seconds * 1000:.0f} ms)")
    if facts.refused:
        return fault(hop, f"{facts.address} refuses connections", "relay_port_closed")
    if facts.silent:
        return fault(hop, f"{facts.address} does not answer", "relay_silent")
    return fault(hop, clip(facts.error), "relay_unreachable")


@dataclass(frozen=True, slots=True)
class TlsFacts:
    """What a handshake without verification showed."""

    address: str
    error: str = ""


def judge_tls(facts: TlsFacts) -> Finding:
    """Judge TLS itself, before anything is trusted."""
    hop = "TLS"
    if facts.error:
        return fault(hop, f"{facts.address} makes no TLS 1.3 connection ({clip(facts.error)})", "relay_tls")
    return ok(hop, "TLS 1.3")


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """The relay's certificate, and whether it is trusted."""

    host: str
    subject_names: tuple[str, ...] = ()
    not_before: float = 0.0
    not_after: float = 0.0
    """Unix seconds; 0: the certificate could not be read."""
    error: ArcbridgeError | ssl.SSLCertVerificationError | None = None
    pinned: bool = False
    ca_file: str = ""


def judge_certificate(facts: CertificateFacts, now: float) -> Finding:
    """Judge the relay's certificate, by CA file, pin or the system's CAs."""
    hop, error = "relay certificate", facts.error
    if isinstance(error, PinMismatch):
        return fault(hop, sentence(error), "relay_pin")
    if isinstance(error, ConfigError | StateError):
        return fault(hop, sentence(error), "relay_ca_file")
    if isinstance(error, ArcbridgeError):
        return fault(hop, sentence(error), "relay_other", "check the relay's address: a relay gives its CA at /v1/ca")
    if error is not None:
        return _not_trusted(hop, facts, error, now)
    if 0 < facts.not_after < now + CERTIFICATE_ENDS_SOON:
        return fault_to_come(hop, f"trusted, and ends in {duration(facts.not_after - now)}", "relay_certificate_ends")
    until = f", until {when(facts.not_after)}" if facts.not_after else ""
    by = "the pinned CA" if facts.pinned else f"the CA in {facts.ca_file}" if facts.ca_file else "a CA of this system"
    return ok(hop, f"of {by}{until}")


def _not_trusted(hop: str, facts: CertificateFacts, error: ssl.SSLCertVerificationError, now: float) -> Finding:
    code = error.verify_code
    if code == _EXPIRED or 0 < facts.not_after <= now:
        return fault(
            hop,
            f"the certificate, or its CA's, has expired (the relay's own ended at {when(facts.not_after)})",
            "relay_certificate_expired",
        )
    if code == _NOT_YET_VALID or facts.not_before > now:
        return fault(
            hop, f"the certificate is not valid yet (from {when(facts.not_before)})", "relay_certificate_not_yet"
        )
    if code in (_WRONG_NAME, _WRONG_ADDRESS):
        names = ", ".join(clip(name) for name in facts.subject_names[:4]) or "no name"
        return fault(hop, f"the certificate is for {names}, not for {facts.host}", "relay_certificate_name")
    how = f"the CA in {facts.ca_file}" if facts.ca_file else "the pinned CA" if facts.pinned else "a CA of this system"
    return fault(hop, f"the certificate is not of {how} ({clip(error.verify_message)})", "relay_ca")


@dataclass(frozen=True, slots=True)
class RelayFacts:
    """Whether the other end is a relay."""

    address: str
    speaks_join: bool


def judge_relay(facts: RelayFacts) -> Finding:
    """Judge whether the server is a relay of arcbridge."""
    if facts.speaks_join:
        return ok("relay", f"{facts.address} is an arcbridge relay")
    return fault(
        "relay", f"{facts.address} speaks TLS, and not arcbridge-join/1: it is no arcbridge relay", "relay_other"
    )


def judge_clock(ahead: float | None) -> Finding:
    """Judge this machine's clock against the relay's; `ahead` in seconds, None: the relay did not say its time."""
    hop = "clock"
    if ahead is None:
        return skipped(hop, "the relay did not say its time")
    if abs(ahead) < SKEW_WARNED:
        return ok(hop, "as the relay's")
    detail = f"this machine is {duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} the relay"
    remedy = "set the clock of the one that is wrong (NTP): tokens and certificates are valid by the clock"
    return (failed if abs(ahead) >= SKEW_FAILED else warning)(hop, detail, remedy, "clock")
