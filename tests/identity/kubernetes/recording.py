"""Kubernetes' own tests of token authentication, as cases that can be held against ours.

The tests of `k8s.io/apiserver` (the OIDC authenticator, and the validation of AuthenticationConfiguration) are copied
from Go's module cache into a temporary module, with a recorder beside them, and run there: nothing of Kubernetes is in
this repository. The assertions of the tests stay in force; only those on metrics are taken out, because the recorder
shows more tokens. The cases of `cases.yaml` are judged by the same code. The recording is kept in the tests' cache, and
is made again when Kubernetes' version, Go's, the recorder or a case changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from tests.support import go_build
from tests.support.kube_programs import Unavailable, cache_directory
from tests.support.progress import Progress

HERE = Path(__file__).parent
MODULE = HERE.parents[1] / "cluster"
"""The Go module whose versions of Kubernetes are used."""
NOW = 1_257_894_000
"""Unix time of the cases: that of Kubernetes' own."""
ISSUER = "https://issuer.example"
AUDIENCE = "cluster"
PACKAGES = {"oidc": "plugin/pkg/authenticator/token/oidc", "validation": "pkg/apis/apiserver/validation"}
RUN = (
    "^(TestToken|TestRecordOwn|TestValidateAuthenticationConfiguration|TestValidateIssuerURL|"
    "TestValidateIssuerDiscoveryURL|TestValidateAudiences|TestValidateCertificateAuthority|"
    "TestValidateClaimValidationRules|TestValidateClaimMappings|TestValidateUserValidationRules)$"
)
LARGE: dict[str, Any] = {
    "$many": [f"group-{number}" for number in range(1001)],
    "$numbers": list(range(100)),
    "$text": "a" * 1000,
}
"""Claims that a case names instead of writing them out."""
LONG = {"$nested": "(" * 40 + "true" + ")" * 40, "$deep": "[" * 9000 + "]" * 9000}
"""The same inside a file or a payload."""
TIMEOUT = 1800.0
"""Seconds for compiling and for running."""


@dataclass(frozen=True)
class RecordedToken:
    """A token, and whom Kubernetes takes its bearer for; `user` None: it is refused, for `error`."""

    name: str
    token: str
    user: dict[str, Any] | None
    error: str


@dataclass(frozen=True)
class RecordedCase:
    """A configuration file, what an issuer's URLs answer, and tokens. `file_error` empty: the file is accepted."""

    suite: str
    name: str
    config: str
    file_error: str
    now: int = NOW
    algorithms: list[str] | None = None
    documents: dict[str, str] = field(default_factory=dict)
    tokens: list[RecordedToken] = field(default_factory=list)


@dataclass(frozen=True)
class OwnCase:
    """A case of `cases.yaml`: `row` of the documentation it shows, and the input of the Go program."""

    row: str
    given: dict[str, Any]


def own_cases() -> list[OwnCase]:
    """Read `cases.yaml`; what a case does not say is that of a token which both accept."""
    found = []
    for row, cases in yaml.safe_load((HERE / "cases.yaml").read_text(encoding="utf-8")).items():
        for number, case in enumerate(cases):
            found.append(OwnCase(row, _given(f"{row} {number}", dict(case))))
    return found


def _given(name: str, case: dict[str, Any]) -> dict[str, Any]:
    claims: dict[str, Any] = {"iss": ISSUER, "aud": AUDIENCE, "sub": "a-subject", "name": "jane"}
    claims |= {"iat": NOW - 60, "exp": NOW + 600, **case.pop("claims", {})}
    claims = {key: LARGE.get(str(value), value) for key, value in claims.items() if value != "ABSENT"}
    config = case.pop("config", None)
    if config is None:
        issuer = {"url": case.pop("url", ISSUER), "audiences": [AUDIENCE], **case.pop("issuer", {})}
        entry = {"issuer": issuer, "claimMappings": {"username": {"claim": "name", "prefix": ""}}}
        entry["claimMappings"] |= case.pop("mappings", {})
        document = {"apiVersion": "apiserver.config.k8s.io/v1", "kind": "AuthenticationConfiguration"}
        config = json.dumps({**document, "jwt": [{**entry, **case.pop("jwt", {})}], **case.pop("top", {})})
    config = config.replace("$nested", LONG["$nested"])
    header = json.dumps({"alg": "RS256", "kid": "k1", **case.pop("header", {})})
    payload = (case.pop("payload", None) or json.dumps(claims)).replace('"$deep"', LONG["$deep"])
    if case.pop("file", False):
        payload = ""  # the file alone
    keys = case.pop("keys", '{"keys": [{"kid": "k1", {{RSA}}}]}')
    signed = {url: json.dumps(answer) for url, answer in case.pop("signed", {}).items()}
    given = {"name": name, "config": config, "header": case.pop("raw_header", header), "payload": payload}
    given |= {"keys": keys, "padded": case.pop("padded", 0), "tail": case.pop("tail", ""), "signed": signed, "now": NOW}
    assert not case, f"{name}: what is {list(case)}?"
    return given


def recording() -> list[RecordedCase]:
    """Return all cases with Kubernetes' verdicts, recording them where that was not done yet (minutes, the first time).

    Raises `Unavailable` where there is no Go, or no module proxy the first time.
    """
    own = json.dumps([case.given for case in own_cases()])
    go = shutil.which("go")
    if go is None:
        raise Unavailable("there is no Go to run Kubernetes' tests: install Go 1.26 or later")
    version = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, check=True, cwd=MODULE).stdout
    digest = hashlib.sha256(f"{version}\0{own}\0{RUN}".encode())
    for source in (MODULE / "go.mod", MODULE / "go.sum", Path(__file__), *sorted(HERE.glob("*/*.go"))):
        digest.update(source.read_bytes() + b"\0")
    cache = cache_directory()
    kept = cache / f"kubernetes-cases-{digest.hexdigest()[:20]}.jsonl"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "kubernetes-cases.lock"):
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                try:
                    made = _record(go, Path(scratch), own)
                except go_build.BuildFailed as error:
                    raise Unavailable(f"Kubernetes' tests do not run here:\n{error}") from error
                made.rename(kept)
    return [_case(json.loads(line)) for line in kept.read_text(encoding="utf-8").splitlines()]


def _case(line: dict[str, Any]) -> RecordedCase:
    tokens = [RecordedToken(**token) for token in line.pop("tokens", None) or []]
    return RecordedCase(**line, tokens=tokens)


def _record(go: str, scratch: Path, own: str) -> Path:
    for name in ("go.mod", "go.sum"):
        shutil.copyfile(MODULE / name, scratch / name)
    flags = ["-mod=mod", "-trimpath", "-buildvcs=false"]
    go_build.run_go([go, "mod", "download", "k8s.io/apiserver"], scratch, lambda _: None, TIMEOUT)
    listed = subprocess.run(
        [go, "list", "-m", "-f", "{{.Dir}}", "k8s.io/apiserver"],
        cwd=scratch,
        capture_output=True,
        text=True,
        check=True,
    )
    for name, package in PACKAGES.items():
        _copy(Path(listed.stdout.strip()) / package, scratch / name)
        shutil.copyfile(HERE / name / "record_test.go", scratch / name / "record_test.go")
    (scratch / "own.json").write_text(own, encoding="utf-8")
    begun = 0

    def heard(line: str) -> None:
        nonlocal begun
        begun += line.startswith("=== RUN")
        progress.show(detail=f"{begun} cases" if begun else "compiling")

    command = [go, "test", *flags, "-p", "2", "-count=1", "-vet=off", "-v", "-run", RUN]
    with Progress("running Kubernetes' tests of authentication") as progress:
        go_build.run_go([*command, *(f"./{name}" for name in PACKAGES)], scratch, heard, TIMEOUT)
    return scratch / "recording.jsonl"


def _copy(package: Path, target: Path) -> None:
    """Copy a package with its one test of interest, and put the calls of the recorder into that."""
    target.mkdir()
    for source in package.glob("*.go"):
        if not source.name.endswith("_test.go"):
            shutil.copyfile(source, target / source.name)
    if (package / "testdata").exists():
        shutil.copytree(package / "testdata", target / "testdata", copy_function=shutil.copyfile)
    text = (package / f"{target.name}_test.go").read_text(encoding="utf-8")
    patch = {"oidc": _patched_oidc, "validation": _patched_validation}[target.name]
    (target / f"{target.name}_test.go").write_text(_without_unused_imports(patch(text)), encoding="utf-8")
    os.chmod(target, 0o700)


def _once(text: str, old: str, new: str) -> str:
    if text.count(old) != 1:
        raise go_build.BuildFailed(
            f"Kubernetes' test is not the one that is known: {old!r} is in it {text.count(old)} times"
        )
    return text.replace(old, new)


def _patched_oidc(text: str) -> str:
    call = "a, err := New(ctx, c.options)\n\tdefer recordRun(t, c, a, signer, ts.URL)\n"
    text = _once(text, "a, err := New(ctx, c.options)\n", call)
    # Behind TestToken are tests of metrics and of a function; what follows them is used by TestToken.
    text = re.sub(r"func TestUnmarshalClaimError\(.*?(?=^type errTransport )", "", text, flags=re.S | re.M)
    return re.sub(r"testutil\.AssertHistogramTotalCount\(.*, (\w+)\)\n", r"_ = \1\n", text)


def _patched_validation(text: str) -> str:
    loops = "t.Run(tt.name, func(t *testing.T) {\n"
    before, authorization, after = text.partition("func TestValidateAuthorizationConfiguration(")
    return before.replace(loops, f"{loops}\t\t\trecordRow(t, tt)\n") + authorization + after


def _without_unused_imports(text: str) -> str:
    head, end, body = text.partition("\n)\n")
    lines = []
    for line in head.splitlines():
        match = re.fullmatch(r'\t(?:(\w+) )?"(?:.*/)?([\w.-]+)"', line)
        name = "" if match is None else match[1] or {"go-jose.v2": "jose"}.get(match[2], match[2])
        if match is None or re.search(rf"\b{re.escape(name)}\.", body) or (match[2] == "v2" and "klog." in body):
            lines.append(line)
    return "\n".join(lines) + end + body


def main() -> int:
    """Record the cases, so that no test has to wait for it."""
    try:
        print(f"{len(recording())} cases of token authentication", file=sys.stderr)
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
