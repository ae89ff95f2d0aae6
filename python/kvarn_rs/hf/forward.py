"""Forwards: the new K and V of a cache's layers, from `update` until they are committed or dropped.

transformers calls layer by layer: `arrive` with the new K and V, then attention, which appends and attends, or some
other operation, which gets dense tensors. Nothing says which layers a forward has: models leave layers out, stop early,
or have fewer than their config. So a forward lasts until a layer arrives for the second time, or until the cache is
changed otherwise (`crop`, `reorder_cache`, ...). Then

* every group drops it, if the model's call raised;
* else `settle` commits it with the layers that arrived. The others lack its positions: their K and V are refused from
  then on, until `crop` removes the positions from all layers.

Reading (lengths, `keys`, `stats`) does neither: it shows what each layer has, as the caches of transformers do.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from kvarn_rs._core import first_seen
from kvarn_rs.errors import KvarnError, OpenStepError, RollbackError, ShapeError, StaleStepError, UnsupportedError

from . import calls
from .compat import is_in_backward
from .fallback import Fallbacks
from .gradients import REFUSAL, lost_source, needs_gradient, refuse_transforms, refusing
from .group import GroupPlan, LayerGroup


class NewTokens:
    """The new K and V [B, num_kv_heads, T, head_dim] of one layer in one forward.

    Lives as long as its handles: the forward drops its reference when they are appended, so that a prefill does not
    keep the K and V of all layers until its end.

    Attributes:
        index: the layer's number in its group; layer_idx: in the model.
        appended: whether K and V are in the pages.
        other_half: K and V are decoded together; the one that was not asked for, as (whether it is V, the tensor).
    """

    __slots__ = ("appended", "forward", "group", "index", "k", "layer_idx", "other_half", "v")

    def __init__(
        self, forward: Forward, group: LayerGroup, index: int, layer_idx: int, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        self.forward = forward
        self.group = group
        self.index = index
        self.layer_idx = layer_idx
        self.k = k
        self.v = v
        self.appended = False
        self.other_half: tuple[bool, torch.Tensor] | None = None


class Forward:
    """The layers that arrived in one forward.

    Attributes:
        num_new: new positions.
        arrived: by layer, its `NewTokens` until its K and V are appended, then None.
        calls: the model's calls that they arrived in, each once; none where the cache is filled by hand.
        need_gradients: the layers whose K or V needed gradients.
    """

    __slots__ = ("arrived", "calls", "need_gradients", "num_new")

    def __init__(self, num_new: int) -> None:
        self.num_new = num_new
        self.arrived: dict[int, NewTokens | None] = {}
        self.calls: list[calls.Call] = []
        self.need_gradients: set[int] = set()

    @property
    def is_running(self) -> bool:
        """Whether the model still computes."""
        return any(call.is_running for call in self.calls)

    @property
    def has_raised(self) -> bool:
        """Whether an exception ended the model's call."""
        return any(call.has_raised for call in self.calls)


class Forwards:
    """The forward in progress, and what the earlier ones left: the layer groups of one cache.

    Attributes:
        plans: all groups.
        groups: those whose first K arrived.
        fallbacks: attention that left the pages.
        forward: the one in progress; None between forwards.
        behind: the layers that were left out of a forward, and how many positions they have.
        need_gradients: the layers that hold K or V which needed gradients.
        fused_calls: attention calls on pages.
        dropped_forwards: forwards that were not committed.
    """

    def __init__(self, plans: list[GroupPlan], strict: bool) -> None:
        self.plans = plans
        self.groups: dict[GroupPlan, LayerGroup] = {}
        self.fallbacks = Fallbacks(strict)
        self.forward: Forward | None = None
        self.behind: dict[int, int] = {}
        self.need_gradients: set[int] = set()
        self.fused_calls = 0
        self.dropped_forwards = 0

    @property
    def num_layers(self) -> int:
        """Paged layers."""
        return sum(len(plan.layers) for plan in self.plans)

    # A forward ---------------------------------------------------------------------------------------------------

    def enter(self, layer_idx: int, num_new: int) -> Forward:
        """The forward that a layer's num_new positions belong to: the one in progress, or a new one.

        Raises:
            ShapeError: another number of new positions than the forward has.
            RollbackError: the layer was left out of an earlier forward.
            UnsupportedError: the second arrival of the layer in one call of the model, or an arrival within a backward.
        """
        if torch.is_grad_enabled() and is_in_backward():
            raise UnsupportedError(f"K and V came within a backward (checkpointing): {REFUSAL}")
        forward = self.forward
        call = forward.calls[-1] if forward is not None and forward.calls else None
        if call is None or not calls.is_innermost(call):
            call = calls.innermost()
        if forward is not None:
            is_known = call in forward.calls
            if layer_idx in forward.arrived:
                if is_known and call is not None and call.is_running:
                    self.abort()
                    raise UnsupportedError(
                        f"layer {layer_idx} came twice in one call of the model: each run of a layer needs a number of "
                        "its own"
                    )
                self.settle()
            elif not is_known:
                self._drop_if_raised()
        if self.forward is None:
            self.forward = Forward(num_new)
        forward = self.forward
        if call is not None and call not in forward.calls:
            forward.calls.append(call)
        if num_new != forward.num_new:
            layers = list(forward.arrived)
            self.abort()
            raise ShapeError(
                f"layer {layer_idx} has {num_new} new positions, layers {layers} had {forward.num_new}; for K and V of "
                "something else than the tokens (cross-attention), use an unquantized cache"
            )
        if layer_idx in self.behind:
            self.abort()
            has = self.behind[layer_idx]
            raise RollbackError(
                f"layer {layer_idx} has {has} of {self.length} positions: a forward left it out, or raised before it. "
                f"If it raised, {f'crop({has})' if has else 'reset()'} takes back what other layers got, and it can "
                "be repeated; for a model that leaves layers out at times, use an unquantized cache"
            )
        return forward

    def arrive(self, plan: GroupPlan, index: int, layer_idx: int, k: torch.Tensor, v: torch.Tensor) -> NewTokens:
        """Takes the K and V [B, num_kv_heads, T, head_dim] of a layer, to be appended once its mask is known.

        Raises:
            ShapeError: another batch size, or number of new positions, than the cache or this forward has.
            DtypeError: a dtype that the pages cannot hold.
            RollbackError: see `enter`.
            UnsupportedError: see `enter`, and `refuse_transforms`.
        """
        forward = self.enter(layer_idx, k.shape[2])
        try:
            refuse_transforms(k, v)
            group = self.groups.get(plan)
            if group is None or group.dtypes != (k.dtype, v.dtype):
                group = self.group_for(plan, k, v)
            group.set_batch(k.shape[0])
        except KvarnError:
            self.abort()
            raise
        if needs_gradient(k) or needs_gradient(v):
            forward.need_gradients.add(layer_idx)
        new = NewTokens(forward, group, index, layer_idx, k.detach(), v.detach())
        forward.arrived[layer_idx] = new
        return new

    def group_for(self, plan: GroupPlan, k: torch.Tensor, v: torch.Tensor) -> LayerGroup:
        """The group of a plan, with pages for K and V like these: see `LayerGroup.for_kv` and `adapt`."""
        group = self.groups.get(plan)
        if group is None:
            group = self.groups[plan] = LayerGroup.for_kv(plan, k, v)
        else:
            group.adapt(k, v)
        return group

    def append(self, new: NewTokens) -> None:
        """Writes the K and V of a layer to the pages."""
        new.group.append(new.index, new.forward.num_new, new.k, new.v)
        self._set_appended(new)

    def append_and_attend(
        self, new: NewTokens, query: torch.Tensor, out: torch.Tensor, options: dict[str, Any]
    ) -> None:
        """Writes the K and V of a layer to the pages, and attends. See `LayerGroup.append_and_attend`."""
        new.group.append_and_attend(new.index, new.forward.num_new, query, new.k, new.v, out, options)
        self._set_appended(new)

    def _set_appended(self, new: NewTokens) -> None:
        new.forward.arrived[new.layer_idx] = None
        new.appended = True

    def dense(self, new: NewTokens, reason: str, detail: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantized K and V of all visible positions for one layer of the current forward.

        Raises:
            StaleStepError: the forward has ended.
            UnsupportedError: the cache is strict, or a backward wants them.
        """
        if is_in_backward():
            raise UnsupportedError(REFUSAL)
        self.check_current(new)
        try:
            self.fallbacks.count(reason, detail)
            if not new.appended:
                self.append(new)
            group = new.group
            end = group.length + new.forward.num_new
            return group.dequantize(new.index, group.first_visible, end, (new.k.dtype, new.v.dtype), (new.k, new.v))
        except KvarnError:
            self.abort()
            raise

    def check_current(self, new: NewTokens) -> None:
        """StaleStepError if the forward of a handle has ended."""
        if new.forward is not self.forward:
            raise StaleStepError(
                f"the K and V of layer {new.layer_idx} belong to a forward that is over: the cache has moved on"
            )

    def settle(self) -> None:
        """Ends the forward in progress: drops it if the model's call raised, else commits the layers that arrived.

        Raises:
            OpenStepError: the model still computes it; nothing was changed.
            NonFiniteError and others of the core: K or V that no attention has read; the forward is dropped.
        """
        self._drop_if_raised()
        forward = self.forward
        if forward is None:
            return
        if forward.is_running:
            raise OpenStepError(
                f"the model is in the middle of a forward, layers {list(forward.arrived)} have come: change or copy "
                "the cache once the forward is over"
            )
        try:
            for new in list(forward.arrived.values()):
                if new is not None:
                    self.append(new)
            for group in self.groups.values():
                group.append_missing(forward.arrived)
        except KvarnError:
            self.abort()
            raise
        self.forward = None
        self.need_gradients |= forward.need_gradients
        if not forward.arrived:
            return
        for plan in self.plans:
            for layer_idx in plan.layers:
                if layer_idx not in forward.arrived:
                    self.behind.setdefault(layer_idx, self._length_of(plan))
        for group in self.groups.values():
            group.commit()

    def settle_for_copy(self) -> None:
        """Settles, unless the forward can be copied as it is: by hand, and nothing of it is in the pages."""
        forward = self.forward
        is_open = any(group.step is not None for group in self.groups.values())
        if forward is None or forward.calls or is_open:
            self.settle()

    def _drop_if_raised(self) -> None:
        forward = self.forward
        if forward is not None and forward.has_raised:
            num_arrived = len(forward.arrived)
            self.abort()
            warnings.warn(
                f"kvarn: dropped a forward that raised after {num_arrived} of {self.num_layers} layers; the cache is "
                "as it was before it",
                RuntimeWarning,
                stacklevel=2,
            )

    def abort(self) -> None:
        """Drops the forward in progress: every group is as before it."""
        if self.forward is not None:
            self.dropped_forwards += 1
        self._drop()

    def _drop(self) -> None:
        if self.forward is not None:
            self.forward.arrived.clear()  # a NewTokens and its forward hold each other
            self.forward = None
        for group in self.groups.values():
            group.abort()

    def crop(self, length: int) -> None:
        """Keeps the first `length` positions of a settled cache."""
        for group in self.groups.values():
            group.crop(length)
        self.behind = {layer_idx: has for layer_idx, has in self.behind.items() if has < length}

    def reset(self) -> None:
        """Drops the forward in progress and every token."""
        self._drop()
        self.behind.clear()
        self.need_gradients.clear()
        for group in self.groups.values():
            group.reset()

    def remove(self, plan: GroupPlan) -> None:
        """Forgets a group whose layers cannot be paged."""
        self.plans.remove(plan)
        self.groups.pop(plan, None)

    # Reading -----------------------------------------------------------------------------------------------------

    @property
    def _live(self) -> Forward | None:
        """The forward in progress, unless the model's call raised."""
        return None if self.forward is None or self.forward.has_raised else self.forward

    @property
    def length(self) -> int:
        """Committed positions."""
        return max((group.length for group in self.groups.values()), default=0)

    def _length_of(self, plan: GroupPlan) -> int:
        group = self.groups.get(plan)
        return 0 if group is None else group.length

    @property
    def is_in_call(self) -> bool:
        """Whether the model still computes the forward in progress."""
        return self.forward is not None and self.forward.is_running

    def lengths_of(self, plan: GroupPlan) -> dict[int, int]:
        """The positions that each layer of a group has, those of the forward in progress once the layer has arrived."""
        forward, length = self._live, self._length_of(plan)
        arrived, num_new = ({}, 0) if forward is None else (forward.arrived, forward.num_new)
        return {
            layer_idx: self.behind.get(layer_idx, length + (num_new if layer_idx in arrived else 0))
            for layer_idx in plan.layers
        }

    def has_arrived(self, plan: GroupPlan, layer_idx: int) -> bool:
        """Whether a layer has arrived since the cache was empty; True for every layer before the first arrival."""
        if layer_idx in self.behind:
            return self.behind[layer_idx] > 0
        forward = self._live
        return forward is None or self._length_of(plan) > 0 or layer_idx in forward.arrived

    def read(self, group: LayerGroup, index: int, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantized K and V of what the next query of a layer sees, in the dtypes of the last that arrived."""
        forward = self._live
        new = None if forward is None else forward.arrived.get(layer_idx)
        end = self.lengths_of(group.plan)[layer_idx]
        first = first_seen(end, group.window)
        fresh = None if new is None else (new.k, new.v)
        k, v = group.dequantize(index, first, end, group.dtypes, fresh, is_appended=False)
        asked = self.need_gradients if forward is None else self.need_gradients | forward.need_gradients
        lost = lost_source() if layer_idx in asked else None
        return refusing(lambda: k, lost), refusing(lambda: v, lost)
