"""Layers that share one core cache: before their first K (`GroupPlan`), and from then on (`LayerGroup`)."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvarn_rs import Calibration, PagedKvCache, Step
from kvarn_rs._core import first_seen, is_prefill
from kvarn_rs.errors import DtypeError, RollbackError, ShapeError

from .admission import reason_against_mask
from .masks import attended_columns
from .positions import Positions
from .settings import PageSettings

Shape = tuple[int | None, int | None]

_UNCHECKED = object()  # not None: None is a mask
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(eq=False)
class GroupPlan:
    """Layers that are alike, and what is known of their pages before the first K arrives.

    Attributes:
        layers: their numbers in the model.
        window: positions that a query sees, itself included; None: all.
        shape: (num_kv_heads, head_dim) as the config says, possibly None: a hint; the first K decides.
        settings: those of the cache.
        calibration: the model's.
        record_past: keep what leaves the window, so that `LayerGroup.crop` can go back to it.
    """

    layers: list[int]
    window: int | None
    shape: Shape
    settings: PageSettings
    calibration: Calibration
    record_past: bool = False

    def make_core(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> PagedKvCache:
        """The empty core cache. dtype: of the elements of `raw` pages.

        Raises:
            ConfigError, UnsupportedError, DtypeError: a shape or dtype that the core does not do.
            CalibrationError: a calibration of another model.
        """
        settings = self.settings
        return PagedKvCache(
            num_layers=len(self.layers),
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            format=settings.format,
            block_size=settings.block_size,
            num_blocks=settings.num_blocks,
            num_open_pages=settings.num_open_pages,
            dtype=_name(dtype),
            window=self.window,
            calibration=self.calibration,
            layers=self.layers,
            codec=settings.codec,
        )


@dataclass
class GroupStep:
    """The open step of a group: the part that its layers have in a forward.

    Attributes:
        core: the core's step.
        num_new: new positions of each row.
        tokens: bool [B, num_new], True = token; None: all are.
        positions: the group's, once the step is committed.
        mask: the last mask that was checked.
        reason: why it keeps attention off the pages; None if it does not.
    """

    core: Step
    num_new: int
    tokens: torch.Tensor | None
    positions: Positions
    mask: object = _UNCHECKED
    reason: str | None = None

    def num_tokens(self, row: int) -> int:
        """New tokens of a row."""
        return self.num_new if self.tokens is None else int(self.tokens[row].sum())


class LayerGroup:
    """The pages of layers with one (num_kv_heads, head_dim, window): one core cache, one sequence per batch row.

    Between forwards, `core.seq_len(sequences[b])` is the number of tokens in the row b of `positions`.

    Attributes:
        plan: what it was made from.
        core: the pages.
        sequences: the core's sequence of each batch row.
        positions: committed ones.
        grew: since the last crop.
        page_dtype: of the elements of `raw` pages.
        dtypes: of the last K and V that arrived.
        step: the open step, from the first attention of a forward on; None between forwards.
    """

    def __init__(
        self,
        plan: GroupPlan,
        core: PagedKvCache,
        sequences: Sequence[int] = (),
        positions: Positions | None = None,
        grew: bool = False,
    ) -> None:
        self.plan = plan
        self.layers = plan.layers
        self.window = plan.window
        self.core = core
        self.page_dtype: torch.dtype = getattr(torch, core.dtype)
        self.dtypes = (self.page_dtype, self.page_dtype)
        self.sequences = list(sequences)
        self.positions = Positions() if positions is None else positions
        self.grew = grew
        self.step: GroupStep | None = None

    @classmethod
    def for_kv(cls, plan: GroupPlan, k: torch.Tensor, v: torch.Tensor) -> LayerGroup:
        """An empty group for K and V like these, [B, num_kv_heads, any, head_dim].

        Raises:
            ConfigError, UnsupportedError, DtypeError, CalibrationError: see `GroupPlan.make_core`.
        """
        group = cls(plan, plan.make_core(k.shape[1], k.shape[3], torch.promote_types(k.dtype, v.dtype)))
        group.dtypes = (k.dtype, v.dtype)
        return group

    def adapt(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Takes note of the dtypes of the next K and V; empty `raw` pages that do not hold them are made anew.

        Raises:
            DtypeError: a dtype that the core does not do, or that the elements of `raw` pages in use cannot hold.
        """
        dtype = torch.promote_types(k.dtype, v.dtype)
        is_raw = self.plan.settings.format == "raw"
        if dtype not in _DTYPES or (is_raw and torch.promote_types(dtype, self.page_dtype) != self.page_dtype):
            if dtype not in _DTYPES or self.length or self.step is not None:
                raise DtypeError(
                    f"K and V of {_name(dtype)} came to {self.plan.settings.format} pages that hold {self.length} "
                    f"positions of {_name(self.page_dtype)}. Go on in that dtype"
                    + (", call reset(), or use a quantized format" if is_raw and dtype in _DTYPES else "")
                )
            self.core = self.plan.make_core(k.shape[1], k.shape[3], dtype)
            self.page_dtype = dtype
            self.sequences = []
        self.dtypes = (k.dtype, v.dtype)

    def set_batch(self, batch_size: int) -> None:
        """Makes a sequence for every batch row; ShapeError if there are tokens of another batch."""
        if len(self.sequences) == batch_size:
            return
        if self.length:
            raise ShapeError(
                f"the cache holds {len(self.sequences)} rows of {self.length} positions, K and V came with "
                f"{batch_size} rows; use batch_repeat_interleave, batch_select_indices or reset"
            )
        for sequence in self.sequences:
            self.core.free(sequence)
        self.sequences = [self.core.new_sequence() for _ in range(batch_size)]

    @property
    def length(self) -> int:
        """Committed positions."""
        return self.positions.length

    @property
    def first_visible(self) -> int:
        """The first position that the next query, or the first one of the open step, sees."""
        return first_seen(self.positions.length, self.window)

    @property
    def num_visible(self) -> int:
        """How many committed positions that query sees."""
        length = self.positions.length
        return length if self.window is None else min(length, self.window - 1)

    # One forward: begin, (append, attend)*, commit or abort ------------------------------------------------------

    def begin(self, num_new: int, tokens: torch.Tensor | None) -> GroupStep:
        """Opens the step of a forward. tokens: bool [B, num_new], True = token; None: all are.

        Raises:
            OutOfBlocksError: nothing was changed.
        """
        # The first step after a crop may release what its own queries do not see: no later crop goes further back.
        retain = self.plan.record_past and self.grew
        if tokens is None:
            core = self.core.begin_step(self.sequences, num_new, retain=retain)
        else:
            core = self.core.begin_step(self.sequences, mask=tokens, retain=retain)
        self.step = GroupStep(core, num_new, tokens, self.positions.extended(num_new, tokens))
        return self.step

    def open_step(self, num_new: int) -> GroupStep:
        """The open step; if there is none, a new one without padding."""
        return self.begin(num_new, None) if self.step is None else self.step

    def admit(self, mask: torch.Tensor | None, num_new: int, window: int | None) -> str | None:
        """Opens the step if need be, and says why a mask keeps attention off the pages; None if it does not.

        The first mask of a forward says which of its new positions are padding.

        Raises:
            ConfigError: the mask lets a query see padding that was not stored.
            OutOfBlocksError: nothing was changed.
        """
        step = self.step
        if step is not None and mask is step.mask:
            return step.reason
        seen = None if mask is None else attended_columns(mask)
        if seen is not None:
            seen = seen.expand(len(self.sequences), self.num_visible + num_new)
        if step is None:
            tokens = None if seen is None else seen[:, -num_new:]
            step = self.begin(num_new, None if tokens is None or tokens.all() else tokens.contiguous())
        step.reason = reason_against_mask(mask, seen, step.positions, self.first_visible, window, num_new)
        step.mask = mask
        return step.reason

    def commit(self) -> None:
        """Closes the open step, if there is one: its tokens are the group's."""
        if self.step is not None:
            self.step.core.commit()
            self.positions = self.step.positions
            self.step = None
            self.grew = True

    def abort(self) -> None:
        """Drops the open step, if there is one: the group is as before it."""
        if self.step is not None:
            self.step.core.abort()
            self.step = None

    def append(self, index: int, num_new: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes the K and V of the group's layer `index` to the pages, with the mask that the step has (or none)."""
        self.open_step(num_new).core.append(index, *self._as_stored(k, v))

    def append_and_attend(
        self,
        index: int,
        num_new: int,
        query: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        options: dict[str, Any],
    ) -> None:
        """Writes the K and V of the group's layer `index` to the pages and attends into `out`, in one call of the core.

        query: of the same positions; the calibration learns from them. options: those of `Step.forward`.
        """
        self.open_step(num_new).core.forward(index, query, *self._as_stored(k, v), out, **options)

    def _as_stored(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.plan.settings.format == "raw":  # wide enough for both
            return k.to(self.page_dtype), v.to(self.page_dtype)
        return k, v

    def append_missing(self, arrived: Container[int]) -> None:
        """Appends zeros to the open step, if there is one, for the layers that did not arrive.

        The core commits a step of all its layers: they share their block tables.
        """
        if self.step is None:
            return
        size = (len(self.sequences), self.core.num_kv_heads, self.step.num_new, self.core.head_dim)
        for index, layer_idx in enumerate(self.layers):
            if layer_idx not in arrived:
                zeros = torch.zeros(size, dtype=self.page_dtype)
                self.step.core.append(index, zeros, zeros)

    def dequantize(
        self,
        index: int,
        first: int,
        end: int,
        dtypes: tuple[torch.dtype, torch.dtype],
        new: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        is_appended: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the positions first..end of one layer, [B, num_kv_heads, end - first, head_dim], contiguous; zero
        where padding is.

        new: K and V of the open forward, which `end` is the end of. Rows with a prefill show them as they arrived,
        like the core's attention; all rows do if they are not appended.
        """
        positions = self.positions if self.step is None else self.step.positions
        if positions.length < end:  # no mask has said yet which new positions are padding
            positions = positions.extended(end - positions.length)
        all_tokens = positions.tokens()
        size = (len(self.sequences), self.core.num_kv_heads, end - first, self.core.head_dim)
        k, v = torch.zeros(size, dtype=dtypes[0]), torch.zeros(size, dtype=dtypes[1])
        for row, sequence in enumerate(self.sequences):
            tokens = None if all_tokens is None else all_tokens[row]
            num_paged = end - first
            if new is not None and (not is_appended or self._is_prefill(row)):
                num_paged = max(self.length, first) - first
                for dense, arrived in zip((k, v), new, strict=True):
                    dense[row, :, num_paged:] = arrived[row, :, first + num_paged - end :]
                    if tokens is not None:
                        dense[row, :, num_paged:].masked_fill_(~tokens[first + num_paged : end, None], 0)
            if tokens is None:
                if num_paged:
                    rows = slice(row, row + 1)
                    self.core.dequantize(index, sequence, k[rows, :, :num_paged], v[rows, :, :num_paged], start=first)
                continue
            columns = tokens[first : first + num_paged].nonzero()[:, 0]
            if len(columns):
                row_k = k.new_empty(1, size[1], len(columns), size[3])
                row_v = v.new_empty(row_k.shape)
                self.core.dequantize(index, sequence, row_k, row_v, start=int(tokens[:first].sum()))
                k[row, :, columns] = row_k[0]
                v[row, :, columns] = row_v[0]
        return k, v

    def _is_prefill(self, row: int) -> bool:
        """Whether the open step is a prefill of a row: its new tokens attend to each other unquantized."""
        num_new = 0 if self.step is None else self.step.num_tokens(row)
        return is_prefill(self.core.block_size, self.core.seq_len(self.sequences[row]), num_new)

    # Between forwards -------------------------------------------------------------------------------------------

    def select(self, rows: list[int]) -> None:
        """Batch row i becomes what rows[i] was; a row used more than once is shared, copy-on-write."""
        kept: set[int] = set()
        sequences = []
        for row in rows:
            sequences.append(self.core.fork(self.sequences[row]) if row in kept else self.sequences[row])
            kept.add(row)
        for row, sequence in enumerate(self.sequences):
            if row not in kept:
                self.core.free(sequence)
        self.sequences = sequences
        self.positions = self.positions.selected(rows)

    def check_crop(self, length: int) -> None:
        """Raises what `crop` would raise, and changes nothing.

        Raises:
            RollbackError: the window no longer holds what a query at position `length` would see.
            OutOfBlocksError: no block, or page, for the sealed blocks that the end is within.
        """
        if length >= self.length:
            return
        num_tokens = [self.positions.num_tokens(row, length) for row in range(len(self.sequences))]
        for sequence, num_kept in zip(self.sequences, num_tokens, strict=True):
            needed, first = first_seen(num_kept, self.window), self.core.first_held(sequence)
            if first > needed:
                raise RollbackError(
                    f"cannot crop to {length} of {self.length} positions: a window of {self.window} needs tokens from "
                    f"{needed} on, those before {first} were released; call activate_past_recording before the forward"
                )
        self.core.check_truncate(self.sequences, num_tokens)

    def crop(self, length: int) -> None:
        """Keeps the first `length` positions; a sealed block that the end is within becomes a page again."""
        if length < self.length:
            for row, sequence in enumerate(self.sequences):
                self.core.truncate(sequence, self.positions.num_tokens(row, length), unseal=True)
            self.positions = self.positions.cropped(length)
        self.grew = False

    def reset(self) -> None:
        """Frees every sequence, and the open step."""
        self.core.reset()
        self.step = None
        self.sequences = []
        self.positions = Positions()
        self.grew = False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
