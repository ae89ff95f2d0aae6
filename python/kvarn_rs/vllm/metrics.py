"""Figures of kvarn in vLLM's Prometheus registry, with the labels of vLLM's own: `model_name` and `engine`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .figures import CALIBRATION_STATES, Report

PREFIX = "kvarn_"
_LABELS = ["model_name", "engine"]

# (name, documentation, further label): gauges.
_GAUGES = (
    ("blocks", "Blocks of vLLM's pool, by state (used, free).", "state"),
    ("blocks_bytes", "Memory of the blocks of vLLM's pool on all ranks, by state (used, free).", "state"),
    ("open_pages", "Open pages, of blocks that are not sealed, by state (used, free).", "state"),
    ("open_pages_bytes", "Memory of open pages on all ranks, by state (used, free).", "state"),
    ("open_pages_peak", "Most open pages that were in use at once.", None),
    ("saturation_ratio", "Share of K codes clamped to the ends of their grid, of the layer with the most.", None),
    (
        "drift_ratio",
        "Deviation of K over that which its pages were opened with, of the layer farthest from 1.",
        None,
    ),
    ("calibration", f"1 for the state of the calibration ({', '.join(CALIBRATION_STATES)}), 0 for others.", "state"),
)
_COUNTERS = (
    ("sealed_blocks", "Blocks sealed."),
    (
        "out_of_range_tokens",
        "Tokens stored incorrectly because scales of float16 cannot hold their K or V, counted in each layer.",
    ),
)


class Metrics:
    """The metrics of some engine cores.

    Args:
        gauge: prometheus_client's class, or one with its arguments.
        counter: the same.
        model_name: the value of its label.
        engines: numbers of the engine cores.
    """

    def __init__(self, gauge: Any, counter: Any, model_name: str, engines: Sequence[int]) -> None:
        self._gauges = {
            name: gauge(
                name=PREFIX + name,
                documentation=documentation,
                labelnames=_LABELS if label is None else [*_LABELS, label],
                multiprocess_mode="mostrecent",
            )
            for name, documentation, label in _GAUGES
        }
        self._counters = {
            name: counter(name=PREFIX + name, documentation=documentation, labelnames=_LABELS)
            for name, documentation in _COUNTERS
        }
        self._model_name = model_name
        for engine in engines:
            for metric in self._counters.values():
                metric.labels(model_name, str(engine))  # there from the start, at 0

    def record(self, report: Report, engine: int) -> None:
        """Sets the gauges and adds to the counters of an engine core."""
        labels = (self._model_name, str(engine))
        values: Mapping[str, Any] = report
        for name in ("blocks", "blocks_bytes", "open_pages", "open_pages_bytes"):
            for state, value in values[name].items():
                self._gauges[name].labels(*labels, state).set(value)
        self._gauges["open_pages_peak"].labels(*labels).set(report["open_pages_peak"])
        for name in ("saturation", "drift"):
            if values[name] is not None:
                self._gauges[f"{name}_ratio"].labels(*labels).set(values[name])
        if report["calibration"] is not None:
            for state in CALIBRATION_STATES:
                self._gauges["calibration"].labels(*labels, state).set(state == report["calibration"])
        self._counters["sealed_blocks"].labels(*labels).inc(report["sealed"])
        self._counters["out_of_range_tokens"].labels(*labels).inc(report["out_of_range_tokens"])
