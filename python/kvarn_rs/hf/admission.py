"""The check whether attention with a forward's mask can run on pages."""

from __future__ import annotations

import torch

from kvarn_rs.errors import ConfigError

from .masks import is_padding_row
from .positions import Positions


def reason_against_mask(
    mask: torch.Tensor | None,
    seen: torch.Tensor | None,
    positions: Positions,
    first: int,
    window: int | None,
    num_new: int,
) -> str | None:
    """Why a mask keeps attention off the pages, a reason of `fallback`; None if it does not.

    Args:
        mask: see `masks`.
        seen: bool [B, positions from `first` on], True = some query sees it; None: all of them.
        positions: those of the cache, the forward's included.
        first: the first position that the forward's first query sees.
        window: positions that a query sees, itself included; None: all.
        num_new: positions of the forward.

    Raises:
        ConfigError: the mask lets a query see padding that was not stored.
    """
    tokens = positions.tokens(first)
    if tokens is not None:
        unstored = ~tokens if seen is None else seen & ~tokens
        if unstored.any():
            row, column = unstored.nonzero()[0].tolist()
            raise ConfigError(
                f"the attention mask shows position {column + first} of batch row {row}, which was padding when it "
                "came: the cache keeps no K and V of padding. Pass the attention_mask of all positions, the earlier "
                "ones as they were"
            )
    if mask is None or seen is None:
        return None
    if not is_padding_row(mask, num_new):
        return "custom_mask"
    if not (seen.all() if tokens is None else torch.equal(seen, tokens)):
        return "hidden_tokens"
    if window is not None and tokens is not None and positions.has_inner_padding():
        return "padding_in_window"
    return None
