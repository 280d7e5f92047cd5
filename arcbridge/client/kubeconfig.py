"""The kubeconfig: our three entries in it, and nothing else of it changed.

Where (client-go's rules, `k8s.io/client-go/tools/clientcmd`): `--file`, else the list in KUBECONFIG, else
`~/.kube/config`. An entry that exists is changed in the file that has it; new ones go to the first file of the list
that exists, else to its last name. The current context is written where one is set. In reading, the first file that
sets a value wins.

How: under the lock file that kubectl uses, on a copy that replaces the file at once. Scalars that we do not touch
keep their very spelling (see `kubeconfig_yaml`); comments are lost, as kubectl loses them. Our entries carry an
extension `arcbridge.io/managed`; one of the same name without it was made by another program and is never overwritten.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arcbridge.client.kubeconfig_file import KubeconfigFile
from arcbridge.client.kubeconfig_yaml import dump
from arcbridge.errors import ConfigError, StateError

MARK = "arcbridge.io/managed"
_SECTIONS = ("clusters", "users", "contexts")


@dataclass(frozen=True, slots=True)
class Entry:
    """What a kubeconfig needs to know about one cluster; PEMs as text."""

    name: str
    """Name of the context and of the cluster in the file."""
    cluster: str
    """The cluster's name at the relay."""
    server: str
    ca_pem: str
    client_certificate_pem: str
    client_key_pem: str = field(repr=False)
    token: str = field(default="", repr=False)
    token_file: str = ""
    """Token mode: a file that kubectl reads itself wins over a copy of the token."""

    @property
    def user(self) -> str:
        return f"arcbridge-{self.name}"


@dataclass(frozen=True, slots=True)
class Merged:
    """What `merge` did, so that it can be undone."""

    entry: Entry
    path: Path
    """The file that holds the context."""
    context_path: Path
    """The file whose current context was changed."""
    switched: bool
    former: str | None
    """The current context before; None: none was set."""


class Kubeconfig:
    """The files that kubectl would read, in its order."""

    def __init__(self, files: list[Path]) -> None:
        self.files = [KubeconfigFile(path) for path in files]

    @classmethod
    def find(cls, file: str, environment: Mapping[str, str]) -> Kubeconfig:
        """By `--file`, KUBECONFIG or the home directory."""
        if file:
            return cls([Path(file).expanduser()])
        listed = [Path(name) for name in environment.get("KUBECONFIG", "").split(":") if name]
        # A file named twice is read once; client-go keeps the first place.
        return cls(list(dict.fromkeys(listed)) or [Path("~/.kube/config").expanduser()])

    # -- before anything is shown to the user -----------------------------------------------------------------------

    def check(self, name: str, cluster: str) -> None:
        """Raise StateError or ConfigError if `merge` would: unwritable, malformed, or a foreign entry in the way."""
        for file in self.files:
            file.read()
        probe = Entry(name, cluster, "", "", "", "")
        for section in _SECTIONS:
            self._require_ours(section, _named(section, probe), cluster)
            self._holder(section, _named(section, probe)).check_writable()

    # -- the two changes ----------------------------------------------------------------------------------------------

    def merge(self, entry: Entry, *, switch: bool) -> Merged:
        """Put our entries in, and make the context the current one if `switch`; raises StateError, ConfigError."""
        with self._locked():
            for section in _SECTIONS:
                self._require_ours(section, _named(section, entry), entry.cluster)
            for section, make in (("clusters", _cluster), ("users", _user), ("contexts", _context)):
                self._put(section, _named(section, entry), entry, make)
            path = self._holder("contexts", entry.name).path
            holder = self._context_holder()
            former = holder.current_context
            if switch:
                holder.current_context = entry.name
            self._save()
        return Merged(entry, path, holder.path, switch, former)

    def undo(self, merged: Merged, *, remove: bool) -> None:
        """At the end: the former current context, if ours is still the current one; the entries out if `remove`."""
        entry = merged.entry
        with self._locked():
            if merged.switched and merged.former != entry.name:
                for file in self.files:
                    if file.path == merged.context_path and file.current_context == entry.name:
                        file.current_context = merged.former
            if remove:
                for file in self.files:
                    for section in _SECTIONS:
                        file.remove(section, _named(section, entry), lambda found: _owner(found) == entry.cluster)
                    if file.current_context == entry.name:
                        file.current_context = None
            self._save()

    # -- inside -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """All files locked, and read anew; a list is locked in its order, so two of us cannot wait for each other."""
        with ExitStack() as stack:
            for file in self.files:
                # A file of the list that is not there, and that we would not make, needs no lock (nor a directory).
                if file.exists() or file is self._new_file():
                    stack.enter_context(file.locked())
                file.read()
                file.holds_ours = any(
                    _owner(body) is not None for section in _SECTIONS for body in file.bodies(section)
                )
            yield

    def _save(self) -> None:
        for file in self.files:
            file.save()

    def _new_file(self) -> KubeconfigFile:
        """Where new entries go."""
        return next((file for file in self.files if file.exists()), self.files[-1])

    def _holder(self, section: str, name: str) -> KubeconfigFile:
        return next((file for file in self.files if file.find(section, name) is not None), self._new_file())

    def _context_holder(self) -> KubeconfigFile:
        return next((file for file in self.files if file.current_context), self._new_file())

    def _require_ours(self, section: str, name: str, cluster: str) -> None:
        for file in self.files:
            found = file.find(section, name)
            if found is None:
                continue
            owner = _owner(found)
            if owner is None:
                raise ConfigError(
                    f"{file.path} has another entry {name!r} in {section!r}, which arcbridge did not make; "
                    "choose another name with --kube-context, or another file with --file"
                )
            if owner != cluster:
                raise ConfigError(
                    f"{file.path}: entry {name!r} in {section!r} belongs to cluster {owner!r}; "
                    "choose another name with --kube-context"
                )

    def _put(self, section: str, name: str, entry: Entry, make: Callable[[Entry, dict[Any, Any]], None]) -> None:
        file = self._holder(section, name)
        body = file.entry(section, name)
        make(entry, body)
        _mark(body, entry.cluster)
        file.changed = True


def render(entry: Entry) -> str:
    """A kubeconfig of its own, for `--file -`."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for section, make in (("clusters", _cluster), ("users", _user), ("contexts", _context)):
        body: dict[Any, Any] = {}
        make(entry, body)
        _mark(body, entry.cluster)
        sections[section] = [{"name": _named(section, entry), section[:-1]: body}]
    return dump({"apiVersion": "v1", "kind": "Config", **sections, "current-context": entry.name, "preferences": {}})


def _named(section: str, entry: Entry) -> str:
    return entry.user if section == "users" else entry.name


def _cluster(entry: Entry, body: dict[Any, Any]) -> None:
    for key in ("certificate-authority", "insecure-skip-tls-verify", "tls-server-name"):
        body.pop(key, None)
    body["server"] = entry.server
    body["certificate-authority-data"] = _base64(entry.ca_pem)


def _user(entry: Entry, body: dict[Any, Any]) -> None:
    # Whatever else could log this user in would win over, or contradict, what we write.
    for key in ("client-certificate", "client-key", "token", "tokenFile", "username", "password", "exec"):
        body.pop(key, None)
    body["client-certificate-data"] = _base64(entry.client_certificate_pem)
    body["client-key-data"] = _base64(entry.client_key_pem)
    if entry.token_file:
        body["tokenFile"] = entry.token_file
    elif entry.token:
        body["token"] = entry.token


def _context(entry: Entry, body: dict[Any, Any]) -> None:
    # The namespace that the user set with `kubectl config set-context` stays.
    body["cluster"] = entry.name
    body["user"] = entry.user


def _mark(body: dict[Any, Any], cluster: str) -> None:
    extensions = body.get("extensions")
    if not isinstance(extensions, list):
        extensions = body["extensions"] = []
    extensions[:] = [item for item in extensions if not (isinstance(item, dict) and item.get("name") == MARK)]
    extensions.append({"name": MARK, "extension": {"cluster": cluster}})


def _owner(body: dict[Any, Any]) -> str | None:
    """The cluster for which we made an entry; None: we did not make it."""
    extensions = body.get("extensions")
    for item in extensions if isinstance(extensions, list) else []:
        if isinstance(item, dict) and item.get("name") == MARK:
            extension = item.get("extension")
            return str(extension.get("cluster", "")) if isinstance(extension, dict) else ""
    return None


def _base64(pem: str) -> str:
    return base64.b64encode(pem.encode()).decode()


__all__ = ["MARK", "Entry", "Kubeconfig", "Merged", "StateError", "render"]
