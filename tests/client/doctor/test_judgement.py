"""The way to the relay: facts in, findings out."""

from __future__ import annotations

import ssl

import pytest

from arcbridge.checks.diagnosis import Finding, FindingState
from arcbridge.client.doctor.judgement import (
    CertificateFacts,
    NameFacts,
    ProxyFacts,
    RelayFacts,
    TcpFacts,
    TlsFacts,
    judge_certificate,
    judge_clock,
    judge_name,
    judge_proxy,
    judge_relay,
    judge_tcp,
    judge_tls,
)
from arcbridge.errors import ConfigError, PinMismatch, Unreachable

NOW = 1_000_000_000.0


def verdict(finding: Finding) -> tuple[str, str]:
    """FindingState and code; what failed says what to do."""
    if finding.state in (FindingState.FAILED, FindingState.WARNING):
        assert finding.remedy
    return str(finding.state), finding.code


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (NameFacts("r", ("192.0.2.1",)), ("ok", "")),
        (NameFacts("192.0.2.1", literal=True), ("ok", "")),
        (NameFacts("r", by_proxy=True), ("skipped", "")),
        (NameFacts("r", error="Name or service not known"), ("failed", "relay_name")),
    ],
)
def test_name(facts: NameFacts, expected: tuple[str, str]) -> None:
    assert verdict(judge_name(facts)) == expected


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (ProxyFacts(), ("skipped", "")),
        (ProxyFacts("p:3128"), ("ok", "")),
        (ProxyFacts(settings_error="x"), ("failed", "proxy_settings")),
        (ProxyFacts("p:3128", unreachable="x"), ("failed", "proxy_unreachable")),
        (ProxyFacts("p:3128", refused="x"), ("failed", "proxy_refused")),
        (ProxyFacts("p:3128", refused="x", asks_for_credentials=True), ("failed", "proxy_credentials")),
    ],
)
def test_proxy(facts: ProxyFacts, expected: tuple[str, str]) -> None:
    assert verdict(judge_proxy(facts)) == expected


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (TcpFacts("r:443", 0.01), ("ok", "")),
        (TcpFacts("r:443", error="x", refused=True), ("failed", "relay_port_closed")),
        (TcpFacts("r:443", error="x", silent=True), ("failed", "relay_silent")),
        (TcpFacts("r:443", error="no route to host"), ("failed", "relay_unreachable")),
    ],
)
def test_tcp(facts: TcpFacts, expected: tuple[str, str]) -> None:
    assert verdict(judge_tcp(facts)) == expected


def test_tls_and_relay() -> None:
    assert verdict(judge_tls(TlsFacts("r:443"))) == ("ok", "")
    assert verdict(judge_tls(TlsFacts("r:443", error="wrong version number"))) == ("failed", "relay_tls")
    assert verdict(judge_relay(RelayFacts("r:443", True))) == ("ok", "")
    assert verdict(judge_relay(RelayFacts("r:443", False))) == ("failed", "relay_other")


def untrusted(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError()
    error.verify_code, error.verify_message = code, "words of OpenSSL"
    return error


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (CertificateFacts("r", ("r",), 0.0, NOW + 1e7), ("ok", "")),
        (CertificateFacts("r", ("r",), 0.0, NOW + 86400), ("warning", "relay_certificate_ends")),
        (CertificateFacts("r", ("r",), 0.0, NOW - 1, untrusted(10)), ("failed", "relay_certificate_expired")),
        # The CA's own end: the relay's certificate goes on.
        (CertificateFacts("r", ("r",), 0.0, NOW + 1e7, untrusted(10)), ("failed", "relay_certificate_expired")),
        (CertificateFacts("r", ("r",), NOW + 9, NOW + 1e7, untrusted(9)), ("failed", "relay_certificate_not_yet")),
        (CertificateFacts("r", ("other",), 0.0, NOW + 1e7, untrusted(62)), ("failed", "relay_certificate_name")),
        (CertificateFacts("192.0.2.1", (), 0.0, NOW + 1e7, untrusted(64)), ("failed", "relay_certificate_name")),
        (CertificateFacts("r", ("r",), 0.0, NOW + 1e7, untrusted(20)), ("failed", "relay_ca")),
        (CertificateFacts("r", error=PinMismatch("two pins")), ("failed", "relay_pin")),
        (CertificateFacts("r", error=ConfigError("no PEM")), ("failed", "relay_ca_file")),
        (CertificateFacts("r", error=Unreachable("no CA to give")), ("failed", "relay_other")),
    ],
)
def test_certificate(facts: CertificateFacts, expected: tuple[str, str]) -> None:
    assert verdict(judge_certificate(facts, NOW)) == expected


def test_names_of_a_certificate_cannot_steer_a_terminal() -> None:
    facts = CertificateFacts("r", ("a\x1b[2Jb",), 0.0, NOW + 1e7, untrusted(62))
    assert "\x1b" not in judge_certificate(facts, NOW).detail


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        (None, ("skipped", "")),
        (0.0, ("ok", "")),
        (-29.0, ("ok", "")),
        (40.0, ("warning", "clock")),
        (-40.0, ("warning", "clock")),
        (120.0, ("failed", "clock")),
        (-1e9, ("failed", "clock")),
    ],
)
def test_clock(ahead: float | None, expected: tuple[str, str]) -> None:
    assert verdict(judge_clock(ahead)) == expected
