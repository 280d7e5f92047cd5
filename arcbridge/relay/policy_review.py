"""Reviews the policy for an operator: by which rule a user reaches a cluster, and what another file would change.

The policy in force is that of the relay which runs on the data directory, where one does, else that of the file. The
relay sends its rules, and which of some groups its users have; everything is worked out here, in the operator's
command and not in the relay's event loop. Nothing is changed by it.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from arcbridge.errors import ArcbridgeError, ConfigError, StateError
from arcbridge.identity.authentication import AuthenticationConfig
from arcbridge.identity.policy import AdminRule, Policy, admin_changes
from arcbridge.identity.policy_rules import Rule, explain, named
from arcbridge.pki.names import check_cluster_name
from arcbridge.relay import admin
from arcbridge.relay.admin_socket import ask
from arcbridge.relay.backend import registry_of
from arcbridge.relay.settings import check, check_policy, known_clusters
from arcbridge.settings.config import RelayConfig
from arcbridge.settings.problems import Problems
from arcbridge.settings.suggest import nearest

Row = dict[str, Any]
Names = frozenset[str]
"""Those who may reach a cluster: `user NAME` and `group NAME`, with ` through actor NAME` where a program acts for the
user; `user *` is everyone, `actor *` each program."""

KINDS: Final = ("users", "groups", "actors", "clusters")
GROUPS_ASKED: Final = 25
"""Groups in one question to the relay, which takes 64 KiB; a name has a KiB at most."""


async def policy_in_force(config: RelayConfig) -> tuple[Policy, bool]:
    """Return the policy that counts, and whether a relay runs that has it in force; where its processes have several,
    the hash is those of all. Raises `StateError`, and `ConfigError` for a file with a mistake."""
    processes = await ask(config.data_dir, {"ask": "policy"})
    if not processes:
        problems = Problems()
        policy = check_policy(config, problems, AuthenticationConfig(()))
        problems.refuse()
        return policy, False
    first, found, admins = processes[0], dict[int, Row](), dict[int, Row]()
    asked = {"ask": "policy_rules", "relay": first.get("relay"), "worker": first.get("worker")}
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # a relay of another version
        for row in await ask(config.data_dir, asked) or ():
            entries, key = (admins, "admin") if "admin" in row else (found, "rule")
            rule = entries.setdefault(row[key], {"line": row["line"], **{kind: [] for kind in (*KINDS, "what")}})
            rule[row["kind"]].append(str(row["name"]))
    # Relays of earlier versions have no `[[admin]]`.
    if len(found) != first.get("rules") or len(admins) != first.get("admins", 0):
        raise StateError(f"the relay that runs on {config.data_dir} does not send its rules: is it of this version?")
    rules = tuple(_rule_of(one, f"allow[{n}]") for n, one in sorted(found.items()))
    rights = tuple(AdminRule(_rule_of(one, f"admin[{n}]"), frozenset(one["what"])) for n, one in sorted(admins.items()))
    return Policy(rules, ", ".join(sorted({str(row.get("hash")) for row in processes})), admins=rights), True


def _rule_of(row: Row, path: str) -> Rule:
    users, groups, actors = (frozenset(row[kind]) for kind in ("users", "groups", "actors"))
    return Rule(users, groups, tuple(row["clusters"]), path, row["line"], actors)


async def explain_access(config: RelayConfig, user: str, groups: tuple[str, ...], cluster: str, actor: str = "") -> Row:
    """Return what the policy says of a user, or of one in these groups, for whom `actor` acts, and a cluster, and why;
    `allowed` is the policy's alone. Without `groups` those of the user's last token count, as the relay that runs knows
    them."""
    check_cluster_name(cluster)
    if not user and not groups:
        raise ConfigError("whom? give the name of the user as the policy has it, or --groups")
    policy, running = await policy_in_force(config)
    rows = [] if groups or not running else await ask(config.data_dir, {"ask": "user", "user": user}) or []
    token = max(rows, key=lambda row: (row.get("from") == "session", row.get("at", 0.0)), default=None)
    groups = groups or tuple((token or {}).get("groups", ()))
    verdict = explain(policy.rules, named(user, groups, actor), cluster)
    reason, known = verdict.sentence(), verdict.allowed or _all_known(token, policy)
    if not known:
        reason = "not all groups of that token which the policy names are known, as it has changed since: give --groups"
    path, line = ("", 0) if verdict.rule is None else (verdict.rule.path, verdict.rule.line)
    row = {"user": user, "groups": list(groups), "actor": actor, "cluster": cluster, "allowed": verdict.allowed,
           "known": known, "reason": reason, "rule": path, "line": line, "by": verdict.by, "lacks": list(verdict.lacks),
           "near": verdict.near, "token": token, "policy": policy.hash, "running": running, "cluster_state": "",
           "agents": None, "did_you_mean": "", "revoked": None}  # fmt: skip
    with contextlib.suppress(ArcbridgeError):  # a registry that does not answer takes nothing from the answer
        if running:
            clusters = {one["name"]: one for one in (await admin.list_clusters(admin.at(config))).rows}
            state = clusters.get(cluster, {"state": "not enrolled", "agents": 0})
            row |= {"cluster_state": state["state"], "agents": state["agents"]}
            row["did_you_mean"] = "" if cluster in clusters else nearest(cluster, clusters)
            row["revoked"] = next(
                (one for one in await admin.list_users(admin.at(config)) if one["user"] == user), None
            )
    return row


def _all_known(token: Row | None, policy: Policy) -> bool:
    """Return whether a user's row has all groups of the token that a rule in force names. One of an older relay does
    not say by which policy they were chosen."""
    if token is None or not token.get("more"):
        return True
    return not token.get("cut") and token.get("policy", policy.hash) == policy.hash


async def compare_policy(config: RelayConfig, file: Path) -> Row:
    """Return what `file` changes: rules, administrators, who may reach which cluster, and which connected users lose or
    gain what."""
    (former, running), problems = await policy_in_force(config), Problems()
    clusters = set(await _clusters(config))
    policy = check_policy(replace(config, policy=file), problems, check(config).issuers, clusters)
    if not policy.hash:
        problems.refuse()
    rules = _changed_rules(former.rules, policy.rules)
    sessions = await _connected(config, sorted(former.groups | policy.groups)) if running and rules else []
    old, new = (_rights(one.rules, {*clusters, *(row["cluster"] for row in sessions)}) for one in (former, policy))
    changed = [name for name in sorted({*old, *new}) if old[name] != new[name]]
    return {
        "former": former.hash,
        "hash": policy.hash,
        "running": running,
        "rules": rules,
        "admins": [change._asdict() for change in admin_changes(former, policy)],
        "clusters": [
            {"cluster": name, "gains": sorted(new[name] - old[name]), "loses": sorted(old[name] - new[name])}
            for name in changed
        ],
        "users": _changed_users(sessions, changed, old, new),
        "tests": len(policy.tests),
        "errors": [str(one) for one in problems.errors],
        "warnings": [str(one) for one in problems.warnings],
    }


async def _clusters(config: RelayConfig) -> Sequence[str]:
    if not config.fleet.servers:
        return known_clusters(config)
    async with registry_of(config) as registry:
        return [record.name for record in await registry.clusters()]


async def _connected(config: RelayConfig, groups: Sequence[str]) -> list[Row]:
    """Return a row for each session that runs, with those of these groups that its user has."""
    found: dict[tuple[object, ...], Row] = {}
    for at in range(0, max(len(groups), 1), GROUPS_ASKED):
        asked = {"ask": "connected", "groups": groups[at : at + GROUPS_ASKED]}
        for row in await ask(config.data_dir, asked) or ():
            key = (row.get("relay"), row.get("worker"), row.get("session"))
            found.setdefault(key, {"user": "", "cluster": "", **row, "groups": []})["groups"] += row.get("groups", ())
    return list(found.values())


def _changed_rules(old: Sequence[Rule], new: Sequence[Rule]) -> list[Row]:
    """Return the rules that were added, removed or changed. The order of rules means nothing; a rule is another form
    of a former one where it has the same clusters, or the same users and groups."""
    removed, added = [rule for rule in old if rule not in new], [rule for rule in new if rule not in old]
    rows = []
    for rule in added:
        forms = (one for one in removed if one.clusters == rule.clusters or one.callers == rule.callers)
        if (former := next(forms, None)) is not None:
            removed.remove(former)
        change = ("added", _NO_RULE) if former is None else ("changed", former)
        rows.append(_rule_row(change[0], rule, rule, change[1]))
    return [*(_rule_row("removed", rule, _NO_RULE, rule) for rule in removed), *rows]


_NO_RULE: Final = Rule(frozenset(), frozenset(), ())


def _rule_row(change: str, shown: Rule, rule: Rule, former: Rule) -> Row:
    now, before = ([f"{kind[:-1]} {name}" for kind in KINDS for name in getattr(one, kind)] for one in (rule, former))
    gains, loses = sorted({*now} - {*before}), sorted({*before} - {*now})
    return {"change": change, "rule": shown.path, "line": shown.line, "gains": gains, "loses": loses}


def _through(name: str, actor: str) -> str:
    return f"{name} through actor {actor}" if actor else name


def _rights(rules: Sequence[Rule], clusters: Iterable[str]) -> Mapping[str, Names]:
    """Return for each cluster the users and groups that the rules let reach it."""
    found: defaultdict[str, Names] = defaultdict(frozenset)
    for rule in rules:
        users = [*(f"user {name}" for name in rule.users), *(f"group {name}" for name in rule.groups)]
        names = {_through(name, actor) for name in users for actor in rule.actors or ("",)}
        for cluster in filter(rule.covers, clusters):
            found[cluster] |= names
    return found


def _changed_users(
    sessions: Iterable[Row], changed: Iterable[str], old: Mapping[str, Names], new: Mapping[str, Names]
) -> list[Row]:
    """Return the connected users who gain or lose a cluster, by name, and how many of their sessions end."""
    touched: defaultdict[str, set[str]] = defaultdict(set)
    for cluster in changed:
        for name in old[cluster] ^ new[cluster]:
            touched[name].add(cluster)
    users: dict[str, Row] = {}
    for row in sessions:
        names = [f"user {row['user']}", "user *", *(f"group {group}" for group in row["groups"])]
        actors = {row["actor"], "*"} if row.get("actor") else {""}
        own = {_through(name, actor) for name in names for actor in actors}
        near: set[str] = set().union(*(touched[name] for name in own & touched.keys()))
        before, after = ({name for name in near if not own.isdisjoint(rights[name])} for rights in (old, new))
        user = users.setdefault(row["user"], {"gains": set(), "loses": set(), "sessions_lost": 0})
        user["gains"] |= after - before
        user["loses"] |= before - after
        user["sessions_lost"] += row["cluster"] in before - after
    return [
        {"user": name, **one, "gains": sorted(one["gains"]), "loses": sorted(one["loses"])}
        for name, one in sorted(users.items())
        if one["gains"] or one["loses"]
    ]
