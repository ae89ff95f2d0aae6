"""Attention of one layer."""

from __future__ import annotations

from typing import Any

import torch

from kvarn_rs.errors import UnsupportedError

from . import compat, formats
from .metadata import KVarnMetadata


class KVarnImpl(compat.AttentionImpl):
    """Attention of one layer, by the engine of its group.

    In formats that seal it has the layer's open pages, so that vLLM counts them as memory of the model.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **_more: Any,
    ) -> None:
        if alibi_slopes is not None:
            raise UnsupportedError("kvarn-rs has no ALiBi attention: leave --kv-cache-dtype at auto")
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.format = formats.format_of(kv_cache_dtype)
        self.softcap = logits_soft_cap or None
        self.window = None if sliding_window in (None, -1) else sliding_window
        self.sinks = sinks
        self.kv_sharing_target = kv_sharing_target_layer_name
        self.open_pages: torch.Tensor | None = None
        if formats.seals(self.format) and self.kv_sharing_target is None:
            num_pages = formats.open_pages(*compat.step_limits())
            self.open_pages = torch.zeros(
                (num_pages, self.num_kv_heads, formats.open_page_bytes(head_size)), dtype=torch.uint8
            )

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: KVarnMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes the step's keys and values, and attends.

        Args:
            layer: vLLM's module of the layer.
            query: `[rows, num_heads, head_size]`; rows beyond the step's tokens are padding.
            key: `[rows, num_kv_heads, head_size]`.
            value: the same.
            kv_cache: the layer's blocks, which the engine has already.
            attn_metadata: the step's; None while vLLM measures memory.
            output: `[rows, num_heads, head_size]`, overwritten.
            output_scale: not supported, like the next.
            output_block_scale: None.
        """
        if attn_metadata is None:
            return output.zero_()
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("kvarn-rs does not quantize the outputs of attention")
        rows = attn_metadata.num_tokens
        engine, index = attn_metadata.group.layer(self.kv_sharing_target or layer.layer_name)
        options = {"scale": self.scale, "window": self.window, "softcap": self.softcap, "sinks": self.sinks}
        if self.kv_sharing_target is not None or key is None or value is None:
            engine.attend(index, query[:rows], None, None, output[:rows], **options)
            return output
        tensors = query[:rows], key[:rows], value[:rows], output[:rows]
        prefill, batches = attn_metadata.group.prefill, attn_metadata.prefills
        has_kernel = self.window is None and (self.sinks is None or self.sinks.dtype is torch.bfloat16)
        if batches and prefill is not None and has_kernel:
            prefill.forward(index, batches, *tensors, scale=self.scale, softcap=self.softcap, sinks=self.sinks)
        else:
            engine.forward(index, *tensors, **options)
        return output
