"""Damaged files: a cache, a pickle or a calibration with any bit flipped is refused."""

from __future__ import annotations

import pickle
import random
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hf.families import forward, kvarn_cache, prompt
from kvarn_rs import CacheFileError, Calibration, CalibrationError, _core
from kvarn_rs.hf import KvarnCache, calibrate

FLIPS = 300  # of a few hundred thousand bits; in Rust, each bit of small files is flipped


@pytest.fixture(autouse=True)
def _no_calibrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def damaged(data: bytes) -> Iterator[bytes]:
    """`data` with one bit flipped: the first and last bytes', the padding's of the header, and others."""
    rng = random.Random(0)
    header_end = 8 + int.from_bytes(data[:8], "little")
    bits = [
        *range(8 * 8),
        *range(8 * (header_end - 8), 8 * (header_end + 8)),
        *range(8 * (len(data) - 8), 8 * len(data)),
    ]
    for bit in bits + [rng.randrange(8 * len(data)) for _ in range(FLIPS)]:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


@pytest.mark.parametrize("format", ["raw", "int8", "int4"])
def test_a_saved_cache_with_a_bit_flipped_is_refused(
    format: str, model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model, path = model_of("gemma3"), tmp_path / "x"
    cache = kvarn_cache(model, format)
    forward(model, cache, prompt(1, 60))
    cache.save(path)
    data = path.read_bytes()
    for index, content in enumerate(damaged(data)):
        path.write_bytes(content)
        with pytest.raises(CacheFileError, match=f"^{path}: "):
            KvarnCache.load(path, model)
        if index % 16 == 0:
            with pytest.raises(CacheFileError):
                _core.inspect_caches(path)
    path.write_bytes(data)
    KvarnCache.load(path, model).save(path)
    assert path.read_bytes() == data, "undamaged it comes back"


@pytest.mark.parametrize("format", ["raw", "int8", "int4"])
def test_a_pickled_cache_with_a_bit_of_its_file_flipped_is_refused(
    format: str, model_of: Callable[[str], Any], tmp_path: Path
) -> None:
    model, path = model_of("llama"), tmp_path / "x"
    cache = kvarn_cache(model, format)
    forward(model, cache, prompt(1, 60))
    cache.save(path)
    data, pickled = path.read_bytes(), pickle.dumps(cache)
    before, found, after = pickled.partition(data)
    assert found, "what is pickled is the file"
    for content in damaged(data):
        with pytest.raises(CacheFileError):
            pickle.loads(before + content + after)
    assert isinstance(pickle.loads(pickled), KvarnCache)


def test_a_calibration_file_with_a_bit_flipped_is_refused(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    model, path = model_of("llama"), tmp_path / "x"
    calibrate(model, prompt(1, 200), path=path)
    data = path.read_bytes()
    for content in damaged(data):
        path.write_bytes(content)
        with pytest.raises(CalibrationError, match=f"^{path}: "):
            Calibration.load(path)
    with pytest.raises(CalibrationError):
        KvarnCache(model, "int4", calibration=path)


def test_the_checksum_is_zlib_s_of_all_bytes_before_it(model_of: Callable[[str], Any], tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    model = model_of("llama")
    calibrate(model, prompt(1, 200), path=tmp_path / "calibration")
    cache = kvarn_cache(model, "int4")
    forward(model, cache, prompt(1, 60))
    cache.save(tmp_path / "cache")
    for path in (tmp_path / "calibration", tmp_path / "cache"):
        data = path.read_bytes()
        with safetensors.safe_open(path, "pt") as opened:
            stored = bytes(opened.get_tensor("checksum").tolist())
        assert stored == data[-4:] == zlib.crc32(data[:-4]).to_bytes(4, "little")
