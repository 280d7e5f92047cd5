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
    """One flag: its spellings, what stands for its value in the help, and the setting: `-f --file FILE = file`.

    `…` behind the value: the flag may be repeated.
    """

    __slots__ = ("choices", "default", "help", "key", "kind", "metavar", "names", "topic")

    def __init__(self, spelling: str, help: str, *, choices: tuple[str, ...] = (), default: str = "") -> None:
        spelling, _, self.key = spelling.partition(" = ")
        *words, last = spelling.split()
        self.metavar = last.removesuffix("…")
        self.names = [word for word in (*words, last) if word.startswith("-")]
        self.help = help
        self.kind = LIST if last.endswith("…") else VALUE
        if last.startswith("-"):
            self.kind = OFF if last.startswith("--no-") else ON
        self.choices = choices
        self.default = default
        """Which of `choices` counts where none is given."""
        self.topic = ""
        """What `help flags` lists it under."""

    @property
    def long(self) -> str:
        """The spelling that names the flag in messages and in the environment: its first long one, where it has one."""
        return next((name for name in self.names if name.startswith("--")), self.names[0])

    @property
    def dest(self) -> str:
        return self.long.lstrip("-").replace("-", "_")

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return "ARCBRIDGE_" + self.dest.upper()

    @property
    def takes_value(self) -> bool:
        return self.kind in (VALUE, LIST)


def _about(topic: str, *flags: Flag) -> tuple[Flag, ...]:
    """Give flags their topic."""
    for flag in flags:
        flag.topic = topic
    return flags


COLOURS = ("auto", "always", "never")

GENERAL = _about(
    "the process",
    Flag("--role ROLE", "which of the three roles this process has", choices=(CLIENT, RELAY, AGENT)),
    Flag("--config FILE", "settings file (TOML)"),
    Flag("-v --verbose --debug", "log at level debug"),
    Flag("--log-level LEVEL = observe.log_level", "how much is logged", choices=LOG_LEVELS, default="info"),
    Flag(
        "--log-format FORMAT = observe.log_format",
        "form of the log; auto: console on a terminal, else json",
        choices=LOG_FORMATS,
        default="auto",
    ),
    Flag("--color WHEN", "colour; auto: on a terminal, unless NO_COLOR is set", choices=COLOURS, default="auto"),
    Flag("--observe-listen HOST:PORT = observe.listen", "serve /metrics, /livez and /readyz here"),
)

_AUTHENTICATION = _about(
    "users' tokens",
    Flag("--authentication FILE = authentication", "AuthenticationConfiguration file for users' tokens"),
)
_RELAY = _about(
    "the relay",
    Flag("--listen HOST:PORT = listen", "the one port"),
    Flag("--public-address HOST:PORT = public_address", "host:port that agents and clients dial"),
    Flag("--data-dir DIR = data_dir", "where the registry and the CA are kept"),
    Flag("--policy FILE = policy", "who may reach which cluster (TOML)"),
    Flag("--workers N = workers", "processes that share the port (default: 1; 0: one for each core)"),
    Flag("--agent-certificate-life DURATION = agent_certificate_life", "life of agents' certificates, as 7d or 12h"),
    Flag("--tls-certificate FILE = tls.certificate", "own outer certificate"),
    Flag("--tls-key FILE = tls.key", "its key"),
    Flag("--fleet-name NAME = fleet.name", "what NATS permissions know this relay by"),
    Flag("--fleet-internal-address HOST:PORT = fleet.internal_address", "where other relays of the fleet reach it"),
)

_AGENT = _about(
    "the agent",
    Flag("--relay URL… = relays", "https://host:port of a relay; may be repeated"),
    Flag("--join-token-file FILE = join_token_file", "holds id.secret for enrolment"),
    Flag("--no-token-mode = token_mode", "refuse sessions that carry the caller's own ServiceAccount token"),
    Flag("--kube-server URL = kubernetes.server", "https://host:port of the API server"),
    Flag("--kube-ca-file FILE = kubernetes.ca_file", "CA of the API server"),
    Flag("--kube-token-file FILE = kubernetes.token_file", "the agent's own token"),
    Flag(
        "--kube-client-certificate-file FILE = kubernetes.client_certificate_file", "the agent's own client certificate"
    ),
    Flag("--kube-client-key-file FILE = kubernetes.client_key_file", "key of that certificate"),
    Flag(
        "--kube-credential-bundle-file FILE = kubernetes.credential_bundle_file",
        "key and certificates of the agent's pod in one file",
    ),
    Flag("--state-dir DIR = state.directory", "keep the credential in this directory"),
    Flag("--state-secret NAMESPACE/NAME = state.secret", "keep the credential in this Secret"),
    Flag("--audit-file FILE = audit.file", "audit log; - is standard output"),
)

_TRUST = _about(
    "trust in the relay",
    Flag("--relay-ca-pin PIN = relay_ca_pin", "sha256:… of the relay CA's public key"),
    Flag("--relay-ca-file FILE = relay_ca_file", "the relay's CA"),
)

_CLIENT = (
    _about(
        "relay and cluster",
        Flag("--relay URL… = relays", "https://host:port of a relay; may be repeated: any of them serves"),
        Flag("-n --cluster --name NAME… = cluster", "cluster to reach; `proxy` takes several, each has its own port"),
        Flag("--port PORT = port", "local port (default: 47011, then the one this cluster had; 0 picks one)"),
    )
    + _about(
        "the kubeconfig",
        Flag(
            "-f --file FILE = file",
            "kubeconfig to write; - is standard output (default: KUBECONFIG, then ~/.kube/config)",
        ),
        Flag("--kube-context NAME = kube_context", "name of the context and the cluster in it"),
        Flag("--no-context-switch = context_switch", "leave the current context alone"),
        Flag("--remove-context = remove_context", "take the entries out of the kubeconfig at the end"),
    )
    + _about(
        "sessions with fewer rights",
        Flag("--read-only = restrict.read_only", "get, list and watch alone; no exec, attach, port-forward and proxy"),
        Flag("--no-secrets = restrict.secrets", "no Secrets, and no tokens of service accounts"),
        Flag("--namespace NAME… = restrict.namespaces", "this namespace alone, and nothing cluster-wide"),
        Flag("--verb VERB… = restrict.verbs", "this verb of Kubernetes alone, as get or patch"),
    )
    + _about(
        "tokens that are given",
        Flag(
            "--token TOKEN",
            "ServiceAccount token, passed to the API server unchanged; - reads it from standard input "
            "(prefer --token-file: other users can see a command line)",
        ),
        Flag("--token-file FILE = token_file", "the same from a file"),
        Flag("--access-token-file FILE = login.access_token_file", "token for the relay"),
        Flag("--id-token-file FILE = login.id_token_file", "token for the cluster"),
    )
    + _about(
        "the login",
        Flag("--oidc-issuer-url URL = login.issuer", "log in at this issuer"),
        Flag("--oidc-client-id ID = login.client_id", "as this client"),
        Flag("--oidc-audience AUDIENCE = login.audience", "audience to ask for in the access token"),
        Flag(
            "--cluster-audience AUDIENCE = login.cluster_audience",
            "audience of the token for a cluster; {cluster} is its name",
        ),
        Flag(
            "--cluster-audience-by WAY = login.cluster_audience_by",
            "how it is asked for: resource, audience, scope or exchange",
        ),
        Flag(
            "--oidc-scope SCOPE… = login.scopes",
            "scope of the login; may be repeated, and takes the place of the default ones",
        ),
        Flag(
            "--relay-scope SCOPE… = login.relay_scopes",
            "scope of the relay's token, where that of the login has more; may be repeated",
        ),
        Flag("--cluster-scope SCOPE… = login.cluster_scopes", "scope of a cluster's token; may be repeated"),
        Flag(
            "--workload KIND = login.workload",
            "have the tokens as a job or pod: github, gitlab, kubernetes, azure-pipelines, file:PATH or env:NAME",
        ),
        Flag(
            "--client-assertion-workload KIND = login.client_assertion_workload",
            "log in at the issuer with the own token of this job or pod: github-actions or kubernetes",
        ),
        Flag(
            "--client-assertion-audience AUDIENCE = login.client_assertion_audience",
            "audience of that token (default: api://AzureADTokenExchange)",
        ),
        Flag(
            "--issuer-origin URL… = login.issuer_origins",
            "https://host of a further origin at which the issuer has endpoints, or its page for device codes",
        ),
        Flag(
            "--redirect-path PATH = login.redirect_path",
            "local path to which the browser comes back (default: one that belongs to the issuer; / for none)",
        ),
        Flag(
            "--redirect-port PORT = login.redirect_port",
            "local port to which the browser comes back (default: 8000 or 18000; 0 picks one)",
        ),
        Flag("--proof-key-file FILE = login.proof_key_file", "key that tokens are bound to"),
        Flag("--oidc-ca-file FILE = login.ca_file", "CA of the issuer"),
        Flag("--grant-type TYPE = login.grant_type", "how to log in", choices=GRANT_TYPES, default="auto"),
    )
    + _about(
        "trust in clusters, and what is kept",
        Flag("--cluster-ca-pin PIN = cluster_ca_pin", "sha256:… of the cluster CA's public key"),
        Flag("--pins-file FILE = pins_file", "pins of an organisation's clusters (TOML)"),
        Flag(
            "--trust-first-use = trust_first_use",
            "trust a cluster that was never seen, and `login` a relay and its issuer, without asking",
        ),
        Flag("--state-dir DIR = state_dir", "keys, pins and ports of this user"),
        Flag("--no-resumption = resumption", "let what runs be cut when a connection is lost, instead of resuming it"),
    )
)

_AND_GENERAL = {
    RELAY: (*_RELAY, *_AUTHENTICATION),
    AGENT: (*_AGENT, *_AUTHENTICATION, *_TRUST),
    CLIENT: (*_CLIENT, *_TRUST),
}


def flags_of(role: str) -> tuple[Flag, ...]:
    """Return all flags that a role knows, in the order of the help."""
    return (*_AND_GENERAL[role], *GENERAL)
