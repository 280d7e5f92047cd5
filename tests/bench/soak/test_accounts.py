"""The joining of both ends' rows, with rows written by hand: every way in which they can disagree."""

from __future__ import annotations

from typing import Any

import pytest

from bench.soak.accounts import NO_REASON, Kill, settle, stalls

CUT = "cut: Connection reset by peer"


def half(end: str = "clean", size: int = 100, **more: Any) -> dict[str, Any]:
    return {"bytes": size, "records": 3, "sha256": f"of {size}", "end": end, **more}


def row(stream: int = 1, client: int | None = 0, **more: Any) -> dict[str, Any]:
    plain = {
        "stream": stream,
        "kind": "chatty",
        "first_record_s": 0.1,
        "sent": half(),
        "received": half(),
        "stalls": {},
    }
    return plain | ({} if client is None else {"client": client}) | more


def far(stream: int = 1, **more: Any) -> dict[str, Any]:
    return row(stream, None, **more)


def test_what_agrees_is_complete() -> None:
    accounts = settle([row(1), row(2)], [far(2), far(1)], 2)
    assert (accounts.opened, accounts.completed, accounts.failed) == (2, 2, 0)
    assert (accounts.bytes_up, accounts.bytes_down, accounts.records) == (200, 200, 12)
    assert accounts.sound
    assert not accounts.reasons


@pytest.mark.parametrize(
    ("near", "other", "expected", "reason"),
    [
        (row(received=half(size=90)), far(), (10, 0, 0), "other bytes than were sent"),
        (row(), far(received=half(size=0)), (100, 0, 0), "other bytes than were sent"),
        (row(), far(received=half(size=107)), (0, 7, 0), "other bytes than were sent"),
        (row(), far(received=half(sha256="of others")), (0, 0, 1), "not the same bytes"),
        (row(received=half("lost", 50, mismatch="lost", count=0)), far(), (50, 0, 0), "other bytes than were sent"),
        (row(received=half("lost", mismatch="lost", count=0)), far(), (0, 0, 0), "without a trailer"),
        (row(received=half("lost", 50, mismatch="lost", count=9)), far(), (9, 0, 0), "bytes lost"),
        (row(received=half("doubled", 50, mismatch="doubled", count=9)), far(), (0, 9, 0), "bytes doubled"),
        (row(), far(received=half("wrong", 50, mismatch="wrong", count=1)), (0, 0, 1), "bytes wrong"),
        (row(received=half("hung: nothing came"), sent=half("hung")), far(), (0, 0, 0), "hung"),
        (row(), far(received=half(CUT), sent=half(CUT)), (0, 0, 0), "at the target alone: cut"),
    ],
)
def test_what_disagrees_is_not_explained_by_anything(
    near: dict[str, Any], other: dict[str, Any], expected: tuple[int, int, int], reason: str
) -> None:
    accounts = settle([near, row(2)], [other, far(2)], 2, {0: ["the session ended"]})
    assert (accounts.bytes_lost, accounts.bytes_doubled, accounts.bytes_wrong) == expected
    assert (accounts.opened, accounts.completed, accounts.failed, accounts.unexplained) == (2, 1, 1, 1)
    assert not accounts.sound
    (told,) = accounts.reasons
    assert reason in told


def test_a_stream_that_the_target_never_saw() -> None:
    accounts = settle([row()], [], 1)
    assert (accounts.bytes_lost, accounts.failed, accounts.unexplained) == (100, 1, 1)
    broken = row(2, sent=half(CUT), received=half(CUT))
    accounts = settle([row(1), broken], [far(1), {"nameless": "0 bytes read", "bytes": 0}], 2)
    assert (accounts.bytes_lost, accounts.failed, accounts.unexplained) == (0, 1, 0), "its first bytes were on the way"


def test_a_stream_that_was_not_opened_or_that_came_twice() -> None:
    accounts = settle([row(1)], [far(1), far(1), far(3)], 1)
    assert (accounts.completed, accounts.bytes_doubled, accounts.unexplained) == (1, 200, 2)
    wrong = {"nameless": "no preamble", "bytes": 7, "mismatch": "wrong", "count": 1}
    accounts = settle([row(1)], [far(1), wrong], 1)
    assert (accounts.completed, accounts.bytes_wrong, accounts.sound) == (1, 1, False)


def test_a_cut_is_explained_by_what_its_client_said() -> None:
    cut = [row(n, client=n % 2, sent=half(CUT), received=half(CUT)) for n in range(1, 5)]
    refused = {"stream": 6, "client": 0, "refused": "Connection refused"}
    rows = [*cut, row(5), refused]
    accounts = settle(rows, [far(5)], 6, {0: ["expired", "no agent", "expired"], 1: ["gone"]})
    assert (accounts.completed, accounts.failed, accounts.unexplained) == (1, 5, 1)
    assert accounts.reasons == {
        f"{CUT} (expired)": 1,
        f"{CUT} (no agent)": 1,
        f"{CUT} (gone)": 1,
        f"{CUT} ({NO_REASON})": 1,
        "refused: Connection refused (expired)": 1,
    }
    assert settle(rows, [far(5)], 6).unexplained == 0, "no log to ask"


def test_stalls_are_of_streams_whose_session_was_hit() -> None:
    near = [
        row(1, client=0, stalls={"0": 0.5, "1": 9.0}),
        row(2, client=1, stalls={"0": 7.0}),
        row(3, client=0, stalls={"1": 0.2}),
        {"stream": 4, "client": 0, "refused": "no"},
    ]
    other = [far(1, stalls={"0": 0.75}), far(3, stalls={"1": 0.1}), {"nameless": "x", "bytes": 0}]
    kills = [Kill(0, 0, 1.0, frozenset({0})), Kill(1, 1, 2.0, frozenset({0, 1})), Kill(2, 0, 3.0, frozenset({0}))]
    assert stalls(near, other, kills) == {0: [0.75], 1: [0.2, 9.0], 2: []}
