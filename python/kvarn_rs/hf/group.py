"""Where do the tokens of layers that look alike live, and which positions of transformers are they?

transformers counts *positions*, padding included; pages hold only tokens. A `LayerGroup` owns the core cache of the
layers with one (num_kv_heads, head_dim, window), one sequence per batch row, and the map between the two countings:

    tokens of row b before position p = p - padding[b, :p].sum()        (positions from padding.shape[1] on are tokens)

Between forwards `core.seq_len(sequences[b])` = tokens of row b before `length`, for every row.
"""

from __future__ import annotations

from typing import Any

import torch

from kvarn_rs import Calibration, PagedKvCache
from kvarn_rs._core import is_prefill
from kvarn_rs.errors import ConfigError, DtypeError, RollbackError, ShapeError

from .masks import attended_columns, is_padding_row

_UNCHECKED = object()  # not None: None is a mask
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class LayerGroup:
    """Layers of one (num_kv_heads, head_dim, window): one core cache, one sequence per batch row."""

    def __init__(
        self,
        layers: list[int],
        window: int | None,
        *,
        shape: tuple[int | None, int | None],
        format: str,
        block_size: int,
        num_blocks: int | None,
        num_open_pages: int | None,
        calibration: Calibration,
        codec: str | None,
    ) -> None:
        self.layers = layers  # the model's numbers of the group's layers
        self.window = window
        self.shape = shape  # (num_kv_heads, head_dim) as the config says, a hint
        self.format = format
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.num_open_pages = num_open_pages
        self.calibration = calibration
        self.codec = codec
        self.core: Any = None  # PagedKvCache, once the shape of K is known
        self.page_dtype = torch.float32  # that the core was made for: of the elements of raw pages
        self.dtypes = (torch.float32, torch.float32)  # of the last K and V that came
        self.sequences: list[int] = []
        self.length = 0
        self.padding: torch.Tensor | None = None  # bool [B, P], True = padding; its last column has some
        self.record_past = False  # keep what leaves the window, so that `crop` can come back to it
        self.step: Any = None  # kvarn_rs.Step, from the first attention of a forward on
        self.num_new = 0
        self.step_tokens: torch.Tensor | None = None  # bool [B, num_new]; None: all are tokens
        self.checked_mask: object = _UNCHECKED
        self.verdict: str | None = None
        self.grew = False  # since the last crop, under record_past

    @property
    def num_layers(self) -> int:
        """Layers of the group."""
        return len(self.layers)

    def prepare(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Makes pages for K and V like these, [B, num_kv_heads, any, head_dim], unless there are some that hold them.

        Raises:
            ConfigError, UnsupportedError: a shape, format or block size that the core does not do.
            DtypeError: a dtype that the core does not do, or that the elements of `raw` pages in use cannot hold.
        """
        dtype = torch.promote_types(k.dtype, v.dtype)
        is_raw = self.format == "raw"
        if self.core is None:
            self._create_core(k, dtype)
        elif dtype not in _DTYPES or (is_raw and torch.promote_types(dtype, self.page_dtype) != self.page_dtype):
            if dtype not in _DTYPES or self.length or self.step is not None:
                raise DtypeError(
                    f"K and V of {_name(dtype)} came to {self.format} pages that hold {self.length} positions of "
                    f"{_name(self.page_dtype)}. Go on in that dtype"
                    + (", call reset(), or use a quantized format" if is_raw and dtype in _DTYPES else "")
                )
            self._create_core(k, dtype)
            self.sequences = []
        self.dtypes = (k.dtype, v.dtype)

    def _create_core(self, k: torch.Tensor, dtype: torch.dtype) -> None:
        self.core = PagedKvCache(
            num_layers=self.num_layers,
            num_kv_heads=k.shape[1],
            head_dim=k.shape[3],
            format=self.format,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            num_open_pages=self.num_open_pages,
            dtype=_name(dtype),
            window=self.window,
            calibration=self.calibration,
            layers=self.layers,
            codec=self.codec,
        )
        self.page_dtype = dtype

    def set_batch(self, batch_size: int) -> None:
        """Gives every batch row a sequence; ShapeError if tokens of another batch are held."""
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
    def first_visible(self) -> int:
        """The first position that the next query, or the first one of the open step, sees."""
        return self.first_visible_after(self.length)

    def first_visible_after(self, length: int) -> int:
        """The first position that a query at position `length` sees."""
        return 0 if self.window is None else max(length - self.window + 1, 0)

    # One forward: begin, (append, attend)*, commit or abort ------------------------------------------------------

    def begin(self, num_new: int, tokens: torch.Tensor | None) -> Any:
        """Opens and returns the step of a forward. tokens: bool [B, num_new], True = token; None: all are.

        Raises:
            OutOfBlocksError: nothing was changed.
        """
        # The first step after a crop may release what its own queries do not see: no later crop goes further back.
        retain = self.record_past and self.grew
        if tokens is None:
            self.step = self.core.begin_step(self.sequences, num_new, retain=retain)
        else:
            self.step = self.core.begin_step(self.sequences, mask=tokens, retain=retain)
        self.num_new = num_new
        self.step_tokens = tokens
        self.checked_mask = _UNCHECKED
        return self.step

    def admit(self, mask: torch.Tensor | None, num_new: int, window: int | None) -> str | None:
        """Opens the step if need be, and tells why a mask keeps attention off the pages; None if it does not.

        The first mask of a forward tells which of its new rows are padding.

        Raises:
            ConfigError: the mask lets a query see padding that was not stored.
            OutOfBlocksError: nothing was changed.
        """
        if self.step is not None and mask is self.checked_mask:
            return self.verdict
        seen = None if mask is None else attended_columns(mask)
        if seen is not None:
            seen = seen.expand(len(self.sequences), self.length - self.first_visible + num_new)
        if self.step is None:
            tokens = None if seen is None else seen[:, -num_new:]
            self.begin(num_new, None if tokens is None or tokens.all() else tokens.contiguous())
        self.verdict = self._judge(mask, seen, window)
        self.checked_mask = mask
        return self.verdict

    def _judge(self, mask: torch.Tensor | None, seen: torch.Tensor | None, window: int | None) -> str | None:
        tokens = self.visible_tokens()
        if tokens is not None:
            unstored = ~tokens if seen is None else seen & ~tokens
            if unstored.any():
                row, column = unstored.nonzero()[0].tolist()
                raise ConfigError(
                    f"the attention mask shows position {column + self.first_visible} of batch row {row}, which was "
                    "padding when it came: the cache keeps no K and V of padding. Pass the attention_mask of all "
                    "positions, the earlier ones as they were"
                )
        if mask is None or seen is None:
            return None
        if not is_padding_row(mask, self.num_new):
            return "custom_mask"
        if not (seen.all() if tokens is None else torch.equal(seen, tokens)):
            return "hidden_tokens"
        if window is not None and tokens is not None and self._has_inner_padding():
            return "padding_in_window"
        return None

    def _all_tokens(self) -> torch.Tensor | None:
        """bool [B, positions up to the open step's last]: True = token; None: all are."""
        if self.padding is None and self.step_tokens is None:
            return None
        num_new = self.num_new if self.step is not None else 0
        tokens = torch.ones(len(self.sequences), self.length + num_new, dtype=torch.bool)
        if self.padding is not None:
            tokens[:, : self.padding.shape[1]] = ~self.padding
        if self.step_tokens is not None:
            tokens[:, self.length :] = self.step_tokens
        return tokens

    def visible_tokens(self) -> torch.Tensor | None:
        """bool [B, kv_len] of the positions from `first_visible` on: True = token; None: all are."""
        first = self.first_visible
        if self.step_tokens is None and (self.padding is None or self.padding.shape[1] <= first):
            return None
        tokens = self._all_tokens()
        return None if tokens is None else tokens[:, first:]

    def _has_inner_padding(self) -> bool:
        """Whether a row has padding between two tokens: a window of W positions then holds fewer than W tokens."""
        tokens = self._all_tokens()
        if tokens is None:
            return False
        before = tokens.cumsum(1) > 0
        after = tokens.flip(1).cumsum(1).flip(1) > 0
        return bool((before & after & ~tokens).any())

    def commit(self) -> None:
        """Closes the step: its tokens are there."""
        if self.step_tokens is not None and (tokens := self._all_tokens()) is not None:
            self.padding = _trim(~tokens)
        self.step.commit()
        self._close_step()
        self.length += self.num_new
        self.grew = True

    def abort(self) -> None:
        """Drops the step, if one is open: the group is as before it."""
        if self.step is not None:
            self.step.abort()
            self._close_step()

    def _close_step(self) -> None:
        self.step = None
        self.step_tokens = None
        self.checked_mask = _UNCHECKED

    def append(
        self, layer: int, num_new: int, k: torch.Tensor, v: torch.Tensor, query: torch.Tensor | None = None
    ) -> None:
        """Writes the K and V of a layer to the pages, with the mask that the step has (or none).

        query: the queries of the same positions, which the calibration learns from.
        """
        step = self.begin(num_new, None) if self.step is None else self.step
        if self.format == "raw":  # wide enough for both
            k, v = k.to(self.page_dtype), v.to(self.page_dtype)
        step.append(layer, k, v, query)

    def append_nothing(self, layer: int) -> None:
        """Gives a layer without K and V zeros for the open step: the layers of a group share their block tables."""
        zeros = torch.zeros(
            len(self.sequences), self.core.num_kv_heads, self.num_new, self.core.head_dim, dtype=self.page_dtype
        )
        self.step.append(layer, zeros, zeros)

    def dequantize(
        self,
        layer: int,
        first: int,
        end: int,
        dtypes: tuple[torch.dtype, torch.dtype],
        fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
        *,
        is_appended: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the positions first..end of one layer, [B, num_kv_heads, end - first, head_dim], contiguous; zero
        where padding is.

        fresh: K and V of the open forward, which `end` is the end of. Rows with a prefill show them as they came, like
        the core's attention; all rows do if they are not appended.
        """
        all_tokens = self._all_tokens()
        if all_tokens is not None and all_tokens.shape[1] < end:  # no mask has told yet which new rows are padding
            all_tokens = torch.nn.functional.pad(all_tokens, (0, end - all_tokens.shape[1]), value=True)
        size = (len(self.sequences), self.core.num_kv_heads, end - first, self.core.head_dim)
        k, v = torch.zeros(size, dtype=dtypes[0]), torch.zeros(size, dtype=dtypes[1])
        for row, sequence in enumerate(self.sequences):
            tokens = None if all_tokens is None else all_tokens[row]
            from_fresh = fresh is not None and (not is_appended or self._is_prefill(row))
            num_paged = max(self.length, first) - first if from_fresh else end - first
            if fresh is not None and num_paged < end - first:
                for dense, given in zip((k, v), fresh, strict=True):
                    dense[row, :, num_paged:] = given[row, :, first + num_paged - end :]
                    if tokens is not None:
                        dense[row, :, num_paged:].masked_fill_(~tokens[first + num_paged : end, None], 0)
            if tokens is None:
                if num_paged:
                    rows = slice(row, row + 1)
                    self.core.dequantize(layer, sequence, k[rows, :, :num_paged], v[rows, :, :num_paged], start=first)
                continue
            columns = tokens[first : first + num_paged].nonzero()[:, 0]
            if len(columns):
                row_k = k.new_empty(1, size[1], len(columns), size[3])
                row_v = v.new_empty(row_k.shape)
                self.core.dequantize(layer, sequence, row_k, row_v, start=int(tokens[:first].sum()))
                k[row, :, columns] = row_k[0]
                v[row, :, columns] = row_v[0]
        return k, v

    def _is_prefill(self, row: int) -> bool:
        """Whether the open step is a prefill of a row: its new tokens attend to each other unquantized."""
        num_new = self.num_new if self.step_tokens is None else int(self.step_tokens[row].sum())
        return is_prefill(self.core.block_size, self.core.seq_len(self.sequences[row]), num_new)

    # Between forwards -------------------------------------------------------------------------------------------

    def _num_tokens(self, row: int, position: int) -> int:
        """Tokens of a batch row before a position."""
        return position if self.padding is None else position - int(self.padding[row, :position].sum())

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
        if self.padding is not None:
            self.padding = _trim(self.padding[rows])

    def check_crop(self, length: int) -> None:
        """Raises what `crop` would raise, and changes nothing.

        Raises:
            RollbackError: the window no longer holds what a query at position `length` would see.
            OutOfBlocksError: no block, or page, for the sealed blocks that the end is within.
        """
        if length >= self.length or self.core is None:
            return
        for row, sequence in enumerate(self.sequences):
            needed = 0 if self.window is None else max(self._num_tokens(row, length) - self.window + 1, 0)
            held = self.core.first_held(sequence)
            if held > needed:
                raise RollbackError(
                    f"cannot crop to {length} of {self.length} positions: a window of {self.window} needs tokens from "
                    f"{needed} on, those before {held} were released; call activate_past_recording before the forward"
                )
        self.core.check_truncate(self.sequences, [self._num_tokens(row, length) for row in range(len(self.sequences))])

    def crop(self, length: int) -> None:
        """Keeps the first `length` positions; a sealed block that the end is within becomes a page again."""
        if length < self.length:
            for row, sequence in enumerate(self.sequences):
                self.core.truncate(sequence, self._num_tokens(row, length), unseal=True)
            self.length = length
            if self.padding is not None:
                self.padding = _trim(self.padding[:, :length])
        self.grew = False

    def reset(self) -> None:
        """Frees every sequence."""
        if self.core is not None:
            self.core.reset()
        self._close_step()
        self.sequences = []
        self.length = 0
        self.padding = None
        self.grew = False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _trim(padding: torch.Tensor) -> torch.Tensor | None:
    """Drops the columns after the last padding; None if there is no padding."""
    columns = padding.any(0).nonzero()
    return padding[:, : int(columns[-1]) + 1].contiguous() if len(columns) else None
