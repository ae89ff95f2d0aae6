"""Runs this environment's vLLM on a tiny random model, for `kvarn doctor --vllm`: `python -m kvarn_rs.vllm.check`.

One line of stdout, among lines of vLLM's, is JSON: ``{"version", "divergence": {FORMAT: float}, "error": str | null}``,
the KL divergence of the next token's distribution from that of vLLM's own cache, after a prompt of which kvarn stores
whole blocks and a part of one.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import math
import os
import tempfile
from typing import Any

from . import formats

MOST_DIVERGENCE = {"int8": 1e-3, "int4": 0.1}
"""Eight and six times what was seen. Blocks in another order give 0.5, one that is left out 1."""

_VOCABULARY = 256
_NUM_TOKENS = 2 * formats.BLOCK_SIZE + 20


def measure() -> dict[str, float]:
    """The divergence by format."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.1,  # so that the next token depends on those before
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        names = ["auto", *(formats.PREFIX + name for name in MOST_DIVERGENCE)]
        expected, *found = (_next_token(folder, name) for name in names)
    return {
        name: sum(math.exp(p) * (p - q) for p, q in zip(expected, logprobs, strict=True))
        for name, logprobs in zip(MOST_DIVERGENCE, found, strict=True)
    }


def _next_token(model: str, cache_dtype: str) -> list[float]:
    """Log probabilities of the tokens after one that was decoded: it reads all of the prompt from the cache."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        skip_tokenizer_init=True,
        kv_cache_dtype=cache_dtype,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=2,
        max_logprobs=_VOCABULARY,
        kv_cache_memory_bytes=16 << 20,
        enforce_eager=True,
    )
    prompt: Any = [{"prompt_token_ids": [1 + index * 31 % 250 for index in range(_NUM_TOKENS)]}]
    # The same first token for all: its logit is raised beyond what weights can do.
    parameters = SamplingParams(
        temperature=0, max_tokens=2, ignore_eos=True, detokenize=False, logprobs=_VOCABULARY, logit_bias={7: 100.0}
    )
    (output,) = llm.generate(prompt, parameters, use_tqdm=False)
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None
    return [logprobs[1][token].logprob for token in range(_VOCABULARY)]


def main() -> None:
    """Prints the result; errors of vLLM and of the plugin are part of it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    result: dict[str, Any] = {"version": None, "divergence": {}, "error": None}
    try:
        import vllm

        result["version"] = vllm.__version__
        result["divergence"] = measure()
    except Exception as error:  # whatever is wrong with the environment
        result["error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
