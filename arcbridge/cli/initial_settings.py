"""`config init`: writes the annotated settings files of a role, filled from the command line.

The files are those of config/, which travel in the wheel. A value takes the place of its line there, so that the
comments stay beside it. Invariant: no edited file is overwritten, and where there is one no file is written. Not edited
is a file as `config init` writes it without flags: deb and rpm install such files, for this to fill.
"""

from __future__ import annotations

import operator
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcbridge.cli.configuration import find_problems, toml_value
from arcbridge.cli.output import print_error, print_prose, print_warning
from arcbridge.cli.parser import Invocation
from arcbridge.cli.settings import given_settings
from arcbridge.errors import ConfigError, ExitCode
from arcbridge.settings.config_loader import Given, load
from arcbridge.settings.flags import AGENT, RELAY
from arcbridge.settings.role_settings import KINDS, normalized
from arcbridge.settings.user_directories import shared_settings, user_directory

if TYPE_CHECKING:
    from collections.abc import Mapping

_RELAY_AUDIENCE = "arcbridge-relay"
_CLUSTER_AUDIENCE = "arcbridge-{cluster}"
_CLIENT_ID = "arcbridge"
_PREFIX = "oidc:"
"""What the annotated authentication files put before users and groups."""
_PORT = 443
_UNITS = Path("/usr/lib/systemd/system")
"""Where deb and rpm put the unit of a role."""
_AUDIT_FILE = "/var/log/arcbridge/audit.jsonl"
"""The file that the agent's unit makes room for, and that logrotate rotates."""
_HEADER = re.compile(r"#?\[+([^\[\]]+)\]+")


def init(invocation: Invocation) -> int:
    """Write the files, say what is still to be edited, and print the next command; returns the exit code."""
    if invocation.text("config"):
        raise ConfigError("flag --config: `config init` writes into a directory; give --directory DIR")
    directory = _directory(invocation, os.environ)
    kind = {"root": _is_root(), "service": _is_service(invocation)}
    files = initial_files(invocation, **kind)
    untouched = initial_files(Invocation(invocation.role, invocation.command, {}), **kind)
    there = [str(directory / name) for name in files if _is_edited(directory / name, untouched[name])]
    if there:
        raise ConfigError(f"{', '.join(there)}: exists, and nothing is overwritten; give --directory DIR, or move it")
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        for name, text in files.items():
            path = directory / name
            with open(path, "w" if path.exists() else "x", encoding="utf-8") as file:
                file.write(text)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be written: {error.strerror}; give --directory DIR") from error
    settings = directory / f"{invocation.role}.toml"
    from arcbridge.settings.problems import Severity

    written = Invocation(invocation.role, ("config", "check"), {"config": str(settings)})
    problems = find_problems(written, {})
    errors = [problem for problem in problems if problem.severity is Severity.ERROR]
    print_prose(f"Wrote {', '.join(str(directory / name) for name in files)}")
    sys.stdout.flush()
    for problem in problems:
        (print_error if problem in errors else print_warning)(str(problem))
    command = ["arcbridge", "--role", invocation.role, "--config", str(settings)]
    if errors:
        print(f"Edit what is named above, then:\n  {shlex.join([*command, 'config', 'check'])}")
    elif kind["service"]:
        print(f"Next:\n  systemctl enable --now arcbridge-{invocation.role}")
    else:
        print(f"Next:\n  {shlex.join(command)}")
    return ExitCode.DONE


def initial_files(invocation: Invocation, *, root: bool, service: bool = False) -> dict[str, str]:
    """Return the files of the role, by name, in the order in which they are read. `service`: for the unit of deb and
    rpm. Raises ConfigError for a wrong flag."""
    role = invocation.role
    given = normalized(role, given_settings(invocation, {}))
    given.pop("relay", None)
    issuer, client_id = invocation.text("issuer"), invocation.text("client_id", _CLIENT_ID)
    if role != AGENT and issuer:
        given |= {"login.issuer": Given(issuer, "flag --issuer"), "login.client_id": Given(client_id, "flag --issuer")}
        # One audience for each end (docs/security.md#C33): what an end has seen is of no use at another one.
        given.setdefault("login.audience", Given(invocation.text("audience", _RELAY_AUDIENCE), "default"))
        given.setdefault("login.cluster_audience", Given(_CLUSTER_AUDIENCE, "default"))
    elif role == AGENT and issuer:
        if not invocation.text("audience"):
            raise ConfigError(
                "flag --audience: required with --issuer; give the audience of the tokens for this agent's cluster, "
                "arcbridge-NAME as clients ask for it by default, or their client id where clusters get the id token"
            )
        given.setdefault("forbidden_audiences", Given([_RELAY_AUDIENCE], "default"))
    config = load(KINDS[role], None, given)
    values: dict[str, Any] = {path: operator.attrgetter(path)(config) for path in given}
    if role == AGENT and issuer:
        values.setdefault("authentication", "agent-authentication.yaml")
        values.setdefault("token_mode", False)  # as in the chart; without an issuer it is the only way in
    if role == RELAY:
        _fit_machine(values, root)
    elif role == AGENT and not root and "state.directory" not in values:
        values["state.directory"] = "agent-state"
    if role == AGENT and service:
        values.setdefault("audit.file", _AUDIT_FILE)
    text = template(f"{role}.toml")
    for path, value in values.items():
        text = fill(text, path, value)
    if values.get("state.secret"):
        text = re.sub(r"(?m)^(directory = )", r"#\1", text)
    files = {f"{role}.toml": text}
    if role == RELAY:
        files["relay-authentication.yaml"] = _authentication(role, issuer, invocation.text("audience", _RELAY_AUDIENCE))
        files["policy.toml"] = _policy(invocation.texts("group"))
    elif role == AGENT:
        files["agent-authentication.yaml"] = _authentication(role, issuer, invocation.text("audience", _CLIENT_ID))
    return files


def template(name: str) -> str:
    """Read one of the annotated files: as it was installed, or of the clone that this runs from."""
    package = Path(__file__).resolve().parents[1]
    for directory in (package / "annotated", package.parent / "config"):
        if (directory / name).is_file():
            return (directory / name).read_text(encoding="utf-8")
    raise ConfigError(f"{name} is missing from this installation; install arcbridge from its wheel or a clone")


def fill(text: str, path: str, value: Any) -> str:
    """Set `path` on its own line of an annotated file, whether that shows a value or a default."""
    *tables, key = path.split(".")
    lines, table = text.splitlines(), ""
    for number, line in enumerate(lines):
        header = _HEADER.fullmatch(line)
        if header:
            table = header[1]
        elif table == ".".join(tables) and re.match(rf"#?{re.escape(key)} = ", line):
            plain = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            lines[number] = f"{key} = {toml_value(plain)}"
            return "\n".join(lines) + "\n"
    raise ConfigError(f"{path}: has no line in the annotated file; set it by hand")


def _directory(invocation: Invocation, environment: Mapping[str, str]) -> Path:
    if named := invocation.text("directory"):
        return Path(named).expanduser().absolute()
    return shared_settings(environment) if _is_root() else user_directory("config", environment)


def _is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


def _is_service(invocation: Invocation) -> bool:
    """Return whether the settings are those of a unit that deb or rpm has installed."""
    unit = _UNITS / f"arcbridge-{invocation.role}.service"
    return _is_root() and _directory(invocation, os.environ) == shared_settings(os.environ) and unit.exists()


def _is_edited(path: Path, untouched: str) -> bool:
    """Return whether a file is there that is not as `config init` writes it without flags."""
    try:
        return path.exists() and path.read_bytes() != untouched.encode()
    except OSError:
        return True


def _fit_machine(values: dict[str, Any], root: bool) -> None:
    """Listen where agents and clients dial, and keep the data where an ordinary user may."""
    if "public_address" in values and "listen" not in values:
        from arcbridge.net.address import parse_address

        port = parse_address(values["public_address"]).port
        if port != _PORT:
            values["listen"] = f"0.0.0.0:{port}"
    if not root and "data_dir" not in values:
        values["data_dir"] = "relay-data"


def _authentication(role: str, issuer: str, audience: str) -> str:
    text = template(f"{role}-authentication.yaml")
    example = _RELAY_AUDIENCE if role == RELAY else _CLIENT_ID
    if issuer:
        text = _replaced(text, "url: https://login.example.org", f"url: {_yaml(issuer)}")
    return _replaced(text, f"        - {example}\n", f"        - {_yaml(audience)}\n")


def _policy(groups: tuple[str, ...]) -> str:
    """Return the policy: every cluster for the groups, or the example's rules as comments, which allow no user
    anything."""
    head, rule, examples = template("policy.toml").partition("[[allow]]")
    if not groups:
        return head + "".join(f"#{line}\n" if line else "\n" for line in (rule + examples).splitlines())
    named = [group if group.startswith(_PREFIX) else _PREFIX + group for group in groups]
    test = f'#[[test]]\n#groups = {toml_value(named)}\n#accept = ["CLUSTER"]\n'
    return f'{head}[[allow]]\ngroups = {toml_value(named)}\nclusters = ["*"]\n\n{test}'


def _yaml(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9:/._~-]*[A-Za-z0-9/]", text):
        return text
    import json

    return json.dumps(text)


def _replaced(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise ConfigError(f"the annotated file has changed: {old.strip()!r} is not once in it")
    return text.replace(old, new)
