"""Tiny random models whose attention, or cache, is unlike that of `families`. Eager attention, eval mode."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import DynamicCache

from hf.families import TINY, VOCAB, random_model

IMAGE_TOKEN = VOCAB - 1


def make_other(stem: str, head: str = "ForCausalLM", **settings: Any) -> Any:
    """A model of 2 layers of the class that `stem` and `head` name; settings: of its config, None leaves one out."""
    wanted = {**TINY, "num_hidden_layers": 2, **settings}
    config = getattr(transformers, f"{stem}Config")(
        **{name: value for name, value in wanted.items() if value is not None}
    )
    return random_model(getattr(transformers, f"{stem}{head}"), config)


def latent(stem: str, **settings: Any) -> Any:
    """Attention on a latent that is projected up after the cache."""
    return make_other(
        stem,
        num_key_value_heads=4,
        head_dim=None,
        moe_intermediate_size=32,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=32,
        q_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        **settings,
    )


def git() -> Any:
    """Attention code of its own beside a vision tower that uses the interface."""
    return make_other("Git", max_position_embeddings=128, num_key_value_heads=None, head_dim=None)


def sparse_indexed() -> Any:
    """Every query sees 8 keys that an indexer picks."""
    return latent("DeepseekV32", first_k_dense_replace=2, index_topk=8, index_n_heads=2, index_head_dim=32)


def falcon_h1() -> Any:
    """Attention beside a state in every layer."""
    return make_other(
        "FalconH1",
        mamba_d_ssm=128,
        mamba_n_heads=8,
        mamba_d_head=16,
        mamba_d_state=16,
        mamba_chunk_size=16,
    )


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=32,
    )
    text = transformers.LlamaConfig(**{**TINY, "num_hidden_layers": 2})
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    return random_model(transformers.LlavaForConditionalGeneration, config)


def implementations(model: Any) -> dict[str, str]:
    """The attention implementation of a model's config and of its sub-configs, by name."""
    parts = {name: getattr(model.config, name) for name in model.config.sub_configs}
    return {name: config._attn_implementation for name, config in {"": model.config, **parts}.items()}


def dynamic(model: Any) -> DynamicCache:
    """transformers' cache; the model's attention stays as it is."""
    return DynamicCache(config=model.config)
