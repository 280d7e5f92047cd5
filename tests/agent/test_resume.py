"""Who may resume a session, and what every other caller is told (docs/threats.md#S3, docs/threats.md#S5,
docs/threats.md#S6).
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from arcbridge.agent.resume import ENDED_MEMORY, GONE, MAX_ENDED, MAX_SUBJECTS, TRIES, Claim, ResumeRefusal, Resumes
from arcbridge.errors import ConnectionLost, SessionEnded
from arcbridge.wire.frames import GoawayCode
from arcbridge.wire.records import Hello

ID, SECRET = b"i" * 16, b"s" * 16


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Session:
    epoch: int = 1
    closed: bool = False


def hello(*, session_id: bytes = ID, secret: bytes = SECRET, epoch: int = 2) -> Hello:
    return Hello(session_id=session_id, resume_secret=secret, epoch=epoch)


def held(clock: Clock | None = None) -> tuple[Resumes[Session], Session]:
    resumes: Resumes[Session] = Resumes(clock=clock or Clock())
    session = Session()
    resumes.add(ID, Claim(SECRET, "alice", False), session)
    return resumes, session


def test_the_owner_gets_it() -> None:
    resumes, session = held()
    assert resumes.judge(hello(), "alice", False) is session
    assert resumes.judge(hello(epoch=2**40), "alice", False) is session
    assert sum(resumes.refused.values()) == 0


STRANGERS = [
    ("unknown", hello(session_id=b"x" * 16), "alice", False),
    ("unknown", hello(session_id=b""), "alice", False),
    ("secret", hello(secret=b"x" * 16), "alice", False),
    ("secret", hello(secret=b""), "alice", False),
    ("secret", hello(secret=b"x" * 16), "mallory", False),
    ("subject", hello(), "mallory", False),
    ("subject", hello(), "alice\udc80", False),
    ("subject", hello(), "alice", True),
]


@pytest.mark.parametrize(("reason", "asked", "subject", "token_mode"), STRANGERS)
def test_every_other_caller_hears_one_answer(reason: str, asked: Hello, subject: str, token_mode: bool) -> None:
    resumes, session = held()
    assert resumes.judge(asked, subject, token_mode) == ResumeRefusal(reason, GoawayCode.GONE, GONE)
    assert resumes.refused[reason] == 1
    assert resumes.judge(hello(), "alice", False) is session


@pytest.mark.parametrize("epoch", [0, 1])
def test_s3_only_a_higher_epoch_attaches(epoch: int) -> None:
    resumes, _ = held()
    refusal = resumes.judge(hello(epoch=epoch), "alice", False)
    assert isinstance(refusal, ResumeRefusal)
    assert (refusal.check, refusal.code) == ("epoch", GoawayCode.REPLACED)


def test_an_epoch_is_told_to_the_owner_alone() -> None:
    resumes, _ = held()
    refusal = resumes.judge(hello(epoch=0), "mallory", False)
    assert isinstance(refusal, ResumeRefusal)
    assert refusal.code == GoawayCode.GONE


def test_s5_guessing_is_limited_for_the_subject_and_the_owner_gets_in() -> None:
    clock = Clock()
    resumes, session = held(clock)
    for _ in range(500):
        refusal = resumes.judge(hello(secret=b"x" * 16), "mallory", False)
        assert isinstance(refusal, ResumeRefusal)
        assert (refusal.code, refusal.message) == (GoawayCode.GONE, GONE)
    assert resumes.refused["secret"] == TRIES + 1
    assert resumes.refused["limit"] == 500 - TRIES - 1
    assert refusal.quiet
    assert resumes.judge(hello(), "alice", False) is session
    clock.now += 60.0
    resumes.judge(hello(secret=b"x" * 16), "mallory", False)
    assert resumes.refused["secret"] == TRIES + 2


def test_a_user_who_failed_often_still_gets_his_own() -> None:
    resumes, session = held()
    for number in range(100):
        resumes.judge(hello(session_id=bytes([number]) * 16), "alice", False)
    assert resumes.refused["limit"] > 0
    assert resumes.judge(hello(), "alice", False) is session


ENDS = [
    (GoawayCode.EXPIRED, GoawayCode.EXPIRED),
    (GoawayCode.REVOKED, GoawayCode.REVOKED),
    (GoawayCode.FORBIDDEN, GoawayCode.FORBIDDEN),
    (GoawayCode.DRAINING, GoawayCode.GONE),
    (GoawayCode.GONE, GoawayCode.GONE),
    (GoawayCode.LIMIT, GoawayCode.GONE),
]


@pytest.mark.parametrize(("code", "told"), ENDS)
def test_the_owner_hears_why_it_ended(code: GoawayCode, told: GoawayCode) -> None:
    clock = Clock()
    resumes, _ = held(clock)
    resumes.remove(ID, SessionEnded(code, "the very reason"))
    assert len(resumes) == 0
    assert resumes.judge(hello(), "alice", False) == ResumeRefusal("ended", told, "the very reason")
    for other in (resumes.judge(hello(), "mallory", False), resumes.judge(hello(secret=b"x" * 16), "alice", False)):
        assert isinstance(other, ResumeRefusal)
        assert (other.code, other.message) == (GoawayCode.GONE, GONE)
    clock.now += ENDED_MEMORY
    assert resumes.judge(hello(), "alice", False) == ResumeRefusal("unknown", GoawayCode.GONE, GONE)


@pytest.mark.parametrize("error", [ConnectionLost("cut"), SessionEnded(GoawayCode.DONE, "closed")])
def test_ends_without_a_reason_that_helps_are_not_kept(error: Exception) -> None:
    resumes, _ = held()
    resumes.remove(ID, error)
    assert resumes.judge(hello(), "alice", False) == ResumeRefusal("unknown", GoawayCode.GONE, GONE)


def test_one_that_has_closed_and_is_not_removed_yet() -> None:
    resumes, session = held()
    session.closed = True
    assert resumes.judge(hello(), "alice", False) == ResumeRefusal("ended", GoawayCode.GONE, GONE)


def test_what_is_remembered_is_bounded() -> None:
    resumes, _ = held()
    for number in range(MAX_ENDED + 50):
        name = number.to_bytes(16, "big")
        resumes.add(name, Claim(SECRET, "alice", False), Session())
        resumes.remove(name, SessionEnded(GoawayCode.EXPIRED, "expired"))
    assert len(resumes._ended) == MAX_ENDED
    for number in range(MAX_SUBJECTS + 50):
        resumes.judge(hello(), f"mallory-{number}", False)
    assert len(resumes._failures) == MAX_SUBJECTS


def test_a_claim_shows_no_secret() -> None:
    assert "s" * 4 not in repr(Claim(SECRET, "alice", False))
