"""Figures of the vLLM plugin: how those of workers make a report, and a report metrics."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from kvarn_rs.vllm import figures, formats
from kvarn_rs.vllm.figures import Reporter, WorkerFigures, of_worker
from kvarn_rs.vllm.metrics import Metrics

STATS = {
    "open_pages": 3,
    "peak_open_pages": 5,
    "sealed": 7,
    "calibrated": "frozen",
    "saturation": [None, 0.25],
    "drift": [0.4, 2.0],
    "out_of_range_tokens": [1, 2],
}


def group(format: str = "int4", num_open_pages: int = 8, **stats: Any) -> Any:
    """A group of two layers of three heads of 64 channels."""
    engine = SimpleNamespace(format=format, num_layers=2, num_kv_heads=3, head_dim=64, stats=lambda: {**STATS, **stats})
    return SimpleNamespace(engine=engine, num_open_pages=num_open_pages)


PAGE = 2 * 3 * formats.open_page_bytes(64)


def worker(**changes: Any) -> WorkerFigures:
    return {**of_worker([group()], block_bytes=1000), **changes}  # pyright: ignore[reportReturnType]


def report(*workers: WorkerFigures, num_blocks: int = 10, num_free: int = 6) -> Any:
    reporter = Reporter()
    reporter.update(workers, num_blocks, num_free)
    return reporter.take()


def test_a_worker_sums_its_groups() -> None:
    found = of_worker([group(), group(open_pages=1, sealed=2, drift=[None, None])], block_bytes=1000)
    assert found == {
        "block_bytes": 1000,
        "open_pages": 4,
        "open_page_limit": 16,
        "peak_open_pages": 10,
        "open_page_bytes": 4 * PAGE,
        "open_page_limit_bytes": 16 * PAGE,
        "sealed": 9,
        "out_of_range_tokens": 6,
        "saturation": 0.25,
        "drift": 0.4,  # 2.5 times too small is farther from 1 than twice too large
        "calibration": "frozen",
    }


def test_the_least_advanced_group_gives_the_state_of_the_calibration() -> None:
    states = ["file", "own prompt", "frozen"]
    assert of_worker([group(calibrated=state) for state in states], 0)["calibration"] == "own prompt"


def test_a_worker_without_groups_or_with_formats_that_never_seal_has_no_calibration() -> None:
    assert of_worker([], 0)["calibration"] is None
    assert of_worker([group("int8", calibrated="no")], 0)["calibration"] is None


def test_ranks_have_the_same_blocks_and_add_their_bytes_and_tokens_out_of_range() -> None:
    found = report(worker(), worker(saturation=0.5, drift=None, out_of_range_tokens=4, calibration="no"))
    assert found == {
        "blocks": {"used": 4, "free": 6},
        "blocks_bytes": {"used": 4 * 2000, "free": 6 * 2000},
        "open_pages": {"used": 3, "free": 5},
        "open_pages_bytes": {"used": 2 * 3 * PAGE, "free": 2 * 5 * PAGE},
        "open_pages_peak": 5,
        "sealed": 7,
        "out_of_range_tokens": 7,
        "saturation": 0.5,
        "drift": 0.4,
        "calibration": "no",
    }


def test_counters_report_what_is_new_also_when_a_report_was_not_taken() -> None:
    reporter = Reporter()
    reporter.update([worker(sealed=5)], 1, 1)
    reporter.update([worker(sealed=8)], 1, 1)
    taken = reporter.take()
    assert taken is not None
    assert taken["sealed"] == 8
    assert reporter.take() is None
    reporter.update([worker(sealed=8)], 1, 1)
    assert (reporter.take() or {}).get("sealed") == 0


def test_engines_that_were_made_anew_count_from_zero() -> None:
    reporter = Reporter()
    for sealed, new in ((8, 8), (3, 3), (4, 1)):
        reporter.update([worker(sealed=sealed)], 1, 1)
        assert (reporter.take() or {})["sealed"] == new


class Metric:
    """Stands for prometheus_client's."""

    def __init__(self, name: str, documentation: str, labelnames: list[str], **_: Any) -> None:
        assert documentation
        self._name, self._labels, self.values = name, labelnames, {}

    def labels(self, *values: str) -> Any:
        assert len(values) == len(self._labels)
        self.values.setdefault(values, 0)
        return SimpleNamespace(
            set=lambda value: self.values.update({values: float(value)}),
            inc=lambda value: self.values.update({values: self.values[values] + value}),
        )


def test_a_report_sets_gauges_and_adds_to_counters_of_its_engine() -> None:
    made: dict[str, Metric] = {}

    def make(**options: Any) -> Metric:
        return made.setdefault(options["name"], Metric(**options))

    metrics = Metrics(make, make, "model", [0, 1])
    assert made["kvarn_sealed_blocks"].values == {("model", "0"): 0, ("model", "1"): 0}
    for _ in range(2):
        metrics.record(report(worker(drift=None)), 1)
    one = ("model", "1")
    assert made["kvarn_blocks"].values == {(*one, "used"): 4, (*one, "free"): 6}
    assert made["kvarn_open_pages_bytes"].values == {(*one, "used"): 3 * PAGE, (*one, "free"): 5 * PAGE}
    assert made["kvarn_open_pages_peak"].values == {one: 5}
    assert made["kvarn_saturation_ratio"].values == {one: 0.25}
    assert made["kvarn_drift_ratio"].values == {}
    assert made["kvarn_calibration"].values == {
        (*one, state): float(state == "frozen") for state in figures.CALIBRATION_STATES
    }
    assert made["kvarn_sealed_blocks"].values == {("model", "0"): 0, one: 14}
    assert made["kvarn_out_of_range_tokens"].values == {("model", "0"): 0, one: 6}
