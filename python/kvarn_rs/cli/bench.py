"""`kvarn bench attend`: decode attention over pages and tiles, compared with torch SDPA and read bandwidth.

One new token of each sequence attends to `context` tokens (itself included). Every contender cycles through several
copies of its cache, at least `working_set_bytes` in total, as a model cycles through its layers, so that no data stay
in the processor's caches between calls. In each repetition every contender runs once. Formats that seal are filled by a
prefill, so that every full block before the new token is a tile; there is no calibration. Keys and values of SDPA are
contiguous, in float32 and bfloat16; SDPA is called with `enable_gqa=True` and, as `grouped`, with the query heads of
each kv head as query rows, which computes the same without repeating keys. Read bandwidth is measured by `torch.sum`
over float64.

JSON: ``{"machine": {"cpu", "simd_level", "threads", "torch"}, "context", "batch", "num_q_heads", "num_kv_heads",
"head_dim", "block_size", "repetitions", "working_set_bytes",
"results": [{"name", "median_us", "q1_us", "q3_us", "bytes", "gb_per_s", "stream_share", "speedup",
"max_relative_error", "tolerance"}], "ok"}``

Times are per call; `q1_us` and `q3_us` are quartiles over the repetitions. `bytes` are the stored keys and values that
a call reads; `stream_share` is `gb_per_s` relative to the result `stream`; `speedup` is relative to the fastest SDPA.
`max_relative_error` is the largest difference from float32 SDPA on the decoded cache, relative to the largest output;
`ok` is false, and the exit code 1, if any exceeds its `tolerance`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, KvarnError
from . import bench_seal
from .console import Console, add_output_options
from .generate import check_format
from .machine import cpu_name
from .models import require
from .sizes import format_bytes, format_count, parse_bytes, parse_count, parse_names

if TYPE_CHECKING:
    import torch

# `raw` pages differ from SDPA by the order of float32 sums, other formats also by where scales are applied.
TOLERANCES = {"raw": 1e-5}
TOLERANCE = 2e-3
_STREAM_BYTES = 512 << 20


def add_parser(commands: Any) -> None:
    """Adds `bench attend` and `bench seal` to the command line."""
    bench = commands.add_parser("bench", help="measure speed on this machine")
    benches = bench.add_subparsers(title="benches", metavar="BENCH", required=True)
    parser = benches.add_parser(
        "attend",
        help="measure decode attention against torch SDPA",
        description="Measure decode attention over the cache, check its output, and compare with torch SDPA and the "
        "machine's read bandwidth.",
    )
    parser.add_argument("--context", type=parse_count, default=8192, help="tokens per sequence (default: 8k)")
    parser.add_argument("--head-dim", type=parse_count, default=128, help="channels per head (default: 128)")
    parser.add_argument(
        "--heads", type=parse_heads, default=(32, 8), metavar="Q/KV", help="query heads and kv heads (default: 32/8)"
    )
    parser.add_argument("--batch", type=parse_count, default=1, help="number of sequences (default: 1)")
    parser.add_argument("--threads", type=parse_count, help="threads of kvarn and of torch (default: all cores)")
    parser.add_argument("--formats", type=parse_names, help="cache formats, comma-separated (default: all)")
    parser.add_argument("--block-size", type=parse_count, default=128, help="tokens per block (default: 128)")
    parser.add_argument("--repetitions", type=parse_count, default=15, help="timed repetitions (default: 15)")
    parser.add_argument(
        "--working-set",
        type=parse_bytes,
        default=256 << 20,
        help="bytes that each contender reads before it reads any again (default: 256MiB)",
    )
    add_output_options(parser)
    parser.set_defaults(run=run)
    bench_seal.add_parser(benches)


def parse_heads(text: str) -> tuple[int, int]:
    """Parses query heads and kv heads, written `32/8`."""
    num_q_heads, slash, num_kv_heads = text.partition("/")
    if not slash:
        raise argparse.ArgumentTypeError(f"{text!r} is not Q/KV; write for example 32/8")
    heads = parse_count(num_q_heads), parse_count(num_kv_heads)
    if heads[0] % heads[1]:
        raise argparse.ArgumentTypeError(f"{heads[0]} query heads do not divide among {heads[1]} kv heads")
    return heads


@dataclass
class Contender:
    """One implementation of the attention that is measured.

    Attributes:
        name: its name in the report.
        bytes: bytes of stored keys and values that one call reads.
        calls: one callable for each copy of its cache.
        seconds: mean seconds per call, for each repetition.
        tolerance: largest allowed `error`; None: the output is not checked.
        error: largest relative difference from the reference.
    """

    name: str
    bytes: float
    calls: list[Callable[[], Any]]
    seconds: list[float] = field(default_factory=list)
    tolerance: float | None = None
    error: float = 0.0

    def measure(self) -> None:
        """Runs one repetition."""
        start = time.perf_counter()
        for call in self.calls:
            call()
        self.seconds.append((time.perf_counter() - start) / len(self.calls))


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Runs the command."""
    require("torch")
    from .. import FORMATS, _core

    arguments.formats = arguments.formats or list(FORMATS)
    for name in arguments.formats:
        check_format(name, arguments.block_size)
    if arguments.context < 2:
        raise ConfigError("--context must be at least 2: a token, and one that attends to it")
    cores = os.cpu_count() or 1
    if arguments.threads is not None and not 1 <= arguments.threads <= cores:
        raise ConfigError(f"--threads {arguments.threads}: this machine has {cores} cores")
    import torch

    if arguments.threads is not None:
        os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)  # read when the core's first kernel runs
    threads = arguments.threads or _core.num_threads()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            try:
                contenders = prepare(arguments, console)
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, KvarnError):
                    raise
                reason = str(error).splitlines()[0] if str(error) else "out of memory"
                raise ConfigError(f"no room for caches of this shape: {reason[:200]}") from error
            if _core.num_threads() != threads:
                started = _core.num_threads()
                console.warn(f"kvarn's threads were already started: it runs on {started}, torch on {threads}")
            steps = arguments.repetitions * len(contenders)
            with console.progress("measuring", steps) as advance:
                for contender in contenders:
                    contender.measure()
                    contender.seconds.clear()
                for _ in range(arguments.repetitions):
                    for contender in contenders:
                        contender.measure()
                        advance(1)
    finally:
        torch.set_num_threads(before)
    report = summarize(arguments, contenders)
    console.result(report)
    _print(report, console)
    return 0 if report["ok"] else 1


def prepare(arguments: argparse.Namespace, console: Console) -> list[Contender]:
    """Makes all contenders, fills their caches and checks their outputs."""
    import torch

    num_q_heads, num_kv_heads = arguments.heads
    shape = (arguments.batch, num_kv_heads, arguments.context, arguments.head_dim)
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(shape, generator=generator)
    k += 2 * torch.randn(1, num_kv_heads, 1, arguments.head_dim, generator=generator)  # models' keys have channel means
    v = torch.randn(shape, generator=generator)
    q = torch.randn(arguments.batch, num_q_heads, 1, arguments.head_dim, generator=generator)
    with console.progress("filling the caches", len(arguments.formats) + 2) as advance:
        stream = torch.zeros(_STREAM_BYTES // 8, dtype=torch.float64)
        contenders = [Contender("stream", _STREAM_BYTES, [stream.sum])]
        for dtype in (torch.float32, torch.bfloat16):
            contenders += dense(q, k, v, dtype, arguments.working_set)
            advance(1)
        for name in arguments.formats:
            contenders.append(paged(name, q, k, v, arguments))
            advance(1)
    return contenders


def copies_for(working_set: int, bytes_read: int) -> int:
    """The number of copies of a cache that make up the working set."""
    return max(1, -(-working_set // bytes_read))


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """SDPA of one new token to all of `k` and `v`, with grouped query heads."""
    import torch

    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dtype: torch.dtype, working_set: int) -> list[Contender]:
    """The two SDPA contenders of one dtype."""
    import torch

    bytes_read = 2 * k.numel() * dtype.itemsize
    q = q.to(dtype)
    rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    copies = [(k.to(dtype, copy=True), v.to(dtype, copy=True)) for _ in range(copies_for(working_set, bytes_read))]
    name = {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    return [
        Contender(f"sdpa {name}", bytes_read, [lambda k=k, v=v: sdpa(q, k, v) for k, v in copies]),
        Contender(f"sdpa {name} grouped", bytes_read, [lambda k=k, v=v: sdpa(rows, k, v) for k, v in copies]),
    ]


def paged(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, arguments: argparse.Namespace) -> Contender:
    """The contender of one cache format. Each copy is a layer of the cache."""
    import torch

    from .. import PagedKvCache

    batch, num_kv_heads, context, head_dim = k.shape

    def make(num_layers: int) -> PagedKvCache:
        return PagedKvCache(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            format=name,
            block_size=arguments.block_size,
        )

    layout = make(1).stats()
    tiles = 0 if layout["bytes_per_open_page"] == 0 else (context - 1) // arguments.block_size
    in_pages = context - tiles * arguments.block_size
    page_bytes = layout["bytes_per_open_page"] or layout["bytes_per_block"]
    bytes_read = batch * (tiles * layout["bytes_per_block"] + in_pages * page_bytes / arguments.block_size)
    num_layers = copies_for(arguments.working_set, int(bytes_read))
    cache = make(num_layers)
    sequences = [cache.new_sequence() for _ in range(batch)]
    with cache.begin_step(sequences, context - 1) as step:
        for layer in range(num_layers):
            step.append(layer, k[:, :, :-1], v[:, :, :-1])
    step = cache.begin_step(sequences, 1)
    for layer in range(num_layers):
        step.append(layer, k[:, :, -1:], v[:, :, -1:])
    out = torch.empty_like(q)
    calls = [lambda layer=layer: step.attend(layer, q, None, None, out) for layer in range(num_layers)]

    stored_k, stored_v = torch.empty_like(k), torch.empty_like(v)
    errors = []
    for layer in {0, num_layers - 1}:
        for row, sequence in enumerate(sequences):
            cache.dequantize(layer, sequence, stored_k[row : row + 1], stored_v[row : row + 1])
        expected = sdpa(q, stored_k, stored_v)
        calls[layer]()
        errors.append(((out - expected).abs().max() / expected.abs().max()).item())
    return Contender(name, bytes_read, calls, error=max(errors), tolerance=TOLERANCES.get(name, TOLERANCE))


def summarize(arguments: argparse.Namespace, contenders: list[Contender]) -> dict[str, Any]:
    """The report."""
    import torch

    from .. import _core

    def bandwidth(contender: Contender) -> float:
        return contender.bytes / statistics.median(contender.seconds) / 1e9

    stream = bandwidth(contenders[0])
    best = min(statistics.median(each.seconds) for each in contenders if each.name.startswith("sdpa"))
    results = []
    for contender in contenders:
        median = statistics.median(contender.seconds)
        q1, q3 = _quartiles(contender.seconds)
        results.append(
            {
                "name": contender.name,
                "median_us": median * 1e6,
                "q1_us": q1 * 1e6,
                "q3_us": q3 * 1e6,
                "bytes": int(contender.bytes),
                "gb_per_s": bandwidth(contender),
                "stream_share": bandwidth(contender) / stream,
                "speedup": None if contender is contenders[0] else best / median,
                "max_relative_error": None if contender.tolerance is None else contender.error,
                "tolerance": contender.tolerance,
            }
        )
    return {
        "machine": {
            "cpu": cpu_name(),
            "simd_level": _core.simd_level(),
            "threads": _core.num_threads(),
            "torch": torch.__version__,
        },
        "context": arguments.context,
        "batch": arguments.batch,
        "num_q_heads": arguments.heads[0],
        "num_kv_heads": arguments.heads[1],
        "head_dim": arguments.head_dim,
        "block_size": arguments.block_size,
        "repetitions": arguments.repetitions,
        "working_set_bytes": arguments.working_set,
        "results": results,
        "ok": all(each.error <= each.tolerance for each in contenders if each.tolerance is not None),
    }


def _quartiles(seconds: list[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    q1, _, q3 = statistics.quantiles(seconds, n=4, method="inclusive")
    return q1, q3


def _print(report: dict[str, Any], console: Console) -> None:
    machine = report["machine"]
    console.line(
        f"{machine['cpu']}, {machine['simd_level']}, {machine['threads']} threads, torch {machine['torch']}: "
        f"{report['batch']} x one token attends to {format_count(report['context'])} tokens, {report['num_q_heads']}/"
        f"{report['num_kv_heads']} heads of {report['head_dim']}; {report['repetitions']} repetitions over "
        f"{format_bytes(report['working_set_bytes'])}"
    )
    console.line()
    rows = []
    for result in report["results"]:
        error = result["max_relative_error"]
        verdict = "-"
        if error is not None:
            tolerance = result["tolerance"]
            verdict = f"{error:.1e} ok" if error <= tolerance else f"{error:.1e} OVER {tolerance:.0e}"
        rows.append(
            (
                result["name"],
                f"{result['median_us']:,.0f}",
                f"{result['q1_us']:,.0f}..{result['q3_us']:,.0f}",
                f"{result['gb_per_s']:.1f}",
                f"{result['stream_share']:.0%}",
                "-" if result["speedup"] is None else f"{result['speedup']:.2f}x",
                verdict,
            )
        )
    console.table(("contender", "us/call", "quartiles", "GB/s", "of stream", "vs best SDPA", "error"), rows)
