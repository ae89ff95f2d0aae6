"""Kvarn caches beside the unquantized one of transformers, same model, same weights, same machine.

Quality is judged in *decode semantics*: every scored token is fed with at most 15 others, so that it and all later
ones read the quantized history in every layer and errors accumulate as they do in use. All caches are fed the same
tokens, chunk by chunk side by side: the prompt, then the greedy continuation of the cache that generated, token by
token. The continuation's positions are scored and, if the prompt has 512 tokens or more, those of the prompt too: its
first 256 tokens at once and unscored, the rest 16 at a time.

* `kl_mean`: mean KL divergence of the next-token distributions from the reference's, in nats, over `positions`;
* `same_top1`: share of them with the same likeliest token;
* `agreement_tokens`: greedy tokens of both caches until the first difference;
* `reference`: what the reference is, with its dtype;
* `reference_*`: memory and speed of the unquantized cache, generating as many tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from .._core import DECODE_TOKENS
from ..eval.metrics import agreement_length, kl_divergence, same_top1
from .console import Console
from .runs import GreedyRun, attention, feed, greedy, tensor_bytes

SCORED_PROMPT_TOKENS = 512  # prompts from this length on are scored too
UNSCORED_TOKENS = 256


@dataclass
class Scores:
    """How far a cache's distributions were from the reference's.

    Attributes:
        cache: the kvarn cache, with all the tokens that were fed.
        divergences: KL divergence in nats, of the positions of each scored chunk.
        matches: the same likeliest token? Likewise.
    """

    cache: Any
    divergences: list[torch.Tensor] = field(default_factory=list)
    matches: list[torch.Tensor] = field(default_factory=list)

    def add(self, reference: torch.Tensor, logits: torch.Tensor) -> None:
        """Scores the logits [T, vocabulary] of a chunk."""
        self.divergences.append(kl_divergence(reference, logits))
        self.matches.append(same_top1(reference, logits))

    @property
    def positions(self) -> int:
        """Positions scored."""
        return sum(map(len, self.divergences))

    @property
    def kl_mean(self) -> float:
        """Mean divergence."""
        return torch.cat(self.divergences).double().mean().item()

    @property
    def kl_last_quarter(self) -> float:
        """Mean divergence over the last quarter of the positions, rounded up: do errors grow?"""
        return torch.cat(self.divergences)[-((self.positions + 3) // 4) :].double().mean().item()

    @property
    def same_top1(self) -> float:
        """Share of the positions with the same likeliest token."""
        return torch.cat(self.matches).double().mean().item()


def score(
    model: Any,
    prompt_ids: torch.Tensor,
    continuation: list[int],
    caches: dict[str, Any],
    reference_attention: str,
    console: Console,
) -> tuple[dict[str, Scores], int]:
    """Feeds an unquantized cache and `caches`, empty ones by name, the same tokens, one chunk at a time.

    Args:
        model: a causal language model, its attention set for the kvarn caches.
        prompt_ids: [1, T].
        continuation: tokens after the prompt.
        caches: kvarn caches.
        reference_attention: the attention implementation of the unquantized cache.
        console: for progress.

    Returns:
        The scores by name, and the bytes that the unquantized cache holds in the end.
    """
    scores = {name: Scores(cache) for name, cache in caches.items()}
    reference = DynamicCache(config=model.config)
    total = (prompt_ids.shape[1] + len(continuation)) * (len(caches) + 1)
    with console.progress("scoring all caches on the same tokens", total) as advance:
        for tokens, scored in _chunks(prompt_ids, continuation):
            with attention(model, reference_attention):
                expected = feed(model, tokens, reference, last_only=not scored)
            advance(tokens.shape[1])
            for each in scores.values():
                logits = feed(model, tokens, each.cache, last_only=not scored)
                if scored:
                    each.add(expected, logits)
                advance(tokens.shape[1])
    return scores, tensor_bytes(reference.layers)


def compare(
    model: Any,
    prompt_ids: torch.Tensor,
    generated: GreedyRun,
    scores: Scores,
    reference_attention: str,
    console: Console,
) -> dict[str, Any]:
    """The comparison, under the keys of the module's description.

    Args:
        model: a causal language model, its attention set for the kvarn cache.
        prompt_ids: [1, T].
        generated: the run with the kvarn cache.
        scores: those of a kvarn cache like it.
        reference_attention: the attention implementation of the unquantized cache.
        console: for progress.
    """
    cache = DynamicCache(config=model.config)
    with attention(model, reference_attention), console.progress("generating with the unquantized cache"):
        reference = greedy(model, prompt_ids, cache, len(generated.tokens))
    reference_bytes = tensor_bytes(cache.layers)
    return {
        "reference": reference_name(model),
        "kl_mean": scores.kl_mean,
        "same_top1": scores.same_top1,
        "positions": scores.positions,
        "agreement_tokens": agreement_length(reference.tokens, generated.tokens),
        "reference_bytes_per_token": reference_bytes / cache.get_seq_length(),
        "reference_bytes_in_use": reference_bytes,
        "reference_decode_tokens_per_s": reference.decode_tokens_per_s,
        "reference_prefill_s": reference.prefill_s,
    }


def reference_name(model: Any) -> str:
    """What the unquantized cache is called: it keeps the model's dtype."""
    return f"unquantized ({str(model.dtype).removeprefix('torch.')})"


def _chunks(prompt_ids: torch.Tensor, continuation: Iterable[int]) -> Iterator[tuple[torch.Tensor, bool]]:
    """(tokens [1, T], scored): the steps in which a prompt and its continuation are fed."""
    first = UNSCORED_TOKENS if prompt_ids.shape[1] >= SCORED_PROMPT_TOKENS else prompt_ids.shape[1]
    yield prompt_ids[:, :first], False
    for start in range(first, prompt_ids.shape[1], DECODE_TOKENS):
        yield prompt_ids[:, start : start + DECODE_TOKENS], True
    for token in continuation:
        yield torch.tensor([[token]]), True
