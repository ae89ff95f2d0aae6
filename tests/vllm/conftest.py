"""Real vLLM on tiny random models. `just test-vllm` runs these tests in an environment that has vLLM."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def ask() -> Callable[..., tuple[Any, str]]:
    """Runs `ask.py` with a model, a cache dtype and options of `LLM`: its result, and its log."""

    def run(
        model: Path, cache_dtype: str, environment: dict[str, str], num_tokens: int = 20, **options: Any
    ) -> tuple[Any, str]:
        script = Path(__file__).with_name("ask.py")
        command = [sys.executable, str(script), str(model), cache_dtype, json.dumps(options), str(num_tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
        results = [line for line in done.stdout.splitlines() if line.startswith('{"tokens"')]
        return json.loads(results[-1]), done.stdout + done.stderr

    return run


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
