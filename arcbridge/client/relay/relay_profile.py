"""Relays that this user has logged in at: what was trusted then, kept so that later commands need no flags.

One directory for each relay under `relays/` of the state directory (0700, files 0600): `profile.json` with the relay's
addresses, the pin of its CA, where it says that one logs in, and what the user gave beside that; `ca.pem`, the CA
itself; `issuer-ca.pem`, the issuer's, where the user gave one. Invariant: what is here was shown to the user, or given
by the user, and only `login` writes it; a relay that says something else later changes nothing here.

Settings that flags, environment and settings file give go before what is kept here (`fill`).
"""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from arcbridge.client.state import StateDirectory
from arcbridge.errors import ConfigError, StateError
from arcbridge.net.address import Address, check_origins, issuer_origin, parse_address
from arcbridge.pki.pins import check_pin, pin_of
from arcbridge.pki.private_files import ensure_private_directory, locked, read_file, write_private
from arcbridge.settings.choices import AUDIENCE_BY, BROWSER, DEVICE, GRANTS
from arcbridge.settings.config import CLIENT_CREDENTIALS, OF_ISSUER, ClientConfig, LoginConfig

_TEXTS = ("issuer", "client_id", "audience", "cluster_audience", "cluster_audience_by")
_LISTS = ("scopes", "cluster_scopes", "relay_scopes", "issuer_origins")
SETTINGS = (*_TEXTS, *_LISTS, "dpop")
"""The settings of a login that a relay may name. What would weaken a login, such as `one_token`, is not among them."""
OWN = (*(name for name in _TEXTS if name != "issuer"), *_LISTS, "redirect_port", "redirect_path", "proof_key_file")
"""The settings of a login that the user may give beside what a relay names, and that are kept with it. Another issuer
makes another login."""
_TEXT_LIMIT = 512
_LIST_LIMIT = 64
_RELAY_LIST_LIMIT = 20
_RELAY_LIMIT = 1024
"""Words of a list, and characters in all, that a relay may name: the question is to fit on one screen."""
_OTHERS = {"dpop": (bool, "true or false"), "redirect_port": (int, "a number"), "proof_key_file": (str, "a path")}
_WORD = f"printable ASCII without a space, of at most {_TEXT_LIMIT} characters"
_NONE_NAMED = LoginConfig()


@dataclass(frozen=True, slots=True)
class LoginOffer:
    """Where one logs in, as a relay says it (`GET /v1/login`) or as the user's flags did."""

    settings: dict[str, Any]
    """By the names in `SETTINGS`; lists are tuples."""
    grants: tuple[str, ...] = ()
    """Ways to log in that the issuer offers; empty: not known."""

    @classmethod
    def read(cls, document: object) -> LoginOffer:
        """Read what was kept; raises `ConfigError`, which quotes nothing of it.

        Members that are not known are ignored, so that newer relays may say more.
        """
        if not isinstance(document, dict):
            raise ConfigError("it is not a JSON object")
        found = {name: _read(name, document.get(name, _json(getattr(_NONE_NAMED, name)))) for name in SETTINGS}
        for name in ("issuer", "client_id"):
            if not found[name]:
                raise ConfigError(f"{name}: required but not set")
        check_origins("issuer_origins", found["issuer_origins"])
        if found["cluster_audience_by"] not in AUDIENCE_BY:
            raise ConfigError(f"cluster_audience_by: must be one of {', '.join(AUDIENCE_BY)}")
        wrong = "issuer: must be an https:// URL of a host, without an @, a query, a fragment or an empty port"
        if "@" in found["issuer"]:
            raise ConfigError(wrong)
        try:
            issuer_origin(found["issuer"], "issuer")
        except ConfigError:
            raise ConfigError(wrong) from None
        grants = document.get("grant_types", [])
        if not isinstance(grants, list):
            raise ConfigError("grant_types: must be a list")
        return cls(found, tuple(one for one in GRANTS if one in grants))

    @classmethod
    def read_from_relay(cls, document: object) -> LoginOffer:
        """Read what a relay answered: as `read`, and refuse more than a person can compare, and one token that would be
        good at more than one cluster."""
        offer = cls.read(document)
        for name in _LISTS:
            if len(offer.settings[name]) > _RELAY_LIST_LIMIT:
                raise ConfigError(f"{name}: has more than {_RELAY_LIST_LIMIT} words, which no reader can compare")
        words = [offer.settings[name] for name in _TEXTS] + [one for name in _LISTS for one in offer.settings[name]]
        if sum(map(len, words)) > _RELAY_LIMIT:
            raise ConfigError(f"it has more than {_RELAY_LIMIT} characters, which no reader can compare")
        audience = offer.settings["cluster_audience"]
        if audience and "{cluster}" not in audience:
            raise ConfigError(
                "cluster_audience: has no {cluster} in it, so a cluster would get a token that is good elsewhere, too"
            )
        return offer

    @classmethod
    def of(cls, login: LoginConfig) -> LoginOffer:
        """Return what the user's own settings say."""
        return cls({name: getattr(login, name) for name in SETTINGS})

    @property
    def issuer(self) -> str:
        return str(self.settings["issuer"])

    @property
    def only_grant(self) -> str:
        """The one way for a person to log in that is offered; `auto` where there is a choice, or none is named."""
        offered = [grant for grant in (BROWSER, DEVICE) if grant in self.grants]
        return offered[0] if len(offered) == 1 else _NONE_NAMED.grant_type

    def differs(self, other: LoginOffer) -> list[str]:
        """Return the settings in which `other` says something else; ways to log in do not count."""
        return [name for name in SETTINGS if self.settings[name] != other.settings[name]]

    def beyond(self, login: LoginConfig, own: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a login would take from this offer that the user did not give and no default allows.

        `login`: what the user gives now. `own`: what the user gave, and goes before the offer. The names are those of
        `LoginConfig`, `grant_type` among them where the offer leaves out the browser (docs/threats.md#B41).
        """
        found = {
            name: value
            for name, value in self.settings.items()
            if name not in own and value != getattr(login, name) and not _within_default(name, value)
        }
        if self.only_grant == DEVICE and login.grant_type == _NONE_NAMED.grant_type:
            found["grant_type"] = DEVICE
        return found

    def document(self) -> dict[str, Any]:
        """Return the offer as JSON, for `read`."""
        return {**_document(self.settings), "grant_types": list(self.grants)}


@dataclass(frozen=True, slots=True)
class RelayProfile:
    """One organisation's relays as this user knows them."""

    relays: tuple[str, ...]
    """`https://host:port` of each; the first one names the profile."""
    login: LoginOffer
    from_relay: bool = True
    """Whether the relay named the login; False: the user's flags did, and what the relay says is not asked."""
    ca_pin: str = ""
    """`sha256:…` of the relays' CA; empty: the system's CAs vouch for them."""
    ca_pem: str = field(default="", repr=False)
    issuer_ca_pem: str = field(default="", repr=False)
    """CA of the issuer's certificate, as the user gave it; empty: the system's."""
    grant_type: str = "auto"
    own: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the login that the user gave (of `OWN`, as in `LoginConfig`); they go before those of `login`."""
    logged_in_at: float = 0.0
    """Unix seconds of the last login; 0: trusted, and not logged in yet."""
    directory: Path = Path()
    """Where it is kept; empty before it is."""

    @property
    def address(self) -> Address:
        return parse_address(self.relays[0])

    @property
    def url(self) -> str:
        return short_url(self.address)

    @property
    def grant(self) -> str:
        """The way to log in: the user's, else the only one that the relay offers, else `auto`."""
        return self.grant_type if self.grant_type != _NONE_NAMED.grant_type else self.login.only_grant

    @property
    def in_force(self) -> dict[str, Any]:
        """What a login without any flag takes: the settings of `SETTINGS`, and `grant_type`."""
        own = {name: value for name, value in self.own.items() if name in SETTINGS}
        return {**self.login.settings, **own, "grant_type": self.grant}


def short_url(address: Address) -> str:
    """Write a relay's URL as people do: without the port that goes without saying."""
    return address.url.removesuffix(":443")


class RelayProfiles:
    """The profiles of one state directory. Every method raises StateError; `save` raises ConfigError too."""

    def __init__(self, state: Path) -> None:
        self.path = state / "relays"
        self.successions = StateDirectory(state, state).successions

    def all(self, *, skip_damaged: bool = False) -> list[RelayProfile]:
        """Return all profiles, the one logged in at last first. `skip_damaged`: those that can be read."""
        try:
            names = sorted(entry.name for entry in self.path.iterdir() if not entry.name.startswith("."))
        except FileNotFoundError:
            return []  # there is no directory before the first login
        except OSError as error:
            raise StateError(f"cannot read {self.path}: {error.strerror}; see `arcbridge doctor`") from error
        found = []
        for name in names:
            try:
                if (profile := self._load(self.path / name)) is not None:
                    found.append(profile)
            except StateError:
                if not skip_damaged:
                    raise
        return sorted(found, key=operator.attrgetter("logged_in_at"), reverse=True)

    def get(self, relay: Address) -> RelayProfile | None:
        """Return the profile in which this relay is."""
        return next((one for one in self.all() if relay in _addresses(one.relays)), None)

    def save(self, profile: RelayProfile) -> RelayProfile:
        """Keep a profile in place of the one of the same relay; returns it with its directory."""
        check_readable(profile)
        directory = profile.directory if profile.directory != Path() else self.path / _name(profile.address)
        ensure_private_directory(directory)
        with locked(self.path / ".lock"):
            write_private(directory / "ca.pem", profile.ca_pem.encode())
            write_private(directory / "issuer-ca.pem", profile.issuer_ca_pem.encode())
            document = {
                "relays": list(profile.relays),
                "ca_pin": profile.ca_pin,
                "login": profile.login.document(),
                "from_relay": profile.from_relay,
                "grant_type": profile.grant_type,
                "own": _document(profile.own),
                "logged_in_at": profile.logged_in_at,
            }
            # Written last, because a directory without this file counts as no profile.
            write_private(directory / "profile.json", (json.dumps(document, indent=1) + "\n").encode())
        return replace(profile, directory=directory)

    def _load(self, directory: Path) -> RelayProfile | None:
        data = read_file(directory / "profile.json")
        if data is None:
            return None
        try:
            document = json.loads(data)
            relays = tuple(document["relays"])
            _addresses(relays)
            if not relays or not isinstance(document["logged_in_at"], int | float):
                raise ValueError("no relay, or no time")
            return RelayProfile(
                relays,
                LoginOffer.read(document["login"]),
                bool(document["from_relay"]),
                check_pin(document["ca_pin"]) if document["ca_pin"] else "",
                (read_file(directory / "ca.pem") or b"").decode("ascii"),
                (read_file(directory / "issuer-ca.pem") or b"").decode("ascii"),
                str(document["grant_type"]),
                _read_own(document.get("own", {})),
                float(document["logged_in_at"]),
                directory,
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, ConfigError) as error:
            raise StateError(f"{directory} is damaged: remove it, and log in again (`arcbridge login URL`)") from error


def fill(config: ClientConfig, profiles: RelayProfiles) -> tuple[ClientConfig, Sequence[RelayProfile]]:
    """Add to settings that name no relay, no trust or no login what was trusted at the last login.

    Named relays choose the profile in which they are; without one the last login does. Returns the settings and the
    profiles that would do, of which the first one was used. Raises ConfigError, StateError.
    """
    named = config.relay_urls()
    whole = has_login(config.login) and not config.login.issuer  # what an issuer gives may be kept in part
    if named and whole and (config.relay_ca_pin or config.relay_ca_file):
        return config, ()
    known = profiles.all()
    if named:
        known = [profile] if (profile := _named(known, named)) is not None else []
    elif has_login(config.login):
        # A token of the user's own settings is for the relay of its issuer, and for no other organisation's.
        known = [one for one in known if config.login.issuer and one.login.issuer == config.login.issuer]
    return apply(config, known[0]) if known else config, known


def apply(config: ClientConfig, profile: RelayProfile) -> ClientConfig:
    """Return the settings with those of a profile where they have none of their own."""
    login = config.login
    others = login.command or login.access_token_file or login.id_token_file is not None
    if not has_login(login) or (login.issuer == profile.login.issuer and not others):
        login = apply_login(login, profile)
    own_trust = bool(config.relay_ca_pin or config.relay_ca_file)
    pinned = bool(profile.ca_pin) and not own_trust
    return replace(
        config,
        relay="",
        relays=config.relay_urls() or profile.relays,
        relay_ca_pin=profile.ca_pin if pinned else config.relay_ca_pin,
        relay_ca_file=profile.directory / "ca.pem" if pinned else config.relay_ca_file,
        login=login,
    )


def apply_login(login: LoginConfig, profile: RelayProfile) -> LoginConfig:
    """Return the login's settings with those of a profile where they have their defaults.

    Raises ConfigError for credentials without an issuer: a relay, which may be another organisation's, named the
    profile's one, and the credentials would go there (docs/threats.md#B37).
    """
    if not login.issuer and (given := [name for name in CLIENT_CREDENTIALS if getattr(login, name)]):
        raise ConfigError(
            f"login.{given[0]}: is for one issuer, and these settings name none; write login.issuer beside it, as the "
            "issuer's operator says it: an issuer that a relay names gets no credentials of your settings"
        )
    added: dict[str, Any] = {
        name: value
        for name, value in {**profile.login.settings, **profile.own}.items()
        if getattr(login, name) == getattr(_NONE_NAMED, name)
    }
    if login.ca_file is None and profile.issuer_ca_pem:
        added["ca_file"] = profile.directory / "issuer-ca.pem"
    if login.grant_type == "auto":
        added["grant_type"] = profile.grant
    return replace(login, **added)


def without_issuer(login: LoginConfig) -> LoginConfig:
    """Return the settings without their issuer, and without what is for it alone."""
    return replace(login, issuer="", **{name: getattr(_NONE_NAMED, name) for name in OF_ISSUER})


def own_settings(login: LoginConfig, offer: LoginOffer) -> dict[str, Any]:
    """Return the settings of `OWN` that the user gives, and in which `offer` says something else."""
    if login.issuer and login.issuer != offer.issuer:
        login = without_issuer(login)
    found = {name: getattr(login, name) for name in OWN if getattr(login, name) != getattr(_NONE_NAMED, name)}
    if (file := found.get("proof_key_file")) is not None:
        found["proof_key_file"] = file.absolute()
    return {name: value for name, value in found.items() if offer.settings.get(name) != value}


def later_own(kept: Mapping[str, Any], login: LoginConfig, offer: LoginOffer, named: Collection[str]) -> dict[str, Any]:
    """Return the user's own settings after a login that gives some of them; the others stay as they were kept.

    `named`: settings that this login gives even where they have their defaults. What it gives as `offer` has it is the
    user's own no more.
    """
    changed = {name for name in OWN if name in named or getattr(login, name) != getattr(_NONE_NAMED, name)}
    return {name: value for name, value in kept.items() if name not in changed} | own_settings(login, offer)


def check_readable(profile: RelayProfile) -> None:
    """Raise ConfigError, which names the setting, where the login of a profile could be kept and not be read again."""
    try:
        LoginOffer.read(profile.login.document())
        _read_own(_document(profile.own))
    except ConfigError as error:
        raise ConfigError(f"login.{error.message}") from error


def _json(value: Any) -> Any:
    """Return a setting of a login as JSON, for `_read`."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _document(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _json(value) for name, value in settings.items()}


def _read(name: str, value: Any) -> Any:
    """Read a setting of a login from JSON; raises ConfigError, which quotes nothing of it."""
    if name in _LISTS:
        if not isinstance(value, list) or len(value) > _LIST_LIMIT or not all(map(_is_word, value)):
            raise ConfigError(f"{name}: must be a list of at most {_LIST_LIMIT} words, each {_WORD}")
        return tuple(value)
    kind, words = _OTHERS.get(name, (str, _WORD))
    if type(value) is not kind or (name not in _OTHERS and not _is_word(value)):
        raise ConfigError(f"{name}: must be {words}")
    return Path(str(value)) if name == "proof_key_file" else value


def _read_own(document: object) -> dict[str, Any]:
    """Read what was kept of the user's own settings; raises ConfigError."""
    if not isinstance(document, dict) or not set(document) <= {*OWN}:
        raise ConfigError("own is not the settings of a login")
    return {name: _read(name, value) for name, value in document.items()}


def has_login(login: LoginConfig) -> bool:
    """Return whether the settings say where tokens come from."""
    return bool(
        login.issuer or login.command or login.workload or login.access_token_file or login.id_token_file is not None
    )


def login_command(config: ClientConfig, profiles: RelayProfiles) -> str:
    """Return the command that logs in at the relay and issuer of these settings, for messages."""
    relays = config.relay_urls()
    words = ["arcbridge login"]
    if relays:
        words.append(short_url(parse_address(relays[0])))
    try:
        profile = _named(profiles.all(), relays) if relays else None
    except StateError:
        profile = None
    if config.login.issuer and (profile is None or profile.login.issuer != config.login.issuer):
        words.append(f"--oidc-issuer-url {config.login.issuer} --oidc-client-id {config.login.client_id}")
    return " ".join(words)


def _named(known: Sequence[RelayProfile], relays: Sequence[str]) -> RelayProfile | None:
    """Return the profile that has all these relays; a host without a port means its only profile, whatever the port."""
    try:
        wanted = _addresses(relays)
    except ConfigError:  # the check of the settings says what is wrong, with its place
        return None
    for profile in known:
        if set(wanted) <= set(_addresses(profile.relays)):
            return profile
    if len(relays) == 1 and "://" not in relays[0] and ":" not in relays[0]:
        same_host = [one for one in known if wanted[0].host in {address.host for address in _addresses(one.relays)}]
        return same_host[0] if len(same_host) == 1 else None
    return None


def _addresses(relays: Sequence[str]) -> list[Address]:
    return [parse_address(relay) for relay in relays]


def _name(address: Address) -> str:
    """Return a directory's name that every system takes."""
    return f"{address.host.replace(':', '-')}_{address.port}"


def _is_word(value: object) -> bool:
    # ASCII: an issuer that only looks like the right one is spelt in other letters.
    return isinstance(value, str) and len(value) <= _TEXT_LIMIT and re.fullmatch("[!-~]*", value) is not None


def _within_default(name: str, value: Any) -> bool:
    """Return whether a setting asks for no more than a login does that names nothing."""
    default = getattr(_NONE_NAMED, name)
    return value == default or (isinstance(default, tuple) and set(value) <= set(default))


def organisation(config: ClientConfig, state: StateDirectory) -> str:
    """Return the pin of the relays' CA, else the URL of the first one: tokens and local certificates are kept under it.

    Two relays share it only where one CA vouches for both, or where the user logged in at both as one. It asks none.
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
        with suppress(ConfigError, OSError):
            return pin_of(config.relay_ca_file.read_text("ascii", "ignore"))
    address = parse_address(urls[0])
    profile = RelayProfiles(state.path).get(address)
    return (address if profile is None else profile.address).url
