"""The artifacts of a release: wheel, source archive, charts, bill of materials, single-file client, deb and rpm, site,
checksums.

Two builds of one commit give the same bytes: what is built is the commit and not the working tree, every tool is locked
by hash, and every time is the commit's. This module signs nothing; `publish` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from release import linux_packages, sbom, single_file, site
from release.lock import FROM_SOURCE, ROOT

CHARTS: Final = ("arcbridge-agent", "arcbridge-relay")
SUMS: Final = "SHA256SUMS"


def build(out: Path, *, commit: str = "HEAD") -> list[Path]:
    """Build all artifacts of a commit into `out` and return their paths.

    Raises `ValueError` when `out` holds anything: checksums of a release are about all that lies beside them.
    """
    with _making(out, commit) as tools:
        made = [*tools.packages(), *map(tools.chart, CHARTS), *tools.of_platform(), *tools.services(), tools.site()]
        placed = [Path(shutil.copy(path, out)) for path in sorted(made)]
    return [*placed, checksums(out)]


def client_file(out: Path, *, commit: str = "HEAD") -> list[Path]:
    """Build what each platform has of its own into `out` and return the paths: the single-file client, the bill of
    materials of what is in it, and on Linux the program as deb and rpm.

    What a release has of the other platforms: their sums are written where all files are. Raises as `build` does.
    """
    with _making(out, commit) as tools:
        tools.packages()
        return [Path(shutil.copy(path, out)) for path in tools.of_platform()]


def bill_of_materials(out: Path, *, commit: str = "HEAD") -> Path:
    """Write the bill of materials of a commit to `out` and return its path."""
    with tempfile.TemporaryDirectory(prefix="arcbridge-release-") as work:
        tools = Tools(commit, Path(work))
        tools.packages()
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(tools.bill_of_materials(), out))


def checksums(out: Path) -> Path:
    """Write the sums of all files in `out` to `SHA256SUMS` there, in place of older ones, and return its path."""
    present = sorted(out.iterdir()) if out.is_dir() else []
    paths = [path for path in present if path.is_file() and not path.name.startswith(SUMS)]
    if not paths:
        raise ValueError(f"{out} has no file of a release: run `make dist` before")
    (out / SUMS).write_text("".join(f"{sha256(path)}  {path.name}\n" for path in paths), newline="\n")
    return out / SUMS


@contextlib.contextmanager
def _making(out: Path, commit: str) -> Iterator[Tools]:
    if out.exists() and (present := sorted(path.name for path in out.iterdir())):
        raise ValueError(f"{out} is not empty ({present[0]}): remove it, or give another directory with OUT=")
    with tempfile.TemporaryDirectory(prefix="arcbridge-release-") as work:
        out.mkdir(parents=True, exist_ok=True)
        yield Tools(commit, Path(work))


class Tools:
    """A commit's files and the tools that it locks, in a directory which the caller removes."""

    def __init__(self, commit: str, work: Path) -> None:
        self._work = work
        self._source = work / "source"
        self._python = _python_of(work / "tools")
        self._product = work / "product"
        """The environment that the bill of materials describes."""
        self._made = work / "made"
        self._epoch = _check_out(commit, self._source)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", work / "tools"], check=True)
        self._pip(
            *("install", "--no-compile", "--require-hashes", "--only-binary", ":all:"),
            *("--requirement", str(self._source / "config" / "locks" / "build.txt")),
        )

    def packages(self) -> list[Path]:
        """Build wheel and source archive."""
        self._run("-m", "hatchling", "build", "--directory", str(self._made), "--target", "wheel", "--target", "sdist")
        return [next(self._made.glob("*.whl")), next(self._made.glob("*.tar.gz"))]

    def bill_of_materials(self) -> Path:
        """Install the wheel and its locked dependencies, and describe what is installed then."""
        wheel = next(self._made.glob("*.whl"))
        downloads, wheels, product = self._work / "downloads", self._work / "wheels", self._product
        from_source = [word for name in FROM_SOURCE for word in ("--no-binary", name)]
        self._pip(
            *(
                "download",
                "--no-deps",
                "--require-hashes",
                "--no-build-isolation",
                "--only-binary",
                ":all:",
                *from_source,
            ),
            *("--dest", str(downloads), "--requirement", str(self._source / "config" / "locks" / "runtime.txt")),
        )
        self._pip(
            *("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(wheels)),
            *(str(path) for path in sorted(downloads.iterdir())),
        )
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", product], check=True)
        # By name, as from an index: what is installed from a path is recorded by that path.
        self._pip(
            *("--isolated", "install", "--no-compile", "--no-index"),
            *("--find-links", str(wheels), "--find-links", str(self._made), f"arcbridge[{','.join(self._extras())}]"),
            python=_python_of(product),
        )
        artifacts = {path.name: sha256(path) for path in [*downloads.iterdir(), wheel]}
        bill = self._made / f"{'-'.join(wheel.name.split('-')[:2])}-{single_file.platform_name()}.cdx.json"
        bill.write_text(
            sbom.describe(_python_of(product), self._source / "pyproject.toml", artifacts, epoch=self._epoch)
        )
        return bill

    def chart(self, chart: str) -> Path:
        """Pack a chart as Helm does, which would write the time of the build into it."""
        source = self._source / "config" / "helm" / chart
        version = re.search(r"^version: (\S+)$", (source / "Chart.yaml").read_text(), re.MULTILINE)
        if version is None:
            raise ValueError(f"config/helm/{chart}/Chart.yaml has no version")
        packed = self._made / f"{chart}-{version[1]}.tgz"
        packed.write_bytes(single_file.tar_archive(source, self._epoch, root=chart))
        return packed

    def of_platform(self) -> list[Path]:
        """Build the bill of materials, the single-file client, and on Linux the program's packages.

        The last two are made in the environment of the bill, to which their builders are added.
        """
        bill = self.bill_of_materials()
        self._pip(
            *("install", "--no-compile", "--require-hashes", "--only-binary", ":all:"),
            *("--requirement", str(self._source / "config" / "locks" / "client.txt")),
            python=_python_of(self._product),
        )
        work = self._work / "client"
        work.mkdir()
        python = _python_of(self._product)
        client = single_file.build(self._source, python, work, self._version(), epoch=self._epoch)
        if sys.platform != "linux":
            return [bill, client]
        gathered = single_file.gather(self._source, python, work, epoch=self._epoch, all_roles=True)
        return [bill, client, *self._packager().program(gathered, bill)]

    def services(self) -> list[Path]:
        """Pack the services of relay and agent, with the builder that `of_platform` has installed."""
        return [path for role in linux_packages.ROLES for path in self._packager().service(role)]

    def site(self) -> Path:
        """Make a site of the documentation, with tools of their own, and pack it."""
        tools, out = self._work / "site-tools", self._work / "site"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tools], check=True)
        self._pip(
            *("install", "--no-compile", "--require-hashes", "--only-binary", ":all:"),
            *("--requirement", str(self._source / "config" / "locks" / "site.txt")),
            python=_python_of(tools),
        )
        site.build(self._source, out, _python_of(tools), epoch=self._epoch)
        packed = self._made / f"arcbridge-docs-{self._version()}.tgz"
        packed.write_bytes(single_file.tar_archive(out, self._epoch, root=packed.stem))
        return packed

    def _version(self) -> str:
        return next(self._made.glob("*.whl")).name.split("-")[1]

    def _packager(self) -> linux_packages.Packager:
        python = _python_of(self._product)
        return linux_packages.Packager(self._source, python, self._made, self._version(), epoch=self._epoch)

    def _extras(self) -> list[str]:
        with (self._source / "pyproject.toml").open("rb") as file:
            return sorted(tomllib.load(file)["project"]["optional-dependencies"])

    def _pip(self, *arguments: str, python: Path | None = None) -> None:
        """Run this interpreter's pip on an environment: that of the tools, if no other one is given."""
        options = ("-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python or self._python))
        self._run(*options, *arguments, python=Path(sys.executable))

    def _run(self, *arguments: str, python: Path | None = None) -> None:
        subprocess.run(
            [python or self._python, *arguments],
            check=True,
            cwd=self._source,
            env={**os.environ, "SOURCE_DATE_EPOCH": str(self._epoch)},
            capture_output=True,
            text=True,
        )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_out(commit: str, source: Path) -> int:
    """Write the files of a commit to `source` and return the commit's time."""
    source.mkdir()
    archive = subprocess.run(["git", "archive", commit], check=True, cwd=ROOT, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(source, filter="data")
    shown = subprocess.run(
        ["git", "log", "-1", "--format=%ct", commit], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    return int(shown.stdout)


def _python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
