"""Judges the flags of a kubeconfig that `connect` has not written here: they may be another person's.

kubectl runs the credential plugin with the flags of whatever kubeconfig it reads, and these name relays, files of
tokens and issuers. It decides nothing about a connection that is known (`client.background.connections`). Invariant:
flags alone send no token of this user where neither the user's settings nor a trusted relay would send it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

from arcbridge.client.background.connection_settings import ConnectionSettings, Value
from arcbridge.client.relay.relay_profile import RelayProfiles
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ConfigError
from arcbridge.net.address import parse_address
from arcbridge.settings.config import ClientConfig

_HARMLESS = (
    "relay", "relays", "cluster", "clusters", "port", "file", "kube_context", "context_switch", "remove_context",
    "resumption", "login", "observe",
)  # fmt: skip
"""Settings that send nothing elsewhere; relays and login are compared by themselves."""


def refuse_untrusted(settings: ConnectionSettings, environment: Mapping[str, str]) -> None:
    """Raise ConfigError, which names the settings, where flags say more than this user has trusted before.

    Trusted are the user's settings file, which is judged by its owner and mode (docs/threats.md#B43), and what `login`
    has kept of a relay. Raises StateError for a damaged one.
    """
    asked = settings.load(environment)
    bare: dict[str, Value] = {"cluster": (asked.cluster,)}
    own = ConnectionSettings.of(bare, settings.file).load(environment)
    wrong, relays = [], _urls(asked)
    if not relays <= _urls(own):
        known = RelayProfiles(StateDirectory.find(own.state_dir, environment).path).all()
        profile = next((one for one in known if relays <= set(one.relays)), None)
        if profile is None:
            wrong.append("relays")
        own = ConnectionSettings.of({**bare, "relays": asked.relay_urls()}, settings.file).load(environment)
        if profile is not None and own.login.issuer != profile.login.issuer:
            wrong.append("login.issuer")  # tokens of the user's settings are for the relays of these
    if own.relay_ca_pin and asked.relay_ca_pin == own.relay_ca_pin and asked.relay_ca_file is None:
        own = replace(own, relay_ca_file=None)  # the file of what was trusted gives way to a pin that is the same
    wrong += [
        one.name
        for one in fields(ClientConfig)
        if one.name not in _HARMLESS and getattr(asked, one.name) != getattr(own, one.name)
    ]
    wrong += [
        f"login.{one.name}"
        for one in fields(asked.login)
        if getattr(asked.login, one.name) != getattr(own.login, one.name)
    ]
    if wrong:
        raise ConfigError(
            f"the kubeconfig's flags set {', '.join(dict.fromkeys(wrong))}, which `connect` has not written here and "
            "nothing here trusts: another person's kubeconfig could have your tokens sent elsewhere. If it is yours, "
            f"run `arcbridge connect {asked.cluster}` once with these flags, or log in at the relay first"
        )


def _urls(config: ClientConfig) -> set[str]:
    return {parse_address(one).url for one in config.relay_urls()}
