"""`kvarn generate` on a tiny random model."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvarn_rs
from kvarn_rs import _core

pytest.importorskip("torch")
pytest.importorskip("transformers")

from kvarn_rs import hf

PROMPT = "The tide comes in because of the moon."
# K and V, 3 layers, 2 kv heads of 16 channels in float32.
DENSE_BYTES = 2 * 3 * 2 * 16 * 4
# Blocks of 16 tokens: pages, and 4-bit tiles (440 bytes, padded).
PAGE_BYTES = 3 * 2 * (2 * 16 * 16 + 6 * 16 + 4 * 16)
TILE_BYTES = 3 * 2 * 448


@pytest.fixture(autouse=True)
def _no_calibration_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Caches that learn on their own, whatever this machine's user has calibrated."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def long_prompt(tmp_path: Path) -> Path:
    """A file of 608 characters: long enough to be scored, and for layers to be calibrated."""
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT * 16, encoding="utf-8")
    return file


def test_the_json_has_the_text_and_its_costs(kvarn: Callable[..., Any], tiny_model: Path) -> None:
    arguments = ("--model", tiny_model, "--block-size", "16", "--max-new-tokens", "5", "--json", PROMPT)
    made = kvarn("generate", *arguments).json
    assert made["format"] == "int4"
    assert made["tokens"] == 5
    assert made["prompt_tokens"] == len(f"[{PROMPT}]")
    assert isinstance(made["text"], str)
    held = made["prompt_tokens"] + 4  # the last token is never fed
    assert held == 2 * 16 + 12
    assert made["bytes_in_use"] == 3 * TILE_BYTES + PAGE_BYTES  # the tile of the open block is counted too
    assert made["bytes_per_token"] == made["bytes_in_use"] / held
    assert made["dense_fallbacks"] == 0
    assert made["calibrated"] == "no"  # too few tokens
    assert made["decode_tokens_per_s"] > 0
    assert {"compare", "ladder"}.isdisjoint(made)
    int8 = kvarn("generate", *arguments, "--format", "int8").json
    assert int8["bytes_in_use"] == -(-held // 16) * PAGE_BYTES


def test_the_comparison_has_its_keys_and_an_unquantized_cache_agrees_with_itself(
    kvarn: Callable[..., Any], tiny_model: Path
) -> None:
    arguments = ("--model", tiny_model, "--format", "raw", "--compare", "--max-new-tokens", "12", "--json", PROMPT)
    made = kvarn("generate", *arguments).json
    compared = made["compare"]
    assert made["dense_fallbacks"] == 0
    assert compared["agreement_tokens"] == 12
    assert compared["same_top1"] == 1
    assert compared["positions"] == 12
    assert abs(compared["kl_mean"]) < 1e-6  # float32 sums in another order
    assert compared["reference_bytes_in_use"] == (made["prompt_tokens"] + 11) * DENSE_BYTES
    assert compared["reference_bytes_per_token"] == DENSE_BYTES
    assert compared["reference_decode_tokens_per_s"] > 0
    assert compared["reference_prefill_s"] > 0


def test_a_long_prompt_is_scored_too_and_int8_is_near_the_reference(
    kvarn: Callable[..., Any], tiny_model: Path, long_prompt: Path
) -> None:
    arguments = ("--model", tiny_model, "--raw", "--max-new-tokens", "8", "--json", "--prompt-file", long_prompt)
    made = kvarn("generate", *arguments, "--compare", "--format", "int8").json
    assert made["prompt_tokens"] == 16 * len(PROMPT)
    assert made["compare"]["positions"] == 16 * len(PROMPT) - 256 + 8
    assert 1e-12 < made["compare"]["kl_mean"] < 1e-4
    assert made["compare"]["same_top1"] > 0.95


def test_the_ladder_has_every_format_and_its_figures_are_those_of_the_comparison(
    kvarn: Callable[..., Any], tiny_model: Path, long_prompt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvarn_rs.cli import compare, runs

    fed, feed = [], runs.feed
    monkeypatch.setattr(compare, "feed", lambda *given, **more: fed.append(given[1]) or feed(*given, **more))
    arguments = ("--model", tiny_model, "--raw", "--max-new-tokens", "8", "--json", "--prompt-file", long_prompt)
    made = kvarn("generate", *arguments, "--compare", "--ladder").json
    rows = {row["format"]: row for row in made["ladder"]}
    assert list(rows) == ["int8", "int4", "int3", "int2"]
    tokens = made["prompt_tokens"] + made["tokens"]
    assert len(fed) == (1 + (made["prompt_tokens"] - 256) // 16 + 8) * 5  # the reference and four caches, once each
    for row in made["ladder"]:
        assert row["bytes_per_token"] == row["bytes_in_use"] / tokens
        assert row["memory_saved"] == 1 - row["bytes_in_use"] / (tokens * DENSE_BYTES)
        assert row["kl_mean"] > 1e-12
        assert row["kl_last_quarter"] not in (0, row["kl_mean"])
    assert rows["int4"]["kl_mean"] == made["compare"]["kl_mean"]
    assert rows["int4"]["same_top1"] == made["compare"]["same_top1"]
    # Head_dim 16, blocks of 128: tiles of 2 x 16 x 128 x bits / 8 + 6 x 128 + 4 x 16 + 24 bytes, padded to 16. 616
    # tokens are four of them, and an open page whose tile is counted too.
    pages = 2 * 16 * 128 + 6 * 128 + 4 * 16
    tiles = {"int4": 2912, "int3": 2400, "int2": 1888}
    assert rows["int8"]["bytes_in_use"] == 3 * 2 * 5 * pages
    for name, tile in tiles.items():
        assert rows[name]["bytes_per_token_at_rest"] == 3 * 2 * tile / 128
        assert rows[name]["bytes_in_use"] == 3 * 2 * (5 * tile + pages)
        assert rows[name]["calibrated"] == "own prompt"
    assert rows["int8"]["kl_mean"] < rows["int4"]["kl_mean"] < rows["int2"]["kl_mean"]


def test_results_do_not_depend_on_what_ran_before(
    kvarn: Callable[..., Any], tiny_model: Path, long_prompt: Path
) -> None:
    arguments = ("--model", tiny_model, "--raw", "--max-new-tokens", "8", "--json", "--prompt-file", long_prompt)
    alone = kvarn("generate", *arguments, "--ladder", "--format", "int2").json
    both = kvarn("generate", *arguments, "--ladder", "--compare", "--format", "int2").json
    compared = kvarn("generate", *arguments, "--compare", "--format", "int2").json
    assert alone["ladder"] == both["ladder"]
    assert compared["compare"]["kl_mean"] == both["compare"]["kl_mean"] == both["ladder"][-1]["kl_mean"]
    assert alone["text"] == both["text"] == compared["text"]


def test_codecs_join_the_ladder_with_the_bytes_they_would_take(
    kvarn: Callable[..., Any], tiny_model: Path, long_prompt: Path
) -> None:
    arguments = ("--model", tiny_model, "--raw", "--ladder", "--codecs", "--max-new-tokens", "2", "--json")
    made = kvarn("generate", *arguments, "--format", "raw", "--prompt-file", long_prompt).json
    rows = {row["format"]: row for row in made["ladder"]}
    assert list(rows) == ["int8", "int4", "int3", "int2", *kvarn_rs.CODECS]
    for name in kvarn_rs.CODECS:
        row = rows[name]
        assert row["bytes_per_token_at_rest"] == 3 * 2 * _core.codec_bytes_per_token(name, 16)
        assert [key for key, value in row.items() if value is None] == [
            "bytes_per_token",
            "bytes_in_use",
            "memory_saved",
            "calibrated",
        ]
        assert row["kl_mean"] > 1e-12
    assert rows["fp8"]["bytes_per_token_at_rest"] == 3 * 2 * 32
    assert "ladder" in kvarn("generate", "--model", tiny_model, "--codecs", "x").refused()


def test_layers_that_stay_unquantized_are_counted(kvarn: Callable[..., Any], tiny_model: Path, tmp_path: Path) -> None:
    import transformers

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config: Any = transformers.AutoConfig.from_pretrained(str(folder))
    config.head_dim = 24  # which no page holds
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    arguments = ("--model", folder, "--compare", "--ladder", "--max-new-tokens", "4")
    with pytest.warns(hf.DenseFallbackWarning, match="head_dim 24"):
        made = kvarn("generate", *arguments, "--json", PROMPT).json
    assert made["bytes_in_use"] == made["compare"]["reference_bytes_in_use"] > 0
    assert [row["memory_saved"] for row in made["ladder"]] == [0] * 4
    with pytest.warns(hf.DenseFallbackWarning):
        assert kvarn("generate", *arguments, PROMPT).code == 0


def calibrate(folder: Path, file: Path | None) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder))
    hf.calibrate(model, list((PROMPT * 16).encode()), path=file)


def test_a_calibration_file_is_used_by_every_cache(
    kvarn: Callable[..., Any], tiny_model: Path, long_prompt: Path, tmp_path: Path
) -> None:
    file = tmp_path / "calibration.safetensors"
    calibrate(tiny_model, file)
    arguments = ("generate", "--model", tiny_model, "--max-new-tokens", "2", "--calibration", file)
    made = kvarn(*arguments, "--json", "--ladder", "--raw", "--prompt-file", long_prompt).json
    assert made["calibrated"] == "file"
    assert {row["calibrated"] for row in made["ladder"]} == {"file"}
    file.write_bytes(file.read_bytes()[:-1])
    assert str(file) in kvarn(*arguments, "x").refused()
    file.unlink()
    assert str(file) in kvarn(*arguments, "x").refused()


def test_the_models_file_in_the_cache_folder_is_used_and_ignored_if_damaged(
    kvarn: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    calibrate(tiny_model, None)
    arguments = ("generate", "--model", tiny_model, "--max-new-tokens", "2", "--json", PROMPT)
    done = kvarn(*arguments)
    assert (done.json["calibrated"], done.err) == ("file", "")
    (file,) = (tmp_path / "cache" / "kvarn-rs" / "calibration").iterdir()
    file.write_bytes(b"not a calibration")
    done = kvarn(*arguments)
    assert done.json["calibrated"] == "no"
    (line,) = done.err.splitlines()
    assert line.startswith("warning: ")
    assert str(file) in line


def test_the_text_is_streamed_to_stdout_and_the_rest_to_stderr(kvarn: Callable[..., Any], tiny_model: Path) -> None:
    arguments = ("generate", "--model", tiny_model, "--max-new-tokens", "6", PROMPT)
    text = kvarn(*arguments, "--json").json["text"]
    done = kvarn(*arguments)
    assert done.out.rstrip("\n") == text.rstrip("\n")
    assert "int4" in done.err
    assert kvarn(*arguments, "--quiet").err == ""


def test_the_comparison_is_printed_as_a_table(kvarn: Callable[..., Any], tiny_model: Path) -> None:
    done = kvarn("generate", "--model", tiny_model, "--compare", "--max-new-tokens", "4", PROMPT)
    assert done.code == 0
    assert all(word in done.out for word in ("bytes/token", "tokens/GiB", "unquantized", "KL divergence"))
    done = kvarn("generate", "--model", tiny_model, "--ladder", "--codecs", "--max-new-tokens", "4", PROMPT)
    assert done.code == 0
    words = ("at rest", "tokens/GiB", "last quarter", "int2", "kvarn_k4v4", "calibrated")
    assert [word for word in words if word not in done.out] == []
    assert "against unquantized (float32)" in done.out


def test_one_new_token_has_no_decode_speed(kvarn: Callable[..., Any], tiny_model: Path) -> None:
    arguments = ("--model", tiny_model, "--compare", "--max-new-tokens", "1", PROMPT)
    assert kvarn("generate", *arguments, "--json").json["decode_tokens_per_s"] is None
    assert kvarn("generate", *arguments).code == 0


def test_the_prompt_may_come_from_standard_input(
    kvarn: Callable[..., Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    arguments = ("generate", "--model", tiny_model, "--max-new-tokens", "3", "--json")
    piped = kvarn(*arguments, "--prompt-file", "-").json
    assert piped["text"] == kvarn(*arguments, PROMPT).json["text"]


def test_the_chat_template_is_used_unless_the_prompt_is_to_stay_raw(
    kvarn: Callable[..., Any], tiny_model: Path
) -> None:
    arguments = ("generate", "--model", tiny_model, "--max-new-tokens", "1", "--json", "abc")
    assert kvarn(*arguments).json["prompt_tokens"] == 5
    assert kvarn(*arguments, "--raw").json["prompt_tokens"] == 3


def test_a_prompt_beyond_the_models_limit_is_refused_with_the_numbers(
    kvarn: Callable[..., Any], tiny_model: Path
) -> None:
    line = kvarn("generate", "--model", tiny_model, "--raw", "--max-new-tokens", "25", "x" * 1000).refused()
    assert all(number in line for number in ("1000", "25", "1025", "1024"))
    assert kvarn("generate", "--model", tiny_model, "--raw", "--max-new-tokens", "24", "--json", "x" * 1000).code == 0


def test_a_tokenizer_of_another_model_is_refused(kvarn: Callable[..., Any], tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    tokenizer["model"]["vocab"]["a"] = 300
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "300" in kvarn("generate", "--model", folder, "a").refused()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((), "PROMPT"),
        (("one", "--prompt-file", "two"), "PROMPT"),
        (("--prompt-file", "no/such/file"), "no/such/file"),
        (("--format", "int5", "x"), "int5"),
        (("--block-size", "100", "x"), "block_size"),
        (("--max-new-tokens", "0", "x"), "max-new-tokens"),
        (("--max-new-tokens", "some", "x"), "max-new-tokens"),
        (("--raw", ""), "empty"),
        (("--model", "no/such/model", "x"), "no/such/model"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: tuple[str, ...], word: str, kvarn: Callable[..., Any], tiny_model: Path
) -> None:
    for more in ((), ("--json",)):
        assert word in kvarn("generate", "--model", tiny_model, *arguments, *more).refused()


def test_a_prompt_file_that_is_not_text_is_refused(kvarn: Callable[..., Any], tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.bin"
    file.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in kvarn("generate", "--model", tiny_model, "--prompt-file", file).refused()
    assert "cannot read" in kvarn("generate", "--model", tiny_model, "--prompt-file", tmp_path).refused()


def damage_nothing_there(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")


def damage_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no_such_type"}', encoding="utf-8")


def damage_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x10" * 100)


def damage_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def damage_missing_tensors(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["num_hidden_layers"] = 5
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def damage_shapes(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["intermediate_size"] = 128
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def damage_no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        damage_nothing_there,
        damage_config,
        damage_type,
        damage_weights,
        damage_no_weights,
        damage_missing_tensors,
        damage_shapes,
        damage_no_tokenizer,
    ],
)
def test_a_damaged_model_is_refused_in_one_line(
    damage: Callable[[Path], None], kvarn: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    assert str(folder) in kvarn("generate", "--model", folder, "--json", PROMPT).refused()


def test_a_separate_process_writes_only_json(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "kvarn_rs.cli", "generate", "--model", str(tiny_model), "--json", "--compare"]
    done = subprocess.run([*command, "--max-new-tokens", "9", PROMPT], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["tokens"] == 9
