"""What is not a load on many systems in turn, but a question of its own: one file and one class each.

A new one is a file here and a line in `STUDIES`.
"""

from __future__ import annotations

from bench.studies.base import Study
from bench.studies.kubernetes import Kubernetes
from bench.studies.nearest import Nearest
from bench.studies.page import Page
from bench.studies.profile import Profile
from bench.studies.scale import Scale
from bench.studies.start import Start
from bench.studies.workers import Workers

STUDIES: dict[str, type[Study]] = {
    Start.name: Start,
    Scale.name: Scale,
    Kubernetes.name: Kubernetes,
    Workers.name: Workers,
    Nearest.name: Nearest,
    Page.name: Page,
    Profile.name: Profile,
}
"""By name, in the order of the report."""

QUICK = (Start.name,)
"""Those of `--quick`."""

__all__ = ["QUICK", "STUDIES", "Study"]
