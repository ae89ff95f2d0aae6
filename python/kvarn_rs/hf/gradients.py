"""The refusal of a backward through pages: they keep no graph, so its gradients would miss a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.forward_ad import unpack_dual

from kvarn_rs.errors import UnsupportedError

from .compat import AnyTensor, is_transforming

REFUSAL = "attention on pages has no gradients; train with an unquantized cache, or with none"


class _Refuse(torch.autograd.Function):
    """A tensor that depends on others in the graph, and whose backward raises."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], torch.Tensor], *sources: torch.Tensor) -> torch.Tensor:
        return make()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise UnsupportedError(REFUSAL)


def refusing(make: Callable[[], AnyTensor], *sources: torch.Tensor | None) -> AnyTensor:
    """The new tensor that `make` returns. A forward can use it; a backward through it to the sources raises.

    sources: what it was computed from, outside of the graph; those that need no gradient, and None, do not count.
    """
    if not torch.is_grad_enabled():
        return make()
    needed = [source for source in sources if source is not None and source.requires_grad]
    return _Refuse.apply(make, *needed) if needed else make()  # pyright: ignore[reportReturnType]


def refuse_transforms(*tensors: torch.Tensor | None) -> None:
    """UnsupportedError for tensors with tangents (forward-mode AD), and within `torch.func` transforms."""
    has_tangent = any(x is not None and unpack_dual(x).tangent is not None for x in tensors)
    if has_tangent or is_transforming():
        raise UnsupportedError(REFUSAL)


def lost_source() -> torch.Tensor:
    """Stands for K and V of earlier forwards that needed gradients, and whose graph is gone."""
    return torch.empty(0, requires_grad=True)


def needs_gradient(x: torch.Tensor) -> bool:
    """Whether a backward of what is computed from x would reach it."""
    return x.requires_grad and torch.is_grad_enabled()
