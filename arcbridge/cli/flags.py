"""Every flag and sub-command of the executable, as data: one table for the parser, the environment, completion.

A flag with a `key` sets that path of the role's settings (`arcbridge.settings.config`) and can be given as
`ARCBRIDGE_<FLAG>` in the environment too. A flag without one belongs to the command line alone. This module is
read at every start, also for `--help`, so it imports nothing but the words that settings may take.
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
"""Switches: their presence sets the key to true, or to false."""


class Flag:
    """One flag: its spellings, what it sets, and the roles that know it."""

    __slots__ = ("choices", "help", "key", "kind", "metavar", "names", "roles")

    def __init__(
        self,
        *names: str,
        help: str,
        key: str = "",
        kind: str = VALUE,
        metavar: str = "VALUE",
        roles: tuple[str, ...] = ROLES,
        choices: tuple[str, ...] = (),
    ) -> None:
        self.names = names
        self.help = help
        self.key = key
        self.kind = kind
        self.metavar = metavar
        self.roles = roles
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


class Command:
    """One sub-command: its path (`("token", "create")`), its roles, its own flags and positionals."""

    __slots__ = ("arguments", "flags", "help", "optional", "path", "repeated", "roles", "takes_command")

    def __init__(
        self,
        *path: str,
        help: str,
        roles: tuple[str, ...] = ROLES,
        flags: tuple[Flag, ...] = (),
        arguments: tuple[tuple[str, str, tuple[str, ...]], ...] = (),
        repeated: bool = False,
        optional: bool = False,
        takes_command: bool = False,
    ) -> None:
        self.path = path
        self.help = help
        self.roles = roles
        self.flags = flags
        self.arguments = arguments
        """Positionals: (name, help, choices); all required but for `optional`."""
        self.repeated = repeated
        """Whether the last positional may be given several times."""
        self.optional = optional
        """Whether the last positional may be left out."""
        self.takes_command = takes_command
        """Whether another program's command line follows behind `--`; the parser reads nothing of it."""


def _or(choices: tuple[str, ...]) -> str:
    *others, last = choices
    return f"{', '.join(others)} or {last}"


COLOURS = ("auto", "always", "never")

DOCUMENTS = ("json", "yaml")
"""The formats of `--output` in which everything is printed, for programs; each command has them."""
LIST_OUTPUTS = ("table", *DOCUMENTS, "name")
DIAGNOSIS_OUTPUTS = ("table", *DOCUMENTS)


def _output(*choices: str) -> Flag:
    """Make `--output` of a command; the first of `choices` is the default."""
    return Flag("-o", "--output", help=f"how to print (default: {choices[0]})", metavar="FORMAT", choices=choices)


OUTPUT = _output(*LIST_OUTPUTS)
WIDE_OUTPUT = _output("table", "wide", *LIST_OUTPUTS[1:])
DIAGNOSIS_OUTPUT = _output(*DIAGNOSIS_OUTPUTS)
TEXT_OUTPUT = _output("text", *DOCUMENTS)
SETTINGS_OUTPUT = _output("toml", *DOCUMENTS)

GENERAL = (
    Flag("--role", help="which of the three roles this process has", metavar="ROLE", choices=ROLES),
    Flag("--config", help="settings file (TOML)", metavar="FILE"),
    Flag("-v", "--verbose", "--debug", help="log at level debug", kind=ON),
    Flag(
        "--log-level",
        help=_or(LOG_LEVELS),
        key="observe.log_level",
        metavar="LEVEL",
        choices=LOG_LEVELS,
    ),
    Flag(
        "--log-format",
        help="json, console, or auto: console on a terminal, JSON elsewhere",
        key="observe.log_format",
        metavar="FORMAT",
        choices=LOG_FORMATS,
    ),
    Flag("--color", help=_or(COLOURS), metavar="WHEN", choices=COLOURS),
    Flag(
        "--observe-listen",
        help="serve /metrics, /livez and /readyz here",
        key="observe.listen",
        metavar="HOST:PORT",
    ),
)

RELAY_FLAGS = (
    Flag("--listen", help="the one port", key="listen", metavar="HOST:PORT", roles=(RELAY,)),
    Flag(
        "--public-address",
        help="host:port that agents and clients dial",
        key="public_address",
        metavar="HOST:PORT",
        roles=(RELAY,),
    ),
    Flag("--data-dir", help="where the registry and the CA are kept", key="data_dir", metavar="DIR", roles=(RELAY,)),
    Flag(
        "--authentication",
        help="AuthenticationConfiguration file for users' tokens",
        key="authentication",
        metavar="FILE",
        roles=(RELAY, AGENT),
    ),
    Flag("--policy", help="who may reach which cluster (TOML)", key="policy", metavar="FILE", roles=(RELAY,)),
    Flag(
        "--workers",
        help="processes that share the port; 0: one for each core (default: 1)",
        key="workers",
        metavar="N",
        roles=(RELAY,),
    ),
    Flag(
        "--agent-certificate-life",
        help="life of agents' certificates, as 7d or 12h",
        key="agent_certificate_life",
        metavar="DURATION",
        roles=(RELAY,),
    ),
    Flag("--tls-certificate", help="own outer certificate", key="tls.certificate", metavar="FILE", roles=(RELAY,)),
    Flag("--tls-key", help="its key", key="tls.key", metavar="FILE", roles=(RELAY,)),
)

AGENT_FLAGS = (
    Flag(
        "--relay",
        help="https://host:port of a relay; may be repeated",
        key="relays",
        kind=LIST,
        metavar="URL",
        roles=(AGENT,),
    ),
    Flag(
        "--join-token-file", help="holds id.secret for enrolment", key="join_token_file", metavar="FILE", roles=(AGENT,)
    ),
    Flag(
        "--no-token-mode",
        help="refuse sessions that carry the caller's own ServiceAccount token",
        key="token_mode",
        kind=OFF,
        roles=(AGENT,),
    ),
    Flag(
        "--kube-server",
        help="https://host:port of the API server",
        key="kubernetes.server",
        metavar="URL",
        roles=(AGENT,),
    ),
    Flag("--kube-ca-file", help="CA of the API server", key="kubernetes.ca_file", metavar="FILE", roles=(AGENT,)),
    Flag(
        "--kube-token-file", help="the agent's own token", key="kubernetes.token_file", metavar="FILE", roles=(AGENT,)
    ),
    Flag(
        "--kube-client-certificate-file",
        help="the agent's own client certificate",
        key="kubernetes.client_certificate_file",
        metavar="FILE",
        roles=(AGENT,),
    ),
    Flag(
        "--kube-client-key-file",
        help="key of that certificate",
        key="kubernetes.client_key_file",
        metavar="FILE",
        roles=(AGENT,),
    ),
    Flag(
        "--state-dir",
        help="keep the credential in this directory",
        key="state.directory",
        metavar="DIR",
        roles=(AGENT,),
    ),
    Flag(
        "--state-secret",
        help="keep the credential in this Secret",
        key="state.secret",
        metavar="NAMESPACE/NAME",
        roles=(AGENT,),
    ),
    Flag("--audit-file", help="audit log; - is standard output", key="audit.file", metavar="FILE", roles=(AGENT,)),
)

TRUST_FLAGS = (
    Flag(
        "--relay-ca-pin",
        help="sha256:… of the relay CA's public key",
        key="relay_ca_pin",
        metavar="PIN",
        roles=(AGENT, CLIENT),
    ),
    Flag("--relay-ca-file", help="the relay's CA", key="relay_ca_file", metavar="FILE", roles=(AGENT, CLIENT)),
)

CLIENT_FLAGS = (
    Flag(
        "--relay",
        help="https://host:port of a relay; may be repeated: any of them serves",
        key="relays",
        kind=LIST,
        metavar="URL",
        roles=(CLIENT,),
    ),
    Flag(
        "-n",
        "--cluster",
        "--name",
        help="cluster to reach; may be repeated: each has a port of its own",
        key="cluster",
        kind=LIST,
        metavar="NAME",
        roles=(CLIENT,),
    ),
    Flag(
        "--port",
        help="local port (default: 47011, then the one this cluster had; 0 picks one)",
        key="port",
        metavar="PORT",
        roles=(CLIENT,),
    ),
    Flag(
        "-f",
        "--file",
        help="kubeconfig to write; - is standard output (default: KUBECONFIG, then ~/.kube/config)",
        key="file",
        metavar="FILE",
        roles=(CLIENT,),
    ),
    Flag(
        "--kube-context",
        help="name of the context and the cluster in it",
        key="kube_context",
        metavar="NAME",
        roles=(CLIENT,),
    ),
    Flag(
        "--no-context-switch",
        help="leave the current context alone",
        key="context_switch",
        kind=OFF,
        roles=(CLIENT,),
    ),
    Flag(
        "--remove-context",
        help="take the entries out of the kubeconfig at the end",
        key="remove_context",
        kind=ON,
        roles=(CLIENT,),
    ),
    Flag(
        "--token",
        help="ServiceAccount token, passed to the API server unchanged; - reads it from standard input "
        "(prefer --token-file: other users can see a command line)",
        metavar="TOKEN",
        roles=(CLIENT,),
    ),
    Flag("--token-file", help="the same from a file", key="token_file", metavar="FILE", roles=(CLIENT,)),
    Flag(
        "--access-token-file",
        help="token for the relay",
        key="login.access_token_file",
        metavar="FILE",
        roles=(CLIENT,),
    ),
    Flag("--id-token-file", help="token for the cluster", key="login.id_token_file", metavar="FILE", roles=(CLIENT,)),
    Flag("--oidc-issuer-url", help="log in at this issuer", key="login.issuer", metavar="URL", roles=(CLIENT,)),
    Flag("--oidc-client-id", help="as this client", key="login.client_id", metavar="ID", roles=(CLIENT,)),
    Flag(
        "--oidc-audience",
        help="audience to ask for in the access token",
        key="login.audience",
        metavar="AUDIENCE",
        roles=(CLIENT,),
    ),
    Flag(
        "--cluster-audience",
        help="audience of the token for a cluster; {cluster} is its name",
        key="login.cluster_audience",
        metavar="AUDIENCE",
        roles=(CLIENT,),
    ),
    Flag(
        "--cluster-audience-by",
        help="how it is asked for: resource, audience, scope or exchange",
        key="login.cluster_audience_by",
        metavar="WAY",
        roles=(CLIENT,),
    ),
    Flag(
        "--oidc-scope",
        help="scope of the login; may be repeated, and takes the place of the default ones",
        key="login.scopes",
        kind=LIST,
        metavar="SCOPE",
        roles=(CLIENT,),
    ),
    Flag(
        "--relay-scope",
        help="scope of the relay's token, where that of the login has more; may be repeated",
        key="login.relay_scopes",
        kind=LIST,
        metavar="SCOPE",
        roles=(CLIENT,),
    ),
    Flag(
        "--cluster-scope",
        help="scope of a cluster's token; may be repeated",
        key="login.cluster_scopes",
        kind=LIST,
        metavar="SCOPE",
        roles=(CLIENT,),
    ),
    Flag(
        "--workload",
        help="have the tokens as a job or pod: github, gitlab, kubernetes, azure-pipelines, file:PATH or env:NAME",
        key="login.workload",
        metavar="KIND",
        roles=(CLIENT,),
    ),
    Flag(
        "--client-assertion-workload",
        help="log in at the issuer with the own token of this job or pod: github-actions or kubernetes",
        key="login.client_assertion_workload",
        metavar="KIND",
        roles=(CLIENT,),
    ),
    Flag(
        "--client-assertion-audience",
        help="audience of that token (default: api://AzureADTokenExchange)",
        key="login.client_assertion_audience",
        metavar="AUDIENCE",
        roles=(CLIENT,),
    ),
    Flag(
        "--issuer-origin",
        help="https://host of a further origin at which the issuer has endpoints, or its page for device codes",
        key="login.issuer_origins",
        kind=LIST,
        metavar="URL",
        roles=(CLIENT,),
    ),
    Flag(
        "--redirect-path",
        help="local path to which the browser comes back (default: one that belongs to the issuer; / for none)",
        key="login.redirect_path",
        metavar="PATH",
        roles=(CLIENT,),
    ),
    Flag(
        "--redirect-port",
        help="local port to which the browser comes back (default: 8000 or 18000; 0 picks one)",
        key="login.redirect_port",
        metavar="PORT",
        roles=(CLIENT,),
    ),
    Flag(
        "--proof-key-file",
        help="key that tokens are bound to",
        key="login.proof_key_file",
        metavar="FILE",
        roles=(CLIENT,),
    ),
    Flag("--oidc-ca-file", help="CA of the issuer", key="login.ca_file", metavar="FILE", roles=(CLIENT,)),
    Flag(
        "--grant-type",
        help=_or(GRANT_TYPES),
        key="login.grant_type",
        metavar="TYPE",
        roles=(CLIENT,),
        choices=GRANT_TYPES,
    ),
    Flag(
        "--cluster-ca-pin",
        help="sha256:… of the cluster CA's public key",
        key="cluster_ca_pin",
        metavar="PIN",
        roles=(CLIENT,),
    ),
    Flag(
        "--pins-file",
        help="pins of an organisation's clusters (TOML)",
        key="pins_file",
        metavar="FILE",
        roles=(CLIENT,),
    ),
    Flag(
        "--trust-first-use",
        help="trust a cluster that was never seen, and `login` a relay and its issuer, without asking",
        key="trust_first_use",
        kind=ON,
        roles=(CLIENT,),
    ),
    Flag("--state-dir", help="keys, pins and ports of this user", key="state_dir", metavar="DIR", roles=(CLIENT,)),
    Flag(
        "--no-resumption",
        help="let what runs be cut when a connection is lost, instead of resuming it",
        key="resumption",
        kind=OFF,
        roles=(CLIENT,),
    ),
)

FLAGS = (*GENERAL, *RELAY_FLAGS, *AGENT_FLAGS, *TRUST_FLAGS, *CLIENT_FLAGS)

_CLUSTER_ARGUMENT = ("cluster", "name of the cluster", ())
_USER_ARGUMENT = ("user", "name of the user as the policy has it, or ISSUER#SUBJECT", ())

COMMANDS = (
    Command("proxy", help="serve kubectl on a local port (the default)", roles=(CLIENT,)),
    Command(
        "forward",
        help="carry a TCP target of the cluster to a local port",
        roles=(CLIENT,),
        arguments=(("target", "name of the target in the agent's settings", ()),),
        flags=(
            Flag("--listen", help="local address (default: 127.0.0.1:0)", metavar="HOST:PORT"),
            Flag("--any-user", help="let programs of other users of this machine use the port", kind=ON),
        ),
    ),
    Command(
        "connect",
        help="serve clusters in the background, for kubectl from any terminal",
        roles=(CLIENT,),
        flags=(Flag("--static", help="a client certificate in the kubeconfig, for tools without plugins", kind=ON),),
        arguments=(("name", "names of clusters", ()),),
        repeated=True,
        optional=True,
    ),
    Command(
        "disconnect",
        help="serve clusters no more, and take their contexts out",
        roles=(CLIENT,),
        flags=(Flag("--all", help="all that are connected", kind=ON),),
        arguments=(("name", "names of clusters or contexts", ()),),
        repeated=True,
        optional=True,
    ),
    Command("stop", help="end the background process; kubectl starts it again", roles=(CLIENT,)),
    Command(
        "logs",
        help="print the log of the background process",
        roles=(CLIENT,),
        flags=(Flag("-f", "--follow", help="go on as it grows", kind=ON),),
    ),
    Command(
        "credential",
        help="print a credential for kubectl, which runs this by itself",
        roles=(CLIENT,),
        flags=(Flag("--ended", help="say that what served the cluster has ended", kind=ON),),
    ),
    Command("background", help="be the background process, as systemd starts it", roles=(CLIENT,)),
    Command("clusters", help="list the clusters you may reach", roles=(CLIENT,), flags=(WIDE_OUTPUT,)),
    Command(
        "login",
        help="log in, at a relay that says where; commands that name no relay then mean this one",
        roles=(CLIENT,),
        arguments=(("relay_url", "https://host[:port] of the relay (default: the one logged in at last)", ()),),
        flags=(Flag("--renew-trust", help="ask again whether to trust the relay's CA and its issuer", kind=ON),),
        repeated=True,
        optional=True,
    ),
    Command(
        "whoami",
        help="show who is logged in, until when, and where",
        roles=(CLIENT,),
        flags=(OUTPUT, Flag("--check", help="ask the relay whether it takes the login", kind=ON)),
    ),
    Command("key", help="make the key of --proof-key-file, and print what names it", roles=(CLIENT,), flags=(OUTPUT,)),
    Command("logout", help="forget the kept tokens, here and at the issuer", roles=(CLIENT,)),
    Command(
        "run",
        help="run a command against clusters: it ends, and so do the kubeconfig and the connection that it had",
        roles=(CLIENT,),
        flags=(Flag("--parallel", help="clusters at a time, where several are named (default: 4)", metavar="N"),),
        takes_command=True,
    ),
    Command(
        "doctor",
        help="look at each hop of the way, and say what is wrong with the first that fails",
        roles=(CLIENT,),
        flags=(DIAGNOSIS_OUTPUT,),
        arguments=(("name", "cluster to look at (default: --cluster)", ()),),
        optional=True,
    ),
    Command(
        "speedtest",
        help="measure round trips and throughput of each hop to a cluster",
        roles=(CLIENT,),
        flags=(
            Flag("--seconds", help="how long to read (default: 5)", metavar="N"),
            DIAGNOSIS_OUTPUT,
        ),
        arguments=(("name", "cluster to measure (default: --cluster)", ()),),
        optional=True,
    ),
    Command(
        "status",
        help="show what is connected here; with --role client check login, relay and cluster",
        roles=(CLIENT,),
        flags=(OUTPUT,),
    ),
    Command("run", help="run the role (the default)", roles=(RELAY, AGENT)),
    Command("enroll", help="trade the join token for a certificate, then end", roles=(AGENT,)),
    Command(
        "audit",
        "verify",
        help="check audit logs for records that are missing or were changed",
        roles=(AGENT,),
        flags=(
            Flag(
                "--anchors",
                help="an agent's log (JSON) with the heads of the chains; may be repeated",
                kind=LIST,
                metavar="FILE",
            ),
            TEXT_OUTPUT,
        ),
        arguments=(("file", "an audit log, as it was written; .gz too", ()),),
        repeated=True,
    ),
    Command(
        "token",
        "create",
        help="make a join token for a cluster's agents",
        roles=(RELAY,),
        flags=(
            Flag("--cluster", help="name of the cluster", metavar="NAME"),
            Flag("--uses", help="how often it may be used (default: 1)", metavar="N"),
            Flag("--ttl", help="how long it lives, as 1h or 7d (default: 1h)", metavar="DURATION"),
            Flag("--rebind", help="let the cluster come back with another CA", kind=ON),
            Flag(
                "--kube-server",
                help="for an agent that is no pod: https://host:port of its API server",
                metavar="URL",
            ),
            Flag("--kube-ca-file", help="CA of that API server, on the agent's machine", metavar="FILE"),
            Flag("--kube-token-file", help="the agent's own token there", metavar="FILE"),
            Flag("--kube-client-certificate-file", help="or its client certificate", metavar="FILE"),
            Flag("--kube-client-key-file", help="key of that certificate", metavar="FILE"),
            OUTPUT,
        ),
    ),
    Command("token", "list", help="list join tokens", roles=(RELAY,), flags=(OUTPUT,)),
    Command(
        "token",
        "delete",
        help="delete a join token",
        roles=(RELAY,),
        arguments=(("id", "id of the token, the part before the dot", ()),),
    ),
    Command("cluster", "list", help="list enrolled clusters", roles=(RELAY,), flags=(OUTPUT,)),
    Command(
        "cluster", "revoke", help="cut a cluster off and refuse it", roles=(RELAY,), arguments=(_CLUSTER_ARGUMENT,)
    ),
    Command("cluster", "restore", help="let a revoked cluster back in", roles=(RELAY,), arguments=(_CLUSTER_ARGUMENT,)),
    Command(
        "cluster", "delete", help="forget a cluster that is no more", roles=(RELAY,), arguments=(_CLUSTER_ARGUMENT,)
    ),
    Command("session", "list", help="list the sessions that run now", roles=(RELAY,), flags=(OUTPUT,)),
    Command(
        "session",
        "end",
        help="end one session",
        roles=(RELAY,),
        arguments=(("session", "id of the session, as `session list` shows it, or its first one", ()),),
        flags=(Flag("--reason", help="shown to the user", metavar="TEXT"),),
    ),
    Command(
        "doctor",
        help="check this role and all that it depends on, and say what to do",
        roles=(RELAY, AGENT),
        flags=(DIAGNOSIS_OUTPUT,),
    ),
    Command(
        "user",
        "revoke",
        help="end a user's sessions and refuse the tokens issued before a time",
        roles=(RELAY,),
        arguments=(_USER_ARGUMENT,),
        flags=(
            Flag(
                "--before",
                help="refuse tokens issued before, as 2026-11-25T12:00:00Z or 2026-11-25 (default: now)",
                metavar="TIME",
            ),
            Flag("--reason", help="shown to the user", metavar="TEXT"),
        ),
    ),
    Command("user", "restore", help="take a revocation back", roles=(RELAY,), arguments=(_USER_ARGUMENT,)),
    Command("user", "list", help="list the users who are revoked", roles=(RELAY,), flags=(OUTPUT,)),
    Command(
        "config",
        "check",
        help="check the settings and the files they name as a start does; exit code 2 with errors",
        flags=(TEXT_OUTPUT,),
    ),
    Command(
        "config",
        "init",
        help="write the annotated settings files of the role, filled from the flags; what is there is left alone",
        flags=(
            Flag(
                "--directory",
                help="where to (default: /etc/arcbridge for root, else ~/.config/arcbridge)",
                metavar="DIR",
            ),
            Flag("--issuer", help="the OIDC issuer whose tokens count, or at which to log in", metavar="URL"),
            Flag("--client-id", help="this program's client id there (default: arcbridge)", metavar="ID"),
            Flag(
                "--audience",
                help="audience of the tokens for this end (default: arcbridge-relay; an agent's is arcbridge-NAME)",
                metavar="AUDIENCE",
            ),
            Flag(
                "--group",
                help="a group that may reach every cluster (relay), as the issuer names it; may be repeated",
                kind=LIST,
                metavar="NAME",
            ),
        ),
    ),
    Command(
        "config",
        "print",
        help="print the settings in force",
        flags=(SETTINGS_OUTPUT,),
    ),
    Command("version", help="print the version"),
    Command(
        "completion",
        help="print a completion script for a shell",
        arguments=(("shell", "which shell", ("bash", "zsh", "fish")),),
    ),
)

DEFAULT_COMMAND = {RELAY: ("run",), AGENT: ("run",), CLIENT: ("proxy",)}

GROUP_HELP = {
    "audit": "audit logs",
    "token": "join tokens",
    "cluster": "enrolled clusters",
    "session": "sessions that run now",
    "user": "users whose logins are revoked",
    "config": "settings",
}


def flags_of(role: str) -> tuple[Flag, ...]:
    """Return all flags that a role knows, in the order of the help."""
    return tuple(flag for flag in FLAGS if role in flag.roles)


def commands_of(role: str) -> tuple[Command, ...]:
    return tuple(command for command in COMMANDS if role in command.roles)


def find_command(role: str, path: tuple[str, ...]) -> Command:
    return next(command for command in commands_of(role) if command.path == path)
