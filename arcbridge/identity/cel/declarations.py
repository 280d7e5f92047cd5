"""Declares to the library's checker the functions and variables that Kubernetes has beside CEL's own.

The overloads are those of `functions`. This module evaluates nothing.
"""

from __future__ import annotations

import json
from typing import Any

from cel_expr_python import cel

from arcbridge.identity.cel.functions import ORDER, OVERLOADS

_NAMED_TYPES = ("net.IP", "net.CIDR")
"""The types of Kubernetes that an expression can name, as in `type(x) == net.IP`."""

USER_TYPE = "kubernetes.UserInfo"
"""The type of the variable `user`."""


def functions() -> list[dict[str, Any]]:
    """Return the declarations of all overloads that the library does not have, as its configuration has them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for one in OVERLOADS:
        if one.result:
            overload: dict[str, Any] = {"id": f"k8s {one}", "return": _type(one.result)}
            if one.receiver:
                overload["target"] = _type(one.receiver)
            overload["args"] = list(map(_type, one.arguments))
            found.setdefault(one.name, []).append(overload)
    return [{"name": name, "overloads": overloads} for name, overloads in found.items()]


def _type(signature: str) -> dict[str, Any]:
    if signature.startswith("~"):
        return {"type_name": signature[1:], "is_type_param": True}
    name, bracket, inner = signature.partition("<")
    if not bracket:
        return {"type_name": name}
    parameters = inner[:-1].split(",", 1) if name == "map" else [inner[:-1]]
    return {"type_name": name, "params": list(map(_type, parameters))}


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
        # `functions` declares these, because Kubernetes has more overloads of them: the library takes a function once.
        "stdlib": {"exclude_functions": [{"name": name} for name in ("string", *ORDER)]},
        "functions": functions(),
        "variables": [{"name": name, "type_name": "type", "params": [{"type_name": name}]} for name in _NAMED_TYPES],
    }
    return cel.NewEnv(config=cel.NewEnvConfigFromYaml(json.dumps(config)), variables=variables)
