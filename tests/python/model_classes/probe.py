"""The trial of one class: a tiny model with transformers' cache under eager attention, then with a `KvarnCache`.

Everything is caught and written down; what it means is `outcome`'s business.
"""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import get_layer_types_and_kwargs

import kvarn_rs
from hf.families import BLOCK_SIZE, CACHE_NAME
from kvarn_rs.errors import KvarnError
from kvarn_rs.hf import KvarnCache
from kvarn_rs.hf.compat import keeps_nothing
from kvarn_rs.hf.layer import KvarnLayer

from .configs import PAD, VOCAB, classes, tiny_model

PROMPT = 40
NEW = 20
# Logits of the two caches may differ by rounding (1e-6 of their spread is usual); more is another computation.
LOGITS_TOLERANCE = 1e-3

Tokens = tuple[list[list[int]], list[torch.Tensor]]  # new ids by row, logits [rows, vocab] by step


def _prompt(rows: int, length: int, seed: int = 7) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def _generate(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> Tokens:
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, "output_logits": True, **options}
    out = model.generate(
        input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **options, **{CACHE_NAME: cache}
    )
    new = out.sequences.flatten(0, -2)[:, ids.shape[1] :]  # music has codebooks between rows and tokens
    return new.tolist(), [step.float() for step in out.logits]


def greedy(model: Any, cache: Any) -> Tokens:
    return _generate(model, cache, _prompt(1, PROMPT))


def padded(model: Any, cache: Any) -> Tokens:
    ids = _prompt(2, PROMPT)
    mask = torch.ones_like(ids)
    ids[1, :13], mask[1, :13] = PAD, 0
    return _generate(model, cache, ids, mask)


def turns(model: Any, cache: Any) -> Tokens:
    ids = _prompt(1, PROMPT)
    first, logits = _generate(model, cache, ids, max_new_tokens=NEW // 2)
    ids = torch.cat([ids, torch.tensor(first), _prompt(1, 9, seed=8)], 1)
    second, more = _generate(model, cache, ids, max_new_tokens=NEW // 2)
    return [first[0] + second[0]], logits + more


def beams(model: Any, cache: Any) -> Tokens:
    # Logits of beams are in an order of their own: tokens are compared alone.
    return _generate(model, cache, _prompt(1, PROMPT), num_beams=3)[0], []


MODES: dict[str, Callable[[Any, Any], Tokens]] = {mode.__name__: mode for mode in (greedy, padded, turns, beams)}


def probe(model_type: str, modes: Iterable[str] = tuple(MODES)) -> dict[str, Any]:
    """The record of one class: whether it was built, and by mode what each cache did (see `_compared`)."""
    record: dict[str, Any] = {"class": classes()[model_type], "built": None, "modes": {}}
    model, failure = _caught(lambda: tiny_model(model_type))
    if failure is not None:
        return record | {"built": failure}
    record["layer_types"] = _caught(lambda: get_layer_types_and_kwargs(_decoder_config(model))[0])[0]
    record["power"], _ = _caught(lambda: _power(model))
    tested: dict[str, Tokens] = {}
    for name in modes:
        reference, failure = _reference(model, MODES[name])
        expected, held = reference or (None, None)
        if expected is not None:
            tested[name] = expected
        seen = {"held": held} if failure is None else failure
        record["modes"][name] = {"reference": seen, "raw": _compared(model, MODES[name], expected, "raw")}
    if tested:
        name = "padded" if "padded" in tested else next(iter(tested))
        mode, tokens = MODES[name], tested[name]
        record["int4"] = _compared(model, mode, tokens, "int4")
        record["strict"] = _compared(model, mode, tokens, "raw", strict=True)
        record["other_cache"] = _after(model, mode, tokens)
    return record


def _decoder_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _caught(run: Callable[[], Any]) -> tuple[Any, dict[str, Any] | None]:
    """(result, None), or (None, what was raised)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return run(), None
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return None, {
            "error": type(error).__name__,
            "typed": isinstance(error, KvarnError),
            "message": " ".join(str(error).split())[:400],
            "at": f"{os.path.join(*frame.filename.split(os.sep)[-2:])}:{frame.lineno} in {frame.name}",
        }


def _reference(
    model: Any, mode: Callable[[Any, Any], Tokens], attention: str = "eager"
) -> tuple[Any, dict[str, Any] | None]:
    """((tokens, positions that the cache holds), None), or (None, what was raised)."""

    def run() -> tuple[Tokens, int | None]:
        model.set_attn_implementation(attention)
        cache = DynamicCache(config=model.config)
        tokens = mode(model, cache)
        if any(step.isnan().any() for step in tokens[1]):
            raise ArithmeticError("logits are NaN")
        return tokens, _held(cache)

    return _caught(run)


def _held(cache: Any) -> int | None:
    """Positions that a cache holds; None where it has no layer of attention."""
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return None


def _compared(
    model: Any, mode: Callable[[Any, Any], Tokens], expected: Tokens | None, format: str, **options: Any
) -> Any:
    """What a mode did with a `KvarnCache`: "equal" and more if expected, "stats", "warnings"; or what was raised."""
    result: dict[str, Any] = {"warnings": []}
    model.set_attn_implementation("eager")
    before = _decoder_config(model)._attn_implementation
    caches: list[Any] = []

    def run() -> Tokens:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                caches.append(KvarnCache(model, format, block_size=BLOCK_SIZE, **options))
                return mode(model, caches[0])
            finally:
                result["warnings"] = sorted({str(w.message) for w in seen if _is_ours(w)})

    actual, failure = _caught(run)
    if failure is not None:
        result |= failure | {"constructed": bool(caches)}
        if not caches:
            result["left_as_it_was"] = _decoder_config(model)._attn_implementation == before
    elif expected is not None:
        result |= _difference(actual, expected)
        if not result["equal"] and format == "raw":  # is it the attention, or eager that differs from all others?
            result["sdpa"] = _sdpa(model, mode, expected)
    if caches:
        stats, failure = _caught(caches[0].stats)
        if failure is not None:
            result |= failure | {"constructed": True}
        names = ("fused_calls", "dense_fallbacks", "fallback_reasons", "dropped_forwards", "paged_layers")
        result["stats"] = {name: (stats or {}).get(name) for name in (*names, "unpaged_layers", "bytes_in_use")}
        result["own_layers"] = _own_layers(caches[0], model)
        result["held"] = _held(caches[0])
    return result


def _is_ours(warning: Any) -> bool:
    return str(warning.message).startswith("kvarn") or type(warning.message).__module__.startswith(kvarn_rs.__name__)


def _own_layers(cache: Any, model: Any) -> list[str]:
    """The kinds of the layers that stay transformers' own and hold something."""
    kinds, _ = _caught(lambda: get_layer_types_and_kwargs(_decoder_config(model))[0])
    layers = enumerate(cache.layers)
    own = [i for i, layer in layers if not isinstance(layer, KvarnLayer) and not keeps_nothing(layer)]
    return sorted({kinds[i] if kinds and i < len(kinds) else type(cache.layers[i]).__name__ for i in own})


def _difference(actual: Tokens, expected: Tokens) -> dict[str, Any]:
    """Tokens exactly; logits relative to their spread, up to the first step whose input is not the same."""
    same = [[a == b for a, b in zip(*rows, strict=False)] for rows in zip(actual[0], expected[0], strict=True)]
    first = min(row.index(False) if False in row else len(row) for row in same)
    steps = zip(actual[1][: first + 1], expected[1][: first + 1], strict=True)
    errors = [_logits_error(a, b) for a, b in steps]
    return {
        "equal": actual[0] == expected[0] and all(error <= LOGITS_TOLERANCE for error in errors),
        "agreement": sum(map(sum, same)) / sum(map(len, same)),
        "first_difference": first,
        "logits": max(errors, default=None),
    }


def _logits_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    finite = expected.isfinite()  # some models hide tokens by -inf
    if not torch.equal(actual.isfinite(), finite):
        return float("inf")
    spread = expected[finite].std().item()
    return (actual - expected)[finite].abs().max().item() / (spread or 1.0)


def _sdpa(model: Any, mode: Callable[[Any, Any], Tokens], expected: Tokens) -> str:
    reference, failure = _reference(model, mode, "sdpa")
    if failure is not None:
        return failure["error"]
    return "equal" if _difference(reference[0], expected)["equal"] else "differs"


def _after(model: Any, mode: Callable[[Any, Any], Tokens], expected: Tokens) -> dict[str, Any]:
    """Whether a model that a `KvarnCache` was made for still does the same with a cache of transformers."""

    def run() -> Tokens:
        model.set_attn_implementation("eager")
        with contextlib.suppress(KvarnError):
            KvarnCache(model, "raw")
        return mode(model, DynamicCache(config=model.config))

    actual, failure = _caught(run)
    return _difference(actual, expected) if failure is None else failure | {"constructed": True}


def _power(model: Any) -> float:
    """How far the logits move, relative to their spread, when ten tokens in the middle of the prompt change."""
    ids = _prompt(1, PROMPT)
    other = ids.clone()
    other[:, 20:30] = _prompt(1, 10, seed=9)
    with torch.no_grad():
        a, b = (model(input_ids=x).logits[:, -1].float() for x in (ids, other))
    return ((a - b).abs().max() / a.std()).item()
