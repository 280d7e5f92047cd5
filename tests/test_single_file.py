"""The single-file client's own part; tests/release/test_single_file.py runs such a file."""

from __future__ import annotations

import os
import sys
import types

import pytest

from arcbridge import single_file


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment that stands for the process'."""
    variables: dict[str, str] = {"PATH": "/usr/bin"}
    stand_in = types.SimpleNamespace(environ=variables, path=os.path)
    monkeypatch.setattr(single_file, "os", stand_in)
    monkeypatch.setattr(single_file, "_file", "")
    monkeypatch.setattr(sys, "argv", ["loader"])
    return variables


def test_an_installed_package_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_file, "_file", "")
    assert not single_file.is_single_file()
    assert single_file.executable() == sys.executable


def test_the_file_is_what_was_called(environment: dict[str, str]) -> None:
    environment["_ARCBRIDGE_PROGRAM"] = "/home/alice/bin/kubectl-arcbridge"
    single_file.begin()
    assert single_file.is_single_file()
    assert single_file.executable() == "/home/alice/bin/kubectl-arcbridge"
    assert sys.argv == ["/home/alice/bin/kubectl-arcbridge"]
    assert environment == {"PATH": "/usr/bin"}


def test_the_loader_leaves_nothing_in_the_environment(environment: dict[str, str]) -> None:
    environment |= {"LD_LIBRARY_PATH": "/unpacked", "_PYI_ARCHIVE_FILE": "x", "_PYI_PARENT_PROCESS_LEVEL": "1"}
    single_file.begin()
    assert environment == {"PATH": "/usr/bin"}
    environment |= {"LD_LIBRARY_PATH": "/unpacked:/of/the/caller", "LD_LIBRARY_PATH_ORIG": "/of/the/caller"}
    single_file.begin()
    assert environment == {"PATH": "/usr/bin", "LD_LIBRARY_PATH": "/of/the/caller"}
