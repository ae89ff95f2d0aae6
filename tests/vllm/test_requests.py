"""What becomes of a request's blocks and open pages when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
from runs import (
    BLOCK,
    MOST_DIVERGENCE,
    VOCABULARY,
    answer_of,
    blocks_in_use,
    core,
    finish,
    groups,
    largest_divergence,
    make_llm,
)
from vllm import SamplingParams  # pyright: ignore

SEALED = "kvarn_int4"


def greedy(num_tokens: int, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, **options)


def ask(llm: Any, prompt: list[int], parameters: SamplingParams) -> Any:
    (output,) = llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
    return output


def test_a_request_that_ends_on_an_edge_of_a_block_leaves_a_prefix(model: Path) -> None:
    prompt = [3 + i * 31 % 500 for i in range(2 * BLOCK - 19)]
    llm = make_llm(model, SEALED, enable_prefix_caching=True)
    first = ask(llm, prompt, greedy(20))  # the last of them is not computed, so that two blocks are full
    longer = [*prompt, *first.outputs[0].token_ids, 7]
    second = ask(llm, longer, greedy(1, logprobs=VOCABULARY))
    assert second.num_cached_tokens == 2 * BLOCK
    (group,) = groups(llm)
    assert group.engine.stats()["sealed"] == 2
    expected = ask(make_llm(model, "auto"), longer, greedy(1, logprobs=VOCABULARY)).outputs[0]
    assert largest_divergence([answer_of(expected)], [answer_of(second.outputs[0])]) < MOST_DIVERGENCE["int4"]


def test_samples_of_one_prompt_share_its_blocks(model: Path) -> None:
    llm = make_llm(model, SEALED, enable_prefix_caching=True)
    parameters = SamplingParams(temperature=1, n=4, seed=0, max_tokens=20, ignore_eos=True, detokenize=False)
    output = ask(llm, [3 + i % 500 for i in range(300)], parameters)
    assert [len(sample.token_ids) for sample in output.outputs] == [20] * 4
    assert len({tuple(sample.token_ids) for sample in output.outputs}) > 1
    finish(llm)
    assert blocks_in_use(llm) == 0
    assert groups(llm)[0].engine.stats()["open_pages"] == 0


def test_a_request_that_is_aborted_gives_its_pages_back(model: Path) -> None:
    llm = make_llm(model, SEALED)
    engine: Any = llm.llm_engine
    (group,) = groups(llm)
    for name, length in (("long", 300), ("short", 9)):
        engine.add_request(name, {"prompt_token_ids": [5] * length}, greedy(200))
    for _ in range(5):
        engine.step()
    before = group.engine.stats()["open_pages"]
    engine.abort_request(["long"])
    engine.step()
    assert 0 < group.engine.stats()["open_pages"] < before
    engine.abort_request(["short"])
    core(llm).step()
    assert group.engine.stats()["open_pages"] == 0
    assert blocks_in_use(llm) == 0


def test_a_model_in_bfloat16_has_the_tokens_of_stock_vllm_in_raw(model: Path) -> None:
    prompt = [3 + i * 31 % 500 for i in range(200)]
    stock, ours = (
        ask(make_llm(model, name, dtype="bfloat16"), prompt, greedy(1, logprobs=VOCABULARY)).outputs[0]
        for name in ("auto", "kvarn_raw")
    )
    assert stock.token_ids == ours.token_ids


def test_a_block_that_the_window_has_passed_is_sealed_and_keeps_no_page(sliding_model: Path) -> None:
    llm = make_llm(sliding_model, SEALED, enable_prefix_caching=True)
    engine: Any = llm.llm_engine
    (group,) = groups(llm)
    # The second block is full, and not sealed by the step that fills it; the third begins beyond what is seen.
    engine.add_request("one", {"prompt_token_ids": [5] * (3 * BLOCK - 1)}, greedy(5))
    for _ in range(2):
        engine.step()
    assert group.engine.stats()["sealed"] == 2
    assert group.engine.stats()["open_pages"] <= 2
    while engine.has_unfinished_requests():
        engine.step()
    finish(llm)
    assert group.engine.stats()["open_pages"] == 0
