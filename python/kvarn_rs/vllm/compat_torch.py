"""Torch's attention on the CPU, an operator that torch does not document: all that depends on torch's releases."""

from __future__ import annotations

import torch

_FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def is_faster(dtype: torch.dtype) -> bool:
    """Whether torch attends to many tokens faster than the core does: in bfloat16, on a CPU with AMX.

    Elsewhere it is as fast or slower. False too for a torch without the operator.
    """
    has_amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return dtype is torch.bfloat16 and hasattr(torch.ops.aten, _FLASH) and has_amx()


def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, *, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and its log-sum-exp.

    Args:
        q: `[num_tokens, num_q_heads, head_dim]`.
        k: `[num_keys, num_kv_heads, head_dim]`, of `q`'s dtype.
        v: the same.
        scale: factor on the scores.
        is_causal: whether token `i` sees the first `i + 1` keys alone.

    Returns:
        `[num_kv_heads, group, num_tokens, head_dim]` in `q`'s dtype, where query head `h` is `divmod(h, group)`, and in
        float32 `[num_kv_heads, group, num_tokens]`, the natural logarithm of the sum of the exponentials of the scores.
    """
    group = q.shape[1] // k.shape[1]
    by_heads = q.unflatten(1, (k.shape[1], group)).permute(1, 2, 0, 3)
    k, v = (each.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for each in (k, v))  # no copies
    return getattr(torch.ops.aten, _FLASH)(by_heads, k, v, 0.0, is_causal, scale=scale)
