"""What `--kv-cache-dtype kvarn_...` means for vLLM's other settings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from kvarn_rs.errors import ConfigError, UnsupportedError

from . import formats

_logger = logging.getLogger("vllm.kvarn_rs")

SPECULATION = ("ngram", "suffix", "draft_model", "eagle")
"""Methods of `--speculative-config` that are tried."""


OPTIONS = {"calibration": str, "sliding_window": bool}
"""What `--additional-config` may say under `kvarn`."""


def kvarn_options(config: Any) -> Mapping[str, Any]:
    """What `--additional-config` says under `kvarn`.

    Raises:
        ConfigError: not a mapping, an unknown name, or a value of another type.
    """
    options = config.additional_config
    options = options.get("kvarn", {}) if isinstance(options, Mapping) else {}
    if not isinstance(options, Mapping):
        raise ConfigError(f"--additional-config: kvarn is {options!r}, not a mapping of {', '.join(OPTIONS)}")
    for name, value in options.items():
        if name not in OPTIONS or not isinstance(value, OPTIONS[name]):
            known = ", ".join(f"{known} ({kind.__name__})" for known, kind in OPTIONS.items())
            raise ConfigError(f"--additional-config: kvarn has {name!r}: {value!r}; known are {known}")
    return options


def model_dtype(config: Any) -> str:
    """A model's dtype by its name in torch, such as `bfloat16`."""
    return str(config.model_config.dtype).removeprefix("torch.")


def layer_types(config: Any) -> set[str]:
    """The kinds of attention that a model's config names; empty if it names none."""
    return set(getattr(config.model_config.hf_text_config, "layer_types", None) or ())


def skipped_layers(config: Any, smallest_block: int | None) -> list[str]:
    """What `--kv-cache-dtype-skip-layers` is: as set by hand, else the sliding layers of a model that has others too.

    They see few tokens, so that quantizing them saves little. They are quantized with `--additional-config
    '{"kvarn": {"sliding_window": true}}'`, and where no block of vLLM's own cache has the bytes of one of ours.

    Args:
        config: vLLM's.
        smallest_block: tokens of the smallest block of vLLM's own cache; None if all blocks must have the same tokens.

    Raises:
        UnsupportedError: layers are skipped by hand, and cannot be.
    """
    model = config.model_config
    name, head_dim = formats.format_of(config.cache_config.cache_dtype), model.get_head_size()
    fit = formats.unquantized_tokens(name, head_dim, model_dtype(config))
    possible = smallest_block is not None and fit >= smallest_block
    named = config.cache_config.kv_cache_dtype_skip_layers
    if named and not possible:
        raise UnsupportedError(
            f"--kv-cache-dtype-skip-layers {' '.join(named)}: vLLM's own cache has no blocks of the bytes of a {name} "
            f"block, {fit} tokens, on this platform; leave it out"
        )
    kinds = {"sliding_attention", "full_attention"}
    is_hybrid = kinds <= layer_types(config)
    if named or not is_hybrid or kvarn_options(config).get("sliding_window", False):
        return named
    if not possible:
        _logger.info(
            "kvarn-rs: sliding-window layers are quantized too: no unquantized block fits in the bytes of a %s block",
            name,
        )
        return []
    return ["sliding_window"]


def check_block_size(block_size: int | None) -> None:
    """Refuses a block size given by hand that is not ours.

    Raises:
        ConfigError: naming both.
    """
    if block_size not in (None, formats.BLOCK_SIZE):
        raise ConfigError(
            f"--block-size {block_size}: kvarn's formats have blocks of {formats.BLOCK_SIZE} tokens; leave it out"
        )


def check_backend(name: str | None, cache_dtype: str) -> None:
    """Refuses an attention backend given by hand that is not ours.

    Raises:
        ConfigError: naming both.
    """
    if name not in (None, "CUSTOM"):
        raise ConfigError(
            f"--attention-backend {name} does not read --kv-cache-dtype {cache_dtype}: leave the backend out, kvarn-rs "
            "selects its own"
        )


def check_config(config: Any, cache_dtype: str) -> None:
    """Refuses features of a run that a format does not work with.

    Raises:
        ConfigError: an option of kvarn's is unknown, or of another type.
        UnsupportedError: naming the feature, and what to do.
    """
    kvarn_options(config)
    cache, parallel, model = config.cache_config, config.parallel_config, config.model_config
    if getattr(model, "is_hybrid", False):
        raise UnsupportedError(
            f"models with layers of a constant state do not work with {cache_dtype}: vLLM would split its blocks"
        )
    if model.uses_alibi:
        raise UnsupportedError(f"ALiBi does not work with {cache_dtype}: leave --kv-cache-dtype at auto")
    if model.attn_type != "decoder" or config.attention_config.use_non_causal:
        raise UnsupportedError(
            f"attention that is not causal does not work with {cache_dtype}: leave --kv-cache-dtype at auto"
        )
    if getattr(model.hf_text_config, "attention_chunk_size", None) or "chunked_attention" in layer_types(config):
        raise UnsupportedError(
            f"chunked attention does not work with {cache_dtype}: its steps are not those of requests"
        )
    if getattr(cache, "kv_sharing_fast_prefill", False):
        raise UnsupportedError(f"--kv-sharing-fast-prefill does not work with {cache_dtype}: leave it out")
    unit = getattr(cache, "prefix_match_unit", None)
    if unit not in (None, formats.BLOCK_SIZE):
        raise UnsupportedError(f"--prefix-match-unit {unit}: kvarn's blocks are shared whole; leave it out")
    if config.kv_transfer_config is not None:
        raise UnsupportedError(
            f"KV transfer is not tried with {cache_dtype}, whose blocks a connector must copy whole: leave out one of "
            "the two"
        )
    if getattr(parallel, "decode_context_parallel_size", 1) > 1:
        raise UnsupportedError("kvarn-rs does not support decode context parallelism")
    if getattr(config, "use_v2_model_runner", False):
        raise UnsupportedError(
            "kvarn-rs does not follow the requests of vLLM's second model runner yet: set VLLM_USE_V2_MODEL_RUNNER=0"
        )
    speculative = config.speculative_config
    if speculative is not None and parallel.pipeline_parallel_size > 1:
        raise UnsupportedError(
            f"speculation with pipeline parallelism does not work with {cache_dtype}: only the last rank knows which "
            "drafts were accepted"
        )
    if speculative is not None and speculative.method not in SPECULATION:
        raise UnsupportedError(
            f"speculation by {speculative.method!r} is not tried with {cache_dtype}: use {', '.join(SPECULATION)}"
        )
