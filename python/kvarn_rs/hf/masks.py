"""The masks of transformers: which positions a query sees, and what pages need to know of that.

The mask of a forward reaches attention as one of

* a `KvarnMask`, which `kvarn_mask` made. If it `is_causal`, its tokens and window say all of it;
* a tensor that the caller made (or the model, from a `KvarnMask`), [B, heads, T, kv_len] or broadcast to it, bool
  (True = visible) or added to the scores: used as it is, nothing is added to it;
* None: causal, unless the module says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.utils._pytree import tree_map

from kvarn_rs.errors import DtypeError, ShapeError, UnsupportedError

from .compat import WITHOUT_TORCH_FUNCTION, is_plain_causal, sdpa_mask, tensor_without_storage, window_of

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)
_SLICE = torch.ops.aten.slice.Tensor
_SAME = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)


class KvarnMask(torch.Tensor):
    """transformers' mask of a forward, bool [B, 1, T, kv_len], True = visible, without storage until it is read.

    kvarn attention takes what it needs from the attributes; any other operation works on the whole mask. Slices stay
    masks of this kind: models that share K and V between layers cut off the first queries.

    Attributes:
        is_causal: whether a query sees the tokens up to itself within `window`, where the queries are the last T of
            the kv_len positions. If not, `whole` is needed.
        tokens: bool [B, kv_len], True = token, False = padding; None: all are tokens.
        window: positions that a query sees, itself included; None: all.
    """

    _make: Callable[[], torch.Tensor]
    _whole: torch.Tensor | None
    is_causal: bool
    tokens: torch.Tensor | None
    window: int | None

    @staticmethod
    def __new__(
        cls,
        size: tuple[int, ...],
        make: Callable[[], torch.Tensor],
        device: torch.device | str = "cpu",
        is_causal: bool = False,
        tokens: torch.Tensor | None = None,
        window: int | None = None,
    ) -> KvarnMask:
        """A mask of shape `size` that `make` returns when it is asked for."""
        mask = tensor_without_storage(cls, size, dtype=torch.bool, device=torch.device(device))
        mask._make = make
        mask._whole = None
        mask.is_causal = is_causal
        mask.tokens = tokens
        mask.window = window
        return mask

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass  # torch.Tensor.__init__ takes no arguments

    # Straight to __torch_dispatch__: no operation needs to be seen before that.
    __torch_function__ = WITHOUT_TORCH_FUNCTION  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _SLICE and isinstance(args[0], KvarnMask):
            return args[0]._slice(*args[1:])
        if func in _SAME:
            return args[0]._slice()
        if func in _ADDITIONS and any(isinstance(x, torch.Tensor) and x.is_floating_point() for x in args):
            raise UnsupportedError(
                "the model adds the mask of kvarn attention, which is bool, to its scores: it has attention code of "
                "its own; call model.set_attn_implementation('eager')"
            )
        return func(*tree_map(whole, args), **tree_map(whole, kwargs or {}))

    def whole(self) -> torch.Tensor:
        """The real mask, made once: every layer of a forward has the same one."""
        if self._whole is None:
            self._whole = self._make()
        return self._whole

    def _slice(self, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> KvarnMask:
        size = list(self.shape)
        start, end, _ = slice(start, end, step).indices(size[dim])
        # All positions, or the last queries, are seen as before.
        same = step == 1 and end == size[dim] and (start == 0 or dim % 4 == 2)
        size[dim] = len(range(start, end, step))
        return KvarnMask(
            tuple(size),
            lambda: _SLICE(self.whole(), dim, start, end, step),
            self.device,
            self.is_causal and same,
            self.tokens,
            self.window,
        )

    def __repr__(self, *, tensor_contents: None = None) -> str:
        return f"KvarnMask({list(self.shape)}, is_causal={self.is_causal}, window={self.window})"


def whole(x: Any) -> Any:
    """The real mask of a `KvarnMask`; anything else as it is."""
    return x.whole() if isinstance(x, KvarnMask) else x


def kvarn_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> torch.Tensor:
    """transformers' mask hook for `attn_implementation="kvarn"`.

    Args:
        kv_length: positions from `kv_offset` on that attention will see; those of the queries begin at `q_offset`.
        attention_mask: bool [B, positions so far], True = token, or None.
        allow_is_causal_skip: False when the model goes on to change the mask, which then has to be whole.

    Returns:
        The mask that transformers has for sdpa, [B, 1, q_length, kv_length]: a `KvarnMask`; while a graph is traced, a
        tensor.
    """
    if mask_function is not None:
        kwargs["mask_function"] = mask_function
    kwargs["allow_is_bidirectional_skip"] = False  # None means causal here

    def make() -> torch.Tensor:
        mask = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=cast(int, q_offset),  # a tensor is added like a number
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )
        return cast(torch.Tensor, mask)  # None where it may skip

    if torch.compiler.is_compiling():
        return make()
    plain = mask_function is None or is_plain_causal(mask_function)
    # Keys of a static cache go on after the queries, to its end; its offset is a tensor.
    last = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    by_position = attention_mask is None or attention_mask.dim() == 2
    if not (plain and last and by_position and allow_is_causal_skip) or use_vmap:
        mask = make()
        return KvarnMask(tuple(mask.shape), lambda: mask, mask.device)
    tokens = None
    if attention_mask is not None:
        tokens = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        if (missing := kv_length - tokens.shape[1]) > 0:  # as transformers: positions beyond the mask are hidden
            tokens = torch.nn.functional.pad(tokens, (0, missing))
        if tokens.all():
            tokens = None
    window = None if mask_function is None else window_of(mask_function)
    return KvarnMask((batch_size, 1, q_length, kv_length), make, device, True, tokens, window)


def check_mask(mask: torch.Tensor, size: tuple[int, int, int, int]) -> None:
    """Refuses a mask that attention of `size` [B, heads, T, kv_len] cannot have.

    Raises:
        ShapeError: it is not broadcast to `size`.
        DtypeError: neither bool nor added to the scores.
    """
    if mask.dim() != 4 or any(found not in (1, wanted) for found, wanted in zip(mask.shape, size, strict=True)):
        raise ShapeError(
            f"attention mask {list(mask.shape)}, expected [batch, heads, queries, keys] {list(size)}, or 1 for some"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise DtypeError(
            f"attention mask of {mask.dtype}: bool (True = visible), or floats that are added to the scores"
        )


def is_padding_row(mask: torch.Tensor, num_queries: int) -> bool:
    """Whether a mask says only which positions are tokens: causality adds nothing to a single query."""
    if isinstance(mask, KvarnMask) and mask.is_causal:
        return True
    return num_queries == 1 and mask.dtype == torch.bool and mask.shape[1] == 1


def attended_columns(mask: torch.Tensor) -> torch.Tensor | None:
    """bool [B or 1, kv_len or 1]: the positions that any query of a 4-D mask sees; None: all of them."""
    if isinstance(mask, KvarnMask) and mask.is_causal:
        return mask.tokens
    mask = whole(mask)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.flatten(1, 2).any(1)
