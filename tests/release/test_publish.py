"""What the steps of a release ask docker, helm, cosign and gh to do, and what they do when one of these misbehaves.

No engine, registry or issuer of identities is here: the programs are stand-ins that keep what they were given.
docs/decisions/0052-hosted-runners.md says what was tried with real ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from arcbridge import __version__
from release import number, publish

A, B, C = (f"sha256:{digit * 64}" for digit in "abc")
CHARTS = {"arcbridge-agent": B, "arcbridge-relay": C}
"""What the registry says is the digest of each."""
REPOSITORY = "registry.example.com/owner/arcbridge"
STAND_IN = """#!{python}
import json, pathlib, sys
folder = pathlib.Path(__file__).parent
words = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
text = "" if sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8", "replace")
with (folder / "asked").open("a") as file:
    file.write(json.dumps([words, text[:4000]]) + "\\n")
for begins, answer, code in json.loads((folder / "answers").read_text()):
    if " ".join(words).startswith(begins):
        print(answer)
        sys.exit(code)
"""


class Programs:
    """Stand-ins for the four programs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._answers: list[tuple[str, str, int]] = []
        for name in ("docker", "helm", "cosign", "gh"):
            (folder / name).write_text(STAND_IN.format(python=sys.executable))
            (folder / name).chmod(0o755)
        self._write()

    def answer(self, begins: str, text: str, code: int = 0) -> None:
        """Let commands that begin so print `text` and end with `code`; a later answer goes before earlier ones."""
        self._answers.insert(0, (begins, text, code))
        self._write()

    def _write(self) -> None:
        (self._folder / "answers").write_text(json.dumps(self._answers))

    def asked(self) -> list[tuple[str, str]]:
        """Each command with what it got on standard input."""
        kept = self._folder / "asked"
        return (
            [(" ".join(words), text) for words, text in map(json.loads, kept.read_text().splitlines())]
            if kept.exists()
            else []
        )


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    for name in ("REGISTRY", "REGISTRY_USER", "REGISTRY_TOKEN", "BASE", "TAG", "GITHUB_REF_NAME", "GITHUB_OUTPUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(publish.platform, "machine", lambda: "x86_64")
    made = Programs(folder)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=number.ROOT, capture_output=True, text=True, check=True)
    made.answer("docker run", f"arcbridge {__version__}+1f2e3d4c (commit {commit.stdout[:12]}, 2027-01-15)")
    made.answer("docker image inspect", f"other.example.com/arcbridge@{B}\n{REPOSITORY}@{A}")
    made.answer("docker buildx imagetools inspect", C)
    for chart, digest in CHARTS.items():
        pushed = f"Pushed: registry.example.com/owner/charts/{chart}:{__version__}\nDigest: {digest}"
        made.answer(f"helm push {tmp_path}/dist/{chart}-", pushed)
    return made


@pytest.fixture
def registry(programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The environment of a hosted job; the file with its outputs."""
    monkeypatch.setenv("REGISTRY", "registry.example.com/owner")
    monkeypatch.setenv("REGISTRY_USER", "owner")
    monkeypatch.setenv("REGISTRY_TOKEN", "s3cret-of-the-job")
    monkeypatch.setenv("GITHUB_OUTPUT", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


def step(name: str, out: Path) -> int:
    return publish.main([name, "--out", str(out)])


def released(out: Path) -> Path:
    out.mkdir(exist_ok=True)
    for name in (*(f"{chart}-{__version__}.tgz" for chart in CHARTS), f"arcbridge-{__version__}-linux-x86_64.cdx.json"):
        (out / name).write_text(name)
    return out


def test_an_image_is_built_of_the_commit_and_tried_as_it_will_run(programs: Programs, tmp_path: Path) -> None:
    assert step("image", tmp_path) == 0
    (build, context), (run, _) = programs.asked()
    name = f"arcbridge:{__version__}-amd64"
    assert build.startswith(f"docker build --build-arg VERSION={__version__} --build-arg REVISION=")
    assert build.endswith(f"--tag {name} -")
    assert "pax_global_header" in context, "a tar archive of git"
    assert run == f"docker run --rm --read-only --cap-drop ALL --network none {name} version"


def test_an_image_of_something_else_is_no_image(
    programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.answer("docker run", f"arcbridge {__version__}+1f2e3d4c (commit 000000000000, 2027-01-15)")
    assert step("image", tmp_path) == 1
    assert "and not of commit" in capsys.readouterr().err


def test_the_base_may_be_behind_a_mirror(programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASE", f"mirror.example.com/python:3.13@{A}")
    assert step("image", tmp_path) == 0
    assert f" --build-arg BASE=mirror.example.com/python:3.13@{A} --tag " in programs.asked()[0][0]


@pytest.mark.usefixtures("registry")
def test_each_processor_pushes_its_image_and_keeps_the_digest(programs: Programs, tmp_path: Path) -> None:
    assert step("publish-image", tmp_path / "digests") == 0
    login, _build, _run, push, _inspect = programs.asked()
    assert login == ("docker login registry.example.com --username owner --password-stdin", "s3cret-of-the-job")
    assert push[0] == f"docker push --quiet {REPOSITORY}:{__version__}-amd64"
    assert (tmp_path / "digests" / "image-amd64.digest").read_text() == f"{A}\n", "that of this registry"


def test_both_become_one_name_that_is_signed(programs: Programs, tmp_path: Path, registry: Path) -> None:
    out = released(tmp_path / "dist")
    (out / "image-amd64.digest").write_text(f"{A}\n")
    (out / "image-arm64.digest").write_text(f"{B}\n")
    assert step("publish-index", out) == 0
    _login, create, _inspect, sign = (words for words, _ in programs.asked())
    assert create.endswith(f"create --tag {REPOSITORY}:{__version__} {REPOSITORY}@{A} {REPOSITORY}@{B}")
    assert sign == f"cosign sign --yes {REPOSITORY}@{C}"
    bill = out / f"arcbridge-{__version__}-linux-x86_64.cdx.json"
    assert registry.read_text() == f"digest={C}\nbill={bill}\n"


@pytest.mark.usefixtures("registry")
def test_one_processor_alone_is_no_image(
    programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = released(tmp_path / "dist")
    (out / "image-amd64.digest").write_text(f"{A}\n")
    assert step("publish-index", out) == 1
    assert "image-arm64.digest is missing" in capsys.readouterr().err
    (out / "image-arm64.digest").write_text("latest\n")
    assert step("publish-index", out) == 1
    assert "one digest was expected, and not 'latest" in capsys.readouterr().err
    assert programs.asked() == []


def test_both_charts_are_pushed_and_signed_by_their_digests(programs: Programs, tmp_path: Path, registry: Path) -> None:
    assert step("publish-chart", released(tmp_path / "dist")) == 0
    login, _docker, *rest = (words for words, _ in programs.asked())
    assert login == "helm registry login registry.example.com --username owner --password-stdin"
    charts = "registry.example.com/owner/charts"
    for (chart, digest), push, sign in zip(CHARTS.items(), rest[::2], rest[1::2], strict=True):
        assert push == f"helm push {tmp_path}/dist/{chart}-{__version__}.tgz oci://{charts}"
        assert sign == f"cosign sign --yes {charts}/{chart}@{digest}"
    assert registry.read_text() == "".join(f"{chart}={digest}\n" for chart, digest in CHARTS.items())


def test_one_chart_alone_is_not_pushed(programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = released(tmp_path / "dist")
    (out / f"arcbridge-relay-{__version__}.tgz").unlink()
    assert step("publish-chart", out) == 1
    assert f"arcbridge-relay-{__version__}.tgz is missing" in capsys.readouterr().err
    assert programs.asked() == []


def test_each_chart_that_is_pushed_gets_its_provenance() -> None:
    workflow = yaml.safe_load((number.ROOT / ".github" / "workflows" / "release.yml").read_text())
    steps = [step.get("with", {}) for step in workflow["jobs"]["registry"]["steps"]]
    attested = {one["subject-name"].rpartition("/")[2]: one["subject-digest"] for one in steps if "subject-name" in one}
    assert {chart: attested.get(chart) for chart in publish.CHARTS} == {
        chart: f"${{{{ steps.charts.outputs.{chart} }}}}" for chart in publish.CHARTS
    }


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("said", ["", f"Digest: {A}\nDigest: {B}", "Digest: sha256:abc"])
def test_what_names_no_one_digest_is_not_signed(programs: Programs, tmp_path: Path, said: str) -> None:
    programs.answer("helm push", said)
    assert step("publish-chart", released(tmp_path / "dist")) == 1
    assert not [words for words, _ in programs.asked() if words.startswith("cosign")]


def test_sums_are_of_all_files_and_signed(programs: Programs, tmp_path: Path) -> None:
    out = released(tmp_path / "dist")
    (out / "SHA256SUMS").write_text("of one platform alone\n")
    assert step("sign", out) == 0
    lines = (out / "SHA256SUMS").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == sorted(
        path.name for path in out.iterdir() if path.name != "SHA256SUMS"
    )
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    assert programs.asked()[-1][0] == f"cosign sign-blob --yes --bundle {out}/SHA256SUMS.sigstore.json {out}/SHA256SUMS"


def test_a_page_has_all_files_and_the_changelog(
    programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(number, "check", lambda tag: "0.2.0")
    monkeypatch.setattr(number, "notes", lambda version: "* New: `a` thing; $(rm -rf /)\n")
    monkeypatch.setenv("GITHUB_REF_NAME", "v0.2.0")
    out = released(tmp_path / "dist")
    assert step("publish-release", out) == 1
    assert "is not signed" in capsys.readouterr().err
    (out / "SHA256SUMS.sigstore.json").touch()
    assert step("publish-release", out) == 0
    ((words, text),) = programs.asked()
    assert words.startswith("gh release create v0.2.0 --verify-tag --title arcbridge 0.2.0 --notes-file - /")
    assert text == "* New: `a` thing; $(rm -rf /)\n"
    assert words.count(str(out)) == 4
    monkeypatch.setattr(number, "check", lambda tag: "0.2.0rc1")
    assert step("publish-release", out) == 0
    assert " --prerelease " in programs.asked()[-1][0]


@pytest.mark.parametrize("command", ["publish-image", "publish-index", "publish-chart"])
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("REGISTRY", "", "REGISTRY is not set: see the first lines of .github/workflows/release.yml"),
        ("REGISTRY", "https://registry.example.com/owner", "without a scheme"),
        ("REGISTRY", "registry.example.com/Owner", "in lower case"),
        ("REGISTRY", "registry.example.com/owner --insecure", "write it as"),
        ("REGISTRY_USER", "", "REGISTRY_USER is not set"),
    ],
)
def test_what_is_not_set_is_named(
    registry: Path,
    programs: Programs,
    tmp_path: Path,
    command: str,
    name: str,
    value: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    out = released(tmp_path / "dist")
    for processor, digest in (("amd64", A), ("arm64", B)):
        (out / f"image-{processor}.digest").write_text(digest)
    assert step(command, out) == 1
    assert said in capsys.readouterr().err
    assert programs.asked() == []


@pytest.mark.usefixtures("registry")
def test_a_program_that_fails_ends_the_step_with_what_it_said(
    programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.answer("helm push", "Error: 403 denied", 1)
    assert step("publish-chart", released(tmp_path / "dist")) == 1
    shown = capsys.readouterr().err
    assert "403 denied" in shown
    assert "helm push" in shown
    assert "s3cret" not in shown
    assert not [words for words, _ in programs.asked() if words.startswith("cosign")]


def test_the_steps_need_no_package(tmp_path: Path) -> None:
    """They hold tokens: `-S` leaves out all that was installed."""
    command = [sys.executable, "-S", "-c", "import release.publish, sys; sys.exit('yaml' in sys.modules)"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(number.ROOT / ".ci")}, check=False)
    assert done.returncode == 0
