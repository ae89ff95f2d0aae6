"""Forked children, which have no kernel threads: every call that would block on them is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import kvarn_rs

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

NUM_TOKENS = 40
"""Two sealed blocks and a page, of blocks of 16."""

SETUP = """
import os, signal, sys, numpy as np, kvarn_rs
cache = kvarn_rs.PagedKvCache.load(sys.argv[1])
sequence, other = cache.sequences()[0], cache.new_sequence()
rows = np.ones((1, 2, 1, 16), np.float32)
"""
STARTS = {
    "begin_step": "cache.begin_step([cache.new_sequence()], 1).abort()",
    "truncate": "cache.truncate(cache.fork(sequence), 5, unseal=True)",
    "num_threads": "kvarn_rs._core.num_threads()",
}
"""What a parent does first, each of which starts its threads."""

REFUSED = {
    "begin_step": "cache.begin_step([other], 1)",
    "append": "step.append(0, rows, rows)",
    "attend": "step.attend(0, rows, rows, rows)",
    "truncate": "cache.truncate(sequence, 5, unseal=True)",
}
"""What its child cannot do."""

CHILD = """
if os.fork() == 0:
    signal.alarm(30)  # of a child that waits for threads
    try:
        {call}
    except kvarn_rs.UnsupportedError as error:
        os._exit(0 if "forked" in str(error) else 3)
    os._exit(4)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    cache = kvarn_rs.PagedKvCache(num_layers=1, num_kv_heads=2, head_dim=16, block_size=16)
    step = cache.begin_step([cache.new_sequence()], NUM_TOKENS)
    rows = np.ones((1, 2, NUM_TOKENS, 16), np.float32)
    step.append(0, rows, rows)
    step.commit()
    cache.save(tmp_path / "cache")
    return tmp_path / "cache"


def run(saved: Path, code: str) -> None:
    done = subprocess.run([sys.executable, "-c", SETUP + code, saved], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (done.returncode, done.stderr[-600:])


@pytest.mark.parametrize("call", REFUSED)
def test_a_forked_child_is_refused_for_lack_of_kernel_threads(saved, call) -> None:
    run(saved, f"step = cache.begin_step([other], 1){CHILD.format(call=REFUSED[call])}")


@pytest.mark.parametrize("start", STARTS)
def test_every_call_that_starts_threads_records_the_process(saved, start) -> None:
    run(saved, STARTS[start] + CHILD.format(call=REFUSED["begin_step"]))


def test_a_forked_child_may_truncate_within_a_page(saved) -> None:
    call = f"cache.truncate(sequence, {NUM_TOKENS - 1}); os._exit(0)"
    run(saved, STARTS["begin_step"] + CHILD.format(call=call))


def test_a_child_of_a_process_whose_openmp_threads_ran_computes_on_threads_of_its_own() -> None:
    pytest.importorskip("torch")
    code = """
import torch
torch.set_num_threads(2)
(torch.ones(600, 600) @ torch.ones(600, 600)).sum()
if os.fork() == 0:
    signal.alarm(30)
    cache = kvarn_rs.PagedKvCache(num_layers=1, num_kv_heads=2, head_dim=64)
    rows = np.ones((1, 2, 4096, 64), np.float32)
    with cache.begin_step([cache.new_sequence()], 4096) as step:
        step.append(0, rows, rows)
        step.attend(0, rows, rows, rows)
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    run_fresh = "import os, signal, sys, numpy as np, kvarn_rs" + code
    done = subprocess.run([sys.executable, "-c", run_fresh], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr[-600:])
