"""Writes the administrators' page as HTML.

Every text that is not of this module passes `_text`, which escapes it and writes out control characters and marks that
reorder text, so that no name or reason is markup or reads otherwise than it is written. The page is bounded: of the
clusters it has the worst ones, as many as fit into `MOST_BYTES`, and says how many there are more. What changes while
one looks at it is in elements with `data-live`, which `script.js` replaces one by one.
"""

from __future__ import annotations

import html
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from arcbridge.identity.policy import EVERY_CLUSTER
from arcbridge.identity.policy_rules import covers
from arcbridge.observe.untrusted_text import escape
from arcbridge.relay.operations import Row
from arcbridge.relay.page.changes import AuditedChange
from arcbridge.relay.page.facts import ClusterFact, Facts, RelayFact, make_room
from arcbridge.relay.page.lookups import RuleReach, UserReach
from arcbridge.relay.page.words import DEGRADED, DOWN, NEVER, SERVING, STATES
from arcbridge.settings.named_files import SOON
from arcbridge.units import rfc3339

MOST_BYTES: Final = 24_000
"""Bytes of the table of clusters."""
MOST_PART: Final = 4_000
"""Bytes of each other list."""
MOST_REFUSED: Final = 1_000
"""Bytes of the list of refusals among the changes."""
MOST_TEXT: Final = 300
"""Characters of one text."""
_AUDIT_SHOW: Final = "<code>arcbridge audit show</code>"
_MARKS: Final = {SERVING: ("ok", "✓"), DEGRADED: ("bad", "!"), DOWN: ("down", "✕"), NEVER: ("new", "?")}
"""Class and sign of each state; the sign is beside the word, and no colour stands alone."""


@dataclass(frozen=True, slots=True)
class Looked:
    """What a page was asked for besides the list."""

    text: str = ""
    """Part of the names that are listed; empty: all."""
    cluster: str = ""
    user: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """What is known of that."""

    refusals: Sequence[Row] | None = None
    """Of the cluster; None: it is not the caller's, or none was asked for."""
    reach: UserReach | None = None
    failure: str = ""


def shell(title: str, body: str, *, script: bool = False) -> str:
    """Return a whole document."""
    code = '<script src="/page/script.js" defer></script>' if script else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{_text(title)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" '
        f'content="light dark"><link rel="stylesheet" href="/page/style.css">{code}</head><body>{body}</body></html>'
    )


def notice(relay: str, words: str, *, login: str = "") -> str:
    """Return a page with one sentence, and where to log in. `login`: at which issuer; empty: nowhere."""
    at = f'<p><a class="go" href="/page/login">Log in at {_text(login)}</a></p>' if login else ""
    body = f'<main class="notice"><h1>arcbridge <span>{_text(relay)}</span></h1><p>{_text(words)}</p>{at}</main>'
    return shell("arcbridge", body)


def page(facts: Facts, live: str, relay: str, user: str, looked: Looked, found: Found) -> str:
    """Return the page for one who has logged in. `live`: `live_parts` of the same facts."""
    relays, summary, clusters, changes = live.split(_CUT)
    head = (
        '<a class="skip" href="#clusters">Skip to the clusters</a><header>'
        f"<h1>arcbridge <span>{_text(relay)}</span></h1>"
        f'<p id="live">as of <time>{_clock(facts.at)}</time>; reload to see what is new</p>'
        f'<form method="post" action="/page/logout"><span class="who">{_name(user)}</span> '
        "<button>Log out</button></form></header>"
    )
    search = (
        '<form class="ask" method="get" action="/page">'
        f'<p><label for="q">Part of a cluster\'s name</label><input id="q" name="q" maxlength="63" '
        f'value="{_text(looked.text)}"></p>'
        '<p><label for="user">Reach of a user</label>'
        f'<input id="user" name="user" maxlength="1024" value="{_text(looked.user)}"></p><p><button>Show</button></p>'
        "</form>"
    )
    main = (
        f'<main>{relays}<section id="clusters" aria-labelledby="h-clusters"><h2 id="h-clusters">Clusters</h2>'
        f"{summary}{search}{_lookup(looked, found, facts.at)}{clusters}</section>{changes}</main>"
    )
    return shell("arcbridge", head + main, script=True)


_CUT: Final = "<!---->"
"""Stands between the parts that are live."""


def live_parts(facts: Facts, patterns: Sequence[str], readable: Sequence[str], *, text: str) -> str:
    """Return the parts that change while one looks: of relays, of clusters, of changes. `patterns`: the caller's
    clusters; `readable`: those of which the caller may read what was changed, too; with every cluster also what is the
    relay's own. The same question to the same facts is answered once."""
    key = tuple(patterns), tuple(readable), text
    if key not in facts.made.views:
        make_room(facts.made.views)
        own, folded = facts.of(patterns), text.casefold()
        shown = [one for one in own if folded in one.name] if folded else own
        whole = EVERY_CLUSTER in readable
        relays = _once(facts, ("relays", whole), lambda: _relays(facts) if whole else _failure(facts))
        summary = _once(facts, ("summary", key[0]), lambda: _summary(own))
        changes = _once(facts, ("changes", key[1]), lambda: _changes(facts, readable) if readable else "")
        facts.made.views[key] = _CUT.join(
            (
                _live("relays", relays),
                _live("summary", summary, 'role="status"'),
                _live("table", _table(own, shown, facts.at, text)),
                _live("changes", changes),
            )
        )
    return facts.made.views[key]


def _once(facts: Facts, key: object, make: Callable[[], str]) -> str:
    if key not in facts.made.parts:
        make_room(facts.made.parts)
        facts.made.parts[key] = make()
    return facts.made.parts[key]


def _live(name: str, body: str, more: str = "") -> str:
    return f'<div id="{name}" {more} data-live>{body}</div>'


# -- parts -------------------------------------------------------------------------------------------------------------


def _failure(facts: Facts) -> str:
    words = [f"{facts.failure}; what is below is of {_clock(facts.at)}"] if facts.failure else []
    words += [facts.missing] if facts.missing else []
    return "".join(f'<p class="alarm"><b>Attention:</b> {_text(one)}.</p>' for one in words)


def _relays(facts: Facts) -> str:
    findings = _bounded(map(_finding, facts.findings), MOST_PART, "findings: `arcbridge --role relay doctor`")
    rows = _bounded((_relay(one, facts.at) for one in facts.relays), MOST_PART, "relays")
    return (
        f'{_failure(facts)}<section aria-labelledby="h-relays"><h2 id="h-relays">Relays</h2>'
        f"{f'<ul>{findings}</ul>' if findings else '<p>The self-checks of this relay find nothing wrong.</p>'}"
        f"<ul class='relays'>{rows}</ul></section>"
    )


def _finding(row: Row) -> str:
    kind = ("down", "✕", "failed") if row.get("state") == "failed" else ("bad", "!", "warning")
    workers = [str(one) for one in row["workers"] if one is not None]
    at = f" (worker {', '.join(workers)})" if workers else ""
    remedy = f" <span class='fix'>{_sentence(str(row['remedy']))}</span>" if row.get("remedy") else ""
    return (
        f'<li><span class="s {kind[0]}"><span aria-hidden="true">{kind[1]}</span> {kind[2]}</span> '
        f"{_text(str(row.get('hop')))}{at}: {_sentence(str(row.get('detail')))}{remedy}</li>"
    )


def _relay(one: RelayFact, now: float) -> str:
    processes = f", {one.processes} processes" if one.processes > 1 else ""
    policy = f"policy {_text(', '.join(one.policies))}"
    held = (
        f' <span class="s bad"><span aria-hidden="true">!</span> version {_text(one.held)} is held back</span>'
        if one.held
        else ""
    )
    known = [f"version {_text(', '.join(one.versions))}"] if one.versions else []
    if one.certificate_expires:
        until = f"certificate until {_day(one.certificate_expires)}"
        soon = one.certificate_expires - now < SOON
        known.append(f'<span class="s bad"><span aria-hidden="true">!</span> {until}</span>' if soon else until)
    known += [_count(one.connections, "agent"), policy]
    return f"<li><b>{_name(one.address)}</b>{processes}: {', '.join(known)}{held}</li>"


def _summary(own: Sequence[ClusterFact]) -> str:
    found = Counter("" if one.revoked else one.judged.state for one in own)
    revoked = found.pop("", 0)
    bad = found.total() - found[SERVING]
    each = ", ".join(f"{found[state]} {'down' if state == DOWN else state}" for state in STATES if found[state])
    words = (
        f"{bad} of {len(own)} clusters need you: {each}" if bad else f"{_count(len(own), 'cluster')}: {each or 'none'}"
    )
    return f"{words}{f', {revoked} revoked' if revoked else ''}."


def _table(own: Sequence[ClusterFact], shown: Sequence[ClusterFact], now: float, text: str) -> str:
    rows, size = list[str](), 0
    for one in shown:
        row = _cluster(one, now)
        size += len(row.encode())
        if size > MOST_BYTES:
            break
        rows.append(row)
    left = len(shown) - len(rows)
    more = f"<p>and {left} more: name a part of what you look for.</p>" if left else ""
    words = f"{len(shown)} of {len(own)} have “{_text(text)}” in their name."
    filtered = f'<p>{words} <a id="all" href="/page">Show all</a></p>' if text else ""
    heads = ("Cluster", "State", "What is wrong, and what to do", "Agents ready", "Sessions", "Round trip",
             "Certificate ends", "Version")  # fmt: skip
    table = (
        "<table><caption>Worst first</caption><thead><tr>"
        + "".join(f'<th scope="col">{head}</th>' for head in heads)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        if rows
        else "<p>No cluster to show.</p>"
    )
    return filtered + table + more


def _cluster(one: ClusterFact, now: float) -> str:
    kind, sign = _MARKS[one.judged.state]
    since = f" {_when(one.judged.since, now)}" if one.judged.state == DOWN else ""
    faults = "".join(
        f"<p>{_sentence(fault.what)} <span class='fix'>{_sentence(fault.remedy)}</span></p>"
        for fault in one.judged.faults
    )
    trip = "" if one.round_trip is None else f"{one.round_trip * 1000:.0f} ms"
    cells = (
        ("Wrong", faults),
        ("Agents ready", f"{one.ready} of {one.agents}"),
        ("Sessions", f"{one.sessions}"),
        ("Round trip", trip),
        ("Certificate ends", _day(one.expires)),
        ("Version", _text(one.version)),
    )
    return (
        f'<tr><th scope="row"><a id="c-{_text(one.name)}" href="/page?cluster={quote(one.name)}">{_name(one.name)}</a>'
        f'</th><td><span class="s {kind}"><span aria-hidden="true">{sign}</span> {one.judged.state}{since}</span></td>'
        + "".join(f'<td data-of="{head}">{cell}</td>' if cell else "<td></td>" for head, cell in cells)
        + "</tr>"
    )


def _changes(facts: Facts, readable: Sequence[str]) -> str:
    """Return what was changed in these clusters, also those that are there no more, or not yet. A record about another
    cluster besides has its name, and users of it: it is for viewers who may read both."""
    head = '<section aria-labelledby="h-changes"><h2 id="h-changes">Changed in the last 24 hours</h2>'
    if facts.changes is None:
        return f"{head}<p>The relay's audit log is no file, or cannot be read: [audit] in its settings.</p></section>"
    whole, changes = EVERY_CLUSTER in readable, facts.changes

    def own(records: Sequence[AuditedChange]) -> list[AuditedChange]:
        return [one for one in records if whole or (one.clusters and all(covers(readable, it) for it in one.clusters))]

    rest, since = "records: `arcbridge audit show`", _when_at(changes.cut)
    done = _bounded(map(_change, own(changes.records)), MOST_PART, rest)
    refused = _bounded(map(_change, own(changes.refusals)), MOST_REFUSED, rest)
    if changes.more_refusals:
        refused += f"<li>and {changes.more_refusals if whole else 'maybe'} more {_code(rest)}</li>"
    if done:
        body = f"<ol>{done}</ol>" + f"<p>That is all since {since}; older records: {_AUDIT_SHOW}.</p>" * bool(since)
    elif changes.cut:
        at = f" since {since}" if since else ""
        body = f"<p>Nothing{at}, by the end of the audit log of this relay; older records: {_AUDIT_SHOW}.</p>"
    else:
        body = "<p>Nothing, by the audit log of this relay.</p>"
    return f"{head}{body}{f'<h3>Refused</h3><ol>{refused}</ol>' if refused else ''}</section>"


def _change(one: AuditedChange) -> str:
    about = ", ".join(f"{name} {_name(value)}" for name, value in one.about)
    outcome, _, reason = one.failure.partition(":")
    bad = f' <span class="s bad"><span aria-hidden="true">!</span> {_text(outcome)}</span>{_text(reason)}' * bool(
        outcome
    )
    at, names = _when_at(one.at), f": {about}" if about else ""
    return f"<li>{at} <b>{_text(one.act)}</b> by {_name(one.actor)}{names}{bad}</li>"


def _lookup(looked: Looked, found: Found, now: float) -> str:
    """Return what was asked of a user or a cluster."""
    if not (looked.user or looked.cluster):
        return ""
    name = looked.user or looked.cluster
    close = '<p><a href="/page">Close</a></p>'
    if found.failure:
        body = f'<p class="alarm">{_text(found.failure)}.</p>'
    elif found.reach is not None:
        body = _reach(found.reach, now)
    elif found.refusals is not None:
        body = f"<h3>Last refusals of this cluster</h3>{_refusals(found.refusals, now)}"
    else:
        body = "<p>There is no such cluster, or it is not yours; [[admin]] in the relay's policy says who reads.</p>"
    return f'<section class="look" aria-labelledby="h-look"><h3 id="h-look">{_name(name)}</h3>{body}{close}</section>'


def _reach(reach: UserReach, now: float) -> str:
    token = reach.token
    came = "No token of this user is known here, so the name alone was looked for."
    if token is not None:
        groups = _text(", ".join(map(str, token.get("groups", ())))) or "none"
        named = f"groups that the policy names: {groups}; {int(token.get('more', 0))} more"
        leading = f"groups that lead to clusters of yours: {groups}"
        came = f"By the token of {_when(float(token.get('at', 0.0)), now)}: {named if reach.whole else leading}."
    elif not reach.whole:
        came = "No token of this user is known here, or it has nothing to do with clusters of yours."
    parts = [f"<p>{came}</p>"]
    if reach.revoked is not None:
        before = rfc3339(float(reach.revoked["before"]))
        parts.append(f'<p class="alarm">Logins from before {before} are revoked. {_text(reach.revoked["reason"])}</p>')
    rules = _bounded(map(_rule, reach.rules), MOST_PART, "rules")
    none = "<p>No rule lets this user reach a cluster of yours.</p>" if reach.complete else "<p>None found so far.</p>"
    parts.append(f"<h4>Reaches</h4>{f'<ul>{rules}</ul>' if rules else none}")
    if not reach.complete:
        rest = "<code>arcbridge --role relay policy explain</code> has the rest"
        parts.append(f"<p>There may be more: not every rule was compared; {rest}.</p>")
    sessions = _bounded((_session(row, now) for row in reach.sessions), MOST_PART, "sessions")
    parts.append(f"<h4>Sessions</h4>{f'<ul>{sessions}</ul>' if sessions else '<p>None runs.</p>'}")
    parts.append(f"<h4>Last refusals</h4>{_refusals(reach.refusals, now)}")
    return "".join(parts)


def _rule(one: RuleReach) -> str:
    names = ", ".join(_name(name) for name in one.clusters) + (f" and {one.more} more" if one.more else "")
    return f"<li>{_text(one.rule)}, by the {_name(one.by)}: {names}</li>"


def _session(row: Row, now: float) -> str:
    return (
        f"<li>{_name(str(row.get('cluster')))} since {_when(float(row.get('since', 0.0)), now)} from "
        f"{_name(str(row.get('source')))}, session {_text(str(row.get('session')))}</li>"
    )


def _refusals(rows: Sequence[Row], now: float) -> str:
    found = _bounded((_refusal(row, now) for row in rows[:20]), MOST_PART, "refusals: `arcbridge refusal list`")
    return f"<ol>{found}</ol>" if found else "<p>None that this relay remembers.</p>"


def _refusal(row: Row, now: float) -> str:
    times = int(row.get("times", 1))
    rule = f" ({_text(str(row['rule']))})" if row.get("rule") else ""
    return (
        f"<li>{_when(float(row.get('at', 0.0)), now)} {_name(str(row.get('user')))}, {_name(str(row.get('cluster')))}: "
        f"{_text(str(row.get('code')))}{rule}, {_text(str(row.get('reason')))}"
        f"{f', {times} times' if times > 1 else ''}; session {_text(str(row.get('session')))}</li>"
    )


# -- texts -------------------------------------------------------------------------------------------------------------


def _text(words: str) -> str:
    cut = words if len(words) <= MOST_TEXT else words[: MOST_TEXT - 1] + "…"
    return html.escape(escape(cut))


def _name(words: str) -> str:
    """Return a name of a peer's, whose direction of writing is its own."""
    return f"<bdi>{_text(words)}</bdi>"


def _sentence(words: str) -> str:
    """Return words as a sentence: with a capital and a full stop."""
    return f"{_code(words[:1].upper() + words[1:])}." if words else ""


def _code(words: str) -> str:
    """Return a text whose commands stand between backquotes."""
    parts = _text(words).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S UTC", time.gmtime(at))


def _when(at: float, now: float) -> str:
    """Return a time of the last or next hours without its day, and any other time with it."""
    if at <= 0:
        return ""
    there, here = time.gmtime(at), time.gmtime(now)
    near = there[:3] == here[:3]
    return (
        f'<time datetime="{rfc3339(at)}">{time.strftime("%H:%M UTC" if near else "%Y-%m-%d %H:%M UTC", there)}</time>'
    )


def _when_at(at: str) -> str:
    """Return an RFC 3339 time of a record of the last day; nothing where there is none."""
    return f'<time datetime="{_text(at)}">{_text(at[11:16])}</time>' if at[11:16] else ""


def _day(at: float) -> str:
    return f'<time datetime="{rfc3339(at)}">{time.strftime("%Y-%m-%d", time.gmtime(at))}</time>' if at > 0 else ""


def _bounded(items: Iterable[str], most: int, what: str) -> str:
    """Return as many items as fit, and how many there are more; `what` they are."""
    kept, size, left = list[str](), 0, 0
    for item in items:
        size += len(item.encode())
        if size <= most:
            kept.append(item)
        else:
            left += 1
    return "".join(kept) + (f"<li>and {left} more {_code(what)}</li>" if left else "")
