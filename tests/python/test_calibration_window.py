"""INT8 keys follow their channels: a page's means and deviations are those of the 512 tokens before it."""

from __future__ import annotations

import pytest
import torch

from paged_reference import attention, contents, distance, extend, keys_and_values, make_cache, normal

HEAD_DIM = 64
BLOCK_SIZE = 128
WINDOW_TOKENS = 512
# Channels far from zero, as models with rotary embeddings have.
OUTLIERS = [3, 17, 40]
# A page whose statistics are known rounds a unit normal to steps of about 3 / 127; 3 leaves room for their own error.
KNOWN_PAGE_ERROR = 3 * (3 / 127) / 12**0.5
# What per-token INT8 without statistics loses on such channels, at least: its steps are 300 / 127.
FAR_BELOW = 20
# How far above its old error a changed channel may be after a window: it saw the keys as the old pages rounded them.
ABSORBED = 1.5
# The page after a change is this much worse, or the test has changed nothing.
NOTICED = 10


def outlying(mean: float = 300.0) -> torch.Tensor:
    means = torch.zeros(HEAD_DIM)
    means[OUTLIERS] = mean
    return means


def keys(num_tokens: int, mean: torch.Tensor, deviation: torch.Tensor | float = 1.0, seed: int = 0) -> torch.Tensor:
    return mean + deviation * normal(1, 1, num_tokens, HEAD_DIM, seed=seed)


def stored(k: torch.Tensor, num_new: int) -> torch.Tensor:
    """The keys as an INT8 cache holds them when they come `num_new` at a time."""
    cache = make_cache("int8", num_kv_heads=1, head_dim=HEAD_DIM, block_size=BLOCK_SIZE)
    sequence = cache.new_sequence()
    for part in k.split(num_new, 2):
        with cache.begin_step([sequence], part.shape[2]) as step:
            step.append(0, part, torch.zeros_like(part))
    return contents(cache, sequence)[0]


def plain_int8(k: torch.Tensor) -> torch.Tensor:
    """One scale a token, no statistics."""
    scale = k.abs().amax(-1, keepdim=True) / 127
    return (k / scale).round() * scale


def rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()


@pytest.mark.parametrize("num_new", [1, 16, 128, 700])
def test_channels_far_from_zero_stay_accurate(num_new) -> None:
    k = keys(2 * WINDOW_TOKENS, outlying())
    error = (stored(k, num_new) - k)[:, :, WINDOW_TOKENS:]
    assert rms(error) <= KNOWN_PAGE_ERROR
    assert rms(error) <= rms(plain_int8(k) - k) / FAR_BELOW


def test_attention_to_such_keys_stays_accurate_in_a_long_decode() -> None:
    k, v = keys(WINDOW_TOKENS + 100, outlying()), keys(WINDOW_TOKENS + 100, torch.zeros(HEAD_DIM), seed=1)
    q = normal(1, 1, 1, HEAD_DIM, seed=2)
    cache = make_cache("int8", num_kv_heads=1, head_dim=HEAD_DIM, block_size=BLOCK_SIZE)
    sequence, out = cache.new_sequence(), q
    extend(cache, sequence, k[:, :, :WINDOW_TOKENS], v[:, :, :WINDOW_TOKENS])
    for position in range(WINDOW_TOKENS, k.shape[2]):
        one = slice(position, position + 1)
        with cache.begin_step([sequence], 1) as step:
            step.append(0, k[:, :, one], v[:, :, one])
            out = step.attend(0, q, None, None)
    exact = attention(q, k, v)
    assert distance(out, exact) <= distance(attention(q, plain_int8(k), v), exact) / FAR_BELOW


@pytest.mark.parametrize("num_new", [1, 16])
@pytest.mark.parametrize(
    ("shift", "deviation", "spread"),
    [(0.0, 1.0, 1.5), (5.0, 3.0, 1.5), (50.0, 1.0, 0.5), (300.0, 1.0, 0.5), (-300.0, 5.0, 0.5)],
)
@pytest.mark.parametrize("change", [5 * BLOCK_SIZE, 5 * BLOCK_SIZE + 60])
def test_a_change_of_domain_is_absorbed_within_one_window(change, shift, deviation, spread, num_new) -> None:
    """A page is frozen as it is opened: what counts is the first page opened a window after the change."""
    old = keys(change, outlying())
    means = outlying() + torch.where(torch.arange(HEAD_DIM) % 2 == 0, shift, -shift)
    deviations = deviation * torch.exp(spread * normal(HEAD_DIM, seed=5))
    k = torch.cat([old, keys(WINDOW_TOKENS + 3 * BLOCK_SIZE, means, deviations, seed=1)], 2)
    error = stored(k, num_new) - k
    before = rms(error[:, :, 2 * BLOCK_SIZE : change])
    relative = error[:, :, change:] / deviations
    # The same tokens where nothing came before them.
    settled = ((stored(k[:, :, change:], num_new) - k[:, :, change:]) / deviations)[:, :, WINDOW_TOKENS:]
    absorbed = -(change + WINDOW_TOKENS) // BLOCK_SIZE * -BLOCK_SIZE - change
    assert rms(relative[:, :, :BLOCK_SIZE]) > NOTICED * before
    assert rms(relative[:, :, absorbed : absorbed + BLOCK_SIZE]) <= ABSORBED * rms(settled)
    assert rms(relative[:, :, absorbed:]) <= ABSORBED * rms(settled)


def test_a_prefill_absorbs_a_change_at_once() -> None:
    k = torch.cat([keys(640, outlying()), keys(640, outlying(-300.0), 3.0, seed=1)], 2)
    error = stored(k, 640) - k
    assert rms(error[:, :, 640:] / 3) <= ABSORBED * rms(error[:, :, :640])


def test_later_tokens_do_not_change_earlier_pages() -> None:
    k = torch.cat([keys(200, outlying()), keys(500, outlying(-300.0), 20.0, seed=1)], 2)
    assert torch.equal(stored(k, 10)[:, :, :200], stored(k[:, :, :200], 10))


def test_a_constant_channel_does_not_coarsen_the_others() -> None:
    k = keys(WINDOW_TOKENS + 100, torch.zeros(HEAD_DIM))
    k[..., 0], k[..., 1] = 360.1, 0.0  # float16 has 360.0 and 360.25
    error = stored(k, 1)[:, :, WINDOW_TOKENS:] - k[:, :, WINDOW_TOKENS:]
    assert rms(error[..., 2:]) <= KNOWN_PAGE_ERROR
    assert distance(error[..., 0], torch.zeros(1)) <= 0.02
    assert distance(error[..., 1], torch.zeros(1)) <= 0.02


def test_tokens_without_prior_statistics_are_as_accurate_as_plain_int8() -> None:
    k, v = keys_and_values(1)
    cache = make_cache("int8")
    sequence = cache.new_sequence()
    extend(cache, sequence, k, v)
    half_step = k.abs().amax(-1, keepdim=True) / 127 / 2
    # 127 steps of a scale rounded to float16's 11 bits are off by less than 1 / 8
    assert ((contents(cache, sequence)[0] - k).abs() <= 1.25 * half_step).all()
