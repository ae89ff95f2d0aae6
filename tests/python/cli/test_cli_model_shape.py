"""`model_shape`, which reads a `config.json`, against transformers' configuration classes."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvarn_rs.cli.model_shape import model_shape
from kvarn_rs.errors import ConfigError, UnsupportedError

transformers = pytest.importorskip("transformers")

# Whose defaults are filled in here too, where a file leaves out which layer is of which type.
FAMILIES = (
    "bamba cohere2 exaone4 falcon_h1 gemma gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text glm4 "
    "gpt2 gpt_bigcode gpt_neox gpt_oss jamba lfm2 llama llama4 llama4_text minimax_m2 mistral mistral3 "
    "mixtral mllama nemotron olmo2 olmo3 paligemma phi3 phimoe qwen2 qwen2_5_vl qwen2_moe qwen3 qwen3_moe "
    "qwen3_next qwen3_vl recurrent_gemma smollm3 starcoder2 vaultgemma "
)
# Whose published files name each layer's type.
NAMING_FAMILIES = ["afmoe", "granitemoehybrid", "minimax", "nemotron_h", "qwen3_5", "zamba2"]
SETTINGS = {
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "bamba": {"attn_layer_indices": [3, 9]},
    "lfm2": {"full_attn_idxs": [2, 5, 8]},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 20},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 20},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 20},
    "qwen3_next": {"full_attention_interval": 3},
}
PER_TOKEN = {"full_attention", "hybrid", "sliding_attention", "chunked_attention"}


def of_transformers(config: Any) -> Counter[tuple[int, int, int | None]]:
    """Layers by (kv heads, head_dim, window)."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    config = config.get_text_config(decoder=True)
    found: Counter[tuple[int, int, int | None]] = Counter()
    for layer, kind, settings in zip(config.per_layer_config, *get_layer_types_and_kwargs(config), strict=True):
        if kind in PER_TOKEN:
            heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
            head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
            found[1 if getattr(layer, "multi_query", False) else heads, head_dim, settings.get("sliding_window")] += 1
    return found


def of_ours(fields: dict[str, Any]) -> Counter[tuple[int, int, int | None]]:
    found: Counter[tuple[int, int, int | None]] = Counter()
    for group in model_shape(fields).groups:
        found[group.num_kv_heads, group.head_dim, group.window] += group.num_layers
    return found


def without_layer_types(fields: Any) -> Any:
    if not isinstance(fields, dict):
        return fields
    named = ("layer_types", "layers_block_type", "per_layer_config")
    return {name: without_layer_types(value) for name, value in fields.items() if name not in named}


@pytest.mark.parametrize("family", [*FAMILIES.split(), *NAMING_FAMILIES])
def test_the_layers_are_those_that_transformers_makes(family: str) -> None:
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    if not hasattr(transformers.PreTrainedConfig, "per_layer_config"):
        pytest.skip("this transformers does not say what each layer is")
    config = transformers.CONFIG_MAPPING[family](**SETTINGS.get(family, {}))
    expected = of_transformers(config)
    assert expected
    fields = json.loads(config.to_json_string(use_diff=False))
    assert of_ours(fields) == expected
    if family in FAMILIES.split():
        assert of_ours({**without_layer_types(fields), **SETTINGS.get(family, {})}) == expected


LLAMA = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 70) | st.floats() | st.sampled_from(["attention", "M*", "", "L"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["0", "x"]), inner, max_size=2),
    max_leaves=5,
)
FIELDS = (
    "model_type layer_types layers_block_type hybrid_override_pattern block_types full_attention_interval "
    "attn_layer_period attn_layer_offset attn_type_list attn_layer_indices full_attn_idxs "
    "attention_chunk_size no_rope_layers sliding_window sliding_window_pattern use_sliding_window "
    "max_window_layers num_kv_shared_layers per_layer_config head_dim v_head_dim multi_query text_config "
    "kv_lora_rank max_position_embeddings num_hidden_layers num_attention_heads hidden_size "
)


@given(st.dictionaries(st.sampled_from(FIELDS.split()), ANYTHING, max_size=4))
def test_every_configuration_is_read_or_refused(fields: dict[str, Any]) -> None:
    try:
        shape = model_shape({**LLAMA, **fields})
    except (ConfigError, UnsupportedError):
        return
    assert all(group.num_layers > 0 and group.num_kv_heads > 0 and group.head_dim > 0 for group in shape.groups)
