"""The settings of a connection of the background process: what flags and environment gave when it was connected.

They are kept as fields in the state directory, and stand as flags in the kubeconfig, where kubectl gives them to the
credential plugin; nothing in them is secret. Invariant: `read_words(settings.words())` are the same settings.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arcbridge.errors import ConfigError
from arcbridge.settings.config import ClientConfig
from arcbridge.settings.config_loader import Given
from arcbridge.settings.flags import CLIENT, LIST, ON, Flag, flags_of

Value = str | bool | tuple[str, ...]
FILE = "--config"
"""The one flag of a connection that is no setting: it names the settings file."""
UNKNOWN = "the flags of the credential plugin are not known; run `arcbridge connect` again"


@dataclass(frozen=True, slots=True)
class ConnectionSettings:
    """What one connection has besides the defaults and the settings file."""

    values: tuple[tuple[str, Value], ...]
    """Dotted path and value, as text of flags; in the order of the flags, `cluster` first."""
    file: str = ""
    """The settings file, absolute; empty: the one that is found."""

    @classmethod
    def of(cls, values: Mapping[str, Value], file: str = "") -> ConnectionSettings:
        order = [flag.key for flag in _flags() if flag.key in values]
        # A setting of another release is kept; `load` refuses it.
        return cls(tuple((key, values[key]) for key in dict.fromkeys((*order, *values))), file)

    def get(self, key: str) -> Value | None:
        return dict(self.values).get(key)

    def without_context(self) -> ConnectionSettings:
        """Return what a cluster is served by: the settings without the name of the context."""
        return ConnectionSettings(tuple(one for one in self.values if one[0] != "kube_context"), self.file)

    def words(self) -> tuple[str, ...]:
        """Return the same as flags."""
        found: list[str] = []
        values = dict(self.values)
        for flag in _flags():
            value = self.file or None if flag.long == FILE else values.get(flag.key)
            if isinstance(value, bool):
                found.append(flag.long)
            elif value is not None:
                for one in (value,) if isinstance(value, str) else value:
                    found += (flag.long, one)
        return tuple(found)

    def document(self) -> dict[str, Any]:
        """Return the same for the state directory (`read_document`)."""
        return {"values": dict(self.values), "file": self.file}

    def connect_command(self) -> str:
        """Return the command that connects with these settings, for messages."""
        names = self.get("cluster") or ()
        rest = ConnectionSettings(tuple(one for one in self.values if one[0] != "cluster"), self.file)
        return shlex.join(["arcbridge", "connect", *(names if isinstance(names, tuple) else ()), *rest.words()])

    def load(self, environment: Mapping[str, str]) -> ClientConfig:
        """Return the settings in force, with those of the file and of the last login; raises ConfigError.

        kubectl runs the plugin with the flags of a kubeconfig, which may be another person's: no settings file counts
        that others can change.
        """
        from pathlib import Path

        from arcbridge.client.relay.relay_profile import RelayProfiles, fill
        from arcbridge.client.state import StateDirectory
        from arcbridge.settings.role_settings import find_file, read

        flags = {flag.key: flag for flag in _flags()}
        if any(key not in flags for key, _ in self.values):
            raise ConfigError(UNKNOWN)
        given = {
            key: Given(flags[key].kind == ON if isinstance(value, bool) else value, f"flag {flags[key].long}")
            for key, value in self.values
        }
        file = Path(self.file).expanduser() if self.file else find_file(CLIENT, environment)
        config: ClientConfig
        config, wrong = read(CLIENT, file, given, of_this_user=True)
        if wrong:
            raise wrong[0]
        config, _ = fill(config, RelayProfiles(StateDirectory.find(config.state_dir, environment).path))
        if not config.cluster:
            raise ConfigError("cluster: required but not set; give --cluster NAME")
        return config


def read_words(words: Sequence[str]) -> ConnectionSettings:
    """Read flags, as a kubeconfig has them. Raises ConfigError for a flag that the client does not have."""
    by_name = {name: flag for flag in flags_of(CLIENT) for name in flag.names}
    values: dict[str, Any] = {}
    file = ""
    rest = iter(words)
    for word in rest:
        name, assigned, value = word.partition("=")
        if (flag := by_name.get(name)) is None:
            raise ConfigError(UNKNOWN)
        if flag.takes_value and not assigned and (following := next(rest, None)) is not None:
            value, assigned = following, "="
        if flag.takes_value != bool(assigned):
            raise ConfigError(UNKNOWN)
        if flag.long == FILE:
            file = value
        elif flag.key and flag.kind == LIST:
            values[flag.key] = (*values.get(flag.key, ()), value)
        elif flag.key:
            values[flag.key] = value if flag.takes_value else True
    return ConnectionSettings.of(values, file)


def read_document(document: Mapping[str, Any]) -> ConnectionSettings:
    """Read what `ConnectionSettings` are in the state directory. Raises KeyError, TypeError, AttributeError."""
    values: dict[str, Value] = {
        str(key): tuple(map(str, value)) if isinstance(value, list) else value if value is True else str(value)
        for key, value in document["values"].items()
    }
    return ConnectionSettings.of(values, str(document["file"]))


def _flags() -> list[Flag]:
    """Return the flags of settings in the order of `words`."""
    first = ("--cluster", FILE)
    flags = [flag for flag in flags_of(CLIENT) if flag.key or flag.long == FILE]
    return sorted(flags, key=lambda flag: first.index(flag.long) if flag.long in first else len(first))
