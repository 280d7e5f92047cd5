"""The organisation at Entra ID, with the files of config/examples/entra-id, and its people and jobs."""

from __future__ import annotations

import re
import ssl
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.entra import CLUSTER, READER, RELAY, TENANT, Entra, User
from tests.support.machine import Machine, make_home, write_settings
from tests.support.world import World

EXAMPLES = Path(__file__).resolve().parents[2] / "config" / "examples" / "entra-id"
MICROSOFT = f"https://login.microsoftonline.com/{TENANT}/v2.0"
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
class EntraMachine(Machine):
    """A machine of a user, or of a job."""

    world: EntraWorld
    upn: str = ""
    """Who logs in here; empty: a job."""

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
    ) -> EntraMachine:
        """`change`: texts of the example, each a part of it, and what takes their places."""
        directory, example, tail, issuer = make_home(world, name), EXAMPLES / settings, "", {}
        if MICROSOFT in example.read_text():
            tail, issuer = f'ca_file = "{world.entra.ca_file}"\n', {MICROSOFT: world.entra.issuer}
        path = write_settings(world, directory, example, {**(change or {}), **issuer}, tail)
        return cls(world, name, directory, path, dict(env or {}), "" if user is None else user.upn)

    @classmethod
    def with_tokens(cls, world: EntraWorld, name: str, access: str, cluster: str) -> EntraMachine:
        """A machine that has one token for the relay and one for the cluster, and no login."""
        directory = make_home(world, name)
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

    def log_in(self) -> str:
        """Log in by browser, which has this user's session; return what the command said at its end."""
        context = ssl.create_default_context(cafile=self.world.entra.ca_file)
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
        )
        with (
            self.logging_in() as (process, page),
            opener.open(f"{page}&login_hint={urllib.parse.quote(self.upn)}", timeout=30) as answer,
        ):
            assert "You are logged in" in answer.read().decode()
        return process.output()

    def log_in_by_device(self) -> str:
        """Log in by a code on another device; return what the command said at its end."""
        process = self.begin("login", "--wait", "100s", "--grant-type", "device-code")
        code = process.wait_for_line(r"enter the code (\S+)", timeout=30)[1]
        self.world.entra.approve(code, self.upn)
        assert process.wait(30) == 0, process.tail()
        return process.output()
