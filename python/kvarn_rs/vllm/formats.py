"""The names of kvarn's formats as vLLM's `--kv-cache-dtype`, and the bytes that their blocks take."""

from __future__ import annotations

from kvarn_rs import FORMATS
from kvarn_rs._core import block_bytes

PREFIX = "kvarn_"
CACHE_DTYPES = tuple(PREFIX + name for name in FORMATS)
"""What `--kv-cache-dtype` accepts beside vLLM's own."""

BLOCK_SIZE = 128
"""Tokens of a block."""

SMALLEST_UNQUANTIZED_BLOCK = 32
"""Tokens of the smallest block of layers that stay in vLLM's own cache: what its attention on the CPU takes.

Attention on GPUs takes 16. It is the same there, so that a model's layers are quantized in the same formats everywhere.
"""


def is_ours(cache_dtype: object) -> bool:
    """Whether a `--kv-cache-dtype` names one of kvarn's formats."""
    return cache_dtype in CACHE_DTYPES


def format_of(cache_dtype: str) -> str:
    """The format that a `--kv-cache-dtype` of `CACHE_DTYPES` names."""
    return cache_dtype.removeprefix(PREFIX)


def seals(format: str) -> bool:
    """Whether blocks of a format are tiles, with pages beside for those that are not sealed."""
    return format not in ("raw", "int8")


def token_bytes(format: str, head_dim: int, dtype: str) -> int:
    """Bytes of a token and key/value head in vLLM's memory: a block's record, rounded up to whole bytes a token."""
    return -(-block_bytes(format, head_dim, BLOCK_SIZE, dtype) // BLOCK_SIZE)


def unquantized_tokens(format: str, head_dim: int, dtype: str) -> int:
    """The power of two of unquantized tokens that fit in the bytes of a block."""
    fit = BLOCK_SIZE * token_bytes(format, head_dim, dtype) // token_bytes("raw", head_dim, dtype)
    return 1 << fit.bit_length() - 1


def open_page_bytes(head_dim: int) -> int:
    """Bytes of a page of one key/value head of a block that is not sealed."""
    return block_bytes("int8", head_dim, BLOCK_SIZE)


def open_pages(max_num_seqs: int, max_num_batched_tokens: int) -> int:
    """Pages that blocks which are not sealed can need at once, in each layer.

    In a step, a sequence has its last full block, which the step seals, and the blocks that it writes and does not
    seal at once: two, or three if it has more new tokens than a block. Others keep at most two from step to step.
    """
    return 3 * max_num_seqs + min(max_num_seqs, max_num_batched_tokens // BLOCK_SIZE)
