"""The lock files: whole, with hashes, for every platform of the image, and above the floors of pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from release import lock

PROJECT = tomllib.loads((lock.ROOT / "pyproject.toml").read_text())
HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")

PROCESSORS = ("x86_64", "aarch64")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")

# What comes from an index comes as fast as it comes.
pytestmark = pytest.mark.timeout(600)


def entries(path: Path) -> dict[str, tuple[Requirement, list[str]]]:
    """Name -> what is pinned, and its hashes."""
    found = {}
    logical = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    for line in filter(None, map(str.strip, logical.splitlines())):
        pin, *_ = line.split(" --hash")
        requirement = Requirement(pin)
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{name} is pinned twice"
        found[name] = (requirement, HASH.findall(line))
        assert line.split() == [*pin.split(), *found[name][1]], line
    return found


def environment(python: str, processor: str) -> dict[str, str]:
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_machine": processor,
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }


def applies(marker: Marker | None, where: dict[str, str]) -> bool:
    return marker is None or marker.evaluate(where)


@pytest.mark.parametrize("path", [lock.RUNTIME, lock.BUILD, lock.CLIENT, lock.SITE], ids=lambda path: path.stem)
def test_each_entry_is_one_version_with_hashes(path: Path) -> None:
    found = entries(path)
    assert len(found) > 5
    for name, (requirement, hashes) in found.items():
        assert re.fullmatch(r"==[0-9][\w.]*", str(requirement.specifier)), name
        assert hashes, f"{name} has no hash"
        assert requirement.url is None, name


@pytest.mark.parametrize("path", [lock.RUNTIME, lock.BUILD, lock.CLIENT, lock.SITE], ids=lambda path: path.stem)
def test_no_index_is_named(path: Path) -> None:
    text = path.read_text()
    assert "://" not in text
    assert "index" not in text


def wanted() -> list[Requirement]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    return [Requirement(text) for part in (PROJECT["project"]["dependencies"], *extras) for text in part]


def test_the_floors_of_pyproject_are_met() -> None:
    found = entries(lock.RUNTIME)
    for requirement in wanted():
        pinned, _ = found[canonicalize_name(requirement.name)]
        version = str(pinned.specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement} but {pinned}"


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("python", PYTHONS)
def test_each_dependency_of_a_dependency_is_there(python: str, processor: str) -> None:
    """Follows what the installed distributions ask for. Where an installed version is not the pinned one, its needs are
    those of another version, so this compares names and floors alone; `test_every_platform_finds_its_files` asks the
    index about the pinned ones."""
    found, where = entries(lock.RUNTIME), environment(python, processor)
    queue, seen = wanted(), set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if not applies(requirement.marker, where) or (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        assert name in found, f"{name} is needed on Python {python}, {processor}, and not locked"
        pinned, _ = found[name]
        assert applies(pinned.marker, where), f"{name} is left out on Python {python}, {processor}"
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # not needed on this machine
        for need in map(Requirement, needs):
            for extra in ("", *requirement.extras):
                if applies(need.marker, {**where, "extra": extra}):
                    need.marker = None
                    queue.append(need)
                    break
    assert len(seen) > 15


def test_the_build_lock_has_the_build_system_of_pyproject() -> None:
    asked = {str(Requirement(line)) for line in lock.BUILD_SOURCE.read_text().splitlines() if line[:1] != "#"}
    assert set(PROJECT["build-system"]["requires"]) <= asked
    found = entries(lock.BUILD)
    for requirement in map(Requirement, asked):
        pinned, _ = found[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(str(pinned.specifier).removeprefix("==")), pinned


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("path", [lock.RUNTIME, lock.BUILD, lock.CLIENT, lock.SITE], ids=lambda path: path.stem)
@pytest.mark.parametrize("python", PYTHONS)
def test_every_platform_finds_its_files(path: Path, python: str) -> None:
    lock.check_platforms(path, python=python)


@pytest.mark.usefixtures("index")
def test_a_platform_that_finds_no_wheel_is_told(tmp_path: Path) -> None:
    """uvloop has no wheel for the Python after next, and no source is built where wheels are asked for."""
    text = lock.RUNTIME.read_text()
    at = text.index("\nuvloop==")
    alone = tmp_path / "alone.txt"
    alone.write_text(text[at:].split("\nyarl==")[0] + "\n")
    with pytest.raises(subprocess.CalledProcessError) as error:
        lock.check_platforms(alone, python="3.99")
    assert "uvloop" in error.value.stderr
