"""CPU of the proof of possession per session, at each of the three roles.

    python -m bench.micro.proof [--rounds 9] [--output FILE]

A session costs two proofs: the client makes one for JOIN and one for AUTH, the relay checks the first and the agent the
second. What is measured is all that a bound token adds at each place: at the client reading the token's claims and the
peer's certificate and signing, at relay and agent reading the binding and checking. Tokens have 1.5 KB, as those of
large issuers. CPU time of this process; the parts take turns in each round, and the result has each round's mean.
"""

from __future__ import annotations

import argparse
import json
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

from arcbridge.client.credentials.tokens import Tokens
from arcbridge.identity.proof import Binding, Peer, ProofChecker, ProofKey, ProofPolicy, ProofRefused, binding, spki_of
from arcbridge.pki.authority import Authority
from arcbridge.settings.config import LoginConfig
from bench import machine

REPEATS = 300
"""Times that each part runs in a round."""
BOUND_MS = 0.5
"""CPU that a session may cost for it, at all three roles together."""


def parts() -> dict[str, Callable[[], object]]:
    """What each place does for one proof."""
    key, authority = ProofKey.generate(), Authority.create("bench")
    certificate = ssl.PEM_cert_to_DER_cert(authority.issue_server(["one.cluster.arcbridge"]).certificate_pem)
    claims = {"iss": "https://issuer.example", "nonce": key.nonce(), "groups": [f"group-{n:04}" for n in range(70)]}
    token = jwt.encode(claims, ec.generate_private_key(ec.SECP256R1()), algorithm="ES256")

    class Pair:
        """A login that has both tokens."""

        def __init__(self) -> None:
            self.key: ProofKey | None = key

    tokens = Tokens(LoginConfig(), Pair())  # type: ignore[arg-type]
    peer = Peer(spki_of(certificate), authority.pin)
    checker = ProofChecker(ProofPolicy.IF_BOUND, "the agent")
    proof = tokens.prove(token, certificate, authority.pin)
    bound = binding(claims)
    return {
        "client_makes_one": lambda: tokens.prove(token, certificate, authority.pin),
        "end_checks_one": lambda: checker.check(binding(claims), token, proof, peer),
        "end_checks_one_wrong_key": lambda: _refused(checker, bound, token, proof, peer),
        "end_takes_an_unbound_token": lambda: checker.check(binding({"aud": "cluster"}), token, "", peer),
    }


def _refused(checker: ProofChecker, bound: Binding, token: str, proof: str, peer: Peer) -> None:
    try:
        checker.check(bound._replace(thumbprints=("x" * 43,)), token, proof, peer)
    except ProofRefused:
        return
    raise AssertionError("a wrong key was taken")


def first_use_ms() -> float:
    """CPU that the first proof of a client process costs besides: `cryptography` is imported for it."""
    code = (
        "import asyncio, ssl, json, time\n"
        "import arcbridge.client.credentials.tokens, arcbridge.client.session.connection\n"
        "began = time.process_time()\n"
        "from arcbridge.identity.proof import ProofKey\n"
        "from cryptography import x509\n"
        "from cryptography.hazmat.primitives.asymmetric import ec\n"
        "ProofKey.generate().sign_proof('a', b'b', '', 1.0)\n"
        "print((time.process_time() - began) * 1000)\n"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)


def run(rounds: int) -> dict[str, Any]:
    """All rounds; the result as it is kept."""
    before, made = machine.describe(), parts()
    found: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds):
        for name in list(made)[:: 1 if number % 2 == 0 else -1]:
            work = made[name]
            began = time.process_time()
            for _ in range(REPEATS):
                work()
            found[name].append(round((time.process_time() - began) / REPEATS * 1e6, 2))
    medians = {name: statistics.median(values) for name, values in found.items()}
    session = (2 * medians["client_makes_one"] + 2 * medians["end_checks_one"]) / 1000
    return {
        "command": f"python -m bench.micro.proof --rounds {rounds}",
        "commit": machine.commit(),
        "machine": before,
        "unit": "microseconds of CPU",
        "rounds": rounds,
        "repeats": REPEATS,
        "medians": medians,
        "session_ms": round(session, 3),
        "bound_ms": BOUND_MS,
        "first_proof_of_a_client_process_ms": round(statistics.median(first_use_ms() for _ in range(5)), 1),
        "runs": found,
    }


def main() -> None:
    """Measure and print; with --output, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = run(options.rounds)
    text = json.dumps(result, indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n")
    print(text)
    if result["session_ms"] > BOUND_MS:
        sys.exit(f"a session costs more than {BOUND_MS} ms")


if __name__ == "__main__":
    main()
