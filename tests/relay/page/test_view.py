"""The page's HTML: bounded whatever the clusters are called, and nothing of theirs is markup."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from arcbridge.relay import page as package
from arcbridge.relay.page import facts as facts_module
from arcbridge.relay.page import view
from arcbridge.relay.page.changes import AuditedChange, ChangeList
from arcbridge.relay.page.facts import ClusterFact, Facts, RelayFact
from arcbridge.relay.page.lookups import RuleReach, UserReach
from arcbridge.relay.page.view import Found, Looked, live_parts, notice, page
from arcbridge.relay.page.words import DEGRADED, DOWN, NEVER, SERVING, Fault, Judgement

MOST = 60_000
"""Bytes of the whole page."""
NOW = 1_900_000_000.0
HOSTILE = "</td><script>alert(1)</script>\u202egnp\x00\x1b[31m'\"&" * 10


def cluster(name: str, state: str = SERVING, *faults: Fault, revoked: bool = False) -> ClusterFact:
    judged = Judgement(state, NOW - 60 if state == DOWN else 0.0, faults)
    return ClusterFact(name, judged, revoked, 1, 2, "1.0", NOW + 9e5,
                       0.012, 3)  # fmt: skip


def rendered(facts: Facts, text: str = "", found: Found | None = None, **looked: str) -> str:
    live = live_parts(facts, ["*"], ["*"], text=text)
    return page(facts, live, "relay.test:443", HOSTILE, Looked(text, **looked), found or Found())


def worst() -> Facts:
    """Ten thousand clusters, all of whose texts are as long and as hostile as they can be."""
    faults = tuple(Fault(HOSTILE * 10, HOSTILE * 10) for _ in range(3))
    record = AuditedChange("2030-01-01T00:00:00Z", HOSTILE, HOSTILE, ((HOSTILE, HOSTILE),) * 12, (), HOSTILE)
    names = (f"{number:05}-{'x' * 57}" for number in range(10_000))
    return Facts(
        NOW,
        tuple(cluster(name, DOWN, *faults) for name in names),
        tuple(RelayFact(HOSTILE, 3, 10_000, (HOSTILE,) * 9, HOSTILE, (HOSTILE,) * 3, NOW) for _ in range(500)),
        tuple({"state": "failed", "hop": HOSTILE, "detail": HOSTILE * 9, "remedy": HOSTILE, "workers": [*range(64)]}
              for _ in range(50)),
        ChangeList((record,) * 200, (record,) * 20, 10**9, HOSTILE),
        HOSTILE,
        HOSTILE,
    )  # fmt: skip


def reach() -> UserReach:
    refusal = {"at": NOW, "user": HOSTILE, "cluster": HOSTILE, "code": HOSTILE, "rule": HOSTILE, "reason": HOSTILE,
               "times": 10**9, "session": HOSTILE}  # fmt: skip
    return UserReach(
        HOSTILE, {"at": NOW, "groups": [HOSTILE] * 500, "more": 10**9},
        tuple(RuleReach(HOSTILE, HOSTILE, (HOSTILE,) * 50, 10**6) for _ in range(20)), False,
        tuple({"cluster": HOSTILE, "source": HOSTILE, "session": HOSTILE, "since": NOW} for _ in range(50)),
        (refusal,) * 20, True, {"before": NOW, "reason": HOSTILE},
    )  # fmt: skip


class Tags(HTMLParser):
    """The tags of a page, and whether each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.seen: set[str] = set()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name == "style"]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_k12_the_worst_page_is_small_and_has_no_tag_of_a_peers() -> None:
    """docs/threats.md#K12."""
    own = sum(len(files(package).joinpath(name).read_bytes()) for name in ("style.css", "script.js"))
    for text in (rendered(worst(), found=Found(reach=reach()), user=HOSTILE), rendered(worst(), "x", cluster=HOSTILE)):
        assert len(text.encode()) + own < MOST
        tags = Tags(text)
        assert tags.open == []
        assert len(tags.ids) == len(set(tags.ids))
        assert text.count("<script") == 1
        assert not re.search("[\x00-\x1f\u202e]", text)
        assert "9 9" not in text
        assert re.search(r"and 99\d\d more", text)


def test_the_worst_come_first_and_each_state_has_its_words() -> None:
    fault = Fault("it is broken", "mend it with `arcbridge doctor`")
    clusters = (cluster("d", DOWN, fault), cluster("g", DEGRADED, fault), cluster("n", NEVER), cluster("s"),
                cluster("r", DOWN, revoked=True))  # fmt: skip
    assert [one.name for one in sorted(reversed(clusters), key=lambda one: one.rank)] == ["d", "g", "n", "s", "r"]
    text = rendered(Facts(NOW, clusters))
    assert "3 of 5 clusters need you: 1 down, 1 degraded, 1 never seen, 1 serving, 1 revoked." in text
    assert "It is broken. <span class='fix'>Mend it with <code>arcbridge doctor</code>.</span>" in text
    assert 'down since <time datetime="2030-03-17T17:45:40Z">17:45 UTC</time>' in text
    for word in ("1 of 2", "12 ms", "1.0", "2030-03-28"):
        assert word in text
    assert '<th scope="row"><a id="c-d" href="/page?cluster=d">' in text
    assert "2 clusters: 2 serving." in rendered(Facts(NOW, (cluster("a"), cluster("b"))))
    assert "0 clusters: none." in rendered(Facts(NOW))


def test_a_relay_has_its_version_and_its_certificates_end() -> None:
    relays = (
        RelayFact("a:443", 2, 3, ("h",), "", ("1.0", "1.1"), NOW + 30 * 86400),
        RelayFact("b:443", 1, 0, ("h",), "k", ("1.1",), NOW + 86400),
        RelayFact("c:443", 1, 1, ("h",), ""),
    )
    text = re.sub(r"</?(?:b|time|span)[^>]*>", "", rendered(Facts(NOW, relays=relays)))
    assert "<li>a:443, 2 processes: version 1.0, 1.1, certificate until 2030-04-16, 3 agents, policy h</li>" in text
    assert "version 1.1, ! certificate until 2030-03-18, 0 agents, policy h ! version k is held back</li>" in text
    assert "<li>c:443: 1 agent, policy h</li>" in text, "one of an earlier version says neither"


def test_a_filter_and_what_is_old_or_missing() -> None:
    facts = Facts(
        NOW, (cluster("shop-1"), cluster("bank")), changes=None, failure="it does not answer", missing="2 are"
    )
    text = rendered(facts, "SHOP")
    assert ("shop-1" in text, ">bank<" in text, "1 of 2 have" in text) == (True, False, True)
    assert "it does not answer; what is below is of 17:46:40 UTC" in text
    assert ("2 are." in text, "audit log is no file" in text) == (True, True)
    # Rendered once for all who see the same.
    assert len(facts.made.views) == 1
    rendered(facts, "SHOP")
    assert len(facts.made.views) == 1
    for number in range(300):
        rendered(facts, str(number))
    assert len(facts.made.views) <= 101
    assert not replace(facts).made.views


async def test_k13_what_a_question_does_not_change_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/threats.md#K13: of one person's pages, each with a question of its own, each costs its table."""
    compared, made = list[str](), list[str]()
    covers, summary, changes = facts_module.covers, view._summary, view._changes
    monkeypatch.setattr(facts_module, "covers", lambda names, name: compared.append(name) or covers(names, name))
    monkeypatch.setattr(view, "_summary", lambda own: made.append("summary") or summary(own))
    monkeypatch.setattr(view, "_changes", lambda facts, own: made.append("changes") or changes(facts, own))
    facts = Facts(NOW, tuple(cluster(f"shop-{number}") for number in range(facts_module.TOGETHER + 1)))
    names = [f"shop-{number}*" for number in range(9)]
    turns, choosing = 0, asyncio.create_task(facts.choose(names))
    while not choosing.done():
        turns += 1
        await asyncio.sleep(0)
    assert turns > 2
    texts = {live_parts(facts, names, names, text=str(number)) for number in range(50)}
    assert (len(texts), len(compared), made) == (50, len(facts.clusters), ["summary", "changes"])
    assert await facts.choose(names) is facts.of(names)


def changed(*clusters: str, act: str = "cluster revoke") -> AuditedChange:
    return AuditedChange("2030-01-01T10:00:00Z", act, "root", (("cluster", ", ".join(clusters)),), clusters, "")


def test_k11_one_sees_of_changes_what_concerns_readable_clusters() -> None:
    """docs/threats.md#K11: another right to a cluster shows none of its acts."""
    facts = Facts(NOW, (cluster("a"), cluster("b")), changes=ChangeList((changed("a"), changed("b"))))
    for patterns, readable, seen in ((["a"], ["a"], (1, 0)), (["a", "b"], ["a"], (1, 0)), (["a", "b"], ["b"], (0, 1)),
                                     (["a", "b"], [], (0, 0)), (["*"], ["*"], (1, 1))):  # fmt: skip
        text = live_parts(facts, patterns, readable, text="")
        assert tuple(text.count(f"cluster <bdi>{name}</bdi>") for name in "ab") == seen
    # A record about both has the names of both.
    both = changed("a", "b", act="session end")
    facts = Facts(NOW, (cluster("a"), cluster("b")), changes=ChangeList((both, changed())))
    seen = [live_parts(facts, ["*"], readable, text="").count("<li>") for readable in (["a"], ["a", "b"], ["*"])]
    assert seen == [0, 1, 2]
    # A cluster that was deleted, and one that has not come yet.
    gone, coming = changed("shop-1", act="cluster delete"), changed("shop-2", act="token create")
    facts = Facts(NOW, (), changes=ChangeList((gone, coming)))
    text = live_parts(facts, ["shop-*"], ["shop-*"], text="")
    assert ("cluster delete" in text, "token create" in text) == (True, True)


def test_refusals_take_no_place_from_changes_and_what_is_cut_is_said() -> None:
    facts = Facts(NOW, (cluster("a"),), changes=ChangeList((changed("a"),), (changed("a", act="refused act"),) * 20, 3))
    text = live_parts(facts, ["*"], ["*"], text="")
    assert text.index("cluster revoke") < text.index("<h3>Refused</h3>") < text.index("refused act")
    assert "and 3 more records" in text
    # Of other clusters' refusals one is not told the number.
    text = live_parts(facts, ["b"], ["b"], text="")
    assert ("Nothing, by the audit log" in text, "and maybe more" in text, "refused act" in text) == (True, True, False)
    cut = replace(facts, changes=ChangeList((changed("a"),), cut="2030-01-01T09:07:00Z"))
    since = '<time datetime="2030-01-01T09:07:00Z">09:07</time>'
    assert f"That is all since {since}; older" in live_parts(cut, ["*"], ["*"], text="")
    assert f"Nothing since {since}, by" in live_parts(cut, ["b"], ["b"], text="")
    assert "Nothing, by the end" in live_parts(Facts(NOW, changes=ChangeList(cut="9999")), ["b"], ["b"], text="")


def test_of_a_reach_that_is_not_complete_nothing_is_denied() -> None:
    found = UserReach("ann", None, (), True, (), (), True, None)
    denied, more = "No rule lets this user reach", "There may be more"
    text = rendered(Facts(NOW), found=Found(reach=found), user="ann")
    assert (denied in text, more in text) == (True, False)
    text = rendered(Facts(NOW), found=Found(reach=replace(found, complete=False)), user="ann")
    assert (denied in text, "None found so far" in text, more in text) == (False, True, True)


def test_a_notice() -> None:
    text = notice("relay.test:443", HOSTILE, login="https://issuer.test")
    assert (Tags(text).open, "<script" in text) == ([], False)
    assert 'href="/page/login">Log in at https://issuer.test</a>' in text
