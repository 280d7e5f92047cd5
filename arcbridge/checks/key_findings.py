"""Words what is wrong with the keys of an issuer, for the `doctor` of relay and agent.

An issuer whose keys cannot be fetched is one of three faults: another CA than the one that is configured, another
issuer than the one that is configured, or nothing that answers. Older keys that are still in use make it a warning.
"""

from __future__ import annotations

from arcbridge.errors import ArcbridgeError, UntrustedCertificate, WrongDocument

from .diagnosis import Finding, failed, ok, skipped, warning


def key_finding(path: str, url: str, usable: bool, failure: ArcbridgeError | None) -> Finding:
    """Return the finding for the issuer at `path` of the authentication file (`jwt[0]`).

    `usable`: there are keys, new or old. `failure`: why the last fetch failed; None where it did not.
    """
    hop = f"keys of issuer {path}"
    if failure is None:
        return ok(hop, f"keys of {url} are there") if usable else skipped(hop, f"keys of {url} are not asked for yet")
    if isinstance(failure, UntrustedCertificate):
        code, remedy = "issuer_ca", "put the CA of the issuer's own certificate into issuer.certificateAuthority"
    elif isinstance(failure, WrongDocument):
        code, remedy = "issuer_document", "correct issuer.url: it has to be what the issuer calls itself"
    else:
        code, remedy = "issuer_unreachable", "check issuer.url, and that the issuer can be reached from here"
    if usable:
        return warning(hop, f"older keys of {url} are in use; new ones: {failure.message}", remedy, code)
    return failed(hop, f"{url}: {failure.message}", remedy, code)
