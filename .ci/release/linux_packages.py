"""deb and rpm: one package with the program and its Python, and one with the service of each of relay and agent.

nfpm writes both formats from one description (`linux/*.yaml`) and a directory with the files, which is laid out here.
`single_file.gather` makes the program. Two builds of one commit give the same bytes.
docs/decisions/0063-deb-and-rpm.md has the reasons.
"""

from __future__ import annotations

import email.utils
import gzip
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from release.sbom import normal_name

PROCESSORS: Final = {"x86_64": "amd64", "aarch64": "arm64"}
"""Python's name of each processor, and that of registries and of Debian."""
MAINTAINER: Final = "The arcbridge authors <security@arcbridge.example>"
"""A placeholder, as in SECURITY.md: the maintainers of a repository write theirs in its place."""
ROLES: Final = ("relay", "agent")
"""Those that run as services."""
_STATE: Final = {
    "relay": "/var/lib/arcbridge",
    "agent": "/var/lib/arcbridge-agent /var/lib/arcbridge-recordings /var/log/arcbridge",
}
"""What a service keeps, by role: it outlives the package."""
_LICENCE: Final = re.compile(r"(?i)licen[cs]e|copying|notice|authors")
_DESCRIPTIONS: Final = Path(".ci", "release", "linux")
_EXAMPLES: Final = ("examples", "grafana", "helm", "kubernetes", "monitoring", "prometheus")
"""Of config/."""
_FACTS: Final = """
import json, sysconfig
from arcbridge.cli.completion import SCRIPTS
from arcbridge.cli.initial_settings import initial_files
from arcbridge.cli.parser import Invocation
roles = ("relay", "agent")
settings = {role: initial_files(Invocation(role, ("config", "init"), {}), root=True, service=True) for role in roles}
paths = [sysconfig.get_path(name) for name in ("purelib", "stdlib")]
print(json.dumps({"settings": settings, "completion": SCRIPTS, "paths": paths}))
"""


class Packager:
    """The packages of one commit, made in a directory which the caller removes."""

    def __init__(self, source: Path, python: Path, work: Path, version: str, *, epoch: int) -> None:
        """`source`: the commit's files; `python`: of an environment with arcbridge and nfpm; `epoch`: unix seconds."""
        self._source = source
        self._python = python
        self._work = work
        self._version = packed_version(version)
        self._epoch = epoch
        done = subprocess.run([python, "-I", "-c", _FACTS], check=True, capture_output=True, text=True)
        self._facts: dict[str, Any] = json.loads(done.stdout)

    def program(self, gathered: Path, bill: Path) -> list[Path]:
        """Pack the program that `gathered` has, with the bill of what is in it; return deb and rpm."""
        stage = self._stage("arcbridge")
        shutil.copytree(gathered, stage / "usr/lib/arcbridge", symlinks=True)
        (stage / "usr/bin").mkdir()
        (stage / "usr/bin/arcbridge").symlink_to("../lib/arcbridge/arcbridge")
        (stage / "usr/bin/kubectl-arcbridge").symlink_to("arcbridge")
        for page in (self._source / "config/man").iterdir():
            _write(stage / f"usr/share/man/man{page.suffix[1:]}" / f"{page.name}.gz", _compressed(page.read_bytes()))
        shells = self._facts["completion"]
        _write(stage / "usr/share/bash-completion/completions/arcbridge", shells["bash"].encode())
        _write(stage / "usr/share/fish/vendor_completions.d/arcbridge.fish", shells["fish"].encode())
        # A file that zsh loads at the first TAB answers that TAB as well.
        _write(stage / "zsh", shells["zsh"].replace("\ncompdef _arcbridge arcbridge\n", '\n_arcbridge "$@"\n').encode())
        self._unit(stage, "arcbridge-client.service", "user")
        doc = stage / "usr/share/doc/arcbridge"
        for page in sorted((self._source / "docs").rglob("*.md")):
            _write(doc / page.relative_to(self._source / "docs"), page.read_bytes())
        for name in ("CHANGELOG.md", "README.md", "SECURITY.md"):
            shutil.copy(self._source / name, doc)
        for name in _EXAMPLES:
            place = doc / "examples" / ("" if name == "examples" else name)
            shutil.copytree(self._source / "config" / name, place, dirs_exist_ok=True)
        shutil.copy(bill, doc / "arcbridge.cdx.json")
        self._licences(doc / "licences", bill)
        shutil.copy(self._source / _DESCRIPTIONS / "lintian", stage)
        return self._pack(stage, {"GLIBC": glibc(gathered)})

    def service(self, role: str) -> list[Path]:
        """Pack the unit and the settings of relay or agent; return deb and rpm."""
        stage = self._stage(f"arcbridge-{role}")
        self._unit(stage, f"arcbridge-{role}.service", "system")
        for name, text in self._facts["settings"][role].items():
            _write(stage / "etc/arcbridge" / name, text.encode())
        _write(stage / "etc/logrotate.d" / stage.name, (self._source / "config/logrotate" / stage.name).read_bytes())
        users = self._source / "config/sysusers" / f"{stage.name}.conf"
        if users.exists():
            _write(stage / "usr/lib/sysusers.d" / users.name, users.read_bytes())
        marks = {"ROLE": role, "STATE": _STATE[role]}
        for script in (self._source / _DESCRIPTIONS).glob("*.sh"):
            _write(stage / script.stem, filled(script.read_text(), marks).encode())
        return self._pack(stage, {})

    def _stage(self, name: str) -> Path:
        """Return a new directory for the files of a package, with what each package has."""
        stage = self._work / name
        doc = stage / "usr/share/doc" / name
        doc.mkdir(parents=True)
        shutil.copy(self._source / _DESCRIPTIONS / "copyright", doc)
        entry = f"{name} ({self._version}) stable; urgency=medium\n\n  * What is new: CHANGELOG.md of arcbridge.\n\n"
        date = email.utils.formatdate(self._epoch)
        _write(doc / "changelog.gz", _compressed(f"{entry} -- {MAINTAINER}  {date}\n".encode()))
        return stage

    def _unit(self, stage: Path, name: str, manager: str) -> None:
        text = (self._source / "config/systemd" / name).read_text()
        text = re.sub(r"^(ExecStart=)\S+/arcbridge ", r"\1/usr/bin/arcbridge ", text, flags=re.MULTILINE)
        _write(stage / "usr/lib/systemd" / manager / name, text.encode())

    def _licences(self, out: Path, bill: Path) -> None:
        """Write the licences of all that the program brings along: of Python, and of what the bill names."""
        packages, stdlib = map(Path, self._facts["paths"])
        named = {normal_name(component["name"]) for component in json.loads(bill.read_text())["components"]}
        _write(out / "arcbridge" / "LICENSE", (self._source / "LICENSE").read_bytes())
        for file in stdlib.glob("LICENSE*"):
            _write(out / "python" / file.name, file.read_bytes())
        for information in packages.glob("*.dist-info"):
            if (name := normal_name(information.name.split("-")[0])) in named:
                for file in information.rglob("*"):
                    if file.is_file() and _LICENCE.match(file.name):
                        _write(out / name / file.name, file.read_bytes())

    def _pack(self, stage: Path, marks: Mapping[str, str]) -> list[Path]:
        """Write deb and rpm of the files in `stage`."""
        name, processor = stage.name, PROCESSORS[platform.machine()]
        marks = {
            "ARCH": processor,
            "MAINTAINER": MAINTAINER,
            "TIME": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._epoch)),
            "VERSION": self._version,
            **marks,
        }
        description = filled((self._source / _DESCRIPTIONS / f"{name}.yaml").read_text(), marks)
        (stage / "nfpm.yaml").write_text(description)
        for path in [stage, *stage.rglob("*")]:
            if not path.is_symlink():
                program = path.stat().st_mode & 0o100 and ".so" not in path.name
                path.chmod(0o755 if path.is_dir() or program else 0o644)
            os.utime(path, (self._epoch, self._epoch), follow_symlinks=False)
        everywhere = "arch: all\n" in description
        # Without "~", which hosts of releases write as another character.
        version = self._version.replace("~", "")
        made = []
        for packager, file in (
            ("deb", f"{name}_{version}_{'all' if everywhere else processor}.deb"),
            ("rpm", f"{name}-{version}-1.{'noarch' if everywhere else platform.machine()}.rpm"),
        ):
            subprocess.run(
                [
                    *(self._python.with_name("nfpm"), "package", "--config", "nfpm.yaml"),
                    *("--packager", packager, "--target", self._work / file),
                ],
                check=True,
                cwd=stage,
                env={**os.environ, "SOURCE_DATE_EPOCH": str(self._epoch)},
                capture_output=True,
                text=True,
            )
            made.append(self._work / file)
        return made


def packed_version(version: str) -> str:
    """Return a version as deb and rpm write it: both sort "~" before the end, so that 0.2.0~rc1 is older than 0.2.0."""
    return re.sub(r"(?=(a|b|rc)\d)", "~", version, count=1)


def glibc(directory: Path) -> str:
    """Return the oldest version of glibc that has what the programs and libraries in `directory` want of it."""
    wanted = {(2, 17)}
    for path in directory.rglob("*"):
        if path.is_file():
            wanted.update((int(a), int(b)) for a, b in re.findall(rb"GLIBC_(\d+)\.(\d+)", path.read_bytes()))
    return ".".join(map(str, max(wanted)))


def _compressed(content: bytes) -> bytes:
    return gzip.compress(content, compresslevel=9, mtime=0)


def filled(text: str, marks: Mapping[str, str]) -> str:
    """Put a value in the place of each mark `@NAME@`. Raises `ValueError` for a mark without one."""
    for name, value in marks.items():
        text = text.replace(f"@{name}@", value)
    if left := re.search(r"@[A-Z]+@", text):
        raise ValueError(f"{left[0]} has no value: see .ci/release/linux_packages.py")
    return text


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
