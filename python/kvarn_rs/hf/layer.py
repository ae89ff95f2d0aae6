"""A paged layer's interface to transformers: lengths and flags; the tokens are in the layer's group."""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch

from kvarn_rs._core import first_seen
from kvarn_rs.errors import CalibrationError, ConfigError, DeviceError, DtypeError, UnsupportedError

from .compat import CacheLayerMixin, dense_layer
from .forward import Forwards
from .group import GroupPlan, LayerGroup
from .handle import handles


class KvarnLayer(CacheLayerMixin):
    """The layer `index` of a group. What changes tokens is done by the cache, for all layers at once: see `_refuse`."""

    is_compileable = False
    is_croppable = True
    supports_early_init = True
    device = torch.device("cpu")

    def __init__(self, forwards: Forwards, plan: GroupPlan, index: int) -> None:
        # Not CacheLayerMixin.__init__: it sets keys, values and is_initialized, which are computed here.
        self.forwards = forwards
        self.plan = plan
        self.index = index
        self.layer_idx = plan.layers[index]
        self.is_sliding = plan.window is not None
        if plan.window is not None:
            self.sliding_window = plan.window

    @property
    def group(self) -> LayerGroup | None:
        """The pages of the layer and of those like it; None before the first K."""
        return self.forwards.groups.get(self.plan)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Creates the pages for K and V like [B, num_kv_heads, any, head_dim]."""
        self.forwards.group_for(self.plan, key_states, value_states).set_batch(key_states.shape[0])

    def why_not_paged(self, k: torch.Tensor, v: torch.Tensor) -> str | None:
        """Makes the group's pages for its first K and V, [B, num_kv_heads, T, head_dim]; or says why that cannot be.

        Raises:
            DeviceError: tensors that are not on the CPU.
            CalibrationError: one of another model.
        """
        self.forwards.enter(self.layer_idx, k.shape[2])
        if k.device.type != "cpu":
            raise DeviceError(f"K and V on {k.device}; this release keeps them on the CPU only")
        if k.shape != v.shape:
            return f"K and V have different shapes, {list(k.shape)} and {list(v.shape)}"
        try:
            self.forwards.group_for(self.plan, k, v)
        except CalibrationError:
            raise  # not the shape's fault
        except (ConfigError, DtypeError, UnsupportedError) as error:
            return str(error)
        return None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `KvarnCache.update`."""
        new = self.forwards.arrive(self.plan, self.index, self.layer_idx, key_states, value_states)
        return handles(self.forwards, new, key_states, value_states)

    @property
    def is_initialized(self) -> bool:
        """Whether there are batch rows, and this layer has arrived if any has: some models leave layers out."""
        return self._num_rows > 0 and self.forwards.has_arrived(self.plan, self.layer_idx)

    @property
    def batch_size(self) -> int:
        """Batch rows; like transformers' layers, the attribute is not there before there are any."""
        if not self._num_rows:
            raise AttributeError("no batch yet")
        return self._num_rows

    @property
    def _num_rows(self) -> int:
        group = self.group
        return 0 if group is None else len(group.sequences)

    @property
    def dtype(self) -> torch.dtype | None:
        """dtype of the last K that arrived; None before the first."""
        return None if self.group is None else self.group.dtypes[0]

    def get_seq_length(self) -> int:
        """Positions seen, padding and what left the window included; those of a forward from the layer's update on."""
        return self.forwards.lengths_of(self.plan)[self.layer_idx]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(number of visible positions with query_length new ones, the first of them)."""
        lengths = self.forwards.lengths_of(self.plan)
        # Asked for all layers of a kind through the first of them, which the model may leave out.
        length = lengths[self.layer_idx] if self.forwards.is_in_call else max(lengths.values())
        first = first_seen(length, self.plan.window)
        return length - first + query_length, first

    def get_max_length(self) -> int:
        """The window, or -1 without one."""
        return -1 if self.plan.window is None else self.plan.window

    @property
    def record_past(self) -> bool:
        """Whether what leaves the window is kept until the next `crop`."""
        return self.plan.record_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.plan.record_past = value

    def activate_past_recording(self) -> None:
        """Keeps what leaves the window until the next `crop`, so that it can be undone."""
        self.plan.record_past = True

    @property
    def keys(self) -> torch.Tensor | None:
        """All visible keys dequantized, [B, num_kv_heads, positions, head_dim]: a copy. None when empty.

        In the dtype of the last K that arrived. Within a forward, the new ones are there from the layer's update on.
        """
        return self._dense(0)

    @property
    def values(self) -> torch.Tensor | None:
        """All visible values dequantized, like `keys`."""
        return self._dense(1)

    def _dense(self, half: int) -> torch.Tensor | None:
        group = self.group
        if group is None or not self.is_initialized:
            return None
        self.forwards.fallbacks.count("keys_values")
        return self.forwards.read(group, self.index, self.layer_idx)[half]

    def offload(self) -> None:
        """Nothing to move: pages are in host memory."""

    def prefetch(self) -> None:
        """Nothing to move: pages are in host memory."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Departs from the contract of transformers' layers: those of a group share block tables, so one cannot change
        without the others.
        """
        raise UnsupportedError("call this on the cache: the layers of a group share their block tables")

    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _refuse

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheLayerMixin:
        """The layer of a copy of the whole cache, or an empty one of transformers' own: by itself it has no pages.

        Models that run layers more than once add copies to a new cache: those stay unquantized, counted and warned of.

        Raises:
            UnsupportedError: by itself, and the cache is strict or the layer has tokens.
        """
        forwards = memo.get(id(self.forwards))
        if forwards is not None:
            return KvarnLayer(forwards, copy.deepcopy(self.plan, memo), self.index)
        if self.get_seq_length():
            self._refuse_copy()
        self.forwards.fallbacks.count("copied_layer")
        return dense_layer(self.plan.window)

    def _refuse_copy(self, *args: Any) -> NoReturn:
        raise UnsupportedError(
            f"layer {self.layer_idx} was to be copied by itself, but the layers of a cache share their pages: copy the "
            "whole cache; where the model copies layers, use an unquantized cache"
        )

    __copy__ = __reduce_ex__ = _refuse_copy  # a whole cache is pickled as a file
