"""This machine with a layer above its file system: packages of its system are installed there, and gone with the test.

A mount namespace holds an overlay of `/`, and commands run in it by chroot, as root, with this machine's network and
processes. No service manager runs there: a unit is read and never started.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from tests.support.kube_programs import Unavailable, require_isolation
from tests.support.stopping import Stopping

ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
}
_HOLD: Final = """
set -e
mount -t tmpfs -o mode=755 layer "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" overlay "$1/root"
for name in dev proc sys; do mount --rbind "/$name" "$1/root/$name"; done
mount --bind "$2" "$1/root/mnt"
echo ready
exec sleep infinity
"""


class LayeredMachine(Stopping):
    """A machine on which anything may be installed. What `files` has is in its `/mnt`."""

    def __init__(self, directory: Path, files: Path) -> None:
        """Make it below `directory`. Raises `Unavailable` where namespaces or overlays cannot be had."""
        require_isolation()
        for program in ("nsenter", "chroot"):
            if shutil.which(program) is None:
                raise Unavailable(f"a layered machine needs {program} (util-linux, coreutils)")
        directory.mkdir(parents=True)
        self._directory = directory
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _HOLD, "hold", directory, files]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._holder.stdout is not None
        if (said := self._holder.stdout.readline()) != "ready\n":
            self.stop()
            raise Unavailable(f"a layered machine cannot be made here: {said.strip()}")

    def command(self, *words: str | os.PathLike[str]) -> list[str]:
        """Return the command line that runs `words` on it."""
        enter = ("nsenter", "--target", str(self._holder.pid), "--mount", "chroot", str(self._directory / "root"))
        return [*enter, *map(os.fspath, words)]

    def run(
        self, *words: str | os.PathLike[str], check: bool = True, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run `words` on it with `text` as input; a failure shows what the program printed."""
        done = subprocess.run(
            self.command(*words), env=ENVIRONMENT, input=text, capture_output=True, text=True, check=False, timeout=300
        )
        assert done.returncode == 0 or not check, f"{words} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def read(self, path: str) -> str:
        """Return the text of a file of it."""
        return self.run("cat", path).stdout

    def write(self, path: str, text: str) -> None:
        """Write a file of it."""
        self.run("tee", path, text=text)

    def at(self, path: str) -> Path:
        """Return where a file of it is for programs of this machine, and of any other layered one."""
        return Path(f"/proc/{self._holder.pid}/root{self._directory.absolute()}/root{path}")

    def has(self, path: str) -> bool:
        """Return whether a file or directory of it exists."""
        return self.run("test", "-e", path, check=False).returncode == 0

    def stop(self) -> None:
        """Throw the layer away, with all that was written."""
        self._holder.kill()
        self._holder.communicate()
