"""Every flag that sets something, as data: one table for the parser, the environment, the help and completion.

A flag with a `key` sets that path of the role's settings (`arcbridge.settings.config`) and can be given as
`ARCBRIDGE_<FLAG>` in the environment too. A flag without one belongs to the command line alone. This module is read at
every start, also for `--help`, so it imports nothing but the words that settings may take.
"""

from __future__ import annotations

from arcbridge.settings.choices import GRANT_TYPES, LOG_FORMATS, LOG_LEVELS

RELAY = "relay"
AGENT = "agent"
CLIENT = "client"
ROLES = (RELAY, AGENT, CLIENT)

VALUE = "value"
"""One value; the last one given wins."""
LIST = "list"
"""May be repeated; in the environment: separated by commas."""
ON = "on"
OFF = "off"
"""Switches: their presence sets the key to true, or, for one that begins with `--no-`, to false."""


class Flag:
    """One flag: its spellings and what stands for its value in the help, as `-f --file FILE`, and what it sets.

    `…` behind that: the flag may be repeated.
    """

    __slots__ = ("choices", "help", "key", "kind", "metavar", "names")

    def __init__(self, spelling: str, help: str, key: str = "", *, choices: tuple[str, ...] = ()) -> None:
        *words, last = spelling.split()
        self.metavar = last.removesuffix("…")
        self.names = [word for word in (*words, last) if word.startswith("-")]
        self.help = help
        self.key = key
        self.kind = LIST if last.endswith("…") else VALUE
        if last.startswith("-"):
            self.kind = OFF if last.startswith("--no-") else ON
        self.choices = choices

    @property
    def long(self) -> str:
        """The spelling that names the flag in messages and in the environment: its first long one."""
        return next(name for name in self.names if name.startswith("--"))

    @property
    def dest(self) -> str:
        return self.long[2:].replace("-", "_")

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return "ARCBRIDGE_" + self.dest.upper()

    @property
    def takes_value(self) -> bool:
        return self.kind in (VALUE, LIST)


def _or(choices: tuple[str, ...]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}"


COLOURS = ("auto", "always", "never")

GENERAL = (
    Flag("--role ROLE", "which of the three roles this process has", choices=ROLES),
    Flag("--config FILE", "settings file (TOML)"),
    Flag("-v --verbose --debug", "log at level debug"),
    Flag("--log-level LEVEL", _or(LOG_LEVELS), "observe.log_level", choices=LOG_LEVELS),
    Flag(
        "--log-format FORMAT",
        "json, console, or auto: console on a terminal, JSON elsewhere",
        "observe.log_format",
        choices=LOG_FORMATS,
    ),
    Flag("--color WHEN", _or(COLOURS), choices=COLOURS),
    Flag("--observe-listen HOST:PORT", "serve /metrics, /livez and /readyz here", "observe.listen"),
)

_AUTHENTICATION = Flag("--authentication FILE", "AuthenticationConfiguration file for users' tokens", "authentication")
_RELAY = (
    Flag("--listen HOST:PORT", "the one port", "listen"),
    Flag("--public-address HOST:PORT", "host:port that agents and clients dial", "public_address"),
    Flag("--data-dir DIR", "where the registry and the CA are kept", "data_dir"),
    _AUTHENTICATION,
    Flag("--policy FILE", "who may reach which cluster (TOML)", "policy"),
    Flag("--workers N", "processes that share the port; 0: one for each core (default: 1)", "workers"),
    Flag("--agent-certificate-life DURATION", "life of agents' certificates, as 7d or 12h", "agent_certificate_life"),
    Flag("--tls-certificate FILE", "own outer certificate", "tls.certificate"),
    Flag("--tls-key FILE", "its key", "tls.key"),
)

_AGENT = (
    _AUTHENTICATION,
    Flag("--relay URL…", "https://host:port of a relay; may be repeated", "relays"),
    Flag("--join-token-file FILE", "holds id.secret for enrolment", "join_token_file"),
    Flag("--no-token-mode", "refuse sessions that carry the caller's own ServiceAccount token", "token_mode"),
    Flag("--kube-server URL", "https://host:port of the API server", "kubernetes.server"),
    Flag("--kube-ca-file FILE", "CA of the API server", "kubernetes.ca_file"),
    Flag("--kube-token-file FILE", "the agent's own token", "kubernetes.token_file"),
    Flag(
        "--kube-client-certificate-file FILE",
        "the agent's own client certificate",
        "kubernetes.client_certificate_file",
    ),
    Flag("--kube-client-key-file FILE", "key of that certificate", "kubernetes.client_key_file"),
    Flag("--state-dir DIR", "keep the credential in this directory", "state.directory"),
    Flag("--state-secret NAMESPACE/NAME", "keep the credential in this Secret", "state.secret"),
    Flag("--audit-file FILE", "audit log; - is standard output", "audit.file"),
)

_TRUST = (
    Flag("--relay-ca-pin PIN", "sha256:… of the relay CA's public key", "relay_ca_pin"),
    Flag("--relay-ca-file FILE", "the relay's CA", "relay_ca_file"),
)

_CLIENT = (
    Flag("--relay URL…", "https://host:port of a relay; may be repeated: any of them serves", "relays"),
    Flag("-n --cluster --name NAME…", "cluster to reach; may be repeated: each has a port of its own", "cluster"),
    Flag("--port PORT", "local port (default: 47011, then the one this cluster had; 0 picks one)", "port"),
    Flag(
        "-f --file FILE", "kubeconfig to write; - is standard output (default: KUBECONFIG, then ~/.kube/config)", "file"
    ),
    Flag("--kube-context NAME", "name of the context and the cluster in it", "kube_context"),
    Flag("--no-context-switch", "leave the current context alone", "context_switch"),
    Flag("--remove-context", "take the entries out of the kubeconfig at the end", "remove_context"),
    Flag(
        "--token TOKEN",
        "ServiceAccount token, passed to the API server unchanged; - reads it from standard input "
        "(prefer --token-file: other users can see a command line)",
    ),
    Flag("--token-file FILE", "the same from a file", "token_file"),
    Flag("--access-token-file FILE", "token for the relay", "login.access_token_file"),
    Flag("--id-token-file FILE", "token for the cluster", "login.id_token_file"),
    Flag("--oidc-issuer-url URL", "log in at this issuer", "login.issuer"),
    Flag("--oidc-client-id ID", "as this client", "login.client_id"),
    Flag("--oidc-audience AUDIENCE", "audience to ask for in the access token", "login.audience"),
    Flag(
        "--cluster-audience AUDIENCE",
        "audience of the token for a cluster; {cluster} is its name",
        "login.cluster_audience",
    ),
    Flag(
        "--cluster-audience-by WAY",
        "how it is asked for: resource, audience, scope or exchange",
        "login.cluster_audience_by",
    ),
    Flag(
        "--oidc-scope SCOPE…",
        "scope of the login; may be repeated, and takes the place of the default ones",
        "login.scopes",
    ),
    Flag(
        "--relay-scope SCOPE…",
        "scope of the relay's token, where that of the login has more; may be repeated",
        "login.relay_scopes",
    ),
    Flag("--cluster-scope SCOPE…", "scope of a cluster's token; may be repeated", "login.cluster_scopes"),
    Flag(
        "--workload KIND",
        "have the tokens as a job or pod: github, gitlab, kubernetes, azure-pipelines, file:PATH or env:NAME",
        "login.workload",
    ),
    Flag(
        "--client-assertion-workload KIND",
        "log in at the issuer with the own token of this job or pod: github-actions or kubernetes",
        "login.client_assertion_workload",
    ),
    Flag(
        "--client-assertion-audience AUDIENCE",
        "audience of that token (default: api://AzureADTokenExchange)",
        "login.client_assertion_audience",
    ),
    Flag(
        "--issuer-origin URL…",
        "https://host of a further origin at which the issuer has endpoints, or its page for device codes",
        "login.issuer_origins",
    ),
    Flag(
        "--redirect-path PATH",
        "local path to which the browser comes back (default: one that belongs to the issuer; / for none)",
        "login.redirect_path",
    ),
    Flag(
        "--redirect-port PORT",
        "local port to which the browser comes back (default: 8000 or 18000; 0 picks one)",
        "login.redirect_port",
    ),
    Flag("--proof-key-file FILE", "key that tokens are bound to", "login.proof_key_file"),
    Flag("--oidc-ca-file FILE", "CA of the issuer", "login.ca_file"),
    Flag("--grant-type TYPE", _or(GRANT_TYPES), "login.grant_type", choices=GRANT_TYPES),
    Flag("--cluster-ca-pin PIN", "sha256:… of the cluster CA's public key", "cluster_ca_pin"),
    Flag("--pins-file FILE", "pins of an organisation's clusters (TOML)", "pins_file"),
    Flag(
        "--trust-first-use",
        "trust a cluster that was never seen, and `login` a relay and its issuer, without asking",
        "trust_first_use",
    ),
    Flag("--state-dir DIR", "keys, pins and ports of this user", "state_dir"),
    Flag("--no-resumption", "let what runs be cut when a connection is lost, instead of resuming it", "resumption"),
)

_AND_GENERAL = {RELAY: _RELAY, AGENT: (*_AGENT, *_TRUST), CLIENT: (*_TRUST, *_CLIENT)}


def flags_of(role: str) -> tuple[Flag, ...]:
    """Return all flags that a role knows, in the order of the help."""
    return (*GENERAL, *_AND_GENERAL[role])
