"""Decides what of each source may stand in a bundle: a list of what is let in, and no search for what is not.

A document has the keys of `DOCUMENTS` and no others; a setting shows its value where it is a number, a switch or the
path of a file that is there, or where `_SHOWN` has its name and the value has that form; a line of metrics or of a log
is one of ours or is left out (`bundle.log_lines`). Each text that is let in goes through the redaction of the log
besides.

Invariant: with `without_names` no text of another author is let in at all, only numbers, words of ours, and names of
users and clusters as numbers (docs/threats.md#O9).
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Final

from arcbridge.observe.untrusted_text import clean

DOCUMENTS: Final = {
    "doctor": "ok cause hops.hop^ hops.state hops.code hops.detail… hops.remedy…",
    "config check": "ok role problems.severity problems.setting… problems.message… problems.source… problems.line "
    "problems.column",
    "status": "process.pid process.version process.since process.former_versions clusters.name@cluster "
    "clusters.contexts@context clusters.user@user clusters.relay… clusters.port clusters.state clusters.reason… "
    "clusters.since clusters.connections clusters.bytes_to_cluster clusters.bytes_from_cluster "
    "clusters.token_expires logins.relay… logins.user@user",
    "cluster list": "name@cluster state agents ready failing sessions round_trip last_seen version revoked revoked_at "
    "certificate_expires cluster_ca_pin relay_ca",
    "session list": "session first_session user@user cluster@cluster agent… since bytes_to_agent bytes_to_client "
    "relay… worker",
    "policy list": "hash rules admins held reason… relay… worker",
    "ca status": "ca pin certificate_expires",
}
"""What of a command's document is let in. `…`: a text of other authors; `@KIND`: a name; `^`: what a finding is about;
else a number or a word."""
ROWS: Final = 1000
"""Items of one list."""
TEXT: Final = 2048
"""Bytes of one text."""
SET, UNSET, ABSENT = "set", "unset", "set (no such file)"

_WORD: Final = re.compile(r"[\w.:+/,()\[\] '-]{0,120}", re.ASCII)
_HOP: Final = re.compile(r"(?!(?:running relay: )?audit sink )[A-Za-z':, ]{1,60}(?:jwt\[[0-9]{1,3}\])?")
"""What a finding is about, where no name of an address or a table is in it."""
_METRIC: Final = re.compile(
    r"((?:arcbridge|process)_[a-z0-9_]{1,100})(?:\{([^{}\n]{0,2000})\})?( [-+.0-9eEInfNa]{1,40})"
)
_LABEL: Final = re.compile(r'([a-z][a-z0-9_]{0,50})="((?:[^"\\\n]|\\.)*+)"')

_CHOICE: Final = re.compile(r"[a-z0-9-]{1,24}")
_PIN: Final = re.compile(r"sha256:[0-9a-f]{64}")
_ADDRESS: Final = re.compile(r"(?:(?:https?|nats|tls)://)?[A-Za-z0-9.:\[\]_-]{1,260}(?:/[0-9]{0,3})?")
_ISSUER: Final = re.compile(r"https?://[A-Za-z0-9.:\[\]_-]{1,260}(?:/[A-Za-z0-9._~/-]{0,260})?")
_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9._:/{}+=*-]{1,200}")
_SHOWN: Final = {
    name: form
    for form, names in {
        _CHOICE: "log_level log_format on_failure kind format proof grant_type grant_types cluster_audience_by",
        _PIN: "relay_ca_pin cluster_ca_pin",
        _ADDRESS: "listen public_address internal_address relay relays server servers address url claim_sources "
        "issuer_origins proxy_protocol_from",
        _ISSUER: "issuer issuers token_endpoint",
        _IDENTIFIER: "audience cluster_audience forbidden_audiences scopes relay_scopes cluster_scopes drain_label "
        "prefix bucket redirect_path client_assertion_audience file",
    }.items()
    for name in names.split()
}
"""Settings whose texts are shown, by their last word, in this form alone. What is not here is `set`."""
NAMES: Final = {
    **dict.fromkeys(("cluster", "clusters"), "cluster"),
    **dict.fromkeys(("user", "users", "username"), "user"),
    **dict.fromkeys(("group", "groups", "impersonate_groups"), "group"),
    **dict.fromkeys(("actor", "actors"), "actor"),
    **dict.fromkeys(("context", "contexts", "kube_context"), "context"),
    **dict.fromkeys(("sink", "sinks"), "sink"),
}
"""Settings, labels and fields of the log that are names, and of what."""
_LABELS: Final = frozenset(
    ("bound", "cause", "check", "code", "direction", "le", "limit", "outcome", "purpose", "reason", "result", "role",
     "rule", "version", "python", "what")
)  # fmt: skip
"""Labels of metrics whose values are words of ours."""
_OUR_FILES: Final = re.compile(
    r"\.?(?:ca|server|tls|client|local-ca|registry|relay|agent|audit|pins|ports|connections|kubeconfigs|clusters|tokens"
    r"|cache|successions|running|background|credential|admin|control|silent|told|start)"
    r"(?:[.-](?:ca|rotation|start|crt|key|db|wal|shm|json|jsonl|lock|log|sock|toml|gz|[0-9]{1,3}))*"
)


class Contents:
    """Lets in what may stand in one bundle."""

    def __init__(self, *, without_names: bool) -> None:
        self.without_names = without_names
        self._numbers: dict[str, dict[str, str]] = {}
        self._absent: set[str] = set()
        """Paths of settings where no file is: one may be a secret that was put where its file's name belongs."""

    # -- values ----------------------------------------------------------------------------------------------------

    def name(self, kind: str, value: object) -> str:
        """Return a name, or the number that it has in this bundle. One name has one number in all sources."""
        text = str(value)
        if not self.without_names or not text:
            return self._clean(text)
        known = self._numbers.setdefault(kind, {})
        return known.setdefault(text, f"{kind}-{len(known) + 1}")

    def named(self, kind: str, value: object) -> Any:
        """Return a name, or several of them."""
        return [self.name(kind, one) for one in value[:ROWS]] if isinstance(value, list) else self.name(kind, value)

    def text(self, value: object) -> Any:
        """Return a text of other authors, or a number."""
        if value is None or isinstance(value, bool | int | float):
            return value
        return None if self.without_names else self._clean(str(value))

    def word(self, value: object) -> Any:
        """Return a word of ours, or a number."""
        return self._clean(value) if isinstance(value, str) and _WORD.fullmatch(value) else self.text(value)

    def without_absent(self, text: str) -> str:
        """Return a text without the paths of settings where no file is. The settings come first."""
        for path in sorted(self._absent, key=len, reverse=True):
            text = text.replace(path, "[no such file]")
        return text

    def _clean(self, text: str) -> str:
        return clean(self.without_absent(text), TEXT)

    # -- documents -------------------------------------------------------------------------------------------------

    def document(self, command: str, value: Any) -> Any:
        """Return what may stand of the document that a command prints."""
        allowed = dict(_allowed(one) for one in DOCUMENTS[command].split())
        return self._part(allowed, "", value)

    def _part(self, allowed: dict[str, str], path: str, value: Any) -> Any:
        if isinstance(value, list):
            more = [f"{len(value) - ROWS} more"] if len(value) > ROWS else []
            return [self._part(allowed, path, one) for one in value[:ROWS]] + more
        if isinstance(value, dict):
            paths = {key: f"{path}.{key}" if path else key for key in value}
            return {
                key: self._part(allowed, paths[key], one)
                for key, one in value.items()
                if paths[key] in allowed or any(name.startswith(f"{paths[key]}.") for name in allowed)
            }
        kind = allowed.get(path)
        if kind is None:
            return None  # a document of another version has a value where this one has a table
        if kind == "…" or value is None:
            return self.text(value)
        if kind == "^":
            return self._clean(str(value)) if _HOP.fullmatch(str(value)) else self.name("hop", value)
        return self.name(kind, value) if kind else self.word(value)

    # -- settings --------------------------------------------------------------------------------------------------

    def settings(self, config: Any, path: str = "") -> dict[str, Any]:
        """Return each setting by its dotted name: its value, or `set` or `unset`."""
        found: dict[str, Any] = {}
        for field in fields(config):
            name, value = f"{path}{field.name}", getattr(config, field.name)
            if is_dataclass(value):
                found |= self.settings(value, f"{name}.")
            elif isinstance(value, dict):
                kind = NAMES.get(field.name, field.name)
                for key, table in value.items():
                    found |= self.settings(table, f"{name}.{self.name(kind, key)}.")
            elif isinstance(value, Path) or (field.metadata.get("path") and value not in ("", "-")):
                found[name] = self._file(Path(value), given=value != field.default)
            else:
                found[name] = self._setting(field.name, value)
        return found

    def _file(self, path: Path, *, given: bool) -> str:
        """Return the path of a file that is there, or that is a default."""
        if not given or _is_there(path):
            return self.text(path) or SET
        # Of a text with a slash the beginning alone would be named by what says that it is no directory.
        self._absent |= {str(one) for one in (path, *path.parents) if not _is_there(one)}
        return ABSENT

    def _setting(self, name: str, value: object) -> Any:
        if value is None or value in ("", ()):
            return UNSET
        if isinstance(value, bool | int | float):
            return value
        every = list(value) if isinstance(value, tuple) else [value]
        if (kind := NAMES.get(name)) is not None:
            shown: list[Any] = [self.name(kind, one) for one in every]
        elif (form := _SHOWN.get(name)) is not None and all(form.fullmatch(str(one)) for one in every):
            shown = [clean(str(one)) if form in (_CHOICE, _PIN) else self.text(one) or SET for one in every]
        else:
            return SET
        return shown if isinstance(value, tuple) else shown[0]

    # -- lines -----------------------------------------------------------------------------------------------------

    def metrics(self, text: str) -> str:
        """Return the samples of ours on a page of metrics."""
        lines = ""
        for match in filter(None, map(_METRIC.fullmatch, text.splitlines())):
            labels = ",".join(f'{name}="{self._label(name, one)}"' for name, one in _LABEL.findall(match[2] or ""))
            lines += f"{match[1]}{f'{{{labels}}}' if labels else ''}{match[3]}\n"
        return lines

    def _label(self, name: str, value: str) -> str:
        """Return the value of a label, in which quotes stay escaped as they are."""
        return str(self.word(value) or "") if name in _LABELS else self.name(NAMES.get(name, name), value)

    def path(self, parts: tuple[str, ...]) -> str:
        """Return the name of a file in a state directory."""
        return "/".join(one if _OUR_FILES.fullmatch(one) else self.name("file", one) for one in parts)


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except PermissionError:  # within a directory that is another user's
        return True
    except (OSError, ValueError):
        return False
    return True


def _allowed(text: str) -> tuple[str, str]:
    """Read one item of `DOCUMENTS`: the path of a value, and its kind."""
    if text[-1] in "…^":
        return text[:-1], text[-1]
    path, _, kind = text.partition("@")
    return path, kind
