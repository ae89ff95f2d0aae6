"""Figures that operators see, from the engines of a worker to what one process of vLLM reports.

A worker sums its groups of layers (`of_worker`). The engine core puts its workers and its pool of blocks together, and
counts what is new since its last report (`Reporter`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

from . import formats

# From the least advanced state of a calibration to the most.
CALIBRATION_STATES = ("no", "own prompt", "frozen", "file")


class WorkerFigures(TypedDict):
    """Figures of one worker, over its layers. They are read from counters of the host."""

    block_bytes: int
    """Bytes of one block of the pool in all layers."""
    open_pages: int
    """Blocks that have an open page, over KV cache groups; each has one in every layer of its group."""
    open_page_limit: int
    peak_open_pages: int
    open_page_bytes: int
    """Bytes of the open pages in use, in all layers."""
    open_page_limit_bytes: int
    sealed: int
    """Blocks sealed since the start."""
    out_of_range_tokens: int
    """Since the start, counted in each layer."""
    saturation: float | None
    """The largest of a layer."""
    drift: float | None
    """Of the layer whose drift is farthest from 1."""
    calibration: str | None
    """The least advanced state of a group; None in formats that never seal."""


class Report(TypedDict):
    """What an engine core reports: counts of one rank (all ranks have the same blocks), and bytes of all ranks."""

    blocks: dict[str, int]
    """By state, `used` and `free`."""
    blocks_bytes: dict[str, int]
    open_pages: dict[str, int]
    open_pages_bytes: dict[str, int]
    open_pages_peak: int
    sealed: int
    """Since the last report, as the next."""
    out_of_range_tokens: int
    saturation: float | None
    drift: float | None
    calibration: str | None


def of_worker(groups: Iterable[Any], block_bytes: int) -> WorkerFigures:
    """Figures of a worker's groups.

    Args:
        groups: `group.Group`s.
        block_bytes: bytes of one block of the pool in all of its layers.
    """
    groups = list(groups)
    stats = [group.engine.stats() for group in groups]
    page_bytes = [
        group.engine.num_layers * group.engine.num_kv_heads * formats.open_page_bytes(group.engine.head_dim)
        for group in groups
    ]
    sealing = [
        found["calibrated"] for group, found in zip(groups, stats, strict=True) if formats.seals(group.engine.format)
    ]
    return {
        "block_bytes": block_bytes,
        "open_pages": sum(found["open_pages"] for found in stats),
        "open_page_limit": sum(group.num_open_pages for group in groups),
        "peak_open_pages": sum(found["peak_open_pages"] for found in stats),
        "open_page_bytes": sum(found["open_pages"] * size for found, size in zip(stats, page_bytes, strict=True)),
        "open_page_limit_bytes": sum(
            group.num_open_pages * size for group, size in zip(groups, page_bytes, strict=True)
        ),
        "sealed": sum(found["sealed"] for found in stats),
        "out_of_range_tokens": sum(sum(found["out_of_range_tokens"]) for found in stats),
        "saturation": _largest(share for found in stats for share in found["saturation"]),
        "drift": _farthest(ratio for found in stats for ratio in found["drift"]),
        "calibration": min(sealing, key=CALIBRATION_STATES.index, default=None),
    }


class Reporter:
    """Puts the figures of workers together, into reports that count what is new since the last one."""

    def __init__(self) -> None:
        self._counted = {"sealed": 0, "out_of_range_tokens": 0}
        self._report: Report | None = None

    def update(self, workers: Sequence[WorkerFigures], num_blocks: int, num_free: int) -> None:
        """Brings the next report up to date.

        Args:
            workers: figures of each.
            num_blocks: blocks of the pool, which are the same in all workers.
            num_free: of these, blocks that no request has.
        """
        # Workers have the same block tables: what counts blocks is the same in each.
        used_pages, limit = (max(rank[name] for rank in workers) for name in ("open_pages", "open_page_limit"))
        used_bytes, limit_bytes, block_bytes = (
            sum(rank[name] for rank in workers) for name in ("open_page_bytes", "open_page_limit_bytes", "block_bytes")
        )
        states = [rank["calibration"] for rank in workers if rank["calibration"] is not None]
        used, before = num_blocks - num_free, self._report
        self._report = {
            "blocks": {"used": used, "free": num_free},
            "blocks_bytes": {"used": used * block_bytes, "free": num_free * block_bytes},
            "open_pages": {"used": used_pages, "free": limit - used_pages},
            "open_pages_bytes": {"used": used_bytes, "free": limit_bytes - used_bytes},
            "open_pages_peak": max(rank["peak_open_pages"] for rank in workers),
            "sealed": self._new("sealed", max(rank["sealed"] for rank in workers)),
            "out_of_range_tokens": self._new(
                "out_of_range_tokens", sum(rank["out_of_range_tokens"] for rank in workers)
            ),
            "saturation": _largest(rank["saturation"] for rank in workers),
            "drift": _farthest(rank["drift"] for rank in workers),
            "calibration": min(states, key=CALIBRATION_STATES.index, default=None),
        }
        if before is not None:  # which nobody took
            self._report["sealed"] += before["sealed"]
            self._report["out_of_range_tokens"] += before["out_of_range_tokens"]

    def take(self) -> Report | None:
        """The report of what was new, once; None without an update since."""
        report, self._report = self._report, None
        return report

    def _new(self, name: str, count: int) -> int:
        """What a counter has counted since; a smaller count is of engines that were made anew."""
        before, self._counted[name] = self._counted[name], count
        return count - before if count >= before else count


def _largest(shares: Iterable[float | None]) -> float | None:
    return max((share for share in shares if share is not None), default=None)


def _farthest(ratios: Iterable[float | None]) -> float | None:
    """The ratio farthest from 1, of which 2 and 1/2 are as far; 0 is the farthest."""
    return max(
        (ratio for ratio in ratios if ratio is not None),
        key=lambda ratio: max(ratio, 1 / ratio) if ratio > 0 else float("inf"),
        default=None,
    )
