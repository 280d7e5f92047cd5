import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from arcbridge.errors import StateError
from arcbridge.pki.authority import Authority
from arcbridge.pki.credentials import (
    AgentCredential,
    CredentialStore,
    DirectoryStore,
    Snapshot,
    VersionConflict,
    renew_at,
)
from arcbridge.pki.enrolment import make_csr, make_key


@pytest.fixture
def credential() -> AgentCredential:
    relay, cluster, key = Authority.create("relay CA"), Authority.create("cluster CA"), make_key()
    certificate = relay.sign_agent(make_csr(key), "prod", life=600)
    return AgentCredential("prod", certificate, key, relay.certificate_pem, cluster.certificate_pem, cluster.key_pem)


class TestAgentCredential:
    def test_round_trip(self, credential: AgentCredential) -> None:
        entries = credential.to_entries()
        assert set(entries) == {"cluster", "tls.crt", "tls.key", "relay-ca.crt", "cluster-ca.crt", "cluster-ca.key"}
        assert AgentCredential.from_entries({**entries, "note": b"\xff kept by others"}) == credential
        start, end = credential.validity()
        assert end - start == pytest.approx(660, abs=3)

    def test_before_enrolment_there_is_none(self, credential: AgentCredential) -> None:
        for name in credential.to_entries():
            partial = credential.to_entries()
            partial[name] = b""
            assert AgentCredential.from_entries(partial) is None
            del partial[name]
            assert AgentCredential.from_entries(partial) is None
        assert AgentCredential.from_entries({}) is None

    @pytest.mark.parametrize("change", [{"cluster": b"../x"}, {"tls.crt": b"\xff"}])
    def test_damage(self, credential: AgentCredential, change: dict[str, bytes]) -> None:
        with pytest.raises(StateError, match="join token"):
            AgentCredential.from_entries({**credential.to_entries(), **change})

    def test_no_key_in_any_representation(self, credential: AgentCredential) -> None:
        """docs/threats.md#E9, #W4."""
        shown = f"{credential!r} {Snapshot(credential.to_entries(), '1')!r}"
        assert "PRIVATE" not in shown
        assert credential.key_pem.splitlines()[1] not in shown


def test_renewal_is_due_at_two_thirds() -> None:
    assert renew_at(0, 900) == 600
    assert renew_at(100, 400) == 300


@pytest.fixture
def open_store(tmp_path: Path) -> Callable[[], CredentialStore]:
    return lambda: DirectoryStore(tmp_path / "state")


async def test_create_update_and_compare(open_store: Callable[[], CredentialStore]) -> None:
    store, other = open_store(), open_store()
    assert await store.load() is None
    first = await store.save({"a": b"\x00\xff", "b": b""}, expect_version=None)
    with pytest.raises(VersionConflict):
        await other.save({"a": b"2"}, expect_version=None)
    loaded = await other.load()
    assert loaded is not None
    assert (dict(loaded), loaded.version) == ({"a": b"\x00\xff", "b": b""}, first)
    second = await other.save({"a": b"2"}, expect_version=first)
    assert second != first
    with pytest.raises(VersionConflict):
        await store.save({"a": b"3"}, expect_version=first)
    assert await store.load() == {"a": b"2", "b": b""}


async def test_of_many_that_start_on_an_empty_store_one_creates_and_the_others_adopt(
    open_store: Callable[[], CredentialStore],
) -> None:
    """docs/threats.md#E3: the store ends with one cluster CA, whatever the order."""

    async def start(pod: int) -> bytes:
        store = open_store()
        try:
            await store.save({"cluster-ca.key": str(pod).encode()}, expect_version=None)
        except VersionConflict:
            pass
        loaded = await store.load()
        assert loaded is not None
        return loaded["cluster-ca.key"]

    assert len(set(await asyncio.gather(*(start(pod) for pod in range(20))))) == 1


async def test_concurrent_updates_lose_nothing(open_store: Callable[[], CredentialStore]) -> None:
    await open_store().save({}, expect_version=None)

    async def add(name: str) -> None:
        store = open_store()
        while True:
            loaded = await store.load()
            assert loaded is not None
            try:
                await store.save({name: b"1"}, expect_version=loaded.version)
                return
            except VersionConflict:
                continue

    await asyncio.gather(*(add(str(n)) for n in range(10)))
    assert set(await open_store().load() or ()) == {str(n) for n in range(10)}


class TestDirectoryStore:
    async def test_files_are_private_whatever_the_umask(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            await DirectoryStore(tmp_path / "state").save({"tls.key": b"x"}, expect_version=None)
        finally:
            os.umask(before)
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700
        for file in (tmp_path / "state").iterdir():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"version": "1", "data": {"a": "%%%"}}', '{"data": []}', "\xff"])
    async def test_a_damaged_file_is_named_and_kept(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "credential.json"
        path.write_text(text, encoding="latin-1")
        with pytest.raises(StateError, match=r"credential\.json"):
            await DirectoryStore(tmp_path).load()
        with pytest.raises(StateError, match="damaged"):
            await DirectoryStore(tmp_path).save({"a": b"1"}, expect_version=None)
        assert path.read_text(encoding="latin-1") == text
