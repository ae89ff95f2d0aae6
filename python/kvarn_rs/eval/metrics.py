"""Metrics between two runs of one model, as pure functions of logits and tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["agreement_length", "kl_divergence", "same_top1"]


def kl_divergence(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || logits) of the next-token distributions, in nats, for each position.

    Args:
        reference, logits: [..., vocabulary], any float dtype; computed in fp32.

    Returns:
        [...], fp32.
    """
    expected = torch.log_softmax(reference.float(), dim=-1)
    found = torch.log_softmax(logits.float(), dim=-1)
    terms = expected.exp() * (expected - found)
    total = terms.masked_fill(expected == -torch.inf, 0).sum(dim=-1)  # the limit of p log p
    return total.clamp(min=0)  # negative by rounding only


def same_top1(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Whether the most likely token is the same: bool [...] of logits [..., vocabulary]."""
    return reference.argmax(dim=-1) == logits.argmax(dim=-1)


def agreement_length(reference: Sequence[int], tokens: Sequence[int]) -> int:
    """The number of tokens before the first difference; the shorter length if there is none."""
    for index, (expected, found) in enumerate(zip(reference, tokens, strict=False)):
        if expected != found:
            return index
    return min(len(reference), len(tokens))
