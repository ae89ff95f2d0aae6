"""kvarn-rs for Hugging Face transformers (5.16 <= release < 6).

    from kvarn_rs.hf import KvarnCache
    out = model.generate(**batch, past_key_values=KvarnCache(model, "int8"))    # `cache=` from transformers 5.24 on

How a call travels: transformers asks `masks` for the mask of a forward and `cache` for lengths; each layer hands its K
and V to `cache`, which returns `handle`s; `attention` recognises them and works on the pages of their `group`; `store`
keeps the groups of a cache and its forward together.
"""

from __future__ import annotations

from .attention import register
from .cache import KvarnCache
from .calibration import calibrate
from .store import DenseFallbackWarning

__all__ = ["DenseFallbackWarning", "KvarnCache", "calibrate", "register"]
