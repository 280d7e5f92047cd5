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
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml

from arcbridge.errors import ConfigError
from arcbridge.settings.problems import Place, Problem
from arcbridge.shallow_yaml import ShallowScanner

if TYPE_CHECKING:
    from arcbridge.identity.cel.compiler import Expression
    from arcbridge.identity.cel.mapping import Expressions

API_VERSIONS = ("apiserver.config.k8s.io/v1", "apiserver.config.k8s.io/v1beta1")
"""v1beta1 differs from v1 in no field that is carried out here; files from before 1.34 have it."""
KIND = "AuthenticationConfiguration"

MAX_ISSUERS = 64
"""kube-apiserver's own bound."""
MAX_FILE_SIZE = 1 << 20

BUILT_IN_RULES = frozenset(
    {"!user.username.startsWith('system:')", "user.groups.all(group, !group.startsWith('system:'))"}
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
        """Return the issuer whose url is exactly `url`, else None."""
        return next((issuer for issuer in self.issuers if issuer.url == url), None)


class _StrictLoader(ShallowScanner, yaml.SafeLoader):
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
    errors: list[_Misplaced] = []
    config = _configuration(document, errors)
    nodes: dict[str, yaml.Node] = {}
    if errors:
        _collect(node, "", nodes, set())
    return config, [_Misplaced(error.message, *_place(error, text, node, nodes)) for error in errors]


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


def _place(error: _Misplaced, text: str, root: yaml.Node | None, nodes: dict[str, yaml.Node]) -> tuple[int, int]:
    """Return where in the file the field stands that an error's message begins with, or the nearest one around it.

    `nodes`: those of all fields, by their paths."""
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


def _configuration(document: object, errors: list[_Misplaced]) -> AuthenticationConfig:
    """Read a document. Its mistakes are added in the order of its parts; what is behind one is read all the same."""
    entries: list[object] = []
    if (top := _fields(document, "", errors)) is not None:
        top.choice("apiVersion", API_VERSIONS)
        top.choice("kind", (KIND,))
        top.refuse("anonymous", "anonymous access does not exist here; remove it")
        entries = top.items("jwt", least="at least one issuer is needed")
        if len(entries) > MAX_ISSUERS:
            top.wrong("jwt", f"at most {MAX_ISSUERS} issuers")
        top.done()
    read = [_issuer(entry, f"jwt[{index}]", errors) for index, entry in enumerate(entries[:MAX_ISSUERS])]
    issuers = tuple(issuer for issuer in read if issuer is not None)
    _unique([(f"{i.path}.issuer.url", i.url) for i in issuers], errors)
    _unique([(f"{i.path}.issuer.discoveryURL", i.discovery_url) for i in issuers], errors)
    return AuthenticationConfig(issuers)


def _issuer(document: object, path: str, errors: list[_Misplaced]) -> IssuerConfig | None:
    """Read one entry of `jwt[]`; what is wrong has a value that accepts no token."""
    entry = _fields(document, path, errors)
    if entry is None:
        return None
    url, discovery, ca_pem, audiences = "", "", None, tuple[str, ...]()
    if (issuer := entry.fields("issuer")) is not None:
        url = issuer.https_url("url", required=True)
        discovery = issuer.https_url("discoveryURL")
        if discovery and discovery.rstrip("/") == url.rstrip("/"):
            issuer.wrong("discoveryURL", "must differ from url")
        issuer.refuse("egressSelectorType", "egress selectors are not carried out here")
        ca_pem = issuer.text("certificateAuthority") or None
        if ca_pem is not None and not is_ca(ca_pem):
            issuer.wrong("certificateAuthority", "not a PEM certificate")
        audiences = issuer.audiences()
        issuer.done()

    compiled = _Compiled(path, errors)
    rules = _claim_rules(entry, compiled)
    username = groups = uid_claim = None
    if (mappings := entry.fields("claimMappings")) is not None:
        username = _prefixed(mappings.fields("username"), compiled, "username", required=True)
        groups = _prefixed(mappings.fields("groups", required=False), compiled, "groups", required=False)
        uid_claim = _uid(mappings, compiled)
        _extra(mappings, compiled)
        mappings.done()
    _user_rules(entry, compiled)
    entry.done()
    compiled.check_email()
    return IssuerConfig(
        path, url, discovery, ca_pem, audiences, rules, username, groups, uid_claim, compiled.expressions()
    )


def is_ca(pem: str) -> bool:
    """Return whether OpenSSL, which is to trust it, reads the text as certificates."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError):
        return False
    return "-----BEGIN CERTIFICATE-----" in pem


def _uid(mappings: _Fields, compiled: _Compiled) -> str | None:
    uid = mappings.fields("uid", required=False)
    if uid is None:
        return None
    claim, expression = uid.text("claim") or None, uid.text("expression")
    uid.done()
    if expression and claim:
        mappings.wrong("uid", "claim and expression can't both be set")
    elif expression:
        compiled.mapping("uid", uid, expression)
    return claim


class _Compiled:
    """The expressions of one issuer while its entry is read."""

    def __init__(self, path: str, errors: list[_Misplaced]) -> None:
        self._path = path
        self._errors = errors
        self._mappings: dict[str, Expression] = {}
        self._extra: list[tuple[str, Expression]] = []
        self._claim_rules: list[tuple[str, Expression, str]] = []
        self._user_rules: list[tuple[str, Expression, str]] = []

    def mapping(self, name: str, fields: _Fields, source: str) -> None:
        """Take the expression of user name, groups or uid."""
        if compiled := self._compile(fields.at("expression"), source):
            self._mappings[name] = compiled

    def extra(self, key: str, path: str, source: str) -> None:
        """Take the expression of an extra key."""
        if compiled := self._compile(path, source):
            self._extra.append((key, compiled))

    def rule(self, fields: _Fields, source: str, message: str, *, on_user: bool) -> None:
        """Take a rule on claims, or on the user."""
        path = fields.at("expression")
        if compiled := self._compile(path, source, on_user=on_user, rule=True):
            (self._user_rules if on_user else self._claim_rules).append((path, compiled, message))

    def _compile(self, path: str, source: str, *, on_user: bool = False, rule: bool = False) -> Expression | None:
        try:
            from arcbridge.identity.cel.compiler import ExpressionError, compile_claims, compile_user
        except ImportError:
            message = f"{path}: CEL expressions need the package cel-expr-python: pip install 'arcbridge[cel]'"
            self._errors.append(_Misplaced(message))
            return None
        try:
            return compile_user(source) if on_user else compile_claims(source, rule=rule)
        except ExpressionError as error:
            kind = _InExpression if error.line else _Misplaced
            self._errors.append(kind(f"{path}: {error.message}", error.line, error.column))
            return None

    def check_email(self) -> None:
        """Refuse a user name that is made of an e-mail address, unless something asks whether it was verified."""
        username = self._mappings.get("username")
        if username is None or not username.selects("email"):
            return
        asking = [username, *(extra for _, extra in self._extra), *(rule for _, rule, _ in self._claim_rules)]
        if not any(expression.selects("email_verified") for expression in asking):
            message = (
                f"{self._path}.claimMappings.username.expression: claims.email_verified must be used here, in "
                "extra[*].valueExpression or in claimValidationRules[*].expression when claims.email is used"
            )
            self._errors.append(_Misplaced(message))

    def expressions(self) -> Expressions | None:
        """Return all of them; None where there is none."""
        if not (self._mappings or self._extra or self._claim_rules or self._user_rules):
            return None
        from arcbridge.identity.cel.mapping import ExpressionRule, Expressions

        claim_rules, user_rules = (
            tuple(ExpressionRule(*rule) for rule in rules) for rules in (self._claim_rules, self._user_rules)
        )
        return Expressions(self._path, self._mappings, tuple(self._extra), claim_rules, user_rules)


def _claim_rules(entry: _Fields, compiled: _Compiled) -> tuple[ClaimRule, ...]:
    rules: list[ClaimRule] = []
    seen: set[tuple[str, str]] = set()
    for rule in entry.each("claimValidationRules"):
        claim, expression, required, message = map(rule.text, ("claim", "expression", "requiredValue", "message"))
        rule.done()
        name, value = ("claim", claim) if claim else ("expression", expression)
        if bool(claim) == bool(expression):
            rule.wrong("claim", "needs either claim or expression")
        elif (name, value) in seen:
            rule.wrong(name, "is given twice")
        elif claim and message:
            rule.wrong("message", "belongs to expression, not to claim")
        elif expression and required:
            rule.wrong("requiredValue", "belongs to claim, not to expression")
        elif claim:
            rules.append(ClaimRule(claim, required))
        else:
            compiled.rule(rule, expression, message, on_user=False)
        seen.add((name, value))
    return tuple(rules)


def _user_rules(entry: _Fields, compiled: _Compiled) -> None:
    seen: set[str] = set()
    for rule in entry.each("userValidationRules"):
        expression, message = rule.required_text("expression"), rule.text("message")
        rule.done()
        if expression in seen:
            rule.wrong("expression", "is given twice")
        elif expression and expression not in BUILT_IN_RULES:
            compiled.rule(rule, expression, message, on_user=True)
        if expression:
            seen.add(expression)


_EXTRA_KEY = re.compile(r"([^/]*)/([A-Za-z0-9/\-._~%!$&'()*+,;=:]+)")
_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_RESERVED_DOMAINS = ("kubernetes.io", "k8s.io")
ORIGINAL_USER = "arcbridge.io/original-user"
"""Extra key under which the API server's audit log shows who is behind a `--as`."""
RESTRICTED = "arcbridge.io/restricted"
"""Extra key under which it shows what a session gave up of its user's rights."""
ACTOR = "arcbridge.io/actor"
"""Extra key under which it shows which program acts for the user; policies of the cluster may ask for it."""
ELEVATED = "arcbridge.io/elevated"
"""Extra key under which it shows by which grants groups are lent to the user (`agent.elevation`)."""
OWN_EXTRAS = frozenset((ACTOR, ORIGINAL_USER, RESTRICTED, ELEVATED))
"""The extra keys that the agent sets itself."""


def _extra(mappings: _Fields, compiled: _Compiled) -> None:
    seen: set[str] = set()
    for extra in mappings.each("extra"):
        key, expression = extra.required_text("key"), extra.required_text("valueExpression")
        extra.done()
        wrong = "is given twice" if key in seen else _wrong_with_extra_key(key)
        if key and wrong:
            extra.wrong("key", wrong)
        elif key and expression:
            seen.add(key)
            compiled.extra(key, extra.at("valueExpression"), expression)


def _wrong_with_extra_key(key: str) -> str:
    """Return why an extra key is refused; empty where it is not."""
    match = _EXTRA_KEY.fullmatch(key)
    if key != key.lower():
        return "must be lowercase"
    if match is None or not _DOMAIN.fullmatch(match[1]) or len(match[1]) > 253:
        return "must be a domain-prefixed path (such as example.org/foo)"
    if any(match[1] == domain or match[1].endswith(f".{domain}") for domain in _RESERVED_DOMAINS):
        return "k8s.io, kubernetes.io and their subdomains are reserved for Kubernetes use"
    return "is set by the agent itself" if key in OWN_EXTRAS else ""


def _prefixed(fields: _Fields | None, compiled: _Compiled, name: str, *, required: bool) -> PrefixedClaim | None:
    if fields is None:
        return None
    claim, expression = fields.text("claim"), fields.text("expression")
    has_prefix = fields.has("prefix")
    prefix = fields.text("prefix")
    fields.done()
    if claim and expression:
        fields.wrong("", "claim and expression can't both be set")
    elif expression and has_prefix:
        fields.wrong("prefix", "belongs to claim, not to expression")
    elif expression:
        compiled.mapping(name, fields, expression)
    elif required and not claim:
        fields.wrong("", "needs claim or expression")
    elif claim and not has_prefix:
        fields.wrong("prefix", 'must be given beside claim (it may be "")')
    elif claim:
        return PrefixedClaim(claim, prefix)
    return None


def wrong_with_url(url: str) -> str:
    """Return why a URL is no issuer's; empty where it may be one."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "not a URL"
    if parts.scheme != "https" or not host:
        return "must be an https URL"
    if "@" in parts.netloc or "?" in url or "#" in url:
        return "must have no user information, query or fragment"
    if re.search(r"[\x00-\x20\x7f]", url):
        return "must have no blanks or control characters"
    if re.search(r"%(?![0-9A-Fa-f]{2})", url):
        return "% must be followed by two hexadecimal digits"
    if re.search(r"[%\\^`{|}]", parts.netloc):
        return "the host has a character that no host has"
    if "[" in parts.netloc and not re.fullmatch(r"\[[0-9a-fA-F:.]+\](:[0-9]*)?", parts.netloc):
        return "in brackets stands an IPv6 address, and behind them nothing but a port"
    return ""


def _unique(values: list[tuple[str, str]], errors: list[_Misplaced]) -> None:
    seen: set[str] = set()
    for path, value in values:
        if value in seen:
            errors.append(_Misplaced(f"{path}: is given twice"))
        if value:
            seen.add(value)


def _fields(document: object, path: str, errors: list[_Misplaced]) -> _Fields | None:
    """Return the fields of a mapping; None, with a mistake more, where it is none."""
    if isinstance(document, Mapping):
        return _Fields(document, path, errors)
    errors.append(_Misplaced(f"{path or 'document'}: must be a mapping"))
    return None


class _Fields:
    """The fields of one mapping; each is taken once, and `done` finds those that were not taken to be mistakes.

    What is wrong is added to the mistakes, and the value that is returned for it is an empty one.
    """

    __slots__ = ("_errors", "_left", "path")

    def __init__(self, document: Mapping[object, object], path: str, errors: list[_Misplaced]) -> None:
        self.path = path
        self._left: dict[str, object] = {str(key): value for key, value in document.items()}
        self._errors = errors

    def at(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path and name else self.path or name

    def wrong(self, name: str, why: str) -> None:
        """Add a mistake in a field; an empty name: in the mapping itself."""
        self._errors.append(_Misplaced(f"{self.at(name)}: {why}"))

    def has(self, name: str) -> bool:
        return self._left.get(name) is not None

    def refuse(self, name: str, why: str) -> None:
        if name in self._left:
            del self._left[name]
            self.wrong(name, why)

    def text(self, name: str, *, required: bool = False) -> str:
        value = self._left.pop(name, None)
        if value is None or value == "":
            if required:
                self.wrong(name, "missing")
            return ""
        if not isinstance(value, str):
            self.wrong(name, "must be a string")
            return ""
        return value

    def required_text(self, name: str) -> str:
        return self.text(name, required=True)

    def choice(self, name: str, values: tuple[str, ...]) -> None:
        value = self.required_text(name)
        if value and value not in values:
            self.wrong(name, f"must be {values[0]}")

    def https_url(self, name: str, *, required: bool = False) -> str:
        url = self.text(name, required=required)
        why = wrong_with_url(url) if url else ""
        if why:
            self.wrong(name, why)
        return "" if why else url

    def items(self, name: str, *, least: str = "") -> list[object]:
        """Return the items of a list. `least`: what is wrong where there are none."""
        value = self._left.pop(name, None)
        if value is not None and not isinstance(value, list):
            self.wrong(name, "must be a list")
            return []
        if not value and least:
            self.wrong(name, least)
        return value or []

    def audiences(self) -> tuple[str, ...]:
        found = self.items("audiences", least="at least one audience is needed")
        texts = [(self.at(f"audiences[{n}]"), one) for n, one in enumerate(found) if isinstance(one, str) and one]
        for n, one in enumerate(found):
            if not isinstance(one, str) or not one:
                self.wrong(f"audiences[{n}]", "must be a string that is not empty")
        _unique(texts, self._errors)
        match = self.text("audienceMatchPolicy")
        if match not in ("", "MatchAny") or (len(found) > 1 and not match):
            self.wrong("audienceMatchPolicy", "must be MatchAny with several audiences")
        return tuple(text for _, text in texts)

    def fields(self, name: str, *, required: bool = True) -> _Fields | None:
        value = self._left.pop(name, None)
        if value is not None:
            return _fields(value, self.at(name), self._errors)
        if required:
            self.wrong(name, "missing")
        return None

    def each(self, name: str) -> Iterator[_Fields]:
        """Yield the mappings of a list."""
        for n, item in enumerate(self.items(name)):
            if (found := _fields(item, self.at(f"{name}[{n}]"), self._errors)) is not None:
                yield found

    def done(self) -> None:
        for name in self._left:
            self.wrong(name, "unknown field")
