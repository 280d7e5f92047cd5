"""A machine of a person or a job beside a world: a home, a settings file made from an example, the client's commands.

Who logs in there, and how, belongs to the identity provider; `log_in` is its own.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.cluster import Cluster
from tests.support.processes import ManagedProcess, run
from tests.support.world import Client, World, arcbridge, login_ports

NO_RELAY = "https://relay.example.org:443"
NO_PIN = "sha256:" + 64 * "0"


def make_home(world: World, name: str) -> Path:
    """Return a new directory for a machine."""
    directory = world.directory / "people" / name
    directory.mkdir(parents=True)
    return directory


def write_settings(world: World, directory: Path, example: Path, change: Mapping[str, str], tail: str) -> Path:
    """Write an example's settings with a world's relay; `change`: parts of the example, and what takes their places."""
    text = example.read_text()
    pin = {f'relay_ca_pin = "{NO_PIN}"': f'relay_ca_pin = "{world.relay_pin}"'}
    for placeholder, value in {NO_RELAY: world.relay_url, **pin, **change}.items():
        assert placeholder in text, placeholder
        text = text.replace(placeholder, value)
    text = re.sub(r"^cluster(_ca_pin)? = .*\n", "", text, flags=re.MULTILINE)
    path = directory / example.name
    path.write_text(f'cluster = "{world.cluster}"\ntrust_first_use = true\n{text}{tail}')
    return path


def claims(token: str) -> dict[str, Any]:
    """What a token says."""
    part = token.split(".")[1]
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return found


@dataclass
class Machine:
    """A home and the settings file that its commands read."""

    world: World
    name: str
    directory: Path
    settings: Path | None
    """None: nothing is set but the home."""
    environment: dict[str, str] = field(default_factory=dict)
    """What its commands find besides."""

    @property
    def env(self) -> dict[str, str]:
        """A browser that says where it was sent, and opens nothing."""
        browser = {"BROWSER": "echo opened %s", "DISPLAY": ":none"}
        return self.world.client_env(self.directory, {**browser, **self.environment})

    def command(self, *arguments: str) -> list[str]:
        own = () if self.settings is None else ("--role", "client", "--config", str(self.settings))
        return arcbridge(*own, *arguments)

    def run(self, *arguments: str, check: bool = True) -> tuple[int, str]:
        """Run a command to its end: status, and what the user sees."""
        done = run(self.command(*arguments), env={**os.environ, **self.env}, check=check, timeout=60)
        return done.returncode, done.stdout.decode() + done.stderr.decode()

    def begin(self, *arguments: str) -> ManagedProcess:
        """Start a command that goes on."""
        name = f"{self.name}-{len(self.world.processes)}"
        process = ManagedProcess(
            self.command(*arguments), log_dir=self.world.logs, name=name, env=self.env, cwd=self.directory
        )
        self.world.processes.append(process)
        return process

    @property
    def kept(self) -> dict[str, Any]:
        """What the login has kept on this machine."""
        (file,) = (self.directory / "cache").rglob("tokens/*.json")
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    @property
    def cluster_token(self) -> str:
        """The kept token for the cluster."""
        (one,) = self.kept["by_audience"].values()
        return str(one["access_token"])

    @property
    def key_file(self) -> Path:
        """The key to which the login's tokens are bound."""
        (file,) = (self.directory / "cache").rglob("tokens/*.key")
        return file

    @contextlib.contextmanager
    def logging_in(self) -> Iterator[tuple[ManagedProcess, str]]:
        """A login by browser: the command, which has ended well behind the block, and the page that it has opened."""
        with login_ports():
            process = self.begin("login", "--wait", "100s", "--grant-type", "authcode")
            yield process, str(process.wait_for_line(r"^opened (https://\S+)", timeout=30)[1])
            assert process.wait(30) == 0, process.tail()

    def log_in(self) -> str:
        """Log in by browser as the person of this machine; return what the command said at its end."""
        raise NotImplementedError

    def start(self, *arguments: str) -> Client:
        """Start the proxy; it is ready when it printed the line that tools parse."""
        kubeconfig = self.directory / "kubeconfig"
        process = self.begin("--file", str(kubeconfig), "--port", "0", *arguments)
        client = Client(process, kubeconfig, self.directory, env=self.env)
        client.port = int(process.wait_for_line(r"Proxy is listening on port (\d+)", timeout=30)[1])
        process.wait_for_line(r"Start sending kubectl requests on '(.+)' context", timeout=30)
        return client


class Shell:
    """kubectl with what the client of a machine saved."""

    def __init__(self, cluster: Cluster, machine: Machine) -> None:
        self.kubectl = cluster.kubectl_for(kubeconfig=machine.directory / "kubeconfig")

    def whoami(self) -> dict[str, object]:
        """Whom the API server takes this kubectl for."""
        answer = self.kubectl.run("auth", "whoami", "-o", "json").stdout
        found: dict[str, object] = json.loads(answer)["status"]["userInfo"]
        return found

    def groups(self) -> set[str]:
        """The groups of `whoami`."""
        found = self.whoami()["groups"]
        assert isinstance(found, list)
        return set(found)

    def refusal(self, *arguments: str) -> str:
        """What kubectl says where it may not; empty where it may."""
        done = self.kubectl.run(*(arguments or ("auth", "whoami")), check=False)
        return done.stdout + done.stderr if done.returncode else ""

    def says(self, words: str) -> bool:
        """Whether kubectl refuses with these words."""
        return words in self.refusal()
