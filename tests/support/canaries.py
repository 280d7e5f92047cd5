"""Secrets of a run, and where they were found again: whole or in pieces, as they are, in base64, in hexadecimal.

`Canaries` is told each secret; `find` says which of them some bytes hold, even if only sixteen characters of one. The
recorder is a `sitecustomize` for the processes under test: it writes down secrets that a process makes for itself and
never shows (dial tokens, resume secrets, PKCE verifiers), so that they can be looked for as well.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key

PIECE = 16
"""Characters of a piece: what is shorter tells nothing of a secret of 128 bits or more."""

_BLOCK = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.+?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL)

RECORDER = """
import os, secrets, sys

# For the roles alone: the processes of the test follow it, as most programs do.
if "arcbridge" in sys.orig_argv and "ARCBRIDGE_TEST_TLS_KEYS" in os.environ:
    os.environ["SSLKEYLOGFILE"] = os.environ["ARCBRIDGE_TEST_TLS_KEYS"]

def _record(kind, value):
    path = os.path.join(os.environ["ARCBRIDGE_TEST_RECORD"], str(os.getpid()))
    with open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as file:
        file.write(kind + " " + value + "\\n")

def _caller():
    return sys._getframe(2).f_globals.get("__name__", "")

_urandom, _token, _seen = os.urandom, secrets.token_urlsafe, {}

def _is_second(caller):
    _seen[caller] = _seen.get(caller, 0) + 1
    return _seen[caller] % 2 == 0

def urandom(size):
    value = _urandom(size)
    # A session's id is made first, then its secret.
    if size == 16 and _caller() == "arcbridge.agent.agent_session" and _is_second("sessions"):
        _record("resume-secret", value.hex())
    return value

def token_urlsafe(size=None):
    value = _token(size)
    caller = _caller()
    if caller == "arcbridge.relay.pending_dials":
        _record("dial-token", value)
    # A login makes the verifier first, then the state, which the user is shown in an address.
    elif caller == "arcbridge.client.credentials.login" and not _is_second("login"):
        _record("pkce-verifier", value)
    return value

os.urandom, secrets.token_urlsafe = urandom, token_urlsafe
"""


class Canaries:
    """The secrets of a run by name. Names begin with their kind: `token/…`, `key/…`."""

    def __init__(self) -> None:
        self._pieces: dict[bytes, str] = {}
        self.names: set[str] = set()

    def add(self, name: str, secret: str | bytes) -> None:
        """Look for `secret`. Of a JWT the signature counts: the rest is much alike in all tokens of a user."""
        raw = secret.encode() if isinstance(secret, str) else secret
        if raw.startswith(b"eyJ") and raw.count(b".") == 2:
            signature = raw.rpartition(b".")[2]
            parts = [signature, *_base64(signature)]
        else:
            parts = [raw, raw.hex().encode(), *_base64(raw), quote(raw, safe="").encode()]
        pieces = {part[at : at + PIECE] for part in parts for at in range(max(len(part) - PIECE + 1, 0))}
        assert pieces, f"{name} is too short to be looked for"
        self._pieces |= dict.fromkeys(pieces, name)
        self.names.add(name)

    def add_keys(self, name: str, data: bytes) -> int:
        """Look for the private numbers of every private key in `data` (PEM, or within base64); return how many."""
        found = 0
        for text in (data, *_decoded(data)):
            for block in _BLOCK.findall(text.replace(b"\\n", b"\n")):
                try:
                    key = load_pem_private_key(block + b"\n", None)
                except (ValueError, TypeError):
                    continue
                found += 1
                # Not the PEM: it holds the public key too, which certificates show.
                if isinstance(key, ec.EllipticCurvePrivateKey):
                    self.add(f"{name}/{found}", key.private_numbers().private_value.to_bytes(32, "big"))
                elif isinstance(key, rsa.RSAPrivateKey):
                    self.add(f"{name}/{found}", key.private_numbers().p.to_bytes(128, "big")[:64])
        return found

    def add_recorded(self, directory: Path) -> None:
        """Look for what the recorder wrote down."""
        for path in sorted(directory.iterdir()):
            for number, line in enumerate(path.read_text().splitlines()):
                kind, value = line.split()
                self.add(f"{kind}/{path.name}-{number}", bytes.fromhex(value) if kind == "resume-secret" else value)

    def find(self, data: bytes) -> set[str]:
        """The names of the secrets of which `data` holds a piece; within base64 and JSON too."""
        pieces = self._pieces
        found = set()
        for text in (data, *_decoded(data)):
            found |= {
                pieces[text[at : at + PIECE]] for at in range(len(text) - PIECE + 1) if text[at : at + PIECE] in pieces
            }
        return found


def install_recorder(directory: Path) -> dict[str, str]:
    """Make the recorder below `directory`; return the environment in which it records to `directory`/records."""
    (directory / "recorder").mkdir()
    (directory / "recorder" / "sitecustomize.py").write_text(RECORDER)
    (directory / "records").mkdir()
    former = os.environ.get("PYTHONPATH", "")
    path = f"{directory / 'recorder'}{os.pathsep + former if former else ''}"
    return {"PYTHONPATH": path, "ARCBRIDGE_TEST_RECORD": str(directory / "records")}


def _base64(raw: bytes) -> Iterable[bytes]:
    """How `raw` looks inside of base64 and base64url, wherever it begins."""
    for before in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            # The characters at both ends depend on the neighbours too.
            yield encode(b"\0" * before + raw).rstrip(b"=")[before + 1 : -1]


def _decoded(data: bytes) -> Iterable[bytes]:
    """What long words of base64 in `data` stand for."""
    for word in re.findall(rb"[A-Za-z0-9+/]{100,}", data):
        yield base64.b64decode(word[: len(word) // 4 * 4])
