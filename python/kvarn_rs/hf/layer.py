"""One paged layer as transformers sees it: lengths and flags, nothing that holds tokens."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from kvarn_rs.errors import UnsupportedError

from .compat import CacheLayerMixin
from .group import LayerGroup
from .store import PageStore


class KvarnLayer(CacheLayerMixin):
    """A view of layer `ordinal` of a group. What changes tokens is done by the cache, for all layers at once."""

    is_compileable = False
    is_croppable = True
    supports_early_init = True
    device = torch.device("cpu")

    def __init__(self, store: PageStore, group: LayerGroup, ordinal: int, layer_idx: int) -> None:
        # Not CacheLayerMixin.__init__: it sets keys, values and is_initialized, which are computed here.
        self.store = store
        self.group = group
        self.ordinal = ordinal
        self.layer_idx = layer_idx
        self.is_sliding = group.window is not None
        if group.window is not None:
            self.sliding_window = group.window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Creates the pages for K and V like [B, num_kv_heads, any, head_dim]."""
        if self.group.core is None:
            self.group.create_core(key_states)
        self.group.set_batch(key_states.shape[0])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KvarnCache.update`."""
        return self.store.arrive(self.group, self.ordinal, self.layer_idx, key_states, value_states)

    @property
    def is_initialized(self) -> bool:
        """Whether there are batch rows."""
        return bool(self.group.sequences)

    @property
    def batch_size(self) -> int:
        """Batch rows; like transformers' layers, the attribute is not there before there are any."""
        if not self.group.sequences:
            raise AttributeError("no batch yet")
        return len(self.group.sequences)

    @property
    def dtype(self) -> torch.dtype | None:
        """dtype of the K and V that come and of what attention returns; None before the first."""
        return self.group.dtype

    def get_seq_length(self) -> int:
        """Positions seen, padding and what left the window included."""
        return self.group.length + self.store.num_unsettled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of visible positions with query_length new ones, the first of them)."""
        length = self.get_seq_length()
        first = 0 if self.group.window is None else max(length - self.group.window + 1, 0)
        return length - first + query_length, first

    def get_max_length(self) -> int:
        """The window, or -1 without one."""
        return -1 if self.group.window is None else self.group.window

    @property
    def record_past(self) -> bool:
        """Whether what leaves the window is kept until the next `crop`."""
        return self.group.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.group.record_past = value

    def activate_past_recording(self) -> None:
        """Keeps what leaves the window until the next `crop`, so that it can be undone."""
        self.group.record_past = True

    @property
    def keys(self) -> torch.Tensor | None:
        """All visible keys dequantized, [B, num_kv_heads, positions, head_dim]: a copy. None when empty."""
        return self._dense(0)

    @property
    def values(self) -> torch.Tensor | None:
        """All visible values dequantized, [B, num_kv_heads, positions, head_dim]: a copy. None when empty."""
        return self._dense(1)

    def _dense(self, half: int) -> torch.Tensor | None:
        self.store.settle()
        if not self.group.sequences:
            return None
        self.store.count_fallback("keys_values")
        return self.group.dequantize(self.ordinal, None)[half]

    def offload(self) -> None:
        """Nothing to move: pages are in host memory."""

    def prefetch(self) -> None:
        """Nothing to move: pages are in host memory."""

    def _not_alone(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Layers of a group share block tables, so one cannot change without the others."""
        raise UnsupportedError("call this on the cache: the layers of a group share their block tables")

    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _not_alone
