"""Runs of a model with a cache, by timed greedy generation or on given tokens, and the bytes of caches."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM, TextStreamer
from transformers.generation.streamers import BaseStreamer

from ..hf.compat import attention_of
from ..hf.layer import KvarnLayer

# The argument that takes the cache; transformers renamed it for all models at once.
_CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


@dataclass(frozen=True)
class GreedyRun:
    """The tokens of one greedy generation, and its speed.

    Attributes:
        tokens: the new tokens.
        prefill_s: seconds until the first new token.
        decode_tokens_per_s: new tokens per second after the first; None with fewer than two.
    """

    tokens: list[int]
    prefill_s: float
    decode_tokens_per_s: float | None


class _Clock(BaseStreamer):
    """A streamer that records the time of each token and forwards it to another one."""

    def __init__(self, text: TextStreamer | None) -> None:
        self.text = text
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # generate first puts the prompt, before its first forward
        if self.text is not None:
            self.text.put(value)

    def end(self) -> None:
        if self.text is not None:
            self.text.end()


def attention_name(model: Any) -> str:
    """The model's current attention implementation."""
    return str(attention_of(model.config.get_text_config()))


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Sets another attention implementation within the block."""
    before = attention_name(model)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def warm_up(model: Any, prompt_ids: torch.Tensor) -> None:
    """Runs a short forward, so that weights mapped from disk are in memory before anything is timed."""
    model(input_ids=prompt_ids[:, :8], use_cache=False)


def greedy(model: Any, prompt_ids: torch.Tensor, cache: Any, max_new_tokens: int, tokenizer: Any = None) -> GreedyRun:
    """Continues the prompt [1, T] greedily; streams the text to stdout if a tokenizer is given."""
    text = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if tokenizer is not None else None
    clock = _Clock(text)
    output = model.generate(
        input_ids=prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        **{_CACHE: cache},
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        streamer=clock,
    )
    tokens = output[0, prompt_ids.shape[1] :].tolist()
    asked, first, *later = clock.times
    speed = len(later) / (later[-1] - first) if later else None
    return GreedyRun(tokens, first - asked, speed)


@torch.no_grad()
def feed(model: Any, tokens: torch.Tensor, cache: Any, *, last_only: bool = False) -> torch.Tensor:
    """Appends `tokens` [1, T] to the cache and returns the logits [T or 1, vocabulary]."""
    output = model(input_ids=tokens, use_cache=True, logits_to_keep=1 if last_only else 0, **{_CACHE: cache})
    return output.logits[0]


def held_bytes(cache: Any) -> int:
    """Bytes in use by a kvarn cache: its blocks, and the tensors of layers that are not paged."""
    unpaged = [layer for layer in cache.layers if not isinstance(layer, KvarnLayer)]
    return cache.stats()["bytes_in_use"] + tensor_bytes(unpaged)


def tensor_bytes(layers: Iterable[Any]) -> int:
    """Bytes of the keys and values in transformers' cache layers."""
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)
