"""Which relays belong to one organisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arcbridge.client.relay.organisation import organisation
from arcbridge.client.relay.relay_profile import LoginOffer, RelayProfile, RelayProfiles
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ConfigError
from arcbridge.settings.config import ClientConfig, LoginConfig
from tests.client.far_side import OTHER_CA, RELAY_CA


def test_b42_which_relays_are_one_organisation(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "state", tmp_path / "cache")

    def of(**relay: Any) -> str:
        return organisation(ClientConfig(**relay), state)

    ca, both = tmp_path / "ca.pem", tmp_path / "both.pem"
    ca.write_text(RELAY_CA.certificate_pem)
    both.write_text(RELAY_CA.certificate_pem + OTHER_CA.certificate_pem)
    a, b = "https://a.example", "https://b.example"
    assert of(relays=(a,)) != of(relays=(b,))
    assert of(relays=(a, b)) == of(relay=a)
    # The pin names the organisation, however it was given and whichever relay of it is asked.
    pinned = of(relays=(a,), relay_ca_pin=RELAY_CA.pin)
    assert pinned == of(relays=(b,), relay_ca_pin=RELAY_CA.pin.upper().replace("SHA", "sha"))
    assert pinned == of(relays=(a,), relay_ca_file=ca)
    assert pinned not in (of(relays=(a,)), of(relays=(a,), relay_ca_pin=OTHER_CA.pin))
    assert of(relays=(a,), relay_ca_file=both) == of(relays=(a,))
    # So does the profile of relays with a certificate of a public CA.
    offer = LoginOffer.of(LoginConfig(issuer="https://i.example", client_id="c"))
    RelayProfiles(state.path).save(RelayProfile((f"{a}:443", f"{b}:443"), offer))
    assert of(relays=(b,)) == of(relays=(a,))
    with pytest.raises(ConfigError, match="relays: required, because a login is for one organisation's relays"):
        of()
