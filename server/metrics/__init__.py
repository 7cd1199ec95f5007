"""Prometheus metrics of the server."""

from server.metrics.exposition import CONTENT_TYPE, Metrics, Snapshot
from server.metrics.requests import OTHER, RequestRecord

__all__ = ["CONTENT_TYPE", "OTHER", "Metrics", "RequestRecord", "Snapshot"]
