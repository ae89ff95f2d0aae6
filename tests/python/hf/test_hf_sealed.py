"""Formats that seal under transformers: rollback, padding, copies, calibration, and pages that run out."""

from __future__ import annotations

import copy
import importlib.metadata
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from hf.families import BLOCK_SIZE, decode, forward, generate, kvarn_cache, left_padded, make_model, prompt
from kvarn_rs import Calibration, CalibrationError, ConfigError, OutOfBlocksError, OutOfOpenPagesError, RollbackError
from kvarn_rs.hf import DenseFallbackWarning, KvarnCache, calibrate

ROOT = Path(__file__).parents[3]
PROSE, CODE = "examples/prompt.txt", "python/kvarn_rs/hf/group.py"
SEALED = pytest.mark.parametrize("format", ["int4", "int3", "int2"])
# Norm of the difference over norm of the logits, of one layer. What unsealing adds is INT8 rounding, once more.
UNSEALED_ERROR = 0.03
# The same for a row that is alone: products of matrices differ in the last bit, and now and then a code.
ALONE_ERROR = 0.03


def relative(logits: torch.Tensor, others: torch.Tensor) -> float:
    return ((logits - others).norm() / others.norm()).item()


def cache_of(model: Any, format: str = "int4", **settings: Any) -> KvarnCache:
    """One with a calibration of its own, so that no test meets what another one has learned."""
    return kvarn_cache(model, format, **{"calibration": Calibration(), **settings})


def read_values(cache: Any, layer: int = 0) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DenseFallbackWarning)
        values = cache.layers[layer].values
    assert values is not None
    return values


# When


@SEALED
def test_what_a_forward_fills_is_sealed_by_the_next(model_of, format):
    cache = cache_of(model_of("llama"), format)
    seen = []
    for num_new in (70, 9, 1, 1, 40):  # 70, 79, 80, 81 and 121 positions
        forward(model_of("llama"), cache, prompt(2, num_new))
        cache.get_seq_length()
        cache.crop(0)  # settles
        seen.append((cache.stats()["sealed"], cache.stats()["open_pages"]))
    assert seen == [(2 * n, 2 * pages) for n, pages in [(3, 2), (4, 1), (4, 1), (5, 1), (5, 3)]]


# Going back


@SEALED
@pytest.mark.parametrize("family", ["llama", "qwen3_mixed", "gemma3"])
def test_a_crop_into_a_sealed_block_is_as_if_the_rest_had_never_been(model_of, family, format):
    model = model_of(family)
    cropped, never = cache_of(model, format), cache_of(model, format)
    for cache in (cropped, never):
        cache.activate_past_recording()
        forward(model, cache, prompt(2, 60))
    rejected = prompt(2, 45, seed=9)
    forward(model, cropped, rejected)  # 105 positions: two blocks are sealed at once, and the prompt's last full one
    forward(model, cropped, prompt(2, 1))
    cropped.crop(-42)
    assert cropped.get_seq_length() == 64
    forward(model, never, rejected[:, :4])
    cropped.crop(-9)
    never.crop(-9)
    groups = 1 if family == "llama" else 2
    assert cropped.stats()["unsealed"] >= 2 * groups
    for seed, num_new in enumerate([1, 1, 5, 30, 1]):
        logits = [forward(model, cache, prompt(2, num_new, seed)) for cache in (cropped, never)]
        assert cropped.get_seq_length() == never.get_seq_length()
        assert relative(*logits) < {"int4": 0.3, "int3": 0.6, "int2": 1.0}[format], "loosely: three layers"


@SEALED
def test_unsealing_costs_one_more_rounding_to_8_bits(format):
    model = make_model("llama", num_hidden_layers=1)
    ids = prompt(2, 120)
    cropped, whole = cache_of(model, format), cache_of(model, format)
    for cache in (cropped, whole):
        forward(model, cache, ids[:, :100])
        forward(model, cache, ids[:, 100:101])
    assert cropped.stats()["sealed"] == 2 * 5
    cropped.crop(90)
    assert cropped.stats()["unsealed"] == 2
    for position in range(90, 101):  # again what was there, token by token
        forward(model, cropped, ids[:, position, None])
    logits = [forward(model, cache, ids[:, 101:102]) for cache in (cropped, whole)]
    assert 0 < relative(*logits) < {"int4": 0.1, "int3": 0.2, "int2": 0.5}[format]
    raw = kvarn_cache(model)
    forward(model, raw, ids[:, :101])
    exact = forward(model, raw, ids[:, 101:102])
    assert relative(logits[0], exact) < 1.3 * relative(logits[1], exact) + UNSEALED_ERROR


@pytest.mark.parametrize("drafts", [4, 12, 40])
def test_drafts_of_up_to_16_tokens_are_rejected_before_anything_of_them_is_sealed(model_of, drafts):
    model = model_of("llama")
    ids = torch.cat([prompt(1, 14)] * 5, 1)
    cache = cache_of(model)
    tokens = generate(model, cache, input_ids=ids, prompt_lookup_num_tokens=drafts, max_new_tokens=60)
    assert tokens.shape == (1, 130)
    stats = cache.stats()
    assert stats["sealed"] > 5
    assert stats["dense_fallbacks"] == 0
    assert (stats["unsealed"] > 0) == (drafts > 16)
    # The step of verification has one token more than the drafts; a decode never seals its own tokens.


def test_drafts_across_a_block_s_end_can_be_taken_back(model_of):
    model = model_of("qwen3_mixed")
    cache, never = cache_of(model), cache_of(model)
    for one in (cache, never):
        one.activate_past_recording()
        forward(model, one, prompt(1, 45))
        one.crop(0)
    forward(model, cache, prompt(1, 10, seed=5))  # fills the third block, and begins the fourth
    cache.crop(-9)
    forward(model, never, prompt(1, 10, seed=5)[:, :1])
    assert cache.stats()["unsealed"] == 0
    logits = [forward(model, one, prompt(1, 3)) for one in (cache, never)]
    assert relative(*logits) < 0.05
    one_layer = make_model("llama", num_hidden_layers=1)
    caches = [cache_of(one_layer), cache_of(one_layer)]
    for one, drafts in zip(caches, (10, 1), strict=True):
        forward(one_layer, one, prompt(1, 45))
        forward(one_layer, one, prompt(1, 10, seed=5)[:, :drafts])
        one.crop(46)
    logits = [forward(one_layer, one, prompt(1, 3)) for one in caches]
    assert relative(*logits) < 1e-5, "nothing of the rejected tokens is left"


def test_a_crop_further_than_a_window_is_refused_and_changes_nothing(model_of):
    model = model_of("qwen3_mixed")
    cache = cache_of(model)
    forward(model, cache, prompt(1, 60))
    decode(model, cache, prompt(1, 1), 30)
    cache.crop(0)
    before = cache.stats()
    with pytest.raises(RollbackError, match="activate_past_recording"):
        cache.crop(-40)
    assert cache.stats() == before


# Rows


def test_rows_of_a_padded_batch_equal_single_sequences():
    model = make_model("llama", num_hidden_layers=1)
    lengths = [70, 33, 16]
    batch = left_padded(lengths)
    frozen = calibrate(model, prompt(1, 200), save=False)
    together, mask = cache_of(model, calibration=frozen), batch["attention_mask"]
    logits = [forward(model, together, batch["input_ids"], mask)[:, -1:]]
    for seed in range(20):
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        logits.append(forward(model, together, prompt(3, 1, seed), mask))
    sums = {"sealed": 0, "open_pages": 0, "blocks_in_use": 0, "bytes_in_use": 0}
    for row, length in enumerate(lengths):
        alone = cache_of(model, calibration=frozen)
        own = [forward(model, alone, batch["input_ids"][row, None, -length:])[:, -1:]]
        own += [forward(model, alone, prompt(3, 1, seed)[row, None]) for seed in range(20)]
        for mine, theirs in zip(own, logits, strict=True):
            assert relative(mine, theirs[row, None]) < ALONE_ERROR
        alone.crop(0)
        sums = {name: total + alone.stats()[name] for name, total in sums.items()}
    together.crop(0)
    assert {name: together.stats()[name] for name in sums} == sums


@SEALED
def test_the_first_token_that_is_no_padding_keeps_8_bits(model_of, format):
    model, lengths = model_of("llama"), [90, 41, 33]
    batch = left_padded(lengths)
    cache, raw = cache_of(model, format), kvarn_cache(model)
    for one in (cache, raw):
        forward(model, one, batch["input_ids"], batch["attention_mask"])
    error = (read_values(cache) - read_values(raw)).square().mean(3).sqrt().amax(1)
    for row, length in enumerate(lengths):
        first = 90 - length
        assert error[row, first] < 0.02
        assert error[row, first + 1 : first + BLOCK_SIZE].min() > 3 * error[row, first]


# Copies, reset


@SEALED
def test_a_copy_goes_its_own_way_and_shares_only_the_calibration(model_of, format):
    model = model_of("llama")
    cache = cache_of(model, format)
    forward(model, cache, prompt(2, 70))
    expected = decode(model, copy.deepcopy(cache), prompt(2, 1), 12)
    clone = copy.deepcopy(cache)
    assert clone.calibration is cache.calibration
    decode(model, clone, prompt(2, 1, seed=9), 40)
    clone.crop(-70)
    assert (cache.stats()["unsealed"], clone.get_seq_length()) == (0, 40)
    clone.reset()
    assert clone.stats()["open_pages"] == clone.stats()["bytes_in_use"] == 0
    assert torch.equal(decode(model, cache, prompt(2, 1), 12), expected)


@SEALED
def test_after_a_reset_everything_is_as_in_a_new_cache(model_of, format):
    model, frozen = model_of("gemma3"), Calibration()
    decode(model, cache_of(model, "int8", calibration=frozen), prompt(1, 200), 2)
    frozen.freeze()
    cache = cache_of(model, format, calibration=frozen)
    decode(model, cache, prompt(3, 70), 20)
    cache.reset()
    again = decode(model, cache, prompt(2, 50, seed=8), 30)
    assert torch.equal(again, decode(model, cache_of(model, format, calibration=frozen), prompt(2, 50, seed=8), 30))


# Calibration


def test_caches_of_a_model_learn_together_until_it_is_frozen():
    model = make_model("llama", max_position_embeddings=4096)
    first, second = KvarnCache(model, block_size=BLOCK_SIZE), KvarnCache(model, block_size=BLOCK_SIZE)
    assert first.calibration is second.calibration
    assert first.stats()["calibrated"] == "no"
    forward(model, first, prompt(1, 100))
    first.crop(0)
    assert first.stats()["calibrated"] == "no", "too few to tell by, and sealed plainly"
    assert first.stats()["sealed"] > 0
    forward(model, second, prompt(1, 60))
    assert {cache.stats()["calibrated"] for cache in (first, second)} == {"own prompt"}
    before = [layer["query_tokens"] for layer in second.calibration.layers()]
    assert before == [160] * 3
    decode(model, second, prompt(1, 1), 5)
    assert first.calibration.wanted(0) == 2048 - 165, "decoded tokens count as well"
    forward(model, first, prompt(1, 2500))
    assert {cache.stats()["calibrated"] for cache in (first, second)} == {"frozen"}
    other = KvarnCache(make_model("llama", seed=1), block_size=BLOCK_SIZE)
    assert other.stats()["calibrated"] == "no"


def test_padding_teaches_nothing():
    model = make_model("llama")
    cache = cache_of(model)
    batch = left_padded([50, 33, 7])
    forward(model, cache, batch["input_ids"], batch["attention_mask"])
    assert [layer["query_tokens"] for layer in cache.calibration.layers()] == [90] * 3


def test_a_calibration_of_another_shape_is_refused_and_unpages_nothing():
    other = Calibration()
    wide = make_model("llama", head_dim=32)
    forward(wide, cache_of(wide, calibration=other), prompt(1, 40))
    model = make_model("llama")
    cache = cache_of(model, calibration=other)
    with pytest.raises(CalibrationError, match=r"head_dim 16.*head_dim 32"):
        forward(model, cache, prompt(1, 40))
    assert cache.stats()["unpaged_layers"] == 0


def test_a_missing_calibration_file_leaves_the_model_as_it_was():
    model = make_model("llama")
    model.set_attn_implementation("sdpa")
    with pytest.raises(CalibrationError):
        KvarnCache(model, calibration="/nowhere/it.safetensors")
    assert model.config._attn_implementation == "sdpa"


def test_a_calibration_from_a_file_makes_the_same_tokens_every_time(tmp_path):
    model = make_model("llama", num_hidden_layers=1)
    file = tmp_path / "it.safetensors"
    calibrate(model, prompt(1, 300), path=file)
    first = cache_of(model, "int2", calibration=file)
    assert first.stats()["calibrated"] == "file"
    logits = forward(model, first, prompt(1, 90)), forward(model, first, prompt(1, 1))
    forward(model, first, prompt(1, 300))
    second = cache_of(model, "int2", calibration=str(file))
    assert torch.equal(forward(model, second, prompt(1, 90)), logits[0])
    assert torch.equal(forward(model, second, prompt(1, 1)), logits[1])
    plain = cache_of(model, "int2")
    forward(model, plain, prompt(1, 90))
    assert not torch.equal(forward(model, plain, prompt(1, 1)), logits[1]), "it makes a difference"


# Pages that run out


@pytest.mark.parametrize("family", ["llama", "qwen3_mixed"])
def test_a_forward_without_pages_for_it_leaves_the_cache_as_it_was(model_of, family):
    model = model_of(family)
    cache, expected = cache_of(model, num_open_pages=4), cache_of(model)
    ids = prompt(2, 40)
    for one in (cache, expected):
        forward(model, one, ids)
        one.crop(0)
    before = cache.stats()
    with pytest.raises(OutOfOpenPagesError) as caught:
        forward(model, cache, prompt(2, 60))
    assert caught.value.needed > caught.value.free
    assert isinstance(caught.value, OutOfBlocksError)
    after = cache.stats()
    told = {"dropped_forwards", "blocks_in_use", "bytes_in_use", "open_pages", "peak_blocks", "peak_bytes"}
    assert {name for name in before if before[name] != after[name]} <= told | {"calibrated"}
    assert (after["dropped_forwards"], cache.get_seq_length()) == (1, 40)
    next_ids = prompt(2, 1)
    assert torch.equal(decode(model, cache, next_ids, 20), decode(model, expected, next_ids, 20))
    assert cache.stats()["peak_bytes"] > 0


@pytest.mark.parametrize("settings", [{"num_open_pages": 3}, {"num_blocks": 5}], ids=str)
def test_a_crop_without_room_for_it_leaves_the_cache_as_it_was(model_of, settings):
    """Four rows that share a sealed block, and three that have room for one of their own."""
    model = model_of("llama")
    cache, expected = cache_of(model, **settings), cache_of(model)
    for one in (cache, expected):
        forward(model, one, prompt(1, 52))
        forward(model, one, prompt(1, 1))
        one.batch_repeat_interleave(4)
        one.crop(0)
    before = cache.stats()
    with pytest.raises(OutOfBlocksError, match="needed"):
        cache.crop(-43)
    assert cache.stats() == before
    assert cache.get_seq_length() == 53
    cache.batch_select_indices(torch.tensor([0]))
    expected.batch_select_indices(torch.tensor([0]))
    assert torch.equal(decode(model, cache, prompt(1, 1), 5), decode(model, expected, prompt(1, 1), 5))


def test_settings_of_open_pages_are_checked_at_once(model_of):
    for wrong in (0, -1):
        with pytest.raises((ConfigError, OverflowError)):
            KvarnCache(model_of("llama"), num_open_pages=wrong)
    cache = KvarnCache(model_of("llama"), "int8", num_open_pages=1, block_size=BLOCK_SIZE)
    forward(model_of("llama"), cache, prompt(2, 50))
    cache.crop(0)
    assert cache.stats()["open_pages"] == 0, "where blocks do not seal there is nothing to bound"


# Real text


@pytest.mark.demo
def test_page_statistics_fit_after_prose_code_and_prose_again():
    """The first layers of a real model, 16 tokens at a time: 704 of prose, of code, and of prose."""
    from kvarn_rs.cli import demo
    from kvarn_rs.cli.console import Console

    try:
        importlib.metadata.version(demo.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{demo.PACKAGE} is not installed; run: {demo.INSTALL}")
    model, tokenizer = demo.load_demo(Console(quiet=True))
    model.model.layers = model.model.layers[:6]
    model.config.num_hidden_layers = 6
    prose, code = (tokenizer((ROOT / name).read_text(encoding="utf-8"))["input_ids"] for name in (PROSE, CODE))
    each, drift = 704, []
    ids = torch.tensor([[*prose[:each], *code[:each], *prose[each : 2 * each]]])
    assert ids.shape[1] == 3 * each
    cache = KvarnCache(model, calibration=Calibration())
    for column in ids.split(16, 1):
        forward(model, cache, column)
        drift.append(torch.tensor(list(cache.stats()["drift"].values())))
    step = each // 16
    before = drift[step - 1]
    assert 1.1 < drift[8].max() < 1.5, "the first page was opened with 16 tokens"
    assert (before - 1).abs().max() < 0.3
    for change in (step, 2 * step):
        changed = torch.stack(drift[change : change + 12]).amax(0) / drift[change - 1]
        assert changed.max() > 1.03, "seen"
        assert (drift[change + step - 1] / before - 1).abs().max() < 0.15, "and absorbed"
    assert cache.stats()["dense_fallbacks"] == 0
    assert max(cache.stats()["saturation"].values()) < 0.05
