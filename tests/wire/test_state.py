from __future__ import annotations

from arcbridge.wire.state import Kind, Side, State, Stats


def test_a_sides_value_is_the_parity_of_its_streams() -> None:
    assert (Side.INITIATOR.value, Side.ACCEPTOR.value) == (1, 0)


def test_the_words_are_those_of_the_table() -> None:
    assert [state.value for state in State] == ["hello", "auth", "open", "draining", "detached", "closed"]
    assert {kind.value for kind in Kind} == {"session", "control"}


def test_counters_start_at_zero_and_are_all_declared() -> None:
    stats = Stats()
    assert {name: getattr(stats, name) for name in Stats.__slots__} == dict.fromkeys(Stats.__annotations__, 0)
    stats.bytes_sent += 5
    assert (stats.bytes_sent, Stats().bytes_sent) == (5, 0)
