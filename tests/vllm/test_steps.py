"""Steps that do not come to all layers, and passes of a draft model that do not come at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
from runs import BLOCK, MOST_DIVERGENCE, answer_of, blocks_in_use, core, finish, groups, largest_divergence, make_llm
from vllm import SamplingParams  # pyright: ignore

from kvarn_rs.errors import OpenStepError

SEALED = "kvarn_int4"
DRAFT_LEN = 64
"""Tokens that the draft model allows, drafts included."""
DRAFTS = 3
# Deviation of keys over that of the few tokens which a page was opened with. Zeros in their place gave 800,000.
MOST_DRIFT = 5


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, logprobs=512)


def tokens(count: int, step: int) -> list[int]:
    return [3 + i * step % 500 for i in range(count)]


def draft_of(model: Path, **options: Any) -> dict[str, Any]:
    speculation = {"method": "draft_model", "model": str(model), "num_speculative_tokens": DRAFTS, **options}
    return {"speculative_config": speculation}


def runner_of(llm: Any) -> Any:
    return core(llm).model_executor.driver_worker.worker.model_runner


def run(llm: Any, requests: list[tuple[list[int], int]]) -> list[Any]:
    prompts: Any = [{"prompt_token_ids": prompt} for prompt, _ in requests]
    outputs = llm.generate(prompts, [greedy(count) for _, count in requests], use_tqdm=False)
    return [answer_of(output.outputs[0]) for output in outputs]


def test_a_step_that_a_layer_did_not_run_is_an_error_that_names_it(model: Path) -> None:
    llm = make_llm(model, SEALED)
    engine: Any = llm.llm_engine
    engine.add_request("one", {"prompt_token_ids": tokens(20, 31)}, greedy(5))
    layers = runner_of(llm).vllm_config.compilation_config.static_forward_context
    impl = layers["model.layers.1.self_attn.attn"].impl
    impl.forward = lambda *_, output, **__: output.zero_()
    engine.step()
    with pytest.raises(OpenStepError, match=r"layers \[1\] of .*1 model\.layers\.1\.self_attn\.attn"):
        engine.step()


def test_runs_that_warm_vllm_up_leave_nothing(model: Path) -> None:
    llm = make_llm(model, SEALED)
    (group,) = groups(llm)
    before = run(llm, [(tokens(200, 31), 5)])
    finish(llm)
    runner_of(llm)._dummy_run(16, force_attention=True)
    assert not group.engine.is_open
    assert group.engine.stats()["open_pages"] == 0
    assert run(llm, [(tokens(200, 31), 5)])[0].tokens == before[0].tokens


def test_drafts_go_on_after_a_request_longer_than_the_draft_model_allows(model: Path) -> None:
    long, short = (tokens(DRAFT_LEN + 6, 31), 9), (tokens(20, 7), 35)
    stock = run(make_llm(model, "auto"), [long, short])
    llm = make_llm(model, SEALED, **draft_of(model, max_model_len=DRAFT_LEN))
    _, drafting = groups(llm)
    engine: Any = llm.llm_engine
    for name, (prompt, count) in (("long", long), ("short", short)):
        engine.add_request(name, {"prompt_token_ids": prompt}, greedy(count))
    found: dict[str, Any] = {}
    was_written = False
    while engine.has_unfinished_requests():
        was_written = drafting.engine.stats()["open_pages"] > 0
        assert "long" in found or not was_written, "no drafts are made beside the long request"
        found |= {output.request_id: answer_of(output.outputs[0]) for output in engine.step() if output.finished}
    assert was_written
    stats = drafting.engine.stats()
    assert all(drift < MOST_DRIFT for drift in stats["drift"])
    assert not any(stats["out_of_range_tokens"])
    assert largest_divergence(stock, [found["long"], found["short"]]) < MOST_DIVERGENCE["int4"]
    finish(llm)
    assert blocks_in_use(llm) == 0
    assert [(group.engine.stats()["open_pages"], group.num_requests) for group in groups(llm)] == [(0, 0)] * 2


def test_drafts_amid_a_prompt_are_not_sealed_when_it_is_aborted(model: Path) -> None:
    llm = make_llm(model, SEALED, **draft_of(model))
    core(llm).scheduler.max_num_scheduled_tokens = BLOCK - DRAFTS + 1  # whatever vLLM makes of its own limit
    engine: Any = llm.llm_engine
    engine.add_request("one", {"prompt_token_ids": tokens(300, 31)}, greedy(5))
    engine.step()
    assert core(llm).scheduler.running[0].num_computed_tokens < BLOCK, "with drafts, a block is full"
    engine.abort_request(["one"])
    finish(llm)
    assert [group.engine.stats()["sealed"] for group in groups(llm)] == [0, 0]
    assert [(group.engine.stats()["open_pages"], group.num_requests) for group in groups(llm)] == [(0, 0)] * 2
