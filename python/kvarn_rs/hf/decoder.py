"""What is a `KvarnCache` made for: which model, which of its layers are alike, which settings work?"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch

import kvarn_rs
from kvarn_rs.errors import ConfigError, DeviceError, UnknownFormatError, UnsupportedError

from .attention import ATTENTION_NAME, register
from .calibration import fingerprint
from .compat import LayerPlan
from .store import DenseFallbackWarning

Shape = tuple[int | None, int | None]


class Decoder:
    """A model, or as much of one as its config tells.

    Attributes:
        model: the model, or None.
        config: the config of its decoder.

    Raises:
        ConfigError: neither, or an encoder-decoder model.
        DeviceError: a model that is not on the CPU.
    """

    def __init__(self, model_or_config: Any) -> None:
        self.model: Any = model_or_config if isinstance(model_or_config, torch.nn.Module) else None
        config: Any = model_or_config if self.model is None else getattr(self.model, "config", None)
        if not hasattr(config, "get_text_config"):
            raise ConfigError(f"expected a transformers model or config, not {type(model_or_config).__name__}")
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(f"{config.model_type} is an encoder-decoder model; KvarnCache is for decoders")
        if self.model is not None and self.model.device.type != "cpu":
            raise DeviceError(f"the model is on {self.model.device}; this release keeps K and V on the CPU only")
        self.config: Any = config.get_text_config(decoder=True)

    def use_kvarn_attention(self, strict: bool) -> None:
        """Sets the model's attention; warns, or raises UnsupportedError if `strict`, where it has its own."""
        register()
        before = self.config._attn_implementation
        self.model.set_attn_implementation(ATTENTION_NAME)
        if self.config._attn_implementation == ATTENTION_NAME:
            return
        message = (
            f"{type(self.model).__name__} has its own attention ({self.config._attn_implementation}) and cannot use "
            "kvarn attention: every step will dequantize its K and V"
        )
        if strict:
            self.model.set_attn_implementation(before)
            raise UnsupportedError(message)
        warnings.warn(message, DenseFallbackWarning, stacklevel=3)


class Origin:
    """Whose K and V a cache holds: a model's, while it lives, or what a file says of it."""

    def __init__(self, model_type: str, model: Any = None, known: str | None = None) -> None:
        self.model_type = model_type
        self._model = None if model is None else weakref.ref(model)
        self._known = known

    @property
    def fingerprint(self) -> str | None:
        """The model's, if it is known."""
        model = None if self._model is None else self._model()
        return self._known if model is None else fingerprint(model)


def group_layers(plans: Iterable[LayerPlan]) -> list[tuple[list[int], int | None, Shape]]:
    """The paged layers that are alike: their numbers, window and shape, by the first of them."""
    members: dict[tuple[int | None, Shape], list[int]] = {}
    for layer_idx, plan in enumerate(plans):
        if plan.paged:
            members.setdefault((plan.window, plan.shape), []).append(layer_idx)
    return [(layers, window, shape) for (window, shape), layers in members.items()]


def check_pages(
    format: str, block_size: int, num_blocks: int | None, num_open_pages: int | None, codec: str | None
) -> None:
    """Typed errors for settings that no model can use, before a model is touched."""
    if format not in kvarn_rs.FORMATS:
        raise UnknownFormatError(f"unknown format {format!r}; known: {', '.join(kvarn_rs.FORMATS)}")
    if num_blocks is not None and num_blocks < 1:
        raise ConfigError(f"num_blocks is {num_blocks}; it must be at least 1, or None")
    # The core knows what it does: ask it with the smallest shape there is.
    kvarn_rs.PagedKvCache(
        num_layers=1,
        num_kv_heads=1,
        head_dim=16,
        format=format,
        block_size=block_size,
        num_open_pages=num_open_pages,
        codec=codec,
    )
