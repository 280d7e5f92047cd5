"""The client's one check of its settings: a start runs it, and `config check` runs nothing else.

It reads the files that the settings name, collects every mistake, makes no file and asks no peer. Files that another
program keeps fresh may be absent until a token is asked for: that is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from arcbridge.client.credentials.tokens import (
    CLUSTER_AUDIENCE,
    is_azure_pipelines,
    refuse_contradictions,
    with_defaults,
)
from arcbridge.client.session.restrictions import restrictions_of
from arcbridge.errors import ConfigError, NotInThisJob, StateError
from arcbridge.net.address import issuer_origin, parse_address
from arcbridge.pki.names import check_cluster_name
from arcbridge.settings import named_files
from arcbridge.settings.choices import PROGRAM
from arcbridge.settings.config import ClientConfig, LoginConfig
from arcbridge.settings.problems import Problems
from arcbridge.settings.regions import check_regions


@dataclass(frozen=True, slots=True)
class CheckedClientSettings:
    """What a check has found."""

    config: ClientConfig
    problems: Problems


def required(config: ClientConfig, environment: Mapping[str, str]) -> CheckedClientSettings:
    """Return what a start needs of `check`. Raises SettingsRefused."""
    checked = check(config, environment)
    checked.problems.refuse()
    return checked


def check(config: ClientConfig, environment: Mapping[str, str]) -> CheckedClientSettings:
    """Check the settings and every file that they name; the mistakes are in `problems`."""
    problems = Problems()
    _relays(config, problems)
    _clusters(config, problems)
    _state(config, problems, environment)
    with problems.collect("login"):
        refuse_contradictions(config.login)
    with problems.collect("restrict"):
        restrictions_of(config.restrict)
    _tokens(config, problems)
    _issuer(config.login, problems, environment)
    _workload(config.login, problems, environment)
    if config.observe.listen:
        from arcbridge.observe.listen import parse_observe_listen

        with problems.collect("observe.listen"):
            parse_observe_listen(config.observe.listen)
    return CheckedClientSettings(config, problems)


def _relays(config: ClientConfig, problems: Problems) -> None:
    urls: tuple[str, ...] = ()
    with problems.collect("relay"):
        urls = config.relay_urls()
        if not urls:
            problems.error(
                "relays",
                "relays: required but not set; log in: `arcbridge login https://RELAY`, or give --relay https://host:port",
            )
    for n, url in enumerate(urls):
        setting = "relay" if config.relay else f"relays[{n}]"
        with problems.collect(setting):
            named_files.check_not_placeholder(problems, setting, parse_address(url).host)
    check_regions(problems, config.region, config.regions, parse_address, None)
    named_files.check_pin_setting(problems, "relay_ca_pin", config.relay_ca_pin)
    if config.relay_ca_file is not None:
        named_files.check_ca(problems, "relay_ca_file", config.relay_ca_file)
    elif not config.relay_ca_pin:
        problems.warn(
            "relay_ca_pin",
            "relay_ca_pin: missing, and so is relay_ca_file: only relays with a certificate of a CA that this system "
            "trusts can be reached",
        )


def _clusters(config: ClientConfig, problems: Problems) -> None:
    for setting, names in (("cluster", (config.cluster,)), ("clusters", config.clusters)):
        for n, name in enumerate(names):
            if name:
                path = setting if setting == "cluster" else f"clusters[{n}]"
                with problems.collect(path):
                    check_cluster_name(name)
    named_files.check_pin_setting(problems, "cluster_ca_pin", config.cluster_ca_pin)
    if config.pins_file is not None:
        if named_files.read(problems, "pins_file", config.pins_file) is not None:
            from arcbridge.pki.pins import PinStore

            with _collect(problems, "pins_file"):
                PinStore(config.pins_file, relay="").get("any")
    elif not config.cluster_ca_pin and config.trust_first_use:
        problems.warn(
            "trust_first_use",
            "trust_first_use: on, and no pin is given: a relay that is hostile at the first contact could put a "
            "cluster of its own in between",
        )


def _state(config: ClientConfig, problems: Problems, environment: Mapping[str, str]) -> None:
    from arcbridge.client.state import StateDirectory

    with _collect(problems, "state_dir"):
        directory = StateDirectory.find(config.state_dir, environment).path
        named_files.check_directory(problems, "state_dir", directory)


def _tokens(config: ClientConfig, problems: Problems) -> None:
    login = config.login
    for setting, path in (
        ("token_file", config.token_file),
        ("login.access_token_file", login.access_token_file),
        ("login.id_token_file", login.id_token_file),
        ("login.client_assertion_file", login.client_assertion_file),
    ):
        if path is not None:
            named_files.check_secret(problems, setting, path, missing="warning")
    if login.client_secret_file is not None:
        # Any printable characters, spaces too (RFC 6749, appendix A.2).
        named_files.check_readable(problems, "login.client_secret_file", login.client_secret_file)
    same = login.access_token_file is not None and login.access_token_file in (login.id_token_file, config.token_file)
    if same and not login.one_token:
        problems.error(
            "login.access_token_file",
            "login.access_token_file: is the cluster's file as well, so that the relay could act as you in the "
            "cluster; give a token of its own for each, or set one_token = true under [login] if you accept that",
        )
    if login.client_key_file is not None:
        named_files.read(problems, "login.client_key_file", login.client_key_file)
    if login.proof_key_file is not None:
        from arcbridge.client.credentials import proof_keys

        with problems.collect("login.proof_key_file"):
            proof_keys.required(login.proof_key_file)
    if not (login.access_token_file or login.command or login.issuer or login.workload):
        problems.warn(
            "login",
            "login: nothing says where the relay's token comes from: set login.issuer and login.client_id, "
            "login.command, login.workload or login.access_token_file",
        )


def _issuer(login: LoginConfig, problems: Problems, environment: Mapping[str, str]) -> None:
    if login.ca_file is not None:
        named_files.check_ca(problems, "login.ca_file", login.ca_file)
    if not login.issuer:
        if login.client_id:
            problems.error("login.issuer", "login.issuer: required with login.client_id; give --oidc-issuer-url URL")
        return
    from urllib.parse import urlsplit

    from arcbridge.client.credentials.login import check_login

    with problems.collect("login.issuer"):
        issuer_origin(login.issuer, "login.issuer")
        named_files.check_not_placeholder(problems, "login.issuer", urlsplit(login.issuer).hostname or "")
    with _collect(problems, "login.client_id"):
        if login.grant_type == PROGRAM:
            from arcbridge.client.credentials.client_credentials import ClientCredentials

            ClientCredentials(login, environment=environment)
            if not (login.cluster_audience or login.id_token_file or login.one_token):
                problems.warn(
                    "login.cluster_audience",
                    "login.cluster_audience: missing: unless the issuer adds an ID token, which few do for a program, "
                    "relay and cluster would get the same token, and the client refuses that; set it, such as "
                    f"{CLUSTER_AUDIENCE}",
                )
        else:
            check_login(login)
            from arcbridge.client.credentials.client_authentication import ClientAuthentication

            ClientAuthentication(login, environment=environment)


def _workload(login: LoginConfig, problems: Problems, environment: Mapping[str, str]) -> None:
    # A job of Azure Pipelines is a client of an issuer, and has no tokens for relay and cluster.
    if not login.workload or is_azure_pipelines(login.workload):
        return
    from arcbridge.client.credentials.workload import WorkloadTokens

    with _collect(problems, "login.workload"):
        WorkloadTokens(with_defaults(login), environment=environment)


@contextmanager
def _collect(problems: Problems, setting: str) -> Iterator[None]:
    """Collect as `Problems.collect` does, a StateError too, and as a warning where the tokens of a job are absent: a
    file may be checked elsewhere than in the job that uses it."""
    with problems.collect(setting):
        try:
            yield
        except NotInThisJob as error:
            problems.warn(error.setting, error.message)
        except StateError as error:
            raise ConfigError(f"{setting}: {error.message}") from error
