"""A step as vLLM describes it to attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kvarn_rs.errors import StaleStepError, UnsupportedError

from . import compat
from .drafts import DraftGroup
from .group import Group
from .prefill import PrefillBatch, prefills


@dataclass
class KVarnMetadata(compat.AttentionMetadata):
    """A step, or a pass of a draft model, that the group's engine has begun."""

    group: Group
    num_tokens: int
    prefills: list[PrefillBatch]


class KVarnMetadataBuilder(compat.AttentionMetadataBuilder):
    """Begins a step of the engine of some layers, which share block tables."""

    _cudagraph_support: ClassVar[Any] = compat.AttentionCGSupport.NEVER

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device, *_more: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._group: Group | None = None
        self._has_layers = True
        self.is_warming_up = False
        """Whether vLLM runs the model without requests: no step is begun then."""

    @property
    def group(self) -> Group | None:
        """The layers' engine and requests; None before vLLM has allocated blocks."""
        return self._group

    def start(self, names: list[str], model: Any, num_groups: int) -> None:
        """Lends layers' blocks to an engine.

        Args:
            names: of those that the builder is for. A draft model's have a builder of their own, and are of the one of
                their KV cache group too: that one may be left without any.
            model: vLLM's config of their model.
            num_groups: KV cache groups, which share the pool of blocks.
        """
        self._has_layers = bool(names)
        if names:
            kind = Group if model is self.vllm_config.model_config else DraftGroup
            self._group = kind(compat.layers(self.vllm_config, names), self.vllm_config, model, num_groups)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> KVarnMetadata | None:
        """Begins the step; None without layers, or while vLLM warms up.

        Args:
            common_prefix_len: not used.
            common_attn_metadata: vLLM's description of the step.
            fast_build: not used.
        """
        return self._begin(common_attn_metadata, 0)

    def build_for_drafting(self, common_attn_metadata: Any, draft_index: int) -> KVarnMetadata | None:
        """Begins a pass of a draft model.

        Args:
            common_attn_metadata: vLLM's description of the pass.
            draft_index: its number within the step. The first has the step's tokens, each other one draft a sequence.
        """
        return self._begin(common_attn_metadata, draft_index)

    def _begin(self, step: Any, draft_index: int) -> KVarnMetadata | None:
        if step.causal is not True:
            raise UnsupportedError("kvarn-rs has causal attention alone")
        if not self._has_layers or self.is_warming_up:
            return None
        if self._group is None:
            raise StaleStepError("kvarn-rs: a step before the model has blocks")
        starts = step.query_start_loc_cpu[: step.num_reqs + 1].to(torch.int32)
        lens = step.seq_lens[: step.num_reqs].to("cpu", torch.int32)
        arrays = step.block_table_tensor[: step.num_reqs], lens - starts.diff(), starts
        if isinstance(self._group, DraftGroup):
            context_lens = self._group.begin_pass(*arrays, draft_index)
        else:
            context_lens = self._group.begin(*arrays)
        attention = self._group.prefill
        batches = [] if attention is None else attention.batches(prefills(context_lens, starts))
        return KVarnMetadata(self._group, int(starts[-1]), batches)
