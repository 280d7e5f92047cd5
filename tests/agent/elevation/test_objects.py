"""Rules and requests, read as the API server sends them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from arcbridge.agent.elevation.objects import MOST_GROUPS, read_request, read_rule

from .documents import CREATED, request, request_document, rule, rule_document


def test_what_is_read() -> None:
    found = rule(count=2, users=("carol",))
    assert (found.groups, found.most_seconds, found.approvals) == ({"operators"}, 3600, 2)
    assert (found.user_groups, found.users, found.approver_groups) == ({"dev"}, {"carol"}, {"leads"})
    assert rule(approvers=()).approvals == 0
    asked = request(begins=CREATED + 60)
    assert (asked.begins, asked.until, asked.created) == (CREATED + 60, CREATED + 1860, CREATED)
    assert asked.text == "alice-1 rule=incident groups=operators approved-by=bob reason=INC-42 it burns"
    assert request(approved=()).text == "alice-1 rule=incident groups=operators reason=INC-42 it burns"
    assert (request(denied={"user": "bob"}).denied, request(withdrawn={"user": "bob"}).withdrawn) == (True, True)


def test_an_end_behind_the_asked_seconds_is_cut() -> None:
    document = request_document(begins=CREATED)
    document["status"]["until"] = "2099-01-01T00:00:00Z"
    assert read_request(document).until == CREATED + 1800


def test_of_a_user_one_approval_is_read_and_of_many_the_first() -> None:
    many = [(f"user-{n % 40}", "leads") for n in range(400)]
    assert len(request(approved=many).approvals) == MOST_GROUPS
    assert request(approved=[("bob", "leads"), ("bob", "others")]).approvals == (("bob", "leads"),)


def test_a_reason_is_one_clean_line_that_is_bounded() -> None:
    asked = request(reason="a\r\nImpersonate-Group: system:masters\x00" + "ä" * 5000)
    assert len(asked.text.encode()) < 800
    assert asked.text.isprintable()
    assert "eyJ" not in request(reason="token eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl").text


WRONG: list[tuple[str, str, Any]] = [
    ("spec", "user", None), ("spec", "user", 7), ("spec", "seconds", "1800"), ("spec", "seconds", True),
    ("spec", "seconds", 0), ("spec", "groups", "operators"), ("spec", "groups", [1]), ("spec", "groups", [""]),
    ("metadata", "uid", None), ("metadata", "creationTimestamp", "yesterday"),
    ("metadata", "creationTimestamp", "2026-11-29T12:00:00"), ("status", "approvals", {}),
    ("status", "approvals", "bob"), ("status", "until", "soon"), ("status", "from", 12),
]  # fmt: skip


@pytest.mark.parametrize(("part", "field", "value"), WRONG)
def test_what_was_written_past_the_schema_is_refused(part: str, field: str, value: Any) -> None:
    document = copy.deepcopy(request_document(begins=CREATED))
    document[part][field] = value
    with pytest.raises(ValueError, match=field):
        read_request(document)
    with pytest.raises(ValueError, match="is missing"):
        read_request({**document, "spec": None})


@pytest.mark.parametrize("lacking", ["groups", "maxSeconds", "requesters"])
def test_a_rule_is_whole(lacking: str) -> None:
    document = rule_document()
    del document["spec"][lacking]
    if lacking == "groups":
        assert read_rule(document).groups == frozenset(), "it lends nothing"
    else:
        with pytest.raises(ValueError, match=lacking):
            read_rule(document)
