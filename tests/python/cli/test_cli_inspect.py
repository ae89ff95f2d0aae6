"""`kvarn inspect` on cache files; on calibration files see `test_cli_calibrate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvarn_rs import PagedKvCache, _core

np = pytest.importorskip("numpy")


def filled(format: str = "int4", num_tokens: int = 70, window: int | None = None) -> PagedKvCache:
    cache = PagedKvCache(num_layers=2, num_kv_heads=2, head_dim=32, block_size=16, format=format, window=window)
    rows = np.random.default_rng(0).standard_normal((1, 2, num_tokens, 32)).astype(np.float32)
    with cache.begin_step([cache.new_sequence()], num_tokens) as step:
        for layer in range(2):
            step.append(layer, rows, rows)
    return cache


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache.kvarn"


def test_a_cache_of_the_core_is_described(kvarn: Callable[..., Any], file: Path) -> None:
    cache = filled()
    cache.fork(0)
    cache.save(file)
    said = kvarn("inspect", file, "--json").json
    stats = cache.stats()
    (one,) = said["caches"]
    assert (said["kind"], said["file"], said["bytes"]) == ("cache", str(file), file.stat().st_size)
    assert (said["model_type"], said["fingerprint"], one["layers"]) == (None, None, None)
    expected = {"format": "int4", "dtype": "float32", "num_layers": 2, "num_kv_heads": 2, "head_dim": 32}
    assert {name: one[name] for name in expected} == expected
    assert (one["block_size"], one["window"], one["num_blocks"], one["num_open_pages"]) == (16, None, None, None)
    assert one["sequences"] == [{"id": id, "tokens": 70, "first_held": 0} for id in (0, 1)]
    assert (said["open_blocks"], said["sealed_blocks"]) == (stats["open_pages"], 5 - stats["open_pages"])
    assert said["tile_bytes"] == said["sealed_blocks"] * stats["bytes_per_block"]
    assert said["page_bytes"] == said["open_blocks"] * stats["bytes_per_open_page"]
    assert said["tile_bytes"] + said["page_bytes"] + said["other_bytes"] == said["bytes"]
    assert 0 < said["other_bytes"] < 2000
    assert said["bytes_per_token"] == stats["bytes_per_token"]


def test_the_summary_is_printed_as_text(kvarn: Callable[..., Any], file: Path) -> None:
    cache = filled(window=40)
    for _ in range(11):
        cache.fork(0)
    cache.save(file)
    shown = kvarn("inspect", file).out
    for part in (
        "cache of a model, ",
        "2 layers: int4, 2 kv heads of head_dim 32, blocks of 16, window 40",
        "12 sequences: 70, 70, 70, 70, 70, 70, 70, 70 and 4 more tokens",
        "3 blocks sealed, 2 open",
        "tiles ",
        "bytes a token at rest",
    ):
        assert part in shown, shown
    PagedKvCache(num_layers=2, num_kv_heads=2, head_dim=32).save(file)
    assert "0 sequences: no tokens" in kvarn("inspect", file).out


def test_formats_that_do_not_seal_have_pages_only(kvarn: Callable[..., Any], file: Path) -> None:
    filled("int8").save(file)
    said = kvarn("inspect", file, "--json").json
    assert (said["sealed_blocks"], said["open_blocks"], said["tile_bytes"]) == (0, 5, 0)
    _core.save_caches(file, [])
    said = kvarn("inspect", file, "--json").json
    assert (said["caches"], said["bytes_per_token"], said["other_bytes"]) == ([], 0, file.stat().st_size)


def test_a_cache_of_a_model_names_it_and_its_layers(kvarn: Callable[..., Any], tiny_model: Path, file: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from kvarn_rs.hf import KvarnCache
    from kvarn_rs.hf.fingerprint import fingerprint

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    cache = KvarnCache(model, "int4")
    model.generate(torch.arange(1, 41)[None], past_key_values=cache, max_new_tokens=2, do_sample=False)
    cache.save(file)
    said = kvarn("inspect", file, "--json").json
    assert (said["model_type"], said["fingerprint"]) == ("llama", fingerprint(model))
    (one,) = said["caches"]
    assert one["layers"] == [0, 1, 2]
    assert [sequence["tokens"] for sequence in one["sequences"]] == [41]
    shown = kvarn("inspect", file).out
    for part in ("cache of a llama model", said["fingerprint"], "layers 0-2: int4", "1 sequence: 41 tokens"):
        assert part in shown, shown


@pytest.mark.parametrize(
    "note",
    [
        "no JSON",
        "[" * 100_000,
        '{"writer": "somebody else"}',
        '{"writer": "kvarn_rs.hf"}',
        '{"writer": "kvarn_rs.hf", "groups": [{"cache": [], "layers": 3}], "model_type": 3}',
        '{"writer": "kvarn_rs.hf", "groups": [{"cache": 0, "layers": [Infinity]}], "model_type": 3, "fingerprint": 3}',
    ],
)
def test_a_note_of_another_writer_is_ignored(note: str, kvarn: Callable[..., Any], file: Path) -> None:
    _core.save_caches(file, [filled()], note)
    said = kvarn("inspect", file, "--json").json
    assert (said["model_type"], said["fingerprint"], said["caches"][0]["layers"]) == (None, None, None)


def test_any_other_file_is_refused_in_one_line(
    kvarn: Callable[..., Any], tiny_model: Path, file: Path, tmp_path: Path
) -> None:
    cache = filled()
    whole = cache.to_bytes()
    spoiled = bytearray(whole)
    spoiled[-5] ^= 1  # before the checksum
    for content, expected in [
        (b"", 'not a file of kind "kvarn calibration" or "kvarn cache"'),
        (b"kvarn cache", "not a safetensors file of 11 bytes"),
        (whole[:-1], "not a safetensors file"),
        (whole + b"\0", "not a safetensors file"),
        (bytes(spoiled), "damaged: the checksum of its bytes is"),
        (whole.replace(b'"version":"2"', b'"version":"1"'), "version 1, this release reads version 2"),
    ]:
        file.write_bytes(content)
        said = kvarn("inspect", file).refused()
        assert str(file) in said
        assert expected in said
    (weights,) = tiny_model.glob("*.safetensors")
    assert "not a file of kind" in kvarn("inspect", weights).refused()
    assert "cannot be read" in kvarn("inspect", tmp_path / "none").refused()
    assert "not a file" in kvarn("inspect", tmp_path).refused()
