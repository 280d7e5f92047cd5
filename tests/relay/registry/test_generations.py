"""What a renewal is, judged by what the registry holds of the key: owners are served, copies are found out."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arcbridge.errors import EnrolmentRefused
from arcbridge.relay.registry.generations import (
    MOST_KEYS,
    OLDER_AGENT,
    RENEW_AGAIN,
    Keys,
    KeyState,
    ShownCertificate,
    check_generation,
    enrolled,
    from_json,
    renewed,
    to_json,
)

NOW = 1_800_000_000.0
KEY, OTHER = "a" * 64, "b" * 64
OWN, STOLEN = "1" * 64, "2" * 64


def shown(generation: int, issued_at: float = NOW - 1000) -> ShownCertificate:
    return ShownCertificate(KEY, generation, issued_at)


def at(generation: int, request: str = OWN, when: float = NOW, void: int = 0) -> Keys:
    return {KEY: KeyState(generation, request, when, void), OTHER: KeyState(1)}


class TestEnrolment:
    def test_a_new_key_begins(self) -> None:
        keys = enrolled({OTHER: KeyState(5)}, KEY, NOW, repeated=False)
        assert keys == {OTHER: KeyState(5), KEY: KeyState(1, "", NOW)}

    def test_a_repeated_redemption_changes_nothing(self) -> None:
        """Several pods have answers to it; whichever certificate they keep, it is of the same generation."""
        keys = enrolled({}, KEY, NOW, repeated=False)
        assert enrolled(keys, KEY, NOW + 60, repeated=True) == keys

    def test_a_redemption_of_before_generations_were_counted(self) -> None:
        assert enrolled({}, KEY, NOW, repeated=True)[KEY].generation == 1

    @pytest.mark.parametrize("void", [0, 4])
    def test_the_same_key_comes_back(self, void: int) -> None:
        keys = enrolled(at(4, void=void), KEY, NOW, repeated=False)
        assert keys[KEY] == KeyState(5, "", NOW, void)
        check_generation(keys, KEY, 5)


class TestRenewal:
    def test_the_next_generation(self) -> None:
        renewal = renewed(at(4), shown(4), STOLEN, NOW + 5)
        assert renewal.generation == 5
        assert renewal.keys == {KEY: KeyState(5, STOLEN, NOW + 5, 0), OTHER: KeyState(1)}

    def test_the_same_request_again_at_any_time(self) -> None:
        """Its answer was lost, for as long as the former certificate is valid; or another pod was as fast."""
        renewal = renewed(at(5), shown(4), OWN, NOW + 1e6)
        assert renewal == (at(5), 5)

    @pytest.mark.parametrize(
        ("generation", "request_hash"), [(4, STOLEN), (4, OLDER_AGENT), (3, OWN), (3, STOLEN), (1, OWN), (0, OWN)]
    )
    def test_a_second_renewal_of_a_generation_makes_both_void(self, generation: int, request_hash: str) -> None:
        renewal = renewed(at(5), shown(generation), request_hash, NOW + 1)
        assert renewal.generation == 0
        assert renewal.keys == at(5, void=5)
        for void in range(6):
            with pytest.raises(EnrolmentRefused, match="void"):
                check_generation(renewal.keys, KEY, void)
            with pytest.raises(EnrolmentRefused, match="void"):
                renewed(renewal.keys, shown(void), OWN, NOW + 2)
        check_generation(renewal.keys, OTHER, 1)

    def test_one_that_enrolled_again_has_no_older_certificate(self) -> None:
        assert renewed(at(5, request=""), shown(4), OWN, NOW + 1).generation == 0

    def test_the_registry_does_not_know_the_key(self) -> None:
        """Adopted from another relay, or enrolled before generations were counted."""
        for generation in (0, 7):
            renewal = renewed({}, shown(generation), OWN, NOW)
            assert renewal == ({KEY: KeyState(generation + 1, OWN, NOW)}, generation + 1)
            assert renewed(renewal.keys, shown(generation), OWN, NOW).generation == generation + 1
            assert renewed(renewal.keys, shown(generation), STOLEN, NOW).generation == 0

    def test_the_registry_is_behind(self) -> None:
        """It is a backup, or the relay has a registry of its own and another one renewed meanwhile."""
        renewal = renewed(at(3), shown(6), STOLEN, NOW)
        assert (renewal.generation, renewal.keys[KEY].generation) == (7, 7)
        behind = renewed(at(3, void=2), shown(6), STOLEN, NOW)
        assert behind.keys[KEY].void == 2

    def test_older_agents_may_repeat_themselves_for_ten_minutes(self) -> None:
        keys = renewed(at(4), shown(4), OLDER_AGENT, NOW).keys
        for request_hash in (OLDER_AGENT, OWN):
            assert renewed(keys, shown(4), request_hash, NOW + RENEW_AGAIN) == (keys, 5)
            assert renewed(keys, shown(4), request_hash, NOW + RENEW_AGAIN + 1).generation == 0
        assert renewed(keys, shown(3), OLDER_AGENT, NOW).generation == 0, "an older generation is none of theirs"

    def test_a_relay_of_the_fleet_that_does_not_count_yet(self) -> None:
        """It has issued a certificate that states no generation since; one from before is an old one."""
        assert renewed(at(5), shown(0, issued_at=NOW + 60), OWN, NOW + 90).generation == 6
        assert renewed(at(5), shown(0, issued_at=NOW - 60), OWN, NOW + 90).generation == 0


def test_the_number_of_keys_is_bounded() -> None:
    keys: Keys = {"void": KeyState(3, "", 0.0, 3)}
    for number in range(MOST_KEYS + 50):
        keys = enrolled(keys, f"{number:064x}", NOW + number, repeated=False)
    assert len(keys) == MOST_KEYS
    assert "void" in keys, "what refuses a certificate is kept before what does not"
    assert f"{MOST_KEYS + 49:064x}" in keys
    assert f"{0:064x}" not in keys


def test_what_is_stored_comes_back() -> None:
    keys = at(5, void=2)
    assert from_json(json.loads(json.dumps(to_json(keys)))) == keys


@given(
    st.lists(
        st.tuples(st.sampled_from(["owner", "pod", "lost answer", "thief"]), st.floats(0, 1e5)), min_size=1, max_size=30
    )
)
def test_owners_alone_are_never_found_guilty_and_a_thief_always(acts: list[tuple[str, float]]) -> None:
    """One credential with stored requests, and at some moment a copy of it as it was then."""
    keys, now = enrolled({}, KEY, NOW, repeated=False), NOW
    held, copied = 1, 0
    """Generations of the certificates that the owner and the thief hold."""
    for number, (act, seconds) in enumerate(acts):
        now += seconds
        request = f"{number:064x}"
        if act == "thief" and not copied:
            copied = held  # nothing is done with it yet
            continue
        mine, other = (copied, held) if act == "thief" else (held, copied)
        guilty = other > mine  # the other one has renewed what both had
        renewal = renewed(keys, shown(mine), request, now)
        keys = renewal.keys
        assert (renewal.generation == 0) == guilty
        if guilty:
            for generation in range(keys[KEY].generation + 1):
                with pytest.raises(EnrolmentRefused):
                    check_generation(keys, KEY, generation)
            return
        assert renewal.generation == mine + 1
        if act in ("pod", "lost answer"):
            assert renewed(keys, shown(mine), request, now + 5) == renewal
        if act == "thief":
            copied = renewal.generation
        else:
            held = renewal.generation
