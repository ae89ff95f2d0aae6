"""A step as vLLM describes it to attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvarn_rs.errors import StaleStepError, UnsupportedError

from . import compat
from .group import Group
from .prefill import Prefill, prefills


@dataclass
class KVarnMetadata(compat.AttentionMetadata):
    """A step that the group's engine has begun."""

    group: Group
    num_tokens: int
    prefills: list[Prefill]


class KVarnMetadataBuilder(compat.AttentionMetadataBuilder):
    """Begins a step of the engine of some layers, which share block tables."""

    _cudagraph_support: ClassVar[Any] = compat.AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device, *_more: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._group: Group | None = None

    @property
    def group(self) -> Group | None:
        """The layers' engine and requests; None before vLLM has allocated blocks."""
        return self._group

    def start(self) -> None:
        """Lends the layers' blocks to an engine."""
        self._group = Group(compat.layers(self.vllm_config, self.layer_names), self.vllm_config)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> KVarnMetadata:
        """Begins the step.

        Args:
            common_prefix_len: not used.
            common_attn_metadata: vLLM's description of the step.
            fast_build: not used.
        """
        step = common_attn_metadata
        if step.causal is not True:
            raise UnsupportedError("kvarn-rs has causal attention alone")
        if self._group is None:
            raise StaleStepError("kvarn-rs: a step before the model has blocks")
        starts = step.query_start_loc_cpu[: step.num_reqs + 1].to(torch.int32)
        lens = step.seq_lens[: step.num_reqs].to("cpu", torch.int32)
        context_lens = lens - starts.diff()
        self._group.begin(step.block_table_tensor[: step.num_reqs], context_lens, starts)
        return KVarnMetadata(self._group, int(starts[-1]), prefills(context_lens, starts))
