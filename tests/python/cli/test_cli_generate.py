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

pytest.importorskip("torch")
pytest.importorskip("transformers")

PROMPT = "The tide comes in because of the moon."
# K and V, 3 layers, 2 kv heads of 16 channels in float32.
DENSE_BYTES = 2 * 3 * 2 * 16 * 4
INT8_BLOCK_BYTES = 3 * 2 * (2 * 16 * 16 + 6 * 16 + 4 * 16)


def test_the_json_says_what_was_made_and_what_it_took(kvarn: Callable[..., Any], tiny_model: Path) -> None:
    arguments = ("--model", tiny_model, "--block-size", "16", "--max-new-tokens", "5", "--json", PROMPT)
    made = kvarn("generate", *arguments).json
    assert made["format"] == "int8"
    assert made["tokens"] == 5
    assert made["prompt_tokens"] == len(f"[{PROMPT}]")
    assert isinstance(made["text"], str)
    held = made["prompt_tokens"] + 4  # the last token is never fed
    assert made["bytes_in_use"] == -(-held // 16) * INT8_BLOCK_BYTES
    assert made["bytes_per_token"] == made["bytes_in_use"] / held
    assert made["dense_fallbacks"] == 0
    assert made["decode_tokens_per_s"] > 0
    assert "compare" not in made


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
    kvarn: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT * 16, encoding="utf-8")
    arguments = ("--model", tiny_model, "--raw", "--compare", "--max-new-tokens", "8", "--json", "--prompt-file", file)
    made = kvarn("generate", *arguments).json
    assert made["prompt_tokens"] == 16 * len(PROMPT)
    assert made["compare"]["positions"] == 16 * len(PROMPT) - 256 + 8
    assert 1e-12 < made["compare"]["kl_mean"] < 1e-4
    assert made["compare"]["same_top1"] > 0.95


def test_the_text_is_streamed_to_stdout_and_the_rest_to_stderr(kvarn: Callable[..., Any], tiny_model: Path) -> None:
    arguments = ("generate", "--model", tiny_model, "--max-new-tokens", "6", PROMPT)
    text = kvarn(*arguments, "--json").json["text"]
    done = kvarn(*arguments)
    assert done.out.rstrip("\n") == text.rstrip("\n")
    assert "int8" in done.err
    assert kvarn(*arguments, "--quiet").err == ""


def test_people_get_a_table_of_the_comparison(kvarn: Callable[..., Any], tiny_model: Path) -> None:
    done = kvarn("generate", "--model", tiny_model, "--compare", "--max-new-tokens", "4", PROMPT)
    assert done.code == 0
    assert all(word in done.out for word in ("bytes/token", "tokens/GiB", "unquantized", "KL divergence"))


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


def test_a_process_of_its_own_writes_json_and_nothing_else(tiny_model: Path) -> None:
    command = [sys.executable, "-m", "kvarn_rs.cli", "generate", "--model", str(tiny_model), "--json", "--compare"]
    done = subprocess.run([*command, "--max-new-tokens", "9", PROMPT], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["tokens"] == 9
