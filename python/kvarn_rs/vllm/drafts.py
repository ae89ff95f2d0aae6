"""The layers of a draft model, which makes several passes in a step."""

from __future__ import annotations

import torch

from . import formats
from .group import Group


class DraftGroup(Group):
    """The group of a draft model's layers.

    The first pass of a step has the step's tokens and, behind those that were kept, rows of rejected ones; each pass
    after has one more draft of a sequence. The next step's first pass begins after the tokens that were kept, and
    writes the places of drafts again. So only first passes seal: what is before them is final.
    """

    def begin_pass(
        self, block_tables: torch.Tensor, context_lens: torch.Tensor, starts: torch.Tensor, index: int
    ) -> None:
        """Begins a pass; see `Engine.begin`.

        Args:
            block_tables: of each sequence.
            context_lens: tokens before the pass, drafts of earlier ones included.
            starts: first row of each sequence, and the number of rows last.
            index: of the pass in the step. From 1 on, the pass before is committed up to this one's context.
        """
        if index == 0:
            self._open_missed(block_tables, context_lens)
            self.begin(block_tables, context_lens, starts)
            return
        if self.engine.is_open:
            self.commit((context_lens.minimum(self._ends) - self._context).tolist())
        self._context, self._ends = context_lens, context_lens + starts.diff()
        self.engine.begin(block_tables, context_lens, starts, seal=False)

    def _open_missed(self, block_tables: torch.Tensor, context_lens: torch.Tensor) -> None:
        """Writes zeros before the context where the block that it ends in was never written.

        vLLM makes no drafts while a sequence of the step is as long as the model allows: the others' tokens are missed.
        """
        if self.engine.is_open:
            self.engine.abort()
        partial = [(row, length) for row, length in enumerate(context_lens.tolist()) if length % formats.BLOCK_SIZE]
        ends = [(int(block_tables[row, length // formats.BLOCK_SIZE]), length) for row, length in partial]
        missed = [(block, length % formats.BLOCK_SIZE) for block, length in ends if not self.engine.has_page(block)]
        if not missed:
            return
        blocks, counts = (torch.tensor(each, dtype=torch.int32) for each in zip(*missed, strict=True))
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])
        self.engine.begin(blocks[:, None], torch.zeros_like(counts), starts)
        zeros = torch.zeros(int(starts[-1]), self.engine.num_kv_heads, self.engine.head_dim)
        for layer in range(self.engine.num_layers):
            self.engine.append(layer, zeros, zeros)
        self.engine.commit()
