"""The workflows of hosted runners run `make` targets that are there, and actions that are named by digest.

Hosted runners are not here: `actionlint` and `zizmor` read the files, and what a step runs is run by the tests of the
target. docs/decisions/0052-hosted-runners.md says which steps were run on a machine, and which the first push tries.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from release.lock import ROOT
from tests.support.kube_programs import Unavailable, built
from tests.support.processes import require_or_skip
from tests.support.windows import POSIX_TESTS

FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.yml"))
TEXTS = {path.name: path.read_text() for path in FILES}
# As text throughout: YAML's own words (`on`, `true`, 3.10) are none of GitHub's.
WORKFLOWS: dict[str, Any] = {name: yaml.load(text, yaml.BaseLoader) for name, text in TEXTS.items()}
MAKEFILE = (ROOT / "Makefile").read_text()

COMMAND = re.compile(r"make ([a-z-]+)((?: [A-Z]+=[\w./-]+)*)")
PINNED = re.compile(r"uses: (?P<action>[\w./-]+)@(?P<digest>[0-9a-f]{40}) # (?P<version>v\d+\.\d+\.\d+)")
WRITING = {
    ("release.yml", "sign"): {"id-token", "attestations"},
    ("release.yml", "image"): {"packages"},
    ("release.yml", "registry"): {"packages", "id-token", "attestations"},
    ("release.yml", "page"): {"contents"},
}
"""The jobs that may write, and what."""


def jobs() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for name, workflow in WORKFLOWS.items():
        for job, body in workflow["jobs"].items():
            yield name, job, body


def steps() -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, job, body in jobs():
        for step in body.get("steps", []):
            yield f"{name}, {job}", step


def test_there_are_workflows() -> None:
    assert set(WORKFLOWS) == {"ci.yml", "nightly.yml", "release.yml"}


def test_each_command_is_a_target_of_make() -> None:
    """Of one word, with literal settings: no expression can come into a shell's line."""
    commands = {step["run"] for _, step in steps() if "run" in step}
    assert len(commands) > 12
    for command in commands:
        matched = COMMAND.fullmatch(command)
        assert matched, command
        # With another environment, so that each target has to say what it would run.
        planned = subprocess.run(
            ["make", "--dry-run", "--no-print-directory", *command.split()[1:], "VENV=not-there"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert planned.returncode == 0, planned.stderr
        assert f" {matched[1]} " in re.sub(r"\\\n\s*", "", MAKEFILE).partition(".PHONY: ")[2].partition("\n")[0] + " "
        for setting in matched[2].split():
            key, _, value = setting.partition("=")
            assert f"$({key})" in MAKEFILE, command
            assert value in planned.stdout, f"{command}: {key} changes nothing"


def test_windows_has_its_programs_elsewhere() -> None:
    command = ["make", "--dry-run", "unit-client", "VENV=not-there", "PYTHON=python"]
    for system, program in (
        ("Windows_NT", "not-there/Scripts/python -m pytest"),
        ("", "not-there/bin/python -m pytest"),
    ):
        planned = subprocess.run([*command, f"OS={system}"], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert program in planned.stdout, planned.stderr


def test_each_action_is_named_by_digest() -> None:
    used = [line.strip().removeprefix("- ") for text in TEXTS.values() for line in text.splitlines() if "uses:" in line]
    assert len(used) > 20
    pins = {}
    for line in used:
        if not line.startswith("uses: ./.github/workflows/"):
            matched = PINNED.fullmatch(line)
            assert matched, line
            pins.setdefault(matched["action"], set()).add((matched["digest"], matched["version"]))
    assert {action: len(found) for action, found in pins.items()} == dict.fromkeys(pins, 1), "one version of each"


def test_jobs_have_the_rights_that_they_need() -> None:
    for name, workflow in WORKFLOWS.items():
        assert workflow["permissions"] == {}, name
        assert workflow["concurrency"]["group"].startswith(name.removesuffix(".yml"))
        assert workflow["defaults"] == {"run": {"shell": "bash"}}, "Windows has another one"
    for name, job, body in jobs():
        rights = body["permissions"]
        assert {right for right, kind in rights.items() if kind == "write"} == WRITING.get((name, job), set()), job
        assert rights["contents"] in ("read", "write")
        assert int(body.get("timeout-minutes", 0)) in range(1, 241) or "uses" in body, job


def test_what_holds_a_token_installs_nothing() -> None:
    """No Python but the machine's, and targets that need its standard library alone."""
    alone = re.findall(r"^((?:[a-z-]+ )*[a-z-]+):\n\t@PYTHONPATH=.ci \$\(PYTHON\) -m release.publish", MAKEFILE, re.M)[
        0
    ]
    for name, job, body in jobs():
        if (name, job) in WRITING:
            assert body["environment"] == "release"
            for step in body["steps"]:
                assert "setup-" not in step.get("uses", "")
                assert step.get("run", "make sign").split()[1] in alone.split()
        else:
            assert "secrets." not in str(body)
            assert "github.token" not in str(body)


def test_no_credential_stays_in_a_clone() -> None:
    for where, step in steps():
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] == "false", where


def test_nothing_runs_with_rights_for_a_stranger() -> None:
    """`pull_request_target` and `workflow_run` give a stranger's change the rights of the repository."""
    for name, workflow in WORKFLOWS.items():
        assert set(workflow["on"]) <= {"push", "pull_request", "schedule", "workflow_call", "workflow_dispatch"}, name
    assert WORKFLOWS["release.yml"]["on"] == {"push": {"tags": ["v*"]}}
    for text in TEXTS.values():
        assert set(re.findall(r"github\.event\.\w+", text)) == set()


def test_the_client_is_tried_on_each_system_and_python() -> None:
    floor = re.search(r'requires-python = ">=(3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    jobs = WORKFLOWS["ci.yml"]["jobs"]
    pythons = ["3.11", "3.12", "3.13", "3.14"]
    assert floor is not None
    assert floor[1] == pythons[0]
    assert jobs["unit"]["strategy"]["matrix"]["python"] == pythons
    matrix = jobs["client"]["strategy"]["matrix"]
    assert matrix["python"] == pythons
    assert [name.partition("-")[0] for name in matrix["system"]] == ["macos", "windows"]


@pytest.mark.timeout(600)
def test_windows_can_import_the_tests_of_a_client() -> None:
    """Simulated (`tests/support/windows.py`): none of them is left out there because a module of POSIX is missing."""
    (folders,) = re.findall(r"^CLIENT_TESTS := \$\(addprefix tests/,([a-z ]+)\)$", MAKEFILE, re.MULTILINE)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.windows", "collect", *(f"tests/{name}" for name in folders.split())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert [name for name in POSIX_TESTS if not (ROOT / "tests" / name).is_file() or f"{name}::" in done.stdout] == []
    assert int(re.findall(r"^(\d+) tests collected", done.stdout, re.MULTILINE)[0]) > 3000


def test_a_release_waits_for_all_tests() -> None:
    """Every job that sends needs, through others, the tests and all that is built."""
    jobs = WORKFLOWS["release.yml"]["jobs"]

    def before(job: str) -> set[str]:
        needed = jobs[job].get("needs", [])
        needed = [needed] if isinstance(needed, str) else needed
        return {*needed, *(one for name in needed for one in before(name))}

    for name, job in WRITING:
        assert name == "release.yml"
        assert {"check", "tests", "packages", "clients", "image-build"} <= before(job), job


@pytest.fixture(scope="module")
def actionlint() -> Path:
    try:
        return built(ROOT / "tests" / "actionlint", ("tool",), ("actionlint",), ldflags="-s -w") / "actionlint"
    except Unavailable as error:
        require_or_skip("go", str(error))


def lint(program: Path, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    # Neither of the checkers of shells and Python: a command is one target.
    command = [program, "-no-color", "-shellcheck=", "-pyflakes=", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)


@pytest.mark.timeout(300)
def test_actionlint_finds_nothing(actionlint: Path) -> None:
    done = lint(actionlint, *map(str, FILES))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = lint(actionlint, "-", text=TEXTS["ci.yml"].replace("matrix.python", "matrix.pyton"))
    assert done.returncode == 1
    assert '"pyton" is not defined' in done.stdout


def audit(*paths: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "zizmor", "--offline", "--no-progress", "--color", "never", "--quiet"]
    command = [*command, "--persona", "auditor", "--no-config", *paths]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)


def test_zizmor_finds_nothing(tmp_path: Path) -> None:
    done = audit(ROOT / ".github")
    assert done.returncode == 0, done.stdout + done.stderr
    worse = tmp_path / "worse.yml"
    worse.write_text(TEXTS["ci.yml"].replace("- run: make lint", "- run: echo ${{ github.event.pull_request.title }}"))
    done = audit(worse)
    assert done.returncode != 0
    assert "template-injection" in done.stdout


def test_hooks_run_tools_of_the_clone_and_fetch_nothing() -> None:
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in settings["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in settings["repos"][0]["hooks"]}
    for name, hook in hooks.items():
        program = hook["entry"].split()[0]
        assert program in ("make", ".venv/bin/ruff") or hook["language"] == "pygrep", name
    subject = re.compile(hooks["subject"]["entry"], re.MULTILINE | re.DOTALL)
    assert subject.search("x" * 73)
    assert not subject.search("x" * 72 + "\n\n" + "y" * 100)


def test_forms_and_updates_are_what_the_host_reads() -> None:
    """Each key that it needs; a form with a mistake is not shown at all."""
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert [path.stem for path in forms] == ["bug", "config", "proposal"]
    for path in forms:
        form = yaml.safe_load(path.read_text())
        if path.stem != "config":
            assert {"name", "description", "body"} <= set(form)
            ids = [field.get("id") for field in form["body"] if field["type"] != "markdown"]
            assert len(ids) == len(set(ids)) > 2
            for field in form["body"]:
                assert field["type"] in ("markdown", "input", "textarea", "dropdown")
                assert "value" in field["attributes"] or "label" in field["attributes"]
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())["updates"]
    folders = {one for update in updates for one in update.get("directories", [update.get("directory")])}
    assert [folder for folder in folders if not (ROOT / folder.removeprefix("/")).is_dir()] == []
    assert {f"/{path.parent.relative_to(ROOT)}" for path in (ROOT / "tests").glob("*/go.mod")} <= folders


HOSTS = [
    name.replace("/", ".")
    for name in (
        *("ghcr/io", "docker/io", "quay/io", "gcr/io", "registry/k8s", "mcr/microsoft", "public/ecr"),
        *("pypi/org", "pythonhosted/org", "proxy/golang", "npmjs/org", "crates/io", "repo1/maven", "deb/debian"),
    )
]
"""Of registries and indexes; written so that this file names none."""


def test_no_host_of_a_registry_is_named() -> None:
    """A clone serves behind any mirror: what differs there is a variable of the machine or of the repository."""
    if not (ROOT / ".git").exists():
        require_or_skip("git", "this is no clone, and what belongs to it is not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    assert len(paths) > 1000
    # Sums of Go modules, and what was measured elsewhere, are no places to fetch from.
    sources = [path for path in paths if path.name != "go.sum" and "results" not in path.parts and path.is_file()]
    found = re.compile("|".join(map(re.escape, HOSTS)).encode())
    assert [str(path.relative_to(ROOT)) for path in sources if found.search(path.read_bytes())] == []
