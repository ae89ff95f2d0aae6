"""`KvarnCache`: a transformers cache whose K and V live in pages.

Layers of full and sliding attention are paged, in groups that share block tables; every other kind of layer stays the
one that transformers uses. What moves tokens about (crop, reorder, repeat, select, reset) is done once per group.
"""

from __future__ import annotations

import copy
import os
import weakref
from typing import TYPE_CHECKING, Any

import torch

from kvarn_rs import Calibration, PagedKvCache, _core
from kvarn_rs.errors import ConfigError, RollbackError, ShapeError

from . import calls, file
from .attention import ATTENTION_NAME
from .calibration import of_fingerprint, resolve
from .compat import Cache, attention_of, dense_layer
from .decoder import Decoder
from .fingerprint import Origin
from .forward import Forwards
from .group import GroupPlan
from .layer import KvarnLayer
from .settings import PageSettings
from .stats import stats_of
from .unpaged import UnpagedLayers

if TYPE_CHECKING:
    from typing_extensions import Self


class KvarnCache(Cache):
    """A transformers cache with quantized, paged K and V, for `generate` and for `model(...)`.

    Use it as `model.generate(**batch, past_key_values=KvarnCache(model))`. Padding takes no space; beams,
    `num_return_sequences` and copies share blocks (copy-on-write); sliding layers release blocks outside their window
    when the next forward begins. CPU only. Prompts beyond the model's `max_position_embeddings` are not refused;
    `generate` warns.
    Models may leave layers out: `get_seq_length(i)` is the length of layer i, and a layer that lacks positions is
    refused when it arrives later. Reading (lengths, `keys`, `stats`) within a forward changes nothing; changing the
    cache there is an error.
    A forward that raises leaves the cache as before it, and can be repeated; if the model also has layers that are not
    paged (linear or chunked attention), call `reset` first. Hooks on the model detect how a call ends. A cache made
    from a config installs them when its first K and V arrive, too late for that forward: call `reset` if it raises.

    Args:
        model_or_config: a model, whose decoder's attention implementation is set to "kvarn" (`register` included). Its
            other parts stay as they are, and so do models that cannot use it. Or its config, after `register()` and
            with the attention implementation set by the caller.
        format: one of `kvarn_rs.FORMATS`; "raw" stores the model's dtype. "int4", "int3" and "int2" store tokens in
            INT8 pages until a block is full, then seal it.
        block_size: positions per block: 16, 32, 64 or 128.
        num_blocks: blocks of each layer group; None: as many as needed.
        num_open_pages: pages of each layer group for blocks that are not sealed: two for each batch row, four if
            forwards append several tokens; None: as many as needed.
        calibration: the model's `kvarn_rs.Calibration`, or the path of a file made by `kvarn calibrate`. None: the
            model's file in the user's cache folder, else a calibration that all caches of this model object share and
            that learns from the first 2,048 tokens; for a config, one for this cache alone.
        codec: with "raw", one of `kvarn_rs.CODECS`, which quantizes the pages in place to evaluate another scheme.
        strict: raise UnsupportedError instead of warning if attention cannot use the pages, or K and V of a layer
            cannot be paged.

    Raises:
        UnknownFormatError: no such format or codec.
        CalibrationError: a calibration file that is damaged, or of another model.
        ConfigError: not a model, an encoder-decoder model, or invalid settings.
        DeviceError: a model that is not on the CPU.
        UnsupportedError: strict, and the model cannot use kvarn attention, or has K and V that are not paged; a format
            that this build does not support.
    """

    def __init__(
        self,
        model_or_config: Any,
        format: str = "int4",
        *,
        block_size: int = 128,
        num_blocks: int | None = None,
        num_open_pages: int | None = None,
        calibration: Calibration | str | os.PathLike[str] | None = None,
        codec: str | None = None,
        strict: bool = False,
    ) -> None:
        decoder = Decoder(model_or_config)
        settings = PageSettings(format, block_size, num_blocks, num_open_pages, codec)
        self.calibration = resolve(decoder.model, calibration)
        notices = decoder.prepare(strict)
        plans = [
            GroupPlan(layers, window, shape, settings, self.calibration) for layers, window, shape in decoder.groups()
        ]
        origin = Origin(decoder.config.model_type, decoder.model)
        self._assemble(Forwards(plans, strict), decoder.default_layers, origin)
        self._config = weakref.ref(decoder.config)
        self._unpaged = UnpagedLayers(self._forwards, decoder.unpaged)
        self._notices = notices
        self._forwards.fallbacks.own_attention = decoder.own_attention is not None
        if decoder.model is not None:
            calls.watch(decoder.model)

    def _assemble(self, forwards: Forwards, default_layers: dict[int, Any], origin: Origin) -> None:
        """Makes the layers: those of all groups, and those that stay transformers'."""
        self._origin = origin
        self._forwards = forwards
        self._config: weakref.ref[Any] | None = None  # the decoder's, whose attention may change at any time
        self._unpaged = UnpagedLayers(forwards, {})
        self._notices: list[str] = []
        paged = {
            layer_idx: KvarnLayer(forwards, plan, index)
            for plan in forwards.plans
            for index, layer_idx in enumerate(plan.layers)
        }
        super().__init__(layers=[layer for _, layer in sorted((default_layers | paged).items())])
        self._num_layers = len(self.layers)  # of the config; models may add some

    # A forward ---------------------------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the new K and V of one layer, each [B, num_kv_heads, T, head_dim].

        Returns:
            For a paged layer, handles of the shape that `DynamicCache` would return: kvarn attention works on their
            pages, any other operation on dequantized tensors (counted, with a warning). They are valid until the next
            forward begins. For an attention that is compiled, such as flex_attention, the dequantized tensors.

        Raises:
            ShapeError: another batch size than the cache holds, or another number of positions than other layers got.
            ConfigError: a layer that the config does not have.
            DtypeError: a dtype that `raw` pages in use cannot hold without loss.
            RollbackError: a layer that was left out of an earlier forward.
            UnsupportedError: a layer that comes twice in one call of the model, or within a backward.
            DeviceError: tensors that are not on the CPU.
        """
        if layer_idx >= len(self.layers):
            raise ConfigError(f"layer {layer_idx} came to a cache for a model of {len(self.layers)} layers")
        layer = self.layers[layer_idx]
        if type(layer) is not KvarnLayer:
            return self._update_other(layer_idx, key_states, value_states, *args, **kwargs)
        if layer.plan not in self._forwards.groups:
            reason = layer.why_not_paged(key_states, value_states)
            if reason is not None:
                self._unpage(layer.plan, reason)
                return self._update_other(layer_idx, key_states, value_states, *args, **kwargs)
        key, value = layer.update(key_states, value_states)
        config = None if self._config is None else self._config()
        if config is None or attention_of(config) in _TAKE_HANDLES:
            return key, value
        return key.clone(), value.clone()

    def _update_other(
        self, layer_idx: int, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._unpaged.check()
        if layer_idx in self._unpaged.refused:
            self._forwards.fallbacks.count("unsupported_shape", self._unpaged.refused[layer_idx])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def update_conv_state(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, for linear attention; RollbackError after a forward that raised."""
        self._unpaged.check()
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, for linear attention; RollbackError after a forward that raised."""
        self._unpaged.check()
        return super().update_recurrent_state(*args, **kwargs)

    def _unpage(self, plan: GroupPlan, reason: str) -> None:
        """Replaces the layers of a group that pages cannot hold by transformers' own."""
        for layer_idx in plan.layers:
            self.layers[layer_idx] = dense_layer(plan.window)
            self._unpaged.refused[layer_idx] = reason
        self._forwards.remove(plan)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that a layer has seen, padding included; within a forward, the new ones once its K and V arrived.

        By default of the whole cache: of the first layer, or of those that the model runs if it leaves that one out.
        """
        length = super().get_seq_length(layer_idx)
        if length or layer_idx or self._forwards.is_in_call:
            return length
        lengths = (max(self._forwards.lengths_of(plan).values()) for plan in self._forwards.plans)
        return max(lengths, default=0)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The position of the first query of a forward, for the layers of one kind: where `get_mask_sizes` ends."""
        layer = self.layers[layer_idx]
        return sum(layer.get_mask_sizes(0)) if type(layer) is KvarnLayer else super().get_query_offset(layer_idx)

    # Between forwards --------------------------------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -n positions (n <= 0), or keeps the first n (n > 0).

        Sliding layers can go back to what their window still holds, or to the last crop if `activate_past_recording`
        was called.

        Raises:
            RollbackError: more than the cache holds, or past what a sliding window holds; nothing was changed.
            OutOfBlocksError: no room for a page of a sealed block that the end is within; nothing was changed.
            OpenStepError: in the middle of a forward, as for all that changes the cache; nothing was changed.
        """
        forwards = self._forwards
        forwards.settle()
        change = int(tokens_to_remove)  # some releases pass a tensor
        length = self.get_seq_length()
        target = length + change if change <= 0 else min(change, length)
        if target < 0:
            raise RollbackError(f"cannot remove {-change} positions of {length}")
        for group in forwards.groups.values():
            group.check_crop(target)
        for layer in self._default_layers().values():
            layer.crop(target - length)
        forwards.crop(target)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Batch row i becomes what row beam_idx[i] was. beam_idx: integers [B]. Blocks are shared, not copied."""
        self._select(beam_idx.tolist())
        for layer in self._default_layers().values():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every batch row becomes `repeats` rows. Blocks are shared, not copied."""
        self._select([row for row in range(self._batch_size()) for _ in range(repeats)])
        for layer in self._default_layers().values():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the batch rows that `indices` (integers, or bool [B]) selects, in its order."""
        if batch_size := self._batch_size():
            try:
                rows = torch.arange(batch_size)[indices].tolist()
            except IndexError as error:
                raise ShapeError(f"rows of a batch of {batch_size}: {error}") from error
            self._select(rows)
        for layer in self._default_layers().values():
            layer.batch_select_indices(indices)

    def _batch_size(self) -> int:
        return max((len(group.sequences) for group in self._forwards.groups.values()), default=0)

    def _select(self, rows: list[int]) -> None:
        self._forwards.settle()
        batch_size = self._batch_size()
        if batch_size:
            wrong = [row for row in rows if not 0 <= row < batch_size]
            if wrong or not rows:
                what = f"row {wrong[0]}" if wrong else "no row at all"
                raise ShapeError(f"{what} of a batch of {batch_size}: nothing was changed")
        for group in self._forwards.groups.values():
            if group.sequences:
                group.select(rows)

    def reset(self) -> None:
        """Empties the cache; its memory goes back to the pool. A forward in progress is dropped."""
        self._forwards.reset()
        self._unpaged.reset()
        for layer in self._default_layers().values():
            layer.reset()

    def __copy__(self) -> KvarnCache:
        """As `copy.deepcopy`: two caches cannot share the forward in progress."""
        return copy.deepcopy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> KvarnCache:
        """An independent cache of the same tokens, its pages copied. OpenStepError in the middle of a forward."""
        self._forwards.settle_for_copy()
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        copy.deepcopy(self._forwards, memo)  # before the layers, which are copied with it alone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    # On disk -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes every token of every row into a file, to the bit and whole or not at all; `load` reads it.

        Kept are the settings and all that later forwards depend on; not the calibration, which is the model's, and not
        what `stats` counts.

        Args:
            path: the file, in a folder that exists; one that is there is replaced.

        Raises:
            UnsupportedError: layers that are not paged, or pages that a codec quantizes in place.
            CacheFileError: the file cannot be written.
        """
        _core.save_caches(path, *self._contents())

    def _contents(self) -> tuple[list[PagedKvCache], str]:
        self._forwards.settle()
        return file.contents(self._forwards, self._origin, self._default_layers())

    def _default_layers(self) -> dict[int, Any]:
        return {idx: layer for idx, layer in enumerate(self.layers) if not isinstance(layer, KvarnLayer)}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model_or_config: Any,
        *,
        calibration: Calibration | str | os.PathLike[str] | None = None,
        strict: bool = False,
    ) -> Self:
        """The cache in a file that `save` wrote, for the same model: `generate` goes on as with the one that was saved.

        A cache is also pickled as such a file. Without a model at hand, what is unpickled takes the model's calibration
        file in the user's cache folder, or one that learns anew: call `load` where the model's own is wanted.

        Args:
            path: the file. Every byte of it is checked, by its checksum and by what it means.
            model_or_config: as for the constructor.
            calibration: as for the constructor.
            strict: as for the constructor.

        Raises:
            CacheFileError: not such a file, damaged, of another version, or of another model.
            CalibrationError, ConfigError, DeviceError, UnsupportedError: as the constructor.
        """
        cores, note = _core.load_caches(path)
        decoder = Decoder(model_or_config)
        with file.named(path):
            saved = file.SavedCache(cores, note)
            saved.check_decoder(decoder)
            cache = cls(model_or_config, **vars(saved.settings), calibration=calibration, strict=strict)
            saved.fill(cache._forwards)
        if decoder.model is None:
            cache._origin = saved.origin
        return cache

    def __reduce__(self) -> tuple[Any, ...]:
        data = _core.caches_to_bytes(*self._contents())
        return _restored, (type(self), data, self._default_layers(), self._forwards.fallbacks.strict)

    # Figures ----------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, Any]:
        """Counters and memory of the cache, over all paged layers.

        Returns:
            fused_calls: attention calls on pages; dense_fallbacks: layer calls that dequantized them instead, and
            fallback_reasons, the same by reason; dropped_forwards: forwards that were dropped incomplete;
            paged_layers and unpaged_layers: numbers of layers; unpaged: by cache layer, the reason why its K and V are
            not paged; notices: the warnings of the constructor; blocks_in_use, peak_blocks, bytes_in_use, peak_bytes:
            sums over the layer groups; bytes_per_token: of all paged layers, in full blocks at rest (0 before the first
            forward); open_pages: pages of blocks that are not sealed; sealed, unsealed: blocks sealed, and decoded
            again by `crop`; first_page_tokens: tokens behind the statistics of the first page that was opened or
            refitted last, the fewest of the layer groups (None before there is one; 32 are enough); calibrated: "no",
            "own prompt", "frozen" or "file"; saturation: by model layer, share of K codes in tiles that were clamped;
            drift: by model layer, recent deviation of K over that of its pages' statistics, 1 where they fit (both None
            before anything was measured); out_of_range_tokens: by model layer, tokens stored incorrectly because the
            scale or zero point of their K or V does not fit float16: values beyond 65,504, or nearly constant V.
        """
        added = dict.fromkeys(range(self._num_layers, len(self.layers)), "added by the model")
        return {
            **stats_of(self._forwards, self.calibration),
            "unpaged_layers": len(self.layers) - self._forwards.num_layers,
            "unpaged": dict(sorted((self._unpaged.planned | self._unpaged.refused | added).items())),
            "notices": list(self._notices),
        }


# Attention made of operations that handles turn into dense ones. A compiled one cannot be given handles.
_TAKE_HANDLES = (ATTENTION_NAME, "eager", "sdpa", None)


def _restored(cls: type[KvarnCache], data: bytes, default_layers: dict[int, Any], strict: bool) -> KvarnCache:
    """A pickled cache, without its model: see `KvarnCache.load` about its calibration."""
    saved = file.SavedCache(*_core.caches_from_bytes(data))
    cache = cls.__new__(cls)
    cache.calibration = of_fingerprint(saved.origin.fingerprint)
    forwards = Forwards(saved.plans(cache.calibration), strict)
    saved.fill(forwards)
    cache._assemble(forwards, default_layers, saved.origin)
    return cache
