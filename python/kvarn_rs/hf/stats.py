"""What a `KvarnCache` tells of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import KvarnCache

_CALIBRATED = ("no", "own prompt", "frozen", "file")  # the least first


def told(cache: KvarnCache) -> dict[str, Any]:
    """See `KvarnCache.stats`."""
    store = cache._store
    paged = [(group, group.core.stats()) for group in store.groups if group.core is not None]
    cores = [core for _, core in paged]
    by_layer = {
        name: dict(
            sorted(
                (layer, x)
                for group, core in paged
                for layer, x in zip(group.layers, core[name], strict=True)
                if store.behind.get(layer) != 0  # never came
            )
        )
        for name in ("saturation", "drift", "out_of_range_tokens")
    }
    added = dict.fromkeys(range(cache._num_layers, len(cache.layers)), "added by the model")
    states = [core["calibrated"] for core in cores]
    return {
        "fused_calls": store.fused_calls,
        "dense_fallbacks": store.fallbacks.total(),
        "fallback_reasons": dict(store.fallbacks),
        "dropped_forwards": store.dropped_forwards,
        "paged_layers": store.num_layers,
        "unpaged_layers": len(cache.layers) - store.num_layers,
        "unpaged": dict(sorted((cache._never_paged | cache._unpaged | added).items())),
        "notices": list(cache._notices),
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
        "calibrated": next((state for state in _CALIBRATED if state in states), cache.calibration.state),
        **by_layer,
    }
