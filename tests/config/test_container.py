"""The container image's recipe. There may be no engine here, so it is linted, and its promises are read from it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from arcbridge import __version__

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    command = [Path(sys.executable).parent / "hadolint", "--failure-threshold", "style", str(ROOT / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_what_runs_is_not_what_builds() -> None:
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    assert len(stages) == 2
    run = stages[1]
    assert "pip install" not in run
    assert "RUN " not in run
    assert re.search(r"^USER 65532:65532$", run, re.MULTILINE)
    assert not re.search(r"^HEALTHCHECK", run, re.MULTILINE)
    assert re.search(r'^ENTRYPOINT \["/opt/arcbridge/bin/arcbridge"\]$', run, re.MULTILINE)
    for name in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in run
    assert f"ARG VERSION={__version__}" in run


def test_no_secret_and_no_setting_of_ours_is_baked_in() -> None:
    assert "ARCBRIDGE_" not in DOCKERFILE
    assert not re.search(r"(?i)(token|password|secret)=", DOCKERFILE)


def test_the_context_holds_what_is_copied_and_nothing_else() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in ignore if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {line[1:] for line in rules if line.startswith("!")}
    copied = set()
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        copied |= set(line.split()[:-1])
    assert copied == let_in


def test_the_build_has_every_file_that_the_package_names() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {project["readme"], *project["license-files"]}
    assert needed <= set(DOCKERFILE.split())
