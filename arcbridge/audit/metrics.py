"""Registers what a role shows at /metrics of its audit log."""

from __future__ import annotations

from arcbridge.audit.log import ChainedLog
from arcbridge.observe.metrics import Metrics


def register(metrics: Metrics, audit: ChainedLog) -> None:
    """Register what agent and relay have alike."""
    counter, gauge = metrics.counter, metrics.gauge
    counter("audit_records_total", "Audit records made.", None, lambda: audit.records)
    counter("audit_dropped_total", "Audit records that were lost.", None, lambda: audit.dropped)
    gauge("audit_failing", "1 while audit records cannot be written.", None, lambda: float(bool(audit.failure)))
    counter("audit_failures_total", "Times that the audit log began to fail.", None, lambda: audit.failures)
    counter("audit_refused_total", "What was refused for want of a record.", None, lambda: audit.refused)
    counter("audit_unrecorded_total", "What went on before its record was written.", None, lambda: audit.unrecorded)
    gauge("audit_chain_records", "Number of the newest record in its chain.", None, lambda: audit.chain_records)
