"""Names of clusters: one canonical spelling, checked wherever a name enters.

A name is part of a TLS server name, of a URI in a certificate and of a message subject, so it is narrow on purpose:
lower-case ASCII letters, digits, `-` and `.`, at most 63 characters (the length of one DNS label, RFC 1035 §2.3.4,
and of a certificate's common name, 64, RFC 5280 appendix A.1). Nothing is folded or trimmed: a name that would need
it is refused, so two spellings can never mean one cluster (docs/threats.md#J22).
"""

from __future__ import annotations

import re

from arcbridge.errors import ConfigError

_NAME = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,61}[a-z0-9])?", re.ASCII)

SERVER_NAME_SUFFIX = ".cluster.arcbridge"


def is_cluster_name(name: str) -> bool:
    """Return whether `name` is canonical."""
    # The length comes first: no pattern is run over a name of 64 KiB.
    return 1 <= len(name) <= 63 and ".." not in name and _NAME.fullmatch(name) is not None


def check_cluster_name(name: str) -> str:
    """Return `name` if it is canonical, else raise `ConfigError`, which never quotes what a peer may have sent."""
    if not is_cluster_name(name):
        raise ConfigError(
            "not a cluster name: use 1 to 63 lower-case letters, digits, '-' and '.', "
            "beginning and ending with a letter or digit, without '..'"
        )
    return name


def cluster_server_name(name: str) -> str:
    """Return the TLS server name under which a cluster's agent answers end to end; raises `ConfigError`."""
    return check_cluster_name(name) + SERVER_NAME_SUFFIX
