"""One kubeconfig file: lock, read, change in memory, replace; every scalar is written as it was read.

A symbolic link is resolved and its target replaced. The mode is 0600 or stricter afterwards, because our private key
stands in the file now. The first change of a file leaves one backup beside it. Of a directory that all users share, as
/tmp is, a file or link that another user has made there is refused (docs/threats.md#W11).

PyYAML follows YAML 1.1 and would turn `2024-01-01` into a date, `0123` into 83, `1:30` into 90 and `yes` into a
boolean, each written back differently. Here no scalar is interpreted: a plain one stays plain text of the same
spelling, a quoted one stays a string that will be quoted where it must be.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from arcbridge.errors import StateError
from arcbridge.pki.private_files import OPEN_SAFELY, make_directories, refuse_planted, replace_file, sync_directory
from arcbridge.shallow_yaml import ShallowScanner
from arcbridge.units import duration

LOCK_WAIT = 3.0
"""Seconds to wait for another writer. kubectl holds its lock for milliseconds and itself never waits."""
LOCK_RETRY = 0.05
BACKUP_SUFFIX = ".before-arcbridge"
_LIMIT = 16 * 1024 * 1024


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


class Plain(str):
    """A scalar that stood without quotes, whatever it means."""

    __slots__ = ()


class _PlainLoader(ShallowScanner, _Loader):  # type: ignore[misc]  # the base is chosen at run time
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 PyYAML's own shape


class _PlainDumper(_Dumper):  # type: ignore[misc]  # the base is chosen at run time
    """PyYAML's own, with all its resolvers: they say which strings need quotes."""


def _construct(loader: Any, node: Any) -> str:
    return node.value if node.style else Plain(node.value)


def _represent(dumper: Any, value: Plain) -> Any:
    # The tag that a reader would find: then the emitter writes the text without quotes and without a tag.
    tag = dumper.resolve(yaml.ScalarNode, str(value), (True, False))
    return dumper.represent_scalar(tag, str(value))


_PlainLoader.add_constructor("tag:yaml.org,2002:str", _construct)
_PlainDumper.add_representer(Plain, _represent)


def parse(data: bytes, name: str) -> Any:
    """Return the document in `data`; None when it is empty. Raises StateError that names the line, never the
    content."""
    try:
        return yaml.load(data, Loader=_PlainLoader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        # The parser's own message quotes the file, and kubeconfigs hold keys.
        raise StateError(f"{name}{line}: not valid YAML; correct it, or choose another file with --file") from None


def dump(document: Any) -> str:
    """Write a document in block style, its order kept and long lines not folded."""
    text: str = yaml.dump(
        document, Dumper=_PlainDumper, sort_keys=False, default_flow_style=False, width=2**31 - 1, allow_unicode=True
    )
    return text


def is_empty(value: object) -> bool:
    """Return whether a value stands for nothing: absent, or any spelling of null."""
    return value is None or (isinstance(value, Plain) and value.lower() in ("", "~", "null"))


class KubeconfigFile:
    """The document of one file. `read` fills it; `save` writes it if something changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document: dict[Any, Any] = {}
        self.changed = False
        self.holds_ours = False
        """Whether the file has an entry of ours, so that it was changed by us before; set by `Kubeconfig`."""

    def exists(self) -> bool:
        return self.path.exists()

    @property
    def target(self) -> Path:
        """The file itself, behind symbolic links."""
        return Path(os.path.realpath(self.path))

    # -- lock, read, save ---------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold `<file>.lock`, as client-go does (`clientcmd/config.go`, lockFile); raises StateError if it stays.

        filelock notes in it who holds it, and breaks one of ours whose process is gone; kubectl's is empty and stays.
        """
        from filelock import SoftFileLock, Timeout  # 15 ms: only what changes the file pays for it

        refuse_planted(self.path)
        lock = self.path.with_name(self.path.name + ".lock")
        try:
            make_directories(self.path.parent, 0o755)
            held = SoftFileLock(str(lock), timeout=LOCK_WAIT, mode=0o600, poll_interval=LOCK_RETRY)
            held.acquire()
        except Timeout:
            raise StateError(
                f"{self.path} is locked: {lock} exists for {_age(lock)}; "
                "if no kubectl is running, a crashed one left it: remove it"
            ) from None
        except OSError as error:
            raise StateError(f"cannot lock {self.path}: {error.strerror}; choose another file with --file") from error
        try:
            yield
        finally:
            held.release()

    def read(self) -> None:
        """Load the file; an absent or empty one is an empty document. Raises StateError."""
        self.changed = False
        self.document = {}
        refuse_planted(self.path)
        try:
            with self.path.open("rb") as file:
                data = file.read(_LIMIT + 1)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StateError(f"cannot read {self.path}: {error.strerror}") from error
        if len(data) > _LIMIT:
            raise StateError(f"{self.path} is larger than {_LIMIT} bytes: not a kubeconfig")
        document = parse(data, str(self.path))
        if is_empty(document):
            return
        if not isinstance(document, dict):
            raise StateError(f"{self.path}: not a kubeconfig; choose another file with --file")
        self.document = document
        for section in ("clusters", "users", "contexts"):
            self._list(section)

    def save(self) -> None:
        """Replace the file, if something changed; raises StateError."""
        if not self.changed:
            return
        if not self.document.get("apiVersion"):
            self.document = {"apiVersion": "v1", "kind": "Config", **self.document}
        try:
            data = dump(self.document).encode()
        except RecursionError:
            raise StateError(f"{self.path} is nested too deeply: not a kubeconfig") from None
        target = self.target
        try:
            mode = 0o600
            if target.exists():
                mode = os.stat(target).st_mode & 0o700 or 0o600
                if not self.holds_ours:  # a copy would keep our key, and a token, for longer than the file does
                    self._back_up(target, mode)
            _replace(target, data, mode)
        except OSError as error:
            raise StateError(f"cannot write {self.path}: {error.strerror}; choose another file with --file") from error
        self.changed = False

    def check_writable(self) -> None:
        """Raise StateError if `save` could not work; nothing is changed."""
        refuse_planted(self.path)
        target = self.target
        place = target
        while not place.exists():
            place = place.parent
        if not os.access(place, os.W_OK):
            raise StateError(f"cannot write {self.path}: {place} cannot be written to; choose another file with --file")

    def _back_up(self, target: Path, mode: int) -> None:
        backup = target.with_name(target.name + BACKUP_SUFFIX)
        try:
            descriptor = os.open(backup, os.O_CREAT | os.O_EXCL | os.O_WRONLY | OPEN_SAFELY, mode)
        except OSError:
            return  # there is a backup, or the directory takes no new file; the change goes on without
        with os.fdopen(descriptor, "wb") as file:
            file.write(target.read_bytes())

    # -- content ------------------------------------------------------------------------------------------------------

    @property
    def current_context(self) -> str | None:
        value = self.document.get("current-context")
        return None if is_empty(value) or value == "" else str(value)

    @current_context.setter
    def current_context(self, name: str | None) -> None:
        if name == self.current_context:
            return
        self.changed = True
        if name is None:
            self.document.pop("current-context", None)
        else:
            self.document["current-context"] = name

    def find(self, section: str, name: str) -> dict[Any, Any] | None:
        """Return the body of an entry, or None."""
        item = self._item(section, name)
        if item is None:
            return None
        body = item.get(section[:-1])
        return body if isinstance(body, dict) else {}

    def entry(self, section: str, name: str) -> dict[Any, Any]:
        """Return the body of an entry, made if it is missing; to be changed in place."""
        item = self._item(section, name)
        if item is None:
            item = {"name": name}
            self.document[section] = [*self._list(section), item]
        if not isinstance(item.get(section[:-1]), dict):
            item[section[:-1]] = {}
        body: dict[Any, Any] = item[section[:-1]]
        return body

    def remove(self, section: str, name: str) -> None:
        """Take an entry out."""
        if self._item(section, name) is not None:
            self.document[section] = [
                item for item in self._list(section) if not (isinstance(item, dict) and item.get("name") == name)
            ]
            self.changed = True

    def bodies(self, section: str) -> list[tuple[str, dict[Any, Any]]]:
        """Return the names and bodies of all entries."""
        return [
            (str(item.get("name")), item[section[:-1]])
            for item in self._list(section)
            if isinstance(item, dict) and isinstance(item.get(section[:-1]), dict)
        ]

    def _item(self, section: str, name: str) -> dict[Any, Any] | None:
        return next((item for item in self._list(section) if isinstance(item, dict) and item.get("name") == name), None)

    def _list(self, section: str) -> list[Any]:
        value = self.document.get(section)
        if is_empty(value):
            return []
        if not isinstance(value, list):
            raise StateError(f"{self.path}: {section!r} is not a list: not a kubeconfig; choose another with --file")
        return value


def _replace(target: Path, data: bytes, mode: int) -> None:
    """Write beside and rename; in place where a file cannot be replaced (a bind mount), or made beside."""
    try:
        try:
            replace_file(target, data, mode, give=True)  # `sudo -E` is not to take the file from its user
        except PermissionError:
            replace_file(target, data, mode)  # root without that right, as in a container
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EXDEV, errno.EACCES, errno.EROFS, errno.EPERM) or not target.exists():
            raise
        _write_in_place(target, data, mode)
        return
    with suppress(OSError):  # it was replaced, and some file systems and directories cannot be synced
        sync_directory(target.parent)


def _write_in_place(target: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(target, os.O_WRONLY | OPEN_SAFELY)
    with os.fdopen(descriptor, "wb") as file:
        # The mode first: the key must not be readable for a moment.
        if sys.platform != "win32" and os.fstat(file.fileno()).st_mode & 0o077:
            os.fchmod(file.fileno(), mode)
        file.write(data)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())


def _age(lock: Path) -> str:
    try:
        seconds = time.time() - lock.stat().st_mtime
    except OSError:
        return "a moment"
    return duration(seconds)
