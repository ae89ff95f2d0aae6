"""`kvarn plan --engine vllm`: the pool of blocks that vLLM makes of a memory, by `--kv-cache-dtype`.

vLLM gives its KV memory to blocks of one size. Layers with the same window are a KV cache group, or several of as many
layers each; a sequence has blocks in each group, and a block is of all layers of a group. In formats that seal,
kvarn's open pages are beside the pool. The rules are those of vLLM 0.26 to 0.32 (`v1/core/kv_cache_utils.py`). As
in 0.32, sliding layers beside full ones stay in vLLM's own cache, in blocks of the same bytes and fewer tokens.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, UnsupportedError
from ..vllm import formats
from .console import Console
from .model_shape import LayerGroup, ModelShape
from .sizes import format_bytes, format_count

# Bytes of an element of vLLM's own cache dtypes.
_ELEMENT_BYTES = {"bf16": 2, "fp8": 1}
_DTYPE = "bfloat16"


def check(arguments: argparse.Namespace) -> None:
    """Refuses options that do not go with this engine, or that it lacks.

    Raises:
        ConfigError: naming the option.
    """
    for name, option in (("max_seqs", "--max-num-seqs"), ("max_batched_tokens", "--max-num-batched-tokens")):
        if getattr(arguments, name) is None:
            raise ConfigError(
                f"--engine vllm needs --{name.replace('_', '-')}, vLLM's {option}: open pages are counted by it"
            )
    if arguments.block_size != formats.BLOCK_SIZE:
        raise ConfigError(f"--block-size {arguments.block_size}: kvarn's blocks have {formats.BLOCK_SIZE} in vLLM")


@dataclass(frozen=True)
class Layout:
    """How vLLM lays layers out in blocks.

    Attributes:
        groups: of each KV cache group its window, None without one, and the tokens of its blocks.
        block_bytes: bytes of a block of any group.
        page_bytes: bytes of one open page in all layers that have them.
    """

    groups: tuple[tuple[int | None, int], ...]
    block_bytes: int
    page_bytes: int


def layout(layers: list[tuple[LayerGroup, int]], name: str) -> Layout:
    """The layout of a model's layers in a format.

    Args:
        layers: groups of layers, and the kv heads of each on one GPU; those of a draft model too.
        name: a format, `bf16` or `fp8`.

    Raises:
        UnsupportedError: a layer that the format does not store, or layers that vLLM lays out in another way.
    """
    is_ours = name not in _ELEMENT_BYTES
    is_mixed = len({group.window is None for group, _ in layers}) == 2
    tokens_of: dict[int | None, int] = {}
    counts: Counter[int | None] = Counter()
    block_bytes: Counter[int | None] = Counter()
    sizes, page_bytes = set(), 0
    for group, heads in layers:
        size = formats.BLOCK_SIZE * heads * _token_bytes(name, group)
        tokens = formats.unquantized_tokens(name, group.head_dim, _DTYPE) if is_ours and is_mixed else 0
        is_quantized = is_ours and (group.window is None or tokens < formats.SMALLEST_UNQUANTIZED_BLOCK)
        tokens_of[group.window] = formats.BLOCK_SIZE if is_quantized or not is_ours else tokens
        if is_quantized and formats.seals(name):
            page_bytes += group.num_layers * heads * formats.open_page_bytes(group.head_dim)
        counts[group.window] += group.num_layers
        block_bytes[group.window] += group.num_layers * size
        sizes.add(size)
    if len(counts) == 1:
        return Layout(tuple(tokens_of.items()), block_bytes.total(), page_bytes)
    if len(sizes) > 1:
        raise UnsupportedError(
            "sliding and full layers whose tokens take different bytes: vLLM's layout of these is not planned"
        )
    fewest, most = min(counts.values()), max(counts.values())
    layers_of_group = most if most < 1.5 * fewest else fewest
    groups = [(window, tokens_of[window]) for window in counts for _ in range(-(-counts[window] // layers_of_group))]
    return Layout(tuple(groups), layers_of_group * sizes.pop(), page_bytes)


def _token_bytes(name: str, group: LayerGroup) -> int:
    """Bytes of a token and kv head."""
    if name in _ELEMENT_BYTES:
        return 2 * group.head_dim * _ELEMENT_BYTES[name]
    if not group.paged:
        raise UnsupportedError("chunked attention is not in kvarn's formats")
    return formats.token_bytes(name, group.head_dim, _DTYPE)


def plan_format(
    name: str, layers: list[tuple[LayerGroup, int]], context: int, arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[str]]:
    """One row of the plan, and notes on its layers that stay in vLLM's own cache.

    Raises:
        UnsupportedError: as `layout`.
    """
    found = layout(layers, name)
    num_pages = formats.open_pages(arguments.max_seqs, arguments.max_batched_tokens) if found.page_bytes else 0
    pool = arguments.kv_cache_memory
    if pool is None:
        pool = max(arguments.memory - arguments.weights - num_pages * found.page_bytes, 0)
    num_blocks = pool // found.block_bytes
    blocks = sum(_sequence_blocks(*group, context, arguments.max_batched_tokens) for group in found.groups)
    row = {
        "format": name,
        "bytes_per_token": blocks * found.block_bytes / context,
        "num_blocks": num_blocks,
        "block_bytes": found.block_bytes,
        "tokens": num_blocks * context // blocks,
        # vLLM keeps one block for itself.
        "sequences": min(max(num_blocks - 1, 0) // blocks, arguments.max_seqs),
        "sequence_bytes": blocks * found.block_bytes,
        "pool_bytes": pool,
        "open_pages": num_pages,
        "open_pages_bytes": num_pages * found.page_bytes,
    }
    unquantized = sorted({tokens for _, tokens in found.groups if tokens != formats.BLOCK_SIZE})
    return row, [f"{name}: sliding layers stay in {_DTYPE}, in blocks of {tokens} tokens" for tokens in unquantized]


def _sequence_blocks(window: int | None, block_size: int, context: int, max_batched_tokens: int) -> int:
    """Blocks of a sequence in a group: what its window shows and a step adds, and one that the window begins within."""
    if window is None:
        return -(-context // block_size)
    return -(-min(window - 1 + max_batched_tokens, context) // block_size) + 1


def notes(shape: ModelShape, arguments: argparse.Namespace) -> list[str]:
    """Notes on what the figures mean in vLLM."""
    if shape.state_layers:
        raise UnsupportedError(
            f"{shape.state_layers} layers have a constant state, or none: vLLM's layout of these is not planned"
        )
    if arguments.kv_cache_memory is not None:
        return ["open pages are beside --kv-cache-memory: vLLM allocates them with the model"]
    return ["open pages are part of the memory that vLLM's --gpu-memory-utilization allows the model"]


def notes_on_draft(shape: ModelShape, draft: ModelShape) -> list[str]:
    """Notes on a draft model, whose layers are in the same blocks as the model's.

    Raises:
        UnsupportedError: layers of either have a window or a constant state.
    """
    if draft.state_layers or any(group.window is not None for group in (*shape.groups, *draft.groups)):
        raise UnsupportedError(
            "a draft model beside layers with a window or a constant state, or of such, is not planned"
        )
    return [
        "the draft model's layers are in the blocks, and have open pages of their own; --weights are of both models"
    ]


def print_report(report: dict[str, Any], console: Console) -> None:
    """Prints the plan as a table."""
    formats_ = report["formats"]
    first = formats_[0]
    console.line(
        f"vLLM: sequences of {format_count(report['context'])} tokens in blocks of {report['block_size']}; "
        f"{report['max_sequences']:,} sequences and {report['max_batched_tokens']:,} tokens a step at most"
    )
    console.line()
    columns = ("format", "bytes/token", f"vs {first['format']}", "blocks", "tokens", "sequences", "pool", "open pages")
    console.table(
        (*columns, "beside"),
        [
            (
                row["format"],
                f"{row['bytes_per_token']:,.1f}",
                f"{first['bytes_per_token'] / row['bytes_per_token']:.2f}x",
                f"{row['num_blocks']:,}",
                f"{row['tokens']:,}",
                f"{row['sequences']:,}",
                format_bytes(row["pool_bytes"]),
                f"{row['open_pages']:,}",
                format_bytes(row["open_pages_bytes"]),
            )
            for row in formats_
        ],
    )
