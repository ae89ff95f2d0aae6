"""Saved and pickled caches: they continue identically, and only with their model."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf.families import BLOCK_SIZE, decode, forward, generate, kvarn_cache, left_padded, make_model, prompt
from kvarn_rs import CacheFileError, Calibration, ConfigError, PagedKvCache, UnsupportedError, _core
from kvarn_rs.hf import KvarnCache

FORMATS = ["raw", "int8", "int4", "int2"]


@pytest.fixture(autouse=True)
def _no_calibrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def through_a_file(cache: Any, model: Any, tmp_path: Path) -> Any:
    """What is loaded, after the file is gone."""
    path = tmp_path / "cache.kvarn"
    cache.save(path)
    loaded = KvarnCache.load(path, model)
    path.unlink()
    return loaded


def through_pickle(cache: Any, model: Any, tmp_path: Path) -> Any:
    return pickle.loads(pickle.dumps(cache))


WAYS = pytest.mark.parametrize("way", [through_a_file, through_pickle])


# Goes on -------------------------------------------------------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_logits_are_the_same_to_the_bit(
    family: str, format: str, way: Callable[..., Any], model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model = model_of(family)
    # One that learns no more: what is sealed later does not depend on who learnt what.
    calibration = Calibration()
    cache = kvarn_cache(model, format, calibration=calibration)
    forward(model, cache, prompt(1, 150))
    if format not in ("raw", "int8"):
        calibration.freeze()
    loaded = way(cache, model, tmp_path)
    for group in loaded._forwards.groups.values():
        group.core.set_calibration(calibration, group.layers)
    ids = prompt(1, 40, seed=8)
    for start in (0, 1, 2, 20):
        part = ids[:, start : 20 if start == 2 else None] if start >= 2 else ids[:, start : start + 1]
        assert torch.equal(forward(model, loaded, part), forward(model, cache, part))
    assert loaded.get_seq_length() == cache.get_seq_length() == 190


@WAYS
@pytest.mark.parametrize("family", ["llama", "qwen3_mixed", "gemma4_shared"])
def test_a_restored_cache_generates_the_same_tokens(
    family: str, way: Callable[..., Any], model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model = model_of(family)
    cache = kvarn_cache(model, "raw")
    ids = generate(model, cache, input_ids=prompt(2, 50), max_new_tokens=9)
    ids = torch.cat([ids, prompt(2, 5, seed=8)], 1)
    loaded = way(cache, model, tmp_path)
    mask = torch.ones_like(ids)
    expected = generate(model, cache, input_ids=ids, attention_mask=mask)
    assert torch.equal(generate(model, loaded, input_ids=ids, attention_mask=mask), expected)
    uncached = generate(model, DynamicCache(config=model.config), input_ids=ids, attention_mask=mask)
    assert torch.equal(uncached, expected)


@WAYS
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_restored_left_padded_batch_continues(
    family: str, way: Callable[..., Any], model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model = model_of(family)
    padded = left_padded([50, 33, 7])
    cache = kvarn_cache(model, "raw")
    forward(model, cache, padded["input_ids"], padded["attention_mask"])
    loaded = way(cache, model, tmp_path)
    mask = torch.cat([padded["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    ids = prompt(3, 1, seed=8)
    assert torch.equal(decode(model, loaded, ids, 20, mask), decode(model, cache, ids, 20, mask))
    groups = (loaded._forwards.groups.values(), cache._forwards.groups.values())
    for group, saved in zip(*groups, strict=True):
        assert torch.equal(group.positions.padding, saved.positions.padding)


@WAYS
def test_restored_beams_still_share_their_blocks(
    way: Callable[..., Any], model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model = model_of("llama")
    cache = kvarn_cache(model, "raw")
    generate(model, cache, input_ids=prompt(1, 50), num_beams=4)
    loaded = way(cache, model, tmp_path)
    names = ("blocks_in_use", "bytes_in_use", "open_pages", "paged_layers")
    assert {name: loaded.stats()[name] for name in names} == {name: cache.stats()[name] for name in names}
    assert loaded.stats()["blocks_in_use"] < 4 * 5, "shared"
    loaded.reorder_cache(torch.tensor([3, 0, 0, 1]))
    cache.reorder_cache(torch.tensor([3, 0, 0, 1]))
    ids = prompt(4, 1, seed=8)
    assert torch.equal(decode(model, loaded, ids, 20), decode(model, cache, ids, 20))


@WAYS
def test_a_window_goes_back_as_far_as_before(
    way: Callable[..., Any], model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model = model_of("mistral")
    cache = kvarn_cache(model, "raw")
    cache.activate_past_recording()
    decode(model, cache, prompt(2, 50), 12)
    loaded = way(cache, model, tmp_path)
    for one in (loaded, cache):
        one.crop(-23)
    ids = prompt(2, 5, seed=8)
    assert torch.equal(decode(model, loaded, ids, 25), decode(model, cache, ids, 25))


@WAYS
def test_one_prompt_on_disk_serves_many(
    way: Callable[..., Any], model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model = model_of("llama")
    cache = kvarn_cache(model, "int4")
    forward(model, cache, prompt(1, 70))
    first, second = way(cache, model, tmp_path), way(cache, model, tmp_path)
    decode(model, first, prompt(1, 3, seed=8), 20)
    assert (first.get_seq_length(), second.get_seq_length(), cache.get_seq_length()) == (92, 70, 70)
    second.batch_repeat_interleave(3)
    assert decode(model, second, prompt(3, 1, seed=9), 4).shape == (3, 4)


@WAYS
def test_a_cache_before_its_first_forward_is_restored(
    way: Callable[..., Any], model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model = model_of("gemma3")
    cache = kvarn_cache(model, "int4", num_blocks=30)
    loaded = way(cache, model, tmp_path)
    assert loaded.get_seq_length() == 0
    ids = prompt(1, 60)
    assert torch.equal(forward(model, loaded, ids), forward(model, cache, ids))
    assert [group.core.num_blocks for group in loaded._forwards.groups.values()] == [30, 30]


def test_a_forward_in_progress_is_settled_first(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    model = model_of("llama")
    cache = kvarn_cache(model, "raw")
    cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)
    cache.save(tmp_path / "x")
    loaded = KvarnCache.load(tmp_path / "x", model)
    assert [loaded.get_seq_length(layer_idx) for layer_idx in range(3)] == [3, 0, 0]


def test_a_cache_pickled_in_another_process_continues(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    model = model_of("llama")
    cache = kvarn_cache(model, "int4")
    forward(model, cache, prompt(1, 70))
    (tmp_path / "pickled").write_bytes(pickle.dumps(cache))
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import pickle, sys; cache = pickle.load(open(sys.argv[1], 'rb')); print(cache.get_seq_length(), "
            "cache.stats()['blocks_in_use'], cache._origin.fingerprint)",
            str(tmp_path / "pickled"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert told == ["70", str(cache.stats()["blocks_in_use"]), cache._origin.fingerprint]


def test_an_unpickled_cache_finds_the_model_s_calibration_file(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    from kvarn_rs.hf import calibrate

    model = make_model("llama")
    made = calibrate(model, list(range(1, 128)) * 4)
    cache = kvarn_cache(model, "int4")
    forward(model, cache, prompt(1, 40))
    unpickled = pickle.loads(pickle.dumps(cache))
    assert (unpickled.calibration.state, unpickled.calibration.fingerprint) == ("file", cache._origin.fingerprint)
    assert made.state == "frozen"
    assert unpickled.stats()["calibrated"] == "file"
    again = pickle.loads(pickle.dumps(unpickled))
    assert again._origin.fingerprint == cache._origin.fingerprint, "though nobody has the model"


def test_the_same_tokens_make_the_same_file(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    model = model_of("llama")
    for name in ("a", "b"):
        cache = kvarn_cache(model, "int8")
        forward(model, cache, prompt(1, 70))
        cache.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_copies_share_the_calibration(model_of: Callable[[str], Any]) -> None:
    model = model_of("llama")
    cache = kvarn_cache(model, "int4")
    assert copy.deepcopy(cache).calibration is cache.calibration
    assert copy.copy(cache).calibration is cache.calibration


# Only for its model --------------------------------------------------------------------------------------------------


def test_another_model_is_refused(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    model, path = model_of("llama"), tmp_path / "cache.kvarn"
    cache = kvarn_cache(model, "int4")
    forward(model, cache, prompt(1, 40))
    cache.save(path)
    retrained, wider = make_model("llama", seed=5), make_model("llama", num_key_value_heads=4)
    deeper, other = make_model("llama", num_hidden_layers=4), model_of("qwen2")
    for wrong, expected in [
        (retrained, "of fingerprint"),
        (wider, r"this model's \[\[\[0, 1, 2\], null, \[4, 16\]\]\]"),
        (deeper, r"\[0, 1, 2, 3\]"),
        (other, "of type 'llama', this one is 'qwen2'"),
        (other.config, "of type 'llama', this one is 'qwen2'"),
        (deeper.config, r"\[0, 1, 2, 3\]"),
    ]:
        implementation = getattr(wrong, "config", wrong)._attn_implementation
        with pytest.raises(CacheFileError, match=expected) as refused:
            KvarnCache.load(path, wrong)
        assert str(refused.value).startswith(f"{path}: ")
        assert getattr(wrong, "config", wrong)._attn_implementation == implementation, "left as it was"
    assert KvarnCache.load(path, retrained.config).get_seq_length() == 40, "a config has no weights"
    with pytest.raises(ConfigError, match="expected a transformers model or config"):
        KvarnCache.load(path, "llama")


def test_a_window_of_another_size_is_another_model(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    model, path = model_of("mistral"), tmp_path / "cache.kvarn"
    kvarn_cache(model, "raw").save(path)
    with pytest.raises(CacheFileError, match=r"\[\[\[0, 1, 2\], 24, \[2, 16\]\]\], this model's .* 32"):
        KvarnCache.load(path, make_model("mistral", sliding_window=32))


@pytest.mark.filterwarnings("ignore:.*chunked_attention:kvarn_rs.hf.DenseFallbackWarning")  # of llama4
@pytest.mark.parametrize("family", ["qwen3_next", "llama4"])
def test_layers_that_are_not_paged_are_named(family: str, model_of: Callable[[str], Any], tmp_path: Path) -> None:
    cache = kvarn_cache(model_of(family), "raw")
    with pytest.raises(UnsupportedError, match=r"not paged cannot be saved: 0 \(\w+\), 2 \(\w+\)"):
        cache.save(tmp_path / "x")
    with pytest.raises(UnsupportedError, match="not paged"):
        pickle.dumps(cache)
    assert not (tmp_path / "x").exists()


def test_pages_of_a_codec_are_not_saved(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    model = model_of("llama")
    cache = kvarn_cache(model, "raw", codec="fp8")
    forward(model, cache, prompt(1, 20))
    with pytest.raises(UnsupportedError, match="fp8"):
        cache.save(tmp_path / "x")


# Not such a file -----------------------------------------------------------------------------------------------------


def test_a_file_of_another_kind_is_refused(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    model, path = model_of("llama"), tmp_path / "x"
    core = PagedKvCache(num_layers=3, num_kv_heads=2, head_dim=16, block_size=16)
    core.save(path)
    with pytest.raises(CacheFileError, match="not of a KvarnCache"):
        KvarnCache.load(path, model)
    for content, expected in [(b"", "not a file of kind"), (b"kvarn cache", "not a safetensors file")]:
        path.write_bytes(content)
        with pytest.raises(CacheFileError, match=expected):
            KvarnCache.load(path, model)
    with pytest.raises(CacheFileError, match="cannot be read"):
        KvarnCache.load(tmp_path / "gone", model)
    with pytest.raises(CacheFileError, match="cannot be written"):
        kvarn_cache(model, "raw").save(tmp_path / "no" / "x")


def _set(*keys: Any) -> Callable[[Any], None]:
    """Sets what the last but one of `keys` names to the last."""

    def alter(note: Any) -> None:
        for key in keys[:-2]:
            note = note[key]
        note[keys[-2]] = keys[-1]

    return alter


@pytest.mark.parametrize(
    ("alter", "expected"),
    [
        (_set("version", 2), "of version 2"),
        (_set("model_type", 5), "model_type is 5, not str"),
        (_set("fingerprint", "../../x"), "not 64 hexadecimal digits"),
        (_set("block_size", -1), "block_size is -1, out of range"),
        (_set("block_size", True), "block_size is True, not int"),
        (_set("block_size", 1e3), "block_size is 1000.0, not int"),
        (_set("block_size", 2**64), "out of range"),
        (_set("block_size", 48), "block_size must be one of"),
        (_set("num_blocks", 0), "num_blocks is 0"),
        (_set("format", "int5"), "unknown format 'int5'"),
        (_set("format", "int8"), "a cache of .*'int4'.* of .*'int8'"),
        (_set("num_blocks", 7), "a cache of .*'num_blocks': None.* of .*'num_blocks': 7"),
        (_set("groups", []), "groups of the layers"),
        (_set("empty_layers", [2]), "groups of the layers"),
        (_set("groups", [3]), "a group is 3"),
        (_set("groups", 0, "layers", []), "groups of the layers"),
        (_set("groups", 0, "layers", [0, 1, 1]), "groups of the layers"),
        (_set("groups", 0, "layers", [0, 1, "x"]), "layers is 'x', not int"),
        (_set("groups", 0, "shape", [2]), "shape is"),
        (_set("groups", 0, "cache", 1), "1 caches, and groups of the caches"),
        (_set("groups", 0, "cache", None), "1 caches, and groups of the caches"),
        (_set("groups", 0, "sequences", [0, 0]), "rows of the sequences"),
        (_set("groups", 0, "sequences", [0, 7]), "rows of the sequences"),
        (_set("groups", 0, "length", 51), "row 0: 50 tokens and 0 of padding at 51"),
        (_set("groups", 0, "length", 2**62), "at 4611686018427387904 positions"),
        (_set("groups", 0, "padding", None), "row 1: 33 tokens and 0 of padding"),
        (_set("groups", 0, "padding", ["0" * 17]), "padding of 1 rows for 2"),
        (_set("groups", 0, "padding", ["0" * 17, "1" * 16]), "not of one width"),
        (_set("groups", 0, "padding", ["0" * 17, "1" * 16 + "x"]), "other than 0 and 1"),
        (_set("groups", 0, "padding", ["0" * 18, "1" * 17 + "0"]), "padding of 2 rows"),
        (_set("groups", 0, "padding", ["0" * 17, 5]), "padding is 5, not str"),
        (_set("groups", 0, "record_past", 1), "record_past is 1, not bool"),
        (_set("behind", 7), "behind is 7, not list"),
        (_set("behind", [[0]]), "not of layers and positions"),
        (_set("behind", [[3, 0]]), "not of layers and positions"),
        (_set("behind", [[0, -1]]), "behind is -1, out of range"),
        (_set("behind", [[0, 51]]), "have 51"),
        (_set("behind", [[0, 9], [1, 9], [2, 9]]), "have 9"),
    ],
)
def test_a_note_that_does_not_fit_is_refused(
    alter: Callable[[Any], None], expected: str, model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model, path = model_of("llama"), tmp_path / "x"
    padded = left_padded([50, 33])
    cache = kvarn_cache(model, "int4")
    forward(model, cache, padded["input_ids"], padded["attention_mask"])
    cache.save(path)
    cores, text = _core.load_caches(path)
    note = json.loads(text)
    alter(note)
    _core.save_caches(path, cores, json.dumps(note))
    with pytest.raises(CacheFileError, match=expected):
        KvarnCache.load(path, model)
    data = _core.caches_to_bytes(cores, json.dumps(note))
    function, arguments = cache.__reduce__()
    with pytest.raises(CacheFileError, match=expected):
        function(arguments[0], data, {}, False)


def test_groups_that_are_not_at_one_length_are_refused(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    model, path = model_of("gemma3"), tmp_path / "x"
    cache = kvarn_cache(model, "raw")
    forward(model, cache, prompt(1, 20))
    cache.save(path)
    cores, text = _core.load_caches(path)
    note = json.loads(text)
    cores[0].truncate(0, BLOCK_SIZE)
    note["groups"][0]["length"] = BLOCK_SIZE
    _core.save_caches(path, cores, json.dumps(note))
    with pytest.raises(CacheFileError, match=r"different \(positions, rows\): \[\(16, 1\), \(20, 1\)\]"):
        KvarnCache.load(path, model)


def test_a_note_nested_too_deep_is_refused(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    path = tmp_path / "x"
    _core.save_caches(path, [], "[" * 100_000)
    with pytest.raises(CacheFileError, match="not of a KvarnCache"):
        KvarnCache.load(path, model_of("llama"))
