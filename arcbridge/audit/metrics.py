"""Registers what a role shows at /metrics of its audit log."""

from __future__ import annotations

from collections.abc import Callable

from arcbridge.audit.log import ChainedLog
from arcbridge.audit.sinks.sender import Sinks, SinkSender
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
    if audit.sinks.senders:
        _register_sinks(metrics, audit.sinks)


def _register_sinks(metrics: Metrics, sinks: Sinks) -> None:
    labels = {"sink": tuple(sender.name for sender in sinks.senders)}

    def of_each(read: Callable[[SinkSender], float]) -> Callable[[], dict[str, float]]:
        return lambda: {sender.name: read(sender) for sender in sinks.senders}

    counter, gauge = metrics.counter, metrics.gauge
    counter("audit_sink_delivered_total", "Audit records that the sink's collector has.", labels,
            of_each(lambda one: one.delivered))  # fmt: skip
    counter("audit_sink_dropped_total", "Audit records that the sink has given up; the chain counts them.", labels,
            of_each(lambda one: one.dropped))  # fmt: skip
    counter("audit_sink_failures_total", "Batches that were not delivered, and are sent again.", labels,
            of_each(lambda one: one.failures))  # fmt: skip
    gauge("audit_sink_failing", "1 while the sink's records are not delivered.", labels,
          of_each(lambda one: float(bool(one.failure))))  # fmt: skip
    gauge("audit_sink_lag_seconds", "Age of the oldest record that is not delivered.", labels,
          of_each(lambda one: one.lag))  # fmt: skip
    gauge("audit_sink_waiting_bytes", "Bytes on disk that are not delivered.", labels,
          of_each(lambda one: one.waiting_bytes))  # fmt: skip
    gauge("audit_sink_last_success_timestamp_seconds", "Unix time at which the sink last had delivered a batch or all.",
          labels, of_each(lambda one: one.last_success))  # fmt: skip
