"""The accuracy of every format on real weights and a real text, against unquantized pages."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from kvarn_rs import Calibration
from kvarn_rs.cli.runs import feed
from kvarn_rs.eval.metrics import kl_divergence
from kvarn_rs.hf import KvarnCache

PROMPT = Path(__file__).parents[3] / "examples/prompt.txt"
TOKENS, FIRST, CHUNK = 896, 256, 16
# The mean KL divergence that each format may have. Seen here: 1.9e-4, 1.3e-3, 5.3e-3, 3.5e-2.
BARS = {"int8": 4e-4, "int4": 2.5e-3, "int3": 1.1e-2, "int2": 8e-2}


@pytest.mark.demo
@pytest.mark.slow
def test_a_real_text_fed_16_tokens_at_a_time_stays_within_each_format_s_bar():
    from kvarn_rs.cli import demo
    from kvarn_rs.cli.console import Console

    try:
        importlib.metadata.version(demo.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{demo.PACKAGE} is not installed; run: {demo.INSTALL}")
    model, tokenizer = demo.load_demo(Console(quiet=True))
    ids = tokenizer(PROMPT.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][:, :TOKENS]
    caches = {format: KvarnCache(model, format, calibration=Calibration()) for format in ("raw", *BARS)}
    divergences: dict[str, list[torch.Tensor]] = {format: [] for format in BARS}
    for start in (0, *range(FIRST, TOKENS, CHUNK)):
        chunk = ids[:, start : start + (CHUNK if start else FIRST)]
        logits = {format: feed(model, chunk, cache, last_only=not start) for format, cache in caches.items()}
        if start:
            for format, seen in divergences.items():
                seen.append(kl_divergence(logits["raw"], logits[format]))
    found = {format: torch.cat(seen).mean().item() for format, seen in divergences.items()}
    assert all(found[format] <= bar for format, bar in BARS.items()), found
    assert sorted(found.values()) == list(found.values()), "fewer bits, more error"
