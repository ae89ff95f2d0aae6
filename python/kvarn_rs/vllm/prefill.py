"""Attention of the sequences of a step that have many new tokens, by torch.

The new tokens attend to each other as they are. What was stored before is dequantized from blocks a window at a time,
and attended to without a mask. The parts are merged by their log-sum-exp, in float32.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from kvarn_rs import Engine
from kvarn_rs._core import DECODE_TOKENS

from .compat_torch import flash_attention

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


def prefills(context_lens: torch.Tensor, query_start_loc: torch.Tensor) -> list[Prefill]:
    """The prefills of a step, from the arrays of `Engine.begin` in host memory."""
    starts = query_start_loc.tolist()
    ranges = zip(starts, starts[1:], context_lens.tolist(), strict=False)
    found = [Prefill(index, slice(start, end), context) for index, (start, end, context) in enumerate(ranges)]
    return [one for one in found if one.rows.stop - one.rows.start > DECODE_TOKENS]


class PrefillAttention:
    """Attention of prefills in the layers of an engine, which have no windows."""

    def __init__(self, engine: Engine, dtype: torch.dtype) -> None:
        """Allocates memory for `HISTORY_TOKENS` tokens.

        Args:
            engine: the layers'.
            dtype: of queries, keys and values.
        """
        self._engine = engine
        shape = (HISTORY_TOKENS, engine.num_kv_heads, engine.head_dim)
        self._k, self._v = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)

    def forward(
        self,
        layer: int,
        sequences: Iterable[Prefill],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        *,
        scale: float,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """As `Engine.forward`, for a step with prefills.

        Args:
            layer: of the engine.
            sequences: all prefills of the engine's open step.
            q: `[num_tokens, num_q_heads, head_dim]`.
            k: `[num_tokens, num_kv_heads, head_dim]`.
            v: the same.
            out: as `q`, overwritten.
            scale: factor on the scores.
            sinks: `[num_q_heads]`, one more logit a head in the softmax, without a value.
        """
        self._engine.append(layer, k, v, q)
        rows = 0
        for one in sequences:
            rows += one.rows.stop - one.rows.start
            found = self._attend(layer, one, q[one.rows], k[one.rows], v[one.rows], scale, sinks)
            out[one.rows].unflatten(1, found.shape[:2]).copy_(found.permute(2, 0, 1, 3))
        if rows < len(q):
            self._engine.attend(layer, q, k, v, out, scale=scale, sinks=sinks, max_query_len=DECODE_TOKENS)

    def _attend(
        self,
        layer: int,
        one: Prefill,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """`[num_kv_heads, group, num_tokens, head_dim]`."""
        out, lse = flash_attention(q, k, v, scale, is_causal=True)
        if one.context_len or sinks is not None:
            out = out.float()
        for start in range(0, one.context_len, HISTORY_TOKENS):
            count = min(HISTORY_TOKENS, one.context_len - start)
            stored = self._k[:count], self._v[:count]
            self._engine.dequantize(layer, one.sequence, *stored, start=start)
            part, part_lse = flash_attention(q, *stored, scale, is_causal=False)
            total = torch.logaddexp(lse, part_lse)
            out.mul_(_weight(lse, total)).addcmul_(part.float(), _weight(part_lse, total))
            lse = total
        if sinks is not None:
            out.mul_(_weight(lse, torch.logaddexp(lse, sinks.float().view(*out.shape[:2], 1))))
        return out


def _weight(lse: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """What a part with one log-sum-exp has of a whole with another."""
    return (lse - total).exp_().unsqueeze(-1)
