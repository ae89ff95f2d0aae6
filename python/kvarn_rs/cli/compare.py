"""Comparison of kvarn caches with transformers' unquantized cache, on one model and machine.

Quality is measured in *decode semantics*: every scored token is fed in a chunk of at most 16, so that it reads the
quantized history in every layer and errors accumulate as in generation. All caches get the same chunks in turn: the
prompt, then the greedy continuation from the kvarn cache, one token at a time. The positions of the continuation are
scored. If the prompt has 512 tokens or more, its positions are scored too, 16 tokens at a time, except the first 256,
which are one unscored chunk.

* `kl_mean`: mean KL divergence of the next-token distributions from the reference's, in nats, over `positions`;
* `same_top1`: share of positions with the same most likely token;
* `agreement_tokens`: greedy tokens of both caches before the first difference;
* `reference`: name of the reference, with its dtype;
* `reference_*`: memory and speed of the unquantized cache when it generates as many tokens.
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

SCORED_PROMPT_TOKENS = 512  # shortest prompt whose positions are scored
UNSCORED_TOKENS = 256  # at the start of such a prompt


@dataclass
class Scores:
    """Quality of one cache against the reference.

    Attributes:
        cache: the kvarn cache, which has all tokens that were fed.
        divergences: KL divergence in nats of each position, by scored chunk.
        matches: bool of each position, whether the most likely token is the same, by scored chunk.
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
        """Number of scored positions."""
        return sum(map(len, self.divergences))

    @property
    def kl_mean(self) -> float:
        """Mean divergence over all positions."""
        return torch.cat(self.divergences).double().mean().item()

    @property
    def kl_last_quarter(self) -> float:
        """Mean divergence over the last quarter of the positions (rounded up), which shows whether errors grow."""
        return torch.cat(self.divergences)[-((self.positions + 3) // 4) :].double().mean().item()

    @property
    def same_top1(self) -> float:
        """Share of the positions with the same most likely token."""
        return torch.cat(self.matches).double().mean().item()


def score(
    model: Any,
    prompt_ids: torch.Tensor,
    continuation: list[int],
    caches: dict[str, Any],
    reference_attention: str,
    console: Console,
) -> tuple[dict[str, Scores], int]:
    """Feeds the same chunks of tokens to an unquantized cache and to `caches`, and scores the latter.

    Args:
        model: a causal language model, its attention set for the kvarn caches.
        prompt_ids: [1, T].
        continuation: tokens after the prompt.
        caches: empty kvarn caches, by name.
        reference_attention: the attention implementation of the unquantized cache.
        console: for progress.

    Returns:
        The scores by name, and the final bytes of the unquantized cache.
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
    """Runs the unquantized cache and returns the comparison, with the keys listed in the module docstring.

    Args:
        model: a causal language model, its attention set for the kvarn cache.
        prompt_ids: [1, T].
        generated: the run with the kvarn cache.
        scores: scores of a kvarn cache with the same settings.
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
    """The name of the unquantized cache, with the model's dtype."""
    return f"unquantized ({str(model.dtype).removeprefix('torch.')})"


def _chunks(prompt_ids: torch.Tensor, continuation: Iterable[int]) -> Iterator[tuple[torch.Tensor, bool]]:
    """The chunks in which a prompt and its continuation are fed: (tokens [1, T], whether they are scored)."""
    first = UNSCORED_TOKENS if prompt_ids.shape[1] >= SCORED_PROMPT_TOKENS else prompt_ids.shape[1]
    yield prompt_ids[:, :first], False
    for start in range(first, prompt_ids.shape[1], DECODE_TOKENS):
        yield prompt_ids[:, start : start + DECODE_TOKENS], True
    for token in continuation:
        yield torch.tensor([[token]]), True
