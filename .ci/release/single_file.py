"""The client as one file for a machine without Python: `arcbridge-linux-x86_64`.

PyInstaller gathers the program, the interpreter and their libraries in a directory; here that directory is put, as a
compressed archive, behind a shell script that unpacks it once (`client/head.sh`). Windows has no such shell, and gets a
zip archive of the directory. Two builds of one commit give the same bytes.
docs/decisions/0020-single-file-client.md has the reasons and the figures.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import platform
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from typing import Final

HEAD_SIZE: Final = 4096
"""Bytes of the script, filled up with spaces: the archive begins behind them."""
_SPEC: Final = Path(".ci", "release", "client", "client.spec")
_HEAD: Final = Path(".ci", "release", "client", "head.sh")


def platform_name() -> str:
    """Return this platform's name in file names and in the relay's paths, such as `linux-x86_64`."""
    return f"{sys.platform}-{platform.machine().lower()}"


def build(source: Path, python: Path, work: Path, version: str, *, epoch: int) -> Path:
    """Build the client of the tree `source` with the environment of `python`, and return the file, made in `work`.

    Arguments and errors are those of `gather`.
    """
    gathered, out = gather(source, python, work, epoch=epoch), work / f"arcbridge-{platform_name()}"
    if sys.platform == "win32":
        return zip_archive(gathered, out.with_name(f"{out.name}.zip"), epoch)
    return pack(gathered, source / _HEAD, out, version, epoch)


def gather(source: Path, python: Path, work: Path, *, epoch: int, all_roles: bool = False) -> Path:
    """Gather the client of the tree `source`, or the program of all roles, with Python and their libraries in a
    directory; return that, in `work`.

    The environment of `python` holds arcbridge, its locked dependencies and PyInstaller; `epoch` is the time of all
    that is made, in unix seconds. Raises subprocess.CalledProcessError, whose `stderr` has what PyInstaller said.
    """
    name = "all" if all_roles else "client"
    subprocess.run(
        [
            *(python, "-m", "PyInstaller", "--noconfirm", "--log-level", "WARN"),
            *("--distpath", work / "gathered", "--workpath", work / "pyinstaller" / name, source / _SPEC),
        ],
        check=True,
        cwd=work,
        env={
            **os.environ,
            "SOURCE_DATE_EPOCH": str(epoch),
            # The order of sets is in the bytecode of constants.
            "PYTHONHASHSEED": "1",
            "PYINSTALLER_CONFIG_DIR": str(work / "pyinstaller-cache"),
            **({"ARCBRIDGE_ALL_ROLES": "1"} if all_roles else {}),
        },
        capture_output=True,
        text=True,
    )
    gathered = work / "gathered" / name
    for record in gathered.rglob("*.dist-info/RECORD"):
        record.unlink()  # what was installed where: it has digests of scripts that name the directory of this build
    if sys.platform == "linux":
        _forget_search_paths(gathered, python.with_name("patchelf"))
    return gathered


def _forget_search_paths(gathered: Path, patchelf: Path) -> None:
    """Take absolute search paths out of libraries: they name directories of the machine that built Python.

    On another machine another user may own such a directory, and put a library there. By those that begin with
    `$ORIGIN` a wheel finds its own.
    """
    for path in _files(gathered):
        if path.is_file() and path.open("rb").read(4) == b"\x7fELF":
            done = subprocess.run([patchelf, "--print-rpath", path], check=False, capture_output=True, text=True)
            if done.stdout.startswith("/"):
                subprocess.run([patchelf, "--remove-rpath", path], check=True, capture_output=True, text=True)


def pack(gathered: Path, head: Path, out: Path, version: str, epoch: int) -> Path:
    """Write the script `head` and the archive of the directory `gathered` to `out`, which may be run then."""
    archive = tar_archive(gathered, epoch)
    script = head.read_text()
    for mark, text in (
        ("@VERSION@", version),
        ("@PLATFORM@", platform_name()),
        ("@DIGEST@", hashlib.sha256(archive).hexdigest()[:16]),
        ("@OFFSET@", str(HEAD_SIZE + 1)),
    ):
        script = script.replace(mark, text)
    if len(script.encode()) >= HEAD_SIZE:
        raise ValueError(f"{head.name} is longer than {HEAD_SIZE} bytes: raise HEAD_SIZE in .ci/release/single_file.py")
    out.write_bytes(script.encode().ljust(HEAD_SIZE - 1) + b"\n" + archive)
    out.chmod(0o755)
    return out


def zip_archive(gathered: Path, out: Path, epoch: int) -> Path:
    """Write the directory `gathered` to the zip archive `out`, under the name `arcbridge`, with one time."""
    moment = time.gmtime(epoch)[:6]
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in _files(gathered):
            entry = zipfile.ZipInfo(f"arcbridge/{path.relative_to(gathered).as_posix()}", moment)
            entry.compress_type = zipfile.ZIP_DEFLATED
            if path.is_file():
                archive.writestr(entry, path.read_bytes())
    return out


def tar_archive(directory: Path, epoch: int, *, root: str = "") -> bytes:
    """Return the files of `directory` as tar, gzip: in the order of their names, without users and with one time.

    `root`: a directory in the archive that they are in.
    """
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in _files(directory):
            entry = tar.gettarinfo(path, (Path(root) / path.relative_to(directory)).as_posix())
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = epoch
            # Whatever the mask of who builds: the script unpacks with one of its own.
            entry.mode = 0o755 if entry.isdir() or path.stat().st_mode & 0o100 else 0o644
            if entry.isreg():
                with path.open("rb") as file:
                    tar.addfile(entry, file)
            else:
                tar.addfile(entry)
    return gzip.compress(plain.getvalue(), compresslevel=9, mtime=0)


def _files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))
