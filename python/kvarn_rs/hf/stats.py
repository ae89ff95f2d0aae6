"""The figures of a `KvarnCache`, all layer groups together."""

from __future__ import annotations

from typing import Any

from kvarn_rs import Calibration

from .forward import Forwards

_CALIBRATED = ("no", "own prompt", "frozen", "file")  # the least first


def stats_of(forwards: Forwards, calibration: Calibration) -> dict[str, Any]:
    """What `KvarnCache.stats` says of paged layers."""
    paged = [(group, group.core.stats()) for group in forwards.groups.values()]
    cores = [core for _, core in paged]
    by_layer = {
        name: dict(
            sorted(
                (layer, x)
                for group, core in paged
                for layer, x in zip(group.layers, core[name], strict=True)
                if forwards.behind.get(layer) != 0  # never arrived
            )
        )
        for name in ("saturation", "drift", "out_of_range_tokens")
    }
    states = [core["calibrated"] for core in cores]
    return {
        "fused_calls": forwards.fused_calls,
        "dense_fallbacks": forwards.fallbacks.counts.total(),
        "fallback_reasons": dict(forwards.fallbacks.counts),
        "dropped_forwards": forwards.dropped_forwards,
        "paged_layers": forwards.num_layers,
        **{
            name: sum(core[name] for core in cores)
            for name in (
                "blocks_in_use",
                "peak_blocks",
                "bytes_in_use",
                "peak_bytes",
                "bytes_per_token",
                "open_pages",
                "sealed",
                "unsealed",
            )
        },
        "first_page_tokens": min(
            (core["first_page_tokens"] for core in cores if core["first_page_tokens"] is not None), default=None
        ),
        "calibrated": next((state for state in _CALIBRATED if state in states), calibration.state),
        **by_layer,
    }
