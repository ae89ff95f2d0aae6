"""An engine over a long time: many requests, its prefix cache reset, asleep, and made anew in the same process."""

from __future__ import annotations

import gc
import random
import weakref
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
import psutil
import runs
from runs import VOCABULARY, make_llm
from vllm import SamplingParams  # pyright: ignore

pytestmark = pytest.mark.slow

NUM_REQUESTS = 2000
WARM = 500
# Bytes of 1,500 requests: stock vLLM's own memory still grows by 20 to 60 MiB then, by 300 MiB in the first 2,000.
MOST_GROWTH = 96 << 20
# Python's objects of as many requests: one that each request leaves would be 1,500.
MOST_OBJECTS = 500


def left(llm: Any) -> dict[str, int]:
    """What is in use when no request is left."""
    runs.finish(llm)
    (group,) = runs.groups(llm)
    pages = group.engine.stats()["open_pages"]
    return {"blocks": runs.blocks_in_use(llm), "pages": pages, "requests": group.num_requests}


NOTHING = {"blocks": 0, "pages": 0, "requests": 0}


def ask(llm: Any, count: int) -> None:
    """Short requests of up to 310 tokens, every other with a common prefix."""
    numbers = random.Random(0)
    prefix = [numbers.randrange(3, VOCABULARY) for _ in range(150)]
    tokens = [[numbers.randrange(3, VOCABULARY) for _ in range(numbers.randrange(1, 160))] for _ in range(count)]
    prompts: list[Any] = [{"prompt_token_ids": (prefix if index % 2 else []) + own} for index, own in enumerate(tokens)]
    parameters = SamplingParams(max_tokens=3, ignore_eos=True, detokenize=False)
    assert len(llm.generate(prompts, parameters, use_tqdm=False)) == count


def memory() -> tuple[int, int]:
    """Bytes and Python's objects of the process."""
    gc.collect()
    return psutil.Process().memory_info().rss, len(gc.get_objects())


def test_thousands_of_short_requests_leave_nothing_and_take_no_more_memory(model: Path) -> None:
    # Few blocks, which the first requests have all written: untouched memory is not counted.
    options: dict[str, Any] = {
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 512,
        "num_gpu_blocks_override": 100,
    }
    ask(make_llm(model, "auto", **options), NUM_REQUESTS)
    llm = make_llm(model, "kvarn_int4", **options)
    ask(llm, WARM)
    assert left(llm) == NOTHING
    before = memory()
    ask(llm, NUM_REQUESTS - WARM)
    growth, objects = (after - at_first for after, at_first in zip(memory(), before, strict=True))
    assert left(llm) == NOTHING
    assert runs.groups(llm)[0].engine.stats()["sealed"] > NUM_REQUESTS // 10
    del llm
    assert growth < MOST_GROWTH
    assert objects < MOST_OBJECTS


def use(model: Path, format: str, expected: list[runs.Answer]) -> list[Any]:
    """Makes an engine, checks its answers and deletes it: weak references of its groups."""
    llm = make_llm(model, format if format == "auto" else f"kvarn_{format}", enable_prefix_caching=True)
    divergence = runs.largest_divergence(expected, runs.greedy(llm))
    assert divergence < runs.MOST_DIVERGENCE["raw" if format == "auto" else format]
    return [weakref.ref(group) for group in runs.groups(llm)]


def test_engines_of_other_formats_follow_in_one_process(model: Path) -> None:
    expected = runs.greedy(make_llm(model, "auto"))
    for format in ("int4", "raw", "int8", "int4", "auto"):
        gone = use(model, format, expected)
        assert len(gone) == (format != "auto")
        gc.collect()
        if not runs.OF_0_26:  # which keeps the memory of deleted engines itself
            assert [group() for group in gone] == [None] * len(gone)


@pytest.mark.parametrize("format", ["raw", "int4"])
def test_requests_go_on_after_the_prefix_cache_was_reset(model: Path, format: str) -> None:
    expected = runs.greedy(make_llm(model, "auto"))  # first, since the end of an engine ends others' process groups
    llm = make_llm(model, f"kvarn_{format}", enable_prefix_caching=True, max_num_batched_tokens=256)
    parameters = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False, logprobs=VOCABULARY)
    engine: Any = llm.llm_engine
    for number, prompt in enumerate(runs.prompts()):
        engine.add_request(str(number), prompt, parameters)
    found: dict[int, runs.Answer] = {}
    num_steps = 0
    while engine.has_unfinished_requests():
        if num_steps in (3, 12):
            assert engine.reset_prefix_cache(reset_running_requests=True)
        for output in engine.step():
            if output.finished:
                found[int(output.request_id)] = runs.answer_of(output.outputs[0])
        num_steps += 1
    answers = [answer for _, answer in sorted(found.items())]
    assert runs.largest_divergence(expected, answers) < runs.MOST_DIVERGENCE[format]
    assert left(llm) == NOTHING


def test_an_engine_that_slept_answers_as_before(model: Path) -> None:
    with pytest.raises(ValueError, match="Sleep mode is not supported"):
        make_llm(model, "kvarn_int4", enable_sleep_mode=True)
    # What the CPU platform has is a pause, in which vLLM forgets the blocks' prefixes.
    llm = make_llm(model, "kvarn_raw", enable_prefix_caching=True)
    before = runs.greedy(llm)
    llm.sleep(1)
    assert left(llm) == NOTHING
    llm.wake_up()
    assert runs.same_tokens(before, runs.greedy(llm))
