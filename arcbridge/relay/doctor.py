"""The relay's `doctor`: looks at everything that a relay with these settings depends on, beside the one that runs.

It opens no port, makes nothing and changes nothing: what the relay would make at its first start is reported as
missing. First the settings and files, then what this process can reach itself (registry, issuers, public address), then
what the running relay says of itself through its admin socket, and which tokens it has refused since its start.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from arcbridge.config import RelayConfig
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.identity import authentication
from arcbridge.identity.groups import GroupSources
from arcbridge.identity.policy import PolicyFile
from arcbridge.identity.verifier import Acceptance, TokenVerifier
from arcbridge.net.address import parse_address
from arcbridge.net.fetch import HttpFetcher
from arcbridge.net.tls import RelayTrust
from arcbridge.observe.diagnosis import Finding, State, failed, ok, skipped
from arcbridge.observe.directory_findings import directory_finding
from arcbridge.observe.key_findings import key_finding
from arcbridge.observe.running import look_at_refusals
from arcbridge.pki.authority import Authority, certificate_validity
from arcbridge.relay.admin_socket import ask
from arcbridge.relay.data_dir import count_clusters, read_authority
from arcbridge.relay.self_checks import (
    POLICY,
    PUBLIC_ADDRESS,
    REGISTRY,
    certificate_finding,
    look_at_public_address,
)

RUNNING, AUTHENTICATION, CA = "running relay", "authentication", "relay's CA"


async def diagnose(config: RelayConfig) -> list[Finding]:
    """Look at everything, in the order in which one thing needs the other."""
    found = [
        _file_finding(AUTHENTICATION, "authentication", config.authentication, authentication.load),
        _file_finding(POLICY, "policy", config.policy, PolicyFile),
    ]
    authority, ca = await asyncio.to_thread(_authority, config)
    found.append(ca)
    found.append(await _guarded(REGISTRY, lambda: _registry(config)))
    if found[0].state is State.OK and config.authentication is not None:
        found += await _issuers(config, config.authentication)
    if config.tls.certificate is not None:
        found.append(_file_finding("relay's certificate", "tls.certificate", config.tls.certificate, _certificate))
    found.append(await _guarded(PUBLIC_ADDRESS, lambda: _public_address(config, authority)))
    return found + await _running(config)


def _file_finding(hop: str, setting: str, path: Path | None, load: Callable[[Path], object]) -> Finding:
    """Whether a file can be read and understood."""
    if path is None:
        return failed(hop, f"{setting} is not set", f"set {setting} in the settings file", "config")
    try:
        loaded = load(path)
    except (ArcbridgeError, OSError) as error:
        words = error.message if isinstance(error, ArcbridgeError) else f"{path}: {error.strerror}"
        return failed(hop, words, "correct the file", "config")
    return loaded if isinstance(loaded, Finding) else ok(hop, f"{path} is well-formed")


def _certificate(path: Path) -> Finding:
    try:
        _, not_after = certificate_validity(path.read_text(encoding="ascii"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not PEM text") from error
    return certificate_finding(not_after, time.time(), own=False)


def _authority(config: RelayConfig) -> tuple[Authority | None, Finding]:
    try:
        authority = read_authority(config.data_dir)
    except ArcbridgeError as error:
        return None, failed(CA, error.message, "restore ca.crt and ca.key of data_dir from a backup", "relay_ca")
    if authority is None:
        words = f"there is none in {config.data_dir}: the relay makes it at its first start"
        return None, failed(CA, words, "start the relay, or correct data_dir", "relay_ca")
    return authority, ok(CA, authority.pin)


async def _registry(config: RelayConfig) -> Finding:
    """The registry's file, read alone: to open it as a relay does would make a newer schema of an older one."""
    if config.fleet.servers:
        return skipped(REGISTRY, "in NATS: the running relay says whether it answers")
    clusters = await asyncio.to_thread(count_clusters, config.data_dir)
    return ok(REGISTRY, f"{clusters} clusters")


async def _issuers(config: RelayConfig, path: Path) -> list[Finding]:
    fetcher = HttpFetcher()
    try:
        accept = Acceptance(max_lifetime=config.max_token_lifetime)
        issuers = authentication.load(path)
        groups = GroupSources(issuers, fetcher.ask, directories=config.graph)
        verifier = TokenVerifier(issuers, fetcher, accept=accept, groups=groups)
        try:
            keys, directories = await asyncio.gather(verifier.look_at_keys(), verifier.look_at_directories())
            return [
                *(key_finding(one.path, one.url, one.usable, one.failure) for one in keys),
                *(directory_finding(one.at, one.usable, one.code, one.why) for one in directories),
            ]
        finally:
            await verifier.close()
    except ConfigError as error:
        return [failed(AUTHENTICATION, error.message, "correct the setting", "config")]
    finally:
        await fetcher.close()


async def _public_address(config: RelayConfig, authority: Authority | None) -> Finding:
    if not config.public_address:
        return failed(PUBLIC_ADDRESS, "public_address is not set", "set it to what agents and clients dial", "config")
    if config.tls.certificate is not None:
        trust = RelayTrust()
    elif authority is None:
        return skipped(PUBLIC_ADDRESS, "there is no CA yet to know the relay by")
    else:
        trust = RelayTrust(authority.certificate_pem)
    return await look_at_public_address(parse_address(config.public_address), trust)


async def _running(config: RelayConfig) -> list[Finding]:
    """What the relay that runs says of itself."""
    try:
        rows = await ask(config.data_dir, {"ask": "checks"})
    except ArcbridgeError as error:
        return [failed(RUNNING, error.message, "look into the relay's log", "relay_silent")]
    if rows is None:
        words = f"no relay runs on {config.data_dir}"
        return [failed(RUNNING, words, "start it (`systemctl start arcbridge-relay`); its log says why it ended",
                       "relay_not_running")]  # fmt: skip
    # Of several workers, each one's word where it is bad, and one word where all are well.
    worst: dict[str, Finding] = {}
    for row in rows:
        place = f" (worker {row['worker']})" if row.get("worker") is not None else ""
        try:
            one = Finding(
                f"running relay: {row['hop']}",
                State(row["state"]),
                f"{row['detail']}{place if row['state'] in ('failed', 'warning') else ''}",
                str(row["remedy"]),
                str(row["code"]),
            )
        except (KeyError, ValueError):
            continue  # of another version
        known = worst.get(one.hop)
        if known is None or _rank(one.state) > _rank(known.state):
            worst[one.hop] = one
    found = [ok(RUNNING, "answers"), *(one for one in worst.values() if one.state is not State.SKIPPED)]
    return found + await look_at_refusals("arcbridge_relay_", config.observe.listen, "access tokens")


def _rank(state: State) -> int:
    return (State.SKIPPED, State.OK, State.WARNING, State.FAILED).index(state)


async def _guarded(hop: str, look: Callable[[], Awaitable[Finding]]) -> Finding:
    """The finding; an error of ours is one, too."""
    try:
        return await look()
    except ArcbridgeError as error:
        return failed(hop, error.message, "see docs/operations.md", hop.replace(" ", "_"))
