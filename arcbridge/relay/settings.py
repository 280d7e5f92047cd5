"""The relay's one check of its settings: every start and every reload runs it, and `config check` runs nothing else.

It reads all files that the settings name, collects every mistake, and keeps what it read, so that a start uses what
was checked. It makes no file, opens no port and asks no peer.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from arcbridge.audit.log import check_policy as check_on_failure
from arcbridge.audit.sinks.settings import check_sinks
from arcbridge.errors import ConfigError, StateError
from arcbridge.identity import token_settings
from arcbridge.identity.authentication import AuthenticationConfig, IssuerConfig
from arcbridge.identity.policy import Policy
from arcbridge.identity.policy_rules import Rule
from arcbridge.identity.proof import ProofPolicy
from arcbridge.identity.verifier import Acceptance
from arcbridge.net.address import Address, parse_address, parse_listen
from arcbridge.observe.listen import parse_observe_listen
from arcbridge.pki.authority import CERTIFICATE_FILE, KEY_FILE, Authority
from arcbridge.pki.private_files import refuse_foreign_directory
from arcbridge.relay.audit.log import audit_file
from arcbridge.relay.http.login_settings import login_document
from arcbridge.relay.proxy_protocol import parse_networks
from arcbridge.settings import named_files
from arcbridge.settings.config import RelayConfig, RelayPageConfig
from arcbridge.settings.problems import Place, Problems, SettingsRefused
from arcbridge.settings.suggest import nearest
from arcbridge.settings.toml_lines import line_of, parts

MOST_UNMATCHED: Final = 10
"""Names and patterns without a cluster that are warned of."""
SHORTEST_SESSION: Final = 300.0
LONGEST_SESSION: Final = 43200.0
"""Seconds that a login at the page may count."""
SHORT_LIFE = 600.0
"""Seconds: agents whose certificates live for less renew all the time."""


@dataclass(frozen=True, slots=True)
class CheckedRelay:
    """What a check has read; complete where `problems` has no error."""

    config: RelayConfig
    problems: Problems
    public: Address
    listen: Address
    issuers: AuthenticationConfig
    policy: Policy
    acceptance: Acceptance
    proof: ProofPolicy


def check(config: RelayConfig) -> CheckedRelay:
    """Check the settings and every file that they name; the mistakes are in `problems`."""
    problems = Problems()
    public, listen = Address("", 0), Address("", 0)
    if not config.public_address:
        problems.error(
            "public_address",
            "required but not set; give --public-address host:port that agents and clients dial, or set it in the "
            "settings file",
        )
    with problems.collect("public_address"):
        if config.public_address:
            public = parse_address(config.public_address)
            named_files.check_not_placeholder(problems, "public_address", public.host)
    with problems.collect("listen"):
        listen = parse_listen(config.listen)
    with problems.collect("observe.listen"):
        parse_observe_listen(config.observe.listen)
    with problems.collect("proxy_protocol_from"):
        parse_networks(config.proxy_protocol_from)
    with problems.collect("workers"):
        worker_count(config)
    _check_limits(config, problems)
    if config.authentication is None:
        problems.error(
            "authentication",
            "required but not set; give --authentication FILE (AuthenticationConfiguration for users' tokens), or set "
            "it in the settings file",
        )
    tokens = token_settings.check(
        problems,
        file=config.authentication,
        acceptance=Acceptance(max_lifetime=config.max_token_lifetime, actor_clients=frozenset(config.actor_clients)),
        proof=config.proof,
        directories=config.graph,
        claim_sources=config.claim_sources,
    )
    issuers = tokens.issuers or AuthenticationConfig(())
    policy = check_policy(config, problems, issuers, known_clusters(config))
    named_files.check_pair(
        problems, ("tls.certificate", config.tls.certificate), ("tls.key", config.tls.key), host=public.host
    )
    with problems.collect("login"):
        login_document(config.login)
    _check_page(config, issuers, policy, problems)
    if config.client.directory is not None:
        with problems.collect("client.directory"):
            _check_client_directory(config.client.directory)
    _check_data_dir(config, problems)
    _check_audit(config, problems)
    _check_fleet(config, problems)
    return CheckedRelay(config, problems, public, listen, issuers, policy, tokens.acceptance, tokens.proof)


def has_authority(config: RelayConfig) -> bool:
    """Return whether a relay, or a command for it, has made the CA in `data_dir`."""
    return any(named_files.is_there(config.data_dir / name) for name in (CERTIFICATE_FILE, KEY_FILE))


def require_complete(config: RelayConfig) -> None:
    """Raise SettingsRefused where a relay would not start and nothing is in `data_dir` yet: a CA that is made for
    settings which the operator has not finished would be the CA of no relay."""
    if not has_authority(config):
        problems = check(config).problems
        if problems.errors:
            raise SettingsRefused(list(problems))


def _check_limits(config: RelayConfig, problems: Problems) -> None:
    limits = config.limits
    for field in fields(limits):
        value = getattr(limits, field.name)
        least = 0 if field.name == "clusters_with_metrics" else 1
        if isinstance(value, int) and value < least:
            problems.error(f"limits.{field.name}", f"must be at least {least}, not {value}")
    for path in ("limits.loop_share_per_address", "limits.loop_share_per_user"):
        if getattr(limits, path.removeprefix("limits.")) > 100:
            problems.error(path, "must be at most 100 (per cent)")
    if not 0 <= config.policy_share <= 100:
        problems.error("policy_share", "must be from 0, for none, to 100 (per cent)")
    if config.policy_hold < 0:
        problems.error("policy_hold", "must be 0 s, for no end, or above")
    if not 0 <= config.recovery_wait <= 600:
        problems.error("recovery_wait", "must be between 0 s, for no wait, and 10m")
    if limits.join_deadline <= 0:
        problems.error("limits.join_deadline", "must be above 0 s")
    for kind, tables in (("groups", limits.groups), ("users", limits.users), ("actors", limits.actors)):
        for name, table in tables.items():
            for setting in ("sessions", "joins_per_minute"):
                if getattr(table, setting) < 0:
                    path = f'limits.{kind}."{name}".{setting}'
                    none = "no bound" if kind == "actors" else "the number of every user"
                    problems.error(path, f"must be 0, for {none}, or above")
    if config.agent_certificate_life <= 0:
        problems.error("agent_certificate_life", "must be above 0 s")
    elif config.agent_certificate_life < SHORT_LIFE:
        problems.warn(
            "agent_certificate_life",
            f"{config.agent_certificate_life:.0f} s has every agent renew all the time, and enrol anew after a relay's "
            "outage of a third of it",
        )


def known_clusters(config: RelayConfig) -> Sequence[str]:
    """Return the clusters that the registry in `data_dir` has; none where there is none that can be read now."""
    if config.fleet.servers:
        return ()
    from arcbridge.relay.data_dir import cluster_names

    try:
        return cluster_names(config.data_dir)
    except StateError:
        return ()


def check_policy(
    config: RelayConfig, problems: Problems, issuers: AuthenticationConfig, clusters: Iterable[str] = ()
) -> Policy:
    """Return the policy of the file, and add what is wrong with it, or may not be meant, to `problems`. `clusters`:
    those that are enrolled, as far as that is known."""
    if config.policy is None:
        problems.error(
            "policy",
            "required but not set; give --policy FILE (who may reach which cluster), or set it in the settings file",
        )
        return Policy(())
    data = named_files.read(problems, "policy", config.policy)
    if data is None:
        return Policy(())
    source = str(config.policy)
    try:
        policy, found = Policy.inspect(data.decode(), source=source)
    except UnicodeDecodeError:
        problems.error("policy", f"policy: {source} must be UTF-8 text", Place(source))
        return Policy(())
    problems.extend(found)
    if not policy.rules and not found:
        problems.warn("policy", "policy: it has no [[allow]], so no user may reach any cluster", Place(source))
    if issuers.issuers and all(issuer.url for issuer in issuers.issuers):
        _warn_of_names(policy, issuers, problems, source, data.decode())
    _warn_of_clusters(policy, frozenset(clusters), problems, source)
    audiences = sorted({audience for issuer in issuers.issuers for audience in issuer.audiences})
    if policy.admins and len(audiences) > 1 and config.proof != ProofPolicy.REQUIRED:
        problems.warn(
            "policy",
            f"admin: the relay takes tokens for {len(audiences)} audiences ({', '.join(audiences)}): where one of them "
            "is a cluster's too, its agents could administer with their users' tokens; give the relay an audience of "
            'its own, or set proof = "required"',
            Place(source, policy.admins[0].rule.line),
        )
    return policy


def _all_rules(policy: Policy) -> tuple[Rule, ...]:
    """Return those of `[[allow]]` and those of `[[admin]]`."""
    return (*policy.rules, *(one.rule for one in policy.admins))


def _warn_of_clusters(policy: Policy, known: frozenset[str], problems: Problems, source: str) -> None:
    """Warn of names and patterns for which there is no cluster; before the first one is enrolled, of none."""
    if not known:
        return
    unmatched: dict[str, Rule] = {}
    for rule in _all_rules(policy):
        for text, pattern in zip(rule.clusters, rule.patterns, strict=True):
            if text not in unmatched and not ("*" in text and any(map(pattern.fullmatch, known))) and text not in known:
                unmatched[text] = rule
    for text, rule in itertools.islice(unmatched.items(), MOST_UNMATCHED):
        near = "" if "*" in text else nearest(text, known)
        meant = f'; did you mean "{near}"?' if near else ""
        why = f'{rule.path}.clusters: no cluster that is enrolled is "{text}"{meant}'
        problems.warn("policy", why, Place(source, rule.line))
    if (more := len(unmatched) - MOST_UNMATCHED) > 0:
        problems.warn("policy", f"policy: {more} more names and patterns are no cluster's", Place(source))


def _warn_of_names(policy: Policy, issuers: AuthenticationConfig, problems: Problems, source: str, text: str) -> None:
    """Warn of rules for users and groups that no token can give, because every issuer puts another prefix before."""
    users, groups = _prefixes(issuers.issuers, "username"), _prefixes(issuers.issuers, "groups")
    for rule in _all_rules(policy):
        for kind, names, prefixes in (("users", rule.users, users), ("groups", rule.groups, groups)):
            if prefixes is None:
                continue
            for name in sorted(names - {"*"}):
                if any(name.startswith(prefix) for prefix in prefixes):
                    continue
                how = " or ".join(f'"{prefix}"' for prefix in sorted(prefixes))
                why = f"names begin with {how} there" if prefixes else "no issuer there says what groups a user has"
                problems.warn(
                    "policy",
                    f'{rule.path}.{kind}: no token can give "{name}" by the authentication file: {why}',
                    Place(source, line_of((*parts(rule.path), kind), text)),
                )


def _prefixes(issuers: tuple[IssuerConfig, ...], kind: str) -> set[str] | None:
    """Return what names of a kind begin with; None where an expression gives them."""
    found = set()
    for issuer in issuers:
        if issuer.expressions is not None and kind in issuer.expressions.mappings:
            return None
        claim = issuer.username if kind == "username" else issuer.groups
        if claim is not None:
            found.add(claim.prefix)
    return found


def page_issuer(page: RelayPageConfig, issuers: AuthenticationConfig) -> str:
    """Return the URL of the issuer at which administrators log in. Raises ConfigError."""
    known = [one.url for one in issuers.issuers]
    if not page.issuer and len(known) == 1:
        return known[0]
    if not page.issuer:
        raise ConfigError(f"page.issuer: required, because the authentication file has {len(known)} issuers; name one")
    if page.issuer not in known:
        raise ConfigError(
            f"page.issuer: the authentication file has no issuer {page.issuer!r}; write it as it stands there, or "
            "leave it out where there is one"
        )
    return page.issuer


def _check_page(config: RelayConfig, issuers: AuthenticationConfig, policy: Policy, problems: Problems) -> None:
    page = config.page
    if not page.client_id:
        given = [field.name for field in fields(page) if getattr(page, field.name) != field.default]
        if given:
            problems.error("page.client_id", f"required with page.{given[0]}; the page's client at the issuer")
        return
    if issuers.issuers:
        with problems.collect("page.issuer"):
            issuer = issuers.issuer(page_issuer(page, issuers))
            if issuer is not None and page.client_id in issuer.audiences:
                problems.error(
                    "page.client_id",
                    f"{page.client_id!r} is an audience of {issuer.path} in the authentication file, so that its id "
                    "tokens would be access tokens; make a client for the page alone",
                )
    if "openid" not in page.scopes:
        problems.error("page.scopes", 'must have "openid", without which an issuer gives no id token')
    if not SHORTEST_SESSION <= page.session <= LONGEST_SESSION:
        problems.error("page.session", "must be between 5m and 12h")
    if page.client_secret_file is not None:
        named_files.check_secret(problems, "page.client_secret_file", page.client_secret_file)
    if config.tls.certificate is None:
        problems.warn(
            "page.client_id",
            "page: browsers do not know the relay's own CA and warn of the page; set tls.certificate and tls.key, or "
            "put ca.crt of data_dir into the browsers of administrators",
        )
    if not policy.admins:
        problems.warn("page.client_id", "page: the policy has no [[admin]], so that the page shows no user anything")


def _check_client_directory(directory: Path) -> None:
    """Raise `ConfigError` where `client.directory` is no directory, or another user can change what is in it."""
    if why := named_files.closed_to_this_user(directory):
        raise ConfigError(f"{directory} cannot be read by this user: {why}")
    if not named_files.is_directory(directory):
        raise ConfigError(f"{directory} is no directory; make it, or take the setting out")
    try:
        refuse_foreign_directory(directory)
    except StateError as error:
        raise ConfigError(error.message) from error


def _check_data_dir(config: RelayConfig, problems: Problems) -> None:
    named_files.check_directory(problems, "data_dir", config.data_dir)
    if named_files.closed_to_this_user(config.data_dir / CERTIFICATE_FILE) or not named_files.is_directory(
        config.data_dir
    ):
        return
    try:
        Authority.read(config.data_dir)
    except StateError as error:
        problems.error("data_dir", error.message)


def _check_audit(config: RelayConfig, problems: Problems) -> None:
    with problems.collect("audit.on_failure"):
        check_on_failure(config.audit.on_failure)
    file = audit_file(config)
    if not file:
        problems.warn("audit.file", "empty, so that no record tells later which administrator did what")
    elif file != "-" and (Path(file).parent != config.data_dir or named_files.is_directory(config.data_dir)):
        # A data directory that is not there yet is made at the start.
        named_files.check_appendable(problems, "audit.file", Path(file))
    check_sinks(config.audit, file, problems)


def _check_fleet(config: RelayConfig, problems: Problems) -> None:
    fleet = config.fleet
    if not fleet.servers:
        return
    from arcbridge.relay.nats import check as check_settings
    from arcbridge.relay.nats import require_library

    with problems.collect("fleet"):
        check_settings(fleet)
    if fleet.internal_address:
        with problems.collect("fleet.internal_address"):
            parse_address(fleet.internal_address)
    for name in ("credentials", "password_file"):
        path = getattr(fleet, name)
        if path is not None and named_files.read(problems, f"fleet.{name}", path) is not None:
            named_files.warn_of_readers(problems, f"fleet.{name}", path)
    if fleet.ca_file is not None:
        named_files.check_ca(problems, "fleet.ca_file", fleet.ca_file)
    if fleet.certificate is not None and fleet.key is not None:
        named_files.check_pair(problems, ("fleet.certificate", fleet.certificate), ("fleet.key", fleet.key))
    with problems.collect("fleet.servers"):
        require_library()
    if fleet.outage <= 0:
        problems.error("fleet.outage", "must be above 0 s")


def required(config: RelayConfig) -> CheckedRelay:
    """Return what a start needs of `check`. Raises SettingsRefused."""
    checked = check(config)
    checked.problems.refuse()
    return checked


MAX_WORKERS: Final = 64
"""More than any machine's cores that one relay can use: each pair of workers has a channel."""


def worker_count(config: RelayConfig) -> int:
    """Return how many processes this relay has. Raises `ConfigError` where it cannot have so many."""
    count = config.workers or min(_cores(), MAX_WORKERS)
    if not 1 <= count <= MAX_WORKERS:
        raise ConfigError(f"workers: 1 to {MAX_WORKERS}, or 0 for one for each core")
    if count > 1:
        if config.fleet.servers:
            raise ConfigError(
                "workers: more than one cannot be had together with fleet.servers: another relay that passes an "
                "agent's join on must reach the very process that waits, and these share one port. Set workers = 1, "
                "and run several relays of the fleet on this machine, each with a port and a data_dir of its own"
            )
        if not sys.platform.startswith("linux"):
            raise ConfigError("workers: more than one needs Linux, whose kernel spreads connections over processes")
    return count


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
