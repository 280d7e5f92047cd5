"""Settings of the three roles, and the one loader for them.

Each role's settings are one frozen dataclass whose fields are exactly the keys of its TOML file: the annotated
files in `config/` document every one. Precedence: flag > environment (`ARCBRIDGE_<FLAG>`) > file > default.
An unknown key is an error that names its path, the file and the nearest known key. Secrets are never settings:
settings name *files* that hold them.

Durations are seconds, sizes bytes, addresses `host:port`. `Path` values given in a file are relative to that file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ObserveConfig:
    """Logs, metrics and health, alike in every role."""

    listen: str = ""
    """`host:port` of /metrics, /healthz, /livez and /readyz; empty: none. Port 0 picks one (its number is logged)."""
    log_level: str = "info"
    log_format: str = "auto"
    """`json`, `console`, or `auto`: console on a terminal, JSON elsewhere."""


@dataclass(frozen=True, slots=True)
class RelayTlsConfig:
    """The relay's outer certificate. Both empty: the relay's own CA issues one for `public_address`."""

    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True)
class RelayLimitsConfig:
    """Bounds on what strangers and users may hold at the relay; why each default: docs/operations.md."""

    unauthenticated: int = 1000
    unauthenticated_per_address: int = 100
    sessions: int = 20000
    pending_joins: int = 2000
    join_deadline: float = 15.0


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
    agent_certificate_life: float = 7 * 86400.0
    tls: RelayTlsConfig = field(default_factory=RelayTlsConfig)
    limits: RelayLimitsConfig = field(default_factory=RelayLimitsConfig)
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


@dataclass(frozen=True, slots=True)
class TargetConfig:
    """One TCP target that OPEN may name besides `kubernetes`; deny by default, so users or groups are needed."""

    address: str = ""
    users: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AgentStateConfig:
    """Where the agent keeps its credential and the cluster's CA: exactly one of the two."""

    directory: Path | None = None
    secret: str = ""
    """`namespace/name` of a Secret that all pods of the DaemonSet share."""


@dataclass(frozen=True, slots=True)
class AuditConfig:
    file: str = "-"
    """Path of the audit log (JSON lines); `-` is standard output; empty switches it off."""


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
    token_mode: bool = True
    """Whether sessions may carry the caller's own ServiceAccount token instead of an OIDC identity."""
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)
    targets: dict[str, TargetConfig] = field(default_factory=dict)
    state: AgentStateConfig = field(default_factory=AgentStateConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)


@dataclass(frozen=True, slots=True)
class LoginConfig:
    """Where tokens come from: files, a command, or an OIDC login."""

    access_token_file: Path | None = None
    """Token for the relay, re-read on every use."""
    id_token_file: Path | None = None
    """Token for the cluster; none: the access token file's (needs one audience for both, a weaker setting)."""
    command: tuple[str, ...] = ()
    """Prints JSON `{"access_token": …, "id_token": …, "expires_at": unix seconds}` on stdout."""
    issuer: str = ""
    client_id: str = ""
    scopes: tuple[str, ...] = ("openid", "profile", "email", "offline_access")
    audience: str = ""
    """Audience to ask for in the access token, where the issuer takes such a parameter."""
    ca_file: Path | None = None
    """CA of the issuer's HTTPS certificate; none: the system's."""
    grant_type: str = "auto"
    """`auto`, `device-code` or `authcode`."""


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """`config/client.toml`."""

    relay: str = ""
    """`https://host:port`. Required."""
    relay_ca_file: Path | None = None
    relay_ca_pin: str = ""
    """How to know the relay: a CA file, or a pin of its CA; neither: the system's CAs."""
    cluster: str = ""
    cluster_ca_pin: str = ""
    pins_file: Path | None = None
    """TOML table `[clusters]` with `name = "sha256:…"`, as an organisation ships it."""
    trust_first_use: bool = False
    port: int = 47011
    file: str = ""
    """Where the kubeconfig goes: a path, `-` for stdout, empty for KUBECONFIG or ~/.kube/config."""
    kube_context: str = ""
    context_switch: bool = True
    token_file: Path | None = None
    """A ServiceAccount token for the cluster: goes to the API server unchanged, no impersonation."""
    state_dir: Path | None = None
    login: LoginConfig = field(default_factory=LoginConfig)
    observe: ObserveConfig = field(default_factory=ObserveConfig)
