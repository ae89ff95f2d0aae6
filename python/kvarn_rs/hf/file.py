"""A `KvarnCache` as a file, and back.

The file is the core's (`kvarn_rs._core.save_caches`): one cache for each layer group, and a note of what the core does
not know, as JSON::

    {"writer": "kvarn_rs.hf", "version": 1, "model_type", "fingerprint" (of the model, or null),
     "format", "block_size", "num_blocks", "num_open_pages",
     "empty_layers": [int] (which use the K and V of others),
     "behind": [[layer, positions that it has]] (the layers that forwards left out, see `store`),
     "groups": [{"layers": [int], "window", "shape": [num_kv_heads, head_dim] (as the config says),
                 "cache": index or null before the first forward, "length", "sequences": [id of each batch row],
                 "padding": ["1" for padding, "0" for a token, by position; of each batch row] or null,
                 "record_past", "grew"}]}

Everything in it is checked before it is used: see `LayerGroup` for what the numbers of a group have to do with each
other.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from kvarn_rs import Calibration, _core
from kvarn_rs.errors import CacheFileError, KvarnError, UnsupportedError

from .calibration import fingerprint, of_fingerprint
from .compat import keeps_nothing
from .decoder import Decoder, Origin, check_pages, group_layers
from .group import LayerGroup
from .layer import KvarnLayer

if TYPE_CHECKING:
    from .cache import KvarnCache

    AnyCache = TypeVar("AnyCache", bound=KvarnCache)

WRITER = "kvarn_rs.hf"
VERSION = 1
_SETTINGS = ("format", "block_size", "num_blocks", "num_open_pages")


def save(cache: KvarnCache, path: str | os.PathLike[str]) -> None:
    """See `KvarnCache.save`."""
    cores, note = _contents(cache)
    _core.save_caches(path, cores, note)


def reduced(cache: KvarnCache) -> tuple[Any, ...]:
    """What a cache is pickled as."""
    cores, note = _contents(cache)
    own_layers = {idx: layer for idx, layer in enumerate(cache.layers) if type(layer) is not KvarnLayer}
    return restored, (type(cache), _core.caches_to_bytes(cores, note), own_layers, cache._store.strict)


def _contents(cache: KvarnCache) -> tuple[list[Any], str]:
    """The core caches of the groups, and the note."""
    cache._store.settle()
    own_layers = {idx: layer for idx, layer in enumerate(cache.layers) if type(layer) is not KvarnLayer}
    others = [f"{idx} ({type(layer).__name__})" for idx, layer in own_layers.items() if not keeps_nothing(layer)]
    if others:
        raise UnsupportedError(f"layers that are not paged cannot be saved: {', '.join(others)}")
    cores: list[Any] = []
    groups: list[dict[str, Any]] = []
    for group in cache._store.groups:
        padding = None if group.padding is None else ["".join(map(str, row)) for row in group.padding.int().tolist()]
        groups.append(
            {
                "layers": group.layers,
                "window": group.window,
                "shape": group.shape,
                "cache": None if group.core is None else len(cores),
                "length": group.length,
                "sequences": group.sequences,
                "padding": padding,
                "record_past": group.record_past,
                "grew": group.grew,
            }
        )
        cores += [] if group.core is None else [group.core]
    first = cache._store.groups[0]
    note = {
        "writer": WRITER,
        "version": VERSION,
        "model_type": cache._origin.model_type,
        "fingerprint": cache._origin.fingerprint,
        **{name: getattr(first, name) for name in _SETTINGS},
        "empty_layers": list(own_layers),
        "behind": sorted(cache._store.behind.items()),
        "groups": groups,
    }
    return cores, json.dumps(note)


def load(
    cls: type[AnyCache],
    path: str | os.PathLike[str],
    model_or_config: Any,
    *,
    calibration: Calibration | str | os.PathLike[str] | None,
    strict: bool,
) -> AnyCache:
    """See `KvarnCache.load`."""
    cores, text = _core.load_caches(path)
    decoder = Decoder(model_or_config)
    try:
        note = Note(text)
        note.check_decoder(decoder)
        cache = cls(model_or_config, **note.settings, calibration=calibration, strict=strict)
        note.fill(cache._store.groups, cores)
        cache._store.behind = note.behind
    except CacheFileError as error:
        raise CacheFileError(f"{os.fspath(path)}: {error}") from None
    if decoder.model is None:
        cache._origin = Origin(note.model_type, known=note.fingerprint)
    return cache


def restored(cls: type[AnyCache], data: bytes, own_layers: dict[int, Any], strict: bool) -> AnyCache:
    """A pickled cache, without its model: see `KvarnCache.load` about its calibration."""
    cores, text = _core.caches_from_bytes(data)
    note = Note(text)
    cache = cls.__new__(cls)
    cache.calibration = of_fingerprint(note.fingerprint)
    groups = [
        LayerGroup(
            group["layers"],
            group["window"],
            shape=group["shape"],
            calibration=cache.calibration,
            codec=None,
            **note.settings,
        )
        for group in note.groups
    ]
    note.fill(groups, cores)
    cache._take(groups, own_layers, Origin(note.model_type, known=note.fingerprint), strict)
    cache._store.behind = note.behind
    return cache


class Note:
    """A file's note, whose fields have the types that they should.

    Attributes:
        model_type: of the decoder's config.
        fingerprint: of the model, or None.
        settings: keyword arguments of `KvarnCache`.
        groups: fields by name, see the module.
        behind: layers that lack positions, and how many they have.

    Raises:
        CacheFileError: naming what is odd.
    """

    def __init__(self, text: str) -> None:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("writer") != WRITER:
            _refuse("a cache file, but not of a KvarnCache: kvarn_rs.PagedKvCache.load reads those of one core cache")
        if found.get("version") != VERSION:
            _refuse(f"a KvarnCache of version {found.get('version')!r}, this release reads version {VERSION}")
        self.model_type: str = _field(found, "model_type", str)
        self.fingerprint: str | None = _field(found, "fingerprint", str, None)
        if self.fingerprint is not None and not re.fullmatch("[0-9a-f]{64}", self.fingerprint):
            _refuse(f"fingerprint is {self.fingerprint!r:.80}, not 64 hexadecimal digits")
        self.settings: dict[str, Any] = {
            "format": _field(found, "format", str),
            "block_size": _field(found, "block_size", int),
            "num_blocks": _field(found, "num_blocks", int, None),
            "num_open_pages": _field(found, "num_open_pages", int, None),
        }
        try:
            check_pages(**self.settings, codec=None)
        except KvarnError as error:
            _refuse(str(error))
        self.groups: list[dict[str, Any]] = [_group(entry) for entry in _field(found, "groups", list)]
        layers = [layer_idx for group in self.groups for layer_idx in group["layers"]]
        layers = sorted(layers + _numbers(found, "empty_layers", int))
        if not layers or layers != list(range(len(layers))) or any(not group["layers"] for group in self.groups):
            _refuse(f"groups of the layers {layers}: not one after the other from 0 on")
        self.behind: dict[int, int] = _behind(found, self.groups)

    def check_decoder(self, decoder: Decoder) -> None:
        """CacheFileError if the file is not of this model, as far as both are known."""
        model_type = decoder.config.model_type
        if model_type != self.model_type:
            _refuse(f"a cache of another model: of type {self.model_type!r}, this one is {model_type!r}")
        own = [(layers, window, shape) for layers, window, shape in group_layers(decoder.plans)]
        saved = [(group["layers"], group["window"], group["shape"]) for group in self.groups]
        if own != saved:
            _refuse(
                "a cache of another model: its layers, windows and [num_kv_heads, head_dim] are "
                f"{json.dumps(saved)}, this model's {json.dumps(own)}"
            )
        if self.fingerprint is not None and decoder.model is not None:
            known = fingerprint(decoder.model)
            if known != self.fingerprint:
                _refuse(f"a cache of another model: of fingerprint {self.fingerprint}, this model's is {known}")

    def fill(self, groups: list[LayerGroup], cores: list[Any]) -> None:
        """Gives each group its core cache and the positions that it holds; CacheFileError where they do not fit."""
        used = [group["cache"] for group in self.groups if group["cache"] is not None]
        if sorted(used) != list(range(len(cores))):
            _refuse(f"{len(cores)} caches, and groups of the caches {used}")
        for group, saved in zip(groups, self.groups, strict=True):
            core = None if saved["cache"] is None else cores[saved["cache"]]
            if core is not None:
                _check_core(group, core)
                core.set_calibration(group.calibration, group.layers)
                group.core = core
                group.page_dtype = getattr(torch, core.dtype)
                group.dtypes = (group.page_dtype, group.page_dtype)
            group.padding = _padding(saved, core)
            group.sequences = saved["sequences"]
            group.length = saved["length"]
            group.record_past = saved["record_past"]
            group.grew = saved["grew"]
        length = max(group.length for group in groups)
        sizes = sorted({(group.length, len(group.sequences)) for group in groups})
        num_rows = max(rows for _, rows in sizes)
        for group in groups:
            # One whose layers were all left out has fewer positions, and no rows if they never came.
            held = max(self.behind.get(layer_idx, length) for layer_idx in group.layers)
            if group.length != held or len(group.sequences) not in ({num_rows} if held else {0, num_rows}):
                _refuse(f"groups of different (positions, rows): {sizes}, of which layers {group.layers} have {held}")


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


def _behind(found: dict[str, Any], groups: list[dict[str, Any]]) -> dict[int, int]:
    entries: list[Any] = [_numbers({"behind": entry}, "behind", int) for entry in _field(found, "behind", list)]
    paged = {layer_idx for group in groups for layer_idx in group["layers"]}
    if any(len(entry) != 2 or entry[0] not in paged for entry in entries):
        _refuse(f"behind is {entries}: not of layers and positions")
    return dict(entries)


def _group(found: Any) -> dict[str, Any]:
    """The fields of a group, by themselves."""
    if not isinstance(found, dict):
        _refuse(f"a group is {found!r:.40}")
    shape = tuple(_numbers(found, "shape", int, None))
    if len(shape) != 2:
        _refuse(f"shape is {list(shape)}, not [num_kv_heads, head_dim]")
    padding = _field(found, "padding", list, None)
    return {
        "layers": _numbers(found, "layers", int),
        "window": _field(found, "window", int, None),
        "shape": shape,
        "cache": _field(found, "cache", int, None),
        "length": _field(found, "length", int),
        "sequences": _numbers(found, "sequences", int),
        "padding": None if padding is None else _numbers(found, "padding", str),
        "record_past": _field(found, "record_past", bool),
        "grew": _field(found, "grew", bool),
    }


def _check_core(group: LayerGroup, core: Any) -> None:
    names = ("num_layers", "window", *_SETTINGS)
    own, saved = ({name: getattr(of, name) for name in names} for of in (group, core))
    if own != saved:
        _refuse(f"a cache of {saved} for the layers {group.layers} of {own}")


def _padding(saved: dict[str, Any], core: Any) -> torch.Tensor | None:
    """The padding of a group whose rows have as many tokens and as much padding as its length says."""
    length, sequences, rows = saved["length"], saved["sequences"], saved["padding"]
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
    return None if rows is None else torch.tensor([[position == "1" for position in row] for row in rows])
