"""Asks an engine for `runs.greedy`, and prints tokens, log probabilities and figures of its groups.

    ask.py MODEL CACHE_DTYPE OPTIONS NUM_TOKENS

OPTIONS are those of `LLM`, as JSON. The log is on stdout too; the last line is the result.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.update(VLLM_LOGGING_LEVEL="INFO", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # one core for each of two workers


def main() -> None:
    model, cache_dtype, options, num_tokens = sys.argv[1:]
    import runs

    llm = runs.make_llm(Path(model), cache_dtype, disable_log_stats=False, **json.loads(options))
    outputs = runs.greedy(llm, int(num_tokens))
    found: dict[str, Any] = {
        "tokens": [answer.tokens for answer in outputs],
        "logprobs": [answer.logprobs for answer in outputs],
        "metrics": {each.name: each.value for each in llm.get_metrics() if hasattr(each, "value")},
    }
    in_process = os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    if in_process and json.loads(options).get("tensor_parallel_size", 1) == 1:
        runs.finish(llm)
        found["blocks_in_use"] = runs.blocks_in_use(llm)
        found["groups"] = [
            {**group.engine.stats(), "num_layers": group.engine.num_layers, "requests": group.num_requests}
            for group in runs.groups(llm)
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
