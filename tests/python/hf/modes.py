"""Ways to use a cache: each takes a model, a cache for it and a function that makes one, and returns token ids."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from hf.families import decode, forward, generate, left_padded, make_model, prompt, reference_cache
from kvarn_rs.hf import KvarnCache

PADDED = [50, 33, 7]


def greedy(model: Any, cache: Any, family: str) -> torch.Tensor:
    return generate(model, cache, input_ids=prompt(1, 50))


def batch(model: Any, cache: Any, family: str) -> torch.Tensor:
    return generate(model, cache, input_ids=prompt(3, 41))


def left_padded_batch(model: Any, cache: Any, family: str) -> torch.Tensor:
    return generate(model, cache, **left_padded(PADDED))


def sampling(model: Any, cache: Any, family: str) -> torch.Tensor:
    torch.manual_seed(3)
    return generate(model, cache, input_ids=prompt(1, 50), do_sample=True, num_return_sequences=3, top_k=20)


def beams(model: Any, cache: Any, family: str) -> torch.Tensor:
    return generate(model, cache, input_ids=prompt(1, 50), num_beams=4)


def left_padded_beams(model: Any, cache: Any, family: str) -> torch.Tensor:
    return generate(model, cache, **left_padded([50, 19]), num_beams=3, max_new_tokens=30)


def prompt_lookup(model: Any, cache: Any, family: str) -> torch.Tensor:
    ids = torch.cat([prompt(1, 14)] * 4, 1)  # repeats itself, so that there is something to look up
    return generate(model, cache, input_ids=ids, prompt_lookup_num_tokens=4)


def assisted(model: Any, cache: Any, family: str) -> torch.Tensor:
    draft = make_model(family)
    with torch.no_grad():  # right often, not always
        for parameter in draft.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.01)
    return generate(model, cache, input_ids=prompt(1, 50), assistant_model=draft)


def chunked_prefill(model: Any, cache: Any, family: str) -> torch.Tensor:
    return generate(model, cache, input_ids=prompt(2, 61), prefill_chunk_size=20)


def chunked_padded_prefill(model: Any, cache: Any, family: str) -> torch.Tensor:
    return generate(model, cache, **left_padded(PADDED), prefill_chunk_size=20)


def multi_turn(model: Any, cache: Any, family: str) -> torch.Tensor:
    ids = prompt(1, 40)
    for turn in range(3):
        # With the mask: without it, generate takes a generated pad token for padding.
        ids = generate(model, cache, input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)
        ids = torch.cat([ids, prompt(1, 9, seed=20 + turn)], 1)
    return ids


def multi_turn_padded(model: Any, cache: Any, family: str) -> torch.Tensor:
    padded = left_padded(PADDED)
    ids, mask = padded["input_ids"], padded["attention_mask"]
    for turn in range(2):
        ids = generate(model, cache, input_ids=ids, attention_mask=mask, max_new_tokens=12)
        ids = torch.cat([ids, prompt(3, 9, seed=20 + turn)], 1)
        mask = torch.cat([mask, mask.new_ones(3, ids.shape[1] - mask.shape[1])], 1)
    return ids


def crop(model: Any, cache: Any, family: str) -> torch.Tensor:
    cache.activate_past_recording()
    first = decode(model, cache, prompt(2, 50), 12)
    cache.crop(-23)
    second = decode(model, cache, prompt(2, 5, seed=8), 25)
    cache.crop(0)
    third = decode(model, cache, prompt(2, 2, seed=9), 10)
    cache.crop(-1)
    return torch.cat([first, second, third, decode(model, cache, prompt(2, 1, seed=9), 10)], 1)


def crop_padded(model: Any, cache: Any, family: str) -> torch.Tensor:
    cache.activate_past_recording()
    padded = left_padded(PADDED)
    mask = padded["attention_mask"]
    first = decode(model, cache, padded["input_ids"], 12, mask)
    cache.crop(-20)  # 50 + 11 positions are held: back into the prompt
    mask = torch.cat([mask[:, :41], mask.new_ones(3, 4)], 1)
    return torch.cat([first, decode(model, cache, prompt(3, 4, seed=8), 10, mask)], 1)


def reset(model: Any, cache: Any, family: str) -> torch.Tensor:
    first = decode(model, cache, prompt(2, 50), 5)
    if isinstance(cache, KvarnCache):
        cache.reset()
    else:  # in some releases their own reset only fills with zeros
        cache = reference_cache(model)
    return torch.cat([first, decode(model, cache, prompt(2, 37, seed=8), 20)], 1)


def reorder_cache(model: Any, cache: Any, family: str) -> torch.Tensor:
    ids = prompt(3, 44)
    first = decode(model, cache, ids, 8)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    return torch.cat([first, decode(model, cache, prompt(3, 1, seed=8), 25)], 1)


def batch_repeat_interleave(model: Any, cache: Any, family: str) -> torch.Tensor:
    padded = left_padded([44, 30])
    mask = padded["attention_mask"]
    forward(model, cache, padded["input_ids"], mask)
    cache.batch_repeat_interleave(3)
    mask = torch.cat([mask.repeat_interleave(3, 0), mask.new_ones(6, 1)], 1)
    return decode(model, cache, prompt(6, 1, seed=8), 20, mask)


def batch_select_indices(model: Any, cache: Any, family: str) -> torch.Tensor:
    padded = left_padded([44, 30, 12])
    mask = padded["attention_mask"]
    forward(model, cache, padded["input_ids"], mask)
    keep = torch.tensor([2, 0])
    cache.batch_select_indices(keep)
    mask = torch.cat([mask[keep], mask.new_ones(2, 1)], 1)
    return decode(model, cache, prompt(2, 1, seed=8), 20, mask)


def deepcopy_fan_out(model: Any, cache: Any, family: str) -> torch.Tensor:
    forward(model, cache, prompt(1, 45))
    caches = [copy.deepcopy(cache) for _ in range(2)] + [cache]
    return torch.cat([decode(model, c, prompt(1, 3, seed=30 + i), 20) for i, c in enumerate(caches)])


# Modes that go back further than a window.
REWINDS = {"crop", "crop_padded"}

MODES: dict[str, Callable[[Any, Any, str], torch.Tensor]] = {
    mode.__name__: mode
    for mode in (
        greedy,
        batch,
        left_padded_batch,
        sampling,
        beams,
        left_padded_beams,
        prompt_lookup,
        assisted,
        chunked_prefill,
        chunked_padded_prefill,
        multi_turn,
        multi_turn_padded,
        crop,
        crop_padded,
        reset,
        reorder_cache,
        batch_repeat_interleave,
        batch_select_indices,
        deepcopy_fan_out,
    )
}
