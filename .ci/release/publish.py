"""`python -m release.publish`: the steps of a release that reach other machines, one `make` target each.

`artifacts` builds, here is sent and signed, by programs that hosted runners have (docker, helm, gh) or that the
workflow installs (cosign). What differs between repositories comes from the environment. These steps hold tokens: all
modules of this package that are imported here need Python's standard library alone, and no word goes through a shell.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from release import number
from release.artifacts import CHARTS, SUMS, checksums
from release.linux_packages import PROCESSORS

_REGISTRY: Final = re.compile(r"[a-z0-9][a-z0-9.-]*(:[0-9]+)?(/[a-z0-9][a-z0-9._-]*)*")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


def check(out: Path) -> None:
    """Say which version the tag releases, or why it cannot."""
    print(f"{number.check(_tag())} can be released")


def image(out: Path) -> str:
    """Build the image of the last commit for this machine's processor, try it, and return its name."""
    version, commit = number.version(), _run("git", "rev-parse", "HEAD").strip()
    name = f"{_repository()}:{version}-{_processor()}"
    base = os.environ.get("BASE", "")
    archive = subprocess.run(["git", "archive", commit], check=True, cwd=number.ROOT, stdout=subprocess.PIPE).stdout
    subprocess.run(
        [
            *("docker", "build", "--build-arg", f"VERSION={version}", "--build-arg", f"REVISION={commit}"),
            *(("--build-arg", f"BASE={base}") if base else ()),
            *("--tag", name, "-"),
        ],
        check=True,
        input=archive,
    )
    # As strict as docs/run.md has it run.
    said = _run("docker", "run", "--rm", "--read-only", "--cap-drop", "ALL", "--network", "none", name, "version")
    if f"commit {commit[:12]}," not in said:
        raise ValueError(f"{name} says it is {said.strip()!r}, and not of commit {commit[:12]}")
    print(f"{name}: {said.strip()}")
    return name


def publish_image(out: Path) -> None:
    """Build the image, push it under its processor's tag, and write its digest to `out`."""
    _log_in()
    name = image(out)
    _run("docker", "push", "--quiet", name)
    for known in _run("docker", "image", "inspect", "--format", '{{join .RepoDigests "\\n"}}', name).split():
        repository, _, digest = known.rpartition("@")
        if repository == _repository():
            out.mkdir(parents=True, exist_ok=True)
            _digest_file(out, _processor()).write_text(f"{_checked(digest)}\n")
            return
    raise ValueError(f"docker names no digest of {name} at {_repository()}")


def publish_index(out: Path) -> None:
    """Give both processors' images one name, sign that, and name the release's bill of what is in them."""
    digests = [
        _checked(_read(_digest_file(out, processor), "make publish-image").strip())
        for processor in sorted(PROCESSORS.values())
    ]
    _log_in()
    name = f"{_repository()}:{number.version()}"
    parts = [f"{_repository()}@{digest}" for digest in digests]
    _run("docker", "buildx", "imagetools", "create", "--tag", name, *parts)
    shown = _run("docker", "buildx", "imagetools", "inspect", name, "--format", "{{.Manifest.Digest}}")
    bill = out / f"arcbridge-{number.version()}-linux-x86_64.cdx.json"
    _read(bill, "make dist")
    digest = _checked(shown.strip())
    _sign(_repository(), digest)
    _output(digest=digest, bill=str(bill))


def publish_chart(out: Path) -> None:
    """Push both charts of the release, and sign them; the output of each is its digest, by the chart's name."""
    packed = {chart: out / f"{chart}-{number.version()}.tgz" for chart in CHARTS}
    for file in packed.values():
        if not file.is_file():
            raise ValueError(f"{file} is missing: run `make dist` before")
    _log_in("helm", "registry")
    _log_in()
    charts = f"{_setting('REGISTRY')}/charts"
    # As docker and cosign do by themselves: a registry on this machine, where a release is tried.
    plain = ("--plain-http",) if charts.startswith("127.0.0.1:") else ()
    for chart, file in packed.items():
        digest = _checked(_run("helm", "push", str(file), f"oci://{charts}", *plain))
        _sign(f"{charts}/{chart}", digest)
        _output(**{chart: digest})


def sign(out: Path) -> None:
    """Write the sums of all files in `out` anew, and sign them by the identity of the workflow that runs."""
    sums = checksums(out)
    _run("cosign", "sign-blob", "--yes", "--bundle", f"{sums}.sigstore.json", str(sums))


def publish_release(out: Path) -> None:
    """Make the release's page, with all files of `out` and what the changelog says."""
    tag = _tag()
    version = number.check(tag)
    files = sorted(str(path) for path in out.iterdir() if path.is_file())
    if not any(name.endswith(f"{SUMS}.sigstore.json") for name in files):
        raise ValueError(f"{out} is not signed: run `make sign` before")
    early = () if re.fullmatch(r"[0-9.]+", version) else ("--prerelease",)
    words = ("--verify-tag", "--title", f"arcbridge {version}", "--notes-file", "-", *early)
    _run("gh", "release", "create", tag, *words, *files, text=number.notes(version))


def _sign(name: str, digest: str) -> None:
    """Sign what has been pushed."""
    _run("cosign", "sign", "--yes", f"{name}@{digest}")
    print(f"{name}@{digest}")


def _output(**outputs: str) -> None:
    """Give `outputs` to the steps after this one."""
    if file := os.environ.get("GITHUB_OUTPUT"):
        with Path(file).open("a") as steps:
            steps.writelines(f"{key}={value}\n" for key, value in outputs.items())


def _log_in(*program: str) -> None:
    """Log in at the registry, where the environment has a token; a machine may be logged in already."""
    host = _setting("REGISTRY").partition("/")[0]
    if token := os.environ.get("REGISTRY_TOKEN"):
        user = _setting("REGISTRY_USER")
        _run(*(program or ("docker",)), "login", host, "--username", user, "--password-stdin", text=token)


def _setting(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise ValueError(f"{name} is not set: see the first lines of .github/workflows/release.yml")
    if name == "REGISTRY" and not _REGISTRY.fullmatch(value):
        raise ValueError(f"REGISTRY={value!r}: write it as registry.example.com/owner, in lower case, without a scheme")
    return value


def _repository() -> str:
    return f"{_setting('REGISTRY')}/arcbridge" if os.environ.get("REGISTRY") else "arcbridge"


def _tag() -> str:
    return os.environ.get("TAG") or os.environ.get("GITHUB_REF_NAME", "")


def _processor() -> str:
    machine = platform.machine()
    if machine not in PROCESSORS:
        raise ValueError(f"no image is made for {machine}; for {' and '.join(PROCESSORS)} there is one")
    return PROCESSORS[machine]


def _digest_file(out: Path, processor: str) -> Path:
    return out / f"image-{processor}.digest"


def _read(path: Path, before: str) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is missing: `{before}` makes it, on a machine of its kind")
    return path.read_text()


def _checked(text: str) -> str:
    """Return the one digest in a text."""
    found: set[str] = set(_DIGEST.findall(text))
    if len(found) != 1:
        raise ValueError(f"one digest was expected, and not {text[:200]!r}")
    return found.pop()


def _run(*words: str, text: str | None = None) -> str:
    """Run a program and return what it printed on both streams; what it prints is shown if it fails."""
    done = subprocess.run(
        words, input=text, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, cwd=number.ROOT
    )
    if done.returncode:
        raise ValueError(f"{done.stdout}\n{' '.join(words[:3])} … failed ({done.returncode})")
    return done.stdout


COMMANDS: Final[dict[str, Callable[[Path], object]]] = {
    "release-check": check,
    "image": image,
    "publish-image": publish_image,
    "publish-index": publish_index,
    "publish-chart": publish_chart,
    "sign": sign,
    "publish-release": publish_release,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the steps; what is wrong is said in a sentence."""
    parser = argparse.ArgumentParser(prog="python -m release.publish", description="One step of a release.")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--out", type=Path, default=number.ROOT / "dist")
    given = parser.parse_args(arguments)
    try:
        COMMANDS[given.command](given.out.absolute())
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
