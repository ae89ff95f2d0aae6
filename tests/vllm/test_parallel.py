"""Tensor parallelism: each rank has the calibration of its heads, and the results are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
import apart
from models import SIZES, saved
from runs import largest_divergence, same_tokens

pytestmark = pytest.mark.slow

# Codes of tiles that sums in another order round to the other side. Another head's calibration gives 1e-2 and more.
MOST_DIFFERENCE = 1e-3
FOUR_HEADS = {**SIZES, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def four_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with four key/value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return saved(LlamaForCausalLM, LlamaConfig(**FOUR_HEADS), tmp_path_factory.mktemp("four_heads"))


@pytest.fixture(scope="module")
def calibrated(four_heads: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder for XDG_CACHE_HOME, and the model's calibration in it."""
    from transformers import AutoModelForCausalLM

    from kvarn_rs.hf import calibrate
    from kvarn_rs.hf.calibration import calibration_path

    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        model = AutoModelForCausalLM.from_pretrained(four_heads)
        calibrate(model, [3 + i * i % 500 for i in range(700)])
        return home, calibration_path(model)


@pytest.mark.parametrize(("found", "engine"), [(False, "0"), (True, "1")], ids=["learned", "from a file"])
def test_two_ranks_give_what_one_process_gives(
    found: bool,
    engine: str,
    four_heads: Path,
    calibrated: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    home, file = calibrated if found else (tmp_path, calibrated[1])
    environment = {"XDG_CACHE_HOME": str(home), "VLLM_ENABLE_V1_MULTIPROCESSING": engine}
    said = f"calibration: {file}" if found else f"calibration: learned from the first requests (no {home}"
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    two = apart.run(four_heads, "kvarn_int4", environment, **ranks)
    assert two["log"].count(said) == 1, "the first rank says which calibration it has"
    one = apart.run(four_heads, "kvarn_int4", environment)
    assert one["log"].count(said) == 1
    assert same_tokens(one["answers"], two["answers"])
    assert largest_divergence(one["answers"], two["answers"]) < MOST_DIFFERENCE
