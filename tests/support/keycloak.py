"""A real Keycloak for tests: HTTPS on loopback, a CA and a database of its own, and realms by its admin API.

    with Keycloak(tmp_path / "keycloak") as keycloak:
        realm = keycloak.create_realm("factory")
        realm.create("users", {"username": "anna", "enabled": True})

The distribution comes from Maven Central by `mvn`, once. It is built for the options of these tests and started once,
for its database and an archive of its classes (JEP 350); all of this is kept in the tests' cache, and later starts take
six seconds instead of twenty. `Unavailable` says what a machine lacks. To only prepare:
`python -m tests.support.keycloak build`.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import platform
import re
import shutil
import ssl
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import trustme
from filelock import FileLock

from tests.support.cluster import Unavailable, cache_directory
from tests.support.processes import ManagedProcess, ProcessFailed, require_or_skip, run
from tests.support.progress import Progress
from tests.support.world import fixed_port

VERSION = "26.4.0"
ARTIFACT = f"org.keycloak:keycloak-quarkus-dist:{VERSION}:zip"
SHA256 = "1b6a11a2726ac8a8dc9c91d5fafe989a75ce4f1622d7f7b45c21d5bc16629c0a"
OLDEST_JAVA = 17
MEMORY = ("-Xms64m", "-Xmx384m", "-XX:MaxMetaspaceSize=256m")
"""Bounds of heap and classes: 300 MiB resident after a start, 480 MiB at most."""
BUILD_OPTIONS = ("--db=dev-file", "--features=token-exchange")
ADMIN = ("admin", "keycloak-admin-of-the-tests")
_JAVA_OPTIONS = (
    *MEMORY,
    # Half of a start is compiling what runs once; the second compiler would only add to it.
    *("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:+ExitOnOutOfMemoryError"),
    *("-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US"),
    *(f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in ("util", "util.concurrent", "security")),
    "-Djava.util.concurrent.ForkJoinPool.common.threadFactory="
    "io.quarkus.bootstrap.forkjoin.QuarkusForkJoinWorkerThreadFactory",
    *("-Djava.util.logging.manager=org.jboss.logmanager.LogManager", "-Dpicocli.disable.closures=true"),
)
"""What `bin/kc.sh` gives the virtual machine; the shell itself would stand between us and the process."""


class AdminError(AssertionError):
    """The admin API refused a request."""

    def __init__(self, method: str, path: str, status: int, body: str) -> None:
        super().__init__(f"{method} {path}: {status} {body[:500]}")
        self.status = status


def require() -> Path:
    """Return the built distribution, or skip and say so; with `keycloak` in ARCBRIDGE_REQUIRE, fail instead."""
    try:
        return distribution()
    except Unavailable as error:
        require_or_skip("keycloak", str(error))


@functools.cache
def distribution() -> Path:
    """Return the directory with `keycloak/` (built), `data/` (a database) and `classes.jsa`.

    Takes one or two minutes the first time. Raises `Unavailable`.
    """
    java = shutil.which("java")
    if java is None:
        raise Unavailable(f"no java: install a Java runtime ({OLDEST_JAVA} or later)")
    answer = run([java, "-version"])
    version = re.search(r'version "(\d+)[^"]*"', (answer.stdout + answer.stderr).decode())
    if version is None or int(version[1]) < OLDEST_JAVA:
        raise Unavailable(f"Keycloak needs Java {OLDEST_JAVA} or later; `java -version` says {version and version[0]}")
    options = repr((BUILD_OPTIONS, _JAVA_OPTIONS, version[0], ADMIN, SHA256))
    digest = hashlib.sha256(options.encode()).hexdigest()[:20]
    cache = cache_directory()
    directory = cache / f"keycloak-{VERSION}-{digest}-{sys.platform}-{platform.machine()}"
    if (directory / "ready").exists():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "keycloak.lock"):  # of two runs at once, the second waits and finds the result
        if not (directory / "ready").exists():
            with Progress(f"preparing Keycloak {VERSION}", total=3, unit="steps") as progress:
                progress.show(0, f"fetching {ARTIFACT}")
                archive = _archive(cache)
                shutil.rmtree(directory, ignore_errors=True)
                try:
                    _prepare(archive, directory, progress)
                except (ProcessFailed, OSError) as error:
                    raise Unavailable(f"Keycloak {VERSION} could not be built or started:\n{error}") from error
            (directory / "ready").touch()
    return directory


def _archive(cache: Path) -> Path:
    """The distribution as Maven Central has it, its digest checked."""
    archive = cache / f"keycloak-{VERSION}.zip"
    if not archive.exists():
        maven = shutil.which("mvn")
        if maven is None:
            raise Unavailable(f"Keycloak is not in {cache}, and there is no mvn to fetch {ARTIFACT}: install Maven")
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            copy = [maven, "-q", "-B", "dependency:copy", f"-Dartifact={ARTIFACT}", f"-DoutputDirectory={scratch}"]
            try:
                run(copy, cwd=Path(scratch), timeout=900)
            except ProcessFailed as error:
                raise Unavailable(f"{ARTIFACT} cannot be fetched:\n{error}") from error
            found = next(Path(scratch).glob("*.zip"))
            digest = hashlib.sha256(found.read_bytes()).hexdigest()
            if digest != SHA256:
                raise Unavailable(f"{ARTIFACT} has the SHA-256 {digest} and not {SHA256}")
            found.rename(archive)
    return archive


def _prepare(archive: Path, directory: Path, progress: Progress) -> None:
    """Unpack and build, then start once where the result stays: the archive of classes knows its paths."""
    directory.mkdir()
    progress.show(1, "unpacking and building it")
    with zipfile.ZipFile(archive) as file:
        file.extractall(directory)
    home = directory / "keycloak"
    (directory / f"keycloak-{VERSION}").rename(home)
    run(["sh", home / "bin" / "kc.sh", "build", *BUILD_OPTIONS], timeout=300)
    progress.show(2, "starting it once")
    with tempfile.TemporaryDirectory() as scratch:
        first = Keycloak(Path(scratch), built=directory, first=True)
        with first:
            pass
        shutil.copytree(Path(scratch) / "data", directory / "data")


class Keycloak:
    """One server. Use as a context manager; it has ended, and its directory may go, when the context is left."""

    def __init__(self, directory: Path, *, built: Path | None = None, first: bool = False) -> None:
        """`first`: with an empty database, and writing the archive of classes at its end."""
        self._built = built or require()
        self._first = first
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.port = fixed_port()
        self.url = f"https://localhost:{self.port}"
        self.ca_file = directory / "ca.pem"
        ca = trustme.CA(organization_name="the issuer's CA")
        leaf = ca.issue_cert("localhost", "127.0.0.1")
        ca.cert_pem.write_to_path(str(self.ca_file))
        leaf.private_key_pem.write_to_path(str(directory / "key.pem"))
        (directory / "cert.pem").write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        self.context = ssl.create_default_context(cafile=self.ca_file)
        self._token = ""
        self.process: ManagedProcess

    def start(self) -> Self:
        """Start the server; it answers when this returns. Raises `ProcessFailed`."""
        home, data = self._built / "keycloak", self.directory / "data"
        if not self._first and not data.exists():
            shutil.copytree(self._built / "data", data)
        classes = self._built / "classes.jsa"
        argv = [
            "java",
            *_JAVA_OPTIONS,
            f"-XX:ArchiveClassesAtExit={classes}" if self._first else f"-XX:SharedArchiveFile={classes}",
            f"-Dkc.home.dir={home}",
            f"-Djboss.server.config.dir={home / 'conf'}",
            # Where Quarkus keeps the log of its transactions: in its home, unless it is told.
            f"-Dquarkus.transaction-manager.object-store.directory={data / 'transactions'}",
            *("-cp", str(home / "lib" / "quarkus-run.jar"), "io.quarkus.bootstrap.runner.QuarkusEntryPoint"),
            *("start", "--optimized", "--cache=local", f"--db-url-path={data}"),
            *("--http-host=127.0.0.1", f"--https-port={self.port}", f"--hostname={self.url}"),
            f"--https-certificate-file={self.directory / 'cert.pem'}",
            f"--https-certificate-key-file={self.directory / 'key.pem'}",
        ]
        environment = {"KC_BOOTSTRAP_ADMIN_USERNAME": ADMIN[0], "KC_BOOTSTRAP_ADMIN_PASSWORD": ADMIN[1]}
        self.process = ManagedProcess(argv, log_dir=self.directory / "logs", name="keycloak", env=environment)
        self.process.wait_for_url(f"{self.url}/realms/master", context=self.context, timeout=240)
        return self

    def stop(self) -> None:
        """End the server by its pid, with the time that it needs to write the archive of classes."""
        self.process.stop(120)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- talking ------------------------------------------------------------------------------------------------------

    def open(
        self,
        method: str,
        url: str,
        *,
        body: object = None,
        form: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, str, Mapping[str, str]]:
        """Ask the server: status, text and headers of its answer, whatever they are."""
        data, head = None, dict(headers or {})
        if body is not None:
            data = json.dumps(body).encode()
            head["Content-Type"] = "application/json"
        elif form is not None:
            data = urllib.parse.urlencode(form).encode()
        request = urllib.request.Request(url, data, head, method=method)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self.context)
        )
        try:
            with opener.open(request, timeout=30) as answer:
                return answer.status, answer.read().decode(), dict(answer.headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode(errors="replace"), dict(error.headers)

    def admin(self, method: str, path: str, body: object = None) -> tuple[Any, str]:
        """Ask the admin API (`path` follows /admin/realms): the document, and the id of what was made."""
        url = f"{self.url}/admin/realms{path}"
        for again in (False, True):
            headers = {"Authorization": f"Bearer {self._admin_token(again)}"}
            status, text, answered = self.open(method, url, body=body, headers=headers)
            if status != 401:
                break
        if status >= 300:
            raise AdminError(method, path, status, text)
        location = answered.get("Location") or ""
        return (json.loads(text) if text else None), location.rpartition("/")[2]

    def _admin_token(self, again: bool) -> str:
        if again or not self._token:
            form = {"grant_type": "password", "client_id": "admin-cli", "username": ADMIN[0], "password": ADMIN[1]}
            _, text, _ = self.open("POST", f"{self.url}/realms/master/protocol/openid-connect/token", form=form)
            self._token = str(json.loads(text)["access_token"])
        return self._token

    def create_realm(self, name: str, **settings: object) -> Realm:
        """Make a realm with Keycloak's defaults and these settings of a RealmRepresentation."""
        self.admin("POST", "", {"realm": name, "enabled": True, "sslRequired": "all", **settings})
        return Realm(self, name)


class Realm:
    """One realm, and what the tests change in it by the admin API."""

    def __init__(self, keycloak: Keycloak, name: str) -> None:
        self.keycloak = keycloak
        self.name = name
        self.url = f"{keycloak.url}/realms/{name}"
        """The issuer."""

    @property
    def token_url(self) -> str:
        return f"{self.url}/protocol/openid-connect/token"

    def admin(self, method: str, path: str, body: object = None) -> Any:
        """Ask the admin API; `path` follows the realm's name."""
        return self.keycloak.admin(method, f"/{self.name}/{path}", body)[0]

    def create(self, kind: str, body: object) -> str:
        """Make one of `users`, `groups`, `clients`, `client-scopes`, `components`; return its id."""
        return self.keycloak.admin("POST", f"/{self.name}/{kind}", body)[1]

    def change(self, path: str, **fields: object) -> None:
        """Replace fields of what is at `path`, such as `users/ID`."""
        self.admin("PUT", path, {**self.admin("GET", path), **fields})

    def token(self, **form: str) -> tuple[int, dict[str, Any]]:
        """Ask the token endpoint with a form."""
        status, text, _ = self.keycloak.open("POST", self.token_url, form=form)
        return status, json.loads(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the distribution and say where it is."""
    parser = argparse.ArgumentParser(prog="python -m tests.support.keycloak")
    parser.add_argument("command", choices=["build"])
    parser.parse_args(argv)
    try:
        print(distribution())
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
