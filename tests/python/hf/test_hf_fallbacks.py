"""Dense fallbacks: correct results, counted with a warning, or refused by a strict cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from hf.families import (
    CACHE_NAME,
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
from hf.other_models import dynamic, latent, make_other
from kvarn_rs.errors import ConfigError, UnsupportedError
from kvarn_rs.hf import DenseFallbackWarning, KvarnCache
from kvarn_rs.hf.attention import kvarn_attention

# The same sums in another order; logits of these models are of the order of 1.
TOLERANCE = 1e-4


def packed_mask(lengths: list[int]) -> torch.Tensor:
    """An additive 4-D mask of sequences laid end to end that do not see each other."""
    total = sum(lengths)
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    seen = (owner[:, None] == owner[None]) & (torch.arange(total)[:, None] >= torch.arange(total)[None])
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "qwen3_mixed", "gemma3"])
def test_another_attention_gets_dense_tensors(model_of, family, attention):
    model = model_of(family)
    batch = left_padded([50, 33, 7])
    expected = generate(model, reference_cache(model), **batch, num_beams=2, max_new_tokens=20)
    cache = kvarn_cache(model)
    model.set_attn_implementation(attention)
    with pytest.warns(DenseFallbackWarning, match="set_attn_implementation") as caught:
        actual = generate(model, cache, **batch, num_beams=2, max_new_tokens=20)
    assert torch.equal(actual, expected)
    assert len(caught) == 1  # one a reason, not one a call
    stats = cache.stats()
    assert stats["fused_calls"] == 0
    assert stats["fallback_reasons"] == {"other_operation": 3 * 20}


def test_a_strict_cache_refuses_to_leave_the_pages(model_of):
    model = model_of("llama")
    cache = kvarn_cache(model, strict=True)
    forward(model, cache, prompt(1, 20))
    model.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match="set_attn_implementation"):
        forward(model, cache, prompt(1, 1))
    model.set_attn_implementation("kvarn")
    assert cache.get_seq_length() == 20
    forward(model, cache, prompt(1, 1))
    assert cache.stats()["dense_fallbacks"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_of_one_s_own_gives_the_logits_of_eager_attention(model_of, family):
    model = model_of(family)
    ids, mask = prompt(1, WINDOW - 4), packed_mask([9, WINDOW - 13])
    expected = forward(model, reference_cache(model), ids, mask)
    cache = kvarn_cache(model)
    with pytest.warns(DenseFallbackWarning, match="2-D attention_mask"):
        actual = forward(model, cache, ids, mask)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    assert set(cache.stats()["fallback_reasons"]) == {"custom_mask"}


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_a_mask_of_one_s_own_tells_which_rows_are_padding(model_of, family):
    """A prompt whose start sees all of itself, left-padded, as with images: decoding it stays on the pages."""
    model = model_of(family)
    batch = left_padded([WINDOW - 4, 9])
    tokens = batch["attention_mask"].bool()
    length = tokens.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen[-6:-2, -6:-2] = True
    seen = seen[None, None] & tokens[:, None, None, :]
    mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    positions = {"position_ids": (tokens.long().cumsum(-1) - 1).clamp(min=0)}
    grown = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    reference = reference_cache(model)
    expected = forward(model, reference, batch["input_ids"], mask, **positions)
    expected_tokens = decode(model, reference, prompt(2, 1, seed=8), 20, grown)
    cache = kvarn_cache(model)
    with pytest.warns(DenseFallbackWarning, match="2-D attention_mask"):
        actual = forward(model, cache, batch["input_ids"], mask, **positions)
    torch.testing.assert_close(actual[tokens], expected[tokens], rtol=0, atol=TOLERANCE)
    assert torch.equal(decode(model, cache, prompt(2, 1, seed=8), 20, grown), expected_tokens)
    assert cache.stats()["fallback_reasons"] == {"custom_mask": 3}


@pytest.mark.parametrize("family", ["llama", "qwen3_mixed"])
def test_tokens_hidden_later_are_left_out(model_of, family):
    model = model_of(family)
    ids, mask = prompt(2, 40), torch.ones(2, 41, dtype=torch.long)
    mask[1, 25:33] = 0
    reference = reference_cache(model)
    forward(model, reference, ids)
    expected = forward(model, reference, prompt(2, 1, seed=8), mask)
    cache = kvarn_cache(model)
    forward(model, cache, ids)
    with pytest.warns(DenseFallbackWarning, match="hides tokens"):
        actual = forward(model, cache, prompt(2, 1, seed=8), mask)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "reasons"), [("llama", set()), ("qwen3_mixed", {"padding_in_window"})])
def test_padding_between_tokens_counts_as_distance_in_a_window_only(model_of, family, reasons):
    model = model_of(family)
    ids, mask = prompt(2, 40), torch.ones(2, 40, dtype=torch.long)
    mask[1, 30:] = 0  # padded on the right, then continued
    expected_cache = reference_cache(model)
    expected = forward(model, expected_cache, ids, mask)
    grown = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    expected_tokens = decode(model, expected_cache, prompt(2, 1, seed=8), 20, grown)
    cache = kvarn_cache(model)
    actual = forward(model, cache, ids, mask)
    torch.testing.assert_close(actual[mask == 1], expected[mask == 1], rtol=0, atol=TOLERANCE)
    if reasons:
        with pytest.warns(DenseFallbackWarning, match="on the left"):
            tokens = decode(model, cache, prompt(2, 1, seed=8), 20, grown)
    else:
        tokens = decode(model, cache, prompt(2, 1, seed=8), 20, grown)
    assert torch.equal(tokens, expected_tokens)
    assert set(cache.stats()["fallback_reasons"]) == reasons


def test_padding_cannot_be_shown_later(model_of):
    model = model_of("qwen3_mixed")
    cache = kvarn_cache(model)
    batch = left_padded([20, 11])
    forward(model, cache, batch["input_ids"], batch["attention_mask"])
    for mask in (None, torch.ones(2, 21, dtype=torch.long)):
        with pytest.raises(ConfigError, match="position 0 of batch row 1"):
            forward(model, cache, prompt(2, 1), mask)
        assert cache.get_seq_length() == 20
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    forward(model, cache, prompt(2, 1), mask)
    assert cache.stats()["dense_fallbacks"] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_kvarn_attention_serves_other_caches(model_of, family):
    model = model_of(family)
    batch = left_padded([50, 33])
    expected = generate(model, reference_cache(model), **batch, max_new_tokens=20)
    kvarn_cache(model)  # sets the attention
    assert torch.equal(generate(model, DynamicCache(config=model.config), **batch, max_new_tokens=20), expected)


@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("not_causal", {"is_causal": False}),
        ("position_bias", {"position_bias": torch.linspace(-3, 3, 4 * 20 * 20).view(1, 4, 20, 20)}),
    ],
)
def test_attention_that_pages_do_not_do_is_done_on_tensors(model_of, reason, options):
    cache = kvarn_cache(model_of("llama"))
    q, k, v = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 20, 16), torch.randn(2, 2, 20, 16)
    causal = options.get("is_causal", True)
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.3 + options.get("position_bias", 0)
    if causal:
        scores = scores.masked_fill(~torch.ones(20, 20, dtype=torch.bool).tril(), float("-inf"))
    expected = (scores.softmax(-1) @ v.repeat_interleave(2, 1)).transpose(1, 2)
    key, value = cache.update(k, v, 0)
    with pytest.warns(DenseFallbackWarning):
        actual, _ = kvarn_attention(torch.nn.Identity().eval(), q, key, value, None, scaling=0.3, **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    assert cache.stats()["fallback_reasons"] == {reason: 1}


def test_reading_keys_and_values_warns_and_gives_what_a_dynamic_cache_holds(model_of):
    model = model_of("qwen3_mixed")
    reference = reference_cache(model)
    cache = kvarn_cache(model)
    assert cache.layers[0].keys is None
    ids = prompt(2, 40)
    forward(model, reference, ids)  # under kvarn attention too: the same K and V
    forward(model, cache, ids)
    with pytest.warns(DenseFallbackWarning, match="keys or values"):
        mine = [(layer.keys, layer.values) for layer in cache.layers]
    theirs = [(layer.keys, layer.values) for layer in reference.layers]
    torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)
    assert cache.stats()["fallback_reasons"] == {"keys_values": 6}


def test_k_and_v_that_pages_cannot_hold_stay_with_transformers():
    """MLA caches a latent and a rotated key, of different widths."""
    model = latent("DeepseekV3")
    batch = left_padded([50, 33])
    expected = generate(model, reference_cache(model), **batch, num_beams=2)
    cache = kvarn_cache(model)
    with pytest.warns(DenseFallbackWarning, match="unquantized cache"):
        actual = generate(model, cache, **batch, num_beams=2)
    assert torch.equal(actual, expected)
    assert cache.stats()["fallback_reasons"] == {"unsupported_shape": 2 * 30}
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.crop(-3)
    assert cache.get_seq_length() == 50 + 29 - 3
    with pytest.raises(UnsupportedError, match="unquantized cache"):
        generate(model, kvarn_cache(model, strict=True), **batch)


def test_a_head_dim_that_pages_cannot_hold_is_named():
    model = make_model("llama", head_dim=20)
    expected = generate(model, reference_cache(model), input_ids=prompt(1, 30))
    with pytest.warns(DenseFallbackWarning, match="head_dim"):
        assert torch.equal(generate(model, kvarn_cache(model), input_ids=prompt(1, 30)), expected)
    with pytest.raises(UnsupportedError, match="head_dim"):
        forward(model, kvarn_cache(model, strict=True), prompt(1, 30))


def test_a_model_with_its_own_attention_is_reported():
    model = make_other("Bloom")
    batch = {"input_ids": prompt(1, 30)}
    expected = generate(model, dynamic(model), **batch)
    with pytest.warns(DenseFallbackWarning, match="BloomForCausalLM has its own attention"):
        cache = KvarnCache(model, "raw", block_size=16)
    assert torch.equal(generate(model, cache, **batch), expected)
    assert cache.stats()["fallback_reasons"] == {"own_attention": 2 * 30}
    with pytest.raises(UnsupportedError, match="BloomForCausalLM"):
        KvarnCache(model, "raw", strict=True)


def test_attention_on_pages_has_neither_dropout_nor_gradients():
    model = make_model("llama")
    cache = kvarn_cache(model)
    model.train()
    with pytest.raises(UnsupportedError, match=r"model\.eval"):
        model(input_ids=prompt(1, 20), **{CACHE_NAME: cache})
    model.eval()
    logits = model(input_ids=prompt(1, 20), **{CACHE_NAME: cache}).logits  # without torch.no_grad()
    torch.testing.assert_close(logits.detach(), forward(model, kvarn_cache(model), prompt(1, 20)))
    with pytest.raises(UnsupportedError, match="no gradients"):
        logits.sum().backward()
