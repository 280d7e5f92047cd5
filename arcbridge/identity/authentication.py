"""Kubernetes' own AuthenticationConfiguration, read strictly.

Source: Kubernetes, "Authenticating" / "Using Authentication Configuration", kind `AuthenticationConfiguration`,
`apiserver.config.k8s.io/v1`. A file written for kube-apiserver is read unchanged. What is not carried out here (egress
selectors, anonymous access) is refused by its path and never ignored: an ignored rule is a rule that an operator relies
on. Errors name the path, line and column of the field.

CEL expressions are compiled here, by `identity.cel`, which is imported for a file that has one. The two
`userValidationRules` that the documentation recommends (no `system:` user, no `system:` group) need no compiler,
because `identity.claims` always enforces them.
"""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from arcbridge.errors import ConfigError
from arcbridge.settings.problems import Place, Problem

if TYPE_CHECKING:
    from arcbridge.identity.cel.compiler import Expression
    from arcbridge.identity.cel.mapping import Expressions, Rule

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
    """A claim must be there and be exactly this JSON string, also where that is empty: so does kube-apiserver."""

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
    username: PrefixedClaim | None
    """None where an expression gives it."""
    groups: PrefixedClaim | None
    uid_claim: str | None
    expressions: Expressions | None = None
    """Everything that is an expression, compiled; None where there is none."""


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
    """SafeLoader that refuses a key given twice: which one counts differs between parsers.

    Every error of a node is a `_Misplaced`.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError) as error:
            # What PyYAML lets through for a scalar that its tag does not fit, such as the date 2024-13-45.
            kind = node.tag.rpartition(":")[2]
            raise _at(node, f"not a value of the YAML type {kind}") from error


def _at(node: yaml.Node, message: str) -> _Misplaced:
    return _Misplaced(message, node.start_mark.line + 1, node.start_mark.column + 1)


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise _at(key_node, "a key must be a string")
        if key in seen:
            raise _at(key_node, f"key {key!r} is given twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _text(loader: _StrictLoader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))
    # JSON writes a character beyond U+FFFF as two escapes, which YAML reads as two characters.
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_SCALAR_TAG, _text)


def load(path: Path) -> AuthenticationConfig:
    """Read the file at `path`; every ConfigError names the file and the path of the field."""
    return parse(_text_of(path), source=str(path))


def inspect(path: Path) -> tuple[AuthenticationConfig, list[Problem]]:
    """Read the file at `path`, and return every mistake in it: the very ones of which `load` raises the first.

    An issuer with a mistake is not among those that are returned. Raises ConfigError where the file cannot be read.
    """
    source = str(path)
    config, errors = _parse(_text_of(path), source)
    return config, [
        Problem("authentication", error.message, place=Place(source, error.line, error.column)) for error in errors
    ]


def parse(text: str, *, source: str = "authentication configuration") -> AuthenticationConfig:
    """Parse YAML (or JSON, which is YAML). Raises ConfigError `source: path: what is wrong`."""
    config, errors = _parse(text, source)
    for error in errors:
        place = f"line {error.line}, column {error.column}: " if error.line else ""
        raise ConfigError(f"{source}: {place}{error.message}") from error
    return config


class _Misplaced(ConfigError):
    """A mistake at a place in the file, counted from 1; 0 where it has none."""

    def __init__(self, message: str, line: int = 0, column: int = 0) -> None:
        super().__init__(message)
        self.line = line
        self.column = column


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the authentication configuration cannot be read: {error}") from error


def _parse(text: str, source: str) -> tuple[AuthenticationConfig, list[_Misplaced]]:
    nothing = AuthenticationConfig(())
    if len(text) > MAX_FILE_SIZE:
        return nothing, [_Misplaced(f"larger than {MAX_FILE_SIZE} bytes")]
    try:
        node, document = _read(text)
    except yaml.YAMLError as error:
        return nothing, [_Misplaced("not valid YAML", *_place_in_yaml(error, text))]
    except _Misplaced as error:
        return nothing, [error]
    except RecursionError:
        return nothing, [_Misplaced("nested too deeply")]
    errors = _Errors()
    config = _configuration(document, errors)
    return config, [_Misplaced(error.message, *_place(error, text, node)) for error in errors.found]


def _place_in_yaml(error: yaml.YAMLError, text: str) -> tuple[int, int]:
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        return before.count(chr(10)) + 1, len(before) - before.rfind(chr(10))
    mark = getattr(error, "problem_mark", None)
    return (mark.line + 1, mark.column + 1) if mark is not None else (0, 0)


def _read(text: str) -> tuple[yaml.Node | None, object]:
    """Read the nodes of a document, which know their places, and the document itself."""
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        return node, None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


class _InExpression(_Misplaced):
    """An expression is wrong at a place inside it."""


def _place(error: ConfigError, text: str, root: yaml.Node | None) -> tuple[int, int]:
    """Return where in the file the field stands that an error's message begins with, or the nearest one around it."""
    nodes: dict[str, yaml.Node] = {}
    _collect(root, "", nodes, set())
    path = error.message.partition(": ")[0]
    while path and path not in nodes:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    node = nodes.get(path, root)
    if node is None:
        return 0, 0
    if isinstance(error, _InExpression) and isinstance(node, yaml.ScalarNode):
        return _inside(text, node, error.line, error.column)
    return node.start_mark.line + 1, node.start_mark.column + 1


def _inside(text: str, node: yaml.ScalarNode, line: int, column: int) -> tuple[int, int]:
    """Return the place in the file of a place in a scalar; where that is folded or has escapes, the scalar's
    beginning."""
    start = node.start_mark
    quoted = node.style in ("'", '"')
    raw = text[start.index + quoted : node.end_mark.index - quoted]
    if node.style == "|":
        lines, wanted = text.splitlines(), node.value.splitlines()
        if line <= len(wanted) and start.line + line < len(lines):
            indent = lines[start.line + line].find(wanted[line - 1])
            if indent >= 0:
                return start.line + line + 1, indent + column
    elif raw == node.value and line == 1:
        return start.line + 1, start.column + quoted + column
    return start.line + 1, start.column + 1


def _collect(node: yaml.Node | None, path: str, out: dict[str, yaml.Node], seen: set[int]) -> None:
    """All fields below `node` by their paths. A node that an alias repeats is gone into once."""
    if node is None or id(node) in seen:
        return
    seen.add(id(node))
    if path:
        out[path] = node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _collect(value, f"{path}.{key.value}" if path else str(key.value), out, seen)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _collect(value, f"{path}[{index}]", out, seen)


class _Errors:
    """The mistakes of a document, in the order of the file's parts; what is behind one is read all the same."""

    def __init__(self) -> None:
        self.found: list[ConfigError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keep the ConfigError that the block raises."""
        try:
            yield
        except ConfigError as error:
            self.found.append(error)


def _configuration(document: object, errors: _Errors) -> AuthenticationConfig:
    entries: list[object] = []
    with errors.collect():
        top = _Fields(document, "")
        with errors.collect():
            if top.text("apiVersion") not in API_VERSIONS:
                raise ConfigError(f"apiVersion: must be {API_VERSIONS[0]}")
        with errors.collect():
            if top.text("kind") != KIND:
                raise ConfigError(f"kind: must be {KIND}")
        with errors.collect():
            top.refuse("anonymous", "anonymous access does not exist here; remove it")
        with errors.collect():
            entries = top.items("jwt")
            if not entries:
                raise ConfigError("jwt: at least one issuer is needed")
            if len(entries) > MAX_ISSUERS:
                raise ConfigError(f"jwt: at most {MAX_ISSUERS} issuers")
        top.done(errors)
    issuers = []
    for index, entry in enumerate(entries[:MAX_ISSUERS]):
        with errors.collect():
            issuers.append(_issuer(entry, f"jwt[{index}]", errors))
    with errors.collect():
        _unique([(f"{i.path}.issuer.url", i.url) for i in issuers])
    with errors.collect():
        _unique([(f"{i.path}.issuer.discoveryURL", i.discovery_url) for i in issuers])
    return AuthenticationConfig(tuple(issuers))


def _issuer(document: object, path: str, errors: _Errors) -> IssuerConfig:
    """Read one entry of `jwt[]`; its mistakes are collected, and what is wrong has a value that accepts no token."""
    entry = _Fields(document, path)
    url, discovery, ca_pem = "", "", None
    audiences: tuple[str, ...] = ()
    with errors.collect():
        issuer = entry.fields("issuer")
        with errors.collect():
            url = _https_url(issuer.text("url"), issuer.at("url"))
        with errors.collect():
            discovery = issuer.optional_text("discoveryURL")
            if discovery:
                _https_url(discovery, issuer.at("discoveryURL"))
                if discovery.rstrip("/") == url.rstrip("/"):
                    raise ConfigError(f"{issuer.at('discoveryURL')}: must differ from url")
        with errors.collect():
            issuer.refuse("egressSelectorType", "egress selectors are not carried out here")
        with errors.collect():
            ca_pem = issuer.optional_text("certificateAuthority") or None
            if ca_pem is not None:
                _check_ca(ca_pem, issuer.at("certificateAuthority"))
        with errors.collect():
            audiences = tuple(issuer.texts("audiences"))
            if not audiences:
                raise ConfigError(f"{issuer.at('audiences')}: at least one audience is needed")
            _unique([(f"{issuer.at('audiences')}[{n}]", a) for n, a in enumerate(audiences)])
        with errors.collect():
            match = issuer.optional_text("audienceMatchPolicy")
            if match not in ("", "MatchAny") or (len(audiences) > 1 and not match):
                raise ConfigError(f"{issuer.at('audienceMatchPolicy')}: must be MatchAny with several audiences")
        issuer.done(errors)

    compiled = _Compiled(path)
    rules: tuple[ClaimRule, ...] = ()
    username: PrefixedClaim | None = None
    groups: PrefixedClaim | None = None
    uid_claim = None
    with errors.collect():
        rules = _claim_rules(entry, path, compiled, errors)
    with errors.collect():
        mappings = entry.fields("claimMappings")
        with errors.collect():
            username = _prefixed(mappings.fields("username"), compiled, "username", errors, required=True)
        with errors.collect():
            groups_fields = mappings.optional_fields("groups")
            if groups_fields is not None:
                groups = _prefixed(groups_fields, compiled, "groups", errors, required=False)
        with errors.collect():
            uid_claim = _uid(mappings, compiled, errors)
        with errors.collect():
            _extra(mappings, compiled, errors)
        mappings.done(errors)
    with errors.collect():
        _user_rules(entry, path, compiled, errors)
    entry.done(errors)
    with errors.collect():
        compiled.check_email()
    return IssuerConfig(
        path, url, discovery, ca_pem, audiences, rules, username, groups, uid_claim, compiled.expressions()
    )


def _check_ca(pem: str, path: str) -> None:
    """Raise ConfigError unless OpenSSL, which is to trust it, reads the text as certificates."""
    if "-----BEGIN CERTIFICATE-----" not in pem:
        raise ConfigError(f"{path}: not a PEM certificate")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"{path}: not a PEM certificate") from error


def _uid(mappings: _Fields, compiled: _Compiled, errors: _Errors) -> str | None:
    uid = mappings.optional_fields("uid")
    if uid is None:
        return None
    claim = uid.optional_text("claim") or None
    expression = uid.optional_text("expression")
    uid.done(errors)
    if expression and claim:
        raise ConfigError(f"{mappings.at('uid')}: claim and expression can't both be set")
    if expression:
        compiled.mapping("uid", uid.at("expression"), expression)
    return claim


class _Compiled:
    """The expressions of one issuer while its entry is read."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._mappings: dict[str, Expression] = {}
        self._extra: list[tuple[str, Expression]] = []
        self._claim_rules: list[Rule] = []
        self._user_rules: list[Rule] = []

    def mapping(self, name: str, path: str, source: str) -> None:
        """Take the expression of user name, groups or uid."""
        self._mappings[name] = _compile(path, source, "claims")

    def extra(self, key: str, path: str, source: str) -> None:
        """Take the expression of an extra key."""
        self._extra.append((key, _compile(path, source, "claims")))

    def claim_rule(self, path: str, source: str, message: str) -> None:
        """Take a rule on claims."""
        compiled = _compile(path, source, "claims", rule=True)
        from arcbridge.identity.cel.mapping import Rule

        self._claim_rules.append(Rule(path, compiled, message))

    def user_rule(self, path: str, source: str, message: str) -> None:
        """Take a rule on the user."""
        compiled = _compile(path, source, "user", rule=True)
        from arcbridge.identity.cel.mapping import Rule

        self._user_rules.append(Rule(path, compiled, message))

    def check_email(self) -> None:
        """Refuse a user name that is made of an e-mail address, unless something asks whether it was verified."""
        username = self._mappings.get("username")
        if username is None or not username.selects("email"):
            return
        asking = [username, *(extra for _, extra in self._extra), *(rule.expression for rule in self._claim_rules)]
        if not any(expression.selects("email_verified") for expression in asking):
            raise ConfigError(
                f"{self._path}.claimMappings.username.expression: claims.email_verified must be used here, in "
                "extra[*].valueExpression or in claimValidationRules[*].expression when claims.email is used"
            )

    def expressions(self) -> Expressions | None:
        """Return all of them; None where there is none."""
        if not (self._mappings or self._extra or self._claim_rules or self._user_rules):
            return None
        from arcbridge.identity.cel.mapping import Expressions

        return Expressions(
            self._path,
            self._mappings.get("username"),
            self._mappings.get("groups"),
            self._mappings.get("uid"),
            tuple(self._extra),
            tuple(self._claim_rules),
            tuple(self._user_rules),
        )


def _compile(path: str, source: str, variable: str, *, rule: bool = False) -> Expression:
    try:
        from arcbridge.identity.cel.compiler import ExpressionError, compile_claims, compile_user
    except ImportError as error:
        raise ConfigError(
            f"{path}: CEL expressions need the package cel-expr-python: pip install 'arcbridge[cel]'"
        ) from error
    try:
        return compile_user(source) if variable == "user" else compile_claims(source, rule=rule)
    except ExpressionError as error:
        message = f"{path}: {error.message}"
        if error.line:
            raise _InExpression(message, error.line, error.column) from error
        raise ConfigError(message) from error


def _claim_rules(entry: _Fields, path: str, compiled: _Compiled, errors: _Errors) -> tuple[ClaimRule, ...]:
    rules: list[ClaimRule] = []
    seen: set[tuple[str, str]] = set()
    for n, item in enumerate(entry.items("claimValidationRules")):
        with errors.collect():
            rule = _Fields(item, f"{path}.claimValidationRules[{n}]")
            claim, expression = rule.optional_text("claim"), rule.optional_text("expression")
            required, message = rule.optional_text("requiredValue"), rule.optional_text("message")
            rule.done(errors)
            if bool(claim) == bool(expression):
                raise ConfigError(f"{rule.at('claim')}: needs either claim or expression")
            given = ("claim", claim) if claim else ("expression", expression)
            if given in seen:
                raise ConfigError(f"{rule.at(given[0])}: is given twice")
            seen.add(given)
            if claim:
                if message:
                    raise ConfigError(f"{rule.at('message')}: belongs to expression, not to claim")
                rules.append(ClaimRule(claim, required))
                continue
            if required:
                raise ConfigError(f"{rule.at('requiredValue')}: belongs to claim, not to expression")
            compiled.claim_rule(rule.at("expression"), expression, message)
    return tuple(rules)


def _user_rules(entry: _Fields, path: str, compiled: _Compiled, errors: _Errors) -> None:
    seen: set[str] = set()
    for n, item in enumerate(entry.items("userValidationRules")):
        with errors.collect():
            rule = _Fields(item, f"{path}.userValidationRules[{n}]")
            expression, message = rule.text("expression"), rule.optional_text("message")
            rule.done(errors)
            if expression in seen:
                raise ConfigError(f"{rule.at('expression')}: is given twice")
            seen.add(expression)
            if expression not in BUILT_IN_RULES:
                compiled.user_rule(rule.at("expression"), expression, message)


_EXTRA_KEY = re.compile(r"([^/]*)/([A-Za-z0-9/\-._~%!$&'()*+,;=:]+)")
_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_RESERVED_DOMAINS = ("kubernetes.io", "k8s.io")
OWN_EXTRA = "arcbridge.io/original-user"
"""The extra key that the agent sets itself, for the API server's audit log."""


def _extra(mappings: _Fields, compiled: _Compiled, errors: _Errors) -> None:
    seen: set[str] = set()
    for n, item in enumerate(mappings.items("extra")):
        with errors.collect():
            extra = _Fields(item, f"{mappings.at('extra')}[{n}]")
            key, expression = extra.text("key"), extra.text("valueExpression")
            extra.done(errors)
            _check_extra_key(key, extra.at("key"), seen)
            seen.add(key)
            compiled.extra(key, extra.at("valueExpression"), expression)


def _check_extra_key(key: str, at: str, seen: set[str]) -> None:
    if key != key.lower():
        raise ConfigError(f"{at}: must be lowercase")
    match = _EXTRA_KEY.fullmatch(key)
    if match is None or not _DOMAIN.fullmatch(match[1]) or len(match[1]) > 253:
        raise ConfigError(f"{at}: must be a domain-prefixed path (such as example.org/foo)")
    if any(match[1] == domain or match[1].endswith(f".{domain}") for domain in _RESERVED_DOMAINS):
        raise ConfigError(f"{at}: k8s.io, kubernetes.io and their subdomains are reserved for Kubernetes use")
    if key == OWN_EXTRA:
        raise ConfigError(f"{at}: is set by the agent itself")
    if key in seen:
        raise ConfigError(f"{at}: is given twice")


def _prefixed(
    fields: _Fields, compiled: _Compiled, name: str, errors: _Errors, *, required: bool
) -> PrefixedClaim | None:
    claim, expression = fields.optional_text("claim"), fields.optional_text("expression")
    has_prefix = fields.has("prefix")
    prefix = fields.optional_text("prefix")
    fields.done(errors)
    if claim and expression:
        raise ConfigError(f"{fields.path}: claim and expression can't both be set")
    if expression:
        if has_prefix:
            raise ConfigError(f"{fields.at('prefix')}: belongs to claim, not to expression")
        compiled.mapping(name, fields.at("expression"), expression)
        return None
    if not claim:
        if required:
            raise ConfigError(f"{fields.path}: needs claim or expression")
        return None
    if not has_prefix:
        raise ConfigError(f'{fields.at("prefix")}: must be given beside claim (it may be "")')
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
    if re.search(r"%(?![0-9A-Fa-f]{2})", url):
        raise ConfigError(f"{path}: % must be followed by two hexadecimal digits")
    if re.search(r"[%\\^`{|}]", parts.netloc):
        raise ConfigError(f"{path}: the host has a character that no host has")
    if "[" in parts.netloc and not re.fullmatch(r"\[[0-9a-fA-F:.]+\](:[0-9]*)?", parts.netloc):
        raise ConfigError(f"{path}: in brackets stands an IPv6 address, and behind them nothing but a port")
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
    """The fields of one mapping; each is taken once, and `done` finds those that were not taken to be mistakes."""

    __slots__ = ("_left", "path")

    def __init__(self, document: object, path: str) -> None:
        if not isinstance(document, Mapping):
            raise ConfigError(f"{path or 'document'}: must be a mapping")
        self.path = path
        self._left: dict[str, object] = {str(key): value for key, value in document.items()}

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name

    def has(self, name: str) -> bool:
        return self._left.get(name) is not None

    def refuse(self, name: str, why: str) -> None:
        if name in self._left:
            del self._left[name]
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

    def done(self, errors: _Errors) -> None:
        errors.found += [ConfigError(f"{self.at(name)}: unknown field") for name in self._left]
