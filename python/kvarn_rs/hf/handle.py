"""Tensors without storage that stand for the K and V of one layer in one forward.

`Cache.update` must return tensors, and attention gets nothing else: so they carry what attention on pages needs. kvarn
attention recognises them; any other operation reaches `__torch_dispatch__` and works on real, dense tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from .compat import WITHOUT_TORCH_FUNCTION, tensor_without_storage
from .forward import Forwards, NewTokens
from .gradients import lost_source, refusing


class KvHandle(torch.Tensor):
    """K or V of all visible positions of a layer, [B, num_kv_heads, kv_len, head_dim], contiguous, without storage.

    Valid until the next forward (or any other operation on the cache) begins; then StaleStepError.

    Attributes:
        forwards: the cache's.
        new_tokens: the K and V that it was made for.
    """

    forwards: Forwards
    new_tokens: NewTokens
    _is_value: bool

    @staticmethod
    def __new__(cls, forwards: Forwards, new: NewTokens, is_value: bool, size: tuple[int, ...]) -> KvHandle:
        """A handle of shape `size` for the K, or the V, of a layer."""
        handle = tensor_without_storage(cls, size, dtype=(new.v if is_value else new.k).dtype)
        handle.forwards = forwards
        handle.new_tokens = new
        handle._is_value = is_value
        return handle

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # torch.Tensor.__init__ takes no arguments

    # Straight to __torch_dispatch__: no operation needs to be seen before that.
    __torch_function__ = WITHOUT_TORCH_FUNCTION  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def real(x: Any) -> Any:
            return x.dense(str(func)) if isinstance(x, KvHandle) else x

        return func(*tree_map(real, args), **tree_map(real, kwargs or {}))

    def dense(self, operation: str) -> torch.Tensor:
        """The real tensor. K and V are decoded together: the other one is kept until it is asked for."""
        new = self.new_tokens
        if new.other_half is not None and new.other_half[0] == self._is_value:
            self.forwards.check_current(new)
            tensor = new.other_half[1]
            new.other_half = None
            return tensor
        k, v = self.forwards.dense(new, "other_operation", operation)
        new.other_half = (not self._is_value, k if self._is_value else v)
        return v if self._is_value else k

    def __repr__(self, *, tensor_contents: None = None) -> str:
        return f"KvHandle({'V' if self._is_value else 'K'} of layer {self.new_tokens.layer_idx}, {list(self.shape)})"


def handles(forwards: Forwards, new: NewTokens, k: torch.Tensor, v: torch.Tensor) -> tuple[KvHandle, KvHandle]:
    """The handles of a layer's K and V; k, v: as they arrived, with their part of the graph."""
    batch_size, num_kv_heads, num_new, head_dim = k.shape
    size = (batch_size, num_kv_heads, new.group.num_visible + num_new, head_dim)
    past = lost_source() if new.layer_idx in forwards.need_gradients else None
    return (
        refusing(lambda: KvHandle(forwards, new, False, size), k, past),
        refusing(lambda: KvHandle(forwards, new, True, size), v, past),
    )
