"""Settings of the three roles: what each is, its type, unit and default.

Each role's settings are one frozen dataclass whose fields are exactly the keys of its TOML file: the annotated
files in `config/` document every one. `arcbridge.settings.config_loader` reads them, and each role's `settings.py`
checks their values. Secrets are never settings: settings name *files* that hold them.

Durations are seconds, sizes bytes, addresses `host:port`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from arcbridge.errors import ConfigError
from arcbridge.settings.choices import BROWSER, DEVICE

_MAY_BE_PATH = {"path": True}
"""Marks a text that is the path of a file unless it is empty or `-`; then it is made absolute as paths are."""


@dataclass(frozen=True, slots=True)
class ObserveConfig:
    """Logs, metrics and health, alike in every role."""

    listen: str = ""
    """`host:port` of /metrics, /healthz, /livez, /readyz and /statusz; empty: none. Port 0: any (it is logged)."""
    log_level: str = "info"
    log_format: str = "auto"
    """`json`, `console`, or `auto`: console on a terminal, JSON elsewhere."""


@dataclass(frozen=True, slots=True)
class RelayTlsConfig:
    """The relay's outer certificate. Both empty: the relay's own CA issues one for `public_address`."""

    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True)
class RelayUserLimitsConfig:
    """Other bounds for a user, or for each user of a group; 0: as for every user."""

    sessions: int = 0
    joins_per_minute: int = 0


@dataclass(frozen=True, slots=True)
class RelayLimitsConfig:
    """Bounds on what strangers and users may hold at the relay; why each default: docs/change.md."""

    unauthenticated: int = 1000
    """Connections at once that have not shown who they are."""
    unauthenticated_per_address: int = 100
    """Connections of one address at once that have not shown who they are."""
    connections_per_second_per_address: int = 200
    """New connections of one address each second, with five seconds' worth at once."""
    loop_share_per_address: int = 50
    """Per cent of the event loop's time that handshakes and credentials of one address may take while others wait."""
    loop_share_per_user: int = 50
    """Per cent of the event loop's time that sessions, joins and requests of one user may take while others wait."""
    sessions: int = 20000
    """Sessions at once; each takes two file descriptors."""
    agents: int = 10000
    """Control connections of agents at once; each takes a file descriptor."""
    pending_joins: int = 2000
    """Clients at once that wait for an agent to answer."""
    agents_per_second: int = 300
    """Agents that may connect each second; who is too early waits for a moment, or comes again later."""
    join_deadline: float = 15.0
    """Seconds from a client's request until an agent must have joined it."""
    sessions_per_user: int = 200
    """Sessions of one user at once."""
    joins_per_minute_per_user: int = 120
    """Sessions that one user may begin each minute, with as many at once."""
    requests_per_minute_per_user: int = 240
    """Requests of one user to the HTTP API each minute, with as many at once."""
    clusters_with_metrics: int = 500
    """Clusters that have metrics of their own, by name; 0: none."""
    groups: dict[str, RelayUserLimitsConfig] = field(default_factory=dict)
    """By the name of the group, as claims are mapped here; of several that apply the largest counts."""
    users: dict[str, RelayUserLimitsConfig] = field(default_factory=dict)
    """By the user name, as claims are mapped here; goes before groups."""
    actors: dict[str, RelayUserLimitsConfig] = field(default_factory=dict)
    """By the name of the actor, `*`: each without a table of its own; over all users for whom it acts. 0: no bound."""


@dataclass(frozen=True, slots=True)
class RelayFleetConfig:
    """Several relays that act as one, over NATS. Without servers this relay stands alone and the rest is not read."""

    servers: tuple[str, ...] = ()
    """`nats://host:port`, or `tls://host:port` where only TLS will do."""
    name: str = ""
    """What NATS permissions know this relay by, in the subjects of its replies; empty: a random one."""
    internal_address: str = ""
    """`host:port` at which the other relays reach this one's port. Needed where all share one public address."""
    credentials: Path | None = None
    """A NATS credentials file (JWT and nkey)."""
    user: str = ""
    """User at the NATS servers, with `password_file`."""
    password_file: Path | None = None
    """A file with the password of `user`."""
    ca_file: Path | None = None
    """CA of the NATS servers' certificates; none: the system's."""
    certificate: Path | None = None
    """Client certificate for NATS servers that ask for one."""
    key: Path | None = None
    """Key of `certificate`."""
    prefix: str = "arcbridge"
    """First part of all subjects. Fleets that share NATS servers differ in it, and in `bucket`."""
    bucket: str = "arcbridge"
    """JetStream key-value bucket of the registry; made when it is not there."""
    replicas: int = 1
    """Copies of the bucket when it is made; 3 in a NATS cluster."""
    outage: float = 1800.0
    """Seconds for which clusters known before are still served when NATS does not answer."""


@dataclass(frozen=True, slots=True)
class IssuerLoginConfig:
    """What a login asks an issuer for: as a client's settings say it, or as a relay tells its clients."""

    issuer: str = ""
    """Empty: a client gets its tokens elsewhere, and a relay tells nothing."""
    client_id: str = ""
    """The id of the client at the issuer; a relay names a public one. Required with `issuer`."""
    scopes: tuple[str, ...] = ("openid", "profile", "email", "offline_access")
    audience: str = ""
    """Audience to ask for in the access token, where the issuer takes such a parameter."""
    cluster_audience: str = ""
    """Audience of the token for a cluster, `{cluster}` being its name; empty: all clusters get the one id token."""
    cluster_audience_by: str = "resource"
    """How a token for that audience is asked for: `resource`, `audience` or `scope` at a refresh, or `exchange` (RFC
    8693)."""
    cluster_scopes: tuple[str, ...] = ()
    """Scopes of the request for a cluster's token, `{audience}` being its audience; empty: by `scope` that alone."""
    relay_scopes: tuple[str, ...] = ()
    """Scopes of a refresh for the relay's token, where the login's own token has more; empty: it is asked for none."""
    issuer_origins: tuple[str, ...] = ()
    """Origins (`https://host[:port]`) at which the issuer may have endpoints, or its page for device codes, besides its
    own."""
    dpop: bool = True
    """Whether tokens are bound to the client's key at the issuer (RFC 9449) where it offers that."""


@dataclass(frozen=True, slots=True)
class RelayLoginConfig(IssuerLoginConfig):
    """What `/v1/login` tells clients about where they log in; without an issuer the relay tells nothing."""

    grant_types: tuple[str, ...] = (BROWSER, DEVICE)
    """Ways to log in that the issuer offers this client: `authcode`, `device-code`, `client-credentials`."""


@dataclass(frozen=True, slots=True)
class RelayClientConfig:
    """The single-file client, as the relay serves it to new users; off unless a directory is given."""

    directory: Path | None = None
    """Holds `arcbridge-PLATFORM` for each platform, as `make dist` names them."""


@dataclass(frozen=True, slots=True)
class RelayPageConfig:
    """The administrators' page, which shows facts and changes nothing; off unless a client id is given."""

    client_id: str = ""
    """Id of the page's own client at the issuer, which the relay asks for a login by the code flow."""
    issuer: str = ""
    """URL of an issuer of `authentication`; empty: the only one that is there."""
    client_secret_file: Path | None = None
    """A file with the client's secret, read at each login; none: the client is public."""
    scopes: tuple[str, ...] = ("openid", "profile", "email")
    """What a login asks for: enough for the claims of which `authentication` makes the user and the groups."""
    session: float = 3600.0
    """Seconds for which a login counts; a right that the policy takes, and a revoked login, end it within ten
    seconds."""


@dataclass(frozen=True, slots=True)
class GraphConfig:
    """One tenant of Microsoft Entra ID, whose groups are looked up in Microsoft Graph where they did not fit into a
    token, and the application as which relay or agent asks; it has one of the three credentials."""

    issuers: tuple[str, ...] = ()
    """Issuers of the authentication file whose tokens are meant. Required."""
    tenant: str = ""
    """The directory (tenant) id, as in `tid`. Required."""
    client_id: str = ""
    """The application (client) id. Required."""
    certificate_file: Path | None = None
    """Certificate of the application (PEM), and its private key."""
    key_file: Path | None = None
    client_secret_file: Path | None = None
    federated_token_file: Path | None = None
    """A token of another issuer that a federated credential of the application names, such as a pod's."""
    url: str = "https://graph.microsoft.com"
    """Microsoft Graph; national clouds have other hosts."""
    token_endpoint: str = ""
    """Where the application gets its tokens; empty: that of the tenant at login.microsoftonline.com."""
    ca_file: Path | None = None
    """CA of both servers' HTTPS certificates; none: the system's."""
    cache: float = 300.0
    """Seconds for which the groups of a user are remembered."""


@dataclass(frozen=True, slots=True)
class AuditSinkConfig:
    """A place to which the records of the audit log's file are carried on."""

    kind: str = ""
    """`http`, `syslog` (RFC 5424 over TLS) or `stdout`. Required."""
    address: str = ""
    """http: the URL that takes the records, `https://`, or `http://` of this machine's loopback. syslog: `host:port`,
    or a host for port 6514."""
    ca_file: Path | None = None
    """CA of the collector's certificate; none: the system's."""
    certificate: Path | None = None
    """Client certificate and key for a collector that asks for one; both or neither."""
    key: Path | None = None
    token_file: Path | None = None
    """http: a file with what stands behind `token_scheme` in Authorization, re-read on every use."""
    token_scheme: str = "Bearer"
    format: str = "lines"
    """http: `lines`, a record each (application/x-ndjson), or `array`, one JSON array."""
    gzip: bool = False
    """http: whether bodies are compressed."""
    facility: int = 13
    """syslog: 0 to 23; 13 is the log audit (RFC 5424 §6.2.1)."""
    severity: int = 6
    """syslog: 0 to 7; 6 is informational."""
    max_message: int = 8192
    """syslog: bytes of a message; of a longer one the record is cut, which the message says."""
    close_notify: bool = True
    """syslog: whether a batch counts as delivered only where the receiver ends TLS in order, and not by FIN alone."""
    batch_records: int = 500
    batch_bytes: int = 1024**2
    interval: float = 1.0
    """Seconds between two looks for new records, for which they gather."""
    timeout: float = 30.0
    """Seconds for one batch, from the connection to the collector's answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditFilesConfig:
    """What becomes of an audit log's file, alike in relay and agent."""

    rotate_bytes: int = 0
    """Size at which the role itself renames the file and begins a new one; 0: another program does, such as
    logrotate."""
    keep_bytes: int = 1024**3
    """Bytes of files that the role has renamed; the oldest are removed above it."""
    keep_age: float = 0.0
    """Seconds for which such a file is kept after its last record; 0: no bound."""
    sinks: dict[str, AuditSinkConfig] = field(default_factory=dict)
    """By a name that the operator gives."""


@dataclass(frozen=True, slots=True)
class RelayAuditConfig(AuditFilesConfig):
    """What is recorded of administrators' acts, enrolments, policies and settings."""

    file: str = "audit.jsonl"
    """Path of the audit log (JSON lines), a relative one within `data_dir`; `-` is standard output; empty switches it
    off."""
    on_failure: str = "continue"
    """While the log cannot be written: `continue` (what is missing is counted), or `refuse` acts and enrolments."""
    fsync: bool = True
    """Whether records reach the disk before what they record is done. There are few."""


@dataclass(frozen=True, slots=True)
class RelayConfig:
    """`config/relay.toml`."""

    listen: str = "0.0.0.0:443"
    public_address: str = ""
    """`host:port` that agents and clients dial; its host is in the relay's certificate. Required."""
    data_dir: Path = Path("/var/lib/arcbridge")
    authentication: Path | None = None
    """AuthenticationConfiguration (YAML) for the access tokens of clients. Required."""
    policy: Path | None = None
    """Who may reach which cluster (TOML). Required: nothing is allowed without it."""
    policy_share: int = 50
    """Per cent of the connected users who may lose a right by one change of the policy; a change that takes it from
    more, and from three at least, is held back until it is accepted. So is one without any rule. 0: none is."""
    policy_hold: float = 600.0
    """Seconds after which a change that is held back counts all the same, where the file stays as it is; 0: never."""
    recovery_wait: float = 30.0
    """Seconds for which users begin nothing after a restore or a loss of the registry, while agents give back the
    revocations that they know; less where all known clusters have. 0: users are let in at once."""
    proof: str = "if-bound"
    """Proofs of possession: `required`, `if-bound` (for tokens that are bound to a key), or `off` (none is looked at,
    and bound tokens are refused)."""
    proxy_protocol_from: tuple[str, ...] = ()
    """Addresses and networks of load balancers whose connections begin with a PROXY protocol header of version 2."""
    max_token_lifetime: float = 172800.0
    """Seconds from `iat` to `exp` that an access token may have."""
    actor_clients: tuple[str, ...] = ()
    """Client ids of programs that act for users: a token that was issued to one of them has it as its actor, as one
    with `act` has (RFC 8693). What names no actor is for users alone."""
    claim_sources: tuple[str, ...] = ()
    """`https://host:port` of servers besides the issuer itself from which the groups of a token are fetched where the
    token says so (OpenID Connect Core 5.6.2)."""
    workers: int = 1
    """Processes that share the one port; 0: one for each core this process may use. Linux only above 1."""
    agent_certificate_life: float = 7 * 86400.0
    tls: RelayTlsConfig = field(default_factory=RelayTlsConfig)
    login: RelayLoginConfig = field(default_factory=RelayLoginConfig)
    client: RelayClientConfig = field(default_factory=RelayClientConfig)
    page: RelayPageConfig = field(default_factory=RelayPageConfig)
    audit: RelayAuditConfig = field(default_factory=RelayAuditConfig)
    fleet: RelayFleetConfig = field(default_factory=RelayFleetConfig)
    limits: RelayLimitsConfig = field(default_factory=RelayLimitsConfig)
    graph: dict[str, GraphConfig] = field(default_factory=dict)
    """By a name that the operator gives."""
    observe: ObserveConfig = field(default_factory=ObserveConfig)


@dataclass(frozen=True, slots=True)
class KubernetesConfig:
    """How the agent reaches the API server. All empty: in-cluster (KUBERNETES_SERVICE_HOST, projected token)."""

    server: str = ""
    """`https://host:port`."""
    ca_file: Path | None = None
    token_file: Path | None = None
    """The agent's own ServiceAccount token, re-read as it rotates."""
    client_certificate_file: Path | None = None
    client_key_file: Path | None = None
    credential_bundle_file: Path | None = None
    """Key and certificate chain of the agent's pod in one file, re-read as the kubelet renews them; no token then."""
    impersonate_groups: tuple[str, ...] = ("*",)
    """Groups that the agent's identity may impersonate: a user's other groups are left out. `*` alone: all."""
    drain_label: str = ""
    """`key=value` that the agent's pod takes on as a label while it drains; empty: none."""


@dataclass(frozen=True, slots=True)
class TargetConfig:
    """One TCP target that OPEN may name besides `kubernetes`; deny by default, so users or groups are needed."""

    address: str = ""
    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    actors: tuple[str, ...] = ()
    """Actors that may connect for these users, `*`: each; none: the users alone."""


@dataclass(frozen=True, slots=True)
class AgentStateConfig:
    """Where the agent keeps its credential and the cluster's CA: exactly one of the two."""

    directory: Path | None = None
    secret: str = ""
    """`namespace/name` of a Secret that all pods of the DaemonSet share."""


@dataclass(frozen=True, slots=True)
class AuditConfig(AuditFilesConfig):
    file: str = field(default="-", metadata=_MAY_BE_PATH)
    """Path of the audit log (JSON lines); `-` is standard output; empty switches it off."""
    on_failure: str = "continue"
    """While the log cannot be written: `continue` (what is missing is counted), or `refuse` every request."""
    commands: bool = True
    """Whether the command lines of exec and of ephemeral containers are recorded."""
    fsync: bool = False
    """Whether records reach the disk before what they record leaves; else they outlive the process, not the machine."""


@dataclass(frozen=True, slots=True)
class LimitsOverrideConfig:
    """What one group or one user may take, where that differs from `AgentLimitsConfig`; None: it does not."""

    requests_per_second: int | None = None
    request_burst: int | None = None
    concurrent_requests: int | None = None
    streams: int | None = None
    upgraded_streams: int | None = None
    bytes_per_second_to_cluster: int | None = None
    bytes_per_second_to_user: int | None = None
    bytes_per_day: int | None = None
    sessions: int | None = None
    apiserver_seats: int | None = None
    connects_per_second: int | None = None
    waiting_bytes: int | None = None
    audit_bytes_per_second: int | None = None
    loop_share: int | None = None


@dataclass(frozen=True, slots=True)
class ActorLimitsConfig:
    """What one actor may take of one agent process, over all users for whom it acts; 0: no limit. The limits of each of
    these users count besides."""

    sessions: int = 0
    requests_per_second: int = 0
    """After a burst of five times as many."""
    concurrent_requests: int = 0
    """Requests under way, watches and upgraded ones included."""


@dataclass(frozen=True, slots=True)
class AgentLimitsConfig:
    """What one user may take of one agent process, over all sessions; 0: no limit. Why each default:
    docs/change.md."""

    requests_per_second: int = 200
    """Requests each second, after a burst."""
    request_burst: int = 1000
    """Requests that may come at once after a pause."""
    concurrent_requests: int = 1000
    """Requests under way, watches and upgraded ones included."""
    streams: int = 2000
    """Connections of kubectl and other programs, idle ones included, and those to TCP targets."""
    upgraded_streams: int = 500
    """`exec`, `attach` and `port-forward`."""
    bytes_per_second_to_cluster: int = 1024**3
    """Bytes that go from the user to the cluster each second; more wait."""
    bytes_per_second_to_user: int = 1024**3
    """Bytes that go from the cluster to the user each second; more wait."""
    bytes_per_day: int = 1024**4
    """Bytes of both directions together, from 00:00 UTC."""
    sessions: int = 32
    """Sessions, those without a connection included."""
    apiserver_seats: int = 16
    """Requests that the API server works on, or whose answers the user does not read; further ones wait. Watches, logs
    and upgraded streams take no seat."""
    connects_per_second: int = 50
    """Connections to the API server, after a burst of four times as many; further ones wait for their turn."""
    waiting_bytes: int = 64 * 1024**2
    """Bytes that wait towards the user; above it the API server is read in small portions and no further."""
    audit_bytes_per_second: int = 128 * 1024
    """Bytes of audit records, after a burst of 16 seconds' worth. Above it what must be recorded is refused, and
    records of what only reads are left out and counted."""
    loop_share: int = 50
    """Per cent of the event loop's time while others wait; a user above it is slowed down, and then refused."""
    agent_connects_per_second: int = 200
    """Connections to the API server of all users together, after a burst of twice as many; 0: no limit."""
    agent_warm_connections: int = 64
    """Connections to the API server that are kept for the next `exec`, `attach` or `port-forward` of sessions that had
    one in the last minute, one for a session; 0: none."""
    agent_waiting_bytes: int = 256 * 1024**2
    """Bytes that wait towards all users together; above it the streams that have been stalled longest are reset."""
    groups: dict[str, LimitsOverrideConfig] = field(default_factory=dict)
    """By group, as claim mapping names it. Of several groups the largest value counts."""
    users: dict[str, LimitsOverrideConfig] = field(default_factory=dict)
    """By user name, as claim mapping names it; counts before any group."""
    actors: dict[str, ActorLimitsConfig] = field(default_factory=dict)
    """By the name of the actor, `*`: each that has no table of its own; over all users for whom it acts."""


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """How long an agent serves a session."""

    max_age: float = 43200.0
    """Seconds that a session lasts at most, however often its token is renewed; it never outlives its token."""
    end_upgraded_streams: bool = True
    """Whether exec, attach and port-forward end when the token is renewed with fewer groups or another name: the API
    server judges them at their start alone."""
    drain: float = 30.0
    """Seconds for which an agent that is told to stop serves the streams that run; no session begins meanwhile."""


@dataclass(frozen=True, slots=True)
class RegionConfig:
    """`[regions.NAME]` of agents and clients."""

    relays: tuple[str, ...] = ()
    """`https://host:port` of the relays of this region."""


@dataclass(frozen=True, slots=True)
class TracingConfig:
    """Where spans go of requests whose callers trace them."""

    endpoint: str = ""
    """URL that takes OTLP over HTTP in JSON, `https://`, or `http://` of this machine's loopback; empty: there are no
    spans."""
    ca_file: Path | None = None
    """CA of the collector's certificate; none: the system's."""
    token_file: Path | None = None
    """A file with what stands behind `Bearer` in Authorization, re-read on every use."""


@dataclass(frozen=True, slots=True)
class ElevationConfig:
    """Groups that are lent to users for a time, by AccessRules and AccessRequests of the cluster."""

    groups: tuple[str, ...] = ()
    """The groups that rules may lend, as they are after claim mapping; empty: none is lent, and nothing is watched."""
    default: str = "all"
    """What a user may do to whom nothing is lent: `all` that RBAC allows, or `read-only`."""
    default_groups: tuple[str, ...] = ("*",)
    """For which groups' users `default` holds; `*` alone: for every user."""


@dataclass(frozen=True, slots=True)
class RecordingRuleConfig:
    """Whose `exec` and `attach` are recorded; what is empty leaves none out."""

    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    """Users and groups as claim mapping names them; both empty: everyone."""
    namespaces: tuple[str, ...] = ()
    """Namespaces of the pods; empty: all."""
    required: bool = True
    """Whether a session that cannot be recorded is refused, and ends where its recording fails; else it goes on."""
    typed_input: bool = False
    """Whether what the user types is recorded too, passwords among it."""


@dataclass(frozen=True, slots=True)
class RecordingBucketConfig:
    """The bucket to which finished recordings go, in an object store as Amazon has it; no endpoint: none."""

    endpoint: str = ""
    """`https://host[:port]`, or `http://` of this machine's loopback; the bucket is the first part of its paths."""
    bucket: str = ""
    """Its name."""
    prefix: str = ""
    """What the names of recordings in the bucket begin with, such as `berlin/`."""
    region: str = "us-east-1"
    """Region of the signatures (AWS Signature Version 4)."""
    access_key_file: Path | None = None
    """A file with the id of the access key, re-read on every use."""
    secret_key_file: Path | None = None
    """A file with the secret of that key."""
    ca_file: Path | None = None
    """CA of the store's certificate; none: the system's."""


@dataclass(frozen=True, slots=True)
class RecordingConfig:
    """Recordings of `exec` and `attach`, sealed to recipients; without rules there are none."""

    recipients: tuple[str, ...] = ()
    """age recipients, `age1…` (X25519) or `age1pq1…` (ML-KEM-768 and X25519): each can open every recording."""
    directory: Path | None = None
    """Where recordings are written, and stay unless there is a bucket."""
    directory_bytes: int = 8 * 1024**3
    """Bytes of recordings in the directory; above it no further session is recorded."""
    session_bytes: int = 1024**3
    """Bytes of one recording; above it the recording fails."""
    rules: dict[str, RecordingRuleConfig] = field(default_factory=dict)
    """By a name that the operator gives. Of several that apply the strictest counts."""
    bucket: RecordingBucketConfig = field(default_factory=RecordingBucketConfig)


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """`config/agent.toml`."""

    relays: tuple[str, ...] = ()
    """`https://host:port` of each relay. Required."""
    relay_ca_pin: str = ""
    """`sha256:<hex>` of the relay CA's public key; needed to enrol unless `relay_ca_file` is given."""
    relay_ca_file: Path | None = None
    join_token_file: Path | None = None
    """Holds `id.secret`; needed for the first start and after the certificate has lapsed."""
    authentication: Path | None = None
    """AuthenticationConfiguration (YAML) for the users' cluster tokens; none: only token mode works."""
    forbidden_audiences: tuple[str, ...] = ()
    """Audiences, such as the relay's, that a user's token must not have besides the cluster's."""
    max_token_lifetime: float = 172800.0
    """Seconds from `iat` to `exp` that a user's token may have."""
    actor_clients: tuple[str, ...] = ()
    """Client ids of programs that act for users: a token that was issued to one of them has it as its actor, as one
    with `act` has (RFC 8693). What names no actor is for users alone."""
    claim_sources: tuple[str, ...] = ()
    """`https://host:port` of servers besides the issuer itself from which the groups of a token are fetched where the
    token says so (OpenID Connect Core 5.6.2)."""
    denylist_file: Path | None = None
    """TOML file of users who are not served, read again when it changes; none: only relays revoke users."""
    proof: str = "if-bound"
    """Proofs of possession: `required`, `if-bound` (for tokens that are bound to a key), or `off` (none is looked at,
    and bound tokens are refused)."""
    token_mode: bool = True
    """Whether sessions may carry the caller's own ServiceAccount token instead of an OIDC identity."""
    control_connections: int = 2
    """Relays of the list to be connected to at a time; a number above the list's length means all of them."""
    region: str = ""
    """The region whose relays come before all others, whatever the round trips; empty: the nearest relays do."""
    regions: dict[str, RegionConfig] = field(default_factory=dict)
    """By a name that the operator gives."""
    resumption: bool = True
    """Whether a session outlives its connection; False: what runs is cut with it, and no history is kept."""
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    targets: dict[str, TargetConfig] = field(default_factory=dict)
    """TCP addresses for `forward`, by a name that the operator gives."""
    graph: dict[str, GraphConfig] = field(default_factory=dict)
    """By a name that the operator gives."""
    limits: AgentLimitsConfig = field(default_factory=AgentLimitsConfig)
    state: AgentStateConfig = field(default_factory=AgentStateConfig)
    session: SessionConfig = field(default_factory=SessionConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    tracing: TracingConfig = field(default_factory=TracingConfig)
    elevation: ElevationConfig = field(default_factory=ElevationConfig)
    recording: RecordingConfig = field(default_factory=RecordingConfig)


@dataclass(frozen=True, slots=True)
class LoginConfig(IssuerLoginConfig):
    """Where tokens come from: files, a command, or an OIDC login."""

    access_token_file: Path | None = None
    """Token for the relay, re-read on every use."""
    id_token_file: Path | None = None
    """Token for the cluster."""
    proof_key_file: Path | None = None
    """Private JWK of the key to which tokens are bound; none: a login keeps its own, a command or workload gets a new
    one, and tokens from files are bound to none."""
    one_token: bool = False
    """Whether relay and cluster may get the same token, with which the relay could act as the user in the cluster."""
    command: tuple[str, ...] = ()
    """Prints JSON `{"access_token": …, "id_token": …, "expires_at": unix seconds}` on stdout."""
    workload: str = ""
    """Where a job or pod has its tokens from: `github`, `gitlab`, `kubernetes`, `file:PATH`, `env:NAME`, or, with
    `issuer`, `azure-pipelines`; empty: nowhere."""
    require_bound: bool = False
    """Whether clusters are shown only tokens that are bound to a key of this client."""
    ca_file: Path | None = None
    """CA of the issuer's HTTPS certificate; none: the system's. The token services of GitHub Actions and Azure
    Pipelines are public ones, for which the system's CAs always count."""
    grant_type: str = "auto"
    """`auto`, `device-code`, `authcode`, or `client-credentials` for a program without a person."""
    client_secret_file: Path | None = None
    """The client's secret at the issuer; this or one of the next three for a confidential client, none for a public."""
    client_key_file: Path | None = None
    """Private key (PEM) with which the client signs assertions of its own (private_key_jwt)."""
    client_key_id: str = ""
    """`kid` in the header of such an assertion, where the issuer knows several keys of the client."""
    client_certificate_file: Path | None = None
    """Certificate (PEM) of that key: the assertion names it by `x5t#S256` and has PS256, as Entra ID wants."""
    client_assertion_file: Path | None = None
    """An assertion that another issuer signed, such as a workload's token (RFC 7523); re-read on every use."""
    client_assertion_command: tuple[str, ...] = ()
    """Prints such an assertion on stdout."""
    client_assertion_workload: str = ""
    """`github-actions` or `kubernetes`: this job's or pod's own token is the assertion; empty: none is."""
    client_assertion_audience: str = "api://AzureADTokenExchange"
    """Audience of that token."""
    redirect_port: int | None = None
    """Local port to which the browser comes back; none: 8000, or 18000 where that is in use. 0: any free one."""
    redirect_path: str = ""
    """Path to which the browser comes back, `/` for none; empty: one that belongs to the issuer, where it does not
    announce `iss` (RFC 9207)."""
    pop: bool = False
    """Whether the issuer is asked for tokens that are bound to the key in Entra ID's way (`req_cnf`, `cnf.kid`)."""


CLIENT_CREDENTIALS = (
    "client_secret_file",
    "client_key_file",
    "client_assertion_file",
    "client_assertion_command",
    "client_assertion_workload",
)
"""The settings of a login by which the client proves itself to the issuer; one of them, or `workload` for some."""
OF_ISSUER = (*CLIENT_CREDENTIALS, "client_key_id", "client_certificate_file", "redirect_path", "issuer_origins")
"""The settings of a login that are for one issuer: at another one they would give it what is meant for the first."""


@dataclass(frozen=True, slots=True)
class RestrictConfig:
    """What each session gives up of its user's rights. The agent enforces it, and RBAC decides about the rest."""

    read_only: bool = False
    """Whether a session may get, list and watch alone, without exec, attach, port-forward and proxy."""
    secrets: bool = True
    """Whether it may see Secrets, and have tokens of service accounts made."""
    namespaces: tuple[str, ...] = ()
    """The only namespaces that it may see; empty: all, and what is in none."""
    verbs: tuple[str, ...] = ()
    """The only verbs of Kubernetes that it may use; empty: all."""


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """`config/client.toml`."""

    relay: str = ""
    """`https://host:port` of the one relay: another way to write `relays` with one entry."""
    relays: tuple[str, ...] = ()
    """`https://host:port` of each relay; any of them serves. This or `relay` is required."""
    region: str = ""
    """The region whose relays come before all others, whatever the round trips; empty: the nearest relays do."""
    regions: dict[str, RegionConfig] = field(default_factory=dict)
    """By a name that the operator gives."""
    relay_ca_file: Path | None = None
    relay_ca_pin: str = ""
    """How to know the relays: a CA file, or a pin of their one CA; neither: the system's CAs."""
    cluster: str = ""
    clusters: tuple[str, ...] = ()
    """Further clusters that the same process serves, each on a port of its own."""
    cluster_ca_pin: str = ""
    pins_file: Path | None = None
    """TOML table `[clusters]` with `name = "sha256:…"`, as an organisation ships it."""
    trust_first_use: bool = False
    port: int | None = None
    """Local port; none: 47011 for the first cluster ever reached, then the one the cluster had before. 0 picks one."""
    file: str = field(default="", metadata=_MAY_BE_PATH)
    """Where the kubeconfig goes: a path, `-` for stdout, empty for KUBECONFIG or ~/.kube/config."""
    kube_context: str = ""
    context_switch: bool = True
    remove_context: bool = False
    """Take our entries out of the kubeconfig at the end; otherwise only the former current context is restored."""
    token_file: Path | None = None
    """A ServiceAccount token for the cluster: goes to the API server unchanged, no impersonation."""
    state_dir: Path | None = None
    resumption: bool = True
    """Whether a session outlives its connection; False: what runs is cut with it, and no history is kept."""
    login: LoginConfig = field(default_factory=LoginConfig)
    restrict: RestrictConfig = field(default_factory=RestrictConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)

    def relay_urls(self) -> tuple[str, ...]:
        """Return the relays, whichever way they were given; raises ConfigError when both ways were."""
        if self.relay and self.relays:
            raise ConfigError("relay: given together with relays; put every relay into relays and take relay out")
        return (self.relay,) if self.relay else self.relays

    def region_urls(self) -> tuple[str, ...]:
        """Return the relays of the preferred region."""
        return self.regions[self.region].relays if self.region in self.regions else ()
