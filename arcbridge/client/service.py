"""Composes the client's commands: `proxy` (kubectl), `forward` (TCP targets), and what all commands share.

Nothing here prints or reads a terminal: the command line gives a `Terminal`. The four lines that tools parse are those
of `az connectedk8s proxy`, each shown when it has become true: the port is bound, the kubeconfig is written, and
requests work because a session is up.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import structlog

from arcbridge.client.credentials.identity_summary import cache_of
from arcbridge.client.credentials.token_cache import TokenCache
from arcbridge.client.credentials.tokens import (
    TokenCommand,
    TokenPair,
    Tokens,
    check_token,
    refuse_contradictions,
    with_defaults,
)
from arcbridge.client.kubeconfig.entries import Kubeconfig, Merged, render
from arcbridge.client.kubeconfig.repair import repair_kubeconfigs, running_of
from arcbridge.client.kubeconfig.running import BACKGROUND, Running
from arcbridge.client.relay.relays import Relays
from arcbridge.client.serving.forward import Forward, check_offered, check_target_name
from arcbridge.client.serving.served_cluster import ServedCluster, let_close
from arcbridge.client.session.session_manager import SessionManager
from arcbridge.client.session.trust import Ask, ClusterTrust
from arcbridge.client.settings import required
from arcbridge.client.state import StateDirectory
from arcbridge.errors import ArcbridgeError, ConfigError, Unauthenticated
from arcbridge.net.address import parse_listen
from arcbridge.net.loopback import listen_at
from arcbridge.pki.names import check_cluster_name
from arcbridge.pki.pins import PinStore
from arcbridge.settings.choices import PROGRAM
from arcbridge.settings.config import ClientConfig

if TYPE_CHECKING:
    # aiohttp takes a quarter of a second to import: `login` and metrics need it, `proxy` does not.
    from arcbridge.client.credentials.login import Login, OpenBrowser, Say
    from arcbridge.identity.proof import ProofKey
    from arcbridge.observe.server import ObserveServer

log = structlog.get_logger("arcbridge.client")


@dataclass(frozen=True, slots=True)
class Terminal:
    """How a command talks to its user; given by the command line. With the defaults there is no user to talk to."""

    tell: Say = field(default=lambda line: None)
    """Shows one line of the command's own output (stdout, or stderr where stdout is data)."""
    write_data: Callable[[str], None] = field(default=lambda text: None)
    """Writes a whole document to stdout: the kubeconfig of `--file -`."""
    ask_trust: Ask | None = None
    """Asks whether a cluster's pin is right; None: the user cannot be asked."""
    may_log_in: bool = False
    """Whether a login may wait for the user."""
    open_browser: OpenBrowser | None = None
    """Opens a URL in a browser; None: the system's own."""


class ClientContext:
    """The parts that every command of the client needs, made from its settings.

    Raises ConfigError or StateError for settings that cannot work.
    """

    def __init__(
        self,
        config: ClientConfig,
        terminal: Terminal,
        *,
        token: str = "",
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        login = with_defaults(config.login)
        if login is not config.login:
            config = replace(config, login=login)
        self.config = config
        self.terminal = terminal
        self.environment = environment
        self.state = StateDirectory.find(config.state_dir, environment)
        refuse_contradictions(config.login)
        if token:
            token = check_token(token.encode(), "--token")
        self.tokens = Tokens(
            config.login,
            self._pair(),
            token=token,
            token_file=None if token else config.token_file,
        )
        self.tokens.interactive = terminal.may_log_in
        self.token = token

    @cached_property
    def relays(self) -> Relays:
        """The relays of the settings; raises ConfigError where there are none."""
        return Relays.of(self.config)

    def require_login(self) -> None:
        """Raise Unauthenticated where it is plain, without the network, that no token for the relay can be had.

        A command says so before it does anything that the user would take for success.
        """
        login = self.config.login
        if login.command or login.workload or login.access_token_file is not None or login.id_token_file is not None:
            return
        if not login.issuer:
            raise Unauthenticated(self._no_login())
        if login.grant_type != PROGRAM and not self.tokens.interactive:
            cache = self.token_cache()
            kept = cache.load()
            if not (kept.refresh_token or kept.access_token or kept.id_token):
                raise Unauthenticated(f"{cache.no_login}; run `{self.login_command()}`")

    def _no_login(self) -> str:
        what = "no login is configured"
        if self.tokens.token_mode:
            what = "--token and --token-file are for the cluster, and the relay needs a login of its own"
        command = self.login_command() if self.config.relay_urls() else "arcbridge login https://RELAY"
        return f"{what}; run `{command}`, or give --access-token-file and --id-token-file, or --oidc-issuer-url"

    def login_command(self) -> str:
        """Return the command that logs in with these settings, for messages."""
        from arcbridge.client.relay.relay_profile import RelayProfiles, login_command

        return login_command(self.config, RelayProfiles(self.state.path))

    def _pair(self) -> TokenPair | None:
        login = self.config.login
        if login.workload and not login.issuer:
            from arcbridge.client.credentials.workload import WorkloadTokens

            return WorkloadTokens(login, key=self._key(), environment=self.environment)
        if login.command:
            return TokenCommand(login.command, key=self._key(), environment=self.environment)
        if login.issuer and (login.grant_type == PROGRAM or login.workload):
            from arcbridge.client.credentials.client_credentials import ClientCredentials

            return ClientCredentials(login, key=self._key(), environment=self.environment)
        return self.login() if login.issuer else None

    def _key(self) -> ProofKey | None:
        """Return the key of the settings, which must exist; None: each source of tokens has its own."""
        file = self.config.login.proof_key_file
        if file is None:
            return None
        from arcbridge.client.credentials import proof_keys

        key = proof_keys.load(file, of_settings=True)
        if key is None:
            raise ConfigError(f"login.proof_key_file: {file} does not exist; `arcbridge --role client key` makes it")
        return key

    def login(self) -> Login:
        """Return the configured OIDC login; raises ConfigError when there is none."""
        login = self.config.login
        if not login.issuer:
            raise ConfigError("login.issuer: no OIDC login is configured; give --oidc-issuer-url and --oidc-client-id")
        if login.grant_type == PROGRAM or login.workload:
            raise ConfigError("login.grant_type: client-credentials has no login; each command asks for its tokens")
        from arcbridge.client.credentials.login import Login

        return Login(
            login,
            self.token_cache(),
            say=self.terminal.tell,
            open_browser=self.terminal.open_browser,
            command=self.login_command(),
        )

    def token_cache(self) -> TokenCache:
        return cache_of(self.config, self.state)

    def clusters(self) -> list[str]:
        """Return the clusters that were named, canonical, each once; raises ConfigError when there is none."""
        names = list(dict.fromkeys(filter(None, (self.config.cluster, *self.config.clusters))))
        if not names:
            raise ConfigError("cluster: required but not set; give --cluster NAME (`clusters` lists them)")
        for name in names:
            try:
                check_cluster_name(name)
            except ConfigError as error:
                raise ConfigError(f"flag --cluster: {name[:64]!r}: {error.message}") from error
        return names

    def session(self, cluster: str) -> SessionManager:
        return SessionManager(
            self.relays.apart(),
            cluster,
            self.tokens.for_cluster(cluster),
            self.trust(),
            resumption=self.config.resumption,
        )

    def served(self, cluster: str, clock: Callable[[], float] = time.time) -> ServedCluster:
        """Return a cluster to be served on a local port."""
        return ServedCluster(self.session(cluster), self.config, self.state, self.relays.names, self.token, clock)

    def trust(self, *, first_use: bool = True) -> ClusterTrust:
        """Return the rule for clusters; without `first_use` none is trusted unseen, whatever the settings say."""
        config = self.config
        return ClusterTrust(
            pin=config.cluster_ca_pin,
            pins_file=config.pins_file,
            remembered=PinStore(self.state.pins_file, relay=self.relays.names[0]),
            first_use=config.trust_first_use and first_use,
            ask=self.terminal.ask_trust,
            relays=self.relays.names,
        )


async def run_proxy(
    config: ClientConfig,
    terminal: Terminal,
    *,
    token: str = "",
    environment: Mapping[str, str] = os.environ,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve the clusters of `config` until cancelled; then put back what was changed.

    Raises ArcbridgeError when the start fails: nothing was changed then.
    """
    context = ClientContext(config, terminal, token=token, environment=environment)
    clusters = context.clusters()
    if not config.relay_urls():
        context.require_login()  # its error says to log in, which sets the relay as well
    required(config, environment)
    if len(clusters) > 1:
        for flag, value in (("--kube-context", config.kube_context), ("--cluster-ca-pin", config.cluster_ca_pin)):
            if value:
                raise ConfigError(f"flag {flag}: fits one cluster, but {len(clusters)} were named")
        if config.port:
            raise ConfigError(f"flag --port: fits one cluster, but {len(clusters)} were named; each keeps its own")
    to_stdout = config.file == "-"
    if to_stdout and len(clusters) > 1:
        raise ConfigError("flag --file: standard output takes the kubeconfig of one cluster; name one, or a file")
    running = running_of(context.state, environment)
    kubeconfig = None if to_stdout else Kubeconfig.find(config.file, environment)
    if kubeconfig is not None:
        await asyncio.to_thread(repair_kubeconfigs, context.state, running)
        # Before any login, so that no user logs in for nothing.
        for cluster in clusters:
            await asyncio.to_thread(kubeconfig.check, config.kube_context or cluster, cluster, context.relays.names)
        waiting = [one for one in clusters if not _told_of_another(kubeconfig, running, config, one, terminal)]
        if not waiting:
            return
        clusters = waiting
    context.require_login()
    proxies = [context.served(cluster) for cluster in clusters]
    observer: ObserveServer | None = None
    try:
        for proxy in proxies:
            if moved := proxy.bind():
                terminal.tell(moved)
            terminal.tell(f"Proxy is listening on port {proxy.port}")
        observer = await _observe(config, proxies)
        await _together([proxy.session.connect_once() for proxy in proxies])
        merged: list[Merged] = []
        try:
            # `run` begins now; it also replaces a session that has ended since `connect_once`.
            async with asyncio.TaskGroup() as group:
                for proxy in proxies:
                    proxy.keep_port()
                    group.create_task(proxy.session.run())
                    await proxy.serve()
                    group.create_task(proxy.keep_renewed(_renewed(proxy, kubeconfig, config, running)))
                for number, proxy in enumerate(proxies):
                    name = config.kube_context or proxy.cluster
                    if kubeconfig is None:
                        terminal.write_data(render(proxy.entry(name, process="")))
                    else:
                        entry = proxy.entry(name, process=running.begin())
                        context.state.add_kubeconfig([file.path for file in kubeconfig.files])
                        switch = config.context_switch and number == 0
                        merging = asyncio.ensure_future(asyncio.to_thread(kubeconfig.merge, entry, switch=switch))
                        try:
                            done = await asyncio.shield(merging)
                        except asyncio.CancelledError:
                            # A thread cannot be cancelled: what it changes must be undone.
                            merged.append(await merging)
                            raise
                        merged.append(done)
                        _tell_merged(terminal, done)
                    context.state.add_cluster_name(proxy.cluster)
                terminal.tell("Press Ctrl+C to close proxy.")
                ready()
        finally:
            if kubeconfig is not None:
                for done in reversed(merged):
                    # Without a thread, because a second cancellation must not leave the file half-way.
                    _undo(kubeconfig, done, remove=config.remove_context)
    finally:
        await asyncio.gather(*(proxy.close() for proxy in proxies))
        running.end()
        if observer is not None:
            await observer.stop()


def _renewed(
    proxy: ServedCluster, kubeconfig: Kubeconfig | None, config: ClientConfig, running: Running
) -> Callable[[], Awaitable[None]]:
    """Give what writes a new client certificate to where the one of before was written."""

    async def write() -> None:
        name = config.kube_context or proxy.cluster
        if kubeconfig is None:
            log.warning(
                "kubeconfig not updated",
                cluster=proxy.cluster,
                reason="it was written to standard output, and its client certificate ends",
                advice="start the proxy again before that",
            )
            return
        await asyncio.to_thread(kubeconfig.refresh, proxy.entry(name, process=running.begin()))

    return write


def _told_of_another(
    kubeconfig: Kubeconfig, running: Running, config: ClientConfig, cluster: str, terminal: Terminal
) -> bool:
    """Return whether another process serves the context of a cluster already; the user is told then."""
    name = config.kube_context or cluster
    process, server = kubeconfig.served(name)
    if not server or (process != BACKGROUND and not running.alive(process)):
        return False
    who = "is connected in the background" if process == BACKGROUND else "is served by another proxy"
    port = server.rpartition(":")[2]
    terminal.tell(f'Cluster "{cluster}" {who} already: port {port}, context "{name}"')
    return True


async def run_forward(
    config: ClientConfig,
    terminal: Terminal,
    target: str,
    listen: str,
    *,
    any_user: bool = False,
    token: str = "",
    environment: Mapping[str, str] = os.environ,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Carry a TCP target of the one named cluster to a local address until cancelled.

    `any_user`: also for programs of other users of this machine.
    """
    check_target_name(target)
    context = ClientContext(config, terminal, token=token, environment=environment)
    cluster, *more = context.clusters()
    required(config, environment)
    if more:
        raise ConfigError("flag --cluster: `forward` is for one cluster; start one process for each")
    context.require_login()
    address = parse_listen(listen, default_port=0)
    sock = listen_at(address.host or "127.0.0.1", address.port)
    session = context.session(cluster)
    forward = Forward(session, target, sock, any_user=any_user)
    observer: ObserveServer | None = None
    try:
        observer = await _observe(config, [], forwards=[forward], sessions=[session])
        await session.connect_once()
        check_offered(target, session.targets, cluster)
        async with asyncio.TaskGroup() as group:
            group.create_task(session.run())
            forward.start()
            host, port = sock.getsockname()[:2]
            shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            terminal.tell(f"Forwarding {shown} to {target} of cluster {cluster}")
            terminal.tell("Press Ctrl+C to close.")
            ready()
    finally:
        await forward.close()
        session.close()
        await session.wait_closed()
        await let_close()
        if observer is not None:
            await observer.stop()


async def _together(starts: list[Awaitable[None]]) -> None:
    """Run all at once; raises the first failure itself, without a group, because the user reads one sentence."""
    try:
        async with asyncio.TaskGroup() as group:
            for start in starts:
                group.create_task(_run(start))
    except BaseExceptionGroup as errors:
        ours = errors.subgroup(ArcbridgeError)
        if ours is None:
            raise
        first: BaseException = ours
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        raise first from None


async def _run(start: Awaitable[None]) -> None:
    await start


def _tell_merged(terminal: Terminal, merged: Merged) -> None:
    name = merged.entry.name
    if merged.switched:
        terminal.tell(f'Merged "{name}" as current context in {merged.path}')
    else:
        terminal.tell(f'Merged "{name}" in {merged.path}')
    terminal.tell(f"Start sending kubectl requests on '{name}' context using kubeconfig at {merged.path}")


def _undo(kubeconfig: Kubeconfig, merged: Merged, *, remove: bool) -> None:
    try:
        kubeconfig.undo(merged, remove=remove)
    except ArcbridgeError as error:
        log.warning("the kubeconfig was not put back", reason=error.message)


async def _observe(
    config: ClientConfig,
    proxies: list[ServedCluster],
    *,
    forwards: list[Forward] | None = None,
    sessions: list[SessionManager] | None = None,
) -> ObserveServer | None:
    """Start the listener of metrics and health, if one is configured, and return it; raises ConfigError."""
    if not config.observe.listen:
        return None
    from arcbridge.client.serving.metrics import register
    from arcbridge.observe.health import Checks
    from arcbridge.observe.metrics import Metrics
    from arcbridge.observe.server import ObserveServer

    metrics, checks = Metrics("client"), Checks()
    managers = [*(sessions or []), *(proxy.session for proxy in proxies)]
    register(
        metrics,
        managers,
        lambda: [proxy.endpoint.stats for proxy in proxies if proxy.endpoint is not None],
        lambda: [forward.stats for forward in forwards or []],
    )
    for session in managers:
        checks.add(f"session-{session.cluster}", _session_check(session))
    server = ObserveServer(config.observe.listen, metrics, checks)
    address = await server.start()
    log.info("observing", address=address)
    return server


def _session_check(session: SessionManager) -> Callable[[], str | None]:
    def check() -> str | None:
        if session.current is not None:
            return None
        return session.failure.message if session.failure is not None else "no session yet"

    return check
