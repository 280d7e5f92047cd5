from __future__ import annotations

import io
from pathlib import Path

import pytest

from arcbridge import __version__
from arcbridge.client.relay import update_notice
from arcbridge.client.relay.update_notice import INTERVAL, newer, platform_name, tell
from arcbridge.relay.http import client_files

RELAY = "https://relay.example.org:443"


class Console(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("offered", "own", "answer"),
    [
        ("0.2.0", "0.1.0", "0.2.0"),
        ("0.1.1", "0.1.0", "0.1.1"),
        ("0.10.0", "0.9.9", "0.10.0"),
        ("1.0", "0.9.9", "1.0"),
        ("0.1.0", "0.1.0", ""),
        ("0.1.0", "0.2.0", ""),
        ("0.2.0", "0.2.0rc1", "0.2.0"),
        ("0.2.0.dev1", "0.2.0", ""),
        ("0.2.0+local", "0.2.0", ""),
        ("\x1b[31m9.9.9", "0.1.0", ""),
        ("9.9.9 and run this", "0.1.0", ""),
        ("9" * 30 + ".1", "0.1.0", ""),
        ("", "0.1.0", ""),
    ],
)
def test_which_version_is_newer(offered: str, own: str, answer: str) -> None:
    header = f"win32-amd64=99.0.0, linux-x86_64={offered}"
    assert newer(header, own, "linux-x86_64") == answer
    assert newer(header, own, "linux-aarch64") == ""


def test_both_ends_name_header_and_platform_alike() -> None:
    assert update_notice.HEADER == client_files.HEADER
    assert client_files._NAME.fullmatch(f"arcbridge-{platform_name()}")


def test_once_a_day_on_a_terminal(tmp_path: Path) -> None:
    header = f"{platform_name()}=99.1.0"
    now = 1_800_000_000.0

    def told(stream: io.StringIO, environment: dict[str, str], at: float) -> str:
        tell(header, RELAY, tmp_path / "cache", stream, environment, lambda: at)
        return stream.getvalue()

    assert told(io.StringIO(), {}, now) == "", "a pipe"
    assert told(Console(), {"ARCBRIDGE_NO_UPDATE_NOTICE": "1"}, now) == ""
    assert told(Console(), {}, now) == (
        f"notice: this client is {__version__}, the relay offers 99.1.0: {RELAY}/client/{platform_name()} "
        "(ARCBRIDGE_NO_UPDATE_NOTICE=1 hides this)\n"
    )
    assert told(Console(), {}, now + INTERVAL - 1) == ""
    assert told(Console(), {}, now + INTERVAL).count("\n") == 1
    assert told(Console(), {}, now).count("\n") == 1, "the clock was put back: the last time counts for nothing"


def test_nothing_to_tell_leaves_nothing(tmp_path: Path) -> None:
    tell(f"{platform_name()}={__version__}", RELAY, tmp_path / "cache", Console(), {})
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    stream = Console()
    tell(f"{platform_name()}=99.1.0", RELAY, tmp_path / "cache", stream, {})
    assert stream.getvalue() == "", "it would be told each time"
