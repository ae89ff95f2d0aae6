"""Tensors without storage that stand for the K and V of one layer in one forward.

`Cache.update` must return tensors and attention gets nothing but them, so they carry what attention on pages needs.
kvarn attention recognises them; any other operation reaches `__torch_dispatch__` and works on real, dense tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from .calls import Call
    from .group import LayerGroup
    from .store import PageStore


class Pending:
    """The new K and V [B, num_kv_heads, T, head_dim] of one layer in one forward.

    Lives as long as its handles do: the store lets go of it once it is appended, so that a prefill's K and V are not
    all kept until the forward is over.
    """

    __slots__ = ("appended", "forward", "group", "k", "layer_idx", "ordinal", "other_half", "v")

    def __init__(
        self, forward: Forward, group: LayerGroup, ordinal: int, layer_idx: int, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        self.forward = forward
        self.group = group
        self.ordinal = ordinal
        self.layer_idx = layer_idx
        self.k = k
        self.v = v
        self.appended = False
        self.other_half: tuple[bool, torch.Tensor] | None = None


class Forward:
    """The layers that came in one forward; a layer's `Pending` until its K and V are appended, then None.

    Attributes:
        calls: the model's calls that brought them, without repetition; none where the cache is filled by hand.
        need_gradients: the layers whose K or V needed gradients.
    """

    __slots__ = ("arrived", "calls", "need_gradients", "num_new")

    def __init__(self, num_new: int) -> None:
        self.num_new = num_new
        self.arrived: dict[int, Pending | None] = {}
        self.calls: list[Call] = []
        self.need_gradients: set[int] = set()

    @property
    def is_running(self) -> bool:
        """Whether the model still computes."""
        return any(call.is_running for call in self.calls)

    @property
    def has_raised(self) -> bool:
        """Whether the model gave up."""
        return any(call.has_raised for call in self.calls)


class KvHandle(torch.Tensor):
    """K or V of all visible positions of a layer, [B, num_kv_heads, kv_len, head_dim], contiguous, without storage.

    Valid until the next forward (or any other operation on the cache) begins; then StaleStepError.
    """

    _store: PageStore
    pending: Pending
    _is_value: bool

    @staticmethod
    def __new__(cls, store: PageStore, pending: Pending, is_value: bool, size: tuple[int, ...]) -> KvHandle:
        """A handle of shape `size` for the K, or the V, that is pending."""
        dtype = (pending.v if is_value else pending.k).dtype
        handle = torch.Tensor._make_wrapper_subclass(cls, size, dtype=dtype)
        handle._store = store
        handle.pending = pending
        handle._is_value = is_value
        return handle

    def __init__(self, store: PageStore, pending: Pending, is_value: bool, size: tuple[int, ...]) -> None:
        pass  # torch.Tensor.__init__ takes no arguments

    # Straight to __torch_dispatch__: no operation needs to be seen before that.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def real(x: Any) -> Any:
            return x.dense(str(func)) if isinstance(x, KvHandle) else x

        return func(*tree_map(real, args), **tree_map(real, kwargs or {}))

    @property
    def store(self) -> PageStore:
        """The pages behind this handle."""
        return self._store

    def dense(self, operation: str) -> torch.Tensor:
        """The real tensor. K and V are decoded together: the other one is kept until it is asked for."""
        pending = self.pending
        if pending.other_half is not None and pending.other_half[0] == self._is_value:
            self._store.check_current(pending)
            tensor = pending.other_half[1]
            pending.other_half = None
            return tensor
        k, v = self._store.dense(pending, "other_operation", operation)
        pending.other_half = (not self._is_value, k if self._is_value else v)
        return v if self._is_value else k

    def __repr__(self, *, tensor_contents: None = None) -> str:
        return f"KvHandle({'V' if self._is_value else 'K'} of layer {self.pending.layer_idx}, {list(self.shape)})"
