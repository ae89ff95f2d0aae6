"""Real vLLM on a tiny random model. `just test-vllm` runs these tests in an environment that has vLLM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"
)


SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "initializer_range": 0.05,
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, whose next tokens are far from certain."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return saved(LlamaForCausalLM, LlamaConfig(**SIZES), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def sliding_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as a Mistral whose queries see 100 tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(**SIZES, sliding_window=100)
    return saved(MistralForCausalLM, config, tmp_path_factory.mktemp("sliding_model"))


def saved(kind: Any, config: Any, folder: Path) -> Path:
    """A model of random weights, the same each time, in a folder."""
    import torch

    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    return folder
