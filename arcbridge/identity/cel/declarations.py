"""What Kubernetes 1.36 declares beside CEL's own functions, in the form in which the library's checker takes it.

Source: `k8s.io/apiserver/pkg/cel/library` and `pkg/cel/environment/base.go`, release 1.36. The standard functions, the
macros, optional types, sets, lists (version 2 of 3, which differ in costs alone) and comprehensions with two variables
come with the library; version 2 of the strings extension is declared here, because Kubernetes adds to its functions.
Authorizers are left out: an authenticator has no variable of that type.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import permutations
from typing import Any

from cel_expr_python import cel

from arcbridge.identity.cel.formats import FORMATS

_NAMED_TYPES = ("net.IP", "net.CIDR")
"""The types of Kubernetes that an expression can name, as in `type(x) == net.IP`."""

USER_TYPE = "kubernetes.UserInfo"
"""The type of the variable `user`."""

_SUMMABLE = ("int", "uint", "double", "duration")
_COMPARABLE = ("int", "uint", "double", "bool", "duration", "timestamp", "string", "bytes")
_ORDER = ("_<_", "_<=_", "_>_", "_>=_")
_SIGNATURES = """
url(string) -> kubernetes.URL
isURL(string) -> bool
kubernetes.URL.getScheme() -> string
kubernetes.URL.getHost() -> string
kubernetes.URL.getHostname() -> string
kubernetes.URL.getPort() -> string
kubernetes.URL.getEscapedPath() -> string
kubernetes.URL.getQuery() -> map<string,list<string>>
string(string) -> string
string(bool) -> string
string(int) -> string
string(uint) -> string
string(double) -> string
string(bytes) -> string
string(timestamp) -> string
string(duration) -> string
string.charAt(int) -> string
string.indexOf(string) -> int
string.indexOf(string,int) -> int
string.lastIndexOf(string) -> int
string.lastIndexOf(string,int) -> int
string.lowerAscii() -> string
string.upperAscii() -> string
string.replace(string,string) -> string
string.replace(string,string,int) -> string
string.split(string) -> list<string>
string.split(string,int) -> list<string>
string.substring(int) -> string
string.substring(int,int) -> string
string.trim() -> string
string.format(list<dyn>) -> string
strings.quote(string) -> string
list<string>.join() -> string
list<string>.join(string) -> string
string.find(string) -> string
string.findAll(string) -> list<string>
string.findAll(string,int) -> list<string>
quantity(string) -> kubernetes.Quantity
isQuantity(string) -> bool
sign(kubernetes.Quantity) -> int
kubernetes.Quantity.isGreaterThan(kubernetes.Quantity) -> bool
kubernetes.Quantity.isLessThan(kubernetes.Quantity) -> bool
kubernetes.Quantity.compareTo(kubernetes.Quantity) -> int
kubernetes.Quantity.asApproximateFloat() -> double
kubernetes.Quantity.asInteger() -> int
kubernetes.Quantity.isInteger() -> bool
kubernetes.Quantity.add(kubernetes.Quantity) -> kubernetes.Quantity
kubernetes.Quantity.add(int) -> kubernetes.Quantity
kubernetes.Quantity.sub(kubernetes.Quantity) -> kubernetes.Quantity
kubernetes.Quantity.sub(int) -> kubernetes.Quantity
ip(string) -> net.IP
isIP(string) -> bool
ip.isCanonical(string) -> bool
net.IP.family() -> int
net.IP.isUnspecified() -> bool
net.IP.isLoopback() -> bool
net.IP.isLinkLocalMulticast() -> bool
net.IP.isLinkLocalUnicast() -> bool
net.IP.isGlobalUnicast() -> bool
string(net.IP) -> string
cidr(string) -> net.CIDR
isCIDR(string) -> bool
net.CIDR.containsIP(string) -> bool
net.CIDR.containsIP(net.IP) -> bool
net.CIDR.containsCIDR(string) -> bool
net.CIDR.containsCIDR(net.CIDR) -> bool
net.CIDR.ip() -> net.IP
net.CIDR.prefixLength() -> int
net.CIDR.masked() -> net.CIDR
string(net.CIDR) -> string
format.named(string) -> optional_type<kubernetes.NamedFormat>
kubernetes.NamedFormat.validate(string) -> optional_type<list<string>>
semver(string) -> kubernetes.Semver
semver(string,bool) -> kubernetes.Semver
isSemver(string) -> bool
isSemver(string,bool) -> bool
kubernetes.Semver.isGreaterThan(kubernetes.Semver) -> bool
kubernetes.Semver.isLessThan(kubernetes.Semver) -> bool
kubernetes.Semver.compareTo(kubernetes.Semver) -> int
kubernetes.Semver.major() -> int
kubernetes.Semver.minor() -> int
kubernetes.Semver.patch() -> int
"""


def signatures() -> Iterator[str]:
    """Yield one line for each overload: `receiver.name(arguments) -> result`."""
    yield from _SIGNATURES.strip().splitlines()
    yield from (f"format.{name}() -> kubernetes.NamedFormat" for name in FORMATS)
    for kind in _COMPARABLE:
        yield f"list<{kind}>.isSorted() -> bool"
        yield f"list<{kind}>.max() -> {kind}"
        yield f"list<{kind}>.min() -> {kind}"
    yield from (f"list<{kind}>.sum() -> {kind}" for kind in _SUMMABLE)
    for operator in _ORDER:
        yield from (f"{operator}({kind},{kind}) -> bool" for kind in _COMPARABLE)
        yield from (f"{operator}({left},{right}) -> bool" for left, right in permutations(("int", "uint", "double"), 2))
    yield "optional.unwrap(list<optional_type<~A>>) -> list<~A>"
    yield "list<optional_type<~A>>.unwrapOpt() -> list<~A>"
    yield "list<~A>.indexOf(~A) -> int"
    yield "list<~A>.lastIndexOf(~A) -> int"


def functions() -> list[dict[str, Any]]:
    """Return the declarations of all `signatures`, as the library's configuration has them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for signature in signatures():
        head, _, result = signature.partition(" -> ")
        path, _, rest = head.partition("(")
        receiver, _, name = path.rpartition(".")
        overload: dict[str, Any] = {"id": f"k8s {signature}", "return": _type(result)}
        if receiver in ("", "format", "ip", "optional", "strings"):  # a namespace is no receiver
            name = path
        else:
            overload["target"] = _type(receiver)
        overload["args"] = [_type(argument) for argument in rest[:-1].split(",") if argument]
        found.setdefault(name, []).append(overload)
    return [{"name": name, "overloads": overloads} for name, overloads in found.items()]


def _type(signature: str) -> dict[str, Any]:
    if signature.startswith("~"):
        return {"type_name": signature[1:], "is_type_param": True}
    name, bracket, inner = signature.partition("<")
    if not bracket:
        return {"type_name": name}
    parameters = inner[:-1]
    if name == "map":
        key, _, value = parameters.partition(",")
        return {"type_name": name, "params": [_type(key), _type(value)]}
    return {"type_name": name, "params": [_type(parameters)]}


def claims_environment() -> Any:
    """Return the environment of expressions on `claims`: a map of strings to `any`, as Kubernetes declares it."""
    return _environment({"claims": cel.Type.Map(cel.Type.STRING, cel.Type("any"))})


def user_environment() -> Any:
    """Return the environment of expressions on `user`, whose fields are declared by their paths and so have their
    types."""
    strings = cel.Type.List(cel.Type.STRING)
    return _environment(
        {
            "user": cel.Type.AbstractType(USER_TYPE),
            "user.username": cel.Type.STRING,
            "user.uid": cel.Type.STRING,
            "user.groups": strings,
            "user.extra": cel.Type.Map(cel.Type.STRING, strings),
        }
    )


def _environment(variables: dict[str, Any]) -> Any:
    config = {
        "name": "kubernetes",
        "extensions": [{"name": name} for name in ("optional", "sets", "lists", "two-var-comprehensions")],
        # These are declared above, because Kubernetes has more overloads of them: the library takes a function once.
        "stdlib": {"exclude_functions": [{"name": name} for name in ("string", *_ORDER)]},
        "functions": functions(),
        "variables": [{"name": name, "type_name": "type", "params": [{"type_name": name}]} for name in _NAMED_TYPES],
    }
    return cel.NewEnv(config=cel.NewEnvConfigFromYaml(json.dumps(config)), variables=variables)
