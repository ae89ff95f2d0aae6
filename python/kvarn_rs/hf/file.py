"""The file of a `KvarnCache`: what is written, and what is read, checked.

The file is the core's (`kvarn_rs._core.save_caches`): one cache for each layer group, and a note of what the core does
not know, as JSON::

    {"writer": "kvarn_rs.hf", "version": 1, "model_type", "fingerprint" (of the model, or null),
     "format", "block_size", "num_blocks", "num_open_pages",
     "empty_layers": [int] (which use the K and V of others),
     "behind": [[layer, positions that it has]] (the layers that forwards left out, see `forward`),
     "groups": [{"layers": [int], "window", "shape": [num_kv_heads, head_dim] (as the config says),
                 "cache": index or null before the first forward, "length", "sequences": [id of each batch row],
                 "padding": ["1" for padding, "0" for a token, by position; of each batch row] or null,
                 "record_past", "grew"}]}

Everything in it is checked before it is used: see `LayerGroup` and `Positions` for how the numbers of a group
hang together.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from kvarn_rs import Calibration, PagedKvCache
from kvarn_rs.errors import CacheFileError, KvarnError, UnsupportedError

from .compat import keeps_nothing
from .decoder import Decoder
from .fingerprint import Origin, fingerprint
from .forward import Forwards
from .group import GroupPlan, LayerGroup, Shape
from .positions import Positions
from .settings import PageSettings

WRITER = "kvarn_rs.hf"
VERSION = 1
_SETTINGS = ("format", "block_size", "num_blocks", "num_open_pages")


def contents(forwards: Forwards, origin: Origin, default_layers: dict[int, Any]) -> tuple[list[PagedKvCache], str]:
    """The core caches of the groups, and the note. default_layers: the cache's layers that are not paged.

    Raises:
        UnsupportedError: one of those holds something.
    """
    others = [f"{idx} ({type(layer).__name__})" for idx, layer in default_layers.items() if not keeps_nothing(layer)]
    if others:
        raise UnsupportedError(f"layers that are not paged cannot be saved: {', '.join(others)}")
    cores: list[PagedKvCache] = []
    groups: list[dict[str, Any]] = []
    for plan in forwards.plans:
        group = forwards.groups.get(plan)
        positions = Positions() if group is None else group.positions
        padding = None if positions.padding is None else positions.padding.int().tolist()
        groups.append(
            {
                "layers": plan.layers,
                "window": plan.window,
                "shape": plan.shape,
                "cache": None if group is None else len(cores),
                "length": positions.length,
                "sequences": [] if group is None else group.sequences,
                "padding": None if padding is None else ["".join(map(str, row)) for row in padding],
                "record_past": plan.record_past,
                "grew": group is not None and group.grew,
            }
        )
        cores += [] if group is None else [group.core]
    note = {
        "writer": WRITER,
        "version": VERSION,
        "model_type": origin.model_type,
        "fingerprint": origin.fingerprint,
        **{name: getattr(forwards.plans[0].settings, name) for name in _SETTINGS},
        "empty_layers": list(default_layers),
        "behind": sorted(forwards.behind.items()),
        "groups": groups,
    }
    return cores, json.dumps(note)


@contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Puts the name of a file before what is wrong with it."""
    try:
        yield
    except CacheFileError as error:
        raise CacheFileError(f"{os.fspath(path)}: {error}") from None


@dataclass(frozen=True)
class SavedGroup:
    """The fields of a group, see the module, each of its type. cache: the number of its core cache, or None."""

    layers: list[int]
    window: int | None
    shape: Shape
    cache: int | None
    length: int
    sequences: list[int]
    padding: list[str] | None
    record_past: bool
    grew: bool


class SavedCache:
    """The content of a file, whose fields have the types that they should.

    Attributes:
        cores: the core caches.
        origin: the model.
        settings: those of the cache.
        groups: its layer groups.
        behind: layers that lack positions, and how many they have.

    Raises:
        CacheFileError: naming what is odd.
    """

    def __init__(self, cores: list[PagedKvCache], note: str) -> None:
        self.cores = cores
        try:
            found = json.loads(note)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("writer") != WRITER:
            _refuse("a cache file, but not of a KvarnCache: kvarn_rs.PagedKvCache.load reads those of one core cache")
        if found.get("version") != VERSION:
            _refuse(f"a KvarnCache of version {found.get('version')!r}, this release reads version {VERSION}")
        model_type: str = _field(found, "model_type", str)
        known: str | None = _field(found, "fingerprint", str, None)
        if known is not None and not re.fullmatch("[0-9a-f]{64}", known):
            _refuse(f"fingerprint is {known!r:.80}, not 64 hexadecimal digits")
        self.origin = Origin(model_type, known=known)
        self.settings = _settings(found)
        self.groups = [_group(entry) for entry in _field(found, "groups", list)]
        layers = [layer_idx for group in self.groups for layer_idx in group.layers]
        layers = sorted(layers + _numbers(found, "empty_layers", int))
        if not layers or layers != list(range(len(layers))) or any(not group.layers for group in self.groups):
            _refuse(f"groups of the layers {layers}: not one after the other from 0 on")
        self.behind: dict[int, int] = _behind(found, self.groups)

    def check_decoder(self, decoder: Decoder) -> None:
        """CacheFileError if the file is not of this model, as far as both are known."""
        model_type = decoder.config.model_type
        if model_type != self.origin.model_type:
            _refuse(f"a cache of another model: of type {self.origin.model_type!r}, this one is {model_type!r}")
        expected = decoder.groups()
        found = [(group.layers, group.window, group.shape) for group in self.groups]
        if found != expected:
            _refuse(
                "a cache of another model: its layers, windows and [num_kv_heads, head_dim] are "
                f"{json.dumps(found)}, this model's {json.dumps(expected)}"
            )
        if self.origin.fingerprint is not None and decoder.model is not None:
            known = fingerprint(decoder.model)
            if known != self.origin.fingerprint:
                _refuse(f"a cache of another model: of fingerprint {self.origin.fingerprint}, this model's is {known}")

    def plans(self, calibration: Calibration) -> list[GroupPlan]:
        """The plans of the groups, for a cache whose model is not at hand."""
        return [GroupPlan(group.layers, group.window, group.shape, self.settings, calibration) for group in self.groups]

    def fill(self, forwards: Forwards) -> None:
        """Makes the groups of a new cache, with the plans of this one; CacheFileError where numbers do not fit."""
        used = [group.cache for group in self.groups if group.cache is not None]
        if sorted(used) != list(range(len(self.cores))):
            _refuse(f"{len(self.cores)} caches, and groups of the caches {used}")
        for plan, saved in zip(forwards.plans, self.groups, strict=True):
            plan.record_past = saved.record_past
            core = None if saved.cache is None else self.cores[saved.cache]
            if core is not None:
                _check_core(plan, core)
            _check_rows(saved, core)
            if core is not None:
                core.set_calibration(plan.calibration, plan.layers)
                positions = Positions(saved.length, _padding(saved))
                forwards.groups[plan] = LayerGroup(plan, core, saved.sequences, positions, saved.grew)
        length = max(group.length for group in self.groups)
        sizes = sorted({(group.length, len(group.sequences)) for group in self.groups})
        num_rows = max(rows for _, rows in sizes)
        for group in self.groups:
            # One whose layers were all left out has fewer positions, and no rows if they never came.
            wanted = max(self.behind.get(layer_idx, length) for layer_idx in group.layers)
            if group.length != wanted or len(group.sequences) not in ({num_rows} if wanted else {0, num_rows}):
                _refuse(f"groups of different (positions, rows): {sizes}, of which layers {group.layers} have {wanted}")
        forwards.behind = self.behind


def _settings(found: dict[str, Any]) -> PageSettings:
    try:
        return PageSettings(
            format=_field(found, "format", str),
            block_size=_field(found, "block_size", int),
            num_blocks=_field(found, "num_blocks", int, None),
            num_open_pages=_field(found, "num_open_pages", int, None),
        )
    except KvarnError as error:
        raise CacheFileError(str(error)) from None


def _refuse(why: str) -> NoReturn:
    raise CacheFileError(why)


def _field(found: dict[str, Any], name: str, *allowed: Any) -> Any:
    """A field of one of the types (None for null); whole numbers are not negative and fit 63 bits."""
    value = found.get(name)
    if not any(value is None if kind is None else type(value) is kind for kind in allowed) or name not in found:
        known = " or ".join("null" if kind is None else kind.__name__ for kind in allowed)
        _refuse(f"{name} is {value!r:.40}, not {known}")
    if type(value) is int and not 0 <= value < 2**63:
        _refuse(f"{name} is {value}, out of range")
    return value


def _numbers(found: dict[str, Any], name: str, *allowed: Any) -> list[Any]:
    entries = _field(found, name, list)
    return [_field({name: entry}, name, *allowed) for entry in entries]


def _behind(found: dict[str, Any], groups: list[SavedGroup]) -> dict[int, int]:
    entries: list[Any] = [_numbers({"behind": entry}, "behind", int) for entry in _field(found, "behind", list)]
    paged = {layer_idx for group in groups for layer_idx in group.layers}
    if any(len(entry) != 2 or entry[0] not in paged for entry in entries):
        _refuse(f"behind is {entries}: not of layers and positions")
    return dict(entries)


def _group(found: Any) -> SavedGroup:
    if not isinstance(found, dict):
        _refuse(f"a group is {found!r:.40}")
    shape = tuple(_numbers(found, "shape", int, None))
    if len(shape) != 2:
        _refuse(f"shape is {list(shape)}, not [num_kv_heads, head_dim]")
    padding = _field(found, "padding", list, None)
    return SavedGroup(
        layers=_numbers(found, "layers", int),
        window=_field(found, "window", int, None),
        shape=(shape[0], shape[1]),
        cache=_field(found, "cache", int, None),
        length=_field(found, "length", int),
        sequences=_numbers(found, "sequences", int),
        padding=None if padding is None else _numbers(found, "padding", str),
        record_past=_field(found, "record_past", bool),
        grew=_field(found, "grew", bool),
    )


def _check_core(plan: GroupPlan, core: PagedKvCache) -> None:
    names = ("num_layers", "window", *_SETTINGS)
    settings = {name: getattr(plan.settings, name) for name in _SETTINGS}
    expected = {"num_layers": len(plan.layers), "window": plan.window, **settings}
    found = {name: getattr(core, name) for name in names}
    if found != expected:
        _refuse(f"a cache of {found} for the layers {plan.layers} of {expected}")


def _check_rows(saved: SavedGroup, core: PagedKvCache | None) -> None:
    """CacheFileError unless every row has as many tokens and as much padding as the group's length says."""
    length, sequences, rows = saved.length, saved.sequences, saved.padding
    num_tokens_of = {} if core is None else {sequence: core.seq_len(sequence) for sequence in core.sequences()}
    if sorted(sequences) != list(num_tokens_of):
        _refuse(f"rows of the sequences {sequences}, its cache has {list(num_tokens_of)}")
    if not sequences and length:
        _refuse(f"{length} positions of no row")
    if rows is not None:
        width = len(rows[0]) if rows else 0
        well_formed = all(len(row) == width and not row.strip("01") for row in rows)
        if len(rows) != len(sequences) or not well_formed or not any(row.endswith("1") for row in rows):
            _refuse(f"padding of {len(rows)} rows for {len(sequences)}: not of one width, or of other than 0 and 1")
    for row, sequence in enumerate(sequences):
        num_tokens, num_padding = num_tokens_of[sequence], 0 if rows is None else rows[row].count("1")
        width = 0 if rows is None else len(rows[row])
        if num_tokens + num_padding != length or width > length:
            _refuse(f"row {row}: {num_tokens} tokens and {num_padding} of padding at {length} positions")


def _padding(saved: SavedGroup) -> torch.Tensor | None:
    rows = saved.padding
    return None if rows is None else torch.tensor([[position == "1" for position in row] for row in rows])
