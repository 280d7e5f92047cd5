"""The agent's one check of its settings: every start and every reload runs it, and `config check` runs nothing else.

It reads all files that the settings name, collects every mistake, and keeps what it read, so that a start uses what
was checked. It makes no file and asks no peer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from arcbridge.agent.accounts import check_limits
from arcbridge.agent.denylist import parse_denylist
from arcbridge.agent.kube.apiserver import SERVICE_ACCOUNT, endpoint_of
from arcbridge.agent.revocations import Revocation
from arcbridge.agent.targets import Target, read_targets
from arcbridge.agent.workload import parse_label, pod_name
from arcbridge.audit.log import check_policy
from arcbridge.audit.sinks.collector import http_address
from arcbridge.audit.sinks.settings import check_sinks
from arcbridge.errors import ConfigError, StateError
from arcbridge.identity import token_settings
from arcbridge.identity.authentication import AuthenticationConfig
from arcbridge.identity.claims import is_reserved
from arcbridge.identity.names import is_plain
from arcbridge.identity.proof import ProofPolicy
from arcbridge.identity.verifier import Acceptance
from arcbridge.net.address import Address, parse_address
from arcbridge.observe.listen import parse_observe_listen
from arcbridge.pki.credentials import AgentCredential, DirectoryStore
from arcbridge.settings import named_files
from arcbridge.settings.choices import DEFAULT_RIGHTS, FULL
from arcbridge.settings.config import AgentConfig, RecordingBucketConfig, RecordingConfig, TracingConfig
from arcbridge.settings.problems import Place, Problems
from arcbridge.settings.regions import check_regions
from arcbridge.settings.toml_lines import line_of, parts

MIN_AGE = 10.0
"""Seconds: the shortest `session.max_age`."""
MAX_DRAIN = 24 * 3600.0
"""Seconds: the longest `session.drain`. No orchestrator waits for longer."""
MOST_LENDABLE = 32
"""Groups of `elevation.groups`: the self-check asks for the right to each."""
EXAMPLE_RECIPIENT = "age1ql3z7hjy54pw3hyww5ayyfg7zqgvc7w3j2elw8zmrj2kg5sfn9aqmcac8p"
"""The public key in age's own README, which the annotated files have, too; its private key may be anyone's."""

MIN_RECORDINGS = 1024 * 1024
"""Bytes: the least bound on one recording, and on all of them."""
MAX_STORED_RECORDING = 5 * 1024**3 - 1024**2
"""Bytes: what stores take in one request is 5 GiB, and the last lines of a recording come on top."""
BUCKET_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
"""https://docs.aws.amazon.com/AmazonS3/latest/userguide/bucketnamingrules.html"""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check has read; complete where `problems` has no error."""

    config: AgentConfig
    problems: Problems
    relays: tuple[Address, ...]
    region: frozenset[Address]
    """The relays of the preferred region."""
    issuers: AuthenticationConfig | None
    """None: no OIDC token counts."""
    acceptance: Acceptance
    proof: ProofPolicy
    targets: Mapping[str, Target]
    denylist: Mapping[str, Revocation]


def required(config: AgentConfig, *, serves: bool = True) -> Checked:
    """Return what a start needs of `check`. Raises SettingsRefused."""
    checked = check(config, serves=serves)
    checked.problems.refuse()
    return checked


def check(
    config: AgentConfig,
    environment: Mapping[str, str] | None = None,
    service_account: Path = SERVICE_ACCOUNT,
    *,
    serves: bool = True,
) -> Checked:
    """Check the settings and every file that they name; the mistakes are in `problems`.

    `environment`: where a pod finds its API server; None: this process' own. `serves`: false for an agent that enrols
    and ends, which reaches the API server only for its Secret.
    """
    problems = Problems()
    relays = _relays(config, problems)
    region = check_regions(problems, config.region, config.regions, parse_address, relays)
    with problems.collect("observe.listen"):
        parse_observe_listen(config.observe.listen)
    _relay_trust(config, problems)
    _who_may_log_in(config, problems)
    tokens = token_settings.check(
        problems,
        file=config.authentication,
        acceptance=Acceptance(
            frozenset(config.forbidden_audiences), config.max_token_lifetime, frozenset(config.actor_clients)
        ),
        proof=config.proof,
        directories=config.graph,
        claim_sources=config.claim_sources,
    )
    denylist = _denylist(config, problems)
    if serves or config.state.secret:
        _kubernetes(config, problems, environment, service_account)
    _state(config, problems, service_account)
    targets = _targets(config, problems)
    with problems.collect("limits"):
        check_limits(config.limits)
    if config.session.max_age < MIN_AGE:
        problems.error("session.max_age", f"must be at least {MIN_AGE:.0f} s; clients would do little but come back")
    if not 0 < config.session.drain <= MAX_DRAIN:
        problems.error("session.drain", f"must be above 0 s, and at most {MAX_DRAIN / 3600:.0f} h")
    _audit(config, problems)
    _tracing(config.tracing, problems)
    _elevation(config, problems)
    _recording(config.recording, problems)
    return Checked(
        config, problems, tuple(relays), region, tokens.issuers, tokens.acceptance, tokens.proof, targets, denylist
    )


def _relays(config: AgentConfig, problems: Problems) -> list[Address]:
    if not config.relays:
        problems.error("relays", "required but not set; give --relay https://host:port, or set it in the settings file")
    relays: list[Address] = []
    for n, text in enumerate(config.relays):
        setting = f"relays[{n}]"
        with problems.collect(setting):
            address = parse_address(text)
            if address in relays:
                raise ConfigError(f"{setting}: {address} is given twice")
            relays.append(address)
            named_files.check_not_placeholder(problems, setting, address.host)
    if config.control_connections < 1:
        problems.error("control_connections", "must be at least 1; 2 keeps the cluster within reach when a relay dies")
    return relays


def _relay_trust(config: AgentConfig, problems: Problems) -> None:
    named_files.check_pin_setting(problems, "relay_ca_pin", config.relay_ca_pin)
    if config.relay_ca_file is not None:
        ca_pem = named_files.check_ca(problems, "relay_ca_file", config.relay_ca_file)
        if ca_pem is not None and config.relay_ca_pin:
            from arcbridge.pki.pins import pin_of, same_pin

            with problems.collect("relay_ca_pin"):
                if not same_pin(config.relay_ca_pin, pin_of(ca_pem)):
                    raise ConfigError("relay_ca_pin: contradicts relay_ca_file: remove the wrong one")
    elif not config.relay_ca_pin:
        problems.warn(
            "relay_ca_pin",
            "missing, and so is relay_ca_file: the relay's certificate must be of a CA that this system "
            "trusts, and without the pin of a relay's own CA no agent can enrol there",
        )


def _who_may_log_in(config: AgentConfig, problems: Problems) -> None:
    if config.token_mode:
        problems.warn(
            "token_mode",
            "on (the default), so that who holds a ServiceAccount token of this cluster comes in with it; "
            "switch it off where all access must come from an issuer",
        )
    if config.authentication is None:
        if not config.token_mode:
            problems.error("authentication", "missing, and token_mode is off: no caller could log in")
        else:
            problems.warn("authentication", "missing, so that only ServiceAccount tokens count")
    elif not config.forbidden_audiences:
        problems.warn(
            "forbidden_audiences",
            "empty; name the relay's audience, so that no token that was shown to a relay counts here",
        )


def _denylist(config: AgentConfig, problems: Problems) -> Mapping[str, Revocation]:
    if config.denylist_file is None:
        return {}
    data = named_files.read(problems, "denylist_file", config.denylist_file)
    if data is None:
        return {}
    source = str(config.denylist_file)
    try:
        return parse_denylist(data, source)
    except ConfigError as error:
        message = error.message.removeprefix(f"{source}: ")
        line = line_of(parts(message.partition(":")[0]), data.decode("utf-8", "replace"))
        problems.error("denylist_file", f"denylist_file: {message}", Place(source, line))
    return {}


def _kubernetes(
    config: AgentConfig, problems: Problems, environment: Mapping[str, str] | None, service_account: Path
) -> None:
    settings = config.kubernetes
    if settings.drain_label:
        with problems.collect("kubernetes.drain_label"):
            parse_label(settings.drain_label)
            pod_name(environment)
            if not named_files.is_there(service_account / "namespace"):
                raise ConfigError(
                    f"kubernetes.drain_label: needs the pod's namespace, which is not in {service_account}; mount the "
                    "token of the pod's ServiceAccount, or remove it where the agent is no pod"
                )
    try:
        if environment is None:
            end = endpoint_of(settings, service_account=service_account)
        else:
            end = endpoint_of(settings, environment, service_account)
    except ConfigError as error:
        problems.error("kubernetes.server", error.message)
        return
    if end.ca_file is not None:
        named_files.check_ca(problems, "kubernetes.ca_file", end.ca_file)
    if end.token_file is not None:
        named_files.check_secret(problems, "kubernetes.token_file", end.token_file)
    named_files.check_pair(
        problems,
        ("kubernetes.client_certificate_file", end.certificate_file),
        ("kubernetes.client_key_file", end.key_file),
    )
    bundle = ("kubernetes.credential_bundle_file", end.bundle_file)
    named_files.check_pair(problems, bundle, bundle)


def _state(config: AgentConfig, problems: Problems, service_account: Path) -> None:
    state = config.state
    if bool(state.secret) == (state.directory is not None):
        problems.error("state", "exactly one of state.directory and state.secret is needed")
        return
    enrolled = True  # a Secret may hold a credential; only the API server could tell
    if state.directory is not None:
        named_files.check_directory(problems, "state.directory", state.directory)
        if not named_files.is_directory(state.directory) and named_files.is_there(state.directory):
            return
        try:
            kept = DirectoryStore(state.directory).read()
            enrolled = kept is not None and AgentCredential.from_entries(kept) is not None
        except StateError as error:
            problems.error("state.directory", error.message)
    elif "/" not in state.secret and not named_files.is_there(service_account / "namespace"):
        problems.error("state.secret", "write namespace/name (this is not a pod)")
    if config.join_token_file is not None:
        named_files.check_join_token(
            problems, "join_token_file", config.join_token_file, missing="fine" if enrolled else "error"
        )
    elif not enrolled:
        problems.error(
            "join_token_file",
            "required for the first start; make a token with `arcbridge --role relay token create`, "
            "put it into a file and give --join-token-file",
        )


def _targets(config: AgentConfig, problems: Problems) -> Mapping[str, Target]:
    targets: dict[str, Target] = {}
    for name, target in config.targets.items():
        with problems.collect(f"targets.{name}"):
            targets |= read_targets({name: target})
    return targets


def _audit(config: AgentConfig, problems: Problems) -> None:
    with problems.collect("audit.on_failure"):
        check_policy(config.audit.on_failure)
    if not config.audit.file:
        problems.warn("audit.file", "empty, so that no record tells later which user did what")
    elif config.audit.file != "-":
        named_files.check_appendable(problems, "audit.file", Path(config.audit.file))
    check_sinks(config.audit, config.audit.file, problems)


def _tracing(tracing: TracingConfig, problems: Problems) -> None:
    if not tracing.endpoint:
        for setting in ("ca_file", "token_file"):
            if getattr(tracing, setting) is not None:
                problems.error(f"tracing.{setting}", "is of no use without tracing.endpoint: set both, or take it out")
        return
    _http_server(problems, "tracing", tracing.endpoint, tracing.ca_file)
    if tracing.token_file is not None:
        named_files.check_secret(problems, "tracing.token_file", tracing.token_file, missing="warning")


def _http_server(problems: Problems, table: str, endpoint: str, ca_file: Path | None) -> None:
    """Check `endpoint` and `ca_file` of a table of settings."""
    try:
        where, _ = http_address(endpoint)
    except ConfigError as error:
        problems.error(f"{table}.endpoint", error.message)
    else:
        named_files.check_not_placeholder(problems, f"{table}.endpoint", where.host)
    if ca_file is not None:
        named_files.check_ca(problems, f"{table}.ca_file", ca_file)


def _elevation(config: AgentConfig, problems: Problems) -> None:
    elevation, impersonable = config.elevation, config.kubernetes.impersonate_groups
    if elevation.default not in DEFAULT_RIGHTS:
        problems.error("elevation.default", f"must be one of {', '.join(DEFAULT_RIGHTS)}")
    elif elevation.default != FULL and not elevation.groups:
        problems.error("elevation.default", "without elevation.groups no user could do more: name what may be lent")
    named = elevation.default_groups
    if not named or ("*" in named and named != ("*",)):
        problems.error("elevation.default_groups", 'either ["*"], which is every user, or names of groups')
    if len(elevation.groups) > MOST_LENDABLE:
        problems.error("elevation.groups", f"at most {MOST_LENDABLE}")
    for n, group in enumerate(elevation.groups):
        if not is_plain(group) or is_reserved(group) or group == "*":
            problems.error(
                f"elevation.groups[{n}]", "must be the name of a group, and none of Kubernetes' own (system:)"
            )
        elif impersonable != ("*",) and group not in impersonable:
            problems.error(
                f"elevation.groups[{n}]",
                f"{group!r} is not among kubernetes.impersonate_groups, so that no request could have it; add it there "
                "and to the agent's role (the chart does both)",
            )


def _recording(recording: RecordingConfig, problems: Problems) -> None:
    if not recording.rules:
        for setting, given in (
            ("recipients", recording.recipients),
            ("directory", recording.directory),
            ("bucket", recording.bucket.endpoint),
        ):
            if given:
                problems.error(f"recording.{setting}", "is of no use without a table [recording.rules.NAME]: make one")
        return
    from arcbridge.errors import SealingError
    from arcbridge.sealing.age import parse_recipient

    if not recording.recipients:
        problems.error("recording.recipients", "required for recordings: the public keys of those who may open them")
    for number, text in enumerate(recording.recipients):
        try:
            parse_recipient(text)
        except SealingError as error:
            problems.error(f"recording.recipients[{number}]", error.message)
        if text == EXAMPLE_RECIPIENT:
            problems.error(f"recording.recipients[{number}]", "is the example's key: write your own (age-keygen)")
    if recording.directory is None:
        problems.error("recording.directory", "required for recordings, which are written there; with a bucket, too")
    else:
        named_files.check_directory(problems, "recording.directory", recording.directory)
    if recording.directory_bytes < MIN_RECORDINGS:
        problems.error("recording.directory_bytes", f"must be at least {MIN_RECORDINGS}")
    if recording.session_bytes < MIN_RECORDINGS:
        problems.error("recording.session_bytes", f"must be at least {MIN_RECORDINGS}")
    elif recording.bucket.endpoint and recording.session_bytes > MAX_STORED_RECORDING:
        problems.error("recording.session_bytes", f"must be at most {MAX_STORED_RECORDING} with a bucket")
    _bucket(recording.bucket, problems)


def _bucket(bucket: RecordingBucketConfig, problems: Problems) -> None:
    keys = {"access_key_file": bucket.access_key_file, "secret_key_file": bucket.secret_key_file}
    if not bucket.endpoint:
        for setting, given in {"bucket": bucket.bucket, "ca_file": bucket.ca_file, **keys}.items():
            if given:
                problems.error(
                    f"recording.bucket.{setting}",
                    "is of no use without recording.bucket.endpoint: set both, or take it out",
                )
        return
    _http_server(problems, "recording.bucket", bucket.endpoint, bucket.ca_file)
    if not BUCKET_NAME.fullmatch(bucket.bucket):
        problems.error("recording.bucket.bucket", "the name of a bucket is needed: small letters, digits, '-' and '.'")
    for setting, file in keys.items():
        if file is None:
            problems.error(f"recording.bucket.{setting}", "required: a file with one word")
        else:
            named_files.check_secret(problems, f"recording.bucket.{setting}", file)
