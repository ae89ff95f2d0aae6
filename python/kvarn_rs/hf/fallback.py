"""Dense fallbacks: the reasons why attention cannot use the pages, with counters and warnings."""

from __future__ import annotations

import warnings
from collections import Counter

from kvarn_rs.errors import UnsupportedError


class DenseFallbackWarning(UserWarning):
    """Attention dequantized the cache first: correct, but with the memory and speed of an unquantized cache."""


_UNQUANTIZED = "use an unquantized cache for this model"
# reason: (what happened, what to do about it)
_REASONS = {
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
    "other_window": ("the attention mask shows more than the window of a layer", _UNQUANTIZED),
    "not_causal": ("attention is not causal", _UNQUANTIZED),
    "position_bias": ("attention adds a position bias", _UNQUANTIZED),
    "copied_layer": (
        "an empty cache layer was copied by itself, as by models that run layers more than once: the copy stays "
        "unquantized",
        "use an unquantized cache for such a model; to copy a cache, copy all of it",
    ),
    "unsupported_shape": ("{detail}", _UNQUANTIZED),
}


class Fallbacks:
    """The dense fallbacks of one cache.

    Attributes:
        strict: raise instead of counting.
        own_attention: the model attends with code of its own, as a warning said when the cache was made; set after
            that, and other operations are counted under that name.
        counts: layer calls by reason.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.own_attention = False
        self.counts: Counter[str] = Counter()

    def count(self, reason: str, detail: str = "") -> None:
        """Counts a dense fallback and warns of its reason's first; UnsupportedError if the cache is strict."""
        if reason == "other_operation" and self.own_attention:
            self.counts["own_attention"] += 1
            return
        what, remedy = _REASONS[reason]
        message = f"kvarn: {what.format(detail=detail)}. Remedy: {remedy}."
        if self.strict:
            raise UnsupportedError(message)
        self.counts[reason] += 1
        if self.counts[reason] == 1:
            warnings.warn(message, DenseFallbackWarning, stacklevel=2)
