"""The kubeconfig: our three entries in it, and nothing else of it changed.

Where (client-go's rules, `k8s.io/client-go/tools/clientcmd`): `--file`, else the list in KUBECONFIG, else
`~/.kube/config`. An entry that exists is changed in the file that has it; new ones go to the first file of the list
that exists, else to its last name. The current context is written where one is set. In reading, the first file that
sets a value wins.

How: under the lock file that kubectl uses, on a copy that replaces the file at once. Scalars that we do not touch
keep their very spelling (see `file`); comments are lost, as kubectl loses them. Our entries carry an
extension `arcbridge.io/managed`; one of the same name without it was made by another program and is never overwritten.

The extension says which process serves the entry, at which address, and which context was the current one before ours.
Invariant: an entry whose process is gone, and whose address is still the one that we wrote, gets a credential plugin
that says what to do, or starts the background process, at the next command (`repair`).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arcbridge.client.kubeconfig.file import KubeconfigFile, Plain, dump, is_empty
from arcbridge.errors import ConfigError
from arcbridge.installation import NAME, is_there, own_path

MARK = "arcbridge.io/managed"
_DISPLACED = {
    "clusters": ("certificate-authority", "insecure-skip-tls-verify", "tls-server-name"),
    "users": (
        *("client-certificate", "client-certificate-data", "client-key", "client-key-data"),
        *("token", "tokenFile", "username", "password", "exec"),
    ),
    "contexts": (),
}
"""The sections, and the fields of an entry in them that would contradict what we write."""


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
    namespace: str = ""
    """The namespace that a kubeconfig of its own is for; empty: `default`."""


class Kubeconfig:
    """The files that kubectl would read, in its order."""

    def __init__(self, files: Iterable[str | Path]) -> None:
        self.files = [KubeconfigFile(Path(path)) for path in files]

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
        self._read()
        for section in _DISPLACED:
            self._require_ours(section, name, cluster, relays)
            self._holder(section, _named(section, name)).check_writable()

    def served(self, name: str) -> tuple[str, str]:
        """Return the process and the address of our entry of that name; empty texts where it is not ours, or names
        none."""
        self._read()
        mark = mark_of(self._context(name)) or {}
        return str(mark.get("process") or ""), str(mark.get("server") or "")

    # -- the changes --------------------------------------------------------------------------------------------------

    def merge(self, entry: Entry, *, switch: bool) -> Path:
        """Put our entries in, and make the context the current one if `switch`.

        Returns the file that has the context. Raises StateError, ConfigError.
        """
        with self._locked():
            for section in _DISPLACED:
                self._require_ours(section, entry.name, entry.cluster, entry.relays)
            holder = self._context_holder()
            self._put(entry, self._last_foreign(holder.current_context))
            path = self._holder("contexts", entry.name).path
            if switch:
                holder.current_context = entry.name
            self._save()
        return path

    def refresh(self, entry: Entry) -> bool:
        """Write our entries anew where they are all still there and ours; the current context stays.

        Returns whether they were. Raises StateError.
        """
        with self._locked():
            for section in _DISPLACED:
                name = _named(section, entry.name)
                bodies = [body for file in self.files if (body := file.find(section, name)) is not None]
                if not bodies or not all(
                    (mark := mark_of(body)) is not None
                    and _owns(mark, entry.cluster, entry.relays)
                    and not _was_edited(section, body, mark)
                    for body in bodies
                ):
                    return False
            self._put(entry, _former(mark_of(self._context(entry.name)) or {}))
            self._save()
        return True

    def undo(self, entry: Entry, *, remove: bool) -> None:
        """At the end of what served an entry, if it still does: the last context that was not ours comes back where
        this one is the current one, and the entries go out (`remove`) or say what to do."""

        def ours(mark: dict[Any, Any]) -> bool:
            return _owns(mark, entry.cluster, entry.relays) and str(mark.get("process") or "") == entry.process

        with self._locked():
            self._retire(entry.name, ours, remove=remove)
            self._save()

    def repair(self, alive: Callable[[str], bool]) -> list[str]:
        """Do so for each entry whose process ended without doing it; returns their names. Raises StateError."""
        self._read()
        if not self._dead(alive):
            return []
        with self._locked():
            dead = self._dead(alive)
            for name in dead:
                self._retire(name, lambda mark: not alive(str(mark["process"])), remove=False)
            self._save()
        return dead

    def heal(self) -> list[str]:
        """Let plugins of ours whose program is not there any more be this program; return their entries' names.

        So are those of former versions, which kubectl looks up in PATH. Raises StateError.
        """
        self._read()
        if not (path := own_path()).startswith("/") or not any(True for _ in self._lost_plugins()):
            return []
        with self._locked():
            healed = []
            for file, name, plugin, mark in self._lost_plugins():
                plugin["command"] = mark["command"] = path
                file.changed = True
                healed.append(name.removeprefix("arcbridge-"))
            self._save()
        return healed

    def _lost_plugins(self) -> Iterator[tuple[KubeconfigFile, str, dict[Any, Any], dict[Any, Any]]]:
        for file in self.files:
            for name, body in file.bodies("users"):
                mark, plugin = mark_of(body), body.get("exec")
                if mark is None or not isinstance(plugin, dict) or _was_edited("users", body, mark):
                    continue
                if (command := str(plugin.get("command"))) == NAME or not is_there(command):
                    yield file, name, plugin, mark

    def remove(self, name: str, cluster: str, relays: tuple[str, ...]) -> None:
        """Take a cluster's entries out, whatever served them."""
        with self._locked():
            self._retire(name, lambda mark: _owns(mark, cluster, relays), remove=True)
            self._save()

    def remove_all(self, ca_pem: str, *, remains: bool) -> list[str]:
        """Take all entries of ours out that are at endpoints of this CA, whatever served them, but for parts that were
        edited since; returns their names. An empty `ca_pem` is of none. `remains`: also those that name no CA, which
        no process can serve. Raises StateError."""
        with self._locked():
            names = {
                name.removeprefix("arcbridge-") if section == "users" else name
                for file in self.files
                for section in _DISPLACED
                for name, body in file.bodies(section)
                if mark_of(body) is not None
            }
            authorities = {_base64(ca_pem)} if ca_pem else set()
            names = {name for name in names if (ca := self._authority(name)) in authorities or (remains and not ca)}
            for name in sorted(names):
                self._retire(name, lambda mark: True, remove=True)
            self._save()
        return sorted(names)

    def has_ours(self) -> bool:
        """Return whether any entry is ours; raises StateError."""
        self._read()
        return any(map(_has_ours, self.files))

    def _read(self) -> None:
        for file in self.files:
            file.read()

    def _retire(self, name: str, ours: Callable[[dict[Any, Any]], bool], *, remove: bool) -> None:
        """Let the entries of `name` whose mark is `ours` no longer point at a dead port.

        They go out, or their user becomes the plugin; the context that was current before ours comes back, unless the
        plugin starts what serves this one. A part that was edited since is left alone.
        """
        found = [
            (file, section, entry_name, body, mark)
            for section in ("contexts", "users", "clusters")
            for file in self.files
            if (body := file.find(section, entry_name := _named(section, name))) is not None
            and (mark := mark_of(body)) is not None
        ]
        context = self._context(name)
        # The user may have taken the context out: then the mark of another entry says which cluster they are for.
        whole = mark_of(context) if context is not None else next((mark for *_, mark in found), None)
        if whole is None or not ours(whole):
            return
        if remove or not _texts(whole.get("arguments")):
            for file in self.files:
                if file.current_context == name:
                    file.current_context = _former(whole)
        for file, section, entry_name, body, mark in found:
            if mark.get("cluster") != whole.get("cluster"):
                continue
            if remove and not _was_edited(section, body, mark):
                file.remove(section, entry_name)
            elif not remove and mark.get("process"):
                if section == "users" and not _was_edited(section, body, mark):
                    arguments = _texts(mark.get("arguments")) or ("--cluster", str(mark["cluster"]), "--ended")
                    _fill(section, body, {"exec": _plugin(arguments)})
                    mark["command"] = body["exec"]["command"]
                mark.pop("process")  # so that an entry is retired only once
                file.changed = True

    def _dead(self, alive: Callable[[str], bool]) -> list[str]:
        """Return the names of our contexts with a client certificate whose process is gone."""
        return [
            name
            for file in self.files
            for name, body in file.bodies("contexts")
            if (mark := mark_of(body)) is not None
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
                file.holds_ours = _has_ours(file)
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

    def _authority(self, name: str) -> str:
        """Return the CA that a cluster's entry trusts, in base64; empty where it says none."""
        bodies = (body for file in self.files if (body := file.find("clusters", name)) is not None)
        return str(next(bodies, {}).get("certificate-authority-data", ""))

    def _last_foreign(self, current: str | None) -> str | None:
        """Return the current context, or the one that was before it where it is ours."""
        mark = mark_of(self._context(current)) if current is not None else None
        return current if mark is None else _former(mark)

    def _require_ours(self, section: str, name: str, cluster: str, relays: tuple[str, ...]) -> None:
        name = _named(section, name)
        for file in self.files:
            found = file.find(section, name)
            if found is None:
                continue
            mark = mark_of(found)
            if mark is None:
                raise ConfigError(
                    f"{file.path} has another entry {name!r} in {section!r}, which arcbridge did not make; "
                    "choose another name with --kube-context, or another file with --file"
                )
            if not _owns(mark, cluster, relays):
                of, at = str(mark.get("cluster", "")), _texts(mark.get("relays"))
                where = f" at relay {at[0]}" if of == cluster and at else ""
                raise ConfigError(
                    f"{file.path}: entry {name!r} in {section!r} belongs to cluster {of!r}{where}; "
                    "choose another name with --kube-context"
                )

    def _put(self, entry: Entry, former: str | None) -> None:
        """Write our entries; `former`: the last current context that was not ours."""
        for section, fields in _fields(entry).items():
            name = _named(section, entry.name)
            file = self._holder(section, name)
            body = file.entry(section, name)
            _fill(section, body, fields)
            _mark(body, entry, section, former)
            file.changed = True


def render(entry: Entry) -> str:
    """Render a kubeconfig of its own, for `--file -`."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for section, body in _fields(entry).items():
        if section == "contexts" and entry.namespace:
            body["namespace"] = entry.namespace
        _mark(body, entry, section, None)
        sections[section] = [{"name": _named(section, entry.name), section[:-1]: body}]
    return dump({"apiVersion": "v1", "kind": "Config", **sections, "current-context": entry.name, "preferences": {}})


def _named(section: str, name: str) -> str:
    """Return the name of the entry in a section that belongs to a context."""
    return f"arcbridge-{name}" if section == "users" else name


def _fields(entry: Entry) -> dict[str, dict[Any, Any]]:
    """Return what is set in the entry of each section. A namespace that the user has set stays."""
    user: dict[Any, Any] = {"exec": _plugin(entry.arguments)}
    if not entry.plugin:
        user = {
            "client-certificate-data": _base64(entry.client_certificate_pem),
            "client-key-data": _base64(entry.client_key_pem),
        }
        if entry.token_file:
            user["tokenFile"] = entry.token_file
        elif entry.token:
            user["token"] = entry.token
    return {
        "clusters": {"server": entry.server, "certificate-authority-data": _base64(entry.ca_pem)},
        "users": user,
        "contexts": {"cluster": entry.name, "user": _named("users", entry.name)},
    }


def _plugin(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Return the `exec` of a user whose credential `arcbridge credential` prints
    (client.authentication.k8s.io/v1)."""
    return {
        "apiVersion": "client.authentication.k8s.io/v1",
        # An IDE has another PATH. kuberc's allowlist looks its names up in PATH, and so takes this path as well.
        "command": own_path(),
        "args": ["credential", *arguments],
        "interactiveMode": "IfAvailable",
        # Without cluster info the plugin could not see to which port kubectl is about to connect.
        "provideClusterInfo": Plain("true"),
        "installHint": "arcbridge is not here any more: install it, and run `arcbridge status`, which puts this right",
    }


def _fill(section: str, body: dict[Any, Any], fields: dict[Any, Any]) -> None:
    """Set fields in an entry, and take out what would win over them, or contradict them."""
    for key in _DISPLACED[section]:
        if key not in fields:
            body.pop(key, None)
    body.update(fields)


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
    if "exec" in body:
        mark["command"] = body["exec"]["command"]
    extensions.append({"name": MARK, "extension": mark})


def mark_of(body: dict[Any, Any] | None) -> dict[Any, Any] | None:
    """Return what we have written about an entry; None: we did not make it, or there is none."""
    extensions = body.get("extensions") if body is not None else None
    for item in extensions if isinstance(extensions, list) else []:
        if isinstance(item, dict) and item.get("name") == MARK:
            extension = item.get("extension")
            return extension if isinstance(extension, dict) else {}
    return None


def _has_ours(file: KubeconfigFile) -> bool:
    return any(mark_of(body) is not None for section in _DISPLACED for _, body in file.bodies(section))


def _former(mark: dict[Any, Any]) -> str | None:
    return None if is_empty(mark.get("former")) else str(mark["former"])


def _owns(mark: dict[Any, Any] | None, cluster: str, relays: tuple[str, ...]) -> bool:
    """Return whether an entry is for this cluster; one that names no relay is for any."""
    if mark is None or str(mark.get("cluster", "")) != cluster:
        return False
    known = _texts(mark.get("relays"))
    return not known or not relays or bool(set(known) & set(relays))


def _was_edited(section: str, body: dict[Any, Any], mark: dict[Any, Any]) -> bool:
    """Return whether another program, or the user, has made another thing of our entry."""
    if section == "clusters":
        return bool(mark.get("server")) and str(body.get("server")) != str(mark["server"])
    if section == "users":
        plugin = body.get("exec")
        if isinstance(plugin, dict):
            return str(plugin.get("command")) != str(mark.get("command", NAME))
        return "client-certificate-data" not in body
    return False


def _texts(value: object) -> tuple[str, ...]:
    return tuple(str(one) for one in value) if isinstance(value, list) else ()


def _base64(pem: str) -> str:
    return base64.b64encode(pem.encode()).decode()
