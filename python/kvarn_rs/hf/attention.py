"""The attention function of `attn_implementation="kvarn"`: on pages where possible, else on dequantized tensors."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from kvarn_rs.errors import KvarnError, UnsupportedError

from .compat import AttentionInterface, AttentionMaskInterface
from .dense import dense_attention
from .forward import Forwards, NewTokens
from .gradients import refuse_transforms, refusing
from .handle import KvHandle
from .masks import KvarnMask, check_mask, kvarn_mask

ATTENTION_NAME = "kvarn"


def register() -> None:
    """Registers `attn_implementation="kvarn"` with transformers. Idempotent."""
    AttentionInterface.register(ATTENTION_NAME, kvarn_attention)
    # Without a mask function transformers passes no mask at all, and left-padded batches are wrong.
    AttentionMaskInterface.register(ATTENTION_NAME, kvarn_mask)


# What models hand down to attention without a change to what it computes: it is in the mask and in the rotated K
# already, or is for other parts of the model.
HARMLESS = frozenset(
    (
        "cache",
        "cache_position",
        "deterministic",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "labels",
        "logits_to_keep",
        "mm_token_type_ids",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    )
)
# Where sequences begin that are laid end to end: in a mask that was made for them from their position_ids.
PACKED = frozenset(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"))


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
        sliding_window, is_causal: what a query sees where there is no mask; a mask says it all.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: [num_q_heads], a score per head that takes part in the softmax and has no value.
        kwargs: those in `HARMLESS`; those in `PACKED`, beside a mask of packed sequences; others if None or False.

    Returns:
        [B, T, num_q_heads, head_dim], contiguous, and None: attention weights are not available.

    Raises:
        UnsupportedError: dropout with pages, gradients in training; in eval mode, a later backward that would need
            gradients of what was computed from pages; keyword arguments that ask for another attention.
        ConfigError: a mask that shows padding which was not stored.
        ShapeError, DtypeError: a mask that does not fit.
        StaleStepError: handles of an earlier forward.
        NonFiniteError, OutOfBlocksError: from the pages; the cache is as before the forward.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if isinstance(attention_mask, KvarnMask) and attention_mask.is_causal:
        causal, sliding_window = True, attention_mask.window
    size = (max(query.shape[0], key.shape[0]), query.shape[1], query.shape[2], key.shape[2])
    if type(key) is KvHandle and type(value) is KvHandle and key.new_tokens is value.new_tokens:
        forwards, new = key.forwards, key.new_tokens
        forwards.check_current(new)
        # The scale and the cap of scores may be learned, too.
        given = [x for x in (query, s_aux, scaling, softcap) if isinstance(x, torch.Tensor)]
        sources = [*given, key, value]
        try:
            refuse_transforms(*given)
            _check_options(kwargs, attention_mask)
            if attention_mask is not None:
                check_mask(attention_mask, size)
            if dropout or (module.training and torch.is_grad_enabled() and any(x.requires_grad for x in sources)):
                raise UnsupportedError(
                    "attention on pages has neither dropout nor gradients: call model.eval(), or train with an "
                    "unquantized cache"
                )
            reason = _reason_against_pages(new, attention_mask, sliding_window, causal, position_bias)
        except KvarnError:
            forwards.abort()
            raise
        if reason is None:
            window = _narrower(new.group.window, sliding_window)
            out = _paged_attention(forwards, new, query, scaling, window, softcap, s_aux)
            return refusing(lambda: out, *sources), None
        dense_key, dense_value = (x.to(query.dtype) for x in forwards.dense(new, reason))
        key, value = refusing(lambda: dense_key, key), refusing(lambda: dense_value, value)
    else:
        _check_options(kwargs, attention_mask)
    if isinstance(attention_mask, KvarnMask):
        check_mask(attention_mask, size)
        plain = attention_mask.is_causal and attention_mask.tokens is None and attention_mask.shape[3] == key.shape[2]
        attention_mask = None if plain else attention_mask.whole()
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


def _check_options(options: dict[str, Any], mask: torch.Tensor | None) -> None:
    """Refuses keyword arguments that change what attention computes; warns of weights that nobody gets.

    Raises:
        UnsupportedError: by their names; or a mask that is no tensor.
    """
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise UnsupportedError(f"kvarn attention takes a mask that is a tensor, not {type(mask).__name__}")
    if not options:
        return
    if options.get("output_attentions"):
        warnings.warn("kvarn attention has no attention weights to return: use eager attention", stacklevel=3)
    harmless = HARMLESS if _is_packed(options) and (mask is None or _is_plain(mask)) else HARMLESS | PACKED
    unknown = [name for name, value in options.items() if not (value is None or value is False or name in harmless)]
    if unknown:
        raise UnsupportedError(
            f"the model asks attention for {', '.join(unknown)}, which kvarn attention does not do; call "
            "model.set_attn_implementation('eager'), or 'sdpa' where the model has it"
        )


def _is_packed(options: dict[str, Any]) -> bool:
    """Whether there are several sequences in a row."""
    starts, owners = options.get("cu_seq_lens_q"), options.get("seq_idx")
    if starts is not None:
        return starts.numel() > 2
    return owners is not None and bool((owners != owners[..., :1]).any())


def _is_plain(mask: torch.Tensor) -> bool:
    return isinstance(mask, KvarnMask) and mask.is_causal


def _reason_against_pages(
    new: NewTokens,
    mask: torch.Tensor | None,
    window: int | None,
    causal: bool,
    position_bias: torch.Tensor | None,
) -> str | None:
    """Opens the group's step if need be, and says why the pages cannot serve this call; None if they can."""
    group, num_new = new.group, new.forward.num_new
    narrower = _narrower(group.window, window)
    reason = group.admit(mask, num_new, narrower)
    if not causal:
        return "not_causal"
    if position_bias is not None:
        return "position_bias"
    # A mask may show more than the layer's window. A single query sees what the layer keeps, in any case.
    is_wider = mask is not None and narrower != window
    if is_wider and group.window is not None and num_new > 1 and group.length + num_new > group.window:
        return reason or "other_window"
    return reason


def _narrower(one: int | None, other: int | None) -> int | None:
    return min((window for window in (one, other) if window is not None), default=None)


def _paged_attention(
    forwards: Forwards,
    new: NewTokens,
    query: torch.Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    query = query.detach()
    num_new = new.forward.num_new
    num_queries = query.shape[2]
    if num_queries != num_new:  # models that share K and V between layers may ask for the last positions only
        query = torch.nn.functional.pad(query, (0, 0, num_new - num_queries, 0))
    batch_size, num_heads, _, head_dim = query.shape
    out = torch.empty((batch_size, num_new, num_heads, head_dim), dtype=query.dtype)
    options = {
        "scale": _detached(scale),
        "window": window,
        "softcap": _detached(softcap),
        "sinks": _detached(sinks),
    }
    try:
        if new.appended or num_queries != num_new:
            if not new.appended:
                forwards.append(new)
            step = new.group.open_step(num_new).core
            step.attend(new.index, query, new.k, new.v, out.transpose(1, 2), **options)
        else:
            forwards.append_and_attend(new, query, out.transpose(1, 2), options)
    except KvarnError:
        forwards.abort()
        raise
    forwards.fused_calls += 1
    return out if num_queries == num_new else out[:, num_new - num_queries :].contiguous()


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, torch.Tensor) else x
