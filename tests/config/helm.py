"""A real Helm and this repository's charts, for tests."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .rendered import Rendered

ROOT = Path(__file__).resolve().parents[2]
AGENT = ROOT / "config/helm/arcbridge-agent"
RELAY = ROOT / "config/helm/arcbridge-relay"
NAMESPACE = "remote"


class Helm:
    """A real Helm with a home of its own, and one of the charts, whose name its release has."""

    def __init__(self, binary: Path, home: Path, kubeconfig: Path | None = None, chart: Path = AGENT) -> None:
        self.binary = binary
        self._release = (chart.name, str(chart), "--namespace", NAMESPACE, "-f", str(chart / "ci/values.yaml"))
        self.env = {**os.environ, "HOME": str(home), "KUBECONFIG": str(kubeconfig or home / "none"),
                    "HELM_CACHE_HOME": str(home / "cache"), "HELM_CONFIG_HOME": str(home / "config"),
                    "HELM_DATA_HOME": str(home / "data")}  # fmt: skip

    def run(self, *args: str, check: bool = True, timeout: float = 90) -> subprocess.CompletedProcess[str]:
        command = [self.binary, *args]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout, check=False)
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    @contextmanager
    def installed(self, *settings: str) -> Iterator[str]:
        """Install the chart, give its notes, uninstall it. No node runs its pods, so Helm does not wait for them."""
        try:
            yield self.run("install", *self._release, "--wait=hookOnly", *settings, "--create-namespace").stdout
        finally:
            self.run("uninstall", self._release[0], "--namespace", NAMESPACE)

    def upgrade(self, *settings: str) -> None:
        self.run("upgrade", *self._release, "--wait=hookOnly", *settings)

    def template(self, *args: str) -> Rendered:
        return Rendered.parse(self.run("template", *self._release, *args).stdout)

    def refusal(self, *args: str) -> str:
        """Return why the chart is not rendered with these arguments."""
        done = self.run("template", *self._release, *args, check=False)
        assert done.returncode != 0, done.stdout
        return done.stderr

    def notes(self, *args: str) -> str:
        """Return what an installation says, of which nothing is made."""
        return self.run("install", *self._release, "--dry-run=client", *args).stdout.partition("NOTES:")[2]
