"""The organisation at Entra ID, with the files of config/examples/entra-id, and its people and jobs."""

from __future__ import annotations

import os
import re
import ssl
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.entra import CLUSTER, PIPELINE, READER, RELAY, TENANT, Entra, User
from tests.support.processes import ManagedProcess, run
from tests.support.world import Client, World, arcbridge, login_ports

EXAMPLES = Path(__file__).resolve().parents[2] / "config" / "examples" / "entra-id"
MICROSOFT = f"https://login.microsoftonline.com/{TENANT}/v2.0"
NO_RELAY = "https://relay.example.org:443"
NO_PIN = "sha256:" + 64 * "0"
STAFF = "77777777-7777-7777-7777-777777777777"
"""The group of the example's policy."""
JOB_ID = "66666666-6666-6666-6666-666666666666"
"""Object id of the example's application."""


class EntraWorld(World):
    """The three roles with the files of the examples; only addresses, paths and pins are put in."""

    entra: Entra

    def start_issuer(self) -> None:
        """It runs already."""

    def authentication(self, audience: str) -> str:
        """The example of that end, for the tokens of both versions."""
        name, resource = {"arcbridge-relay": ("relay", RELAY), "arcbridge-cluster": ("agent", CLUSTER)}[audience]
        text = (EXAMPLES / f"{name}-authentication.yaml").read_text()
        head, _, entry = text.partition("jwt:\n")
        ca = "\n".join(8 * " " + line for line in self.entra.ca_file.read_text().strip().splitlines())
        trusted = f"      certificateAuthority: |\n{ca}\n"
        second = re.sub(rf"url: {re.escape(MICROSOFT)}.*\n", f"url: {self.entra.issuer}\n{trusted}", entry)
        where = f"url: {self.entra.issuer_v1}\n      discoveryURL: {self.entra.discovery_v1}\n{trusted}"
        first = re.sub(rf"url: {re.escape(MICROSOFT)}.*\n", where, entry).replace(resource, f"api://{resource}")
        assert entry not in (first, second)
        return f"{head}jwt:\n{second}{first}"

    def graph(self) -> str:
        """`[graph.NAME]` of relay and agent, as the examples have it but for addresses."""
        secret = self.directory / "graph-secret"
        new = secret.with_suffix(".new")  # the agent may read the file at any moment
        new.touch(mode=0o600)
        new.write_text(self.entra.applications[READER].secret)
        new.replace(secret)
        return f"""
[graph.example]
issuers = ["{self.entra.issuer}", "{self.entra.issuer_v1}"]
tenant = "{TENANT}"
client_id = "{READER}"
client_secret_file = "{secret}"
url = "{self.entra.graph_url}"
token_endpoint = "{self.entra.token_url}"
ca_file = "{self.entra.ca_file}"
"""


@dataclass
class Machine:
    """A home of its own, and a settings file made from an example."""

    world: EntraWorld
    name: str
    directory: Path
    settings: Path
    upn: str = ""
    """Who logs in here; empty: a job."""
    surroundings: dict[str, str] = field(default_factory=dict)

    @classmethod
    def at_work(
        cls,
        world: EntraWorld,
        name: str,
        settings: str = "client.toml",
        *,
        user: User | None = None,
        change: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        ca_file: Path | None = None,
    ) -> Machine:
        """`change`: texts of the example, each a part of it, and what takes their places."""
        directory = world.directory / "people" / name
        directory.mkdir(parents=True)
        text = (EXAMPLES / settings).read_text()
        if MICROSOFT in text:
            text += f'ca_file = "{ca_file or world.entra.ca_file}"\n'
        for placeholder, value in (
            (NO_RELAY, world.relay_url),
            (f'relay_ca_pin = "{NO_PIN}"', f'relay_ca_pin = "{world.relay_pin}"'),
            *(change or {}).items(),
        ):
            assert placeholder in text, placeholder
            text = text.replace(placeholder, value)
        text = text.replace(MICROSOFT, world.entra.issuer)
        text = re.sub(r"^cluster(_ca_pin)? = .*\n", "", text, flags=re.MULTILINE)
        path = directory / settings
        path.write_text(f'cluster = "{world.cluster}"\ntrust_first_use = true\n{text}')
        return cls(world, name, directory, path, "" if user is None else user.upn, dict(env or {}))

    @classmethod
    def with_tokens(cls, world: EntraWorld, name: str, access: str, cluster: str) -> Machine:
        """A machine that has one token for the relay and one for the cluster, and no login."""
        directory = world.directory / "people" / name
        directory.mkdir(parents=True)
        for file, token in (("access", access), ("cluster", cluster)):
            (directory / file).write_text(token)
        settings = directory / "client.toml"
        settings.write_text(
            f'''cluster = "{world.cluster}"
trust_first_use = true
relays = ["{world.relay_url}"]
relay_ca_pin = "{world.relay_pin}"
[login]
access_token_file = "access"
id_token_file = "cluster"
'''
        )
        return cls(world, name, directory, settings)

    @property
    def env(self) -> dict[str, str]:
        """A browser that says where it was sent, and leaves the rest to `log_in`."""
        return self.world.client_env(
            self.directory, {"BROWSER": "echo opened %s", "DISPLAY": ":none", **self.surroundings}
        )

    def command(self, *arguments: str) -> list[str]:
        return arcbridge("--role", "client", "--config", str(self.settings), *arguments)

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run a command to its end: status, and what the user sees."""
        done = run(self.command(*arguments), env={**os.environ, **self.env}, check=False, timeout=60)
        return done.returncode, done.stdout.decode() + done.stderr.decode()

    def begin(self, *arguments: str) -> ManagedProcess:
        """Start a command that goes on."""
        name = f"{self.name}-{len(self.world.processes)}"
        process = ManagedProcess(
            self.command(*arguments), log_dir=self.world.logs, name=name, env=self.env, cwd=self.directory
        )
        self.world.processes.append(process)
        return process

    def log_in(self) -> str:
        """Log in by browser, which has this user's session; return what the command said at its end."""
        context = ssl.create_default_context(cafile=self.world.entra.ca_file)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with login_ports():
            process = self.begin("login", "--grant-type", "authcode")
            page = process.wait_for_line(r"^opened (https://\S+)", timeout=30)[1]
            with opener.open(f"{page}&login_hint={urllib.parse.quote(self.upn)}", timeout=30) as answer:
                assert "You are logged in" in answer.read().decode()
            assert process.wait(30) == 0, process.tail()
        return process.output()

    def log_in_by_device(self) -> str:
        """Log in by a code on another device; return what the command said at its end."""
        process = self.begin("login", "--grant-type", "device-code")
        code = process.wait_for_line(r"enter the code (\S+)", timeout=30)[1]
        self.world.entra.approve(code, self.upn)
        assert process.wait(30) == 0, process.tail()
        return process.output()

    def start(self, *arguments: str) -> Client:
        """Start the proxy; it is ready when it printed the line that tools parse."""
        kubeconfig = self.directory / "kubeconfig"
        process = self.begin("--file", str(kubeconfig), "--port", "0", *arguments)
        client = Client(process, kubeconfig, self.directory, env=self.env)
        client.port = int(process.wait_for_line(r"Proxy is listening on port (\d+)", timeout=30)[1])
        process.wait_for_line(r"Start sending kubectl requests on '(.+)' context", timeout=30)
        return client


@dataclass
class EntraOrganisation:
    """`arc.Organisation` at Entra ID."""

    world: EntraWorld

    def person(self, name: str) -> tuple[Machine, str]:
        """A person by UPN."""
        user = self.world.entra.hire(f"{name}@example.org", groups=[STAFF])
        return Machine.at_work(self.world, name, user=user), user.upn

    def pipeline(self) -> tuple[Machine, str]:
        """The application with a secret, by the object id of its service principal."""
        application = self.world.entra.applications[PIPELINE]
        machine = Machine.at_work(self.world, "pipeline", "ci.toml")
        secret = machine.directory / "client-secret"
        secret.touch(mode=0o600)
        secret.write_text(application.secret)
        return machine, application.object_id
