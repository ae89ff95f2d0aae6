"""The pages of one `KvarnCache` and the forward that is writing to them.

A forward is a chain of calls that transformers makes layer by layer: `arrive` (K and V come), then attention, which
appends and attends, or some other operation, which gets the dense tensors. Nobody says which layers it has: models
leave layers out, stop early, or have fewer than their config. So it goes on while layers come that have not come yet,
and is over when one comes again, or when something else is written (`crop`, `reorder_cache`, ...). Then

* it is dropped, by every group, if the model's call raised;
* else `settle` commits it with the layers that came. A layer that did not come lacks those positions: its K and V are
  refused from then on, until `crop` has taken the positions back.

Reading (lengths, `keys`, `stats`) does neither: it tells what each layer has, as transformers' own caches do.
"""

from __future__ import annotations

import warnings
from collections import Counter

import torch

from kvarn_rs.errors import KvarnError, OpenStepError, RollbackError, ShapeError, StaleStepError, UnsupportedError

from . import calls
from .gradients import REFUSAL, is_in_backward, lost_source, needs_gradient, refuse_transforms, refusing
from .group import LayerGroup
from .handle import Forward, KvHandle, Pending


class DenseFallbackWarning(UserWarning):
    """Attention left the pages: correct, but with the memory and speed of an unquantized cache for that call."""


# reason: (what happened, what to do about it)
FALLBACKS = {
    "other_operation": (
        "{detail} read K and V outside kvarn attention",
        "call model.set_attn_implementation('kvarn'), or pass the model to KvarnCache; where the model itself does it "
        "then, use an unquantized cache",
    ),
    "keys_values": ("the keys or values of a cache layer were read", "use the cache through the model only"),
    "custom_mask": (
        "the attention mask is neither causal nor a sliding window with padding",
        "pass a 2-D attention_mask, or none",
    ),
    "hidden_tokens": (
        "the attention mask hides tokens that are stored",
        "pass the attention_mask of the earlier forwards, and new columns",
    ),
    "padding_in_window": (
        "padding between tokens under a sliding window",
        "pad prompts on the left, and batch turns of equal length",
    ),
    "other_window": (
        "the attention mask shows more than the window of a layer",
        "use an unquantized cache for this model",
    ),
    "not_causal": ("attention is not causal", "use an unquantized cache for this model"),
    "position_bias": ("attention adds a position bias", "use an unquantized cache for this model"),
    "copied_layer": (
        "an empty cache layer was copied by itself, as by models that run layers more than once: the copy stays "
        "unquantized",
        "use an unquantized cache for such a model; to copy a cache, copy all of it",
    ),
    "unsupported_shape": ("{detail}", "use an unquantized cache for this model"),
}


class PageStore:
    """All layer groups of one cache, the forward in progress, and what is counted.

    Attributes:
        behind: the layers that were left out of a forward, and how many positions they have.
        need_gradients: the layers that hold K or V which needed gradients.
    """

    def __init__(self, groups: list[LayerGroup], strict: bool) -> None:
        self.groups = groups
        self.strict = strict
        self.forward: Forward | None = None
        self.behind: dict[int, int] = {}
        self.need_gradients: set[int] = set()
        self.fused_calls = 0
        self.fallbacks: Counter[str] = Counter()
        self.dropped_forwards = 0
        self.own_attention = False  # the model attends with code of its own: told once, when the cache was made

    @property
    def num_layers(self) -> int:
        """Paged layers."""
        return sum(group.num_layers for group in self.groups)

    # A forward ---------------------------------------------------------------------------------------------------

    def enter(self, layer_idx: int, num_new: int) -> Forward:
        """The forward that a layer's num_new positions belong to: the one in progress, or a new one.

        Raises:
            ShapeError: another number of new positions than the forward has.
            RollbackError: the layer was left out of an earlier forward.
            UnsupportedError: the layer came already in this call of the model, or comes within a backward.
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
            came = list(forward.arrived)
            self.abort()
            raise ShapeError(
                f"layer {layer_idx} has {num_new} new positions, layers {came} had {forward.num_new}; for K and V of "
                "something else than the tokens (cross-attention), use an unquantized cache"
            )
        if layer_idx in self.behind:
            self.abort()
            held = self.behind[layer_idx]
            raise RollbackError(
                f"layer {layer_idx} has {held} of {self.length} positions: a forward left it out, or raised before it. "
                f"If it raised, {f'crop({held})' if held else 'reset()'} takes back what other layers got, and it can "
                "be repeated; for a model that leaves layers out at times, use an unquantized cache"
            )
        return forward

    def arrive(
        self, group: LayerGroup, ordinal: int, layer_idx: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[KvHandle, KvHandle]:
        """Takes the K and V [B, num_kv_heads, T, head_dim] of a layer, to be appended once its mask is known.

        Returns:
            Handles that look like K and V of all visible positions and are valid until the next forward.

        Raises:
            ShapeError: another batch size, or number of new positions, than the cache or this forward has.
            DtypeError: a dtype that the pages cannot hold.
            RollbackError: see `enter`.
            UnsupportedError: see `enter`, and `refuse_transforms`.
        """
        batch_size, num_kv_heads, num_new, head_dim = k.shape
        forward = self.enter(layer_idx, num_new)
        try:
            refuse_transforms(k, v)
            group.prepare(k, v)
            group.set_batch(batch_size)
        except KvarnError:
            self.abort()
            raise
        if needs_gradient(k) or needs_gradient(v):
            forward.need_gradients.add(layer_idx)
        pending = Pending(forward, group, ordinal, layer_idx, k.detach(), v.detach())
        forward.arrived[layer_idx] = pending
        size = (batch_size, num_kv_heads, group.length - group.first_visible + num_new, head_dim)
        past = lost_source() if layer_idx in self.need_gradients else None
        return (
            refusing(lambda: KvHandle(self, pending, False, size), k, past),
            refusing(lambda: KvHandle(self, pending, True, size), v, past),
        )

    def append(self, pending: Pending, query: torch.Tensor | None = None) -> None:
        """Writes the K and V of a layer to the pages. query: see `LayerGroup.append`."""
        pending.group.append(pending.ordinal, pending.forward.num_new, pending.k, pending.v, query)
        pending.forward.arrived[pending.layer_idx] = None
        pending.appended = True

    def dense(self, pending: Pending, reason: str, detail: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantized K and V of all visible positions for one layer of the current forward.

        Raises:
            StaleStepError: the forward is over.
            UnsupportedError: the cache is strict, or a backward wants them.
        """
        if is_in_backward():
            raise UnsupportedError(REFUSAL)
        self.check_current(pending)
        try:
            self.count_fallback(reason, detail)
            if not pending.appended:
                self.append(pending)
            group, fresh = pending.group, (pending.k, pending.v)
            end = group.length + pending.forward.num_new
            return group.dequantize(pending.ordinal, group.first_visible, end, (fresh[0].dtype, fresh[1].dtype), fresh)
        except KvarnError:
            self.abort()
            raise

    def check_current(self, pending: Pending) -> None:
        """StaleStepError if a handle's forward is over."""
        if pending.forward is not self.forward:
            raise StaleStepError(
                f"the K and V of layer {pending.layer_idx} belong to a forward that is over: the cache has moved on"
            )

    def settle(self) -> None:
        """Ends the forward in progress: commits it with the layers that came, or drops it if the model gave up.

        Raises:
            OpenStepError: the model still computes it; nothing was changed.
            NonFiniteError and others of the core: K or V that no attention had read yet; the forward is dropped.
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
            for pending in list(forward.arrived.values()):
                if pending is not None:
                    self.append(pending)
            for group in self.groups:
                for ordinal, layer_idx in enumerate(group.layers):
                    if group.step is not None and layer_idx not in forward.arrived:
                        group.append_nothing(ordinal)
        except KvarnError:
            self.abort()
            raise
        self.forward = None
        self.need_gradients |= forward.need_gradients
        for group in self.groups if forward.arrived else []:
            for layer_idx in group.layers:
                if layer_idx not in forward.arrived:
                    self.behind.setdefault(layer_idx, group.length)
            if group.step is not None:
                group.commit()

    def settle_for_copy(self) -> None:
        """Settles, unless the forward can be copied as it is: by hand, and nothing of it is in the pages."""
        forward = self.forward
        is_open = any(group.step is not None for group in self.groups)
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
            self.forward.arrived.clear()  # a Pending and its forward hold each other
            self.forward = None
        for group in self.groups:
            group.abort()

    def crop(self, length: int) -> None:
        """Keeps the first `length` positions of a settled cache."""
        for group in self.groups:
            group.crop(length)
        self.behind = {layer_idx: held for layer_idx, held in self.behind.items() if held < length}

    def reset(self) -> None:
        """Drops the forward in progress and every token."""
        self._drop()
        self.behind.clear()
        self.need_gradients.clear()
        for group in self.groups:
            group.reset()

    def remove(self, group: LayerGroup) -> None:
        """Forgets a group whose layers cannot be paged."""
        self.groups.remove(group)

    # Reading -----------------------------------------------------------------------------------------------------

    @property
    def _live(self) -> Forward | None:
        """The forward in progress, unless the model gave up."""
        return None if self.forward is None or self.forward.has_raised else self.forward

    @property
    def length(self) -> int:
        """Committed positions."""
        return max((group.length for group in self.groups), default=0)

    @property
    def is_in_call(self) -> bool:
        """Whether the model still computes the forward in progress."""
        return self.forward is not None and self.forward.is_running

    def lengths_of(self, group: LayerGroup) -> dict[int, int]:
        """The positions that each layer of a group has, those of the forward in progress once the layer has come."""
        forward = self._live
        arrived, num_new = ({}, 0) if forward is None else (forward.arrived, forward.num_new)
        return {
            layer_idx: self.behind.get(layer_idx, group.length + (num_new if layer_idx in arrived else 0))
            for layer_idx in group.layers
        }

    def has_come(self, group: LayerGroup, layer_idx: int) -> bool:
        """Whether K and V of a layer came since the cache was empty; True of all layers before any has."""
        if layer_idx in self.behind:
            return self.behind[layer_idx] > 0
        forward = self._live
        return forward is None or group.length > 0 or layer_idx in forward.arrived

    def read(self, group: LayerGroup, ordinal: int, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantized K and V of what the next query of a layer sees, in the dtypes of the last that came."""
        forward = self._live
        pending = None if forward is None else forward.arrived.get(layer_idx)
        end = self.lengths_of(group)[layer_idx]
        first = group.first_visible_after(end)
        fresh = None if pending is None else (pending.k, pending.v)
        k, v = group.dequantize(ordinal, first, end, group.dtypes, fresh, is_appended=False)
        asked = self.need_gradients if forward is None else self.need_gradients | forward.need_gradients
        lost = lost_source() if layer_idx in asked else None
        return refusing(lambda: k, lost), refusing(lambda: v, lost)

    # Counting ----------------------------------------------------------------------------------------------------

    def count_fallback(self, reason: str, detail: str = "") -> None:
        """Counts a dense fallback and warns of its reason's first; UnsupportedError if the cache is strict."""
        if reason == "other_operation" and self.own_attention:
            self.fallbacks["own_attention"] += 1
            return
        what, remedy = FALLBACKS[reason]
        message = f"kvarn: {what.format(detail=detail)}. Remedy: {remedy}."
        if self.strict:
            raise UnsupportedError(message)
        self.fallbacks[reason] += 1
        if self.fallbacks[reason] == 1:
            warnings.warn(message, DenseFallbackWarning, stacklevel=2)
