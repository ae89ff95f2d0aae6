"""Which positions may a query see: transformers' masks, in the smallest form that says it.

The mask of a forward reaches attention as one of

* None: every position is a token; causality and the sliding window are arithmetic on positions;
* a *padding row*, bool [B, 1, 1, kv_len], True = token: the same, and some positions are padding;
* anything else, [B, 1 or heads, T, kv_len], bool or added to the scores: a pattern of its own (overlays, packed
  sequences, chunks, bidirectional attention, a mask that the caller made).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .compat import is_plain_causal, sdpa_mask


def kvarn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """transformers' mask hook for `attn_implementation="kvarn"`.

    Args:
        kv_length: positions from `kv_offset` on that attention will see.
        attention_mask: bool [B, positions so far], True = token, or None.
        allow_is_causal_skip: False when the model goes on to change the mask, which then has to be whole.

    Returns:
        None, a padding row, or transformers' dense bool mask [B, 1, q_length, kv_length] (see the module).
    """
    plain = mask_function is None or is_plain_causal(mask_function)
    if not (plain and allow_is_causal_skip) or use_vmap:
        if mask_function is not None:
            kwargs["mask_function"] = mask_function
        kwargs["allow_is_bidirectional_skip"] = False  # None means causal here
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            **kwargs,
        )
    if attention_mask is None:
        return None
    tokens = attention_mask[:, kv_offset : kv_offset + kv_length]
    if (missing := kv_length - tokens.shape[1]) > 0:  # as transformers does: positions beyond the mask are hidden
        tokens = torch.nn.functional.pad(tokens, (0, missing))
    if tokens.all():
        return None
    return tokens[:, None, None, :]


def is_padding_row(mask: torch.Tensor) -> bool:
    """Whether a mask says only which positions are tokens."""
    return mask.dtype == torch.bool and mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == 1


def attended_columns(mask: torch.Tensor) -> torch.Tensor:
    """bool [B, kv_len]: the positions that any query of a 4-D mask sees."""
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.flatten(1, 2).any(1)


def causal_window(num_queries: int, kv_len: int, window: int | None) -> torch.Tensor | None:
    """bool [num_queries, kv_len] of queries that are the last of kv_len positions; None if they see everything."""
    if num_queries == 1 and (window is None or kv_len <= window):
        return None
    query = torch.arange(kv_len - num_queries, kv_len)[:, None]
    key = torch.arange(kv_len)[None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
