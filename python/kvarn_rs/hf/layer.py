"""One paged layer as transformers sees it: lengths and flags, nothing that holds tokens."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch

from kvarn_rs.errors import CalibrationError, ConfigError, DeviceError, DtypeError, UnsupportedError

from .compat import CacheLayerMixin, dense_layer
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
        self.group.prepare(key_states, value_states)
        self.group.set_batch(key_states.shape[0])

    def why_not_paged(self, k: torch.Tensor, v: torch.Tensor) -> str | None:
        """Makes the group's pages, for its first K and V; or tells why that cannot be.

        Raises:
            DeviceError: tensors that are not on the CPU.
            CalibrationError: one of another model.
        """
        self.store.enter(self.layer_idx, k.shape[2])
        if k.device.type != "cpu":
            raise DeviceError(f"K and V on {k.device}; this release keeps them on the CPU only")
        if k.shape != v.shape:
            return f"K and V have different shapes, {list(k.shape)} and {list(v.shape)}"
        try:
            self.group.prepare(k, v)
        except CalibrationError:
            raise  # not the shape's fault
        except (ConfigError, DtypeError, UnsupportedError) as error:
            return str(error)
        return None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KvarnCache.update`."""
        return self.store.arrive(self.group, self.ordinal, self.layer_idx, key_states, value_states)

    @property
    def is_initialized(self) -> bool:
        """Whether there are batch rows, and K and V of this layer if any came at all: some models leave layers out."""
        return bool(self.group.sequences) and self.store.has_come(self.group, self.layer_idx)

    @property
    def batch_size(self) -> int:
        """Batch rows; like transformers' layers, the attribute is not there before there are any."""
        if not self.group.sequences:
            raise AttributeError("no batch yet")
        return len(self.group.sequences)

    @property
    def dtype(self) -> torch.dtype | None:
        """dtype of the last K that came; None before the first."""
        return None if self.group.core is None else self.group.dtypes[0]

    def get_seq_length(self) -> int:
        """Positions seen, padding and what left the window included; those of a forward from the layer's update on."""
        return self.store.lengths_of(self.group)[self.layer_idx]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of visible positions with query_length new ones, the first of them)."""
        lengths = self.store.lengths_of(self.group)
        # Asked for all layers of a kind through the first of them, which the model may leave out.
        length = lengths[self.layer_idx] if self.store.is_in_call else max(lengths.values())
        first = self.group.first_visible_after(length)
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
        """All visible keys dequantized, [B, num_kv_heads, positions, head_dim]: a copy. None when empty.

        In the dtype of the last K that came. Within a forward, the new ones are there from the layer's update on.
        """
        return self._dense(0)

    @property
    def values(self) -> torch.Tensor | None:
        """All visible values dequantized, like `keys`."""
        return self._dense(1)

    def _dense(self, half: int) -> torch.Tensor | None:
        if not self.is_initialized:
            return None
        self.store.count_fallback("keys_values")
        return self.store.read(self.group, self.ordinal, self.layer_idx)[half]

    def offload(self) -> None:
        """Nothing to move: pages are in host memory."""

    def prefetch(self) -> None:
        """Nothing to move: pages are in host memory."""

    def _not_alone(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Layers of a group share block tables, so one cannot change without the others."""
        raise UnsupportedError("call this on the cache: the layers of a group share their block tables")

    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _not_alone

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheLayerMixin:
        """The layer of a copy of the whole cache, or an empty one of transformers' own: by itself it has no pages.

        Models that run layers more than once add copies to a new cache: those stay unquantized, counted and warned of.

        Raises:
            UnsupportedError: by itself, and the cache is strict or the layer has tokens.
        """
        store = memo.get(id(self.store))
        if store is not None:
            return KvarnLayer(store, copy.deepcopy(self.group, memo), self.ordinal, self.layer_idx)
        if self.get_seq_length():
            self._refuse_copy()
        self.store.count_fallback("copied_layer")
        return dense_layer(self.group.window)

    def _refuse_copy(self, *args: Any) -> NoReturn:
        raise UnsupportedError(
            f"layer {self.layer_idx} was to be copied by itself, but the layers of a cache share their pages: copy the "
            "whole cache; where the model copies layers, use an unquantized cache"
        )

    __copy__ = __reduce_ex__ = _refuse_copy  # a whole cache is pickled as a file
