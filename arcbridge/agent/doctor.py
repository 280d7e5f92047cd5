"""The agent's `doctor`: looks at everything that an agent with these settings depends on, beside the one that runs.

It enrols nothing, opens no control connection and changes nothing. First the settings and what is kept (credential, its
end, whose it is), then each relay up to its certificate, then the API server, issuers and the audit log, and last what
the running agent says of itself. What does not need another thing is looked at beside it, so that all of it takes as
long as the slowest; an API server that does not answer is asked once.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from arcbridge.agent.enrol import oldest_cluster_ca
from arcbridge.agent.kube.apiserver import ApiServer, endpoint_of
from arcbridge.agent.relay_http import post
from arcbridge.agent.self_checks import (
    API_SERVER,
    AUDIT,
    IMPERSONATION,
    api_checks,
    certificate_finding,
    groups_checks,
    issuers_check,
)
from arcbridge.agent.self_checks import CREDENTIAL as API_CREDENTIAL
from arcbridge.agent.service import credential_store, make_verifier
from arcbridge.agent.settings import Checked, check
from arcbridge.audit.sinks.collector import HTTP
from arcbridge.audit.sinks.settings import look_at_collectors, unreachable
from arcbridge.checks.diagnosis import Finding, FindingState, failed, first_failure, ok, settings_findings, skipped
from arcbridge.checks.running import look_at_process, look_at_refusals, read_page, samples_of
from arcbridge.checks.self_checks import SelfCheck, SelfChecks
from arcbridge.errors import ArcbridgeError, ConfigError, EnrolmentRefused, PinMismatch
from arcbridge.net.address import Address
from arcbridge.net.dialer import try_tls
from arcbridge.net.tls import ALPN_HTTP, RelayTrust, cure_of, fetch_relay_cas, outer_client_context
from arcbridge.pki.credentials import CLUSTER_CA_CERTIFICATE, AgentCredential
from arcbridge.pki.pins import pin_of, same_pin
from arcbridge.settings.config import AgentConfig, AuditSinkConfig, TracingConfig
from arcbridge.settings.named_files import is_directory, is_there
from arcbridge.settings.problems import Place, located

SETTINGS, CREDENTIAL, JOIN_TOKEN = "settings", "agent's credential at the relay", "join token"
_LOOKED_AT = ("audit.", "authentication", "join_token_file", "kubernetes", "relay_ca", "state")
"""Settings whose files a hop of their own is about."""
_SILENT = "the API server does not answer"
_SPANS = "check the table [tracing], the collector, and that this place may connect to it"
CONNECT_DEADLINE = 10.0
"""Seconds for one relay, TCP and TLS together."""
_PIN = (
    "compare relay_ca_pin with `token create`, or with the relay's log (`relay_ca_pin`); a new relay CA has a new pin. "
    "Where others of the relays are trusted, this one may lack their ca-rotation.json"
)


async def diagnose(config: AgentConfig, place: Callable[[str], Place | None] = lambda _: None) -> list[Finding]:
    """Look at everything, in the order in which one thing needs the other. `place`: where a setting was given."""
    checked = check(config)
    if wrong := [one for one in checked.problems.errors if not one.setting.startswith(_LOOKED_AT)]:
        return settings_findings(located(wrong, place), lambda _: SETTINGS)
    try:
        endpoint = endpoint_of(config.kubernetes)
    except ConfigError as error:
        return [failed(SETTINGS, error.message, "correct the settings file", "config")]
    found = [ok(SETTINGS, "complete and well-formed")]
    api: ApiServer | None = None
    try:
        api = ApiServer(endpoint)
    except ConfigError as error:
        found.append(failed(API_SERVER, error.message, "correct the file that the setting names", "kubernetes"))
    try:
        looks = await asyncio.gather(
            _relays_and_api(config, checked, api),
            _issuers(checked),
            _audit(config),
            look_at_collectors(config.audit.sinks),
            _spans(config.tracing),
            look_at_process(config.observe.listen),
            look_at_refusals("arcbridge_agent_", config.observe.listen, "tokens of users"),
        )
    finally:
        if api is not None:
            await api.close()
    return found + [one for look in looks for one in look]


async def _all(checks: Sequence[SelfCheck]) -> list[Finding]:
    return await SelfChecks(checks, None).look()


# --- what is kept, the relays, and the API server -------------------------------------------------------------------


async def _relays_and_api(config: AgentConfig, checked: Checked, api: ApiServer | None) -> list[Finding]:
    if not config.state.secret:
        looks = await asyncio.gather(_relays(config, checked.relays, api), _api(api, checked))
        return [one for look in looks for one in look]
    # What is kept in a Secret needs the API server first.
    found = await _api(api, checked)
    if first_failure(found[:1]) is not None:
        return [*found, skipped(CREDENTIAL, _SILENT)]
    return found + await _relays(config, checked.relays, api)


async def _api(api: ApiServer | None, checked: Checked) -> list[Finding]:
    if api is None:
        return []
    server, credential, rights, files = api_checks(api, lambda: checked.issuers)
    found = await _all([server])
    if first_failure(found) is None:
        return found + await _all([credential, rights, files])
    return [*found, skipped(API_CREDENTIAL, _SILENT), skipped(IMPERSONATION, _SILENT), *await _all([files])]


async def _relays(config: AgentConfig, relays: Sequence[Address], api: ApiServer | None) -> list[Finding]:
    credential: AgentCredential | None = None
    try:
        snapshot = await credential_store(config, api).load()
        credential = None if snapshot is None else AgentCredential.from_entries(snapshot)
    except ArcbridgeError as error:
        return [failed(CREDENTIAL, error.message, "restore the agent's state, or let the agent enrol again", "state")]
    trust, found = await _trust(config, credential)
    question = None
    if credential is None:
        question = {"join_token": _join_token(config)}
        if snapshot is not None and snapshot.get(CLUSTER_CA_CERTIFICATE):
            question["cluster_ca_pin"] = pin_of(oldest_cluster_ca(snapshot))
    looks = await asyncio.gather(*(_relay(config, relay, trust, question) for relay in relays))
    return found + [one for look in looks for one in look]


async def _trust(config: AgentConfig, credential: AgentCredential | None) -> tuple[RelayTrust | None, list[Finding]]:
    """Return how relays are known, and whether that agrees with the settings. None: it has to be asked for with the
    pin."""
    found: list[Finding] = []
    if credential is None:
        found.append(skipped(CREDENTIAL, "the agent has not enrolled yet"))
    else:
        one = certificate_finding(*credential.validity(), time.time())
        words = f"cluster {credential.cluster}, {one.detail}" if one.state is FindingState.OK else one.detail
        found.append(Finding(CREDENTIAL, one.state, words, one.remedy, one.code))
    pem: str | None = None
    followed: tuple[str, ...] = ()
    if config.relay_ca_file is not None:
        try:
            pem = config.relay_ca_file.read_text("ascii", "ignore")
        except OSError:
            found.append(
                failed("relay's CA", f"{config.relay_ca_file} cannot be read", "correct relay_ca_file", "config")
            )
            return None, found
    elif credential is not None:
        pem = credential.relay_trust_pem or None
        followed = credential.relay_succession.pins if credential.relay_cas else ()
    known = followed or ((pin_of(pem),) if pem and config.relay_ca_pin else ())
    if known and config.relay_ca_pin and not any(same_pin(one, config.relay_ca_pin) for one in known):
        words = f"relay_ca_pin is {config.relay_ca_pin}, and the CA that the agent has is {known[-1]}"
        found.append(failed("relay's CA", words, _PIN, "relay_pin"))
    if pem is None and (credential is not None or not config.relay_ca_pin):
        return RelayTrust(), found
    return (None if pem is None else RelayTrust(pem)), found


async def _relay(
    config: AgentConfig, relay: Address, trust: RelayTrust | None, question: dict[str, str] | None
) -> list[Finding]:
    """Look at one relay: whether it answers and is the one that the pin names; and for a new agent, whether it could
    enrol (`question`: its join token, and the pin of the cluster's CA where it has made one)."""
    hop = f"relay {relay}"
    try:
        async with asyncio.timeout(CONNECT_DEADLINE):
            if trust is None:
                cas = await fetch_relay_cas(relay, config.relay_ca_pin, deadline=CONNECT_DEADLINE)
                trust = RelayTrust(cas.trusted)
            await try_tls(relay, outer_client_context(trust, ALPN_HTTP), deadline=CONNECT_DEADLINE)
    except PinMismatch as error:
        return [failed(hop, error.message, _PIN, "relay_pin")]
    except ssl.SSLError as error:
        words = getattr(error, "verify_message", "") or error.reason or "TLS failed"
        cure = cure_of(error, _PIN) if isinstance(error, ssl.SSLCertVerificationError) else _PIN
        return [failed(hop, f"its certificate is not trusted ({words})", cure, "relay_pin")]
    except (ArcbridgeError, OSError, TimeoutError) as error:
        words = error.message if isinstance(error, ArcbridgeError) else "no answer in time"
        remedy = (
            "check `relays`, name resolution, and that this cluster may connect to it (HTTPS_PROXY, egress policies)"
        )
        return [failed(hop, words, remedy, "relay_unreachable")]
    found = [ok(hop, "answers, and is the one that is trusted")]
    if question is not None:
        found.append(await _check_token(relay, trust, question))
    return found


def _join_token(config: AgentConfig) -> str:
    if config.join_token_file is None:
        return ""
    try:
        return config.join_token_file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


async def _check_token(relay: Address, trust: RelayTrust, question: dict[str, str]) -> Finding:
    """Ask the relay whether the join token could enrol this agent; that uses nothing up."""
    remedy = (
        "make a new one at the relay (`token create --cluster NAME`; with --rebind where the name belongs to another "
        "cluster CA) and put it into join_token_file"
    )
    if not question["join_token"]:
        return failed(JOIN_TOKEN, "the agent has not enrolled, and join_token_file has none", remedy, "join_token")
    try:
        answer = await post(relay, "/v1/join-token", question, trust)
    except EnrolmentRefused as error:
        return failed(JOIN_TOKEN, error.message, remedy, "join_token")
    except ArcbridgeError as error:
        return skipped(JOIN_TOKEN, f"{relay} cannot say: {error.message}")
    return ok(JOIN_TOKEN, f"can enrol this agent for cluster {answer.get('cluster')}")


# --- the rest -------------------------------------------------------------------------------------------------------


async def _spans(tracing: TracingConfig) -> list[Finding]:
    if not tracing.endpoint:
        return []
    spans = AuditSinkConfig(HTTP, tracing.endpoint, ca_file=tracing.ca_file, token_file=tracing.token_file)
    reason = await unreachable(spans)
    return [
        failed("spans", reason, _SPANS, "spans") if reason else ok("spans", "the collector answers, and is trusted")
    ]


async def _issuers(checked: Checked) -> list[Finding]:
    config = checked.config
    if wrong := [one for one in checked.problems.errors if one.setting.startswith("authentication")]:
        return [failed("authentication", str(wrong[0]), "correct the file or the setting", "config")]
    async with AsyncExitStack() as stack:
        try:
            verifier = make_verifier(checked, stack)
        except ConfigError as error:
            return [failed("authentication", error.message, "correct the file or the setting", "config")]
        return await _all([issuers_check(verifier, token_mode=lambda: config.token_mode), *groups_checks(verifier)])


async def _audit(config: AgentConfig) -> list[Finding]:
    """Look whether the audit log can be written, by this user and by the agent that runs."""
    file, remedy = config.audit.file, "make room, or let the agent's user write audit.file"
    if not file or file == "-":
        return [skipped(AUDIT, "no file")]
    page = await read_page(config.observe.listen, "/metrics") if config.observe.listen else None
    if page is not None and samples_of(page.text).get("arcbridge_agent_audit_failing", 0.0):
        return [failed(AUDIT, f"the running agent cannot write {file}", remedy, "audit")]
    path = Path(file)
    target = path if is_there(path) else path.parent
    if not os.access(target, os.W_OK) or is_directory(path):
        return [failed(AUDIT, f"{file} cannot be written by this user", remedy, "audit")]
    return [ok(AUDIT, f"{file} can be written")]
