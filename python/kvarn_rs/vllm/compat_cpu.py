"""vLLM's own attention on the CPU, over a scratch cache: all that depends on its release."""
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.platforms import current_platform

_BLOCK_SIZE = 128
"""Tokens of a scratch block: a multiple of what the kernels of every instruction set take."""


def has_kernels(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernels are there, for such heads."""
    if not current_platform.is_cpu():
        return False
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return head_dim in CPUAttentionBackend.get_supported_head_sizes() and dtype in CPUAttentionBackend.supported_dtypes


class ScratchCache:
    """Unquantized blocks of one layer, in the layout of vLLM's kernels."""

    def __init__(self, num_tokens: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        """Reserves memory.

        Args:
            num_tokens: most tokens of a batch.
            num_kv_heads: of each layer.
            head_dim: channels of a head.
            dtype: of queries, keys and values.
        """
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        self.num_blocks = blocks_of(num_tokens)
        self.dtype = dtype
        self.isa = _get_attn_isa(dtype, _BLOCK_SIZE, head_dim)
        shape = (self.num_blocks, num_kv_heads, 2 * _BLOCK_SIZE, head_dim)
        # Zeros, since kernels read what a block has behind its tokens; numpy's take memory when they are first used.
        zeros = torch.from_numpy(np.zeros((*shape[:-1], head_dim * dtype.itemsize), dtype=np.uint8))
        self.k, self.v = zeros.view(dtype).chunk(2, dim=2)

    def write(self, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes keys and values, `[num_tokens, num_kv_heads, head_dim]` each, to the slots from `start` on."""
        slots = torch.arange(start, start + len(k), dtype=torch.int64)
        ops.cpu_attn_reshape_and_cache(k, v, self.k, self.v, slots, self.isa)


def blocks_of(num_tokens: int) -> int:
    """Scratch blocks of a sequence."""
    return -(-num_tokens // _BLOCK_SIZE)


class ScratchBatch:
    """Sequences that attend in one call, each in blocks of its own of a scratch cache."""

    def __init__(self, scratch: ScratchCache, query_lens: Sequence[int], seq_lens: Sequence[int]) -> None:
        """Assigns blocks.

        Args:
            scratch: where the tokens will be.
            query_lens: new tokens of each sequence.
            seq_lens: all tokens of each.
        """
        self._scratch = scratch
        counts = [blocks_of(length) for length in seq_lens]
        firsts = [sum(counts[:index]) for index in range(len(counts))]
        self.first_slots = [first * _BLOCK_SIZE for first in firsts]
        self._tables = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, first, count in zip(self._tables, firsts, counts, strict=True):
            row[:count] = torch.arange(first, first + count)
        self._seq_lens = torch.tensor(seq_lens, dtype=torch.int32)
        self._starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self._schedule = cache(self._make_schedule)  # of all layers with as many query heads

    def _make_schedule(self, num_q_heads: int) -> torch.Tensor:
        _, num_kv_heads, _, head_dim = self._scratch.k.shape
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(self._seq_lens),
            num_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            seq_lens=self._seq_lens,
            dtype=self._scratch.dtype,
            query_start_loc=self._starts,
            causal=True,
            sliding_window_size=-1,
            isa=self._scratch.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )

    def attend(
        self, q: torch.Tensor, out: torch.Tensor, scale: float, softcap: float | None, sinks: torch.Tensor | None
    ) -> None:
        """Causal attention of the new tokens, `[num_tokens, num_q_heads, head_dim]`, to all of their sequences."""
        ops.cpu_attention_with_kv_cache(
            query=q,
            key_cache=self._scratch.k,
            value_cache=self._scratch.v,
            output=out,
            query_start_loc=self._starts,
            seq_lens=self._seq_lens,
            scale=scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self._tables,
            softcap=softcap or 0.0,
            scheduler_metadata=self._schedule(q.shape[1]),
            s_aux=sinks,
        )
