"""What a worker of vLLM says of kvarn's groups: the tests' `worker_extension_cls`."""

from __future__ import annotations

import os
from typing import Any


def groups_of(runner: Any) -> list[Any]:
    """kvarn's groups of layers of a model runner, those of a draft model last."""
    attention = [group for groups in runner.attn_groups for group in groups]
    attention += getattr(getattr(runner, "drafter", None), "draft_attn_groups", [])
    builders = [builder for group in attention for builder in group.metadata_builders]
    return [builder.group for builder in builders if getattr(builder, "group", None) is not None]


class Probe:
    """Methods that vLLM adds to its workers."""

    model_runner: Any

    def kvarn_state(self) -> dict[str, Any]:
        """Of each group, its layers, pages and requests that are followed; and the worker's process."""
        return {
            "groups": [
                {
                    "format": group.engine.format,
                    "num_layers": group.engine.num_layers,
                    "num_kv_heads": group.engine.num_kv_heads,
                    "open_pages": group.engine.stats()["open_pages"],
                    "sealed": group.engine.stats()["sealed"],
                    "requests": group.num_requests,
                }
                for group in groups_of(self.model_runner)
            ],
            "process": os.getpid(),
        }
