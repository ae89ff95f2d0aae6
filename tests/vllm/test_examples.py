"""The examples that need vLLM, as their users run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, **environment: str) -> list[str]:
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-3000:]
    return done.stdout.decode(errors="replace").splitlines()


@pytest.mark.slow
def test_the_offline_example_prints_the_tokens_of_two_prompts() -> None:
    tokens = [line for line in run("vllm_offline.py") if line.startswith("[")]
    assert [len(line.split(",")) for line in tokens[-2:]] == [16, 16]


@pytest.mark.slow
def test_the_server_example_streams_and_prints_metrics() -> None:
    lines = run("vllm_server.py", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert 'kvarn_blocks{engine="0",model_name="served",state="used"} 0.0' in lines
    assert 'kvarn_open_pages{engine="0",model_name="served",state="used"} 0.0' in lines
    (sealed,) = [line for line in lines if line.startswith("kvarn_sealed_blocks_total")]
    assert float(sealed.split()[-1]) >= 4  # of a prompt of 612 bytes
