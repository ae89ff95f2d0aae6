"""Runs of vLLM, and what they are compared by."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams  # pyright: ignore

VOCABULARY = 512
BLOCK = 128
KV_CACHE_BYTES = 64 << 20
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "prefix caching": {"enable_prefix_caching": True},
    "chunked prefill": {"enable_chunked_prefill": True, "max_num_batched_tokens": 64},
    "preemption": {"num_gpu_blocks_override": 12, "max_num_batched_tokens": 256},
    "ngram speculation": {"speculative_config": NGRAM},
    "all at once": {
        "enable_prefix_caching": True,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 64,
        "speculative_config": NGRAM,
    },
}


def make_llm(model: Path, cache_dtype: str, **options: Any) -> LLM:
    """An engine in this process, with blocks of 128 tokens in 64 MiB."""
    settings: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "max_logprobs": VOCABULARY,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    settings |= {"block_size": BLOCK} if cache_dtype == "auto" else {"kv_cache_dtype": cache_dtype}
    return LLM(**{**settings, **options})


def prompts() -> list[Any]:
    """Prompts that share prefixes, that end on an edge of a block and beside it, and one that repeats itself."""
    numbers = random.Random(3)

    def tokens(count: int) -> list[int]:
        return [numbers.randrange(3, VOCABULARY) for _ in range(count)]

    one, other = tokens(400), tokens(520)
    shared = [one[:300], one[:300], one[:256], one[:257], other, other[:384], one[:130] + tokens(100)]
    return [{"prompt_token_ids": prompt} for prompt in [*shared, (tokens(40) * 6)[:230]]]


def greedy(llm: LLM, num_tokens: int = 20) -> list[tuple[list[int], list[Any]]]:
    """The most likely tokens after each of `prompts`, and the log probabilities of all tokens at each."""
    parameters = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, logprobs=VOCABULARY
    )
    outputs = llm.generate(prompts(), parameters, use_tqdm=False)
    return [(list(output.outputs[0].token_ids), output.outputs[0].logprobs or []) for output in outputs]


def largest_divergence(expected: list[tuple[list[int], list[Any]]], found: list[tuple[list[int], list[Any]]]) -> float:
    """Of the positions with the same tokens before them, the largest KL divergence."""
    divergences = []
    for (tokens, expected_logprobs), (other_tokens, found_logprobs) in zip(expected, found, strict=True):
        for token, other, p, q in zip(tokens, other_tokens, expected_logprobs, found_logprobs, strict=True):
            divergences.append(sum(math.exp(p[i].logprob) * (p[i].logprob - q[i].logprob) for i in p))
            if token != other:
                break
    return max(divergences)


def core(llm: LLM) -> Any:
    """vLLM's engine core."""
    return llm.llm_engine.engine_core.engine_core  # pyright: ignore[reportAttributeAccessIssue]


def groups(llm: LLM) -> list[Any]:
    """kvarn's groups of layers, those of a draft model last."""
    runner = core(llm).model_executor.driver_worker.worker.model_runner
    attention = [group for groups in runner.attn_groups for group in groups]
    attention += getattr(getattr(runner, "drafter", None), "draft_attn_groups", [])
    builders = [builder for group in attention for builder in group.metadata_builders]
    return [builder.group for builder in builders if getattr(builder, "group", None) is not None]


def num_blocks(llm: LLM) -> int:
    """Blocks of the pool."""
    return core(llm).scheduler.kv_cache_manager.block_pool.num_gpu_blocks


def blocks_in_use(llm: LLM) -> int:
    """Blocks that requests hold; vLLM keeps block 0 for itself."""
    return num_blocks(llm) - 1 - core(llm).scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def finish(llm: LLM) -> None:
    """The step in which a worker hears of the requests that have finished."""
    core(llm).step()
