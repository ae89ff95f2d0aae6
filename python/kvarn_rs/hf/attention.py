"""The attention that transformers calls for `attn_implementation="kvarn"`: on pages when it can, dense when not."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvarn_rs.errors import KvarnError, UnsupportedError

from .compat import AttentionInterface, AttentionMaskInterface
from .gradients import refusing
from .handle import KvHandle, Pending
from .masks import causal_window, is_padding_row, kvarn_mask
from .store import PageStore

ATTENTION_NAME = "kvarn"


def register() -> None:
    """Makes `attn_implementation="kvarn"` known to transformers. May be called again."""
    AttentionInterface.register(ATTENTION_NAME, kvarn_attention)
    # Without a mask function transformers passes no mask at all, and left-padded batches are wrong.
    AttentionMaskInterface.register(ATTENTION_NAME, kvarn_mask)


def kvarn_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention hook.

    Args:
        query: [B, num_q_heads, T, head_dim].
        key, value: handles of a `KvarnCache`, or tensors [B, num_kv_heads, kv_len, head_dim].
        attention_mask: see `masks`.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: [num_q_heads], a score per head that takes part in the softmax and has no value.

    Returns:
        [B, T, num_q_heads, head_dim], contiguous, and None: attention weights are not available.

    Raises:
        UnsupportedError: dropout with pages, gradients in training; in eval mode, a later backward that would need
            gradients of what came out of pages.
        ConfigError: a mask that shows padding which was not stored.
        StaleStepError: handles of an earlier forward.
        NonFiniteError, OutOfBlocksError: from the pages; the cache is as before the forward.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if type(key) is KvHandle and type(value) is KvHandle and key.pending is value.pending:
        store, pending = key.store, key.pending
        needs_gradients = any(x is not None and x.requires_grad for x in (query, key, value, s_aux))
        if dropout or (module.training and needs_gradients and torch.is_grad_enabled()):
            store.abort()
            raise UnsupportedError(
                "attention on pages has neither dropout nor gradients: call model.eval(), or train with an unquantized "
                "cache"
            )
        # A model may give a window to layers that its cache has as full ones.
        sliding_window = pending.group.window or sliding_window
        reason = _reason_against_pages(store, pending, attention_mask, sliding_window, causal, position_bias)
        if reason is None:
            out = _paged_attention(store, pending, query, scaling, sliding_window, softcap, s_aux)
            return refusing(lambda: out, query, key, value, s_aux), None
        dense_key, dense_value = (x.to(query.dtype) for x in store.dense(pending, reason))
        key, value = refusing(lambda: dense_key, key), refusing(lambda: dense_value, value)
    elif sliding_window is None:
        sliding_window = getattr(module, "sliding_window", None)  # some models leave it to the mask
    return (
        dense_attention(
            query,
            key,
            value,
            attention_mask,
            window=sliding_window,
            causal=causal,
            dropout=dropout,
            scale=scaling,
            softcap=softcap,
            sinks=s_aux,
            position_bias=position_bias,
        ),
        None,
    )


def _reason_against_pages(
    store: PageStore,
    pending: Pending,
    mask: torch.Tensor | None,
    window: int | None,
    causal: bool,
    position_bias: torch.Tensor | None,
) -> str | None:
    """Opens the group's step if need be, and tells why the pages cannot serve this call; None if they can."""
    store.check_current(pending)
    try:
        reason = pending.group.admit(mask, pending.forward.num_new, window)
    except KvarnError:
        store.abort()
        raise
    if not causal:
        return "not_causal"
    return reason if position_bias is None else "position_bias"


def _paged_attention(
    store: PageStore,
    pending: Pending,
    query: torch.Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    query = query.detach()
    num_new = pending.forward.num_new
    num_queries = query.shape[2]
    if num_queries != num_new:  # models that share K and V between layers may ask for the last positions only
        query = torch.nn.functional.pad(query, (0, 0, num_new - num_queries, 0))
    batch_size, num_heads, _, head_dim = query.shape
    out = torch.empty((batch_size, num_new, num_heads, head_dim), dtype=query.dtype)
    group = pending.group
    try:
        if not pending.appended:
            store.append(pending, query if num_queries == num_new else None)
        group.step.attend(
            pending.ordinal,
            query,
            pending.k,
            pending.v,
            out.transpose(1, 2),
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=None if sinks is None else sinks.detach(),
        )
    except KvarnError:
        store.abort()
        raise
    store.fused_calls += 1
    return out if num_queries == num_new else out[:, num_new - num_queries :].contiguous()


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

    mask: None or a padding row (causality and window are then applied here), or a whole mask, bool or added to the
    scores. The queries are the last T of the kv_len positions.

    Returns:
        [B, T, num_q_heads, head_dim of value], contiguous.
    """
    num_queries, kv_len = query.shape[2], key.shape[2]
    by_torch = softcap is None and sinks is None and position_bias is None
    # torch's own causal mask starts at the first key, so it fits where every key has its query.
    torch_causal = by_torch and causal and mask is None and num_queries == kv_len and (window or kv_len) >= kv_len
    if causal and not torch_causal and (mask is None or is_padding_row(mask)):
        seen = causal_window(num_queries, kv_len, window)
        if seen is not None:
            seen = seen.to(query.device)
            mask = seen[None, None] if mask is None else mask & seen
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
