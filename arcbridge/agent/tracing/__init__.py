"""Spans of requests whose callers trace them: read from `traceparent` (`spans`), sent to a collector (`exporter`)."""
