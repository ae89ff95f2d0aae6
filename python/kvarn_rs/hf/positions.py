"""The map from transformers' positions to stored tokens.

transformers counts *positions*, padding included; pages hold only tokens. In row b of a batch,

    tokens before position p = p - padding[b, :p].sum()        (positions from padding.shape[1] on are tokens)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Positions:
    """The positions of a batch, and which of them are padding. Every operation returns a new value.

    Attributes:
        length: positions of every row, padding included.
        padding: bool [B, P], P <= length, True = padding, with some in its last column; None: there is none.
    """

    length: int = 0
    padding: torch.Tensor | None = None

    def tokens(self, start: int = 0) -> torch.Tensor | None:
        """bool [B, length - start], True = token, of the positions from `start` on; None: all of them are."""
        padding = self.padding
        if padding is None or padding.shape[1] <= start:
            return None
        tokens = torch.ones(padding.shape[0], self.length - start, dtype=torch.bool)
        tokens[:, : padding.shape[1] - start] = ~padding[:, start:]
        return tokens

    def num_tokens(self, row: int, position: int) -> int:
        """Tokens of a row before a position."""
        return position if self.padding is None else position - int(self.padding[row, :position].sum())

    def has_inner_padding(self) -> bool:
        """Whether a row has padding between two tokens: a window of W positions then holds fewer than W tokens."""
        tokens = self.tokens()
        if tokens is None:
            return False
        before = tokens.cumsum(1) > 0
        after = tokens.flip(1).cumsum(1).flip(1) > 0
        return bool((before & after & ~tokens).any())

    def extended(self, num_new: int, tokens: torch.Tensor | None = None) -> Positions:
        """With num_new more. tokens: bool [B, num_new], True = token; None: all of them are."""
        if tokens is None:
            return Positions(self.length + num_new, self.padding)
        padding = torch.zeros(tokens.shape[0], self.length + num_new, dtype=torch.bool)
        if self.padding is not None:
            padding[:, : self.padding.shape[1]] = self.padding
        padding[:, self.length :] = ~tokens
        return Positions(self.length + num_new, _trimmed(padding))

    def cropped(self, length: int) -> Positions:
        """The first `length` of them."""
        return Positions(length, None if self.padding is None else _trimmed(self.padding[:, :length]))

    def selected(self, rows: list[int]) -> Positions:
        """Row i becomes what rows[i] is."""
        return Positions(self.length, None if self.padding is None else _trimmed(self.padding[rows]))


def _trimmed(padding: torch.Tensor) -> torch.Tensor | None:
    """Without the columns after the last padding; None if there is no padding."""
    columns = padding.any(0).nonzero()
    return padding[:, : int(columns[-1]) + 1].contiguous() if len(columns) else None
