"""The relay's self-checks: what of the things that it depends on works, and which of them make it unready.

Registry, issuers' keys, NATS of a fleet, the certificate's end, file descriptors, the policy file, the audit log, and
whether the public address leads to this relay. They change nothing. None of them makes a relay unready by itself: that
is for a registry that does not answer, and for a relay that goes away (docs/decisions/0022-self-checks.md).
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from arcbridge.audit.sinks.settings import sink_findings
from arcbridge.checks.diagnosis import Finding, directory_finding, failed, key_finding, ok, skipped, warning
from arcbridge.checks.self_checks import SelfCheck
from arcbridge.errors import ArcbridgeError
from arcbridge.identity.policy import Policy
from arcbridge.net.address import Address
from arcbridge.net.descriptors import UNLIMITED, advice, limit
from arcbridge.net.dialer import DIRECT, SockAddr, resolve, try_tls
from arcbridge.net.tls import ALPN_HTTP, RelayTrust, outer_client_context
from arcbridge.relay.capacity import needed
from arcbridge.relay.parts import Basis
from arcbridge.settings.config import RelayLimitsConfig
from arcbridge.settings.named_files import DAY_LEFT, SOON

AUDIT, REGISTRY, FLEET, CERTIFICATE = "audit log", "registry", "fleet (NATS)", "relay's certificate"
DESCRIPTORS, POLICY, PUBLIC_ADDRESS, CA = "file descriptors", "policy", "public address", "relay's CA"
CA_WARNS: Final = 180
"""Days before its end at which the relay's CA should have been rotated."""
CERTIFICATE_WARNS: Final = SOON
"""Seconds before its end at which a certificate should have been replaced: an own one is renewed 30 days before."""
CERTIFICATE_FAILS: Final = DAY_LEFT
FEW: Final = 0.1
"""Share of the descriptors that is left when it is told."""
CONNECT_DEADLINE: Final = 10.0


def registry_finding(error: str | None) -> Finding:
    """`error`: why the registry did not answer the last time; None: it did."""
    if error is None:
        return ok(REGISTRY, "answers")
    return failed(REGISTRY, error, "check data_dir (space, owner), or NATS of the fleet", "registry")


def certificate_finding(expires: float, now: float, *, own: bool) -> Finding:
    """`expires`: unix seconds; `own`: issued by the relay's own CA."""
    left = expires - now
    remedy = "see `certificate not renewed` in the log" if own else "replace the files of [tls]"
    if left < CERTIFICATE_FAILS:
        words = "it has lapsed" if left <= 0 else f"it lapses in {left / 3600:.1f} h"
        return failed(CERTIFICATE, words, remedy, "relay_certificate")
    if left < CERTIFICATE_WARNS:
        return warning(CERTIFICATE, f"it lapses in {left / 86400:.0f} days", remedy, "relay_certificate")
    return ok(CERTIFICATE, f"valid for {left / 86400:.0f} days")


def descriptors_finding(used: int | None, most: int, limits: RelayLimitsConfig, wanted: RelayLimitsConfig) -> Finding:
    """`used` None: the system does not say. `limits`: those that count, of those that the settings want."""
    if used is None or most == UNLIMITED:
        return skipped(DESCRIPTORS, "the system does not say, or sets no limit")
    if used >= most * (1 - FEW):
        return warning(DESCRIPTORS, f"{used} of {most} are in use", advice(2 * most), "descriptors")
    if limits.sessions < wanted.sessions:
        words = f"{most} are too few: {limits.sessions} sessions instead of {wanted.sessions}"
        words += f", {limits.agents} agents instead of {wanted.agents}"
        return warning(DESCRIPTORS, words, f"{advice(needed(wanted))}; or lower the limits", "descriptors")
    return ok(DESCRIPTORS, f"{used} of {most} are in use")


def descriptors_used() -> int | None:
    """Return how many descriptors this process has open; None where the system does not say."""
    try:
        return len(os.listdir("/proc/self/fd")) - 1
    except OSError:
        return None


def ca_finding(error: str, expires: float, now: float) -> Finding:
    """`error`: why a step of the rotation was not taken over; empty where it was. `expires`: of the relay's own CA,
    unix seconds."""
    if error:
        return failed(CA, error, "correct data_dir; this process goes on with the CA that it has", "relay_ca_step")
    if (days := int((expires - now) // 86400)) < CA_WARNS:
        words = f"it ends in {days} days, and every certificate of it then"
        return warning(CA, words, "rotate it: docs/how-to/rotate-a-ca.md", "relay_ca_ends")
    return ok(CA, f"ends in {days} days")


def fleet_finding(connected: bool | None) -> Finding:
    """`connected`: whether NATS answers; None where the relay has none."""
    if connected is None:
        return skipped(FLEET, "none is configured")
    if connected:
        return ok(FLEET, "NATS answers")
    return failed(FLEET, "NATS does not answer", "check fleet.servers and NATS itself", "fleet")


def policy_finding(error: str, held: tuple[Policy, str] | None = None) -> Finding:
    """`error`: why the last version of the file was not taken over; empty where it was. `held`: the version that is
    held back, and why."""
    if held is not None:
        words = f"version {held[0].hash} is held back: {held[1]}; the former one counts"
        remedy = f"correct the policy file, or `arcbridge --role relay policy accept {held[0].hash}`"
        return failed(POLICY, words, remedy, "policy_held")
    if error:
        return failed(POLICY, f"{error}; the last good version counts", "correct the policy file", "policy")
    return ok(POLICY, "as it was read")


def audit_finding(failure: str, *, refuses: bool) -> Finding:
    """`failure`: why records cannot be written now; empty where they can. `refuses`: what is not recorded is not
    done."""
    if failure:
        then = "commands and enrolments are refused" if refuses else "records of what is done meanwhile may be lost"
        return failed(AUDIT, f"it cannot be written ({failure}); {then}", "make room, or correct audit.file", "audit")
    return ok(AUDIT, "records are written")


async def look_at_public_address(public: Address, ca_pem: str | None, chain_pem: str = "") -> Finding:
    """Connect to the public address as an agent does, and compare its certificate with what agents trust.

    `ca_pem`: the relay's own CA, if it has issued the relay's certificate. None: a certificate of another CA, which
    agents know by their system's CAs or by a file; then `chain_pem`, what the relay shows, is known as well.

    Fails only where that is certain. That this machine cannot dial an address that is not its own (a NAT without a
    way back) says nothing of agents and clients, and is a warning.
    """
    try:
        async with asyncio.timeout(CONNECT_DEADLINE):
            known_by = await _known_by(public, ca_pem, chain_pem)
    except ssl.SSLError as error:
        words = getattr(error, "verify_message", "") or error.reason or "TLS failed"
        return failed(PUBLIC_ADDRESS, f"{public} is answered by another server, or under another name ({words})",
                      "set public_address to the name and port of this relay", "public_address")  # fmt: skip
    except (ArcbridgeError, OSError, TimeoutError) as error:
        words = error.message if isinstance(error, ArcbridgeError) else "no answer in time"
        return await _unreached(public, words)
    return ok(PUBLIC_ADDRESS, f"{public} leads to this relay{known_by}")


async def _known_by(public: Address, ca_pem: str | None, chain_pem: str) -> str:
    """Make a TLS connection to the relay at the address; return what to add about its CA. Raises what the way there
    raises, and `ssl.SSLError` where another server answers."""
    context = outer_client_context(RelayTrust(ca_pem), ALPN_HTTP)
    try:
        await try_tls(public, context, deadline=CONNECT_DEADLINE, proxy=DIRECT)
    except ssl.SSLCertVerificationError:
        if ca_pem is not None or not chain_pem:
            raise
    else:
        return ""
    # What the relay shows is known, whichever of it that is: its own certificate is enough.
    context = outer_client_context(RelayTrust(chain_pem), ALPN_HTTP)
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    await try_tls(public, context, deadline=CONNECT_DEADLINE, proxy=DIRECT)
    return "; this system does not trust its CA, so that agents and clients need relay_ca_file"


async def _unreached(public: Address, words: str) -> Finding:
    """Return what it means that nothing answers at the public address."""
    remedy = "set public_address to what agents and clients dial"
    try:
        here = any(_is_of_this_machine(family, sockaddr) for family, sockaddr in await resolve(public))
    except socket.gaierror as error:
        if error.errno in _NO_SUCH_NAME:
            return failed(PUBLIC_ADDRESS, f"there is no name {public.host}", remedy, "public_address")
        here = False
    except OSError:
        here = False
    if here:
        return failed(PUBLIC_ADDRESS, f"{public} does not lead to this relay: {words}", remedy, "public_address")
    return warning(
        PUBLIC_ADDRESS,
        f"{public} cannot be judged from here: {words}",
        "a NAT without a way back keeps this machine from dialling it: then look from elsewhere (`arcbridge doctor`); "
        f"else {remedy}",
        "public_address_unknown",
    )


_NO_SUCH_NAME: Final = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


def _is_of_this_machine(family: int, sockaddr: SockAddr) -> bool:
    """Return whether an address is this machine's: then nothing is between it and this process. Nothing is sent for
    it."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(sockaddr)
        except OSError:
            return False
        # The kernel chooses the source: for an own address that address, and for others of the loopback 127.0.0.1.
        source, wanted = (ipaddress.ip_address(str(one[0])) for one in (sock.getsockname(), sockaddr))
        return source == wanted or (source.is_loopback and wanted.is_loopback)


def checks_of(
    registry_error: Callable[[], str | None],
    basis: Basis,
    revocations: Callable[[], Finding],
    limits: Callable[[], tuple[RelayLimitsConfig, RelayLimitsConfig]],
    clock: Callable[[], float] = time.time,
    ca_error: Callable[[], str] = str,
) -> list[SelfCheck]:
    """Return all checks of a relay that serves. The registry gates readiness by itself. `limits`: those that count now,
    and those that the settings want."""
    verifier, certificate = basis.verifier, basis.certificate

    async def issuers() -> Sequence[Finding]:
        return [key_finding(*one) for one in await verifier.look_at_keys()]

    async def groups() -> Sequence[Finding]:
        return [directory_finding(*one) for one in await verifier.look_at_directories()]

    async def public_address() -> Sequence[Finding]:
        return [await look_at_public_address(basis.checked.public, certificate.ca_pem, certificate.loaded.chain_pem)]

    async def audit() -> Sequence[Finding]:
        own = audit_finding(basis.audit.failure, refuses=basis.audit.refuses)
        return [own, *sink_findings(basis.audit.sinks)]

    def now(find: Callable[[], Finding]) -> Callable[[], Awaitable[Sequence[Finding]]]:
        async def look() -> Sequence[Finding]:
            return [find()]

        return look

    return [
        SelfCheck("registry", now(lambda: registry_finding(registry_error()))),
        SelfCheck("revocations", now(revocations)),
        SelfCheck("issuers", issuers),
        *([SelfCheck("groups", groups)] if verifier.has_directories else ()),
        SelfCheck("fleet", now(lambda: fleet_finding(basis.fleet.engine_connected))),
        SelfCheck(
            "certificate",
            now(lambda: certificate_finding(certificate.loaded.expires, clock(), own=certificate.ca_pem is not None)),
        ),
        SelfCheck("ca", now(lambda: ca_finding(ca_error(), basis.authority.expires, clock()))),
        SelfCheck("descriptors", now(lambda: descriptors_finding(descriptors_used(), limit(), *limits()))),
        SelfCheck("policy", now(lambda: policy_finding(basis.policy.error, basis.policy.held))),
        SelfCheck("audit", audit),
        SelfCheck("public_address", public_address),
    ]
