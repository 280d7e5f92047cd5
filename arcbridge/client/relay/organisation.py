"""Tells the relays of one organisation from those of any other, for what must not be mixed up between them.

Tokens and local certificates are kept under what this returns. It asks no relay. Invariant: two relays share it only
where one CA vouches for both, or where the user logged in at both as one.
"""

from __future__ import annotations

from contextlib import suppress

from arcbridge.client.relay.relay_profile import RelayProfiles
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ConfigError
from arcbridge.net.address import parse_address
from arcbridge.pki.pins import check_pin, pin_of
from arcbridge.settings.config import ClientConfig


def organisation(config: ClientConfig, state: StateDirectory) -> str:
    """Return the pin of the relays' CA, else the URL of the first one.

    Raises ConfigError where no relay is set; StateError where what is kept of it is damaged.
    """
    if config.relay_ca_pin:
        return check_pin(config.relay_ca_pin)
    urls = config.relay_urls()
    if not urls:
        raise ConfigError(
            "relays: required, because a login is for one organisation's relays; run `arcbridge login https://RELAY`, "
            "or give --relay https://host:port"
        )
    if config.relay_ca_file is not None:
        # A file of several CAs has no pin; one that cannot be read is reported when the relay is dialled.
        with suppress(ConfigError, OSError, UnicodeDecodeError):
            return pin_of(config.relay_ca_file.read_text("ascii"))
    address = parse_address(urls[0])
    profile = RelayProfiles(state.path).get(address)
    return (address if profile is None else profile.address).url
