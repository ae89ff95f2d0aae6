"""`kvarn plan`: how many tokens and sequences of a model fit in a memory, by cache format.

JSON: ``{"engine", "model_type", "context", "block_size", "memory_bytes", "weights_bytes", "tensor_parallel",
"max_sequences", "layers": [{"num_layers", "num_kv_heads", "head_dim", "window"}], "state_layers",
"formats": [{"format", "bytes_per_token", "tokens", "sequences", "sequence_bytes", "open_bytes", "open_page_bytes"}],
"unsupported": [{"format", "reason"}], "notes": [str]}``

All figures are for one GPU. A sequence takes whole blocks, which are tiles in formats that seal and pages in others. In
formats that seal, a running sequence also has two open INT8 pages in each layer, `open_page_bytes` (0 in other
formats). `sequence_bytes` is both for `context` tokens, `bytes_per_token` is the blocks alone per token, and
`open_bytes` is the part of `sequence_bytes` due to open pages and rounding up to blocks. `tokens` is the whole blocks
that fit beside the open pages of `sequences` if all layers have full attention and the same storage, else the tokens of
as many sequences of `context` as fit. `num_kv_heads` is per GPU.

With `--engine vllm` the figures are of the pool of blocks that vLLM makes (`plan_vllm`), with the layers of a draft
model if there is one. JSON has `max_batched_tokens` and `draft_layers` (as `layers`) too, and formats are
``[{"format", "bytes_per_token", "num_blocks", "block_bytes", "tokens", "sequences", "sequence_bytes", "pool_bytes",
"open_pages", "open_pages_bytes"}]``. `num_blocks` and `tokens` are those that vLLM logs for a pool of `pool_bytes`;
`memory_bytes` is null with `--kv-cache-memory`. `open_pages` is the number of pages beside the pool in each layer, for
`max_sequences` sequences, and `open_pages_bytes` the memory of all of them. A sequence under a window has the blocks
that its window shows and those that a step adds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UnknownFormatError, UnsupportedError
from . import plan_vllm
from .console import Console, add_output_options
from .model_shape import LayerGroup, ModelShape, model_shape, read_config
from .sizes import format_bytes, format_count, parse_bytes, parse_count, parse_names

if TYPE_CHECKING:
    from .. import _core

# Dtypes of an engine's unquantized cache; the first is the baseline.
DENSE_FORMATS = ("bf16", "fp8")
_DEFAULT_CONTEXT = 32768


def add_parser(commands: Any) -> None:
    """Adds `plan` to the command line."""
    parser = commands.add_parser(
        "plan",
        help="compute how many tokens and sequences fit, by format",
        description="Compute how many tokens and sequences fit in memory, by cache format. Reads only a config.json.",
    )
    parser.add_argument("model", metavar="CONFIG", type=Path, help="a config.json, or the folder that holds it")
    parser.add_argument(
        "--engine",
        choices=("kvarn", "vllm"),
        default="kvarn",
        help="whose blocks: those of kvarn's own cache (the default), or vLLM's",
    )
    memory = parser.add_mutually_exclusive_group(required=True)
    memory.add_argument(
        "--memory", type=parse_bytes, help="memory of one GPU, for example 80GiB (bytes without a unit)"
    )
    memory.add_argument(
        "--kv-cache-memory",
        type=parse_bytes,
        help="vLLM's --kv-cache-memory-bytes, beside which open pages are (only with --engine vllm)",
    )
    parser.add_argument("--weights", type=parse_bytes, default=0, help="memory of weights and workspace (default: 0)")
    parser.add_argument(
        "--format",
        type=parse_names,
        default=["all"],
        metavar="NAMES",
        help="bf16, fp8, int8, int4, int3, int2, comma-separated; or all (the default)",
    )
    parser.add_argument("--context", type=parse_count, help="tokens per sequence (default: 32k, or the model's limit)")
    parser.add_argument("--max-seqs", type=parse_count, help="most sequences that run at once (default: all that fit)")
    parser.add_argument(
        "--max-batched-tokens", type=parse_count, help="vLLM's most tokens of a step (only with --engine vllm)"
    )
    parser.add_argument(
        "--draft-model",
        metavar="CONFIG",
        type=Path,
        help="the config.json of vLLM's draft model, or its folder (only with --engine vllm)",
    )
    parser.add_argument("--tp", type=parse_count, default=1, help="GPUs of tensor parallelism (default: 1)")
    parser.add_argument("--block-size", type=parse_count, default=128, help="tokens per block (default: 128)")
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace, console: Console) -> int:
    """Runs the command."""
    in_vllm = arguments.engine == "vllm"
    if in_vllm:
        plan_vllm.check(arguments)
    elif any((arguments.kv_cache_memory, arguments.max_batched_tokens, arguments.draft_model)):
        raise ConfigError("--kv-cache-memory, --max-batched-tokens and --draft-model are for --engine vllm")
    shape = model_shape(read_config(arguments.model))
    draft = None if arguments.draft_model is None else model_shape(read_config(arguments.draft_model))
    context = arguments.context or min(shape.max_context or _DEFAULT_CONTEXT, _DEFAULT_CONTEXT)
    if arguments.memory is None and arguments.weights:
        raise ConfigError("--weights are not part of --kv-cache-memory: leave one of them out")
    if arguments.memory is not None and arguments.weights >= arguments.memory:
        raise ConfigError(
            f"weights of {format_bytes(arguments.weights)} leave nothing of {format_bytes(arguments.memory)}"
        )
    groups, draft_groups = (
        [(group, heads_per_gpu(group.num_kv_heads, arguments.tp)) for group in (() if one is None else one.groups)]
        for one in (shape, draft)
    )
    formats, unsupported = [], []
    notes = plan_notes(shape, context, arguments)
    if draft is not None:
        notes += plan_vllm.notes_on_draft(shape, draft)
    for name in format_names(arguments.format):
        try:
            plan_one = plan_vllm.plan_format if in_vllm else plan_format
            row, dense_layers = plan_one(name, groups + draft_groups, context, arguments)
        except UnsupportedError as error:
            unsupported.append({"format": name, "reason": str(error)})
            continue
        formats.append(row)
        notes += dense_layers
    if not formats:
        raise UnsupportedError("; ".join(f"{entry['format']}: {entry['reason']}" for entry in unsupported))
    if not any(row["tokens"] for row in formats):
        least = min(formats, key=lambda row: row["bytes_per_token"])
        open_pages = f", beside {format_bytes(least['open_pages_bytes'])} of open pages" if in_vllm else ""
        raise ConfigError(
            f"{format_bytes(cache_memory(arguments))} for the cache hold no block: {arguments.block_size} tokens take "
            f"about {format_bytes(least['bytes_per_token'] * arguments.block_size)} in {least['format']}{open_pages}. "
            "A size without a unit is in bytes: write for example --memory 80GiB"
        )
    report = {
        "engine": arguments.engine,
        "model_type": shape.model_type,
        "context": context,
        "block_size": arguments.block_size,
        "memory_bytes": arguments.memory,
        "weights_bytes": arguments.weights,
        "tensor_parallel": arguments.tp,
        "max_sequences": arguments.max_seqs,
        "layers": _layers(groups),
        "state_layers": shape.state_layers,
        "formats": formats,
        "unsupported": unsupported,
        "notes": notes,
    }
    if in_vllm:
        report |= {"max_batched_tokens": arguments.max_batched_tokens, "draft_layers": _layers(draft_groups)}
    console.result(report)
    _print_layers(shape.model_type, report["layers"], console)
    if draft is not None:
        _print_layers(f"draft model, {draft.model_type}", report["draft_layers"], console)
    if in_vllm:
        plan_vllm.print_report(report, console)
    else:
        _print(report, console)
    for entry in report["unsupported"]:
        console.line(f"{entry['format']} is not planned: {entry['reason']}")
    for note in report["notes"]:
        console.note(f"note: {note}")
    return 0


def cache_memory(arguments: argparse.Namespace) -> int:
    """Bytes for the cache."""
    return arguments.memory - arguments.weights if arguments.memory is not None else arguments.kv_cache_memory


def format_names(names: list[str]) -> list[str]:
    """The formats to plan, with `all` expanded. Refuses unknown names."""
    from .. import FORMATS

    known = [*DENSE_FORMATS, *(name for name in FORMATS if name != "raw")]  # `raw` takes the bytes of bf16
    for name in names:
        if name not in (*known, "all"):
            raise UnknownFormatError(f"unknown format {name!r}; plan knows: {', '.join(known)}, all")
    return known if "all" in names else names


def heads_per_gpu(num_kv_heads: int, tensor_parallel: int) -> int:
    """Kv heads on each of `tensor_parallel` GPUs; heads are replicated if there are fewer of them than GPUs."""
    if num_kv_heads > tensor_parallel and num_kv_heads % tensor_parallel:
        raise ConfigError(f"{num_kv_heads} kv heads do not divide among {tensor_parallel} GPUs")
    return max(1, num_kv_heads // tensor_parallel)


def page_refusal(name: str, group: LayerGroup, block_size: int) -> str:
    """The reason why pages of this format cannot store a group's layers; empty if they can."""
    from .. import _core

    if not group.paged:
        return "chunked attention stays in the engine's unquantized cache"
    try:
        _core.block_bytes(name, group.head_dim, block_size)
    except UnsupportedError as error:
        return str(error)
    return ""


def capacity(
    stored: dict[str, list[tuple[int, int, int, int | None]]],
    block_size: int,
    context: int,
    memory: int,
    max_sequences: int | None,
) -> _core.Capacity:
    """`_core.capacity` of groups with different storages, combined."""
    from .. import _core

    parts = [
        _core.capacity(storage, groups, block_size, context, memory, max_sequences)
        for storage, groups in stored.items()
    ]
    if len(parts) == 1:
        return parts[0]
    sequence_bytes = sum(part["sequence_bytes"] for part in parts)
    sequences = memory // sequence_bytes
    return {
        "sequence_bytes": sequence_bytes,
        "open_bytes": sum(part["open_bytes"] for part in parts),
        "open_page_bytes": sum(part["open_page_bytes"] for part in parts),
        "tokens": memory * context // sequence_bytes,
        "sequences": sequences if max_sequences is None else min(sequences, max_sequences),
    }


def plan_format(
    name: str, groups: list[tuple[LayerGroup, int]], context: int, arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """One row of the plan, and notes on its layers that stay unquantized.

    Raises:
        UnsupportedError: no layer can be stored in this format.
    """
    stored: dict[str, list[tuple[int, int, int, int | None]]] = {}
    refusals: dict[LayerGroup, str] = {}
    for group, heads in groups:
        storage = name
        if name not in DENSE_FORMATS and (reason := page_refusal(name, group, arguments.block_size)):
            storage = DENSE_FORMATS[0]
            refusals[group] = reason
        stored.setdefault(storage, []).append((group.num_layers, heads, group.head_dim, group.window))
    if len(refusals) == len(groups):
        raise UnsupportedError("; ".join(dict.fromkeys(refusals.values())))
    fits = capacity(stored, arguments.block_size, context, arguments.memory - arguments.weights, arguments.max_seqs)
    row = {
        "format": name,
        "bytes_per_token": (fits["sequence_bytes"] - fits["open_page_bytes"]) / context,
        "tokens": fits["tokens"],
        "sequences": fits["sequences"],
        "sequence_bytes": fits["sequence_bytes"],
        "open_bytes": fits["open_bytes"],
        "open_page_bytes": fits["open_page_bytes"],
    }
    return row, [
        f"{name}: {group.num_layers} layers are counted in {DENSE_FORMATS[0]}: {reason}"
        for group, reason in refusals.items()
    ]


def plan_notes(shape: ModelShape, context: int, arguments: argparse.Namespace) -> list[str]:
    """Notes on assumptions behind the figures."""
    notes = plan_vllm.notes(shape, arguments) if arguments.engine == "vllm" else []
    if not arguments.weights and arguments.memory is not None:
        notes.append("weights are not counted: give them with --weights")
    if shape.max_context is not None and context > shape.max_context:
        notes.append(f"a context of {context:,} is beyond the model's own limit of {shape.max_context:,}")
    if shape.state_layers:
        notes.append(f"{shape.state_layers} layers have a constant state, or none: not counted")
    is_sliding = any(group.window is not None and group.window < context for group in shape.groups)
    if is_sliding and arguments.engine != "vllm":
        notes.append(
            "sliding layers store a prompt in full until the next step: the figures are for decode and chunked prefill"
        )
    if shape.assumed_sliding:
        notes.append("the configuration does not say which layers have the sliding window: all are assumed to")
    replicated = sorted({group.num_kv_heads for group in shape.groups if group.num_kv_heads < arguments.tp})
    if replicated:
        heads = ", ".join(map(str, replicated))
        notes.append(f"{heads} kv heads on {arguments.tp} GPUs: each GPU stores one, so heads are replicated")
    return notes


def _layers(groups: list[tuple[LayerGroup, int]]) -> list[dict[str, Any]]:
    return [
        {"num_layers": group.num_layers, "num_kv_heads": heads, "head_dim": group.head_dim, "window": group.window}
        for group, heads in groups
    ]


def _print_layers(model: str, layers: list[dict[str, Any]], console: Console) -> None:
    for layer in layers:
        reach = "reading everything" if layer["window"] is None else f"reading {layer['window']:,} tokens"
        console.line(
            f"{model}: {layer['num_layers']} layers of {layer['num_kv_heads']} kv heads, "
            f"head_dim {layer['head_dim']}, {reach}"
        )


def _print(report: dict[str, Any], console: Console) -> None:
    console.line(
        f"{format_bytes(report['memory_bytes'] - report['weights_bytes'])} for the cache on each GPU; sequences of "
        f"{format_count(report['context'])} tokens in blocks of {report['block_size']}"
    )
    console.line()
    formats = report["formats"]
    first = formats[0]
    console.table(
        (
            "format",
            "bytes/token",
            f"vs {first['format']}",
            "tokens",
            "sequences",
            "a sequence",
            "rounding",
            "open pages",
        ),
        [
            (
                row["format"],
                f"{row['bytes_per_token']:,.1f}",
                f"{first['bytes_per_token'] / row['bytes_per_token']:.2f}x",
                f"{row['tokens']:,}",
                f"{row['sequences']:,}",
                format_bytes(row["sequence_bytes"]),
                format_bytes(row["open_bytes"] - row["open_page_bytes"]),
                format_bytes(row["open_page_bytes"]),
            )
            for row in formats
        ],
    )
