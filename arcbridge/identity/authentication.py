"""Kubernetes' own AuthenticationConfiguration, read strictly.

Source: Kubernetes, "Authenticating" / "Using Authentication Configuration", kind `AuthenticationConfiguration`,
`apiserver.config.k8s.io/v1`. A file written for kube-apiserver is read unchanged. What is not carried out here (CEL
expressions, egress selectors, anonymous access) is refused by its path and never ignored: an ignored rule is a
rule that an operator relies on.

The two `userValidationRules` that the documentation recommends (no `system:` user, no `system:` group)
are accepted word for word, because `identity.claims` always enforces them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from arcbridge.errors import ConfigError

API_VERSIONS = ("apiserver.config.k8s.io/v1", "apiserver.config.k8s.io/v1beta1")
"""v1beta1 differs from v1 in no field that is carried out here; files from before 1.34 have it."""
KIND = "AuthenticationConfiguration"

MAX_ISSUERS = 64
"""kube-apiserver's own bound."""
MAX_FILE_SIZE = 1 << 20

BUILT_IN_RULES = frozenset(
    {
        "!user.username.startsWith('system:')",
        "user.groups.all(group, !group.startsWith('system:'))",
    }
)


@dataclass(frozen=True, slots=True)
class ClaimRule:
    """A claim must be there and, unless `required_value` is empty, be exactly this JSON string."""

    claim: str
    required_value: str


@dataclass(frozen=True, slots=True)
class PrefixedClaim:
    """`claim` gives the value, `prefix` (may be empty) is put before it."""

    claim: str
    prefix: str


@dataclass(frozen=True, slots=True)
class IssuerConfig:
    """One entry of `jwt[]`. `path` (`jwt[0]`) is for messages; `url` is compared exactly, trailing slash and all."""

    path: str
    url: str
    discovery_url: str
    ca_pem: str | None
    audiences: tuple[str, ...]
    rules: tuple[ClaimRule, ...]
    username: PrefixedClaim
    groups: PrefixedClaim | None
    uid_claim: str | None


@dataclass(frozen=True, slots=True)
class AuthenticationConfig:
    """All issuers, by their url in `issuer()`; order is the file's."""

    issuers: tuple[IssuerConfig, ...]

    def issuer(self, url: str) -> IssuerConfig | None:
        """Answer the issuer whose url is exactly `url`, else None."""
        for issuer in self.issuers:
            if issuer.url == url:
                return issuer
        return None


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice: which one counts differs between parsers."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise ConfigError(f"line {key_node.start_mark.line + 1}: a key must be a string")
        if key in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} is given twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load(path: Path) -> AuthenticationConfig:
    """Read the file at `path`; every ConfigError names the file and the path of the field."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the authentication configuration cannot be read: {error}") from error
    return parse(text, source=str(path))


def parse(text: str, *, source: str = "authentication configuration") -> AuthenticationConfig:
    """Parse YAML (or JSON, which is YAML). Raises ConfigError `source: path: what is wrong`."""
    if len(text) > MAX_FILE_SIZE:
        raise ConfigError(f"{source}: larger than {MAX_FILE_SIZE} bytes")
    try:
        document = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark is not None else ""
        raise ConfigError(f"{source}: {where}not valid YAML") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error.message}") from error
    try:
        return from_mapping(document)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error.message}") from error


def from_mapping(document: object) -> AuthenticationConfig:
    """Build the configuration from a parsed document. Raises ConfigError `path: what is wrong`."""
    top = _Fields(document, "")
    version = top.text("apiVersion")
    if version not in API_VERSIONS:
        raise ConfigError(f"apiVersion: must be {API_VERSIONS[0]}")
    if top.text("kind") != KIND:
        raise ConfigError(f"kind: must be {KIND}")
    top.refuse("anonymous", "anonymous access does not exist here; remove it")
    entries = top.items("jwt")
    top.done()
    if not entries:
        raise ConfigError("jwt: at least one issuer is needed")
    if len(entries) > MAX_ISSUERS:
        raise ConfigError(f"jwt: at most {MAX_ISSUERS} issuers")
    issuers = tuple(_issuer(entry, f"jwt[{index}]") for index, entry in enumerate(entries))
    _unique([(f"{i.path}.issuer.url", i.url) for i in issuers])
    _unique([(f"{i.path}.issuer.discoveryURL", i.discovery_url) for i in issuers])
    return AuthenticationConfig(issuers)


def _issuer(document: object, path: str) -> IssuerConfig:
    entry = _Fields(document, path)
    issuer = entry.fields("issuer")
    url = _https_url(issuer.text("url"), issuer.at("url"))
    discovery = issuer.optional_text("discoveryURL")
    if discovery:
        _https_url(discovery, issuer.at("discoveryURL"))
        if discovery.rstrip("/") == url.rstrip("/"):
            raise ConfigError(f"{issuer.at('discoveryURL')}: must differ from url")
    issuer.refuse("egressSelectorType", "egress selectors are not carried out here")
    ca_pem = issuer.optional_text("certificateAuthority") or None
    if ca_pem is not None and "-----BEGIN CERTIFICATE-----" not in ca_pem:
        raise ConfigError(f"{issuer.at('certificateAuthority')}: not a PEM certificate")
    audiences = tuple(issuer.texts("audiences"))
    if not audiences:
        raise ConfigError(f"{issuer.at('audiences')}: at least one audience is needed")
    _unique([(f"{issuer.at('audiences')}[{n}]", a) for n, a in enumerate(audiences)])
    match = issuer.optional_text("audienceMatchPolicy")
    if match not in ("", "MatchAny") or (len(audiences) > 1 and not match):
        raise ConfigError(f"{issuer.at('audienceMatchPolicy')}: must be MatchAny with several audiences")
    issuer.done()

    rules = tuple(
        _rule(r, f"{path}.claimValidationRules[{n}]") for n, r in enumerate(entry.items("claimValidationRules"))
    )
    _unique([(f"{path}.claimValidationRules[{n}].claim", r.claim) for n, r in enumerate(rules)])

    mappings = entry.fields("claimMappings")
    username = _prefixed(mappings.fields("username"))
    groups_fields = mappings.optional_fields("groups")
    groups = _prefixed(groups_fields) if groups_fields is not None else None
    uid = mappings.optional_fields("uid")
    uid_claim = None
    if uid is not None:
        uid.refuse("expression", "CEL expressions are not carried out here; use claim")
        uid_claim = uid.text("claim")
        uid.done()
    for n, item in enumerate(mappings.items("extra")):
        extra = _Fields(item, f"{mappings.at('extra')}[{n}]")
        extra.refuse("valueExpression", "CEL expressions are not carried out here; remove this extra")
        raise ConfigError(f"{mappings.at('extra')}[{n}].valueExpression: missing")
    mappings.done()

    for n, item in enumerate(entry.items("userValidationRules")):
        rule = _Fields(item, f"{path}.userValidationRules[{n}]")
        expression = rule.text("expression")
        rule.optional_text("message")
        rule.done()
        if expression not in BUILT_IN_RULES:
            raise ConfigError(
                f"{rule.at('expression')}: CEL expressions are not carried out here, except the two standard "
                "rules against 'system:' names, which always hold"
            )
    entry.done()
    return IssuerConfig(path, url, discovery, ca_pem, audiences, rules, username, groups, uid_claim)


def _rule(document: object, path: str) -> ClaimRule:
    rule = _Fields(document, path)
    rule.refuse("expression", "CEL expressions are not carried out here; use claim and requiredValue")
    rule.refuse("message", "belongs to expression, which is not carried out here")
    claim = rule.text("claim")
    required = rule.optional_text("requiredValue")
    rule.done()
    return ClaimRule(claim, required)


def _prefixed(fields: _Fields) -> PrefixedClaim:
    fields.refuse("expression", "CEL expressions are not carried out here; use claim and prefix")
    claim = fields.text("claim")
    if not fields.has("prefix"):
        raise ConfigError(f'{fields.at("prefix")}: must be given beside claim (it may be "")')
    prefix = fields.optional_text("prefix")
    fields.done()
    return PrefixedClaim(claim, prefix)


def _https_url(url: str, path: str) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{path}: not a URL") from error
    if parts.scheme != "https" or not host:
        raise ConfigError(f"{path}: must be an https URL")
    if "@" in parts.netloc or "?" in url or "#" in url:
        raise ConfigError(f"{path}: must have no user information, query or fragment")
    if re.search(r"[\x00-\x20\x7f]", url):
        raise ConfigError(f"{path}: must have no blanks or control characters")
    return url


def _unique(values: list[tuple[str, str]]) -> None:
    seen: set[str] = set()
    for path, value in values:
        if not value:
            continue
        if value in seen:
            raise ConfigError(f"{path}: is given twice")
        seen.add(value)


class _Fields:
    """The fields of one mapping; each is taken once, and `done()` refuses those that were not taken."""

    __slots__ = ("_left", "_path")

    def __init__(self, document: object, path: str) -> None:
        if not isinstance(document, Mapping):
            raise ConfigError(f"{path or 'document'}: must be a mapping")
        self._path = path
        self._left: dict[str, object] = {str(key): value for key, value in document.items()}

    def at(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def has(self, name: str) -> bool:
        return self._left.get(name) is not None

    def refuse(self, name: str, why: str) -> None:
        if name in self._left:
            raise ConfigError(f"{self.at(name)}: {why}")

    def text(self, name: str) -> str:
        value = self._left.pop(name, None)
        if value is None or value == "":
            raise ConfigError(f"{self.at(name)}: missing")
        if not isinstance(value, str):
            raise ConfigError(f"{self.at(name)}: must be a string")
        return value

    def optional_text(self, name: str) -> str:
        value = self._left.pop(name, None)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise ConfigError(f"{self.at(name)}: must be a string")
        return value

    def items(self, name: str) -> list[object]:
        value = self._left.pop(name, None)
        if value is None:
            return []
        if not isinstance(value, list):
            raise ConfigError(f"{self.at(name)}: must be a list")
        return value

    def texts(self, name: str) -> list[str]:
        out = []
        for n, item in enumerate(self.items(name)):
            if not isinstance(item, str) or not item:
                raise ConfigError(f"{self.at(name)}[{n}]: must be a string that is not empty")
            out.append(item)
        return out

    def fields(self, name: str) -> _Fields:
        value = self._left.pop(name, None)
        if value is None:
            raise ConfigError(f"{self.at(name)}: missing")
        return _Fields(value, self.at(name))

    def optional_fields(self, name: str) -> _Fields | None:
        value = self._left.pop(name, None)
        return None if value is None else _Fields(value, self.at(name))

    def done(self) -> None:
        for name in self._left:
            raise ConfigError(f"{self.at(name)}: unknown field")
