"""Models, caches and arguments that kvarn attention does not support: the same tokens, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf.families import CACHE_NAME, forward, generate, kvarn_cache, left_padded, make_model, prompt, reference_cache
from hf.other_models import IMAGE_TOKEN, dynamic, git, implementations, llava, sparse_indexed
from kvarn_rs.errors import ShapeError, UnsupportedError
from kvarn_rs.hf import DenseFallbackWarning, KvarnCache, register
from kvarn_rs.hf.attention import HARMLESS, kvarn_attention

# The same sums in another order; logits of these models are of the order of 1.
TOLERANCE = 1e-4


# Models with attention of their own -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [git, sparse_indexed], ids=["git", "deepseek_v32"])
def test_a_model_that_cannot_be_served_is_left_as_it_was(make):
    model = make()
    batch = left_padded([40, 28])
    before = implementations(model)
    expected = generate(model, dynamic(model), **batch)
    with pytest.warns(DenseFallbackWarning) as caught:
        cache = KvarnCache(model, "raw", block_size=16)
    assert len(caught) == 1
    assert torch.equal(generate(model, cache, **batch), expected)  # a second warning would be an error
    assert implementations(model) == before
    assert cache.stats()["notices"] == [str(caught[0].message)]
    with pytest.raises(UnsupportedError):
        KvarnCache(model, "raw", strict=True)
    assert implementations(model) == before


def test_a_model_that_keeps_its_attention_counts_every_reading_of_k_and_v():
    model = git()
    with pytest.warns(DenseFallbackWarning, match="GitSelfAttention"):
        cache = kvarn_cache(model)
    generate(model, cache, input_ids=prompt(1, 20), max_new_tokens=5)
    assert cache.stats()["fallback_reasons"] == {"own_attention": 2 * 5}


# Its code reads K and V before it adds the mask.
@pytest.mark.filterwarnings("ignore::kvarn_rs.hf.DenseFallbackWarning")
def test_a_model_that_was_set_to_kvarn_attention_and_cannot_use_it_is_refused():
    model = git()
    register()
    model.set_attn_implementation("kvarn")
    ids = prompt(2, 30)
    with pytest.raises(UnsupportedError, match=r"set_attn_implementation\('eager'\)"):
        KvarnCache(model, "raw")
    for own in (KvarnCache(model.config, "raw"), dynamic(model)):
        with pytest.raises(UnsupportedError, match="attention code of its own"):
            forward(model, own, ids)


def test_sparse_indices_are_refused_by_name():
    model = sparse_indexed()
    register()
    model.set_attn_implementation("kvarn")
    with pytest.raises(UnsupportedError, match="indices"):
        forward(model, dynamic(model), prompt(1, 40))


def test_a_strict_refusal_restores_each_part_of_a_model():
    model = llava()
    model.set_attn_implementation({"": "sdpa", "vision_config": "eager", "text_config": "sdpa"})
    before = implementations(model)
    for layer in model.get_decoder().layers:
        layer.self_attn.__class__ = type("OwnAttention", (transformers.models.git.modeling_git.GitSelfAttention,), {})
    with pytest.raises(UnsupportedError, match="OwnAttention"):
        KvarnCache(model, "raw", strict=True)
    assert implementations(model) == before


# Models of several parts ----------------------------------------------------------------------------------------


def picture(model: Any) -> dict[str, torch.Tensor]:
    ids = prompt(1, 30)
    ids[ids == IMAGE_TOKEN] = 2
    ids[0, 5:9] = IMAGE_TOKEN
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def test_a_vision_tower_keeps_its_attention_or_has_kvarn_s():
    model = llava()
    expected = generate(model, dynamic(model), **picture(model))
    cache = kvarn_cache(model)
    assert implementations(model) == {"": "kvarn", "vision_config": "eager", "text_config": "kvarn"}
    model.set_attn_implementation("kvarn")
    assert implementations(model)["vision_config"] == "kvarn"
    for own in (cache, KvarnCache(model.config, "raw", block_size=16)):
        assert torch.equal(generate(model, own, **picture(model)), expected)
        assert own.stats()["fused_calls"] == 2 * 30
        assert own.stats()["dense_fallbacks"] == 0
        model.set_attn_implementation({"": "kvarn", "vision_config": "eager", "text_config": "kvarn"})


class Attention(torch.nn.Module):
    def __init__(self, is_causal: bool | None) -> None:
        super().__init__()
        if is_causal is not None:
            self.is_causal = is_causal


@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize(
    "mask",
    [
        None,
        torch.arange(12)[None, None, None] < torch.tensor([12, 7])[:, None, None, None],
        torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(3)) < 0.7,
        torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(3)),
    ],
    ids=["none", "columns", "3-D", "added"],
)
def test_tensors_are_attended_to_as_sdpa_does(is_causal, mask):
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 4, 12, 16, generator=random) for _ in range(3))
    module = Attention(is_causal).eval()
    expected, _ = sdpa_attention_forward(module, q, k, v, mask)
    actual, _ = kvarn_attention(module, q, k, v, mask)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


# Other caches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt_oss"])
def test_transformers_own_caches_keep_their_tokens_under_kvarn_attention(model_of, family, implementation):
    model = model_of(family)
    options: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False, "cache_implementation": implementation}
    if implementation == "static":
        options["disable_compile"] = True
    for batch in (left_padded([50, 33]), {"input_ids": prompt(1, 30)}):
        for num_beams in (1, 3):
            model.set_attn_implementation("eager")
            expected = model.generate(**batch, **options, num_beams=num_beams)
            kvarn_cache(model)  # sets the attention; the cache is not used
            assert torch.equal(model.generate(**batch, **options, num_beams=num_beams), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3_mixed"])
def test_a_static_cache_is_filled_in_pieces(model_of, family):
    model = model_of(family)

    def logits(attention: str) -> torch.Tensor:
        model.set_attn_implementation(attention)
        cache = transformers.StaticCache(config=model.config, max_cache_len=64)
        return torch.cat([forward(model, cache, ids) for ids in prompt(2, 40).split([13, 1, 20, 6], 1)], 1)

    register()
    torch.testing.assert_close(logits("kvarn"), logits("eager"), rtol=0, atol=TOLERANCE)


def test_keys_that_go_on_after_a_mask_are_refused(model_of):
    model = model_of("llama")
    register()
    model.set_attn_implementation("kvarn")

    class Longer(transformers.DynamicCache):
        def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
            key, value = super().update(key_states, value_states, *args, **kwargs)
            return torch.nn.functional.pad(key, (0, 0, 0, 3)), torch.nn.functional.pad(value, (0, 0, 0, 3))

    with pytest.raises(ShapeError, match="attention mask"):
        forward(model, Longer(config=model.config), prompt(1, 20))


# Other attention on a KvarnCache --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")  # of transformers
def test_flex_attention_gets_dense_tensors(model_of):
    model = model_of("llama")
    ids = prompt(1, 30)

    def logits(cache: Any) -> torch.Tensor:
        return torch.cat([forward(model, cache, ids), forward(model, cache, ids[:, :1])], 1)

    model.set_attn_implementation("flex_attention")
    expected = logits(dynamic(model))
    for own in (model, model.config):
        cache = KvarnCache(own, "raw", block_size=16)
        model.set_attn_implementation("flex_attention")
        with pytest.warns(DenseFallbackWarning, match="set_attn_implementation"):
            actual = logits(cache)
        torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
        assert cache.stats()["fallback_reasons"] == {"other_operation": 3 * 2}
        assert cache.get_seq_length() == 31


@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")  # of transformers
def test_flex_attention_on_a_strict_cache_is_refused_before_anything_is_written(model_of):
    model = model_of("llama")
    cache = kvarn_cache(model, strict=True)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedError, match="set_attn_implementation"):
        forward(model, cache, prompt(1, 30))
    assert cache.get_seq_length() == 0
    model.set_attn_implementation("kvarn")
    forward(model, cache, prompt(1, 30))


# Keyword arguments ----------------------------------------------------------------------------------------------


def attended(options: dict[str, Any], paged: bool, mask: torch.Tensor | None = None) -> Any:
    random = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, 12, 16, generator=random) for heads in (4, 2, 2))
    cache = kvarn_cache(make_model("llama"))
    if paged:
        k, v = cache.update(k, v, 0)
    try:
        return kvarn_attention(torch.nn.Identity().eval(), q, k, v, mask, **options)[0]
    except UnsupportedError:
        assert cache.get_seq_length() == 0
        raise


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize(
    "name", ["indices", "block_indices", "sinks", "head_mask", "layer_head_mask", "what_comes_next"]
)
def test_an_unknown_argument_is_refused_by_name_unless_it_says_nothing(paged, name):
    for given in (torch.zeros(1, 12, 3), 1.0, True):
        with pytest.raises(UnsupportedError, match=name):
            attended({name: given}, paged)
    plain = attended({}, paged)
    assert torch.equal(attended({name: None}, paged), plain)
    assert torch.equal(attended({name: False}, paged), plain)
    harmless = HARMLESS - {"output_attentions"}
    assert torch.equal(attended(dict.fromkeys(harmless, torch.ones(1)), paged), plain)


def test_sequences_laid_end_to_end_need_a_mask_that_says_so():
    starts = torch.tensor([0, 5, 12], dtype=torch.int32)
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 7, "max_length_k": 7}
    owner = torch.arange(12) >= 5
    mask = (owner[:, None] == owner[None]).tril()[None, None]
    for options in (packed, {"seq_idx": owner[None].int()}):
        for paged in (True, False):
            with pytest.raises(UnsupportedError, match=next(iter(options))):
                attended(options, paged)
        assert torch.equal(attended(options, False, mask), attended({}, False, mask))
    one = {"cu_seq_lens_q": starts[[0, 2]], "max_length_q": 12, "seq_idx": torch.zeros(1, 12)}
    assert torch.equal(attended(one, True), attended({}, True))


def test_packed_sequences_of_a_model_call_are_as_with_eager_attention(model_of):
    """What a flattening collator hands over: positions that begin anew, and where."""
    model = model_of("llama")
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    starts = torch.tensor([0, 9, 23], dtype=torch.int32)
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 14, "max_length_k": 14}
    options = {"input_ids": prompt(1, 23), "position_ids": positions, "use_cache": False, **packed}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**options).logits
        kvarn_cache(model)
        torch.testing.assert_close(model(**options).logits, expected, rtol=0, atol=TOLERANCE)
        with pytest.raises(UnsupportedError, match="cu_seq_lens_q"):
            model(**options, **{CACHE_NAME: kvarn_cache(model)})


def test_attention_weights_that_nobody_gets_are_warned_of(model_of):
    model = model_of("llama")
    ids = prompt(1, 20)
    expected = forward(model, reference_cache(model), ids)
    cache = kvarn_cache(model)
    with pytest.warns(UserWarning, match="no attention weights"):
        actual = forward(model, cache, ids, output_attentions=True)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
