"""docs/models.md and the script that generates it: its verdicts, its completeness, and the counts in the README."""

import os
import re
import time
from pathlib import Path

import pytest
import torch
import transformers

from kvarn_rs.hf import KvarnCache
from model_classes import probe as probing
from model_classes.configs import classes, tiny_model
from model_classes.outcome import OUTCOMES, judge
from model_classes.pool import run_each
from model_classes.probe import probe
from model_classes.table import parse, render, sentence

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/models.md").read_text(encoding="utf-8")
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
VERSIONS = {"transformers": "0"}


@pytest.mark.parametrize(
    ("model_type", "outcome"),
    [("llama", "fused"), ("lfm2", "mixed"), ("falcon", "fallback"), ("deepseek_v3", "unpaged"), ("xlstm", "untried")],
)
def test_a_class_is_sorted_by_what_it_does(model_type: str, outcome: str) -> None:
    found, notes = judge(probe(model_type, ["greedy"]))
    assert found == outcome, notes


def test_other_logits_than_those_of_dynamic_cache_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgetful(KvarnCache):
        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
            return super().update(key_states, value_states * 1.1, *args, **kwargs)

    monkeypatch.setattr(probing, "KvarnCache", Forgetful)
    outcome, notes = judge(probe("llama", ["greedy"]))
    assert outcome == "wrong"
    assert notes == ["greedy, strict: other tokens"]


def test_a_tiny_model_is_the_same_each_time() -> None:
    first, second = (tiny_model("llama").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_process_that_crashes_raises_or_times_out_is_reported() -> None:
    assert dict(run_each([3], os._exit, 1, 60)) == {3: {"failed": "the process ended with status 3"}}
    assert dict(run_each([60], time.sleep, 1, 1)) == {60: {"failed": "not done after 1 s"}}
    pairs, none = (("a", 1),), "no pairs"
    done = dict(run_each([pairs, none], dict, 2, 60))
    assert done[pairs] == {"a": 1}
    assert "ValueError" in done[none]["failed"]


def test_a_page_says_what_it_was_made_of() -> None:
    built = {"built": {"message": "needs a|b"}}
    records = {"c": {"class": "C", "failed": "not done after 300 s"}} | {n: {"class": n.upper(), **built} for n in "ab"}
    page = render(records, "2026-11-28", VERSIONS)
    assert parse(page) == {OUTCOMES["untried"][0]: {"a": "A", "b": "B"}, OUTCOMES["wrong"][0]: {"c": "C"}}
    assert sentence(page) == "2 not tried, 1 wrong"
    with pytest.raises(ValueError, match="what the heading says"):
        parse(page.replace("(2)", "(3)"))


def test_the_page_lists_every_class_once() -> None:
    made_with = re.search(r"transformers (\S+),", PAGE)
    assert made_with, "the page names its transformers"
    rows = [model_type for section in parse(PAGE).values() for model_type in section]
    assert len(rows) == len(set(rows))
    if made_with[1] != transformers.__version__:
        pytest.skip(f"the page is of transformers {made_with[1]}, installed is {transformers.__version__}")
    assert set(rows) == set(classes())


def test_the_readme_has_the_counts_of_the_page() -> None:
    assert sentence(PAGE) in README
    assert f"{sum(map(len, parse(PAGE).values()))} of them" in README
