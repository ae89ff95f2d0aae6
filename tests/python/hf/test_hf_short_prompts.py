"""Short first prompts: the first page of a few tokens serves those after them as well as one of 32.

Models with K biases as Qwen2 and 2.5 have them: channels of 100 to 300 beside channels of 1.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from hf.families import CACHE_NAME, make_model
from kvarn_rs import Calibration
from kvarn_rs.hf import KvarnCache

LENGTH = 250
# Of the tokens' agreement with unquantized pages: that of one prompt differs from another's by so much by chance.
CHANCE = 0.05


@cache
def biased_model() -> Any:
    model = make_model(
        "qwen2",
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    for layer in model.model.layers:  # six slowly rotating pairs of channels
        biases = torch.randn(2, 2, 6).sign() * (100 + 200 * torch.rand(2, 2, 6))
        layer.self_attn.k_proj.bias.data.view(2, 2, 32)[:, :, 26:] = biases
    return model


@torch.no_grad()
def likeliest(format: str, first: int) -> torch.Tensor:
    """The likeliest tokens after each position from `first` on, one forward each after the first."""
    model = biased_model()
    token_ids = torch.randint(2, 128, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    kept = KvarnCache(model, format, calibration=Calibration())
    model(token_ids[:, :first], **{CACHE_NAME: kept})
    found = [
        model(token_ids[:, position : position + 1], **{CACHE_NAME: kept}).logits.argmax(-1)
        for position in range(first, LENGTH)
    ]
    return torch.cat(found, 1)


@cache
def agreement(format: str, first: int) -> float:
    """Share of the tokens that unquantized pages give, too."""
    return (likeliest(format, first) == likeliest("raw", first)).float().mean().item()


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("first", [1, 2, 5, 16, 31])
def test_a_short_prompt_agrees_as_well_as_one_of_32_tokens(format, first) -> None:
    assert agreement(format, first) >= agreement(format, 32) - CHANCE


def test_stats_report_the_tokens_that_the_first_page_was_opened_with() -> None:
    model = biased_model()
    kept = KvarnCache(model, "int8", calibration=Calibration())
    assert kept.stats()["first_page_tokens"] is None
    seen = []
    with torch.no_grad():
        for count in (5, 1, 1, 1, 20, 30):
            model(torch.full((1, count), 7), **{CACHE_NAME: kept})
            kept.crop(0)  # ends the forward
            seen.append(kept.stats()["first_page_tokens"])
    assert seen == [5, 6, 7, 8, 28, 58]
    unquantized = KvarnCache(model, "raw")
    with torch.no_grad():
        model(torch.full((1, 5), 7), **{CACHE_NAME: unquantized})
    unquantized.crop(0)
    assert unquantized.stats()["first_page_tokens"] is None
