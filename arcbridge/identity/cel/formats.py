"""Kubernetes' library of named formats: `format.dns1123Label().validate(claims.sub)` is none where the name is valid.

What is wrong with a name is said in words of ours, which an expression can only hand on; that something is wrong is
decided as Kubernetes decides it.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import re
from collections.abc import Callable
from dataclasses import dataclass

from arcbridge.identity.cel.addresses import is_url
from arcbridge.identity.cel.values import NONE, Opaque, Optional, StringList

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_DNS_LABEL = re.compile(_LABEL)
_DNS_SUBDOMAIN = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_NAME = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_UUID = re.compile(r"(?i)[0-9a-f]{8}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{4}-?[0-9a-f]{12}")
_BASE64 = re.compile(
    r"(?:[A-Za-z0-9+/]{4})+(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?|[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}="
)
_TIME = re.compile(r"([0-9]{2}):([0-9]{2}):([0-9]{2})(.[0-9]+)?(z|([+-][0-9]{2}:[0-9]{2}))")


@dataclass(frozen=True, slots=True)
class Format(Opaque):
    """A named format; `pattern_size`: the length of its pattern, from which the cost of a check is computed."""

    name: str
    pattern_size: int
    valid: Callable[[str], bool]

    type_name = "kubernetes.NamedFormat"


def _dns(pattern: re.Pattern[str], most: int, prefix: bool) -> Callable[[str], bool]:
    def valid(name: str) -> bool:
        # A prefix may end with a dash, because something follows.
        checked = name[:-1] + "a" if prefix and len(name) > 1 and name.endswith("-") else name
        return len(checked.encode("utf-8", "replace")) <= most and pattern.fullmatch(checked) is not None

    return valid


def _label_value(name: str) -> bool:
    return len(name.encode("utf-8", "replace")) <= 63 and (not name or _NAME.fullmatch(name) is not None)


def is_subdomain(name: str) -> bool:
    """Return whether `name` is a domain as Kubernetes writes one (RFC 1123, lower case)."""
    return _dns(_DNS_SUBDOMAIN, 253, False)(name)


def _qualified_name(name: str) -> bool:
    prefix, slash, rest = name.rpartition("/")
    if slash and (not prefix or not is_subdomain(prefix)):
        return False
    return bool(rest) and _label_value(rest)


def _is_date(name: str) -> bool:
    if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", name):
        return False
    try:
        datetime.date.fromisoformat(name)
    except ValueError:
        return name.startswith("0000")
    return True


def _is_datetime(name: str) -> bool:
    date, separator, rest = name.lower().partition("t")
    match = _TIME.fullmatch(rest.split("t")[0]) if separator else None
    return match is not None and _is_date(date) and match[1] <= "23" and match[2] <= "59" and match[3] <= "59"


def _is_base64(name: str) -> bool:
    if not _BASE64.fullmatch(name):
        return False
    try:
        base64.b64decode(name, validate=True)
    except binascii.Error:
        return False
    return True


FORMATS: dict[str, Format] = {
    "dns1123Label": Format("DNS1123Label", 30, _dns(_DNS_LABEL, 63, False)),
    "dns1123Subdomain": Format("DNS1123Subdomain", 60, _dns(_DNS_SUBDOMAIN, 253, False)),
    "dns1035Label": Format("DNS1035Label", 30, _dns(_DNS_1035, 63, False)),
    "qualifiedName": Format("QualifiedName", 60, _qualified_name),
    "dns1123LabelPrefix": Format("DNS1123LabelPrefix", 30, _dns(_DNS_LABEL, 63, True)),
    "dns1123SubdomainPrefix": Format("DNS1123SubdomainPrefix", 60, _dns(_DNS_SUBDOMAIN, 253, True)),
    "dns1035LabelPrefix": Format("DNS1035LabelPrefix", 30, _dns(_DNS_1035, 63, True)),
    "labelValue": Format("LabelValue", 40, _label_value),
    "uri": Format("URI", 1103, is_url),
    "uuid": Format("uuid", 78, lambda name: _UUID.fullmatch(name) is not None),
    "byte": Format("byte", 84, _is_base64),
    "date": Format("date", 81, _is_date),
    "datetime": Format("datetime", 81, _is_datetime),
}


def named(name: str) -> Optional:
    """`format.named`."""
    found = FORMATS.get(name)
    return NONE if found is None else Optional(found)


def validate(form: Format, name: str) -> Optional:
    """`validate`: none, or a list of what is wrong."""
    return NONE if form.valid(name) else Optional(StringList([f"does not have the format {form.name}"]))
