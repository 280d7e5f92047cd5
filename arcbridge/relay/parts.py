"""The parts of one relay process, as `relay.service` connects them, for those that concern many: metrics and reloads.

It makes and closes none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from arcbridge.identity.policy import PolicyFile
from arcbridge.identity.verifier import TokenVerifier
from arcbridge.pki.authority import Authority
from arcbridge.relay.access import CallerChecks
from arcbridge.relay.admission import Admission
from arcbridge.relay.audit.log import RelayAudit
from arcbridge.relay.certificate import ServerCertificate
from arcbridge.relay.client_join import ClientJoins
from arcbridge.relay.control import ControlServer
from arcbridge.relay.counters import Counters
from arcbridge.relay.fleet.base import Fleet
from arcbridge.relay.http.administration import AdminApi
from arcbridge.relay.http.api import Api
from arcbridge.relay.http.server import HttpApiServer
from arcbridge.relay.listener import Listener
from arcbridge.relay.pending_dials import Detour
from arcbridge.relay.pump import Pumps
from arcbridge.relay.registry.base import Registry
from arcbridge.relay.settings import CheckedRelay
from arcbridge.settings.config import RelayLimitsConfig

if TYPE_CHECKING:
    from arcbridge.relay.page.site import PageSite


@dataclass(frozen=True, slots=True)
class Basis:
    """What a relay knows and keeps; no peer meets it."""

    checked: CheckedRelay
    limits: RelayLimitsConfig
    """Those that count: as many sessions and agents as there are descriptors for."""
    wanted: RelayLimitsConfig
    """Those of the settings, for this process."""
    descriptors: int
    counters: Counters
    policy: PolicyFile
    verifier: TokenVerifier
    checks: CallerChecks
    authority: Authority
    registry: Registry
    fleet: Fleet
    certificate: ServerCertificate
    audit: RelayAudit


@dataclass(frozen=True, slots=True)
class Entrances:
    """What peers meet."""

    admission: Admission
    listener: Listener
    pumps: Pumps
    control: ControlServer
    clients: ClientJoins
    detour: Detour | None
    api: Api
    administration: AdminApi
    http: HttpApiServer
    page: PageSite | None
    """The administrators' page; None: the settings have none."""
