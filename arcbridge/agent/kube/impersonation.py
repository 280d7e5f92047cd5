"""Builds the headers that go to the API server: without the caller's that could say who asks, with the agent's.

What Kubernetes does ("User impersonation"): a request that the agent's credential authenticates, with
`Impersonate-User`, `-Uid`, `-Group`, `-Extra-*`, runs as that user. **Without any of them it runs as the agent.** So
the worst failure is not a header that gets in but the agent's own that gets lost: CVE-2021-31999 named
`Impersonate-User` in `Connection`, and a proxy that removed hop-by-hop headers last removed its own.

Hence the order, which is the point of this file:

1. what the caller asked for with `--as` is read from *all* headers, whatever `Connection` says of them;
2. hop-by-hop headers go (RFC 9110 §7.6.1), and whatever `Connection` names;
3. every header goes that could say who asks: `Impersonate-*`, `Authorization`, `X-Remote-*`, forwarding headers;
4. the agent's are added, last;
5. the result is checked against what was meant, header by header, and refused if it differs.

Names with `_` are refused outright: some servers read them as `-`. Values must be UTF-8 without control characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import quote, unquote

from arcbridge.agent.kube.request_facts import RequestFacts
from arcbridge.agent.kube.status import RequestRefusal, bad_request
from arcbridge.http_fields import HOP_BY_HOP
from arcbridge.identity.authentication import ACTOR, OWN_EXTRAS, RESTRICTED
from arcbridge.identity.claims import Identity

Headers = list[tuple[str, str]]

REBUILT = frozenset({"host", "content-length", "expect"})
"""Written anew: where the request goes and how its body is framed."""
_IDENTITY_PREFIXES = ("impersonate-", "x-remote-", "x-forwarded-", "x-original-", "proxy-")
_IDENTITY_HEADERS = frozenset(
    {
        "authorization",
        "audit-id",
        # Where a request comes from: the API server's audit log believes these (`sourceIPs`), or a proxy before it may.
        "forwarded",
        "x-forwarded",
        "x-real-ip",
        "x-client-ip",
        "x-cluster-client-ip",
        "x-envoy-external-address",
        "true-client-ip",
        "cf-connecting-ip",
        "fastly-client-ip",
        "via",
    }
)
_DROPPED = _IDENTITY_HEADERS | HOP_BY_HOP | REBUILT

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_EXTRA_SAFE = "!#$&'*+-.^`|~"
"""What stays unescaped in an extra key: token characters but `%`."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Whom a request runs as: exactly what the impersonation headers say, no more."""

    user: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: tuple[tuple[str, str], ...] = ()
    """(key, value) pairs, a key may repeat; keys are lower-case and not yet escaped."""

    @classmethod
    def of(
        cls, identity: Identity, impersonable: frozenset[str] | None = None, restricted: tuple[str, ...] = ()
    ) -> Subject:
        """Return the subject of a mapped identity, with those of its groups that the agent may impersonate (None:
        all), what its session gave up, and who acts for it."""
        extra = tuple((key.lower(), value) for key, values in identity.extra.items() for value in values)
        extra += tuple((RESTRICTED, word) for word in restricted)
        extra += ((ACTOR, identity.actor),) if identity.actor else ()
        groups = tuple(group for group in identity.groups if impersonable is None or group in impersonable)
        return cls(identity.username, identity.uid, groups, extra)


def requested_subject(asks: Sequence[tuple[str, str]]) -> Subject | None:
    """Return whom `--as`, `--as-group`, `--as-uid` and `--as-user-extra` ask for (`RequestFacts.impersonation`); None
    when none of them is given.

    Refuses what is incomplete or unknown: acting as the caller where another user was asked for is never right.
    """
    users: list[str] = []
    uids: list[str] = []
    groups: list[str] = []
    extra: list[tuple[str, str]] = []
    for name, value in asks:
        if not value and not name.startswith("impersonate-extra-"):
            raise bad_request("an impersonation header is empty")
        if name == "impersonate-user":
            users.append(value)
        elif name == "impersonate-uid":
            uids.append(value)
        elif name == "impersonate-group":
            groups.append(value)
        elif name.startswith("impersonate-extra-") and len(name) > len("impersonate-extra-"):
            key = _extra_key(name.removeprefix("impersonate-extra-"))
            if key in OWN_EXTRAS:
                raise bad_request(f"the impersonation extra {key} is set by the agent itself")
            extra.append((key, value))
        else:
            raise bad_request("an impersonation header is not known here")
    if not asks:
        return None
    if len(users) != 1:
        raise bad_request("impersonation (--as) needs exactly one user")
    if len(uids) > 1:
        raise bad_request("impersonation (--as-uid) takes one uid")
    return Subject(users[0], uids[0] if uids else "", tuple(groups), tuple(extra))


def impersonated_headers(cleaned: Headers, subject: Subject, *, authorization: str = "") -> Headers:
    """Build the headers of a request that runs as `subject`, from the caller's that go on (`cleaned_headers`).

    `authorization` is the agent's own (empty where it has a client certificate). Raises RequestRefusal, 400 for the
    caller's mistakes, 500 where the result is not what was meant.
    """
    headers = list(cleaned)
    if authorization:
        headers.append(("Authorization", authorization))
    headers.append(("Impersonate-User", subject.user))
    if subject.uid:
        headers.append(("Impersonate-Uid", subject.uid))
    headers.extend(("Impersonate-Group", group) for group in subject.groups)
    headers.extend((f"Impersonate-Extra-{_escaped(key)}", value) for key, value in subject.extra)
    check_impersonated(headers, subject)
    return headers


def own_token_headers(facts: RequestFacts) -> Headers:
    """Build the headers of a request in token mode: the caller's own `Authorization` and `--as` go on unchanged.

    A request without exactly one bearer token is 401: the agent's own is never a substitute.
    """
    token = bearer_token(facts)
    headers = cleaned_headers(facts, keep_authorization=True)
    sent = [value.encode().partition(b" ")[2].strip(b" ") for name, value in headers if name.lower() == "authorization"]
    if sent != [token]:
        raise RequestRefusal(500, "the request's own token was lost on the way")
    return headers


def bearer_token(facts: RequestFacts) -> bytes:
    """Return the one bearer token of a request in token mode. Raises RequestRefusal 401."""
    tokens = facts.values.get(b"authorization", ())
    found = re.fullmatch(rb"(?i:bearer) +([^\s]+)", tokens[0].strip(b" \t")) if len(tokens) == 1 else None
    if found is None:
        raise RequestRefusal(401, "this session carries service-account tokens, and the request has none")
    return found[1]


def check_impersonated(headers: Iterable[tuple[str, str]], subject: Subject) -> None:
    """Refuse (500) unless `headers` impersonate exactly `subject`; the last line before the request leaves."""
    users: list[str] = []
    uids: list[str] = []
    groups: list[str] = []
    extra: list[tuple[str, str]] = []
    for name, value in headers:
        lower = name.lower()
        if _CONTROL.search(value) or value != value.strip(" \t") or "_" in name:
            raise RequestRefusal(500, "a header of the outgoing request is malformed; nothing was sent")
        if lower == "impersonate-user":
            users.append(value)
        elif lower == "impersonate-uid":
            uids.append(value)
        elif lower == "impersonate-group":
            groups.append(value)
        elif lower.startswith("impersonate-extra-"):
            extra.append((unquote(lower.removeprefix("impersonate-extra-")), value))
        elif lower.startswith("impersonate"):
            raise RequestRefusal(500, "the outgoing request has an unknown impersonation header; nothing was sent")
    found = Subject(users[0] if len(users) == 1 else "", "".join(uids), tuple(groups), tuple(extra))
    if not subject.user or len(uids) > 1 or found != subject:
        raise RequestRefusal(500, "the outgoing request does not carry the caller's identity; nothing was sent")


def cleaned_headers(facts: RequestFacts, *, keep_authorization: bool = False) -> Headers:
    """Return the caller's headers that go on: steps 2 and 3. Raises RequestRefusal for malformed ones."""
    if facts.misnamed is not None:
        raise facts.misnamed
    named = facts.options
    out: Headers = []
    for name, lower, value in facts.fields:
        if keep_authorization and (lower == "authorization" or lower.startswith("impersonate-")):
            # Even where Connection names them: without its Impersonate-User the request would run as the caller.
            out.append((name, value))
        elif lower not in named and not is_dropped(lower):
            out.append((name, value))
    return out


def passed_lines(facts: RequestFacts) -> bytes:
    """Return the lines of the caller's headers that go on, which say nothing of who asks. Raises RequestRefusal."""
    lines = header_lines(cleaned_headers(facts))
    if b"\r\nimpersonate" in b"\r\n" + lines.lower():
        raise RequestRefusal(500, "the outgoing request has an unknown impersonation header; nothing was sent")
    return lines


def is_dropped(lower: str) -> bool:
    """Return whether a header of this lower-case name never goes on: steps 2 and 3."""
    return lower in _DROPPED or lower.startswith(_IDENTITY_PREFIXES)


def header_lines(headers: Headers) -> bytes:
    """Return the lines of checked headers, and once more in the bytes that will be sent: one line each, and no
    other. Raises RequestRefusal (500)."""
    text = "".join([f"{name}: {value}\r\n" for name, value in headers])
    lines = text.split("\r\n")
    if lines.pop() or [tuple(line.split(": ", 1)) for line in lines] != headers or "\x00" in text:
        raise RequestRefusal(500, "a header of the outgoing request is malformed; nothing was sent")
    return text.encode()


def _escaped(key: str) -> str:
    """Return an extra key as part of a header name; `_` is escaped too, because names with `_` are refused."""
    return quote(key, safe=_EXTRA_SAFE).replace("_", "%5F")


def _extra_key(escaped: str) -> str:
    """Return the key in a header name: percent-encoded, compared in lower case (Kubernetes, "User impersonation")."""
    if re.search(r"%(?![0-9a-f]{2})", escaped):
        raise bad_request("an impersonation extra key is not percent-encoded properly")
    try:
        key = unquote(escaped, errors="strict").lower()
    except UnicodeDecodeError as error:
        raise bad_request("an impersonation extra key is not UTF-8") from error
    if _CONTROL.search(key) or not key.strip():
        raise bad_request("an impersonation extra key contains control characters")
    return key
