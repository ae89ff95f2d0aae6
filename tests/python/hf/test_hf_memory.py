"""Memory of a `KvarnCache`, and the effect of quantization on logits."""

from __future__ import annotations

import weakref

import pytest
import torch

from hf.families import (
    BLOCK_SIZE,
    FAMILIES,
    WINDOW,
    decode,
    forward,
    generate,
    kvarn_cache,
    left_padded,
    make_model,
    prompt,
    reference_cache,
)
from kvarn_rs.hf.attention import kvarn_attention

# Norm of the difference over norm of the logits of random models; the largest seen is 0.012.
INT8_TOLERANCE = 0.03


def teacher_forced(model, format, batch, text):
    cache = kvarn_cache(model, format)
    mask = batch["attention_mask"]
    logits = [forward(model, cache, batch["input_ids"], mask)[:, -1:]]
    for column in text.split(1, 1):
        mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
        logits.append(forward(model, cache, column, mask))
    assert cache.stats()["dense_fallbacks"] == 0
    return torch.cat(logits, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_stays_close_to_raw(model_of, family):
    model, batch, text = model_of(family), left_padded([50, 33]), prompt(2, 30, seed=8)
    raw = teacher_forced(model, "raw", batch, text)
    int8 = teacher_forced(model, "int8", batch, text)
    error = ((int8 - raw).norm() / raw.norm()).item()
    assert 0 < error < INT8_TOLERANCE


@pytest.mark.parametrize("family", ["llama", "qwen3_mixed"])
def test_int8_generates_with_beams_and_padding(model_of, family):
    cache = kvarn_cache(model_of(family), "int8")
    tokens = generate(model_of(family), cache, **left_padded([50, 19]), num_beams=3, num_return_sequences=3)
    assert tokens.shape == (6, 80)
    assert cache.stats()["dense_fallbacks"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_half_precision_is_as_close_to_eager_attention_as_its_rounding(family, dtype):
    model = make_model(family).to(dtype)
    batch = left_padded([50, 33])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    full = make_model(family)
    exact = forward(full, reference_cache(full), ids, mask)[mask == 1]
    eager = forward(model, reference_cache(model), ids, mask)[mask == 1].float()
    paged = forward(model, kvarn_cache(model), ids, mask)[mask == 1].float()
    assert (paged - exact).norm() < 1.2 * (eager - exact).norm()


def test_a_prefill_frees_k_and_v_layer_by_layer(model_of):
    cache = kvarn_cache(model_of("llama"))
    q, k = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16)
    alive = weakref.ref(k)
    key, value = cache.update(k, k, 0)
    kvarn_attention(torch.nn.Identity().eval(), q, key, value, None)
    del k, key, value
    assert alive() is None


def test_beams_share_blocks(model_of):
    model, num_beams, length, num_new = model_of("llama"), 4, 2 * BLOCK_SIZE, 6 * BLOCK_SIZE
    cache = kvarn_cache(model)
    generate(model, cache, input_ids=prompt(1, length), num_beams=num_beams, max_new_tokens=num_new)
    dense_blocks = num_beams * (length + num_new) // BLOCK_SIZE
    assert cache.stats()["peak_blocks"] < 0.75 * dense_blocks


def test_copies_of_a_prompt_share_its_blocks(model_of):
    model = model_of("llama")
    cache = kvarn_cache(model)
    forward(model, cache, prompt(1, 3 * BLOCK_SIZE))
    cache.batch_repeat_interleave(5)
    assert cache.stats()["blocks_in_use"] == 3
    decode(model, cache, prompt(5, 1), 1)
    assert cache.stats()["blocks_in_use"] == 3 + 5


def test_a_sliding_window_releases_blocks(model_of):
    model = model_of("mistral")
    cache = kvarn_cache(model)
    decode(model, cache, prompt(1, 100), 60)
    # A window of W tokens lies in at most this many blocks, and the step's own token may open one more.
    assert cache.stats()["blocks_in_use"] <= -(-(WINDOW - 1) // BLOCK_SIZE) + 2
    assert cache.get_seq_length() == 159


def test_padding_takes_no_space(model_of):
    model = model_of("llama")
    cache = kvarn_cache(model)
    batch = left_padded([3 * BLOCK_SIZE, BLOCK_SIZE])
    forward(model, cache, batch["input_ids"], batch["attention_mask"])
    assert cache.stats()["blocks_in_use"] == 4


def test_bytes_per_token_are_those_of_the_layouts(model_of):
    model = model_of("qwen3_mixed")
    num_layers, num_kv_heads, head_dim = 3, 2, 16
    assert kvarn_cache(model).stats()["bytes_per_token"] == 0  # not known before the first K and V
    sizes = {}
    for format in ("raw", "int8"):
        cache = kvarn_cache(model, format)
        forward(model, cache, prompt(1, 20))
        sizes[format] = cache.stats()["bytes_per_token"]
    assert sizes["raw"] == num_layers * num_kv_heads * 2 * head_dim * 4  # float32 K and V
    assert sizes["int8"] < sizes["raw"] / 2
