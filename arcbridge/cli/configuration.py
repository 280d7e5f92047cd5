"""`config check` and `config print`: what a role would run with, and whether that can work."""

from __future__ import annotations

import os
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from arcbridge.cli.output import print_document
from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import load_settings, settings_file
from arcbridge.config import AgentConfig, ClientConfig, RelayConfig
from arcbridge.errors import ConfigError, ExitCode

_REQUIRED: dict[type[Any], dict[str, str]] = {
    RelayConfig: {
        "public_address": "--public-address host:port that agents and clients dial",
        "authentication": "--authentication FILE (AuthenticationConfiguration for users' tokens)",
        "policy": "--policy FILE (who may reach which cluster)",
    },
    AgentConfig: {"relays": "--relay https://host:port"},
    ClientConfig: {"relays": "--relay https://host:port (or log in: `arcbridge login https://RELAY`)"},
}


def run_config(invocation: Invocation) -> int:
    config = load_settings(invocation, os.environ)
    if invocation.command[1] == "print":
        output = invocation.text("output", "toml")
        if output == "toml":
            sys.stdout.write(as_toml(config))
        else:
            print_document(as_data(config), output)
        return ExitCode.DONE
    check(config)
    file = settings_file(invocation, os.environ)
    print(f"{file or 'flags and environment'}: the settings of the {invocation.role} are complete and well-formed")
    return ExitCode.DONE


def require(config: Any) -> None:
    """Raise ConfigError for the first required setting that is missing; it says how to give it."""
    for path, how in _REQUIRED[type(config)].items():
        # A client's one relay may be under its other name.
        if not (config.relay_urls() if isinstance(config, ClientConfig) else getattr(config, path)):
            raise ConfigError(f"{path}: required but not set; give {how}, or set it in the settings file")


def check(config: Any) -> None:
    """All that can be told without the network: required settings, addresses, pins, files that must exist."""
    from arcbridge.net.address import parse_address, parse_listen
    from arcbridge.pki.names import check_cluster_name
    from arcbridge.pki.pins import check_pin

    require(config)
    for name, path in _input_files(config):
        if not path.exists():
            raise ConfigError(f"{name}: {path} does not exist")
        if not os.access(path, os.R_OK):
            raise ConfigError(f"{name}: {path} cannot be read by this user")
    if isinstance(config, RelayConfig):
        parse_listen(config.listen)
        parse_address(config.public_address)
        if config.login.issuer or config.login.client_id:
            from arcbridge.relay.login_settings import login_document

            login_document(config.login)
        if config.proxy_protocol_from:
            from arcbridge.relay.proxy_protocol import parse_networks

            parse_networks(config.proxy_protocol_from)
        if (config.tls.certificate is None) != (config.tls.key is None):
            raise ConfigError("tls: certificate and key go together; set both or neither")
        if config.workers != 1:
            from arcbridge.relay.processes.supervisor import worker_count

            worker_count(config)
        if config.fleet.servers:
            from arcbridge.relay.nats import check as check_fleet

            check_fleet(config.fleet)
            if config.fleet.internal_address:
                parse_address(config.fleet.internal_address)
    elif isinstance(config, AgentConfig):
        for relay in config.relays:
            parse_address(relay)
        if (config.state.directory is None) == (not config.state.secret):
            raise ConfigError("state: set exactly one of state.directory and state.secret")
        if config.denylist_file is not None:
            from arcbridge.agent.denylist import parse_denylist

            parse_denylist(config.denylist_file.read_bytes(), f"denylist_file: {config.denylist_file}")
    else:
        for relay in config.relay_urls():
            parse_address(relay)
        for cluster in filter(None, (config.cluster, *config.clusters)):
            check_cluster_name(cluster)
    for name in ("relay_ca_pin", "cluster_ca_pin"):
        if getattr(config, name, ""):
            try:
                check_pin(getattr(config, name))
            except ConfigError as error:
                raise ConfigError(f"{name}: {error.message}") from error


def _input_files(config: Any) -> list[tuple[str, Path]]:
    """Files that must exist already, by setting; what the program makes itself is not among them."""
    made_by_us = {"data_dir", "state_dir", "directory"}
    found: list[tuple[str, Path]] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Path) and field.name not in made_by_us:
            found.append((field.name, value))
        elif is_dataclass(value):
            found += [(f"{field.name}.{name}", path) for name, path in _input_files(value)]
    return found


def as_data(config: Any) -> dict[str, Any]:
    """Settings as plain data in the shape of the file; what is unset is left out."""
    data: dict[str, Any] = {}
    for field in fields(config):
        value = _plain(getattr(config, field.name))
        if value is not None:
            data[field.name] = value
    return data


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return as_data(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def as_toml(config: Any) -> str:
    """Settings as a file that `--config` takes."""
    return "\n".join(_toml_table(as_data(config), ())).lstrip("\n") + "\n"


def _toml_table(table: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [f"\n[{'.'.join(_toml_key(part) for part in path)}]"] if path else []
    lines += [f"{_toml_key(key)} = {_toml_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    if len(lines) == 1 and path:
        lines = []
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _toml_table(value, (*path, key))
    return lines


def _toml_key(key: str) -> str:
    return key if key.replace("-", "").replace("_", "").isalnum() and key.isascii() else _toml_value(key)


def _toml_value(value: Any) -> str:
    import json

    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    # TOML's basic strings and numbers are written as JSON's are (toml.io v1.0.0, "String").
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else json.dumps(value)
