"""Reads the settings of a role: the file in force, flags and environment over it, and what no single setting shows.

It checks names, types and choices, and that what is for one issuer stays with that issuer; what values mean is the
roles' to check. Invariant: settings that may name programs come from no file that another user can change, where the
caller asks for that (docs/threats.md#B43) and on Windows from none that all users may write (docs/threats.md#W15).
"""

from __future__ import annotations

import operator
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from arcbridge.errors import ConfigError
from arcbridge.settings.config import OF_ISSUER, AgentConfig, ClientConfig, LoginConfig, RelayConfig
from arcbridge.settings.config_loader import Given, SettingError, load_all
from arcbridge.settings.flags import AGENT, CLIENT, RELAY, flags_of
from arcbridge.settings.suggest import unknown
from arcbridge.settings.user_directories import shared_settings, user_directory

KINDS: dict[str, type[Any]] = {RELAY: RelayConfig, AGENT: AgentConfig, CLIENT: ClientConfig}


def find_file(role: str, environment: Mapping[str, str]) -> Path | None:
    """Return the role's settings file where none is named: the user's own, else that of all users; None: there is none.

    Raises ConfigError on Windows for one of all users.
    """
    for directory in (user_directory("config", environment), shared_settings(environment)):
        candidate = directory / f"{role}.toml"
        shared = directory == shared_settings(environment)
        try:
            if not stat.S_ISREG(os.stat(candidate).st_mode):
                continue
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            # Settings that are not to be read are an error, which the loader says; a client may be on the machine of
            # a relay, whose settings are none of its business.
            if role == CLIENT and shared:
                continue
            return candidate
        if shared and sys.platform == "win32":
            raise ConfigError(
                f"{candidate} is not used: every user of this machine may put files there. Move it to a directory that "
                "administrators alone can write, and name it to all users in ARCBRIDGE_CONFIG, or give --config"
            )
        return candidate
    return None


def read(
    role: str, file: Path | None, given: Mapping[str, Given], *, of_this_user: bool = False
) -> tuple[Any, list[SettingError]]:
    """Return the settings of a role, and every mistake in them; a setting that is wrong has its default.

    `given`: what flags and environment set, by dotted path. `of_this_user`: raises ConfigError for a file that others
    can change.
    """
    given = normalized(role, given)
    config, wrong = load_all(KINDS[role], file, given, judge=_refuse_settings_of_others if of_this_user else None)
    wrong += _wrong_choices(config, role)
    if isinstance(config, ClientConfig):
        config, untied = _tied_to_issuer(config, file, given)
        wrong += untied
    return config, wrong


def normalized(role: str, given: Mapping[str, Given]) -> dict[str, Given]:
    """Return what is given as the settings have it: a client's clusters and relays are lists there, and an empty word
    empties a list of its login."""
    given = {
        key: Given([one for one in value if one], source)
        if key.startswith("login.") and isinstance(value, list | tuple)
        else Given(value, source)
        for key, (value, source) in given.items()
    }
    if role == CLIENT and "cluster" in given:
        names, source = given["cluster"]
        if isinstance(names, Sequence) and not isinstance(names, str):
            # Names on the command line replace the file's, all of them.
            given |= {"cluster": Given(names[0], source), "clusters": Given(list(names[1:]), source)}
    if role == CLIENT and "relays" in given:
        relays, source = given["relays"]
        if isinstance(relays, Sequence) and not isinstance(relays, str):
            # As in the environment, one flag may name several.
            parts = [one.strip() for text in relays for one in str(text).split(",")]
            given["relays"] = Given([one for one in parts if one], source)
        # The file's relay gives way as the file's list does.
        given["relay"] = Given("", source)
    return given


def _tied_to_issuer(
    config: ClientConfig, file: Path | None, given: Mapping[str, Given]
) -> tuple[ClientConfig, list[SettingError]]:
    """Return the settings, in which those of the file that are for one issuer count for the one that the file names.

    A flag, or a relay, may name another issuer, which would get what is not for it (docs/threats.md#B38).
    """
    login, defaults = config.login, {name: getattr(LoginConfig(), name) for name in OF_ISSUER}
    names = [name for name, value in defaults.items() if f"login.{name}" not in given and getattr(login, name) != value]
    if file is None or not names:
        return config, []
    of_file = login.issuer
    if "login.issuer" in given:
        of_file = load_all(ClientConfig, file)[0].login.issuer
    if not of_file:
        text = "is for one issuer, and the file names none; write login.issuer beside it, or take it out"
        return config, [SettingError(f"login.{name}", f"login.{name}: {text}") for name in names]
    if of_file != login.issuer:
        config = replace(config, login=replace(login, **{name: defaults[name] for name in names}))
    return config, []


def _refuse_settings_of_others(file: Path, status: os.stat_result) -> None:
    """Raise ConfigError for settings that another user can change: they name programs (docs/threats.md#B43)."""
    if sys.platform == "win32":
        return  # no credential plugin runs there
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{file} is no ordinary file, and the credential plugin takes no settings from another kind")
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{file} belongs to another user, and the credential plugin takes no settings of others, which name "
            "programs: copy the file to your own directory, and run `arcbridge connect` with that --config"
        )
    # A group of this user's own (umask 002) has no other member.
    if status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and status.st_gid != os.getegid()):
        raise ConfigError(
            f"{file} can be changed by other users, and names programs that the credential plugin runs: "
            f"chmod go-w {file}"
        )


def _wrong_choices(config: Any, role: str) -> list[SettingError]:
    """Hold each setting to the choices of its flag, wherever it was given."""
    wrong = []
    for flag in flags_of(role):
        if flag.key and flag.choices:
            value = operator.attrgetter(flag.key)(config)
            if value not in flag.choices:
                wrong.append(SettingError(flag.key, unknown(flag.key, value, flag.choices)))
    if isinstance(config, ClientConfig):
        try:
            config.relay_urls()  # says so when there are two lists
        except ConfigError as error:
            wrong.append(SettingError("relay", error.message))
        if config.port is not None and not 0 <= config.port <= 65535:
            wrong.append(SettingError("port", "port: must be between 0 and 65535"))
    return wrong
