"""Shows the pins of clusters that are known here, and lets another one take the place of one.

What an organisation ships (`pins_file`) is shown and never changed. Invariant: a pin counts until one that the user has
given or agreed to takes its place, in one write.
"""

from __future__ import annotations

from arcbridge.client.background.connecting import trust
from arcbridge.client.service import ClientContext
from arcbridge.client.session.trust import ClusterTrust
from arcbridge.errors import ConfigError, PinMismatch
from arcbridge.pki.pins import PinStore, check_pin


def known_pins(context: ClientContext, cluster: str) -> list[dict[str, str]]:
    """Return the pins of `cluster`, or of all where that is empty: name, relay, pin, the pin of the newest CA that
    followed (empty: none has), and the file that has it."""
    known = context.state.successions.known
    files = filter(None, (context.config.pins_file, context.state.pins_file))
    return [
        {
            "name": name,
            "relay": relay or "any",
            "pin": pin,
            "followed_by": newest if newest != pin else "",
            "file": str(file),
        }
        for file in files
        for relay, name, pin in PinStore(file).entries()
        for newest in [known(pin).pins[-1]]
        if cluster in ("", name)
    ]


async def renew(context: ClientContext, cluster: str) -> str:
    """Trust another pin than before, and return it: the given one, else the one that the cluster shows, if the user
    agrees. Raises ConfigError, PinMismatch and what a session raises."""
    config, relay = context.config, context.relays.names[0]
    shipped = config.pins_file
    if shipped is not None and any(PinStore(shipped, relay=one).get(cluster) for one in context.relays.names):
        raise ConfigError(f"{shipped} has the pin of cluster {cluster!r}, and is your organisation's: change it there")
    given = check_pin(config.cluster_ca_pin) if config.cluster_ca_pin else ""
    if not given and not config.trust_first_use and context.terminal.ask_trust is None:
        raise PinMismatch(
            f"no user is there to compare the new pin of cluster {cluster!r}; give it with --cluster-ca-pin, or accept "
            "it unseen with --trust-first-use"
        )
    store = PinStore(context.state.pins_file, relay=relay)
    rule = ClusterTrust(
        pin=given,
        first_use=config.trust_first_use,
        ask=context.terminal.ask_trust,
        successions=context.state.successions,
    )
    try:
        if not given:
            await trust(context, cluster, rule)
    finally:  # what the user has agreed to counts even where there is no session then
        if pin := rule.known(cluster):
            # Another next CA of the same CA may have been followed, which the user does not mean.
            context.state.successions.forget(pin)
            store.replace(cluster, pin, context.relays.names)
    return pin
