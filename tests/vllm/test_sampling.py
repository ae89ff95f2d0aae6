"""Ways to choose tokens, and the model's dtypes and compilation, each against stock vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
import runs
from runs import MOST_DIVERGENCE, MOST_DIVERGENCE_IN_16_BITS, RAW_DIVERGENCE, VOCABULARY, make_llm
from vllm import SamplingParams  # pyright: ignore
from vllm.sampling_params import BeamSearchParams  # pyright: ignore

pytestmark = pytest.mark.slow

PROMPTS = [{"prompt_token_ids": [3 + i * step % 500 for i in range(length)]} for step, length in ((31, 300), (7, 90))]
NUM_BEAMS = 4


def both(model: Path, format: str, **options: Any) -> tuple[Any, Any]:
    """Engines of stock vLLM and of a format."""
    return tuple(make_llm(model, name, **options) for name in ("auto", f"kvarn_{format}"))


def left(llm: Any) -> tuple[int, int]:
    """Blocks and open pages in use."""
    runs.finish(llm)
    return runs.blocks_in_use(llm), sum(group.engine.stats()["open_pages"] for group in runs.groups(llm))


# Of a beam's 20 tokens; another context gives differences of 20 and more.
MOST_LIKELIHOOD_ERROR = 1.5


@pytest.mark.parametrize("format", ["raw", "int4"])
def test_beams_are_as_likely_as_stock_vllm_finds_them(model: Path, format: str) -> None:
    stock, ours = both(model, format, skip_tokenizer_init=False, enable_prefix_caching=True)
    parameters = BeamSearchParams(beam_width=NUM_BEAMS, max_tokens=20, ignore_eos=True)
    found = ours.beam_search(PROMPTS, parameters)
    if format == "raw":
        for one, other in zip(stock.beam_search(PROMPTS, parameters), found, strict=True):
            assert [beam.tokens for beam in one.sequences] == [beam.tokens for beam in other.sequences]
    scoring = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    for prompt, output in zip(PROMPTS, found, strict=True):
        assert len({tuple(beam.tokens) for beam in output.sequences}) == NUM_BEAMS
        scored = stock.generate(
            [{"prompt_token_ids": beam.tokens} for beam in output.sequences], scoring, use_tqdm=False
        )
        for beam, one in zip(output.sequences, scored, strict=True):
            own = range(len(prompt["prompt_token_ids"]), len(beam.tokens))
            likelihood = sum(one.prompt_logprobs[position][beam.tokens[position]].logprob for position in own)
            assert beam.cum_logprob == pytest.approx(likelihood, abs=MOST_LIKELIHOOD_ERROR)
    assert left(ours) == (0, 0)


def test_samples_with_a_seed_are_those_of_stock_vllm_in_raw(model: Path) -> None:
    stock, ours = both(model, "raw", enable_prefix_caching=True)
    parameters = SamplingParams(
        temperature=1, top_p=0.9, top_k=40, n=4, seed=0, max_tokens=20, ignore_eos=True, detokenize=False
    )
    expected, found = (
        [sample.token_ids for output in llm.generate(PROMPTS, parameters, use_tqdm=False) for sample in output.outputs]
        for llm in (stock, ours)
    )
    assert len({tuple(tokens) for tokens in expected}) == 4 * len(PROMPTS)
    assert found == expected
    assert left(ours) == (0, 0)


@pytest.mark.parametrize("format", ["raw", "int8", "int4"])
def test_log_probabilities_of_prompts_are_those_of_stock_vllm(model: Path, format: str) -> None:
    stock, ours = both(model, format, enable_chunked_prefill=True, max_num_batched_tokens=64)
    parameters = SamplingParams(max_tokens=1, prompt_logprobs=VOCABULARY, detokenize=False)
    expected, found = (llm.generate(PROMPTS, parameters, use_tqdm=False) for llm in (stock, ours))
    for one, other in zip(expected, found, strict=True):
        rows = zip(one.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True)
        divergences = [runs.divergence(runs.row_of(p), runs.row_of(q)) for p, q in rows]
        assert len(divergences) == len(one.prompt_token_ids) - 1
        assert max(divergences) < MOST_DIVERGENCE[format]
    assert left(ours) == (0, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_in_16_bits_answer_as_stock_vllm(model: Path, dtype: str) -> None:
    options: dict[str, Any] = {"dtype": dtype, "enable_prefix_caching": True, "max_num_batched_tokens": 256}
    expected = runs.greedy(make_llm(model, "auto", **options))
    found = {}
    for format in MOST_DIVERGENCE_IN_16_BITS:
        ours = make_llm(model, f"kvarn_{format}", **options)
        found[format] = runs.largest_divergence(expected, runs.greedy(ours))
        assert left(ours) == (0, 0)
        del ours  # its end would end the process groups of the next one
    assert all(found[format] < most for format, most in MOST_DIVERGENCE_IN_16_BITS.items()), found


@pytest.mark.parametrize("format", ["raw", "int4"])
def test_a_compiled_model_answers_as_stock_vllm_without_compilation(model: Path, format: str) -> None:
    expected = runs.greedy(make_llm(model, "auto"))
    compiled = make_llm(model, f"kvarn_{format}", enforce_eager=False)
    assert compiled.llm_engine.vllm_config.compilation_config.backend == "inductor"
    # The compiler sums in another order.
    most = 10 * RAW_DIVERGENCE if format == "raw" else MOST_DIVERGENCE[format]
    assert runs.largest_divergence(expected, runs.greedy(compiled)) < most
    assert left(compiled) == (0, 0)
