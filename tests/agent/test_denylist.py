"""The denylist's file: read at the start, again when it changes, and without effect when it is broken
(docs/threats.md#V15).
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from arcbridge.agent import denylist as module
from arcbridge.agent.denylist import Denylist, parse_denylist
from arcbridge.agent.revocations import Revocation
from arcbridge.errors import ConfigError

ALICE = '[[deny]]\nuser = "oidc:alice"\n'
BOB = '[[deny]]\nuser = "https://issuer#bob"\nbefore = 2026-11-25T12:00:00Z\nreason = "laptop stolen"\n'


def test_users_are_listed_with_or_without_a_time() -> None:
    listed = parse_denylist((ALICE + BOB).encode(), "list")
    assert listed == {
        "oidc:alice": Revocation("oidc:alice", math.inf),
        "https://issuer#bob": Revocation("https://issuer#bob", 1_795_608_000.0, "laptop stolen"),
    }
    assert parse_denylist(b"", "list") == {}
    assert parse_denylist(b"# no user is denied now\n", "list") == {}


BROKEN = [
    ("not TOML", "oidc:alice\n", "not valid TOML"),
    ("not UTF-8", "\udcff", "not valid TOML"),
    ("a number of 5000 digits", "a = " + "1" * 5000, "not valid TOML"),
    ("nested 5000 deep", "a = " + "[" * 5000, "not valid TOML"),
    ("another table", '[[allow]]\nuser = "a"\n', "unknown setting 'allow'"),
    ("a list of names", 'deny = ["oidc:alice"]\n', r"deny\[0\]: must be a table"),
    ("one name", 'deny = "oidc:alice"\n', "each user is an entry"),
    ("no user", '[[deny]]\nreason = "x"\n', r"deny\[0\].user"),
    ("an empty user", '[[deny]]\nuser = ""\n', r"deny\[0\].user"),
    ("blanks around", ALICE + '[[deny]]\nuser = " oidc:bob"\n', r"deny\[1\].user"),
    ("a mistyped key", ALICE + 'befor = 2026-11-25T12:00:00Z\n', r"deny\[0\].befor: unknown"),
    ("a time without its zone", ALICE + "before = 2026-11-25T12:00:00\n", r"deny\[0\].before"),
    ("a day", ALICE + "before = 2026-11-25\n", r"deny\[0\].before"),
    ("a number", ALICE + "before = 5\n", r"deny\[0\].before"),
    ("a reason that is none", ALICE + "reason = 5\n", r"deny\[0\].reason"),
    ("twice", ALICE + ALICE, r"deny\[1\].user: the user is listed twice"),
    ("too long", "#" * (module.MAX_FILE + 1), "more than"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), [row[1:] for row in BROKEN], ids=[row[0] for row in BROKEN])
async def test_v15_a_broken_file_keeps_the_last_good_list(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "denylist.toml"
    path.write_text(ALICE)
    taken: list[Mapping[str, Revocation]] = []
    denylist = Denylist(path, taken.append)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with capture_logs() as logs:
        for _ in range(3):
            await denylist.reload()
        path.write_text(ALICE + BOB)
        await denylist.reload()
    assert [sorted(one) for one in taken] == [["oidc:alice"], ["https://issuer#bob", "oidc:alice"]]
    assert [(one["event"], one["log_level"]) for one in logs] == [
        ("denylist not taken", "error"),
        ("denylist taken", "info"),
    ], "once, not at each reading"
    assert str(path) in logs[0]["reason"]
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=words):
        Denylist(path, taken.append)
    assert len(taken) == 2


async def test_v15_a_file_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "denylist.toml"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Denylist(path, lambda listed: None)
    path.write_text(ALICE)
    taken: list[Mapping[str, Revocation]] = []
    denylist = Denylist(path, taken.append)
    path.unlink()
    await denylist.reload()
    assert "cannot be read" in denylist.error
    assert (len(taken), denylist.users) == (1, 1)
    path.write_text(ALICE)  # the same bytes again: there was an error meanwhile
    await denylist.reload()
    assert denylist.error == ""
    assert len(taken) == 2


def test_v15_every_way_to_replace_the_file(tmp_path: Path) -> None:
    """Written anew, renamed over, and as a ConfigMap is mounted: links to a directory that is exchanged as a whole."""

    def written(path: Path, text: str) -> None:
        path.write_text(text)

    def renamed(path: Path, text: str) -> None:
        path.with_name("new").write_text(text)
        os.replace(path.with_name("new"), path)

    def mounted(path: Path, text: str) -> None:
        number = len(list(path.parent.glob("..2026*")))
        directory = path.parent / f"..2026_{number}"
        directory.mkdir()
        (directory / path.name).write_text(text)
        os.symlink(directory.name, path.parent / "..data_tmp")
        os.replace(path.parent / "..data_tmp", path.parent / "..data")
        if not path.is_symlink():
            os.symlink(f"..data/{path.name}", path)

    def seen_through(replace: Callable[[Path, str], None]) -> list[list[str]]:
        path = tmp_path / replace.__name__ / "denylist.toml"
        path.parent.mkdir()
        replace(path, ALICE)
        taken: list[Mapping[str, Revocation]] = []
        denylist = Denylist(path, taken.append)
        for text in (ALICE, ALICE + BOB, "", ALICE.replace("alice", "carol")):
            replace(path, text)
            # As long, and of the same second: only its bytes say that it is another one.
            os.utime(path, (1, 1))
            asyncio.run(denylist.reload())
        return [sorted(one) for one in taken]

    for replace in (written, renamed, mounted):
        assert seen_through(replace) == [["oidc:alice"], ["https://issuer#bob", "oidc:alice"], [], ["oidc:carol"]], (
            replace.__name__
        )


async def test_it_is_read_again_until_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.CHECK_INTERVAL < 5
    monkeypatch.setattr(module, "CHECK_INTERVAL", 0.01)
    path = tmp_path / "denylist.toml"
    path.write_text("")
    changed = asyncio.Event()
    denylist = Denylist(path, lambda listed: changed.set() if listed else None)
    task = asyncio.get_running_loop().create_task(denylist.run())
    path.write_text(ALICE)
    await asyncio.wait_for(changed.wait(), 5)
    task.cancel()
    await asyncio.wait([task])
