"""Keeps the key of a login (`identity.proof`) in a file (0600) beside the login's tokens; it is made once.

The tokens of a login are bound to this key, so a copy of them is worth nothing without the file, and a login whose
file is lost needs a new login. Invariant: of processes that start together one makes the key, and all get that one.
Keys for tokens from commands and of workloads are never written.
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path

from arcbridge.errors import ConfigError, StateError
from arcbridge.identity.proof import MAX_KEY_FILE, ProofKey
from arcbridge.pki.private_files import ensure_private_directory, locked, others_may_use, read_file, write_private


def load(path: Path) -> ProofKey | None:
    """Return the key in the file at `path`, None when there is no file.

    Raises StateError when it cannot be read, is no key, or may be read by other users.
    """
    data = read_file(path, limit=MAX_KEY_FILE)
    if data is None:
        return None
    advice = "remove the file and log in again; where login.proof_key_file names it,"
    try:
        status = os.stat(path)
    except OSError as error:
        raise StateError(f"cannot read {path}: {error.strerror}") from error
    if others_may_use(status):
        mode = f"mode {stat.S_IMODE(status.st_mode):o}"
        raise StateError(f"other users may read the key in {path} ({mode}): {advice} chmod 600 {path}")
    try:
        return _parsed(data)
    except StateError as error:
        raise StateError(f"{path} is damaged ({error.message}): {advice} put the key there again") from error


def required(path: Path) -> ProofKey:
    """Return the key of `login.proof_key_file`. Raises ConfigError where there is none that can be used."""
    try:
        key = load(path)
    except StateError as error:
        raise ConfigError(f"login.proof_key_file: {error.message}") from error
    if key is None:
        raise ConfigError(f"login.proof_key_file: {path} does not exist; `arcbridge --role client key` makes it")
    return key


def load_or_make(path: Path) -> ProofKey:
    """Return the key in the file at `path`, which is made first where it is missing. Raises StateError as `load`."""
    key = load(path)
    if key is not None:
        return key
    ensure_private_directory(path.parent)
    with locked(path.with_name(f".{path.name}.lock")):
        key = load(path)
        if key is None:
            key = ProofKey.generate()
            write_private(path, key.to_jwk())
    return key


@lru_cache(maxsize=4)
def _parsed(data: bytes) -> ProofKey:
    """Return the key of a file: the same one while the file is the same, because that one is ready to sign."""
    return ProofKey.from_jwk(data)


def remove(path: Path) -> bool:
    """Remove the file of a key or of its tokens; False when there was none. Raises StateError."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StateError(f"cannot remove {path}: {error.strerror}") from error
    return True
