"""Tokens that a platform has given: chosen by their audience."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.credentials.environment_tokens import EnvironmentTokens
from arcbridge.errors import ConfigError, Unauthenticated

NOW = 1000.0


def token(aud: str | list[str], exp: float = 2000, iss: str = "https://gitlab.example.org", **more: Any) -> str:
    claims = json.dumps({"aud": aud, "exp": exp, "iss": iss, **more}).encode()
    return f"e30.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.c2ln"


def at_hand(kind: str, **environment: str) -> EnvironmentTokens:
    return EnvironmentTokens(kind, environment, lambda: NOW)


def test_the_audience_decides() -> None:
    relay, cluster = token("arcbridge-relay"), token(["arcbridge-a", "arcbridge:key:x"])
    tokens = at_hand("env:A,B", A=relay, B=cluster)
    assert tokens.for_audience("arcbridge-relay") == relay
    assert tokens.for_audience("arcbridge-a") == cluster


def test_one_variable_may_hold_several() -> None:
    relay, cluster = token("arcbridge-relay"), token("arcbridge-a")
    assert at_hand("env:A", A=f"{relay}\n{cluster}\n").for_audience("arcbridge-a") == cluster


def test_of_several_the_one_that_lasts_longest() -> None:
    short, long, old = token("a", 1500), token("a", 3000), token("a", 900)
    assert at_hand("env:A", A=f"{short} {long} {old}").for_audience("a") == long
    with pytest.raises(Unauthenticated, match='the token of env:A for audience "a" has expired; get a new one'):
        at_hand("env:A", A=old).for_audience("a")


def test_gitlab_takes_its_own_tokens_alone() -> None:
    own, foreign = token("a"), token("a", 9000, iss="https://login.example.org")
    tokens = at_hand("gitlab", CI_SERVER_URL="https://gitlab.example.org", X=foreign, Y=own, Z="text")
    assert tokens.for_audience("a") == own


def test_a_refusal_names_the_audiences_and_no_token() -> None:
    secret = token("arcbridge-relay")
    tokens = at_hand("gitlab", CI_SERVER_URL="https://gitlab.example.org", A=secret)
    with pytest.raises(Unauthenticated) as caught:
        tokens.for_audience("arcbridge-a")
    assert caught.value.message == (
        'the job has no token for audience "arcbridge-a" (there are some for "arcbridge-relay"); add it to `id_tokens` '
        "of the job, with `aud: arcbridge-a`"
    )
    assert secret not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    relay, cluster = token("arcbridge-relay"), token("arcbridge-a")
    # As the kubelet projects a volume: names are links into a directory that is exchanged at once.
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..data").symlink_to("..2026")
    for name, text in (("relay", relay), ("a", cluster)):
        (tmp_path / "..2026" / name).write_text(text)
        (tmp_path / name).symlink_to(f"..data/{name}")
    assert at_hand(f"file:{tmp_path}").for_audience("arcbridge-a") == cluster
    assert at_hand(f"file:{tmp_path / 'relay'}").for_audience("arcbridge-relay") == relay
    both = tmp_path / "both"
    both.write_text(f"{relay}\n{cluster}\n")
    tokens = at_hand(f"file:{both}")
    assert tokens.for_audience("arcbridge-a") == cluster
    renewed = token("arcbridge-a", 3000)
    both.write_text(renewed)
    assert tokens.for_audience("arcbridge-a") == renewed
    both.unlink()
    with pytest.raises(Unauthenticated, match="does not exist"):
        tokens.for_audience("arcbridge-a")


def test_what_is_read_is_bounded(tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(1024 * 1024 + 1)
    with pytest.raises(Unauthenticated, match="big holds no tokens, or more than 1024 KiB"):
        at_hand(f"file:{big}").for_audience("a")
    for number in range(65):
        (tmp_path / f"token-{number}").write_text(token("a"))
    with pytest.raises(Unauthenticated, match="holds more than 64 files"):
        at_hand(f"file:{tmp_path}").for_audience("a")


@pytest.mark.parametrize("kind", ["env:", "env:A B", "env:A", "file:", "gitlab"])
def test_places_that_cannot_be(kind: str) -> None:
    with pytest.raises(ConfigError, match="workload: "):
        at_hand(kind)


def test_an_audience_behind_a_key() -> None:
    key = f"arcbridge:key:{'x' * 43}"
    for given, audience in ((f"{key}@arcbridge-a", "arcbridge-a"), (f"{key}@a@b", "a@b")):
        assert at_hand("env:A", A=token(given)).for_audience(audience) == token(given)
    # The end alone is not the audience.
    for other in (f"{key}@evil@arcbridge-a", f"{key}@arcbridge-a@evil", f"{key}@", key, "x@arcbridge-a"):
        with pytest.raises(Unauthenticated, match="has no token"):
            at_hand("env:A", A=token(other)).for_audience("arcbridge-a")
