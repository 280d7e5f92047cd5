"""Holds what a check has found, in the words that the `doctor` of every role prints.

A check looks at one hop (name resolution, the relay's certificate, the API server) and yields one `Finding`. It raises
nothing that belongs to the hop: what is wrong is its result. This module prints nothing (`cli.output`); it keeps the
order of the hops, because the first one that fails is the cause of the rest. Two findings that relay and agent share,
about issuers and about directories of groups, are worded here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from arcbridge.errors import ArcbridgeError, UntrustedCertificate, WrongDocument
from arcbridge.settings.problems import Problem, Severity


class FindingState(StrEnum):
    """What a check found out about its hop."""

    OK = "ok"
    WARNING = "warning"
    """The hop works, and something about it will be in the way sooner or later."""
    FAILED = "failed"
    SKIPPED = "skipped"
    """The hop was not looked at, because one before it failed or because the settings do not use it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    hop: str
    """What was looked at, in few words: `relay certificate`, `API server`."""
    state: FindingState
    detail: str
    """One sentence or less: what was found. It holds no secret."""
    remedy: str = ""
    """What to do; empty where nothing is wrong."""
    code: str = ""
    """A stable name of the fault for scripts, such as `issuer_ca`; empty where nothing is wrong."""


class ReportedFindings(list[Finding]):
    """Findings, each of which is reported when it is added: an examination takes as long as its slowest deadline."""

    def __init__(self, report: Callable[[Finding], None]) -> None:
        super().__init__()
        self._report = report

    def append(self, finding: Finding) -> None:
        super().append(finding)
        self._report(finding)

    def extend(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.append(finding)


def first_failure(findings: Sequence[Finding]) -> Finding | None:
    """Return the first hop that failed, in the order of the way; None where none did."""
    return next((finding for finding in findings if finding.state is FindingState.FAILED), None)


def settings_findings(problems: Iterable[Problem], hop: Callable[[str], str]) -> list[Finding]:
    """Return what a role's check of its settings has found, errors first; `hop`: which hop a setting is about."""
    found = [
        failed(hop(one.setting), str(one), "correct the setting, or the file that it names", "config")
        if one.severity is Severity.ERROR
        else warning(hop(one.setting), str(one), "correct it, or leave it where it is meant", "config")
        for one in problems
    ]
    return sorted(found, key=lambda one: one.state is not FindingState.FAILED)


def ok(hop: str, detail: str) -> Finding:
    """Return a hop that works."""
    return Finding(hop, FindingState.OK, detail)


def skipped(hop: str, detail: str) -> Finding:
    """Return a hop that was not looked at; `detail` says why."""
    return Finding(hop, FindingState.SKIPPED, detail)


def warning(hop: str, detail: str, remedy: str, code: str) -> Finding:
    """Return a hop that works, and will be in the way sooner or later."""
    return Finding(hop, FindingState.WARNING, detail, remedy, code)


def failed(hop: str, detail: str, remedy: str, code: str) -> Finding:
    """Return a hop that does not work."""
    return Finding(hop, FindingState.FAILED, detail, remedy, code)


# -- what stands behind tokens: issuers' keys, and directories of groups -----------------------------------------------


def key_finding(path: str, url: str, usable: bool, failure: ArcbridgeError | None) -> Finding:
    """Return the finding for the issuer at `path` of the authentication file (`jwt[0]`).

    `usable`: there are keys, new or old. `failure`: why the last fetch failed; None where it did not.
    """
    hop = f"keys of issuer {path}"
    if failure is None:
        return ok(hop, f"keys of {url} are there") if usable else skipped(hop, f"keys of {url} are not asked for yet")
    if isinstance(failure, UntrustedCertificate):
        code, remedy = "issuer_ca", "put the CA of the issuer's own certificate into issuer.certificateAuthority"
    elif isinstance(failure, WrongDocument):
        code, remedy = "issuer_document", "correct issuer.url: it has to be what the issuer calls itself"
    else:
        code, remedy = "issuer_unreachable", "check issuer.url, and that the issuer can be reached from here"
    if usable:
        return warning(hop, f"older keys of {url} are in use; new ones: {failure.message}", remedy, code)
    return failed(hop, f"{url}: {failure.message}", remedy, code)


_REMEDIES = {
    "graph_credential": "renew the credential of the application at Entra ID, and put it into the file that the table "
    "names; it is read again without a restart",
    "graph_permission": "give the application the permissions of docs/how-to/entra-id.md, with admin consent, and "
    "compare url and token_endpoint, which have to be of one cloud",
}
_REACH = "check token_endpoint and ca_file of the table, and that this place may connect to Entra ID"


def directory_finding(at: str, usable: bool, code: str, why: str) -> Finding:
    """Return the finding for the table `at` of the settings (`graph.NAME`). `usable`: it can ask now; `code` and `why`:
    what is wrong, empty where nothing is."""
    hop = f"groups by {at}"
    if not code:
        return ok(hop, "the application has a token for Microsoft Graph")
    remedy = _REMEDIES.get(code, _REACH)
    return warning(hop, why, remedy, code) if usable else failed(hop, why, remedy, code)
