"""Formats with weights of a real model, and with weights that are quantized themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
import runs
import torch
from safetensors.torch import load_file, save_file

from kvarn_rs.cli.demo import cache_folder

pytestmark = pytest.mark.slow

GROUP = 32
CODES_IN_A_WORD = 8
# Zero points of 8 of 0 to 15; GPTQ stores one less.
ZEROS = {"awq": 0x88888888, "gptq": 0x77777777}
SCALE = 0.01
"""Codes of a standard deviation of 4.6 become weights of 0.05, as those of the model."""


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The model with 4-bit codes for weights, in the format of AWQ or GPTQ. The codes are random, in any order."""

    def make(method: str) -> Path:
        torch.manual_seed(1)
        folder = tmp_path_factory.mktemp(method)
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(model / "model.safetensors").items():
            if not name.endswith("_proj.weight"):
                tensors[name] = tensor.to(torch.bfloat16)
                continue
            outputs, inputs = tensor.shape
            layer = name.removesuffix(".weight")
            rows, columns = (inputs, outputs // CODES_IN_A_WORD)
            if method == "gptq":
                rows, columns = inputs // CODES_IN_A_WORD, outputs
                tensors[f"{layer}.g_idx"] = torch.arange(inputs, dtype=torch.int32) // GROUP
            tensors[f"{layer}.qweight"] = torch.randint(-(2**31), 2**31, (rows, columns)).to(torch.int32)
            zeros = torch.full((inputs // GROUP, outputs // CODES_IN_A_WORD), ZEROS[method]).to(torch.int32)
            tensors[f"{layer}.qzeros"] = zeros
            tensors[f"{layer}.scales"] = torch.full((inputs // GROUP, outputs), SCALE, dtype=torch.float16)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((model / "config.json").read_text())
        settings = {"bits": 4, "group_size": GROUP}
        of_method = {"awq": {"zero_point": True, "version": "gemm"}, "gptq": {"desc_act": False, "sym": True}}
        config["quantization_config"] = {"quant_method": method, **settings, **of_method[method]}
        config["dtype"] = "bfloat16"
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_quantized_weights_answer_as_in_stock_vllm(quantized: Callable[[str], Path], method: str) -> None:
    folder = quantized(method)
    options: dict[str, Any] = {"dtype": "bfloat16", "max_num_batched_tokens": 256}
    stock = runs.make_llm(folder, "auto", **options)
    assert stock.llm_engine.vllm_config.quant_config is not None
    expected = runs.greedy(stock)
    ours = runs.make_llm(folder, "kvarn_int4", **options)
    assert runs.largest_divergence(expected, runs.greedy(ours)) < runs.MOST_DIVERGENCE_IN_16_BITS["int4"]
    runs.finish(ours)
    assert runs.blocks_in_use(ours) == 0
    assert runs.groups(ours)[0].engine.stats()["open_pages"] == 0


@pytest.mark.parametrize(("format", "agreeing"), [("raw", 32), ("int8", 32), ("int4", 16)])
def test_a_real_model_goes_on_as_in_stock_vllm(format: str, agreeing: int) -> None:
    if not (cache_folder() / "config.json").is_file():
        pytest.skip("the demo model is not converted yet: `kvarn generate --model demo`")
    from transformers import AutoTokenizer

    text = (Path(__file__).parents[2] / "examples/prompt.txt").read_text()
    prompt: Any = {"prompt_token_ids": AutoTokenizer.from_pretrained(cache_folder())(text).input_ids}
    found = []
    for cache_dtype in ("auto", f"kvarn_{format}"):
        options = {"max_model_len": 2048, "max_num_batched_tokens": 512, "kv_cache_memory_bytes": 256 << 20}
        llm = runs.make_llm(cache_folder(), cache_dtype, **options)
        parameters = runs.SamplingParams(temperature=0, max_tokens=32, ignore_eos=True, detokenize=False)
        (output,) = llm.generate([prompt], parameters, use_tqdm=False)
        found.append(list(output.outputs[0].token_ids))
        del llm
    assert found[0][:agreeing] == found[1][:agreeing]
