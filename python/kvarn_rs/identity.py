"""Which model it is: the fingerprint of a decoder, from memory or from a checkpoint, and the file of its calibration.

A fingerprint is a hash of a few settings and of samples of weights. transformers renames and converts weights as it
loads them, so names do not count: a weight is known by its layer, its shape and its sample. Experts of a mixture, which
are stacked then, do not count either, nor do a language model head, weights that are not floating point, and layers
beyond the config's (of a built-in draft model).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

# Of a config, what people change under the same weights, and how the weights are cut into heads. The rest has defaults
# that change from one release of transformers to the next.
_SETTINGS = (
    "head_dim",
    "layer_types",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rope_parameters",
    "sliding_window",
)
_LEFT_OUT = ("experts", "lm_head")
_EMBEDDINGS = r"(.*\.|)(?:embed|embed_in|embed_tokens|embeddings|tok_embeddings|word_embeddings|wte)\.weight"
_SAMPLED_ROWS = 4  # of each weight, evenly spaced
_SAMPLED_COLUMNS = 64  # of each of them
_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"

Reader = Callable[[tuple[slice, ...]], torch.Tensor]
"""Reads a part of a weight."""


def fingerprint_of(config: Any, weights: Iterable[tuple[str, tuple[int, ...], bool, Reader]]) -> str:
    """The fingerprint of a decoder.

    The same for the same weights in float32, bfloat16, and float16 where it holds them: samples are rounded to
    bfloat16.

    Args:
        config: of its text model, as transformers has it.
        weights: of each parameter of the decoder its name, shape, whether it is floating point, and how it is read.

    Returns:
        64 hexadecimal digits of a sha256.
    """
    saved = config.to_dict()  # attributes of a config whose layers differ raise
    settings = {name: _plain(saved.get(config.attribute_map.get(name, name))) for name in _SETTINGS}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    num_layers = settings["num_hidden_layers"]
    samples = []
    for name, shape, is_float, read in weights:
        layer = next((int(part) for part in name.split(".") if part.isdigit()), None)
        beyond = layer is not None and num_layers is not None and layer >= num_layers
        if is_float and not beyond and _takes_part(name, shape):
            samples.append(hashlib.sha256(f"{layer} {list(shape)}\n".encode() + _sample(shape, read)).digest())
    digest.update(b"".join(sorted(samples)))
    return digest.hexdigest()


def _takes_part(name: str, shape: tuple[int, ...]) -> bool:
    parts = name.split(".")
    return parts[-1] in ("weight", "bias") and len(shape) in (1, 2) and not any(part in _LEFT_OUT for part in parts)


def _plain(value: Any) -> Any:
    """A setting as JSON, without entries that are None; numbers as floats, since 10000 and 10000.0 are the same."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, (int, float)):
        return float(value)
    return None if value is None else str(value)


def _sample(shape: tuple[int, ...], read: Reader) -> bytes:
    """Some elements of a weight in bfloat16; none of one that cannot be read."""
    parts = []
    try:
        for part in range(_SAMPLED_ROWS if 0 not in shape else 0):
            row = [(size - 1) * part // (_SAMPLED_ROWS - 1) for size in shape[:-1]]
            start = max(shape[-1] - _SAMPLED_COLUMNS, 0) * part // (_SAMPLED_ROWS - 1)
            found = read((*(slice(index, index + 1) for index in row), slice(start, start + _SAMPLED_COLUMNS)))
            parts.append(found.reshape(-1).to("cpu", torch.float32).to(torch.bfloat16).view(torch.int16))
    except (RuntimeError, NotImplementedError, TypeError):  # on no device, or of a type that cannot be indexed
        return b""
    return torch.cat(parts).numpy().astype("<i2", copy=False).tobytes() if parts else b""


def fingerprint_of_checkpoint(folder: str | os.PathLike[str], *, trust_remote_code: bool = False) -> str | None:
    """The fingerprint that the model in a folder has once transformers has loaded it, from a part of its files.

    Args:
        folder: of a model, with a `config.json` and its weights in safetensors files named as transformers names them.
        trust_remote_code: whether code in the folder may be run to read its config.

    Returns:
        64 hexadecimal digits; None for a folder without such files, or whose weights are not those of a decoder.
    """
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig

    folder = Path(folder)
    try:
        files = _files(folder)
        if not files:
            return None
        config: Any = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        handles = [safe_open(str(file), "pt") for file in files]
        holders = {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118 (no mapping)
        prefix = _decoder_prefix(list(holders))
        if prefix is None:
            return None

        def weights() -> Iterable[tuple[str, tuple[int, ...], bool, Reader]]:
            for name in (name for name in holders if name.startswith(prefix)):
                found = holders[name].get_slice(name)
                yield name[len(prefix) :], tuple(found.get_shape()), "F" in found.get_dtype(), found.__getitem__

        return fingerprint_of(config.get_text_config(decoder=True), weights())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, SafetensorError):
        return None


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        return [folder / _WHOLE] if (folder / _WHOLE).is_file() else []
    named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(named))]


def _decoder_prefix(names: list[str]) -> str | None:
    """What the names of the decoder's weights begin with: those of the parent of the token embedding.

    Of several embeddings it is the one with the most weights beside it; those within layers are of draft models.
    """
    found = [match[1] for match in (re.fullmatch(_EMBEDDINGS, name) for name in names) if match]
    found = [prefix for prefix in found if not any(part.isdigit() for part in prefix.split("."))]
    return max(found, key=lambda prefix: sum(name.startswith(prefix) for name in names), default=None)


def calibration_folder() -> Path:
    """Where calibrations are kept: `kvarn-rs/calibration` under `XDG_CACHE_HOME`, or under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return folder / "kvarn-rs" / "calibration"


def path_of(model_fingerprint: str) -> Path:
    """The file of the calibration of a model with this fingerprint, whether it is there or not."""
    return calibration_folder() / f"{model_fingerprint}.safetensors"
