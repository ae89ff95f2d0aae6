"""Runs of vLLM, and what they are compared by."""

from __future__ import annotations

import gc
import importlib.metadata
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import probe
from vllm import LLM, SamplingParams  # pyright: ignore

OF_0_26 = importlib.metadata.version("vllm").startswith("0.26.")
VOCABULARY = 512
BLOCK = 128
KV_CACHE_BYTES = 64 << 20
PASSES = 2  # the second finds the prefixes of the first
# Rounding of float32 sums in another order than stock vLLM's.
RAW_DIVERGENCE = 1e-5
# Of the random model, at its worst token: twice what was seen. A wrong block, token or statistic gives 3e-2 and more.
MOST_DIVERGENCE = {"raw": RAW_DIVERGENCE, "int8": 1e-4, "int4": 2e-2, "int3": 7e-2, "int2": 2.5e-1}
# Stock vLLM also rounds probabilities to 16 bits, and ours does not.
MOST_DIVERGENCE_IN_16_BITS = {"raw": 1e-3, "int8": 1e-3, "int4": 2.5e-2}
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


class Answer(NamedTuple):
    """Tokens, and before each the log probabilities of all: `[tokens][vocabulary]`."""

    tokens: list[int]
    logprobs: list[list[float]]


def make_llm(model: Path, cache_dtype: str, **options: Any) -> LLM:
    """An engine in this process, with blocks of 128 tokens in 64 MiB."""
    gc.collect()  # an engine before it ends now, not in the midst of this one's work, whose process groups it would end
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


def greedy(llm: LLM, num_tokens: int = 20) -> list[Answer]:
    """The most likely tokens after each of `prompts`, and what all others had."""
    parameters = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, logprobs=VOCABULARY
    )
    return [answer_of(output.outputs[0]) for output in llm.generate(prompts(), parameters, use_tqdm=False)]


def answer_of(completion: Any) -> Answer:
    """What vLLM answered, of a request with the log probabilities of all tokens."""
    return Answer(list(completion.token_ids), [row_of(row) for row in completion.logprobs])


def row_of(logprobs: Any) -> list[float]:
    """The log probabilities of all tokens, of vLLM's by token."""
    return [logprobs[token].logprob for token in range(VOCABULARY)]


def same_tokens(expected: list[Answer], found: list[Answer]) -> bool:
    """Whether all answers have the same tokens."""
    return [answer.tokens for answer in expected] == [answer.tokens for answer in found]


def divergence(expected: list[float], found: list[float]) -> float:
    """The KL divergence of two distributions, given by their log probabilities."""
    return sum(math.exp(p) * (p - q) for p, q in zip(expected, found, strict=True))


def largest_divergence(expected: list[Answer], found: list[Answer]) -> float:
    """Of the positions with the same tokens before them, the largest KL divergence."""
    divergences = []
    for one, other in zip(expected, found, strict=True):
        for token, other_token, p, q in zip(one.tokens, other.tokens, one.logprobs, other.logprobs, strict=True):
            divergences.append(divergence(p, q))
            if token != other_token:
                break
    return max(divergences)


def core(llm: LLM) -> Any:
    """vLLM's engine core."""
    return llm.llm_engine.engine_core.engine_core  # pyright: ignore[reportAttributeAccessIssue]


def groups(llm: LLM) -> list[Any]:
    """kvarn's groups of layers, those of a draft model last."""
    return probe.groups_of(core(llm).model_executor.driver_worker.worker.model_runner)


def num_blocks(llm: LLM) -> int:
    """Blocks of the pool."""
    return core(llm).scheduler.kv_cache_manager.block_pool.num_gpu_blocks


def blocks_in_use(llm: LLM) -> int:
    """Blocks that requests hold; vLLM keeps block 0 for itself."""
    return num_blocks(llm) - 1 - core(llm).scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def finish(llm: LLM) -> None:
    """The step in which a worker hears of the requests that have finished."""
    core(llm).step()


def measure(model: Path, cache_dtype: str, feature: str, expected: list[Answer]) -> dict[str, Any]:
    """Runs a format with a feature, and says how far it is from what was expected, and what is left in use."""
    llm = make_llm(model, cache_dtype, **FEATURES[feature])
    scheduler, preempted = core(llm).scheduler, []
    preempt = scheduler._preempt_request
    scheduler._preempt_request = lambda *args, **kwargs: (preempted.append(1), preempt(*args, **kwargs))[1]
    answers = [greedy(llm) for _ in range(PASSES)]
    finish(llm)
    (group,) = groups(llm)
    stats = group.engine.stats()
    return {
        "same_tokens": [same_tokens(expected, found) for found in answers],
        "divergences": [largest_divergence(expected, found) for found in answers],
        "num_blocks": num_blocks(llm),
        "blocks_in_use": blocks_in_use(llm),
        "open_pages": stats["open_pages"],
        "peak_open_pages": stats["peak_open_pages"],
        "num_open_pages": group.num_open_pages,
        "sealed": stats["sealed"],
        "requests": group.num_requests,
        "preempted": len(preempted),
    }
