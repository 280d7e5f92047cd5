"""The systems that are compared: one file and one class each. A new one is a file here and a line in `PEERS`."""

from __future__ import annotations

from bench.peers.arcbridge import WITHOUT_RESUMPTION, Arcbridge, WithoutResumption
from bench.peers.base import Peer, Unavailable
from bench.peers.direct import Direct
from bench.peers.frp import Frp, FrpWithoutMux
from bench.peers.openssh import OpenSsh

PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (Arcbridge, WithoutResumption, OpenSsh, Frp, FrpWithoutMux, Direct)
}
"""By name, in the order of the report."""

QUICK = ("arcbridge", WITHOUT_RESUMPTION, "openssh", "direct")
"""The systems of `--quick`; `--full` has all."""

__all__ = ["PEERS", "QUICK", "WITHOUT_RESUMPTION", "Peer", "Unavailable"]
