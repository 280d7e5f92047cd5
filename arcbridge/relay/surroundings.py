"""Looks at what a start of the relay would meet on this machine besides its settings: ports, the disk, another relay.

`config check` runs it behind the check of the settings, and says what a start says: the sentences come from the code
that a start runs. A relay that runs on these very settings is in nobody's way, so that a check before a reload is as
good as one before a start. Ports are bound for an instant, and nothing is accepted; no file is made.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from arcbridge.errors import ConfigError
from arcbridge.net.address import Address
from arcbridge.observe.listen import check_observe_port, port_of, split_listen
from arcbridge.relay.audit.log import audit_file
from arcbridge.relay.data_dir import LOCK_FILE, another_relay, is_locked
from arcbridge.relay.listener import bind
from arcbridge.relay.settings import CheckedRelay
from arcbridge.settings.problems import Problems
from arcbridge.settings.surroundings import holders, is_full, listeners


def look_around(checked: CheckedRelay, runs_these: Callable[[int], bool]) -> Problems:
    """Return what would be in the way of a start. `runs_these`: whether a process was given these settings."""
    config, problems = checked.config, Problems()
    if why := is_full(config.data_dir):
        problems.error("data_dir", f"data_dir: {why}")
    elif (audit := audit_file(config)) not in ("", "-") and (why := is_full(Path(audit))):
        problems.warn("audit.file", why)
    relay = _Relay(config.data_dir, runs_these)
    listen, observe = checked.listen, config.observe.listen
    free = _try(problems, "listen", listen.port, lambda: bind(listen, accept=False).close(), relay)
    if observe and _is_one(listen, observe):
        problems.error("observe.listen", f"observe.listen {observe!r}: that is the port of listen; choose another one")
    elif observe:
        _try(problems, "observe.listen", port_of(observe), lambda: check_observe_port(observe), relay)
    if relay.processes and not relay.is_this:
        problems.error("data_dir", another_relay(config.data_dir).message)
    elif relay.runs and not relay.processes and free:
        problems.warn(
            "data_dir",
            f"data_dir: a relay is running on {config.data_dir}, and this user may not look into it; where that is not "
            "the relay of these settings, stop it, or use another one",
        )
    return problems


def _is_one(listen: Address, observe: str) -> bool:
    """Return whether both are to listen at one port of one address."""
    host, port = split_listen(observe)
    return port == listen.port != 0 and (host == listen.host or not {host, listen.host}.isdisjoint(_ALL))


_ALL = (None, "", "0.0.0.0", "::")
"""Hosts that stand for all addresses."""


class _Relay:
    """The relay that runs on a data directory."""

    def __init__(self, data_dir: Path, runs_these: Callable[[int], bool]) -> None:
        self.runs = is_locked(data_dir)
        self.processes = holders(data_dir / LOCK_FILE) if self.runs else frozenset()
        """The relay's processes; empty where this user may not see their files, as only root may (cli.core_dumps)."""
        self.is_this = any(map(runs_these, self.processes))

    def has(self, port: int) -> bool:
        """Return whether the relay of these settings has a port; where the system does not say who has it, one that
        runs on their data directory is taken to be theirs."""
        by = listeners(port)
        return bool(by & self.processes) if by and self.processes else self.runs


def _try(problems: Problems, setting: str, port: int, bound: Callable[[], None], relay: _Relay) -> bool:
    """Bind a port by `bound`, and return whether that was possible."""
    try:
        if port:
            bound()
    except ConfigError as error:
        if isinstance(error.__cause__, PermissionError):
            problems.warn(setting, error.message)  # the user that the relay runs as may have the capability
        elif not relay.has(port):
            problems.error(setting, error.message)
        return False
    return True
