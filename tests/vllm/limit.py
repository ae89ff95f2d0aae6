"""A draft model beside a request that becomes as long as the model allows: `limit.py MODEL DRAFT_MODEL`.

vLLM makes no drafts in the last steps of that request, so that the draft model misses tokens of the other one, whose
next block begins in these steps. Prints the tokens of both.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"
)
LIMIT, TOKENS = 160, (20, 40)
PROMPTS = [list(range(3, 143)), list(range(9, 120))]


def main() -> None:
    model, draft = sys.argv[1:]
    import runs
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    drafts = {"method": "draft_model", "model": draft, "num_speculative_tokens": 3}
    llm = runs.make_llm(Path(model), "kvarn_int4", max_model_len=LIMIT, speculative_config=drafts)
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in PROMPTS],
        [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False) for count in TOKENS],
        use_tqdm=False,
    )
    runs.finish(llm)
    pages = [group.engine.stats()["open_pages"] for group in runs.groups(llm)]
    print(json.dumps({"lengths": [len(output.outputs[0].token_ids) for output in outputs], "open_pages": pages}))


if __name__ == "__main__":
    main()
