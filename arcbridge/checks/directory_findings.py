"""Words what is wrong with a directory in which groups are looked up, for the `doctor` of relay and agent.

Microsoft Graph is asked as an application of its own. Either that gets no token, or the token endpoint does not answer,
or Graph refuses the application. Where it can still ask, the fault is a warning.
"""

from __future__ import annotations

from .diagnosis import Finding, failed, ok, warning

_REMEDIES = {
    "graph_credential": "renew the credential of the application at Entra ID, and put it into the file that the table "
    "names; it is read again without a restart",
    "graph_permission": "give the application the permissions of docs/how-to/entra-id.md, with admin consent, and "
    "compare url and token_endpoint, which have to be of one cloud",
}
_REACH = "check token_endpoint and ca_file of the table, and that this place may connect to Entra ID"


def directory_finding(at: str, usable: bool, code: str, why: str) -> Finding:
    """Return the finding for the table `at` of the settings (`graph.NAME`). `usable`: it can ask now; `code` and `why`:
    what is wrong, empty where nothing is."""
    hop = f"groups by {at}"
    if not code:
        return ok(hop, "the application has a token for Microsoft Graph")
    remedy = _REMEDIES.get(code, _REACH)
    return warning(hop, why, remedy, code) if usable else failed(hop, why, remedy, code)
