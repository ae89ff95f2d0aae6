"""The identity of a model: a hash of its config and of a sample of its weights."""

from __future__ import annotations

import hashlib
import json
import re
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from kvarn_rs.errors import ConfigError

# What a config says of how and by whom a model is run, not of what it computes.
_VOLATILE = frozenset(
    (
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "quantization_config",
        "return_dict",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)
_SAMPLED_ROWS = 4  # of each weight, evenly spaced
_SAMPLED_COLUMNS = 64  # of each of them


def fingerprint(model: Any) -> str:
    """Identifies a decoder by its text config and a sample of its weights, in a fraction of a second.

    The same for the same weights in another dtype that holds them exactly (float32 from bfloat16 files), with or
    without a language model head, and under any attention implementation. A weight that cannot be read as numbers
    (on no device, or packed by another library) takes part by its name and shape alone.

    Returns:
        64 hexadecimal digits of a sha256.

    Raises:
        ConfigError: not a transformers model.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(model, torch.nn.Module) or not hasattr(config, "get_text_config"):
        raise ConfigError(f"expected a transformers model, not {type(model).__name__}")
    find_decoder: Any = getattr(model, "get_decoder", None)
    decoder = model if find_decoder is None else find_decoder()
    digest = hashlib.sha256()
    digest.update(json.dumps(_lasting(config.get_text_config(decoder=True).to_dict()), sort_keys=True).encode())
    samples = []
    for name, weight in sorted(decoder.named_parameters(), key=lambda entry: entry[0]):
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        samples += _sample(weight.detach())
    if samples:
        digest.update(torch.cat(samples).numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _lasting(value: Any) -> Any:
    """A config's part without what may change: keys of `_VOLATILE`, private ones, token ids, those without a value."""
    if isinstance(value, dict):
        return {
            str(key): _lasting(entry)
            for key, entry in value.items()
            if entry is not None and key not in _VOLATILE and not re.match(r"_|.*_token_id$", str(key))
        }
    if isinstance(value, (list, tuple)):
        return [_lasting(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str)) else repr(value)


def _sample(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """Some elements of a weight as float32, whatever its strides; none of one that has no memory or is not dense."""
    if weight.is_meta or weight.numel() == 0 or not weight.is_floating_point():
        return
    try:
        for part in range(_SAMPLED_ROWS):
            row = weight
            while row.dim() > 1:
                row = row[(row.shape[0] - 1) * part // (_SAMPLED_ROWS - 1)]
            row = row.reshape(-1)
            start = max(row.shape[0] - _SAMPLED_COLUMNS, 0) * part // (_SAMPLED_ROWS - 1)
            yield row[start : start + _SAMPLED_COLUMNS].to("cpu", torch.float32)
    except (RuntimeError, NotImplementedError, TypeError):  # a quantized weight that cannot be indexed
        return


class Origin:
    """The model whose K and V a cache holds, while the model lives; or what a file says of it."""

    def __init__(self, model_type: str, model: Any = None, known: str | None = None) -> None:
        self.model_type = model_type
        self._model = None if model is None else weakref.ref(model)
        self._known = known

    @property
    def fingerprint(self) -> str | None:
        """The model's, if it is known."""
        model = None if self._model is None else self._model()
        return self._known if model is None else fingerprint(model)
