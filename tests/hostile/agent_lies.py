"""The agent's lies: subclasses of its real parts, each honest in all but one thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from arcbridge.agent.authenticator import Authenticated, Authenticator
from arcbridge.agent.control import ControlConnections
from arcbridge.agent.kube.caller import Caller
from arcbridge.agent.kube.proxy import KubeProxy
from arcbridge.agent.session_certificate import SessionCertificate, SessionTls
from arcbridge.identity.proof import NO_PEER, Peer
from arcbridge.mux.session import MuxSession
from arcbridge.mux.stream import StreamTransport
from arcbridge.net.tls import inner_server_context
from arcbridge.pki.authority import Authority
from arcbridge.pki.credentials import AgentCredential
from arcbridge.wire.records import Auth
from tests.hostile.by_hand import say


class Collects(Authenticator):
    """Keeps what its users log in with, proofs included."""

    made: ClassVar[list[Collects]] = []

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.taken: list[Auth] = []
        self.made.append(self)

    async def authenticate(self, auth: Auth, peer: Peer = NO_PEER) -> Authenticated:
        self.taken.append(auth)
        return await super().authenticate(auth, peer)


def answers_with(frames: Callable[[int], bytes]) -> type[KubeProxy]:
    """A proxy that sends these frames, for the id of the stream that a caller opens, instead of an answer."""

    class AnswersWith(KubeProxy):
        def serve(self, stream: StreamTransport, caller: Caller) -> None:
            session: MuxSession = stream._session
            say(session, frames(stream.id))

    return AnswersWith


def tells_of_streams(opened: list[StreamTransport]) -> type[KubeProxy]:
    """The real proxy, which puts each stream into a list as soon as the agent has it."""

    class TellsOfStreams(KubeProxy):
        def serve(self, stream: StreamTransport, caller: Caller) -> None:
            opened.append(stream)
            super().serve(stream, caller)

    return TellsOfStreams


def shows(certify: Callable[[AgentCredential], tuple[str, str]]) -> type[SessionCertificate]:
    """A session certificate that `certify` makes: certificate and key, PEM."""

    class Shows(SessionCertificate):
        __slots__ = ()

        def tls(self, credential: AgentCredential) -> SessionTls:
            context = inner_server_context(*certify(credential))
            return SessionTls(context, Peer(context.spki, ""))

    return Shows


def own_authority(credential: AgentCredential) -> Authority:
    """The cluster's CA, which the agent holds."""
    return Authority.load(credential.cluster_ca_certificate_pem, credential.cluster_ca_key_pem)


class Control(ControlConnections):
    """The real control connections; tests say on them what no agent says."""

    made: ClassVar[list[Control]] = []

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.made.append(self)

    def say(self, body: bytes) -> None:
        """Send a frame on every control connection."""
        for link in self._links:
            if link.session is not None:
                say(link.session, body)
