"""The Rust core. Tensors are torch CPU tensors (float32, float16, bfloat16) or numpy arrays (float32, float16).

Queries, keys, values and outputs are used where they lie.
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
"""Most new tokens of a sequence in decode, and in the verification of drafts."""

FIRST_TOKENS: int
"""Fewest query tokens that a layer is calibrated with."""

QUERY_TOKENS: int
"""Query tokens after which a layer's calibration is frozen."""

_Tensor = TypeVar("_Tensor")
_State = Literal["no", "own prompt", "frozen", "file"]

@type_check_only
class LayerSummary(TypedDict):
    """What is known of a layer of a calibration."""

    layer: int
    """The model's number of it."""
    num_kv_heads: int
    head_dim: int
    query_tokens: int
    """Seen; from a file, those of the layer that had seen the fewest."""
    state: _State
    rotated_heads: int | None
    """Heads in whose rotated frame rounding is expected to cost less; `None` while there is nothing to tell by."""

@type_check_only
class CacheStats(TypedDict):
    """Blocks and bytes of a cache; lists have an entry a layer."""

    blocks_in_use: int
    peak_blocks: int
    free_blocks: int | None
    """`None` when the pool grows."""
    partial_blocks: int
    """Blocks with room left."""
    open_pages: int
    """Of blocks that are not sealed; 0 in formats that never are."""
    peak_open_pages: int
    bytes_in_use: int
    """Of blocks at rest, and open pages."""
    peak_bytes: int
    allocated_bytes: int
    """Address space: a page takes memory when it is first used."""
    bytes_per_block: int
    bytes_per_open_page: int
    bytes_per_token: float
    """At rest."""
    num_sequences: int
    cow_copies: int
    sealed: int
    """Blocks, so far."""
    unsealed: int
    first_page_tokens: int | None
    """What the statistics of the first page of a sequence that was opened or refitted last were taken over; `None`
    before there is one, and in `raw`.
    """
    calibrated: _State
    """The least of the layers."""
    saturation: list[float | None]
    """The share of the K codes of tiles that were clamped to the ends of their grid; `None` before there is a tile."""
    drift: list[float | None]
    """The deviation of K over the one that its pages were opened with, over the latest 128 or so tokens: 1 where it
    fits, `None` before there is anything to tell.
    """
    out_of_range_tokens: list[int]
    """Tokens that are stored wrong because float16 does not hold the scale or zero point of their K or V (V beyond
    65,504 or all within some 1e-4 of each other, K as large in a tile), counted where they are written to a page and
    again where their block is sealed.
    """

@type_check_only
class CacheSummary(TypedDict):
    """What a file holds of a cache: its settings, and bytes of all layers together."""

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
    """Id, tokens, first token held."""
    sealed_blocks: int
    open_blocks: int
    """Blocks that are pages: partly filled, not sealed yet, or of a format that never seals."""
    tile_bytes: int
    page_bytes: int
    bytes_per_token: float
    """At rest."""

@type_check_only
class Capacity(TypedDict):
    """What fits in a memory."""

    sequence_bytes: int
    """Of one running sequence, whole blocks and its open pages."""
    open_bytes: int
    """The part of it that no token in reach uses at rest."""
    open_page_bytes: int
    """The part of that which is open pages, two in every layer and key/value head of formats that seal."""
    tokens: int
    sequences: int

@final
class Calibration:
    """What sealing knows of a model: learned from its first tokens by all its caches together, or out of a file.

    It belongs to one model and holds, per layer and key/value head, how rounding errors of K are passed on so that they
    cancel where the queries look, and the mean and deviation of the K channels. Layers are numbered as in the model. A
    layer is calibrated when its first block is about to seal, from at least `FIRST_TOKENS` tokens; again when the
    tokens that it has seen have doubled; and is frozen at `QUERY_TOKENS`: nothing changes it any more. Copies, deep
    ones too, are the calibration itself.
    """

    def __new__(cls) -> Self: ...
    @staticmethod
    def load(path: str | PathLike[str], fingerprint: str | None = None) -> Calibration:
        """The calibration in a file that `save` wrote.

        Args:
            path: a safetensors file. Every byte of it is checked, by its checksum and by what it means.
            fingerprint: that of the model it is for; `None` takes any.

        Raises:
            CalibrationError: not such a file, damaged, of another version, or of another model.
        """
    def save(self, path: str | PathLike[str], fingerprint: str, model: str = "") -> None:
        """Writes the frozen layers, whole or not at all. The same layers make the same bytes.

        Args:
            path: the file, in a folder that exists; one that is there is replaced.
            fingerprint: identifies the model; `load` compares it.
            model: the model's name, for people.

        Raises:
            ConfigError: no layer is frozen.
            CalibrationError: the file cannot be written.
        """
    @property
    def state(self) -> str:
        """`no`, `own prompt`, `frozen` or `file`: how far its least layer has come; `no` without layers."""
    @property
    def fingerprint(self) -> str | None:
        """What its file says of the model; `None` if it is from no file."""
    @property
    def model(self) -> str | None:
        """The model's name in its file; `None` if it is from no file."""
    def layers(self) -> list[LayerSummary]:
        """The layers seen or loaded, in order."""
    def wanted(self, layer: int) -> int:
        """Query tokens that a layer would still take: `QUERY_TOKENS` less those seen, 0 once frozen or loaded."""
    def freeze(self) -> None:
        """Calibrates and freezes every layer with what it has seen.

        Raises:
            ConfigError: nothing was seen, or a layer has seen fewer than `FIRST_TOKENS` tokens; none was frozen.
        """
    def __copy__(self) -> Calibration: ...
    def __deepcopy__(self, _memo: object) -> Calibration: ...

@final
class PagedKvCache:
    """Pages of one group of layers: layers of the same heads, `head_dim` and window, which share block tables.

    A *sequence* is a list of tokens, stored in *blocks* of `block_size`. A *step* takes some sequences forward:
    `begin_step` finds the blocks of its tokens (all or none), each layer appends and attends, and `commit` makes the
    tokens the sequences' own. While a step is open its sequences cannot be forked, freed, truncated or stepped.

    Args:
        num_layers: layers of the group.
        num_kv_heads: key/value heads of a layer.
        head_dim: channels of a head, a multiple of 16 up to 256.
        format: how blocks hold their tokens, one of `kvarn_rs.FORMATS`. `int4`, `int3` and `int2` *seal*: a block is an
            INT8 page while it has room, and a tile from the step after it is full on (a prefill seals what it writes
            whole, but the last full block, at once).
        block_size: tokens of a block: 16, 32, 64 or 128.
        num_blocks: blocks of the pool, refused at once if they cannot be had; `None` grows as needed.
        num_open_pages: pages for blocks that are not sealed, in formats that seal: two for each sequence that may
            decode a token at a time, four for one that takes more in a step; `None` grows as needed.
        dtype: element type of `raw` pages: `float32`, `float16` or `bfloat16`. Other formats take any.
        window: tokens that a query sees, itself included; blocks wholly outside are released as steps begin.
        calibration: what sealing knows of the model. The cache goes on with it, from the queries that `append` is
            given, until it is frozen. `None`: tiles are rounded to nearest.
        layers: the model's numbers of the cache's layers, under which the calibration keeps them; `None`: 0, 1, ...
        codec: with `raw`, one of `kvarn_rs.CODECS`, which quantizes the pages in place, to compare formats by.

    Raises:
        UnknownFormatError, ConfigError, UnsupportedError: naming the setting and what it may be.
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
        """Uses a calibration from now on, as the arguments of the constructor say.

        Raises:
            ConfigError: not a number for each layer.
        """
    def sequences(self) -> list[int]:
        """The ids of the sequences not yet freed, ascending."""
    def new_sequence(self) -> int:
        """A sequence without tokens."""
    def fork(self, sequence: int) -> int:
        """A sequence with the same tokens; blocks are shared until one of the two writes into them.

        Raises:
            UnknownSequenceError, OpenStepError
        """
    def free(self, sequence: int) -> None:
        """Gives the sequence's blocks back.

        Raises:
            UnknownSequenceError, OpenStepError
        """
    def truncate(self, sequence: int, length: int, *, unseal: bool = False) -> None:
        """Keeps the first `length` tokens.

        Args:
            sequence: its id.
            length: tokens to keep.
            unseal: where `length` is within a sealed block, decode its tokens into a page again, and count that.

        Raises:
            RollbackError: it has fewer, or the window has released tokens that the next query would see, or without
                `unseal` the end is within a sealed block.
            OutOfBlocksError, OutOfOpenPagesError: no room to unseal.
            UnknownSequenceError, OpenStepError
        """
    def check_truncate(self, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """Raises what `truncate` with `unseal` of each, one after the other, would raise; changes nothing.

        Raises:
            RollbackError, OutOfBlocksError, OutOfOpenPagesError, UnknownSequenceError, OpenStepError, ConfigError
        """
    def seq_len(self, sequence: int) -> int:
        """Committed tokens."""
    def first_held(self, sequence: int) -> int:
        """First token that the window has not released; 0 without a window."""
    def block_table(self, sequence: int) -> list[int]:
        """Block ids in order; 2**32 - 1 where the window released a block."""
    def match_prefix(self, token_ids: Sequence[int]) -> int:
        """A new sequence that shares the longest published prefix: whole blocks, and never the last token.

        `seq_len` says how many tokens it found.
        """
    def publish_prefix(self, sequence: int, token_ids: Sequence[int]) -> int:
        """Makes the full blocks of a sequence, whose tokens are `token_ids`, findable; returns how many are new.

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
        """Finds the blocks of a step's tokens, or raises and changes nothing.

        Args:
            sequences: their ids, in the order of the step's rows.
            num_new: rows of each sequence (an int: the same for all); every row is a token.
            mask: in place of `num_new`, a bool tensor `[B, T]`: token or padding. Padding takes no slot.
            retain: release nothing out of the window, so that a later `truncate` may come back to it.

        Raises:
            OutOfBlocksError, OutOfOpenPagesError: with `needed` and `free`.
            UnknownSequenceError, OpenStepError, ConfigError
        """
    def dequantize(self, layer: int, sequence: int, k: object, v: object, *, start: int = 0) -> None:
        """Decodes tokens `start..start + n` into `k` and `v`, `[1, num_kv_heads, n, head_dim]` each.

        Tokens of an open step count once `layer` has been appended.

        Raises:
            ShapeError: tokens that the sequence does not hold.
            UnknownSequenceError, DtypeError, StrideError, DeviceError
        """
    def stats(self) -> CacheStats:
        """Blocks and bytes; bytes are of whole blocks, every layer together."""
    def save(self, path: str | PathLike[str]) -> None:
        """Writes every sequence, to the bit, into a file, whole or not at all; `load` has them again.

        Codes are in the canonical order of the format, not in that of this machine; the same tokens written alike make
        the same bytes. Kept are the settings, and of the sequences ids, lengths and blocks, shared ones once; not kept
        are the calibration, which is the model's, published prefixes, and figures.

        Args:
            path: the file, in a folder that exists; one that is there is replaced.

        Raises:
            OpenStepError: while a step is open.
            UnsupportedError: pages that a codec quantizes in place.
            CacheFileError: the file cannot be written.
        """
    @staticmethod
    def load(
        path: str | PathLike[str], *, calibration: Calibration | None = None, layers: Sequence[int] | None = None
    ) -> PagedKvCache:
        """The cache in a file that `save` wrote. Every byte of it is checked, by its checksum and by what it means.

        A bounded pool takes the memory of its unused blocks when a step first needs it.

        Args:
            path: a safetensors file.
            calibration: as for the constructor.
            layers: as for the constructor.

        Raises:
            CacheFileError: not such a file, damaged, of another version, or of more than one cache.
            OutOfMemoryError, ConfigError
        """
    def to_bytes(self) -> bytes:
        """What `save` writes; also how a cache is pickled, without its calibration.

        Raises:
            OpenStepError, UnsupportedError, OutOfMemoryError
        """
    @staticmethod
    def from_bytes(data: bytes) -> PagedKvCache:
        """The cache in what `to_bytes` gave.

        Raises:
            CacheFileError, OutOfMemoryError
        """
    def __reduce__(self) -> tuple[Callable[[bytes], PagedKvCache], tuple[bytes]]: ...
    def reset(self) -> None:
        """Forgets every sequence, step and prefix; keeps the memory."""
    def copy(self) -> PagedKvCache:
        """A cache with the same sequences, of its own memory.

        Raises:
            OpenStepError: while a step is open.
        """
    def __copy__(self) -> PagedKvCache: ...
    def __deepcopy__(self, _memo: object) -> PagedKvCache: ...

@final
class Step:
    """A step in progress. As a context manager it commits at the end, and aborts when an exception leaves the block.

    A step that is garbage collected while open is aborted.
    """

    @property
    def num_rows(self) -> int:
        """Rows of its tensors, padding included."""
    @property
    def is_open(self) -> bool:
        """Neither committed nor aborted."""
    def append(self, layer: int, k: object, v: object, q: object = None) -> None:
        """Writes a layer's keys and values, `[B, num_kv_heads, T, head_dim]` each, with `B * T = num_rows`.

        Sequences of different lengths are packed: `[1, num_kv_heads, num_rows, head_dim]`. `raw` pages take their own
        dtype only. Blocks that are due are sealed. A calibration that is not frozen learns from the step's queries `q`,
        `[B, num_q_heads, T, head_dim]` (after rotary embedding, as attention gets them); without them from nothing. It
        keeps what it learned of a step that is aborted.

        Raises:
            NonFiniteError: naming row, head and channel; nothing was written.
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
    ) -> _Tensor:
        """Causal attention of the step's queries to everything their sequences hold, the step's tokens included.

        Args:
            layer: one that this step has appended.
            q: `[B, num_q_heads, T, head_dim]`; `num_q_heads` is a multiple of `num_kv_heads`.
            k: the step's own keys again, as appended, or `None`. With them, the tokens of a prefill (`is_prefill`)
                attend to each other unquantized; without, everything is read from pages.
            v: the step's own values again, or `None`.
            out: receives the result, of `q`'s shape; made like `q` when `None`. Rows of padding become zeros.
            scale: factor on the scores; `head_dim ** -0.5` when `None`.
            window: tokens that a query sees, itself included, where smaller than the cache's.
            softcap: scores become `softcap * tanh(scores / softcap)`.
            sinks: `[num_q_heads]`, a logit that takes part in the softmax and has no value.

        Raises:
            OpenStepError: the layer has no keys and values of this step yet.
            ShapeError, DtypeError, StrideError, DeviceError, ConfigError, StaleStepError
        """
    def commit(self) -> None:
        """Makes the step's tokens the sequences' own.

        Raises:
            OpenStepError: a layer has not been appended; the step stays open.
            StaleStepError
        """
    def abort(self) -> None:
        """Forgets the step: its sequences hold the tokens that they held before it.

        Blocks that left the window when it began stay released.

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

def save_caches(path: str | PathLike[str], caches: Sequence[PagedKvCache], note: str = "") -> None:
    """Writes several caches, and a text of whoever keeps them together, into one file. See `PagedKvCache.save`.

    Raises:
        ConfigError: a cache is named twice.
        OpenStepError, UnsupportedError, CacheFileError
    """

def caches_to_bytes(caches: Sequence[PagedKvCache], note: str = "") -> bytes:
    """What `save_caches` writes.

    Raises:
        ConfigError, OpenStepError, UnsupportedError, OutOfMemoryError
    """

def load_caches(path: str | PathLike[str]) -> tuple[list[PagedKvCache], str]:
    """The caches and the text that `save_caches` wrote. See `PagedKvCache.load`.

    Raises:
        CacheFileError, OutOfMemoryError
    """

def caches_from_bytes(data: bytes) -> tuple[list[PagedKvCache], str]:
    """The caches and the text that `caches_to_bytes` gave.

    Raises:
        CacheFileError, OutOfMemoryError
    """

def inspect_caches(path: str | PathLike[str]) -> tuple[list[CacheSummary], str]:
    """Checks a file of caches, every byte of it, without taking memory for them; gives what it holds, and the text.

    Raises:
        CacheFileError, OutOfMemoryError
    """

def file_kind(path: str | PathLike[str]) -> str:
    """`kvarn cache` or `kvarn calibration`: what a file says it is; nothing else of it is read.

    Raises:
        ConfigError: it cannot be read, or says neither.
    """

def formats() -> list[str]:
    """Names of the cache formats, from the largest to the smallest."""

def codecs() -> list[str]:
    """Names of the codecs that `raw` pages can be quantized with in place, to compare formats by."""

def codec_bytes_per_token(codec: str, head_dim: int, block_size: int = 128) -> float:
    """Bytes that a token and key/value head would take in a codec's scheme.

    Raises:
        UnknownFormatError, UnsupportedError, ConfigError
    """

def simd_level() -> str:
    """The SIMD level of new caches: the machine's fastest, or the one that `KVARN_SIMD` names."""

def first_seen(position: int, window: int | None) -> int:
    """First position that the query at `position` sees, itself included, under a window of so many tokens or `None`."""

def is_prefill(block_size: int, context_len: int, num_new: int) -> bool:
    """Whether `num_new` tokens after `context_len` are a prefill: they attend to each other unquantized.

    True for more than `DECODE_TOKENS`, and while half of a sequence's first block is not written.
    """

def num_threads() -> int:
    """Threads that the kernels use: `RAYON_NUM_THREADS`, or one a core."""

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
    """What fits in a memory when every sequence is `context` tokens long.

    Args:
        storage: a cache format (`raw` in bf16), or `bf16` or `fp8` for an engine's own cache.
        groups: (`num_layers`, `num_kv_heads`, `head_dim`, `window` or `None`) of layers that store tokens alike.
        block_size: tokens of a block.
        context: tokens of a sequence.
        memory_bytes: memory for the cache.
        max_sequences: sequences that may run at once; `None`: as many as fit.

    Raises:
        UnknownFormatError, UnsupportedError, ConfigError
    """
