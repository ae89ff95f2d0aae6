"""The shape of a model's key/value cache, read from its `config.json` without transformers.

The rules are those of transformers' configuration classes: which layers have keys and values, with how many heads and
channels, and with which window. Defaults of those classes are repeated here only for fields that published
configurations leave out.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, UnsupportedError

FULL, SLIDING, CHUNKED, STATE = "full", "sliding", "chunked", "state"

# Names of layer types in `layer_types` and its predecessors. A STATE layer stores nothing per token.
_KINDS = {
    **dict.fromkeys(("full_attention", "attention", "hybrid", "*"), FULL),
    **dict.fromkeys(("sliding_attention", "hybrid_sliding"), SLIDING),
    "chunked_attention": CHUNKED,
    **dict.fromkeys(("linear_attention", "mamba", "mamba2", "recurrent", "conv", "M"), STATE),
    **dict.fromkeys(("moe", "mlp", "dense", "sparse", "E", "-"), STATE),
}
# Keys of the language model's configuration inside that of a multimodal model.
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")
# Names in older architectures: GPT-2, Falcon, ChatGLM, RecurrentGemma, Zamba.
_ALIASES = {
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head",),
    "num_key_value_heads": ("num_kv_heads", "multi_query_group_num"),
    "hidden_size": ("n_embd",),
    "head_dim": ("attention_head_dim", "kv_channels"),
    "sliding_window": ("attention_window_size", "sliding_window_size"),
    "sliding_window_pattern": ("_sliding_window_pattern", "global_attn_every_n_layers"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
}
# Model types in which every layer slides if there is a window.
_ALL_SLIDE = {"ministral", "mistral", "mixtral", "phi3", "phi4_multimodal", "phimoe", "starcoder2"}
# One layer in this many is full and the others slide, if the configuration does not say.
_SLIDING_PATTERN = {
    "gemma2": 2,
    "gpt_oss": 2,
    "vaultgemma": 2,
    "cohere2": 4,
    "exaone4": 4,
    "olmo3": 4,
    "gemma3n_text": 5,
    "gemma3_text": 6,
    "gemma4_text": 6,
}
# One layer in this many is full and the others have a constant state, if the configuration does not say.
_STATE_PATTERN = {"qwen3_next": 4, "qwen3_5_text": 4, "qwen3_5_moe_text": 4, "olmo_hybrid": 4}
_GEMMA3 = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131072}
_DEFAULTS = {
    "gemma": {"head_dim": 256},
    "gemma2": {"head_dim": 256},
    "gemma3_text": _GEMMA3,
    "gemma3n_text": {"num_kv_shared_layers": 15, "head_dim": 256},
    "gemma4_text": {"head_dim": 256, "global_head_dim": 512},
    "gpt_oss": {"head_dim": 64},
    "qwen3": {"head_dim": 128},
}


# Larger values mean a corrupt configuration.
_MOST = {"num_hidden_layers": 100_000}
_MOST_OF_ANYTHING = 1 << 40


@dataclass(frozen=True)
class LayerGroup:
    """Layers with the same heads and window.

    Attributes:
        num_layers: number of layers.
        num_kv_heads: key/value heads per layer, over all devices.
        head_dim: channels per head.
        window: tokens that a query sees, itself included; None: all.
        paged: False if pages do not support the layer (chunked attention), so that the engine stores it unquantized.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    paged: bool = True


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model's key/value cache.

    Attributes:
        model_type: the architecture's name.
        max_context: the model's longest sequence, if its configuration says.
        groups: the layers that store keys and values.
        state_layers: number of layers with a constant state, or nothing to store.
        assumed_sliding: the configuration has a window but does not say which layers slide; all are assumed to.
    """

    model_type: str
    max_context: int | None
    groups: tuple[LayerGroup, ...]
    state_layers: int
    assumed_sliding: bool


_MAX_CONFIG_BYTES = 16 << 20


def read_config(path: Path) -> dict[str, Any]:
    """Reads a `config.json`, given the file or its folder."""
    file = path
    try:
        file = path / "config.json" if path.is_dir() else path
        with file.open("rb") as opened:
            data = opened.read(_MAX_CONFIG_BYTES + 1)
        if len(data) > _MAX_CONFIG_BYTES:
            raise ConfigError(f"{file} is over {_MAX_CONFIG_BYTES} bytes: no model configuration is so long")
        config = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {str(file)[:200]}: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{file} is not a model configuration: it is nested too deeply") from error
    except ValueError as error:  # not JSON, or not text
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file} is not a model configuration: it is a {type(config).__name__}, not an object")
    return config


def model_shape(config: dict[str, Any]) -> ModelShape:
    """The shape of the key/value cache of the model with this configuration."""
    config = _language_model(config)
    model_type = str(config.get("model_type") or "unknown")
    config = {**_DEFAULTS.get(model_type, {}), **{name: value for name, value in config.items() if value is not None}}
    if config.get("is_encoder_decoder"):
        raise UnsupportedError(f"{model_type} is an encoder-decoder: its cross-attention cache is not planned")
    if "kv_lora_rank" in config:
        raise UnsupportedError(
            f"{model_type} has multi-head latent attention (kv_lora_rank {config['kv_lora_rank']}): it caches latents, "
            "not keys and values, and no format here stores them"
        )
    kinds = _layer_kinds(config, model_type)
    shared = _integer(config, "num_kv_shared_layers", default=0, least=0)
    kinds = kinds[: max(len(kinds) - shared, 0)]
    overrides = _per_layer(config)
    counts: Counter[LayerGroup] = Counter()
    for index, kind in enumerate(kinds):
        if kind != STATE:
            counts[_one_layer({**config, **overrides.get(index, {})}, kind)] += 1
    if not counts:
        raise UnsupportedError(f"{model_type} has no attention layer that stores keys and values: nothing to plan")
    return ModelShape(
        model_type=model_type,
        max_context=_integer(config, "max_position_embeddings", default=0, least=0) or None,
        groups=tuple(
            LayerGroup(count, group.num_kv_heads, group.head_dim, group.window, group.paged)
            for group, count in counts.items()
        ),
        state_layers=kinds.count(STATE),
        assumed_sliding=set(kinds) == {SLIDING} and "layer_types" not in config and model_type not in _ALL_SLIDE,
    )


def _language_model(config: dict[str, Any]) -> dict[str, Any]:
    for name in _NESTED:
        nested = config.get(name)
        if isinstance(nested, dict) and nested:
            return _language_model(nested)
    return config


def _one_layer(config: dict[str, Any], kind: str) -> LayerGroup:
    num_q_heads = _integer(config, "num_attention_heads")
    num_kv_heads = _integer(config, "num_key_value_heads", default=num_q_heads)
    if config.get("multi_query") and not config.get("new_decoder_architecture"):  # Falcon, GPT-BigCode
        num_kv_heads = 1
    head_dim = _integer(config, "head_dim", default=0, least=0)
    if not head_dim:
        head_dim = _integer(config, "hidden_size") // num_q_heads
        if not head_dim:
            raise ConfigError(f"hidden_size {config.get('hidden_size')} is less than the {num_q_heads} attention heads")
    if kind == FULL and "per_layer_config" not in config:  # Gemma 4: its full layers differ from its sliding ones
        head_dim = _integer(config, "global_head_dim", default=head_dim)
        if config.get("attention_k_eq_v", True):
            num_kv_heads = _integer(config, "num_global_key_value_heads", default=num_kv_heads)
    v_head_dim = _integer(config, "v_head_dim", default=head_dim)
    if v_head_dim != head_dim:
        raise UnsupportedError(f"keys of {head_dim} channels and values of {v_head_dim}: pages need one head_dim")
    window = None
    if kind == SLIDING:
        window = _integer(config, "sliding_window")
    elif kind == CHUNKED:
        window = _integer(config, "attention_chunk_size")
    return LayerGroup(1, num_kv_heads, head_dim, window, paged=kind != CHUNKED)


def _layer_kinds(config: dict[str, Any], model_type: str) -> list[str]:
    """The kind of every layer, FULL, SLIDING, CHUNKED or STATE, in order."""
    pattern = config.get("hybrid_override_pattern")
    names = list(pattern) if isinstance(pattern, str) else []
    names = _list(config, "layer_types") or _list(config, "layers_block_type") or names
    if names:
        num_layers = _integer(config, "num_hidden_layers", default=len(names))
        if len(names) < num_layers:
            raise ConfigError(f"layer_types names {len(names)} layers, num_hidden_layers says {num_layers}")
        return [_kind(name) for name in names[:num_layers]]
    layers = range(_integer(config, "num_hidden_layers"))
    if _list(config, "block_types"):  # RecurrentGemma; all of its attention is local
        cycle = [SLIDING if name == "attention" else _kind(name) for name in _list(config, "block_types")]
        return [cycle[i % len(cycle)] for i in layers]
    if "full_attention_interval" in config or model_type in _STATE_PATTERN:
        interval = _integer(config, "full_attention_interval", default=_STATE_PATTERN.get(model_type))
        return [STATE if (i + 1) % interval else FULL for i in layers]
    if "attn_layer_period" in config:
        period = _integer(config, "attn_layer_period")
        offset = _integer(config, "attn_layer_offset", default=0, least=0)
        return [FULL if i % period == offset else STATE for i in layers]
    if _list(config, "attn_type_list"):
        return [FULL if is_attention else STATE for is_attention in _list(config, "attn_type_list")[: len(layers)]]
    for name in ("attn_layer_indices", "full_attn_idxs"):
        if name in config:
            return [FULL if i in _list(config, name) else STATE for i in layers]
    if "attention_chunk_size" in config:  # Llama 4: layers without rotary positions have full attention
        interval = _integer(config, "no_rope_layer_interval", default=4)
        rotary = _list(config, "no_rope_layers") or [(i + 1) % interval for i in layers]
        return [CHUNKED if has_rotary else FULL for has_rotary in rotary[: len(layers)]]
    return _sliding_kinds(config, model_type, layers)


def _sliding_kinds(config: dict[str, Any], model_type: str, layers: range) -> list[str]:
    if not _integer(config, "sliding_window", default=0, least=0):
        return [FULL] * len(layers)
    if "use_sliding_window" in config or "max_window_layers" in config or model_type.startswith("qwen"):
        first = _integer(config, "max_window_layers", default=len(layers), least=0)
        if not config.get("use_sliding_window", False):
            return [FULL] * len(layers)
        if model_type == "qwen2_moe":
            return [SLIDING if i % 2 == 0 and i < first else FULL for i in layers]
        return [SLIDING if i >= first else FULL for i in layers]
    pattern = config.get("sliding_window_pattern")
    if isinstance(pattern, str) and pattern and set(pattern) <= {"L", "G"}:
        return [FULL if pattern[i % len(pattern)] == "G" else SLIDING for i in layers]
    every = _integer(config, "sliding_window_pattern", default=_SLIDING_PATTERN.get(model_type, 0), least=0)
    return [SLIDING if every == 0 or (i + 1) % every else FULL for i in layers]


def _kind(name: object) -> str:
    kind = _KINDS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise UnsupportedError(f"unknown layer type {name!r}: its memory per token cannot be planned")
    return kind


def _list(config: dict[str, Any], name: str) -> list[Any]:
    """The list `name`; empty if absent."""
    value = config.get(name, [])
    if not isinstance(value, list):
        raise ConfigError(f"{name} is {value!r}: expected a list")
    return value


def _per_layer(config: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """`per_layer_config`: fields that override those of the model, by layer."""
    overrides = config.get("per_layer_config", {})
    try:
        return {int(index): dict(fields) for index, fields in overrides.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"per_layer_config is {overrides!r}: expected objects by layer number") from error


def _integer(config: dict[str, Any], name: str, *, default: int | None = None, least: int = 1) -> int:
    """The integer `name`, or its alias, in the valid range; `default` if absent."""
    found = next((other for other in (name, *_ALIASES.get(name, ())) if config.get(other) is not None), None)
    if found is None:
        if default is None:
            raise ConfigError(f"the model configuration has no {name}")
        return default
    value = config[found]
    most = _MOST.get(name, _MOST_OF_ANYTHING)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"{found} is {value!r}: expected a whole number from {least} to {most}")
    return value
