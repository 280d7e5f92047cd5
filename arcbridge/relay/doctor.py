"""The relay's `doctor`: looks at everything that a relay with these settings depends on, beside the one that runs.

It opens no port, makes nothing and changes nothing: what the relay would make at its first start is reported as
missing. First the settings and files, by the check that a start runs (`relay.settings`), then what this process can
reach itself (registry, issuers, public address), then what the running relay says of itself through its admin socket,
and which tokens it has refused since its start.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from arcbridge.audit.sinks.settings import look_at_collectors
from arcbridge.checks.diagnosis import (
    Finding,
    FindingState,
    directory_finding,
    failed,
    key_finding,
    ok,
    settings_findings,
    skipped,
    warning,
)
from arcbridge.checks.running import look_at_process, look_at_refusals
from arcbridge.errors import ArcbridgeError, ConfigError
from arcbridge.pki.authority import Authority, certificate_validity
from arcbridge.pki.rotation import LATER_BACKUP, named
from arcbridge.relay import ca_rotation
from arcbridge.relay.admin_socket import ask
from arcbridge.relay.certificate import read_text
from arcbridge.relay.data_dir import cluster_names, is_locked, read_authority
from arcbridge.relay.self_checks import (
    CA,
    CERTIFICATE,
    POLICY,
    PUBLIC_ADDRESS,
    REGISTRY,
    certificate_finding,
    look_at_public_address,
)
from arcbridge.relay.service import make_verifier
from arcbridge.relay.settings import CheckedRelay, check
from arcbridge.settings.config import RelayConfig
from arcbridge.settings.problems import Place, located

SETTINGS, RUNNING, AUTHENTICATION, ROTATION = (
    "settings",
    "running relay",
    "authentication",
    "rotation of the relay's CA",
)


async def diagnose(config: RelayConfig, place: Callable[[str], Place | None] = lambda _: None) -> list[Finding]:
    """Look at everything, in the order in which one thing needs the other. `place`: where a setting was given."""
    checked = await asyncio.to_thread(check, config)
    wrong = settings_findings(located(list(checked.problems), place), _hop_of)
    bad = {one.hop for one in wrong if one.state is FindingState.FAILED}
    found = wrong if SETTINGS in bad else [ok(SETTINGS, "complete and well-formed"), *wrong]
    found += [
        ok(hop, f"{path} is well-formed")
        for hop, path in ((AUTHENTICATION, config.authentication), (POLICY, config.policy))
        if hop not in bad
    ]
    authority, ca = await asyncio.to_thread(_authority, config)
    found.append(ca)
    found.append(await _guarded(REGISTRY, "registry", lambda: _registry(config), _REGISTRY_REMEDY))
    if AUTHENTICATION not in bad:
        found += await _issuers(checked)
    certificate = config.tls.certificate
    if certificate is not None and CERTIFICATE not in bad:
        found.append(await _guarded(CERTIFICATE, "certificate", lambda: _certificate(certificate)))
    running = await _running(config)
    idle = any(one.code == "relay_not_running" for one in running)
    found += running if idle else []  # the first failure is the cause, and no address leads to what does not run
    if CERTIFICATE in bad:
        found.append(skipped(PUBLIC_ADDRESS, "the files of [tls] do not say by which certificate to know the relay"))
    elif checked.public.host:
        one = await _guarded(PUBLIC_ADDRESS, "public_address", lambda: _public_address(checked, authority))
        if idle and one.remedy:
            one = replace(one, remedy=f"if it stays so once the relay runs: {one.remedy}")
        found.append(one)
    if authority is not None and (strayed := await _strayed(config, authority)) is not None:
        found.append(strayed)
    elif authority is not None and authority.trusted_pem != authority.certificate_pem:
        found.append(await _guarded(ROTATION, "relay_ca_rotation", lambda: _rotation(config)))
    found += await look_at_collectors(config.audit.sinks)
    return found if idle else found + running


def _hop_of(setting: str) -> str:
    """Return the hop that a setting is about; most are about none."""
    table = setting.partition(".")[0]
    return {"authentication": AUTHENTICATION, "policy": POLICY, "tls": CERTIFICATE}.get(table, SETTINGS)


def _authority(config: RelayConfig) -> tuple[Authority | None, Finding]:
    try:
        authority = read_authority(config.data_dir)
    except ArcbridgeError as error:
        return None, failed(CA, error.message, "restore ca.crt and ca.key of data_dir from a backup", "relay_ca")
    if authority is None:
        words = f"there is none in {config.data_dir}: the relay makes it at its first start"
        return None, failed(CA, words, "start the relay, or correct data_dir", "relay_ca")
    return authority, ok(CA, authority.pin)


async def _strayed(config: RelayConfig, authority: Authority) -> Finding | None:
    """Return that agents follow a CA which this relay does not have; None where none does."""
    try:
        agents = await ask(config.data_dir, {"ask": "agents"}) or []
    except ArcbridgeError:
        return None  # the running relay's own row says it
    strayed = ca_rotation.followers_of_another_ca(agents, authority.succession)
    if not strayed:
        return None
    return failed(ROTATION, "; ".join(named(strayed)), LATER_BACKUP, "relay_ca_rotation")


async def _rotation(config: RelayConfig) -> Finding:
    """Return how far the rotation of the CA is, of which one step is left."""
    found = await ca_rotation.status(config)
    step = found.rotation.step
    if not found.missing:
        return ok(ROTATION, f"{found.followed} have followed: it is safe to run `ca {step}` now")
    words = f"{found.followed} have followed, so wait with `ca {step}`: {'; '.join(named(found.missing))}"
    return warning(ROTATION, words, "`arcbridge --role relay ca status` shows them", "relay_ca_rotation")


async def _registry(config: RelayConfig) -> Finding:
    """Look at the registry's file and only read it: to open it as a relay does would make a newer schema of an older
    one."""
    if config.fleet.servers:
        return skipped(REGISTRY, "in NATS: the running relay says whether it answers")
    clusters = await asyncio.to_thread(cluster_names, config.data_dir)
    return ok(REGISTRY, f"{len(clusters)} cluster{'s' if len(clusters) != 1 else ''}")


async def _certificate(path: Path) -> Finding:
    chain_pem = read_text("tls.certificate", path)
    return certificate_finding(certificate_validity(chain_pem)[1], time.time(), own=False)


async def _issuers(checked: CheckedRelay) -> list[Finding]:
    async with AsyncExitStack() as stack:
        try:
            verifier = make_verifier(checked, stack)
        except ConfigError:
            return []  # the settings' check has reported it
        keys, directories = await asyncio.gather(verifier.look_at_keys(), verifier.look_at_directories())
        return [*(key_finding(*one) for one in keys), *(directory_finding(*one) for one in directories)]


async def _public_address(checked: CheckedRelay, authority: Authority | None) -> Finding:
    certificate = checked.config.tls.certificate
    if certificate is not None:
        return await look_at_public_address(checked.public, None, read_text("tls.certificate", certificate))
    if authority is None:
        return skipped(PUBLIC_ADDRESS, "there is no CA yet to know the relay by")
    return await look_at_public_address(checked.public, authority.trusted_pem)


async def _running(config: RelayConfig) -> list[Finding]:
    """Return what the relay that runs says of itself."""
    try:
        rows = await ask(config.data_dir, {"ask": "checks"})
    except ArcbridgeError as error:
        return [failed(RUNNING, error.message, "look into the relay's log", "relay_silent")]
    if not rows and (rows is not None or await asyncio.to_thread(is_locked, config.data_dir)):
        how = "answers no commands" if rows is None else "does not send what it finds"
        words = f"a relay runs on {config.data_dir} and {how}: it is of an older version"
        remedy = "restart it with this version; until then its own log and metrics say how it is"
        if rows is None:
            words += ", or is still starting, or its log says `admin socket not opened`"
            remedy = f"ask again; if it stays so, {remedy}"
        found = [warning(RUNNING, words, remedy, "relay_older"), *await look_at_process(config.observe.listen)]
        return found + await look_at_refusals("arcbridge_relay_", config.observe.listen, "access tokens")
    if rows is None:
        words = f"no relay runs on {config.data_dir}"
        return [failed(RUNNING, words, "start it (`systemctl start arcbridge-relay`); its log says why it ended",
                       "relay_not_running")]  # fmt: skip
    # Several workers give one row each for a hop: the worst one is shown.
    worst: dict[str, Finding] = {}
    for row in rows:
        place = f" (worker {row['worker']})" if row.get("worker") is not None else ""
        try:
            one = Finding(
                f"running relay: {row['hop']}",
                FindingState(row["state"]),
                f"{row['detail']}{place if row['state'] in ('failed', 'warning') else ''}",
                str(row["remedy"]),
                str(row["code"]),
            )
        except (KeyError, ValueError):
            continue  # a relay of another version wrote the row
        known = worst.get(one.hop)
        if known is None or _rank(one.state) > _rank(known.state):
            worst[one.hop] = one
    found = [ok(RUNNING, "answers"), *(one for one in worst.values() if one.state is not FindingState.SKIPPED)]
    return found + await look_at_refusals("arcbridge_relay_", config.observe.listen, "access tokens")


def _rank(state: FindingState) -> int:
    return (FindingState.SKIPPED, FindingState.OK, FindingState.WARNING, FindingState.FAILED).index(state)


_REGISTRY_REMEDY: Final = (
    "the relay's first start makes it; restore one that is damaged from a backup (docs/disaster-recovery.md)"
)


async def _guarded(
    hop: str, code: str, look: Callable[[], Awaitable[Finding]], remedy: str = "see docs/broken.md"
) -> Finding:
    """Return the finding of `look`; an error of ours becomes a finding with `code`, too, and with `remedy`."""
    try:
        return await look()
    except ArcbridgeError as error:
        return failed(hop, error.message, remedy, code)
