"""The table of flags is consistent with itself and with the settings."""

from __future__ import annotations

import typing

import pytest

from arcbridge.settings.config import AgentConfig, ClientConfig, RelayConfig
from arcbridge.settings.flags import ROLES, flags_of

KINDS = {"relay": RelayConfig, "agent": AgentConfig, "client": ClientConfig}


@pytest.mark.parametrize("role", ROLES)
def test_every_key_is_a_setting(role: str) -> None:
    for flag in flags_of(role):
        if flag.key:
            kind: type = KINDS[role]
            *tables, name = flag.key.split(".")
            for table in tables:
                kind = typing.get_type_hints(kind)[table]
            assert name in typing.get_type_hints(kind), flag.key


@pytest.mark.parametrize("role", ROLES)
def test_no_spelling_is_taken_twice(role: str) -> None:
    names = [name for flag in flags_of(role) for name in flag.names]
    assert len(names) == len(set(names))
    variables = [flag.variable for flag in flags_of(role)]
    assert len(variables) == len(set(variables))


NO_SECRETS = {
    "--no-secrets": "a switch",
    "--no-token-mode": "a switch",
    "--state-secret": "the name of a Secret",
    "--token": "Azure Arc's users know it; the client hides its token (tests/cli/test_client.py)",
}


@pytest.mark.parametrize("role", ROLES)
def test_no_flag_takes_a_secret(role: str) -> None:
    """docs/threats.md#W4: every user of the machine can read a command line, so flags name files."""
    words = ("token", "secret", "password", "key", "credential")
    flags = [flag for flag in flags_of(role) if any(word in flag.long for word in words)]
    assert flags
    assert {flag.long for flag in flags if flag.metavar != "FILE"} <= set(NO_SECRETS)


def test_the_flags_that_users_of_azure_arc_know() -> None:
    names = {name for flag in flags_of("client") for name in flag.names}
    assert {"-n", "--name", "--token", "--kube-context", "-f", "--file", "--port"} <= names
