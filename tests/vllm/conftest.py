"""Real vLLM on a tiny random model. `just test-vllm` runs these tests in an environment that has vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from models import SIZES, saved

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"
)


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
