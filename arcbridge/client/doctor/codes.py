"""The stable names of what the client's doctor can find: the exit code and the remedy that go with each.

docs/broken.md lists them all, for people and for scripts (`arcbridge doctor -o json`). What findings say of
texts and times from outside is bounded and cleaned here, too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from arcbridge.checks.diagnosis import Finding, failed, first_failure, warning
from arcbridge.errors import ArcbridgeError, ExitCode
from arcbridge.observe.untrusted_text import clean

_SHOWN = 200
"""Bytes of a name or a claim from outside."""
_SENTENCE = 500
"""Bytes of an error's message, which may hold two pins."""

_REMEDIES: dict[ExitCode, dict[str, str]] = {
    ExitCode.UNREACHABLE: {
        "relay_name": "check the spelling of the relay's address (--relay), and the name servers of this machine",
        "proxy_unreachable": (
            "check HTTPS_PROXY; if the relay can be reached without a proxy, name its host in NO_PROXY"
        ),
        "proxy_credentials": "put them into HTTPS_PROXY, as http://user:password@host:port",
        "proxy_refused": (
            "ask the owner of the proxy to allow CONNECT to the relay's host and port, or name the host in NO_PROXY"
        ),
        "relay_port_closed": "check the port in the relay's address, and ask its operator whether the relay runs",
        "relay_silent": (
            "a firewall drops the packets, or the address is wrong; where a proxy is needed, set HTTPS_PROXY"
        ),
        "relay_unreachable": "check the relay's address, and the network of this machine",
        "relay_tls": (
            "check the relay's address: the port may be another service's, or something in between breaks TLS 1.3"
        ),
        "relay_ca": (
            "give the CA that the relay's operator gave you (--relay-ca-file), or its pin (--relay-ca-pin); if it "
            "is the right one, another party may be in between"
        ),
        "relay_certificate_name": (
            "use one of these names as the relay's address, or ask its operator for a certificate with this one"
        ),
        "relay_certificate_expired": (
            "ask the relay's operator to renew it; if it is good elsewhere, set the clock of this machine"
        ),
        "relay_certificate_not_yet": "set the clock of this machine; if it is right, tell the relay's operator",
        "relay_other": (
            "check the relay's address; a proxy that terminates TLS in front of a relay has to pass it through"
        ),
        "issuer": "check the issuer's address and CA, and the network",
        "relay_busy": "the relay's log says why; ask its operator",
        "agent_missing": "tell the cluster's operator: `arcbridge --role agent doctor` in the cluster says why",
        "agent_silent": "try again; if it stays so, the agent cannot open connections to the relay's public address",
        "agent_refused": "the agent's log says why; tell the cluster's operator",
        "agent_unavailable": (
            "tell the cluster's operator: `arcbridge --role agent doctor` says whether it has the issuer's keys"
        ),
        "background_silent": "`arcbridge stop` ends it, and kubectl starts another",
        "session": "try again; the agent's log has this session's id",
        "api_server": "tell the cluster's operator: `arcbridge --role agent doctor` says why",
        "agent_credential": (
            "this is not about your login: tell the cluster's operator (the agent's ServiceAccount token or "
            "client certificate; `arcbridge --role agent doctor`)"
        ),
        "agent_impersonation": (
            "tell the cluster's operator to name your user and groups in the agent's impersonation rights "
            "(`arcbridge --role agent doctor`)"
        ),
    },
    ExitCode.LOGIN: {
        "login_missing": (
            "run `arcbridge login https://RELAY`, or have the program that writes the token files write new ones"
        ),
        "token_expired": "run `arcbridge login`, or have the program that writes the token files write new ones",
        "token_not_yet": "compare the clocks of this machine and of the issuer",
        "relay_token_audience": "",
        "relay_token_issuer": "",
        "relay_token": "log in again; the relay's log names the rule",
        "cluster_token_audience": "",
        "cluster_token_issuer": "",
        "cluster_token_claim": "ask the cluster's operator which claim is missing",
        "cluster_token": "log in again; the log of the cluster's agent names the rule",
        "cluster_credential": "have a new one made",
    },
    ExitCode.DENIED: {
        "policy": "check the name (`arcbridge clusters` lists yours), or ask the relay's operator for access",
        "access_revoked": "ask the operator of the cluster, who revoked it",
        "agent_forbids": "ask the cluster's operator for access",
    },
    ExitCode.USAGE: {
        "settings": "",
        "proxy_settings": "correct HTTPS_PROXY or ALL_PROXY, or name the relay in NO_PROXY",
        "relay_ca_file": "give the relay's CA as a PEM file (--relay-ca-file)",
        "login_settings": "correct the setting or the file",
        "one_token": "have a token issued for each of the two",
    },
    ExitCode.FAILURE: {
        "relay_pin": (
            "compare the pin with the one that the relay's operator gave you (--relay-ca-pin); if the operator "
            "has not changed the CA, another party may be in between"
        ),
        "clock": "",
        "cluster_unknown": (
            "compare the pin with its owner's and give --cluster-ca-pin, or run `arcbridge connect` at a terminal"
        ),
        "cluster_pin": (
            "if the cluster's owner has not changed its CA, another party may be in between; else "
            "`arcbridge trust NAME --renew`"
        ),
        "state_directory": "put this right, or name another directory with --state-dir",
        "disk_full": "make room there: logins, certificates and the kubeconfig are written to it",
        "background": "`arcbridge stop` ends it, and kubectl starts another; `arcbridge logs` says what it met",
        "kubeconfig": "repair the file, or name another one in KUBECONFIG",
        "plugin_missing": "`arcbridge status` writes today's path",
        "kubeconfig_dead": "",
        "kubeconfig_edited": "`arcbridge connect NAME` writes it anew",
        "port_taken": "end that program, or serve the cluster at another port (--port)",
    },
    ExitCode.DONE: {
        "state_open": "chmod g-w it",
        "plugin_other": "`arcbridge connect NAME` writes the path of this one",
        "kubeconfig_elsewhere": "name that file in KUBECONFIG, or run `arcbridge connect NAME` for this one",
        "relay_certificate_ends": "ask the relay's operator to renew it",
        "token_ends": "run `arcbridge login`, or have the program that writes the token files write new ones",
    },
}
"""What to do about each fault, by what `arcbridge doctor` ends with where it is the first one; empty where the finding
itself says it. A warning ends with 0."""
CODES = {code: number for number, faults in _REMEDIES.items() for code in faults}


def fault(hop: str, detail: str, code: str, remedy: str = "") -> Finding:
    """Return a hop that does not work; `remedy`: another one than that of the table."""
    return failed(hop, detail, remedy or _REMEDIES[CODES[code]][code], code)


def fault_to_come(hop: str, detail: str, code: str) -> Finding:
    """Return a hop that works, and will be in the way sooner or later."""
    return warning(hop, detail, _REMEDIES[CODES[code]][code], code)


def exit_code(findings: Sequence[Finding]) -> ExitCode:
    """Return the exit code of the first hop that failed."""
    failure = first_failure(findings)
    return ExitCode.DONE if failure is None else CODES[failure.code]


def clip(text: str) -> str:
    """Return a text from outside as a finding may hold it."""
    return clean(text, _SHOWN)


def sentence(error: ArcbridgeError) -> str:
    """Return the message of an error as a finding may hold it."""
    return clean(error.message, _SENTENCE)


def when(moment: float) -> str:
    """Write unix seconds in this machine's time zone, for people."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
