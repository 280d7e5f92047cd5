"""The stable names of what the client's doctor can find, and the exit code that goes with each.

docs/troubleshooting.md lists them all, for people and for scripts (`arcbridge doctor -o json`).
"""

from __future__ import annotations

from collections.abc import Sequence

from arcbridge.checks.diagnosis import Finding, first_failure
from arcbridge.errors import ExitCode

CODES: dict[str, ExitCode] = {
    "settings": ExitCode.USAGE,
    "relay_name": ExitCode.UNREACHABLE,
    "proxy_settings": ExitCode.USAGE,
    "proxy_unreachable": ExitCode.UNREACHABLE,
    "proxy_credentials": ExitCode.UNREACHABLE,
    "proxy_refused": ExitCode.UNREACHABLE,
    "relay_port_closed": ExitCode.UNREACHABLE,
    "relay_silent": ExitCode.UNREACHABLE,
    "relay_unreachable": ExitCode.UNREACHABLE,
    "relay_tls": ExitCode.UNREACHABLE,
    "relay_ca_file": ExitCode.USAGE,
    "relay_pin": ExitCode.FAILURE,
    "relay_ca": ExitCode.UNREACHABLE,
    "relay_certificate_name": ExitCode.UNREACHABLE,
    "relay_certificate_expired": ExitCode.UNREACHABLE,
    "relay_certificate_not_yet": ExitCode.UNREACHABLE,
    "relay_certificate_ends": ExitCode.DONE,
    "relay_other": ExitCode.UNREACHABLE,
    "clock": ExitCode.FAILURE,
    "login_missing": ExitCode.LOGIN,
    "login_settings": ExitCode.USAGE,
    "issuer": ExitCode.UNREACHABLE,
    "one_token": ExitCode.USAGE,
    "token_expired": ExitCode.LOGIN,
    "token_not_yet": ExitCode.LOGIN,
    "token_ends": ExitCode.DONE,
    "relay_token_audience": ExitCode.LOGIN,
    "relay_token_issuer": ExitCode.LOGIN,
    "relay_token": ExitCode.LOGIN,
    "relay_busy": ExitCode.UNREACHABLE,
    "policy": ExitCode.LOGIN,
    "agent_missing": ExitCode.UNREACHABLE,
    "agent_silent": ExitCode.UNREACHABLE,
    "agent_refused": ExitCode.UNREACHABLE,
    "cluster_unknown": ExitCode.FAILURE,
    "cluster_pin": ExitCode.FAILURE,
    "cluster_token_audience": ExitCode.LOGIN,
    "cluster_token_issuer": ExitCode.LOGIN,
    "cluster_token_claim": ExitCode.LOGIN,
    "cluster_token": ExitCode.LOGIN,
    "access_revoked": ExitCode.LOGIN,
    "agent_forbids": ExitCode.LOGIN,
    "agent_unavailable": ExitCode.UNREACHABLE,
    "session": ExitCode.UNREACHABLE,
    "api_server": ExitCode.UNREACHABLE,
    "agent_credential": ExitCode.UNREACHABLE,
    "agent_impersonation": ExitCode.UNREACHABLE,
    "cluster_credential": ExitCode.LOGIN,
    "kubeconfig": ExitCode.FAILURE,
    "kubeconfig_dead": ExitCode.FAILURE,
    "port_taken": ExitCode.FAILURE,
}
"""What `arcbridge doctor` ends with where this is the first fault; a warning ends with 0."""


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """Return the exit code of the first hop that failed."""
    failure = first_failure(findings)
    return ExitCode.DONE if failure is None else CODES[failure.code]
