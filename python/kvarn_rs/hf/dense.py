"""Attention on dense tensors: what transformers asks of an attention function, and kvarn's pages do not do."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    window: int | None = None,
    causal: bool = True,
    dropout: float = 0.0,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention on tensors: query [B, num_q_heads, T, head_dim], key and value [B, num_kv_heads, kv_len, ...].

    mask: used as it is, bool or added to the scores. None: if `causal`, the queries are the last T of the kv_len
    positions and see `window` of them.

    Returns:
        [B, T, num_q_heads, head_dim of value], contiguous.
    """
    num_queries, kv_len = query.shape[2], key.shape[2]
    by_torch = softcap is None and sinks is None and position_bias is None
    # torch takes no other masks; the smallest number of another dtype may be infinite in the query's.
    by_torch = by_torch and (mask is None or mask.dtype in (torch.bool, torch.float32, query.dtype))
    # torch's own causal mask starts at the first key, so it fits where every key has its query.
    torch_causal = by_torch and causal and mask is None and num_queries == kv_len and (window or kv_len) >= kv_len
    if causal and mask is None and not torch_causal:
        seen = _causal_window(num_queries, kv_len, window)
        mask = None if seen is None else seen[None, None].to(query.device)
    if by_torch:
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=torch_causal, scale=scale, enable_gqa=grouped
        )
        return out.transpose(1, 2).contiguous()
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if position_bias is not None:
        scores = scores + position_bias
    if mask is not None:
        # The smallest finite number and not -inf: a padding query sees nothing, and must not become NaN.
        hidden = torch.finfo(scores.dtype).min
        scores = torch.where(mask, scores, hidden) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, num_queries, 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., :kv_len]
    weights = torch.nn.functional.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous()


def _causal_window(num_queries: int, kv_len: int, window: int | None) -> torch.Tensor | None:
    """bool [num_queries, kv_len] of queries that are the last of kv_len positions; None if they see everything."""
    if num_queries == 1 and (window is None or kv_len <= window):
        return None
    query = torch.arange(kv_len - num_queries, kv_len)[:, None]
    key = torch.arange(kv_len)[None, :]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
