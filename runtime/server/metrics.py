"""What is told of a server: counters, gauges and histograms to Prometheus, and the log in JSON."""

from __future__ import annotations

import json
import logging
import traceback
from typing import Any

from f2gguf.runtime.errors import F2ggufError
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.metrics import MetricWrapperBase

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second line for each, of when it began

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)

_OF_MODEL: dict[str, tuple[type[MetricWrapperBase], str, dict[str, Any]]] = {
    "tokens": (Counter, "Tokens embedded.", {}),
    "texts": (Counter, "Texts embedded.", {}),
    "truncated_texts": (Counter, "Texts cut to the maximum length.", {}),
    "quarantined_texts": (Counter, "Texts that have no finite vector.", {}),
    "queue_requests": (Gauge, "Requests with texts that wait.", {}),
    "queue_tokens": (Gauge, "Tokens that wait.", {}),
    "tokenize_seconds": (Histogram, "A request's texts become ids.", {"buckets": _SECONDS}),
    "queue_seconds": (Histogram, "A request waits for its first text's turn.", {"buckets": _SECONDS}),
    "compute_seconds": (Histogram, "One step of the model, with the short ones in its pauses.", {"buckets": _SECONDS}),
    "batch_fill": (Histogram, "Tokens of a step, as a share of its budget.", {"buckets": _SHARES}),
}


class Metrics:
    """All metrics of a server, in a registry of their own; those of a model by `of`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._new(Counter, "requests", "Requests answered.", "path", "status")
        words = "From a request's headers to its answer's last byte."
        self.request_seconds = self._new(Histogram, "request_seconds", words, "path", buckets=_SECONDS)
        self.in_flight = self._new(Gauge, "requests_in_flight", "Requests accepted and not answered yet.")
        self._of_model = {
            name: self._new(kind, name, words, "model", **options) for name, (kind, words, options) in _OF_MODEL.items()
        }

    def of(self, model: str) -> dict[str, Any]:
        """The metrics of one model by name."""
        return {name: metric.labels(model) for name, metric in self._of_model.items()}

    def _new(self, kind: type[MetricWrapperBase], name: str, words: str, *labels: str, **options: Any) -> Any:
        return kind(f"f2gguf_{name}", words, labels, registry=self.registry, **options)


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON, with the record's `facts`.

    An error that is not ours is logged without its message, which could quote a text.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info and (error := record.exc_info[1]):
            line["error"] = f"{type(error).__name__}{f': {error}' if isinstance(error, F2ggufError) else ''}"
            line["traceback"] = "".join(traceback.format_tb(error.__traceback__))
        return json.dumps(line)


def log_as_json() -> None:
    """Log to stderr: f2gguf's own records from info on, those of others from warnings on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("f2gguf").setLevel(logging.INFO)
