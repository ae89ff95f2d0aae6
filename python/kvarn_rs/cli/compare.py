"""A kvarn cache beside the unquantized one of transformers, same model, same weights, same machine.

Quality is judged in *decode semantics*: every scored token is fed with at most 15 others, so that it and all later
ones read the quantized history in every layer and errors accumulate as they do in use. Both caches are fed the same
tokens: the prompt, then the quantized run's own continuation, token by token. The continuation's positions are scored
and, if the prompt has 512 tokens or more, those of the prompt too: its first 256 tokens at once and unscored, the rest
16 at a time.

* `kl_mean`: mean KL divergence of the next-token distributions from the reference's, in nats, over `positions`;
* `same_top1`: share of them with the same likeliest token;
* `agreement_tokens`: greedy tokens of both caches until the first difference;
* `reference`: what the reference is, with its dtype;
* `reference_*`: memory and speed of the unquantized cache, generating as many tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache

from .._core import DECODE_TOKENS
from ..eval.metrics import agreement_length, kl_divergence, same_top1
from .console import Console
from .runs import GreedyRun, attention, attention_name, feed, greedy

SCORED_PROMPT_TOKENS = 512  # prompts from this length on are scored too
FIRST_TOKENS = 256


def compare(
    model: Any,
    prompt_ids: torch.Tensor,
    generated: GreedyRun,
    make_cache: Callable[[], Any],
    reference_attention: str,
    console: Console,
) -> dict[str, Any]:
    """The comparison, under the keys of the module's description.

    Args:
        model: a causal language model, its attention set for the kvarn cache.
        prompt_ids: [1, T].
        generated: the run with the kvarn cache.
        make_cache: a new kvarn cache.
        reference_attention: the attention implementation of the unquantized cache.
        console: for progress.
    """
    reference_cache = DynamicCache(config=model.config)
    with attention(model, reference_attention), console.progress("generating with the unquantized cache"):
        reference = greedy(model, prompt_ids, reference_cache, len(generated.tokens))
    reference_bytes = dense_bytes(reference_cache)
    held = reference_cache.get_seq_length()

    divergences, matches = [], []
    continuation = torch.tensor([generated.tokens])
    total = prompt_ids.shape[1] + continuation.shape[1]
    caches = make_cache(), DynamicCache(config=model.config)
    names = attention_name(model), reference_attention
    with console.progress("scoring both caches on the same tokens", total) as advance:
        for tokens, scored in _chunks(prompt_ids, continuation):
            logits = []
            for cache, name in zip(caches, names, strict=True):
                with attention(model, name):
                    logits.append(feed(model, tokens, cache, last_only=not scored))
            if scored:
                divergences.append(kl_divergence(logits[1], logits[0]))
                matches.append(same_top1(logits[1], logits[0]))
            advance(tokens.shape[1])
    divergence = torch.cat(divergences).double()
    return {
        "reference": f"unquantized ({str(model.dtype).removeprefix('torch.')})",
        "kl_mean": divergence.mean().item(),
        "same_top1": torch.cat(matches).double().mean().item(),
        "positions": divergence.numel(),
        "agreement_tokens": agreement_length(reference.tokens, generated.tokens),
        "reference_bytes_per_token": reference_bytes / held,
        "reference_bytes_in_use": reference_bytes,
        "reference_decode_tokens_per_s": reference.decode_tokens_per_s,
        "reference_prefill_s": reference.prefill_s,
    }


def _chunks(prompt_ids: torch.Tensor, continuation: torch.Tensor) -> Iterator[tuple[torch.Tensor, bool]]:
    """(tokens [1, T], scored): the steps in which a prompt and its continuation are fed."""
    first = FIRST_TOKENS if prompt_ids.shape[1] >= SCORED_PROMPT_TOKENS else prompt_ids.shape[1]
    yield prompt_ids[:, :first], False
    for start in range(first, prompt_ids.shape[1], DECODE_TOKENS):
        yield prompt_ids[:, start : start + DECODE_TOKENS], True
    for token in continuation[0]:
        yield token.view(1, 1), True


def dense_bytes(cache: DynamicCache) -> int:
    """Bytes of the keys and values that an unquantized cache holds."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)
