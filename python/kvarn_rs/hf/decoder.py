"""The decoder that a `KvarnCache` is made for: its layers, and its attention implementation."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch

from kvarn_rs.errors import ConfigError, DeviceError, UnsupportedError

from .attention import ATTENTION_NAME, register
from .compat import attention_of, plan_layers
from .fallback import DenseFallbackWarning
from .group import Shape
from .implementation import AttentionSettings, cache_limit, own_attention, takes_cache


class Decoder:
    """The decoder of a model, or of a config alone.

    Attributes:
        model: the model; None where only the config is known.
        config: the config of its decoder.
        plans: one for each of its layers, in order.
        own_attention: the attention that the model keeps, if `prepare` could not set kvarn's; else None.

    Raises:
        ConfigError: neither, or an encoder-decoder model.
        DeviceError: a model that is not on the CPU.
    """

    def __init__(self, model_or_config: Any) -> None:
        self.model: Any = model_or_config if isinstance(model_or_config, torch.nn.Module) else None
        config: Any = model_or_config if self.model is None else getattr(self.model, "config", None)
        wanted = ("get_text_config",) if self.model is None else ("device", "set_attn_implementation")
        has_all = hasattr(config, "get_text_config") and all(hasattr(model_or_config, name) for name in wanted)
        if not has_all or isinstance(model_or_config, type):
            raise ConfigError(f"expected a transformers model or config, not {type(model_or_config).__name__}")
        if getattr(config, "is_encoder_decoder", False):
            raise ConfigError(f"{config.model_type} is an encoder-decoder model; KvarnCache is for decoders")
        if self.model is not None and self.model.device.type != "cpu":
            raise DeviceError(_why_elsewhere(self.model))
        self.config: Any = config.get_text_config(decoder=True)
        try:
            self.plans = plan_layers(self.config)
        except AttributeError as error:  # a model without a cache of layers
            raise ConfigError(f"{type(self.config).__name__} does not tell its layers: {error}") from error
        self.own_attention: str | None = None
        if self.model is not None and not takes_cache(self.model):
            why = f"{type(self.model).__name__}, as it is now, hands no K and V to a cache"
            self.plans = [
                dataclasses.replace(plan, paged=False, unpaged=why) if plan.paged or plan.unpaged else plan
                for plan in self.plans
            ]

    @property
    def unpaged(self) -> dict[int, str]:
        """The layers whose K and V are not paged, and why."""
        return {layer_idx: plan.unpaged for layer_idx, plan in enumerate(self.plans) if plan.unpaged is not None}

    @property
    def default_layers(self) -> dict[int, Any]:
        """The layers of transformers that stay, since nothing of them is paged."""
        return {layer_idx: plan.default_layer for layer_idx, plan in enumerate(self.plans) if not plan.paged}

    def groups(self) -> list[tuple[list[int], int | None, Shape]]:
        """The paged layers that are alike: their numbers, window and shape, by the first of them."""
        members: dict[tuple[int | None, Shape], list[int]] = {}
        for layer_idx, plan in enumerate(self.plans):
            if plan.paged:
                members.setdefault((plan.window, plan.shape), []).append(layer_idx)
        return [(layers, window, shape) for (window, shape), layers in members.items()]

    def prepare(self, strict: bool) -> list[str]:
        """Sets a model to kvarn attention if its layers are paged and its code can use it; else leaves it as it is.

        Returns:
            What will not use pages, and why; also the text of one DenseFallbackWarning.

        Raises:
            UnsupportedError: `strict`, and something will not use pages; or a model that cannot use kvarn attention and
                has it set already. The model is as it was.
        """
        notices = self._unpaged_layers()
        settings = None
        if self.model is not None and any(plan.paged for plan in self.plans):
            register()
            settings = AttentionSettings(self.model)
            notices += self._set_attention(settings) + self._generates_without()
        if notices and strict:
            if settings is not None:
                settings.restore()
            raise UnsupportedError("; ".join(notices))
        if notices:
            warnings.warn("; ".join(notices), DenseFallbackWarning, stacklevel=3)
        return notices

    def _unpaged_layers(self) -> list[str]:
        if not self.unpaged and not any(plan.paged for plan in self.plans):
            return [f"{self.config.model_type} has no layer with keys and values: there is nothing to quantize"]
        layers_of: dict[str, list[int]] = {}
        for layer_idx, why in self.unpaged.items():
            layers_of.setdefault(why, []).append(layer_idx)
        return [
            f"{len(layers)} of {len(self.plans)} layers ({', '.join(map(str, layers))}) are not paged and stay "
            f"unquantized: {why}"
            for why, layers in layers_of.items()
        ]

    def _set_attention(self, settings: AttentionSettings) -> list[str]:
        before = attention_of(self.config)
        self.own_attention = own_attention(self.model)
        if self.own_attention is None:
            settings.set(ATTENTION_NAME, self.config)
            if attention_of(self.config) == ATTENTION_NAME:
                return []
            settings.restore()
            self.own_attention = before
        message = (
            f"{type(self.model).__name__} has its own attention ({self.own_attention}) and cannot use kvarn attention: "
            "every step will dequantize its K and V"
        )
        if before == ATTENTION_NAME:
            raise UnsupportedError(f"{message}; call model.set_attn_implementation('eager') first")
        return [message]

    def _generates_without(self) -> list[str]:
        limit = cache_limit(self.model, self.config)
        if limit is None:
            return []
        return [
            f"where a sequence first has more than {limit} positions, generate of {type(self.model).__name__} drops "
            "the cache and goes on with an unquantized one of its own"
        ]


def _why_elsewhere(model: Any) -> str:
    if model.device.type != "meta":
        return f"the model is on {model.device}; this release keeps K and V on the CPU only"
    return (
        "the model's weights are on meta, no device: not loaded, or offloaded by accelerate. Load it with "
        "device_map='cpu'; or, if they come from disk when they are needed, call register(), "
        "model.set_attn_implementation('kvarn') and "
        "KvarnCache(model.config)"
    )
