"""What `ask.py` prints, compared."""

from __future__ import annotations

import math
from typing import Any


def largest_divergence(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of the positions with the same tokens before them, the largest KL divergence."""
    divergences = []
    for tokens, found, expected_at, found_at in zip(
        one["tokens"], other["tokens"], one["logprobs"], other["logprobs"], strict=True
    ):
        for a, b, p, q in zip(tokens, found, expected_at, found_at, strict=True):
            divergences.append(sum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True)))
            if a != b:
                break
    return max(divergences)
