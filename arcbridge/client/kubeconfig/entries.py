"""The kubeconfig: our three entries in it, and nothing else of it changed.

Where (client-go's rules, `k8s.io/client-go/tools/clientcmd`): `--file`, else the list in KUBECONFIG, else
`~/.kube/config`. An entry that exists is changed in the file that has it; new ones go to the first file of the list
that exists, else to its last name. The current context is written where one is set. In reading, the first file that
sets a value wins.

How: under the lock file that kubectl uses, on a copy that replaces the file at once. Scalars that we do not touch
keep their very spelling (see `kubeconfig_yaml`); comments are lost, as kubectl loses them. Our entries carry an
extension `arcbridge.io/managed`; one of the same name without it was made by another program and is never overwritten.

The extension says which process serves the entry, at which address, and which context was the current one before ours.
Invariant: an entry whose process is gone, and whose address is still the one that we wrote, gets a credential plugin
that says what to do, or starts the background process, at the next command (`repair`).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arcbridge.client.kubeconfig.block_yaml import Plain, dump, is_empty
from arcbridge.client.kubeconfig.file import KubeconfigFile
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
    relays: tuple[str, ...] = ()
    """The cluster's relays (`host:port`); clusters of one name at other relays are other clusters."""
    process: str = ""
    """Name of the process that serves the entry (`client.kubeconfig.running`); empty: entries of no process are left
    alone."""
    arguments: tuple[str, ...] = ()
    """What `arcbridge credential` is given to start the background process; empty: a proxy in the foreground serves."""
    plugin: bool = False
    """Whether the user is the credential plugin, with `arguments`; False: a client certificate."""

    @property
    def user(self) -> str:
        return f"arcbridge-{self.name}"


@dataclass(frozen=True, slots=True)
class Merged:
    """What `merge` did, so that it can be undone."""

    entry: Entry
    path: Path
    """The file that holds the context."""
    switched: bool
    former: str | None
    """The last current context that was not ours; None: none was set."""


class Kubeconfig:
    """The files that kubectl would read, in its order."""

    def __init__(self, files: list[Path]) -> None:
        self.files = [KubeconfigFile(path) for path in files]

    @classmethod
    def find(cls, file: str, environment: Mapping[str, str]) -> Kubeconfig:
        """Find the kubeconfig by `--file`, KUBECONFIG or the home directory."""
        if file:
            return cls([Path(file).expanduser()])
        listed = [Path(name) for name in environment.get("KUBECONFIG", "").split(os.pathsep) if name]
        # A file named twice is read once; client-go keeps the first place.
        return cls(list(dict.fromkeys(listed)) or [Path("~/.kube/config").expanduser()])

    # -- before anything is shown to the user -----------------------------------------------------------------------

    def check(self, name: str, cluster: str, relays: tuple[str, ...] = ()) -> None:
        """Raise StateError or ConfigError if `merge` would: unwritable, malformed, or a foreign entry in the way."""
        for file in self.files:
            file.read()
        probe = Entry(name, cluster, "", "", "", "", relays=relays)
        for section in _SECTIONS:
            self._require_ours(section, _named(section, probe), probe)
            self._holder(section, _named(section, probe)).check_writable()

    def served(self, name: str) -> tuple[str, str]:
        """Return the process and the address of our entry of that name; empty texts where it is not ours, or names
        none."""
        for file in self.files:
            file.read()
        body = self._context(name)
        mark = _mark_of(body) if body is not None else None
        return (str(mark.get("process") or ""), str(mark.get("server") or "")) if mark is not None else ("", "")

    # -- the changes --------------------------------------------------------------------------------------------------

    def merge(self, entry: Entry, *, switch: bool) -> Merged:
        """Put our entries in, and make the context the current one if `switch`; raises StateError, ConfigError."""
        with self._locked():
            for section in _SECTIONS:
                self._require_ours(section, _named(section, entry), entry)
            holder = self._context_holder()
            former = self._last_foreign(holder.current_context)
            for section, make in (("clusters", _cluster), ("users", _user), ("contexts", _context)):
                self._put(section, _named(section, entry), entry, make, former)
            path = self._holder("contexts", entry.name).path
            if switch:
                holder.current_context = entry.name
            self._save()
        return Merged(entry, path, switch, former)

    def refresh(self, entry: Entry) -> bool:
        """Write our entries anew where they are all still there and ours; the current context stays.

        Returns whether they were. Raises StateError.
        """
        with self._locked():
            for section in _SECTIONS:
                name = _named(section, entry)
                bodies = [body for file in self.files if (body := file.find(section, name)) is not None]
                marks = [_mark_of(body) for body in bodies]
                if not bodies or any(
                    mark is None or not _owns(mark, entry) or _was_edited(section, body, mark)
                    for body, mark in zip(bodies, marks, strict=True)
                ):
                    return False
            context = self._context(entry.name)
            mark = (_mark_of(context) if context is not None else None) or {}
            former = None if is_empty(mark.get("former")) else str(mark["former"])
            for section, make in (("clusters", _cluster), ("users", _user), ("contexts", _context)):
                self._put(section, _named(section, entry), entry, make, former)
            self._save()
        return True

    def undo(self, merged: Merged, *, remove: bool) -> None:
        """At the end of what served an entry, if it still does: the last context that was not ours comes back where
        this one is the current one, and the entries go out (`remove`) or say what to do."""
        entry = merged.entry
        with self._locked():
            self._retire(entry.name, lambda mark: _is_of(mark, entry), remove=remove)
            self._save()

    def repair(self, alive: Callable[[str], bool]) -> list[str]:
        """Do so for each entry whose process ended without doing it; returns their names. Raises StateError."""
        for file in self.files:
            file.read()
        if not self._dead(alive):
            return []
        with self._locked():
            dead = self._dead(alive)
            for name in dead:
                self._retire(name, lambda mark: not alive(str(mark["process"])), remove=False)
            self._save()
        return dead

    def remove(self, name: str, cluster: str, relays: tuple[str, ...]) -> bool:
        """Take a cluster's entries out, whatever served them; says whether they were there."""
        probe = Entry(name, cluster, "", "", "", "", relays=relays)
        with self._locked():
            found = any(
                (body := file.find("contexts", name)) is not None and _owns(_mark_of(body), probe)
                for file in self.files
            )
            self._retire(name, lambda mark: _owns(mark, probe), remove=True)
            self._save()
        return found

    def has_ours(self) -> bool:
        """Return whether any entry is ours; raises StateError."""
        for file in self.files:
            file.read()
        return any(
            _mark_of(body) is not None for file in self.files for section in _SECTIONS for body in file.bodies(section)
        )

    def _retire(self, name: str, ours: Callable[[dict[Any, Any]], bool], *, remove: bool) -> None:
        """Let the entries of `name` whose mark is `ours` no longer point at a dead port.

        They go out, or their user becomes the plugin; the context that was current before ours comes back, unless the
        plugin starts what serves this one. A part that was edited since is left alone.
        """
        found = [
            (file, section, entry_name, body, mark)
            for section in ("contexts", "users", "clusters")
            for file in self.files
            if (body := file.find(section, entry_name := f"arcbridge-{name}" if section == "users" else name))
            is not None
            and (mark := _mark_of(body)) is not None
        ]
        context = self._context(name)
        # The user may have taken the context out: then the mark of another entry says which cluster they are for.
        whole = _mark_of(context) if context is not None else next((mark for *_, mark in found), None)
        if whole is None or not ours(whole):
            return
        if remove or not _texts(whole.get("arguments")):
            former = None if is_empty(whole.get("former")) else str(whole["former"])
            for file in self.files:
                if file.current_context == name:
                    file.current_context = former
        for file, section, entry_name, body, mark in found:
            if mark.get("cluster") != whole.get("cluster"):
                continue
            if remove and not _was_edited(section, body, mark):
                file.remove(section, entry_name)
            elif not remove and mark.get("process"):
                if section == "users" and not _was_edited(section, body, mark):
                    arguments = _texts(mark.get("arguments"))
                    _set_plugin(body, arguments or ("--cluster", str(mark["cluster"]), "--ended"))
                mark.pop("process")  # so that an entry is retired only once
                file.changed = True

    def _dead(self, alive: Callable[[str], bool]) -> list[str]:
        """Return the names of our contexts with a client certificate whose process is gone."""
        return [
            name
            for file in self.files
            for name, body in file.named_bodies("contexts")
            if (mark := _mark_of(body)) is not None
            and mark.get("process")
            and not mark.get("plugin")
            and not alive(str(mark["process"]))
        ]

    # -- inside -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Lock all files and read them anew; a list is locked in its order, so two of us cannot wait for each other."""
        with ExitStack() as stack:
            for file in self.files:
                # A file of the list that is not there, and that we would not make, needs no lock (nor a directory).
                if file.exists() or file is self._new_file():
                    stack.enter_context(file.locked())
                file.read()
                file.holds_ours = any(
                    _mark_of(body) is not None for section in _SECTIONS for body in file.bodies(section)
                )
            yield

    def _save(self) -> None:
        for file in self.files:
            file.save()

    def _new_file(self) -> KubeconfigFile:
        """Return the file to which new entries go."""
        return next((file for file in self.files if file.exists()), self.files[-1])

    def _holder(self, section: str, name: str) -> KubeconfigFile:
        return next((file for file in self.files if file.find(section, name) is not None), self._new_file())

    def _context_holder(self) -> KubeconfigFile:
        return next((file for file in self.files if file.current_context), self._new_file())

    def _context(self, name: str) -> dict[Any, Any] | None:
        """Return the body of the context that kubectl finds under a name."""
        return next((body for file in self.files if (body := file.find("contexts", name)) is not None), None)

    def _last_foreign(self, current: str | None) -> str | None:
        """Return the current context, or the one that was before it where it is ours."""
        body = self._context(current) if current is not None else None
        mark = _mark_of(body) if body is not None else None
        if mark is None:
            return current
        return None if is_empty(mark.get("former")) else str(mark["former"])

    def _require_ours(self, section: str, name: str, entry: Entry) -> None:
        for file in self.files:
            found = file.find(section, name)
            if found is None:
                continue
            mark = _mark_of(found)
            if mark is None:
                raise ConfigError(
                    f"{file.path} has another entry {name!r} in {section!r}, which arcbridge did not make; "
                    "choose another name with --kube-context, or another file with --file"
                )
            if not _owns(mark, entry):
                of, at = str(mark.get("cluster", "")), _texts(mark.get("relays"))
                where = f" at relay {at[0]}" if of == entry.cluster and at else ""
                raise ConfigError(
                    f"{file.path}: entry {name!r} in {section!r} belongs to cluster {of!r}{where}; "
                    "choose another name with --kube-context"
                )

    def _put(
        self,
        section: str,
        name: str,
        entry: Entry,
        make: Callable[[Entry, dict[Any, Any]], None],
        former: str | None,
    ) -> None:
        file = self._holder(section, name)
        body = file.entry(section, name)
        make(entry, body)
        _mark(body, entry, section, former)
        file.changed = True


def render(entry: Entry) -> str:
    """Render a kubeconfig of its own, for `--file -`."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for section, make in (("clusters", _cluster), ("users", _user), ("contexts", _context)):
        body: dict[Any, Any] = {}
        make(entry, body)
        _mark(body, entry, section, None)
        sections[section] = [{"name": _named(section, entry), section[:-1]: body}]
    return dump({"apiVersion": "v1", "kind": "Config", **sections, "current-context": entry.name, "preferences": {}})


def _named(section: str, entry: Entry) -> str:
    return entry.user if section == "users" else entry.name


def _cluster(entry: Entry, body: dict[Any, Any]) -> None:
    for key in ("certificate-authority", "insecure-skip-tls-verify", "tls-server-name"):
        body.pop(key, None)
    body["server"] = entry.server
    body["certificate-authority-data"] = _base64(entry.ca_pem)


_LOGINS = (
    *("client-certificate", "client-certificate-data", "client-key", "client-key-data"),
    *("token", "tokenFile", "username", "password", "exec"),
)


def _user(entry: Entry, body: dict[Any, Any]) -> None:
    if entry.plugin:
        _set_plugin(body, entry.arguments)
        return
    # Whatever else could log this user in would win over, or contradict, what we write.
    for key in _LOGINS:
        if not key.startswith("client-") or not key.endswith("-data"):
            body.pop(key, None)
    body["client-certificate-data"] = _base64(entry.client_certificate_pem)
    body["client-key-data"] = _base64(entry.client_key_pem)
    if entry.token_file:
        body["tokenFile"] = entry.token_file
    elif entry.token:
        body["token"] = entry.token


def _set_plugin(body: dict[Any, Any], arguments: tuple[str, ...]) -> None:
    """Make a user one whose credential `arcbridge credential` prints (client.authentication.k8s.io/v1)."""
    for key in _LOGINS:
        body.pop(key, None)
    body["exec"] = {
        "apiVersion": "client.authentication.k8s.io/v1",
        # A bare name: kuberc's credentialPluginPolicy allows plugins by name.
        "command": "arcbridge",
        "args": ["credential", *arguments],
        "interactiveMode": "IfAvailable",
        # Without cluster info the plugin could not see to which port kubectl is about to connect.
        "provideClusterInfo": Plain("true"),
        "installHint": "arcbridge is not on the PATH: install it, or put its directory there",
    }


def _context(entry: Entry, body: dict[Any, Any]) -> None:
    # The namespace that the user set with `kubectl config set-context` stays.
    body["cluster"] = entry.name
    body["user"] = entry.user


def _mark(body: dict[Any, Any], entry: Entry, section: str, former: str | None) -> None:
    extensions = body.get("extensions")
    if not isinstance(extensions, list):
        extensions = body["extensions"] = []
    extensions[:] = [item for item in extensions if not (isinstance(item, dict) and item.get("name") == MARK)]
    mark: dict[str, Any] = {"cluster": entry.cluster}
    if entry.relays:
        mark["relays"] = list(entry.relays)
    if entry.process:
        mark["server"] = entry.server
        if section != "clusters":  # the cluster's entry is to be the same from one start to the next
            mark["process"] = entry.process
            if entry.plugin:
                mark["plugin"] = "true"
            elif entry.arguments:
                mark["arguments"] = list(entry.arguments)
    if section == "contexts" and former is not None:
        mark["former"] = former
    extensions.append({"name": MARK, "extension": mark})


def _mark_of(body: dict[Any, Any]) -> dict[Any, Any] | None:
    """Return what we have written about an entry; None: we did not make it."""
    extensions = body.get("extensions")
    for item in extensions if isinstance(extensions, list) else []:
        if isinstance(item, dict) and item.get("name") == MARK:
            extension = item.get("extension")
            return extension if isinstance(extension, dict) else {}
    return None


def _owns(mark: dict[Any, Any] | None, entry: Entry) -> bool:
    """Return whether an entry is for this cluster; one that names no relay is for any."""
    if mark is None or str(mark.get("cluster", "")) != entry.cluster:
        return False
    relays = _texts(mark.get("relays"))
    return not relays or not entry.relays or bool(set(relays) & set(entry.relays))


def _is_of(mark: dict[Any, Any], entry: Entry) -> bool:
    return _owns(mark, entry) and str(mark.get("process") or "") == entry.process


def _was_edited(section: str, body: dict[Any, Any], mark: dict[Any, Any]) -> bool:
    """Return whether another program, or the user, has made another thing of our entry."""
    if section == "clusters":
        return bool(mark.get("server")) and str(body.get("server")) != str(mark["server"])
    if section == "users":
        plugin = body.get("exec")
        if isinstance(plugin, dict):
            return str(plugin.get("command")) != "arcbridge"
        return "client-certificate-data" not in body
    return False


def _texts(value: object) -> tuple[str, ...]:
    return tuple(str(one) for one in value) if isinstance(value, list) else ()


def _base64(pem: str) -> str:
    return base64.b64encode(pem.encode()).decode()


__all__ = ["MARK", "Entry", "Kubeconfig", "Merged", "StateError", "render"]
