"""`kvarn calibrate` and `kvarn inspect` on a tiny random model, and once on the demo model."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvarn_rs import Calibration
from kvarn_rs.cli import demo, main
from kvarn_rs.cli.console import Console
from kvarn_rs.cli.inspect import ranges

PROMPT = "The tide comes in because of the moon."


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of calibrations, empty, for this test only."""
    from kvarn_rs import identity

    made = tmp_path / "calibrations"
    monkeypatch.setattr(identity, "calibration_folder", lambda: made)  # the demo model stays where it is
    return made


def test_the_file_is_saved_where_the_next_cache_finds_it(
    kvarn: Callable[..., Any], tiny_model: Path, folder: Path
) -> None:
    said = kvarn("calibrate", tiny_model, "--json").json
    assert said["query_tokens"] == 1024, "the model's positions"
    assert (said["layers"], said["heads"]) == (3, 6)
    assert said["model"] == tiny_model.name
    (file,) = folder.iterdir()
    assert said["file"] == str(file)
    assert said["bytes"] == file.stat().st_size
    assert file.stem == said["fingerprint"] == Calibration.load(file).fingerprint
    assert said["seconds"] > 0
    used = kvarn("generate", "--model", tiny_model, "--format", "int8", "--max-new-tokens", "2", "--json", PROMPT).json
    assert used["stats"]["calibrated"] == "file"


def test_a_text_and_an_output_file_can_be_given(
    kvarn: Callable[..., Any], tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "it.safetensors"
    text.write_text("ab" * 100, encoding="utf-8")
    done = kvarn("calibrate", tiny_model, "--text", text, "--out", out)
    assert done.code == 0
    assert "200 tokens, 3 layers of 6 kv heads" in done.out
    assert str(out) in done.out
    assert Calibration.load(out).layers()[0]["query_tokens"] == 200
    assert not folder.exists()


def test_inspect_summarizes_the_file(kvarn: Callable[..., Any], tiny_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "it.safetensors"
    made = kvarn("calibrate", tiny_model, "--out", out, "--json").json
    said = kvarn("inspect", out, "--json").json
    assert said["kind"] == "calibration"
    for key in ("file", "bytes", "fingerprint", "model", "query_tokens", "heads"):
        assert said[key] == made[key]
    assert said["groups"] == [{"layers": [0, 1, 2], "num_kv_heads": 2, "head_dim": 16}]
    assert 0 <= said["rotated_heads"] <= 6
    shown = kvarn("inspect", out).out
    for part in (made["fingerprint"], tiny_model.name, "1,024 query tokens", "layers 0-2: 2 kv heads of head_dim 16"):
        assert part in shown


@pytest.mark.parametrize("command", ["calibrate", "inspect"])
def test_both_have_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: kvarn {command}" in capsys.readouterr().out


def test_consecutive_layers_are_shown_as_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([3]) == "3"


@pytest.mark.parametrize("content", [b"", b"hello", b"kvarn calibration", None])
def test_a_file_that_is_not_a_calibration_is_refused_in_one_line(
    content: bytes | None, kvarn: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "it"
    if content is not None:
        file.write_bytes(content)
    assert str(file) in kvarn("inspect", file).refused()


def test_another_safetensors_file_is_refused_in_one_line(kvarn: Callable[..., Any], tiny_model: Path) -> None:
    (weights,) = tiny_model.glob("*.safetensors")
    assert "not a file of kind" in kvarn("inspect", weights).refused()


def test_invalid_texts_and_folders_are_refused_in_one_line(
    kvarn: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    short, latin = tmp_path / "short.txt", tmp_path / "latin.txt"
    short.write_text("x" * 127, encoding="utf-8")
    latin.write_bytes(b"caf\xe9" * 100)
    assert "127 tokens are too few" in kvarn("calibrate", tiny_model, "--text", short).refused()
    assert "not UTF-8" in kvarn("calibrate", tiny_model, "--text", latin).refused()
    assert "cannot read" in kvarn("calibrate", tiny_model, "--text", tmp_path / "none").refused()
    assert "not a folder" in kvarn("calibrate", tiny_model, "--out", tmp_path / "no" / "it").refused()
    assert "not a folder" in kvarn("calibrate", tmp_path / "no model").refused()


@pytest.mark.demo
@pytest.mark.slow
def test_the_demo_model_finds_its_own_file_and_no_other_s(
    kvarn: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    try:
        importlib.metadata.version(demo.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{demo.PACKAGE} is not installed; run: {demo.INSTALL}")
    from kvarn_rs import CalibrationError
    from kvarn_rs.hf import KvarnCache

    text = tmp_path / "text.txt"
    text.write_text("Pack the lamps, the rope and the map; the ferry leaves at six. " * 12, encoding="utf-8")
    made = kvarn("calibrate", "demo", "--text", text, "--json").json
    assert (made["layers"], made["heads"]) == (30, 90)
    model, _ = demo.load_demo(Console(quiet=True))
    assert KvarnCache(model, "int8").calibration.fingerprint == made["fingerprint"]
    kvarn("calibrate", tiny_model, "--out", tmp_path / "tiny")
    with pytest.raises(CalibrationError, match="another model"):
        KvarnCache(model, "int8", calibration=tmp_path / "tiny")
