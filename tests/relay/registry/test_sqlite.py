import asyncio
import json
import multiprocessing
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from arcbridge.errors import EnrolmentRefused, StateError
from arcbridge.relay.registry import sqlite
from arcbridge.relay.registry.base import ClusterRecord, JoinTokenRecord, Recovery, Registry, RegistryUnavailable
from arcbridge.relay.registry.sqlite import SCHEMA_VERSION, SqliteRegistry
from tests.support.clock import Clock

from .conformance import HOUR, KEY_A, Opener, RegistryConformance, cluster_ca


@pytest.fixture
def clock() -> Clock:
    return Clock(1_800_000_000.0)


class TestSqlite(RegistryConformance):
    @pytest.fixture
    async def open_registry(self, clock: Clock, tmp_path: Path) -> AsyncIterator[Opener]:
        opened: list[Registry] = []

        async def open_one() -> Registry:
            opened.append(await SqliteRegistry.open(tmp_path / "data", clock=clock, busy_timeout=30))
            return opened[-1]

        yield open_one
        for registry in opened:
            await registry.close()


def _redeem_many(directory: Path, token: str, pem: str, first: int, barrier, results) -> None:
    async def main() -> int:
        registry = await SqliteRegistry.open(directory, clock=Clock(1_800_000_000.0), busy_timeout=30)
        try:
            barrier.wait()
            attempts = [registry.redeem_join_token(token, f"{n:064x}", pem) for n in range(first, first + 25)]
            outcomes = await asyncio.gather(*attempts, return_exceptions=True)
            assert all(not isinstance(o, BaseException) or "used up" in str(o) for o in outcomes), outcomes
            return sum(not isinstance(outcome, BaseException) for outcome in outcomes)
        finally:
            await registry.close()

    results.put(asyncio.run(main()))


@pytest.mark.parametrize("uses", [1, 7])
async def test_two_processes_on_one_file(tmp_path: Path, clock: Clock, uses: int) -> None:
    """docs/threats.md#E1 over processes: 50 redeems, 25 in each."""
    registry = await SqliteRegistry.open(tmp_path, clock=clock)
    token = await registry.create_join_token("prod", uses=uses, expires_at=clock.now + HOUR)
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.Queue()
    pem = cluster_ca().certificate_pem
    workers = [
        spawn.Process(target=_redeem_many, args=(tmp_path, token, pem, first, barrier, results)) for first in (0, 25)
    ]
    for worker in workers:
        worker.start()
    won = [await asyncio.to_thread(results.get, timeout=60) for _ in workers]
    for worker in workers:
        await asyncio.to_thread(worker.join, 60)
        assert worker.exitcode == 0
    assert sum(won) == uses
    assert (await registry.list_join_tokens())[0].used == uses
    await registry.close()


def _open_and_close(directory: Path, barrier) -> None:
    async def main() -> None:
        barrier.wait()
        await (await SqliteRegistry.open(directory)).close()

    asyncio.run(main())


async def test_processes_that_make_the_file_together(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(4)
    workers = [spawn.Process(target=_open_and_close, args=(tmp_path, barrier)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        await asyncio.to_thread(worker.join, 60)
        assert worker.exitcode == 0


_ENROL_FOR_EVER = """
import asyncio, sys
from pathlib import Path
from arcbridge.relay.registry.sqlite import SqliteRegistry

async def main(directory, token, pem):
    registry = await SqliteRegistry.open(Path(directory), clock=lambda: 1_800_000_000.0)
    for n in range(int(sys.argv[3]), 10**9):
        await registry.redeem_join_token(token, f"{n:064x}", pem)
        print(n, flush=True)

asyncio.run(main(sys.argv[1], sys.argv[2], sys.stdin.read()))
"""


async def test_killed_in_the_middle_it_is_never_half_an_enrolment(tmp_path: Path, clock: Clock) -> None:
    """docs/threats.md#E8: whatever was answered is there, and each use has its redemption."""
    registry = await SqliteRegistry.open(tmp_path, clock=clock)
    token = await registry.create_join_token("prod", uses=10_000, expires_at=clock.now + HOUR)
    answered = 0
    for round_number in range(10):
        worker = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-c", _ENROL_FOR_EVER, tmp_path, token, str(round_number * 1_000_000)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )
        worker.stdin.write(cluster_ca().certificate_pem)
        worker.stdin.close()
        for _ in range(round_number + 1):
            assert worker.stdout.readline()
        os.kill(worker.pid, signal.SIGKILL)
        answered += round_number + 1 + len(worker.stdout.readlines())
        worker.stdout.close()
        worker.wait()
        with sqlite3.connect(tmp_path / "registry.db") as database:
            (redeemed,) = database.execute("SELECT count(*) FROM redemptions").fetchone()
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        database.close()
        (listed,) = await registry.list_join_tokens()
        assert listed.used == redeemed
        # At most the one whose answer was under way when the kill came.
        assert answered <= redeemed <= answered + round_number + 1
    await registry.close()


class TestFile:
    async def test_is_private_whatever_the_umask(self, tmp_path: Path, clock: Clock) -> None:
        before = os.umask(0)
        try:
            registry = await SqliteRegistry.open(tmp_path / "data", clock=clock)
            await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        finally:
            os.umask(before)
        files = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "data").iterdir()}
        assert {"registry.db", "registry.db-wal", "registry.db-shm"} <= set(files)
        assert set(files.values()) == {0o600}
        await registry.close()

    async def test_holds_no_secret(self, tmp_path: Path, clock: Clock) -> None:
        """docs/threats.md#E9: every byte of every file, before and after the log is folded in."""
        registry = await SqliteRegistry.open(tmp_path, clock=clock)
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        secret = token.partition(".")[2].encode()

        def scan() -> None:
            for file in tmp_path.iterdir():
                data = file.read_bytes()
                assert not any(secret[n : n + 12] in data for n in range(len(secret) - 12))

        scan()
        await registry.close()
        scan()

    async def test_settings_that_keep_promises(self, tmp_path: Path) -> None:
        before = set(threading.enumerate())  # a registry that was just closed may still be among them
        registry = await SqliteRegistry.open(tmp_path)

        def settings() -> list[object]:
            names = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            return [registry._durable.execute(f"PRAGMA {name}").fetchone()[0] for name in names]

        assert await registry._run(settings) == ["wal", 2, 1, 5000]
        assert [thread.name for thread in set(threading.enumerate()) - before].count("registry_0") == 1
        await registry.close()

    async def test_a_newer_schema_is_refused_untouched(self, tmp_path: Path) -> None:
        await (await SqliteRegistry.open(tmp_path)).close()
        path = tmp_path / "registry.db"
        database = sqlite3.connect(path)
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
        database.close()
        before = path.read_bytes()
        with pytest.raises(StateError, match=f"newer arcbridge.*{SCHEMA_VERSION + 1}"):
            await SqliteRegistry.open(tmp_path)
        assert path.read_bytes() == before

    async def test_a_file_of_an_older_schema_is_brought_up_to_date_with_all_it_holds(
        self, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each step is tried on a file that the steps before it have made."""
        for version in range(1, SCHEMA_VERSION):
            directory = tmp_path / str(version)
            with monkeypatch.context() as older:
                older.setattr(sqlite, "_STEPS", sqlite._STEPS[:version])
                older.setattr(sqlite, "SCHEMA_VERSION", version)
                await (await SqliteRegistry.open(directory, clock=clock)).close()
            with sqlite3.connect(directory / "registry.db") as database:
                columns = "name, ca_pem, ca_pin, created, revoked"
                cluster = ("prod", cluster_ca().certificate_pem, cluster_ca().pin, clock.now, clock.now)
                database.execute(f"INSERT INTO clusters ({columns}) VALUES (?, ?, ?, ?, ?)", cluster)
                columns = "id, secret_hash, cluster, uses, used, created, expires_at"
                token = ("0" * 16, "0" * 64, "prod", 1, 0, clock.now, clock.now + HOUR)
                database.execute(f"INSERT INTO join_tokens ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", token)
            database.close()
            held = (
                [ClusterRecord(*cluster[:4], revoked=clock.now)],
                [JoinTokenRecord("0" * 16, "prod", 1, 0, clock.now, clock.now + HOUR)],
            )
            # Two at once, as workers open it.
            newer = await asyncio.gather(*(SqliteRegistry.open(directory, clock=clock) for _ in range(2)))
            for registry in newer:
                assert (await registry.clusters(), await registry.list_join_tokens()) == held
                assert await registry.user_revocations() == {}
            await newer[0].revoke_user("alice", int(clock.now))
            assert set(await newer[1].user_revocations()) == {"alice"}
            for registry in newer:
                await registry.close()

    async def test_a_step_that_fails_changes_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = sqlite._STEPS[:1]
        with monkeypatch.context() as older:
            older.setattr(sqlite, "_STEPS", first)
            older.setattr(sqlite, "SCHEMA_VERSION", 1)
            await (await SqliteRegistry.open(tmp_path)).close()
        with monkeypatch.context() as broken:
            broken.setattr(sqlite, "_STEPS", (*first, ("CREATE TABLE half (a)", "CREATE TABLE clusters (again)")))
            broken.setattr(sqlite, "SCHEMA_VERSION", 2)
            with pytest.raises(RegistryUnavailable):
                await SqliteRegistry.open(tmp_path)
        database = sqlite3.connect(tmp_path / "registry.db")
        assert database.execute("PRAGMA user_version").fetchone() == (1,)
        assert database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'half'").fetchone() == (0,)
        database.close()
        await (await SqliteRegistry.open(tmp_path)).close()

    async def test_a_database_of_another_program_is_refused_untouched(self, tmp_path: Path) -> None:
        path = tmp_path / "registry.db"
        database = sqlite3.connect(path)
        database.execute("CREATE TABLE notes (text)")
        database.commit()
        database.close()
        before = path.read_bytes()
        with pytest.raises(StateError, match="not a registry"):
            await SqliteRegistry.open(tmp_path)
        assert path.read_bytes() == before

    async def test_garbage_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "registry.db").write_bytes(b"garbage" * 1000)
        with pytest.raises(StateError, match=r"registry\.db is damaged"):
            await SqliteRegistry.open(tmp_path)

    async def test_a_directory_that_cannot_be_used(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StateError, match="cannot"):
            await SqliteRegistry.open(tmp_path / "file" / "data")
        (tmp_path / "registry.db").mkdir()
        with pytest.raises(StateError, match=r"registry\.db"):
            await SqliteRegistry.open(tmp_path)

    async def test_failed_opens_leave_no_thread(self, tmp_path: Path) -> None:
        (tmp_path / "registry.db").write_bytes(b"garbage" * 1000)
        for _ in range(5):
            with pytest.raises(StateError):
                await SqliteRegistry.open(tmp_path)
        for thread in threading.enumerate():
            if thread.name.startswith("registry"):
                thread.join(5)
                assert not thread.is_alive()


class TestFaults:
    """docs/threats.md#E8: refused with a time to come back, nothing half done, and well again afterwards."""

    async def test_locked_by_another_process(self, tmp_path: Path, clock: Clock) -> None:
        registry = await SqliteRegistry.open(tmp_path, clock=clock, busy_timeout=0.05)
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        other = sqlite3.connect(tmp_path / "registry.db", isolation_level=None)
        snapshot = await registry.snapshot()
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(RegistryUnavailable, match="locked") as caught:
            await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        assert caught.value.retry_after
        with pytest.raises(RegistryUnavailable, match="locked"):
            await registry.revoke_user("alice@example.com", int(clock.now))
        with pytest.raises(RegistryUnavailable, match="locked"):
            await asyncio.wait_for(registry.replace(snapshot.data, Recovery("restored", clock.now)), 10)
        assert (await registry.clusters(), await registry.user_revocations()) == ([], {})  # reading goes on
        other.execute("ROLLBACK")
        other.close()
        await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        await registry.close()

    async def test_disk_full(self, tmp_path: Path, clock: Clock) -> None:
        registry = await SqliteRegistry.open(tmp_path, clock=clock)
        token = await registry.create_join_token("prod", uses=10_000, expires_at=clock.now + HOUR)

        def limit(pages: int | None) -> None:
            (used,) = registry._durable.execute("PRAGMA page_count").fetchone()
            registry._durable.execute(f"PRAGMA max_page_count = {pages or used}")

        await registry._run(lambda: limit(None))
        done = 0

        async def fill() -> None:
            nonlocal done
            for done in range(2000):
                await registry.redeem_join_token(token, f"{done:064x}", cluster_ca().certificate_pem)

        with pytest.raises(RegistryUnavailable, match="full"):
            await fill()
        assert (await registry.list_join_tokens())[0].used == done
        await registry._run(lambda: limit(1_000_000))
        await registry.redeem_join_token(token, "f" * 64, cluster_ca().certificate_pem)
        assert (await registry.list_join_tokens())[0].used == done + 1
        await registry.close()

    async def test_read_only(self, tmp_path: Path, clock: Clock) -> None:
        registry = await SqliteRegistry.open(tmp_path, clock=clock)
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        await registry._run(lambda: registry._durable.execute("PRAGMA query_only = ON"))
        with pytest.raises(RegistryUnavailable):
            await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        await registry._run(lambda: registry._durable.execute("PRAGMA query_only = OFF"))
        assert (await registry.list_join_tokens())[0].used == 0
        await registry.close()

    async def test_a_stuck_disk_gathers_no_endless_queue_and_blocks_no_loop(self, tmp_path: Path) -> None:
        registry = await SqliteRegistry.open(tmp_path)
        release = threading.Event()
        stuck = asyncio.ensure_future(registry._run(release.wait))
        waiting = [asyncio.ensure_future(registry.revocations()) for _ in range(3000)]
        await asyncio.sleep(0)
        refused = [task for task in waiting if task.done()]
        assert len(refused) == 1001
        for task in refused:
            assert isinstance(task.exception(), RegistryUnavailable)
        release.set()
        results = await asyncio.gather(stuck, *waiting, return_exceptions=True)
        assert sum(result == frozenset() for result in results) == 1999
        await registry.close()

    async def test_errors_hold_nothing_of_the_token(self, tmp_path: Path, clock: Clock) -> None:
        registry = await SqliteRegistry.open(tmp_path, clock=clock)
        token = await registry.create_join_token("prod", expires_at=clock.now + HOUR)
        await registry.delete_join_token(token.partition(".")[0])
        with pytest.raises(EnrolmentRefused) as caught:
            await registry.redeem_join_token(token, KEY_A, cluster_ca().certificate_pem)
        assert token.partition(".")[2][:12] not in json.dumps([str(caught.value), repr(caught.value)])
        await registry.close()
