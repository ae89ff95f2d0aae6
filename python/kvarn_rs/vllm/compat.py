"""Everything that depends on the release of vLLM, with `compat_metrics` and `compat_cpu`.

No other file imports vLLM's internals.

What a release has decides, not its number: with `AttentionBackend.customize_spec` (0.28 on) a backend sizes its blocks,
before that the specs of layers are replaced by `_PackedSpec`s. The names of cache dtypes are a closed `Literal`, which
is extended.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args

import torch
import vllm.config.cache as cache_module
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.utils import torch_utils
from vllm.v1 import kv_cache_interface
from vllm.v1.attention import selector
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode, SlidingWindowSpec

from . import calibration, formats, settings
from .wrapping import wrap as _wrap

__all__ = [
    "AttentionBackend",
    "AttentionCGSupport",
    "AttentionImpl",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "builders",
    "install",
    "layer_number",
    "layers",
    "packed_spec",
    "record_layouts",
    "smallest_block",
    "step_limits",
    "tensor_parallel",
]

_CUSTOMIZES_SPECS = hasattr(AttentionBackend, "customize_spec")


def install(backend_of: Callable[[str, torch.dtype], Any], builder_class: type) -> None:
    """Adds the formats to vLLM's cache dtypes, and the backend to its selection.

    Args:
        backend_of: the backend for a cache dtype and a model's dtype.
        builder_class: what makes its metadata.
    """
    _select_backend(backend_of, builder_class)
    _check_engine_configs()
    _size_blocks()
    _add_cache_dtypes(formats.CACHE_DTYPES)  # last: without them, nothing of the others does anything


# Cache dtypes.


def _add_cache_dtypes(names: Iterable[str]) -> None:
    original = cache_module.CacheDType
    extended = Literal[tuple(dict.fromkeys((*get_args(original), *names)))]  # type: ignore[valid-type]
    if extended == original:
        return
    import vllm.config.vllm as vllm_module
    import vllm.engine.arg_utils as arguments
    from pydantic.dataclasses import rebuild_dataclass

    config = cache_module.CacheConfig
    field = next(field for field in dataclasses.fields(config) if field.name == "cache_dtype")
    validated = config.__pydantic_fields__["cache_dtype"]
    dtypes, forget_options = torch_utils.STR_DTYPE_TO_TORCH_DTYPE, arguments._compute_kwargs.cache_clear

    def accept(cache_dtypes: Any) -> None:
        for module in (cache_module, arguments, selector):
            vars(module)["CacheDType"] = cache_dtypes
        config.__annotations__["cache_dtype"] = field.type = validated.annotation = cache_dtypes
        for rebuilt in (config, vllm_module.VllmConfig):
            rebuild_dataclass(rebuilt, force=True, raise_errors=False)
        forget_options()

    try:
        accept(extended)
    except Exception:
        accept(original)
        raise
    dtypes.update(dict.fromkeys(names, torch.uint8))


# One flag.


def _select_backend(backend_of: Callable[[str, torch.dtype], Any], builder_class: type) -> None:
    """Selects the backend by the cache dtype of a layer, on every platform."""

    def select(original: Any, backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any) -> Any:
        cache_dtype = attn_selector_config.kv_cache_dtype
        if not formats.is_ours(cache_dtype):
            return original(backend, attn_selector_config, *args, **kwargs)
        _watch_runner(builder_class)
        settings.check_backend(None if backend is None else backend.name, cache_dtype)
        ours = backend_of(cache_dtype, attn_selector_config.dtype)
        reasons = ours.validate_configuration(**attn_selector_config._asdict(), device_capability=None)
        if reasons:
            raise ValueError(f"--kv-cache-dtype {cache_dtype}: {'; '.join(reasons)}")
        return ours

    _wrap(selector, "_cached_get_attn_backend", select)


def _check_engine_configs() -> None:
    """Checks a run's settings where they come together, before a model is loaded."""
    from vllm.engine.arg_utils import EngineArgs

    def create(original: Any, arguments: Any, *args: Any, **kwargs: Any) -> Any:
        if not formats.is_ours(arguments.kv_cache_dtype):
            return original(arguments, *args, **kwargs)
        backend = arguments.attention_backend or arguments.attention_config.backend
        settings.check_backend(None if backend is None else getattr(backend, "name", backend), arguments.kv_cache_dtype)
        settings.check_block_size(arguments.block_size)
        arguments.block_size = formats.BLOCK_SIZE
        config = original(arguments, *args, **kwargs)
        settings.check_config(config, arguments.kv_cache_dtype)
        config.cache_config.kv_cache_dtype_skip_layers = settings.skipped_layers(config, smallest_block())
        if formats.seals(formats.format_of(arguments.kv_cache_dtype)):
            calibration.check_named(config)
        return config

    _wrap(EngineArgs, "create_engine_config", create)


# Bytes of a block.


def smallest_block() -> int | None:
    """Tokens of the smallest block of vLLM's own cache; None if all layers' blocks must have the same tokens."""
    from vllm.platforms import current_platform

    # Before 0.28, its CPU kernels read the size of all blocks from the config.
    has_one_size = current_platform.is_cpu() and not _CUSTOMIZES_SPECS
    return None if has_one_size else formats.SMALLEST_UNQUANTIZED_BLOCK


def _size_blocks() -> None:
    """Gives all layers blocks of one size in bytes: those that stay in vLLM's own cache have fewer tokens in them."""
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.platforms.interface import Platform

    def align(original: Any, config: Any, *args: Any) -> Any:
        """Would make our blocks larger until they hold as many unquantized tokens."""
        return None if formats.is_ours(config.cache_config.cache_dtype) else original(config, *args)

    def get_spec(original: Any, layer: Any, config: Any) -> Any:
        spec, cache_dtype = original(layer, config), config.cache_config.cache_dtype
        if spec is None or not formats.is_ours(cache_dtype):
            return spec
        if not formats.is_ours(layer.kv_cache_dtype):
            ours = formats.format_of(cache_dtype), layer.head_size, settings.model_dtype(config)
            page = formats.BLOCK_SIZE * formats.token_bytes(*ours) * layer.num_kv_heads
            return dataclasses.replace(spec, block_size=formats.unquantized_tokens(*ours), page_size_padded=page)
        return spec if _CUSTOMIZES_SPECS else _replaced_spec(spec, layer)

    _wrap(Platform, "_align_heterogeneous_kv_block_size", align)
    _wrap(Attention, "get_kv_cache_spec", get_spec)


def packed_spec(spec: Any, token_bytes: int) -> Any:
    """A layer's spec with blocks of so many bytes a token and head."""
    if spec.state_content_bytes is not None:
        return spec
    return dataclasses.replace(spec, dtype=torch.uint8, state_content_bytes=token_bytes)


def record_layouts() -> tuple[Any, ...]:
    """The layouts in which a block of a head is contiguous: one."""
    return (kv_cache_interface.KVCacheLayout.LBHNC,)


class _PackedSpec:
    """A spec before `customize_spec`, whose blocks have `kvarn_token_bytes` bytes a token and head."""

    kvarn_token_bytes: int
    block_size: int
    num_kv_heads: int
    page_size_padded: int | None

    @property
    def real_page_size_bytes(self) -> int:
        return self.block_size * self.num_kv_heads * self.kvarn_token_bytes

    @property
    def unpadded_page_size_bytes(self) -> int:
        return self.real_page_size_bytes

    @property
    def page_size_bytes(self) -> int:
        return self.page_size_padded or self.real_page_size_bytes

    @classmethod
    def merge(cls, specs: list[Any]) -> Any:
        merged = super().merge(specs)  # pyright: ignore[reportAttributeAccessIssue]
        return dataclasses.replace(merged, kvarn_token_bytes=specs[0].kvarn_token_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedFullAttentionSpec(_PackedSpec, FullAttentionSpec):
    """Full attention in blocks of our size. Public, since vLLM pickles it."""

    kvarn_token_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedSlidingWindowSpec(_PackedSpec, SlidingWindowSpec):
    """Sliding-window attention in blocks of our size. Public, since vLLM pickles it."""

    kvarn_token_bytes: int = 0


def _replaced_spec(spec: Any, layer: Any) -> Any:
    """The `_PackedSpec` in place of a layer's spec."""
    values = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec) if field.init}
    values["dtype"] = torch.uint8
    values["kvarn_token_bytes"] = layer.attn_backend.token_bytes(layer.head_size)
    # With any other mode than none, vLLM asks the backend for the shape of a quantized cache.
    values["kv_quant_mode"] = KVQuantMode.INT8_PER_TOKEN_HEAD
    return (PackedFullAttentionSpec if type(spec) is FullAttentionSpec else PackedSlidingWindowSpec)(**values)


# A run.


def step_limits() -> tuple[int, int]:
    """Most sequences and most tokens of a step of the model that is being made."""
    scheduler = get_current_vllm_config().scheduler_config
    return scheduler.max_num_seqs, scheduler.max_num_batched_tokens


def layers(config: Any, names: Iterable[str]) -> dict[str, Any]:
    """vLLM's modules of layers, by name."""
    known = config.compilation_config.static_forward_context
    return {name: known[name] for name in names}


def tensor_parallel() -> tuple[int, int]:
    """This worker's rank among those that share the heads of its layers, and their number."""
    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def layer_number(name: str) -> int:
    """The model's number of a layer, from the name of its module."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _attention_groups(runner: Any) -> list[tuple[int, Any, bool]]:
    """Groups of layers: the KV cache group that each is of, itself, and whether it is the drafter's.

    A draft model's layers are in a group of the drafter, and in one of the runner too.
    """
    drafting = getattr(getattr(runner, "drafter", None), "draft_attn_groups", [])
    found = [(index, group, False) for index, groups in enumerate(runner.attn_groups) for group in groups]
    return found + [(group.kv_cache_group_id, group, True) for group in drafting]


def builders(runner: Any, builder_class: type) -> Iterator[tuple[int, Any]]:
    """Builders of a class in a worker's model runner, with the number of the KV cache group that each is of."""
    for index, group, _ in _attention_groups(runner):
        yield from ((index, builder) for builder in group.metadata_builders if isinstance(builder, builder_class))


def _watch_runner(builder_class: type) -> None:
    """Starts the groups of a model once it has blocks; tells them, before each step, what became of the last one."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def start(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(runner, *args, **kwargs)
        config, groups = runner.vllm_config, _attention_groups(runner)
        drafts = {name for _, group, is_draft in groups if is_draft for name in group.layer_names}
        for _, group, is_draft in groups:
            model = config.speculative_config.draft_model_config if is_draft else config.model_config
            names = [name for name in group.layer_names if is_draft or name not in drafts]
            for builder in (each for each in group.metadata_builders if isinstance(each, builder_class)):
                builder.start(names, model, len(runner.kv_cache_config.kv_cache_groups))
        return result

    def settle(original: Any, runner: Any, scheduled: Any) -> Any:
        last = [(request, runner.requests[request]) for request in runner.input_batch.req_ids]
        ended = {*scheduled.finished_req_ids, *(scheduled.preempted_req_ids or ())}
        ended |= scheduled.scheduled_cached_reqs.resumed_req_ids
        states = {request: runner.requests[request] for request in ended if request in runner.requests}
        has_drafts = runner.speculative_config is not None
        for index, builder in builders(runner, builder_class):
            if builder.group is not None:
                known = [(name, _num_valid(state, has_drafts), state.block_ids[index]) for name, state in last]
                builder.group.settle(known, {name: state.block_ids[index] for name, state in states.items()})
        return original(runner, scheduled)

    def warm_up(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
        found = [builder for _, builder in builders(runner, builder_class)]
        for builder in found:
            builder.is_warming_up = True
        try:
            return original(runner, *args, **kwargs)
        finally:
            for builder in found:
                builder.is_warming_up = False

    _wrap(GPUModelRunner, "initialize_kv_cache", start)
    _wrap(GPUModelRunner, "_update_states", settle)
    _wrap(GPUModelRunner, "_dummy_run", warm_up)


def _num_valid(state: Any, has_drafts: bool) -> int:
    """The most tokens of a request whose keys and values stay: all but the newest, and no draft that was rejected.

    Without drafts all that were computed stay. Only the last rank of pipeline parallelism would know how many.
    """
    return max(state.num_prompt_tokens, state.num_tokens - 1) if has_drafts else sys.maxsize
