"""The attention backend that vLLM selects for kvarn's formats."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch

from . import compat, formats
from .impl import KVarnImpl
from .metadata import KVarnMetadataBuilder


class KVarnBackend(compat.AttentionBackend):
    """Attention to blocks of one format. Subclasses, made by `backend_of`, name it."""

    accept_output_buffer: bool = True
    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(formats.CACHE_DTYPES)
    format: ClassVar[str]
    dtype: ClassVar[str]
    """The model's, by its name in torch."""

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's enum that is for backends of others."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KVarnImpl]:
        """The implementation of a layer."""
        return KVarnImpl

    @staticmethod
    def get_builder_cls() -> type[KVarnMetadataBuilder]:
        """What makes a step's metadata."""
        return KVarnMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        """One: vLLM then never splits a block."""
        return [formats.BLOCK_SIZE]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Multiples of 16 up to 256."""
        return head_size % 16 == 0 and 0 < head_size <= 256

    @classmethod
    def supports_sink(cls) -> bool:
        """Learned sinks."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Sliding windows."""
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Transfer of blocks to other engines: not tried, and without the open pages of formats that seal."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Steps in which a device drops drafts that the host counts: not these, since a step is planned on the host."""
        return False

    @classmethod
    def token_bytes(cls, head_size: int) -> int:
        """Bytes of a token and key/value head."""
        return formats.token_bytes(cls.format, head_size, cls.dtype)

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """The layer's spec with our bytes a token."""
        return compat.packed_spec(spec, cls.token_bytes(spec.head_size))

    @classmethod
    def supported_kv_cache_layouts(cls) -> Any:
        """One: each block and head is a contiguous record."""
        return compat.record_layouts()

    @staticmethod
    def get_kv_cache_stride_order(include_num_layers_dimension: bool = False) -> tuple[int, ...]:
        """The same order in memory; vLLM takes the error for "layers are not interleaved"."""
        if include_num_layers_dimension:
            raise NotImplementedError
        return (0, 1, 2, 3)


@cache
def backend_of(cache_dtype: str, dtype: torch.dtype) -> type[KVarnBackend]:
    """The backend for a `--kv-cache-dtype` of `formats.CACHE_DTYPES` and a model's dtype."""
    name = formats.format_of(cache_dtype)

    class Backend(KVarnBackend):
        """Attention to blocks of one format."""

        format = name

        @staticmethod
        def get_kv_cache_shape(
            num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
        ) -> tuple[int, ...]:
            """One record a head, in bytes a token. Releases that ask for it say nothing of the format."""
            return (num_blocks, num_kv_heads, block_size, Backend.token_bytes(head_size))

    Backend.dtype = str(dtype).removeprefix("torch.")
    Backend.__name__ = Backend.__qualname__ = f"{KVarnBackend.__name__}_{name}_{Backend.dtype}"
    return Backend
