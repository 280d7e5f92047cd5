"""Building a small Go module, with the packages counted."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.support import go_build, progress
from tests.support.processes import require_or_skip
from tests.support.test_progress import Terminal

FLAGS = ["-trimpath", "-buildvcs=false"]


@pytest.fixture(scope="module")
def go() -> str:
    found = shutil.which("go")
    if found is None:
        require_or_skip("go", "no Go: install Go 1.26 or later")
    return found


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A module of three packages that no cache of Go's has: a part of its source is the test's own path."""
    files = {
        "go.mod": "module example.org/counted\n\ngo 1.24\n",
        "one/one.go": f'package one\n\nconst One = "{tmp_path}"\n',
        "two/two.go": 'package two\n\nimport "example.org/counted/one"\n\nconst Two = one.One + "!"\n',
        "counted/main.go": 'package main\n\nimport "example.org/counted/two"\n\nfunc main() { println(two.Two) }\n',
    }
    for name, text in files.items():
        path = tmp_path / "module" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "module"


def build(go: str, module: Path) -> None:
    target = module.parent / "bin"
    go_build.build(go, module, ["./counted"], target, title="building counted", flags=FLAGS, timeout=300)


def test_a_terminal_is_told_how_many_are_done(go: str, module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    build(go, module)
    counts = [line.partition(" s, ")[2] for line in stream.getvalue().split("\r\x1b[K") if " of " in line]
    assert counts[-1].split()[0] == counts[-1].split()[2]  # all of them
    assert "packages" in counts[0]


def test_a_package_that_does_not_compile_is_named(go: str, module: Path) -> None:
    (module / "two" / "two.go").write_text("package two\n\nconst Two = nosuch\n")
    with pytest.raises(go_build.BuildFailed, match=r"go build: exit status 1\n(?s:.*)undefined: nosuch"):
        build(go, module)
