"""Behaviour of a `KvarnCache` besides its tokens: lengths, rollback, isolation, and errors that change nothing."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig

from hf.families import (
    CACHE_NAME,
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
from kvarn_rs.errors import (
    ConfigError,
    DeviceError,
    NonFiniteError,
    OutOfBlocksError,
    RollbackError,
    ShapeError,
    StaleStepError,
    UnknownFormatError,
    UnsupportedError,
)
from kvarn_rs.hf import KvarnCache, register


@contextlib.contextmanager
def failing(module: torch.nn.Module, message: str = "gave up"):
    """The module raises RuntimeError instead of running."""

    def fail(*args: object) -> None:
        raise RuntimeError(message)

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def poisoned(module: torch.nn.Module, row: int):
    """The output of the module is NaN in one batch row."""

    def poison(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[row, 0, 0] = float("nan")
        return output

    hook = module.register_forward_hook(poison)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("family", ["llama", "qwen3_mixed", "mistral"])
def test_lengths_are_those_of_a_dynamic_cache(model_of, family):
    model = model_of(family)
    reference = reference_cache(model)
    cache = kvarn_cache(model)
    for num_new in (0, 10, 13, 1, 1, 17, 1, 40, 2):
        if num_new:
            forward(model, reference, prompt(2, num_new))
            forward(model, cache, prompt(2, num_new))
        for layer_idx in range(3):
            assert cache.get_seq_length(layer_idx) == reference.get_seq_length(layer_idx)
            for query_length in (1, 5):
                mine, theirs = (c.get_mask_sizes(query_length, layer_idx) for c in (cache, reference))
                assert mine == theirs
    assert len(cache) == 3
    assert cache.is_sliding == reference.is_sliding
    assert [layer.get_max_length() for layer in cache.layers] == [layer.get_max_length() for layer in reference.layers]
    assert cache.is_initialized
    assert not cache.is_compileable
    assert cache.batch_size == 2
    assert cache.layers[0].dtype == torch.float32
    assert cache.layers[0].device.type == "cpu"


def test_handles_look_like_what_a_dynamic_cache_returns(model_of):
    reference = reference_cache(model_of("qwen3_mixed"))
    cache = kvarn_cache(model_of("qwen3_mixed"))
    for num_new in (30, 1, 3):
        k, v = torch.randn(2, 2, 2, num_new, 16).unbind(0)
        for layer_idx in range(3):
            for mine, theirs in zip(cache.update(k, v, layer_idx), reference.update(k, v, layer_idx), strict=True):
                assert mine.shape == theirs.shape
                assert mine.dtype == theirs.dtype
                assert mine.is_contiguous()


def test_a_crop_may_name_the_length_to_keep(model_of):
    model = model_of("llama")
    cache = kvarn_cache(model)
    forward(model, cache, prompt(1, 40))
    cache.crop(50)
    assert cache.get_seq_length() == 40
    cache.crop(33)
    assert cache.get_seq_length() == 33
    with pytest.raises(RollbackError, match="34 positions of 33"):
        cache.crop(-34)
    cache.crop(-33)
    assert cache.stats()["blocks_in_use"] == 0


def test_a_crop_beyond_a_window_is_refused_and_changes_nothing(model_of):
    model = model_of("qwen3_mixed")
    cache = kvarn_cache(model)
    forward(model, cache, prompt(1, 60))
    decode(model, cache, prompt(1, 1), 20)
    blocks = cache.stats()["blocks_in_use"]
    with pytest.raises(RollbackError, match="activate_past_recording"):
        cache.crop(-40)
    assert cache.get_seq_length() == 80
    assert cache.stats()["blocks_in_use"] == blocks
    cache.crop(-1)
    assert cache.get_seq_length() == 79


def test_past_recording_retains_the_window_until_the_next_crop(model_of):
    model = model_of("mistral")
    cache = kvarn_cache(model)
    cache.activate_past_recording()
    assert cache.layers[0].record_past
    forward(model, cache, prompt(1, 60))
    cache.crop(0)
    decode(model, cache, prompt(1, 1), 30)
    held = cache.stats()["blocks_in_use"]
    cache.crop(-30)
    assert cache.get_seq_length() == 60
    for _ in range(10):  # a crop after each forward, as in assisted decoding, keeps it small
        decode(model, cache, prompt(1, 1), 5)
        cache.crop(-1)
    assert cache.stats()["blocks_in_use"] < held


@pytest.mark.parametrize("first_forward", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3_mixed"])
def test_a_forward_that_fails_half_way_leaves_no_trace(family, first_forward):
    model = make_model(family)
    ids = prompt(2, 30)
    expected = decode(model, reference_cache(model), ids, 20)
    cache = kvarn_cache(model)
    tokens = []
    if not first_forward:
        ids = forward(model, cache, ids)[:, -1:].argmax(-1)
        tokens.append(ids)
    with failing(model.model.layers[1].mlp), pytest.raises(RuntimeError, match="gave up"):
        forward(model, cache, prompt(2, 3))
    assert cache.get_seq_length() == (0 if first_forward else 30)
    with pytest.warns(RuntimeWarning, match="after 2 of 3 layers"):
        tokens.append(decode(model, cache, ids, 20 - len(tokens)))
    assert torch.equal(torch.cat(tokens, 1), expected)
    assert cache.stats()["dropped_forwards"] == 1


def test_layers_that_are_not_paged_cannot_undo_a_failed_forward():
    model = make_model("qwen3_next")
    cache = kvarn_cache(model)
    with failing(model.model.layers[2]), pytest.raises(RuntimeError, match="gave up"):
        forward(model, cache, prompt(1, 30))
    expected = decode(model, kvarn_cache(model), prompt(1, 30), 5)
    cache.reset()
    assert torch.equal(decode(model, cache, prompt(1, 30), 5), expected)


@pytest.mark.parametrize("family", ["llama", "qwen3_mixed"])
@pytest.mark.parametrize("layer_idx", [0, 2])
def test_nan_is_refused_and_nothing_is_written(family, layer_idx):
    model = make_model(family)
    ids = prompt(2, 30)
    expected = decode(model, reference_cache(model), ids, 20)
    cache = kvarn_cache(model)
    ids = forward(model, cache, ids)[:, -1:].argmax(-1)
    before = cache.stats()["blocks_in_use"]
    with poisoned(model.model.layers[layer_idx].self_attn.v_proj, row=1), pytest.raises(NonFiniteError):
        forward(model, cache, ids)
    assert cache.get_seq_length() == 30
    assert cache.stats()["blocks_in_use"] == before
    assert torch.equal(torch.cat([ids, decode(model, cache, ids, 19)], 1), expected)


def test_two_models_with_two_caches_do_not_interfere():
    models = [make_model("llama", seed=1), make_model("qwen3_mixed", seed=2)]
    expected = [decode(model, reference_cache(model), prompt(1, 40), 15) for model in models]
    caches = [kvarn_cache(model) for model in models]
    ids = [prompt(1, 40)] * 2
    tokens: list[list[torch.Tensor]] = [[], []]
    for _ in range(15):
        for which, (model, cache) in enumerate(zip(models, caches, strict=True)):
            ids[which] = forward(model, cache, ids[which])[:, -1:].argmax(-1)
            tokens[which].append(ids[which])
    assert all(torch.equal(torch.cat(mine, 1), theirs) for mine, theirs in zip(tokens, expected, strict=True))
    assert sum(cache.stats()["dense_fallbacks"] for cache in caches) == 0


def test_a_copy_and_its_original_are_independent(model_of):
    model = model_of("qwen3_mixed")
    cache = kvarn_cache(model)
    forward(model, cache, prompt(2, 40))
    expected = decode(model, copy.deepcopy(cache), prompt(2, 1), 10)
    clone = copy.deepcopy(cache)
    decode(model, clone, prompt(2, 1, seed=9), 20)
    clone.reset()
    assert cache.get_seq_length() == 40
    assert torch.equal(decode(model, cache, prompt(2, 1), 10), expected)


def test_k_and_v_that_nothing_read_are_kept(model_of):
    cache = kvarn_cache(model_of("qwen3_mixed"))
    k, v = torch.randn(2, 1, 2, 5, 16).unbind(0)
    for layer_idx in range(3):
        cache.update(k, v, layer_idx)
    cache.crop(-1)
    assert cache.get_seq_length() == 4
    with pytest.warns(UserWarning, match="keys or values"):
        assert torch.equal(cache.layers[1].keys, k[:, :, :4])


def test_a_handle_is_stale_once_the_cache_has_moved_on(model_of):
    cache = kvarn_cache(model_of("llama"))
    k = torch.randn(1, 2, 5, 16)
    handles = [cache.update(k, k, layer_idx)[0] for layer_idx in range(3)]
    with pytest.warns(UserWarning, match="outside kvarn attention"):
        assert torch.equal(handles[0] + 0, k)
    cache.update(k, k, 0)
    with pytest.raises(StaleStepError, match="layer 1"):
        handles[1].sum()


def test_another_batch_size_is_refused(model_of):
    model = model_of("llama")
    cache = kvarn_cache(model)
    forward(model, cache, prompt(2, 20))
    with pytest.raises(ShapeError, match=r"2 rows of 20 positions.* 3 rows"):
        forward(model, cache, prompt(3, 1))
    forward(model, cache, prompt(2, 1))
    assert cache.get_seq_length() == 21
    cache.reset()
    forward(model, cache, prompt(3, 20))


def test_running_out_of_blocks_changes_nothing(model_of):
    model = model_of("qwen3_mixed")
    cache = kvarn_cache(model, num_blocks=4)
    forward(model, cache, prompt(1, 40))
    with pytest.raises(OutOfBlocksError):
        forward(model, cache, prompt(1, 40))
    assert cache.get_seq_length() == 40
    expected = kvarn_cache(model)
    forward(model, expected, prompt(1, 40))
    assert torch.equal(decode(model, cache, prompt(1, 1), 10), decode(model, expected, prompt(1, 1), 10))


def test_invalid_settings_are_named(model_of):
    config = model_of("llama").config
    with pytest.raises(UnknownFormatError, match=r"'int5'.*raw, int8"):
        KvarnCache(config, "int5")
    with pytest.raises(ConfigError, match="block_size"):
        KvarnCache(config, block_size=48)
    with pytest.raises(ConfigError, match="num_blocks is 0"):
        KvarnCache(config, num_blocks=0)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        KvarnCache(transformers.T5Config())
    with pytest.raises(ConfigError, match=r"layer 3 .* 3 layers"):
        KvarnCache(config).update(torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 4, 16), 3)
    with pytest.raises(ConfigError, match="not dict"):
        KvarnCache({"num_hidden_layers": 2})
    with torch.device("meta"):
        elsewhere = transformers.LlamaForCausalLM(config)
    with pytest.raises(DeviceError, match="meta"):
        KvarnCache(elsewhere)
    k = torch.empty(1, 2, 4, 16, device="meta")
    with pytest.raises(DeviceError, match="meta"):
        KvarnCache(config).update(k, k, 0)


def test_layers_of_a_group_change_together(model_of):
    cache = kvarn_cache(model_of("llama"))
    layer = cache.layers[0]
    for operation in (layer.crop, layer.reset, layer.reorder_cache, layer.batch_repeat_interleave):
        with pytest.raises(UnsupportedError, match="on the cache"):
            operation()


def test_a_config_is_enough_once_attention_is_registered():
    register()
    register()
    model = make_model("qwen3_mixed")
    expected = generate(model, reference_cache(model), input_ids=prompt(1, 40))
    model.set_attn_implementation("kvarn")
    cache = KvarnCache(model.config, "raw", block_size=16)
    assert torch.equal(generate(model, cache, input_ids=prompt(1, 40)), expected)
    assert cache.stats()["dense_fallbacks"] == 0


def test_a_composite_config_is_that_of_its_decoder():
    config = transformers.LlavaConfig(text_config=LlamaConfig(num_hidden_layers=5).to_dict())
    assert len(KvarnCache(config)) == 5


def test_early_initialization_makes_the_rows(model_of):
    model = model_of("qwen3_mixed")
    expected = decode(model, reference_cache(model), prompt(2, 40), 10)
    cache = kvarn_cache(model)
    assert not cache.is_initialized
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.batch_size == 2
    assert torch.equal(decode(model, cache, prompt(2, 40), 10), expected)


def test_offloading_is_a_no_op(model_of):
    cache = kvarn_cache(model_of("llama"))
    forward(model_of("llama"), cache, prompt(1, 20))
    cache.offload(0)
    cache.layers[0].prefetch()
    assert cache.get_seq_length() == 20


def test_generate_returns_the_cache_it_was_given(model_of):
    model = model_of("llama")
    cache = kvarn_cache(model)
    output: Any = generate(model, cache, input_ids=prompt(1, 20), return_dict_in_generate=True)
    assert output[CACHE_NAME] is cache


@pytest.mark.parametrize("batch", [{"input_ids": prompt(1, 50)}, left_padded([50, 33])], ids=["plain", "padded"])
def test_a_window_passed_only_to_attention_applies(batch):
    """All layers full for the cache, and sliding for the model's masks and attention."""
    model = make_model("mistral", layer_types=["full_attention"] * 3)
    expected = generate(model, reference_cache(model, keeps_everything=True), **batch)
    cache = kvarn_cache(model)
    assert cache.is_sliding == [False] * 3
    assert torch.equal(generate(model, cache, **batch), expected)
    assert cache.stats()["dense_fallbacks"] == 0


def test_a_window_longer_than_the_text_is_no_window(model_of):
    model = make_model("mistral", sliding_window=400)
    assert WINDOW < 400
    expected = generate(model, reference_cache(model), input_ids=prompt(1, 50))
    assert torch.equal(generate(model, kvarn_cache(model), input_ids=prompt(1, 50)), expected)
