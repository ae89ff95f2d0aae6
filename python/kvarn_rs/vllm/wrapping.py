"""Replaces functions of vLLM by others that call them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replaces a function of vLLM by one that gets it as its first argument. Once: the second time nothing happens."""
    original = getattr(owner, name)
    if getattr(original, "kvarn_wraps", None) is not None:
        return

    @functools.wraps(original)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    replaced.kvarn_wraps = original  # pyright: ignore[reportAttributeAccessIssue]
    setattr(owner, name, replaced)
