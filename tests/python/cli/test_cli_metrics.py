"""The metrics of comparisons against values computed by hand."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from kvarn_rs.eval.metrics import agreement_length, kl_divergence, same_top1  # noqa: E402


def test_divergence_is_that_of_the_distributions_and_of_the_reference_first() -> None:
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]).log()
    logits = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]]).log() + 7  # a constant changes no distribution
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    torch.testing.assert_close(kl_divergence(reference, logits), torch.tensor([expected, 0.0]), atol=1e-6, rtol=1e-5)
    skewed = torch.tensor([0.9, 0.05, 0.05]).log()
    assert kl_divergence(reference[0], skewed) != kl_divergence(skewed, reference[0])


def test_tokens_that_both_rule_out_add_nothing() -> None:
    reference = torch.tensor([0.5, 0.5, 0.0]).log()
    torch.testing.assert_close(kl_divergence(reference, reference), torch.tensor(0.0))


def test_divergence_is_computed_in_float32_whatever_the_logits_are() -> None:
    logits = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    half = kl_divergence(logits.bfloat16(), logits.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, torch.zeros(4))


def test_the_likeliest_token_is_compared_at_each_position() -> None:
    reference = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    assert same_top1(reference, torch.tensor([[0.0, 9.0], [0.0, 9.0]])).tolist() == [True, False]


@pytest.mark.parametrize(
    ("reference", "tokens", "expected"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 5, 3], 1), ([1, 2], [1, 2, 3], 2), ([], [1], 0)],
)
def test_agreement_ends_at_the_first_difference(reference: list[int], tokens: list[int], expected: int) -> None:
    assert agreement_length(reference, tokens) == expected
