"""The layers of a draft model, which makes several passes in a step."""

from __future__ import annotations

from typing import Any

import torch

from . import formats
from .group import Group, StepRange


class DraftGroup(Group):
    """The group of a draft model's layers.

    The first pass of a step has the step's tokens and, behind those that were kept, rows of rejected ones; each pass
    after has one more draft of a sequence. The next step's first pass begins after the tokens that were kept, and
    writes the places of drafts again. So only first passes seal: what is before them is final.

    vLLM makes no drafts, and no pass, while a sequence of the step is as long as the draft model allows: the tokens of
    the others are missing. Where a pass begins within a block of which nothing was written, the engine gets the pass as
    the beginning of the block: its page has the statistics of the pass's keys, and decodes to likely ones in the places
    that no pass has written. The next step's pass is where it belongs.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._num_missing = torch.empty(0, dtype=torch.int32)

    def begin_pass(
        self, block_tables: torch.Tensor, context_lens: torch.Tensor, starts: torch.Tensor, index: int
    ) -> torch.Tensor:
        """Begins a pass; see `Engine.begin`.

        Args:
            block_tables: of each sequence.
            context_lens: tokens before the pass, drafts of earlier ones included.
            starts: first row of each sequence, and the number of rows last.
            index: of the pass in the step. From 1 on, the pass before is committed up to this one's context.

        Returns:
            The tokens of each sequence that the engine has before the pass.
        """
        current = self._pass
        if index:
            self.commit((context_lens.minimum(current.ends) - current.context_lens).tolist())
        self._pass = StepRange(context_lens, context_lens + starts.diff())
        if not index:
            self._step = self._pass
            self._num_missing = self._count_missing(block_tables, context_lens)
        if self._num_missing.any():
            block_tables, context_lens = block_tables.clone(), context_lens - self._num_missing
            for row, count in enumerate(self._num_missing.tolist()):
                block_tables[row] = block_tables[row].roll(-(count // formats.BLOCK_SIZE))
        self.engine.begin(block_tables, context_lens, starts, seal=index == 0)
        return context_lens

    def _count_missing(self, block_tables: torch.Tensor, context_lens: torch.Tensor) -> torch.Tensor:
        """Tokens before the first pass of sequences within a block of which nothing was written; 0 of the others."""

        def is_written(row: int, length: int) -> bool:
            within = length % formats.BLOCK_SIZE
            return not within or self.engine.has_page(int(block_tables[row, length // formats.BLOCK_SIZE]))

        lengths = enumerate(context_lens.tolist())
        return torch.tensor([0 if is_written(*each) else each[1] for each in lengths], dtype=torch.int32)
