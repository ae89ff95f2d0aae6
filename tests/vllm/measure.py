"""Runs formats with a feature, and prints what `test_formats` asserts: `measure.py MODEL FEATURE FORMAT...`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"
)
PASSES = 2  # the second finds the prefixes of the first


def measure(model: Path, cache_dtype: str, feature: str, expected: list[Any]) -> dict[str, Any]:
    import runs

    llm = runs.make_llm(model, cache_dtype, **runs.FEATURES[feature])
    scheduler, preempted = runs.core(llm).scheduler, []
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(1), preempt(*args, **kwargs))[1]
    passes = []
    for _ in range(PASSES):
        found = runs.greedy(llm)
        same = [tokens for tokens, _ in found] == [tokens for tokens, _ in expected]
        passes.append({"same_tokens": same, "divergence": runs.largest_divergence(expected, found)})
    runs.finish(llm)
    (group,) = runs.groups(llm)
    stats = group.engine.stats()
    return {
        "passes": passes,
        "num_blocks": runs.num_blocks(llm),
        "blocks_in_use": runs.blocks_in_use(llm),
        "open_pages": stats["open_pages"],
        "peak_open_pages": stats["peak_open_pages"],
        "num_open_pages": group.num_open_pages,
        "sealed": stats["sealed"],
        "requests": group.num_requests,
        "preempted": len(preempted),
    }


def main() -> None:
    model, feature, *formats = sys.argv[1:]
    import runs

    llm = runs.make_llm(Path(model), "auto")
    expected = runs.greedy(llm)
    del llm
    found = {}
    for format in formats:
        found[format] = measure(Path(model), f"kvarn_{format}", feature, expected)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
