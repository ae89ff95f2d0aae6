"""The identity of a model object: the fingerprint of its decoder."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from kvarn_rs.errors import ConfigError
from kvarn_rs.identity import fingerprint_of


def fingerprint(model: Any) -> str:
    """Identifies a decoder by a sample of its weights and a few settings, in a fraction of a second.

    The same in float32, bfloat16, and float16 where it holds the weights, with or without a language model head, under
    any attention implementation, and from the model's files (`identity.fingerprint_of_checkpoint`). A weight on no
    device takes part by its shape alone, one that is packed by another library not at all.

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
    weights = (
        (name, tuple(weight.shape), weight.is_floating_point(), weight.detach().__getitem__)
        for name, weight in decoder.named_parameters()
    )
    return fingerprint_of(config.get_text_config(decoder=True), weights)


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
