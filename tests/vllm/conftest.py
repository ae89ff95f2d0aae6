"""Real vLLM on tiny random models. `just test-vllm` runs these tests in an environment that has vLLM."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
from models import SIZES, saved

# At lower levels pytest keeps vLLM's records of errors, which keep engines alive by their tracebacks.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"
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


@pytest.fixture(scope="session", autouse=True)
def _engines_in_one_process() -> None:
    """Lets a process make an engine after one with ngram speculation, which stock vLLM 0.32 cannot.

    It replaces its Triton kernels again for each engine, by a walk through the attributes of all modules, and fails at
    one of numba's, which that speculation loads. Once is enough.
    """
    try:
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
    except ImportError:
        return
    platform = type(current_platform)
    register = getattr(platform, "register_triton_kernel_overrides", None)
    if register is not None:
        platform.register_triton_kernel_overrides = staticmethod(functools.cache(register))
