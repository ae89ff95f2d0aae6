"""The fingerprint of a checkpoint, which vLLM takes, is the one of the model that transformers loads from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf.families import FAMILIES, HYBRID_FAMILIES, MORE_FAMILIES, make_model
from kvarn_rs.hf.fingerprint import fingerprint
from kvarn_rs.identity import fingerprint_of_checkpoint
from model_classes.configs import tiny_model

WEIGHTS = "model.safetensors"
# Experts that transformers stacks as it loads them, a router of another name, a built-in draft model, tied embeddings.
MORE_CLASSES = ["mixtral", "qwen2_moe", "deepseek_v3", "glm4_moe", "falcon", "opt", "gpt_neox", "phi4_multimodal"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoint of a Llama."""
    make_model("llama").save_pretrained(tmp_path)
    return tmp_path


def rewritten(folder: Path, rename: Callable[[str], str], **more: torch.Tensor) -> Path:
    """A checkpoint with other names, and weights beside."""
    weights = {rename(name): weight for name, weight in load_file(folder / WEIGHTS).items()}
    save_file({**weights, **more}, folder / WEIGHTS, {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES, *HYBRID_FAMILIES])
def test_files_and_model_have_the_same_fingerprint(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path)
    assert fingerprint_of_checkpoint(tmp_path) == fingerprint(type(model).from_pretrained(tmp_path))


@pytest.mark.parametrize("model_type", MORE_CLASSES)
def test_files_whose_weights_are_converted_as_they_load_have_the_model_s_fingerprint(
    model_type: str, tmp_path: Path
) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert fingerprint_of_checkpoint(tmp_path) == fingerprint(loaded)


def test_a_checkpoint_in_many_files_has_the_same_fingerprint(folder: Path, tmp_path_factory: Any) -> None:
    own = fingerprint_of_checkpoint(folder)
    other = tmp_path_factory.mktemp("sharded")
    make_model("llama").save_pretrained(other, max_shard_size="20KB")
    assert len(list(other.glob("*.safetensors"))) > 2
    assert fingerprint_of_checkpoint(other) == own == fingerprint(make_model("llama"))


@pytest.mark.parametrize("prefix", ["", "transformer.", "language_model.model.", "model.language_model."])
def test_the_decoder_s_name_does_not_count(prefix: str, folder: Path) -> None:
    own = fingerprint_of_checkpoint(folder)
    vision = {f"vision_tower.layers.{i}.mlp.weight": torch.ones(4, 4) for i in range(2)} if prefix else {}
    assert fingerprint_of_checkpoint(rewritten(folder, lambda name: name.replace("model.", prefix), **vision)) == own


def test_draft_layers_in_the_checkpoint_do_not_count(folder: Path) -> None:
    own = fingerprint_of_checkpoint(folder)
    draft = {f"model.layers.3.{name}.weight": torch.ones(8, 8) for name in ("embed_tokens", "self_attn.q_proj")}
    assert fingerprint_of_checkpoint(rewritten(folder, str, **draft)) == own


def test_every_weight_of_the_checkpoint_counts(folder: Path) -> None:
    weights = load_file(folder / WEIGHTS)
    own = fingerprint_of_checkpoint(folder)
    for name in weights:
        save_file({**weights, name: weights[name] * 1.0078125}, folder / WEIGHTS, {"format": "pt"})
        assert (fingerprint_of_checkpoint(folder) == own) == ("lm_head" in name), name


@pytest.mark.parametrize(("setting", "value"), [("num_attention_heads", 8), ("sliding_window", 7)])
def test_settings_that_change_attention_count(setting: str, value: int, tmp_path: Path) -> None:
    make_model("mistral").save_pretrained(tmp_path)
    own = fingerprint_of_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "transformers_version": "1.2.3", "use_cache": False}))
    assert fingerprint_of_checkpoint(tmp_path) == own
    (tmp_path / "config.json").write_text(json.dumps({**config, setting: value}))
    assert fingerprint_of_checkpoint(tmp_path) != own


def test_a_folder_without_safetensors_or_config_has_no_fingerprint(folder: Path, tmp_path_factory: Any) -> None:
    pickled = tmp_path_factory.mktemp("pickled")
    shutil.copy(folder / "config.json", pickled)
    torch.save(load_file(folder / WEIGHTS), pickled / "pytorch_model.bin")
    assert fingerprint_of_checkpoint(pickled) is None
    (folder / "config.json").unlink()
    assert fingerprint_of_checkpoint(folder) is None
    assert fingerprint_of_checkpoint(folder / "nowhere") is None


def test_a_damaged_file_has_no_fingerprint(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"not safetensors")
    assert fingerprint_of_checkpoint(folder) is None
