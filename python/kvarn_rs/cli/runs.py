"""Runs of one model with one cache: greedy and timed, or fed with given tokens; and what the cache then holds."""

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
    """What `generate` made, and how long it took.

    Attributes:
        tokens: the new tokens.
        prefill_s: seconds from the prompt to the first new token.
        decode_tokens_per_s: new tokens after the first, by second; None if there were none.
    """

    tokens: list[int]
    prefill_s: float
    decode_tokens_per_s: float | None


class _Clock(BaseStreamer):
    """Notes when each token came, and passes it on."""

    def __init__(self, text: TextStreamer | None) -> None:
        self.text = text
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # the first is the prompt's, before the first forward
        if self.text is not None:
            self.text.put(value)

    def end(self) -> None:
        if self.text is not None:
            self.text.end()


def attention_name(model: Any) -> str:
    """The attention implementation that the model uses now."""
    return str(attention_of(model.config.get_text_config()))


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """The model with another attention implementation."""
    before = attention_name(model)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def warm_up(model: Any, prompt_ids: torch.Tensor) -> None:
    """Brings the weights, which may be mapped from disk, into memory: the first timed run must not pay for it."""
    model(input_ids=prompt_ids[:, :8], use_cache=False)


def greedy(model: Any, prompt_ids: torch.Tensor, cache: Any, max_new_tokens: int, tokenizer: Any = None) -> GreedyRun:
    """Continues the prompt [1, T] greedily; prints the text as it comes if a tokenizer is given."""
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
    """Logits [T or 1, vocabulary] after `tokens` [1, T], which the cache keeps."""
    output = model(input_ids=tokens, use_cache=True, logits_to_keep=1 if last_only else 0, **{_CACHE: cache})
    return output.logits[0]


def held_bytes(cache: Any) -> int:
    """Bytes that a kvarn cache holds: its blocks, and the tensors of layers that are not paged."""
    unpaged = [layer for layer in cache.layers if not isinstance(layer, KvarnLayer)]
    return cache.stats()["bytes_in_use"] + tensor_bytes(unpaged)


def tensor_bytes(layers: Iterable[Any]) -> int:
    """Bytes of the keys and values that transformers' own cache layers hold."""
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor is not None)
