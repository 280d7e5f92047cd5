"""A release: the same bytes from the same commit, checksums over all of it, and a signature that says who vouches."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from arcbridge import __version__
from release import artifacts, lock, single_file
from tests.support.kube_programs import Unavailable, helm
from tests.support.processes import require_or_skip

SECURITY = lock.ROOT / "SECURITY.md"

# What comes from an index comes as fast as it comes.
pytestmark = pytest.mark.timeout(600)


def block(containing: str) -> list[str]:
    """The lines of the code block of SECURITY.md with this text."""
    for found in re.findall(r"(?:^    .+\n)+", SECURITY.read_text(), re.MULTILINE):
        if containing in found:
            return [line.strip() for line in found.splitlines()]
    raise AssertionError(f"SECURITY.md has no block with {containing!r}")


def shell(lines: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", "\n".join(lines)], cwd=directory, capture_output=True, text=True, check=False, timeout=60
    )


def test_two_builds_have_the_same_bytes(dist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one from another directory, at another time, by a user with another mask and time zone."""
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    before = os.umask(0o077)
    try:
        second = artifacts.build(tmp_path / "second")
    finally:
        os.umask(before)
    assert sorted(path.name for path in second) == sorted(path.name for path in dist.iterdir())
    for path in second:
        assert path.read_bytes() == (dist / path.name).read_bytes(), path.name


def test_the_sums_of_a_part_are_those_of_the_whole(dist: Path, tmp_path: Path) -> None:
    """A runner of another system builds a part of a release, whose sums are written where all files are."""
    (path,) = dist.glob("*.cdx.json")
    shutil.copy(path, tmp_path)
    (line,) = artifacts.checksums(tmp_path).read_text().splitlines()
    assert line in (dist / artifacts.SUMS).read_text().splitlines()


def test_it_holds_what_a_release_is(dist: Path) -> None:
    names = {path.name for path in dist.iterdir()}
    assert {f"arcbridge-{__version__}-py3-none-any.whl", f"arcbridge-{__version__}.tar.gz", "SHA256SUMS"} < names
    assert {f"{chart}-{__version__}.tgz" for chart in artifacts.CHARTS} < names
    assert len([name for name in names if name.endswith((".deb", ".rpm"))]) == 6
    assert len(names) == 14
    with zipfile.ZipFile(dist / f"arcbridge-{__version__}-py3-none-any.whl") as wheel:
        inside = wheel.namelist()
    data = f"arcbridge-{__version__}.data"
    assert {name.split("/")[0] for name in inside} == {"arcbridge", data, f"arcbridge-{__version__}.dist-info"}
    assert {name for name in inside if name.startswith(data)} == {
        f"{data}/data/share/man/{page}"
        for page in ("man1/arcbridge.1", "man8/arcbridge-relay.8", "man8/arcbridge-agent.8")
    }
    with tarfile.open(dist / f"arcbridge-{__version__}.tar.gz") as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"arcbridge", "config", "docs", "SECURITY.md", "pyproject.toml"} <= top
    assert not top & {".git", ".venv", "bench", "dist", "tests"}


def test_the_wheel_of_the_source_archive_is_the_wheel(dist: Path, index: None, tmp_path: Path) -> None:
    with tarfile.open(dist / f"arcbridge-{__version__}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / f"arcbridge-{__version__}"
    subprocess.run(
        [
            *(Path(sys.executable).parent / "uv", "build", "--quiet", "--wheel", "--no-config"),
            *("--build-constraints", "config/locks/build.txt", "--require-hashes"),
        ],
        cwd=source,
        check=True,
    )
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as made, zipfile.ZipFile(dist / wheel.name) as released:
        assert made.namelist() == released.namelist()
        for name in made.namelist():
            assert made.read(name) == released.read(name), name


@pytest.mark.parametrize("name", artifacts.CHARTS)
def test_helm_has_the_chart_of_the_clone(dist: Path, name: str) -> None:
    """Packed by us, so that two builds have the same bytes, and read by Helm."""
    try:
        program = helm()
    except Unavailable as error:
        require_or_skip("helm", str(error))
    values = ("--values", lock.ROOT / "config" / "helm" / name / "ci" / "values.yaml")
    rendered = [
        subprocess.run(
            [program, "template", "agent", chart, *values], capture_output=True, text=True, check=True
        ).stdout
        for chart in (dist / f"{name}-{__version__}.tgz", lock.ROOT / "config" / "helm" / name)
    ]
    assert rendered[0] == rendered[1] != ""


def test_what_is_built_names_its_commit(dist: Path) -> None:
    """The wheel, and with it the image; the single-file client."""
    commit = subprocess.run(
        ["git", "log", "-1", "--format=%H %cs"], cwd=lock.ROOT, capture_output=True, text=True
    ).stdout
    with zipfile.ZipFile(dist / f"arcbridge-{__version__}-py3-none-any.whl") as wheel:
        assert wheel.read("arcbridge/commit.txt").decode() == commit
    said = subprocess.run(
        [dist / f"arcbridge-{single_file.platform_name()}", "version"], capture_output=True, text=True
    )
    assert said.stdout == f"arcbridge {__version__} (commit {commit[:12]}, {commit.split()[1]})\n", said.stderr


def test_a_directory_with_nothing_in_it_has_no_sums(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file of a release"):
        artifacts.checksums(tmp_path)


def test_a_directory_with_anything_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "older.whl").touch()
    with pytest.raises(ValueError, match=r"older\.whl"):
        artifacts.build(tmp_path)


@pytest.fixture
def release(dist: Path, tmp_path: Path) -> Path:
    """A copy of the release, signed with a throw-away key whose public half a verifier has."""
    copy = tmp_path / "dist"
    shutil.copytree(dist, copy)
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", key], check=True)
    (copy / "allowed_signers").write_text(f"releases@arcbridge {key.with_suffix('.pub').read_text()}")
    signing = [line.replace("KEY", str(key), 1) for line in block("-Y sign")]
    done = shell(signing, copy)
    assert done.returncode == 0, done.stderr
    return copy


def test_a_signed_release_verifies_with_the_commands_of_the_page(release: Path) -> None:
    done = shell(block("-Y verify"), release)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Good "arcbridge-release" signature for releases@arcbridge' in done.stdout
    assert done.stdout.count(": OK") == 13


@pytest.mark.parametrize(
    "name",
    [
        "*.whl",
        "*.tar.gz",
        "arcbridge-agent-*.tgz",
        "arcbridge-relay-*.tgz",
        "arcbridge-docs-*.tgz",
        "*.cdx.json",
        "arcbridge-linux-*",
        "arcbridge_*.deb",
        "arcbridge-relay-*.rpm",
    ],
)
def test_a_changed_artifact_is_found(release: Path, name: str) -> None:
    (path,) = release.glob(name)
    path.write_bytes(path.read_bytes() + b"\n")
    done = shell(block("-Y verify"), release)
    assert done.returncode != 0
    assert f"{path.name}: FAILED" in done.stdout


def test_changed_sums_are_found(release: Path) -> None:
    sums = release / "SHA256SUMS"
    sums.write_text(sums.read_text().replace("a", "b", 1))
    assert shell(block("-Y verify"), release).returncode != 0


def test_the_signature_of_another_key_is_found(release: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", other], check=True)
    (release / "SHA256SUMS.sig").unlink()
    done = shell([line.replace("KEY", str(other), 1) for line in block("-Y sign")], release)
    assert done.returncode == 0
    assert shell(block("-Y verify"), release).returncode != 0


def test_a_signature_for_another_purpose_is_found(release: Path, tmp_path: Path) -> None:
    (release / "SHA256SUMS.sig").unlink()
    subprocess.run(
        ["ssh-keygen", "-q", "-Y", "sign", "-f", tmp_path / "key", "-n", "file", release / "SHA256SUMS"], check=True
    )
    assert shell(block("-Y verify"), release).returncode != 0
