"""Formats what administrators' commands answer, on the relay's machine (`cli.relay`) and from afar (`cli.admin`).

It asks no relay. Invariant: what comes from a relay reaches a terminal escaped, as all rows do (`cli.output`).
"""

from __future__ import annotations

from arcbridge.cli.commands import DOCUMENTS, FOR_PEOPLE
from arcbridge.cli.output import as_prose, format_document, format_rows, plain, print_note, rfc3339
from arcbridge.cli.screen import Column

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from arcbridge.pki.new_token import NewToken

    Row = Mapping[str, Any]

_LISTS = {
    "token list": "id cluster state used/2 uses/2 created/3 expires_at/1",
    "cluster list": "name state agents/1 ready+ failing+ sessions+ round_trip+ last_seen/2 certificate_expires/4 "
    "version/3 cluster_ca_pin/5 relay_ca+ newest_relay_ca+ newest_cluster_ca+",
    "session list": "session user cluster since/1 actor/2 restricted/2 bytes_to_agent/4 bytes_to_client/3 round_trip/5 "
    "agent/5 relay/6 worker/7",
    "refusal list": "at user cluster code rule/3 times/2 reason… session/1 relay/4 worker/5",
    "user list": "user before revoked_at/1 reason…",
    "recovery list": "cluster last_seen",
    "policy list": "hash rules/1 held reason… relay/2 worker/3",
}
"""The columns of each list; the first one names a row. `/N`: its rank, `+`: in `-o wide` alone, `…`: sentences."""
_NONE = {
    "token list": "no join tokens",
    "cluster list": "no clusters: none is enrolled",
    "session list": "no sessions: none runs now",
    "refusal list": "no refusals that the relay remembers",
    "user list": "no users: none is revoked",
    "recovery list": "no clusters: none has revocations to give back",
}
"""What is said beside a list without rows."""
_DONE = {
    "token delete": "join token {id} is deleted: it enrols no more agents",
    "cluster revoke": "cluster {cluster} is revoked: its agents are cut off within seconds and refused",
    "cluster revoke, unknown": "cluster {cluster} is revoked, and was not known here (was the name meant?): its agents "
    "are refused when they come, at this relay and at those that share its registry",
    "cluster restore": "cluster {cluster} is restored: its agents come back by themselves while their certificate is "
    "valid",
    "cluster delete": "cluster {cluster} is forgotten: the name is free, also for another cluster CA",
    "session end": "session {session} of {user} with cluster {cluster} ends within seconds",
    "user revoke": "user {user} is revoked: tokens issued before {before} are refused, and what runs under them ends "
    "within seconds",
    "user restore": "user {user} is restored: tokens count again until they lapse",
    "policy accept": "version {hash} of the policy counts from now on",
}
"""What each act says of each row of its answer."""
_TIMES = frozenset(
    ("created", "expires_at", "last_seen", "certificate_expires", "before", "revoked_at", "since", "at", "valid_since")
)
"""Keys whose values are unix seconds, 0 for never; people and scripts get them as RFC 3339."""


def format_list(command: str, rows: Sequence[Row], output: str) -> str:
    """Return the rows of a list; `output` as in `--output`. A note on standard error says that there are none."""
    if not rows and command in _NONE and output in ("", *FOR_PEOPLE):
        print_note(_NONE[command])
    columns = [_column(text) for text in _LISTS[command].split()]
    shown = [_dated(row) for row in rows]
    for row in shown if output in ("", *FOR_PEOPLE) else ():
        if isinstance(trip := row.get("round_trip"), float):
            row["round_trip"] = f"{trip * 1000:.1f} ms" if trip else ""
    return format_rows(shown, columns, output, name=columns[0].key)


def _column(text: str) -> Column:
    key, _, rank = text.partition("/")
    name = key.rstrip("+…")
    return Column(name, rank=int(rank or 0), words=key.endswith("…"), state=name == "state", wide=key.endswith("+"))


def format_done(command: str, rows: Sequence[Row]) -> str:
    """Return a sentence for each row of an act's answer."""
    return as_prose(
        "\n".join(
            _DONE[command if row.get("known", True) else f"{command}, unknown"].format_map(
                {key: plain(str(value)) for key, value in _dated(row).items()}
            )
            for row in rows
        )
    )


def format_token(made: NewToken, output: str) -> str:
    """Return a new join token with what is to be done with it."""
    from dataclasses import asdict

    if output in DOCUMENTS:
        return format_document(_dated(asdict(made)), output)
    if output not in ("", "table"):
        return format_rows([asdict(made)], (), output, name="token")
    uses, until = "once" if made.uses == 1 else f"{made.uses} times", rfc3339(made.expires_at) or "-"
    lines = [
        f"Join token for cluster {made.cluster}, usable {uses} until {until}; shown only now:",
        "",
        f"  {made.token}",
        "",
        "Where kubectl reaches the cluster, with the Helm chart of a clone, or of the package in "
        "/usr/share/doc/arcbridge/examples/helm (values.yaml says whose tokens count):"
        if made.in_cluster
        else "On the agent's machine, in the foreground (for its package: docs/how-to/install.md#packages):",
        "",
        *(f"  {line}" for line in made.command.splitlines()),
        "",
        "The first line holds the token. The spaces before it keep it out of the history of a shell that is set so "
        "(bash: HISTCONTROL=ignorespace); `-o name` prints the token alone, for `> FILE`.",
        "",
    ]
    if made.in_cluster:
        lines += [
            "For an agent on a machine that is no pod give this command `--kube-server https://HOST:PORT` and "
            "`--kube-token-file FILE` (and `--kube-ca-file FILE`) too: it prints what starts that agent.",
            "",
        ]
    if not made.relay_ca_pin:
        lines += [
            "The relay's certificate comes from another CA: agents check it against their system's CAs, or against "
            "--relay-ca-file.",
            "",
        ]
    # What is to be copied stays as it is.
    return "\n".join(line if line[:1] in ("", " ") else as_prose(line).rstrip("\n") for line in lines)


def _dated(row: Row) -> dict[str, Any]:
    """Return the row with its times as text; None, which tables show as `-`, for never."""
    return {key: rfc3339(value or 0.0) if key in _TIMES else value for key, value in row.items()}
