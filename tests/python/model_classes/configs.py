"""Tiny configs: every class of transformers' causal language models, shrunk by the names of its settings.

A setting keeps its default unless `TINY` names it, or `OVERRIDES` does for its class. Windows, chunks and top-k
selections become shorter than the prompts, so that they matter to the tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

SEED = 0
VOCAB = 128
PAD, BOS = 0, 1
WINDOW = 16
LAYERS = 2
ENCODER_LAYERS = 3  # unlike the decoder's: decoders are built without their encoder, and depths differ in real models
HEADS = 4
HEAD_DIM = 16
HIDDEN = HEADS * HEAD_DIM
EXPERTS = 4

FULL_AND_SLIDING = ["full_attention", "sliding_attention"]
# The last two layers use the K and V of the first two.
KV_SHARED = {"num_hidden_layers": 4, "layer_types": 2 * FULL_AND_SLIDING[::-1], "num_kv_shared_layers": 2}
ALL_KV_SHARED = KV_SHARED | {"num_kv_shared_layers": 4}  # a draft model reads its target's


def _all(value: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, value)


TINY: dict[str, Any] = {
    **_all(VOCAB, "vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"),
    **_all(HIDDEN, "hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "input_embedding_size"),
    **_all(HIDDEN, "output_embedding_size", "attention_hidden_size", "lru_width", "word_embed_proj_dim"),
    **_all(HIDDEN, "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_inner", "dff"),
    **_all(HIDDEN, "dim_ff", "feed_forward_size", "ffn_hidden_size", "intermediate_size_mlp", "backbone_hidden_size"),
    **_all(HIDDEN, "dense_intermediate_size", "prefix_dense_intermediate_size", "mamba_d_ssm"),
    **_all(32, "moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size"),
    **_all(32, "shared_intermediate_size", "moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    **_all(LAYERS, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"),
    **_all(ENCODER_LAYERS, "encoder_layers", "num_encoder_layers"),
    **_all(HEADS, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"),
    **_all(HEADS, "decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"),
    **_all(HEADS, "num_encoder_attention_heads", "num_decoder_attention_heads"),
    **_all(2, "num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"),
    **_all(HEAD_DIM, "head_dim", "dim_head", "d_head", "kv_channels", "attention_head_size", "swa_head_dim"),
    **_all(HEAD_DIM, "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "q_lora_rank"),
    **_all(32, "kv_lora_rank"),
    **_all(512, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"),
    **_all(512, "original_max_position_embeddings", "context_length"),
    **_all(EXPERTS, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    **_all(2, "num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"),
    **_all(1, "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "n_group", "topk_group"),
    **_all(1, "first_k_dense_replace", "num_dense_layers", "zero_expert_num"),
    **_all(WINDOW, "sliding_window", "sliding_window_size", "attention_window_size", "local_attention", "window_size"),
    **_all(WINDOW, "attention_chunk_size", "keep_window_size", "local_attention_window_len"),
    **_all(8, "index_topk"),
    **_all(2, "index_n_heads", "index_topk_blocks"),
    **_all(32, "index_head_dim"),
    **_all(8, "index_block_size"),
    **_all(8, "rotary_dim"),
    # Linear attention, convolutions and state spaces.
    **_all(2, "linear_num_key_heads", "n_mamba_heads", "num_mem_blocks", "mamba_n_groups", "n_groups", "mamba_ngroups"),
    **_all(4, "linear_num_value_heads", "linear_num_heads"),
    **_all(16, "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"),
    **_all(16, "mamba_d_state", "ssm_state_size", "state_size", "mamba_d_head", "mamba_head_dim"),
    **_all(8, "mamba_n_heads", "mamba_num_heads"),
    **_all(16, "mamba_chunk_size", "chunk_size", "block_size"),
    **_all(16, "hidden_size_per_layer_input", "laurel_rank", "o_lora_rank"),
    # The usual 0.02 makes models whose tokens attention hardly changes; tied, they repeat their last token.
    **_all(0.2, "initializer_range", "init_std", "initializer_factor"),
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,  # nothing stops early
    "forced_eos_token_id": None,
    "use_cache": True,
}

# What a class wants besides, by the name of its config. Gemma 4's heads of 512, which no page holds, stay.
OVERRIDES: dict[str, dict[str, Any]] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {"encoder_hash_byte_group_vocab": 64},
    "CohereCompassTextConfig": {
        "layer_types": FULL_AND_SLIDING,
        "rope_parameters": _all({"rope_type": "default", "rope_theta": 1e4}, *FULL_AND_SLIDING),
    },
    "DbrxConfig": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "DoryConfig": {
        "num_hidden_layers": 4,
        "layer_types": 2 * FULL_AND_SLIDING[::-1],
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "Dots3NoteTextConfig": {
        **_all(HEADS, "swa_num_attention_heads", "swa_num_key_value_heads"),
        **_all(HEAD_DIM, "swa_qk_nope_head_dim", "swa_v_head_dim", "swa_q_lora_rank"),
        **_all(2 * HEAD_DIM, "swa_head_dim", "swa_kv_lora_rank"),
    },
    "FalconH1Config": {"mamba_d_ssm": 128},
    "Gemma3nTextConfig": KV_SHARED,
    "Gemma4AssistantConfig": {
        "text_config": ALL_KV_SHARED | _all(0, "hidden_size_per_layer_input", "vocab_size_per_layer_input")
    },
    "Gemma4TextConfig": KV_SHARED,
    "Gemma4UnifiedAssistantConfig": {"text_config": ALL_KV_SHARED},
    "Gemma4UnifiedTextConfig": KV_SHARED,
    "GraniteMoeHybridConfig": {"layer_types": ["linear_attention", "full_attention"]},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Inkling2LoopTextConfig": {
        "num_hidden_layers": 4,
        "layer_types": 2 * ["hybrid_sliding", "hybrid"],
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
    },
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Mamba2Config": {"num_heads": 8},
    "MiniMaxM3VLTextConfig": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "MusicgenDecoderConfig": {"num_codebooks": 1},
    "MusicgenMelodyDecoderConfig": {"num_codebooks": 1},
    "Phi4MultimodalAudioConfig": {"num_blocks": 1, "nemo_conv_channels": 16, "ext_pw_out_channel": HIDDEN},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "RecurrentGemmaConfig": {"num_hidden_layers": 3},
    "ReformerConfig": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "RoCBertConfig": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16, "shape_vocab_size": VOCAB},
    "XLMConfig": {"causal": True, "mask_token_id": 2},
    "XmodConfig": {"default_language": "en_XX"},
    "ZambaConfig": {"attention_hidden_size": 2 * HIDDEN},
    "ZayaConfig": {"num_experts_per_tok": 1},
}


def classes() -> dict[str, str]:
    """The name of the class of every causal language model of the installed transformers, by model type."""
    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_model(model_type: str) -> Any:
    """A random model of a class: float32, in eval mode, eager attention; the same one each time."""
    config_class: Any = CONFIG_MAPPING[model_type]
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    sub_classes = [type(getattr(_default(config_class), name)) for name in config_class.sub_configs]
    if model_class.config_class in sub_classes:
        config_class = model_class.config_class
    config = tiny_config(config_class)
    torch.manual_seed(SEED)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.decoder_start_token_id = BOS
    return model


def tiny_config(config_class: Any, **overrides: Any) -> Any:
    """A config of a class; overrides: its settings, and those of its sub-configs in a dict of their own."""
    names = {field.name for field in dataclasses.fields(config_class)}
    default = _default(config_class)
    settings = {name: value for name, value in TINY.items() if name in names}
    if {"kv_lora_rank", "num_key_value_heads"} <= names:  # latent attention: every head has its own K and V
        settings["num_key_value_heads"] = HEADS
    if "is_decoder" in names:
        settings["is_decoder"] = True
    for name in ("layer_types", "layers_block_type"):  # layers of every kind that the default has
        kinds = list(dict.fromkeys(getattr(default, name, None) or ()))
        if name in names and len(kinds) > 1:
            settings |= {name: kinds, "num_hidden_layers": len(kinds)}
    settings |= OVERRIDES.get(config_class.__name__, {}) | overrides
    for name in config_class.sub_configs:
        if (part := getattr(default, name)) is not None:
            settings[name] = tiny_config(type(part), **settings.get(name, {}))
    return config_class(**settings)


def _default(config_class: Any) -> Any:
    """The config of no arguments; of those of its sub-configs alone, where the class's own defaults are refused."""
    overrides = OVERRIDES.get(config_class.__name__, {})
    return config_class(**{name: overrides[name] for name in config_class.sub_configs if name in overrides})
