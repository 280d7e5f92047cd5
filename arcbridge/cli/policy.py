"""`policy explain` and `policy diff`: what they print, and the exit code."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from arcbridge.cli.commands import DOCUMENTS
from arcbridge.cli.output import as_prose, format_rows, plain, print_document, print_error, print_warning, rfc3339
from arcbridge.cli.screen import Column
from arcbridge.cli.settings import start
from arcbridge.errors import ConfigError, ExitCode
from arcbridge.identity.policy_rules import named, who
from arcbridge.relay import policy_review

if TYPE_CHECKING:
    from collections.abc import Callable

    from arcbridge.cli.parser import Invocation

MOST_SHOWN: Final = 20
"""Rows of a table, and names in a cell; documents have all."""


def explain(invocation: Invocation) -> int:
    """Print which rule decides; 0 where the user may reach the cluster."""
    groups = tuple(name for text in invocation.texts("groups") for name in text.split(",") if name)
    *user, cluster = invocation.texts("name")
    if len(user) > 1:
        raise ConfigError("which one? give the name of one user, and of one cluster")
    config = start(invocation, "warning")
    actor = invocation.text("actor")
    row = asyncio.run(policy_review.explain_access(config, "".join(user), groups, cluster, actor))
    for times, key in ((row["token"], "at"), (row["revoked"], "before"), (row["revoked"], "revoked_at")):
        if times:
            times[key] = rfc3339(times[key])
    _print(row, invocation, _explained)
    return ExitCode.DONE if row["allowed"] and row["cluster_state"] not in _CLOSED else ExitCode.FAILURE


_CLOSED: Final = ("Revoked", "not enrolled")
_RUNNING, _FILE = "of the relay that runs", "of the settings' file, because no relay runs here"


def _explained(row: policy_review.Row) -> str:
    token, revoked = row["token"], row["revoked"]
    may = "may reach" if row["allowed"] else "may not reach" if row["known"] else "may or may not reach"
    came = "not known here, so the name alone was looked for; give --groups"
    if token:
        claim = f'; the token has no claim "{token["missing_claim"]}"' if token["missing_claim"] else ""
        names = f"{len(token['groups'])} that the policy names and {token['more']} more"
        came = f"{names}, of a {token['from']} at {token['at']}{claim}"
    meant = f"; did you mean {row['did_you_mean']}?" if row["did_you_mean"] else ""
    lines = {
        who(named(row["user"], row["groups"], row["actor"])) + f' {may} "{row["cluster"]}"': row["reason"],
        "policy": f"version {row['policy']} {_RUNNING if row['running'] else _FILE}",
        "groups": "" if row["groups"] and not token else came,
        "cluster": row["cluster_state"] and f"{row['cluster_state']}, agents: {row['agents']}{meant}",
        "user": revoked and f"logins from before {revoked['before']} are revoked ({revoked['reason']})",
    }
    return as_prose("\n".join(f"{plain(key)}: {plain(text)}" for key, text in lines.items() if text))


def diff(invocation: Invocation) -> int:
    """Print what the file changes; 1 where it changes anything, 2 where it is not taken over."""
    row = asyncio.run(policy_review.compare_policy(start(invocation, "warning"), Path(invocation.text("file"))))
    for tell, texts in ((print_error, row["errors"]), (print_warning, row["warnings"])):
        for text in texts:
            tell(text)
    _print(row, invocation, _compared)
    return ExitCode.USAGE if row["errors"] else ExitCode.FAILURE if row["rules"] or row["admins"] else ExitCode.DONE


def _compared(row: policy_review.Row) -> str:
    where = _RUNNING if row["running"] else _FILE
    tests = f"{row['tests']} tests {'do not all pass' if row['errors'] else 'pass'}"
    admins = f", and what {len(row['admins'])} may administer" if row["admins"] else ""
    text = f"version {row['former']} ({where}), to {row['hash']}: {len(row['rules'])} rules differ{admins}; {tests}"
    text = as_prose(text)
    heads = {"rules": "change rule line", "admins": "who", "clusters": "cluster", "users": "user sessions_lost"}
    for kind, first in heads.items():
        columns = [Column(name) for name in first.split()] + [Column(name, words=True) for name in ("gains", "loses")]
        rows = [row | {key: _first(row[key]) for key in ("gains", "loses")} for row in row[kind]]
        if rows:
            more = f"and {len(rows) - MOST_SHOWN} more {kind}\n" if len(rows) > MOST_SHOWN else ""
            text += f"\n{format_rows(rows[:MOST_SHOWN], columns, 'table')}{more}"
    return text


def _first(names: list[str]) -> str:
    more = f" and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
    return ", ".join(names[:MOST_SHOWN]) + more


def _print(row: policy_review.Row, invocation: Invocation, text: Callable[[policy_review.Row], str]) -> None:
    if (output := invocation.text("output", "text")) in DOCUMENTS:
        print_document(row, output)
    else:
        sys.stdout.write(text(row))
