"""The layers of one KV cache group: their engine, and which of its blocks requests still need."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from kvarn_rs import Engine
from kvarn_rs._core import first_seen
from kvarn_rs.errors import OpenStepError

from . import compat, compat_cpu, formats
from .calibration import calibration_of
from .prefill import PrefillAttention

_logger = logging.getLogger("vllm.kvarn_rs")


class StepRange(NamedTuple):
    """Tokens of the sequences of a step, or of a pass of a draft model, `[num_sequences]`, int32."""

    context_lens: torch.Tensor
    ends: torch.Tensor


class Group:
    """An engine over vLLM's blocks of some layers, and the lengths of the requests that it has seen.

    vLLM says which tokens of a step it keeps only with the next one, so that a step is committed then: `settle`.
    """

    def __init__(self, layers: Mapping[str, Any], config: Any, model: Any, num_groups: int) -> None:
        """Lends the blocks of layers to an engine.

        Args:
            layers: vLLM's modules by their names. Those that read the blocks of another layer are left out.
            config: vLLM's.
            model: vLLM's config of their model: the one that is served, or its draft model.
            num_groups: KV cache groups, which share the pool of blocks.

        Raises:
            CalibrationError: the calibration file that was named is of another model.
        """
        layers = {name: layer for name, layer in layers.items() if layer.impl.kv_sharing_target is None}
        first = next(iter(layers.values()))
        impl = first.impl
        blocks = [_records(layer.kv_cache) for layer in layers.values()]
        seals = formats.seals(impl.format)
        window = _widest(layer.impl.window for layer in layers.values())
        self._index = {name: index for index, name in enumerate(layers)}
        numbers = [compat.layer_number(name) for name in layers]
        rank, num_ranks = compat.tensor_parallel()
        found = calibration_of(config, model, numbers, rank, num_ranks) if seals else None
        self._engine = Engine(
            num_kv_heads=impl.num_kv_heads,
            head_dim=impl.head_size,
            pages=[layer.impl.open_pages for layer in layers.values()] if seals else blocks,
            tiles=blocks if seals else None,
            format=impl.format,
            block_size=formats.BLOCK_SIZE,
            dtype=str(first.dtype).removeprefix("torch."),
            window=window,
            calibration=None if found is None else found.calibration,
            layers=numbers,
        )
        num_tokens = max(model.max_model_len, config.scheduler_config.max_num_batched_tokens)
        self._prefill = None
        if compat_cpu.has_kernels(impl.head_size, first.dtype):
            self._prefill = PrefillAttention(self._engine, first.dtype, num_tokens)
        self._seals = seals
        self._window = window
        self._num_open_pages = 0 if impl.open_pages is None else len(impl.open_pages)
        self._step = self._pass = StepRange(*2 * (torch.empty(0, dtype=torch.int32),))
        self._lengths: dict[str, int] = {}
        if rank == 0:
            _log(self._engine, blocks, impl, num_groups, None if found is None else found.origin)

    @property
    def engine(self) -> Engine:
        """The engine of the layers."""
        return self._engine

    @property
    def prefill(self) -> PrefillAttention | None:
        """Attention of prefills by vLLM's kernels; None where it has none for such heads."""
        return self._prefill

    @property
    def num_open_pages(self) -> int:
        """Pages for blocks that are not sealed; 0 in formats that never seal."""
        return self._num_open_pages

    @property
    def num_requests(self) -> int:
        """Requests whose open pages are followed; 0 in formats that never seal."""
        return len(self._lengths)

    def layer(self, name: str) -> tuple[Engine, int]:
        """The engine and a layer's index in it."""
        return self._engine, self._index[name]

    def begin(self, block_tables: torch.Tensor, context_lens: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Begins a step; see `Engine.begin`.

        Returns:
            The tokens of each sequence that the engine has before the step: `context_lens`, if not said otherwise.
        """
        self._step = self._pass = StepRange(context_lens, context_lens + starts.diff())
        self._engine.begin(block_tables, context_lens, starts)
        return context_lens

    def commit(self, accepted: list[int]) -> None:
        """Commits so many tokens of each sequence.

        Raises:
            OpenStepError: layers of the step have not run.
        """
        try:
            self._engine.commit(accepted)
        except OpenStepError as error:
            names = ", ".join(f"{index} {name}" for name, index in self._index.items())
            raise OpenStepError(f"kvarn-rs: vLLM has ended a step of requests, but {error} of ({names})") from error

    def settle(self, known: Iterable[tuple[str, int, list[int]]], ended: Mapping[str, list[int]]) -> None:
        """Commits the last step, and releases the blocks of requests that finished or were preempted.

        Their full blocks are sealed, since others may find them by their prefix.

        Args:
            known: of each sequence of the last step, its request, how many of its tokens are not rejected drafts, and
                its blocks.
            ended: blocks of each request that finished or was preempted.

        Raises:
            OpenStepError: layers of the step have not run.
        """
        if self._engine.is_open:
            self._commit_step(list(known))
        if not self._seals:
            return
        found = [(blocks, self._lengths.pop(name)) for name, blocks in ended.items() if name in self._lengths]
        if found:
            visible = [block for blocks, length in found for block in blocks[self._first_visible(length) :]]
            self._seal_and_release(found, visible)

    def _commit_step(self, known: list[tuple[str, int, list[int]]]) -> None:
        """Commits the last step or pass, of whose tokens vLLM has kept some."""
        accepted, hidden, unused = [], [], []
        ranges = (*self._step, *self._pass)
        lengths = {}
        for (request, num_tokens, blocks), first, step_end, context, end in zip(
            known, *(each.tolist() for each in ranges), strict=True
        ):
            lengths[request] = length = min(step_end, num_tokens)
            accepted.append(max(length - context, 0))
            unused += blocks[-(-length // formats.BLOCK_SIZE) : -(-end // formats.BLOCK_SIZE)]
            newly_hidden = range(self._first_visible(first), self._first_visible(length))
            hidden += [(blocks, (index + 1) * formats.BLOCK_SIZE) for index in newly_hidden]
        self.commit(accepted)
        if not self._seals:
            return
        self._lengths.update(lengths)
        self._engine.release(unused)  # drafts alone were in them
        if hidden:  # vLLM may give them to others from now on
            self._seal_and_release(hidden, [blocks[length // formats.BLOCK_SIZE - 1] for blocks, length in hidden])

    def _first_visible(self, length: int) -> int:
        """Index of the first block that the window of a sequence does not hide."""
        return first_seen(length, self._window) // formats.BLOCK_SIZE

    def _seal_and_release(self, sequences: list[tuple[list[int], int]], blocks: list[int]) -> None:
        """Seals the full blocks of sequences, given by their blocks and lengths, and frees the pages of blocks."""
        self._seal(sequences)
        self._engine.release(sorted(set(blocks)))

    def _seal(self, sequences: list[tuple[list[int], int]]) -> None:
        """A step without tokens: it seals the full blocks of its sequences."""
        full = [blocks[: length // formats.BLOCK_SIZE] for blocks, length in sequences]
        width = max(map(len, full))
        if not width:
            return
        tables = torch.tensor([blocks + [0] * (width - len(blocks)) for blocks in full], dtype=torch.int32)
        lens = torch.tensor([len(blocks) * formats.BLOCK_SIZE for blocks in full], dtype=torch.int32)
        self._engine.begin(tables, lens, torch.zeros(len(full) + 1, dtype=torch.int32))
        nothing = torch.empty(0, self._engine.num_kv_heads, self._engine.head_dim)
        for layer in range(self._engine.num_layers):
            self._engine.append(layer, nothing, nothing)
        self._engine.commit()


def _widest(windows: Iterable[int | None]) -> int | None:
    """The window of the layers that see most; None if one of them sees everything."""
    known = list(windows)
    return None if None in known else max(window for window in known if window is not None)


def _records(blocks: torch.Tensor) -> torch.Tensor:
    """Blocks as `[num_blocks, num_kv_heads, bytes]`, of vLLM's `[num_blocks, num_kv_heads, block_size, bytes]`."""
    return blocks.view(torch.uint8).flatten(2)


def _log(engine: Engine, blocks: list[torch.Tensor], impl: Any, num_groups: int, calibration: str | None) -> None:
    # A sequence has blocks of each group, so that how many tokens fit depends on windows: vLLM says it.
    fit = (
        f": {len(blocks[0]) * formats.BLOCK_SIZE} tokens" if num_groups == 1 else f" for {num_groups} groups of layers"
    )
    bytes_per_token = engine.num_layers * engine.num_kv_heads * blocks[0].shape[2] / formats.BLOCK_SIZE
    open_pages = ""
    if impl.open_pages is not None:
        mebibytes = engine.num_layers * impl.open_pages.nbytes / 2**20
        open_pages = (
            f"; {len(impl.open_pages)} open pages a layer, {mebibytes:.1f} MiB beside vLLM's blocks; "
            f"calibration: {calibration}"
        )
    _logger.info(
        "kvarn-rs: %s, %d layers, %.0f bytes a token, %d blocks of %d tokens%s%s",
        engine.format,
        engine.num_layers,
        bytes_per_token,
        len(blocks[0]),
        formats.BLOCK_SIZE,
        fit,
        open_pages,
    )
