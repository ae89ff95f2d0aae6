"""Tiny random models, one per way of attending, and their caches."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch.nn import ModuleList
from transformers import DynamicCache

from kvarn_rs.hf import KvarnCache, register

BLOCK_SIZE = 16
WINDOW = 24  # neither a multiple of the block size nor longer than the prompts
VOCAB = 128
PAD = 0

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
SLIDING = {"sliding_window": WINDOW}
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,  # tied, a random model repeats its last token
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    # Nothing stops early: an early stop would hide what comes after it.
    "eos_token_id": None,
    "bos_token_id": 1,
    "pad_token_id": PAD,
}

# family: (class stem, what its config adds)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "qwen3_mixed": ("Qwen3", {"layer_types": MIXED, "use_sliding_window": True, **SLIDING}),
    "mistral": ("Mistral", SLIDING),
    "gemma2": ("Gemma2", {"layer_types": MIXED, "query_pre_attn_scalar": 16, **SLIDING}),
    "gemma3": ("Gemma3", {"layer_types": MIXED, "query_pre_attn_scalar": 16, **SLIDING}),
    "gpt_oss": ("GptOss", {"layer_types": MIXED, "num_local_experts": 2, "num_experts_per_tok": 2, **SLIDING}),
}
MORE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("Phi3", {}),
    "phi3_sliding": ("Phi3", SLIDING),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1]}),
    "olmo3": ("Olmo3", {"layer_types": MIXED, **SLIDING}),
    "cohere2": ("Cohere2", {"layer_types": MIXED, **SLIDING}),
    "glm4": ("Glm4", {"partial_rotary_factor": 0.5}),
    "gemma4_shared": (
        "Gemma4",
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCAB,
            **SLIDING,
        },
    ),
    "gpt2": ("GPT2", {"n_layer": 3, "n_head": 4, "n_embd": 64, "n_positions": 512}),
}
# Attention layers, and layers of other kinds that stay transformers' own.
HYBRID_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": (
        "Qwen3Next",
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "llama4": (
        "Llama4",
        {
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
            "no_rope_layers": [1, 0, 1],
            "attention_chunk_size": WINDOW,
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
        },
    ),
}
# Families with a fourth layer, to leave some out.
FOUR_LAYERS = {
    "llama": {"num_hidden_layers": 4},
    "qwen3_mixed": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
ALL_FAMILIES = {**FAMILIES, **MORE_FAMILIES, **HYBRID_FAMILIES}

# The argument by which models take their cache; it was renamed in transformers 5.24.
_PARAMETERS = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
CACHE_NAME = "cache" if "cache" in _PARAMETERS else "past_key_values"


def _class(*names: str) -> Any:
    """The first of these that transformers has."""
    return next(getattr(transformers, name) for name in names if hasattr(transformers, name))


def make_model(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A model of a family with eager attention, float32, in eval mode."""
    stem, extra = ALL_FAMILIES[family]
    names = ["vocab_size", *(name for name in TINY if name.endswith("token_id"))] if stem == "GPT2" else TINY
    settings = {**{name: TINY[name] for name in names}, **extra, **overrides}
    config = _class(f"{stem}TextConfig", f"{stem}Config")(**settings)
    return random_model(_class(f"{stem}ForCausalLM", f"{stem}LMHeadModel"), config, seed)


def random_model(model_class: Any, config: Any, seed: int = 0) -> Any:
    """A model of a class whose attention matters to its tokens: eager, float32, in eval mode. Nothing stops early."""
    torch.manual_seed(seed)
    model = model_class._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        # Larger than the usual initialisation, biases and sinks included.
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.15)
            elif name.endswith(("bias", "sinks")):
                parameter.normal_(0, 0.5)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def kvarn_cache(model: Any, format: str = "raw", **kwargs: Any) -> Any:
    """A cache of small blocks; sets the model's attention."""
    return KvarnCache(model, format, block_size=BLOCK_SIZE, **kwargs)


def reference_cache(model: Any, keeps_everything: bool = False) -> Any:
    """transformers' cache with eager attention: the oracle. Sets the model's attention.

    One that keeps everything leaves windows to the mask, so that it can always go back; those that do not cannot in
    some releases.
    """
    model.set_attn_implementation("eager")
    return DynamicCache() if keeps_everything else DynamicCache(config=model.config)


def prompt(batch_size: int, length: int, seed: int = 7) -> torch.Tensor:
    """Random token ids [batch_size, length], no padding."""
    return torch.randint(2, VOCAB, (batch_size, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 7) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask of prompts of these lengths, padded on the left to the longest."""
    ids = prompt(len(lengths), max(lengths), seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = PAD
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, cache: Any, **kwargs: Any) -> torch.Tensor:
    """Token ids [rows, length], 30 new ones unless told."""
    options = {"max_new_tokens": 30, "do_sample": False, **kwargs}
    return model.generate(**options, **{CACHE_NAME: cache})


@torch.no_grad()
def forward(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    """Logits [B, T, vocab] of one forward; positions follow from the 2-D mask as in generate."""
    if mask is not None and mask.dim() == 2 and "position_ids" not in kwargs:
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask, use_cache=True, **{CACHE_NAME: cache}, **kwargs).logits


def decode(model: Any, cache: Any, ids: torch.Tensor, num_new: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Greedy token ids [B, num_new] after forwarding ids; mask covers everything up to and with ids, or is None."""
    tokens = []
    for _ in range(num_new):
        ids = forward(model, cache, ids, mask)[:, -1:].argmax(-1)
        tokens.append(ids)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
    return torch.cat(tokens, 1)


def pruned(family: str, kept: list[int]) -> Any:
    """A model of four layers by its config, of which some are kept, in this order."""
    model = make_model(family, **FOUR_LAYERS[family])
    keep(model, kept)
    return model


def keep(model: Any, kept: list[int]) -> None:
    """Leaves a model these of its layers, in this order."""
    layers = list(model.model.layers)
    model.model.layers = ModuleList(layers[index] for index in kept)


@torch.no_grad()
def recomputed(model: Any, ids: torch.Tensor, num_new: int) -> torch.Tensor:
    """Greedy token ids [B, num_new] without a cache."""
    length = ids.shape[1]
    for _ in range(num_new):
        ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids[:, length:]


def config_only(model: Any, format: str = "raw") -> KvarnCache:
    """A cache that does not know its model. Sets the model's attention."""
    register()
    model.set_attn_implementation("kvarn")
    return KvarnCache(model.config, format, block_size=BLOCK_SIZE)
