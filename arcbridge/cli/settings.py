"""From a parsed command line and the environment to the settings of a role.

Precedence: flag > environment (`ARCBRIDGE_<FLAG>`) > file > default. The file is `--config`, else ARCBRIDGE_CONFIG,
else the first of `$XDG_CONFIG_HOME/arcbridge/<role>.toml` and `/etc/arcbridge/<role>.toml` that exists (Windows, macOS:
`arcbridge.settings.user_directories`). What names a client's relay and login nowhere is had from its last login
(`client.relay_profile`).
"""

from __future__ import annotations

import operator
import os
import stat
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcbridge.cli.flags import AGENT, CLIENT, LIST, OFF, RELAY, Flag, flags_of
from arcbridge.cli.parser import Invocation
from arcbridge.cli.suggest import unknown
from arcbridge.errors import ConfigError
from arcbridge.settings.config import OF_ISSUER, AgentConfig, ClientConfig, LoginConfig, RelayConfig
from arcbridge.settings.config_loader import Given, SettingError, load_all
from arcbridge.settings.user_directories import shared_settings, user_directory

if TYPE_CHECKING:
    from collections.abc import Callable

    from arcbridge.settings.problems import Place, Problem

KINDS: dict[str, type[Any]] = {RELAY: RelayConfig, AGENT: AgentConfig, CLIENT: ClientConfig}


def settings_file(invocation: Invocation, environment: Mapping[str, str]) -> Path | None:
    """Return the settings file in force, or None. Raises ConfigError for one that another user planted (Windows)."""
    named = invocation.text("config") or environment.get("ARCBRIDGE_CONFIG", "")
    if named:
        return Path(named).expanduser()
    for directory in (user_directory("config", environment), shared_settings(environment)):
        candidate = directory / f"{invocation.role}.toml"
        shared = directory == shared_settings(environment)
        try:
            if not stat.S_ISREG(os.stat(candidate).st_mode):
                continue
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            # Settings that are not to be read are an error, which the loader says; a client may be on the machine of
            # a relay, whose settings are none of its business.
            if invocation.role == CLIENT and shared:
                continue
            return candidate
        if sys.platform == "win32" and shared:
            from arcbridge.settings.windows_owner import refuse_foreign_settings

            refuse_foreign_settings(candidate)
        return candidate
    return None


def given_settings(invocation: Invocation, environment: Mapping[str, str]) -> dict[str, Given]:
    """Return what flags and environment set, by dotted path; flags win."""
    given: dict[str, Given] = {}
    # A sub-command's own flag hides the role's one of the same name: `token create --cluster` is no setting.
    own = {flag.dest for flag in _own_flags(invocation)}
    for flag in flags_of(invocation.role):
        if not flag.key or flag.dest in own:
            continue
        typed = invocation.given.get(flag.dest)
        if typed is not None:
            value: object = flag.kind != OFF if not flag.takes_value else typed
            if flag.kind == LIST and isinstance(typed, list):
                value = [one for one in typed if one] if flag.key.startswith("login.") else typed
            given[flag.key] = Given(value, f"flag {flag.long}")
            continue
        text = environment.get(flag.variable)
        if text is not None and text != "":
            given[flag.key] = Given(_from_environment(flag, text), f"environment variable {flag.variable}")
    if invocation.switch("verbose") and "log_level" not in invocation.given:
        given["observe.log_level"] = Given("debug", "flag --verbose")
    return given


def load_settings(invocation: Invocation, environment: Mapping[str, str]) -> Any:
    """Return the settings of the invocation's role, checked; raises ConfigError, as SettingsRefused for mistakes."""
    config, wrong = read_settings(invocation, environment)
    if wrong:
        from arcbridge.settings.problems import SettingsRefused, located

        raise SettingsRefused(located([problem_of(error) for error in wrong], place_of(invocation, environment)))
    for flag in _own_flags(invocation):
        value = invocation.text(flag.dest)
        if flag.choices and value and value not in flag.choices:
            raise ConfigError(unknown(f"flag {flag.long}", value, flag.choices))
    return config


def problem_of(error: SettingError) -> Problem:
    """Return a mistake as a problem, with its place where the loader knows it."""
    from arcbridge.settings.problems import Place, Problem

    setting = ".".join(error.path)
    if error.source and error.message.startswith(error.source):
        # The line is between the source and the colon.
        message = error.message.removeprefix(error.source).partition(": ")[2]
        return Problem(setting, message, place=Place(error.source, error.line, error.column))
    return Problem(setting, error.message)


def read_settings(invocation: Invocation, environment: Mapping[str, str]) -> tuple[Any, list[SettingError]]:
    """Return the settings of the invocation's role, and every mistake in them; a setting that is wrong has its
    default."""
    given = normalized_settings(invocation, environment)
    # kubectl runs the plugin with the flags of a kubeconfig, which may be another's.
    judge = _refuse_settings_of_others if invocation.command[0] == "credential" else None
    config, wrong = load_all(KINDS[invocation.role], settings_file(invocation, environment), given, judge=judge)
    wrong += _wrong_choices(config, invocation.role)
    if isinstance(config, ClientConfig):
        config, untied = _tied_to_issuer(config, settings_file(invocation, environment), given)
        wrong += untied
    if not wrong and invocation.role == CLIENT and invocation.command[0] not in _WITHOUT_PROFILE:
        config = _with_profile(config, invocation, environment)
    return config, wrong


def normalized_settings(invocation: Invocation, environment: Mapping[str, str]) -> dict[str, Given]:
    """Return what flags and environment set, as the settings have it: several clusters and relays are lists there."""
    given = given_settings(invocation, environment)
    if invocation.role == CLIENT and "cluster" in given:
        names, source = given.pop("cluster")
        if isinstance(names, list):
            given["cluster"] = Given(names[0], source)
            # Names on the command line replace the file's, all of them.
            given["clusters"] = Given(names[1:], source)
    if invocation.role == CLIENT and "relays" in given:
        relays, source = given["relays"]
        if isinstance(relays, list):
            # As in the environment, one flag may name several.
            parts = [one.strip() for text in relays for one in str(text).split(",")]
            given["relays"] = Given([one for one in parts if one], source)
        # The file's relay gives way as the file's list does.
        given["relay"] = Given("", source)
    return given


def place_of(invocation: Invocation, environment: Mapping[str, str]) -> Callable[[str], Place | None]:
    """Return where a setting was given, by its dotted path: a flag, the environment, or a line of the settings file."""
    from arcbridge.settings.problems import Place
    from arcbridge.settings.toml_lines import line_of, parts

    given = given_settings(invocation, environment)
    file = settings_file(invocation, environment)
    try:
        text = "" if file is None else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""

    def place(setting: str) -> Place | None:
        if setting in given:
            return Place(given[setting].source)
        return None if file is None else Place(str(file), line_of(parts(setting), text))

    return place


_WITHOUT_PROFILE = ("login", "key")
"""Sub-commands of the client that decide by themselves what a saved relay adds, or that need none."""
_SILENT = ("config", "credential")
"""Sub-commands whose stderr a program reads, or that are about the settings alone."""


def _with_profile(config: ClientConfig, invocation: Invocation, environment: Mapping[str, str]) -> ClientConfig:
    """Return the settings with those of the relay that was logged in at, where no setting names another."""
    from arcbridge.client.relay.relay_profile import RelayProfiles, fill
    from arcbridge.client.state import StateDirectory

    state = StateDirectory.find(config.state_dir, environment)
    filled = fill(config, RelayProfiles(state.path))
    if filled.others and filled.profile is not None and invocation.command[0] not in _SILENT:
        others = ", ".join(one.url for one in filled.others)
        sys.stderr.write(f"at {filled.profile.url}, the last login; for another one give --relay ({others})\n")
    return filled.config


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
        return config, [SettingError(f"login.{name}: {text}", ("login", name), "") for name in names]
    if of_file != login.issuer:
        config = replace(config, login=replace(login, **{name: defaults[name] for name in names}))
    return config, []


def _refuse_settings_of_others(file: Path, status: os.stat_result) -> None:
    """Raise ConfigError for settings that another user can change: they name programs (docs/threats.md#B43)."""
    if sys.platform == "win32":
        from arcbridge.settings.windows_owner import refuse_foreign_settings

        refuse_foreign_settings(file)
        return
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{file} is no ordinary file, and the credential plugin takes no settings from another kind")
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigError(
            f"{file} belongs to another user, and the credential plugin takes no settings of others, which name "
            "programs: copy the file to your own directory, and run `arcbridge connect` with that --config"
        )
    # A group of this user's own (umask 002) has nobody else in it.
    if status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and status.st_gid != os.getegid()):
        raise ConfigError(
            f"{file} can be changed by other users, and names programs that the credential plugin runs: "
            f"chmod go-w {file}"
        )


def _own_flags(invocation: Invocation) -> tuple[Flag, ...]:
    from arcbridge.cli.flags import find_command

    return find_command(invocation.role, invocation.command).flags


def _from_environment(flag: Flag, text: str) -> object:
    if flag.kind == LIST:
        return [item.strip() for item in text.split(",") if item.strip()]
    if flag.kind == OFF:
        # The variable is named after the flag, so its truth is the flag's, and the setting is the opposite.
        return "0" if text.strip().lower() in ("1", "true", "yes", "on") else "1"
    return text


def _wrong_choices(config: Any, role: str) -> list[SettingError]:
    """Hold each setting to the choices of its flag, wherever it was given."""
    wrong = []
    for flag in flags_of(role):
        if flag.key and flag.choices:
            value = operator.attrgetter(flag.key)(config)
            if value not in flag.choices:
                text = unknown(flag.key, value, flag.choices)
                wrong.append(SettingError(text, tuple(flag.key.split(".")), ""))
    if isinstance(config, ClientConfig):
        try:
            config.relay_urls()  # says so when there are two lists
        except ConfigError as error:
            wrong.append(SettingError(error.message, ("relay",), ""))
        if config.port is not None and not 0 <= config.port <= 65535:
            wrong.append(SettingError("port: must be between 0 and 65535", ("port",), ""))
    return wrong
