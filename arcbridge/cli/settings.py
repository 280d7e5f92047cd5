"""From a parsed command line and the environment to the settings of a role.

Precedence: flag > environment (`ARCBRIDGE_<FLAG>`) > file > default. The file is `--config`, else ARCBRIDGE_CONFIG,
else the first of `$XDG_CONFIG_HOME/arcbridge/<role>.toml` and `/etc/arcbridge/<role>.toml` that exists (Windows, macOS:
`arcbridge.settings.user_directories`). Where nothing names a client's relay and login, they are those of its last login
(`client.relay.relay_profile`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcbridge.cli.commands import find_command
from arcbridge.cli.output import print_warning
from arcbridge.cli.parser import Invocation
from arcbridge.errors import ConfigError
from arcbridge.settings.config import ClientConfig
from arcbridge.settings.config_loader import Given, SettingError
from arcbridge.settings.flags import CLIENT, LIST, OFF, ROLES, Flag, flags_of
from arcbridge.settings.role_settings import find_file, read
from arcbridge.settings.suggest import nearest, unknown

if TYPE_CHECKING:
    from collections.abc import Callable

    from arcbridge.settings.problems import Place

_PREFIX = "ARCBRIDGE_"
_NO_FLAGS = {"DEBUGGABLE", "LOOP", "NO_UPDATE_NOTICE", "READY_DESCRIPTOR", "TOKEN_WAS_SHOWN", "UNPACK_DIR"}
"""Variables of arcbridge that belong to no flag."""


def settings_file(invocation: Invocation, environment: Mapping[str, str]) -> Path | None:
    """Return the settings file in force, or None; raises ConfigError (`find_file`)."""
    named = invocation.text("config") or environment.get("ARCBRIDGE_CONFIG", "")
    if named:
        return Path(named).expanduser()
    return find_file(invocation.role, environment)


def given_state_dir(invocation: Invocation, environment: Mapping[str, str]) -> Path | None:
    """Return the state directory of flag or environment; None: they name none. What has to work with settings that
    cannot be read asks here."""
    given = invocation.text("state_dir") or environment.get("ARCBRIDGE_STATE_DIR", "")
    return Path(given).expanduser().absolute() if given else None


def given_settings(invocation: Invocation, environment: Mapping[str, str]) -> dict[str, Given]:
    """Return what flags and environment set, by dotted path; flags win."""
    given: dict[str, Given] = {}
    # A sub-command's own flag hides the role's one of the same name: `token create --cluster` is no setting.
    own = {flag.dest for flag in find_command(invocation.role, invocation.command).flags}
    for flag in flags_of(invocation.role):
        if not flag.key or flag.dest in own:
            continue
        typed = invocation.given.get(flag.dest)
        if typed is not None:
            given[flag.key] = Given(typed if flag.takes_value else flag.kind != OFF, f"flag {flag.long}")
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
    for sentence in misspelt_variables(environment):
        _warn_once(sentence)
    if wrong:
        from arcbridge.settings.problems import SettingsRefused, located

        raise SettingsRefused(located([error.problem for error in wrong], place_of(invocation, environment)))
    for flag in find_command(invocation.role, invocation.command).flags:
        value = invocation.text(flag.dest)
        if flag.choices and value and value not in flag.choices:
            raise ConfigError(unknown(f"flag {flag.long}", value, flag.choices))
    return config


def misspelt_variables(environment: Mapping[str, str]) -> list[str]:
    """Return a sentence for each variable that sets nothing and is nearly the name of one that does.

    Of no other one: Kubernetes gives a pod `ARCBRIDGE_…` for each Service of such a name.
    """
    found = []
    if names := [name.removeprefix(_PREFIX) for name in environment if name.startswith(_PREFIX)]:
        flags = (flag for role in ROLES for flag in flags_of(role) if flag.dest != "verbose")  # it has none
        known = _NO_FLAGS | {flag.variable.removeprefix(_PREFIX) for flag in flags}
        for name in names:
            if name not in known and (near := nearest(name, known, cutoff=0.8)):
                found.append(f"environment variable {_PREFIX}{name} sets nothing; did you mean {_PREFIX}{near}?")
    return found


@cache
def _warn_once(sentence: str) -> None:
    """Print a warning of which the settings that are read again (SIGHUP) say nothing."""
    print_warning(sentence)


def start(invocation: Invocation, level: str = "") -> Any:
    """Return the settings of a relay's or an agent's command, and set logging up by them; `level`: another one than
    theirs, for a command that answers and ends. Raises ConfigError."""
    config = load_settings(invocation, os.environ)
    from arcbridge.observe import logging

    logging.configure(invocation.role, level or config.observe.log_level, config.observe.log_format)
    return config


def read_settings(invocation: Invocation, environment: Mapping[str, str]) -> tuple[Any, list[SettingError]]:
    """Return the settings of the invocation's role, and every mistake in them; a setting that is wrong has its
    default."""
    file = settings_file(invocation, environment)
    config, wrong = read(invocation.role, file, given_settings(invocation, environment))
    if not wrong and invocation.role == CLIENT and invocation.command[0] not in _WITHOUT_PROFILE:
        config = _with_profile(config, invocation, environment)
    return config, wrong


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


_WITHOUT_PROFILE = ("gateway", "login", "key", "uninstall")
"""Sub-commands of the client that decide by themselves what a saved relay adds, or that need none."""
_SILENT = ("config", "status", "bundle")
"""Sub-commands that are about the settings alone, or that name the relay themselves."""


def _with_profile(config: ClientConfig, invocation: Invocation, environment: Mapping[str, str]) -> ClientConfig:
    """Return the settings with those of the relay that was logged in at, where no setting names another."""
    from arcbridge.client.relay.relay_profile import RelayProfiles, fill
    from arcbridge.client.state import StateDirectory

    state = StateDirectory.find(config.state_dir, environment)
    config, fit = fill(config, RelayProfiles(state.path))
    if len(fit) > 1 and invocation.command[0] not in _SILENT:
        others = ", ".join(one.url for one in fit[1:])
        from arcbridge.cli.output import print_note

        print_note(f"at {fit[0].url}, the last login; for another one give --relay ({others})")
    return config


def _from_environment(flag: Flag, text: str) -> object:
    if flag.kind == LIST:
        return [item.strip() for item in text.split(",") if item.strip()]
    if flag.kind == OFF:
        # The variable is named after the flag, so its truth is the flag's, and the setting is the opposite.
        return "0" if text.strip().lower() in ("1", "true", "yes", "on") else "1"
    return text
