"""Calibrations of transformers models: fingerprints, which one a cache uses, the files, and `calibrate`."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf.families import TINY, make_model
from kvarn_rs import Calibration, CalibrationError, ConfigError, DeviceError
from kvarn_rs.hf import KvarnCache, calibrate
from kvarn_rs.hf.calibration import calibration_path, resolve
from kvarn_rs.hf.fingerprint import fingerprint
from kvarn_rs.identity import calibration_folder

TOKENS = [(7 * i * i + 3 * i) % 127 + 1 for i in range(300)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of calibrations, empty, for this test only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kvarn-rs" / "calibration"


@pytest.fixture
def model() -> Any:
    """A model object that no other test knows."""
    return make_model("llama")


# The fingerprint ---------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_the_model_s_and_not_the_run_s(model: Any) -> None:
    own = fingerprint(model)
    assert len(own) == 64
    assert fingerprint(make_model("llama")) == own
    KvarnCache(model, "int8")
    model.config.use_cache = False
    model.config._name_or_path = "/somewhere/else"
    model.config.pad_token_id = 5
    assert fingerprint(model) == own
    assert fingerprint(model.model) == own, "with or without a head"


def test_the_fingerprint_is_the_same_in_every_dtype_that_the_weights_fit_in(model: Any) -> None:
    own = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).to(torch.bfloat16)) == own
    assert fingerprint(copy.deepcopy(model).to(torch.bfloat16).float()) == own


def test_the_fingerprint_does_not_depend_on_strides(model: Any) -> None:
    own = fingerprint(model)
    projection = model.model.layers[1].self_attn.k_proj
    projection.weight = torch.nn.Parameter(projection.weight.detach().T.contiguous().T)
    assert not projection.weight.is_contiguous()
    assert fingerprint(model) == own


def test_every_weight_and_what_the_config_computes_count(model: Any) -> None:
    own = fingerprint(model)
    for name, weight in model.model.named_parameters():
        with torch.no_grad():
            before = weight.clone()
            weight.mul_(1.0078125)
            assert fingerprint(model) != own, name
            weight.copy_(before)
    assert fingerprint(model) == own
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 12345.0}
    assert fingerprint(model) != own
    assert fingerprint(make_model("qwen3")) != own


def test_the_fingerprint_of_no_model_is_refused(model: Any) -> None:
    for other in (model.config, torch.nn.Linear(2, 2), "a name"):
        with pytest.raises(ConfigError, match="expected a transformers model"):
            fingerprint(other)


def test_a_weight_without_memory_counts_by_its_shape(model: Any) -> None:
    own = fingerprint(model)
    model.model.layers[0].to("meta")
    assert fingerprint(model) != own


# Whose calibration -------------------------------------------------------------------------------------------------


def test_all_caches_of_a_model_share_one_and_other_models_have_others(model: Any) -> None:
    shared = resolve(model)
    assert KvarnCache(model).calibration is shared
    assert KvarnCache(model, "int8").calibration is shared
    assert resolve(make_model("llama")) is not shared, "another model object, even of the same weights"
    assert resolve(None) is not resolve(None)


def test_a_calibration_does_not_keep_its_model_alive(model: Any) -> None:
    other = make_model("llama")
    shared, gone = resolve(other), weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    assert shared.state == "no"


def test_a_given_calibration_is_used(model: Any, tmp_path: Path) -> None:
    given = Calibration()
    assert resolve(model, given) is given
    assert KvarnCache(model, calibration=given).calibration is given
    file = tmp_path / "given.safetensors"
    calibrate(model, TOKENS, path=file)
    for path in (file, str(file)):
        assert resolve(model, path).state == "file"
        assert resolve(None, path).state == "file", "no model to compare with"
    with pytest.raises(ConfigError, match="not int"):
        resolve(model, 3)  # type: ignore[arg-type]


def test_a_given_file_of_another_model_is_refused(model: Any, tmp_path: Path) -> None:
    file = tmp_path / "given.safetensors"
    calibrate(model, TOKENS, path=file)
    with pytest.raises(CalibrationError, match="another model"):
        KvarnCache(make_model("llama", seed=1), calibration=file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CalibrationError, match=file.name):
        KvarnCache(model, calibration=file)
    with pytest.raises(CalibrationError, match="none"):
        KvarnCache(model, calibration=tmp_path / "none")


def test_the_model_s_file_is_found_by_itself(model: Any, folder: Path) -> None:
    calibrate(model, TOKENS)
    assert calibration_path(model) == folder / f"{fingerprint(model)}.safetensors"
    assert list(folder.iterdir()) == [calibration_path(model)]
    again = make_model("llama")
    cache = KvarnCache(again, "int8")
    assert cache.calibration.state == "file"
    assert cache.calibration.fingerprint == fingerprint(again)
    assert cache.stats()["calibrated"] == "file"
    assert resolve(make_model("llama", seed=1)).state == "no"


def test_a_damaged_file_in_the_folder_is_named_once_and_passed_over(model: Any) -> None:
    calibrate(model, TOKENS)
    path = calibration_path(model)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.warns(RuntimeWarning, match=path.name) as caught:
        assert resolve(make_model("llama")).state == "no"
    assert "calibrate" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve(make_model("llama")).state == "no"


def test_the_folder_falls_back_to_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for unusable in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert calibration_folder() == tmp_path / ".cache" / "kvarn-rs" / "calibration"


# Made ahead --------------------------------------------------------------------------------------------------------


def test_calibrate_covers_every_paged_layer_and_leaves_the_model_as_it_was(model: Any) -> None:
    model.train()
    steps: list[int] = []
    made = calibrate(model, TOKENS, save=False, progress=steps.append)
    assert made.state == "frozen"
    assert [(layer["layer"], layer["query_tokens"]) for layer in made.layers()] == [(0, 300), (1, 300), (2, 300)]
    assert sum(steps) == 300
    assert model.config._attn_implementation == "eager"
    assert model.training
    assert not calibration_folder().exists(), "not asked to keep it"
    assert resolve(model) is made, "later caches of the model use it"


def test_long_texts_are_cut_at_2048_tokens_or_at_the_model_s_positions() -> None:
    short = make_model("llama")  # 512 positions
    assert calibrate(short, TOKENS * 10, save=False).layers()[0]["query_tokens"] == 512
    long = make_model("llama", max_position_embeddings=4096)
    made = calibrate(long, torch.tensor([TOKENS * 10]), save=False)
    assert {layer["query_tokens"] for layer in made.layers()} == {2048}


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen3_next", "gemma4_shared"])
def test_models_of_every_kind_can_be_calibrated(family: str, model_of: Callable[[str], Any]) -> None:
    model = model_of(family)
    made = calibrate(model, TOKENS, path=None)
    assert made.state == "frozen"
    assert Calibration.load(calibration_path(model)).layers()[0]["query_tokens"] == 300
    with torch.no_grad():
        cache = KvarnCache(model, "int8")
        model(input_ids=torch.tensor([TOKENS[:40]]), past_key_values=cache)
    assert cache.calibration is made


@pytest.mark.slow
def test_two_processes_make_the_same_file(model: Any, tmp_path: Path) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(1); from hf.families import make_model; "
        "from kvarn_rs.hf import calibrate; calibrate(make_model('llama'), eval(sys.argv[2]), path=sys.argv[1])"
    )
    own, other = tmp_path / "own", tmp_path / "other"
    calibrate(model, TOKENS, path=own)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]])}
    subprocess.run([sys.executable, "-c", code, other, repr(TOKENS)], check=True, env=environment, timeout=240)
    assert own.read_bytes() == other.read_bytes()


class Words:
    """A tokenizer of one token per word."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(word) % 100 for word in text.split()]}


def test_a_text_is_read_by_the_tokenizer_and_there_is_one_to_start_with(model: Any) -> None:
    text = "one two three four " * 40
    assert calibrate(model, text, tokenizer=Words(), save=False).layers()[0]["query_tokens"] == 160
    assert calibrate(model, tokenizer=Words(), save=False).layers()[0]["query_tokens"] == 512
    with pytest.raises(ConfigError, match="no tokenizer for the text: pass tokenizer="):
        calibrate(model)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[:127], "127 tokens are too few to calibrate with: 128"),
        ([], "0 tokens"),
        ([*TOKENS, TINY["vocab_size"]], "to 128, the model knows 128"),
        ([*TOKENS, -1], "from -1"),
        ([[1] * 200, [2] * 200], r"\[2, 200\]"),
        ([0.5] * 200, "float32"),
        (["a", "b"], "got list"),
        (torch.tensor(3), "int64"),
    ],
)
def test_an_invalid_text_is_refused_and_changes_nothing(tokens: Any, message: str, model: Any) -> None:
    before = resolve(model)
    with pytest.raises(ConfigError, match=message):
        calibrate(model, tokens)
    assert resolve(model) is before
    assert model.config._attn_implementation == "eager"
    assert not calibration_folder().exists()


def test_a_model_on_another_device_is_refused(model: Any) -> None:
    with pytest.raises(DeviceError, match="meta"):
        calibrate(model.to("meta"), TOKENS)


def test_a_file_that_cannot_be_written_is_an_error_and_the_calibration_is_used(model: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be written"):
        calibrate(model, TOKENS, path=tmp_path / "no" / "folder" / "it")
    assert resolve(model).state == "frozen"
    (tmp_path / "cache").write_text("a file where a folder is wanted", encoding="utf-8")
    with pytest.raises(CalibrationError, match="cannot be made"):
        calibrate(model, TOKENS)
