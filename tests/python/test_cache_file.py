"""Saving, loading and pickling the core cache from Python; what the file is made of is tested in Rust."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvarn_rs import (
    FORMATS,
    CacheFileError,
    Calibration,
    ConfigError,
    OpenStepError,
    OutOfBlocksError,
    PagedKvCache,
    UnsupportedError,
    _core,
)

np = pytest.importorskip("numpy")

HEAD_DIM = 32
LAYERS = 2


def rows(num_tokens: int, seed: int = 0, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).standard_normal((1, 2, num_tokens, HEAD_DIM)).astype(dtype)


def extend(cache: PagedKvCache, sequence: int, num_tokens: int, seed: int = 0) -> Any:
    """What the layers' attention reads in one step of random rows."""
    outs = []
    values = rows(num_tokens, seed, np.dtype(cache.dtype))
    with cache.begin_step([sequence], num_tokens) as step:
        for layer in range(cache.num_layers):
            step.append(layer, values, values, values)
            outs.append(step.attend(layer, values, values, values))
    return np.stack(outs)


def made(format: str = "int4", **settings: Any) -> PagedKvCache:
    options: dict[str, Any] = {"num_layers": LAYERS, "num_kv_heads": 2, "head_dim": HEAD_DIM, "block_size": 16}
    cache = PagedKvCache(format=format, **{**options, **settings})
    extend(cache, cache.new_sequence(), 40)
    extend(cache, cache.fork(0), 1)
    return cache


def through_a_file(cache: PagedKvCache, tmp_path: Path) -> PagedKvCache:
    cache.save(tmp_path / "x")
    return PagedKvCache.load(str(tmp_path / "x"))


def through_bytes(cache: PagedKvCache, tmp_path: Path) -> PagedKvCache:
    return PagedKvCache.from_bytes(cache.to_bytes())


def through_pickle(cache: PagedKvCache, tmp_path: Path) -> PagedKvCache:
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("way", [through_a_file, through_bytes, through_pickle])
@pytest.mark.parametrize("format", FORMATS)
def test_a_restored_cache_continues_like_the_original(format: str, way: Callable[..., Any], tmp_path: Path) -> None:
    cache = made(format, dtype="float16" if format == "raw" else "float32", window=30, num_blocks=40, num_open_pages=9)
    again = way(cache, tmp_path)
    for name in ("format", "dtype", "num_layers", "num_kv_heads", "head_dim", "block_size", "num_blocks", "window"):
        assert getattr(again, name) == getattr(cache, name)
    assert (again.num_open_pages, again.sequences()) == (9, [0, 1])
    assert [again.seq_len(sequence) for sequence in (0, 1)] == [40, 41]
    assert again.first_held(1) == cache.first_held(1)
    assert again.stats()["blocks_in_use"] == cache.stats()["blocks_in_use"]
    for seed, sequence in enumerate((0, 1, 0)):
        for num_tokens in (1, 20):
            assert np.array_equal(extend(again, sequence, num_tokens, seed), extend(cache, sequence, num_tokens, seed))
    assert again.new_sequence() == cache.new_sequence() == 2
    assert again.to_bytes() == cache.to_bytes()


def test_the_file_and_the_bytes_are_the_same(tmp_path: Path) -> None:
    cache = made()
    cache.save(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == cache.to_bytes()
    assert os.listdir(tmp_path) == ["x"]
    assert _core.file_kind(tmp_path / "x") == "kvarn cache"


def test_a_file_has_no_calibration(tmp_path: Path) -> None:
    calibration = Calibration()
    cache = made(calibration=calibration, layers=[3, 8])
    extend(cache, 0, 200)
    calibration.freeze()
    cache.save(tmp_path / "x")
    assert PagedKvCache.load(tmp_path / "x").stats()["calibrated"] == "no"
    again = PagedKvCache.load(tmp_path / "x", calibration=calibration, layers=[3, 8])
    assert again.stats()["calibrated"] == "frozen"
    later = PagedKvCache.load(tmp_path / "x")
    later.set_calibration(calibration, [3, 8])
    assert np.array_equal(extend(again, 0, 70, 5), extend(cache, 0, 70, 5))
    assert np.array_equal(extend(again, 0, 1, 6), extend(cache, 0, 1, 6))
    extend(later, 0, 70, 5)
    extend(later, 0, 1, 6)
    assert later.to_bytes() == again.to_bytes() == cache.to_bytes()
    with pytest.raises(ConfigError, match="1 layer numbers for a cache of 2 layers"):
        PagedKvCache.load(tmp_path / "x", calibration=calibration, layers=[3])
    with pytest.raises(ConfigError, match="1 layer numbers"):
        later.set_calibration(calibration, [3])


def test_copies_keep_the_calibration() -> None:
    calibration = Calibration()
    cache = made(calibration=calibration)
    extend(cache, 0, 200)
    calibration.freeze()
    for one in (copy.copy(cache), copy.deepcopy(cache), cache.copy()):
        assert one.stats()["calibrated"] == "frozen"
        assert one.to_bytes() == cache.to_bytes()


def test_a_bounded_pool_is_restored_bounded(tmp_path: Path) -> None:
    again = through_a_file(made(num_blocks=6), tmp_path)
    with pytest.raises(OutOfBlocksError) as refused:
        again.begin_step([0], 100)
    assert (refused.value.needed, refused.value.free) == (6, 2)


def test_several_caches_share_a_file(tmp_path: Path) -> None:
    wide, narrow = made("int8"), made("int2", num_layers=1, window=20)
    _core.save_caches(tmp_path / "x", [wide, narrow], "a note, \N{SNOWMAN} \n")
    caches, note = _core.load_caches(tmp_path / "x")
    assert note == "a note, \N{SNOWMAN} \n"
    assert [cache.to_bytes() for cache in caches] == [wide.to_bytes(), narrow.to_bytes()]
    again, note = _core.caches_from_bytes(_core.caches_to_bytes([wide, narrow], "n"))
    assert (len(again), note) == (2, "n")
    described, note = _core.inspect_caches(tmp_path / "x")
    assert [one["format"] for one in described] == ["int8", "int2"]
    assert described[0]["sequences"] == [(0, 40, 0), (1, 41, 0)]
    with pytest.raises(CacheFileError, match="holds 2 caches, not one"):
        PagedKvCache.load(tmp_path / "x")
    with pytest.raises(ConfigError, match="named twice"):
        _core.save_caches(tmp_path / "x", [wide, wide])


def test_threads_that_save_the_same_caches_do_not_deadlock() -> None:
    first, second = made("int8"), made("int4")
    expected = {order: _core.caches_to_bytes([*order]) for order in ((first, second), (second, first))}
    wrong: list[Any] = []

    def save(order: tuple[PagedKvCache, PagedKvCache]) -> None:
        wrong.extend(order for _ in range(50) if _core.caches_to_bytes([*order]) != expected[order])

    threads = [threading.Thread(target=save, args=(order,), daemon=True) for order in expected for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong


def test_a_cache_that_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    cache = made()
    with cache.begin_step([1], 1) as step:
        for act in (lambda: cache.save(tmp_path / "x"), cache.to_bytes, lambda: pickle.dumps(cache)):
            with pytest.raises(OpenStepError, match="sequence 1"):
                act()
        step.abort()
    with pytest.raises(UnsupportedError, match="codec fp8"):
        made("raw", codec="fp8").to_bytes()
    with pytest.raises(CacheFileError, match="cannot be written"):
        cache.save(tmp_path / "no" / "x")
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_not_a_cache_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x"
    whole = made().to_bytes()
    for content in (b"", b"text", b"kvarn cache", whole[:-1], whole + b"\0", whole.replace(b"int4", b"int3")):
        file.write_bytes(content)
        with pytest.raises(CacheFileError, match=f"^{file}: "):
            PagedKvCache.load(file)
        with pytest.raises(CacheFileError):
            PagedKvCache.from_bytes(content)
        with pytest.raises(CacheFileError):
            _core.inspect_caches(file)
    calibration = Calibration()
    extend(made(calibration=calibration), 0, 200)
    calibration.freeze()
    calibration.save(file, "f")
    assert _core.file_kind(file) == "kvarn calibration"
    with pytest.raises(CacheFileError, match='not a file of kind "kvarn cache"'):
        PagedKvCache.load(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        _core.file_kind(tmp_path / "none")
    assert issubclass(CacheFileError, ConfigError)


def test_other_programs_read_it_as_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    made().save(tmp_path / "x")
    with safetensors.safe_open(tmp_path / "x", "numpy") as opened:
        assert opened.metadata()["kind"] == "kvarn cache"
        assert opened.metadata()["caches.0.format"] == "int4"
        assert opened.get_tensor("caches.0.sequences").tolist() == [[0, 40, 0], [1, 41, 0]]
        tables = opened.get_tensor("caches.0.block_tables").tolist()
        assert tables == [0, 1, 2, 0, 1, 3]
        is_open = opened.get_tensor("caches.0.open").tolist()
        for layer in range(LAYERS):
            assert opened.get_tensor(f"caches.0.layers.{layer}.pages").shape[:2] == (sum(is_open), 2)
            assert opened.get_tensor(f"caches.0.layers.{layer}.tiles").shape[:2] == (4 - sum(is_open), 2)
