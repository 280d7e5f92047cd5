"""`login` and `logout`: whom the user trusts, the tokens of the login, and their end at the issuer.

At the first contact with a relay the user is asked once, for its CA and for the issuer that it names; the answer is
kept (`client.relay.relay_profile`) before the login begins, so that a login that fails asks nothing again.
`client.credentials.login` does the login itself.
"""

from __future__ import annotations

import shutil
import textwrap
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import structlog

from arcbridge.client.commands.first_contact import Contact, ask_known, ask_relay, check_known
from arcbridge.client.credentials.audience_parameters import overlap
from arcbridge.client.credentials.client_authentication import ClientAuthentication
from arcbridge.client.credentials.identity_summary import cache_of, user_name
from arcbridge.client.credentials.issuer import Issuer, IssuerError
from arcbridge.client.credentials.jwt_unverified import claims_unverified
from arcbridge.client.credentials.login_question import Line, flags, layout, login_lines, quoted, shown
from arcbridge.client.credentials.token_cache import TokenSet
from arcbridge.client.relay.relay_access import RelayAccess
from arcbridge.client.relay.relay_profile import (
    LoginOffer,
    RelayProfile,
    RelayProfiles,
    apply,
    check_readable,
    fill,
    has_login,
    later_own,
    own_settings,
    short_url,
    without_issuer,
)
from arcbridge.client.relay.relays import concerns_all
from arcbridge.client.service import ClientContext, Terminal
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ArcbridgeError, ConfigError, ConnectionLost, PinMismatch, Unauthenticated, Unreachable
from arcbridge.net.address import parse_address
from arcbridge.net.system_trust import read_cas
from arcbridge.pki.pins import check_pin, pin_of
from arcbridge.pki.succession import Succession
from arcbridge.settings.choices import PROGRAM
from arcbridge.settings.config import ClientConfig, LoginConfig
from arcbridge.tasks import within

if TYPE_CHECKING:
    from arcbridge.client.credentials.login import Login


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """The outcome of `log_in`."""

    user: str
    until: float
    """Unix seconds; 0: not known."""
    relay: str
    """URL of the relay that the login is for; empty: the settings name none."""
    already: bool
    """Whether there was a login, and none was begun."""


Ask = Callable[[str], Awaitable[bool]]
"""Asks the user a question; returns whether the answer was yes."""
Say = Callable[[str], None]
_NEED_NEW_LOGIN = {"dpop", "proof_key_file", "require_bound"}
"""Settings that the tokens of an earlier login do not meet."""
COLUMNS = 80
"""Width of the question, which fits every terminal."""
_PUBLIC_CA = "a public one, which this system trusts"

log = structlog.get_logger("arcbridge.client")


async def trusted(
    config: ClientConfig,
    profiles: RelayProfiles,
    relays: tuple[str, ...],
    *,
    ask: Ask | None,
    say: Say,
    renew: bool = False,
    named: Collection[str] = (),
) -> RelayProfile | None:
    """Find the profile to log in with, and keep it; None where the settings alone say where to log in and no relay was
    named.

    `relays`: the URLs that `login` was given. `ask`: None where there is no terminal. `renew`: ask again, whatever was
    trusted. `named`: settings of the login that are given even where they have their defaults, by their names in
    `LoginConfig`; what was kept of them before counts no more. Raises PinMismatch where the user says no, or the relay
    is not the one that was trusted; ConfigError where nothing says how to log in; Unreachable.
    """
    if has_login(config.login) and not config.login.issuer:
        raise ConfigError(
            "login: these settings have tokens of their own (files, a command or a workload), so there is nothing to "
            "log in at; take them out, or leave `login` out"
        )
    if not relays and config.login.issuer:
        return None
    relays = relays or config.relay_urls()
    if not relays:
        known = profiles.all()
        if not known:
            raise ConfigError("no relay is known here: run `arcbridge login https://RELAY`, as its operator names it")
        relays = known[0].relays
    contact = _ContactWithRelay(config, profiles, relays, ask, say, named)
    profile = profiles.get(parse_address(relays[0]))
    if profile is None or renew:
        return await contact.first(profile)
    return await contact.later(profile)


@dataclass(frozen=True, slots=True)
class _ContactWithRelay:
    """One login at a relay: what is given with it, what is kept here, and whom to ask."""

    config: ClientConfig
    profiles: RelayProfiles
    relays: tuple[str, ...]
    ask: Ask | None
    say: Say
    named: Collection[str]

    async def later(self, profile: RelayProfile) -> RelayProfile:
        """Hold what the relay says against what was trusted, and keep what the user gives with this login.

        Where the user takes back what went before the relay's word, that word is agreed to as at the first contact.
        """
        config, login, former, cas = self.config, self.config.login, profile, None
        for flag, pin in _given_pins(config):
            if profile.ca_pin and pin not in self.profiles.successions.known(profile.ca_pin).pins:
                raise PinMismatch(
                    f"flag {flag}: {pin} is not the pin that was trusted for {profile.url} ({profile.ca_pin}); run "
                    f"`arcbridge login --renew-trust {profile.url}` with it when the new one is right"
                )
        newly_pinned = not profile.ca_pin and bool(config.relay_ca_pin or config.relay_ca_file)
        try:
            if newly_pinned:
                # Until now the system's CAs vouched for it. What cannot be checked is not kept: no answer is an error.
                contact = await _any_contact(config, profile.relays, given=True)
                profile = replace(profile, ca_pin=contact.ca_pin)
            else:
                contact = await ask_known(profile, self.profiles.successions)
        except (Unreachable, ConnectionLost) as error:
            if newly_pinned:
                raise
            self.say(f"{profile.url} cannot be asked now ({error.message}); logging in as it said before")
        else:
            check_known(profile, contact)
            profile, cas = replace(profile, ca_pem=contact.ca_pem), contact.cas
        urls = tuple(parse_address(relay).url for relay in self.relays)
        if not set(urls) <= set(profile.relays):
            profile = replace(profile, relays=tuple(dict.fromkeys((*profile.relays, *urls))))
        if login.issuer and login.issuer != profile.login.issuer:
            await self._pass_over(profile.url, profile.login)
            profile = replace(profile, login=_own_offer(login), from_relay=False, own={})
        profile = replace(profile, own=later_own(profile.own, login, profile.login, self.named))
        if login.ca_file is not None:
            profile = replace(profile, issuer_ca_pem=read_cas(login.ca_file, "login.ca_file"))
        if login.grant_type != "auto" or "grant_type" in self.named:
            profile = replace(profile, grant_type=login.grant_type)
        warning = _also_good_at(self.profiles, profile, former) if profile.in_force != former.in_force else ""
        if not profile.from_relay:
            if warning:
                self.say(warning)
            return self._save(profile, cas)
        known = Contact(profile.address, vouched_for=True, ca_pem=profile.ca_pem)
        await self._agree(known, profile, former, warning)
        return self._save(profile, cas)

    async def first(self, former: RelayProfile | None) -> RelayProfile:
        """Have the user agree to what the relay says, and keep it; `former`: what was trusted before."""
        config, login = self.config, self.config.login
        trust_given = bool(config.relay_ca_pin or config.relay_ca_file)
        contact = await _any_contact(config, self.relays, given=trust_given)
        relay = short_url(contact.address)
        offer, from_relay = contact.offer, True
        if login.issuer and (offer is None or (offer.issuer, offer.settings["client_id"]) != _named(login, offer)):
            if offer is not None and offer.issuer != login.issuer:
                await self._pass_over(relay, offer)
            offer, from_relay = _own_offer(login), False
        if offer is None:
            raise ConfigError(
                f"{relay} does not say how to log in: give --oidc-issuer-url URL and --oidc-client-id ID, or have its "
                "operator add a [login] table to its settings"
            )
        if from_relay and (self.ask is None or config.trust_first_use):
            # The user sees nothing, and what is not shown makes no login weaker (docs/threats.md#B24).
            offer = replace(offer, settings={**offer.settings, "dpop": login.dpop})
        profile = RelayProfile(
            tuple(parse_address(one).url for one in self.relays),
            offer,
            from_relay,
            contact.ca_pin,
            contact.ca_pem,
            read_cas(login.ca_file, "login.ca_file") if login.ca_file is not None else "",
            login.grant_type,
            own_settings(login, offer),
        )
        check_readable(profile)  # before the user is asked
        await self._agree(contact, profile, former, _also_good_at(self.profiles, profile, former))
        if former is not None:
            kept = former.issuer_ca_pem if former.login.issuer == offer.issuer else ""
            profile = replace(profile, directory=former.directory, issuer_ca_pem=profile.issuer_ca_pem or kept)
            if profile.ca_pin:
                # The user agreed to the pin as the relay shows it now, also where another CA had followed it here.
                self.profiles.successions.forget(profile.ca_pin)
        return self._save(profile, contact.cas)

    def _save(self, profile: RelayProfile, cas: Succession | None) -> RelayProfile:
        """Keep what was agreed to, and which CAs followed the relay's."""
        if cas is not None:
            self.profiles.successions.keep(profile.ca_pin, cas)
        return self.profiles.save(profile)

    async def _pass_over(self, relay: str, offer: LoginOffer) -> None:
        """Tell the user that settings name another issuer than a relay does; ask where no flag of this login names it.

        A settings file holds for every relay, and so its issuer's tokens would go to one that asked for none of them.
        """
        text = (
            f"{relay} names the issuer {quoted(offer.issuer)}, and your settings name "
            f"{quoted(self.config.login.issuer)}, which counts: the relay will get tokens of that one"
        )
        if self.ask is None or "issuer" in self.named or self.config.trust_first_use:
            self.say(text)
        elif not await self.ask("\n".join((*textwrap.wrap(f"{text}.", _width()), "Log in there? [y/N] "))):
            raise PinMismatch(
                f"nothing was sent to {relay}; log in with `--oidc-issuer-url` and `--oidc-client-id` as its operator "
                "names them, or take login.issuer out of your settings file"
            )

    async def _agree(self, contact: Contact, profile: RelayProfile, former: RelayProfile | None, warning: str) -> None:
        """Have the user agree to what the relay alone says; raises PinMismatch where the answer is no.

        `warning`: is said in any case, with the question where there is one.
        """
        config, ask = self.config, self.ask
        relay, trusted = short_url(contact.address), {} if former is None else former.in_force
        new = _unsaid(config.login, profile, former, self.named)
        if ask is None and new.get("dpop"):
            del new["dpop"]  # bound tokens, as the settings have it: the relay's word is not taken (`_first_contact`)
        ca_given = bool(config.relay_ca_pin or config.relay_ca_file)
        same_ca = contact.vouched_for if former is None else former.ca_pin == contact.ca_pin
        new_ca = not ca_given and not same_ca
        asked = (new_ca or new) and ask is not None and not config.trust_first_use
        if warning and not asked:
            self.say(warning)
        if not new_ca and not new:
            return
        if config.trust_first_use:
            # The one hole of trust on first use: a hostile relay or path at this very moment (docs/threats.md#B23).
            values = {name: shown(value) for name, value in new.items()}
            log.warning("trusting a relay at first use", relay=relay, relay_ca_pin=contact.ca_pin, **values)
            return
        if ask is None:
            raise PinMismatch(_untold(relay, contact.ca_pin if new_ca else "", new))
        before = "" if former is None or former.ca_pin == contact.ca_pin else former.ca_pin or _PUBLIC_CA
        lines = [
            Line("relay's CA", contact.ca_pin or _PUBLIC_CA, before),
            *login_lines(profile.in_force, None if former is None else trusted),
        ]
        head = f"{relay} is not known here." if former is None else f"You trusted {relay}; what an arrow shows is new."
        width = _width()
        text = [head, "Compare with what its operator gave you:", *layout(lines, width), *textwrap.wrap(warning, width)]
        if not await ask("\n".join((*text, "Trust all of it? [y/N] "))):
            raise PinMismatch(f"{relay} was not trusted; ask its operator for the pin of its CA and for the login")


def _given_pins(config: ClientConfig) -> list[tuple[str, str]]:
    """Return the pins of the relay's CA that the settings give, each with its flag. Raises ConfigError, StateError."""
    found = []
    if config.relay_ca_pin:
        found.append(("--relay-ca-pin", check_pin(config.relay_ca_pin)))
    if config.relay_ca_file is not None:
        found.append(("--relay-ca-file", pin_of(read_cas(config.relay_ca_file, "relay_ca_file"))))
    return found


async def _any_contact(config: ClientConfig, relays: tuple[str, ...], *, given: bool) -> Contact:
    """Return what the first relay that answers shows."""
    accesses = [RelayAccess(one, ca_file=config.relay_ca_file, ca_pin=config.relay_ca_pin) for one in relays]
    for access in accesses[:-1]:
        try:
            return await ask_relay(access, given=given)
        except ArcbridgeError as error:
            if concerns_all(error) or isinstance(error, PinMismatch):
                raise
    return await ask_relay(accesses[-1], given=given)


def _named(login: LoginConfig, offer: LoginOffer) -> tuple[str, str]:
    """Return the issuer and the client id of the settings, of which the relay may add the second."""
    return login.issuer, login.client_id or offer.settings["client_id"]


def _own_offer(login: LoginConfig) -> LoginOffer:
    if not login.client_id:
        raise ConfigError("login.client_id: required with login.issuer; give --oidc-client-id ID")
    return LoginOffer.of(login)


def _unsaid(
    login: LoginConfig, profile: RelayProfile, former: RelayProfile | None, named: Collection[str]
) -> dict[str, Any]:
    """Return what the relay alone says: at a first contact what is beyond the defaults, later each difference.

    A setting that is left out can make a login weaker than one that was trusted, too (docs/threats.md#B46).
    """
    if former is None:
        return profile.login.beyond(login, profile.own)
    if not profile.from_relay:
        return {}
    trusted = former.in_force
    return {
        name: value
        for name, value in profile.in_force.items()
        if trusted[name] != value
        and name not in profile.own
        and not (value == getattr(login, name) and (name in named or value != getattr(LoginConfig(), name)))
    }


def _width() -> int:
    return min(COLUMNS, shutil.get_terminal_size().columns)


def _also_good_at(profiles: RelayProfiles, profile: RelayProfile, former: RelayProfile | None) -> str:
    """Return the warning that another relay, or a cluster of its, takes tokens of the same issuer for the same
    audience, whatever the client; empty: none is known to."""
    same = [
        one.url
        for one in profiles.all()
        if (former is None or one.directory != former.directory) and _share_audience(one.in_force, profile.in_force)
    ]
    if not same:
        return ""
    return (
        f"{profile.url} will get tokens that are good at {' and '.join(same)}, too: you log in there with the same "
        "issuer, and an audience is the same."
    )


def _share_audience(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether a token of one login may be good where the other's are; no audience: the issuer decides."""
    if one["issuer"].rstrip("/") != other["issuer"].rstrip("/"):
        return False
    return any(
        overlap(mine, theirs)
        for mine in (one["audience"], one["cluster_audience"] or one["client_id"])
        for theirs in (other["audience"], other["cluster_audience"] or other["client_id"])
    )


def _untold(relay: str, pin: str, new: Mapping[str, object]) -> str:
    """Say what to do where the user cannot be asked."""
    given = [*([f"--relay-ca-pin {pin}"] if pin else []), *flags(new)]
    return (
        f"{relay} names what nothing here vouches for; compare each value with what its operator says and add\n"
        f"  {' '.join(given)}\nor accept all of it unseen with --trust-first-use"
    )


def with_profile(config: ClientConfig, profile: RelayProfile | None) -> ClientConfig:
    """Return the settings of a login at a profile's relay."""
    if profile is None:
        return config
    login = config.login
    if login.issuer and login.issuer != profile.login.issuer:
        login = without_issuer(login)
    return apply(replace(config, login=login), profile)


async def revoke(config: LoginConfig, tokens: TokenSet, environment: Mapping[str, str]) -> str:
    """Have the issuer void the refresh token of a login (RFC 7009).

    Returns why it did not, for one line to the user; empty: it did, or there is none.
    """
    if not tokens.refresh_token:
        return ""
    try:
        async with Issuer(config, ClientAuthentication(config, environment=environment)) as issuer:
            endpoints = await issuer.endpoints()
            if not endpoints.revocation:
                return "the issuer has no revocation endpoint"
            form = {"token": tokens.refresh_token, "token_type_hint": "refresh_token"}
            await issuer.post(endpoints.revocation, form)
    except IssuerError as error:
        return f"the issuer refused ({error.words})"
    except ArcbridgeError as error:
        return error.message
    return ""


async def log_in(
    config: ClientConfig,
    relays: tuple[str, ...],
    terminal: Terminal,
    *,
    ask: Ask | None,
    renew: bool,
    named: Collection[str],
    environment: Mapping[str, str],
    force: bool = False,
    wait: float = 0.0,
) -> LoggedIn:
    """Log in, at a relay that is trusted or at the issuer of the settings; see `trusted` for the arguments.

    `force`: also where there is a login. `wait`: seconds after which it is given up; 0: the user at the terminal does
    that. Raises ArcbridgeError.
    """
    state = StateDirectory.find(config.state_dir, environment)
    profiles = RelayProfiles(state.path)
    if relays:
        config = replace(config, relay="", relays=relays)
    known = profiles.all()
    profile = await trusted(config, profiles, relays, ask=ask, say=terminal.tell, renew=renew, named=named)
    # A login of the user's own settings is for the relay that commands with these settings mean.
    config = fill(config, profiles)[0] if profile is None else with_profile(config, profile)
    context = ClientContext(config, terminal, environment=environment)
    urls = context.config.relay_urls()
    relay = short_url(parse_address(urls[0])) if urls else ""
    already = False
    if context.config.login.grant_type == PROGRAM:
        # Its tokens are asked for by each command; here it is seen whether the issuer gives any.
        await context.tokens.access()
        name, until = context.config.login.client_id, 0.0
    else:
        login = context.login()
        kept = None if force or renew or _NEED_NEW_LOGIN & set(named) else await _kept_login(login)
        already = kept is not None
        found = kept or await _within(wait, login, may_wait=terminal.may_log_in)
        name, until = user_name(claims_unverified(found.id_token or found.access_token)), found.expires_at
    if profile is not None:
        # Commands that name no relay mean this one from now on.
        profiles.save(replace(profile, logged_in_at=time.time()))
        for former in (one for one in known if one.directory == profile.directory):
            # The tokens of a login whose place this one takes with other settings: `logout` would not find them.
            settings = with_profile(ClientConfig(state_dir=config.state_dir), former)
            same = cache_of(settings, state).path == cache_of(config, state).path
            if settings.login.grant_type != PROGRAM and not same:
                _, warning = await log_out(settings, environment)
                if warning:
                    terminal.tell(f"warning: {warning}")
    return LoggedIn(name, until, relay, already)


async def _kept_login(login: Login) -> TokenSet | None:
    """Return the tokens of a login that is good, refreshed where they have to be; None where a new one is needed."""
    try:
        return await login.tokens(interactive=False)
    except Unauthenticated:
        return None


async def _within(wait: float, login: Login, *, may_wait: bool) -> TokenSet:
    """Log in anew, within `wait` seconds where that is not 0. Raises Unauthenticated where no user could do it."""
    if not wait and not may_wait:
        raise Unauthenticated(
            "there is no terminal, so no user is there to log in: a job uses `arcbridge run --workload …` "
            "(docs/how-to/ci.md); `--wait 10m` waits for a login on another device"
        )
    late = Unauthenticated(f"the login was not done within {wait:.0f} s (--wait); start again")
    async with within(wait or None, late):
        return await login.log_in()


async def log_out(config: ClientConfig, environment: Mapping[str, str]) -> tuple[bool, str]:
    """Forget a login's tokens here, and have the issuer void the refresh token.

    Returns whether there were any, and a warning where the issuer did not; empty: it did.
    """
    cache = cache_of(config, StateDirectory.find(config.state_dir, environment))
    # A refresh that is under way, as the background process makes them, would put tokens back.
    async with cache.locked():
        kept = cache.load()
        # Gone from this machine before anything can fail, or take its time.
        forgotten = cache.clear()
    if not (why := await revoke(config.login, kept, environment)):
        return forgotten, ""
    return forgotten, (
        f"the refresh token was not revoked at {config.login.issuer}: {why}; it is forgotten here, and a copy of it is "
        "good there until it ends"
    )
