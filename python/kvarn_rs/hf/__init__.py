"""kvarn-rs for Hugging Face transformers (5.16 <= release < 6).

    from kvarn_rs.hf import KvarnCache
    out = model.generate(**batch, past_key_values=KvarnCache(model, "int8"))    # `cache=` from transformers 5.24 on

How a call travels: transformers asks `masks` for the mask of a forward and `cache` for lengths; each `layer` takes
its K and V into the `forward` in progress and returns `handle`s; `attention` recognises them and works on the pages of
their `group`, which maps `positions` to tokens; what pages cannot do is a `fallback` to `dense` attention.
"""

from __future__ import annotations

from .attention import register
from .cache import KvarnCache
from .calibrate import calibrate
from .fallback import DenseFallbackWarning

__all__ = ["DenseFallbackWarning", "KvarnCache", "calibrate", "register"]
