"""`Calibration` alone and with a `PagedKvCache`: what it learns, when it freezes, and its file."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvarn_rs import Calibration, CalibrationError, ConfigError, PagedKvCache
from kvarn_rs._core import FIRST_TOKENS, QUERY_TOKENS

SHAPE: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16}


def feed(cache: PagedKvCache, num_tokens: int, *, seed: int = 0) -> None:
    """Takes a new sequence forward by random tokens of 4 query heads."""
    random = np.random.default_rng(seed)
    q = random.normal(size=(1, 4, num_tokens, 16)).astype(np.float32)
    k, v = random.normal(size=(2, 1, cache.num_kv_heads, num_tokens, 16)).astype(np.float32)
    with cache.begin_step([cache.new_sequence()], num_tokens) as step:
        for layer in range(cache.num_layers):
            step.append(layer, k, v, q)


def learned(num_tokens: int = 200, seed: int = 0) -> Calibration:
    """A calibration frozen after random tokens."""
    calibration = Calibration()
    feed(PagedKvCache(**SHAPE, format="int8", calibration=calibration), num_tokens, seed=seed)
    calibration.freeze()
    return calibration


def test_a_new_calibration_is_empty() -> None:
    calibration = Calibration()
    assert calibration.state == "no"
    assert calibration.layers() == []
    assert calibration.wanted(7) == QUERY_TOKENS
    assert calibration.fingerprint is None
    assert calibration.model is None
    assert repr(calibration) == 'Calibration(state="no", layers=0)'


@pytest.mark.parametrize("format", ["raw", "int8", "int4"])
def test_a_cache_of_every_format_feeds_its_calibration(format: str) -> None:
    calibration = Calibration()
    cache = PagedKvCache(**SHAPE, format=format, calibration=calibration, layers=[4, 9])
    feed(cache, 150)
    feed(cache, 10, seed=1)
    assert [(layer["layer"], layer["query_tokens"]) for layer in calibration.layers()] == [(4, 160), (9, 160)]
    assert [calibration.wanted(layer) for layer in (4, 9, 0)] == [QUERY_TOKENS - 160] * 2 + [QUERY_TOKENS]


def test_a_calibration_reduces_errors_in_the_directions_of_the_queries() -> None:
    random = np.random.default_rng(3)
    look = random.normal(size=(4, 16)).astype(np.float32)  # all queries lie in the span of four directions

    def score_error(calibration: Calibration | None) -> float:
        cache = PagedKvCache(**SHAPE, format="int2", block_size=16, calibration=calibration)
        q = random.normal(size=(1, 4, 320, 4)).astype(np.float32) @ look
        k, v = random.normal(size=(2, 1, 2, 320, 16)).astype(np.float32)
        sequence = cache.new_sequence()
        with cache.begin_step([sequence], 320) as step:
            for layer in range(2):
                step.append(layer, k, v, q)
        stored = np.empty_like(k), np.empty_like(v)
        cache.dequantize(1, sequence, *stored)
        return float(np.square((stored[0] - k)[:, :, :256] @ look.T).sum())

    calibration = Calibration()
    plain = score_error(None)
    assert score_error(calibration) < 0.2 * plain, "by what the first tokens say"
    calibration.freeze()
    assert score_error(calibration) < 0.2 * plain, "of tokens that it has not seen"


def test_caches_and_their_copies_share_a_calibration() -> None:
    calibration = Calibration()
    assert copy.copy(calibration) is calibration
    assert copy.deepcopy([calibration])[0] is calibration
    for cache in (
        PagedKvCache(**SHAPE, calibration=calibration),
        PagedKvCache(**SHAPE, calibration=calibration).copy(),
    ):
        feed(cache, 40)
    assert calibration.wanted(0) == QUERY_TOKENS - 80


def test_a_calibration_freezes_at_2048_tokens_and_later_ones_change_no_byte(tmp_path: Path) -> None:
    calibration = Calibration()
    cache = PagedKvCache(**SHAPE, format="int8", calibration=calibration)
    feed(cache, 2000)
    assert calibration.state == "no"
    feed(cache, 100, seed=1)
    assert calibration.state == "frozen"
    assert calibration.wanted(0) == 0
    calibration.save(tmp_path / "before", "f")
    feed(cache, 300, seed=2)
    calibration.save(tmp_path / "after", "f")
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes()
    assert {layer["query_tokens"] for layer in calibration.layers()} == {QUERY_TOKENS}


def test_freeze_refuses_too_few_tokens() -> None:
    calibration = Calibration()
    with pytest.raises(ConfigError, match="no layer has seen a token"):
        calibration.freeze()
    feed(PagedKvCache(**SHAPE, calibration=calibration), FIRST_TOKENS - 1)
    with pytest.raises(ConfigError, match="layer 0 has seen 127 query tokens, 128"):
        calibration.freeze()


@pytest.mark.parametrize("frozen", [True, False])
def test_the_cache_of_another_model_is_refused(frozen: bool) -> None:
    calibration = learned()
    if not frozen:
        calibration = Calibration()
        feed(PagedKvCache(**SHAPE, calibration=calibration), 10)
    before = calibration.layers()
    with pytest.raises(CalibrationError, match=r"4 kv heads.* 2 of head_dim"):
        PagedKvCache(num_layers=2, num_kv_heads=4, head_dim=16, calibration=calibration)
    assert calibration.layers() == before


def test_caches_of_two_shapes_cannot_share_a_calibration() -> None:
    calibration = Calibration()
    other = PagedKvCache(num_layers=2, num_kv_heads=4, head_dim=16, calibration=calibration)
    feed(PagedKvCache(**SHAPE, calibration=calibration), 10)
    before = calibration.layers()
    with pytest.raises(ConfigError, match=r"4 kv heads.* 2 of head_dim"):
        feed(other, 20)
    assert calibration.layers() == before


def test_a_file_is_accepted_only_for_its_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "it.safetensors"
    learned().save(file, "abc", "tiny")
    loaded = Calibration.load(file, "abc")
    assert (loaded.state, loaded.fingerprint, loaded.model) == ("file", "abc", "tiny")
    assert [layer["state"] for layer in loaded.layers()] == ["file", "file"]
    assert all(layer["rotated_heads"] in (0, 1, 2) for layer in loaded.layers())
    with pytest.raises(CalibrationError, match=r"another model.*abc.*def"):
        Calibration.load(str(file), "def")
    assert isinstance(CalibrationError(), ConfigError)


def test_a_calibration_file_is_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    file = tmp_path / "it.safetensors"
    learned().save(file, "abc", 'a "model" – ü')
    with safetensors.safe_open(file, framework="numpy") as opened:
        assert opened.metadata()["model"] == 'a "model" – ü'
        assert opened.metadata()["query_tokens"] == "200"
        feedback = opened.get_tensor("layers.1.feedback")
        order = opened.get_tensor("layers.1.order")
        assert opened.get_tensor("layers.1.k_channel_deviation").shape == (2, 16)
    assert feedback.dtype == np.float32
    assert feedback.shape == (2, 2, 16, 16)
    assert np.array_equal(feedback, np.triu(feedback, 1))
    assert feedback.any()
    assert order.dtype == np.uint16
    assert (np.sort(order) == np.arange(16)).all()


def test_two_processes_make_the_same_bytes(tmp_path: Path) -> None:
    code = "import sys, test_calibration as t; t.learned(300, seed=5).save(sys.argv[1], 'abc', 'tiny')"
    own, other = tmp_path / "own", tmp_path / "other"
    learned(300, seed=5).save(own, "abc", "tiny")
    subprocess.run([sys.executable, "-c", code, other], check=True, cwd=Path(__file__).parent, timeout=120)
    assert own.read_bytes() == other.read_bytes()


def test_save_replaces_a_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    file = tmp_path / "it"
    file.write_text("in the way", encoding="utf-8")
    learned().save(file, "abc")
    assert Calibration.load(file).state == "file"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_is_not_a_calibration_is_refused_by_name(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    learned().save(whole, "abc")
    content = whole.read_bytes()
    for name, found in {"empty": b"", "text": b"hello", "cut": content[:-1], "long": content + b"x"}.items():
        file = tmp_path / name
        file.write_bytes(found)
        with pytest.raises(CalibrationError, match=name):
            Calibration.load(file)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(CalibrationError, match=missing.name):
            Calibration.load(missing)
    with pytest.raises(CalibrationError, match="cannot be written"):
        learned().save(tmp_path / "no" / "folder", "abc")


def test_only_frozen_layers_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no layer is frozen"):
        Calibration().save(tmp_path / "it", "abc")
    assert not list(tmp_path.iterdir())


def learned_by(num_kv_heads: int, first: int = 0, *, of: int = 4, num_tokens: int = 200) -> Calibration:
    """A calibration frozen after tokens of kv heads `first` on, of `of` heads that serve two query heads each."""
    random = np.random.default_rng(0)
    q = random.normal(size=(1, 2 * of, num_tokens, 16)).astype(np.float32)
    k = random.normal(size=(1, of, num_tokens, 16)).astype(np.float32)
    q, k = q[:, 2 * first :][:, : 2 * num_kv_heads].copy(), k[:, first:][:, :num_kv_heads].copy()
    calibration = Calibration()
    settings = {"num_layers": 2, "num_kv_heads": num_kv_heads, "head_dim": 16, "format": "int8"}
    cache = PagedKvCache(**settings, calibration=calibration)
    with cache.begin_step([cache.new_sequence()], num_tokens) as step:
        for layer in range(2):
            step.append(layer, k, k, q)
    calibration.freeze()
    return calibration


@pytest.mark.parametrize(
    ("rank", "num_ranks", "first", "count"),
    [(0, 1, 0, 4), (0, 2, 0, 2), (1, 2, 2, 2), (3, 4, 3, 1), (3, 8, 1, 1), (7, 8, 3, 1)],
)
def test_a_rank_s_part_is_what_it_would_learn_from_its_heads(
    rank: int, num_ranks: int, first: int, count: int, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    learned_by(4).save(whole, "abc", "tiny")
    part = Calibration.load(whole).shard(rank, num_ranks)
    assert [(layer["layer"], layer["num_kv_heads"], layer["state"]) for layer in part.layers()] == [
        (0, count, "file"),
        (1, count, "file"),
    ]
    assert (part.fingerprint, part.model) == ("abc", "tiny")
    part.save(tmp_path / "part", "abc")
    learned_by(count, first).save(tmp_path / "own", "abc")
    assert (tmp_path / "part").read_bytes() == (tmp_path / "own").read_bytes()


def test_parts_that_there_are_not_are_refused() -> None:
    whole = learned_by(4)
    for rank, num_ranks, words in ((2, 2, "rank 2 of 2"), (0, 0, "rank 0 of 0"), (0, 3, "4 kv heads, which 3 ranks")):
        with pytest.raises(ConfigError, match=words):
            whole.shard(rank, num_ranks)
    learning = Calibration()
    feed(PagedKvCache(**SHAPE, format="int8", calibration=learning), 200)
    with pytest.raises(ConfigError, match="layer 0 still learns"):
        learning.shard(0, 2)
