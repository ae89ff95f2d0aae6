"""Attention of the sequences of a step that have many new tokens, by vLLM's own kernels for the CPU.

Their tokens are written to a scratch cache, one layer after the other: what was stored before as it is dequantized from
its blocks, new tokens as they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from kvarn_rs import Engine
from kvarn_rs._core import DECODE_TOKENS

from .compat_cpu import ScratchBatch, ScratchCache, blocks_of

HISTORY_TOKENS = 2048
"""Stored tokens that are dequantized at a time."""


@dataclass(frozen=True)
class Prefill:
    """A sequence with more than `DECODE_TOKENS` new tokens in a step."""

    sequence: int
    """Its index in the step."""
    rows: slice
    """Of its new tokens in the step's tensors."""
    context_len: int
    """Tokens before the step."""

    @property
    def num_new(self) -> int:
        """New tokens."""
        return self.rows.stop - self.rows.start

    @property
    def num_tokens(self) -> int:
        """All tokens, after the step."""
        return self.context_len + self.num_new


@dataclass(frozen=True)
class PrefillBatch:
    """Prefills with neighboring rows, which attend in one call."""

    prefills: list[Prefill]
    scratch: ScratchBatch

    @property
    def rows(self) -> slice:
        """Of their new tokens in the step's tensors."""
        return slice(self.prefills[0].rows.start, self.prefills[-1].rows.stop)


def prefills(context_lens: torch.Tensor, query_start_loc: torch.Tensor) -> list[Prefill]:
    """The prefills of a step, from the arrays of `Engine.begin` in host memory."""
    starts = query_start_loc.tolist()
    ranges = zip(starts, starts[1:], context_lens.tolist(), strict=False)
    found = [Prefill(index, slice(start, end), context) for index, (start, end, context) in enumerate(ranges)]
    return [one for one in found if one.num_new > DECODE_TOKENS]


class PrefillAttention:
    """Attention of prefills in the layers of an engine that have no windows."""

    def __init__(self, engine: Engine, dtype: torch.dtype, num_tokens: int) -> None:
        """Reserves a scratch cache of one layer, and memory for `HISTORY_TOKENS` tokens.

        Args:
            engine: the layers'.
            dtype: of queries, keys and values.
            num_tokens: most tokens of a sequence.
        """
        self._engine = engine
        self._scratch = ScratchCache(num_tokens, engine.num_kv_heads, engine.head_dim, dtype)
        shape = (HISTORY_TOKENS, engine.num_kv_heads, engine.head_dim)
        self._k, self._v = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)

    def batches(self, found: Iterable[Prefill]) -> list[PrefillBatch]:
        """Batches of a step's prefills, each as long as the scratch cache and the order of rows allow."""
        return [
            PrefillBatch(batch, ScratchBatch(self._scratch, [p.num_new for p in batch], [p.num_tokens for p in batch]))
            for batch in self._cut(found)
        ]

    def _cut(self, found: Iterable[Prefill]) -> Iterator[list[Prefill]]:
        batch: list[Prefill] = []
        num_blocks = 0
        for one in found:
            num_blocks += blocks_of(one.num_tokens)
            if batch and (num_blocks > self._scratch.num_blocks or one.rows.start != batch[-1].rows.stop):
                yield batch
                batch, num_blocks = [], blocks_of(one.num_tokens)
            batch.append(one)
        if batch:
            yield batch

    def forward(
        self,
        layer: int,
        batches: Iterable[PrefillBatch],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """As `Engine.forward`, for a step with prefills.

        Args:
            layer: of the engine.
            batches: all prefills of the engine's open step.
            q: `[num_tokens, num_q_heads, head_dim]`.
            k: `[num_tokens, num_kv_heads, head_dim]`.
            v: the same.
            out: as `q`, overwritten.
            scale: factor on the scores.
            softcap: scores become `softcap * tanh(score / softcap)`.
            sinks: `[num_q_heads]` in bfloat16, one more logit a head in the softmax, without a value.
        """
        self._engine.append(layer, k, v, q)
        num_rows = 0
        for batch in batches:
            for one, slot in zip(batch.prefills, batch.scratch.first_slots, strict=True):
                self._write_history(layer, one, slot)
                self._scratch.write(slot + one.context_len, k[one.rows], v[one.rows])
                num_rows += one.num_new
            batch.scratch.attend(q[batch.rows], out[batch.rows], scale, softcap, sinks)
        if num_rows < len(q):
            options = {"scale": scale, "softcap": softcap, "sinks": sinks}
            self._engine.attend(layer, q, k, v, out, **options, max_query_len=DECODE_TOKENS)

    def _write_history(self, layer: int, one: Prefill, slot: int) -> None:
        for start in range(0, one.context_len, HISTORY_TOKENS):
            count = min(HISTORY_TOKENS, one.context_len - start)
            self._engine.dequantize(layer, one.sequence, self._k[:count], self._v[:count], start=start)
            self._scratch.write(slot + start, self._k[:count], self._v[:count])
