"""The only file that names private parts of transformers and torch, or what moves between their releases.

transformers 5.16 <= release < 6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar, cast

import torch
from transformers import cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    get_layer_types_and_kwargs,
)
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

__all__ = [
    "CALL_CODE",
    "WITHOUT_TORCH_FUNCTION",
    "AttentionInterface",
    "AttentionMaskInterface",
    "Cache",
    "CacheLayerMixin",
    "LayerPlan",
    "PreTrainedModel",
    "attention_of",
    "dense_layer",
    "has_pre_hook",
    "is_in_backward",
    "is_plain_causal",
    "is_transforming",
    "keeps_nothing",
    "plan_layers",
    "put_attention_back",
    "sdpa_mask",
    "tensor_without_storage",
    "window_of",
]


@dataclass(frozen=True)
class LayerPlan:
    """What one model layer keeps between forwards.

    Attributes:
        default_layer: the layer that `DynamicCache` would use.
        paged: whether pages can take its place (full and sliding attention; not linear, chunked, indexed, shared ...).
        window: tokens that a query of a sliding layer sees, itself included; None without one.
        shape: (num_kv_heads, head_dim) as the config says, possibly None: only a hint, the first K tells.
        unpaged: why its K and V are not paged; None if they are, or if it has none of its own.
    """

    default_layer: Any
    paged: bool
    window: int | None
    shape: tuple[int | None, int | None]
    unpaged: str | None = None


def plan_layers(config: Any) -> list[LayerPlan]:
    """One `LayerPlan` per layer of a decoder's text config, in order."""
    # The types are needed besides the layers: chunked attention uses the class of sliding attention.
    kinds = get_layer_types_and_kwargs(config)[0]
    plans = []
    layers = DynamicCache(config=config).layers
    # Not strict: some releases leave out the last layers where they share the K and V of others.
    for default_layer, kind, layer_config in zip(layers, kinds, config.per_layer_config, strict=False):
        shape = (getattr(layer_config, "num_key_value_heads", None), getattr(layer_config, "head_dim", None))
        window, unpaged = None, None
        if kind == "full_attention" and type(default_layer) is DynamicLayer:
            pass
        elif kind == "sliding_attention" and type(default_layer) is DynamicSlidingWindowLayer:
            window = default_layer.sliding_window
            # transformers' layer then keeps, and shows, every token: pages could not give its tokens.
            unpaged = f"sliding_attention over {window}" if window < 2 else None
        else:
            unpaged = kind
        has_kv = isinstance(default_layer, DynamicLayer)
        plans.append(LayerPlan(default_layer, unpaged is None, window, shape, unpaged if has_kv else None))
    return plans


def dense_layer(window: int | None) -> CacheLayerMixin:
    """transformers' own layer for K/V that pages cannot hold."""
    return DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)


def keeps_nothing(layer: Any) -> bool:
    """Whether a layer of transformers' own has no state: some releases have one where layers use the K of others."""
    return type(layer) is getattr(cache_utils, "DummyLayer", None)


_WINDOWED = sliding_window_causal_mask_function(1)
_OVERLAY = sliding_window_overlay(1)


def is_plain_causal(mask_function: Callable) -> bool:
    """Whether a mask function is causal, or causal within a sliding window, with nothing on top.

    A sliding window's mask function is a closure that transformers makes anew each time: it is recognised by its code
    and that of its parts. One that is not recognised costs speed (a dense mask), never correctness.
    """
    if mask_function is causal_mask_function:
        return True
    if getattr(mask_function, "__code__", None) is not _WINDOWED.__code__ or not mask_function.__closure__:
        return False
    parts = mask_function.__closure__[0].cell_contents
    return (
        isinstance(parts, tuple)
        and len(parts) == 2
        and getattr(parts[0], "__code__", None) is _OVERLAY.__code__
        and parts[1] is causal_mask_function
    )


def window_of(mask_function: Callable) -> int | None:
    """The window of a mask function that `is_plain_causal`; None without one."""
    if mask_function is causal_mask_function:
        return None
    overlay = cast(Any, mask_function).__closure__[0].cell_contents[0]
    return overlay.__closure__[0].cell_contents


# The name of a config's attention implementation, or None.
attention_of: Callable[[Any], str | None] = attrgetter("_attn_implementation")


def put_attention_back(config: Any, name: str | None) -> None:
    """Sets the attention implementation of one config, without a check and not of its parts."""
    config._attn_implementation_internal = name


# torch -----------------------------------------------------------------------------------------------------------

AnyTensor = TypeVar("AnyTensor", bound=torch.Tensor)

# As `__torch_function__` of a subclass: operations go straight to `__torch_dispatch__`.
WITHOUT_TORCH_FUNCTION: Any = torch._C._disabled_torch_function_impl

# The code of the frames that call a module.
CALL_CODE = torch.nn.Module._call_impl.__code__


# A tensor of a subclass whose operations are all its own: (class, shape, *, dtype, device of the CPU unless given).
tensor_without_storage: Any = torch.Tensor._make_wrapper_subclass


def is_in_backward() -> bool:
    """Whether autograd runs a backward in this thread."""
    return torch._C._current_graph_task_id() != -1


# Whether a transform of `torch.func` runs in this thread.
is_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active


def has_pre_hook(module: torch.nn.Module, hook: Callable) -> bool:
    """Whether a module calls a hook before its forward."""
    return hook in module._forward_pre_hooks.values()
