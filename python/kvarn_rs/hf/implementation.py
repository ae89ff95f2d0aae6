"""The attention implementation of a model, and whether its code can use kvarn's.

`set_attn_implementation` sets a name on every part of a model, whether or not its code reads it; and some code takes an
unknown name for a kernel with more abilities. So the code is inspected before the name is set.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import CodeType
from typing import Any

from .compat import PreTrainedModel, attention_of, put_attention_back


class AttentionSettings:
    """The attention implementations of a model and of everything in it, to be changed in part or put back."""

    def __init__(self, model: Any) -> None:
        self._model = model
        parts = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
        self._before: dict[int, tuple[Any, Any]] = {}
        for config in [model.config, *parts]:
            self._add(config)

    def _add(self, config: Any) -> None:
        if id(config) not in self._before:
            self._before[id(config)] = (config, attention_of(config))
            for part in _parts(config):
                self._add(part)

    def set(self, name: str, decoder: Any) -> None:
        """Sets the implementation of the decoder's config, and of the configs that it is a part of; no other's."""
        try:
            self._model.set_attn_implementation(name)
        except Exception:
            self.restore()
            raise
        kept = _path(self._model.config, decoder)
        part = self._model.get_decoder()
        if isinstance(part, PreTrainedModel) and part.config is not self._model.config:  # a copy of the decoder's
            kept += [module.config for module in part.modules() if isinstance(module, PreTrainedModel)]
        self.restore(kept)

    def restore(self, but: Iterable[Any] = ()) -> None:
        """Puts every implementation back, but those of some configs."""
        kept = {id(config) for config in but}
        for key, (config, before) in self._before.items():
            if key not in kept:
                put_attention_back(config, before)


def _parts(config: Any) -> list[Any]:
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    return [part for part in parts if part is not None]


def _path(config: Any, decoder: Any) -> list[Any]:
    """The configs from one down to a decoder's, or none."""
    if config is decoder:
        return [config]
    return next(([config, *path] for part in _parts(config) if (path := _path(part, decoder))), [])


def own_attention(model: Any) -> str | None:
    """The class in a model that keeps K and V in a cache and does not attend through `AttentionInterface`, if any.

    Told by what the code of its `forward` uses: transformers only says whether some class of the file uses the
    interface. One that looks at the implementation's name to tell what to attend to counts, too: the sparse indices of
    some models are in the mask of "eager" and "sdpa" alone.
    """
    for code, name in _caching_code(model):
        by_name = any(isinstance(constant, (tuple, frozenset)) and "eager" in constant for constant in code.co_consts)
        if by_name or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
            return name
    return None


def takes_cache(model: Any) -> bool:
    """Whether a model takes the cache that `generate` hands it, and anything in it hands K and V to one.

    Reformer keeps buckets in a cache of its own.
    """
    kinds = {type(module) for module in model.modules() if isinstance(module, PreTrainedModel)}
    arguments = {name for kind in kinds for name in inspect.signature(kind.forward).parameters}
    return not arguments.isdisjoint(("cache", "past_key_values")) and bool(_caching_code(model))


def _caching_code(model: Any) -> list[tuple[CodeType, str]]:
    """The code of `forward`, and the class, of every kind of module that hands a layer's K and V to a cache."""
    found = []
    for kind in {type(module): None for module in model.modules()}:
        code = getattr(inspect.unwrap(kind.forward), "__code__", None)
        if code is None or "update" not in code.co_names:
            continue
        has_cache = any(name == "cache" or "past" in name for name in code.co_varnames)
        if has_cache and any(name.startswith("layer_id") for name in (*code.co_names, *code.co_varnames)):
            found.append((code, kind.__name__))
    return found


def cache_limit(model: Any, config: Any) -> int | None:
    """Positions beyond which `generate` of a model drops the cache that it was passed; None: it never does.

    Models with two sets of rotary frequencies compute everything again when they change from one to the other.
    """
    limit = getattr(config, "original_max_position_embeddings", None)
    if not isinstance(limit, int) or limit >= getattr(config, "max_position_embeddings", limit):
        return None
    for kind in {type(module) for module in model.modules() if isinstance(module, PreTrainedModel)}:
        prepare = inspect.unwrap(getattr(kind, "prepare_inputs_for_generation", kind.forward))
        if "original_max_position_embeddings" in getattr(getattr(prepare, "__code__", None), "co_names", ()):
            return limit
    return None
