"""Looks at the files and directories that settings name, as a start will use them: they are read, and nothing is made.

Each function adds what is wrong to `Problems`, with the setting that named the file; contents of secrets are in none of
the messages. What may be absent until it is needed is the caller's to say.
"""

from __future__ import annotations

import os
import re
import ssl
import stat
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from arcbridge.errors import ConfigError
from arcbridge.settings.problems import Place, Problems

if TYPE_CHECKING:
    from cryptography import x509

MOST = 1 << 20
"""Bytes of a file that is read."""
SOON = 14 * 86400.0
"""Seconds before a certificate's end from which a warning names it, as a running relay's self-check does."""
DAY_LEFT = 86400.0
"""Seconds before a certificate's end from which a relay's self-check fails."""
_DOCUMENTATION = ("example.org", "example.com", "example.net")
"""Names under which there is no service (RFC 2606 §3), which the annotated files use."""
_JOIN_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}\.[A-Za-z0-9_-]{1,256}")
_ALL_ZEROS = "sha256:" + "0" * 64


def is_there(path: Path) -> bool:
    """Return whether something has this name, or this user may not look: then the one who opens it is told why.

    `Path.exists` raises PermissionError there, before Python 3.14.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True
    return True


def nearest(path: Path) -> Path:
    """Return `path`, or the first directory around it that is there."""
    while not is_there(path) and path != path.parent:
        path = path.parent
    return path


def is_directory(path: Path) -> bool:
    """Return whether there is a directory of this name that this user may look at."""
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def closed_to_this_user(path: Path) -> str:
    """Return why this user may not look at `path`, and what to do: the first directory on the way that may not be
    searched; empty where there is none."""
    for directory in reversed(path.absolute().parents):
        if is_directory(directory) and not _may(directory, os.X_OK):
            return (
                f"this user may search nothing in {directory}: let it (chmod, chgrp), keep the file elsewhere, or run "
                "this as the user that the role runs as"
            )
    return ""


def _may(path: Path, mode: int) -> bool:
    """Return what this process may do, by its effective user where the system tells that."""
    return os.access(path, mode, effective_ids=os.access in os.supports_effective_ids)


def read(problems: Problems, setting: str, path: Path) -> bytes | None:
    """Read the contents of a file that must be there; None, with a problem, where it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST + 1)
    except FileNotFoundError:
        problems.error(setting, f"{path} does not exist")
    except PermissionError:
        why = closed_to_this_user(path)
        problems.error(setting, f"{path} cannot be read by this user{f': {why}' if why else ''}")
    except OSError as error:
        problems.error(setting, f"{path} cannot be read: {error.strerror}")
    except ValueError:
        problems.error(setting, f"{str(path)!r} is no path: it holds a character of value 0")
    else:
        if len(data) <= MOST:
            return data
        problems.error(setting, f"{path} has more than {MOST} bytes")
    return None


def check_readable(problems: Problems, setting: str, path: Path) -> None:
    """Check a file with a secret, whatever its form, that may be absent until it is used."""
    if not is_there(path):
        problems.warn(setting, f"{path} does not exist; it must be there when it is used")
    elif read(problems, setting, path) is not None:
        warn_of_readers(problems, setting, path)


def check_graph(problems: Problems, tables: Mapping[str, object]) -> None:
    """Check the files of `[graph.NAME]`.

    Secrets and the certificate may come after the start, renewed by others; the CA is read by the start.
    """
    for name, table in tables.items():
        for setting in ("client_secret_file", "federated_token_file", "key_file", "certificate_file"):
            path = getattr(table, setting)
            if path is None:
                continue
            if setting != "certificate_file":
                check_readable(problems, f"graph.{name}.{setting}", path)
            elif not is_there(path):
                problems.warn(f"graph.{name}.{setting}", f"{path} does not exist; it must be there when it is used")
            else:
                read(problems, f"graph.{name}.{setting}", path)
        ca_file: Path | None = getattr(table, "ca_file", None)
        if ca_file is not None:
            check_ca(problems, f"graph.{name}.ca_file", ca_file)


def check_secret(problems: Problems, setting: str, path: Path, *, missing: str = "error") -> str | None:
    """Check a file with one word that only its reader may know; `missing`: `error`, `warning` or `fine`. Returns the
    word."""
    if not is_there(path) and missing != "error":
        if missing == "warning":
            problems.warn(setting, f"{path} does not exist; it must be there when it is used")
        return None
    data = read(problems, setting, path)
    if data is None:
        return None
    warn_of_readers(problems, setting, path)
    text = data.decode("ascii", "replace").strip()
    if not text or not text.isascii() or len(text.split()) != 1:
        problems.error(setting, f"{setting}: {path} holds no token: one word of ASCII is needed", Place(str(path), 1))
        return None
    return text


def check_join_token(problems: Problems, setting: str, path: Path, *, missing: str) -> None:
    """Check a file with a join token, `id.secret`."""
    text = check_secret(problems, setting, path, missing=missing)
    if text is not None and _JOIN_TOKEN.fullmatch(text) is None:
        problems.error(
            setting,
            f"{setting}: {path} holds no join token: id.secret, as `arcbridge --role relay token create` prints it",
            Place(str(path), 1),
        )


def warn_of_readers(problems: Problems, setting: str, path: Path) -> None:
    """Warn where every user of this machine may read a secret. A group may: so the kubelet mounts Secrets."""
    try:
        status = path.stat()
    except OSError:
        return
    if os.name == "posix" and status.st_mode & (stat.S_IROTH | stat.S_IWOTH):
        problems.warn(setting, f"every user of this machine may read {path}: chmod o= {path}")


def check_ca(problems: Problems, setting: str, path: Path) -> str | None:
    """Check a file of CA certificates, which OpenSSL has to accept; comments may be in UTF-8. Returns its text."""
    data = read(problems, setting, path)
    if data is None:
        return None
    place = Place(str(path), 1)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        text = data.decode("ascii", "ignore")
        context.load_verify_locations(cadata=text)
    except (ssl.SSLError, ValueError):
        problems.error(setting, f"{setting}: {path} is not a PEM certificate: a CA certificate is needed here", place)
        return None
    for found in context.get_ca_certs():
        begin, end = (ssl.cert_time_to_seconds(str(found[name])) for name in ("notBefore", "notAfter"))
        _warn_of_end(problems, setting, path, begin, end)
    return text


def check_pair(
    problems: Problems, certificate: tuple[str, Path | None], key: tuple[str, Path | None], *, host: str = ""
) -> None:
    """Check a certificate and its key, both or neither; the same setting twice: one file has both. `host`: a name that
    the certificate should be for."""
    (setting, path), (key_setting, key_path) = certificate, key
    if path is None and key_path is None:
        return
    if path is None or key_path is None:
        table = setting.rpartition(".")[0]
        given, lacking = (setting, key_setting) if key_path is None else (key_setting, setting)
        problems.error(given, f"{table}: certificate and key go together; set {lacking} too, or neither")
        return
    data = read(problems, setting, path)
    key_data = data if key == certificate else read(problems, key_setting, key_path)
    files = str(path) if key == certificate else f"{path} and {key_path}"
    if key_data is not None:
        warn_of_readers(problems, key_setting, key_path)
    if data is None or key_data is None:
        return
    from arcbridge.pki.chain import load_chain

    try:
        text = data.decode("ascii")
        load_chain(
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), text, key_data.decode("ascii") if key != certificate else ""
        )
    except UnicodeDecodeError:
        problems.error(setting, f"{setting}: {files} must be PEM text", Place(str(path), 1))
        return
    except ConfigError as error:
        problems.error(setting, f"{setting}: {files}: {error.message}", Place(str(path), 1))
        return
    from cryptography import x509

    try:
        found = x509.load_pem_x509_certificate(text.encode())
    except ValueError:
        return  # a form that OpenSSL takes and `cryptography` does not read
    begin, end = found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp()
    if host and time.time() >= end:
        problems.error(setting, f"the certificate in {path} has expired: peers refuse it; replace it and its key")
    else:
        _warn_of_end(problems, setting, path, begin, end, always=bool(host))
    if host and not _is_for(found, host):
        problems.warn(setting, f"the certificate in {path} is not for {host}, by which peers know this relay")


def check_directory(problems: Problems, setting: str, directory: Path) -> None:
    """Check a directory that is written to, or the place in which it will be made."""
    what = str(directory)
    if why := closed_to_this_user(directory):
        problems.error(setting, f"{what} cannot be used by this user: {why}")
        return
    place = nearest(directory)
    if not is_directory(place):
        problems.error(setting, f"{what} cannot be a directory, because {place} is a file")
    elif _is_kernels(place):
        problems.error(setting, f"{what} cannot be made: {place} holds no files of programs")
    elif not _may(place, os.W_OK | os.X_OK):
        if place == directory:
            problems.error(setting, f"{what} cannot be written by this user")
        else:
            problems.error(setting, f"{what} does not exist, and this user may make nothing in {place}")


def check_appendable(problems: Problems, setting: str, path: Path) -> None:
    """Check a file that is opened to append, and made where it is missing; its directory must be there."""
    if why := closed_to_this_user(path):
        problems.error(setting, f"{path} cannot be written by this user: {why}")
    elif is_directory(path):
        problems.error(setting, f"{path} is a directory; name a file in it")
    elif is_there(path):
        if not _may(path, os.W_OK):
            problems.error(setting, f"{path} cannot be written by this user")
    elif not is_directory(path.parent):
        problems.error(setting, f"{path} cannot be made: there is no directory {path.parent}")
    elif _is_kernels(path.parent) or not _may(path.parent, os.W_OK | os.X_OK):
        problems.error(setting, f"{path} cannot be made: this user may make nothing in {path.parent}")


def check_not_placeholder(problems: Problems, setting: str, host: str) -> None:
    """Check that a host name is none that the annotated files use as an example."""
    name = host.lower().removesuffix(".")
    if any(name == domain or name.endswith(f".{domain}") for domain in _DOCUMENTATION):
        # With its setting, because a host may begin as the setting does: login.example.org.
        problems.error(setting, f"{setting}: {host} is the example's name; write your own")


def check_issuers(problems: Problems, file: Path, issuers: Iterable[tuple[str, str]]) -> None:
    """Check that the issuers of an authentication file, as (path in the file, URL), are not the example's."""
    lines = (read(Problems(), "authentication", file) or b"").decode("utf-8", "replace").splitlines()
    for path, url in issuers:
        found = Problems()
        check_not_placeholder(found, f"{path}.issuer.url", (urlsplit(url).hostname or "") if url else "")
        line = next((number for number, text in enumerate(lines, 1) if url and url in text), 0)
        for problem in found:
            problems.error("authentication", problem.message, Place(str(file), line))


def check_pin_setting(problems: Problems, setting: str, pin: str) -> None:
    """Check a pin, which is not the example's."""
    from arcbridge.pki.pins import check_pin

    if not pin:
        return
    with problems.collect(setting):
        if check_pin(pin) == _ALL_ZEROS:
            raise ConfigError(f"{setting}: these zeros are the example's; `token create` at the relay prints the pin")


def _is_kernels(directory: Path) -> bool:
    """Return whether the kernel makes up what is in a directory, where root also may make nothing."""
    try:
        device = directory.stat().st_dev
        return any(Path(place).stat().st_dev == device for place in ("/proc", "/sys") if is_directory(Path(place)))
    except OSError:
        return False


def _warn_of_end(
    problems: Problems, setting: str, path: Path, begin: float, end: float, *, always: bool = False
) -> None:
    """Warn of a certificate's end; `always`: also of one that never lives for long, and is soon at its end."""
    now = time.time()
    left = end - now
    if left <= 0:
        problems.warn(setting, f"the certificate in {path} has expired")
    elif now < begin:
        problems.warn(setting, f"the certificate in {path} is not valid yet; compare the clocks")
    elif left <= SOON and (always or end - begin > 2 * SOON):
        when = f"{left / 3600:.1f} h: replace it now" if left <= DAY_LEFT else f"{left / 86400:.0f} days"
        problems.warn(setting, f"the certificate in {path} expires in {when}")


def _is_for(certificate: x509.Certificate, host: str) -> bool:
    """Return whether a certificate names a host (RFC 9525 §6.3: one label may be `*`)."""
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return False
    if host in {str(address) for address in names.get_values_for_type(x509.IPAddress)}:
        return True
    found = {name.lower() for name in names.get_values_for_type(x509.DNSName)}
    return host in found or f"*.{host.partition('.')[2]}" in found
