"""`kvarn bench seal`: the time to seal a block.

Measures the append of one token after a full page, which seals the page before it writes the token, and subtracts the
append of one token after `block_size - 1`, which seals nothing. Both are medians over steps that are aborted, so that
every repetition seals the same page. Without a calibration there is no error feedback.

JSON: ``{"machine": {"cpu", "simd_level", "threads"}, "num_kv_heads", "block_size", "repetitions",
"results": [{"format", "head_dim", "calibrated", "block_ms", "head_ms", "token_us", "v_relative_error", "tolerance"}],
"ok"}``

`block_ms` is for all kv heads of a layer, on all threads; `head_ms` is `block_ms` per kv head, `token_us` per token.
`v_relative_error` is the root mean square error of V, relative to that of V; `ok` is false, and the exit code 1, if any
exceeds its `tolerance`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import TYPE_CHECKING, Any

from .console import Console, add_output_options
from .machine import cpu_name
from .models import require
from .sizes import parse_count

if TYPE_CHECKING:
    from .. import Calibration, PagedKvCache

# Normally distributed rows of 64 and 128 give 0.10, 0.19 and 0.35.
TOLERANCES = {"int4": 0.15, "int3": 0.3, "int2": 0.6}
_HEAD_DIMS = (64, 128)


def add_parser(benches: Any) -> None:
    """Adds `bench seal` to the benches."""
    parser = benches.add_parser(
        "seal",
        help="measure the sealing of a block",
        description="Measure the time to seal a block, by format and head_dim, and check the result.",
    )
    parser.add_argument("--kv-heads", type=parse_count, default=8, help="kv heads (default: 8)")
    parser.add_argument("--block-size", type=parse_count, default=128, help="tokens per block (default: 128)")
    parser.add_argument("--repetitions", type=parse_count, default=15, help="timed repetitions (default: 15)")
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Runs the command."""
    require("torch")
    from .. import _core

    cases = [(name, head_dim, known) for head_dim in _HEAD_DIMS for name in TOLERANCES for known in (False, True)]
    results = []
    with console.progress("sealing", len(cases)) as advance:
        for name, head_dim, calibrated in cases:
            results.append(measure(name, head_dim, calibrated, arguments))
            advance(1)
    report = {
        "machine": {"cpu": cpu_name(), "simd_level": _core.simd_level(), "threads": _core.num_threads()},
        "num_kv_heads": arguments.kv_heads,
        "block_size": arguments.block_size,
        "repetitions": arguments.repetitions,
        "results": results,
        "ok": all(each["v_relative_error"] <= each["tolerance"] for each in results),
    }
    console.result(report)
    _print(report, console)
    return 0 if report["ok"] else 1


def measure(name: str, head_dim: int, calibrated: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures one case: an entry of `results`."""
    import torch

    from .. import PagedKvCache

    num_kv_heads, block_size = arguments.kv_heads, arguments.block_size
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, 1, num_kv_heads, block_size + 1, head_dim, generator=generator)
    k += 2 * torch.randn(1, num_kv_heads, 1, head_dim, generator=generator)  # models' keys have channel means
    cache = PagedKvCache(
        num_layers=1,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        format=name,
        block_size=block_size,
        calibration=calibration(num_kv_heads, head_dim) if calibrated else None,
    )
    sequences = []
    for length in (block_size - 1, block_size):  # the last token of a page, and the first after it
        sequences.append(cache.new_sequence())
        with cache.begin_step(sequences[-1:], length) as step:
            step.append(0, k[:, :, :length], v[:, :, :length])
    seconds: list[list[float]] = [[], []]
    for _ in range(arguments.repetitions + 1):
        for sequence, times in zip(sequences, seconds, strict=True):
            times.append(append_seconds(cache, sequence, k[:, :, -1:], v[:, :, -1:]))
    without, sealing = (statistics.median(times[1:]) for times in seconds)
    with cache.begin_step(sequences[1:], 1) as step:
        step.append(0, k[:, :, -1:], v[:, :, -1:])
    stored_k, stored_v = torch.empty_like(k), torch.empty_like(v)
    cache.dequantize(0, sequences[1], stored_k, stored_v)
    tokens = slice(1, block_size)  # the first token's V has 8 bits
    error = (stored_v - v)[:, :, tokens].square().mean().sqrt() / v[:, :, tokens].square().mean().sqrt()
    block = max(sealing - without, 0.0)
    return {
        "format": name,
        "head_dim": head_dim,
        "calibrated": calibrated,
        "block_ms": block * 1e3,
        "head_ms": block * 1e3 / num_kv_heads,
        "token_us": block * 1e6 / block_size,
        "v_relative_error": error.item(),
        "tolerance": TOLERANCES[name],
    }


def calibration(num_kv_heads: int, head_dim: int) -> Calibration:
    """A frozen calibration of random queries."""
    import torch

    from .. import Calibration, PagedKvCache, _core

    found = Calibration()
    cache = PagedKvCache(num_layers=1, num_kv_heads=num_kv_heads, head_dim=head_dim, calibration=found)
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, num_kv_heads, 2 * _core.FIRST_TOKENS, head_dim, generator=generator)
    with cache.begin_step([cache.new_sequence()], k.shape[2]) as step:
        step.append(0, k, k, q)
    found.freeze()
    return found


def append_seconds(cache: PagedKvCache, sequence: int, k: Any, v: Any) -> float:
    """Seconds to append one token, in a step that is then aborted."""
    step = cache.begin_step([sequence], 1)
    start = time.perf_counter()
    step.append(0, k, v)
    seconds = time.perf_counter() - start
    step.abort()
    return seconds


def _print(report: dict[str, Any], console: Console) -> None:
    machine = report["machine"]
    console.line(
        f"{machine['cpu']}, {machine['simd_level']}, {machine['threads']} threads: sealing a block of "
        f"{report['block_size']} tokens and {report['num_kv_heads']} kv heads; {report['repetitions']} repetitions"
    )
    console.line()
    rows = []
    for result in report["results"]:
        error = f"{result['v_relative_error']:.2f}"
        verdict = "ok" if result["v_relative_error"] <= result["tolerance"] else f"OVER {result['tolerance']}"
        rows.append(
            (
                result["format"],
                str(result["head_dim"]),
                "yes" if result["calibrated"] else "no",
                f"{result['block_ms']:.2f}",
                f"{result['head_ms']:.3f}",
                f"{result['token_us']:.1f}",
                f"{error} {verdict}",
            )
        )
    console.table(("format", "head_dim", "calibrated", "ms/block", "ms/head", "us/token", "error of V"), rows)
