"""The container image's recipe. There may be no engine here, so it is linted, and its promises are read from it."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from arcbridge import __version__
from release import lock
from tests.release.test_lock import entries

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
BASE = re.compile(r"python:(?P<python>\d\.\d+)-slim-[a-z]+@sha256:[0-9a-f]{64}")

# What comes from an index comes as fast as it comes.
pytestmark = pytest.mark.timeout(600)


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


def test_every_stage_is_built_on_the_base_that_is_named_by_digest() -> None:
    (base,) = re.findall(r"^ARG BASE=(.*)$", DOCKERFILE, re.MULTILINE)
    assert BASE.fullmatch(base)
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == ["${BASE}", "${BASE}"]
    # A frontend of the builder would be one more image, and one without a digest.
    assert not re.search(r"^#\s*syntax", DOCKERFILE)


def test_every_installation_is_by_hash_or_from_what_was() -> None:
    for command in re.split(r"&&", "".join(steps())):
        if re.search(r"pip (wheel|install)|install --", command):
            assert "--require-hashes" in command or "--no-index" in command, command
    assert "".join(steps()).count("--require-hashes") == 2


def test_the_python_of_the_base_is_the_one_that_is_locked_for() -> None:
    assert {found["python"] for found in BASE.finditer(DOCKERFILE)} == {lock.IMAGE_PYTHON}
    for name in lock.FROM_SOURCE:
        assert f"--no-binary {name} " in " ".join(steps())


def steps() -> list[str]:
    """What the build stage runs, in its order; continued lines are joined and comments left out."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE)
    return [re.sub(r"\\\n\s*", "", step) for step in re.findall(r"^RUN ((?:.*\\\n)*.*)$", text, re.MULTILINE)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder for the image's root, whose `src` has what the Dockerfile copies."""
    for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for name in line.split()[:-1]:
            place, copy = ROOT / name, tmp_path / "src" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if place.is_dir():
                shutil.copytree(place, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(place, copy)
    return tmp_path


def run_steps(root: Path) -> subprocess.CompletedProcess[str]:
    """Run the build stage's steps with this Python, with the image's folders below `root`."""
    script = "\n".join(re.sub(r"(^|&& )python ", rf"\1{sys.executable} ", step) for step in steps())
    return subprocess.run(
        ["bash", "-euc", script.replace("/opt/", f"{root}/opt/")],
        cwd=root / "src",
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.usefixtures("index")
def test_the_steps_of_the_build_stage_make_what_the_image_runs(root: Path) -> None:
    """There may be no engine here: the steps themselves, on this machine's Python."""
    done = run_steps(root)
    assert done.returncode == 0, done.stdout + done.stderr
    product = root / "opt" / "arcbridge"
    version = subprocess.run(
        [product / "bin" / "arcbridge", "--version"], capture_output=True, text=True, check=True, cwd=root
    )
    assert __version__ in version.stdout
    installed = {
        canonicalize_name(found.name): found.version
        for found in importlib.metadata.distributions(path=[str(next(product.glob("lib/python*/site-packages")))])
    }
    here = {"extra": ""}
    assert installed == {"arcbridge": __version__} | {
        name: str(pin.specifier).removeprefix("==")
        for name, (pin, _) in entries(lock.RUNTIME).items()
        if pin.marker is None or pin.marker.evaluate(here)
    }


@pytest.mark.usefixtures("index")
def test_a_file_that_is_not_the_locked_one_ends_the_build(root: Path) -> None:
    path = root / "src" / "config" / "locks" / "runtime.txt"
    pins = path.read_text().split("==", 2)
    # All hashes of the first entry, as after an exchange of its files at the index.
    pins[1] = re.sub(r"sha256:[0-9a-f]{64}", f"sha256:{'0' * 64}", pins[1])
    path.write_text("==".join(pins))
    done = run_steps(root)
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not (root / "opt" / "arcbridge").exists()
