"""The steps of a rotation, and what is kept between them."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from arcbridge.errors import StateError
from arcbridge.pki.authority import Authority
from arcbridge.pki.rotation import Rotation, RotationStatus

NOW = time.time()
OWN, HOSTILE = Authority.create("test CA"), Authority.create("test CA")
FIRST = Rotation(OWN.certificate_pem, OWN.key_pem)
ANNOUNCED = FIRST.take("next", NOW)
ACTIVE = ANNOUNCED.take("activate", NOW)
RETIRED = ACTIVE.take("retire", NOW)


def test_a_step_that_does_not_come_now_changes_nothing() -> None:
    for state, right in ((FIRST, "next"), (ANNOUNCED, "activate"), (ACTIVE, "retire"), (RETIRED, "next")):
        for step in {"next", "activate", "retire"} - {right}:
            with pytest.raises(StateError, match=f"the next step is 'ca {right}'"):
                state.take(step, NOW)


def test_the_former_key_is_kept_nowhere() -> None:
    for state in (ACTIVE, RETIRED):
        assert FIRST.key not in state.encode().decode().replace("\\n", "\n")
        assert "BEGIN" not in repr(state)


def test_a_document_is_read_again_and_one_of_another_ca_is_not() -> None:
    assert Rotation.decode(ACTIVE.encode(), ACTIVE.certificate) == ACTIVE
    assert Rotation.decode(ACTIVE.encode(), FIRST.certificate) == ACTIVE  # the two files are written last
    with pytest.raises(StateError, match="where the CA was replaced, remove the rotation"):
        Rotation.decode(ACTIVE.encode(), HOSTILE.certificate_pem)
    strange = replace(ACTIVE, began="x"), replace(ACTIVE, former_secret="x"), replace(ACTIVE, key=FIRST.key)
    for data in (
        b"{}",
        *(one.encode() for one in strange),
        replace(ANNOUNCED, certificate=ACTIVE.certificate).encode(),
    ):
        with pytest.raises(StateError, match=r"damaged|belong together"):
            Rotation.decode(data, FIRST.certificate)
    with pytest.raises(StateError, match="damaged"):
        Rotation.decode(ACTIVE.encode(), "none")


def test_a_refused_step_names_who_has_not_followed() -> None:
    status = RotationStatus(ANNOUNCED, "0 of 30 clusters", tuple(f"cluster c{n} is not connected" for n in range(30)))
    with pytest.raises(StateError, match=r"cluster c0 is not connected; .* and 10 more"):
        status.require("activate")
    assert [row["ca"] for row in status.rows] == ["present", "next"]
    assert [row["ca"] for row in RotationStatus(ACTIVE, "", ()).rows] == ["former", "present"]
