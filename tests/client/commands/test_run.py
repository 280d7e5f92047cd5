"""A command against clusters, in process: what comes before it, and what becomes of errors."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from arcbridge.client.commands.run import Chosen, check_names, choose, is_pattern, run_command
from arcbridge.errors import ArcbridgeError, CommandNotFound, ConfigError, ExitCode, PermissionRefused, Unreachable
from arcbridge.net.join import JoinCode
from arcbridge.settings.config import RestrictConfig
from arcbridge.wire.records import JoinReply, Restrictions
from tests.client.commands.test_proxy import Case as ProxyCase
from tests.client.commands.test_proxy import short_lives
from tests.client.far_side import CLUSTER, FarSide


class Case(ProxyCase):
    """A user's settings, and what they were shown."""

    def __init__(self, far: FarSide, directory: Path) -> None:
        super().__init__(far, directory)
        self.runtime = directory / "runtime"
        self.runtime.mkdir()
        self.reported: list[tuple[str, str]] = []
        self.written: list[tuple[int, bytes]] = []
        self.environment: dict[str, str] = {}

    async def run(self, *command: str, lasts: float = 0.0, **changes: Any) -> int:
        code = await run_command(
            replace(self.config, **changes),
            self.terminal,
            command,
            report=lambda cluster, message: self.reported.append((cluster, message)),
            write=lambda descriptor, data: self.written.append((descriptor, data)),
            lasts=lasts,
            environment={"PATH": os.environ["PATH"], "XDG_RUNTIME_DIR": str(self.runtime), **self.environment},
        )
        assert os.listdir(self.runtime) == []
        return code


@pytest.fixture
def case(far: FarSide, tmp_path: Path) -> Case:
    return Case(far, tmp_path)


async def test_the_session_is_up_before_the_command_starts_and_ends_with_it(
    case: Case, far: FarSide, tmp_path: Path
) -> None:
    assert await case.run("sh", "-c", f"cat $KUBECONFIG > {tmp_path / 'seen'}; exit 5") == 5
    assert f"name: {CLUSTER}" in (tmp_path / "seen").read_text()
    (session,) = far.sessions
    await session.wait_ended()


async def test_one_cluster_that_cannot_be_reached_raises(case: Case, far: FarSide, tmp_path: Path) -> None:
    far.reply = JoinReply(code=JoinCode.FORBIDDEN)
    with pytest.raises(PermissionRefused):
        await case.run("touch", str(tmp_path / "started"))
    assert not (tmp_path / "started").exists()


async def test_of_several_each_is_told_and_the_worst_counts(case: Case, far: FarSide) -> None:
    code = await case.run(
        "sh", "-c", "echo hello; exit 1", clusters=("other",), cluster_ca_pin="", trust_first_use=True
    )
    # The agent's certificate is of the first cluster alone.
    assert {cluster for cluster, _ in case.reported} == {CLUSTER, "other"}
    assert (CLUSTER, "the command ended with exit code 1") in case.reported
    assert case.written == [(1, b"prod  | hello\n")]
    assert code == ExitCode.RUN_FAILED


@pytest.mark.parametrize(
    ("command", "changes", "error"),
    [
        (("no-such-program",), {}, CommandNotFound),
        (("true",), {"cluster": ""}, ConfigError),
        (("true",), {"cluster": "UPPER-*"}, ConfigError),
        (("true",), {"clusters": ("other",)}, ConfigError),
    ],
    ids=["program", "cluster", "pattern", "pin"],
)
async def test_what_cannot_run_reaches_no_relay(
    case: Case, far: FarSide, command: tuple[str, ...], changes: dict[str, Any], error: type[ArcbridgeError]
) -> None:
    with pytest.raises(error):
        await case.run(*command, **changes)
    assert far.requests == []


async def test_a_long_command_gets_a_new_certificate_before_the_old_one_ends(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_lives(monkeypatch)
    wait = 'cp "$KUBECONFIG" first; while cmp -s "$KUBECONFIG" first; do sleep 0.05; done; cp "$KUBECONFIG" second'
    assert await asyncio.wait_for(case.run("sh", "-c", f"cd {tmp_path}; {wait}"), 20) == 0
    first, second = (yaml.safe_load((tmp_path / name).read_text()) for name in ("first", "second"))
    assert first["users"] != second["users"]
    assert (first["clusters"], first["contexts"]) == (second["clusters"], second["contexts"])


async def test_w32_a_restricted_command_gets_an_endpoint_that_no_other_certificate_opens(
    case: Case, far: FarSide, tmp_path: Path
) -> None:
    """Nor does its own open another: it is of a CA that ends with the command, and that is nowhere on the disk."""
    restrict, seen = RestrictConfig(read_only=True, namespaces=("shop",)), tmp_path / "seen"
    copy = f'cp "$KUBECONFIG" {seen}; env > {tmp_path / "env"}'
    case.environment = {"ARCBRIDGE_ID_TOKEN_FILE": "/f", "OTHER": "kept", "ARCBRIDGE_READ_ONLY": "1"}
    assert await case.run("sh", "-c", copy, restrict=restrict) == 0
    first = yaml.safe_load(seen.read_text())
    assert await case.run("sh", "-c", copy, restrict=restrict) == 0
    second = yaml.safe_load(seen.read_text())
    authorities = [one["clusters"][0]["cluster"]["certificate-authority-data"] for one in (first, second)]
    assert authorities[0] != authorities[1]
    assert second["contexts"][0]["context"]["namespace"] == "shop", "what the program would see without a name"
    kept = b"".join(file.read_bytes() for file in (tmp_path / "state").rglob("*") if file.is_file())
    assert base64.b64decode(second["users"][0]["user"]["client-key-data"]) not in kept
    assert base64.b64decode(authorities[1]) not in kept
    assert {Restrictions.decode(auth.restrictions) for auth in far.auths} == {Restrictions(True, namespaces="shop")}
    lines = (tmp_path / "env").read_text().splitlines()
    assert [line for line in lines if line.startswith("ARCBRIDGE_")] == [f"ARCBRIDGE_CLUSTER={CLUSTER}"]
    assert "OTHER=kept" in lines


async def test_w32_a_restricted_command_gets_no_token_of_the_cluster(case: Case, far: FarSide, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("a-token")
    with pytest.raises(ConfigError, match="without the restrictions"):
        await case.run("true", restrict=RestrictConfig(read_only=True), token_file=tmp_path / "token")
    assert far.requests == []


async def test_a_command_for_a_time(case: Case, far: FarSide) -> None:
    assert await case.run("true", lasts=3600.0) == 0
    assert 3590 < Restrictions.decode(far.auths[0].restrictions).until - time.time() < 3602


LISTED = [
    {"name": "prod-b", "state": "Offline"},
    {"name": "prod-a"},
    {"name": "prod-old", "revoked": True},
    {"name": "staging"},
]


def names(chosen: list[Chosen]) -> list[str]:
    return [one.name for one in chosen]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (["prod-*"], ["prod-a", "prod-b"]),
        (["*"], ["prod-a", "prod-b", "staging"]),
        (["prod-?", "staging"], ["prod-a", "prod-b", "staging"]),
        (["prod-[!a]"], ["prod-b"]),
        (["staging", "prod-*"], ["staging", "prod-a", "prod-b"]),
        (["not-listed"], ["not-listed"]),
        (["staging", "s*"], ["staging"]),
        (["prod-old"], ["prod-old"]),
    ],
)
def test_choose(wanted: list[str], found: list[str]) -> None:
    assert names(choose(wanted, LISTED)) == found


def test_what_a_pattern_chose_says_so_unless_it_was_named_too() -> None:
    assert choose(["prod-*", "prod-b"], LISTED) == [Chosen("prod-a", "prod-*"), Chosen("prod-b")]


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(Unreachable, match="no cluster that you may reach matches 'x-\\*'"):
        choose(["staging", "x-*"], LISTED)


@pytest.mark.parametrize("name", ["Prod", "a..b", "Prod-*", "a b*", "*" * 129, "prod-*\x1b[2J", "../*"])
def test_what_is_neither_a_name_nor_a_pattern(name: str) -> None:
    if name == "../*":
        check_names(["..*"])  # dots are of names, so a pattern may have them
    with pytest.raises(ConfigError, match="flag --cluster"):
        check_names([name])


def test_no_cluster() -> None:
    with pytest.raises(ConfigError, match="required"):
        check_names([])
    assert not is_pattern("prod-1.eu")
