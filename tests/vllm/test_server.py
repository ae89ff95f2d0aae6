"""vLLM's OpenAI server over HTTP: many streams at once, of which some are cancelled."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: `just test-vllm`")
from server import Server

pytestmark = pytest.mark.slow

NUM_STREAMS = 20
CANCELLED = range(1, NUM_STREAMS, 3)
NUM_TOKENS = 16


def prompt(number: int, length: int) -> list[int]:
    return [3 + (number * 101 + i * (7 + number)) % 500 for i in range(length)]


PROMPTS = [prompt(number, 40 + 13 * number) for number in range(NUM_STREAMS)]


def in_use(server: Server) -> list[float]:
    """vLLM's requests and share of blocks, kvarn's open pages and requests."""
    lines = server.metrics().splitlines()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    found = [float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0] in names]
    assert len(found) == len(names)
    (group,) = server.groups()
    return [*found, group["open_pages"], group["requests"]]


@pytest.fixture(params=["raw", "int4"])
def server(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that answers, with a frozen calibration."""
    # Whole prompts in one step, and none from the cache, so that a request is computed as it is alone.
    options = ["--max-num-batched-tokens", "4096", "--no-enable-prefix-caching"]
    started = Server(model, f"kvarn_{request.param}", tmp_path / "server.log", *options)
    try:
        for number in range(3):  # 2,048 tokens freeze the calibration
            started.stream(prompt(50 + number, 900), 1)
        assert [group["format"] for group in started.groups()] == [request.param]
        yield started
    finally:
        started.stop()


def test_many_streams_are_answered_as_alone_while_others_are_cancelled(server: Server) -> None:
    kept = [number for number in range(NUM_STREAMS) if number not in CANCELLED]
    alone = {number: server.stream(PROMPTS[number], NUM_TOKENS) for number in kept}
    assert {len(tokens) for tokens in alone.values()} == {NUM_TOKENS}

    def ask(number: int) -> list[int]:
        if number in CANCELLED:
            return server.stream(PROMPTS[number], 700, cancel_after=1 + number % 5)
        return server.stream(PROMPTS[number], NUM_TOKENS)

    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        found = list(pool.map(ask, range(NUM_STREAMS)))
    assert {number: found[number] for number in kept} == alone
    assert all(0 < len(found[number]) < 700 for number in CANCELLED)
    # vLLM hears of closed connections later.
    server.wait_until(lambda: not any(in_use(server)))
    assert in_use(server) == [0] * 5
    assert server.stream(PROMPTS[0], NUM_TOKENS) == alone[0]
