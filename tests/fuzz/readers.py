"""What reads the bytes of each entrance, and nothing else: the cost oracle measures no comparison of a target's."""

from __future__ import annotations

import json

from arcbridge.agent.kube.fast_path_parser import KnownLines, plain_head
from arcbridge.agent.kube.request_info import request_info
from arcbridge.agent.kube.response import ChunkedBody, read_head
from arcbridge.agent.kube.status import RequestRefusal
from arcbridge.client.kubeconfig import file as kubeconfig_yaml
from arcbridge.errors import RemoteProtocolError, StateError
from arcbridge.identity import authentication, verifier
from arcbridge.identity import proof as proofs
from arcbridge.identity.cel.mapping import BudgetExceeded, CostBudget
from arcbridge.identity.claims import map_claims
from arcbridge.identity.refusal import TokenRefused
from arcbridge.net.client_hello import Incomplete, peek
from arcbridge.pki import pins
from arcbridge.wire.decoder import Decoder
from tests.fuzz import caller_targets, gateway_targets, remote_targets, targets
from tests.fuzz.costs import Read
from tests.fuzz.targets import PIECE


def _client_hello(data: bytes) -> None:
    """As the listener reads: again once what was asked for is there."""
    size, answer = 0, peek(b"")
    while isinstance(answer, Incomplete) and size < answer.need <= len(data):
        size = answer.need
        answer = peek(data[:size])


def _join(data: bytes, size: int = PIECE) -> None:
    try:
        targets.read_join(data, size)
    except (RemoteProtocolError, EOFError):
        pass


def _decoder(data: bytes, size: int = PIECE) -> None:
    seen, reader = targets._Seen(), Decoder()
    try:
        for piece in targets.pieces(data, size):
            reader.feed(memoryview(piece), seen)
    except RemoteProtocolError:
        pass


def _record(data: bytes) -> None:
    for kind in targets._RECORDS:
        try:
            kind.decode(data)
        except RemoteProtocolError:
            continue


def _response_head(data: bytes) -> None:
    try:
        read_head(data, "GET")
    except RequestRefusal:
        pass


def _chunked_body(data: bytes) -> None:
    body = ChunkedBody()
    for piece in targets.pieces(data, PIECE):
        buffer = bytearray(piece)
        body.feed(buffer, 0, len(buffer))
        if body.over or body.broken:
            break


class _Dropped(targets._Taken):
    """A caller that keeps nothing."""

    def response_data(self, data: bytes | memoryview, payload: int) -> None: ...


def _token(data: bytes) -> None:
    try:
        verifier._parts(data.decode("latin-1"))
    except TokenRefused:
        pass
    for issuer in (targets._ISSUER, targets._CEL_ISSUER):
        _claims(data, issuer)


def _claims(data: bytes, issuer: authentication.IssuerConfig) -> None:
    try:
        claims = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(claims, dict):
        return
    claims["exp"] = 1.8e9
    try:
        map_claims(issuer, claims, CostBudget())
    except (TokenRefused, BudgetExceeded):
        pass


def _proof(data: bytes) -> None:
    try:
        proofs.check_proof(
            data.decode("latin-1"), token=targets.PROOF_TOKEN, peer_spki=targets.PROOF_SPKI, pin=targets.PROOF_PIN,
            now=targets.PROOF_NOW, place="the agent",
        )  # fmt: skip
    except proofs.ProofRefused:
        pass


def _kubeconfig(data: bytes) -> None:
    try:
        kubeconfig_yaml.parse(data, "kubeconfig")
    except StateError:
        pass


READERS: dict[str, Read] = targets.FILES | {
    "access_object": remote_targets.access_object,
    "answer": lambda data: targets.read_answer(data, _Dropped()),
    "api_body": remote_targets.read_api_body,
    "audit_text": caller_targets.read_audit_text,
    "cel_values": lambda data: _claims(data, remote_targets._CEL),
    "certificate": lambda data: pins._p256_key(data.decode("latin-1")),
    "chunked_body": _chunked_body,
    "client_hello": _client_hello,
    "decoder": _decoder,
    "enrolment": remote_targets.enrolment,
    "foreign_kubeconfig": remote_targets.foreign_kubeconfig,
    "gateway_head": gateway_targets.read_gateway_head,
    "head": caller_targets.read_head,
    "http_head": remote_targets.read_http_head,
    "issuer_document": remote_targets.issuer_document,
    "join": _join,
    "kubeconfig": _kubeconfig,
    "login_profile": remote_targets.login_profile,
    "nats_message": remote_targets.nats_message,
    "plain_request": lambda data: plain_head(data, KnownLines()),
    "pod_body": caller_targets.read_pod_body,
    "pod_document": remote_targets.pod_document,
    "pod_stream": remote_targets.read_pod_stream,
    "port_forward": caller_targets.read_port_forward,
    "proof": _proof,
    "proxy_header": remote_targets.proxy_header,
    "record": _record,
    "recorded_channels": caller_targets.read_recorded_channels,
    "request": targets.read_request,
    "response_head": _response_head,
    "review_answer": remote_targets.review_answer,
    "sealed_file": remote_targets.read_sealed_file,
    "target": lambda data: request_info("GET", data.decode("latin-1")),
    "token": _token,
}
"""By target. `sessions` is not here: its bytes are no input of a parser, they choose what happens."""

IN_BYTES: dict[str, Read] = {
    "client_hello": _client_hello,
    "decoder": lambda data: _decoder(data, 1),
    "gateway_head": lambda data: gateway_targets.read_gateway_head(data, 1),
    "head": lambda data: caller_targets.read_head(data, 1),
    "http_head": lambda data: remote_targets.read_http_head(data, 1),
    "join": lambda data: _join(data, 1),
}
"""What takes bytes as they come from a network, by target: here each of them comes alone."""
