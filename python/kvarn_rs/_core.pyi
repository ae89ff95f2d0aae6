"""The Rust core. Tensors are torch CPU tensors (float32, float16, bfloat16) or numpy arrays (float32, float16).

Queries, keys, values and outputs are read and written in place, without copies.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from types import TracebackType
from typing import Literal, TypedDict, final, type_check_only

from typing_extensions import Self, TypeVar

__all__ = [
    "DECODE_TOKENS",
    "FIRST_TOKENS",
    "QUERY_TOKENS",
    "Calibration",
    "Engine",
    "PagedKvCache",
    "Step",
    "__version__",
    "block_bytes",
    "caches_from_bytes",
    "caches_to_bytes",
    "capacity",
    "codec_bytes_per_token",
    "codecs",
    "file_kind",
    "first_seen",
    "formats",
    "inspect_caches",
    "is_prefill",
    "load_caches",
    "num_threads",
    "save_caches",
    "simd_level",
]

__version__: str

DECODE_TOKENS: int
"""Most new tokens per sequence and step that count as decode (or as the verification of drafts), not as prefill."""

FIRST_TOKENS: int
"""Fewest query tokens that a layer is calibrated from."""

QUERY_TOKENS: int
"""Query tokens after which a layer's calibration is frozen."""

_Tensor = TypeVar("_Tensor")
_State = Literal["no", "own prompt", "frozen", "file"]

@type_check_only
class LayerSummary(TypedDict):
    """A summary of one layer of a calibration."""

    layer: int
    """Its index in the model."""
    num_kv_heads: int
    head_dim: int
    query_tokens: int
    """Query tokens observed; of a layer from a file, the fewest of all layers in it."""
    state: _State
    rotated_heads: int | None
    """Heads with a smaller expected rounding error in the rotated frame; `None` before the layer is calibrated."""

@type_check_only
class CacheStats(TypedDict):
    """Blocks and bytes of a cache. Lists have one entry per layer."""

    blocks_in_use: int
    peak_blocks: int
    free_blocks: int | None
    """`None`: the pool grows as needed."""
    partial_blocks: int
    """Blocks in use that are not full."""
    open_pages: int
    """Pages of blocks that are not sealed; 0 in formats that never seal."""
    peak_open_pages: int
    bytes_in_use: int
    """Bytes of the blocks in use, at rest, and of their open pages."""
    peak_bytes: int
    allocated_bytes: int
    """Address space reserved; the system backs a page with memory when it is first written."""
    bytes_per_block: int
    bytes_per_open_page: int
    bytes_per_token: float
    """Bytes of a token in a full block at rest."""
    num_sequences: int
    cow_copies: int
    sealed: int
    """Blocks sealed so far."""
    unsealed: int
    """Blocks decoded into a page again so far, by `truncate`."""
    first_page_tokens: int | None
    """Tokens behind the statistics of the sequence's first page that was opened or refitted last; `None` before there
    is one, and in `raw`.
    """
    calibrated: _State
    """The state of the least advanced layer."""
    saturation: list[float | None]
    """Share of the K codes in tiles that were clamped to the ends of their grid; `None` without tiles."""
    drift: list[float | None]
    """Deviation of K over about the last 128 tokens, divided by the deviation that their pages were opened with: 1
    where the statistics fit, `None` before any token was measured.
    """
    out_of_range_tokens: list[int]
    """Tokens stored incorrectly because the scale or zero point of their K or V does not fit float16 (V beyond 65,504,
    or all within about 1e-4 of each other; K as large, in a tile). Counted when they are written to a page, and again
    when their block is sealed.
    """

@type_check_only
class EngineStats(TypedDict):
    """Figures of an engine. Lists have one entry per layer."""

    open_pages: int
    """Pages that blocks have which are not sealed; 0 in formats that never seal."""
    peak_open_pages: int
    sealed: int
    """Blocks sealed so far."""
    calibrated: _State
    saturation: list[float | None]
    drift: list[float | None]
    out_of_range_tokens: list[int]

@type_check_only
class CacheSummary(TypedDict):
    """A summary of one cache in a file: its settings, and bytes over all layers."""

    format: str
    dtype: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    num_blocks: int | None
    num_open_pages: int | None
    window: int | None
    sequences: list[tuple[int, int, int]]
    """(id, tokens, first token not released by the window) of each sequence."""
    sealed_blocks: int
    open_blocks: int
    """Blocks that are pages: partly filled, not sealed yet, or of a format that never seals."""
    tile_bytes: int
    page_bytes: int
    bytes_per_token: float
    """Bytes of a token in a full block at rest."""

@type_check_only
class Capacity(TypedDict):
    """The result of `capacity`."""

    sequence_bytes: int
    """Bytes of one running sequence: whole blocks and open pages."""
    open_bytes: int
    """The part of `sequence_bytes` beyond the visible tokens at rest: open pages and unused parts of blocks."""
    open_page_bytes: int
    """The part of `open_bytes` that is open pages: in formats that seal, two per layer and key/value head."""
    tokens: int
    """Tokens that fit."""
    sequences: int
    """Sequences that fit."""

@final
class Calibration:
    """Statistics of a model's queries and keys that sealing uses, learned by its caches or loaded from a file.

    A calibration belongs to one model and is shared by its caches. For each layer and key/value head it has error
    feedback, which passes rounding errors of K on so that they cancel in the directions of the queries, and the mean
    and deviation of the K channels. Layers have the model's indices. A layer is calibrated when its first block is
    sealed, from at least `FIRST_TOKENS` tokens, and again each time the number of tokens has doubled; at
    `QUERY_TOKENS` it is frozen and never changes again. `copy` and `deepcopy` return the same object.
    """

    def __new__(cls) -> Self: ...
    @staticmethod
    def load(path: str | PathLike[str], fingerprint: str | None = None) -> Calibration:
        """Loads a file written by `save`.

        Args:
            path: a safetensors file. Its checksum and its values are checked.
            fingerprint: the fingerprint of the model to use it for; `None` accepts any.

        Raises:
            CalibrationError: not a calibration file, damaged, of another version, or of another model.
        """
    def save(self, path: str | PathLike[str], fingerprint: str, model: str = "") -> None:
        """Writes the frozen layers to a file, atomically and deterministically.

        Args:
            path: the file, in an existing folder; an existing file is replaced.
            fingerprint: identifies the model; `load` compares it.
            model: the model's name, for display.

        Raises:
            ConfigError: no layer is frozen.
            CalibrationError: the file cannot be written.
        """
    @property
    def state(self) -> str:
        """The state of the least advanced layer: `no`, `own prompt`, `frozen` or `file`; `no` without layers."""
    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the model in its file; `None` if it was not loaded."""
    @property
    def model(self) -> str | None:
        """The model's name in its file; `None` if it was not loaded."""
    def layers(self) -> list[LayerSummary]:
        """The layers observed or loaded, by ascending index."""
    def wanted(self, layer: int) -> int:
        """Query tokens that a layer still needs: `QUERY_TOKENS` less those observed; 0 once frozen or loaded."""
    def freeze(self) -> None:
        """Calibrates and freezes every layer with the tokens observed so far.

        Raises:
            ConfigError: no tokens were observed, or by some layer fewer than `FIRST_TOKENS`; no layer was frozen.
        """
    def shard(self, rank: int, num_ranks: int) -> Calibration:
        """The key/value heads of one rank of tensor parallelism: as many on each, or one that several ranks share.

        Raises:
            ConfigError: no such rank, a layer that still learns, or heads and ranks that do not divide.
        """
    def __copy__(self) -> Calibration: ...
    def __deepcopy__(self, _memo: object) -> Calibration: ...

@final
class PagedKvCache:
    """The paged cache of one group of layers, which have the same heads, `head_dim` and window and share block tables.

    A *sequence* is a list of tokens, stored in *blocks* of `block_size`. A *step* appends tokens to some sequences:
    `begin_step` allocates their blocks (all or none), each layer appends and attends, and `commit` adds the tokens to
    the sequences. While a step is open its sequences cannot be forked, freed, truncated or part of another step.

    Args:
        num_layers: layers of the group.
        num_kv_heads: key/value heads of a layer.
        head_dim: channels of a head, a multiple of 16 up to 256.
        format: how blocks store their tokens, one of `kvarn_rs.FORMATS`. `int4`, `int3` and `int2` *seal*: a block is
            an INT8 page until it is full, and the step after that turns it into a tile (a prefill seals the blocks
            that it fills at once, except the last full one).
        block_size: tokens per block: 16, 32, 64 or 128.
        num_blocks: blocks in the pool, reserved at once; `None`: the pool grows as needed.
        num_open_pages: pages for blocks that are not sealed, in formats that seal: two for each sequence that decodes
            one token per step, four for one that appends more; `None`: the pool grows as needed.
        dtype: element type of `raw` pages: `float32`, `float16` or `bfloat16`. Other formats accept every dtype.
        window: tokens that a query sees, itself included; blocks wholly outside are released as steps begin.
        calibration: the model's calibration. Until it is frozen, it learns from the queries passed to `append`. `None`:
            tiles are rounded to nearest.
        layers: the model's indices of the cache's layers, for the calibration; `None`: 0, 1, ...
        codec: with `raw`, one of `kvarn_rs.CODECS`, which quantizes the pages in place to evaluate another scheme.

    Raises:
        UnknownFormatError, ConfigError, UnsupportedError: naming the setting and its valid values.
        OutOfMemoryError: `num_blocks` or `num_open_pages` need more memory than there is.
    """

    def __new__(
        cls,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        format: str = "int4",
        block_size: int = 128,
        num_blocks: int | None = None,
        num_open_pages: int | None = None,
        dtype: str = "float32",
        window: int | None = None,
        calibration: Calibration | None = None,
        layers: Sequence[int] | None = None,
        codec: str | None = None,
    ) -> Self: ...
    @property
    def format(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_blocks(self) -> int | None: ...
    @property
    def num_open_pages(self) -> int | None: ...
    @property
    def window(self) -> int | None: ...
    def set_calibration(self, calibration: Calibration, layers: Sequence[int] | None = None) -> None:
        """Uses a calibration from now on. The arguments are those of the constructor.

        Raises:
            ConfigError: `layers` does not have one index per layer, or the calibration is of another shape.
        """
    def sequences(self) -> list[int]:
        """The ids of the sequences not yet freed, ascending."""
    def new_sequence(self) -> int:
        """Creates a sequence without tokens and returns its id."""
    def fork(self, sequence: int) -> int:
        """Creates a sequence with the same tokens and returns its id; blocks are shared and copied on write.

        Raises:
            UnknownSequenceError, OpenStepError
        """
    def free(self, sequence: int) -> None:
        """Frees the sequence and its blocks.

        Raises:
            UnknownSequenceError, OpenStepError
        """
    def truncate(self, sequence: int, length: int, *, unseal: bool = False) -> None:
        """Keeps the first `length` tokens.

        Args:
            sequence: its id.
            length: tokens to keep.
            unseal: if `length` is within a sealed block, decode its tokens into a page again (counted in `stats`).

        Raises:
            RollbackError: the sequence has fewer tokens; or the window has released tokens that the next query would
                see; or, without `unseal`, `length` is within a sealed block.
            OutOfBlocksError, OutOfOpenPagesError: no block or page left to unseal into.
            UnsupportedError: `unseal` in a forked child, which has no kernel threads.
            UnknownSequenceError, OpenStepError
        """
    def check_truncate(self, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """Raises the error that `truncate(unseal=True)` of each sequence in turn would raise; changes nothing.

        Raises:
            RollbackError, OutOfBlocksError, OutOfOpenPagesError, UnknownSequenceError, OpenStepError, ConfigError
        """
    def seq_len(self, sequence: int) -> int:
        """The number of committed tokens."""
    def first_held(self, sequence: int) -> int:
        """The first token that the window has not released; 0 without a window."""
    def block_table(self, sequence: int) -> list[int]:
        """The block ids in order; 2**32 - 1 for a block that the window released."""
    def match_prefix(self, token_ids: Sequence[int]) -> int:
        """Creates a sequence that shares the longest published prefix of `token_ids` and returns its id.

        A prefix is whole blocks and never includes the last token; `seq_len` of the new sequence is its length.
        """
    def publish_prefix(self, sequence: int, token_ids: Sequence[int]) -> int:
        """Adds the full blocks of a sequence to the prefix index and returns how many are new.

        Args:
            sequence: its id.
            token_ids: the ids of its tokens.

        Raises:
            ConfigError: fewer ids than committed tokens.
            UnknownSequenceError
        """
    def begin_step(
        self,
        sequences: Sequence[int],
        num_new: int | Sequence[int] | None = None,
        *,
        mask: object = None,
        retain: bool = False,
    ) -> Step:
        """Opens a step: allocates the blocks of its new tokens, or raises and changes nothing.

        Args:
            sequences: their ids, in the order of the step's rows.
            num_new: rows of each sequence (an int: the same for all); every row is a token.
            mask: instead of `num_new`, a bool tensor `[B, T]`, False for padding rows, which are not stored.
            retain: do not release blocks outside the window, so that a later `truncate` can roll back to them.

        Raises:
            OutOfBlocksError, OutOfOpenPagesError: with the attributes `needed` and `free`.
            UnsupportedError: in a forked child, which has no kernel threads.
            UnknownSequenceError, OpenStepError, ConfigError
        """
    def dequantize(self, layer: int, sequence: int, k: object, v: object, *, start: int = 0) -> None:
        """Decodes tokens `start..start + n` into `k` and `v`, `[1, num_kv_heads, n, head_dim]` each.

        Tokens of an open step are included once `layer` has been appended.

        Raises:
            ShapeError: a range beyond the sequence's tokens, or before the first one not released.
            UnknownSequenceError, DtypeError, StrideError, DeviceError
        """
    def stats(self) -> CacheStats:
        """Blocks and bytes in use; bytes are of whole blocks, over all layers."""
    def save(self, path: str | PathLike[str]) -> None:
        """Writes all sequences to a file, atomically; `load` restores them bit for bit.

        Codes are written in the format's canonical order, not in the order of this machine's kernels, so the file does
        not depend on the machine. It contains the settings and the ids, lengths and blocks of the sequences (shared
        blocks once), but no published prefixes, no counters, and no calibration, which belongs to the model.

        Args:
            path: the file, in an existing folder; an existing file is replaced.

        Raises:
            OpenStepError: a step is open.
            UnsupportedError: the cache has a codec.
            CacheFileError: the file cannot be written.
        """
    @staticmethod
    def load(
        path: str | PathLike[str], *, calibration: Calibration | None = None, layers: Sequence[int] | None = None
    ) -> PagedKvCache:
        """Loads a file written by `save`. Its checksum and its values are checked.

        The unused blocks of a bounded pool are allocated when a step first needs them.

        Args:
            path: a safetensors file.
            calibration: as for the constructor.
            layers: as for the constructor.

        Raises:
            CacheFileError: not a cache file, damaged, of another version, or of more than one cache.
            OutOfMemoryError, ConfigError
        """
    def to_bytes(self) -> bytes:
        """The bytes that `save` writes. Pickling uses them, so a pickled cache has no calibration.

        Raises:
            OpenStepError, UnsupportedError, OutOfMemoryError
        """
    @staticmethod
    def from_bytes(data: bytes) -> PagedKvCache:
        """Loads a cache from the result of `to_bytes`.

        Raises:
            CacheFileError, OutOfMemoryError
        """
    def __reduce__(self) -> tuple[Callable[[bytes], PagedKvCache], tuple[bytes]]: ...
    def reset(self) -> None:
        """Removes every sequence, open step and published prefix; the memory stays allocated."""
    def copy(self) -> PagedKvCache:
        """An independent cache with the same sequences and the same calibration.

        Raises:
            OpenStepError: a step is open.
        """
    def __copy__(self) -> PagedKvCache: ...
    def __deepcopy__(self, _memo: object) -> PagedKvCache: ...

@final
class Step:
    """A step in progress. As a context manager it commits on exit, or aborts if the block raised.

    A step that is garbage-collected while open is aborted.
    """

    @property
    def num_rows(self) -> int:
        """Rows of the step's tensors, padding included."""
    @property
    def is_open(self) -> bool:
        """Whether the step was neither committed nor aborted."""
    def append(self, layer: int, k: object, v: object, q: object = None) -> None:
        """Writes a layer's keys and values, `[B, num_kv_heads, T, head_dim]` each, with `B * T = num_rows`.

        Sequences of different lengths are packed: `[1, num_kv_heads, num_rows, head_dim]`. `raw` pages accept their
        own dtype only. Also seals the blocks that are due. A calibration that is not frozen learns from the step's
        queries `q`, `[B, num_q_heads, T, head_dim]`, after rotary embedding, and learns nothing without them. What it
        learned stays if the step is aborted.

        Raises:
            NonFiniteError: with row, head and channel in the message; nothing was written.
            ShapeError, DtypeError, StrideError, DeviceError, StaleStepError
        """
    def attend(
        self,
        layer: int,
        q: _Tensor,
        k: object,
        v: object,
        out: _Tensor | None = None,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: object = None,
        lse: object = None,
        history_only: bool = False,
    ) -> _Tensor:
        """Causal attention of the step's queries to all tokens of their sequences, the step's tokens included.

        Args:
            layer: a layer that this step has appended.
            q: `[B, num_q_heads, T, head_dim]`; `num_q_heads` is a multiple of `num_kv_heads`.
            k: the keys that were appended, or `None`. If given, the tokens of a prefill (see `is_prefill`) attend to
                each other unquantized; otherwise all tokens are read from pages and tiles.
            v: the values that were appended, or `None`; both `k` and `v`, or neither.
            out: receives the result, of `q`'s shape; `None`: a new tensor like `q`. Padding rows become zeros.
            scale: factor on the scores; `None`: `head_dim ** -0.5`.
            window: tokens that a query sees, itself included; the smaller of this and the cache's window applies.
            softcap: scores become `softcap * tanh(scores / softcap)`.
            sinks: `[num_q_heads]`, one more logit per head in the softmax, without a value.
            lse: `[B, num_q_heads, T]`, float32: receives the natural logarithm of the sum of the exponentials of each
                row's scores, a sink's included; minus infinity where there are none.
            history_only: attend to the tokens before the step alone, to merge with attention to the step's own by
                `lse`. Rows of sequences without such tokens become zeros.

        Raises:
            OpenStepError: the layer was not appended in this step.
            ShapeError, DtypeError, StrideError, DeviceError, ConfigError, StaleStepError
        """
    def forward(
        self,
        layer: int,
        q: _Tensor,
        k: object,
        v: object,
        out: _Tensor | None = None,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: object = None,
        lse: object = None,
    ) -> _Tensor:
        """`append` with the queries, then `attend` with the keys and values, in one call: what most layers need.

        Raises: what both do; nothing was written.
        """
    def commit(self) -> None:
        """Adds the step's tokens to its sequences and ends the step.

        Raises:
            OpenStepError: a layer has not been appended; the step stays open.
            StaleStepError
        """
    def abort(self) -> None:
        """Ends the step without its tokens; blocks that the window released when it began stay released.

        Raises:
            StaleStepError
        """
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        _exc_value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> Literal[False]: ...

@final
class Engine:
    """Quantized attention for a serving engine that owns the memory, the block tables and the steps.

    Records are in tensors of the caller, which lends them as long as the object lives: nobody else may write them, or
    free them. A block of `raw` or `int8` is a page of its own number. In the other formats a block is a tile, and while
    it is not full or not committed it has a page beside, which the engine assigns.

    One step is open at a time: `begin`, for each layer `append` and `attend` or `forward`, then `commit` or `abort`.
    Tensors of tokens are `[num_tokens, heads, head_dim]`, sequences laid end to end in the order of the tables. Calls
    may come from any thread, and wait for each other.

    In formats that seal, a sequence has at most three pages in a step of up to 16 tokens (its last full block, the
    partial one, and a new one), and one more in a longer step. A block may be shared once it is full and committed, be
    it still a page. A block that is not shared may be written again from its beginning at any time, released or not; a
    partly written one may be cut back to fewer tokens by a smaller `context_lens`, a sealed one may not.

    Args:
        num_kv_heads: of a layer.
        head_dim: channels of a head.
        pages: a tensor per layer, `[num_pages, num_kv_heads, width]`, uint8 or int8, of any outer strides that are
            multiples of 16 bytes: `width` is at least the bytes of a page of one head. Its content does not matter.
        tiles: in formats that seal, a tensor per layer, `[num_blocks, num_kv_heads, width]`; else `None`.
        format: one of `FORMATS`.
        block_size: tokens of a block: 16, 32, 64 or 128.
        dtype: element type of `raw` pages.
        window: tokens that a query sees, itself included; `None`: all.
        calibration: the model's; it learns until it is frozen.
        layers: the model's number of each layer; `None`: 0, 1, ...

    Raises:
        ConfigError: settings that contradict each other, records that overlap or are not aligned.
        ShapeError, DtypeError, StrideError, DeviceError, UnknownFormatError, UnsupportedError, CalibrationError
    """

    def __new__(
        cls,
        *,
        num_kv_heads: int,
        head_dim: int,
        pages: Sequence[object],
        tiles: Sequence[object] | None = None,
        format: str = "int4",
        block_size: int = 128,
        dtype: str = "float32",
        window: int | None = None,
        calibration: Calibration | None = None,
        layers: Sequence[int] | None = None,
    ) -> Self: ...
    @property
    def format(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def is_open(self) -> bool:
        """Whether a step is open."""
    def begin(self, block_tables: object, context_lens: object, query_start_loc: object, *, seal: bool = True) -> None:
        """Begins a step. Full blocks of committed tokens are sealed, also those of sequences without new tokens.

        Args:
            block_tables: `[num_sequences, width]`, int32: the blocks of each sequence by position, copied. Entries past
                its tokens, and those that the window hides, are not read: -1, say.
            context_lens: `[num_sequences]`, int32: tokens before the step. Not checked: more than were written read
                what is in the blocks.
            query_start_loc: `[num_sequences + 1]`, int32: first row of each sequence, and the number of rows last.
            seal: False while some of the tokens before the step may be cut off again (a draft model's own drafts):
                their full blocks stay pages.

        Raises:
            StaleStepError: a step is open.
            OutOfOpenPagesError: there are too few pages; nothing was changed.
            ConfigError, ShapeError, DtypeError, StrideError, DeviceError
        """
    def append(self, layer: int, k: object, v: object, q: object = None) -> None:
        """Writes a layer's keys and values. See `Step.append`; tensors are `[num_tokens, heads, head_dim]`."""
    def attend(
        self,
        layer: int,
        q: _Tensor,
        k: object,
        v: object,
        out: _Tensor | None = None,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: object = None,
        lse: object = None,
        history_only: bool = False,
        max_query_len: int | None = None,
    ) -> _Tensor:
        """Attends. See `Step.attend`; tensors are `[num_tokens, heads, head_dim]`, and `lse` of the first two.

        Rows of sequences with more than `max_query_len` new tokens are not written: the caller attends for those.
        """
    def forward(
        self,
        layer: int,
        q: _Tensor,
        k: object,
        v: object,
        out: _Tensor | None = None,
        *,
        scale: float | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: object = None,
        lse: object = None,
    ) -> _Tensor:
        """`append` with the queries, then `attend` with the keys and values. See `Step.forward`."""
    def dequantize(self, layer: int, sequence: int, k: object, v: object, *, start: int = 0) -> None:
        """Decodes tokens `start..start + n` of the open step's sequence of this index, once `layer` has been appended.

        `k` and `v` are `[n, num_kv_heads, head_dim]`. Raises as `PagedKvCache.dequantize`; `OpenStepError` and
        `StaleStepError` as `attend`.
        """
    def commit(self, num_accepted: Sequence[int] | None = None) -> None:
        """Ends the step: its tokens are committed, or of each sequence the first `num_accepted` of them.

        Tokens that are not accepted (rejected drafts) are written again by a later step. A step of more than 16 tokens
        of a sequence seals the whole blocks that it writes, but the last: those are accepted in any case.

        Raises:
            OpenStepError: a layer has no keys and values; the step stays open.
            ConfigError: counts that do not fit the step, which stays open.
            StaleStepError: no step is open.
        """
    def abort(self) -> None:
        """Drops the step. Raises `StaleStepError` if none is open."""
    def release(self, blocks: Sequence[int]) -> None:
        """Takes back the pages of blocks whose unsealed tokens nobody reads again: of requests that are finished or
        preempted, and not shared. Sealed blocks stay as they are; in `raw` and `int8` there is nothing to do.

        Raises:
            StaleStepError: a step is open.
            ConfigError: an unknown block; nothing was changed.
        """
    def has_page(self, block: int) -> bool:
        """Whether a block is a page: in formats that seal, one that was written, and neither sealed nor released."""
    def copy_block(self, source: int, destination: int) -> None:
        """Copies a block that is not sealed into another, for a sequence that is forked within it.

        Raises:
            UnsupportedError: the block is sealed, and is shared instead; or it was never written.
            OutOfOpenPagesError, ConfigError, StaleStepError
        """
    def records(self, layer: int, block: int, num_tokens: int, *, is_first: bool) -> bytes:
        """The records of a block, head by head, as files have them.

        Args:
            layer: of the engine.
            block: its id.
            num_tokens: tokens in it; other rows are zero.
            is_first: whether it is the first block of its sequence.

        Raises:
            ConfigError: an unknown layer or block, or more tokens than a block has.
        """
    def stats(self) -> EngineStats: ...

def save_caches(path: str | PathLike[str], caches: Sequence[PagedKvCache], note: str = "") -> None:
    """Writes several caches and a note, a string of the caller, to one file. See `PagedKvCache.save`.

    Raises:
        ConfigError: a cache is named twice.
        OpenStepError, UnsupportedError, CacheFileError
    """

def caches_to_bytes(caches: Sequence[PagedKvCache], note: str = "") -> bytes:
    """The bytes that `save_caches` writes.

    Raises:
        ConfigError, OpenStepError, UnsupportedError, OutOfMemoryError
    """

def load_caches(path: str | PathLike[str]) -> tuple[list[PagedKvCache], str]:
    """Loads the caches and the note from a file written by `save_caches`. See `PagedKvCache.load`.

    Raises:
        CacheFileError, OutOfMemoryError
    """

def caches_from_bytes(data: bytes) -> tuple[list[PagedKvCache], str]:
    """Loads the caches and the note from the result of `caches_to_bytes`.

    Raises:
        CacheFileError, OutOfMemoryError
    """

def inspect_caches(path: str | PathLike[str]) -> tuple[list[CacheSummary], str]:
    """Summaries of the caches in a file, and its note. Checks every byte, but allocates no blocks.

    Raises:
        CacheFileError, OutOfMemoryError
    """

def file_kind(path: str | PathLike[str]) -> str:
    """The kind that a file names, `kvarn cache` or `kvarn calibration`. Nothing else in the file is checked.

    Raises:
        ConfigError: the file cannot be read, or names neither.
    """

def formats() -> list[str]:
    """Names of the cache formats, from the largest to the smallest."""

def codecs() -> list[str]:
    """Names of the codecs, which quantize `raw` pages in place to evaluate other schemes."""

def codec_bytes_per_token(codec: str, head_dim: int, block_size: int = 128) -> float:
    """Bytes per token and key/value head of a codec's scheme, if it were stored packed.

    Raises:
        UnknownFormatError, UnsupportedError, ConfigError
    """

def simd_level() -> str:
    """The SIMD level of new caches: the fastest of this machine, or the one named by `KVARN_SIMD`."""

def first_seen(position: int, window: int | None) -> int:
    """The first position that the query at `position` sees, under a window in tokens (itself included) or `None`."""

def is_prefill(block_size: int, context_len: int, num_new: int) -> bool:
    """Whether new tokens attend to each other unquantized: over `DECODE_TOKENS`, or to a short first page."""

def num_threads() -> int:
    """Number of kernel threads: torch's where it has OpenMP, else `RAYON_NUM_THREADS`, or one per core."""

def block_bytes(format: str, head_dim: int, block_size: int = 128, dtype: str = "bfloat16") -> int:
    """Bytes of one block of one layer and key/value head at rest: of a tile in formats that seal, else of a page.

    Raises:
        UnknownFormatError, UnsupportedError, ConfigError
    """

def capacity(
    storage: str,
    groups: Sequence[tuple[int, int, int, int | None]],
    block_size: int,
    context: int,
    memory_bytes: int,
    max_sequences: int | None = None,
) -> Capacity:
    """Computes how many tokens and sequences fit in a memory if every sequence is `context` tokens long.

    Args:
        storage: a cache format (`raw` in bf16), or `bf16` or `fp8` for an engine's unquantized cache.
        groups: (`num_layers`, `num_kv_heads`, `head_dim`, `window` or `None`) of each group of layers of one shape.
        block_size: tokens per block.
        context: tokens per sequence.
        memory_bytes: memory for the cache.
        max_sequences: most sequences that run at once; `None`: as many as fit.

    Raises:
        UnknownFormatError, UnsupportedError, ConfigError
    """
