"""The kept tokens: freshness, privacy, and that damage is never a crash."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.credentials import token_cache
from arcbridge.client.credentials.token_cache import MemoryTokens, TokenCache, TokenSet, token_set
from arcbridge.errors import StateError, Unreachable
from arcbridge.settings.config import LoginConfig
from tests.client.session.test_session_manager import jwt_like


def cache(directory: Path, relay: str = "r", **more: Any) -> TokenCache:
    login = LoginConfig(**{"issuer": "https://i", "client_id": "c", "scopes": ("openid",), **more})
    return TokenCache(directory / "tokens", relay, login)


@pytest.mark.parametrize(
    ("life", "age", "fresh"),
    [
        (3600, 0, True),
        (3600, 2879, True),
        (3600, 2881, False),
        (1200, 890, True),
        (1200, 910, False),
        (60, 29, True),
        (60, 31, False),
    ],
)
def test_freshness(life: float, age: float, fresh: bool) -> None:
    tokens = TokenSet("a", "i", "", 1000.0, 1000.0 + life)
    assert tokens.fresh(1000.0 + age) is fresh
    assert tokens.usable(1000.0 + life - 1)
    assert not tokens.usable(1000.0 + life)


def test_without_an_end_they_are_fresh() -> None:
    assert TokenSet("a").fresh(1e12)
    assert not TokenSet().fresh(0)
    assert not TokenSet().usable(0)


def test_from_an_answer() -> None:
    now = time.time()
    tokens = token_set({"access_token": "a", "id_token": jwt_like(100), "expires_in": 3600}, now, "old")
    assert tokens.refresh_token == "old"
    assert abs(tokens.expires_at - now - 100) < 2
    assert token_set({"access_token": 3, "expires_in": True}, now) == TokenSet(obtained_at=now)
    for long in (1e300, 10**400, float("inf"), 1e12, 1e12 - now):
        assert token_set({"expires_in": long}, now).expires_at == 0.0


def test_a_scope_that_becomes_the_relay_s_makes_another_file(tmp_path: Path) -> None:
    def path(scopes: tuple[str, ...], **more: tuple[str, ...]) -> Path:
        return cache(tmp_path, scopes=scopes, **more).path

    paths = [path(("a", "b")), path(("a", "b"), relay_scopes=("a",)), path(("a", "a", "b"))]
    paths += [path(("a",), relay_scopes=("b",)), path(("b",), relay_scopes=("a",))]
    assert len(set(paths)) == len(paths)
    assert path(("a", "b"), relay_scopes=()) == paths[0]


def test_b42_files_are_private_and_apart(tmp_path: Path) -> None:
    one, two, three = cache(tmp_path), cache(tmp_path, audience="other"), cache(tmp_path, relay="other")
    tokens = TokenSet("SECRET", "id", "refresh", 1.0, 2.0)
    one.save(tokens)
    assert one.load() == tokens
    assert two.load() == three.load() == TokenSet()
    assert one.path.stat().st_mode & 0o777 == 0o600
    assert one.path.parent.stat().st_mode & 0o777 == 0o700
    assert "SECRET" not in repr(tokens)
    assert one.clear()
    assert not one.clear()


def test_b42_the_file_of_a_version_without_relays_is_not_used(tmp_path: Path) -> None:
    """It may be another relay's; a login, or the end of one, takes it away."""
    one = cache(tmp_path)
    # `[issuer, client id, scopes, audience]`, as those versions had it.
    name = hashlib.sha256(b'["https://i", "c", ["openid"], ""]').hexdigest()[:32]
    former = one.path.with_name(f"{name}.json")
    one.path.parent.mkdir()
    for end in (one.clear, lambda: one.save(TokenSet("new"))):
        former.write_text('{"access_token": "of another relay", "id_token": "", "refresh_token": "r"}')
        former.with_suffix(".key").write_text("{}")
        assert one.load() == TokenSet()
        assert end() in (True, None)
        assert not former.exists()
        assert not former.with_suffix(".key").exists()
    assert one.load() == TokenSet("new")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"access_token": 3}', '{"access_token": "a", "expires_at": "x"}', "\x00\xff", 100000 * "["],
    ids=range(8),
)
def test_damage_means_no_tokens(tmp_path: Path, text: str) -> None:
    kept = cache(tmp_path)
    kept.path.parent.mkdir(parents=True)
    kept.path.write_text(text)
    assert kept.load() == TokenSet()


async def test_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    async def work(name: str) -> None:
        async with cache(tmp_path).locked():
            order.append(f"{name} in")
            await asyncio.sleep(0.02)
            order.append(f"{name} out")

    await asyncio.gather(work("a"), work("b"))
    assert order in (["a in", "a out", "b in", "b out"], ["b in", "b out", "a in", "a out"])
    monkeypatch.setattr(token_cache, "LOCK_WAIT", 0.1)
    async with cache(tmp_path).locked():
        with pytest.raises(StateError, match="another process"):
            await work("c")


def test_tokens_of_single_audiences_are_kept_beside(tmp_path: Path) -> None:
    tokens = TokenSet("a", "i", "r", 1.0, 100.0, {"x": TokenSet("one", "", "", 1.0, 50.0), "y": TokenSet("two")})
    cache(tmp_path).save(tokens)
    assert cache(tmp_path).load() == tokens
    assert tokens.same_login(TokenSet("a", "i"))
    assert "one" not in repr(tokens)


def test_a_login_has_tokens_of_many_clusters(tmp_path: Path) -> None:
    """A file that could be written and not read would end the login."""
    of_clusters = {f"arcbridge-c{number}": TokenSet("t" * 8000, "", "", 1.0, 50.0) for number in range(400)}
    tokens = TokenSet("a", "i", "r", 1.0, 100.0, of_clusters)
    cache(tmp_path).save(tokens)
    assert cache(tmp_path).load() == tokens


@pytest.mark.parametrize(
    "damage", ["3", "[]", '{"x": 3}', '{"x": {"access_token": ""}}', '{"x": {"access_token": 1}}', '{"x": null}']
)
def test_a_damaged_one_is_had_anew_and_the_login_stays(tmp_path: Path, damage: str) -> None:
    one = cache(tmp_path)
    one.save(TokenSet("a", "i", "r", 1.0, 100.0))
    one.path.write_text(one.path.read_text().replace("{}", damage))
    assert one.load() == TokenSet("a", "i", "r", 1.0, 100.0)


@pytest.mark.parametrize("value", ["1" + "0" * 400, "NaN", "Infinity", "-1e300", "true", "null"])
@pytest.mark.parametrize("name", ["obtained_at", "expires_at"])
def test_times_that_are_none_mean_no_tokens(tmp_path: Path, name: str, value: str) -> None:
    one = cache(tmp_path)
    one.save(TokenSet())
    bad = f'{{"access_token": "a", "id_token": "i", "{name}": {value}}}'
    one.path.write_text(bad)
    assert one.load() == TokenSet()
    one.path.write_text(f'{{"access_token": "a", "by_audience": {{"x": {bad}}}}}')
    assert one.load().by_audience == {}


class Source(MemoryTokens):
    """A source whose tokens last for an hour, and the clock."""

    def __init__(self) -> None:
        super().__init__(None, lambda: self.now)
        self.now = 1000.0
        self.asked: list[str] = []
        self.down = False

    async def _ask(self, audience: str) -> TokenSet:
        self.asked.append(audience)
        await asyncio.sleep(0)
        if self.down:
            raise Unreachable("down")
        return TokenSet(f"{audience} {len(self.asked)}", obtained_at=self.now, expires_at=self.now + 3600)


async def test_tokens_in_memory_are_kept_until_they_are_old_or_refused() -> None:
    source = Source()
    found = await asyncio.gather(*(source.for_audience(name, interactive=False) for name in ("a", "b", "a")))
    assert [tokens.access_token for tokens in found] == ["a 1", "b 2", "a 1"]
    assert (await source.tokens(interactive=False)).access_token == " 3"
    assert (await source.for_audience("a", interactive=False, force=True)).access_token == "a 4"
    source.now += 3000
    assert (await source.for_audience("a", interactive=False)).access_token == "a 5"
    # What is old serves while nothing else comes, unless it was refused.
    source.down, source.now = True, source.now + 3599
    assert (await source.for_audience("a", interactive=False)).access_token == "a 5"
    with pytest.raises(Unreachable):
        await source.for_audience("a", interactive=False, force=True)
    source.now += 1
    with pytest.raises(Unreachable):
        await source.for_audience("a", interactive=False)
