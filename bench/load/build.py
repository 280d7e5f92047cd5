"""Compiles a C program into a cache outside the repository; the key is its source, the headers, compiler and flags."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("load.c")
HEADERS = Path(__file__).parent
FLAGS = ("-O2", "-std=gnu11", "-Wall", "-Wextra", "-pthread")


class NoCompiler(Exception):
    """The C compiler is missing or failed; the message says what to do."""


def cache_directory() -> Path:
    """Return the directory that keeps compiled programs between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "arcbridge-bench"


def build(source: Path = SOURCE, flags: tuple[str, ...] = ()) -> Path:
    """Compile the program, with further flags, if needed and return its path. Raises NoCompiler.

    There is no fallback in Python on purpose: it would be the bottleneck, and every figure would be its own.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise NoCompiler(
            "the benchmark's load generator and its link are C programs, and there is no C compiler here: install one "
            "(Debian, Ubuntu: apt-get install gcc libc6-dev; Fedora: dnf install gcc; Alpine: apk add gcc musl-dev), "
            "or set CC"
        )
    headers = [header.read_bytes() for header in sorted(HEADERS.glob("*.h"))]
    parts = (source.read_bytes(), *headers, compiler.encode(), " ".join((*FLAGS, *flags)).encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    program = cache_directory() / f"{source.stem}-{key}"
    if program.exists():
        return program
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
        fresh = Path(scratch) / source.stem
        command = [*compiler.split(), *FLAGS, *flags, f"-I{HEADERS}", "-o", str(fresh), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoCompiler(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
        fresh.replace(program)
    return program
