"""The registry of a relay that stands alone: one SQLite file in its data directory.

The file may be open in several processes: the relay's workers, and an operator's `token create` beside them. WAL
lets readers go on while one writes; every change is one `BEGIN IMMEDIATE` transaction, so the second of two writers
waits (up to the busy timeout) instead of working on a stale view.

SQLite blocks, so all of it happens in one thread that belongs to this object; the event loop never waits for a
disk. Two connections live in that thread: one with `synchronous=FULL`, because a token that was consumed and a
cluster that was revoked must still be so after a power cut, and one with `NORMAL` for `seen`, which agents cause many
times a minute and whose loss costs nothing.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from arcbridge.errors import EnrolmentRefused, StateError
from arcbridge.observe.untrusted_text import printable
from arcbridge.pki.enrolment import JoinToken
from arcbridge.pki.names import check_cluster_name
from arcbridge.pki.pins import pin_of
from arcbridge.pki.private_files import ensure_private_directory, locked, make_private
from arcbridge.relay.registry import base, generations
from arcbridge.relay.registry.base import (
    AccessChange,
    ClusterRecord,
    JoinTokenRecord,
    Recovery,
    Registry,
    RegistrySnapshot,
    RegistryUnavailable,
    UserRevocation,
)
from arcbridge.relay.registry.generations import RenewedTwice, ShownCertificate

T = TypeVar("T")

DATABASE_FILE = "registry.db"

BUSY_TIMEOUT = 5.0
"""Seconds that a transaction waits for another process's. Ours take milliseconds; longer means something is stuck,
and callers are better told so than kept."""

MAX_PENDING = 2000
"""Calls that wait for the thread. At tens of microseconds each this is far more than a healthy disk lets gather."""

_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_LOCKED_WORDS = "the registry is locked by another process: try again in a moment"

_APPLICATION_ID = 0x61726362  # "arcb": tells our files from other SQLite files

_CLUSTERS_AND_TOKENS = (
    """CREATE TABLE clusters (
        name TEXT PRIMARY KEY, ca_pem TEXT NOT NULL, ca_pin TEXT NOT NULL, created REAL NOT NULL,
        last_seen REAL NOT NULL DEFAULT 0, certificate_expires REAL NOT NULL DEFAULT 0,
        version TEXT NOT NULL DEFAULT '', labels TEXT NOT NULL DEFAULT '{}', revoked REAL NOT NULL DEFAULT 0,
        valid_since REAL NOT NULL DEFAULT 0
    )""",
    """CREATE TABLE join_tokens (
        id TEXT PRIMARY KEY, secret_hash TEXT NOT NULL, cluster TEXT NOT NULL, uses INTEGER NOT NULL,
        used INTEGER NOT NULL DEFAULT 0 CHECK (used <= uses), created REAL NOT NULL, expires_at REAL NOT NULL,
        rebind INTEGER NOT NULL DEFAULT 0
    )""",
    """CREATE TABLE redemptions (
        token_id TEXT NOT NULL REFERENCES join_tokens (id) ON DELETE CASCADE, key_hash TEXT NOT NULL,
        at REAL NOT NULL, PRIMARY KEY (token_id, key_hash)
    )""",
    "CREATE INDEX clusters_revoked ON clusters (name) WHERE revoked > 0",
)
_REVOKED_USERS = (
    """CREATE TABLE revoked_users (
        user TEXT PRIMARY KEY, before INTEGER NOT NULL, reason TEXT NOT NULL, revoked REAL NOT NULL
    )""",
)
_GENERATIONS_AND_UNKNOWN_CLUSTERS = (
    "ALTER TABLE clusters ADD COLUMN keys TEXT NOT NULL DEFAULT '{}'",
    "CREATE TABLE revoked_names (name TEXT PRIMARY KEY, revoked REAL NOT NULL)",
)
_RECOVERY = (
    "CREATE TABLE taken_back (kind TEXT NOT NULL, name TEXT NOT NULL, at REAL NOT NULL, PRIMARY KEY (kind, name))",
    "CREATE TABLE recovery (state TEXT NOT NULL)",
)
_SUCCESSIONS = ("ALTER TABLE clusters ADD COLUMN cas TEXT NOT NULL DEFAULT ''",)
_STEPS = (_CLUSTERS_AND_TOKENS, _REVOKED_USERS, _GENERATIONS_AND_UNKNOWN_CLUSTERS, _RECOVERY, _SUCCESSIONS)
"""The steps from an empty file to the schema: number n leads from version n - 1 to version n. Each is final."""

SCHEMA_VERSION = len(_STEPS)

_CLUSTER_COLUMNS = (
    "name, ca_pem, ca_pin, created, last_seen, certificate_expires, version, revoked, valid_since, keys, cas"
)
_TOKEN_COLUMNS = "id, cluster, uses, used, created, expires_at, rebind"
_USER_COLUMNS = "user, before, reason, revoked"


class SqliteRegistry(Registry):
    """See the module's docstring; made by `open`."""

    def __init__(
        self, path: Path, *, clock: Callable[[], float] = time.time, busy_timeout: float = BUSY_TIMEOUT
    ) -> None:
        self.path = path
        self._clock = clock
        self._busy_timeout = busy_timeout
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="registry")
        self._pending = 0
        self._closed = False
        # Both are made, used and closed in the thread only.
        self._durable: sqlite3.Connection
        self._quick: sqlite3.Connection

    @classmethod
    async def open(
        cls, directory: Path, *, clock: Callable[[], float] = time.time, busy_timeout: float = BUSY_TIMEOUT
    ) -> SqliteRegistry:
        """Open `registry.db` in `directory`, made if it is missing (0600).

        Raises `StateError` when it is no registry, damaged, or made by a newer arcbridge, and `RegistryUnavailable`.
        """
        registry = cls(directory / DATABASE_FILE, clock=clock, busy_timeout=busy_timeout)
        try:
            await registry._run(registry._open)
        except BaseException:
            registry._closed = True
            registry._thread.shutdown(wait=False)
            raise
        return registry

    async def close(self) -> None:
        if not self._closed:
            closing = asyncio.get_running_loop().run_in_executor(self._thread, self._close)
            self._closed = True
            self._thread.shutdown(wait=False)
            await closing

    # Join tokens.

    async def create_join_token(self, cluster: str, *, uses: int = 1, expires_at: float, rebind: bool = False) -> str:
        now = self._clock()
        base.check_join_token(cluster, uses, expires_at, now, rebind=rebind)
        token = JoinToken.create()

        def insert(database: sqlite3.Connection) -> None:
            database.execute("DELETE FROM join_tokens WHERE expires_at < ?", (now - base.KEEP_EXPIRED,))
            database.execute(
                "INSERT INTO join_tokens (id, secret_hash, cluster, uses, created, expires_at, rebind)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (token.id, token.secret_hash, cluster, uses, now, expires_at, int(rebind)),
            )

        await self._write(insert)
        return token.text

    async def list_join_tokens(self) -> list[JoinTokenRecord]:
        rows = await self._select(f"SELECT {_TOKEN_COLUMNS} FROM join_tokens ORDER BY created, id")
        return [JoinTokenRecord(**_fields(_TOKEN_COLUMNS, row) | {"rebind": bool(row[-1])}) for row in rows]

    async def delete_join_token(self, token_id: str) -> bool:
        return await self._change("DELETE FROM join_tokens WHERE id = ?", (token_id,))

    async def redeem_join_token(self, text: str, key_hash: str, cluster_ca_pem: str) -> ClusterRecord:
        token = JoinToken.parse(text)
        pin = pin_of(cluster_ca_pem)

        def redeem(database: sqlite3.Connection) -> ClusterRecord:
            now = self._clock()
            cluster, rebind, repeated = _consume(database, token, key_hash, now)
            self._bind(database, cluster, cluster_ca_pem, pin, now, rebind=rebind)
            keys = generations.enrolled(_keys(database, cluster), key_hash, now, repeated=repeated)
            _keep_keys(database, cluster, keys)
            return _cluster(
                database.execute(f"SELECT {_CLUSTER_COLUMNS} FROM clusters WHERE name = ?", (cluster,)).fetchone()
            )

        return await self._write(redeem)

    async def check_join_token(self, text: str) -> str:
        token = JoinToken.parse(text)

        def look() -> str:
            cluster, _, reason = _known_token(self._durable, token, self._clock())
            if reason:
                raise EnrolmentRefused(reason)
            return cluster

        return await self._run(look)

    def _bind(
        self, database: sqlite3.Connection, cluster: str, ca_pem: str, pin: str, now: float, *, rebind: bool
    ) -> None:
        """Bind the cluster's name to its CA, or check that it is bound to this one; in the caller's transaction."""
        row = database.execute("SELECT ca_pin, cas, revoked FROM clusters WHERE name = ?", (cluster,)).fetchone()
        if row is None:
            if database.execute("SELECT 1 FROM revoked_names WHERE name = ?", (cluster,)).fetchone():
                raise EnrolmentRefused(base.REVOKED)
            database.execute(
                "INSERT INTO clusters (name, ca_pem, ca_pin, created) VALUES (?, ?, ?, ?)", (cluster, ca_pem, pin, now)
            )
            return
        known_pin, cas, revoked = row
        same = base.is_bound_to(known_pin, cas, pin)
        if revoked:
            raise EnrolmentRefused(base.REVOKED)
        if not rebind and not same:
            raise EnrolmentRefused(base.foreign_ca(known_pin, pin))
        # Also when the pin is the same: the CA's certificate may have been made again over its key.
        database.execute("UPDATE clusters SET ca_pem = ?, ca_pin = ? WHERE name = ?", (ca_pem, pin, cluster))
        if not same:
            database.execute("UPDATE clusters SET valid_since = ?, cas = '' WHERE name = ?", (now, cluster))

    # Clusters.

    async def cluster(self, name: str) -> ClusterRecord | None:
        check_cluster_name(name)

        rows = await self._select(f"SELECT {_CLUSTER_COLUMNS} FROM clusters WHERE name = ?", (name,))
        return _cluster(rows[0]) if rows else None

    async def adopt(self, name: str, ca_pem: str, when: float) -> bool:
        check_cluster_name(name)
        return await self._change(
            "INSERT INTO clusters (name, ca_pem, ca_pin, created) SELECT ?, ?, ?, ?"
            " WHERE NOT EXISTS (SELECT 1 FROM revoked_names WHERE name = ?) ON CONFLICT (name) DO NOTHING",
            (name, ca_pem, pin_of(ca_pem), when, name),
        )

    async def succeed(self, known: ClusterRecord, ca_pem: str, cas: str) -> bool:
        return await self._change(
            "UPDATE clusters SET ca_pem = ?, ca_pin = ?, cas = ? WHERE name = ? AND ca_pin = ? AND cas = ?",
            (ca_pem, pin_of(ca_pem), cas, known.name, known.ca_pin, known.cas),
        )

    async def clusters(self) -> list[ClusterRecord]:
        return [_cluster(row) for row in await self._select(f"SELECT {_CLUSTER_COLUMNS} FROM clusters ORDER BY name")]

    async def certificate_issued(self, name: str, expires_at: float) -> None:
        check_cluster_name(name)
        await self._change(
            "UPDATE clusters SET certificate_expires = max(certificate_expires, ?) WHERE name = ?", (expires_at, name)
        )

    async def seen(self, name: str, when: float, *, version: str | None = None) -> None:
        check_cluster_name(name)
        version = None if version is None else printable(version, base.MAX_VERSION)

        def update(database: sqlite3.Connection) -> None:
            database.execute(
                "UPDATE clusters SET last_seen = max(last_seen, ?), version = coalesce(?, version) WHERE name = ?",
                (when, version, name),
            )

        await self._write(update, quick=True)

    async def renew(self, name: str, shown: ShownCertificate, request: str) -> int:
        check_cluster_name(name)

        def renew(database: sqlite3.Connection) -> int:
            now = self._clock()
            row = database.execute("SELECT revoked FROM clusters WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise EnrolmentRefused(base.NOT_ENROLLED)
            if row[0]:
                raise EnrolmentRefused(base.REVOKED)
            renewal = generations.renewed(_keys(database, name), shown, request, now)
            _keep_keys(database, name, renewal.keys)
            if not renewal.generation:
                at = _after_taking_back(database, "cluster", name, self._clock())
                database.execute("UPDATE clusters SET revoked = ? WHERE name = ?", (at, name))
            return renewal.generation

        generation = await self._write(renew)
        if not generation:
            raise RenewedTwice
        return generation

    async def revoke_cluster(self, name: str) -> bool:
        check_cluster_name(name)

        def revoke(database: sqlite3.Connection) -> bool:
            # The time of the first revocation stays.
            at = _after_taking_back(database, "cluster", name, self._clock())
            known = database.execute(
                "UPDATE clusters SET revoked = CASE WHEN revoked > 0 THEN revoked ELSE ? END WHERE name = ?", (at, name)
            ).rowcount
            if not known:
                database.execute("INSERT OR IGNORE INTO revoked_names VALUES (?, ?)", (name, at))
            return known > 0

        return await self._write(revoke)

    async def unrevoke_cluster(self, name: str) -> bool:
        return await self._take_back("UPDATE clusters SET revoked = 0 WHERE name = ?", name)

    async def delete_cluster(self, name: str) -> bool:
        return await self._take_back("DELETE FROM clusters WHERE name = ?", name)

    async def _take_back(self, statement: str, name: str) -> bool:
        """Run a statement on a cluster, and forget that its name was revoked; return whether either was known."""
        check_cluster_name(name)

        def change(database: sqlite3.Connection) -> bool:
            back = _take_revocation_back(database, "cluster", name, self._clock())
            return database.execute(statement, (name,)).rowcount > 0 or back

        return await self._write(change)

    async def revocations(self) -> frozenset[str]:
        rows = await self._select("SELECT name FROM clusters WHERE revoked > 0 UNION SELECT name FROM revoked_names")
        return frozenset(name for (name,) in rows)

    # Users.

    async def revoke_user(self, user: str, before: int, reason: str = "") -> UserRevocation:
        base.check_revocation(user, before, reason)

        def revoke(database: sqlite3.Connection) -> UserRevocation:
            now = self._clock()
            at = _after_taking_back(database, "user", user, self._clock())
            known = _users(database)
            former = known.pop(user, None)
            at = base.later(at, None if former is None else former.revoked)
            record = base.added(former, UserRevocation(user, before, reason, at))
            if len(known) >= base.MAX_REVOKED_USERS:
                old = [entry.user for entry in known.values() if base.may_go(entry, now)]
                if not old:
                    raise base.full()
                database.executemany("DELETE FROM revoked_users WHERE user = ?", [(one,) for one in old])
            database.execute(
                f"INSERT OR REPLACE INTO revoked_users ({_USER_COLUMNS}) VALUES (?, ?, ?, ?)",
                (record.user, record.before, record.reason, record.revoked),
            )
            return record

        return await self._write(revoke)

    async def restore_user(self, user: str) -> bool:
        base.check_user(user)
        return await self._write(lambda database: _take_revocation_back(database, "user", user, self._clock()))

    async def user_revocations(self) -> Mapping[str, UserRevocation]:
        return await self._run(lambda: _users(self._durable))

    # What outlives the registry.

    async def access_changes(self) -> list[AccessChange]:
        return await self._run(lambda: list(_access_changes(self._durable).values()))

    async def merge(self, changes: Iterable[AccessChange]) -> list[AccessChange]:
        return await self._write(lambda database: _merge(database, changes, self._clock()))

    async def recovery(self) -> Recovery | None:
        return await self._run(lambda: _recovery(self._durable))

    async def change_recovery(self, change: Callable[[Recovery | None], Recovery | None]) -> Recovery | None:
        def keep(database: sqlite3.Connection) -> Recovery | None:
            was = _recovery(database)
            now = change(was)
            if now != was:
                database.execute("DELETE FROM recovery")
                if now is not None:
                    database.execute("INSERT INTO recovery VALUES (?)", (json.dumps(asdict(now)),))
            return now

        return await self._write(keep)

    async def snapshot(self) -> RegistrySnapshot:
        def copy() -> RegistrySnapshot:
            with closing(sqlite3.connect(":memory:")) as memory:
                self._durable.backup(memory)
                data = bytearray(memory.serialize())
            # Not in WAL mode, which a database in memory cannot have: the versions of the file's format, as SQLite
            # documents them (https://www.sqlite.org/fileformat.html, 1.3.3).
            data[18:20] = b"\x01\x01"
            return RegistrySnapshot("sqlite", SCHEMA_VERSION, bytes(data))

        return await self._run(copy)

    async def replace(self, data: bytes, recovery: Recovery, former: Iterable[AccessChange] = ()) -> list[AccessChange]:
        def replace() -> list[AccessChange]:
            with closing(sqlite3.connect(":memory:", isolation_level=None)) as memory:
                try:
                    memory.deserialize(data)
                    (state,) = memory.execute("PRAGMA quick_check(1)").fetchone()
                except (sqlite3.DatabaseError, MemoryError) as error:  # the latter where there is nothing
                    raise StateError("the registry in the backup is damaged, or none") from error
                version = _check_file(memory, "the registry in the backup")
                if state != "ok" or not version:
                    raise StateError("the registry in the backup is damaged, or none")
                self._bring_up_to_date(memory, version)
                memory.execute("DELETE FROM join_tokens")
                memory.execute("DELETE FROM redemptions")
                memory.execute("DELETE FROM recovery")
                with self._transaction(memory):
                    news = _merge(memory, former, self._clock())
                names = tuple(name for (name,) in memory.execute("SELECT name FROM clusters WHERE revoked = 0"))
                state = json.dumps(asdict(dataclasses.replace(recovery, awaited=names)))
                memory.execute("INSERT INTO recovery VALUES (?)", (state,))
                # One transaction of the registry's file.
                memory.backup(self._durable, progress=_in_time(self._busy_timeout))
                return news

        return await self._run(replace)

    # The thread.

    async def _run(self, action: Callable[[], T]) -> T:
        """Run `action` in the thread and turn SQLite's errors into ours."""
        if self._closed:
            raise RegistryUnavailable("the registry is closed: the relay is stopping")
        if self._pending >= MAX_PENDING:
            raise RegistryUnavailable("the registry is overloaded: try again later")
        self._pending += 1
        future = asyncio.get_running_loop().run_in_executor(self._thread, action)
        # Counted when the thread is done with it, which a cancelled caller does not wait for.
        future.add_done_callback(self._finished)
        try:
            return await asyncio.shield(future)
        except sqlite3.Error as error:
            raise _translated(error, self.path) from error

    def _finished(self, future: asyncio.Future[T]) -> None:
        self._pending -= 1
        if not future.cancelled():
            future.exception()  # seen here too, for callers that were cancelled

    async def _select(self, statement: str, values: tuple[object, ...] = ()) -> list[Any]:
        """Return the rows that a statement finds."""
        return await self._run(lambda: self._durable.execute(statement, values).fetchall())

    async def _write(self, change: Callable[[sqlite3.Connection], T], *, quick: bool = False) -> T:
        """Run `change` in a transaction in the thread; one that is quick may be lost with the machine's power."""

        def write() -> T:
            with self._transaction(self._quick if quick else self._durable) as database:
                return change(database)

        return await self._run(write)

    async def _change(self, statement: str, values: tuple[object, ...]) -> bool:
        """Run one statement in a durable transaction; whether it met a row."""
        return await self._write(lambda database: database.execute(statement, values).rowcount > 0)

    @contextmanager
    def _transaction(self, database: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
        # IMMEDIATE: take the write lock before the first read, or two processes decide on the same old row.
        database.execute("BEGIN IMMEDIATE")
        try:
            yield database
            database.execute("COMMIT")
        except BaseException:
            # A full disk may have rolled back already; a second rollback would hide the first error.
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise

    def _open(self) -> None:
        ensure_private_directory(self.path.parent)
        # One process at a time: switching to WAL does not wait for a lock, it fails.
        with locked(self.path.with_name(f".{self.path.name}.lock")):
            # SQLite would make it with the umask's mode; its -wal and -shm take mode and owner of this file.
            make_private(self.path)
            self._durable = _connect(self.path, self._busy_timeout)
            try:
                version = _check_file(self._durable, str(self.path))
                _set_up(self._durable, "FULL")
                self._bring_up_to_date(self._durable, version)
                self._quick = _connect(self.path, self._busy_timeout)
                _set_up(self._quick, "NORMAL")
            except BaseException:
                self._durable.close()
                raise

    def _bring_up_to_date(self, database: sqlite3.Connection, version: int) -> None:
        """Take the steps that a file of this version lacks: all of them or none."""
        if version == SCHEMA_VERSION:
            return
        with self._transaction(database):
            for step in _STEPS[version:]:
                for statement in step:
                    database.execute(statement)
            database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _close(self) -> None:
        self._quick.close()
        self._durable.close()


def _connect(path: Path, busy_timeout: float) -> sqlite3.Connection:
    # isolation_level None: the sqlite3 module begins no transactions of its own.
    return sqlite3.connect(path, timeout=busy_timeout, isolation_level=None)


def _consume(database: sqlite3.Connection, token: JoinToken, key_hash: str, now: float) -> tuple[str, bool, bool]:
    """Use the token once more; in the caller's transaction. Return its cluster, whether it may rebind, and whether
    this key has used it before."""
    cluster, rebind, reason = _known_token(database, token, now)
    again = database.execute(
        "SELECT at FROM redemptions WHERE token_id = ? AND key_hash = ?", (token.id, key_hash)
    ).fetchone()
    # `abs`: after the wall clock was set back, "earlier" is no longer a reason to trust a redemption for ever.
    if again is not None and abs(now - again[0]) <= base.REDEEM_AGAIN:
        return cluster, rebind, True
    if reason:
        raise EnrolmentRefused(reason)
    database.execute("UPDATE join_tokens SET used = used + 1 WHERE id = ?", (token.id,))
    database.execute(
        "INSERT INTO redemptions (token_id, key_hash, at) VALUES (?, ?, ?)"
        " ON CONFLICT (token_id, key_hash) DO UPDATE SET at = excluded.at",
        (token.id, key_hash, now),
    )
    return cluster, rebind, False


def _known_token(database: sqlite3.Connection, token: JoinToken, now: float) -> tuple[str, bool, str]:
    """Return a join token's cluster, whether it may rebind, and why it cannot be used any more by another key.

    Raises `EnrolmentRefused`: an unknown id costs the same comparison as a wrong secret, and gets the same answer.
    """
    row = database.execute(
        "SELECT secret_hash, cluster, uses, used, expires_at, rebind FROM join_tokens WHERE id = ?", (token.id,)
    ).fetchone()
    secret_hash, cluster, uses, used, expires_at, rebind = row if row is not None else ("0" * 64, "", 0, 0, 0.0, 0)
    if not token.matches(secret_hash) or row is None:
        raise EnrolmentRefused(base.UNKNOWN_TOKEN)
    return str(cluster), bool(rebind), base.spent(used, uses, expires_at, now)


def _keys(database: sqlite3.Connection, cluster: str) -> generations.Keys:
    row = database.execute("SELECT keys FROM clusters WHERE name = ?", (cluster,)).fetchone()
    return generations.from_json(json.loads(row[0]))


def _keep_keys(database: sqlite3.Connection, cluster: str, keys: generations.Keys) -> None:
    database.execute("UPDATE clusters SET keys = ? WHERE name = ?", (json.dumps(generations.to_json(keys)), cluster))


def _cluster(row: tuple[Any, ...]) -> ClusterRecord:
    fields = _fields(_CLUSTER_COLUMNS, row)
    keys = generations.from_json(json.loads(fields["keys"]))
    return ClusterRecord(**fields | {"keys": keys})


def _fields(columns: str, row: tuple[Any, ...]) -> dict[str, Any]:
    """Return a row by the names of its columns, which are those of the record's fields."""
    return dict(zip(columns.split(", "), row, strict=True))


def _users(database: sqlite3.Connection) -> dict[str, UserRevocation]:
    rows = database.execute(f"SELECT {_USER_COLUMNS} FROM revoked_users ORDER BY user").fetchall()
    return {row[0]: UserRevocation(*row) for row in rows}


def _check_file(database: sqlite3.Connection, name: str) -> int:
    """Return the schema's version, 0 for an empty file; a foreign file raises `StateError` before anything is
    written."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    (application,) = database.execute("PRAGMA application_id").fetchone()
    (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application != _APPLICATION_ID and (application or version or tables):
        raise StateError(f"{name} is not a registry of arcbridge: move it away or set another data_dir")
    if version > SCHEMA_VERSION:
        raise StateError(
            f"{name} was made by a newer arcbridge (schema {version}, this one knows {SCHEMA_VERSION}): "
            "install that version again, or restore a backup from before the upgrade"
        )
    return int(version)


def _set_up(database: sqlite3.Connection, synchronous: str) -> None:
    database.execute("PRAGMA journal_mode = WAL")
    database.execute(f"PRAGMA synchronous = {synchronous}")
    database.execute("PRAGMA foreign_keys = ON")
    database.execute("PRAGMA trusted_schema = OFF")


def _after_taking_back(database: sqlite3.Connection, kind: str, name: str, now: float) -> float:
    """Forget that a revocation was taken back, for there is another one; return the time of that."""
    row = database.execute("SELECT at FROM taken_back WHERE kind = ? AND name = ?", (kind, name)).fetchone()
    database.execute("DELETE FROM taken_back WHERE kind = ? AND name = ?", (kind, name))
    return base.later(now, None if row is None else row[0])


def _take_revocation_back(database: sqlite3.Connection, kind: str, name: str, now: float) -> bool:
    """Take the revocation that is in force back, and remember it; return whether there was one."""
    known = _access_changes(database).get((kind, name))
    if known is None or not known.before:
        return False
    _put(database, AccessChange(known.kind, name, base.later(now, known.at)))
    return True


def _access_changes(database: sqlite3.Connection) -> dict[tuple[str, str], AccessChange]:
    rows = database.execute(
        "SELECT 'user', user, revoked, before, reason FROM revoked_users"
        " UNION ALL SELECT 'cluster', name, revoked, 1, '' FROM clusters WHERE revoked > 0"
        " UNION ALL SELECT 'cluster', name, revoked, 1, '' FROM revoked_names"
        " UNION ALL SELECT kind, name, at, 0, '' FROM taken_back"
    )
    return {(row[0], row[1]): AccessChange(*row) for row in rows}


def _merge(database: sqlite3.Connection, changes: Iterable[AccessChange], now: float) -> list[AccessChange]:
    """Put what is news of these changes in force, in the caller's transaction, and return it."""
    news = base.news_of(_access_changes(database), changes, now)
    for change in news:
        _put(database, change)
    return news


def _recovery(database: sqlite3.Connection) -> Recovery | None:
    row = database.execute("SELECT state FROM recovery").fetchone()
    return None if row is None else base.recovery_of(json.loads(row[0]))


def _put(database: sqlite3.Connection, change: AccessChange) -> None:
    """Put a change in force, in the caller's transaction."""
    kind, name, at, before, reason = change
    if kind == "user":
        database.execute("DELETE FROM revoked_users WHERE user = ?", (name,))
        if before:
            database.execute(f"INSERT INTO revoked_users ({_USER_COLUMNS}) VALUES (?, ?, ?, ?)",
                             (name, before, reason, at))  # fmt: skip
    else:
        database.execute("DELETE FROM revoked_names WHERE name = ?", (name,))
        known = database.execute("UPDATE clusters SET revoked = ? WHERE name = ?", (at if before else 0, name)).rowcount
        if before and not known:
            database.execute("INSERT INTO revoked_names VALUES (?, ?)", (name, at))
    database.execute("DELETE FROM taken_back WHERE kind = ? AND name = ?", (kind, name))
    if not before:
        database.execute("INSERT INTO taken_back VALUES (?, ?, ?)", (kind, name, at))
        database.execute("DELETE FROM taken_back WHERE rowid IN (SELECT rowid FROM taken_back ORDER BY at DESC"
                         " LIMIT -1 OFFSET ?)", (base.MAX_TAKEN_BACK,))  # fmt: skip


def _in_time(seconds: float) -> Callable[[int, int, int], None]:
    """Return what ends a copy to a file that another process holds locked; it would try again without an end."""
    until = time.monotonic() + seconds

    def look(state: int, left: int, total: int) -> None:
        if state in _LOCKED and time.monotonic() >= until:
            raise RegistryUnavailable(_LOCKED_WORDS)

    return look


def _translated(error: sqlite3.Error, path: Path) -> RegistryUnavailable | StateError:
    """Ours for SQLite's. The message never holds SQLite's own, which may quote values; that one is the cause."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in _LOCKED:
        return RegistryUnavailable(_LOCKED_WORDS)
    if code == sqlite3.SQLITE_FULL:
        return RegistryUnavailable("the registry's disk is full: make room on the relay", retry_after=60)
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR):
        return RegistryUnavailable("the registry's files cannot be written: look at the relay's disk", retry_after=60)
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StateError(f"{path} is damaged or not a registry: restore it from a backup")
    return RegistryUnavailable("the registry failed: the relay's log has the cause", retry_after=60)
