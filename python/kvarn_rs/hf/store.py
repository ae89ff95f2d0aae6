"""The pages of one `KvarnCache` and the forward that is writing to them.

A forward is a chain of calls that transformers makes layer by layer: `arrive` (K and V come), then attention, which
appends and attends, or some other operation, which gets the dense tensors. It is over when the next one begins, or
anything else is asked of the cache: then `settle` commits it if every layer came, and drops it if not (an exception in
the model, say). So a forward is seen whole or not at all, by every group.
"""

from __future__ import annotations

import warnings
from collections import Counter

import torch

from kvarn_rs.errors import KvarnError, ShapeError, StaleStepError, UnsupportedError

from .group import LayerGroup
from .handle import KvHandle, Pending


class DenseFallbackWarning(UserWarning):
    """Attention left the pages: correct, but with the memory and speed of an unquantized cache for that call."""


# reason: (what happened, what to do about it)
FALLBACKS = {
    "other_operation": (
        "{detail} read K and V outside kvarn attention",
        "call model.set_attn_implementation('kvarn'), or pass the model to KvarnCache",
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
    "not_causal": ("attention is not causal", "use an unquantized cache for this model"),
    "position_bias": ("attention adds a position bias", "use an unquantized cache for this model"),
    "unsupported_shape": ("{detail}", "use an unquantized cache for this model"),
}


class Forward:
    """The layers that came in one forward; a layer's `Pending` until its K and V are appended, then None."""

    __slots__ = ("arrived", "num_new")

    def __init__(self, num_new: int) -> None:
        self.num_new = num_new
        self.arrived: dict[int, Pending | None] = {}


class PageStore:
    """All layer groups of one cache, the forward in progress, and what is counted."""

    def __init__(self, groups: list[LayerGroup], strict: bool) -> None:
        self.groups = groups
        self.strict = strict
        self.forward: Forward | None = None
        self.num_layers = sum(group.num_layers for group in groups)
        self.fused_calls = 0
        self.fallbacks: Counter[str] = Counter()
        self.dropped_forwards = 0

    # A forward ---------------------------------------------------------------------------------------------------

    def arrive(
        self, group: LayerGroup, ordinal: int, layer_idx: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[KvHandle, KvHandle]:
        """Takes the K and V [B, num_kv_heads, T, head_dim] of a layer, to be appended once its mask is known.

        Returns:
            Handles that look like K and V of all visible positions and are valid until the next forward.

        Raises:
            ShapeError: another batch size, or number of new positions, than the cache or this forward has.
        """
        forward = self.forward
        if forward is None or layer_idx in forward.arrived:
            self.settle()
            forward = self.forward = Forward(k.shape[2])
        batch_size, num_kv_heads, num_new, head_dim = k.shape
        if num_new != forward.num_new:
            self.abort()
            raise ShapeError(f"layer {layer_idx} has {num_new} new positions, earlier layers had {forward.num_new}")
        if len(group.sequences) != batch_size:
            group.set_batch(batch_size)
        if k.requires_grad:
            k, v = k.detach(), v.detach()
        pending = Pending(forward, group, ordinal, layer_idx, k, v)
        forward.arrived[layer_idx] = pending
        size = (batch_size, num_kv_heads, group.length - group.first_visible + num_new, head_dim)
        return KvHandle(self, pending, False, size), KvHandle(self, pending, True, size)

    def append(self, pending: Pending, query: torch.Tensor | None = None) -> None:
        """Writes the K and V of a layer to the pages, with the mask that its group's step has (or none).

        query: the queries of the same positions, which the calibration learns from.
        """
        group = pending.group
        step = group.begin(pending.forward.num_new, None) if group.step is None else group.step
        step.append(pending.ordinal, pending.k, pending.v, query)
        pending.forward.arrived[pending.layer_idx] = None
        pending.appended = True

    def dense(self, pending: Pending, reason: str, detail: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        """Dequantized K and V of all visible positions for one layer of the current forward.

        Raises:
            StaleStepError: the forward is over.
            UnsupportedError: the cache is strict.
        """
        self.check_current(pending)
        try:
            self.count_fallback(reason, detail)
            if not pending.appended:
                self.append(pending)
            return pending.group.dequantize(pending.ordinal, (pending.k, pending.v))
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
        """Ends the forward in progress: committed if every layer came, dropped if not.

        Raises:
            NonFiniteError and others of the core: K or V that no attention had read yet; the forward is dropped.
        """
        forward = self.forward
        if forward is None:
            return
        num_arrived = len(forward.arrived)
        if num_arrived < self.num_layers:
            self.abort()
            warnings.warn(
                f"kvarn: dropped a forward that stopped after {num_arrived} of {self.num_layers} layers; the cache is "
                "as it was before it",
                RuntimeWarning,
                stacklevel=2,
            )
            return
        try:
            for pending in list(forward.arrived.values()):
                if pending is not None:
                    self.append(pending)
        except KvarnError:
            self.abort()
            raise
        self.forward = None
        for group in self.groups:
            group.commit()

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

    def reset(self) -> None:
        """Drops the forward in progress and every token."""
        self._drop()
        for group in self.groups:
            group.reset()

    def remove(self, group: LayerGroup) -> None:
        """Forgets a group whose layers cannot be paged."""
        self.groups.remove(group)
        self.num_layers -= group.num_layers

    @property
    def num_unsettled(self) -> int:
        """Positions that the forward in progress adds, once it is complete; 0 until then."""
        forward = self.forward
        return forward.num_new if forward is not None and len(forward.arrived) == self.num_layers else 0

    # Counting ----------------------------------------------------------------------------------------------------

    def count_fallback(self, reason: str, detail: str = "") -> None:
        """Counts a dense fallback and warns of its reason's first; UnsupportedError if the cache is strict."""
        what, remedy = FALLBACKS[reason]
        message = f"kvarn: {what.format(detail=detail)}. Remedy: {remedy}."
        if self.strict:
            raise UnsupportedError(message)
        self.fallbacks[reason] += 1
        if self.fallbacks[reason] == 1:
            warnings.warn(message, DenseFallbackWarning, stacklevel=2)
