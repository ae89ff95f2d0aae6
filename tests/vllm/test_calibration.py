"""Which calibration vLLM uses: the file that `kvarn calibrate` made of the same weights, the one named, or none."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
from models import SIZES, saved
from runs import groups, make_llm

from kvarn_rs.errors import CalibrationError

SEALED = "kvarn_int4"
TOKENS = [3 + i * i % 500 for i in range(300)]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the plugin logs. vLLM sets its loggers up again as it starts, so that a handler would not stay."""
    lines: list[str] = []
    logger = logging.getLogger("vllm.kvarn_rs")
    for level in ("info", "warning"):
        monkeypatch.setattr(logger, level, lambda message, *values: lines.append(message % values))
    return lines


def calibrated(model: Path, path: Path | None = None, **options: Any) -> Path:
    """The calibration file of a checkpoint, made as `kvarn calibrate` does."""
    from transformers import AutoModelForCausalLM

    from kvarn_rs.hf import calibrate
    from kvarn_rs.hf.calibration import calibration_path

    loaded = AutoModelForCausalLM.from_pretrained(model, **options)
    calibrate(loaded, TOKENS, path=path)
    return calibration_path(loaded) if path is None else path


def named(path: Path) -> dict[str, Any]:
    return {"additional_config": {"kvarn": {"calibration": str(path)}}}


def state(llm: Any) -> str:
    (group,) = groups(llm)
    return group.engine.stats()["calibrated"]


def test_a_file_of_the_same_weights_is_found(model: Path, log: list[str]) -> None:
    file = calibrated(model, dtype="bfloat16")  # not the dtype that is served
    assert state(make_llm(model, SEALED)) == "file"
    assert any(line.endswith(f"calibration: {file}") for line in log)


def test_a_named_file_is_used_before_the_one_that_is_found(model: Path, tmp_path: Path, log: list[str]) -> None:
    calibrated(model)
    file = calibrated(model, tmp_path / "named.safetensors")
    assert state(make_llm(model, SEALED, **named(file))) == "file"
    assert any(line.endswith(f"calibration: {file}") for line in log)


def test_a_damaged_file_that_is_found_is_passed_over_with_one_line(model: Path, log: list[str]) -> None:
    file = calibrated(model)
    file.write_bytes(file.read_bytes()[:-8])
    assert state(make_llm(model, SEALED)) == "no"
    assert [str(file) in line and "kvarn calibrate" in line for line in log] == [True, False]
    assert log[1].endswith("calibration: learned from the first requests")


def test_a_named_file_of_another_model_is_refused_naming_both(model: Path, sliding_model: Path, tmp_path: Path) -> None:
    file = calibrated(sliding_model, tmp_path / "other.safetensors")
    words = (
        f'{file}: a calibration of another model: "{sliding_model.name}" of fingerprint "[0-9a-f]{{64}}", this model'
    )
    with pytest.raises(CalibrationError, match=words):
        make_llm(model, SEALED, **named(file))


def pickled(model: Path, folder: Path) -> Path:
    """A checkpoint without safetensors, which has no fingerprint."""
    import torch
    from safetensors.torch import load_file

    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    torch.save(load_file(model / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


def test_weights_that_are_not_safetensors_are_learned_of(model: Path, tmp_path: Path, log: list[str]) -> None:
    assert state(make_llm(pickled(model, tmp_path / "pickled"), SEALED)) == "no"
    (line,) = log
    assert line.endswith("calibration: learned from the first requests (no safetensors to find a file by)")


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"num_hidden_layers": 3}, "up to layer 2; the last one here is 1"),
        ({"num_hidden_layers": 1}, "without layers \\[1\\]"),
        ({"num_key_value_heads": 4}, "2 kv heads of head_dim 64, its calibration has 4 of head_dim 64"),
        ({"head_dim": 32}, "2 kv heads of head_dim 64, its calibration has 2 of head_dim 32"),
    ],
)
def test_a_named_file_that_does_not_fit_is_refused_where_models_cannot_be_compared(
    sizes: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = saved(LlamaForCausalLM, LlamaConfig(**{**SIZES, **sizes}), tmp_path / "other")
    file = calibrated(other, tmp_path / "other.safetensors")
    with pytest.raises(CalibrationError, match=words):
        make_llm(pickled(model, tmp_path / "pickled"), SEALED, **named(file))


def test_formats_that_never_seal_read_no_calibration(model: Path, tmp_path: Path) -> None:
    assert state(make_llm(model, "kvarn_int8", **named(tmp_path / "nowhere"))) == "no"


def test_a_repository_is_its_snapshot_on_this_machine(model: Path, tmp_path: Path) -> None:
    from kvarn_rs.identity import fingerprint_of_checkpoint
    from kvarn_rs.vllm.calibration import fingerprint

    snapshot = tmp_path / "hub" / "models--some--model" / "snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)

    def found(name: str, load_format: str = "auto") -> str | None:
        parts = {"model": name, "revision": None, "trust_remote_code": False}
        load = {"load_format": load_format, "download_dir": str(tmp_path / "hub")}
        return fingerprint(type("LoadConfig", (), load), type("ModelConfig", (), parts))

    assert found("some/model") == fingerprint_of_checkpoint(model)
    assert found("some/other") is None
    assert found("no such name/at all.gguf") is None
    assert found("some/model", "dummy") is None
